"""Slide labels from bags of patch features: extract, cross-validate heads, look at their attention (Z §4.5; L §7).

    python mil.py extract RUN --data=DIR --scales=0,2 --out=DIR     # see features.py
    python mil.py cv --features=DIR --labels=FILE                   # a table, features x heads
    python mil.py map --features=DIR --labels=FILE --slide=NAME --data=DIR

Each fold stops early on a part of its training slides, never on its test slides, and features are standardised by the
training slides alone.

in:  a bag (N,K), one slide   out: logits (C,), attention (N,) or (N,C) that sums to 1     read next: mil_table.py
"""
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate
from tqdm import tqdm

from common import (
    UserError,
    atomic,
    cli,
    configure,
    generator,
    load_tensors,
    open_tensors,
    save_tensors,
    setup,
    write_text,
)
from data import Pyramids
from diffusion import ZoomLDM
from sample_joint import draw_patches
from train import fingerprint
from unet import UNet

# ----- 1. Heads: bag (N,K) -> logits (C,), attention -----

def checked(bag, K):
    """raises: UserError for a bag that is not (N,K) with N at least 1. out: float32."""
    if bag.ndim != 2 or bag.shape[1] != K or not len(bag):
        raise UserError(f"got a bag of shape {tuple(bag.shape)}, this head takes (N,{K}) with at least one patch: give "
                        f"features of the kind it was trained on, and leave empty slides out")
    return bag.float()


class ABMIL(nn.Module):
    """Gated attention over embedded instances. source: Ilse et al. 2018, Eq. 9; sizes as CLAM without instance loss."""

    def __init__(self, K, C, width=512, dropout=0.25):
        super().__init__()
        self.K, self.C = K, C
        self.embed = nn.Sequential(nn.Linear(K, width), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.value, self.gate = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.score = nn.Linear(width // 2, 1)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, C)

    def attend(self, bag):
        """out: h (N,width), attention (N,)."""
        h = self.embed(checked(bag, self.K))                               # (N,width)
        v = self.drop(torch.tanh(self.value(h))) * self.drop(torch.sigmoid(self.gate(h)))
        return h, self.score(v)[:, 0].softmax(0)

    def forward(self, bag):
        h, a = self.attend(bag)
        return self.out(a @ h), a

    def loss(self, bag, y):
        """in: y () int64, the class of the bag."""
        return F.cross_entropy(self(bag)[0], y)


class CLAM_SB(ABMIL):
    """ABMIL whose most and least attended instances must be told apart. source: Lu et al. 2021."""
    SAMPLES, SHARE = 8, 0.3  # published; the loss is 0.7 bag + 0.3 instances

    def __init__(self, K, C, width=512, dropout=0.25):
        super().__init__(K, C, width, dropout)
        self.instance = nn.ModuleList(nn.Linear(width, 2) for _ in range(C))

    def loss(self, bag, y):
        h, a = self.attend(bag)
        loss, n = F.cross_entropy(self.out(a @ h), y), min(self.SAMPLES, len(h) // 2)
        if not n:                                                          # deviates: a bag of one has no least
            return loss
        order = a.argsort()
        logits = self.instance[int(y)](h[torch.cat([order[-n:], order[:n]])])              # (2n,2)
        target = torch.tensor([1] * n + [0] * n, device=h.device)
        return (1 - self.SHARE) * loss + self.SHARE * F.cross_entropy(logits, target)


class DSMIL(nn.Module):
    """Two streams: the highest instance of each class, and attention by likeness to it. source: Li et al. 2021.

    deviates: logits are the mean of both streams (with the bag stream alone, nothing but `loss` would train the other).
    """

    def __init__(self, K, C, width=128):
        super().__init__()
        self.K, self.C = K, C
        self.instance = nn.Linear(K, C)
        self.query = nn.Sequential(nn.Linear(K, width), nn.ReLU(inplace=True), nn.Linear(width, width), nn.Tanh())
        self.out = nn.Conv1d(C, C, K)
        for layer in (self.instance, self.query[0], self.query[2], self.out):
            nn.init.orthogonal_(layer.weight)  # published; it makes like queries of like instances from the start
            nn.init.zeros_(layer.bias)
        with torch.no_grad():  # deviates: random scores would choose the critical instances for many epochs
            self.instance.weight.mul_(0.01)
            self.out.weight.mul_(0.01)

    def streams(self, bag):
        """out: logits of the instance and of the bag stream, (C,) each; attention (N,C)."""
        x = checked(bag, self.K)
        top, critical = self.instance(x).max(0)                            # (C,), (C,)
        q = self.query(x)                                                  # (N,width)
        a = (q @ q[critical].T / q.shape[1] ** 0.5).softmax(0)             # (N,C)
        return top, self.out((a.T @ x)[None])[0, :, 0], a

    def forward(self, bag):
        top, whole, a = self.streams(bag)
        return (top + whole) / 2, a

    def loss(self, bag, y):
        top, whole, _ = self.streams(bag)
        target = F.one_hot(y, self.C).float()
        return (F.binary_cross_entropy_with_logits(top, target) + F.binary_cross_entropy_with_logits(whole, target)) / 2


class MeanPool(nn.Module):
    """A floor: the mean of all instances, embedded, then a linear layer; attention is even."""

    def __init__(self, K, C, width=512, dropout=0.25):
        super().__init__()
        self.K, self.C = K, C
        self.embed = nn.Sequential(nn.Linear(K, width), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.out = nn.Linear(width, C)

    def forward(self, bag):
        h = self.embed(checked(bag, self.K))
        return self.out(h.mean(0)), torch.full_like(h[:, 0], 1 / len(h))

    def loss(self, bag, y):
        return F.cross_entropy(self(bag)[0], y)


class MaxPool(MeanPool):
    """A floor: the maximum over instances of each embedded channel; attention is the share of channels an instance has
    the maximum of. (The maximum of instance logits trains badly: an instance that starts low is never looked at.)"""

    def forward(self, bag):
        h, at = self.embed(checked(bag, self.K)).max(0)                    # (width,), (width,)
        return self.out(h), torch.bincount(at, minlength=len(bag)) / len(h)


HEADS = {"abmil": ABMIL, "clam": CLAM_SB, "dsmil": DSMIL, "mean": MeanPool, "max": MaxPool}


RECIPES = {"dsmil": dict(betas=(0.5, 0.9), weight_decay=1e-3)}  # published; the others: CLAM's


RECIPE = dict(betas=(0.9, 0.999), weight_decay=1e-5)


def build(name, K, C, width, dropout):
    """A head by name. raises: UserError for an unknown one."""
    if name not in HEADS:
        raise UserError(f"unknown head {name!r}: known are {', '.join(HEADS)}")
    return HEADS[name](K, C, width) if name == "dsmil" else HEADS[name](K, C, width, dropout)


# ----- 2. Training one head -----

def fit(name, train, val, scaler, C, cfg, seed):
    """Train a head, a bag a step, classes equally often, until the validation loss has not fallen for a while.

    in:  train, val: lists of (function that reads a bag (N,K), class number); scaler: mean and deviation (K,).
    out: the head at its lowest validation loss, in eval mode.
    """
    torch.manual_seed(seed)
    (mean, deviation), labels = scaler, torch.tensor([y for _, y in train])
    head = build(name, len(mean), C, cfg.width, cfg.dropout)
    opt = torch.optim.Adam(head.parameters(), lr=cfg.lr, **RECIPES.get(name, RECIPE))
    weight = 1 / torch.bincount(labels, minlength=C)[labels].double()
    best, since, kept = float("inf"), 0, None

    def loss(item):
        read, y = item
        return head.loss((read() - mean) / deviation, torch.tensor(y))
    for epoch in range(cfg.epochs):
        head.train()
        for k in torch.multinomial(weight, len(train), True, generator=generator(cfg.seed, seed, epoch)).tolist():
            opt.zero_grad()
            loss(train[k]).backward()
            opt.step()
        head.eval()
        with torch.no_grad():
            value = float(torch.stack([loss(item) for item in val]).mean())
        if not math.isfinite(value):
            raise UserError(f"head {name}: the validation loss is no longer finite: give a lower --lr than {cfg.lr}")
        since = since + 1
        if value < best:
            best, since, kept = value, 0, {k: v.clone() for k, v in head.state_dict().items()}
        if since >= cfg.patience:
            break
    head.load_state_dict(kept)
    return head


@dataclass
class ExtractConfig:
    run: str = ""             # run folder
    data: str = ""            # pyramids; default: those the run was trained on
    out: str = ""             # folder to write; default RUN/features
    scales: tuple = (0,)      # of the features, finest first
    kind: str = "unet"        # unet; untrained, the same with a random U-Net; descriptor, the encoder on the patch
    #                           itself; drawn, the same on a patch drawn from the condition
    t: int = 100              # time index that patches are noised to (Z 100, L 50)
    block: str = ""           # middle (L), or an index into the published output_blocks; default 3 (Z), or the last
    weights: str | None = None  # of the encoder, for kinds descriptor and drawn
    seed: int = 0             # of the noise
    guidance: float = 2.0     # of kind drawn
    steps: int = 10           # of kind drawn
    batch: int = 64           # patches per network call
    device: str = "auto"
    threads: int = 0
    amp: bool = True          # bf16 where the device has it


def open_all(cfg, ranks):
    """out: the model, with a random U-Net for kind untrained, or None; the pyramids; the encoder, or None; the block.
    raises: UserError for bad settings, or pyramids that the run was not trained on the like of."""
    from slides.encoders import load_encoder
    if cfg.kind not in ("unet", "untrained", "descriptor", "drawn") or cfg.batch < 1 or cfg.steps < 1 or cfg.seed < 0:
        raise UserError(f"--kind={cfg.kind} --batch={cfg.batch} --steps={cfg.steps} --seed={cfg.seed}: kinds are unet, "
                        f"untrained, descriptor, drawn; batch and steps at least 1")
    if not cfg.run and (cfg.kind != "descriptor" or not cfg.data):
        raise UserError("say which run: python mil.py extract RUN --data=DIR (only --kind=descriptor --data=DIR --out="
                        "DIR needs none)")
    model = ZoomLDM.from_run(cfg.run).to(ranks.device) if cfg.run else None
    info = model.info if model else {}
    pyramids = Pyramids(cfg.data or info.get("data", ""), std=info.get("std"))
    if model and (pyramids.patch != info.get("patch") or pyramids.encoder != info.get("encoder")
                  or pyramids.embed_dim != model.summarizer.cfg.embed_dim):
        raise UserError(f"{pyramids.folder} has {pyramids.patch}-pixel patches embedded with {pyramids.encoder!r}, the "
                        f"run was trained on {info.get('patch')} and {info.get('encoder')!r}: build it with these")
    top = min(pyramids.scales, model.summarizer.cfg.scales if model else pyramids.scales)
    if not cfg.scales or list(cfg.scales) != sorted({s for s in cfg.scales if s in range(top)}):
        raise UserError(f"--scales={cfg.scales}: give some of 0 to {top - 1}, finest first")
    block, encoder = None, None
    if cfg.kind in ("unet", "untrained"):
        names = ["middle", *map(str, range(len(model.unet.up)))]
        block = cfg.block or str(min(3, len(model.unet.up) - 1))
        if block not in names or not 0 <= cfg.t < model.schedule.T:
            raise UserError(f"--block={cfg.block} --t={cfg.t}: blocks of this run are {', '.join(names)}; t is from 0 "
                            f"to {model.schedule.T - 1}")
        block = block if block == "middle" else int(block)
    else:
        encoder = load_encoder(pyramids.encoder, pyramids.std, cfg.weights, ranks.device)
    if cfg.kind == "untrained":
        torch.manual_seed(cfg.seed)
        model.unet = UNet(model.unet.cfg).to(ranks.device).eval().requires_grad_(False)
    return model, pyramids, encoder, block


@torch.no_grad()
def scale_features(model, pyramids, encoder, block, k, s, cfg, ranks):
    """Features (n,K) float32 of all patches of scale s of slide k. The noise of a patch is a function of seed, slide
    and place alone: batches, ranks and interruptions change nothing."""
    mark, out = crc32(pyramids.slides[k]["name"].encode()), []
    for first in range(0, pyramids.slides[k]["counts"][s], cfg.batch):
        rows = range(first, min(first + cfg.batch, pyramids.slides[k]["counts"][s]))
        batch = default_collate([pyramids.item(k, s, n, ("x",)) for n in rows])
        x = batch["x"]
        if cfg.kind == "drawn":
            x = draw_patches(model, batch, SimpleNamespace(
                batch=cfg.batch, guidance=cfg.guidance, steps=cfg.steps, sampler="ddim", end="clean",
                seed=int(generator(cfg.seed, mark, s, first).initial_seed())), ranks)
        x = x.to(ranks.device)
        if encoder is not None:
            out.append(encoder((x + 1) / 2).float().cpu())                                 # (b,E)
            continue
        tokens, mask, scale = (batch[key].to(ranks.device) for key in ("tokens", "mask", "s"))
        with ranks.autocast():
            z, c = model.encode(x).float(), model.summarizer(tokens, mask, scale).float()
            eps = torch.stack([torch.randn(z.shape[1:], generator=generator(cfg.seed, mark, s, *ij))
                               for ij in batch["ij"].tolist()])
            t = torch.full((len(z),), cfg.t, device=z.device)
            z_t = model.schedule.q_sample(z, t, eps.to(z.device))
            out.append(model.unet.features(z_t, t, c, block).float().mean((2, 3)).cpu())   # (b,K)
    return torch.cat(out) if out else torch.zeros(0, 0)


def extract(cfg):
    """Write OUT/SLIDE.safetensors for every slide: features (N,K), coords (N,2), one slide in memory at a time. Slides
    that are done are passed over; ranks share the others. raises: UserError if they were made with other settings."""
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model, pyramids, encoder, block = open_all(cfg, ranks)
    out = Path(cfg.out or Path(cfg.run) / "features")
    same = {k: v for k, v in asdict(cfg).items() if k not in ("run", "data", "out", "batch", "device", "threads")}
    same |= {"block": block, "model": fingerprint(model) if model and cfg.kind != "descriptor" else None}
    P, lost, none = pyramids.patch, 0, []
    if ranks.rank == 0:
        print(f"{cfg.kind} features of {len(pyramids.slides)} slides at scales {cfg.scales}"
              f"{f', block {block}, t = {cfg.t}' if block is not None else ''} -> {out}")
    for k in tqdm(range(ranks.rank, len(pyramids.slides), ranks.world), disable=ranks.rank > 0):
        slide, source = pyramids.slides[k], (pyramids.folder / pyramids.slides[k]["file"]).stat()
        path = out / f"{slide['name']}.safetensors"
        meta = json.loads(json.dumps({"settings": same, "source": [source.st_size, source.st_mtime_ns], "patch": P,
                                      "size": slide["size"], "scales": cfg.scales}))
        if path.exists():
            with open_tensors(path) as f:
                there = json.loads((f.metadata() or {}).get("json", "{}"))
            if {key: there.get(key) for key in meta} != meta:
                raise UserError(f"{path} was made from other images or with other settings: give another --out, or "
                                f"remove it")
            continue
        ij = [[tuple(v) for v in pyramids.tensor(k, f"ij{s}").tolist()] if slide["counts"][s] else []
              for s in cfg.scales]
        place = [{v: n for n, v in enumerate(places)} for places in ij]
        rows = [[at.get((i >> s - cfg.scales[0], j >> s - cfg.scales[0]), -1) for s, at in zip(cfg.scales, place)]
                for i, j in ij[0]]
        whole = torch.tensor([row for row in rows if min(row) >= 0], dtype=torch.long).reshape(-1, len(cfg.scales))
        lost += len(rows) - len(whole)
        if not len(whole):
            none.append(slide["name"])
            continue
        parts = [scale_features(model, pyramids, encoder, block, k, s, cfg, ranks) for s in cfg.scales]
        coords = torch.tensor(ij[0])[whole[:, 0]].flip(1) * (P << cfg.scales[0])           # (N,2) x, y at full size
        save_tensors(path, {"features": torch.cat([p[n] for p, n in zip(parts, whole.T)], 1), "coords": coords.int()},
                     meta | {"widths": [p.shape[1] for p in parts]})
    if lost:
        print(f"{lost} patches of scale {cfg.scales[0]} lie in no patch of {cfg.scales[1:]} and are left out")
    if none:
        print(f"{len(none)} slides have no patch and get no file: {', '.join(none[:8])}")
    ranks.barrier()


@dataclass
class Config:
    features: str = ""         # folder of features, or several with commas between
    labels: str = ""           # CSV with slide_id, label and, if patients have several slides, case_id
    splits: str = ""           # CLAM's splits, a CSV or a folder of them; "" = folds made here
    out: str = ""              # folder for scores and trained heads, which are not trained again; default FEATURES/cv
    heads: str = "abmil,dsmil,clam"  # of HEADS
    views: str = "all"         # features of several scales: all views of them, or some of 0,2,0+2
    width: int = 128           # hidden width; published: 512, DSMIL 128
    folds: int = 5
    seeds: int = 1             # repetitions, with other folds
    fraction: tuple = (1.0,)   # shares of the training slides that are used
    val: float = 0.2           # share of them that early stopping looks at
    epochs: int = 40           # at most; published: 200 (CLAM), 50 (DSMIL)
    patience: int = 10         # epochs without a better validation loss, after which training stops (CLAM: 20)
    lr: float = 5e-4           # of Adam; published: 2e-4 (CLAM), 1e-4 (DSMIL)
    dropout: float = 0.25
    seed: int = 0
    shuffle: bool = False      # shuffle the labels: every AUC should lie near 0.5
    bootstrap: int = 1000      # draws of patients for the intervals
    partial: bool = False      # use the slides that have features and a label
    workers: int = 2           # processes
    # map
    slide: str = ""
    data: str = ""             # pyramids of data.py, whose picture the attention is drawn on
    image: str = ""            # or a picture of the whole slide
    downsample: float = 0.0    # and how many pixels of the slide one of its pixels is


# ----- 1. Scores: one head, one view of one folder, cross-validated -----

# settings that change no single job
FREE = ("features", "out", "heads", "views", "seeds", "fraction", "bootstrap", "workers", "slide", "data", "image",
        "downsample")


@lru_cache(maxsize=4)
def cached_bags(folder, view):
    from slides.bags import Bags
    return Bags(folder, view)


def job_labels(cfg, names, repeat):
    """The labels of these slides; shuffled, if cfg says so, differently in each repetition."""
    from slides.bags import Labels
    labels = Labels(cfg.labels, names, cfg.partial)
    if cfg.shuffle:
        labels.y = labels.y[torch.randperm(len(labels.y), generator=generator(cfg.seed, repeat, 9))]
    return labels


def job_splits(cfg, labels, fraction, repeat):
    from slides.bags import make_splits, read_splits
    if cfg.splits:
        return read_splits(cfg.splits, labels)
    return make_splits(labels, cfg.folds, fraction, cfg.val, cfg.seed + 10 * repeat)


def job_meta(cfg, folder, view, name, fraction, repeat):
    """What the scores of a job depend on. raises: UserError for labels and splits that do not do."""
    from slides.bags import files_of
    labels = job_labels(cfg, [f.stem for f in files_of(folder)], repeat)
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files_of(folder)]
    mark = crc32(repr([files, labels.y.tolist(), labels.patients, job_splits(cfg, labels, fraction, repeat)]).encode())
    same = {k: v for k, v in asdict(cfg).items() if k not in FREE}
    return {"settings": same, "folder": str(folder), "view": view, "head": name, "fraction": fraction,
            "repeat": repeat, "slides": labels.names, "classes": labels.classes, "mark": mark}


def run_job(job):
    """Write scores (n,C) of every slide by the head that did not see it, fold (n,), y (n,), and, for the first
    repetition, the heads. A file that is there and was made by the same job is kept."""
    path, cfg, folder, view, name, fraction, repeat = job
    meta = job_meta(*job[1:])
    if path.exists():
        with open_tensors(path) as f:
            if json.loads((f.metadata() or {}).get("json", "{}")) == json.loads(json.dumps(meta)):
                return path
    torch.set_num_threads(1)
    bags = cached_bags(folder, view)
    labels = job_labels(cfg, bags.names, repeat)
    n, saved = len(labels.names), {}
    scores, fold = torch.full((n, len(labels.classes)), float("nan")), torch.full((n,), -1)
    for k, (train, val, test) in enumerate(job_splits(cfg, labels, fraction, repeat)):
        def items(slides):
            return [(partial(bags.__getitem__, labels.names[i]), int(labels.y[i])) for i in slides]
        scaler = bags.scaler([labels.names[i] for i in train])
        head = fit(name, items(train), items(val), scaler, len(labels.classes), cfg, cfg.seed + 100 * repeat + k)
        with torch.no_grad():
            for i in test:
                scores[i], fold[i] = head((bags[labels.names[i]] - scaler[0]) / scaler[1])[0].softmax(0), k
        if repeat == 0:
            saved |= {f"head.{k}.{key}": v for key, v in head.state_dict().items()}
            saved |= {f"scaler.{k}": torch.stack(scaler)}
    save_tensors(path, {"scores": scores, "fold": fold, "y": labels.y, **saved}, meta)
    return path


# ----- 2. Tables -----

def weighted_auc(scores, y, fold, weights):
    """AUC with slides counted `weights` times, mean over folds, and over classes one against the rest if there are more
    than two. in: scores (n,C), y and fold (n,), -1 = not scored; weights (B,n). out: (B,). Equal weights: metrics.auc.
    """
    out = []
    for k in range(int(fold.max()) + 1):
        for c in range(scores.shape[1]) if scores.shape[1] > 2 else (1,):
            one, rest = (torch.nonzero((fold == k) & ((y == c) == v))[:, 0] for v in (True, False))
            a, b = scores[one, c][:, None], scores[rest, c][None]
            wins = (a > b).double() + (a == b).double() / 2                # (ones,rest)
            w, v = weights[:, one], weights[:, rest]                       # (B,ones), (B,rest)
            out.append((w @ wins * v).sum(1) / (w.sum(1) * v.sum(1)))      # NaN where a draw lacks a class
    return torch.stack(out).nanmean(0)


def patient_draws(patients, n, seed):
    """How often each slide counts if patients are drawn with replacement: (1+n, slides), the first row is all ones."""
    _, group = np.unique(patients, return_inverse=True)
    draws = np.random.default_rng([seed, 5]).integers(0, group.max() + 1, (n, group.max() + 1))
    counts = np.stack([np.bincount(d, minlength=group.max() + 1) for d in draws]) if n else np.zeros((0, 1))
    return torch.from_numpy(np.concatenate([np.ones((1, len(group))), counts[:, group] if n else counts[:, group * 0]]))


def interval(draws):
    """in: (1+n,) value and bootstrap draws of it. out: "0.812 [0.75,0.87]", 95 %."""
    low, high = torch.nanquantile(draws[1:], torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return f"{float(draws[0]):.3f} [{low:.2f},{high:.2f}]"


def cross_validate(cfg, pairs=None):
    """Train what cfg asks for and print tables. out: {(features, head, fraction): draws (1+n,) of the AUC}.

    pairs: names of features whose difference to print; default: all. The intervals say how much the choice of test
    patients matters, not that of training patients. raises: UserError for unusable features, labels or settings.
    """
    from slides.bags import Labels, few, files_of, views
    folders = [f.strip() for f in cfg.features.split(",") if f.strip()]
    heads = [h.strip() for h in cfg.heads.split(",")]
    if not folders or not cfg.labels:
        raise UserError("say what to learn from: python mil.py cv --features=DIR --labels=FILE")
    if set(heads) - set(HEADS) or min(cfg.seeds, cfg.epochs, cfg.patience, cfg.width // 2, cfg.workers) < 1 or (
            cfg.folds < 2 or not 0 < cfg.val < 1 or not all(0 < f <= 1 for f in cfg.fraction) or cfg.bootstrap < 1):
        raise UserError(f"--heads={cfg.heads} --seeds={cfg.seeds} --folds={cfg.folds} --val={cfg.val} --fraction="
                        f"{cfg.fraction}: heads are {', '.join(HEADS)}; folds at least 2, val and fraction are shares, "
                        f"everything else is at least 1")
    if cfg.splits and cfg.fraction != (1.0,):
        raise UserError("--fraction goes with folds made here, not with --splits: cut the train column of the CSV")
    sets, slides = {}, [f.stem for f in files_of(folders[0])]
    for folder in folders:
        mine = [f.stem for f in files_of(folder)]
        if mine != slides:
            odd = sorted(set(mine) ^ set(slides))
            raise UserError(f"{folder} and {folders[0]} hold different slides ({few(odd)}): extract both from the same "
                            f"ones")
        for view in views(folder):
            if cfg.views == "all" or view in cfg.views.split(",") or not view:
                sets[f"{Path(folder).name} {view}".strip()] = folder, view
    if not sets:
        raise UserError(f"--views={cfg.views}: the features have {', '.join(v for f in folders for v in views(f))}")
    out = Path(cfg.out or f"{folders[0].rstrip('/')}_cv")
    labels = Labels(cfg.labels, slides, cfg.partial)
    jobs = {(name, head, fraction, repeat): (out / f"{name}_{head}_{fraction}_{repeat}.safetensors".replace(" ", "_"),
                                             cfg, *sets[name], head, fraction, repeat)
            for name in sets for fraction in cfg.fraction for repeat in range(cfg.seeds) for head in heads}
    for fraction in cfg.fraction:
        for repeat in range(cfg.seeds):  # what is wrong with labels or splits is said before anything is trained
            job_splits(cfg, job_labels(cfg, slides, repeat), fraction, repeat)
    count = torch.bincount(labels.y).tolist()
    print(f"{len(labels.names)} slides of {len(set(labels.patients))} patients, classes "
          f"{', '.join(f'{c} ({n})' for c, n in zip(labels.classes, count))}; {len(jobs)} cross-validations -> {out}")
    if cfg.workers == 1:
        done = [run_job(job) for job in tqdm(jobs.values())]
    else:
        with ProcessPoolExecutor(cfg.workers, get_context("spawn")) as workers:  # torch's threads survive no fork
            done = list(tqdm(workers.map(run_job, jobs.values()), total=len(jobs)))
    weights, draws, right = patient_draws(labels.patients, cfg.bootstrap, cfg.seed), {}, {}
    for (*key, _), path in zip(jobs, done):
        t = load_tensors(path)[0]
        draws.setdefault(tuple(key), []).append(weighted_auc(t["scores"].double(), t["y"], t["fold"], weights))
        seen = t["fold"] >= 0
        right.setdefault(tuple(key), []).append(float((t["scores"].argmax(1) == t["y"])[seen].double().mean()))
    draws = {key: torch.stack(v).mean(0) for key, v in draws.items()}
    right = {key: sum(v) / len(v) for key, v in right.items()}
    wide = max(map(len, sets)) + 2
    for fraction in cfg.fraction:
        print(f"\nAUC [95 % interval over patients] and accuracy, mean of {cfg.seeds} x "
              f"{len(job_splits(cfg, labels, fraction, 0))} folds, {fraction:.0%} of the training slides"
              f"{', LABELS SHUFFLED' if cfg.shuffle else ''}\n{'':{wide}}" + "".join(f"{h:>27}" for h in heads))
        for name in sets:
            print(f"{name:{wide}}" + "".join(
                f"{interval(draws[name, h, fraction]):>21} {right[name, h, fraction]:.3f}" for h in heads))
        pairs = [(b, a) for i, a in enumerate(sets) for b in list(sets)[i + 1:]] if pairs is None else pairs
        for a, b in (p for p in pairs if set(p) <= set(sets)):
            difference = [draws[a, h, fraction] - draws[b, h, fraction] for h in heads]
            print(f"{a} - {b}:" + "".join(f"  {h} {interval(d)}" for h, d in zip(heads, difference))
                  + f"  mean {interval(torch.stack(difference).mean(0))}")
    write_text(out / "cv.json", json.dumps({"settings": asdict(cfg), "rows": [
        {"features": f, "head": h, "fraction": share, "auc": float(d[0]), "accuracy": right[f, h, share], "interval":
         torch.nanquantile(d[1:], torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()}
        for (f, h, share), d in draws.items()]}, indent=1))
    return draws


# ----- 3. Attention maps -----

def thumbnail(cfg, slide):
    """out: picture (h,w,3) uint8 of the slide, and how many of its pixels one of the picture is."""
    if cfg.image:
        if cfg.downsample <= 0:
            raise UserError("--image needs --downsample: how many pixels of the slide one of its pixels is")
        return np.asarray(Image.open(cfg.image).convert("RGB")), cfg.downsample
    if not cfg.data:
        raise UserError("say what to draw on: --data=DIR, the pyramids, or --image=FILE --downsample=N")
    pyramids = Pyramids(cfg.data)
    k = next((i for i, x in enumerate(pyramids.slides) if x["name"] == slide), None)
    if k is None:
        raise UserError(f"{cfg.data} has no slide {slide!r}: give the pyramids it was extracted from")
    (h, w), P = pyramids.slides[k]["size"], pyramids.patch
    s = next((s for s in range(pyramids.scales) if max(h, w) >> s <= 1024), pyramids.scales - 1)
    picture = np.full((h >> s, w >> s, 3), 255, np.uint8)
    for n in range(pyramids.slides[k]["counts"][s]):
        i, j = pyramids.tensor(k, f"ij{s}")[n].tolist()
        picture[i * P:(i + 1) * P, j * P:(j + 1) * P] = pyramids.tensor(k, f"x{s}")[n]
    return picture, 2 ** s


def draw_map(cfg):
    """Write a PNG: the slide, and over it the attention of the head that had the slide in its test fold."""
    from slides.bags import files_of, read_bag, views
    folder, head = cfg.features.split(",")[0], cfg.heads.split(",")[0]
    view = views(folder)[-1]
    cfg = replace(cfg, heads=head, fraction=cfg.fraction[:1])
    job = cfg, folder, view, head, cfg.fraction[0], 0
    path = Path(cfg.out or f"{folder.rstrip('/')}_cv")
    name = f"{Path(folder).name} {view}".strip()
    path = run_job((path / f"{name}_{head}_{cfg.fraction[0]}_0.safetensors".replace(" ", "_"), *job))
    t, meta = load_tensors(path)
    if cfg.slide not in meta["slides"]:
        raise UserError(f"--slide={cfg.slide}: the features are of {', '.join(meta['slides'][:8])}, ...")
    x, coords, info = read_bag(next(f for f in files_of(folder) if f.stem == cfg.slide))
    at = meta["slides"].index(cfg.slide)
    fold, classes = int(t["fold"][at]), meta["classes"]
    if coords is None or fold < 0:
        raise UserError(f"{cfg.slide} has no coordinates, or is in no test fold: give .h5 or .safetensors features")
    model = build(head, x.shape[1], len(classes), cfg.width, cfg.dropout).eval()
    model.load_state_dict({k.removeprefix(f"head.{fold}."): v for k, v in t.items() if k.startswith(f"head.{fold}.")})
    with torch.no_grad():
        logits, a = model((x - t[f"scaler.{fold}"][0]) / t[f"scaler.{fold}"][1])
    a = a[:, int(logits.argmax())] if a.ndim == 2 else a                   # (N,)
    picture, factor = thumbnail(cfg, cfg.slide)
    gaps = torch.cat([v.unique().diff() for v in coords.T])
    side = info["patch"] << info["scales"][0] if "patch" in info else int(gaps.min()) if len(gaps) else 256
    heat = np.zeros(picture.shape[:2])
    for (px, py), v in zip(coords.tolist(), (a / a.max()).tolist()):
        heat[int(py / factor):int((py + side) / factor), int(px / factor):int((px + side) / factor)] = v
    hot = np.stack([np.full_like(heat, 255), 220 * (1 - heat), 0 * heat], -1)              # yellow to red
    over = picture * (1 - 0.6 * heat[..., None]) + hot * 0.6 * heat[..., None]
    out = path.with_name(f"map_{cfg.slide}_{name}_{head}.png".replace(" ", "_"))
    with atomic(out) as tmp:
        Image.fromarray(np.concatenate([picture, over.astype(np.uint8)], 1)).save(tmp, "PNG")
    print(f"{out}: label {classes[int(t['y'][at])]}, "
          + ", ".join(f"P({c}) = {p:.2f}" for c, p in zip(classes, logits.softmax(0).tolist()))
          + f"; the most attended patch weighs {float(a.max()) * len(a):.1f} times the mean one")


def main(argv):
    if argv and argv[0] in ("--help", "-h"):
        return print(__doc__ + "\nsettings: python mil.py extract --help, python mil.py cv --help")
    if not argv or argv[0] not in ("extract", "cv", "map"):
        raise UserError(f"got {argv[0] if argv else 'no command'!r}: write python mil.py extract RUN --data=DIR, or "
                        f"python mil.py cv --features=DIR --labels=FILE, or python mil.py map")
    if argv[0] == "extract":
        return extract(configure(ExtractConfig, argv[1:], words=("run",), doc=__doc__))
    (cross_validate if argv[0] == "cv" else draw_map)(configure(Config, argv[1:], doc=__doc__))


if __name__ == "__main__":
    cli(main)
