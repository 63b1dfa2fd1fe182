"""What conditions from nothing are worth: the tables behind the README's section on them.

    python cdm_table.py conditions out/toy_long    # patches from true, invented (CDM, EDM) and null conditions
    python cdm_table.py memory out/toy_long        # are they copies of training images?
    python cdm_table.py grids out/toy_long         # invented grids of embeddings, and large images drawn from them
    python cdm_table.py text out/toy_long          # does an image show what its caption says?
    python cdm_table.py scales out/toy --single=out/toy_only3 --scale=3     # one model for all scales, or one each?

in:  run folders with what cdm.py trained in them   out: tables, RUN/bench/cdm_*.json, .png     read next: README.md
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import cdm
import sample_joint as S
from common import UserError, cli, configure, save_grid, setup, write_text
from data import fixed_batch
from experiments import metrics as M
from large import proxy as proxies
from sample_joint import Grid, Resize, draw
from slides.encoders import load_encoder
from summarizer import standardize
from text import captions
from text.grid import Regions
from text.tissues import agreement, fractions, print_agreement, spearman, tissue_colours
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
    emphasis: float = 2.0   # text: guidance of the grid model towards its caption
    spread: float = 0.0     # text: how much chance may change the amounts it states
    single: str = ""        # scales: the run that was trained on one scale alone (train.py --only_scale)
    scale: int = 3          # scales: that scale
    device: str = "auto"
    threads: int = 0
    amp: bool = True


# ----- 1. Distances, over seeds -----

def feature_spaces(pyramids):
    """Two ways to describe patches: what conditions are made of, and one that nothing is ever conditioned on."""
    encoder = load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
    return {"desc": lambda x: standardize(encoder((x + 1) / 2)[..., None, None])[..., 0, 0], "rand": M.random_features}


def mean_error(values):
    """Mean and standard error over seeds."""
    v = torch.tensor(values, dtype=torch.float64)
    return float(v.mean()), float(v.std() / len(v) ** 0.5) if len(v) > 1 else float("nan")


def distances(cfg, pyramids, s, sets):
    """Kernel distances of drawn patches to held-out ones. in: sets {name: [(N,3,P,P) per seed]}.
    out: {name: {space: (mean, standard error over seeds)}}, and the floor, training against held-out patches."""
    base, real = (fixed_batch(pyramids, split, s, 256)["x"] for split in ("train", "test"))
    out = {name: {} for name in [*sets, "floor"]}
    for space, f in feature_spaces(pyramids).items():
        described = f(base)
        axes = M.principal(described, min(16, len(base) - 1))
        held = axes(f(real))
        for name, draws in sets.items():
            out[name][space] = mean_error([M.kernel_distance(axes(f(x)), held)[0] for x in draws])
        parts = axes(described).chunk(max(1, min(cfg.seeds, len(base) // 8)))
        out["floor"][space] = mean_error([M.kernel_distance(part, held)[0] for part in parts])
    return out


def true_tokens(model, pyramids, s, n, seed):
    batch = fixed_batch(pyramids, "test", s, n, seed=seed)
    device = next(model.parameters()).device
    with torch.no_grad():
        return model.summarizer(*(batch[k].to(device) for k in ("tokens", "mask", "s")))


def conditions(cfg, model, pyramids, ranks):
    """Distance to held-out patches of patches drawn from four kinds of condition."""
    made, side, table = {}, pyramids.patch // model.vae.factor, []
    for kind in ("cdm", "edm"):
        if (Path(cfg.run) / f"{kind}.safetensors").exists() or kind == "cdm":
            made[kind] = cdm.load_conditioner(cfg.run, kind, model)
    for s in range(pyramids.scales):
        if min(pyramids.count(split, s) for split in ("train", "test")) < 3:
            print(f"scale {s} left out: too few patches to measure a distance to")
            continue
        sets = {name: [] for name in ("true", *made, "null")}
        for seed in range(cfg.seeds):
            c = {"true": true_tokens(model, pyramids, s, cfg.n, seed)}
            c |= {kind: m.tokens([s] * cfg.n, seed) for kind, m in made.items()}
            for name, tokens in c.items():
                sets[name].append(draw(model, tokens, side, ranks, 2.0, cfg.steps, seed))
            sets["null"].append(draw(model, torch.zeros_like(c["true"]), side, ranks, 1.0, cfg.steps, seed))
        measured = distances(cfg, pyramids, s, sets)
        rows = [draws[0][:12] for draws in sets.values()]
        save_grid(Path(cfg.run) / "bench" / f"cdm_conditions_{s}.png", rows, list(sets))
        table.append({"scale": s} | measured)
        print(f"scale {s}: " + "   ".join(f"{name} " + " ".join(f"{m:.2f}±{e:.2f}" for m, e in row.values())
                                          for name, row in measured.items()), flush=True)
    print("kernel distances to held-out patches, descriptor space then random space; ± standard error over "
          f"{cfg.seeds} seeds of {cfg.n} patches; floor: training patches")
    return table


def scales(cfg, model, pyramids, ranks):
    """One model for all scales against one trained on this scale alone (Z Tables 1, 2)."""
    if not cfg.single:
        raise UserError("say which run knows one scale alone: --single=out/toy_only3 (python train.py toy "
                        "--only_scale=3 --vae_weights=out/toy --out=out/toy_only3)")
    alone, side, sets = cdm.ZoomLDM.from_run(cfg.single).to(ranks.device), pyramids.patch // model.vae.factor, {}
    for name, m in (("shared", model), ("alone", alone)):
        sets[name] = [draw(m, true_tokens(m, pyramids, cfg.scale, cfg.n, seed), side, ranks, 2.0, cfg.steps, seed)
                      for seed in range(cfg.seeds)]
    save_grid(Path(cfg.run) / "bench" / f"cdm_scales_{cfg.scale}.png", [d[0][:12] for d in sets.values()], list(sets))
    measured = distances(cfg, pyramids, cfg.scale, sets)
    for name, row in measured.items():
        print(f"scale {cfg.scale}, {name:>7}: " + "  ".join(f"{k} {m:.3f}±{e:.3f}" for k, (m, e) in row.items()))
    return {"scale": cfg.scale} | measured


def memory(cfg, model, pyramids, ranks):
    """Distance of each CDM sample at the coarsest scale to its nearest training image, against that of held-out real
    images (Z S9.1). Copies would lie nearer."""
    s, side = pyramids.scales - 1, pyramids.patch // model.vae.factor
    made = cdm.load_conditioner(cfg.run, "cdm", model)
    drawn = draw(model, made.tokens([s] * cfg.n, 0), side, ranks, 2.0, cfg.steps, 0)
    train, real = fixed_batch(pyramids, "train", s, 1 << 20)["x"], fixed_batch(pyramids, "test", s, cfg.n)["x"]
    out = {}
    for space, f in (*feature_spaces(pyramids).items(), ("pixels", lambda x: Resize(4, "box").down(x).flatten(1))):
        base = f(train)
        like = M.standard(base) if space != "pixels" else lambda x: x
        near = {name: M.nearest(like(f(x)), like(base)) for name, x in (("drawn", drawn), ("real", real))}
        medians = {name: float(v.median()) for name, v in near.items()}
        out[space] = medians | {"least": {name: float(v.min()) for name, v in near.items()}}
        print(f"{space:>7}: median distance to the nearest of {len(train)} training images: drawn "
              f"{medians['drawn']:.3f} (least {float(near['drawn'].min()):.3f}), held-out real {medians['real']:.3f} "
              f"(least {float(near['real'].min()):.3f})")
    flat = Resize(4, "box").down(train).flatten(1)
    closest = torch.cdist(Resize(4, "box").down(drawn).flatten(1), flat)
    pick = closest.amin(1).argsort()[:12]                                                    # the nearest pairs
    save_grid(Path(cfg.run) / "bench" / "cdm_memory.png", [drawn[pick], train[closest.argmin(1)[pick]]],
              ["drawn", "nearest"])
    return out


# ----- 2. Grids and large images -----

def correlation(e):
    """Mean correlation of horizontally and vertically neighbouring cells of grids (N,E,k,k), about the mean cell."""
    e = e - e.mean((0, 2, 3), keepdim=True)
    pairs = [(e[..., :-1], e[..., 1:]), (e[..., :-1, :], e[..., 1:, :])]
    return sum(float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()) for a, b in pairs) / 2


def coherence(cfg, model, pyramids, ranks, proxy, grids, seed=0):
    """Draw a large image for each Grid, the k-th with noise of seed + k. out: images (N,3,size,size), and dB of
    A(image) against its context."""
    settle = S.Config(run=cfg.run, size=(cfg.size,), context=(cfg.context,), steps=cfg.steps,
                      guide=cfg.guide, overlap=cfg.overlap)
    A, images, psnr = Resize(2 ** cfg.context), [], []
    for k, grid in enumerate(grids):
        settle.seed = seed + k
        levels, _ = S.draw_large(model, grid, settle, ranks, proxy)
        images.append(S.decoded(model, levels[-1].z, ranks))
        context = S.decoded(model, levels[0].z, ranks)
        psnr.append(M.psnr(A.down(images[-1]).clamp(-1, 1), context))
    return torch.cat(images), psnr


def grids(cfg, model, pyramids, ranks):
    """Invented grids against real ones, and large images drawn from both."""
    made, k = cdm.load_conditioner(cfg.run, "grid", model), cfg.size // pyramids.patch
    proxy = proxies.load(cfg.run, model, pyramids, ranks) if "proxy" in cfg.guide else None
    def some(split, n, seed):
        slides = Regions(pyramids, k, seed, split)
        return torch.stack([slides[i]["tokens"].mT.unflatten(1, (k, k)) for i in range(n)])  # (n,E,k,k)
    sets = {f"drawn, seed {seed}": torch.stack([made.grid(k, k, seed=1000 * seed + i)
                                                for i in range(cfg.grids // cfg.seeds)]) for seed in range(cfg.seeds)}
    train, held = some("train", cfg.grids, 0), some("test", cfg.grids, 1)
    flat = {name: standardize(e).flatten(1) for name, e in (sets | {"train": train, "held": held}).items()}
    axes = M.principal(flat["train"], min(32, cfg.grids // 2))
    value = mean_error([M.kernel_distance(axes(flat[name]), axes(flat["held"]))[0] for name in sets])
    floor = mean_error([M.kernel_distance(axes(part), axes(flat["held"]))[0] for part in flat["train"].chunk(3)])
    drawn = torch.cat(list(sets.values()))
    print(f"grids of {k} x {k}: kernel distance to held-out grids {value[0]:.3f}±{value[1]:.3f}, of training grids "
          f"{floor[0]:.3f}±{floor[1]:.3f}; correlation of neighbouring cells: drawn {correlation(drawn):.3f}, held out "
          f"{correlation(held):.3f}")
    images, db = {}, {}
    for name, source in (("real", [Grid(e) for e in held[:cfg.n]]), ("invented", [Grid(e) for e in drawn[:cfg.n]])):
        images[name], values = coherence(cfg, model, pyramids, ranks, proxy, source)
        db[name] = mean_error(values)
        print(f"{len(source)} images of {cfg.size} x {cfg.size} from {name} grids: A(image) against the context "
              f"{db[name][0]:.2f}±{db[name][1]:.2f} dB", flush=True)
    save_grid(Path(cfg.run) / "bench" / "cdm_grids.png", [x[:4] for x in images.values()], list(images))
    return {"distance": value, "floor": floor, "correlation": [correlation(drawn), correlation(held)], "psnr": db}


def text(cfg, model, pyramids, ranks):
    """Draw images for each held-out caption, one a seed, and hold the tissues' shares read off them against those of
    the region the caption describes (L Fig. 4). Correlations are those of each seed's images, averaged."""
    made, k = cdm.load_conditioner(cfg.run, "grid", model), cfg.size // pyramids.patch
    described = captions.read_captions(cfg.captions or str(pyramids.folder / "heldout.tsv"), pyramids, "test")[:cfg.n]
    if any(not c.truth for c in described):
        raise UserError(f"--captions={cfg.captions} must state what share each of {', '.join(TISSUES)} has: the file "
                        f"that python captions.py toy writes does")
    texts = [c.text for c in described]
    file = Path(cfg.captions or pyramids.folder / "heldout.tsv").with_suffix(".safetensors")
    vectors = (captions.load_vectors(file, texts, made.info.get("text"))[0] if file.exists() else
               captions.encode_texts(texts))
    proxy = proxies.load(cfg.run, model, pyramids, ranks) if "proxy" in cfg.guide else None
    colours, truth = tissue_colours(pyramids), torch.tensor([c.truth for c in described])
    tables, pooled, db = [], [], []
    for seed in range(cfg.seeds):
        first = 1000 * seed
        invented = [Grid(made.grid(k, k, v, cfg.emphasis, seed=first + i, spread=cfg.spread))
                    for i, v in enumerate(vectors)]
        images, values = coherence(cfg, model, pyramids, ranks, proxy, invented, first)
        found = fractions(images, colours)
        tables.append(agreement(truth, found, seed))
        pooled.append(float(spearman(truth.flatten()[:, None], found.flatten()[:, None])))
        db += values
        if not seed:
            save_grid(Path(cfg.run) / "bench" / "cdm_text.png", list(images.split(4)))
    table = {key: torch.stack([t[key].double() for t in tables]).mean(0) for key in tables[0]}
    table["confusion"] = sum(t["confusion"] for t in tables)
    table["spearman_se"] = torch.tensor([mean_error(v)[1] for v in zip(*(t["spearman"].tolist() for t in tables))])
    print_agreement(table)
    errors = ", ".join(f"{v:.3f}" for v in table["spearman_se"])
    (mean, error), (level, spread) = mean_error(pooled), mean_error(db)
    print(f"{len(texts)} captions, {cfg.seeds} seeds: standard errors of these correlations {errors}; of all shares "
          f"together {mean:.3f} ± {error:.3f}; A(image) against its context {level:.2f} ± {spread:.2f} dB")
    for n in range(min(4, len(texts))):
        print(f"{n}: {texts[n]}")
    return {key: value.tolist() for key, value in table.items()} | {"pooled": mean_error(pooled), "texts": texts}


def main(argv):
    cfg = configure(Config, argv, words=("command", "run"), doc=__doc__)
    commands = {f.__name__: f for f in (conditions, memory, grids, text, scales)}
    if cfg.command not in commands or not cfg.run or min(cfg.n, cfg.seeds, cfg.steps) < 1 or cfg.grids < 3 * cfg.seeds:
        raise UserError(f"got {' '.join(argv)!r}: write python cdm_table.py {' | '.join(commands)} RUN; n, seeds and "
                        f"steps are at least 1, grids at least 3 a seed")
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model, pyramids = cdm.open_run(cfg, ranks)
    found = commands[cfg.command](cfg, model, pyramids, ranks)
    path = Path(cfg.run) / "bench" / f"cdm_{cfg.command}.json"
    write_text(path, json.dumps({"settings": vars(cfg), "found": found}, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    cli(main)
