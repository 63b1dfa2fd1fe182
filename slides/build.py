"""Slides, aerial tiles and photos -> pyramids on disk: `python data.py build`, from one picture to thousands of slides.

Worker processes read and decode strips of base tiles and embed them, unless a GPU does; this process halves them into
the coarser scales and writes one file per image, whole or not at all. The same command goes on where it stopped. An
image that cannot be read is named and passed over; the exit code is 1 in the end. Memory: a few strips.

in:  images, a folder, a pattern or a CSV   out: what pyramid.py describes; masks/*.png, where tissue was found
run: python build.py --images=SLIDES --out=data/mine --mpp=0.5 --tissue=0.2     20x patches that show tissue
     torchrun --nproc_per_node=4 data.py build ..., or --shard=0/4 to 3/4 on machines that share --out
read next: data.py
"""
import glob
import os
import random
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import UserError, atomic, cli, configure, write_text
from data import begin, described, embed, finish, finished, write_slide
from slides.encoders import load_encoder
from slides.official import read_features
from slides.reader import MAX_PIXELS
from slides.strips import ahead, image_jobs, opened, plan, start

PARALLEL = 2**23  # pixels from which worker processes are worth the seconds they take to start
DARK = 3          # of 255; corners without data are black, but for what compression leaves


@dataclass
class BuildConfig:
    images: str = ""              # an image, a folder and all below it, a pattern in quotes ("s/*.svs"), or a CSV
    #                               with columns path, mpp (of its pixels), split (train or test)
    out: str = ""                 # folder to write
    mpp: float | None = None      # micrometres per base pixel: 0.5 = 20x, 1e6 = 1 m. Finer images are reduced to it; if
    #                               one does not say its own, it is taken to have it. None = pixels as they are
    encoder: str = "stats"        # see encoder.py
    weights: str | None = None    # its weights, if it has any
    features: str = ""            # embeddings of that encoder made by CLAM or TRIDENT: NAME.h5, or a folder of them
    patch: int = 256              # pixels of a patch, a multiple of 16
    scales: int = 8               # at most; those larger than every image are dropped
    tissue: float = 0.0           # leave out patches with less than this share of tissue (try 0.2), 0 = keep all
    background: float = 0.0       # leave out patches whose grey levels deviate less than this (try 5), 0 = keep all
    nodata: float = 0.05          # leave out patches with more than this share of black, as corners of aerial tiles
    cut: str = ""                 # 3x2: cut every image into 3 columns x 2 rows, each an image of its own, so that of
    #                               one slide too a part is held out
    holdout: float = 0.1          # fraction of the images held out, if there are at least 5, and no column split
    max_pixels: int = MAX_PIXELS  # refuse larger images of kinds that unpack as a whole
    workers: int = 0              # processes that read; 0 = one per core up to 8, none for a few small images
    shard: str = ""               # i/n: the i-th of n parts of the images, from 0 on; torchrun sets it by itself
    device: str = "cpu"           # where the encoder runs


# ----- 1. One image -----

def output(cfg, job):
    return Path(cfg.out) / f"{job.name.replace('/', '__')}.safetensors"


def failure(cfg, job):
    """The file that says why an image failed: other shards need not wait for it."""
    return output(cfg, job).with_suffix(".failed.txt")


class Chooser:
    """Which patches stay: keep(s,i,j,tile), for write_slide; left counts the others by reason; bad, damaged tiles."""

    def __init__(self, cfg, tissue, there):
        self.cfg, self.tissue, self.there, self.bad, self.left = cfg, tissue, there, {}, Counter()

    def damage(self, damaged, grid):
        """Note the base tiles (i,j) under damaged boxes, in base pixels: every patch over them is left out."""
        for (x0, y0, x1, y1), why in damaged:
            for i in range(max(0, int(y0 // self.cfg.patch)), min(grid[1], int(-(-y1 // self.cfg.patch)))):
                for j in range(max(0, int(x0 // self.cfg.patch)), min(grid[0], int(-(-x1 // self.cfg.patch)))):
                    self.bad[i, j] = why

    def keep(self, s, i, j, tile):
        n, few = 1 << s, tile[::max(1, len(tile) // 64), ::max(1, len(tile) // 64)]  # enough to tell black
        if any(a >> s == i and b >> s == j for a, b in self.bad):
            why = "damaged"
        elif ((few[..., 0] <= DARK) & (few[..., 1] <= DARK) & (few[..., 2] <= DARK)).mean() > self.cfg.nodata:
            why = "without data"
        elif self.tissue is not None and self.tissue[i * n:i * n + n, j * n:j * n + n].mean() < self.cfg.tissue:
            why = "without tissue"
        elif self.there is not None and not self.there[i * n:i * n + n, j * n:j * n + n].all():
            why = "not embedded"
        elif self.cfg.background and tile.mean(-1).std() < self.cfg.background:
            why = "plain"
        else:
            return True
        self.left[why] += 1
        return False


def embedded(cfg, job):
    """Tiles of an image that were embedded elsewhere. out: the job, narrowed to the part they cover; their embeddings
    (Gh,Gw,E), which of them there are (Gh,Gw). raises: UserError if they are of another side, or lie outside."""
    given, slide = Path(cfg.features), opened(job.path, job.own, cfg.mpp, cfg.max_pixels)
    whole = slide.grid(cfg.mpp)[2]
    fine = slide.size[0] / whole[0]                                            # level 0 pixels per base pixel
    e, there, origin, side = read_features(given / job.path.stem if given.is_dir() else given, round(cfg.patch * fine))
    (x, y), P = (round(v / fine) for v in origin), cfg.patch
    gh, gw = min(len(e), (whole[1] - y) // P), min(e.shape[1], (whole[0] - x) // P)
    if abs(side / fine - P) > 0.5 / max(e.shape[:2]) or min(gh, gw) < 1:
        raise UserError(f"--features={given}: the tiles of {job.path.name} have {side} pixels of its level 0 and start "
                        f"at {origin}, which does not fit --patch={P} on {slide.size[0]} x {slide.size[1]} pixels: "
                        f"give --patch={round(side / fine)}, another --mpp, or the image they were cut from")
    return replace(job, origin=(x, y), size=(gw * P, gh * P)), e[:gh, :gw].float(), there[:gh, :gw].numpy()


def build_one(cfg, job, group, encoder, source, spent, progress):
    """Write the file of one image from the results of its tasks; returns what was left out, by reason."""
    P, grid, waiting = cfg.patch, (job.size[0] // cfg.patch, job.size[1] // cfg.patch), deque()
    out, clock = output(cfg, job), time.perf_counter
    for stale in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):           # of a run that was killed
        stale.unlink(missing_ok=True)
    failure(cfg, job).unlink(missing_ok=True)
    tissue = None
    if cfg.tissue:
        tissue, mask = next(group)[1].result()                                 # (Gh,Gw), (h,w)
        with atomic(Path(cfg.out) / "masks" / f"{out.stem}.png") as tmp:
            Image.fromarray(mask).save(tmp, "PNG")
    given, there = embedded(cfg, job)[1:] if cfg.features else (None, None)
    chooser = Chooser(cfg, tissue, there)

    rows = iter(given if given is not None else ())                            # (Gw,E) each

    def strips():
        for _, future in group:
            begun = clock()
            pixels, e, damaged, seconds = future.result()
            spent["waiting"] += clock() - begun
            spent.update(dict(zip(("reading", "decoding", "embedding"), seconds)))
            chooser.damage(damaged, grid)
            waiting.extend([] if e is None else torch.from_numpy(e).split(grid[0]))
            for k in range(0, len(pixels), P):
                yield pixels[k:k + P]                                          # (P,W,3)
                progress(job)

    def embed_row(tiles):
        begun = clock()
        e = next(rows) if given is not None else waiting.popleft() if waiting else embed(encoder, tiles, cfg.device)
        spent.update({"embedding": clock() - begun, "waiting": clock() - begun})
        return e
    begun, before = clock(), spent["waiting"]
    meta = {"source": source, "bytes": job.path.stat().st_size, "size": [job.size[1], job.size[0]]}
    counts = write_slide(out, strips(), embed_row, P, cfg.scales, meta, chooser.keep)
    spent["writing"] += clock() - begun - (spent["waiting"] - before)
    plain, others = chooser.left.pop("plain", 0), "".join(f", {n} {why}" for why, n in sorted(chooser.left.items()))
    tqdm.write(f"{job.name}: {job.size[0]} x {job.size[1]}, pixels {job.note}, kept {counts} patches; dropped "
               f"{job.size[0] - grid[0] * P} columns, {job.size[1] - grid[1] * P} rows at the edge and {plain} plain "
               f"patches{others}")
    for why in sorted(set(chooser.bad.values())):
        tqdm.write(f"  {job.name}: {why}; patches over it are left out")
    return chooser.left + Counter(plain=plain)


# ----- 2. All of them -----

def sample_tiles(cfg, jobs):
    """2,048 training tiles, as (n,3,P,P), from up to 16 images that can be read: to measure deviations on."""
    rng, chosen, errors, P = random.Random(0), [], [], cfg.patch
    train = [job for job in jobs if job.split == "train"]
    for job in rng.sample(train, len(train)):
        try:
            job = plan(job, cfg.mpp, P, cfg.max_pixels)
            opened(job.path, job.own, cfg.mpp, cfg.max_pixels).read(0, 0, P, P, cfg.mpp)  # unpacks it, if it must
            chosen.append(job)
        except UserError as err:
            errors.append(err)
        if len(chosen) == 16:
            break
    if not chosen:
        raise errors[0] if errors else UserError(f"--images={cfg.images}: all images are held out, none to train on")
    for job in chosen:
        slide, gw, n = opened(job.path, job.own, cfg.mpp, cfg.max_pixels), job.size[0] // P, job.size[1] // P
        at = rng.sample(range(gw * n), min(gw * n, 2048 // len(chosen)))
        for some in (at[k:k + 16] for k in range(0, len(at), 16)):
            tiles = np.stack([slide.read(k % gw * P, k // gw * P, P, P, cfg.mpp) for k in some])  # (n,P,P,3)
            yield torch.from_numpy(tiles).movedim(-1, 1) / 255


def report(cfg, built, there, failed, left, spent, seconds):
    """The table in the end: patches per scale and those left out, failures, and where the time went."""
    counts = [[n for n in column] for column in zip(*(described(output(cfg, j), cfg.scales)[0] for j in built + there))]
    print(f"{len(built)} images built, {len(there)} there before, {len(failed)} failed")
    print("".join(f"{x:>12}" for x in ("scale", "patches", "images")))
    for s, column in enumerate(counts):
        print(f"{s:>12}{sum(column):>12}{sum(n > 0 for n in column):>12}")
    print("left out: " + (", ".join(f"{n} {why}" for why, n in sorted(left.items()) if n) or "none"))
    tiles = sum(j.size[0] // cfg.patch * (j.size[1] // cfg.patch) for j in built)
    if tiles:
        parts = {k: spent[k] for k in ("reading", "decoding", "embedding", "writing")}
        print(f"{tiles} base tiles in {seconds:.1f} s: {tiles / seconds:.0f} a second, "
              f"{tiles * 3 * cfg.patch**2 / 1e6 / seconds:.0f} MB of pixels a second; " + ", ".join(
                  f"{k} {v / max(1e-9, sum(parts.values())):.0%}" for k, v in parts.items()) + " of the work")
    for name, why in failed.items():
        print(f"failed: {why}" if name in why else f"failed: {name}: {why}")


def listing(cfg, jobs):
    """out: the index's lines of all images that are done, of any shard, and how many are neither done nor failed."""
    lines, missing = [], 0
    for job in jobs:
        if output(cfg, job).exists():
            counts, meta = described(output(cfg, job), cfg.scales)
            lines.append({"name": job.name, "file": output(cfg, job).name, "split": job.split, "size": meta["size"],
                          "counts": counts})
        else:
            missing += not failure(cfg, job).exists()
    return lines, missing


def parts(cfg):
    """out: (i, n), the part of the images that is ours. raises: UserError if --shard is no i/n."""
    text = cfg.shard or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise UserError(f"--shard={cfg.shard}: write i/n, as 0/4 to 3/4 for four parts")
    return int(i), int(n)


def build(argv):
    """Cut images into pyramids. raises: UserError; SystemExit(1) in the end if some of several images failed."""
    cfg = configure(BuildConfig, argv, doc=__doc__)
    if cfg.patch < 16 or cfg.patch % 16 or min(cfg.scales, cfg.max_pixels) < 1 or not 0 <= cfg.holdout < 1 or min(
            cfg.workers, cfg.background) < 0 or not 0 <= cfg.tissue <= 1 or not 0 <= cfg.nodata <= 1:
        raise UserError(f"got --patch={cfg.patch} --scales={cfg.scales} --holdout={cfg.holdout} --tissue={cfg.tissue} "
                        f"--nodata={cfg.nodata}: patch is a multiple of 16, scales at least 1, holdout in [0, 1), "
                        f"tissue and nodata in [0, 1], workers and background at least 0")
    if not cfg.images or not cfg.out:
        raise UserError("say what to read and where to write: python data.py build --images=DIR_OR_FILE --out=DIR")
    (shard, shards), ranks, P = parts(cfg), int(os.environ.get("WORLD_SIZE", 1)), cfg.patch
    if cfg.device == "cuda":
        cfg.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    columns, _, lines = (cfg.cut or "1x1").partition("x")
    if not (columns.isdigit() and lines.isdigit() and int(columns) and int(lines)) or cfg.cut and cfg.features:
        raise UserError(f"--cut={cfg.cut}: write columns x rows, as 3x2; with --features images stay whole")
    jobs = image_jobs(cfg.images, cfg.out, cfg.holdout, (int(columns), int(lines)))
    mine = jobs[shard::shards]
    if cfg.features and (cfg.encoder == "stats" or cfg.weights or cfg.tissue):
        raise UserError(f"--features={cfg.features}: say which encoder made them, --encoder=uni, and give no --weights "
                        f"and no --tissue, for tiles without embedding are left out")
    encoder = None if cfg.features else load_encoder(cfg.encoder, None, cfg.weights, cfg.device)
    print(f"reading {len(mine)} images from {cfg.images}, writing to {cfg.out}")
    source = {"command": "build"} | {k: v for k, v in asdict(cfg).items() if k not in (
        "out", "max_pixels", "device", "holdout", "workers", "shard") and (k not in ("features", "cut") or v)}

    def deviations():
        if cfg.features:
            return [1.0] * embedded(cfg, plan(jobs[0], cfg.mpp, P, cfg.max_pixels))[1].shape[2]
        return encoder.fit(sample_tiles(cfg, jobs)).tolist() if encoder.scaled else [1.0] * encoder.embed_dim
    index = begin(cfg.out, P, cfg.encoder, source, deviations)
    there, todo, failed, left, spent = [], [], {}, Counter(), Counter()

    def fail(job, err):
        failed[job.name] = str(err)
        if output(cfg, job).parent.is_dir():
            write_text(failure(cfg, job), f"{err}\n")
        if len(jobs) == 1:
            raise err
    for job in mine:
        size = job.path.stat().st_size if job.path.is_file() else 0
        if finished(output(cfg, job), cfg.scales, {"source": source, "bytes": size}):
            there.append(job)
            continue
        try:
            job = plan(job, cfg.mpp, P, cfg.max_pixels)
            todo.append(embedded(cfg, job)[0] if cfg.features else job)
        except UserError as err:
            fail(job, err)
    if todo:
        run(cfg, todo, index, source, spent, left, fail)
    report(cfg, [j for j in todo if j.name not in failed], there, failed, left, spent, spent["seconds"])
    lines, missing = listing(cfg, jobs)
    if missing:
        print(f"{missing} images are left to other shards: the last to end lists all in index.json")
    elif lines:
        finish(cfg.out, index, lines)
    if ranks > 1:                                                              # torchrun ends all ranks when one fails
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if failed:
        sys.exit(1)


def run(cfg, todo, index, source, spent, left, fail):
    """Build the jobs of this process, its workers a few strips ahead."""
    encoder, dropped, threads = None, set(), None
    if not cfg.features:
        encoder = load_encoder(cfg.encoder, index["std"], cfg.weights, cfg.device)
    many = sum(j.size[0] * j.size[1] for j in todo) > PARALLEL
    workers = cfg.workers or (min(8, os.cpu_count() or 1) if many else 0)
    if workers:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), start, (os.getpid(),))  # torch survives no fork
        list(pool.map(time.sleep, [0.01] * workers))                           # started, before the clock is
        submit = pool.submit
    else:
        pool, threads = nullcontext(), torch.get_num_threads()
        torch.set_num_threads(1)                                               # as workers have: the same bytes

        def submit(task):
            return SimpleNamespace(result=task)                                # done when it is asked for
    begun, bar = time.perf_counter(), tqdm(total=len(todo), unit="image", disable=None)
    here, rows = None, Counter()
    if encoder is not None and cfg.device == "cpu":
        here = cfg.encoder, tuple(index["std"]), cfg.weights

    def progress(job):
        rows[job.name] += 1
        bar.set_postfix_str(f"{job.name} {rows[job.name] / (job.size[1] // cfg.patch):.0%}")
    try:
        with pool:
            stream = ahead(todo, dropped, here, cfg.max_pixels, cfg.tissue, submit, 2 * workers)
            for job, group in groupby(stream, lambda x: x[0]):
                try:
                    left.update(build_one(cfg, job, group, encoder, source, spent, progress))
                except UserError as err:
                    dropped.add(job.name)
                    for _ in group:  # noqa: B031 - what was submitted already
                        pass
                    fail(job, err)
                bar.update()
    except BrokenProcessPool as err:
        raise UserError("a worker process was killed, as when memory runs out: run the same command with fewer "
                        "--workers, it goes on where it stopped") from err
    finally:
        bar.close()
        spent["seconds"] = time.perf_counter() - begun
        if threads:
            torch.set_num_threads(threads)


def main(argv):
    build(argv) if argv else print(__doc__)


if __name__ == "__main__":
    cli(main)
