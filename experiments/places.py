"""Does a caption's vector know which tissue lies on the left? What regressions make of sentences, and of their clauses.

    python -m text.captions toy data/toy       # captions.tsv, heldout.tsv
    python -m experiments.places data/toy      # minutes, most of them for the vectors

in:  captions.tsv and heldout.tsv of toy slides; extra: text
out: a table: the share of the variance of held-out embeddings that is foretold     read next: text/grid.py
"""
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import GELU, Dropout, Linear, Module, Sequential
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from common import UserError, at_least, cli, configure
from data import Pyramids
from text.captions import ENCODER, encode_texts, load_vectors, read_captions, save_vectors
from text.grid import embeddings

JOINTS = r"\. |; |, and |, | \| "    # what the wording of captions puts between its clauses

@dataclass
class Config:
    data: str = ""          # toy slides
    captions: str = ""      # folder of captions.tsv and heldout.tsv; default: the slides' own
    epochs: int = 20        # of the network
    threads: int = 2

# ----- 1. What is said, and what is seen -----

def clauses(text):
    """"Mostly fat; no tumour." -> ["mostly fat", "no tumour"]."""
    parts = (part.strip().rstrip(".").lower() for part in re.split(JOINTS, text))
    return [part for part in parts if part]

def vectors_of(texts, file):
    """Their vectors (n,d), each number of deviation 1; kept in a file."""
    if not file.exists():
        different = list(dict.fromkeys(texts))
        save_vectors(file, different, encode_texts(different), ENCODER)
    v, _ = load_vectors(file, texts, ENCODER)
    return (v - v.mean(0)) / v.std(0)

def quarters(captions, pyramids):
    """Mean embeddings of the four quarters of the region that each caption describes, (n,E,2,2)."""
    def seen(slide, block):
        e = embeddings(pyramids, slide, block).movedim(-1, 0)           # (E,rows,columns)
        return adaptive_avg_pool2d(e, 2)                                # (E,2,2)
    found = {place: seen(*place) for place in {(c.slide, c.block) for c in captions}}
    return torch.stack([found[c.slide, c.block] for c in captions])

def foretold(guess, truth):
    """Share of the variance of truth (n,E,2,2) that a guess explains, in four ways to look at it."""
    looks = {"mean": lambda q: q.mean((2, 3)), "quarters": lambda q: q,
             "left - right": lambda q: (q[..., 0] - q[..., 1]).mean(-1),
             "top - bottom": lambda q: (q[..., 0, :] - q[..., 1, :]).mean(-1)}
    out = {}
    for name, look in looks.items():
        a, b = look(guess), look(truth)
        out[name] = 1 - float((a - b).square().sum() / (b - b.mean(0)).square().sum())
    return out

# ----- 2. From one to the other -----

def ridge(v, aim, damp=1e-2):
    """Least squares from v (n,d) to aim (n,E,2,2). out: a function of other v."""
    v, flat = v.double(), aim.double().flatten(1)
    W = torch.linalg.solve(v.T @ v + damp * len(v) * torch.eye(v.shape[1]).double(), v.T @ flat)
    return lambda other: (other.double() @ W).float().view(-1, *aim.shape[1:])

class SumOfClauses(Module):
    """What each clause says alone, added up; then quarters from the sum."""

    def __init__(self, d, out, width=256):
        super().__init__()
        self.out = out
        self.clause = Sequential(Linear(d, width), GELU(), Dropout(0.2), Linear(width, width))
        self.total = Sequential(GELU(), Dropout(0.2), Linear(width, out.numel()))

    def forward(self, v, there):
        """in: clauses v (B,n,d), and which of them there are (B,n). out: (B,E,2,2)."""
        said = (self.clause(v) * there[..., None]).sum(1)               # (B,width)
        return self.total(said).view(-1, *self.out)

def network(v, rows, aim, epochs):
    """Train a SumOfClauses. in: v (m,d), vectors of clauses, the last of none; rows (n,most) of each caption in it; aim
    (n,E,2,2). out: a function of other rows."""
    torch.manual_seed(0)
    net = SumOfClauses(v.shape[1], aim.shape[1:])

    def guess(rows):
        return net(v[rows], rows < len(v) - 1)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    for _ in tqdm(range(epochs), "network"):
        for pick in torch.randperm(len(rows)).split(256):
            loss = (guess(rows[pick]) - aim[pick]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval().requires_grad_(False)
    return guess

# ----- 3. The table -----

def places(cfg):
    """out: {row: foretold}, of sentences and of clauses, by least squares and by a network."""
    pyramids, home = Pyramids(cfg.data), Path(cfg.captions or cfg.data)
    captions = {name: read_captions(home / f"{name}.tsv", pyramids, split)
                for name, split in (("captions", "train"), ("heldout", "test"))}
    aim, truth = (quarters(some, pyramids) for some in captions.values())
    mean, std = aim.mean((0, 2, 3), keepdim=True), aim.std((0, 2, 3), keepdim=True)
    aim, truth = (aim - mean) / std, (truth - mean) / std
    found = {}
    for what, split in (("sentences", lambda text: [text]), ("clauses", clauses)):
        said = [split(c.text) for some in captions.values() for c in some]
        every = sorted({part for parts in said for part in parts})
        v = vectors_of(every, home / f"places_{what}.safetensors")
        v = torch.cat([v, torch.zeros(1, v.shape[1])])                  # the last stands for none
        number, most = {part: k for k, part in enumerate(every)}, max(map(len, said))
        rows = torch.full((len(said), most), len(every))
        for row, parts in zip(rows, said):
            row[:len(parts)] = torch.tensor([number[part] for part in parts])
        known, new = rows[:len(aim)], rows[len(aim):]
        found[f"{what}, least squares"] = foretold(ridge(v[known].sum(1), aim)(v[new].sum(1)), truth)
        found[f"{what}, network"] = foretold(network(v, known, aim, cfg.epochs)(new), truth)
    return found

def main(argv):
    cfg = configure(Config, argv, words=("data",), doc=__doc__)
    at_least(cfg, epochs=1, threads=1)
    if not cfg.data:
        raise UserError("say which slides: python -m experiments.places data/toy")
    torch.set_num_threads(cfg.threads)
    found = places(cfg)
    print(f"{'':>24}", *(f"{look:>14}" for look in next(iter(found.values()))))
    for name, row in found.items():
        print(f"{name:>24}", *(f"{value:>14.3f}" for value in row.values()))

if __name__ == "__main__":
    cli(main, stopped="vectors that are made are kept, and the same command goes on with the others")
