"""Data that others have prepared: the official per-sample folders of BRCA and NAIP, and embeddings by CLAM or TRIDENT.

`Samples` reads the folders that the published models were trained on (root/20x/0/17_vae.npy beside 17_uni_grid.npy, or
root/1x/17_vae.npy beside 17_dino_grid.npy), `read_features` tile embeddings with coordinates.
in:  a folder; or SLIDE.h5, SLIDE.pt   out: items with tokens (64,E), mask (64,), s, z (3,h,w); or a grid (Gh,Gw,E)
read next: slides/build.py"""
from math import isqrt
from pathlib import Path

import numpy as np
import torch

from common import UserError
from data import GRID, Pyramids
from slides.bags import placed
from slides.pictures import picture
from slides.tiff import readable

# ----- 1. The official folders -----

# folder of each scale, finest first; the ending of embeddings; the encoder. official: NAIP's names are exponents, not
# factors, so 3x halves the resolution twice. BRCA holds a million samples per subfolder and puts channels first.
LAYOUTS = {
    "brca": (("20x", "10x", "5x", "2_5x", "1_25x", "0_625x", "0_3125x", "0_15625x"), "uni_grid", "uni"),
    "naip": (("1x", "2x", "3x", "4x"), "dino_grid", "dinov2_reg"),
}

def layout_of(folder):
    """The name of the layout that a folder has, "" if it has none."""
    for name, (scales, _, _) in LAYOUTS.items():
        if any((Path(folder) / scale).is_dir() for scale in scales):
            return name
    return ""

class Samples:
    """An official folder, read like data.Pyramids: one long training slide, none held out, and latents of the
    published VAE on disk. Every sample that has latents counts, in order of its number.
    raises: UserError if there is none, or, on reading, naming a file that is missing, damaged or of another shape."""
    official = True
    weights = mpp = None  # not known
    names, count, item, latent_scale = Pyramids.names, Pyramids.count, Pyramids.item, Pyramids.latent_scale

    def __init__(self, folder):
        self.folder, self.layout = Path(folder), layout_of(folder)
        if not self.layout:
            known = ", ".join(name for scales, _, _ in LAYOUTS.values() for name in scales)
            raise UserError(f"{folder} holds no official samples: there is none of the folders {known}")
        self.folders, self.ending, self.encoder = LAYOUTS[self.layout]
        self.scales = len(self.folders)  # whether or not all are there: the published Summarizers know so many
        self.ids = [self.numbers(self.folder / name) for name in self.folders]
        counts = [len(ids) for ids in self.ids]
        if not any(counts):
            raise UserError(f"{folder} holds no file like {self.path(0, 17, 'vae.npy')}")
        self.slides = [{"name": self.folder.name, "file": "", "split": "train", "counts": counts}]
        s = next(s for s, n in enumerate(counts) if n)
        first = int(self.ids[s][0])                                            # it says what all must be
        self.patch, self.embed_dim = 0, 0                                      # 0: any will do
        self.patch, self.embed_dim = 4 * self.latent(s, first).shape[-1], len(self.grid(s, first))
        self.std = [1.0] * self.embed_dim
        self.images = self.picture(s, first) is not None

    def numbers(self, folder):
        """The numbers of all samples of one scale, sorted; listing millions takes a minute or two."""
        files = folder.glob("*_vae.npy" if self.layout == "naip" else "*/*_vae.npy")
        numbers = (file.name.removesuffix("_vae.npy") for file in files)
        return np.sort(np.array([int(n) for n in numbers if n.isdigit()], np.int64))

    def path(self, s, number, ending):
        sub = f"{number // 1_000_000}/" if self.layout == "brca" else ""
        return self.folder / self.folders[s] / f"{sub}{number}_{ending}"

    def array(self, path):
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        except (OSError, ValueError, EOFError, TypeError) as err:
            raise UserError(f"{path} cannot be read ({err}): copy this sample again, or remove its _vae.npy") from err

    def latent(self, s, number):
        """z (3,h,h) float32."""
        path = self.path(s, number, "vae.npy")
        z = self.array(path)
        side = self.patch // 4 or z.shape[-1]
        if z.shape != (3, side, side):
            raise UserError(f"{path} is {tuple(z.shape)}, expected latents (3,{side},{side})")
        return z

    def grid(self, s, number):
        """e (E,G,G) float32, G = 2^s, or 8 where it was pooled."""
        path = self.path(s, number, self.ending + ".npy")
        e = self.array(path)
        if e.ndim == 1:
            e = e[:, None]                                                     # (E,1)
        elif e.ndim == 2 and self.layout == "naip":
            e = e.mT                                                           # (E,G*G)
        side = isqrt(e.shape[-1])
        if e.shape != (self.embed_dim or len(e), side**2) or side not in (2**s, min(2**s, GRID)):
            raise UserError(f"{path} holds {tuple(e.shape)} as (channels, tiles), expected "
                            f"({self.embed_dim or 1024}, {4**s}) at scale {s}")
        return e.unflatten(1, (side, side))

    def picture(self, s, number):
        """x (3,P,P) in [-1,1], None if the sample has no picture: they are optional."""
        path = self.path(s, number, "img.npy")                                 # the bytes of a file, as an array
        if self.layout == "naip":
            path = path.with_name(f"{number}.jpg")
        if not path.exists():
            return None
        with readable(path):
            data = path.read_bytes() if path.suffix == ".jpg" else np.load(path, allow_pickle=False).tobytes()
            with picture(path, data=data) as opened:
                image = np.array(opened.convert("RGB"))
        return torch.from_numpy(image).movedim(-1, 0).float() / 127.5 - 1

    def read(self, k, s, n, want=("x",)):
        """Sample n of scale s: what is wanted of x, z and e, as from Pyramids."""
        number, out = int(self.ids[s][n]), {}
        if "z" in want:
            out["z"] = self.latent(s, number) * self.latent_scale
        if "x" in want:
            out["x"] = self.picture(s, number)
            if out["x"] is None:
                raise UserError(f"sample {number} of {self.folder / self.folders[s]} has no picture: use its latents")
        if "e" in want:
            out["e"] = self.grid(s, number)
        return out

# ----- 2. Embeddings with coordinates -----

def read_features(path, side=0):
    """Put the embeddings of one image on their grid.
    in:  SLIDE.h5, SLIDE.pt, or neither ending, to take whichever there is; side, in pixels of level 0, of a tile that
    is alone and does not say it.
    out: e (Gh,Gw,E) float16, 0 where there is no tile; there (Gh,Gw) bool; origin (x, y) and side in pixels of level 0.
    raises: UserError for a damaged file, or tiles that overlap or lie on no common grid."""
    files = [Path(f"{path}{end}") for end in (".h5", ".pt", "")]
    path = next((file for file in files if file.is_file()), files[-1])
    x, coords, told, _ = placed(path)
    side = told or side or 1
    origin = coords.amin(0)
    steps = coords - origin                                                    # (N,2) x, y
    column, row = (steps // side).T
    w, h = int(column.max()) + 1, int(row.max()) + 1
    index = row * w + column
    if (steps % side).any() or len(index.unique()) < len(index) or h * w > 10_000 + 100 * len(index):
        raise UserError(f"{path}: {len(x)} tiles of side {side} lie on no common grid: cut the slide without overlap, "
                        f"on one grid for all pieces of tissue, as TRIDENT does (CLAM starts afresh for each)")
    e = torch.zeros(h * w, x.shape[1], dtype=torch.float16)
    e[index] = x.half()
    there = torch.zeros(h * w, dtype=torch.bool)
    there[index] = True
    return e.view(h, w, -1), there.view(h, w), tuple(origin.tolist()), side
