"""Whose conditions a large image has: embeddings of a held-out slide, of any image, of a file, or invented; and edits.

in:  Conditions, settings of a large image   out: a Grid, one embedding per base tile     read next: large/ranks.py"""
from dataclasses import dataclass
from pathlib import Path

import torch

from cdm import load_conditioner
from common import UserError, load_tensors
from data import Pyramids
from large.windows import Grid
from slides.encoders import embed, load_encoder
from slides.reader import open_slide

@dataclass
class Conditions:
    slide: int = 0             # whose embeddings: the k-th image of the split
    reference: str = ""        # or those of this image, read at the data's resolution if it says its own, or of a
    #                            .safetensors file with e (Gh,Gw,E), as data.py and invert.py write them
    weights: str = ""          # of the encoder that embeds the reference, if they lie elsewhere than for the build
    at: tuple = (0, 0)         # base tile (row, column) of the reference where the image begins
    caption: str = ""          # with --condition=grid: what the image shows, in words
    vector: str = ""           # or as a vector made elsewhere, a .safetensors file with v (V,)
    emphasis: float = 2.0      # guidance of the grid model towards its caption
    spread: float = 0.0        # how much chance may change the amounts a caption states; 1 = as trained
    swap: str = ""             # move what is drawn: "i,j:k,l" exchanges two base tiles, more of them after ";"
    paste: str = ""            # "i,j:k,l" or "i,j:k,l:rows,columns" copies a block over another

# ----- 1. Where embeddings come from -----

def inside(name, cfg, have, need):
    """raises: UserError if the image, (rows, columns) = need from --at on, does not lie in `have` base tiles."""
    if any(a < 0 or a + n > most for a, n, most in zip(cfg.at, need, have)):
        raise UserError(f"{name} has {have[0]} x {have[1]} base tiles, the image needs {need[0]} x {need[1]} from "
                        f"{cfg.at} on: a smaller --size, another --at, or a larger --reference")

def from_file(cfg, model):
    """e (rows,columns,E) of a .safetensors file."""
    e, width = load_tensors(cfg.reference)[0].get("e"), model.summarizer.cfg.embed_dim
    if e is None or e.ndim != 3 or e.shape[2] != width:
        shape = None if e is None else tuple(e.shape)
        raise UserError(f"{cfg.reference} holds e {shape}, the run takes (rows, columns, {width}) of its own encoder")
    folder = Path(cfg.reference).parent
    if (folder / "index.json").exists():  # a file of data.py: its deviations may not be the run's
        e = e.float() * Pyramids(folder, std=model.info.get("std")).rescale
    return e

def from_image(cfg, model, pyramids, need):
    """e (rows,columns,E) of the tiles of an image that are asked for: a slide has a hundred thousand."""
    info, patch, name = model.info, model.info.get("patch", 256), cfg.reference
    if not Path(name).is_file():
        raise UserError(f"--reference={name} does not exist: give an image, or a .safetensors grid")
    if "encoder" not in info:
        raise UserError(f"{cfg.run or 'the model'} knows no encoder: give --reference as a .safetensors file")
    slide, mpp = open_slide(name, white=getattr(pyramids, "white", 0)), None
    if slide.said:
        mpp = info.get("mpp") if pyramids is None else pyramids.mpp
        if pyramids is None and mpp is None:
            print(f"{name} is read at its own resolution, for its run does not say which one it knows: give --data=")
    width, height = slide.grid(mpp)[2]
    if min(width, height) < patch:
        raise UserError(f"{name} is {width} x {height} pixels, a patch is {patch}: take a larger --reference")
    inside(name, cfg, (height // patch, width // patch), need)
    encoder, rows = load_encoder(info["encoder"], info["std"], cfg.weights or info.get("weights")), []
    for row in range(cfg.at[0], cfg.at[0] + need[0]):
        strip = slide.read(cfg.at[1] * patch, row * patch, need[1] * patch, patch, mpp)
        rows.append(embed(encoder, strip.reshape(patch, -1, patch, 3).swapaxes(0, 1)))
    return torch.stack(rows)

def slide_of(cfg, pyramids):
    """The number of the k-th image of the split among all. raises: UserError if there are not as many."""
    mine = [k for k, x in enumerate(pyramids.slides) if x["split"] == cfg.split]
    if not 0 <= cfg.slide < len(mine):
        raise UserError(f"--slide={cfg.slide}: {pyramids.folder} has {len(mine)} {cfg.split!r} images, from 0")
    return mine[cfg.slide]

def from_slide(cfg, pyramids):
    """e (rows,columns,E) of the k-th image of the split, and its name."""
    k = slide_of(cfg, pyramids)
    return pyramids.tensor(k, "e").float() * pyramids.rescale, pyramids.slides[k]["name"]

def load_grid(cfg, model, pyramids, need):
    """The `Grid` of conditions under the image, (rows, columns) = need, edited as --swap and --paste say. pyramids:
    the data of the run; a reference and an invented grid do without (None).
    raises: UserError if there are not as many tiles, or the embeddings have another width or are no numbers."""
    name = cfg.reference
    if cfg.condition != "grid" and (cfg.caption or cfg.vector) or cfg.condition == "grid" and cfg.reference:
        raise UserError(f"--condition={cfg.condition}: --caption and --vector go with grid, --reference does not")
    if cfg.condition == "grid":
        from text.grid import vector_of
        made, name = load_conditioner(cfg.run, "grid", model), "the invented grid"
        v = vector_of(made, cfg.caption, cfg.vector)
        e = made.grid(*need, v, cfg.emphasis, cfg.seed, spread=cfg.spread).movedim(0, -1)
    elif name and not name.endswith(".safetensors"):
        e = from_image(cfg, model, pyramids, need)
    else:
        e, name = (from_file(cfg, model), name) if name else from_slide(cfg, pyramids)
        inside(name, cfg, e.shape[:2], need)
        (i, j), (h, w) = cfg.at, need
        e = e[i:i + h, j:j + w]
    e = e.float().movedim(-1, 0)                                                        # (E,rows,columns)
    if not e.isfinite().all():
        raise UserError(f"{name} holds embeddings that are no finite numbers under the image: take another --at")
    return Grid(edited(e, cfg))

# ----- 2. Edits (L §3.2) -----

def cells(text, most):
    """"1,2:3,4;..." -> [[(1, 2), (3, 4)], ...], up to `most` pairs an item. raises: ValueError."""
    out = []
    for item in text.split(";") if text else ():
        pairs = [tuple(map(int, pair.split(","))) for pair in item.split(":")]
        if not 2 <= len(pairs) <= most or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{item!r} is not row,column:row,column")
        out.append(pairs)
    return out

def edited(e, cfg):
    """Move cells of e (E,Gh,Gw) as --swap, then --paste, say. raises: UserError for cells that do not lie on it."""
    told = f"--swap={cfg.swap} --paste={cfg.paste}"
    try:
        swaps, pastes = cells(cfg.swap, 2), cells(cfg.paste, 3)
    except ValueError as err:
        raise UserError(f"{told}: write row,column:row,column, several of them with ';' between ({err})") from err
    for a, b, *size in swaps + pastes:
        size = size[0] if size else (1, 1)
        for corner in (a, b):
            if min(*corner, *(n - 1 for n in size)) < 0 or any(k + n > m for k, n, m in zip(corner, size, e.shape[1:])):
                raise UserError(f"{told}: cells do not lie inside the {e.shape[1]} x {e.shape[2]} tiles, from 0 on")
    e = e.clone()                                           # for it may be mapped from a file
    for (i, j), (k, l) in swaps:
        e[:, [i, k], [j, l]] = e[:, [k, i], [l, j]]
    for (i, j), (k, l), *size in pastes:
        h, w = size[0] if size else (1, 1)
        e[:, k:k + h, l:l + w] = e[:, i:i + h, j:j + w].clone()                         # the two may overlap
    return e
