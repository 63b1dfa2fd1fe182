"""What features and samples are worth: Z Table 5 in miniature, and samples as training data (L Tables 2, 3).

    python data.py toy --task
    python -m experiments.labels out/toy_long                   # features x scales x heads
    python -m experiments.labels out/toy_long --part=sweep      # diffusion features over t and block
    python -m experiments.labels out/toy_long --part=probe      # what all of these know of ducts and of nuclei
    python -m experiments.labels out/toy_long --part=slides     # labels learned from real slides, drawn ones, and both
    python -m experiments.labels out/toy_long --part=patches    # the same for patches, tested under another stain

in:  a run, slides with labels   out: tables, and whether each claim holds; RUN/bench/mil. The same command goes on
"""
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import cat, nn, stack
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import default_collate
from tqdm import tqdm

from common import UserError, at_least, cli, configure, generator, home_of, one_of, setup
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM
from experiments import crossval, features
from experiments.crossval import HEADS, heads_of, interval, limits, patient_draws, weighted_auc
from experiments.evaluate import truth
from experiments.folds import Labels, make_splits, usual_folds
from mil import cross_validate
from sample_joint import Config as Drawing, draw_patches
from slides.bags import Bags, read_bag, views
from slides.names import files_of
from toy.task import CELL, structures

SHARES = (0.1, 1.0)  # of the training slides or patches

@dataclass
class Config:
    run: str = ""
    part: str = "table"       # table, sweep, probe, slides or patches
    data: str = "data/task"   # pyramids of slides with labels
    labels: str = ""          # default DATA/labels.csv
    out: str = ""             # default RUN/bench/mil
    extract: features.Config = field(default_factory=lambda: features.Config(scales=(0, 2)))  # but for run, data, out
    cv: crossval.Config = field(default_factory=lambda: crossval.Config(seeds=3, fraction=(0.25, 1.0)))  # but for files
    ts: tuple = (10, 50, 100, 300, 600)  # of the sweep
    blocks: str = "middle,1,2,3"         # of the sweep, at t = extract.t
    scale: int = 1            # of part patches
    n: int = 2000             # training patches, and as many test patches, if there are

# ----- 1. Slides -----

def extracted(cfg, name, **settings):
    """Extract to OUT/NAME what is not there yet. out: that folder."""
    folder = f"{cfg.out}/{name}"
    features.extract(replace(cfg.extract, run=cfg.run, data=cfg.data, out=folder, **settings))
    return folder

def verdict(text, difference):
    """Say whether a claim holds: whether 95 % of the draws (1+n,) of a difference lie on one side of 0."""
    low, high = limits(difference)
    word = "holds" if low > 0 else "fails" if high < 0 else "is open"
    print(f"{text}: {interval(difference)}, {word}")

def cv_of(cfg, folders, **settings):
    return replace(cfg.cv, features=",".join(folders), labels=cfg.labels, out=f"{cfg.out}/cv", **settings)

def table(cfg):
    """Descriptor, diffusion and untrained features at every scale and joined, each head, each share of the slides."""
    folders = [extracted(cfg, name, kind=name) for name in ("descriptor", "unet", "untrained")]
    *single, joined = views(folders[1])
    pairs = [(f"unet {v}".strip(), f"descriptor {v}".strip()) for v in (*single, joined)]
    pairs += [(f"{name} {joined}", f"{name} {v}") for name in ("descriptor", "unet") for v in single]
    pairs += [(f"unet {joined}".strip(), f"untrained {joined}".strip())]
    draws = crossval.tables(cv_of(cfg, folders), pairs)
    for share in cfg.cv.fraction:
        print(f"\nclaims, mean over heads, {share:.0%} of the training slides")
        for a, b in pairs:
            text = "diffusion features beat" if a.split()[0] != b.split()[0] else "two scales beat one"
            gaps = [draws[a, h, share] - draws[b, h, share] for h in heads_of(cfg.cv)]
            verdict(f"  {text}: {a} - {b}", stack(gaps).mean(0))

def sweep(cfg):
    """Diffusion features over t, and over the block of the U-Net; the first head, all training slides, all scales.
    out: draws (1+n,) of the AUC where every fold chooses both, by its validation loss."""
    usual, folders = cfg.extract, []
    settings = [(t, usual.block) for t in cfg.ts]
    settings += [(usual.t, block.strip()) for block in cfg.blocks.split(",")]
    for t, block in settings:
        folders.append(extracted(cfg, f"t{t}_{block or 'default'}", kind="unet", t=t, block=block))
    joined, head = views(folders[0])[-1], heads_of(cfg.cv)[0]
    cv = cv_of(cfg, folders, fraction=(1.0,), views=joined, heads=head)
    crossval.tables(cv, pairs=[])
    best, counts = crossval.chosen(cv)
    taken = ", ".join(f"{name} {n}" for name, n in counts.items())
    print(f"\nt and block chosen in every fold by its validation loss: {interval(best)}; folds that took {taken}")
    return best

def squares(file, source):
    """Each square of a toy slide: {scale: [(its mean features (K,), has it a duct, has it large nuclei, fold)]}."""
    k, found = int(file.stem.removeprefix("train_")), {}
    duct, large = structures(source["seed"] * 100_000 + k, source["size"])[:2]
    x, coords, meta = read_bag(file)
    column, row = (coords // CELL).T                                       # (N,) each
    square = row * (source["size"] // CELL) + column
    for s, part in zip(meta["scales"], x.split(meta["widths"], 1)):
        if source["patch"] << s <= CELL:
            found[s] = [(part[square == n].mean(0), duct[n], large[n], k // 2 % 5) for n in square.unique()]
    return found

def ridge_auc(x, y, fold):
    """AUC of a ridge regression, each fold predicted by the others. in: x (n,K), y and fold (n,)."""
    target, score = y.double() * 2 - 1, torch.zeros(len(y), 2).double()
    damp = 30 * torch.eye(x.shape[1]).double()
    for k in range(5):
        test = fold == k
        a, b = x[~test], target[~test]
        w = torch.linalg.solve(a.T @ a + damp, a.T @ b)                    # (K,)
        score[test, 1] = x[test] @ w
    once = torch.ones(1, len(y)).double()
    return float(weighted_auc(score, y.long(), fold, once))

def probe(cfg):
    """Is a square a duct, has it large nuclei? AUC on held-out fifths of the patients, for all features so far."""
    source = json.loads((Path(cfg.data) / "index.json").read_text()).get("source", {})
    if source.get("command") != "task":
        raise UserError(f"{cfg.data} are not the toy slides whose ducts are known: python data.py toy --task")
    print(f"{'AUC':<22}{'scale':>6}{'width':>6}{'duct':>8}{'large nuclei':>14}")
    for folder in sorted(f for f in Path(cfg.out).iterdir() if any(f.glob("train_*.safetensors"))):
        found = {}
        for file in files_of(folder):
            for s, rows in squares(file, source).items():
                found.setdefault(s, []).extend(rows)
        for s, rows in found.items():
            x, duct, large, fold = default_collate(rows)
            x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
            x = pad(x, (0, 1), value=1.0).double()                         # (n,K+1)
            duct, large = ridge_auc(x, duct, fold), ridge_auc(x, large, fold)
            print(f"{folder.name:<22}{s:>6}{x.shape[1] - 1:>6}{duct:>8.3f}{large:>14.3f}")

def slides(cfg):
    """Slide labels from descriptors of real slides, of slides drawn patch by patch from the conditions of the same
    training slides, and of both; tested on real ones. The first head, 10 % and all of the training slides."""
    folders = [extracted(cfg, kind, kind=kind) for kind in ("descriptor", "drawn")]
    real, drawn = (Bags(folder, views(folder)[-1]) for folder in folders)
    labels, head, cv, draws = Labels(cfg.labels, real.names), heads_of(cfg.cv)[0], cfg.cv, {}
    weights = patient_draws(labels.patients, cv.bootstrap, cv.seed)
    sources = {"real": [real], "drawn": [drawn], "both": [real, drawn]}
    torch.set_num_threads(1)
    jobs = [(share, repeat, name) for share in SHARES for repeat in range(cv.seeds) for name in sources]
    folds = cv.folds or usual_folds(labels)
    for share, repeat, name in tqdm(jobs):
        splits = make_splits(labels, folds, share, cv.val, cv.seed + 10 * repeat)
        scores, fold, _ = cross_validate(HEADS[head], sources[name], real, labels, splits, cv, repeat)
        draws.setdefault((share, name), []).append(weighted_auc(scores.double(), labels.y, fold, weights))
    draws = {key: stack(found).mean(0) for key, found in draws.items()}
    for share in SHARES:
        aucs = ", ".join(f"{name} {interval(draws[share, name])}" for name in sources)
        print(f"\n{share:.0%} of the training slides, {head}, AUC on real slides: {aucs}")
        verdict("  drawn slides help: both - real", draws[share, "both"] - draws[share, "real"])

# ----- 2. Patches -----

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
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    weight = 1 / torch.bincount(y, minlength=classes)[y].double()          # (N,): all classes as often
    for step in range(epochs * max(1, len(y) // 32)):
        rows = weight.multinomial(32, True, generator=generator(seed, step))
        opt.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        opt.step()
    return net.eval()

@torch.no_grad()
def balanced(net, x, y):
    """Accuracy, every class counted equally."""
    right = cat([net(part).argmax(1) for part in x.split(256)]) == y       # (N,)
    shares = [right[y == c].double().mean() for c in y.unique()]
    return stack(shares).mean()

def patches(cfg):
    """Dominant tissue of patches, learned from real ones, from ones drawn from the conditions of the same, and from
    both; balanced accuracy on held-out patches, as they are and stained otherwise. 10 % and all of --n.
    out: {(share, what was learned from, stain): a value for each seed}."""
    ranks = setup(cfg.extract.device, cfg.extract.amp, cfg.extract.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    pyramids = Pyramids(model.info["data"], std=model.info["std"])
    train, test = (fixed_batch(pyramids, split, cfg.scale, cfg.n) for split in ("train", "test"))
    y, want = (truth(pyramids, b, pyramids.patch)[0].argmax(1) for b in (train, test))
    drawing = Drawing(guidance=cfg.extract.guidance, sampler="ddim", steps=cfg.extract.steps)
    x, fake = train["x"], draw_patches(model, train, drawing, ranks)
    counts = torch.bincount(want).tolist()
    print(f"{len(x)} training and {len(want)} test patches of scale {cfg.scale}, by tissue {counts}")
    classes = int(cat([y, want]).max()) + 1
    stains, found = {"same stain": test["x"], "other stain": stain_shift(test["x"])}, {}
    for share in SHARES:
        n = int(share * len(x))
        sets = {"real": [x[:n]], "drawn": [fake[:n]], "both": [x[:n], fake[:n]]}
        for name, images in sets.items():
            labels = y[:n].repeat(len(images))
            nets = [classifier(cat(images), labels, classes, seed) for seed in range(cfg.cv.seeds)]
            for stain, seen in stains.items():
                score = stack([balanced(net, seen, want) for net in nets])
                found[share, name, stain] = score
                print(f"{share:>5.0%} {name:<6} {stain:<12} balanced accuracy {score.mean():.3f} ± "
                      f"{score.std(correction=0):.3f} over {len(nets)} seeds")
    return found

PARTS = {"table": table, "sweep": sweep, "probe": probe, "slides": slides, "patches": patches}

def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run:
        raise UserError("say which run: python -m experiments.labels RUN")
    one_of(cfg, part=PARTS)
    at_least(cfg, n=10)
    at_least(cfg.cv, seeds=1)
    cfg.out = cfg.out or str(home_of(cfg.run) / "bench" / "mil")
    cfg.labels = cfg.labels or f"{cfg.data}/labels.csv"
    if cfg.part != "patches" and not Path(cfg.labels).is_file():
        raise UserError(f"no labels at {cfg.labels}: draw some: python data.py toy --task --out={cfg.data}")
    PARTS[cfg.part](cfg)

if __name__ == "__main__":
    cli(main)
