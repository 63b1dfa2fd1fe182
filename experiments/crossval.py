"""A table of AUCs: each kind of features by each head, cross-validated, with intervals over patients (Z §4.5).

    python mil.py cv --features=DIR[,DIR...] --labels=FILE

Nothing is trained twice. An interval says how much the choice of the test patients matters, not of the training ones.
in:  folders of features (mil.py extract, CLAM, TRIDENT), a CSV of labels   out: tables, OUT/cv.json, OUT/*.safetensors
"""
import json
from concurrent.futures import wait
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, at_least, configure, load_meta, load_tensors, save_tensors, write_text
from experiments.folds import USUAL, Labels, make_splits, rarest, read_splits, usual_folds
from mil import HEADS, cross_validate
from slides.bags import open_bags, unusable, views
from slides.names import few, file_of, files_of, match, name_of
from toy.folder import processes

@dataclass
class Config:
    features: str = ""         # folder of features, or several with commas between
    labels: str = ""           # CSV with slide_id, label and, if patients have several slides, case_id
    partial: bool = False      # leave out slides without label, without features, or whose features are unusable
    splits: str = ""           # CLAM's splits, a CSV or a folder of them; "" = folds made here
    out: str = ""              # folder for scores and trained heads, which are not trained again; default FEATURES_cv
    heads: str = "abmil,dsmil,clam"  # of HEADS
    views: str = "all"         # features of several scales: all views of them, or some of 0,2,0+2
    width: int = 128           # hidden width; published: 512, DSMIL 128
    folds: int = 0             # 0 = 5, or fewer where a class has fewer patients
    seeds: int = 1             # repetitions, with other folds
    fraction: tuple = (1.0,)   # shares of the training slides that are used
    val: float = 0.2           # share of them that early stopping looks at
    epochs: int = 40           # at most; published: 200 (CLAM), 50 (DSMIL)
    patience: int = 10         # epochs without a better validation loss, after which training stops (CLAM: 20)
    lr: float = 5e-4           # of Adam; published: 2e-4 (CLAM), 1e-4 (DSMIL)
    dropout: float = 0.25
    seed: int = 0
    bootstrap: int = 1000      # draws of patients for the intervals
    workers: int = 2           # processes
    # map
    slide: str = ""            # whose attention to draw
    data: str = ""             # pyramids of data.py, whose picture it is drawn on
    image: str = ""            # or the slide itself: any file that slides.reader reads

FEW = 10    # patients of a class, below which draws of them say nothing about others

# settings that change no single job
FREE = ("features", "out", "heads", "views", "seeds", "fraction", "bootstrap", "workers", "partial", "slide", "data",
        "image")

# ----- 1. One cross-validation: a head on one view of one folder -----

@dataclass
class Job:
    """raises, of its methods: UserError for labels and splits that do not do."""
    cfg: Config
    folder: str
    view: str
    head: str
    fraction: float = 1.0
    repeat: int = 0
    names: tuple = ()          # of the slides in the folder that are used

    def name(self):
        """The end of the folder's path, as much as tells it from the others, and the view."""
        paths = {Path(f.strip()).parts for f in self.cfg.features.split(",")}
        n = next(n for n in range(1, 100) if len({path[-n:] for path in paths}) == len(paths))
        return f"{'/'.join(Path(self.folder).parts[-n:])} {self.view}".strip()

    def labels(self):
        return Labels(self.cfg.labels, self.names, self.cfg.partial)

    def splits(self, labels):
        cfg = self.cfg
        if cfg.splits:
            return read_splits(cfg.splits, labels, cfg.partial)
        folds = cfg.folds or usual_folds(labels)
        return make_splits(labels, folds, self.fraction, cfg.val, cfg.seed + 10 * self.repeat)

    def meta(self, labels, splits):
        """What the scores depend on, as plain types."""
        files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files_of(self.folder)
                 if name_of(f) in labels.names]
        mark = crc32(repr([files, labels.y.tolist(), labels.patients, splits]).encode())
        same = {key: value for key, value in asdict(self.cfg).items() if key not in FREE}
        same["folds"] = same["folds"] or (USUAL if self.cfg.splits else usual_folds(labels))
        return {"settings": same, "folder": str(self.folder), "view": self.view, "head": self.head,
                "fraction": self.fraction, "repeat": self.repeat, "slides": labels.names, "classes": labels.classes,
                "mark": mark, "holds": "validation losses"}  # older files lack them

def out_of(cfg):
    first = cfg.features.split(",")[0].strip().rstrip("/")
    return Path(cfg.out or f"{first}_cv")

def validation(heads, bags, labels, splits):
    """The loss of each fold's head on the slides that stopped its training. out: (folds,)."""
    found = []
    for (head, (mean, deviation)), (_, stop, _) in zip(heads, splits):
        with torch.no_grad():
            losses = [head.loss((bags[labels.names[i]] - mean) / deviation, labels.y[i]) for i in stop]
        found.append(torch.stack(losses).mean())
    return torch.stack(found)

def run_job(job):
    """Write scores (n,C) of every slide by the head that did not see it, fold (n,), y (n,), the validation losses
    (folds,), and, for the first repetition, the heads. out: the file; one that is there and was made by the same job is
    kept."""
    name = f"{job.name()}_{job.head}_{job.fraction}_{job.repeat}.safetensors"
    path, labels = out_of(job.cfg) / file_of(name).replace(" ", "_"), job.labels()
    splits = job.splits(labels)
    meta = job.meta(labels, splits)
    if path.exists() and load_meta(path) == json.loads(json.dumps(meta)):
        return path
    torch.set_num_threads(1)
    bags = open_bags(job.folder, job.view, names=tuple(labels.names))
    scores, fold, heads = cross_validate(HEADS[job.head], [bags], bags, labels, splits, job.cfg, job.repeat)
    tensors = {"scores": scores, "fold": fold, "y": labels.y, "val": validation(heads, bags, labels, splits)}
    for k, (head, scaler) in enumerate(heads if job.repeat == 0 else ()):
        tensors |= {f"head.{k}.{key}": value for key, value in head.state_dict().items()}
        tensors[f"scaler.{k}"] = torch.stack(scaler)                       # (2,K)
    save_tensors(path, tensors, meta)
    return path

# ----- 2. What the scores are worth -----

def weighted_auc(scores, y, fold, weights):
    """AUC where slide i counts weights[:,i] times: mean over folds, and over classes if there are more than two.
    in:  scores (n,C); y, fold (n,), fold -1 = not scored; weights (B,n). out: (B,)."""
    C, found = scores.shape[1], []
    for k in range(int(fold.max()) + 1):
        for c in range(C) if C > 2 else (1,):
            one = torch.nonzero((fold == k) & (y == c))[:, 0]              # slides of class c
            rest = torch.nonzero((fold == k) & (y != c))[:, 0]
            a, b = scores[one, c][:, None], scores[rest, c]
            wins = (a > b).double() + (a == b).double() / 2                # (one,rest), a tie is half a win
            w, v = weights[:, one], weights[:, rest]                       # (B,one), (B,rest)
            won, pairs = (w @ wins * v).sum(1), w.sum(1) * v.sum(1)
            found.append(won / pairs)                                      # NaN where a draw lacks a class
    return torch.stack(found).nanmean(0)

def patient_draws(patients, n, seed):
    """How often each slide counts if patients are drawn with replacement. out: (1+n,slides), the first row all ones."""
    _, patient = np.unique(patients, return_inverse=True)                  # (slides,) numbers
    P, rows = patient.max() + 1, [np.ones(len(patient))]
    for draw in np.random.default_rng([seed, 5]).integers(0, P, (n, P)):
        rows.append(np.bincount(draw, minlength=P)[patient])
    return torch.from_numpy(np.stack(rows))

def limits(draws):
    """in: (1+n,), a value and bootstrap draws of it. out: [low, high], between which 95 % of the draws lie."""
    return torch.nanquantile(draws[1:], torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()

def interval(draws):
    """in: as `limits`. out: "0.812 [0.75,0.87]"."""
    low, high = limits(draws)
    return f"{float(draws[0]):.3f} [{low:.2f},{high:.2f}]"

# ----- 3. Tables -----

def folders_of(cfg):
    """The folders of features. raises: UserError for settings that do not do."""
    folders = [f.strip() for f in cfg.features.split(",") if f.strip()]
    if not folders or not cfg.labels:
        raise UserError("say what to learn from: python mil.py cv --features=DIR --labels=FILE")
    if set(heads_of(cfg)) - set(HEADS):
        raise UserError(f"--heads={cfg.heads}: heads are {', '.join(HEADS)}")
    at_least(cfg, folds=2 if cfg.folds else 0, seeds=1, epochs=1, patience=1, width=2, workers=1, bootstrap=1, lr=0)
    if not (0 < cfg.val < 1 and 0 <= cfg.dropout < 1 and all(0 < f <= 1 for f in cfg.fraction)):
        raise UserError(f"--val={cfg.val} --fraction={cfg.fraction} --dropout={cfg.dropout}: these are shares, from 0 "
                        f"to 1")
    if cfg.splits and cfg.fraction != (1.0,):
        raise UserError("--fraction goes with folds made here, not with --splits: cut the train column of the CSV")
    return folders

def slides_of(cfg, folders):
    """The slides that are used. out: {folder: names in it}, in all folders the same ones, whatever they are called.
    raises: UserError if folders hold different ones, unless cfg.partial: then these and the unusable are left out."""
    files = {folder: {name_of(file): file for file in files_of(folder)} for folder in folders}
    first, pairs, left = folders[0], {}, []
    for folder, mine in files.items():
        bad = unusable(mine) if cfg.partial else {}
        left += bad.values()
        pairs[folder] = match([name for name in mine if name not in bad], files[first], folder)
        odd = (set(mine) - set(pairs[folder])) | (set(files[first]) - set(pairs[folder].values()))
        if odd and not cfg.partial:
            raise UserError(f"{folder} and {first} hold different slides ({few(sorted(odd))}): extract the same ones, "
                            f"or use those that both have: --partial=True")
        left += [f"{name} is not in {folder} and {first}" for name in sorted(odd - set(bad))]
    common = set.intersection(*(set(found.values()) for found in pairs.values()))
    if left:
        print(f"{len(left)} left out: {few(left, '; ')}")
    if not common:
        raise UserError(f"{' and '.join(folders)} have no usable slide in common")
    back = {folder: {k: name for name, k in found.items()} for folder, found in pairs.items()}
    kept = [k for k in files[first] if k in common]                        # one order, by which patients are counted
    return {folder: tuple(map(mine.get, kept)) for folder, mine in back.items()}

def heads_of(cfg):
    return [h.strip() for h in cfg.heads.split(",")]

def jobs_of(cfg):
    """Every cross-validation that cfg asks for, checked before anything is trained. out: list of Job."""
    wanted, jobs = cfg.views.split(","), []
    names = slides_of(cfg, folders_of(cfg))
    pairs = [(folder, view) for folder in names for view in views(folder)]
    chosen = [(f, v) for f, v in pairs if cfg.views == "all" or v in wanted or not v]
    if not chosen:
        raise UserError(f"--views={cfg.views}: the features have {', '.join(v for _, v in pairs)}")
    for pair in chosen:
        for fraction, repeat in product(cfg.fraction, range(cfg.seeds)):
            jobs += [Job(cfg, *pair, head, fraction, repeat, names[pair[0]]) for head in heads_of(cfg)]
            if pair == chosen[0]:
                jobs[-1].splits(jobs[-1].labels())
    return jobs

def measured(cfg, jobs, files, patients):
    """Mean over repetitions. out: {(features, head, fraction): draws (1+n,) of the AUC}; the same of the accuracy."""
    weights = patient_draws(patients, cfg.bootstrap, cfg.seed)
    aucs, right = {}, {}
    for job, path in zip(jobs, files):
        t, key = load_tensors(path)[0], (job.name(), job.head, job.fraction)
        seen, hit = t["fold"] >= 0, t["scores"].argmax(1) == t["y"]
        aucs.setdefault(key, []).append(weighted_auc(t["scores"].double(), t["y"], t["fold"], weights))
        right.setdefault(key, []).append(float(hit[seen].double().mean()))
    aucs = {key: torch.stack(found).mean(0) for key, found in aucs.items()}
    return aucs, {key: sum(found) / len(found) for key, found in right.items()}

def show(cfg, fraction, folds, draws, right, pairs):
    """Print one table, and below it how much features differ. pairs: which ones to compare; None: all."""
    heads, names = heads_of(cfg), list(dict.fromkeys(name for name, _, _ in draws))
    width = max(map(len, names)) + 2
    print(f"\nAUC [95 % interval over patients] and accuracy, mean of {cfg.seeds} x {folds} folds, {fraction:.0%} of "
          f"the training slides")
    print(" " * width + "".join(f"{head:>27}" for head in heads))
    for name in names:
        cells = [f"{interval(draws[name, h, fraction]):>21} {right[name, h, fraction]:.3f}" for h in heads]
        print(f"{name:{width}}" + "".join(cells))
    for a, b in [(b, a) for a, b in combinations(names, 2)] if pairs is None else pairs:
        if a in names and b in names:
            gaps = [draws[a, h, fraction] - draws[b, h, fraction] for h in heads]
            cells = [f"  {h} {interval(gap)}" for h, gap in zip(heads, gaps)]
            print(f"{a} - {b}:" + "".join(cells) + f"  mean {interval(torch.stack(gaps).mean(0))}")

def in_time(tasks):
    """The results of tasks, under a bar whose clock goes on while the first of them takes its minutes."""
    bar, left = tqdm(total=len(tasks), desc="cross-validations"), tasks
    while left:
        _, left = wait(left, timeout=1)
        bar.update(len(tasks) - len(left) - bar.n)
        bar.refresh()
        for task in set(tasks) - left:
            task.result()                                                  # raises what went wrong, at once
    bar.close()
    return [task.result() for task in tasks]

def tables(cfg, pairs=None):
    """Train what cfg asks for and print tables. out: {(features, head, fraction): draws (1+n,) of the AUC}.
    pairs: names of features whose difference to print; default: all. raises: UserError for what does not do."""
    jobs = jobs_of(cfg)
    labels, out = jobs[0].labels(), out_of(cfg)
    classes = ", ".join(f"{c} ({n})" for c, n in zip(labels.classes, labels.y.bincount().tolist()))
    print(f"{len(labels.names)} slides of {len(set(labels.patients))} patients, classes {classes}; {len(jobs)} "
          f"cross-validations -> {out}" + (f"; left out: {labels.left}" if labels.left else ""))
    if cfg.workers == 1:
        files = [run_job(job) for job in tqdm(jobs)]
    else:
        with processes(cfg.workers) as workers:
            files = in_time([workers.submit(run_job, job) for job in jobs])
    draws, right = measured(cfg, jobs, files, labels.patients)
    folds = int(load_tensors(files[0])[0]["fold"].max()) + 1
    for fraction in cfg.fraction:
        show(cfg, fraction, folds, draws, right, pairs)
    name, n = rarest(labels)
    if n < FEW:
        print(f"class {name} has {n} patients: with fewer than {FEW} the intervals mean nothing, and AUCs little")
    rows = [{"features": f, "head": h, "fraction": share, "auc": float(d[0]), "accuracy": right[f, h, share],
             "interval": limits(d)} for (f, h, share), d in draws.items()]
    write_text(out / "cv.json", json.dumps({"settings": asdict(cfg), "rows": rows}, indent=1))
    return draws

def chosen(cfg):
    """What features are worth of which every fold takes its own: those whose head has the lowest validation loss. So no
    test slide has a say. in: cfg of one view, head and share, whose tables are there.
    out: draws (1+n,) of the AUC; {features: how many folds took them}."""
    jobs, aucs = jobs_of(cfg), []
    names, labels = [job.name() for job in jobs if job.repeat == 0], jobs[0].labels()
    counts, weights = dict.fromkeys(names, 0), patient_draws(labels.patients, cfg.bootstrap, cfg.seed)
    for repeat in range(cfg.seeds):
        found = [load_tensors(run_job(job))[0] for job in jobs if job.repeat == repeat]
        fold, scores = found[0]["fold"], found[0]["scores"].clone()                # of the same splits in all
        best = torch.stack([t["val"] for t in found]).argmin(0)                # (folds,)
        for k, number in enumerate(best.tolist()):
            scores[fold == k] = found[number]["scores"][fold == k]
            counts[names[number]] += 1
        aucs.append(weighted_auc(scores.double(), labels.y, fold, weights))
    return torch.stack(aucs).mean(0), counts

def main(argv):
    cfg = configure(Config, argv, doc=__doc__)
    tables(cfg)
    told = f"--features={cfg.features.split(',')[0].strip()} --labels={cfg.labels}"
    print(f"done: {out_of(cfg)}; next: python mil.py map {told} --slide=NAME --data=DIR")
