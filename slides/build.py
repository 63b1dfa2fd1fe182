"""Slides, aerial tiles and photos -> pyramids on disk: `python data.py build`, from one picture to thousands of slides.

Workers read and embed strips of base tiles; the main thread halves them and writes one file per image, whole or not
at all. The same command goes on where it stopped. An image that cannot be read is passed over; exit code 1 in the end.
in:  images, a folder, a pattern or a CSV   out: what data.py describes; masks/*.png, where tissue was found
run: python data.py build --images=SLIDES --out=data/mine --mpp=0.5 --tissue=0.2     20x patches that show tissue
     the same with --shard=0/4 to 3/4 at once, on machines that share --out"""
import glob
import os
import random
import re
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, at_least, configure, save_png, write_text
from slides.encoders import Stats, embed, load_encoder
from slides.pictures import DARK, MAX_PIXELS, masks_beside
from slides.names import file_of
from slides.strips import (ahead, cached_encoder, embed_tiles, embedded, image_jobs, opened, plan, with_features,
                           workers)
from toy.descriptor import spread
from toy.folder import begin, finish, finished, write_slide

LARGE = 2**26  # pixels that one thread at a time decodes, from which processes are worth the seconds they take to start
FREE = "out", "max_pixels", "device", "holdout", "workers", "shard"  # settings that change nothing in a file
# why patches are left out, and what to do if all of them are
LEFT = {"unreadable": "copy the image again", "without data": "raise --nodata, or --white if it is too dark",
        "without tissue": "lower --tissue", "not embedded": "embed the whole image", "plain": "lower --background"}

@dataclass
class Config:
    images: str = ""              # an image, a folder and all below it, a pattern in quotes, or a CSV: path, mpp, split
    out: str = ""                 # folder to write
    mpp: float | None = None      # micrometres per base pixel: 0.5 = 20x, 1e6 = 1 m. Finer images are reduced to it,
    #                               those that do not say their own are taken to have it. None = pixels as they are
    encoder: str = Stats.name     # see slides/encoders.py
    weights: str | None = None    # its weights, if it has any
    features: str = ""            # embeddings of that encoder made by CLAM or TRIDENT: NAME.h5, or a folder of them
    patch: int = 256              # pixels of a patch, a multiple of 16
    scales: int = 8               # at most; those larger than every image are dropped
    tissue: float = 0.0           # leave out patches with less than this share of tissue (try 0.2), 0 = keep all
    background: float = 0.0       # leave out patches whose grey levels deviate less than this (try 5), 0 = keep all
    nodata: float = 0.05          # leave out patches with more than this share of black, or of what the image says is
    #                               nothing, as corners of aerial tiles
    white: int = 0                # of images of more than 8 bits, the value to show as white, for all alike. 0 = the
    #                               largest of as many bits as each uses
    cut: str = ""                 # 3x2: make 3 columns x 2 rows of every image: a part of one slide is held out
    holdout: float = 0.1          # fraction of the images held out, if there are at least 5, and no column split
    max_pixels: int = MAX_PIXELS  # refuse larger images of kinds that unpack as a whole
    workers: int = 0              # that read: threads, or processes (see LARGE); 0 = one per core up to 8
    shard: str = ""               # i/n: the i-th of n parts of the images, from 0 on
    device: str = "cpu"           # where the encoder runs

# ----- 1. One image -----

def output(cfg, job, ending=".safetensors"):
    """The file of an image. What ends in .failed.txt says why there is none: other shards need not wait for it."""
    return Path(cfg.out) / (file_of(job.name) + ending)

def workers_of(cfg):
    return cfg.workers or min(8, os.cpu_count() or 1)

def reasons(left):
    """Patches left out by reason, {why: count}, and what to do, for people."""
    return ", ".join(f"{n} {why} ({LEFT[why]})" for why, n in sorted(left.items()))

class Picture:
    """What write_slide asks of one image: strips of pixels, their embeddings, which patches stay.
    in:  group, (job, future) of its tasks; tissue, the share of each base tile (Gh,Gw); given, embeddings made
    elsewhere (Gh,Gw,E), and there (Gh,Gw), which tiles have one. left counts patches left out by reason."""

    def __init__(self, run, job, group, tissue, given, there):
        self.run, self.cfg, self.job, self.group = run, run.cfg, job, group
        self.tissue, self.there, self.rows = tissue, there, deque(given)       # rows: embeddings to come, (Gw,E) each
        self.bad, self.left = {}, Counter()

    def strips(self):
        P = self.cfg.patch
        for _, future in self.group:
            pixels, e, bad = future.result()
            self.bad.update(bad)
            self.rows.extend([] if e is None else torch.from_numpy(e).split(self.job.size[0] // P))
            for k in range(0, len(pixels), P):
                yield pixels[k:k + P]                                          # (P,W,3)
                self.run.bar.update()

    def embed_row(self, tiles):
        return self.rows.popleft() if self.rows else embed(self.run.encoder, tiles, self.cfg.device)

    def keep(self, s, i, j, tile):
        cfg, under = self.cfg, np.s_[i << s:(i + 1) << s, j << s:(j + 1) << s]  # the base tiles below the patch
        some = tile[::max(1, len(tile) // 64), ::max(1, len(tile) // 64)]      # enough pixels to tell black
        if any((a >> s, b >> s) == (i, j) for a, b in self.bad):
            why = "unreadable"
        elif (some <= (0 if self.job.white else DARK)).all(-1).mean() > cfg.nodata:  # deep pixels have no such noise
            why = "without data"
        elif self.tissue is not None and self.tissue[under].mean() < cfg.tissue:
            why = "without tissue"
        elif self.there is not None and not self.there[under].all():
            why = "not embedded"
        elif cfg.background and tile.mean(-1).std() < cfg.background:
            why = "plain"
        else:
            return True
        self.left[why] += 1
        return False

def made_of(run, job):
    """What a file is made of: other settings, another image or features made anew are told by it."""
    size = job.path.stat().st_size if job.path.is_file() else 0
    of = job.features.stat() if job.features and job.features.is_file() else None
    return {"source": run.source, "bytes": size} | ({"features": [of.st_size, of.st_mtime_ns]} if of else {})

def build_one(run, job, group):
    """Write the file of one image from the results of its tasks."""
    cfg, out, (w, h) = run.cfg, output(run.cfg, job), job.size
    for stale in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):           # of a run that was killed
        stale.unlink(missing_ok=True)
    output(cfg, job, ".failed.txt").unlink(missing_ok=True)
    tissue = None
    if cfg.tissue:
        tissue, mask = next(group)[1].result()                                 # (Gh,Gw), (h,w)
        save_png(Path(cfg.out) / "masks" / f"{out.stem}.png", mask)
    _, given, there = embedded(job) if cfg.features else (job, (), None)
    picture = Picture(run, job, group, tissue, given, there)
    meta = made_of(run, job) | {"size": [h, w]} | ({"white": job.white} if job.white else {})
    counts = write_slide(out, picture.strips(), picture.embed_row, cfg.patch, cfg.scales, meta, picture.keep)
    run.left.update(picture.left)
    others = "".join(f", {n} {why}" for why, n in sorted(picture.left.items()) if why != "plain")
    tqdm.write(f"{job.name}: {w} x {h}, pixels {job.note}, kept {counts} patches; dropped {w % cfg.patch} columns, "
               f"{h % cfg.patch} rows at the edge and {picture.left['plain']} plain patches{others}")
    if unread := masks_beside(job.path):
        tqdm.write(f"  {job.name}: {unread}")
    for why in sorted(set(picture.bad.values())):
        tqdm.write(f"  {job.name}: {why}; patches over it are left out")
    if not any(counts) and picture.bad:
        out.unlink()
        raise UserError(f"{job.path} keeps no patch: {reasons(picture.left)}; {why}")
    if not any(counts):
        tqdm.write(f"  {job.name} keeps no patch: {reasons(picture.left)}")

# ----- 2. All of them -----

class Run:
    """One run of the command over its images: settings, encoder, and what came of it."""

    def __init__(self, cfg, jobs, index):
        self.cfg, self.jobs, self.source = cfg, jobs, index["source"]
        named = cfg.encoder, tuple(index["std"]), cfg.weights, cfg.device
        self.encoder = None if cfg.features else cached_encoder(*named)
        self.in_workers = named if self.encoder and cfg.device == "cpu" else None
        self.there, self.built, self.failed = 0, [], {}                        # images, jobs, {name: why}
        self.left, self.bar, self.seconds = Counter(), None, 0.0               # patches by why they are left out

    def fail(self, job, err):
        self.failed[job.name] = str(err)
        if Path(self.cfg.out).is_dir():
            write_text(output(self.cfg, job, ".failed.txt"), f"{err}\n")
        if len(self.jobs) == 1:
            raise err

    def planned(self, jobs):
        """The jobs that are still to do, with their sizes."""
        cfg, todo = self.cfg, []
        for job in tqdm(jobs, "looking at images", delay=3):
            if finished(output(cfg, job), cfg.scales, made_of(self, job)):
                self.there += 1
                continue
            try:
                job = plan(job, cfg.mpp, cfg.patch, cfg.max_pixels)
                todo.append(embedded(job)[0] if cfg.features else job)
            except UserError as err:
                self.fail(job, err)
        return todo

    def build(self, todo):
        """Build the jobs, workers a few strips ahead."""
        dropped, many = set(), sum(job.size[0] * job.size[1] for job in todo if job.alone) > LARGE
        n = workers_of(self.cfg)
        todo = todo if many else [replace(job, rows=1) for job in todo]        # threads share what they have read
        self.bar = tqdm(total=sum(job.size[1] // job.patch for job in todo), unit="strip", disable=None)
        with self.bar, workers(n, many) as submit:
            begun = time.perf_counter()
            stream = ahead(todo, dropped, self.in_workers, self.cfg.tissue, submit, 2 * n)
            for job, group in groupby(stream, lambda x: x[0]):
                try:
                    build_one(self, job, group)
                    self.built.append(job)
                except UserError as err:
                    dropped.add(job.name)                                      # groupby passes over the rest of it
                    self.fail(job, err)
            self.seconds = time.perf_counter() - begun

    def report(self):
        """The summary in the end: patches left out, failures, speed. What is there, `finish` tells."""
        print(f"{len(self.built)} images built, {self.there} there before, {len(self.failed)} failed")
        print("left out: " + (", ".join(f"{n} {why}" for why, n in sorted(self.left.items())) or "none"))
        tiles = sum((job.size[0] // job.patch) * (job.size[1] // job.patch) for job in self.built)
        if tiles:
            speed, size = tiles / self.seconds, 3e-6 * self.cfg.patch**2
            print(f"{tiles} base tiles in {self.seconds:.1f} s: {speed:.0f} a second, {speed * size:.0f} MB of pixels")
        whites = sorted({job.white for job in self.built if job.white})
        if len(whites) > 1:
            print(f"images of more than 8 bits have their white at {whites}: for all alike, give --white={whites[-1]}")
        for name, why in self.failed.items():
            print(f"failed: {why}" if name in why else f"failed: {name}: {why}")

def sampled(cfg, jobs, encoder, submit):
    """Embeddings (n,E) of 2,048 training tiles, from up to 16 images that can be read: to measure deviations on."""
    rng, used, P = random.Random(0), 0, cfg.patch
    error = UserError(f"--images={cfg.images}: all are held out, none to train on")
    train = [job for job in jobs if job.split == "train"]
    bar = tqdm(total=min(16, len(train)), desc="how colours deviate", delay=3)
    for job in rng.sample(train, len(train)):
        if used == 16:
            return
        try:
            job = plan(job, cfg.mpp, P, cfg.max_pixels)
            n = (job.size[0] // P) * (job.size[1] // P)
            opened(job).read(0, 0, P, P, cfg.mpp)                              # unpacks it, if it must
        except UserError as err:
            error = err
            continue
        at = rng.sample(range(n), min(n, 2048 // min(16, len(train))))
        tasks = [submit(partial(embed_tiles, job, encoder, at[k:k + 16])) for k in range(0, len(at), 16)]
        yield from [task.result() for task in tasks]
        used += 1
        bar.update()
    if not used:
        raise error

def deviations(cfg, jobs):
    """The deviation of each number of an embedding, to scale it with; 1 where the encoder does that itself."""
    if cfg.features:
        for job in jobs:
            try:
                job = plan(job, cfg.mpp, cfg.patch, cfg.max_pixels)
                return [1.0] * embedded(job)[1].shape[2]
            except UserError as err:
                error = err
        raise error
    encoder = load_encoder(cfg.encoder, None, cfg.weights)
    if not encoder.scaled:
        return [1.0] * encoder.embed_dim
    with workers(workers_of(cfg), False) as submit:
        return spread(torch.cat(list(sampled(cfg, jobs, encoder, submit)))).tolist()

def listing(cfg, jobs):
    """out: the index's lines of all images that are done, of any shard, and how many are neither done nor failed."""
    lines, missing = [], 0
    for job in tqdm(jobs, "listing", delay=3):
        file = output(cfg, job)
        done = finished(file, cfg.scales)                                      # patches per scale, meta data
        if done:
            lines.append(dict(name=job.name, file=file.name, split=job.split, size=done[1]["size"], counts=done[0]))
        else:
            missing += not output(cfg, job, ".failed.txt").exists()
    return lines, missing

def check(cfg):
    """out: i and n of --shard; (columns, rows) of --cut. raises: UserError if a setting is not what it may be."""
    at_least(cfg, patch=16, scales=1, max_pixels=1, workers=0, background=0, white=0)
    if cfg.patch % 16 or not (0 <= cfg.holdout < 1 and 0 <= cfg.tissue <= 1 and 0 <= cfg.nodata <= 1):
        raise UserError(f"got --patch={cfg.patch} --holdout={cfg.holdout} --tissue={cfg.tissue} --nodata={cfg.nodata}: "
                        f"patch is a multiple of 16, holdout in [0, 1), tissue, nodata in [0, 1]")
    if cfg.mpp is not None and not 1e-3 <= cfg.mpp <= 1e9:
        raise UserError(f"--mpp={cfg.mpp}: give micrometres per pixel, 0.5 for a 20x scan")
    if not cfg.images or not cfg.out:
        raise UserError("say what to read and where to write: python data.py build --images=DIR_OR_FILE --out=DIR")
    if cfg.features and (cfg.encoder == Stats.name or cfg.weights or cfg.tissue or cfg.cut):
        raise UserError("--features: say which encoder made them, --encoder=uni; give no --weights, --tissue, --cut")
    shard = re.fullmatch(r"(\d+)/(\d+)", cfg.shard or "0/1")
    if not shard or int(shard[1]) >= int(shard[2]):
        raise UserError(f"--shard={cfg.shard}: write i/n, as 0/4 to 3/4 for four parts")
    cut = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", cfg.cut or "1x1")
    if not cut:
        raise UserError(f"--cut={cfg.cut}: write columns x rows, as 3x2")
    return int(shard[1]), int(shard[2]), (int(cut[1]), int(cut[2]))

def build(argv):
    """Cut images into pyramids. raises: UserError; SystemExit(1) in the end if some of several images failed."""
    cfg = configure(Config, argv, doc=__doc__)
    shard, shards, cut = check(cfg)
    jobs = [replace(job, white=cfg.white) for job in image_jobs(cfg.images, cfg.out, cfg.holdout, cut)]
    jobs = with_features(jobs, cfg.features) if cfg.features else jobs
    mine = jobs[shard::shards]
    print(f"reading {len(mine)} images from {cfg.images}, writing to {cfg.out}")
    source = {"command": "build"} | {key: value for key, value in asdict(cfg).items() if key not in FREE}
    index = begin(cfg.out, cfg.patch, cfg.encoder, source, asdict(Config()), partial(deviations, cfg, jobs))
    run = Run(cfg, jobs, index)
    todo = run.planned(mine)
    if todo:
        run.build(todo)
    run.report()
    lines, missing = listing(cfg, jobs)
    if missing:
        print(f"{missing} images are left to other shards: the last to end lists all in index.json")
    elif lines and run.left and not any(sum(line["counts"]) for line in lines):
        raise UserError(f"no patch is left in {cfg.out}: {reasons(run.left)}, and remove that folder")
    elif lines:
        finish(cfg.out, index, lines)
    if run.failed:
        sys.exit(1)
