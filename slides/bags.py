"""Bags: the features of each slide, ours or what other tools wrote.

in:  a folder of .safetensors, .pt, .npy or .h5 files   out: features (N,K) float32, a slide at a time
"""
import json
import re
from _codecs import encode
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common import UserError, load_tensors
from slides.names import SUFFIXES, few, files_of, name_of
from slides.weights import sign_of

# ----- 1. One file -----

NAMES = ("features", "feats", "embeddings")  # CLAM, TRIDENT and we; STAMP; HEST
COORDS = ("coords", "coordinates", "coord", "positions", "xy")
ROOM, RATIO = 2**24, 64  # a file may unpack to so many bytes, and so many times its own

def read_bag(path, mpp=None):
    """in: a file of features: ours, .npy (Owkin's too), .pt and .h5 of CLAM, TRIDENT, STAMP, HEST; mpp, micrometres per
    pixel of level 0, for STAMP tells places in micrometres.
    out: features (N,K) float32; coords (N,2) of corners in pixels of level 0, or None; meta, plain types, with side,
    that of a tile in these pixels, 0 if the file does not say; micrometres, the same of STAMP, else 0.
    raises: UserError if it is damaged, empty, of another shape, or holds NaN."""
    path = Path(path)
    found, meta = contents(path)
    found = {key: plain(path, value) for key, value in found.items()}
    key = named(path, found)
    x, coords = found[key], next((found[c] for c in COORDS if c in found), None)
    if x.ndim == 1 and coords is not None and coords.shape == (1, 2):
        x = x[None]                                                # of one tile, squeezed
    if x.ndim != 2 or not x.shape[1] or not x.is_floating_point():
        raise UserError(f"{path} holds {tuple(x.shape)}, expected features (N,K) of a float type, not {x.dtype}")
    if not len(x):
        raise UserError(f"{path} is an empty bag: take the slide out, or extract it again")
    x = x.float()
    bad = int((~x.isfinite()).any(1).sum())
    if bad:
        raise UserError(f"{path} holds NaN or infinity in {bad} of {len(x)} rows: extract it again")
    if isinstance(meta.get("scales"), list):
        check_scales(path, meta, x.shape[1])
    if path.suffix == ".npy" and has_places(x):
        meta = beside_owkin(path, int(x[0, 0]))
        coords = x[:, 1:3] * meta["patch_size_level0"] if meta else None
        x = x[:, 3:]
    meta |= {"side": side_said(meta), "micrometres": in_micrometres(meta)}
    if mpp and meta["micrometres"] and coords is not None:
        coords, meta["side"] = (coords.double() / mpp).round(), round(meta["micrometres"] / mpp)
    elif key == "feats" or meta["micrometres"]:
        coords = None                                              # of a unit that cannot be told in pixels
    return x, pixels(coords, len(x), meta), meta

def plain(path, value):
    """A tensor of what lies in a file, without leading axes of 1 or gradients; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        kind = f"f{min(value.itemsize, 8)}" if value.dtype.kind == "f" else "i8"  # this machine's order of bytes
        value = torch.from_numpy(value.astype(kind, copy=False))
    if not torch.is_tensor(value) or value.layout != torch.strided:
        return None
    bounded(path, value.numel() * value.element_size())            # a tensor may be one number, strided
    value = value.detach()
    return value[0] if value.ndim == 3 and len(value) == 1 else value  # some tools write (1,N,K)

def bounded(path, size):
    if size > ROOM + RATIO * path.stat().st_size:
        raise UserError(f"{path} would unpack to {size:.3g} bytes, far more than it has: extract it again")

def named(path, found):
    """The name of the features in a file: a known one, or that of the only thing that is no coordinates."""
    tensors = [key for key, value in found.items() if value is not None and key not in COORDS]
    known = [key for key in NAMES if key in tensors] or tensors
    if len(known) != 1:
        raise UserError(f"{path} holds no tensor of features, or several, among {few(found) or 'nothing'}: call them "
                        f"one of {', '.join(NAMES)}")
    return known[0]

def check_scales(path, meta, K):
    """raises: UserError if what a file of ours tells of its scales is not so."""
    scales, widths = meta["scales"], meta.get("widths")
    numbers = [*scales, *widths, meta.get("patch")] if isinstance(widths, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**20 for n in numbers) or sum(widths) != K or len(widths) != len(scales):
        raise UserError(f"{path} tells of scales {scales} that it does not hold: extract it again")

def has_places(x):
    """Whether the first three columns are a level and the column and row of a tile, as Owkin's are."""
    start, rest = x[:, :3], x[:, 3:]
    if (start % 1).any() or not (rest % 1).any() or (start < 0).any() or (start[:, 0] != start[0, 0]).any():
        return False
    return len(start.unique(dim=0)) == len(x)

def beside_owkin(path, level):
    """What metadata.json tells of Owkin's tiles of that level of a DeepZoom image; {} if there is none of it."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        told = json.loads(path.with_name("metadata.json").read_text())
        side = figure(told.get("absolute_tile_size"))
        return {"patch_size_level0": side} if side and told.get("level") == level else {}
    return {}

def unit_of(meta):
    return str(meta.get("unit", "")).strip("b'").lower()

def in_micrometres(meta):
    """The side of a tile of STAMP, whose places are in micrometres as well; 0 if the file does not say so."""
    side = figure(meta.get("tile_size_um")) or figure(meta.get("tile_size"))
    return side if unit_of(meta) in ("um", "\xb5m", "\u03bcm") else 0.0

def pixels(coords, n, meta):
    """Coordinates (n,2) int64 if they are pixels of level 0."""
    known = unit_of(meta) in ("", "px", "pixel", "pixels") or meta.get("micrometres")
    if coords is None or coords.shape != (n, 2) or not known:
        return None
    fractions, far = coords % 1, coords.double().abs()
    if fractions.any() or not (far < 2**40).all():
        return None
    return coords.long()

def side_said(meta):
    """The side of a tile in pixels of level 0 that a file tells: ours, TRIDENT's, or CLAM's of a level; or 0."""
    if isinstance(meta.get("scales"), list):
        return meta["patch"] << meta["scales"][0]
    step = figure(meta.get("downsample")) or float(np.all(meta.get("patch_level") == 0))  # HDF5 may hold arrays
    clam = figure(meta.get("patch_size")) * round(step)
    if not np.all(meta.get("custom_downsample", 1) == 1):
        clam = 0
    trident = figure(meta.get("patch_size_level0"))
    return int(trident or clam)

def figure(value):
    """The number that an attribute is, the first of several; 0 if it is none, or beyond all slides."""
    with suppress(TypeError, ValueError, IndexError):
        number = float(np.ravel(value)[0])
        return number if 0 < number < 2**31 else 0.0
    return 0.0

def contents(path):
    """out: {name: tensor or array}, meta. raises: UserError if it cannot be read."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no file of features: known are {', '.join(SUFFIXES)}")
    if what := sign_of(path):
        raise UserError(f"{path} holds no features, it {what}")
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        if path.suffix == ".h5":
            return read_h5(path)
        if path.suffix == ".npy":
            return {"features": np.load(path, allow_pickle=False)}, {}
        rebuild = np.empty(0).__reduce__()[0]                      # TRIDENT saves arrays, which hold no code either
        kinds = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8")}
        older = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
        with torch.serialization.safe_globals([np.ndarray, np.dtype, encode, *kinds, *older]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except ImportError as err:
        raise UserError(f"{path} needs the extra: pip install -e '.[h5]', or give .pt files") from err
    except Exception as err:  # damaged files raise nearly anything
        why = re.search(r"GLOBAL [\w.]+", str(err))                 # the class that torch would not load
        said = re.sub(r"\x1b\[[\d;]*m", "", str(err)).partition("\n")[0]  # without colours
        why = f"it holds {why[0][7:]}" if why else f"{type(err).__name__}: {said}"
        raise UserError(f"{path} cannot be read ({why}): make it again, of tensors") from err
    if not isinstance(found, dict):
        return {"features": found}, {}
    return found, {key: value for key, value in found.items() if isinstance(value, int | float | str)}

def read_h5(path):
    """out: {name: array}; meta: the attributes of the file and of its coordinates."""
    import h5py
    with h5py.File(path, "r") as f:
        own = [key for key in f if isinstance(f.get(key, getlink=True), h5py.HardLink)]  # not in another file
        sets = {key: f[key] for key in own if isinstance(f[key], h5py.Dataset)}
        floats = [key for key, x in sets.items() if x.dtype.kind == "f"]  # not the pixels that HEST has beside
        features = [key for key in NAMES if key in sets] or floats
        found, meta = {}, dict(f.attrs)
        for key in [key for key in (*features, *COORDS) if key in sets]:
            x = sets[key]
            bounded(path, x.nbytes)                                # before it is read
            if not (x.is_virtual or x.external):                   # as are these
                found[key], meta = np.asarray(x), meta | dict(x.attrs)
    return found, meta

# ----- 2. How large its tiles are -----

def neighbours(coords):
    """The commonest distance of neighbouring tiles in a row or a column, 0 if there are none. in: (N,2)."""
    gaps = []
    for axis, other in ((0, 1), (1, 0)):
        order = np.lexsort((coords[:, axis], coords[:, other]))
        step = np.diff(coords[order], axis=0)
        gaps.append(step[(step[:, other] == 0) & (step[:, axis] > 0), axis])
    gaps, counts = np.unique(np.concatenate(gaps), return_counts=True)
    return int(gaps[counts.argmax()]) if len(gaps) else 0

def placed(path, mpp=None):
    """in, out: features, coords, side of the tiles, meta, as `read_bag`; where the file lacks these, of the coordinates
    beside it, of CLAM (../h5_files, ../patches) and TRIDENT (../patches/*_patches.h5), or of neighbouring tiles.
    raises: UserError if there are none, or if they contradict each other."""
    path = Path(path)
    x, coords, meta = read_bag(path, mpp)
    sides, above, name = [meta["side"]], path.parent.parent, name_of(path)
    for beside in (above / f"h5_files/{name}.h5", above / f"patches/{name}.h5", above / f"patches/{name}_patches.h5"):
        if beside.is_file() and beside != path:
            found, told = contents(beside)
            there = plain(beside, found.get("coords"))
            there = None if there is None else pixels(there, len(x), told)
            coords = there if coords is None else coords
            sides.append(side_said(told) if there is not None and torch.equal(there, coords) else 0)
    if coords is None:
        why = "without coordinates (N,2) in pixels of level 0, and in ../h5_files and ../patches there are none"
        if meta["micrometres"]:
            why = "with places in micrometres: only mil.py map takes these, where the size of a pixel is known"
        raise UserError(f"{path} holds {len(x)} features {why}")
    apart = neighbours(coords.numpy())
    sides = [side for side in sides if side > 0] or [apart]
    foreign = "scales" not in meta and len(x) > 8                  # of ours, few may be left
    far = foreign and sides[0] and apart % sides[0] == 0 and apart > sides[0]
    if max(sides) - min(sides) > 1 or far and not (coords - coords[0]).remainder(apart).any():
        said = " or ".join(map(str, sides))
        raise UserError(f"{path}: tiles said to be of side {said} lie {apart} pixels apart: embed them again")
    near = [apart] if abs(apart - sides[0]) == 1 else []           # TRIDENT floors a side that its patcher rounds
    return x, coords, (near or sides)[0], meta

# ----- 3. A folder -----

def views(folder):
    """How the files of a folder can be looked at: "" as they are; "0", "2", "0+2": the scales joined in ours."""
    scales = None
    for file in files_of(folder):
        with suppress(UserError):                                  # it will be named with all others
            scales = read_bag(file)[2].get("scales")
            break
    scales = [str(s) for s in scales] if isinstance(scales, list) else []
    return [*scales, "+".join(scales)] if len(scales) > 1 else [""]

def unusable(files):
    """in: {name: file}. out: {name: why} of those that no head can learn from."""
    bad = {}
    for name, file in files.items():
        try:
            read_bag(file)
        except UserError as err:
            bad[name] = str(err)
    return bad

class Bags:
    """The features of a folder, slide by slide; those that fit into `budget` bytes stay in memory.
    in:  view, one of `views`. A view of a coarser scale has one row per patch of that scale.
         names, of the slides that are used, by default all.
    Attributes: names; K, the width; sums {name: (N, sum (K), sum of squares (K))}, to standardise by.
    raises: UserError if files are unusable (every one is read once), naming all, or if their widths differ."""

    def __init__(self, folder, view="", budget=2**32, names=None):
        self.view, self.left, self.kept, self.sums = view, budget, {}, {}
        self.files = {name_of(f): f for f in files_of(folder) if names is None or name_of(f) in names}
        self.names = list(self.files)
        for name in self.names:
            try:
                x = self[name]
            except UserError as err:
                why = unusable(self.files).values() or [err]
                raise UserError(f"{len(why)} of {len(self.names)} files of {folder} are of no use: {few(why, '; ')}; "
                                f"or leave them out: --partial=True") from err
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
            x = one_scale(self.files[name], x, coords, meta, int(self.view))
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

def one_scale(path, x, coords, meta, s):
    """The columns of scale s, and one row for each patch of it: our rows are patches of the finest.
    raises: UserError if the file is not ours, or lacks that scale or its coordinates."""
    if coords is None or not isinstance(meta.get("scales"), list) or s not in meta["scales"]:
        raise UserError(f"{path} has no scale {s} with coordinates, as others beside it: extract all alike")
    parents = np.asarray(coords // (meta["patch"] << s))                   # (N,2)
    first = np.unique(parents, axis=0, return_index=True)[1]
    at = meta["scales"].index(s)
    start = sum(meta["widths"][:at])
    return x[np.sort(first), start:start + meta["widths"][at]].clone()

open_bags = lru_cache(maxsize=4)(Bags)  # they stay open, for what is asked for again and again
