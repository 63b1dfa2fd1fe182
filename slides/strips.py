"""Images for `data.py build`: which there are, strips of base tiles read and embedded in worker processes, tissue.

in:  a folder, a pattern, a CSV   out: jobs; per job strips of pixels (n*P,W,3) uint8 with their embeddings (n*Gw,E)
run: python strips.py IMAGE [--mpp=0.5] [--patch=256]     which tiles of it show tissue     read next: build.py
"""
import csv
import glob
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from common import UserError, cli, configure
from data import embed
from slides.encoders import load_encoder
from slides.reader import CACHE, MAX_PIXELS, VENDORS, open_slide

TASK = 2**22        # pixels that a worker reads at a time, if that is a whole strip at least
AHEAD = 2**28       # bytes of strips that may wait
LOW, HIGH = 10, 40  # bounds of the saturation that parts tissue from glass


@dataclass(frozen=True)
class Job:
    """One image to read."""
    name: str           # unique; in index.json
    path: Path
    own: float | None   # its mpp, where the CSV says it
    split: str          # train or test
    size: tuple = ()    # (w,h) at the resolution asked for; from `plan` on
    rows: int = 0       # strips to read at a time
    mpp: float | None = None  # resolution asked for
    patch: int = 0
    origin: tuple = (0, 0)  # where in the image that begins, (x,y) at that resolution
    part: tuple = (0, 0, 1, 1)  # column and row, of how many columns and rows that the image is cut into
    note: str = ""      # about its resolution, for people


# ----- 1. Which images -----

def below(root, out):
    """All files below a folder but those of `out`; links are followed, and a loop of links ends."""
    seen, found = {os.path.realpath(out)}, []
    for folder, folders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
        else:
            seen.add(os.path.realpath(folder))
            found += [Path(folder) / f for f in files]
    return found


def from_csv(path):
    """out: {image: (mpp or None, split or "")} of the columns path, mpp, split; paths are relative to the CSV."""
    with open(path, newline="", encoding="utf-8-sig") as f:
        table = list(csv.DictReader(f))
    found = {}
    for n, row in enumerate(table, 2):
        row = {(k or "").strip(): v.strip() for k, v in row.items() if isinstance(v, str)}
        try:
            mpp = float(row["mpp"]) if row.get("mpp") else None
            if not row["path"] or row.get("split", "") not in ("", "train", "test"):
                raise ValueError
        except (KeyError, ValueError) as err:
            raise UserError(f"{path}, line {n}: give a column path, and if need be mpp (a number or nothing) and split "
                            f"(train, test or nothing)") from err
        found[Path(path).parent / row["path"]] = mpp, row.get("split", "")
    return found


def image_jobs(images, out, holdout, cut=(1, 1)):
    """All images, or of each cut[0] columns x cut[1] rows of parts, sorted; those held out are the same ones whatever
    else is there. raises: UserError if none is."""
    root, known = Path(images), {*Image.registered_extensions(), ".svs", *VENDORS}
    if root.suffix.lower() == ".csv" and root.is_file():
        rows = from_csv(root)
    elif root.is_dir():
        files = below(root, out)
        rows = {p: (None, "") for p in files if p.suffix.lower() in known and p.name[0] != "."}
        if rows and len(rows) < len(files):
            print(f"{root}: {len(files) - len(rows)} entries are not images and are passed over")
    elif root.exists():
        rows = {root: (None, "")}
    elif any(c in images for c in "*?["):
        rows = {Path(p): (None, "") for p in glob.glob(images, recursive=True) if not os.path.isdir(p)}
    else:
        raise UserError(f"--images={root} does not exist: give an image, a folder, a pattern in quotes, or a CSV")
    if not rows:
        raise UserError(f"--images={root} holds no image (PNG, JPEG, TIFF, SVS ...): give a folder that does")
    base = root if root.is_dir() else os.path.commonpath([p.absolute().parent for p in rows])
    names = {p: Path(os.path.relpath(p, base)).as_posix() for p in rows}
    if len({n.replace("/", "__") for n in names.values()}) < len(names):
        raise UserError(f"--images={root} gives two images the same name: rename one")
    columns, lines = cut
    pieces = [(x if cut == (1, 1) else f"{x}@{i}-{j}", p, (j, i, *cut)) for p, x in names.items() for i in range(lines)
              for j in range(columns)]
    n = max(1, round(holdout * len(pieces))) if holdout and len(pieces) >= 5 else 0
    held = set(sorted((x for x, _, _ in pieces), key=lambda x: sha256(x.encode()).digest())[:n])
    if any(split for _, split in rows.values()):
        held = {x for x, p, _ in pieces if rows[p][1] == "test"}
    return [Job(x, p, rows[p][0], "test" if x in held else "train", part=part) for x, p, part in sorted(pieces)]


# ----- 2. Reading, in worker processes -----

@lru_cache(1)
def opened(path, own, mpp, max_pixels):
    """The slide of a job, which collects damaged tiles; a process keeps the last one open. raises: UserError."""
    slide = open_slide(path, own, max_pixels, [])
    if slide.mpp is None:
        if slide.scanned and mpp is None:
            raise UserError(f"{path} does not say how large its pixels are: give --mpp, in micrometres (0.25 for a 40x "
                            f"scan, 0.5 for 20x)")
        slide.mpp, slide.said = mpp or 1.0, False                              # the one asked for, or any unit
    level = slide.grid(mpp)[0]
    slide.room = max(CACHE, 6 * level.size[0] * level.tile[1])                 # two rows of tiles serve the next strip
    return slide


def plan(job, mpp, patch, max_pixels=MAX_PIXELS):
    """Look at the header: the job with its size. raises: UserError if it cannot be read, or is too small."""
    slide = opened(job.path, job.own, mpp, max_pixels)
    whole, task = slide.grid(mpp)[2], TASK if slide.levels[0].tags else 4 * TASK  # all workers unpack a whole image
    (x, y), (x1, y1) = ([n * (k + a) // m for n, k, m in zip(whole, job.part, job.part[2:])] for a in (0, 1))
    w, h, whole = x1 - x, y1 - y, tuple(whole)
    if min(w, h) < patch:
        raise UserError(f"{'a part of ' * (whole != (w, h))}{job.path} is {w} x {h} pixels, smaller than a tile: take "
                        f"--patch below {patch}")
    note = f"{mpp or slide.mpp:.4g} micrometres each" if slide.said else (
        f"taken to be {mpp:.4g} micrometres each, which it does not say" if mpp else "of unknown size")
    return replace(job, size=(w, h), rows=max(1, task // (w * patch)), mpp=mpp, patch=patch, origin=(x, y), note=note)


def start(parent):
    """Begin a worker: it ends with its parent, even one that was killed, and would else wait for work forever."""
    torch.set_num_threads(1)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@lru_cache(1)
def cpu_encoder(name, std, weights):
    return load_encoder(name, list(std), weights)


def read_strips(job, encoder, max_pixels, first, rows):
    """Strips first .. first + rows of base tiles.

    in:  encoder, (name, std, weights) to embed with here, on the CPU, or None. out: pixels (rows*P,W,3) uint8; e
    (rows*Gw,E) float32 or None; damaged, [(box in base pixels, why)]; seconds of reading, decoding, embedding.
    """
    P, w, clock = job.patch, job.size[0], time.perf_counter
    slide, begun = opened(job.path, job.own, job.mpp, max_pixels), clock()
    waited = slide.waited
    (x, y), whole = job.origin, slide.grid(job.mpp)[2]
    pixels = np.concatenate([slide.read(x, y + (first + k) * P, w, P, job.mpp) for k in range(rows)])
    waited, e, done = slide.waited - waited, None, clock()
    if encoder:
        tiles = pixels[:, :w // P * P].reshape(rows, P, w // P, P, 3).swapaxes(1, 2)  # (rows,Gw,P,P,3)
        e = torch.cat([embed(cpu_encoder(*encoder), row) for row in tiles]).numpy()
    fx, fy = (a / b for a, b in zip(slide.size, whole))
    damaged = [((x0 / fx - x, y0 / fy - y, x1 / fx - x, y1 / fy - y), why) for (x0, y0, x1, y1), why in slide.damaged]
    damaged = [(box, why) for box, why in damaged if box[3] > first * P and box[1] < (first + rows) * P]
    return pixels, e, damaged, (waited, done - begun - waited, clock() - done)


# ----- 3. Tissue -----

def otsu(values):
    """The level (0-255) that parts uint8 values into two classes with the largest variance between them."""
    n = np.bincount(values.ravel(), minlength=256).astype(float)
    below, sums = np.cumsum(n), np.cumsum(n * np.arange(256))                  # (256,) of values <= each level
    apart = (sums[-1] * below - sums * below[-1])**2 / np.maximum(below * (below[-1] - below), 1)
    return int(apart.argmax())


def tissue_of(job, max_pixels):
    """Where tissue is: what has colour. out: share of each base tile (Gh,Gw) float32, and the mask (h,w) bool.

    Saturation, (max - min) / max over the bands of a small view (8 pixels across a tile, more of small images),
    smoothed, above Otsu's threshold. That is held in bounds, for a slide without glass has but one class.
    """
    slide, P, (w, h) = opened(job.path, job.own, job.mpp, max_pixels), job.patch, job.size
    k = P // 8                                                                 # base pixels per pixel of the mask
    while k > 1 and max(w, h) < 1024 * k:
        k //= 2
    whole = slide.grid(job.mpp)[2]
    mpp = slide.mpp * max(1, slide.size[0] / whole[0] * k)
    x, y, w1, h1 = (round(n * m / k) for n, m, k in zip(job.origin + job.size, 2 * slide.grid(mpp)[2], 2 * whole))
    view = slide.read(x, y, w1, h1, mpp)                                       # (h,w,3) of the mask
    high, low = view.max(-1), view.min(-1)
    saturation = ((high - low) * (255 / np.maximum(high, 1))).astype(np.uint8)
    saturation = np.asarray(Image.fromarray(saturation).filter(ImageFilter.BoxBlur(2)))
    mask = saturation > np.clip(otsu(saturation), LOW, HIGH)
    total = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))                 # of all above and to the left
    x, y = ((np.arange(n // P + 1) * P * m / n).round().astype(int) for n, m in zip((w, h), mask.shape[::-1]))
    sums = np.diff(np.diff(total[np.ix_(y, x)], axis=0), axis=1)
    return (sums / np.maximum(1, np.outer(np.diff(y), np.diff(x)))).astype(np.float32), mask


# ----- 4. A few tasks ahead -----

def ahead(jobs, dropped, encoder, max_pixels, tissue, submit, window):
    """Submit the tasks of all jobs in order, `window` ahead of need: yields (job, future).

    First of each job comes tissue_of, if wanted, then its strips. Jobs named in `dropped`, a set that may grow
    meanwhile, are left.
    """
    waiting = deque()
    for job in jobs:
        gh = job.size[1] // job.patch
        tasks = [partial(tissue_of, job, max_pixels)] if tissue else []
        for k in range(0, gh, job.rows):
            tasks.append(partial(read_strips, job, encoder, max_pixels, k, min(job.rows, gh - k)))
        for task in tasks:
            if job.name in dropped:
                break
            waiting.append((job, submit(task)))
            if len(waiting) > min(window, AHEAD // (3 * job.size[0] * job.patch * job.rows)):
                yield waiting.popleft()
    yield from waiting


@dataclass
class Config:
    file: str = ""            # the slide or image
    mpp: float | None = None  # micrometres per base pixel; None = pixels as they are
    patch: int = 256          # base pixels of a tile


def main(argv):
    cfg = configure(Config, argv, words=("file",), doc=__doc__)
    if not cfg.file:
        return print("to see where tissue is: python strips.py IMAGE")
    job = plan(Job(cfg.file, Path(cfg.file), None, "train"), cfg.mpp, cfg.patch)
    share, _ = tissue_of(job, MAX_PIXELS)
    print(f"{cfg.file}: {job.size[0]} x {job.size[1]} pixels, {job.note}; tenths of tissue in tiles of {cfg.patch}:")
    for row in share:
        print("".join(f"{min(9, int(10 * x))}" for x in row))


if __name__ == "__main__":
    cli(main)
