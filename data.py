"""Multi-scale patches: toy slides or your own images (build.py) -> pyramids on disk -> the items a model trains on.

A patch at scale s is P x P pixels of the image halved s times, so it covers 2^s x 2^s base tiles, and its condition is
the grid of their embeddings (Z §3.1). One safetensors file per image holds patches and embeddings, memory-mapped.

in:  images of any size   out: items with x (3,P,P) in [-1,1] and/or z (3,P/4,P/4), tokens (64,E), mask (64,), s
run: python data.py toy                                      synthetic tissue, about two minutes
     python data.py build --images=FOLDER --out=data/mine    your own slides, aerial tiles, photos
read next: cdm.py, or train.py
"""
import os
import random
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from build import BuildConfig, build  # noqa: F401
from common import UserError, cli, configure, open_tensors
from encoder import load_encoder
from published import layout_of
from pyramid import GRID, POOLED, begin, block, embed, finish, finished, read_index, tile_rows, write_slide
from summarizer import pack_grid, standardize
from toy import toy_slide
from toy_task import DEFAULTS, task_slide, write_labels

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


# ----- 2. Reading -----

class Pyramids:
    """A folder that data.py wrote: which slides there are, and single patches from memory-mapped files.

    in:  latents, a folder of files of the same names with z{s} (train.py makes it), or None if they stand in the same
    files; std, the deviations a model was trained with, where this set was built with its own.
    Attributes: folder, patch, scales, embed_dim, encoder, weights, std, slides. raises: UserError if missing or
    foreign.
    """
    CACHE = 8192  # mapped tensors per process, far below the system's limit on mappings

    def __init__(self, folder, latents=None, std=None):
        if layout_of(folder):
            raise UserError(f"{folder} holds official samples, which can be learnt from and nothing else: give "
                            f"--data=, a folder that `python data.py build` wrote")
        index = read_index(folder)
        if not index["slides"]:
            raise UserError(f"{folder} is unfinished: run the command that makes it again, it goes on where it stopped")
        self.folder, self.latents = Path(folder), Path(latents or folder)
        for key in ("patch", "scales", "embed_dim", "encoder", "std", "slides"):
            setattr(self, key, index[key])
        self.weights = index["source"].get("weights")  # the file of a published encoder, where it lay then
        self.mpp = index["source"].get("mpp")          # micrometres per pixel of base tiles; None: not known
        self.rescale = None
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
            out["z"] = self.tensor(k, f"z{s}")[n].float()
        if "e" in want:
            e = self.tensor(k, f"p{s}")[n] if s >= POOLED else block(self.tensor(k, "e"), s, *out["ij"].tolist())
            e = e.float() if self.rescale is None else e.float() * self.rescale
            out["e"] = e.permute(2, 0, 1)                                      # (E,G,G)
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
    commands = {"toy": toy, "build": build}
    if argv and argv[0] in ("--help", "-h"):
        return print(__doc__ + "\nsettings: python data.py toy --help, python data.py build --help")
    if not argv or argv[0] not in commands:
        raise UserError(f"got {argv[0] if argv else 'no command'!r}: write python data.py toy, or python data.py build "
                        f"--images=DIR --out=DIR")
    commands[argv[0]](argv[1:])


if __name__ == "__main__":
    cli(main)
