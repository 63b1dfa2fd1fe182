"""Multi-scale patches: toy slides or your own images -> pyramids on disk -> the items a model trains on.

A patch at scale s is P x P pixels of the image halved s times, so it covers 2^s x 2^s base tiles, and its condition is
the grid of their embeddings (Z §3.1). One safetensors file per image holds patches and embeddings, memory-mapped.

in:  images of any size   out: items with x (3,P,P) in [-1,1] and/or z (3,P/4,P/4), tokens (64,E), mask (64,), s
run: python data.py toy                                      synthetic tissue, about two minutes
     python data.py build --images=FOLDER --out=data/mine    your own PNG, JPEG or TIFF files
read next: cdm.py, or train.py
"""
import os
import random
import warnings
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from common import UserError, cli, configure, open_tensors
from encoder import load_encoder
from published import read_features
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
                             lambda s, i, j: s not in kept or i * (side >> s) + j in kept[s],
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


# ----- 2. python data.py build -----

@dataclass
class BuildConfig:
    images: str = ""              # an image, or a folder of images (its subfolders are not read)
    out: str = ""                 # folder to write
    encoder: str = "stats"        # see encoder.py
    weights: str | None = None    # its weights, if it has any
    features: str = ""            # embeddings of that encoder made by CLAM or TRIDENT: NAME.h5, or a folder of them
    patch: int = 256              # pixels of a patch, a multiple of 16
    scales: int = 8               # at most; those larger than every image are dropped
    background: float = 0.0       # leave out patches whose grey levels deviate less than this (try 5), 0 = keep all
    holdout: float = 0.1          # fraction of the images held out, if there are at least 5
    max_pixels: int = 178_956_970  # refuse larger images: a small file can unpack to more than the memory
    device: str = "cpu"           # where the encoder runs


KINDS = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")  # of pixels that show as 8-bit RGB


def open_image(path, cfg, kinds=KINDS):
    """Decode an image that Pillow can show as RGB. raises: UserError if it is damaged, too large, or too small."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked below, before any pixel is decoded
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*[Tt]runcated")  # Pillow only warns of a TIFF with cut tables
            image = Image.open(path)
            if image.width * image.height > cfg.max_pixels:
                raise UserError(f"{path} unpacks to {image.width} x {image.height} pixels, more than --max_pixels="
                                f"{cfg.max_pixels}: give more if you trust the file and have the memory, or cut it up")
            image.load()
    except UserError:
        raise
    except Exception as err:  # Pillow's decoders raise nearly anything on damaged files
        raise UserError(f"{path} cannot be read ({type(err).__name__}: {err}): it is damaged, cut short or of an "
                        f"unknown kind; convert it to PNG, JPEG or TIFF, or take it out") from err
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if image.mode not in kinds:
        raise UserError(f"{path} has pixels of kind {image.mode!r}, which do not show as 8-bit RGB: convert it first")
    if min(image.size) < cfg.patch:
        raise UserError(f"{path} is {image.width} x {image.height} pixels, smaller than a tile: take --patch below "
                        f"{cfg.patch}")
    return image


def crop(image, x, y, w, h):
    """Pixels (h,w,3) uint8. A fourth band is left out, never blended in: in aerial TIFFs it is near-infrared."""
    return np.asarray(image.crop((x, y, x + w, y + h)).convert("RGB"))


def image_files(cfg):
    """The images to read, sorted by name, and the names of those held out: the same ones whatever else is there."""
    root = Path(cfg.images)
    if not cfg.images or not cfg.out:
        raise UserError("say what to read and where to write: python data.py build --images=DIR_OR_FILE --out=DIR")
    if not root.exists():
        raise UserError(f"--images={root} does not exist: give an image or a folder of images")
    known = {*Image.registered_extensions(), ".svs"}
    files = [root] if root.is_file() else sorted(f for f in root.iterdir() if f.suffix.lower() in known)
    if not files:
        raise UserError(f"--images={root} holds no image (PNG, JPEG, TIFF ...): give a folder that does")
    if root.is_dir() and len(files) < len(list(root.iterdir())):
        print(f"{root}: {len(list(root.iterdir())) - len(files)} entries are not images and are passed over")
    n = max(1, round(cfg.holdout * len(files))) if cfg.holdout and len(files) >= 5 else 0
    return files, {f.name for f in sorted(files, key=lambda f: sha256(f.name.encode()).digest())[:n]}


def embedded(cfg, path, image):
    """Tiles of an image that were embedded elsewhere. out: the part of the image that they cover, and for `write_slide`
    their embeddings row by row and which patches have them all."""
    given, P = Path(cfg.features), cfg.patch
    e, there, (x, y), side = read_features(given / path.stem if given.is_dir() else given, P)
    if side != P or x + P > image.width or y + P > image.height:
        raise UserError(f"--features={given}: the tiles of {path.name} have {side} pixels and start at {x}, {y}, which "
                        f"does not fit --patch={P} and {image.width} x {image.height} pixels: give --patch={side}, or "
                        f"the image they were cut from")
    image, rows = image.crop((x, y, min(image.width, x + P * e.shape[1]), min(image.height, y + P * len(e)))), iter(e)
    return image, lambda tiles: next(rows)[:len(tiles)], lambda s, i, j: bool(block(there, s, i, j).all())


def build(argv):
    """Cut images into pyramids."""
    cfg = configure(BuildConfig, argv, doc=__doc__)
    if cfg.patch < 16 or cfg.patch % 16 or cfg.scales < 1 or not 0 <= cfg.holdout < 1:
        raise UserError(f"got --patch={cfg.patch} --scales={cfg.scales} --holdout={cfg.holdout}: patch is a multiple "
                        f"of 16, scales at least 1, holdout in [0, 1)")
    files, held = image_files(cfg)
    if cfg.features and (cfg.encoder == "stats" or cfg.weights):
        raise UserError(f"--features={cfg.features}: say which encoder made them, --encoder=uni, and give no --weights")
    P = cfg.patch
    encoder = None if cfg.features else load_encoder(cfg.encoder, None, cfg.weights, cfg.device)
    print(f"reading {len(files)} images from {cfg.images}, writing to {cfg.out}")

    def tiles():  # 2,048 training tiles from up to 16 images, to measure the deviations on
        rng = random.Random(0)
        chosen = rng.sample([f for f in files if f.name not in held], min(16, len(files) - len(held)))
        for path in chosen:
            image = open_image(path, cfg)
            gw, n = image.width // P, image.width // P * (image.height // P)
            for k in rng.sample(range(n), min(n, 2048 // len(chosen))):
                yield torch.from_numpy(crop(image, k % gw * P, k // gw * P, P, P).copy()).movedim(-1, 0)[None] / 255
    source = {"command": "build"} | {k: v for k, v in asdict(cfg).items() if k not in (
        "out", "max_pixels", "device", "holdout") and (k != "features" or v)}

    def fit_std():
        if cfg.features:
            e = embedded(cfg, files[0], open_image(files[0], cfg))[1](range(1))
            return [1.0] * e.shape[1]
        return encoder.fit(tiles()).tolist() if encoder.scaled else [1.0] * encoder.embed_dim
    index, slides = begin(cfg.out, P, cfg.encoder, source, fit_std), []
    if cfg.encoder == "stats":
        encoder = load_encoder(cfg.encoder, index["std"], None, cfg.device)
    for path in tqdm(files):
        image, meta = open_image(path, cfg), {"source": source, "bytes": path.stat().st_size}
        embed_row, keep = partial(embed, encoder, device=cfg.device), None
        if cfg.features:
            image, embed_row, keep = embedded(cfg, path, image)
        gh, gw = image.height // P, image.width // P
        out = Path(cfg.out) / f"{path.name}.safetensors"
        counts = finished(out, cfg.scales, meta)
        if counts is None:
            strips = (crop(image, 0, i * P, image.width, P) for i in range(gh))
            counts = write_slide(out, strips, embed_row, P, cfg.scales, meta, keep, cfg.background)
        whole = [(gh >> s) * (gw >> s) for s in range(cfg.scales)]
        tqdm.write(f"{path.name}: {image.width} x {image.height}, kept {counts} patches; dropped {image.width - gw * P}"
                   f" columns, {image.height - gh * P} rows at the edge and {sum(whole) - sum(counts)} plain patches")
        slides.append({"name": path.name, "file": out.name, "split": "test" if path.name in held else "train",
                       "size": [image.height, image.width], "counts": counts})
    finish(cfg.out, index, slides)


# ----- 3. Reading -----

class Pyramids:
    """A folder that data.py wrote: which slides there are, and single patches from memory-mapped files.

    in:  latents, a folder of files of the same names with z{s} (train.py makes it), or None if they stand in the same
    files; std, the deviations a model was trained with, where this set was built with its own.
    Attributes: folder, patch, scales, embed_dim, encoder, std, slides. raises: UserError if missing or foreign.
    """
    CACHE = 8192  # mapped tensors per process, far below the system's limit on mappings

    def __init__(self, folder, latents=None, std=None):
        index = read_index(folder)
        if not index["slides"]:
            raise UserError(f"{folder} is unfinished: run the command that makes it again, it goes on where it stopped")
        self.folder, self.latents = Path(folder), Path(latents or folder)
        for key in ("patch", "scales", "embed_dim", "encoder", "std", "slides"):
            setattr(self, key, index[key])
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
