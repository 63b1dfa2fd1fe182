"""What conditions from nothing are worth: the tables of docs/conditions.md and docs/text.md.

    python -m experiments.conditions conditions out/toy_long    # patches from true, invented and null conditions
    python -m experiments.conditions memory out/toy_long        # are they copies of training images?
    python -m experiments.conditions grids out/toy_long         # invented grids, and large images drawn from them
    python -m experiments.conditions text out/toy_long          # does an image show what its caption says?
    python -m experiments.conditions scales out/toy --single=out/toy_only3 --scale=3     # one model for all scales?

in:  run folders with what cdm.py trained in them   out: tables, RUN/bench/cdm_*.json, .png
"""
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import cat, stack

from cdm import load_conditioner
from common import UserError, at_least, cli, configure, home_of, one_of, save_grid, write_text
from data import fixed_batch
from diffusion import ZoomLDM, null_condition
from experiments.metrics import kernel_distance, nearest, principal, psnr, standard
from experiments.quality import feature_spaces, open_run
from large import proxy as proxies
from large.command import EVEN, Settings, decoded, draw_large
from large.windows import Grid
from sample_joint import Resize
from summarizer import standardize
from text import captions
from text.grid import Regions
from text.tissues import agreement, fractions, print_agreement, region_map, spearman, tissue_colours
from text.wording import shares_of
from toy.tissue import TISSUES

@dataclass
class Config:
    command: str = ""       # conditions, memory, grids, text, scales
    run: str = ""           # run folder
    data: str = ""          # data folder; default: the one the run was trained on
    n: int = 64             # patches per scale and seed; large images (grids, text)
    seeds: int = 3
    grids: int = 192        # grids: so many are compared
    steps: int = 20         # of patches and large images; 50 for their conditions
    size: int = 512         # grids, text: pixels a side of the large images
    context: int = 3        # and the scale of their context
    guide: str = "x0"       # and how the one guides the other
    overlap: int = -1       # and what their windows share; 0 halves the time
    captions: str = ""      # text: held-out captions with the shares they state; default DATA/heldout.tsv
    spread: float = 0.0     # text: how much chance may change the amounts it states
    single: str = ""        # scales: the run that was trained on one scale alone (train.py --only_scale)
    scale: int = 3          # scales: that scale
    device: str = "auto"
    threads: int = 0
    amp: bool = True

# ----- 1. Patches -----

def mean_error(values):
    """Mean and standard error over seeds."""
    v = torch.tensor(values, dtype=torch.float64)
    error = float(v.std() / len(v) ** 0.5) if len(v) > 1 else float("nan")
    return float(v.mean()), error

def said(row):
    return " ".join(f"{name} {mean:.3f}±{error:.3f}" for name, (mean, error) in row.items())

def distances(cfg, pyramids, s, sets):
    """Kernel distances of drawn patches to held-out ones. in: sets {name: [(N,3,P,P) per seed]}.
    out: {name: {space: (mean, standard error over seeds)}}, and the floor, training against held-out patches."""
    base, real = (fixed_batch(pyramids, split, s, 256)["x"] for split in ("train", "test"))
    out = {name: {} for name in [*sets, "floor"]}
    for space, features in feature_spaces(pyramids).items():
        train = features(base)
        axes = principal(train, min(16, len(base) - 1))
        held = axes(features(real))
        described = {name: [axes(features(x)) for x in draws] for name, draws in sets.items()}
        described["floor"] = axes(train).chunk(max(1, min(cfg.seeds, len(base) // 8)))
        for name, parts in described.items():
            out[name][space] = mean_error([kernel_distance(part, held)[0] for part in parts])
    return out

def drawn(model, c, cfg, ranks, seed, guidance=2.0):
    """Patches (N,3,P,P) for tokens c (N,L,D)."""
    with ranks.autocast():
        return model.draw(c, model.info["patch"] // model.vae.factor, guidance, cfg.steps, seed)

def true_tokens(model, pyramids, s, n, seed):
    batch, device = fixed_batch(pyramids, "test", s, n, seed=seed), model.unet.conv_out.weight.device
    with torch.no_grad():
        return model.summarizer(*(batch[name].to(device) for name in ("tokens", "mask", "s")))

def conditions(cfg, model, pyramids, ranks):
    """Distance to held-out patches of patches drawn from four kinds of condition."""
    made, table = {"cdm": load_conditioner(cfg.run, "cdm", model)}, []
    folder = Path(cfg.run).parent if Path(cfg.run).is_file() else Path(cfg.run)
    if (folder / "edm.safetensors").exists():
        made["edm"] = load_conditioner(cfg.run, "edm", model)
    for s in range(pyramids.scales):
        if min(pyramids.count(split, s) for split in ("train", "test")) < 3:
            print(f"scale {s} left out: too few patches to measure a distance to")
            continue
        sets = {name: [] for name in ("true", *made, "null")}
        for seed in range(cfg.seeds):
            c = true_tokens(model, pyramids, s, cfg.n, seed)
            sets["true"].append(drawn(model, c, cfg, ranks, seed))
            sets["null"].append(drawn(model, null_condition(c), cfg, ranks, seed, guidance=1.0))
            for name, conditioner in made.items():
                sets[name].append(drawn(model, conditioner.tokens([s] * cfg.n, seed), cfg, ranks, seed))
        save_sheet(cfg, f"conditions_{s}", {name: draws[0][:12] for name, draws in sets.items()})
        row = distances(cfg, pyramids, s, sets)
        table.append({"scale": s} | row)
        print(f"scale {s}: " + "   ".join(f"{name} {said(found)}" for name, found in row.items()), flush=True)
    print(f"kernel distances to held-out patches, ± standard error over {cfg.seeds} seeds of {cfg.n} patches; floor: "
          f"training patches")
    return table

def scales(cfg, model, pyramids, ranks):
    """One model for all scales against one trained on this scale alone (Z Tables 1, 2)."""
    if not cfg.single:
        raise UserError("say which run knows one scale alone: --single=out/toy_only3 (python train.py toy "
                        "--only_scale=3 --vae_weights=out/toy --out=out/toy_only3)")
    sets = {"shared": [], "alone": []}
    for draws, one in zip(sets.values(), (model, ZoomLDM.from_run(cfg.single).to(ranks.device))):
        for seed in range(cfg.seeds):
            draws.append(drawn(one, true_tokens(one, pyramids, cfg.scale, cfg.n, seed), cfg, ranks, seed))
    save_sheet(cfg, f"scales_{cfg.scale}", {name: draws[0][:12] for name, draws in sets.items()})
    found = distances(cfg, pyramids, cfg.scale, sets)
    for name, row in found.items():
        print(f"scale {cfg.scale}, {name:>7}: {said(row)}")
    return {"scale": cfg.scale} | found

def memory(cfg, model, pyramids, ranks):
    """Distance of CDM samples at the coarsest scale, and of held-out images, to the nearest training image (Z S9.1)."""
    s, A, out = pyramids.scales - 1, Resize(4, "box"), {}
    tokens = load_conditioner(cfg.run, "cdm", model).tokens([s] * cfg.n, 0)
    sets = {"drawn": drawn(model, tokens, cfg, ranks, 0), "real": fixed_batch(pyramids, "test", s, cfg.n)["x"]}
    train = fixed_batch(pyramids, "train", s, 1 << 20)["x"]

    def pixels(x):
        return A.down(x).flatten(1)
    for space, features in {**feature_spaces(pyramids), "pixels": pixels}.items():
        base = features(train)
        like = standard(base) if space != "pixels" else torch.Tensor.double
        row, least, each, words = {}, {}, {}, []
        for name, x in sets.items():
            near = nearest(like(features(x)), like(base))                      # (n,)
            row[name], least[name], each[name] = float(near.median()), float(near.min()), near.tolist()
            words.append(f"{name} {row[name]:.3f} (least {least[name]:.3f})")
        out[space] = row | {"least": least, "each": each}
        print(f"{space:>7}: median distance to the nearest of {len(train)} training images: {', '.join(words)}")
    gap, closest = torch.cdist(pixels(sets["drawn"]), pixels(train)).min(1)    # (n,) each
    pick = gap.argsort()[:12]
    save_sheet(cfg, "memory", {"drawn": sets["drawn"][pick], "nearest": train[closest[pick]]})
    return out

def save_sheet(cfg, name, rows):
    save_grid(home_of(cfg.run) / "bench" / f"cdm_{name}.png", list(rows.values()), list(rows))

# ----- 2. Grids and large images -----

def correlation(e):
    """Mean correlation of horizontally and vertically neighbouring cells of grids (N,E,k,k), about the mean cell."""
    e = e - e.mean((0, 2, 3), keepdim=True)
    found = []
    for a, b in ((e[..., :-1], e[..., 1:]), (e[..., :-1, :], e[..., 1:, :])):
        power = a.square().mean() * b.square().mean()
        found.append(float((a * b).mean() / power.sqrt()))
    return sum(found) / 2

def coherence(cfg, model, pyramids, ranks, grids, seed=0):
    """A large image for each Grid. out: images (N,3,size,size), and dB of A(image) against its context."""
    A, images, db = Resize(2 ** cfg.context), [], []
    proxy = proxies.load(cfg.run, model, pyramids, ranks) if "proxy" in cfg.guide else None
    for k, grid in enumerate(grids):
        how = EVEN | dict(steps=cfg.steps, guide=cfg.guide, overlap=cfg.overlap, seed=seed + k)
        settings = Settings(run=cfg.run, size=(cfg.size,), context=(cfg.context,), **how)
        levels, _ = draw_large(model, grid, settings, ranks, proxy)
        context, image = (decoded(model, levels[at].z, ranks) for at in (0, -1))
        images.append(image)
        db.append(psnr(A.down(image).clamp(-1, 1), context))
    return cat(images), db

def grids(cfg, model, pyramids, ranks):
    """Invented grids against real ones, and large images drawn from both."""
    made, k = load_conditioner(cfg.run, "grid", model), cfg.size // pyramids.patch

    def some(split, seed):
        slides = Regions(pyramids, k, seed, split)
        return stack([slides[i]["tokens"].mT.unflatten(1, (k, k)) for i in range(cfg.grids)])           # (n,E,k,k)

    def flat(e):
        return standardize(e).flatten(1)                                                                # (n,E k k)
    train, held, sets = flat(some("train", 0)), some("test", 1), []
    for seed in range(cfg.seeds):
        sets.append(stack([made.grid(k, k, seed=1000 * seed + i) for i in range(cfg.grids // cfg.seeds)]))
    axes = principal(train, min(32, cfg.grids // 2))
    target = axes(flat(held))
    value = mean_error([kernel_distance(axes(flat(e)), target)[0] for e in sets])
    floor = mean_error([kernel_distance(axes(part), target)[0] for part in train.chunk(3)])
    invented = cat(sets)
    near = correlation(invented), correlation(held)
    print(f"grids of {k} x {k}: kernel distance to held-out ones: {said({'drawn': value, 'training': floor})}; "
          f"correlation of neighbouring cells: drawn {near[0]:.3f}, held out {near[1]:.3f}")
    images, db = {}, {}
    for name, e in (("real", held), ("invented", invented)):
        images[name], values = coherence(cfg, model, pyramids, ranks, [Grid(one) for one in e[:cfg.n]])
        db[name] = mean_error(values)
        print(f"{len(values)} images of {cfg.size} x {cfg.size} from grids, dB of A(image) against the context: "
              f"{said({name: db[name]})}", flush=True)
    save_sheet(cfg, "grids", {name: x[:4] for name, x in images.items()})
    return {"distance": value, "floor": floor, "correlation": near, "psnr": db}

def sides(shares, x):
    """How much more of each tissue lies on the left than on the right, and at the top than at the bottom, (...,2,4).
    in: shares, a function of a part of x (...,H,W)."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    across = shares(x[..., :w]) - shares(x[..., w:])
    down = shares(x[..., :h, :]) - shares(x[..., h:, :])
    return stack([across, down], -2)

def text(cfg, model, pyramids, ranks):
    """Draw images for each held-out caption, one a seed, and hold the tissues' shares read off them, and the sides they
    lie on, against those of the region the caption describes (L Fig. 4). Correlations are those of each seed's images,
    averaged."""
    made, k = load_conditioner(cfg.run, "grid", model), cfg.size // pyramids.patch
    path = Path(cfg.captions or pyramids.folder / "heldout.tsv")
    described = captions.read_captions(path, pyramids, "test")[:cfg.n]
    if any(not c.truth for c in described):
        raise UserError(f"--captions={path} must state the shares of {', '.join(TISSUES)}, as text.captions toy does")
    texts, file = [c.text for c in described], path.with_suffix(".safetensors")
    vectors = captions.tell(texts, file if file.exists() else None, made.info.get("text"))
    colours, truth = tissue_colours(pyramids), torch.tensor([c.truth for c in described])
    maps = [region_map(pyramids, c.slide, c.block) for c in described]
    lie = stack([sides(lambda part: torch.tensor(shares_of(part)), region) for region in maps])        # (n,2,4)
    tables, pooled, placed, db = [], [], [], []
    for seed in range(cfg.seeds):
        first = 1000 * seed
        invented = [Grid(made.grid(k, k, v, seed=first + i, spread=cfg.spread)) for i, v in enumerate(vectors)]
        images, values = coherence(cfg, model, pyramids, ranks, invented, first)
        found = fractions(images, colours)
        tables.append(agreement(truth, found, seed))
        pooled.append(float(spearman(truth.reshape(-1, 1), found.reshape(-1, 1))))
        seen = sides(partial(fractions, colours=colours), images)                  # (n,2,4)
        placed.append(float(spearman(lie.reshape(-1, 1), seen.reshape(-1, 1))))
        db += values
        if seed == 0:
            save_grid(home_of(cfg.run) / "bench" / "cdm_text.png", list(images.split(4)))
    table = {key: stack([t[key].double() for t in tables]).mean(0) for key in tables[0]}
    table["confusion"] = sum(t["confusion"] for t in tables)
    print_agreement(table)
    rank = stack([t["spearman"] for t in tables]).T.tolist()                   # (4,seeds)
    means = {name: mean_error(row) for name, row in zip(TISSUES, rank)}
    means |= {"all shares together": mean_error(pooled), "sides": mean_error(placed)}
    means |= {"dB of A(image) against its context": mean_error(db)}
    print(f"{len(texts)} captions, {cfg.seeds} seeds, ± standard error: {said(means)}")
    return {key: value.tolist() for key, value in table.items()} | {"means": means, "texts": texts}

def main(argv):
    cfg = configure(Config, argv, words=("command", "run"), doc=__doc__)
    commands = {"conditions": conditions, "memory": memory, "grids": grids, "text": text, "scales": scales}
    one_of(cfg, command=tuple(commands))
    at_least(cfg, n=1, seeds=1, steps=1, grids=3 * max(cfg.seeds, 3))
    if not cfg.run:
        raise UserError(f"say which run: python -m experiments.conditions {cfg.command} out/toy_long")
    model, pyramids, _, ranks = open_run(cfg, proxy=False, amp=cfg.amp)
    found = commands[cfg.command](cfg, model, pyramids, ranks)
    path = home_of(cfg.run) / "bench" / f"cdm_{cfg.command}.json"
    write_text(path, json.dumps({"settings": vars(cfg), "found": found}, indent=1))
    print(f"wrote {path}")

if __name__ == "__main__":
    cli(main)
