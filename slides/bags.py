"""Bags: the features of each slide, ours or what other tools wrote.

in:  a folder of .safetensors, .pt, .npy or .h5 files   out: features (N,K) float32, a slide at a time
"""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common import UserError, load_tensors

# ----- 1. One file -----

SUFFIXES = (".safetensors", ".pt", ".npy", ".h5")

def read_bag(path):
    """in: a file of features: ours, .npy, CLAM's .pt, CLAM's and TRIDENT's .h5.
    out: features (N,K) float32; coords (N,2) or None; meta, plain types. raises: UserError if it is damaged, empty, of
    another shape, or holds NaN."""
    found, meta = contents(Path(path))
    for key, value in found.items():
        if torch.is_tensor(value) and value.ndim == 3 and len(value) == 1:  # some tools write (1,N,K)
            found[key] = value[0]
    x = found.get("features", next(iter(found.values())) if len(found) == 1 else None)
    if not torch.is_tensor(x) or x.ndim != 2 or not x.is_floating_point():
        shape = tuple(x.shape) if torch.is_tensor(x) else "no tensor"
        raise UserError(f"{path} holds {shape}, expected features (N,K) of a float type, among {', '.join(found)}")
    if not len(x):
        raise UserError(f"{path} is an empty bag: take the slide out, or extract it again")
    bad = int((~x.isfinite()).any(1).sum())
    if bad:
        raise UserError(f"{path} holds NaN or infinity in {bad} of {len(x)} rows: extract it again")
    coords = found.get("coords")
    fits = torch.is_tensor(coords) and coords.shape == (len(x), 2)
    return x.float(), coords.long() if fits else None, meta

def contents(path):
    """out: {name: tensor}, meta. raises: UserError if it cannot be read."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no file of features: known are {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        if path.suffix == ".h5":
            return read_h5(path)
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except ImportError as err:
        raise UserError(f"{path} needs the extra: pip install -e '.[h5]', or give .pt files") from err
    except Exception as err:  # damaged files raise nearly anything
        why = (str(err).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read ({type(err).__name__}: {why}): make it again, of tensors") from err
    if not isinstance(found, dict):
        return {"features": found}, {}
    return found, {"side": int(found.pop("patch_size_level0", 0))}

def read_h5(path):
    """out: {name: tensor}; meta: the side of a tile in pixels of level 0, or 0."""
    import h5py
    with h5py.File(path, "r") as f:
        found = {key: torch.from_numpy(np.asarray(f[key])) for key in ("features", "coords") if key in f}
        side = f["coords"].attrs.get("patch_size_level0", 0) if "coords" in f else 0
    return found, {"side": int(side)}

# ----- 2. A folder -----

def views(folder):
    """How the files of a folder can be looked at: "" as they are; "0", "2", "0+2": the scales joined in ours."""
    _, _, meta = read_bag(files_of(folder)[0])
    scales = [str(s) for s in meta.get("scales", ())]
    return [*scales, "+".join(scales)] if len(scales) > 1 else [""]

def files_of(folder):
    """The files of features in a folder, sorted. raises: UserError if there is none, or two of one slide."""
    folder = Path(folder)
    files = sorted(f for f in folder.glob("*") if f.suffix in SUFFIXES and not f.name.startswith("."))
    if not files:
        raise UserError(f"{folder} holds no features ({', '.join(SUFFIXES)}): make them with python mil.py extract")
    for a, b in zip(files, files[1:]):
        if a.stem == b.stem:
            raise UserError(f"{a} and {b} are features of one slide: take one of them out")
    return files

class Bags:
    """The features of a folder, slide by slide; those that fit into `budget` bytes stay in memory.
    in:  view, one of `views`. A view of a coarser scale has one row per patch of that scale.
    Attributes: names; K, the width; sums {name: (N, sum (K), sum of squares (K))}, to standardise by.
    raises: UserError if a file is unusable (every one is read once), or their widths differ."""

    def __init__(self, folder, view="", budget=2**32):
        self.view, self.left, self.kept, self.sums = view, budget, {}, {}
        self.files = {f.stem: f for f in files_of(folder)}
        self.names = list(self.files)
        for name in self.names:
            x = self[name]
            self.K = x.shape[1] if name == self.names[0] else self.K
            if x.shape[1] != self.K:
                raise UserError(f"{self.files[name]} is {x.shape[1]} wide, others {self.K}: use one extractor for all")
            wide = x.double()
            self.sums[name] = (len(x), wide.sum(0), wide.square().sum(0))

    def __getitem__(self, name):
        """Features (N,K) float32 of one slide."""
        if name in self.kept:
            return self.kept[name]
        x, coords, meta = read_bag(self.files[name])
        if self.view and "+" not in self.view:
            x = one_scale(x, coords, meta, int(self.view))
        if x.nbytes <= self.left:
            self.left -= x.nbytes
            self.kept[name] = x
        return x

    def scaler(self, names, *others):
        """Mean and deviation (K,) float32 of all patches of these slides, here and in other Bags."""
        rows = [bags.sums[name] for bags in (self, *others) for name in names]
        n, first, second = (sum(column) for column in zip(*rows))
        mean = first / n
        deviation = (second / n - mean.square()).clamp(min=0).sqrt()
        floor = 1e-6 * float(deviation.max()) + 1e-12
        return mean.float(), deviation.clamp(min=floor).float()

def one_scale(x, coords, meta, s):
    """The columns of scale s, and one row for each patch of it: our rows are patches of the finest."""
    parents = np.asarray(coords // (meta["patch"] << s))                   # (N,2)
    first = np.unique(parents, axis=0, return_index=True)[1]
    at = meta["scales"].index(s)
    start = sum(meta["widths"][:at])
    return x[np.sort(first), start:start + meta["widths"][at]].clone()

open_bags = lru_cache(maxsize=4)(Bags)  # they stay open, for what is asked for again and again
