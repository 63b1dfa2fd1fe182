"""Multi-scale patches: toy slides or your own images (build.py) -> pyramids on disk -> the items a model trains on.

A patch at scale s is P x P pixels of the image halved s times, so it covers 2^s x 2^s base tiles, and its condition is
the grid of their embeddings (Z §3.1). One safetensors file per image holds patches and embeddings, memory-mapped.

in:  images of any size   out: items with x (3,P,P) in [-1,1] and/or z (3,P/4,P/4), tokens (64,E), mask (64,), s
run: python data.py toy                                      synthetic tissue, about two minutes
     python data.py build --images=FOLDER --out=data/mine    your own slides, aerial tiles, photos
read next: cdm.py, or train.py
"""
import json
import os
import random
import shutil
import struct
import tempfile
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from common import UserError, atomic, cli, open_tensors, write_text
from summarizer import pack_grid, standardize

GRID, POOLED = 8, 4  # Z S8.1: grids over 8x8 are pooled; scale 4 (16x16) is the first, stored pooled as well


# ----- 1. Strips of base tiles -> one file per image -----

def halve(x):
    """Halve the resolution. in: (h,w,3) uint8. out: (h//2,w//2,3) uint8, (a+b+c+d+2)//4 of each 2x2 block."""
    height, width = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2                   # an odd last row or column is left out
    x = x[:height, :width].astype(np.uint16)
    total = x[0::2, 0::2] + x[0::2, 1::2] + x[1::2, 0::2] + x[1::2, 1::2]      # (h/2,w/2,3)
    return ((total + 2) // 4).astype(np.uint8)


def tile_rows(strips, patch, scales):
    """Turn strips (P,W,3) of the image into rows of tiles of every scale: yields (s, row, tiles (n,P,P,3)).

    Two strips of one scale halve into one of the next, so a few strips are all that stands in memory.
    """
    waiting, row = [None] * scales, [0] * scales

    def push(s, strip):
        n = strip.shape[1] // patch
        yield s, row[s], strip[:, :n * patch].reshape(patch, n, patch, 3).swapaxes(0, 1)
        row[s] += 1
        if s + 1 < scales:
            small = halve(strip)                                               # (P/2,W/2,3)
            if waiting[s + 1] is None:
                waiting[s + 1] = small
            else:
                both, waiting[s + 1] = np.concatenate([waiting[s + 1], small]), None
                yield from push(s + 1, both)
    for strip in strips:
        yield from push(0, strip)


@torch.no_grad()
def embed(encoder, tiles, device="cpu"):
    """in: tiles (n,P,P,3) uint8. out: e (n,E) float32."""
    tiles = torch.from_numpy(np.array(tiles))  # a copy: Pillow's pixels are read-only
    n = min(max(2 ** 18 // (tiles.shape[1] * tiles.shape[2]), 1), 16) if str(device) == "cpu" else 64
    batches = tiles.split(n)  # on a CPU what its cache holds, 4 tiles of 256 pixels: faster, and smaller
    return torch.cat([encoder(b.to(device).movedim(-1, 1).float() / 255).float().cpu() for b in batches])


def block(e, s, i, j):
    """The embeddings (2^s,2^s,E) under patch (i,j) of scale s."""
    return e[i << s:(i + 1) << s, j << s:(j + 1) << s]


def pool(grid):
    """in: (2^s,2^s,E) f16, s >= 4. out: block means (8,8,E) f16, taken in float32."""
    k = grid.shape[0] // GRID
    return grid.float().unflatten(1, (GRID, k)).unflatten(0, (GRID, k)).mean((1, 3)).half()


def write_slide(path, strips, embed_row, patch, scales, meta, keep=None, extra=None):
    """Write the file of one image and return its patches per scale.

    in:  strips (P,W,3) uint8; embed_row turns tiles (n,P,P,3) into (n,E); keep(s,i,j,tile) -> bool chooses patches.
    Embeddings all stay. Pixels wait in unnamed files beside the output, for they may exceed the memory.
    """
    e, ij = [], [[] for _ in range(scales)]
    with atomic(path) as tmp:
        raw = [tempfile.TemporaryFile(dir=path.parent) for _ in range(scales)]
        for s, i, tiles in tile_rows(strips, patch, scales):
            if s == 0:
                e.append(embed_row(tiles).half())                              # (Gw,E)
            for j, tile in enumerate(tiles):
                if keep is None or keep(s, i, j, tile):
                    raw[s].write(np.ascontiguousarray(tile))
                    ij[s].append((i, j))
        e = torch.stack(e)                                                     # (Gh,Gw,E) f16
        tensors = {f"ij{s}": np.array(x, np.int32) for s, x in enumerate(ij) if x} | (extra or {}) | {"e": e.numpy()}
        for s in range(POOLED, scales):
            if ij[s]:
                tensors[f"p{s}"] = torch.stack([pool(block(e, s, i, j)) for i, j in ij[s]]).numpy()  # (n,8,8,E)
        join(tmp, tensors, {f"x{s}": ((len(x), patch, patch, 3), raw[s]) for s, x in enumerate(ij) if x}, meta)
        for f in raw:
            f.close()
    return [len(x) for x in ij]


def join(path, tensors, raw, meta):
    """Write a safetensors file by hand: `raw` {name: (shape, open file of bytes)} is copied, never held in memory."""
    kinds = {"uint8": "U8", "int32": "I32", "float16": "F16", "float32": "F32"}
    order = sorted(tensors, key=lambda k: -tensors[k].dtype.itemsize)          # widest first keeps all of them aligned
    specs = [(k, kinds[str(tensors[k].dtype)], tensors[k].shape, tensors[k].nbytes) for k in order]
    specs += [(k, "U8", shape, f.tell()) for k, (shape, f) in raw.items()]
    header, at = {"__metadata__": {"json": json.dumps(meta)}}, 0
    for name, kind, shape, size in specs:
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            out.write(np.ascontiguousarray(tensors[name]))
        for _, f in raw.values():
            f.seek(0)
            shutil.copyfileobj(f, out, 1 << 20)


def described(path, scales):
    """out: patches per scale of a finished file, and the meta data it was written with."""
    with open_tensors(path) as f:
        names = set(f.keys())
        counts = [f.get_slice(f"ij{s}").get_shape()[0] if f"ij{s}" in names else 0 for s in range(scales)]
        return counts, json.loads((f.metadata() or {}).get("json", "{}"))


def finished(path, scales, meta):
    """Patches per scale of a file from an earlier run, None if there is none. raises: UserError if it differs."""
    if not path.exists():
        return None
    counts, there = described(path, scales)
    if {k: there.get(k) for k in meta} != meta:
        raise UserError(f"{path} was made from another image or with other settings: remove it, or give another --out")
    return counts


# ----- 2. The index of a folder -----

def read_index(folder):
    """Read index.json. raises: UserError if it is missing or not ours."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no index.json: make the data with `python data.py toy --out={folder}` or "
                        f"`python data.py build` (official samples can be learnt from and nothing else)")
    try:
        index = json.loads(path.read_text())
    except ValueError as err:
        raise UserError(f"{path} is not valid JSON ({err}): make the data again") from err
    keys = ("patch", "scales", "embed_dim", "encoder", "std", "source", "slides")
    if not isinstance(index, dict) or index.get("format") != 1 or any(k not in index for k in keys):
        raise UserError(f"{path} is not an index of this program (format 1): give a folder that data.py wrote")
    return index


def begin(out, patch, encoder, source, fit_std):
    """Open or start a set: returns its index, with deviations; slides are listed in the end, by `finish`."""
    if (Path(out) / "index.json").exists():
        index = read_index(out)
        there = index["source"]
        if there != source:
            odd = ", ".join(f"{k}={there.get(k)} there, {source.get(k)} now"
                            for k in sorted(there.keys() | source.keys()) if there.get(k) != source.get(k))
            raise UserError(f"{out} holds a set made with other settings ({odd}): give another --out, or remove it")
        return index
    std = fit_std()
    index = {"format": 1, "patch": patch, "scales": 0, "embed_dim": len(std), "encoder": encoder, "std": std,
             "source": source, "slides": []}
    write_text(Path(out) / "index.json", json.dumps(index))
    return index


def finish(out, index, slides):
    """List the slides in index.json and say what is there."""
    counts = [sum(n) for n in zip(*(x["counts"] for x in slides))]
    if not any(counts):
        raise UserError(f"no patch is left in {out}: lower --background, and remove that folder")
    index["scales"], index["slides"] = max(s for s, n in enumerate(counts) if n) + 1, slides
    write_text(Path(out) / "index.json", json.dumps(index))
    size = sum((Path(out) / x["file"]).stat().st_size for x in slides)
    held = sum(x["split"] == "test" for x in slides)
    print(f"{out}: {len(slides)} slides, {held} of them held out, {size / 1e6:.0f} MB, patches per scale {counts}")
    for s in range(index["scales"], len(counts)):
        print(f"  scale {s} is dropped: no image holds a patch of {index['patch'] << s} x {index['patch'] << s} pixels")


# ----- 2. Reading -----

def open_data(folder, latents=None, std=None, latent_scale=1.0):
    """Open what a model trains on: a folder that data.py wrote, or one of the official samples (slides.official).

    out: Pyramids or Samples; both give items, and `official` tells them apart. raises: UserError if it is neither.
    """
    if not (Path(folder) / "index.json").is_file():
        from slides.official import Samples, layout_of
        if layout_of(folder):
            return Samples(folder, latent_scale)
    return Pyramids(folder, latents, std, latent_scale)


class Pyramids:
    """A folder that data.py wrote: which slides there are, and single patches from memory-mapped files.

    in:  latents, a folder of files of the same names with z{s} (train.py makes it), or None if they stand in the same
    files; std, the deviations a model was trained with, where this set was built with its own; latent_scale, by which
    latents are multiplied as they are read, and nowhere else.
    Attributes: folder, patch, scales, embed_dim, encoder, weights, std, slides. raises: UserError if missing or
    foreign.
    """
    CACHE = 8192  # mapped tensors per process, far below the system's limit on mappings

    official = False  # slides.official.Samples says True

    def __init__(self, folder, latents=None, std=None, latent_scale=1.0):
        index = read_index(folder)
        if not index["slides"]:
            raise UserError(f"{folder} is unfinished: run the command that makes it again, it goes on where it stopped")
        self.folder, self.latents, self.latent_scale = Path(folder), Path(latents or folder), latent_scale
        for key in ("patch", "scales", "embed_dim", "encoder", "std", "slides"):
            setattr(self, key, index[key])
        self.weights = index["source"].get("weights")  # the file of a published encoder, where it lay then
        self.mpp = index["source"].get("mpp")          # micrometres per pixel of base tiles; None: not known
        self.rescale = torch.ones(self.embed_dim)      # what embeddings are multiplied by (E,): 1 without `std`
        if std is not None and list(std) != self.std:
            self.rescale, self.std = torch.tensor(self.std) / torch.tensor(std), list(std)
        self._mapped, self._pid = {}, None

    def __getstate__(self):
        return self.__dict__ | {"_mapped": {}, "_pid": None}  # maps do not travel to spawned workers

    def names(self, split):
        return [x["name"] for x in self.slides if x["split"] == split]

    def count(self, split, s):
        return sum(x["counts"][s] for x in self.slides if x["split"] == split)

    def tensor(self, k, name):
        """Tensor `name` of slide k, memory-mapped. raises: UserError if it is missing or of another shape."""
        if self._pid != os.getpid():  # a forked worker opens files of its own
            self._mapped, self._pid = {}, os.getpid()
        if (k, name) not in self._mapped:
            slide, P = self.slides[k], self.patch
            path = (self.latents if name[0] == "z" else self.folder) / slide["file"]
            n = slide["counts"][int(name[-1])] if name != "e" else 0
            want = {"x": (n, P, P, 3), "z": (n, 3, P // 4, P // 4), "p": (n, GRID, GRID, self.embed_dim), "i": (n, 2),
                    "e": (slide["size"][0] // P, slide["size"][1] // P, self.embed_dim)}[name[0]]
            with open_tensors(path) as f:
                got = f.get_tensor(name) if name in f.keys() else None
            if got is None or got.shape != want:
                raise UserError(f"{path}: tensor {name} is {'missing' if got is None else tuple(got.shape)}, expected "
                                f"{want}: make this file again{' with train.py' if name[0] == 'z' else ''}")
            if len(self._mapped) >= self.CACHE:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[k, name] = got
        return self._mapped[k, name]

    def read(self, k, s, n, want=("x",)):
        """Read patch n of scale s of slide k.

        out: ij (2,) int64 and what is wanted of x (3,P,P) float32 in [-1,1], z (3,P/4,P/4) float32, e (E,G,G) float32,
        not standardised. raises: UserError naming file and patch if it is not there.
        """
        slide = self.slides[k]
        if not 0 <= s < len(slide["counts"]) or not 0 <= n < slide["counts"][s]:
            raise UserError(f"{self.folder / slide['file']} has no patch {n} at scale {s}: it holds {slide['counts']}")
        out = {"ij": self.tensor(k, f"ij{s}")[n].long()}
        if "x" in want:
            out["x"] = self.tensor(k, f"x{s}")[n].permute(2, 0, 1).float().div_(127.5).sub_(1)
        if "z" in want:
            out["z"] = self.tensor(k, f"z{s}")[n].float() * self.latent_scale
        if "e" in want:
            e = self.tensor(k, f"p{s}")[n] if s >= POOLED else block(self.tensor(k, "e"), s, *out["ij"].tolist())
            out["e"] = (e.float() * self.rescale).permute(2, 0, 1)             # (E,G,G)
        return out

    def item(self, k, s, n, want):
        """What a model takes: `read`, plus tokens (64,E) float32, mask (64,) bool, s and slide int64."""
        out = self.read(k, s, n, {*want, "e"})
        out["tokens"], out["mask"] = pack_grid(standardize(out["e"] if "e" in want else out.pop("e")))
        return out | {"s": s, "slide": k}


class PatchDataset(Dataset):
    """Random patches: a scale uniformly (or by `shares`), then a patch of that scale uniformly over all slides.

    Item k is a pure function of (seed, k), for any k >= 0, whatever process reads it: resuming is exact and ranks never
    overlap. in: want, any of "x", "z", "e" ("e" only with only_scale, else its shape varies); shares, one weight per
    scale; length, what len() says, by default the number of patches. raises: UserError if nothing fits.
    """

    def __init__(self, pyramids, split="train", seed=0, want=("z",), only_scale=None, shares=None, length=None):
        self.pyramids, self.seed, self.want = pyramids, seed, tuple(want)
        self.slides = [k for k, x in enumerate(pyramids.slides) if x["split"] == split]
        scales = range(pyramids.scales)
        self.ends = [list(accumulate(pyramids.slides[k]["counts"][s] for k in self.slides)) or [0] for s in scales]
        there = [float(ends[-1] > 0) for ends in self.ends]
        if only_scale is not None:
            shares = [float(s == only_scale) for s in scales]
        shares = there if shares is None else list(shares)
        if len(shares) != len(there) or not sum(shares) or any(w < 0 or w and not n for w, n in zip(shares, there)):
            raise UserError(f"scale shares {shares} do not fit {pyramids.folder}, whose {split!r} split holds "
                            f"{[ends[-1] for ends in self.ends]} patches per scale: use only scales that have some")
        self.shares, self.length = [w / sum(shares) for w in shares], length or sum(ends[-1] for ends in self.ends)

    def __len__(self):
        return self.length

    def __getitem__(self, k):
        rng = random.Random(f"{self.seed} {k}")
        s = rng.choices(range(len(self.shares)), self.shares)[0]
        n = rng.randrange(self.ends[s][-1])
        at = bisect_right(self.ends[s], n)
        return self.pyramids.item(self.slides[at], s, n - (self.ends[s][at - 1] if at else 0), self.want)


def fixed_batch(pyramids, split, s, n, want=("x",), seed=0):
    """The same n distinct patches of scale s every time, over as many slides as possible; all if n is larger.

    out: a collated batch, fields as `Pyramids.item`. raises: UserError if there is none.
    """
    order = []
    for k, slide in enumerate(pyramids.slides):
        if slide["split"] == split and s < pyramids.scales:
            rng = random.Random(f"{seed} {s} {k}")
            mine = rng.sample(range(slide["counts"][s]), min(n, slide["counts"][s]))
            order += [(turn, rng.random(), k, i) for turn, i in enumerate(mine)]
    if not order:
        raise UserError(f"{pyramids.folder} has no {split!r} patch at scale {s}; its scales go from 0 to "
                        f"{pyramids.scales - 1}")
    return default_collate([pyramids.item(k, s, i, want) for _, _, k, i in sorted(order)[:n]])


def main(argv):
    from slides.build import build
    from toy.make import toy
    commands = {"toy": toy, "build": build}
    if argv and argv[0] in ("--help", "-h"):
        return print(__doc__ + "\nsettings: python data.py toy --help, python data.py build --help")
    if not argv or argv[0] not in commands:
        raise UserError(f"got {argv[0] if argv else 'no command'!r}: write python data.py toy, or python data.py build "
                        f"--images=DIR --out=DIR")
    commands[argv[0]](argv[1:])


if __name__ == "__main__":
    cli(main)
