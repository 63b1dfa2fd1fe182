"""What a tile looks like, in 96 numbers that need no weights: colour, its layout, edges.

in:  tiles (B,3,P,P) float in [0,1], P a multiple of 16   out: e (B,96)     read next: toy/make.py"""
import numpy as np
import torch
from torch.nn import Module

from common import UserError

LAYOUT = 4                        # layout of red and green on a 4x4 sub-grid; blue hardly varies under these stains
QUADS = 2                         # edges, and a coarse histogram, on a 2x2 sub-grid
OCTAVES = 3                       # edge scales: pixels, pairs of pixels, fours
FINE, COARSE = (0.15, 0.95, 16), (0.15, 0.9, 6)  # red histograms, first and last centre, bins: nuclei absorb red
PARTS = {"colour mean": 3, "colour deviation": 3, "colour layout": 2 * LAYOUT**2, "red histogram": FINE[2],
         "same per quadrant": COARSE[2] * QUADS**2, "edge energy": OCTAVES * QUADS**2, "edge orientation": 2 * OCTAVES}

@torch.no_grad()
def embed(encoder, tiles, device="cpu"):
    """Embed base tiles: (n,P,P,3) uint8 -> e (n,E) float32."""
    at_once = 64
    if str(device) == "cpu":  # what its cache holds, 4 tiles of 256 pixels: faster, and smaller
        pixels = tiles[0, :, :, 0].size
        at_once = min(max(2 ** 18 // pixels, 1), 16)
    e = []
    for k in range(0, len(tiles), at_once):
        planes = np.moveaxis(tiles[k:k + at_once], -1, 1)                       # (n,3,P,P)
        planes = np.ascontiguousarray(planes)                                   # colours apart: all else is faster
        image = torch.from_numpy(planes).to(device).float().div_(255)           # in [0,1]
        e.append(encoder(image).float().cpu())
    return torch.cat(e)

def spread(e):
    """The deviation of each number of embeddings (n,E), to divide it by: (E,). The floor keeps a number that never
    varied in training (plain images) from exploding later."""
    return e.std(0, correction=0).clamp_min(0.01)

class Stats(Module):
    """Describe tiles by colour mean and deviation, colour layout, red histogram, edge energy and orientation.
    in:  image (B,3,H,W) in [0,1], H and W multiples of 16. out: (B,96) float32, divided by `std` when that is given;
    not centred: standardising a centred token would amplify noise near the mean.
    raises: ValueError for another size or a `std` of another length."""
    name = "stats"
    embed_dim = sum(PARTS.values())
    scaled = True  # wants to be divided by the deviation over training tiles (`spread`)

    def __init__(self, std=None):
        super().__init__()
        std = torch.as_tensor([1.0] * self.embed_dim if std is None else std, dtype=torch.float32)
        if std.shape != (self.embed_dim,):
            raise UserError(f"got {tuple(std.shape)} deviations for the encoder 'stats', which has {self.embed_dim} "
                            f"numbers: the data were made with another version, build them again")
        self.register_buffer("std", std)

    def forward(self, image):
        shape = tuple(image.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] % 16 or shape[3] % 16:
            raise UserError(f"got tiles {shape}, stats takes (B,3,H,W), multiples of 16: see --patch")
        image = image.float()
        half = halved(image)                                                    # (B,3,H/2,W/2)
        cells = means(half, LAYOUT)                                             # (B,3,16)
        mean = cells.mean(2)                                                    # (B,3)
        deviation = deviations(image, mean).clamp_min(1e-4)
        layout = cells[:, :2].flatten(1)                                        # (B,32)
        red = half[:, 0]                                                        # less work, nuclei stay
        fine = histogram(red, *FINE, 1)
        coarse = histogram(red, *COARSE, QUADS)
        energy, orientation = edges(image.mean(1))
        parts = [mean, deviation, layout, fine, coarse, energy, orientation]
        return torch.cat(parts, 1) / self.std                                   # (B,96)

def halved(x):
    """Halve the resolution: (...,H,W) -> (...,H/2,W/2). Twice as fast as pooling in PyTorch 2.13."""
    rows = x[..., ::2, :] + x[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) / 4

def means(x, grid):
    """Means over the cells of a grid: (...,H,W) -> (...,grid*grid)."""
    rows = x.unflatten(-2, (grid, -1)).mean(-2)                                 # (...,grid,W)
    return rows.unflatten(-1, (grid, -1)).mean(-1).flatten(-2)

def deviations(x, mean):
    """Deviations of x (B,C,H,W) from its means (B,C): (B,C)."""
    off = x - mean[..., None, None]
    root = x[0, 0].numel() ** 0.5
    return off.flatten(2).norm(dim=2) / root

def histogram(v, low, high, bins, grid):
    """Soft histogram per cell of a grid: in v (B,H,W), out (B,bins*grid*grid).
    A value counts for the two centres around it, the nearer the more. The root compresses rare, strong values, which
    would otherwise own the standardised token."""
    per_unit = (bins - 1) / (high - low)
    place = (v - low) * per_unit + 1                                            # 1 to bins: at that centre
    place = place.clamp(0, bins + 1)
    cells = place.unflatten(2, (grid, -1)).unflatten(1, (grid, -1))             # (B,grid,h,grid,w)
    cells = cells.transpose(2, 3).flatten(3).flatten(1, 2)                      # (B,grid*grid,n)
    below = cells.long().clamp(max=bins)                                        # the centre below, or 0
    nearness = cells - below
    sums = v.new_zeros(*cells.shape[:2], bins + 2)                              # and what lies beyond the ends
    sums = sums.scatter_add(2, below, 1 - nearness)
    sums = sums.scatter_add(2, below + 1, nearness)
    shares = sums[..., 1:-1].mT / cells.shape[2]                                # (B,bins,grid*grid)
    return shares.flatten(1).clamp_min(1e-8).sqrt()

def edges(grey):
    """Edge energy per quadrant and double-angle orientation, per octave: in (B,H,W), out (B,12), (B,6)."""
    energy, orientation = [], []
    for _ in range(OCTAVES):
        corner = grey[:, 1:, 1:]
        gx = corner - grey[:, 1:, :-1]
        gy = corner - grey[:, :-1, 1:]                                          # (B,H-1,W-1)
        xx, yy, xy = (quadrants(a * b) for a, b in ((gx, gx), (gy, gy), (gx, gy)))  # structure tensor (B,4) each
        root = (xx + yy).clamp_min(1e-8).sqrt()
        energy.append(root)
        double = torch.stack([xx - yy, 2 * xy], 1)                              # (B,2,4)
        orientation.append((double / (root[:, None] + 0.01)).mean(2))           # back to the unit of a gradient
        grey = halved(grey)
    return torch.cat(energy, 1), torch.cat(orientation, 1)

def quadrants(x):
    """Means over the quadrants of an odd number of rows and columns, which share the middle ones: (B,H,W) -> (B,4)."""
    h, w = x.shape[1] // 2 + 1, x.shape[2] // 2 + 1
    rows = torch.stack([x[:, :h].mean(1), x[:, -h:].mean(1)], 1)                # (B,2,W)
    left, right = rows[..., :w].mean(2), rows[..., -w:].mean(2)                 # (B,2) each
    return torch.stack([left, right], 2).flatten(1)
