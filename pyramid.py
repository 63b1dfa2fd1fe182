"""The format on disk: images cut into patches at every scale, one safetensors file per image and an index.json.

A patch at scale s is P x P pixels of the image halved s times and lies on 2^s x 2^s base tiles, whose embeddings are
stored once. Files hold e (Gh,Gw,E) f16; per scale ij{s} (n,2) i32, in tiles of that scale, and x{s} (n,P,P,3) u8;
from s = 4 on p{s} (n,8,8,E) f16, the pooled grids. train.py adds latents z{s} (n,3,P/4,P/4) f16, in its run folder.

in:  strips of pixels (P,W,3)   out: a file, memory-mapped by data.Pyramids
run: python pyramid.py     read next: strips.py
"""
import json
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch

import slide
from common import UserError, atomic, cli, open_tensors, write_text

GRID, POOLED = 8, 4  # Z S8.1: grids over 8x8 are pooled; scale 4 (16x16) is the first, stored pooled as well


# ----- 1. Strips of base tiles -> one file per image -----

def halve(x):
    """Halve the resolution: in (h,w,3) uint8, out (h//2,w//2,3) uint8, (a+b+c+d+2)//4 of each 2x2 block."""
    return slide.halve(x[:x.shape[0] // 2 * 2, :x.shape[1] // 2 * 2])


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
                        f"`python data.py build`")
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


def main(argv):
    patch, scales = 16, 3
    image = np.random.default_rng(0).integers(0, 256, (4 * patch, 6 * patch, 3), dtype=np.uint8)
    print(f"an image of 96 x 64 pixels in patches of {patch}, as it is cut:")
    for s, i, tiles in tile_rows(np.split(image, 4), patch, scales):
        print(f"  scale {s}, row {i}: {len(tiles)} patches, each on {2**s} x {2**s} base tiles")


if __name__ == "__main__":
    cli(main)
