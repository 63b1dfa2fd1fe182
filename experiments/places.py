"""Does a caption's vector know which tissue lies on the left? What regressions make of sentences, and of their clauses.

    python -m experiments.places data/toy      # a minute, after python -m text.captions toy and twice embed

in:  captions and heldout of toy slides, .tsv and .safetensors
out: a table: the share of the variance of held-out embeddings that is foretold     read next: text/grid.py
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UserError, at_least, cli, configure
from data import Pyramids
from text.captions import read_captions, tell
from text.clauses import Listener
from text.grid import clauses_in, padded, quarters_of

@dataclass
class Config:
    data: str = ""          # toy slides
    captions: str = ""      # folder of the captions; default: the slides' own
    epochs: int = 20        # of the networks, each on one kind alone
    threads: int = 2

def foretold(guess, truth):
    """Share of the variance of truth (n,E,2,2) that a guess explains, in four ways to look at it."""
    looks = {"mean": lambda q: q.mean((2, 3)), "quarters": lambda q: q,
             "left - right": lambda q: (q[..., 0] - q[..., 1]).mean(-1),
             "top - bottom": lambda q: (q[..., 0, :] - q[..., 1, :]).mean(-1)}
    out = {}
    for name, look in looks.items():
        told, seen = look(guess), look(truth)
        left = (told - seen).square().sum()
        all_of_it = (seen - seen.mean(0)).square().sum()
        out[name] = 1 - float(left / all_of_it)
    return out

def ridge(v, aim, damp=1e-2):
    """Least squares from v (n,d) to aim (n,E,2,2). out: a function of other v."""
    v, flat = v.double(), aim.double().flatten(1)
    penalty = damp * len(v) * torch.eye(v.shape[1]).double()
    W = torch.linalg.solve(v.T @ v + penalty, v.T @ flat)               # (d,4E)
    return lambda other: (other.double() @ W).float().unflatten(1, aim.shape[1:])

def places(cfg):
    """out: {row: foretold}, of sentences and of clauses, by least squares and by a network."""
    pyramids, home, told, seen = Pyramids(cfg.data), Path(cfg.captions or cfg.data), [], []
    for name, split in (("captions", "train"), ("heldout", "test")):
        captions = read_captions(home / f"{name}.tsv", pyramids, split)
        told.append(tell([c.text for c in captions], home / f"{name}.safetensors"))     # [(1+n,V)]
        seen.append(quarters_of(captions, pyramids))                                    # (N,E,2,2)
    usual = torch.cat(told[0])                                                          # (all,V)
    v_mean, v_std = usual.mean(0), usual.std(0)
    mean, std = (f(seen[0], (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))  # (1,E,1,1) each
    aim, truth = ((q - mean) / std for q in seen)
    found = {}
    for what, pick in (("sentences", lambda v: v[:1]), ("clauses", clauses_in)):
        known, new = (padded([(pick(v) - v_mean) / v_std for v in some]) for some in told)
        guess = ridge(known[0].sum(1), aim)(new[0].sum(1))
        found[f"{what}, least squares"] = foretold(guess, truth)
        network = Listener(len(v_std), aim.shape[1]).learn(*known, aim, cfg.epochs)
        found[f"{what}, network"] = foretold(network(*new), truth)
    return found

def main(argv):
    cfg = configure(Config, argv, words=("data",), doc=__doc__)
    at_least(cfg, epochs=1, threads=1)
    if not cfg.data:
        raise UserError("say which slides: python -m experiments.places data/toy")
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    found = places(cfg)
    print(f"{'':>24}", *(f"{look:>14}" for look in next(iter(found.values()))))
    for name, row in found.items():
        print(f"{name:>24}", *(f"{value:>14.3f}" for value in row.values()))

if __name__ == "__main__":
    cli(main)
