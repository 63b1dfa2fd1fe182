"""Pyramids of patches: how images lie on disk, and the items a model trains on (Z §3.1, S8.1).

A patch at scale s is P x P pixels of the image halved s times: it covers 2^s x 2^s base tiles, and the grid
of their embeddings is its condition. A folder holds index.json and a safetensors file per image:
    e     (Gh,Gw,E) f16   embedding of every base tile      x{s} (n,P,P,3) u8   pixels of the patches
    p{s}  (n,8,8,E) f16   their grids pooled, s >= 4        ij{s} (n,2) i32     row and column of each patch
Their latents, z{s} (n,3,P/4,P/4) f16, lie in RUN/latents, in files of the same names.

in:  images of any size   out: items: x (3,P,P) in [-1,1] and/or z (3,P/4,P/4), tokens (64,E), mask (64,), s
run: python data.py toy                                      synthetic tissue, a minute or two
     python data.py build --images=FOLDER --out=data/mine    your own slides, aerial tiles, photos
read next: train.py
"""
import random
import signal
import sys
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from common import UserError, cli
from summarizer import pack_grid, standardize

GRID = 8    # Z S8.1: larger grids are pooled to 8x8
POOLED = 4  # the first scale with a larger grid (16x16): from here on files hold pooled grids

# ----- 1. What a scale is; toy/folder.py writes the files -----

def halve(x):
    """Halve the resolution. in: (h,w,3) uint8. out: (h//2,w//2,3) uint8, (a+b+c+d+2)//4 of each 2x2 block."""
    height, width = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2         # an odd last row or column is left out
    rows = np.add(x[0:height:2, :width], x[1:height:2, :width], dtype=np.uint16)  # 8 bits do not hold a sum
    halves = [(rows[:, 0::2, ..., c] + rows[:, 1::2, ..., c] + 2) // 4 for c in range(x.shape[-1])]
    return np.stack(halves, -1, dtype=np.uint8, casting="unsafe")    # colour by colour takes half the time

def grid_under(e, s, i, j):
    """Embeddings under patch (i,j): e (Gh,Gw,E) -> (2^s,2^s,E), from s = 4 on block means (8,8,E) f16."""
    grid = e[i << s:(i + 1) << s, j << s:(j + 1) << s]
    if s < POOLED:
        return grid
    k = 2 ** s // GRID  # side of a block; summed in float32
    return grid.float().unflatten(1, (GRID, k)).unflatten(0, (GRID, k)).mean((1, 3)).half()

# ----- 2. Reading -----

def read_index(folder):
    """Read index.json. raises: UserError if it is missing, not ours, or names files outside of its folder."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no index.json: make it by data.py (official samples are for training alone)")
    from toy.index import read  # it comes from other people, too
    return read(path)

def open_data(folder, std=None):
    """Open what a model trains on: Pyramids, or slides.official.Samples, whose `official` is True."""
    if not (Path(folder) / "index.json").is_file():
        from slides.official import Samples, layout_of
        if layout_of(folder):
            return Samples(folder)
    return Pyramids(folder, std)

class Pyramids:
    """A folder that data.py wrote: which slides there are, and single patches from memory-mapped files.
    in:  std, the deviations a model was trained with, where this set has its own.
    Attributes: folder, std, patch, scales, embed_dim, encoder, weights, mpp, slides; for a model to set: latents,
    the folder with z{s}, and latent_scale, which latents are multiplied by, here alone. raises: UserError."""
    official = False
    images = True     # slides.official.Samples may lack them
    latent_scale = 1.0

    def __init__(self, folder, std=None):
        index = read_index(folder)
        if not index["slides"]:
            raise UserError(f"{folder} is unfinished: run the command that makes it again, it goes on")
        self.folder = self.latents = Path(folder)
        for key in ("patch", "scales", "embed_dim", "encoder", "slides"):
            setattr(self, key, index[key])
        self.std = list(std or index["std"])           # the encoder's numbers are divided by these
        self.rescale = torch.tensor(index["std"]) / torch.tensor(self.std)  # (E,), 1 where both agree
        self.weights = index["source"].get("weights")  # the file of a published encoder, where it lay then
        self.mpp = index["source"].get("mpp")          # micrometres per pixel of base tiles; None: not known
        self.white = index["source"].get("white", 0)   # of images of more than 8 bits, the value shown as white

    def names(self, split):
        """Names of the slides of a split, "train" or "test"."""
        return [slide["name"] for slide in self.slides if slide["split"] == split]

    def count(self, split, s):
        """Number of patches of scale s in a split."""
        return sum(slide["counts"][s] for slide in self.slides if slide["split"] == split)

    @lru_cache(8192)  # noqa: B019 (a system allows more mappings; none travels to other processes)
    def tensor(self, k, name):
        """Tensor `name` of slide k, mapped: never write to it. raises: UserError if it is missing or mis-shaped."""
        slide, P, E = self.slides[k], self.patch, self.embed_dim
        kind = name.rstrip("0123456789")                             # e, x, z, p or ij
        n = 0 if kind == "e" else slide["counts"][int(name[len(kind):])]
        height, width = slide["size"]
        wanted = {"e": (height // P, width // P, E), "p": (n, GRID, GRID, E), "ij": (n, 2),
                  "x": (n, P, P, 3), "z": (n, 3, P // 4, P // 4)}[kind]
        path = (self.latents if kind == "z" else self.folder) / slide["file"]
        from toy.folder import map_tensor  # a file may be larger than memory
        found = map_tensor(path, name)
        shape = "missing" if found is None else tuple(found.shape)
        if shape != wanted:
            again = "again with train.py" if kind == "z" else "again"
            raise UserError(f"{path}: tensor {name} is {shape}, expected {wanted}: make this file {again}")
        return found

    def read(self, k, s, n, want=("x",)):
        """Read patch n of scale s of slide k. out: ij (2,) int64 and what is wanted of x (3,P,P) in [-1,1],
        z (3,P/4,P/4) and e (E,G,G), not standardised, all float32. raises: UserError naming file and patch."""
        slide = self.slides[k]
        counts = slide["counts"]
        if s not in range(len(counts)) or n not in range(counts[s]):
            path = self.folder / slide["file"]
            raise UserError(f"{path} has no patch {n} at scale {s}: it holds {counts}")
        out = {"ij": self.tensor(k, f"ij{s}")[n].long()}
        if "x" in want:
            out["x"] = self.tensor(k, f"x{s}")[n].permute(2, 0, 1).float() / 127.5 - 1
        if "z" in want:
            out["z"] = self.tensor(k, f"z{s}")[n].float() * self.latent_scale
        if "e" in want:
            if s >= POOLED:
                e = self.tensor(k, f"p{s}")[n]                       # (8,8,E)
            else:
                e = grid_under(self.tensor(k, "e"), s, *out["ij"].tolist())  # (G,G,E)
            out["e"] = (e.float() * self.rescale).permute(2, 0, 1)   # (E,G,G)
        return out

    def item(self, k, s, n, want):
        """What a model takes: `read`, plus tokens (64,E) float32, mask (64,) bool, s and slide int64."""
        out = self.read(k, s, n, {*want, "e"})
        e = out["e"] if "e" in want else out.pop("e")
        out["tokens"], out["mask"] = pack_grid(standardize(e))
        return out | {"s": s, "slide": k}

# ----- 3. What is drawn for a batch -----

class PatchDataset(Dataset):
    """Random patches: a scale uniformly among those that have any, then one of its patches over all slides.
    Item k is a pure function of (seed, k), k >= 0, whatever process reads it. So resuming is exact, and ranks
    that take other k draw independently. in: want, any of "x", "z", "e" ("e" only with only_scale, for its
    shape varies). len(): the number of patches. raises: UserError if nothing fits."""
    def __init__(self, pyramids, split="train", seed=0, want=("z",), only_scale=None):
        self.pyramids, self.seed, self.want = pyramids, seed, want
        self.slides = [k for k, slide in enumerate(pyramids.slides) if slide["split"] == split]
        scales = pyramids.scales
        counts = [pyramids.slides[k]["counts"][:scales] for k in self.slides]
        self.before = np.cumsum([[0] * scales, *counts], 0)          # (slides+1,scales), patches before each
        total = self.before[-1].tolist()
        self.scales = [s for s in range(scales) if total[s] and only_scale in (None, s)]
        if not self.scales:
            raise UserError(f"--only_scale={only_scale} does not fit {pyramids.folder}, whose {split!r} split "
                            f"holds {total} patches per scale")
        self.length = sum(total)

    def __len__(self):
        return self.length

    def place(self, k):
        """Where item k lies: slide, scale, number of the patch."""
        rng = random.Random(f"{self.seed} {k}")
        s = rng.choices(self.scales)[0]
        before = self.before[:, s]                                   # (slides+1,)
        n = rng.randrange(before[-1].item())
        at = np.searchsorted(before, n, "right").item() - 1          # the slide that holds the n-th patch
        return self.slides[at], s, n - before[at].item()

    def __getitem__(self, k):
        return self.pyramids.item(*self.place(k), self.want)

class InTurn(list):
    """Data sets of one patch size in turn: item k is x and s of item k of the (k % n)-th of n."""
    def __getitem__(self, k):
        item = super().__getitem__(k % len(self))[k]
        return {"x": item["x"], "s": item["s"]}                      # tokens of two encoders would not stack

def fixed_batch(pyramids, split, s, n, want=("x",), seed=0):
    """The same n distinct patches of scale s every time, over as many slides as possible; all if n is larger.
    out: a collated batch, fields as `Pyramids.item`. raises: UserError if there is none."""
    order = []
    for k, slide in enumerate(pyramids.slides):
        if slide["split"] == split and s < pyramids.scales:
            rng = random.Random(f"{seed} {s} {k}")
            count = slide["counts"][s]
            for turn, i in enumerate(rng.sample(range(count), min(n, count))):
                order.append((turn, rng.random(), k, i))             # one patch of each slide in turn
    if not order:
        raise UserError(f"{pyramids.folder} has no {split!r} patch at scale {s}, of {pyramids.scales} scales")
    return default_collate([pyramids.item(k, s, i, want) for _, _, k, i in sorted(order)[:n]])

# ----- 4. What a training is fed with -----

def own_places(name, cfg, batch, ranks):
    """Where the micro-batches of this rank begin in the global batch of a stage, their size. raises: UserError."""
    share = batch // ranks.world
    micro = min(cfg.loop.micro or share, share)
    if batch % ranks.world or share % micro:
        option = f"{name}batch" if hasattr(cfg, f"{name}batch") else "batch"
        raise UserError(f"a global batch of {batch} does not divide into {ranks.world} ranks of micro-batches "
                        f"of {micro}: change --{option} or --micro")
    return range(ranks.rank * share, (ranks.rank + 1) * share, micro), micro

@contextmanager
def feed(dataset, steps, batch, micro, ranks, workers):
    """Yield micro-batches of this rank, and a list that holds something once a SIGTERM came, which ends nothing.
    A sample is step * batch + its place, so that resuming is exact. Clusters send SIGTERM to all processes of a
    job: those that load data do not hear it, and end with the training."""
    asked, share = [], batch // ranks.world
    own = range(ranks.rank * share, (ranks.rank + 1) * share)
    numbers = (step * batch + place for step in steps for place in own)
    how = "fork" if workers and sys.platform == "linux" else None       # their server would hear it
    loading = iter(DataLoader(dataset, micro, sampler=numbers, num_workers=workers, worker_init_fn=deafen,
                              pin_memory=ranks.device.type == "cuda", multiprocessing_context=how))
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield loading, asked
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if workers:
            loading._shutdown_workers()                                 # Python would send them a SIGTERM

def deafen(worker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def main(argv):
    command = argv[0] if argv else "no command"
    if command == "toy":
        from toy.make import make
        make(argv[1:])
    elif command == "build":
        from slides.build import build
        build(argv[1:])
    elif command in ("--help", "-h"):
        print(__doc__ + "\nsettings: python data.py toy --help, python data.py build --help")
    else:
        raise UserError(f"got {command!r}: write data.py toy, or data.py build --images=DIR --out=DIR")

if __name__ == "__main__":
    cli(main, stopped="the same command goes on with the files that lack")
