"""Draw the toy set, `python data.py toy`: synthetic slides of four tissues, or with --task of a task with labels.

in:  settings   out: a folder as data.py describes it; every slide's file has region and nuclei as well
run: python data.py toy     read next: data.py
"""
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, at_least, cli, configure, save_png
from toy.descriptor import Stats, embed, spread
from toy.folder import begin, finish, finished, processes, tile_rows, write_slide
from toy.task import NOISE, task_slide, write_labels
from toy.tissue import toy_slide

@dataclass
class ToyConfig:
    out: str = "data/toy"  # folder to write
    slides: int = 256      # training slides
    test: int = 64         # held-out slides
    size: int = 1024       # pixels a side, a multiple of 64 and of patch
    patch: int = 64        # pixels of a patch, a multiple of 16
    scales: int = 5        # at most; those larger than the slide are dropped
    keep0: int = 24        # patches kept per training slide at scale 0, 0 = all: enough for a toy, and quick to encode
    keep1: int = 24        # the same at scale 1; coarser scales and held-out slides keep everything
    seed: int = 0
    encoder: str = Stats.name  # of base tiles: see slides/encoders.py
    workers: int = 2       # processes
    task: bool = False     # slides with labels for mil.py, see toy/task.py, which has other defaults

TASK = ["--out=data/task", "--slides=240", "--test=0", "--size=512", "--scales=4", "--keep0=0", "--keep1=0"]
FREE = ("out", "workers", "task")  # settings that do not decide what is written

def load(name, std=None):
    """An encoder by name; only those of slides/encoders.py need that room."""
    if name == Stats.name:
        return Stats(std)
    from slides.encoders import load_encoder
    return load_encoder(name, std)

def draw(cfg, k):
    """Toy slide k; held-out ones have seeds of their own, whatever the number of training slides."""
    seed = cfg.seed * 100_000 + k
    if k >= cfg.slides:
        seed += 50_000 - cfg.slides
    return task_slide(seed, cfg.size) if cfg.task else toy_slide(seed, cfg.size)

def make_slide(cfg, index, k):
    """Write toy slide k, training slides first, unless an earlier run did; returns its line of the index."""
    torch.set_num_threads(1)
    split, number = ("train", k) if k < cfg.slides else ("test", k - cfg.slides)
    name, meta = f"{split}_{number:04d}", {"source": index["source"]}
    path = Path(cfg.out) / f"{name}.safetensors"
    found = finished(path, cfg.scales, meta)
    counts = found[0] if found else write_toy(cfg, index, k, path, meta)
    return {"name": name, "file": path.name, "split": split, "size": [cfg.size] * 2, "counts": counts}

def write_toy(cfg, index, k, path, meta):
    image, region, nuclei = draw(cfg, k)
    rng, side = np.random.default_rng([cfg.seed, k]), cfg.size // cfg.patch
    kept = {}  # scale -> the patches that stay, as numbers row by row; other scales keep all
    for s, n in enumerate((cfg.keep0, cfg.keep1)):
        if n and k < cfg.slides:
            kept[s] = set(rng.permutation((side >> s) ** 2)[:n].tolist())

    def keep(s, i, j, tile):
        return s not in kept or i * (side >> s) + j in kept[s]
    embed_row = partial(embed, load(index["encoder"], index["std"]))
    extra = {"region": region, "nuclei": nuclei}
    return write_slide(path, np.split(image, side), embed_row, cfg.patch, cfg.scales, meta, keep, extra)

def deviations(cfg):
    """Deviation of each embedded number over a quarter of the tiles of 16 slides, for staining differs between them."""
    encoder = load(cfg.encoder)
    if not encoder.scaled:
        return [1.0] * encoder.embed_dim
    rows = []
    for k in tqdm(range(min(16, cfg.slides)), "how colours deviate", delay=1):
        strips = np.split(draw(cfg, k)[0], cfg.size // cfg.patch)
        for _, _, tiles in tile_rows(strips, cfg.patch, 1):
            rows.append(embed(encoder, tiles[::4]))
    return spread(torch.cat(rows)).tolist()

def check(cfg):
    """raises: UserError for sizes that do not fit together."""
    at_least(cfg, slides=1, test=0, size=64, patch=16, scales=1, workers=1, seed=0)
    if cfg.patch % 16 or cfg.size % 64 or cfg.size % cfg.patch or cfg.seed >= 10_000:
        raise UserError(f"got --size={cfg.size} --patch={cfg.patch} --seed={cfg.seed}: size is a multiple of 64 and of "
                        f"patch, patch one of 16, seed below 10000")
    if cfg.task and (cfg.size < 512 or cfg.size % 256 or cfg.test):
        raise UserError(f"--size={cfg.size} --test={cfg.test}: --task needs a multiple of 256 from 512 on, test 0")

def make(argv):
    """Draw the toy set. raises: UserError for bad settings, or a folder that holds something else."""
    task = "--task" in argv or "--task=True" in argv
    cfg = configure(ToyConfig, TASK + argv if task else argv, doc=__doc__)
    check(cfg)
    print(f"drawing {cfg.slides} + {cfg.test} slides of {cfg.size} x {cfg.size} into {cfg.out}; the first is "
          f"shown in first.png there")
    settings = {key: value for key, value in asdict(cfg).items() if key not in FREE}
    source = {"command": "task" if task else "toy"} | settings
    if cfg.encoder == Stats.name:
        del source["encoder"]  # as in folders from before there was a choice
    index = begin(cfg.out, cfg.patch, cfg.encoder, source, asdict(ToyConfig()), partial(deviations, cfg))
    save_png(Path(cfg.out) / "first.png", draw(cfg, 0)[0])  # something to look at meanwhile
    if task:
        path = Path(cfg.out) / "labels.csv"
        others, ducts = write_labels(path, cfg.seed * 100_000, cfg.slides, cfg.size)
        print(f"{path}: {ducts} slides with label 1, a duct with large nuclei, {others} with label 0, none; "
              f"{NOISE:.0%} of the labels are wrong on purpose")
    numbers = range(cfg.slides + cfg.test)
    work = partial(make_slide, cfg, index)
    if cfg.workers == 1:
        return finish(cfg.out, index, [work(k) for k in tqdm(numbers)])
    with processes(cfg.workers) as workers:
        finish(cfg.out, index, list(tqdm(workers.map(work, numbers), total=len(numbers))))

if __name__ == "__main__":
    cli(make, stopped="the same command goes on with the files that lack")
