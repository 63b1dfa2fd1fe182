"""Images for `data.py build`: which there are, strips of base tiles read and embedded by workers, tissue.

in:  a folder, a pattern, a CSV   out: jobs; per job strips of pixels (n*P,W,3) uint8 with their embeddings (n*Gw,E)
run: python data.py build     read next: slides/build.py
"""
import glob
import os
import re
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from itertools import product
from math import ceil
from multiprocessing import get_context, parent_process
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image, ImageFilter

from common import UserError
from slides.encoders import embed, load_encoder
from slides.names import few, file_of, files_of, match, name_of, read_table
from slides.official import read_features
from slides.pictures import FORMATS
from slides.reader import CACHE, MAX_PIXELS, VENDORS, open_slide
from slides.tiff import JP2K, JP2K_YCBCR, number
from toy.folder import end_children

TIFFS = {".svs", ".qptiff", ".btf", ".tf2", ".tf8"}  # which Pillow does not know for such
cached_encoder = lru_cache(1)(load_encoder)
OPEN, MINE, LOCK = WeakValueDictionary(), threading.local(), threading.Lock()
TASK = 2**22        # pixels that a worker process reads at a time, if that is a whole strip at least
AHEAD = 2**28       # bytes of strips that may wait
NUMBER = r"((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)?"  # or nothing
ALIKE = 1.1         # pixels that differ by less are of one magnification
LOW, HIGH = 10, 40  # bounds of the saturation that parts tissue from glass

@dataclass(frozen=True)
class Job:
    """One image to read, or a part of one."""
    name: str                   # unique; in index.json
    path: Path
    own: float | None = None    # its mpp, where the CSV says it
    split: str = "train"
    part: tuple = (0, 0, 1, 1)  # column and row, of how many columns and rows that the image is cut into
    mpp: float | None = None    # from here on as `plan` finds it: the resolution asked for
    patch: int = 0
    max_pixels: int = MAX_PIXELS
    white: int | None = None    # the value shown as white: the one asked for, or that of its pixels, None of 8 bits
    origin: tuple = (0, 0)      # (x,y) where in the image it begins, and its size (w,h), at that resolution
    size: tuple = ()
    rows: int = 0               # strips to read at a time
    note: str = ""              # about its resolution, for people
    features: Path | None = None  # the file of its embeddings, made elsewhere
    exact: bool = False         # mpp is that of these, to the last digit
    alone: bool = False         # its pixels are decoded by one thread at a time

# ----- 1. Which images -----

def below(root, out):
    """All files below a folder but those of `out`; links are followed, and a loop of links ends."""
    seen, found = {os.path.realpath(out)}, []
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            found += [Path(folder) / f for f in files]
    return found

def from_csv(path):
    """out: {image: (mpp or None, split or "")} of the columns path, mpp, split; paths are relative to the CSV."""
    found = {}
    for n, row in enumerate(read_table(path, ("path",)), 2):
        name, mpp, split = (row.get(key, "") for key in ("path", "mpp", "split"))
        if not name or split not in ("", "train", "test") or not re.fullmatch(NUMBER, mpp):
            raise UserError(f"{path}, line {n}: give path, and if need be mpp, a number, and split, train or test")
        if path.parent / name in found:
            raise UserError(f"{path}, line {n}: {name} is there twice: give it once")
        found[path.parent / name] = float(mpp) if mpp else None, split
    return found

def listed(images, out):
    """out: {image: (mpp or None, split or "")} of all there are. raises: UserError if there is none."""
    root = Path(images)
    if root.suffix.lower() == ".csv" and root.is_file():
        rows = from_csv(root)
    elif root.is_dir():
        pictures = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
        known = pictures | VENDORS | TIFFS
        files = below(root, out)
        rows = {p: (None, "") for p in files if p.suffix.lower() in known and p.name[0] != "."}
        others = sorted(p.name for p in files if p not in rows)
        if rows and others:
            print(f"{root}: {len(others)} entries are not images and are passed over: {few(others)}")
    elif root.exists():
        rows = {root: (None, "")}
    elif any(c in images for c in "*?["):
        rows = {Path(p): (None, "") for p in glob.glob(images, recursive=True) if not os.path.isdir(p)}
    else:
        raise UserError(f"--images={root} does not exist: give an image, a folder, a pattern in quotes, or a CSV")
    if not rows:
        raise UserError(f"--images={root} holds no image (PNG, JPEG, TIFF, SVS ...): give a folder that does")
    return rows

def image_jobs(images, out, holdout, cut=(1, 1)):
    """A job for each image, or for each of its cut[0] columns x cut[1] rows of parts, sorted by name.
    Those held out are the same ones whatever else is there. raises: UserError as `listed`, or for equal names."""
    rows, jobs = listed(images, out), []
    base = images if Path(images).is_dir() else os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in rows])
    for path, (mpp, split) in rows.items():
        name = Path(os.path.relpath(path, base)).as_posix()
        for j, i in product(range(cut[0]), range(cut[1])):
            jobs.append(Job(name if cut == (1, 1) else f"{name}@{i}-{j}", path, mpp, split, (j, i, *cut)))
    twice = [name for name, n in Counter(file_of(job.name) for job in jobs).items() if n > 1]
    if twice:
        raise UserError(f"--images={images} gives two images the same name, {few(twice)}: rename one")
    held = {job.name for job in jobs if job.split == "test"}
    if not any(job.split for job in jobs):
        n = max(1, round(holdout * len(jobs))) if holdout and len(jobs) >= 5 else 0
        held = sorted([job.name for job in jobs], key=lambda name: sha256(name.encode()).digest())[:n]
    jobs = [replace(job, split="test" if job.name in held else "train") for job in jobs]
    return sorted(jobs, key=lambda job: job.name)

# ----- 2. Reading, by workers -----

def opened(job):
    """The slide of a job, the same one for all threads, each of which keeps its last one open. raises: UserError."""
    with LOCK:
        MINE.slide = OPEN.get(job) or OPEN.setdefault(job, opened_anew(job))
        return MINE.slide

def opened_anew(job):
    """The slide of a job, which collects damaged tiles. raises: UserError."""
    slide = open_slide(job.path, job.own, job.max_pixels, [], job.white)
    if slide.mpp is None:
        if slide.scanned and job.mpp is None:
            slide.grid(1.0)                                                    # raises: it does not say its own
        slide.mpp, slide.said = job.mpp or 1.0, False                          # the one asked for, or any unit
    slide.near = 1 + 1e-9 if job.exact else slide.near
    level = slide.grid(job.mpp)[0]
    slide.keep_tiles(max(CACHE, 6 * level.size[0] * level.tile[1]))            # two rows of tiles serve the next strip
    return slide

def plan(job, mpp, patch, max_pixels=MAX_PIXELS):
    """Look at the header: the job with its size. raises: UserError if it cannot be read, or is too small."""
    job = replace(job, mpp=mpp, patch=patch, max_pixels=max_pixels)
    slide = opened(job)
    (width, height), (column, row, columns, rows) = slide.grid(mpp)[2], job.part
    x, y = width * column // columns, height * row // rows
    w, h = width * (column + 1) // columns - x, height * (row + 1) // rows - y
    if min(w, h) < patch:
        what = job.path if columns == rows == 1 else f"a part of {job.path}"
        raise UserError(f"{what} is {w} x {h} pixels, smaller than a tile: take --patch below {patch}")
    note = f"{mpp or slide.mpp:.4g} micrometres each"
    if not slide.said:
        note = f"taken to be {note}, which it does not say" if mpp else "of unknown size"
    note += f", {slide.white} shown as white" if slide.white else ""
    tags = slide.levels[0].tags
    task = TASK if tags else 4 * TASK                                          # all processes unpack a whole image
    alone = not tags or number(tags, "compression") in (JP2K_YCBCR, *JP2K)     # Pillow 13 lets no other thread work
    job = replace(job, white=slide.white, origin=(x, y), size=(w, h), note=note, alone=alone)
    return replace(job, rows=max(1, task // (w * patch)))

def read_strips(job, encoder, first, rows):
    """Strips first .. first + rows of base tiles.
    in:  encoder, (name, std, weights, "cpu") to embed with here, or None. out: pixels (rows*P,W,3) uint8; e
    (rows*Gw,E) float32 or None; {(i,j): why} of damaged base tiles."""
    P, (w, _), (x, y) = job.patch, job.size, job.origin
    slide, e = opened(job), None
    pixels = np.concatenate([slide.read(x, y + (first + k) * P, w, P, job.mpp) for k in range(rows)])
    if encoder:
        tiles = pixels[:, :w // P * P].reshape(rows, P, w // P, P, 3).swapaxes(1, 2)  # (rows,Gw,P,P,3)
        e = torch.cat([embed(cached_encoder(*encoder), row) for row in tiles]).numpy()
    return pixels, e, bad_tiles(job, slide, first, first + rows, job.mpp)

def embed_tiles(job, encoder, at):
    """Embed base tiles, which are counted row by row. out: e (n,E) float32."""
    P, columns = job.patch, job.size[0] // job.patch
    tiles = [opened(job).read(k % columns * P, k // columns * P, P, P, job.mpp) for k in at]
    return embed(encoder, np.stack(tiles))

def with_features(jobs, features):
    """The jobs with their files of embeddings; a single file goes with a single image, whatever it is called.
    raises: UserError if there are none, or a file can be that of two images."""
    root = Path(features)
    if not root.is_dir():
        means, files = {jobs[0].name: root} if len(jobs) == 1 else {}, {root: root}
    else:
        files = {name_of(file): file for file in files_of(root)}
        means = match([job.name for job in jobs], files, root)
    if not means:
        raise UserError(f"--features={root} has none of {few([job.name for job in jobs])}, but {few(files)}: call them "
                        f"as the images are called")
    return [replace(job, features=files.get(means.get(job.name))) for job in jobs]

def embedded(job):
    """Tiles of a job that were embedded elsewhere. Where they show nearly the pixels asked for, base tiles are these
    tiles: scanners of one magnification differ. out: the job, narrowed to the part they cover; their embeddings
    (Gh,Gw,E), which of them there are (Gh,Gw). raises: UserError if they are of another side, or lie outside."""
    if job.features is None:
        raise UserError(f"{job.path} has no features: make them, or take it out")
    slide, P = opened(job), job.patch
    level, ratio, (width, height) = slide.grid(job.mpp)
    fine = ratio[0] * level.step[0]                                            # level 0 pixels per base pixel
    e, there, origin, side = read_features(job.features, round(P * fine))
    drift = abs(side / fine - P) * max(e.shape[:2])                            # base pixels, at the last tile
    if drift > 0.5 and job.mpp and slide.said and 1 / ALIKE < side / fine / P < ALIKE and side >= P:
        job = replace(job, mpp=slide.mpp * side / P, exact=True, note=f"{slide.mpp * side / P:.4g} micrometres each")
        fine, (width, height) = side / P, opened(job).grid(job.mpp)[2]
    elif drift > 0.5:
        mpp = f"--mpp={slide.mpp * side / P:.4g}" if slide.said else "its own mpp in a CSV of images"
        other = [f"--patch={round(side / fine)}"] if round(side / fine) % 16 == 0 else []
        remedy = " or ".join([mpp] * (side >= P) + other) or "features of larger tiles"
        raise UserError(f"{job.features}: tiles of {side} pixels of {job.path.name}'s level 0, at "
                        f"{fine:.4g} of them a pixel, which does not fit --patch={P}: give {remedy}")
    x, y = round(origin[0] / fine), round(origin[1] / fine)
    gh, gw = min(e.shape[0], (height - y) // P), min(e.shape[1], (width - x) // P)
    if min(gh, gw) < 1 or min(x, y) < 0:
        raise UserError(f"{job.features}: its tiles, from {origin} on, lie outside of {job.path.name}: give its own")
    return replace(job, origin=(x, y), size=(gw * P, gh * P)), e[:gh, :gw].float(), there[:gh, :gw].numpy()

def bad_tiles(job, slide, first, last, mpp):
    """{(i,j): why} of the base tiles of rows first to last over damaged tiles of the level that is read for `mpp`."""
    bad, whole, level = {}, slide.grid(job.mpp)[2], slide.grid(mpp)[0]
    for box, why in [(box, why) for box, why, its in slide.damaged if its is level]:
        x, y = ([(at * n / m - o) / job.patch for at in ends]                  # from, to; in base tiles
                for ends, n, m, o in zip((box[::2], box[1::2]), whole, slide.size, job.origin))
        for i in range(max(first, int(y[0])), min(last, ceil(y[1]))):
            for j in range(max(0, int(x[0])), min(job.size[0] // job.patch, ceil(x[1]))):
                bad[i, j] = why
    return bad

# ----- 3. Tissue -----

def otsu(values):
    """The level (0-255) that parts uint8 values into two classes with the largest variance between them."""
    n = np.bincount(values.ravel(), minlength=256).astype(float)
    below, sums = np.cumsum(n), np.cumsum(n * np.arange(256))                  # (256,) of values <= each level
    apart = (sums[-1] * below - sums * below[-1])**2 / np.maximum(below * (below[-1] - below), 1)
    return int(apart.argmax())

def tissue_of(job):
    """Where tissue is: what has colour. out: share of each base tile (Gh,Gw) float32, and the mask (h,w) bool.
    Saturation, (max - min) / max over the bands of a small view (8 pixels across a tile, more of small images),
    smoothed, above Otsu's threshold. That is held in bounds, for a slide without glass has but one class."""
    slide, P, (w, h) = opened(job), job.patch, job.size
    k = P // 8                                                                 # base pixels per pixel of the mask
    while k > 1 and max(w, h) < 1024 * k:
        k //= 2
    width, height = slide.grid(job.mpp)[2]
    mpp = slide.mpp * max(1, slide.size[0] / width * k)
    mw, mh = slide.grid(mpp)[2]                                                # of the whole image
    left, top = round(job.origin[0] * mw / width), round(job.origin[1] * mh / height)
    view = slide.read(left, top, round(w * mw / width), round(h * mh / height), mpp)
    high, low = view.max(-1), view.min(-1)
    saturation = ((high - low) * (255 / np.maximum(high, 1))).astype(np.uint8)  # (h,w) of the mask
    saturation = np.asarray(Image.fromarray(saturation).filter(ImageFilter.BoxBlur(2)))
    mask = saturation > np.clip(otsu(saturation), LOW, HIGH)
    y = (np.arange(h // P + 1) * P * mask.shape[0] / h).round().astype(int)    # (Gh+1,) edges of base tiles
    x = (np.arange(w // P + 1) * P * mask.shape[1] / w).round().astype(int)
    for i, j in bad_tiles(job, slide, 0, h // P, mpp):                         # damage hides tissue, and finer levels
        mask[y[i]:y[i + 1], x[j]:x[j + 1]] = True                              # may be whole
    total = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))                 # of all above and to the left
    sums = np.diff(np.diff(total[np.ix_(y, x)], axis=0), axis=1)
    pixels = np.outer(np.diff(y), np.diff(x))
    share = sums / np.maximum(1, pixels)
    return share.astype(np.float32), mask

# ----- 4. A few tasks ahead -----

def start():
    """Begin a worker process."""
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()

def end_with_parent():
    """Even one that was killed: a worker would else wait for work forever."""
    parent_process().join()
    os._exit(1)

def ahead(jobs, dropped, encoder, tissue, submit, window):
    """Submit the tasks of all jobs in order, `window` ahead of need: yields (job, future).
    First of each job comes tissue_of, if wanted, then its strips. Jobs named in `dropped`, a growing set, are left."""
    waiting = deque()
    for job in jobs:
        gh = job.size[1] // job.patch
        tasks = [partial(tissue_of, job)] if tissue else []
        tasks += [partial(read_strips, job, encoder, k, min(job.rows, gh - k)) for k in range(0, gh, job.rows)]
        for task in tasks:
            if job.name in dropped:
                break
            waiting.append((job, submit(task)))
            while len(waiting) > min(window, AHEAD // (3 * job.size[0] * job.patch * job.rows)):
                yield waiting.popleft()
    yield from waiting

@contextmanager
def workers(n, processes):
    """Yield submit(task) -> future of n threads, which start at once, or of n processes, which take seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                   # as processes have: the same bytes
    pool = ProcessPoolExecutor(n, get_context("spawn"), start) if processes else ThreadPoolExecutor(n)
    try:
        list(pool.map(time.sleep, [0.01] * n))                                 # started, before the clock is
        yield pool.submit
    except KeyboardInterrupt:
        end_children()
        raise
    except BrokenProcessPool as err:
        raise UserError("a worker process was killed, as when memory runs out: go on with fewer --workers") from err
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
