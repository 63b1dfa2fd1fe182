"""Truth of toy images: the share of the area of each tissue, by the region map, or read off the image by its colours.

Colours are learnt from training slides. The command holds areas read off real held-out images against their maps.
in:  x (N,3,H,W) in [-1,1]   out: shares (N,4), in the order of TISSUES
run: python -m text.tissues data/toy     read next: captions.py"""
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, at_least, cli, configure, generator, open_tensors
from data import Pyramids, fixed_batch
from text.wording import shares_of
from toy.tissue import TISSUES

KINDS = len(TISSUES)

# ----- 1. Regions of toy slides -----

def region_map(pyramids, k, block):
    """Tissues (h,w) uint8 of a block (row, col, rows, cols) of base tiles of slide k, at a quarter of the resolution.
    raises: UserError if the data set has no region maps."""
    path = pyramids.folder / pyramids.slides[k]["file"]
    with open_tensors(path) as f:
        if "region" not in f.keys():
            raise UserError(f"{path} holds no region map: only toy slides (python data.py toy) can be described")
        region = f.get_tensor("region")
    row, col, rows, cols = (n * pyramids.patch // 4 for n in block)
    return region[row:row + rows, col:col + cols]

def regions(pyramids, split, n, tiles, seed):
    """n regions at random, over the slides in turn: yields (slide, block, its map (h,w), a random.Random)."""
    least = tiles * pyramids.patch
    slides = [k for k, x in enumerate(pyramids.slides) if x["split"] == split and min(x["size"]) >= least]
    if tiles < 1 or n and not slides:
        raise UserError(f"{pyramids.folder} has no {split!r} slide of {tiles} x {tiles} base tiles: take fewer --tiles")
    for i in range(n):
        k = slides[i % len(slides)]
        high, wide = (side // pyramids.patch for side in pyramids.slides[k]["size"])
        rng = random.Random(f"{seed} {split} {i}")
        block = rng.randrange(high - tiles + 1), rng.randrange(wide - tiles + 1), tiles, tiles
        yield k, block, region_map(pyramids, k, block), rng

def varied(pyramids, split, n, tiles, seed):
    """The same; of every four that whose main tissue has come least often so far. At random one in thirty is mostly
    fat: too few to learn how it is said."""
    come, candidates = [0] * KINDS, regions(pyramids, split, 4 * n, tiles, seed)

    def main_tissue(found):
        return int(np.argmax(shares_of(found[2])))
    for four in zip(*[candidates] * 4):                     # one generator, asked four times
        rare = min(four, key=lambda found: come[main_tissue(found)])
        come[main_tissue(rare)] += 1
        yield rare

def real_image(pyramids, k, block):
    """The pixels (1,3,h,w) of a block of base tiles; tiles that the data set did not keep are black."""
    row, col, rows, cols = block
    P = pyramids.patch
    x = torch.full((1, 3, rows * P, cols * P), -1.0)
    for n, (i, j) in enumerate(pyramids.tensor(k, "ij0").tolist()):
        if row <= i < row + rows and col <= j < col + cols:
            top, left = (i - row) * P, (j - col) * P
            x[0, :, top:top + P, left:left + P] = pyramids.read(k, 0, n)["x"]
    return x

# ----- 2. Areas read off an image -----

def box(x, side):
    """Mean over squares, near the border over the part inside. in, out: (N,C,h,w)."""
    return F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)

def smooth(x):
    """Colours smoothed over 36 pixels, more than a nucleus or a fat cell's wall: (N,3,H,W) -> (N,H/4,W/4,3)."""
    return box(box(F.avg_pool2d(x.float(), 4), 5), 5).movedim(1, -1)

def tissue_colours(pyramids, n=1024):
    """Colours of TISSUES (4,3), measured on training patches, and the metric (3,3) to compare by: in it all directions
    vary alike within a tissue, so that a stain, which makes a slide redder or paler, counts little."""
    batch = fixed_batch(pyramids, "train", 0, n)
    places = zip(batch["slide"].tolist(), batch["ij"].tolist())
    maps = [region_map(pyramids, k, (i, j, 1, 1)) for k, (i, j) in places]
    label = torch.from_numpy(np.stack(maps)).flatten().long()                               # (n,)
    pixels = smooth(batch["x"]).reshape(-1, 3)                                              # (n,3)
    if pyramids.patch < 32 or len(label.unique()) < KINDS:
        raise UserError(f"{pyramids.folder}: give patches of at least 32 pixels that show all of {TISSUES}")
    mean = torch.stack([pixels[label == t].mean(0) for t in range(KINDS)])                  # (4,3)
    spread = pixels - mean[label]                                                           # (n,3)
    covariance = spread.T @ spread / len(spread)
    metric = torch.linalg.cholesky(torch.linalg.inv(covariance + 1e-6 * torch.eye(3)))
    return mean @ metric, metric

def fractions(x, colours):
    """Share of the area of each of TISSUES (N,4): the nearest of `tissue_colours` to each smoothed pixel, then the
    majority within 68 pixels, for the blurred rim of background looks like fat. in: x (N,3,H,W) in [-1,1]."""
    mean, metric = colours
    found = torch.cdist(smooth(x) @ metric.to(x), mean.to(x)).argmin(-1)                    # (N,h,w)
    votes = box(F.one_hot(found, KINDS).movedim(-1, 1).float(), 17)                         # (N,4,h,w)
    return F.one_hot(votes.argmax(1), KINDS).double().mean((1, 2))

def spearman(a, b):
    """Rank correlation of each column of a, b (n,k); ties share their mean rank. out: (k,) float64, 0 if constant."""
    units = []
    for x in (a, b):
        less = (x[:, None] < x).double()                                                    # (n,n,k)
        rank = less.sum(0) - less.sum(1)                    # twice the rank about the middle
        units.append(F.normalize(rank, dim=0))
    return (units[0] * units[1]).sum(0)

def agreement(truth, found, seed=0):
    """Hold shares (n,4) found in images against the true ones. out: dict of error (4,), spearman (4,), shuffled (4,),
    the same with captions and images paired at random, and confusion (4,4), the dominant tissue: true, found."""
    truth, found = truth.double(), found.double()
    other = truth[torch.randperm(len(truth), generator=generator(seed))]
    confusion = torch.zeros(KINDS, KINDS, dtype=torch.long)
    for pair in zip(truth.argmax(1), found.argmax(1)):
        confusion[pair] += 1
    error = (truth - found).abs().mean(0)
    return {"error": error, "spearman": spearman(truth, found), "shuffled": spearman(other, found),
            "confusion": confusion}

def print_agreement(table):
    print(f"{'':>10} {'error':>9} {'Spearman':>9} {'shuffled':>9}  dominant: found {' '.join(TISSUES)}")
    columns = torch.stack([table[key] for key in ("error", "spearman", "shuffled")], 1)     # (4,3)
    for name, row, counts in zip(TISSUES, columns.tolist(), table["confusion"].tolist()):
        numbers = " ".join(f"{number:>9.3f}" for number in row)
        print(f"{name:>10} {numbers} {'':>16}", *(f"{n:>{len(word)}}" for n, word in zip(counts, TISSUES)))

# ----- 3. How exactly -----

@dataclass
class Config:
    data: str = ""        # data folder of toy slides
    n: int = 64           # held-out regions
    tiles: int = 8        # side of a region in base tiles
    seed: int = 0

def main(argv):
    """Show how exactly `fractions` reads held-out regions, whose maps are known."""
    cfg = configure(Config, argv, words=("data",), doc=__doc__)
    at_least(cfg, n=2)
    if not cfg.data:
        raise UserError("say which toy slides: python -m text.tissues data/toy")
    pyramids, true, found = Pyramids(cfg.data), [], []
    colours = tissue_colours(pyramids)
    for k, block, region, _ in regions(pyramids, "test", cfg.n, cfg.tiles, cfg.seed):
        true.append(shares_of(region))
        found.append(fractions(real_image(pyramids, k, block), colours)[0])
    print(f"{len(true)} held-out regions of {cfg.tiles} x {cfg.tiles} tiles; areas read off the real images:")
    print_agreement(agreement(torch.tensor(true), torch.stack(found)))

if __name__ == "__main__":
    cli(main)
