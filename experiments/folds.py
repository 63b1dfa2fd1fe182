"""Labels of slides, and how slides are dealt into folds: whole patients, each class as evenly as that allows.

in:  CSV files with columns case_id, slide_id, label, and, for splits, train, val, test, as CLAM writes them
out: labels; folds (train, val, test) of slide numbers     read next: experiments/crossval.py
"""
import csv
import re
from pathlib import Path

import numpy as np
import torch

from common import UserError

# ----- 1. Labels -----

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
    in: a CSV with slide_id, label, and case_id (default: each slide a patient); names, the slides that have features.
    raises: UserError naming what is missing."""

    def __init__(self, path, names):
        rows = {}
        for row in read_csv(path, ("slide_id", "label")):
            slide, label = row["slide_id"].strip(), row["label"].strip()
            entry = label, (row.get("case_id") or slide).strip()
            if not label or rows.setdefault(slide, entry) != entry:
                raise UserError(f"{path}: slide {slide} has {'two different rows' if label else 'no label'}: give one")
        bare, extra = sorted(set(names) - set(rows)), sorted(set(rows) - set(names))
        for what, which in (("features but no label", bare), ("a label but no features", extra)):
            if which:
                raise UserError(f"{len(which)} slides have {what} in {path}: {few(which)}; complete or remove them")
        self.names = list(names)
        self.classes = sorted({rows[n][0] for n in names}, key=lambda v: (len(v), v))      # 2 before 10
        if len(self.classes) < 2:
            raise UserError(f"{path} gives the slides {len(self.classes)} class(es): at least two are needed")
        self.y = torch.tensor([self.classes.index(rows[n][0]) for n in names])
        self.patients = [rows[n][1] for n in names]

# ----- 2. Folds -----

def deal(labels, slides, parts, seed):
    """Deal slides (numbers) into `parts`, weighted shares: whole patients, each class as evenly as that allows.
    out: a list of slide numbers per part, the same for the same seed. source: greedy, patients with most slides first,
    each to the part that lacks its classes most."""
    patients, C = {}, len(labels.classes)
    for k in slides:
        patients.setdefault(labels.patients[k], []).append(k)
    order = list(patients.values())
    np.random.default_rng(seed).shuffle(order)
    have, share = np.zeros((len(parts), C)), np.array(parts, float)[:, None]               # slides dealt, (parts,C)
    out = [[] for _ in parts]
    for mine in sorted(order, key=len, reverse=True):
        count = np.bincount(labels.y[mine].numpy(), minlength=C)                           # (C,)
        filled = ((have + count) / share * count).sum(1) + 1e-3 * (have / share).sum(1)    # (parts,)
        part = int(filled.argmin())
        have[part] += count
        out[part] += mine
    return [sorted(part) for part in out]

def check_split(labels, split, where):
    """raises: UserError if a part of (train, val, test) lacks a class, or a patient is in two parts."""
    owner = {}
    for name, part in zip(("train", "val", "test"), split):
        lacking = [c for i, c in enumerate(labels.classes) if i not in labels.y[part]]
        if lacking:
            raise UserError(f"{where}: {name} has {len(part)} slides and none of class {', '.join(lacking)}: take more "
                            f"slides, a larger --fraction or --val, or fewer --folds")
        for patient in (labels.patients[k] for k in part):
            if owner.setdefault(patient, name) != name:
                raise UserError(f"{where}: patient {patient} is in {owner[patient]} and in {name}: put all into one")

def make_splits(labels, folds, fraction, val, seed):
    """Cross-validation, stratified and grouped by patient: [(train, val, test)] of slide numbers, one per fold; a share
    `fraction` of what is not in test is used, and a share `val` of that is for early stopping.
    raises: UserError if a class has too few slides or patients."""
    for i, c in enumerate(labels.classes):
        mine = [patient for patient, y in zip(labels.patients, labels.y.tolist()) if y == i]
        if len(set(mine)) < folds:
            raise UserError(f"class {c} has {len(mine)} slides, {len(set(mine))} patients, fewer than --folds={folds}")
    slides, out = range(len(labels.names)), []
    for k, test in enumerate(deal(labels, slides, [1 / folds] * folds, seed)):
        rest = sorted(set(slides) - set(test))
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
    number, out = {name: k for k, name in enumerate(labels.names)}, []
    for file in sorted(files, key=lambda f: (len(f.name), f.name)):                        # 2 before 10
        split = []
        for part in ("train", "val", "test"):
            names = [row[part].strip() for row in read_csv(file, ("train", "val", "test")) if (row[part] or "").strip()]
            unknown = [n for n in names if n not in number]
            if unknown:
                raise UserError(f"{file} names {len(unknown)} slides without features or label: {few(unknown)}")
            split.append([number[n] for n in names])
        check_split(labels, split, file)
        out.append(tuple(split))
    return out
