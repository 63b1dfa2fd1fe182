"""How good inversion and super-resolution are: Z Table 4 on held-out regions, and planted conditions found again.

    python -m experiments.sr table out/toy_long            # 32 regions, scale 2 to 0, 3 seeds -> RUN/bench/sr.*
    python -m experiments.sr table out/toy_long --stain    # the same tissue under dyes the run has never seen
    python -m experiments.sr planted out/toy_long          # images drawn from known grids: are they found again?
    python -m experiments.sr cost out/toy_long             # seconds of one inversion, and of eight at once

in:  a run folder, its data   out: tables, pictures; RUN/sr_baseline.safetensors, the trained baseline of the table
"""
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from tqdm import tqdm

import invert as I
from common import UserError, at_least, cli, configure, generator, load_tensors, save_grid, save_tensors
from common import to_uint8, write_text
from data import PatchDataset, fixed_batch, halve
from diffusion import diffusion_loss, to_eps
from experiments import metrics as M
from experiments.quality import crops, open_run
from large.enlarge import agreement
from large.proxy import fingerprint
from large.windows import decode_strips
from sample_joint import Canvas, Level, Resize, sample_levels
from slides.encoders import load_encoder
from summarizer import pack_grid, standardize
from unet import UNet

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
    stain: bool = False     # other dyes than toy/tissue.py's
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
    """Other dyes: optical density is taken apart into the two of toy slides, whose amounts dye anew. x in [-1,1]."""
    dye = torch.tensor([[0.66, 0.70, 0.28], [0.10, 0.85, 0.34]])
    other = torch.tensor([[0.76, 0.60, 0.22], [0.05, 0.70, 0.55]])
    light = (x.movedim(1, -1) + 1) * (127.5 / 243)                         # (n,H,W,3), 1 = glass
    density = -light.clamp_min(1 / 255).log()
    density = density + density @ torch.linalg.pinv(dye) @ (other - dye)
    dyed = 243 / 127.5 * (-density).exp() - 1
    return to_uint8(dyed.movedim(-1, 1)).movedim(-1, 1) / 127.5 - 1

def stained(pyramids, truth, s):
    """The same regions under other dyes: truth, image at scale s, embeddings of its tiles."""
    truth, encoder = restain(truth), load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
    small = list(to_uint8(truth).numpy())
    for _ in range(s):
        small = [halve(v) for v in small]
    e = [encoder((crops(v[None], pyramids.patch) + 1) / 2).T.unflatten(1, (2 ** s, 2 ** s)) for v in truth]
    return truth, torch.from_numpy(np.stack(small)).movedim(-1, 1) / 127.5 - 1, torch.stack(e)

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
    truth = torch.stack(truth)
    return stained(pyramids, truth, s) if cfg.stain else (truth, batch["x"], batch["e"])

# ----- 2. What training for one factor buys -----

class Trained:
    """The run's own U-Net as a plain super-resolution model: it also sees the image beside the latents (three more
    channels, at first ignored), without conditions; trained for one factor on scale 0, and kept in the run folder."""

    def __init__(self, run, model, pyramids, ranks, factor=4, steps=400):
        self.model, self.factor = model, factor
        self.unet = UNet(replace(model.unet.cfg, channels=6)).to(ranks.device)
        path = Path(run) / "sr_baseline.safetensors"
        want = {"factor": factor, "steps": steps, "model": fingerprint(model)}
        state, meta = load_tensors(path) if path.exists() else ({}, {})
        if meta == want:
            self.unet.load_state_dict(state)
        else:
            own = model.unet.state_dict()
            for name, v in self.unet.state_dict().items():  # the first and last convolution are wider: zeros there
                v.zero_()[tuple(slice(n) for n in own[name].shape)] = own[name]
            self.fit(PatchDataset(pyramids, "train", 7, ("x",), only_scale=0), steps, ranks)
            save_tensors(path, self.unet.state_dict(), want)
        self.unet.eval().requires_grad_(False)

    def predict(self, z_t, t, y):
        null = torch.zeros(len(z_t), 65, self.unet.cfg.context_dim, device=z_t.device)
        return self.unet(torch.cat([z_t, y], 1), t, null)[:, :3].float()

    def beside(self, y):
        """The image on the grid of the latents."""
        side = [n * self.factor // self.model.vae.factor for n in y.shape[2:]]
        return F.interpolate(y, side, mode="bicubic", antialias=True).to(self.unet.conv_out.weight.device)

    def fit(self, data, steps, ranks, batch=32, lr=5e-4):
        optimizer, A, model = torch.optim.AdamW(self.unet.parameters(), lr), Resize(self.factor, "box"), self.model
        for step in tqdm(range(steps), desc="trained baseline"):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            x = default_collate([data[step * batch + i] for i in range(batch)])["x"]
            rng, y = generator(7, step), self.beside(A.down(x))
            with ranks.autocast():
                with torch.no_grad():
                    z = model.encode(x.to(ranks.device)).float()
                t = torch.randint(model.schedule.T, (batch,), generator=rng).to(z.device)
                noise = torch.randn(z.shape, generator=rng).to(z)
                loss, *_ = diffusion_loss(lambda z_t, t, y=y: self.predict(z_t, t, y), z, t, noise, model.schedule,
                                          model.pred)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()

    @torch.no_grad()
    def draw(self, x, seed, steps):
        """x (1,3,H,W) -> (1,3,factor H,factor W), in windows that overlap and fade as everywhere."""
        y, model = self.beside(x), self.model
        window = model.info["patch"] // model.vae.factor
        canvas = Canvas(*y.shape[2:], window, window // 4, True)

        def eps(z, t, ij):
            return to_eps(self.predict(z, t, canvas.cut(y, ij)), z, model.schedule.at(t, z), model.pred)
        z = torch.randn(y.shape, generator=generator(seed, 0)).to(y)
        level, = sample_levels([Level(eps, None, None, canvas, z)], model.schedule, steps=steps, end="clean")
        return torch.cat(list(decode_strips(model.decode, level.z, window * 3 // 2, window // 2)), 2).cpu()

# ----- 3. Commands -----

class Scores:
    """Rows of measures against the truth, {method: {measure: [a value per seed]}}, and the first images of each."""

    def __init__(self, pyramids, cfg, truth, x):
        self.encoder = load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
        self.P, self.A, self.truth, self.x, self.rows, self.first = pyramids.patch, cfg.A, truth, x, {}, {}
        self.net, fine = M.load_lpips(cfg.lpips) if cfg.lpips else None, fixed_batch(pyramids, "train", 0, 512)["x"]
        self.spaces = {"desc": self.describe, "rand": M.random_features}
        self.like = {name: M.standard(f(fine)) for name, f in self.spaces.items()}

    def describe(self, x):
        return standardize(self.encoder((x + 1) / 2)[..., None, None])[..., 0, 0]

    def add(self, name, images):
        truth = self.truth
        row = {"psnr": M.psnr(images, truth), "ssim": M.ssim(images, truth), "gms": M.gms(images, truth)}
        if self.net is not None:
            row["lpips"] = float(torch.cat([self.net(a[None], b[None]) for a, b in zip(images, truth)]).mean())
        for space, f in self.spaces.items():
            a, b = (f(torch.cat([crops(v[None], self.P) for v in xs])) for xs in (images, truth))
            row[space] = M.similarity(self.like[space](a), self.like[space](b))
        row["A, dB"] = agreement(images, self.x, self.A)
        for key, value in row.items():
            self.rows.setdefault(name, {}).setdefault(key, []).append(value)
        self.first.setdefault(name, images[:6])

def table(model, pyramids, proxy, cfg, ranks):
    """Every method, each alone and back-projected, against the truth; mean and deviation over seeds."""
    truth, x, e = regions(pyramids, cfg, cfg.n or (16 if cfg.stain else 32))
    scores, A, out = Scores(pyramids, cfg, truth, x), Resize(2 ** cfg.scale, cfg.A), Path(cfg.run) / "bench"
    trained = Trained(cfg.run, model, pyramids, ranks, A.factor, cfg.train_steps)
    scores.add("bicubic", Resize(A.factor).up(x).clamp(-1, 1))
    how = dict(kind=cfg.A, steps=cfg.steps, guidance=cfg.guidance, guide=cfg.guide, lam=cfg.lam, proxy=proxy)
    for seed in range(cfg.seeds):
        with ranks.autocast():
            inferred = I.invert(model, x, cfg.scale, cfg.invert_steps, seed, start=cfg.start).cpu()
            drawn = {"trained": torch.cat([trained.draw(v[None], seed, cfg.steps) for v in x])}
            for name, given in (("null", None), ("gt", e), ("inferred", inferred)):
                drawn[name] = I.super_resolve(model, x, cfg.scale, given, seed=seed, **how)
        for name, images in drawn.items():
            scores.add(name, images)
            scores.add(f"{name}, exact", I.project(A, images, x))
    scores.add("real", truth)
    stem, rows = "sr_stain" if cfg.stain else "sr", scores.rows
    near = x[:6].repeat_interleave(A.factor, -1).repeat_interleave(A.factor, -2)
    save_grid(out / f"{stem}.png", [near, *scores.first.values()], ["input", *scores.first])
    write_text(out / f"{stem}.json", json.dumps({"settings": vars(cfg), "rows": rows}, indent=1))
    print(f"{len(x)} regions, scale {cfg.scale} to 0, {cfg.seeds} seeds: mean ± deviation; lpips: lower is better\n"
          + " " * 16 + "".join(f"{k:>14}" for k in rows["real"]))
    for name, row in rows.items():
        print(f"{name:>16}", end="")
        for v in row.values():
            print(f"{np.mean(v):>8.3f}" + (f"±{np.std(v, ddof=1):<5.3f}" if len(v) > 1 else " " * 6), end="")
        print()
    print(f"wrote {out / stem}.json and .png")

def found_again(a, b):
    """Share of cells of a (n,D,k,k) that are nearest to their own of b, both without each grid's mean: neighbours on
    one tissue would drown in it."""
    a, b = ((v.flatten(2) - v.flatten(2).mean(2, keepdim=True)).mT for v in (a, b))        # (n,cells,D)
    return float((torch.cdist(a, b).argmin(2) == torch.arange(a.shape[1])).double().mean())

@torch.no_grad()
def planted(model, pyramids, proxy, cfg, ranks):
    """Draw images from known grids, infer these, and compare: the loss on noise and times of its own; how many cells
    are nearest to their own true one (as embeddings; as the Summarizer's first layer sees them); fine patches drawn
    from both with the same noise."""
    n, encoder = cfg.n or 4, load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
    side, W = pyramids.patch // model.vae.factor, model.summarizer.embed.weight.cpu()
    like = M.standard(encoder((fixed_batch(pyramids, "train", 0, 512)["x"] + 1) / 2))
    print(f"{n} images a scale, {cfg.invert_steps} steps\n{'grid':>6}{'loss, true':>12}{'inferred':>10}{'times':>7}"
          f"{'nearest':>9}{'as seen':>9}{'chance':>8}{'fine':>8}{'shuffled':>10}")

    def draw(e, s):
        tokens, mask = (torch.stack(v).to(ranks.device) for v in zip(*map(pack_grid, standardize(e))))
        c = model.summarizer(tokens, mask, torch.full((len(e),), s, device=ranks.device)).float()
        return model.draw(c, side, steps=cfg.steps, batch=128)

    for s in range(1, min(4, pyramids.scales)):
        true = standardize(fixed_batch(pyramids, cfg.split, s, n, ("e",))["e"])
        with ranks.autocast():
            x = draw(true, s)
            found = I.invert(model, x, s, cfg.invert_steps, start=cfg.start).cpu()
            cells = [e.flatten(2).movedim(2, 1).flatten(0, 1)[..., None, None][:128] for e in (true, found)]
            fine = [like(encoder((draw(e, 0) + 1) / 2)) for e in cells]
        z, loss = model.encode(x.to(ranks.device)), torch.zeros(2)
        for t in range(70, 950, 40):  # none of the times of the fit's own noise
            eps = torch.randn(z.shape, generator=generator(999, t)).to(z)
            loss += torch.stack([I.eps_error(model, e.to(z), s, z, t, eps).mean().cpu() for e in (true, found)]) / 22
        seen = found_again((W @ found.flatten(2))[..., None], (W @ true.flatten(2))[..., None])
        right, wrong = M.paired_gain(*fine)
        print(f"{2 ** s:>4}x{2 ** s}{loss[0]:>11.4f}{loss[1]:>10.4f}{loss[1] / loss[0]:>7.2f}"
              f"{found_again(found, true):>9.2f}{seen:>9.2f}{4.0 ** -s:>8.2f}{right:>8.2f}{wrong:>10.2f}", flush=True)

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

COMMANDS = {"table": table, "planted": planted, "cost": cost}

def main(argv):
    cfg = configure(Config, argv, words=("command", "run"), doc=__doc__)
    if cfg.command not in COMMANDS or not cfg.run:
        raise UserError("say what of which run: python -m experiments.sr table out/toy_long, or planted, or cost")
    at_least(cfg, scale=1, n=0, plain=0, seeds=1, steps=1, invert_steps=1, train_steps=1)
    model, pyramids, proxy, ranks = open_run(cfg)
    COMMANDS[cfg.command](model, pyramids, proxy, cfg, ranks)

if __name__ == "__main__":
    cli(main)
