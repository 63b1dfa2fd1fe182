"""Whose conditions a large image has: embeddings of a held-out slide, of any image, of a file, or invented; and edits.

A `Grid` holds one embedding per base tile under the image; `--swap` and `--paste` move its cells, which moves what is
drawn there (L §3.2).

in:  settings of sample_joint.py   out: a Grid, as windows ask it for conditions
run: python reference.py     what two edits do to a grid     read next: sample_joint.py
"""
from pathlib import Path
from types import SimpleNamespace

import torch

from cdm import load_conditioner
from common import UserError, cli, load_tensors
from data import Pyramids
from sample_joint import Grid
from slides.encoders import embed, load_encoder
from slides.reader import open_slide


def cells(text, name, n):
    """"1,2:3,4;..." -> [((1,2),(3,4)), ...]"""
    try:
        out = [tuple(tuple(int(v) for v in pair.split(",")) for pair in item.split(":")) for item in text.split(";")]
        assert all(2 <= len(item) <= n and all(len(pair) == 2 for pair in item) for item in out)
        return out
    except (ValueError, AssertionError) as err:
        raise UserError(f"--{name}={text}: write row,column:row,column, several of them with ';' between") from err


def load_grid(cfg, model, pyramids, need):
    """The `Grid` of conditions under the image, (rows, columns) = need, edited as --swap and --paste say. pyramids:
    the data of the run; a reference and an invented grid do without (None).
    raises: UserError if there are not as many tiles, or the embeddings have another width or are no numbers."""
    patch, info = model.info.get("patch", 256), model.info
    (i, j), (h, w) = cfg.at, need

    def inside(rows, columns):
        if i < 0 or j < 0 or i + h > rows or j + w > columns:
            raise UserError(f"{name} has {rows} x {columns} base tiles, the image needs {h} x {w} from {cfg.at} on: "
                            f"take a smaller --size, another --at, or a larger --reference")
    if cfg.condition == "grid":
        from text.grid import vector_of
        made = load_conditioner(cfg.run, "grid", model)
        v = vector_of(made, cfg.caption, cfg.vector)
        e = made.grid(h, w, v, cfg.emphasis, cfg.seed, spread=cfg.spread).movedim(0, -1)
        name, (i, j) = "the invented grid", (0, 0)
    elif cfg.reference.endswith(".safetensors"):
        e, name = load_tensors(cfg.reference)[0].get("e"), cfg.reference
        if e is None or e.ndim != 3 or e.shape[2] != model.summarizer.cfg.embed_dim:
            raise UserError(f"{cfg.reference} holds e {None if e is None else tuple(e.shape)}, the run takes (rows, "
                            f"columns, {model.summarizer.cfg.embed_dim}): embed with {info.get('encoder')!r}")
        folder = Path(cfg.reference).parent
        if (folder / "index.json").exists():  # a file of data.py: its deviations may not be the run's
            rescale = Pyramids(folder, std=info.get("std")).rescale
            e = e if rescale is None else e.float() * rescale
    elif cfg.reference:
        if not Path(cfg.reference).is_file():
            raise UserError(f"--reference={cfg.reference} does not exist: give an image, or a .safetensors grid")
        if "encoder" not in info:
            raise UserError(f"{cfg.run or 'the model'} does not say which encoder it knows: give --reference as a "
                            f"grid, a .safetensors file")
        slide, name = open_slide(cfg.reference), cfg.reference
        mpp = (info.get("mpp") if pyramids is None else pyramids.mpp) if slide.said else None
        if pyramids is None and info.get("mpp") is None and slide.said:
            print(f"{name} is read at its own resolution, for its run does not say which one it knows: give --data=")
        width, height = slide.grid(mpp)[2]
        if min(width, height) < patch:
            raise UserError(f"{name} is {width} x {height} pixels, smaller than a patch of {patch}: take a larger "
                            f"--reference")
        inside(height // patch, width // patch)
        encoder = load_encoder(info["encoder"], info["std"], cfg.weights or info.get("weights"))
        rows = []
        for r in range(i, i + h):  # what the image needs, and no more: a slide has a hundred thousand tiles
            strip = slide.read(j * patch, r * patch, w * patch, patch, mpp)
            rows.append(embed(encoder, strip.reshape(patch, -1, patch, 3).swapaxes(0, 1)))
        e, (i, j) = torch.stack(rows), (0, 0)                                           # (h,w,E)
    else:
        mine = [k for k, x in enumerate(pyramids.slides) if x["split"] == cfg.split]
        if not 0 <= cfg.slide < len(mine):
            raise UserError(f"--slide={cfg.slide}: {pyramids.folder} has {len(mine)} {cfg.split!r} images, from 0")
        e, name = pyramids.tensor(mine[cfg.slide], "e").float(), pyramids.slides[mine[cfg.slide]]["name"]
        e = e if pyramids.rescale is None else e * pyramids.rescale
    inside(*e.shape[:2])
    e = e[i:i + h, j:j + w].float()
    if not e.isfinite().all():
        raise UserError(f"{name} holds embeddings that are no finite numbers under the image: make it again, or take "
                        f"another --at")
    return edit(Grid(e.movedim(-1, 0)), cfg)


def edit(grid, cfg):
    """Move cells of a Grid as --swap, then --paste, say. raises: UserError for cells that do not lie on it."""
    try:
        for a, b in cells(cfg.swap, "swap", 2) if cfg.swap else ():
            grid.swap(a, b)
        for a, b, *size in cells(cfg.paste, "paste", 3) if cfg.paste else ():
            grid.paste(a, b, size[0] if size else (1, 1))
    except UserError as err:
        raise UserError(f"--swap={cfg.swap} --paste={cfg.paste}: {err}") from err
    return grid


def main(argv):
    for swap, paste in (("", ""), ("0,0:2,3", ""), ("", "0,0:1,2:2,2")):
        grid = edit(Grid(torch.arange(12.0).view(1, 3, 4)), SimpleNamespace(swap=swap, paste=paste))
        print(f"swap={swap!r} paste={paste!r}:", *grid.e[0].int().tolist(), sep="\n  ")


if __name__ == "__main__":
    cli(main)
