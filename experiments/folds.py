"""Labels of slides, and how slides are dealt into folds: whole patients, each class as evenly as that allows.

in:  CSV files with columns case_id, slide_id, label, and, for splits, train, val, test, as CLAM writes them
out: labels; folds (train, val, test) of slide numbers     read next: experiments/crossval.py
"""
import re
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from common import UserError
from slides.names import NOTHING, few, match, read_table

# ----- 1. Labels -----

class Labels:
    """The labels of slides. Attributes: names; y (n,) class numbers; classes, their names; patients, one per slide;
    left, what is left out.
    in: a CSV with slide_id, label, and case_id (default: each slide a patient); names, the slides that have features;
    partial: leave out what has no label, or no features. raises: UserError naming what is missing."""

    def __init__(self, path, names, partial=False):
        rows = {}
        for row in read_table(path, ("slide_id", "label")):
            slide, label, patient = row["slide_id"], row["label"], row.get("case_id", "")
            label, patient = ("" if v.lower() in NOTHING else v for v in (label, patient))
            if rows.setdefault(slide, (label, patient or slide)) != (label, patient or slide):
                raise UserError(f"{path}: slide {slide} has two different rows: give one")
        means = match(names, rows, path)
        absent = {"features but no label": [n for n in names if n not in means or not rows[means[n]][0]],
                  "a label but no features": sorted(set(rows) - set(means.values()))}
        said = "; ".join(f"{len(v)} slides have {what}: {few(v)}" for what, v in absent.items() if v)
        if said and not partial:
            raise UserError(f"{path}: {said}; complete or remove them, or leave them out: --partial=True")
        means = {n: row for n, row in means.items() if rows[row][0]}
        self.names = list(means)
        found = [rows[means[n]] for n in self.names]
        self.classes = sorted({label for label, _ in found}, key=lambda v: (len(v), v))    # 2 before 10
        if len(self.classes) < 2:
            raise UserError(f"{path} gives the slides {len(self.classes)} class(es): at least two are needed")
        self.y = torch.tensor([self.classes.index(label) for label, _ in found])
        self.patients, self.left = [patient for _, patient in found], said

def rarest(labels):
    """The class of the fewest patients: its name, and how many they are."""
    patients = [set() for _ in labels.classes]
    for patient, y in zip(labels.patients, labels.y.tolist()):
        patients[y].add(patient)
    counts = [len(found) for found in patients]
    least = counts.index(min(counts))
    return labels.classes[least], counts[least]

# ----- 2. Folds -----

USUAL = 5   # folds

def usual_folds(labels):
    """Five folds, or as many as the rarest class has patients. raises: UserError if they are fewer than three."""
    name, n = rarest(labels)
    if n < 3:
        raise UserError(f"class {name} has slides of {n} patient(s): training, early stopping and test need one each: "
                        f"give slides of 3 or more, or leave the class out")
    return min(USUAL, n)

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

def spread(labels, part, rest):
    """Move whole patients from `rest` into `part`, lists of slides, until it has every class that `rest` can spare: the
    smallest patients first, and none who leaves `rest` without a class. in place; both stay sorted."""
    for c in range(len(labels.classes)):
        if c in labels.y[part]:
            continue
        patients = {}
        for k in rest:
            patients.setdefault(labels.patients[k], []).append(k)
        for mine in sorted((m for m in patients.values() if c in labels.y[m]), key=len):
            left = [k for k in rest if k not in mine]
            if set(labels.y[left].tolist()) >= set(labels.y[rest].tolist()):
                part[:], rest[:] = sorted(part + mine), left
                break

def check_split(labels, split, where):
    """raises: UserError if a part of (train, val, test) lacks a class, or a patient is in two parts."""
    owner = {}
    for name, part in zip(("train", "val", "test"), split):
        lacking = [c for i, c in enumerate(labels.classes) if i not in labels.y[part]]
        if lacking:
            raise UserError(f"{where}: {name} has {len(part)} slides and none of class {', '.join(lacking)}: give it "
                            f"some, by more slides, a larger --fraction or other --folds")
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
    tests = deal(labels, slides, [1 / folds] * folds, seed)
    for one, other in permutations(tests, 2):
        spread(labels, one, other)
    for k, test in enumerate(tests):
        rest = sorted(set(slides) - set(test))
        if fraction < 1:
            rest, unused = deal(labels, rest, (fraction, 1 - fraction), seed + 1)
            spread(labels, rest, unused)
        train, stop = deal(labels, rest, (1 - val, val), seed + 2)
        spread(labels, stop, train)
        out.append((train, stop, test))
        check_split(labels, out[-1], f"fold {k}")
    return out

def read_splits(path, labels, partial=False):
    """CLAM's splits: a CSV with columns train, val, test of slide ids, or a folder of splits_0.csv, splits_1.csv, ...
    out, raises: as make_splits, and UserError for slides without features or label, unless `partial`."""
    files = [Path(path)]
    if files[0].is_dir():
        files = [f for f in files[0].iterdir() if re.fullmatch(r"splits_\d+\.csv", f.name)]
        if not files:
            raise UserError(f"{path} holds no splits_0.csv: give a CSV with columns train, val, test")
    number, out = {name: k for k, name in enumerate(labels.names)}, []
    for file in sorted(files, key=lambda f: (len(f.name), f.name)):                        # 2 before 10
        split, table = [], read_table(file, ("train", "val", "test"))
        for part in ("train", "val", "test"):
            names = [row[part] for row in table if row[part].lower() not in NOTHING]
            if {name.lower() for name in names} <= {"true", "false"}:                      # splits_0_bool.csv
                names = [row.get("") for row in table if row[part].lower() == "true"]
            means = match(names, number, file)
            unknown = [n for n in names if n not in means]
            if unknown and not partial:
                raise UserError(f"{file} names {len(unknown)} slides without features or label: {few(unknown)}")
            split.append([number[n] for n in means.values()])
        check_split(labels, split, file)
        out.append(tuple(split))
    return out
