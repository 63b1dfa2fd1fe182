"""What features and samples are worth: Z Table 5 in miniature, and samples as training data (L Tables 2, 3).

    python data.py toy --task
    python mil_table.py out/toy_long                     # descriptor, diffusion, untrained features x scales x heads
    python mil_table.py out/toy_long --part=sweep        # diffusion features over t and block
    python mil_table.py out/toy_long --part=probe        # what all of these know of ducts and of nuclei
    python mil_table.py out/toy_long --part=slides       # slide labels learned from real slides, drawn ones, and both
    python mil_table.py out/toy_long --part=patches      # the same for patches, tested under another stain

Features, scores and heads stay in RUN/claims; the same command goes on where it stopped.

in:  a run, slides with labels   out: tables, and whether each claim holds     read next: joint_table.py
"""
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import mil
from common import UserError, cli, configure, generator, setup
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM
from experiments.evaluate import truth
from mil import ExtractConfig, extract, fit
from sample_joint import draw_patches
from slides.bags import Bags, Labels, files_of, make_splits, read_bag, views
from toy.task import CELL, structures


@dataclass
class Config:
    run: str = ""
    part: str = "table"       # table, sweep, probe, slides or patches
    data: str = "data/task"   # pyramids of slides with labels
    labels: str = ""          # default DATA/labels.csv
    out: str = ""             # default RUN/claims
    extract: ExtractConfig = field(default_factory=lambda: ExtractConfig(scales=(0, 2)))  # but for run, data and out
    cv: mil.Config = field(default_factory=lambda: mil.Config(seeds=3, fraction=(0.25, 1.0)))  # but for files
    ts: tuple = (10, 50, 100, 300, 600)  # of the sweep
    blocks: str = "middle,1,2,3"         # of the sweep, at t = extract.t
    toy: str = ""             # of part patches: pyramids with region maps; default: those of the run
    scale: int = 1            # of part patches
    n: int = 2000             # training patches, and as many test patches, if there are


def features(cfg, name, **settings):
    """Extract to OUT/NAME what is not there yet. out: that folder."""
    folder = f"{cfg.out}/{name}"
    extract(replace(cfg.extract, run=cfg.run, data=cfg.data, out=folder, **settings))
    return folder


def verdict(text, difference):
    """Say whether a claim holds: whether 95 % of the draws (1+n,) of a difference lie on one side of 0."""
    low, high = torch.nanquantile(difference[1:], torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    word = "holds" if low > 0 else "fails" if high < 0 else "is open"
    print(f"{text}: {mil.interval(difference)}, {word}")


def table(cfg):
    """Descriptor, diffusion and untrained features at every scale and joined, each head, each share of the slides."""
    names = ["descriptor", "unet", "untrained"]
    folders = [features(cfg, name, kind=name) for name in names]
    last, first = views(folders[1])[-1], views(folders[1])[0]
    pairs = [(f"unet {v}".strip(), f"descriptor {v}".strip()) for v in views(folders[1])]
    pairs += [(f"{name} {last}", f"{name} {v}") for name in names[:2] for v in views(folders[1])[:-1]]
    pairs += [(f"unet {last}".strip(), f"untrained {last}".strip())]
    settings = replace(cfg.cv, features=",".join(folders), labels=cfg.labels, out=f"{cfg.out}/cv")
    draws = mil.cross_validate(settings, pairs)
    heads = [h.strip() for h in cfg.cv.heads.split(",")]
    for share in cfg.cv.fraction:
        print(f"\nclaims, mean over heads, {share:.0%} of the training slides")
        for a, b in pairs:
            text = "diffusion features beat" if a.split()[0] != b.split()[0] else "two scales beat one"
            difference = torch.stack([draws[a, h, share] - draws[b, h, share] for h in heads]).mean(0)
            verdict(f"  {text}: {a} - {b}", difference)
    if last == first:
        print("one scale was extracted: nothing is said about two")


def sweep(cfg):
    """Diffusion features over t, and over the block of the U-Net; the first head, all training slides, all scales."""
    settings = [(t, cfg.extract.block) for t in cfg.ts] + [(cfg.extract.t, b.strip()) for b in cfg.blocks.split(",")]
    folders = [features(cfg, f"t{t}_{block or 'default'}", kind="unet", t=t, block=block) for t, block in settings]
    mil.cross_validate(replace(cfg.cv, features=",".join(folders), labels=cfg.labels, out=f"{cfg.out}/cv",
                               fraction=(1.0,), views=views(folders[0])[-1], heads=cfg.cv.heads.split(",")[0]),
                       pairs=[])


def probe(cfg):
    """What all features extracted so far know of the toy slides: is a square a duct, has it large nuclei? Ridge
    regression on the mean over the patches in the square, AUC on held-out fifths of the patients."""
    source = json.loads((Path(cfg.data) / "index.json").read_text()).get("source", {})
    if source.get("command") != "task":
        raise UserError(f"{cfg.data} are not the toy slides whose ducts are known: python data.py toy --task")
    print(f"{'AUC':<22}{'scale':>6}{'width':>6}{'duct':>8}{'large nuclei':>14}")
    for folder in sorted(f for f in Path(cfg.out).iterdir() if any(f.glob("train_*.safetensors"))):
        found = {}                                              # scale: [(x (K), duct, large, fold)]
        for file in files_of(folder):
            k = int(file.stem.removeprefix("train_"))
            duct, large = structures(source["seed"] * 100_000 + k, source["size"])[:2]
            x, coords, meta = read_bag(file)
            place = (coords // CELL).flip(1)                                           # (N,2) row and column of squares
            square = place[:, 0] * (source["size"] // CELL) + place[:, 1]
            for s, part in zip(meta["scales"], x.split(meta["widths"], 1)):
                for n in square.unique() if source["patch"] << s <= CELL else ():
                    found.setdefault(s, []).append((part[square == n].mean(0), duct[n], large[n], k // 2 % 5))
        for s, rows in found.items():
            x, duct, large, fold = (torch.as_tensor(np.stack(v)) for v in zip(*rows))
            x = F.pad((x - x.mean(0)) / x.std(0).clamp_min(1e-6), (0, 1), value=1.0).double()      # (n,K+1)
            auc = []
            for y in (duct, large):
                score = torch.zeros(len(y), 2).double()
                for k in range(5):
                    a, b = x[fold != k], y[fold != k].double() * 2 - 1
                    w = torch.linalg.solve(a.T @ a + 30 * torch.eye(a.shape[1]).double(), a.T @ b)
                    score[fold == k, 1] = x[fold == k] @ w
                auc.append(float(mil.weighted_auc(score, y.long(), fold, torch.ones(1, len(y)).double())))
            print(f"{folder.name:<22}{s:>6}{x.shape[1] - 1:>6}{auc[0]:>8.3f}{auc[1]:>14.3f}")


def slides(cfg):
    """Slide labels from descriptors of real slides, of slides drawn patch by patch from the conditions of the same
    training slides, and of both; tested on real ones. The first head, 10 % and all of the training slides."""
    real, drawn = (Bags(folder, views(folder)[-1]) for folder in
                   (features(cfg, "descriptor", kind="descriptor"), features(cfg, "drawn", kind="drawn")))
    labels, head = Labels(cfg.labels, real.names, cfg.cv.partial), cfg.cv.heads.split(",")[0]
    C, weights, draws = len(labels.classes), mil.patient_draws(labels.patients, cfg.cv.bootstrap, cfg.cv.seed), {}
    sources = {"real": (real,), "drawn": (drawn,), "both": (real, drawn)}
    torch.set_num_threads(1)
    jobs = [(share, repeat, name) for share in (0.1, 1.0) for repeat in range(cfg.cv.seeds) for name in sources]
    for share, repeat, name in tqdm(jobs):
        scores, fold = torch.full((len(labels.names), C), float("nan")), torch.full((len(labels.names),), -1)
        splits = make_splits(labels, cfg.cv.folds, share, cfg.cv.val, cfg.cv.seed + 10 * repeat)
        for k, (train, val, test) in enumerate(splits):
            def items(part, name=name):
                return [(partial(bags.__getitem__, labels.names[i]), int(labels.y[i])) for bags in sources[name]
                        for i in part]
            mean, deviation = scaler = sources[name][0].scaler([labels.names[i] for i in train], *sources[name][1:])
            net = fit(head, items(train), items(val), scaler, C, cfg.cv, cfg.cv.seed + 100 * repeat + k)
            with torch.no_grad():
                for i in test:
                    scores[i], fold[i] = net((real[labels.names[i]] - mean) / deviation)[0].softmax(0), k
        draws.setdefault((share, name), []).append(mil.weighted_auc(scores.double(), labels.y, fold, weights))
    draws = {key: torch.stack(v).mean(0) for key, v in draws.items()}
    for share in (0.1, 1.0):
        print(f"\n{share:.0%} of the training slides, {head}, AUC on real slides: " + ", ".join(
            f"{name} {mil.interval(draws[share, name])}" for name in sources))
        verdict("  drawn slides help: both - real", draws[share, "both"] - draws[share, "real"])


# ----- patches -----

def stain_shift(x):
    """Another laboratory: more of one dye, less of the other. in, out: x (B,3,H,W) in [-1,1]."""
    density = -((x + 1) / 2).clamp_min(1 / 255).log()                      # optical density of red, green, blue
    density = density * torch.tensor([1.35, 0.8, 1.1])[:, None, None] + 0.03
    return density.neg().exp() * 2 - 1


def classifier(x, y, classes, seed, epochs=30):
    """A small convolutional network, trained from scratch. in: x (N,3,P,P), y (N,). out: the network."""
    torch.manual_seed(seed)
    net, wide = nn.Sequential(), 3
    for width in (16, 32, 64):
        net.extend([nn.Conv2d(wide, width, 3, 2, 1), nn.GroupNorm(4, width), nn.ReLU()])
        wide = width
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, classes)])
    opt, weight = torch.optim.Adam(net.parameters(), 2e-3), 1 / torch.bincount(y, minlength=classes)[y].double()
    for step in range(epochs * max(1, len(y) // 32)):
        rows = torch.multinomial(weight, 32, True, generator=generator(seed, step))
        opt.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        opt.step()
    return net.eval()


def patches(cfg):
    """Dominant tissue of patches, learned from real ones, from ones drawn from the conditions of the same, and from
    both; balanced accuracy on held-out patches, as they are and stained otherwise. 10 % and all of --n."""
    ranks = setup(cfg.extract.device, cfg.extract.amp, cfg.extract.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    pyramids = Pyramids(cfg.toy or model.info["data"], std=model.info["std"])
    train, test = (fixed_batch(pyramids, split, cfg.scale, cfg.n) for split in ("train", "test"))
    (y, want) = (truth(pyramids, b, pyramids.patch)[0].argmax(1) for b in (train, test))
    how = SimpleNamespace(batch=cfg.extract.batch, guidance=cfg.extract.guidance, steps=cfg.extract.steps, seed=0,
                          sampler="ddim", end="clean")
    x, fake, C = train["x"], draw_patches(model, train, how, ranks), int(max(y.max(), want.max())) + 1
    print(f"{len(x)} training and {len(want)} test patches of scale {cfg.scale}, by tissue "
          f"{torch.bincount(want).tolist()}")

    def balanced(net, images):
        with torch.no_grad():
            right = torch.cat([net(part).argmax(1) for part in images.split(256)]) == want
        return torch.stack([right[want == c].double().mean() for c in want.unique()]).mean()
    for share in (0.1, 1.0):
        n = int(share * len(x))
        sets = {"real": (x[:n], y[:n]), "drawn": (fake[:n], y[:n]), "both": (torch.cat([x[:n], fake[:n]]),
                                                                            torch.cat([y[:n], y[:n]]))}
        for name, (images, labels) in sets.items():
            nets = [classifier(images, labels, C, seed) for seed in range(cfg.cv.seeds)]
            for stain, seen in (("same stain", test["x"]), ("other stain", stain_shift(test["x"]))):
                score = torch.stack([balanced(net, seen) for net in nets])
                print(f"{share:>5.0%} {name:<6} {stain:<12} balanced accuracy {score.mean():.3f} ± "
                      f"{score.std(correction=0):.3f} over {len(nets)} seeds")


PARTS = {"table": table, "sweep": sweep, "probe": probe, "slides": slides, "patches": patches}


def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run or cfg.part not in PARTS or cfg.n < 10 or cfg.cv.seeds < 1:
        raise UserError(f"run {cfg.run!r} --part={cfg.part} --n={cfg.n}: write python mil_table.py RUN, part one of "
                        f"{', '.join(PARTS)}, n at least 10")
    cfg.out = cfg.out or str(Path(cfg.run) / "bench" / "mil")
    cfg.labels = cfg.labels or f"{cfg.data}/labels.csv"
    if cfg.part != "patches" and not Path(cfg.labels).is_file():
        raise UserError(f"no labels at {cfg.labels}: draw slides with labels with python data.py toy --task --out="
                        f"{cfg.data}")
    PARTS[cfg.part](cfg)


if __name__ == "__main__":
    cli(main)
