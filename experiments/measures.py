"""What is measured for each claim of the papers: an experiment of this folder, at a size that takes minutes.

in:  a Lab: a run, its data, models trained for a claim   out: {quantity: (value, standard error, bound)}; a claim says
that the value lies above the bound; None: a quantity that is only shown     read next: claims.py
"""
import math
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
from torch.nn.functional import cosine_similarity

import cdm
import data
import train
from common import UserError, save_tensors
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM, layout_fidelity
from experiments import against, conditions, crossval, features, labels, speed, sr
from experiments.metrics import paired_gain, random_features, standard
from experiments.quality import Ruler, crops, held_out, open_run, uncrop
from large.command import Settings, decoded, draw_large
from sample_joint import Config as Drawing, draw_patches
from text import captions

# ----- 1. Numbers and their errors -----

spread = conditions.mean_error  # of numbers measured alike

def minus(a, b):
    """The difference of two (value, error)."""
    return a[0] - b[0], (a[1] ** 2 + b[1] ** 2) ** 0.5

def mean_of(pairs):
    """The mean of several (value, error)."""
    values, errors = zip(*pairs)
    return mean(values), sum(e ** 2 for e in errors) ** 0.5 / len(errors)

def over(a, b):
    """How many times as large a is as b, lists of distances: the ratio of geometric means, which bear outliers."""
    logs = ([math.log(max(value, 1e-9)) for value in values] for values in (a, b))
    gap, error = minus(*map(spread, logs))
    return math.exp(gap), math.exp(gap) * error

# ----- 2. A run that is measured -----

class Lab:
    """What measurements share: a run (home), its data, its networks. mark: of what the present claim comes from."""

    def __init__(self, cfg, home):
        self.cfg, self.home, self.mark = cfg, str(home), ""
        self.options = [f"--device={cfg.device}", f"--threads={cfg.threads}"]
        run = SimpleNamespace(run=self.home, data=cfg.data, device=cfg.device, threads=cfg.threads)
        self.model, self.pyramids, self.proxy, self.ranks = open_run(run)
        self.folder, self.patch = str(self.pyramids.folder), self.pyramids.patch

    def place(self, name):
        """Where something is made for a claim: elsewhere for other weights, data or code."""
        return f"{self.home}/claims/{name}_{self.mark}"

    def load(self, run):
        return ZoomLDM.from_run(run).to(self.ranks.device)

    def trained(self, name, folder, *options):
        """A `toy` run on the autoencoder of this one. out: its folder."""
        vae, out = self.place("vae"), self.place(name)
        meta = {"config": asdict(self.model.vae.cfg), "latent_scale": self.model.latent_scale}
        save_tensors(f"{vae}/vae.safetensors", self.model.vae.state_dict(), meta)
        train.main(["toy", f"--data={folder}", f"--vae_weights={vae}", f"--out={out}", *self.options, *options])
        return out

    def settings(self, kind, **settings):
        """Settings of an experiment for this run and its data."""
        cfg = self.cfg
        return kind(run=self.home, data=self.folder, device=cfg.device, threads=cfg.threads, **settings)

    def conditions(self, command, **settings):
        """A command of experiments/conditions.py on this run. out: what it found."""
        cfg = self.settings(conditions.Config, **settings)
        return getattr(conditions, command)(cfg, self.model, self.pyramids, self.ranks)

    def patches(self, model, pyramids):
        """For each scale up to 64 held-out patches, and those drawn under their conditions: (n,3,P,P) each."""
        for s in range(pyramids.scales):
            batch = fixed_batch(pyramids, "test", s, 64)
            yield batch["x"], draw_patches(model, batch, Drawing(steps=10), self.ranks)

def by_grid(pairs):
    """Layout fidelity at each scale. in: pairs of real and drawn patches, from scale 0 on."""
    return [layout_fidelity(drawn, real, min(2 ** s, 8)) for s, (real, drawn) in enumerate(pairs)]

# ----- 3. The measurements -----

def shared_or_single(lab):
    few, coarsest = lab.place("slides"), lab.pyramids.scales - 1
    data.main(["toy", "--slides=16", "--test=4", f"--out={few}", f"--patch={lab.patch}"])
    shared, single = lab.trained("shared", few), lab.trained("single", few, f"--only_scale={coarsest}")
    cfg = conditions.Config("scales", shared, single=single, scale=coarsest)
    found = conditions.scales(cfg, lab.load(shared), lab.pyramids, lab.ranks)
    return {"distance, single - shared": (*minus(found["alone"]["desc"], found["shared"]["desc"]), 0)}

def between(lab):
    cdm.main(["train", lab.home, *lab.options])
    rows = lab.conditions("conditions", n=24)

    def gap(a, b):
        return *mean_of([minus(row[a]["desc"], row[b]["desc"]) for row in rows]), 0
    return {"distance, null - CDM": gap("null", "cdm"), "CDM - true": gap("cdm", "true")}

def no_copies(lab):
    cdm.main(["train", lab.home, *lab.options])
    found = lab.conditions("memory")
    ratios = {space: over(row["each"]["drawn"], row["each"]["real"]) for space, row in found.items()}
    return {f"nearest training image, drawn / held out, {space}": (*ratio, 0.5) for space, ratio in ratios.items()}

def second_domain(lab):
    folder = lab.cfg.second
    if not (Path(folder) / "index.json").is_file():
        raise UserError(f"{folder} holds no photographs: docs/weights.md makes some, or give --second=DIR")
    model = lab.load(lab.trained("second", folder))
    pyramids = Pyramids(folder, std=model.info["std"])
    like = standard(random_features(fixed_batch(pyramids, "train", 0, 256)["x"]))
    pairs, gains = [*lab.patches(model, pyramids)], []
    for real, drawn in pairs:
        right, wrong = paired_gain(like(random_features(drawn)), like(random_features(real)))
        gains.append(right - wrong)
    return {"layout": (*spread(by_grid(pairs)), 0.9), "similarity, right - wrong condition": (*spread(gains), 0)}

def large_image(lab, grid, level=-1, **how):
    """Draw an image of 8 x 8 patches as `how` says. out: (1,3,H,W), or, with level=0, the coarse view drawn with it."""
    cfg = Settings(run=lab.home, size=(8 * lab.patch,), context=(3,), sampler="lean", **how)
    levels, _ = draw_large(lab.model, grid, cfg, lab.ranks, lab.proxy)
    return decoded(lab.model, levels[level].z, lab.ranks)

def large_images(lab, n, ways):
    """Draw n held-out slides in several ways. out: {way: {column: [of each image]}}, seconds among the columns."""
    grids, real = zip(*(held_out(lab.pyramids, k, 8 * lab.patch) for k in range(n)))
    # on a CPU its own seconds: what else runs does not count
    clock = time.process_time if lab.ranks.device.type == "cpu" else time.perf_counter
    ruler, table = Ruler(lab.pyramids, 3, real), {}
    for name, how in ways.items():
        drawn, seconds = [], []
        for grid in grids:
            began = clock()
            image = large_image(lab, grid, **how)
            seconds.append(clock() - began)
            drawn.append((image, large_image(lab, grid, 0, method="bicubic")))
        table[name] = against.judge(ruler, 3, real, drawn) | {"seconds": seconds}
    return table

def coherence(lab):
    found = large_images(lab, 4, {"joint": {}, "patches": {"method": "multidiffusion"}})
    joint, patches = found.values()
    db = [a - b for a, b in zip(*(row["A(image) to context, dB"] for row in (joint, patches)))]
    times = [b / a for a, b in zip(joint["seconds"], patches["seconds"])]
    return {"agreement with the coarse view, joint - patches, dB": (*spread(db), 0),
            "time, patches / joint": (*spread(times), 1)}

def directions(lab):
    rows = speed.cosine(lab.settings(speed.Config, size=4 * lab.patch))
    return {"cosine of Eq. 6 with Eq. 3": (*spread([e for _, e, *_ in rows]), 0.5),
            "of g after them": (*spread([g for _, _, g, *_ in rows]), 0.5)}

def super_resolution(lab):
    cfg = lab.settings(sr.Config, n=8, steps=25, lam=0.45, guide="x0+proxy")
    rows = sr.table(lab.model, lab.pyramids, lab.proxy, cfg, lab.ranks)
    null, inferred, bicubic = (rows[name] for name in ("null, exact", "inferred, exact", "bicubic"))
    gain = [a - b for a, b in zip(inferred["psnr"], null["psnr"])]
    found = {"psnr, inferred - none, dB": (*spread(gain), -0.1)}
    for space in ("desc", "rand"):
        ahead = [value - bicubic[space][0] for value in inferred[space]]
        found[f"similarity in {space}, inferred - bicubic"] = (*spread(ahead), 0)
    return found

def inversion(lab):
    shares = sr.planted(lab.model, lab.pyramids, lab.proxy, lab.settings(sr.Config, n=8, steps=20), lab.ranks)
    ten, five, below = (spread(shares[s]) for s in (1, 2, 3))
    return {"cells found again at 10x": (*ten, 0.5), "at 5x": (*five, 0.5), "5x - 2.5x": (*minus(five, below), 0)}

def diagnosis(lab, run, task, name, seeds, **settings):
    """Settings of experiments/labels.py: features of a run for the slides of `task`, at two scales, by ABMIL."""
    how = features.Config(scales=(0, 2), device=lab.cfg.device, threads=lab.cfg.threads)
    cv = crossval.Config(seeds=seeds, heads="abmil", workers=lab.cfg.threads)
    place = dict(run=run, data=task, labels=f"{task}/labels.csv", out=lab.place(name))
    return labels.Config(**place, extract=how, cv=cv, **settings)

def two_scales(lab):
    if not (Path(lab.cfg.task) / "index.json").is_file():
        data.main(["toy", "--task", f"--out={lab.cfg.task}", f"--patch={lab.patch}"])
    cfg = diagnosis(lab, lab.home, lab.cfg.task, "mil", 3)
    draws = crossval.tables(labels.cv_of(cfg, [labels.extracted(cfg, "unet", kind="unet")]), pairs=[])
    both, found = draws["unet 0+2", "abmil", 1.0], {}
    for view in ("0", "2"):
        gap = both - draws[f"unet {view}", "abmil", 1.0]                   # (1+draws,), the first of all patients
        found[f"AUC, both - scale {view}"] = float(gap[0]), float(gap[1:].std()), 0
    return found

def summarizers(lab):
    layout = []
    for kind in ("transformer", "cnn"):
        run = lab.trained(kind, lab.folder, f"--summarizer={kind}")
        layout.append(by_grid(lab.patches(lab.load(run), lab.pyramids)))
    gaps = [a - b for a, b in zip(*layout)]
    return {"layout, transformer - CNN": (*spread(gaps), 0)}

def recoded(lab, x):
    """A real image (1,3,H,W) through the autoencoder alone: coded patch by patch, as what runs are trained on, and
    decoded as large images are."""
    size = tuple(n // lab.model.vae.factor for n in x.shape[2:])
    with torch.no_grad(), lab.ranks.autocast():
        z = lab.model.encode(crops(x, lab.patch).to(lab.ranks.device)).float()             # (n,C,P/4,P/4)
    return decoded(lab.model, uncrop(z, size), lab.ranks)

def likeness(lab):
    """... and where it is lost: in the autoencoder; in a patch drawn from its embedding, with more guidance or less; in
    windows side by side whose borders are mended; and in the guide, which makes them joint."""
    alone, plain = {"method": "independent"}, 5                # grey levels: glass, as `data.py build --background=5`
    ways = {"of patches drawn alone": alone, "with guidance 1": alone | {"guidance": 1.0},
            "with guidance 3": alone | {"guidance": 3.0}, "of windows without a guide": {"inner": 0}, "joint": {}}
    grids, real = zip(*(held_out(lab.pyramids, k, 8 * lab.patch) for k in range(8)))
    features, _, like = Ruler(lab.pyramids, 3, real).spaces["desc"]

    def alike(images):                                         # the cosine of each tile with the real one
        rows = [[like(features(crops(x, lab.patch))) for x in pair] for pair in zip(images, real)]
        return [cosine_similarity(near, own) for near, own in rows]                        # (n,) of each image

    def told(rows, bound=None):
        return *spread([float(row.mean()) for row in rows if len(row)]), bound
    found = {name: alike([large_image(lab, grid, **how) for grid in grids]) for name, how in ways.items()}
    grey = [crops(x, lab.patch).mean(1).flatten(1).std(1) * 127.5 for x in real]           # deviations (n,)
    joint = found.pop("joint")
    return {"cosine of tiles with their reference, descriptor": told(joint, 0.9),
            "of the real ones, coded and decoded": told(alike([recoded(lab, x) for x in real])),
            **{name: told(rows) for name, rows in found.items()},
            "joint, of tiles of glass": told([row[g < plain] for row, g in zip(joint, grey)]),
            "of all others": told([row[g >= plain] for row, g in zip(joint, grey)])}

def samples_as_data(lab):
    how = features.Config(device=lab.cfg.device, threads=lab.cfg.threads)
    found = labels.patches(labels.Config(lab.home, "patches", extract=how, cv=crossval.Config(seeds=5)))

    def gain(share):
        gaps = [found[share, "both", stain] - found[share, "real", stain] for stain in ("same stain", "other stain")]
        return *spread(sum(gaps).div(2).tolist()), 0
    return {"accuracy, both - real, 10 % of the patches": gain(0.1), "all": gain(1.0)}

def text_controls(lab):
    home = lab.place("text")
    captions.main(["toy", lab.folder, f"--out={home}"])
    for name in ("heldout", "captions"):
        captions.main(["embed", f"{home}/{name}.tsv"])
    told = f"--captions={home}/captions.tsv", f"--vectors={home}/captions.safetensors"
    cdm.main(["train", lab.home, "--model=grid", "--steps=2500", *told, *lab.options])
    quick = dict(n=32, seeds=2, steps=10, overlap=0, guide="x0+proxy")
    found = lab.conditions("text", captions=f"{home}/heldout.tsv", **quick)
    return {"Spearman of shares, told and drawn": (*found["means"]["all shares together"], 0.5)}

def learned_features(lab):
    """What is conditioned on, and compared with, is a network that learned to name what is in photographs."""
    slides, task = lab.place("learned"), lab.place("learned_task")
    made = "--encoder=efflite0_imagenet", f"--patch={lab.patch}", f"--workers={lab.cfg.threads}"
    data.main(["toy", "--slides=64", "--test=4", "--size=512", f"--out={slides}", *made])
    data.main(["toy", "--task", "--slides=160", f"--out={task}", *made])
    run = lab.trained("learned_run", slides)
    cfg = diagnosis(lab, run, task, "learned_mil", 2, ts=(10, 100), blocks="middle,1")
    ours = labels.sweep(cfg)                                                   # (1+draws,), the first of all patients
    cv = labels.cv_of(cfg, [labels.extracted(cfg, "descriptor", kind="descriptor")], views="0+2")
    theirs = crossval.tables(cv, pairs=[])["descriptor 0+2", "abmil", 1.0]

    def told(draws, bound=None):
        return float(draws[0]), float(draws[1:].std()), bound
    return {"AUC, diffusion features - embeddings": told(ours - theirs, 0), "of the embeddings": told(theirs)}

def enough(lab):
    s, cfgs = 1, {n: conditions.Config(steps=n) for n in (10, 20, 50, 100)}
    ways = {f"{n} steps": (cfg, 2.0) for n, cfg in cfgs.items()}
    ways |= {f"guidance {g:g}": (cfgs[50], g) for g in (1.0, 4.0)}
    sets = {name: [] for name in ways}
    for seed in range(3):
        c = conditions.true_tokens(lab.model, lab.pyramids, s, 64, seed)
        for name, (cfg, guidance) in ways.items():
            sets[name].append(conditions.drawn(lab.model, c, cfg, lab.ranks, seed, guidance))
    found = conditions.distances(cfgs[50], lab.pyramids, s, sets)
    usual, bounds = found["50 steps"]["desc"], {"100 steps": -0.05, "guidance 4": -0.05}    # neither is nearer
    names = ("100 steps", "20 steps", "10 steps", "guidance 4", "guidance 1")
    return {f"distance, {name} - usual": (*minus(found[name]["desc"], usual), bounds.get(name)) for name in names}

