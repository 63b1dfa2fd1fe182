"""Slides, aerial tiles and photos -> pyramids on disk: `python data.py build`, from one picture to thousands of slides.

Worker processes read and decode strips of base tiles and embed them, unless a GPU does; this process halves them into
the coarser scales and writes one file per image, whole or not at all. The same command goes on where it stopped. An
image that cannot be read is named and passed over; the exit code is 1 in the end. Memory: a few strips.

in:  images, a folder, a pattern or a CSV   out: what data.py describes; masks/*.png, where tissue was found
run: python data.py build --images=SLIDES --out=data/mine --mpp=0.5 --tissue=0.2     20x patches that show tissue
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter as clock
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, at_least, cli, configure, save_png, write_text
from data import begin, finish, finished, write_slide
from slides.encoders import Stats, embed, load_encoder
from slides.official import read_features
from slides.reader import MAX_PIXELS
from slides.strips import ahead, image_jobs, opened, plan, start

PARALLEL = 2**23  # pixels from which worker processes are worth the seconds they take to start
KINDS = "reading", "decoding", "embedding", "writing"  # of work
DARK = 3          # of 255; corners without data are black, but for what compression leaves


@dataclass
class Config:
    images: str = ""              # an image, a folder and all below it, a pattern in quotes ("s/*.svs"), or a CSV
    #                               with columns path, mpp (of its pixels), split (train or test)
    out: str = ""                 # folder to write
    mpp: float | None = None      # micrometres per base pixel: 0.5 = 20x, 1e6 = 1 m. Finer images are reduced to it; if
    #                               one does not say its own, it is taken to have it. None = pixels as they are
    encoder: str = Stats.name     # see slides/encoders.py
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


class Picture:
    """What write_slide asks of one image: strips of pixels, their embeddings, which patches stay.

    in:  group, (job, future) of its tasks; given, embeddings made elsewhere (Gh,Gw,E), and there (Gh,Gw), which tiles
    have one; tissue, the share of each base tile. left counts patches left out by reason; bad, the damaged base tiles.
    """

    def __init__(self, run, job, group, tissue, given, there):
        self.run, self.cfg, self.job, self.group = run, run.cfg, job, group
        self.tissue, self.there = tissue, there
        self.rows = deque() if given is None else deque(given)                 # (Gw,E) each, of the rows to come
        self.bad, self.left, self.elsewhere = {}, Counter(), 0.0               # seconds that are not spent writing

    def strips(self):
        P, grid_width = self.cfg.patch, self.job.size[0] // self.cfg.patch
        for _, future in self.group:
            begun = clock()
            pixels, e, bad, seconds = future.result()
            self.elsewhere += clock() - begun
            self.run.spent.update(seconds)
            self.bad.update(bad)
            if e is not None:
                self.rows.extend(torch.from_numpy(e).split(grid_width))
            for k in range(0, len(pixels), P):
                yield pixels[k:k + P]                                          # (P,W,3)
                self.run.progress(self.job)

    def embed_row(self, tiles):
        if self.rows:
            return self.rows.popleft()
        begun = clock()
        e = embed(self.run.encoder, tiles, self.cfg.device)
        self.elsewhere += clock() - begun
        self.run.spent["embedding"] += clock() - begun
        return e

    def keep(self, s, i, j, tile):
        why = self.against(s, i, j, tile)
        if why:
            self.left[why] += 1
        return not why

    def against(self, s, i, j, tile):
        """Why patch (i,j) of scale s is left out; "" if it stays."""
        cfg, under = self.cfg, np.s_[i << s:(i + 1) << s, j << s:(j + 1) << s]  # the base tiles below it
        step = max(1, len(tile) // 64)
        dark = (tile[::step, ::step] <= DARK).all(-1)                          # a few pixels are enough to tell
        if any((a >> s, b >> s) == (i, j) for a, b in self.bad):
            return "damaged"
        if dark.mean() > cfg.nodata:
            return "without data"
        if self.tissue is not None and self.tissue[under].mean() < cfg.tissue:
            return "without tissue"
        if self.there is not None and not self.there[under].all():
            return "not embedded"
        return "plain" if cfg.background and tile.mean(-1).std() < cfg.background else ""


def embedded(cfg, job):
    """Tiles of an image that were embedded elsewhere. out: the job, narrowed to the part they cover; their embeddings
    (Gh,Gw,E), which of them there are (Gh,Gw). raises: UserError if they are of another side, or lie outside."""
    given, slide, P = Path(cfg.features), opened(job), cfg.patch
    width, height = slide.grid(cfg.mpp)[2]
    fine = slide.size[0] / width                                               # level 0 pixels per base pixel
    e, there, origin, side = read_features(given / job.path.stem if given.is_dir() else given, round(P * fine))
    x, y = round(origin[0] / fine), round(origin[1] / fine)
    gh, gw = min(e.shape[0], (height - y) // P), min(e.shape[1], (width - x) // P)
    if abs(side / fine - P) > 0.5 / max(e.shape[:2]) or min(gh, gw) < 1:
        raise UserError(f"--features={given}: the tiles of {job.path.name} have {side} pixels of its level 0 and start "
                        f"at {origin}, which does not fit --patch={P} on {slide.size[0]} x {slide.size[1]} pixels: "
                        f"give --patch={round(side / fine)}, another --mpp, or the image they were cut from")
    return replace(job, origin=(x, y), size=(gw * P, gh * P)), e[:gh, :gw].float(), there[:gh, :gw].numpy()


def build_one(run, job, group):
    """Write the file of one image from the results of its tasks."""
    cfg, out, (w, h) = run.cfg, output(run.cfg, job), job.size
    for stale in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):           # of a run that was killed
        stale.unlink(missing_ok=True)
    failure(cfg, job).unlink(missing_ok=True)
    tissue = given = there = None
    if cfg.tissue:
        tissue, mask = next(group)[1].result()                                 # (Gh,Gw), (h,w)
        save_png(Path(cfg.out) / "masks" / f"{out.stem}.png", mask)
    if cfg.features:
        _, given, there = embedded(cfg, job)
    picture, begun = Picture(run, job, group, tissue, given, there), clock()
    meta = {"source": run.source, "bytes": job.path.stat().st_size, "size": [h, w]}
    counts = write_slide(out, picture.strips(), picture.embed_row, cfg.patch, cfg.scales, meta, picture.keep)
    run.spent["writing"] += clock() - begun - picture.elsewhere
    run.left.update(picture.left)
    others = "".join(f", {n} {why}" for why, n in sorted(picture.left.items()) if why != "plain")
    tqdm.write(f"{job.name}: {w} x {h}, pixels {job.note}, kept {counts} patches; dropped {w % cfg.patch} columns, "
               f"{h % cfg.patch} rows at the edge and {picture.left['plain']} plain patches{others}")
    for why in sorted(set(picture.bad.values())):
        tqdm.write(f"  {job.name}: {why}; patches over it are left out")


# ----- 2. All of them -----

class Run:
    """One run of the command over its images: settings, encoder, and what came of it."""

    def __init__(self, cfg, jobs, index):
        self.cfg, self.jobs, self.source = cfg, jobs, index["source"]
        self.encoder = None if cfg.features else load_encoder(cfg.encoder, index["std"], cfg.weights, cfg.device)
        self.on_cpu = None if cfg.features or cfg.device != "cpu" else (cfg.encoder, tuple(index["std"]), cfg.weights)
        self.there, self.built, self.failed = [], [], {}                       # jobs, jobs, {name: why}
        self.left, self.spent, self.rows = Counter(), Counter(), Counter()     # patches, seconds; strips by image
        self.bar = None

    def fail(self, job, err):
        self.failed[job.name] = str(err)
        if Path(self.cfg.out).is_dir():
            write_text(failure(self.cfg, job), f"{err}\n")
        if len(self.jobs) == 1:
            raise err

    def progress(self, job):
        self.rows[job.name] += 1
        self.bar.set_postfix_str(f"{job.name} {self.rows[job.name] / (job.size[1] // job.patch):.0%}")

    def planned(self, jobs):
        """The jobs that are still to do, with their sizes."""
        cfg, todo = self.cfg, []
        for job in jobs:
            size = job.path.stat().st_size if job.path.is_file() else 0
            if finished(output(cfg, job), cfg.scales, {"source": self.source, "bytes": size}):
                self.there.append(job)
                continue
            try:
                job = plan(job, cfg.mpp, cfg.patch, cfg.max_pixels)
                todo.append(embedded(cfg, job)[0] if cfg.features else job)
            except UserError as err:
                self.fail(job, err)
        return todo

    def build(self, todo):
        """Build the jobs, worker processes a few strips ahead."""
        dropped, many = set(), sum(job.size[0] * job.size[1] for job in todo) > PARALLEL
        n = self.cfg.workers or (min(8, os.cpu_count() or 1) if many else 0)
        self.bar = tqdm(total=len(todo), unit="image", disable=None)
        with self.bar, workers(n) as submit:
            begun = clock()
            stream = ahead(todo, dropped, self.on_cpu, self.cfg.tissue, submit, 2 * n)
            for job, group in groupby(stream, lambda x: x[0]):
                try:
                    build_one(self, job, group)
                    self.built.append(job)
                except UserError as err:
                    dropped.add(job.name)
                    for _ in group:  # noqa: B031 - what was submitted already
                        pass
                    self.fail(job, err)
                self.bar.update()
            self.spent["all"] = clock() - begun

    def report(self):
        """The table in the end: patches per scale and those left out, failures, and where the time went."""
        cfg, done = self.cfg, self.built + self.there
        print(f"{len(self.built)} images built, {len(self.there)} there before, {len(self.failed)} failed")
        print(f"{'scale':>12}{'patches':>12}{'images':>12}")
        counts = [finished(output(cfg, job), cfg.scales)[0] for job in done]
        for s in range(cfg.scales if done else 0):
            print(f"{s:>12}{sum(n[s] for n in counts):>12}{sum(n[s] > 0 for n in counts):>12}")
        print("left out: " + (", ".join(f"{n} {why}" for why, n in sorted(self.left.items())) or "none"))
        tiles = sum((job.size[0] // cfg.patch) * (job.size[1] // cfg.patch) for job in self.built)
        if tiles:
            seconds = self.spent.pop("all")
            work = max(1e-9, sum(self.spent.values()))
            shares = ", ".join(f"{kind} {self.spent[kind] / work:.0%}" for kind in KINDS)
            megabytes = tiles * 3 * cfg.patch**2 / 1e6
            print(f"{tiles} base tiles in {seconds:.1f} s: {tiles / seconds:.0f} a second, {megabytes / seconds:.0f} "
                  f"MB of pixels a second; {shares} of the work")
        for name, why in self.failed.items():
            print(f"failed: {why}" if name in why else f"failed: {name}: {why}")


@contextmanager
def workers(n):
    """Yield submit(task) -> future of n processes; of none, a task is done here, when its result is asked for."""
    threads = torch.get_num_threads()
    try:
        if n:
            with ProcessPoolExecutor(n, get_context("spawn"), start, (os.getpid(),)) as pool:  # torch survives no fork
                list(pool.map(time.sleep, [0.01] * n))                         # started, before the clock is
                yield pool.submit
        else:
            torch.set_num_threads(1)                                           # as workers have: the same bytes
            yield lazily
    except BrokenProcessPool as err:
        raise UserError("a worker process was killed, as when memory runs out: run the same command with fewer "
                        "--workers, it goes on where it stopped") from err
    finally:
        torch.set_num_threads(threads)


def lazily(task):
    return SimpleNamespace(result=task)


def sample_tiles(cfg, jobs):
    """2,048 training tiles, as (n,3,P,P), from up to 16 images that can be read: to measure deviations on."""
    rng, chosen, errors, P = random.Random(0), [], [], cfg.patch
    train = [job for job in jobs if job.split == "train"]
    for job in rng.sample(train, len(train)):
        try:
            job = plan(job, cfg.mpp, P, cfg.max_pixels)
            opened(job).read(0, 0, P, P, cfg.mpp)                              # unpacks it, if it must
            chosen.append(job)
        except UserError as err:
            errors.append(err)
        if len(chosen) == 16:
            break
    if not chosen:
        raise errors[0] if errors else UserError(f"--images={cfg.images}: all images are held out, none to train on")
    for job in chosen:
        slide, gw, n = opened(job), job.size[0] // P, job.size[1] // P
        at = rng.sample(range(gw * n), min(gw * n, 2048 // len(chosen)))
        for first in range(0, len(at), 16):
            tiles = [slide.read(k % gw * P, k // gw * P, P, P, cfg.mpp) for k in at[first:first + 16]]
            yield torch.from_numpy(np.stack(tiles)).movedim(-1, 1) / 255       # (n,3,P,P)


def deviations(cfg, jobs):
    """The deviation of each number of an embedding, to scale it with; 1 where the encoder does that itself."""
    if cfg.features:
        return [1.0] * embedded(cfg, plan(jobs[0], cfg.mpp, cfg.patch, cfg.max_pixels))[1].shape[2]
    encoder = load_encoder(cfg.encoder, None, cfg.weights, cfg.device)
    return encoder.fit(sample_tiles(cfg, jobs)).tolist() if encoder.scaled else [1.0] * encoder.embed_dim


def listing(cfg, jobs):
    """out: the index's lines of all images that are done, of any shard, and how many are neither done nor failed."""
    lines, missing = [], 0
    for job in jobs:
        file = output(cfg, job)
        if file.exists():
            counts, meta = finished(file, cfg.scales)
            lines.append(dict(name=job.name, file=file.name, split=job.split, size=meta["size"], counts=counts))
        else:
            missing += not failure(cfg, job).exists()
    return lines, missing


def check(cfg):
    """Hold the settings against what they may be. raises: UserError."""
    at_least(cfg, patch=16, scales=1, max_pixels=1, workers=0, background=0)
    if cfg.patch % 16 or not (0 <= cfg.holdout < 1 and 0 <= cfg.tissue <= 1 and 0 <= cfg.nodata <= 1):
        raise UserError(f"got --patch={cfg.patch} --holdout={cfg.holdout} --tissue={cfg.tissue} --nodata={cfg.nodata}: "
                        f"patch is a multiple of 16, holdout in [0, 1), tissue, nodata in [0, 1]")
    if not cfg.images or not cfg.out:
        raise UserError("say what to read and where to write: python data.py build --images=DIR_OR_FILE --out=DIR")
    if cfg.features and (cfg.encoder == Stats.name or cfg.weights or cfg.tissue or cfg.cut):
        raise UserError(f"--features={cfg.features}: say which encoder made them, --encoder=uni, and give no "
                        f"--weights, no --tissue and no --cut: tiles without embedding are left out, and images whole")


def pair(text, sign, says):
    """in: "3x2", "x". out: (3, 2). raises: UserError, as `says` tells, if it is no such pair of numbers."""
    a, _, b = text.partition(sign)
    if not (a.isdigit() and b.isdigit() and int(b)):
        raise UserError(says)
    return int(a), int(b)


def build(argv):
    """Cut images into pyramids. raises: UserError; SystemExit(1) in the end if some of several images failed."""
    cfg = configure(Config, argv, doc=__doc__)
    check(cfg)
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    says = f"--shard={cfg.shard}: write i/n, as 0/4 to 3/4 for four parts"
    shard, shards = pair(cfg.shard or f"{rank}/{ranks}", "/", says)
    columns, lines = pair(cfg.cut or "1x1", "x", f"--cut={cfg.cut}: write columns x rows, as 3x2")
    if shard >= shards or not columns:
        raise UserError(says if columns else f"--cut={cfg.cut}: write columns x rows, as 3x2")
    if cfg.device == "cuda":
        cfg.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    jobs = image_jobs(cfg.images, cfg.out, cfg.holdout, (columns, lines))
    mine = jobs[shard::shards]
    print(f"reading {len(mine)} images from {cfg.images}, writing to {cfg.out}")
    source = {"command": "build"} | asdict(cfg)
    for key in ("out", "max_pixels", "device", "holdout", "workers", "shard"):  # they change nothing in a file
        del source[key]
    for key in ("features", "cut"):                                            # older than these, a set lacks them
        if not source[key]:
            del source[key]
    index = begin(cfg.out, cfg.patch, cfg.encoder, source, asdict(Config()), partial(deviations, cfg, jobs))
    run = Run(cfg, jobs, index)
    todo = run.planned(mine)
    if todo:
        run.build(todo)
    run.report()
    lines, missing = listing(cfg, jobs)
    if missing:
        print(f"{missing} images are left to other shards: the last to end lists all in index.json")
    elif lines:
        finish(cfg.out, index, lines)
    if ranks != "1":                                                           # torchrun ends all ranks when one fails
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if run.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli(build, __doc__)
