"""Bags: the features of each slide, ours or what other tools wrote, with their labels and how they are split.

in:  a folder of .safetensors, .pt, .npy or .h5 files; CSV files with columns case_id, slide_id, label, and, for splits,
     train, val, test, as CLAM writes them
out: features (N,K) float32 of a slide at a time; labels; folds of slide numbers
run: python bags.py FILE (what a file of features holds)     read next: mil.py
"""
import csv
import re
from pathlib import Path

import numpy as np
import torch

from common import UserError, cli, load_tensors

# ----- 1. One file -----

SUFFIXES = (".safetensors", ".pt", ".npy", ".h5")


def read_bag(path):
    """in: a file of features: .safetensors, .npy, CLAM's .pt, CLAM's and TRIDENT's .h5.

    out: features (N,K) float32; coords (N,2) or None; meta, plain types. raises: UserError if it is damaged, empty, of
    another shape, or holds NaN.
    """
    path, meta = Path(path), {}
    try:
        if path.suffix == ".safetensors":
            found, meta = load_tensors(path)
        elif path.suffix == ".npy":
            found = {"features": torch.from_numpy(np.load(path, allow_pickle=False))}
        elif path.suffix == ".pt":
            found = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".h5":
            found = read_h5(path)
        else:
            raise UserError(f"{path} is no file of features: known are {', '.join(SUFFIXES)}")
    except UserError:
        raise
    except Exception as err:  # damaged files raise nearly anything
        raise UserError(f"{path} cannot be read ({type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}):"
                        f" it is damaged or holds more than tensors; make it again") from err
    found = found if isinstance(found, dict) else {"features": found}
    x = found.get("features", next(iter(found.values())) if len(found) == 1 else None)
    x = x[0] if torch.is_tensor(x) and x.ndim == 3 and len(x) == 1 else x                  # some tools write (1,N,K)
    if not torch.is_tensor(x) or x.ndim != 2 or not x.is_floating_point():
        raise UserError(f"{path} holds {'no tensor' if not torch.is_tensor(x) else tuple(x.shape)}, expected features "
                        f"(N,K) of a float type, among {', '.join(map(str, found))}")
    if not len(x):
        raise UserError(f"{path} is an empty bag: take the slide out, or extract it again")
    if not x.isfinite().all():
        raise UserError(f"{path} holds NaN or infinity in {int((~x.isfinite()).any(1).sum())} of {len(x)} rows: "
                        f"extract it again")
    coords = found.get("coords")
    return x.float(), coords.long() if torch.is_tensor(coords) and coords.shape == (len(x), 2) else None, meta


def read_h5(path):
    try:
        import h5py
    except ImportError as err:
        raise UserError(f"{path} needs the extra: pip install -e '.[h5]', or give .pt files") from err
    with h5py.File(path, "r") as f:
        return {key: torch.from_numpy(np.asarray(f[key])) for key in ("features", "coords") if key in f}


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
        raise UserError(f"{folder} holds no features ({', '.join(SUFFIXES)}): make them with python mil.py extract, or "
                        f"give the folder that holds them, as {folder}/h5_files")
    for a, b in zip(files, files[1:]):
        if a.stem == b.stem:
            raise UserError(f"{a} and {b} are features of one slide: take one of them out")
    return files


class Bags:
    """The features of a folder, slide by slide; those that fit into `budget` bytes stay in memory.

    in:  view, one of `views`. A view of a coarser scale has one row per patch of that scale.
    Attributes: names; K, the width; sums {name: (N, sum (K), sum of squares (K))}, to standardise by.
    raises: UserError if a file is unusable (every one is read once), or their widths differ.
    """

    def __init__(self, folder, view="", budget=2**32):
        self.view, self.left, self.kept = view, budget, {}
        self.files = {f.stem: f for f in files_of(folder)}
        self.names, self.K, self.sums = list(self.files), None, {}
        for name in self.names:
            x = self[name]
            if x.shape[1] != (self.K or x.shape[1]):
                raise UserError(f"{self.files[name]} has features of width {x.shape[1]}, {self.files[self.names[0]]} of"
                                f" {self.K}: use one extractor for all slides")
            self.K, wide = x.shape[1], x.double()
            self.sums[name] = (len(x), wide.sum(0), wide.square().sum(0))

    def __getitem__(self, name):
        """Features (N,K) float32 of one slide."""
        if name in self.kept:
            return self.kept[name]
        x, coords, meta = read_bag(self.files[name])
        if self.view and "+" not in self.view:
            at = meta["scales"].index(int(self.view))
            start = sum(meta["widths"][:at])
            parent = np.asarray(coords // (meta["patch"] << int(self.view)))
            x = x[np.sort(np.unique(parent, axis=0, return_index=True)[1])]
            x = x[:, start:start + meta["widths"][at]].clone()
        if x.nbytes <= self.left:
            self.left -= x.nbytes
            self.kept[name] = x
        return x

    def scaler(self, names, *others):
        """Mean and deviation (K,) float32 of all patches of these slides, here and in other Bags."""
        n, first, second = (sum(v) for v in zip(*(bags.sums[name] for bags in (self, *others) for name in names)))
        mean = first / n
        deviation = (second / n - mean.square()).clamp(min=0).sqrt()
        return mean.float(), deviation.clamp(min=1e-6 * float(deviation.max()) + 1e-12).float()


# ----- 3. Labels and folds -----

def read_csv(path, needed):
    """The rows of a CSV file as dicts. raises: UserError if it is missing or lacks a column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise UserError(f"{path} cannot be read as CSV ({err}): give a file with columns {', '.join(needed)}") from err
    lacking = [c for c in needed if not rows or c not in rows[0]]
    if lacking:
        raise UserError(f"{path} has no column {', '.join(lacking)}, or no row: give a CSV with {', '.join(needed)}")
    return rows


def few(names):
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Labels:
    """The labels of slides. Attributes: names; y (n,) class numbers; classes, their names; patients, one per slide.

    in:  a CSV with slide_id, label, and case_id (default: each slide a patient); names, the slides there are features
    of; partial: use the slides that have both. raises: UserError naming what is missing.
    """

    def __init__(self, path, names, partial=False):
        rows = {}
        for row in read_csv(path, ("slide_id", "label")):
            key = row["slide_id"].strip()
            entry = (row["label"].strip(), (row.get("case_id") or key).strip())
            if rows.setdefault(key, entry) != entry or not entry[0]:
                raise UserError(f"{path}: slide {key} has {'no label' if not entry[0] else 'two different rows'}: give "
                                f"each slide one label and one case_id")
        bare, extra = sorted(set(names) - set(rows)), sorted(set(rows) - set(names))
        for what, which in (("features but no label", bare), ("a label but no features", extra)):
            if which and not partial:
                raise UserError(f"{len(which)} slides have {what} in {path}: {few(which)}; complete them, or give "
                                f"--partial to use the others")
            if which:
                print(f"passed over, for they have {what}: {few(which)}")
        self.names = [n for n in names if n in rows]
        self.classes = sorted({rows[n][0] for n in self.names}, key=lambda v: (len(v), v))   # 2 before 10
        if len(self.classes) < 2:
            raise UserError(f"{path} gives the slides {len(self.classes)} class(es): at least two are needed")
        self.y = torch.tensor([self.classes.index(rows[n][0]) for n in self.names])
        self.patients = [rows[n][1] for n in self.names]


def deal(labels, slides, parts, seed):
    """Deal slides (numbers) into `parts`, weighted shares: whole patients, each class as evenly as that allows.

    out: a list of slide numbers per part, the same for the same seed. source: greedy, patients with most slides first,
    each to the part that lacks its classes most.
    """
    patients = {}
    for k in slides:
        patients.setdefault(labels.patients[k], []).append(k)
    rng, C = np.random.default_rng(seed), len(labels.classes)
    order = [list(patients.values())[i] for i in rng.permutation(len(patients))]
    order.sort(key=lambda mine: -len(mine))
    have, out, share = np.zeros((len(parts), C)), [[] for _ in parts], np.array(parts, float)[:, None]
    for mine in order:
        count = np.bincount(labels.y[mine].numpy(), minlength=C)
        filled = ((have + count) / share * count).sum(1) + 1e-3 * (have / share).sum(1)
        part = int(filled.argmin())
        have[part] += count
        out[part] += mine
    return [sorted(part) for part in out]


def check_split(labels, split, where):
    """raises: UserError if a part of (train, val, test) lacks a class, or a patient is in two parts."""
    owner = {}
    for name, part in zip(("train", "val", "test"), split):
        lacking = [c for i, c in enumerate(labels.classes) if not (labels.y[part] == i).any()]
        if lacking:
            raise UserError(f"{where}: {name} has {len(part)} slides and none of class {', '.join(lacking)}: take more "
                            f"slides, a larger --fraction or --val, or fewer --folds")
        for k in part:
            if owner.setdefault(labels.patients[k], name) != name:
                raise UserError(f"{where}: patient {labels.patients[k]} is in {owner[labels.patients[k]]} and in {name}"
                                f": put all slides of a patient into one of them")


def make_splits(labels, folds, fraction, val, seed):
    """Cross-validation, stratified and grouped by patient: [(train, val, test)] of slide numbers, one per fold; a share
    `fraction` of what is not in test is used, and a share `val` of that is for early stopping.
    raises: UserError if a class has too few slides or patients."""
    for i, c in enumerate(labels.classes):
        mine = [k for k, y in enumerate(labels.y.tolist()) if y == i]
        patients = len({labels.patients[k] for k in mine})
        if patients < folds:
            raise UserError(f"class {c} has {len(mine)} slides of {patients} patients, fewer than --folds={folds}: "
                            f"take fewer folds, or leave the class out")
    parts, out = deal(labels, range(len(labels.names)), [1 / folds] * folds, seed), []
    for k, test in enumerate(parts):
        rest = sorted(set(range(len(labels.names))) - set(test))
        if fraction < 1:
            rest = deal(labels, rest, (fraction, 1 - fraction), seed + 1)[0]
        out.append((*deal(labels, rest, (1 - val, val), seed + 2), test))
        check_split(labels, out[-1], f"fold {k}")
    return out


def read_splits(path, labels):
    """CLAM's splits: a CSV with columns train, val, test of slide ids, or a folder of splits_0.csv, splits_1.csv, ...
    out, raises: as make_splits, and UserError for slides without label."""
    files = [Path(path)]
    if files[0].is_dir():
        files = [f for f in files[0].iterdir() if re.fullmatch(r"splits_\d+\.csv", f.name)]
        if not files:
            raise UserError(f"{path} holds no splits_0.csv: give a CSV with columns train, val, test")
    number, out = {n: k for k, n in enumerate(labels.names)}, []
    for file in sorted(files, key=lambda f: (len(f.name), f.name)):
        rows = read_csv(file, ("train", "val", "test"))
        parts = [[row[part].strip() for row in rows if (row[part] or "").strip()] for part in ("train", "val", "test")]
        unknown = [n for part in parts for n in part if n not in number]
        if unknown:
            raise UserError(f"{file} names {len(unknown)} slides without features or label: {few(unknown)}")
        out.append(tuple([number[n] for n in part] for part in parts))
        check_split(labels, out[-1], file)
    return out


def main(argv):
    if len(argv) != 1:
        raise UserError("say which file: python bags.py FILE")
    x, coords, meta = read_bag(argv[0])
    print(f"{argv[0]}: {len(x)} patches, features of width {x.shape[1]}, mean {x.mean():.3g}, deviation {x.std():.3g}")
    print("no coordinates" if coords is None else f"coordinates from {coords.amin(0).tolist()} to "
          f"{coords.amax(0).tolist()}", *(f"{k}: {v}" for k, v in meta.items() if k != "settings"), sep="; ")


if __name__ == "__main__":
    cli(main)
