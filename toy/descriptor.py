"""What a tile looks like, in 96 numbers that need no weights: colour, its layout, edges.

in:  tiles (B,3,P,P) float in [0,1], P a multiple of 16   out: e (B,96)     read next: toy/make.py"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

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
        at_once = min(max(2 ** 18 // tiles[0, :, :, 0].size, 1), 16)
    e = []
    for some in torch.from_numpy(np.array(tiles)).split(at_once):  # copied: Pillow's pixels are read-only
        image = some.to(device).movedim(-1, 1).float() / 255                    # (n,3,P,P) in [0,1]
        e.append(encoder(image).float().cpu())
    return torch.cat(e)

class Stats(nn.Module):
    """Describe tiles by colour mean and deviation, colour layout, red histogram, edge energy and orientation.
    in:  image (B,3,H,W) in [0,1], H and W multiples of 16. out: (B,96) float32, divided by `std` when that is given;
    not centred: standardising a centred token would amplify noise near the mean.
    raises: ValueError for another size or a `std` of another length."""
    name = "stats"
    embed_dim = sum(PARTS.values())
    scaled = True  # wants to be divided by the deviation over training tiles (`fit`)

    def __init__(self, std=None):
        super().__init__()
        std = torch.as_tensor([1.0] * self.embed_dim if std is None else std, dtype=torch.float32)
        if std.shape != (self.embed_dim,):
            raise UserError(f"got {tuple(std.shape)} deviations for the encoder 'stats', which has {self.embed_dim} "
                            f"numbers: the data were made with another version, build them again")
        self.register_buffer("std", std)

    def forward(self, image):
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % 16 or image.shape[3] % 16:
            raise UserError(f"got tiles {tuple(image.shape)}, stats takes (B,3,H,W), multiples of 16: see --patch")
        image = image.float()
        cells = F.adaptive_avg_pool2d(image, LAYOUT)                            # (B,3,4,4)
        mean = cells.mean((2, 3), keepdim=True)                                 # (B,3,1,1)
        deviation = (image - mean).square().mean((2, 3)).clamp_min(1e-8).sqrt()
        red = F.avg_pool2d(image[:, :1], 2)                                     # (B,1,H/2,W/2); less work, nuclei stay
        fine, coarse = histogram(red, *FINE, 1), histogram(red, *COARSE, QUADS)
        energy, orientation = edges(image.mean(1, True))
        parts = [mean.flatten(1), deviation, cells[:, :2].flatten(1), fine, coarse, energy, orientation]
        return torch.cat(parts, 1) / self.std                                   # (B,96)

    @classmethod
    @torch.no_grad()
    def fit(cls, batches):
        """in: an iterable of tile batches (B,3,H,W). out: std (E,), the deviation of each number over all tiles.
        The floor keeps a number that never varied in training (plain images) from exploding later."""
        e = torch.cat([cls()(x) for x in batches])
        return e.std(0, correction=0).clamp_min(0.01)

def histogram(v, low, high, bins, grid):
    """Soft histogram per cell of a grid: in v (B,1,H,W), out (B,bins*grid*grid).
    The root compresses rare, strong values, which would otherwise own the standardised token."""
    width = (high - low) / (bins - 1)
    hats = []
    for i in range(bins):
        near = F.relu(1 - (v - low - i * width).abs() / width)                  # (B,1,H,W)
        hats.append(F.adaptive_avg_pool2d(near, grid))
    return torch.cat(hats, 1).flatten(1).clamp_min(1e-8).sqrt()

def edges(grey):
    """Edge energy per quadrant and double-angle orientation, per octave: in (B,1,H,W), out (B,12), (B,6)."""
    energy, orientation = [], []
    for _ in range(OCTAVES):
        corner = grey[:, :, 1:, 1:]
        gx = corner - grey[:, :, 1:, :-1]
        gy = corner - grey[:, :, :-1, 1:]
        tensor = torch.cat([gx * gx + gy * gy, gx * gx - gy * gy, 2 * gx * gy], 1)  # structure tensor (B,3,.,.)
        tensor = F.adaptive_avg_pool2d(tensor, QUADS)                           # (B,3,2,2)
        root = tensor[:, :1].clamp_min(1e-8).sqrt()
        energy.append(root.flatten(1))
        orientation.append((tensor[:, 1:] / (root + 0.01)).mean((2, 3)))        # back to the unit of a gradient
        grey = F.avg_pool2d(grey, 2)
    return torch.cat(energy, 1), torch.cat(orientation, 1)
