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

import numpy as np
import torch
from torch import cat, stack
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from tqdm import tqdm

from common import UserError, at_least, cli, configure, generator, home_of, load_tensors, save_grid
from common import save_tensors, to_uint8, write_text
from data import PatchDataset, fixed_batch, halve
from diffusion import diffusion_loss, to_eps
from experiments.metrics import gms, load_lpips, paired_gain, psnr, similarity, ssim, standard
from experiments.quality import base_tiles, crops, feature_spaces, open_run
from invert import eps_error, invert, project, super_resolve
from large.enlarge import agreement
from large.proxy import fingerprint
from large.windows import decode_strips
from sample_joint import Canvas, Level, Resize, sample_levels
from slides.encoders import load_encoder
from summarizer import standardize, summarized
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
    lam: float = 1.0
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
    amounts = density @ torch.linalg.pinv(dye)                             # (n,H,W,2)
    density = density + amounts @ (other - dye)
    dyed = 243 / 127.5 * (-density).exp() - 1
    return to_uint8(dyed.movedim(-1, 1)).movedim(-1, 1) / 127.5 - 1

def stained(pyramids, truth, s):
    """The same regions under other dyes: truth, image at scale s, embeddings of its tiles."""
    truth = restain(truth)
    encoder = load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
    small = to_uint8(truth).movedim(0, 2).numpy()                          # (P 2^s,P 2^s,n,3)
    for _ in range(s):
        small = halve(small)
    x = torch.from_numpy(small).permute(2, 3, 0, 1) / 127.5 - 1            # (n,3,P,P)
    grids = []
    for image in truth.split(1):
        tiles = crops(image, pyramids.patch)                               # (4^s,3,P,P)
        e = encoder((tiles + 1) / 2)                                       # (4^s,E)
        grids.append(e.T.unflatten(1, (2 ** s, 2 ** s)))
    return truth, x, stack(grids)

def regions(pyramids, cfg, n):
    """n held-out patches at cfg.scale: truth (n,3,P 2^s,P 2^s), image (n,3,P,P), embeddings (n,E,2^s,2^s)."""
    s, side = cfg.scale, 2 ** cfg.scale
    batch = fixed_batch(pyramids, cfg.split, s, 8 * n if cfg.plain else n, ("x", "e"))
    grey = 127.5 * batch["x"].mean(1)                                      # (8 n,P,P)
    shown = grey.flatten(1).std(1) >= cfg.plain
    if not shown.any():
        raise UserError(f"--plain={cfg.plain} passes over all patches of scale {s}: lower it")
    slide, ij, x, e = (batch[name][shown][:n] for name in ("slide", "ij", "x", "e"))
    places = zip(slide.tolist(), (ij * side).tolist())
    truth = cat([base_tiles(pyramids, k, *corner, side) for k, corner in places])
    return stained(pyramids, truth, s) if cfg.stain else (truth, x, e)

# ----- 2. What training for one factor buys -----

class Trained:
    """The run's own U-Net as a plain super-resolution model: it also sees the image beside the latents (three more
    channels, at first ignored), without conditions; trained for one factor on scale 0, and kept in the run folder."""

    def __init__(self, run, model, pyramids, ranks, factor=4, steps=400):
        self.model, self.factor = model, factor
        self.unet = UNet(replace(model.unet.cfg, channels=6)).to(ranks.device)
        path = home_of(run) / "sr_baseline.safetensors"
        want = {"factor": factor, "steps": steps, "model": fingerprint(model)}
        state, meta = load_tensors(path) if path.exists() else ({}, {})
        if meta == want:
            self.unet.load_state_dict(state)
        else:
            state, own = self.unet.state_dict(), model.unet.state_dict()
            for name, v in state.items():  # the first and last convolution are wider: zeros there
                corner = tuple(map(slice, own[name].shape))
                v.zero_()[corner] = own[name]
            self.fit(PatchDataset(pyramids, "train", 7, ("x",), only_scale=0), steps, ranks)
            save_tensors(path, state, want)
        self.unet.eval().requires_grad_(False)

    def predict(self, z_t, t, y):
        null = torch.zeros(len(z_t), 65, self.unet.cfg.context_dim, device=z_t.device)
        return self.unet(cat([z_t, y], 1), t, null)[:, :3].float()

    def beside(self, y):
        """The image on the grid of the latents."""
        side = [n * self.factor // self.model.vae.factor for n in y.shape[2:]]
        y = interpolate(y, side, mode="bicubic", antialias=True)
        return y.to(self.unet.conv_out.weight.device)

    def fit(self, data, steps, ranks, batch=32, lr=5e-4):
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr)
        A, model = Resize(self.factor, "box"), self.model
        for step in tqdm(range(steps), desc="trained baseline"):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            x = default_collate([data[step * batch + i] for i in range(batch)])["x"]
            rng, y = generator(7, step), self.beside(A.down(x))

            def predict(z_t, t, y=y):
                return self.predict(z_t, t, y)
            with ranks.autocast():
                with torch.no_grad():
                    z = model.encode(x.to(ranks.device)).float()
                t = torch.randint(model.schedule.T, (batch,), generator=rng).to(z.device)
                noise = torch.randn(z.shape, generator=rng).to(z)
                loss, *_ = diffusion_loss(predict, z, t, noise, model.schedule, model.pred)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()

    @torch.no_grad()
    def draw(self, x, seed, steps):
        """x (1,3,H,W) -> (1,3,factor H,factor W), in windows that overlap by a quarter and fade."""
        y, model = self.beside(x), self.model
        window = model.info["patch"] // model.vae.factor
        canvas = Canvas(*y.shape[2:], window, window // 4, True)

        def eps(z, t, ij):
            out = self.predict(z, t, canvas.cut(y, ij))
            return to_eps(out, z, model.schedule.at(t, z), model.pred)
        z = torch.randn(y.shape, generator=generator(seed, 0)).to(y)
        level, = sample_levels([Level(eps, None, None, canvas, z)], model.schedule, steps=steps, end="clean")
        strips = decode_strips(model.decode, level.z, window * 3 // 2, window // 2)
        return cat(list(strips), 2).cpu()

# ----- 3. Commands -----

class Scores:
    """Rows of measures against the truth, {method: {measure: [a value per seed]}}, and the first images of each."""

    def __init__(self, pyramids, cfg, truth, x):
        self.P, self.A, self.truth, self.x = pyramids.patch, cfg.A, truth, x
        self.rows, self.first, self.spaces = {}, {}, {}
        self.net = load_lpips(cfg.lpips) if cfg.lpips else None
        fine = fixed_batch(pyramids, "train", 0, 512)["x"]
        for name, features in feature_spaces(pyramids).items():
            self.spaces[name] = features, standard(features(fine))

    def add(self, name, images):
        truth = self.truth
        row = {"psnr": psnr(images, truth), "ssim": ssim(images, truth), "gms": gms(images, truth)}
        if self.net is not None:
            far = [self.net(a, b) for a, b in zip(images.split(1), truth.split(1))]
            row["lpips"] = float(cat(far).mean())        # lower is better
        for space, (features, like) in self.spaces.items():
            tiles = (cat([crops(v, self.P) for v in some.split(1)]) for some in (images, truth))
            row[space] = similarity(*(like(features(x)) for x in tiles))
        row["A, dB"] = agreement(images, self.x, self.A)
        values = self.rows.setdefault(name, {key: [] for key in row})
        for key, value in row.items():
            values[key].append(value)
        self.first.setdefault(name, images[:6])

def table(model, pyramids, proxy, cfg, ranks):
    """Every method, each alone and back-projected, against the truth; mean and deviation over seeds."""
    truth, x, e = regions(pyramids, cfg, cfg.n or (16 if cfg.stain else 32))
    scores, A = Scores(pyramids, cfg, truth, x), Resize(2 ** cfg.scale, cfg.A)
    trained = Trained(cfg.run, model, pyramids, ranks, A.factor, cfg.train_steps)
    scores.add("bicubic", Resize(A.factor).up(x).clamp(-1, 1))
    how = dict(kind=cfg.A, steps=cfg.steps, guidance=cfg.guidance, guide=cfg.guide, lam=cfg.lam, proxy=proxy)
    for seed in range(cfg.seeds):
        with ranks.autocast():
            inferred = invert(model, x, cfg.scale, cfg.invert_steps, seed, start=cfg.start).cpu()
            drawn = {"trained": cat([trained.draw(v, seed, cfg.steps) for v in x.split(1)])}
            for name, given in (("null", None), ("gt", e), ("inferred", inferred)):
                drawn[name] = super_resolve(model, x, cfg.scale, given, seed=seed, **how)
        for name, images in drawn.items():
            scores.add(name, images)
            scores.add(f"{name}, exact", project(A, images, x))
    scores.add("real", truth)
    show(cfg, x, scores, A.factor)
    return scores.rows

def show(cfg, x, scores, factor):
    """Write pictures and numbers, print the table."""
    rows, first = scores.rows, scores.first
    stem = home_of(cfg.run) / "bench" / ("sr_stain" if cfg.stain else "sr")
    near = x[:6].repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    save_grid(f"{stem}.png", [near, *first.values()], ["input", *first])
    write_text(f"{stem}.json", json.dumps({"settings": vars(cfg), "rows": rows}, indent=1))
    print(f"{len(x)} regions, scale {cfg.scale} to 0, {cfg.seeds} seeds: mean ± deviation\n"
          + " " * 16 + "".join(f"{k:>14}" for k in rows["real"]))
    for name, row in rows.items():
        print(f"{name:>16}", end="")
        for v in row.values():
            deviation = f"±{np.std(v, ddof=1):<5.3f}" if len(v) > 1 else " " * 6
            print(f"{np.mean(v):>8.3f}{deviation}", end="")
        print()
    print(f"wrote {stem}.json and .png")

def found_again(a, b):
    """Share of cells of a (n,D,cells) that are nearest to their own of b, both without each grid's mean: neighbours on
    one tissue would drown in it."""
    a, b = ((v - v.mean(2, keepdim=True)).mT for v in (a, b))              # (n,cells,D)
    nearest, own = torch.cdist(a, b).argmin(2), torch.arange(a.shape[1])
    return float((nearest == own).double().mean())

@torch.no_grad()
def planted(model, pyramids, proxy, cfg, ranks):
    """Draw images from known grids, infer these, and compare: the loss on noise and times of its own; how many cells
    are nearest to their own true one (as embeddings; as the Summarizer's first layer sees them); fine patches drawn
    from both with the same noise. out: {scale: share of cells found again, of each image}."""
    n, device, shares = cfg.n or 4, ranks.device, {}
    encoder = load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)
    side, W = pyramids.patch // model.vae.factor, model.summarizer.embed.weight.cpu()
    like = standard(encoder((fixed_batch(pyramids, "train", 0, 512)["x"] + 1) / 2))
    print(f"{n} images a scale, {cfg.invert_steps} steps\n{'grid':>6}{'loss, true':>12}{'inferred':>10}{'times':>7}"
          f"{'nearest':>9}{'as seen':>9}{'chance':>8}{'fine':>8}{'shuffled':>10}")

    def draw(e, s):
        c = summarized(model.summarizer, standardize(e), s).float()
        return model.draw(c, side, steps=cfg.steps, batch=128)

    for s in range(1, min(4, pyramids.scales)):
        true = standardize(fixed_batch(pyramids, cfg.split, s, n, ("e",))["e"])
        with ranks.autocast():
            x = draw(true, s)
            found = invert(model, x, s, cfg.invert_steps, start=cfg.start).cpu()
            fine = []
            for e in (true, found):
                cells = e.movedim(1, -1).flatten(0, 2)[:128, :, None, None]                # (cells,E,1,1)
                fine.append(like(encoder((draw(cells, 0) + 1) / 2)))
        z, loss = model.encode(x.to(device)), [0, 0]
        for t in range(70, 950, 40):  # none of the times of the fit's own noise
            eps = torch.randn(z.shape, generator=generator(999, t)).to(z)
            for k, e in enumerate((true, found)):
                loss[k] += float(eps_error(model, e.to(z), s, z, t, eps).mean()) / 22
        found, true = found.flatten(2), true.flatten(2)                                    # (n,E,cells)
        shares[s] = [found_again(a[None], b[None]) for a, b in zip(found, true)]
        right, wrong = paired_gain(*fine)
        print(f"{2 ** s:>4}x{2 ** s}{loss[0]:>11.4f}{loss[1]:>10.4f}{loss[1] / loss[0]:>7.2f}"
              f"{found_again(found, true):>9.2f}{found_again(W @ found, W @ true):>9.2f}{4.0 ** -s:>8.2f}"
              f"{right:>8.2f}{wrong:>10.2f}", flush=True)
    return shares

def cost(model, pyramids, proxy, cfg, ranks):
    """Medians of three rounds, in turn."""
    x, seconds = fixed_batch(pyramids, cfg.split, cfg.scale, 8)["x"], {1: [], 8: []}
    with ranks.autocast():
        for n in (1, 8) * 4:
            began = time.perf_counter()
            invert(model, x[:n], cfg.scale, cfg.invert_steps)
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
