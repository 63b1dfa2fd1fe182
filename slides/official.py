"""Data that others have prepared: the official per-sample folders of BRCA and NAIP, and embeddings by CLAM or TRIDENT.

`Samples` reads the folders that the published models were trained on (root/20x/0/17_vae.npy beside 17_uni_grid.npy, or
root/1x/17_vae.npy beside 17_dino_grid.npy) and gives the items that pyramids give, so that train.py takes either.
`read_features` puts tile embeddings with coordinates on their grid, so that nobody has to embed twice:
python data.py build --images=SLIDE --features=FILE_OR_FOLDER takes them instead of an encoder.

in:  a folder; or SLIDE.h5, SLIDE.pt   out: items with tokens (64,E), mask (64,), s, z (3,h,w); or a grid (Gh,Gw,E)
run: python published.py FOLDER_OR_FILE     says what is there     read next: data.py
"""
import io
from math import gcd, isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import UserError, cli
from data import GRID
from summarizer import pack_grid, standardize

# ----- 1. The official folders -----

# folder of each scale, finest first; the ending of embeddings; the encoder. official: NAIP's names are exponents, not
# factors, so 3x halves the resolution twice. BRCA holds a million samples per subfolder and puts channels first.
LAYOUTS = {
    "brca": (("20x", "10x", "5x", "2_5x", "1_25x", "0_625x", "0_3125x", "0_15625x"), "uni_grid", "uni"),
    "naip": (("1x", "2x", "3x", "4x"), "dino_grid", "dinov2_reg"),
}


def layout_of(folder):
    """The name of the layout that a folder has, "" if it has none."""
    return next((name for name, x in LAYOUTS.items() if any((Path(folder) / scale).is_dir() for scale in x[0])), "")


class Samples:
    """An official folder, read like data.Pyramids: one long training slide, none held out, and latents of the
    published VAE on disk. Every sample that has latents counts, in order of its number.

    raises: UserError if there is none, or, on reading, naming a file that is missing, damaged or of another shape.
    """
    official = True

    def __init__(self, folder, latent_scale=1.0):
        self.folder, self.layout, self.latent_scale = Path(folder), layout_of(folder), latent_scale
        if not self.layout:
            raise UserError(f"{folder} holds no official samples: there is none of the folders "
                            f"{', '.join(s for scales, *_ in LAYOUTS.values() for s in scales)}")
        names, self.ending, self.encoder = LAYOUTS[self.layout]
        self.weights = self.mpp = None
        self.folders, self.ids = names, [self.numbers(self.folder / name) for name in names]
        counts = [len(x) for x in self.ids]
        if not any(counts):
            raise UserError(f"{folder} holds no file like {self.path(0, 17, 'vae.npy')}")
        self.scales = len(names)  # whether or not all are there: the published Summarizers know so many
        self.slides = [{"name": self.folder.name, "file": "", "split": "train", "counts": counts}]
        s = next(s for s, n in enumerate(counts) if n)
        self.embed_dim, self.patch, number = 0, 0, int(self.ids[s][0])       # the first sample says what all must be
        self.patch, self.embed_dim = 4 * self.latent(s, number).shape[-1], len(self.grid(s, number))
        self.std, self.images = [1.0] * self.embed_dim, self.picture(s, number) is not None

    def numbers(self, folder):
        """The numbers of all samples of one scale, sorted; listing millions takes a minute or two."""
        folders = [folder] if self.layout == "naip" else [f for f in folder.glob("*") if f.name.isdigit()]
        found = [int(f.name[:-8]) for sub in folders if sub.is_dir() for f in sub.iterdir()
                 if f.name.endswith("_vae.npy") and f.name[:-8].isdigit()]
        return np.sort(np.array(found, np.int64))

    def path(self, s, number, ending):
        sub = f"{number // 1_000_000}/" if self.layout == "brca" else ""
        return self.folder / self.folders[s] / f"{sub}{number}_{ending}"

    def array(self, path):
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        except (OSError, ValueError, EOFError, TypeError) as err:
            raise UserError(f"{path} cannot be read ({err}): copy this sample again, or remove its _vae.npy") from err

    def latent(self, s, number):
        """z (3,h,w) float32."""
        z, side = self.array(path := self.path(s, number, "vae.npy")), self.patch // 4
        if z.ndim != 3 or z.shape[0] != 3 or z.shape[1] != z.shape[2] or side and z.shape[1] != side:
            raise UserError(f"{path} is {tuple(z.shape)}, expected latents (3,{side or 64},{side or 64})")
        return z

    def grid(self, s, number):
        """e (E,G,G) float32, G = 2^s, or 8 where it was pooled."""
        e = self.array(path := self.path(s, number, self.ending + ".npy"))
        e = e[:, None] if e.ndim == 1 else e.mT if self.layout == "naip" and e.ndim == 2 else e       # (E,G*G)
        side = isqrt(e.shape[-1])
        if e.ndim != 2 or side**2 != e.shape[1] or side not in (2**s, min(2**s, GRID)) or len(e) != (
                self.embed_dim or len(e)):
            raise UserError(f"{path} holds {tuple(e.shape)} as (channels, tiles), expected "
                            f"({self.embed_dim or 1024}, {4**s}) at scale {s}")
        return e.unflatten(1, (side, side))

    def picture(self, s, number):
        """x (3,P,P) in [-1,1], None if the sample has no picture: they are optional."""
        jpeg = self.folder / self.folders[s] / f"{number}.jpg"
        path = jpeg if self.layout == "naip" else self.path(s, number, "img.npy")  # the bytes of a file, as an array
        if not path.exists():
            return None
        try:
            data = path.read_bytes() if path is jpeg else np.load(path, allow_pickle=False).tobytes()
            image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        except Exception as err:  # Pillow's decoders raise nearly anything on damaged files
            raise UserError(f"{path} cannot be read ({type(err).__name__}: {err}): copy it again") from err
        return torch.from_numpy(image).movedim(-1, 0).float().div_(127.5).sub_(1)

    def names(self, split):
        return [x["name"] for x in self.slides if x["split"] == split]

    def count(self, split, s):
        return sum(x["counts"][s] for x in self.slides if x["split"] == split)

    def item(self, k, s, n, want):
        """Sample n of scale s: tokens (64,E), mask (64,), s, slide, and what is wanted of x, z, e, as from Pyramids."""
        number = int(self.ids[s][n])
        out = {"z": self.latent(s, number) * self.latent_scale} if "z" in want else {}
        if "x" in want:
            out["x"] = self.picture(s, number)
            if out["x"] is None:
                raise UserError(f"sample {number} of {self.folder / self.folders[s]} has no picture: only its "
                                f"latents can be used")
        e = self.grid(s, number)
        out["tokens"], out["mask"] = pack_grid(standardize(e))
        return out | ({"e": e} if "e" in want else {}) | {"s": s, "slide": k}


# ----- 2. Embeddings with coordinates -----

def read_arrays(path):
    """in: SLIDE.h5 by CLAM or TRIDENT, or SLIDE.pt. out: features (N,E), coords (N,2), the side of a tile in pixels of
    level 0, or 0 if the file does not say."""
    if not path.is_file():
        raise UserError(f"no file {path}: check the path")
    try:
        if path.suffix == ".pt":
            found = torch.load(path, map_location="cpu", weights_only=True)
            if torch.is_tensor(found):  # CLAM keeps coordinates in the folder beside
                return found, *read_arrays(path.parent.parent / "h5_files" / f"{path.stem}.h5")[1:]
            return found["features"], found["coords"], found.get("patch_size_level0", 0)
        import h5py
        with h5py.File(path, "r") as f:
            side = f["coords"].attrs.get("patch_size_level0", 0)
            return torch.from_numpy(f["features"][()]), torch.from_numpy(f["coords"][()]), side
    except ImportError as err:
        raise UserError(f"{path} needs the extra: pip install -e '.[h5]'") from err
    except UserError as err:
        raise UserError(f"{path} holds no coordinates, and beside it there are none: {err}") from err
    except Exception as err:  # torch and h5py meet damaged bytes, or other names, with nearly anything
        raise UserError(f"{path} holds no features with coordinates ({type(err).__name__}: {err}): give a file of CLAM "
                        f"or TRIDENT") from err


def read_features(path, side=0):
    """Put the embeddings of one image on their grid.

    in:  SLIDE.h5, SLIDE.pt, or neither ending, to take whichever there is; side of a tile in pixels of level 0, for
    files that do not say it (0 = the largest that fits all coordinates).
    out: e (Gh,Gw,E) float16, 0 where there is no tile; there (Gh,Gw) bool; origin (x, y) and side in pixels of level 0.
    raises: UserError for a damaged file, or tiles that overlap or lie on no common grid.
    """
    path = next((p for end in (".h5", ".pt") if (p := Path(f"{path}{end}")).is_file()), Path(path))
    x, coords, told = read_arrays(path)
    x, coords = (v[0] if v.ndim == 3 and len(v) == 1 else v for v in (x, coords))   # some tools write 1 x N x E
    if x.ndim != 2 or coords.shape != (len(x), 2) or not len(x) or not x.isfinite().all():
        raise UserError(f"{path} holds features {tuple(x.shape)} and coordinates {tuple(coords.shape)}, expected (N,E) "
                        f"and (N,2), finite and not empty")
    coords = coords.long()
    origin = coords.amin(0)
    steps = coords - origin                                                         # (N,2) x, y
    side = int(told or side) or gcd(*steps.flatten().tolist()) or 1
    cell = steps // side
    w, h = (cell.amax(0) + 1).tolist()
    index = cell[:, 1] * w + cell[:, 0]
    if (steps % side).any() or len(index.unique()) < len(index) or h * w > 10_000 + 100 * len(index):
        raise UserError(f"{path}: {len(x)} tiles of side {side} lie on no common grid, which conditions need: cut the "
                        f"slide without overlap and on one grid for all pieces of tissue (CLAM starts afresh for each)")
    e, there = torch.zeros(h * w, x.shape[1], dtype=torch.float16), torch.zeros(h * w, dtype=torch.bool)
    e[index], there[index] = x.half(), True
    return e.view(h, w, -1), there.view(h, w), tuple(origin.tolist()), side


def main(argv):
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        return print(__doc__)
    if Path(argv[0]).is_dir():
        data = Samples(argv[0])
        print(f"{data.layout}: {data.encoder} embeddings of {data.embed_dim} numbers, latents for {data.patch} pixels, "
              f"{'with' if data.images else 'without'} pictures")
        for name, n in zip(data.folders, data.slides[0]["counts"]):
            print(f"{name:>9}: {n:,} samples")
        return
    e, there, origin, side = read_features(argv[0])
    print(f"{int(there.sum())} tiles of {side} pixels, {e.shape[2]} numbers each, on a grid of {e.shape[0]} x "
          f"{e.shape[1]} that starts at {origin}")


if __name__ == "__main__":
    cli(main)
