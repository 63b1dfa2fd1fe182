"""How good inversion and super-resolution are: Z Table 4 on held-out regions, and planted conditions found again.

    python sr_table.py table out/toy_long              # 32 regions, scale 2 to 0, 3 seeds -> RUN/bench/sr.json, sr.png
    python sr_table.py table out/toy_long --stain      # the same tissue under dyes the run has never seen
    python sr_table.py planted out/toy_long            # images drawn from known grids: is the condition found again?
    python sr_table.py cost out/toy_long               # seconds of one inversion, and of eight at once

in:  a run folder, its data   out: tables, pictures     read next: joint_table.py
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import invert as I
from common import UserError, cli, configure, generator, save_grid, to_uint8, write_text
from data import fixed_batch, halve
from experiments import metrics as M
from experiments.quality import crops, open_run
from experiments.sr_trained import Trained
from sample_joint import Resize
from slides.encoders import load_encoder
from summarizer import standardize


@dataclass
class Config:
    command: str = ""       # table, planted, cost
    run: str = ""           # run folder
    data: str = ""          # data folder; default: the one the run was trained on
    split: str = "test"
    scale: int = 2          # of the images; the table goes from there to scale 0
    n: int = 0              # regions; 0 = 32, 16 with --stain, 4 for planted
    plain: float = 0.0      # pass over regions whose grey levels deviate less (try 5): plain glass has a psnr of inf
    seeds: int = 3
    stain: bool = False     # other dyes than toy.py's
    steps: int = 50
    invert_steps: int = 200
    start: str = ""         # of the inference, see invert.py
    guide: str = "x0"
    guidance: float = 1.0   # of super-resolution, see invert.py
    lam: float = 0.3
    A: str = "box"          # how pyramids are made
    train_steps: int = 400  # of the trained baseline
    lpips: str = ""         # weights of its backbone (extra "metrics"); empty = the column is left out
    device: str = "auto"
    threads: int = 2


# ----- 1. Regions -----

def restain(x):
    """Other dyes: optical density is taken apart into the two of toy.py, and their amounts dye anew. x in [-1,1]."""
    dye, other = torch.tensor([[[0.66, 0.70, 0.28], [0.10, 0.85, 0.34]], [[0.76, 0.60, 0.22], [0.05, 0.70, 0.55]]])
    density = -((x.movedim(1, -1) + 1) * (127.5 / 243)).clamp_min(1 / 255).log()        # (n,H,W,3)
    density = density + density @ torch.linalg.pinv(dye) @ (other - dye)
    return to_uint8((243 / 127.5 * (-density).exp() - 1).movedim(-1, 1)).movedim(-1, 1) / 127.5 - 1


def regions(pyramids, cfg, n):
    """n held-out patches at cfg.scale: truth (n,3,P 2^s,P 2^s), image (n,3,P,P), embeddings (n,E,2^s,2^s)."""
    s, P = cfg.scale, pyramids.patch
    batch, truth = fixed_batch(pyramids, cfg.split, s, 8 * n if cfg.plain else n, ("x", "e")), []
    shown = (127.5 * batch["x"].mean(1)).flatten(1).std(1) >= cfg.plain
    if not shown.any():
        raise UserError(f"--plain={cfg.plain} passes over all patches of scale {s}: lower it")
    batch = {k: batch[k][shown][:n] for k in ("slide", "ij", "x", "e")}
    for k, (i, j) in zip(batch["slide"].tolist(), batch["ij"].tolist()):
        there = {tuple(at): m for m, at in enumerate(pyramids.tensor(k, "ij0").tolist())}
        want = [((i << s) + a, (j << s) + b) for a in range(2 ** s) for b in range(2 ** s)]
        if not there.keys() >= set(want):
            raise UserError(f"{pyramids.folder} does not keep all fine patches of its {cfg.split!r} images: take the "
                            f"other --split, or build it without --background")
        tiles = torch.stack([pyramids.read(k, 0, there[at])["x"] for at in want])
        truth.append(F.fold(tiles.flatten(1).T[None], P << s, P, stride=P)[0])
    truth, x, e = torch.stack(truth), batch["x"], batch["e"]
    if cfg.stain:
        truth, encoder = restain(truth), load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
        small = list(to_uint8(truth).numpy())
        for _ in range(s):
            small = [halve(v) for v in small]
        x = torch.from_numpy(np.stack(small)).movedim(-1, 1) / 127.5 - 1
        e = torch.stack([encoder((crops(v[None], P) + 1) / 2).T.unflatten(1, (2 ** s, 2 ** s)) for v in truth])
    return truth, x, e


# ----- 2. Commands -----

def table(model, pyramids, proxy, cfg, ranks):
    """Every method, each alone and back-projected, against the truth; mean and deviation over seeds."""
    truth, x, e = regions(pyramids, cfg, cfg.n or (16 if cfg.stain else 32))
    encoder = load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
    P, out = pyramids.patch, Path(cfg.run) / "bench"
    spaces = {"desc": lambda v: standardize(encoder((v + 1) / 2)[..., None, None])[..., 0, 0],
              "rand": M.random_features}
    fine = fixed_batch(pyramids, "train", 0, 512)["x"]
    like = {name: M.standard(f(fine)) for name, f in spaces.items()}
    factor = 2 ** cfg.scale
    trained = Trained(cfg.run, model, pyramids, ranks, factor, cfg.train_steps)
    net = M.load_lpips(cfg.lpips) if cfg.lpips else None
    rows, first = {}, {}

    def score(name, images):
        row = {"psnr": M.psnr(images, truth), "ssim": M.ssim(images, truth), "gms": M.gms(images, truth)}
        if net is not None:
            row["lpips"] = float(torch.cat([net(a[None], b[None]) for a, b in zip(images, truth)]).mean())
        for space, f in spaces.items():
            a, b = (like[space](f(torch.cat([crops(v[None], P) for v in xs]))) for xs in (images, truth))
            row[space] = M.similarity(a, b)
        row["A, dB"] = I.agreement(images, x, cfg.A)
        for key, value in row.items():
            rows.setdefault(name, {}).setdefault(key, []).append(value)
        first.setdefault(name, images[:6])
    score("bicubic", Resize(factor).up(x).clamp(-1, 1))
    for seed in range(cfg.seeds):
        with ranks.autocast():
            inferred = I.invert(model, x, cfg.scale, cfg.invert_steps, seed, start=cfg.start).cpu()
            drawn = {"trained": torch.cat([trained.draw(v[None], seed, cfg.steps) for v in x])}
            for name, given in (("null", None), ("gt", e), ("inferred", inferred)):
                drawn[name] = I.super_resolve(model, x, cfg.scale, 0, "null" if given is None else "gt", given, False,
                                              seed, cfg.A, steps=cfg.steps, guidance=cfg.guidance,
                                              guide=cfg.guide, lam=cfg.lam, proxy=proxy)
        for name, images in drawn.items():
            score(name, images)
            score(f"{name}, exact", I.project(Resize(factor, cfg.A), images, x))
    score("real", truth)
    stem = "sr_stain" if cfg.stain else "sr"
    near = x[:6].repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    save_grid(out / f"{stem}.png", [near, *first.values()], ["input", *first])
    write_text(out / f"{stem}.json", json.dumps({"settings": vars(cfg), "rows": rows}, indent=1))
    print(f"{len(x)} regions, scale {cfg.scale} to 0, {cfg.seeds} seeds: mean ± deviation; lpips: lower is better\n"
          f"{'':>16}" + "".join(f"{k:>14}" for k in rows["real"]))
    for name, row in rows.items():
        print(f"{name:>16}" + "".join(f"{np.mean(v):>8.3f}" + (f"±{np.std(v, ddof=1):<5.3f}" if len(v) > 1 else " " * 6)
                                      for v in row.values()))
    print(f"wrote {out / stem}.json and .png")


@torch.no_grad()
def planted(model, pyramids, proxy, cfg, ranks):
    """Draw images from known grids, infer these, and compare: the loss on noise and times of its own; how many cells
    are nearest to their own true one (as embeddings; as the Summarizer's first layer sees them; both without each
    grid's mean, or neighbours on one tissue drown in it); fine patches drawn from both with the same noise."""
    n, encoder = cfg.n or 4, load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
    side, W = [pyramids.patch // model.vae.factor] * 2, model.summarizer.embed.weight.cpu()
    like = M.standard(encoder((fixed_batch(pyramids, "train", 0, 512)["x"] + 1) / 2))
    print(f"{n} images a scale, {cfg.invert_steps} steps\n{'grid':>6}{'loss, true':>12}{'inferred':>10}{'times':>7}"
          f"{'nearest':>9}{'as seen':>9}{'chance':>8}{'fine':>8}{'shuffled':>10}")
    for s in range(1, min(4, pyramids.scales)):
        true = standardize(fixed_batch(pyramids, cfg.split, s, n, ("e",))["e"])

        def tokens(e, s):
            pack = [torch.stack(v).to(ranks.device) for v in zip(*map(I.pack_grid, standardize(e)))]
            return model.summarizer(*pack, torch.full((len(e),), s, device=ranks.device)).float()
        with ranks.autocast():
            x = model.decode(model.sample(tokens(true, s), side, steps=cfg.steps)).float().clamp(-1, 1).cpu()
            found = I.invert(model, x, s, cfg.invert_steps, start=cfg.start).cpu()
            singles = [e.flatten(2).movedim(2, 1).flatten(0, 1)[..., None, None][:128] for e in (true, found)]
            fine = [model.decode(model.sample(tokens(e, 0), side, steps=cfg.steps)).float().cpu() for e in singles]
        z, loss = model.encode(x.to(ranks.device)), torch.zeros(2)
        for t in range(70, 950, 40):  # none of the times of the fit's own noise
            eps = torch.randn(z.shape, generator=generator(999, t)).to(z)
            loss += torch.stack([I.eps_error(model, e.to(z), s, z, t, eps).mean().cpu() for e in (true, found)]) / 22
        hits = []
        for a, b in ((found, true), (W @ found.flatten(2), W @ true.flatten(2))):
            a, b = ((v.flatten(2) - v.flatten(2).mean(2, keepdim=True)).mT for v in (a, b))   # (n,cells,E or D)
            hits.append(float((torch.cdist(a, b).argmin(2) == torch.arange(a.shape[1])).double().mean()))
        right, wrong = M.paired_gain(*(like(encoder((v.clamp(-1, 1) + 1) / 2)) for v in fine))
        print(f"{2 ** s:>4}x{2 ** s}{loss[0]:>11.4f}{loss[1]:>10.4f}{loss[1] / loss[0]:>7.2f}{hits[0]:>9.2f}"
              f"{hits[1]:>9.2f}{4.0 ** -s:>8.2f}{right:>8.2f}{wrong:>10.2f}", flush=True)


def cost(model, pyramids, proxy, cfg, ranks):
    """Medians of three rounds, in turn."""
    x, seconds = fixed_batch(pyramids, cfg.split, cfg.scale, 8)["x"], {1: [], 8: []}
    with ranks.autocast():
        for n in (1, 8) * 4:
            began = time.perf_counter()
            I.invert(model, x[:n], cfg.scale, cfg.invert_steps)
            seconds[n].append(time.perf_counter() - began)
    one, eight = (sorted(v[1:])[1] for v in seconds.values())
    print(f"{cfg.invert_steps} steps: one image {one:.1f} s, eight at once {eight:.1f} s ({eight / one:.2f} times)")


def main(argv):
    cfg, commands = configure(Config, argv, words=("command", "run"), doc=__doc__), dict(
        table=table, planted=planted, cost=cost)
    if cfg.command not in commands or not cfg.run:
        raise UserError("say what of which run: python sr_table.py table out/toy_long, or planted, or cost")
    if cfg.scale < 1 or min(cfg.n, cfg.plain) < 0 or min(cfg.seeds, cfg.steps, cfg.invert_steps, cfg.train_steps) < 1:
        raise UserError(f"--scale={cfg.scale} --n={cfg.n} --plain={cfg.plain} --seeds={cfg.seeds}: scale, seeds and "
                        f"steps are at least 1, nothing is negative")
    model, pyramids, proxy, ranks = open_run(cfg)
    commands[cfg.command](model, pyramids, proxy, cfg, ranks)


if __name__ == "__main__":
    cli(main)
