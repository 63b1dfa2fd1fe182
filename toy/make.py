"""TODO"""
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, configure
from data import begin, embed, finish, finished, tile_rows, write_slide
from slides.encoders import load_encoder
from toy.task import DEFAULTS, task_slide, write_labels
from toy.tissue import toy_slide

# ----- 1. python data.py toy -----

@dataclass
class ToyConfig:
    out: str = "data/toy"  # folder to write
    slides: int = 256      # training slides
    test: int = 64         # held-out slides
    size: int = 1024       # pixels a side, a multiple of 64 and of patch
    patch: int = 64        # pixels of a patch
    scales: int = 5        # at most; those larger than the slide are dropped
    keep0: int = 24        # patches kept per training slide at scale 0, 0 = all: enough for a toy, and quick to encode
    keep1: int = 24        # the same at scale 1; coarser scales and held-out slides keep everything
    seed: int = 0
    workers: int = 2       # processes
    task: bool = False     # slides with labels for mil.py, see toy_task.py, which has other defaults


def draw(cfg, k):
    """Toy slide k; held-out ones have seeds of their own, whatever the number of training slides."""
    seed = cfg.seed * 100_000 + (50_000 + k - cfg.slides if k >= cfg.slides else k)
    return (task_slide if cfg.task else toy_slide)(seed, cfg.size)


def toy_file(cfg, index, k):
    """Write toy slide k, training slides first, unless an earlier run did; returns its line of the index."""
    torch.set_num_threads(1)
    test, side = k >= cfg.slides, cfg.size // cfg.patch
    name = f"{'test' if test else 'train'}_{k - cfg.slides if test else k:04d}"
    path, meta = Path(cfg.out) / f"{name}.safetensors", {"source": index["source"]}
    counts = finished(path, cfg.scales, meta)
    if counts is None:
        image, region, nuclei = draw(cfg, k)
        rng = np.random.default_rng([cfg.seed, k])
        kept = {s: set(rng.permutation((side >> s)**2)[:n].tolist()) for s, n in enumerate((cfg.keep0, cfg.keep1))
                if n and not test}
        embed_row = partial(embed, load_encoder("stats", index["std"]))
        counts = write_slide(path, np.split(image, side), embed_row, cfg.patch, cfg.scales, meta,
                             lambda s, i, j, _: s not in kept or i * (side >> s) + j in kept[s],
                             extra={"region": region, "nuclei": nuclei})
    return {"name": name, "file": path.name, "split": "test" if test else "train", "size": [cfg.size] * 2,
            "counts": counts}


def toy(argv):
    """Draw the toy set."""
    cfg = configure(ToyConfig, DEFAULTS * any(a in ("--task", "--task=True") for a in argv) + argv, doc=__doc__)
    if cfg.patch < 16 or cfg.patch % 16 or cfg.size < 64 or cfg.size % 64 or cfg.size % cfg.patch or min(
            cfg.slides, cfg.scales, cfg.workers) < 1 or cfg.test < 0 or not 0 <= cfg.seed < 10_000 or cfg.task and (
            cfg.size % 256 or cfg.size < 512 or cfg.test):
        raise UserError(f"got --size={cfg.size} --patch={cfg.patch} --slides={cfg.slides} --test={cfg.test}: size is a "
                        f"multiple of 64 and of patch, patch one of 16, slides, scales and workers are at least 1; "
                        f"with --task size is a multiple of 256 from 512 on, test 0")
    print(f"drawing {cfg.slides} + {cfg.test} slides of {cfg.size} x {cfg.size} into {cfg.out}")

    def fit_std():  # a quarter of the tiles of 16 slides, for staining differs between slides
        rows = (np.split(draw(cfg, k)[0], cfg.size // cfg.patch) for k in range(min(16, cfg.slides)))
        tiles = (torch.from_numpy(t[::4].copy()) for strips in rows for _, _, t in tile_rows(strips, cfg.patch, 1))
        return load_encoder("stats").fit(t.movedim(-1, 1) / 255 for t in tiles).tolist()
    source = {"command": "task" if cfg.task else "toy"} | {k: v for k, v in asdict(cfg).items() if k not in (
        "out", "workers", "task")}
    index = begin(cfg.out, cfg.patch, "stats", source, fit_std)
    if cfg.task:
        write_labels(Path(cfg.out) / "labels.csv", cfg.seed * 100_000, cfg.slides, cfg.size)
    work, ks = partial(toy_file, cfg, index), range(cfg.slides + cfg.test)
    if cfg.workers == 1:
        return finish(cfg.out, index, [work(k) for k in tqdm(ks)])
    with ProcessPoolExecutor(cfg.workers, get_context("spawn")) as workers:  # torch's threads survive no fork
        finish(cfg.out, index, list(tqdm(workers.map(work, ks), total=len(ks))))
