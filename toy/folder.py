"""How a folder of pyramids is begun, continued and finished, by `data.py toy` and `data.py build`; their latents.

index.json is written first, with the settings; then a file per image, whole or not at all; in the end index.json again,
with the list of files. A command that was stopped goes on with the files that lack.
in:  settings   out: index.json     read next: toy/make.py"""
import json
import shutil
import signal
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, atomic, fingerprint, load_meta, open_tensors, save_tensors, write_text
from data import POOLED, grid_under, halve, read_index
from toy.index import INDEX

def begin(out, patch, encoder, source, defaults, fit_std):
    """Open or start a set: returns its index, whose "source" all its files are written with.
    in:  source, the settings that decide what is written; defaults of all settings, which count where a set does
         not name one, so that a new setting spoils no older folder; fit_std() -> deviations of the embeddings.
    raises: UserError if the set was made with other settings."""
    path = Path(out) / "index.json"
    if not path.exists():
        std = fit_std()
        values = 1, patch, 0, len(std), encoder, std, source, []
        write_text(path, json.dumps(dict(zip(INDEX, values))))
    index = read_index(out)
    there, now = defaults | index["source"], defaults | source
    for key in sorted(there | now):
        a, b = there.get(key), now.get(key)
        if a != b:
            raise UserError(f"{out} was made with other settings ({key}={a} there, {b} now): give another --out")
    return index

def tile_rows(strips, patch, scales):
    """Cut strips (P,W,3) into tiles of every scale, one strip of each in memory: yields s, row, (n,P,P,3)."""
    row = [0] * scales       # the next one of each scale
    upper = [None] * scales  # a halved strip that waits for the one below it
    for strip in strips:
        for s in range(scales):
            n = strip.shape[1] // patch
            yield s, row[s], strip[:, :n * patch].reshape(patch, n, patch, 3).swapaxes(0, 1)
            row[s] += 1
            half = halve(strip)                                      # (P/2,W/2,3)
            if row[s] % 2:
                upper[s] = half
                break
            strip = np.concatenate([upper[s], half])                 # (P,W/2,3)

def write_slide(path, strips, embed_row, patch, scales, meta, keep=None, extra=None):
    """Write the file of one image, whole or not at all. out: the number of patches per scale.
    in:  strips (P,W,3) uint8; embed_row: tiles (n,P,P,3) -> (n,E); keep(s,i,j,tile) says which patches stay,
         while all embeddings do; meta, plain types; extra, more arrays by name. raises: UserError."""
    e, ij = [], [[] for _ in range(scales)]
    with atomic(path) as tmp:
        # pixels may exceed the memory: they wait in unnamed files beside the output
        pixels = [tempfile.TemporaryFile(dir=path.parent) for _ in range(scales)]
        for s, i, tiles in tile_rows(strips, patch, scales):
            if s == 0:
                e.append(embed_row(tiles).half())                    # (Gw,E)
            for j, tile in enumerate(tiles):
                if keep is None or keep(s, i, j, tile):
                    pixels[s].write(tile.tobytes())
                    ij[s].append((i, j))
        e = torch.stack(e)                                           # (Gh,Gw,E)
        there = [s for s in range(scales) if ij[s]]
        tensors = {f"ij{s}": np.array(ij[s], np.int32) for s in there}
        tensors |= (extra or {}) | {"e": e.numpy()}
        for s in there:
            if s >= POOLED:
                grids = [grid_under(e, s, i, j) for i, j in ij[s]]
                tensors[f"p{s}"] = torch.stack(grids).numpy()        # (n,8,8,E)
        streams = {f"x{s}": ((len(ij[s]), patch, patch, 3), pixels[s]) for s in there}
        write_safetensors(tmp, tensors, streams, meta)
        for file in pixels:
            file.close()
    return [len(places) for places in ij]

@contextmanager
def processes(n):
    """A pool of n processes that hear no Ctrl-C of their own: an interruption of what is done below ends them at once,
    and does not wait for what they are at."""
    # torch's threads survive no fork
    pool = ProcessPoolExecutor(n, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    except KeyboardInterrupt:
        end_children()
        raise
    finally:
        pool.shutdown(cancel_futures=True)

def end_children():
    for process in active_children():
        process.kill()              # a SIGTERM they may have been told to take for something else

def finished(path, scales, meta=None):
    """Read what a file of an earlier run holds. out: patches per scale, its meta data; None if there is no file.
    raises: UserError if it was written with other meta data than `meta`."""
    if not path.exists():
        return None
    with open_tensors(path) as f:
        names = set(f.keys())
        counts = [f.get_slice(f"ij{s}").get_shape()[0] if f"ij{s}" in names else 0 for s in range(scales)]
    there = load_meta(path)
    if there | (meta or {}) != there:
        raise UserError(f"{path} was made from another image, other features or with other settings: remove it")
    return counts, there

def finish(out, index, slides):
    """List the slides in index.json and say what is there. raises: UserError if no patch is left."""
    counts = np.sum([slide["counts"] for slide in slides], 0).tolist()
    if not any(counts):
        raise UserError(f"no patch is left in {out}: lower --background, and remove that folder")
    scales = max(s for s, n in enumerate(counts) if n) + 1
    write_text(Path(out) / "index.json", json.dumps(index | {"scales": scales, "slides": slides}))
    held = sum(slide["split"] == "test" for slide in slides)
    print(f"{out}: {len(slides)} slides, {held} of them held out, patches per scale {counts}")
    for s in range(scales, len(counts)):
        side = index["patch"] << s
        print(f"  scale {s} is dropped: no image holds a patch of {side} x {side} pixels")
    if Path(sys.argv[0]).name == "data.py":                          # training, too, makes the data that it lacks
        print(f"next: python {following(str(out), index)}")

def following(out, index):
    """What one does with a folder of pyramids: train on it, or, of a task, classify its slides."""
    if index["source"].get("command") == "task":
        return f"mil.py extract --kind=descriptor --data={out} --scales=0,2 --out={out}_features"
    preset = "toy" if index["patch"] == 64 else "gpu24"
    return f"train.py {preset}" + ("" if out == "data/toy" else f" --data={out} --out=out/{Path(out).name}")

def map_tensor(path, name):
    """Tensor `name` of a safetensors file that may be larger than memory, None if there is none. Not to be written to.
    safetensors (0.8) maps the whole file for PyTorch so that it could be: Linux grants that only up to memory and swap.
    raises: as open_tensors, and UserError if it is of a type that none of our files hold."""
    with open_tensors(path) as f:
        if name not in f.keys():
            return None
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        place = json.loads(f.read(length))[name]
    if place["dtype"] not in ("F16", "F32", "F64", "I32", "I64", "U8"):
        raise UserError(f"{path}: tensor {name} is of type {place['dtype']}: make this file again")
    kind = np.dtype(f"<{place['dtype'][0].lower()}{int(place['dtype'][1:]) // 8}")
    x = np.memmap(path, kind, "r", 8 + length + place["data_offsets"][0], tuple(place["shape"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # PyTorch knows no read-only tensors
        return torch.from_numpy(x)

def write_safetensors(path, tensors, streams, meta):
    """Write a safetensors file by hand: pixels are copied from file to file, never held in memory.
    in:  tensors {name: array}; streams {name: (shape, open file of bytes)}; meta, plain types."""
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # wide types first: all are aligned
    specs = []
    for name in names:
        x = tensors[name]
        kind = f"{x.dtype.kind.upper()}{8 * x.itemsize}"             # F32, I32, F16 or U8
        specs.append((name, kind, x.shape, x.nbytes))
    for name, (shape, file) in streams.items():
        specs.append((name, "U8", shape, file.tell()))
    header = {"__metadata__": {"json": json.dumps(meta)}}
    end = 0
    for name, kind, shape, size in specs:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))                   # then header, then bytes
        out.write(text)
        for name in names:
            out.write(np.ascontiguousarray(tensors[name]))
        for _, file in streams.values():
            file.seek(0)
            shutil.copyfileobj(file, out, 2 ** 20)

@torch.no_grad()
def encode_latents(folder, vae, dataset, items, ranks):
    """Write folder/NAME.safetensors, unscaled f16 latents of the slides of `dataset`, which ranks share out: those of
    the patches that its first `items` items read. The others are NaN."""
    pyramids, vae_mark = dataset.pyramids, fingerprint(vae)
    every = items > 8 * len(dataset)                                    # so long a training reads nearly all
    numbers = tqdm(range(0 if every else items), "which patches are read", delay=3, disable=ranks.rank > 0)
    read = {dataset.place(k) for k in numbers}                          # (slide, scale, number)
    mine = dataset.slides[ranks.rank::ranks.world]
    own = {*mine}
    total = sum(sum(pyramids.slides[i]["counts"]) for i in mine) if every else sum(i in own for i, _, _ in read)
    bar = tqdm(total=total, desc=f"latents -> {folder}", unit=" patches", disable=ranks.rank > 0)
    for i in mine:
        slide, tensors = pyramids.slides[i], {}
        path, source = folder / slide["file"], (pyramids.folder / slide["file"]).stat()
        rows = [[n for n in range(count) if every or (i, s, n) in read] for s, count in enumerate(slide["counts"])]
        # this VAE, these images, these patches
        mark = f"{vae_mark} {source.st_size} {source.st_mtime_ns} {crc32(str(rows).encode())}"
        if path.exists() and load_meta(path).get("vae") == mark:
            bar.update(sum(map(len, rows)))
            continue
        for s, count in enumerate(slide["counts"]):
            z = torch.full((count, 3, *[pyramids.patch // 4] * 2), torch.nan).half()
            for k in range(0, len(rows[s]), 32):
                part = rows[s][k:k + 32]
                x = torch.stack([pyramids.read(i, s, n)["x"] for n in part])
                with ranks.autocast():
                    z[part] = vae.encode(x.to(ranks.device)).half().cpu()
                bar.update(len(part))
            tensors[f"z{s}"] = z                                        # (count,3,P/4,P/4)
        save_tensors(path, tensors, {"vae": mark})
    bar.close()
    ranks.barrier()
