"""Truth of toy images: the share of the area of each tissue, from the region map, or read off the image by its colours.

A model drawn to a caption can so be held against the caption (L Fig. 4). Colours are learned from training slides; on
held-out slides the areas read off the real image can be held against their map, which says how far to believe them.

in:  x (N,3,H,W) in [-1,1]   out: shares (N,4), in the order of toy.TISSUES
run: python tissues.py data/toy     read next: captions.py
"""
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, cli, configure, generator, open_tensors
from data import Pyramids, fixed_batch
from text.wording import describe, shares_of
from toy.tissue import TISSUES

# ----- 1. Regions of toy slides -----

def region_map(pyramids, k, block=None):
    """Tissues (h,w) uint8 of slide k, or of a block (row, col, rows, cols) of its base tiles, at a quarter of the
    resolution. raises: UserError if the data set has no region maps."""
    path = pyramids.folder / pyramids.slides[k]["file"]
    with open_tensors(path) as f:
        if "region" not in f.keys():
            raise UserError(f"{path} holds no region map: only toy slides (python data.py toy) can be described")
        region, q = f.get_tensor("region").numpy(), pyramids.patch // 4
    row, col, rows, cols = block or (0, 0, *(n // pyramids.patch for n in pyramids.slides[k]["size"]))
    return region[row * q:(row + rows) * q, col * q:(col + cols) * q]


def regions(pyramids, split, n, tiles, seed):
    """n regions at random, over the slides in turn: yields (slide, block, its map (h,w), a random.Random)."""
    slides = [k for k, x in enumerate(pyramids.slides)
              if x["split"] == split and min(x["size"]) >= tiles * pyramids.patch]
    if tiles < 1 or n and not slides:
        raise UserError(f"{pyramids.folder} has no {split!r} slide of {tiles} x {tiles} base tiles: take fewer "
                        f"--tiles, or make toy slides with some of that split")
    for i in range(n):
        k, rng = slides[i % len(slides)], random.Random(f"{seed} {split} {i}")
        block = [rng.randrange(side // pyramids.patch - tiles + 1) for side in pyramids.slides[k]["size"]]
        yield k, (*block, tiles, tiles), region_map(pyramids, k, (*block, tiles, tiles)), rng


def real_image(pyramids, k, block):
    """The pixels (1,3,h,w) of a block of base tiles; tiles that the data set did not keep are black."""
    (row, col, rows, cols), P = block, pyramids.patch
    x = torch.full((1, 3, rows * P, cols * P), -1.0)
    for n, (i, j) in enumerate(pyramids.tensor(k, "ij0").tolist()):
        if row <= i < row + rows and col <= j < col + cols:
            x[0, :, (i - row) * P:(i - row + 1) * P, (j - col) * P:(j - col + 1) * P] = pyramids.read(k, 0, n)["x"]
    return x


# ----- 2. Areas read off an image -----

def box(x, side):
    """Mean over squares, near the border over the part inside. in, out: (N,C,h,w)."""
    return F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)


def smooth(x):
    """Colours at a quarter of the resolution, (N,3,H,W) -> (N,3,H/4,W/4), smoothed over 36 pixels, more than a nucleus
    and a fat cell's wall."""
    return box(box(F.avg_pool2d(x.float(), 4), 5), 5)


def tissue_colours(pyramids, n=1024):
    """Colours of TISSUES (4,3), measured on training patches, and the metric (3,3) to compare by: in it all directions
    vary alike within a tissue, so that a stain, which makes a slide redder or paler, counts little."""
    batch, P = fixed_batch(pyramids, "train", 0, n), pyramids.patch
    region = np.stack([region_map(pyramids, k, (i, j, 1, 1))
                       for k, (i, j) in zip(batch["slide"].tolist(), batch["ij"].tolist())])
    pixels, label = smooth(batch["x"]).movedim(1, -1).reshape(-1, 3), torch.from_numpy(region).flatten()
    if P < 32 or len(label.unique()) < len(TISSUES):
        raise UserError(f"{pyramids.folder}: tissues are told apart on patches of at least 32 pixels that show all of "
                        f"{', '.join(TISSUES)}")
    mean = torch.stack([pixels[label == t].mean(0) for t in range(len(TISSUES))])           # (4,3)
    spread = pixels - mean[label.long()]                                                    # (n,3)
    metric = torch.linalg.cholesky(torch.linalg.inv(spread.T @ spread / len(spread) + 1e-6 * torch.eye(3)))
    return mean @ metric, metric


def fractions(x, colours):
    """Share of the area of each of TISSUES (N,4): the nearest of `tissue_colours` to each smoothed pixel, then the
    majority within 68 pixels, for the blurred rim of background looks like fat. in: x (N,3,H,W) in [-1,1]."""
    found = torch.cdist(smooth(x).movedim(1, -1) @ colours[1].to(x), colours[0].to(x)).argmin(-1)  # (N,h,w)
    votes = box(F.one_hot(found, len(TISSUES)).movedim(-1, 1).float(), 17)                  # (N,4,h,w)
    return F.one_hot(votes.argmax(1), len(TISSUES)).double().mean((1, 2))


def spearman(a, b):
    """Rank correlation of each column of a, b (n,k); ties share their mean rank. out: (k,) float64, 0 if constant."""
    def ranks(x):
        less = (x[:, None] < x[None]).double()
        rank = less.sum(0) - less.sum(1)                                       # twice the rank about the middle
        return rank / rank.norm(dim=0).clamp(min=1e-12)
    return (ranks(torch.as_tensor(a)) * ranks(torch.as_tensor(b))).sum(0)


def agreement(truth, found, seed=0):
    """Hold shares (n,4) found in images against the true ones. out: dict of error (4,), spearman (4,), shuffled (4,),
    the same with captions and images paired at random, and confusion (4,4), the dominant tissue: true, found."""
    truth, found = (torch.as_tensor(x).double() for x in (truth, found))
    other = truth[torch.randperm(len(truth), generator=generator(seed))]
    cells = truth.argmax(1) * len(TISSUES) + found.argmax(1)
    return {"error": (truth - found).abs().mean(0), "spearman": spearman(truth, found),
            "shuffled": spearman(other, found), "confusion": torch.bincount(cells, minlength=16).view(4, 4)}


def print_agreement(table):
    print(f"{'':>10} {'error':>9} {'Spearman':>9} {'shuffled':>9}  dominant: found {' '.join(TISSUES)}")
    for t, name in enumerate(TISSUES):
        numbers = " ".join(f"{table[k][t]:>9.3f}" for k in ("error", "spearman", "shuffled"))
        counts = " ".join(f"{n:>{len(found)}}" for n, found in zip(table["confusion"][t].tolist(), TISSUES))
        print(f"{name:>10} {numbers} {'':>17}{counts}")


# ----- 3. How exactly -----

@dataclass
class Config:
    data: str = ""        # data folder of toy slides
    n: int = 64           # held-out regions
    tiles: int = 8        # side of a region in base tiles
    seed: int = 0


def main(argv):
    """Show captions, and how exactly `fractions` reads held-out regions, whose maps are known."""
    cfg = configure(Config, argv, words=("data",), doc=__doc__)
    if not cfg.data or cfg.n < 2:
        raise UserError("say which toy slides, and at least 2 regions: python tissues.py data/toy")
    pyramids, true, found = Pyramids(cfg.data), [], []
    colours = tissue_colours(pyramids)
    for k, block, region, rng in regions(pyramids, "test", cfg.n, cfg.tiles, cfg.seed):
        true.append(shares_of(region))
        found.append(fractions(real_image(pyramids, k, block), colours)[0])
        if len(true) <= 8:
            print(f"{pyramids.slides[k]['name']} {' '.join(f'{v:.2f}' for v in true[-1])}  {describe(region, rng)}")
    print(f"\n{len(true)} held-out regions of {cfg.tiles} x {cfg.tiles} tiles; areas read off the real images:")
    print_agreement(agreement(torch.tensor(true), torch.stack(found)))


if __name__ == "__main__":
    cli(main)
