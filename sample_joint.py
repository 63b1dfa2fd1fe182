"""Draw images with a trained run: patches at any scale from the conditions of held-out images, and how good they are.

    python sample_joint.py out/toy                        # 8 patches a scale: PNGs and a contact sheet
    python sample_joint.py out/toy --scale=3 --n=32 --guidance=1.5 --steps=100 --seed=7 --sampler=plms
    python sample_joint.py out/toy --eval                 # the table of the README, on held-out slides

in:  a run folder and the data folder it was trained on   out: RUN/patches/*.png, sheet.png, eval.json
read next: README.md
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import metrics as M
from common import UserError, atomic, cli, configure, open_tensors, save_grid, setup, to_uint8, write_text
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM, ddim_step, ddim_timesteps, noise_levels, to_x0
from encoder import load_encoder
from summarizer import standardize
from zoom_vae import perplexity


@dataclass
class Config:
    run: str = ""              # run folder (or an ema.safetensors)
    data: str = ""             # data folder; default: the one the run was trained on
    split: str = "test"        # whose conditions: test or train
    out: str = ""              # folder to write; default RUN/patches
    scale: int = -1            # one scale, 0 = finest; -1 = all
    n: int = 0                 # patches per scale, at most as many as there are; 0 = 8, or 128 with --eval
    guidance: float = 2.0      # eps_null + guidance (eps_cond - eps_null); 1 = no guidance
    steps: int = 50
    sampler: str = "ddim"      # ddim or plms
    end: str = "clean"         # where ddim stops: clean, or published (leaves 3.9 % noise in the latent), as plms does
    seed: int = 0
    batch: int = 64            # patches per network call
    eval: bool = False         # measure instead of showing
    device: str = "auto"
    threads: int = 0


# ----- 1. The down-sampling operator A of the constraint A Dec(z) = y (Z Eq. 1) -----

def shrink_matrix(n, k):
    """Rows of A in one dimension, (n/k,n) float64: Keys' cubic (a = -0.5) stretched k times, mirrored at the borders
    with the edge repeated, each row summing to 1. reference: the Resizer of the published helpers."""
    centre = (torch.arange(n // k, dtype=torch.float64) + 0.5) * k - 0.5                # (n/k,)
    taps = (centre[:, None] - 2 * k).floor() + torch.arange(1, 4 * k + 1)               # (n/k,4k)
    d = (taps - centre[:, None]).abs() / k
    w = torch.where(d <= 1, 1.5 * d ** 3 - 2.5 * d ** 2 + 1, (-0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2) * (d < 2))
    at = taps.long() % (2 * n)
    at = torch.where(at >= n, 2 * n - 1 - at, at)                                       # ... 1 0 | 0 1 ... n-1 | n-1
    return torch.zeros(n // k, n, dtype=torch.float64).scatter_add_(1, at, w / w.sum(1, keepdim=True))


class Resize:
    """Antialiased bicubic down-sampling A by an integer factor, and `up` = factor^2 A^T, which is exactly the bicubic
    up-sampling of the published code. kind "box" averages blocks instead, as the pyramids on disk are made; then
    A A^T = 1 / factor^2. in: x (...,H,W), H and W multiples of factor. raises: ValueError for other sides.
    """

    def __init__(self, factor, kind="bicubic"):
        if factor < 1 or kind not in ("bicubic", "box"):
            raise UserError(f"factor={factor}, kind={kind!r}: give a factor of at least 1, and bicubic or box")
        self.factor, self.kind, self.cache = factor, kind, {}

    def matrix(self, n, like):
        """A in one dimension for sides of n pixels, (n/factor,n), in the dtype and on the device of `like`."""
        key = n, like.dtype, like.device
        if key not in self.cache:
            box = torch.eye(n // self.factor, dtype=torch.float64).repeat_interleave(self.factor, 1) / self.factor
            self.cache[key] = (box if self.kind == "box" else shrink_matrix(n, self.factor)).to(like)
        return self.cache[key]

    def down(self, x):
        """A x: (...,H,W) -> (...,H/factor,W/factor)."""
        h, w = x.shape[-2:]
        if h % self.factor or w % self.factor:
            raise UserError(f"got an image of {h} x {w} pixels, which {self.factor} does not divide: crop or pad it")
        return self.matrix(h, x) @ x @ self.matrix(w, x).T

    def up(self, y):
        """factor^2 A^T y: (...,h,w) -> (...,h factor,w factor)."""
        h, w = (n * self.factor for n in y.shape[-2:])
        return self.factor ** 2 * (self.matrix(h, y).T @ y @ self.matrix(w, y))


# ----- 2. Joint sampling (Z Algorithm S2) -----

GREY = 2 / 255  # a residual below one grey level fades out, instead of being blown up to a step of full size


def corners(h, w, window, overlap=0):
    """Upper left corners of windows that cover a canvas; neighbours share `overlap`, at the last edge perhaps more."""
    rows, columns = ([*range(0, n - window, window - overlap), n - window] for n in (h, w))
    return [(i, j) for i in rows for j in columns]


def cut(canvas, ij, window):
    """canvas (1,C,H,W) -> windows (N,C,window,window)."""
    return torch.cat([canvas[..., i:i + window, j:j + window] for i, j in ij])


def merge(parts, ij, h, w):
    """Average windows (N,C,side,side) on a canvas (1,C,h,w); where only one lies, its values come back exactly."""
    side, total = parts.shape[-1], parts.new_zeros(1, parts.shape[1], h, w)
    count = parts.new_zeros(1, 1, h, w)
    for part, (i, j) in zip(parts, ij):
        total[0, :, i:i + side, j:j + side] += part
        count[..., i:i + side, j:j + side] += 1
    return total / count


def peak(parts):
    """Largest absolute value of each window, (N,1,1,1), never zero."""
    return parts.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def joint_sample(eps_fine, eps_ctx, encode, decode, schedule, z_T, z_T_ctx, *, window, factor, steps=50, inner=1,
                 lam=0.5, delta=0.005, zeta=0.005, overlap=0, guide="exact", normalize=True, y=None, callback=None,
                 A=None, end="published"):
    """Draw a large image and the coarse view of it together; the coarse one guides the fine one at every step.

    in:  eps_fine(z (N,C,window,window), t (N,), ij) -> eps of windows at canvas positions ij; eps_ctx(z, t) -> eps;
    encode, decode: images <-> scaled latents; z_T (1,C,H,W) the fine canvas; z_T_ctx (1,C,h,w) the context; factor:
    fine pixels per context pixel; inner: corrections per step (K); lam: the largest change of a number of z_t in one
    of them (with normalize=False: the factor of the step); delta, zeta: widths of the two finite differences; y: a
    fixed target (1,3,h,w) instead of the context's estimate; callback(n, t, z, z0_hat, target) after every step.
    out: (z_fine, z_ctx). Costs 1 + 2 K estimates, K decodes and 2 K encodes a step. raises: ValueError if the canvas is
    no place for the windows, or the context does not match it.
    source: Z §3.2, Eq. 3-6, Algorithm S2. deviates: Eq. 5 adds the gradient, which climbs; this descends, as the code
    does. official: all three directions are scaled to a maximum of 1 per window, which Z leaves out.
    """
    H, W = z_T.shape[2:]
    if min(H, W) < window or not 0 <= overlap < window:
        raise UserError(f"windows of {window} latents that share {overlap} do not cover a canvas of {H} x {W}: take a "
                        f"larger canvas, or a smaller overlap")
    if guide != "exact" or end not in ("clean", "published") or eps_ctx is None and y is None:
        raise UserError(f"guide={guide!r}, end={end!r}: known are 'exact', 'clean', 'published'; and eps_ctx or y "
                        f"must be given")
    A, timesteps = A or Resize(factor), ddim_timesteps(schedule.T, steps)
    ab, ab_prev = noise_levels(schedule, timesteps, end)
    ij, tiles = corners(H, W, window, overlap), corners(H, W, window)
    z, z_ctx = z_T, z_T_ctx

    def estimate(z, i):
        """eps and the clean estimate of the canvas. Overlapping windows are averaged: MultiDiffusion, L §3.2."""
        eps = merge(eps_fine(cut(z, ij, window), index(i, len(ij)), ij), ij, H, W)
        return eps, to_x0(eps, z, ab[i], "eps")

    def index(i, n):
        return torch.full((n,), timesteps[i], dtype=torch.long, device=z.device)

    def decoded(z):
        parts = torch.cat([decode(cut(z, [p], window)) for p in tiles])
        k = parts.shape[-1] // window                                                   # pixels per latent
        return merge(parts, [(i * k, j * k) for i, j in tiles], H * k, W * k)

    def encoded(x):
        k = x.shape[-1] // W
        parts = torch.cat([encode(cut(x, [(i * k, j * k)], window * k)) for i, j in tiles])
        return merge(parts, tiles, H, W)

    def unit(d, fade=1.0):
        """A direction on the canvas, scaled per window to a maximum of `fade`; averaged where windows overlap."""
        k = d.shape[-1] // W
        at = [(i * k, j * k) for i, j in ij]
        parts = cut(d, at, window * k)
        return merge(parts / peak(parts) * fade, at, *d.shape[2:])

    def correction(z0_hat, z, i, target):
        """What to add to z, before lam: downhill in |A Dec(z0_hat(z)) - y|^2 / 2."""
        x = decoded(z0_hat)
        residual = A.down(x)
        if residual.shape != target.shape:
            raise UserError(f"the canvas seen through A is {tuple(residual.shape)}, the context "
                            f"{tuple(target.shape)}: the canvas must be factor={factor} times as large")
        residual = target - residual
        if not normalize:
            err_z = (encoded(x + zeta * A.up(residual) / factor ** 2) - encoded(x)) / zeta   # Eq. 3-4, by J_E
            return (estimate(z + delta * err_z, i)[1] - z0_hat) / delta                      # Eq. 6
        u = A.up(residual)
        k = u.shape[-1] // W
        fade = (peak(cut(u, [(i * k, j * k) for i, j in ij], window * k)) / GREY).clamp_max(1)
        err_z = unit(encoded(x + zeta * unit(u)) - encoded(x))
        return unit(estimate(z + delta * err_z, i)[1] - z0_hat, fade)

    for n, i in enumerate(reversed(range(len(timesteps)))):
        target = y
        if eps_ctx is not None:
            eps_c = eps_ctx(z_ctx, index(i, len(z_ctx)))
            x0_c = to_x0(eps_c, z_ctx, ab[i], "eps")
            z_ctx = ddim_step(z_ctx, x0_c, eps_c, ab_prev[i])
            if y is None:
                target = decode(x0_c).clamp(-1, 1)
        eps, z0_hat = estimate(z, i)
        for _ in range(inner if lam else 0):
            z = z + lam * correction(z0_hat, z, i, target)
            eps, z0_hat = estimate(z, i)
        z = ddim_step(z, z0_hat, eps, ab_prev[i])
        if callback is not None:
            callback(n, timesteps[i], z, z0_hat, target)
    return z, z_ctx


# ----- 3. Patches -----

@torch.no_grad()
def draw_patches(model, batch, cfg, ranks, null=False):
    """Draw one patch per item. in: a collated batch with tokens, mask, s, x. out: (N,3,P,P) in [-1,1] on the CPU."""
    out, side = [], [v // model.vae.factor for v in batch["x"].shape[-2:]]
    for k in range(0, len(batch["s"]), cfg.batch):
        tokens, mask, s = (batch[key][k:k + cfg.batch].to(ranks.device) for key in ("tokens", "mask", "s"))
        with ranks.autocast():
            c = model.summarizer(tokens, mask, s).float()
            z = model.sample(torch.zeros_like(c) if null else c, side, 1.0 if null else cfg.guidance, cfg.steps,
                             cfg.seed, cfg.sampler, cfg.end, first=k)
            out.append(model.decode(z).float().clamp(-1, 1).cpu())
    return torch.cat(out)


def scales_of(cfg, pyramids):
    there = [s for s in range(pyramids.scales) if pyramids.count(cfg.split, s)]
    if not there:
        raise UserError(f"{pyramids.folder} has no {cfg.split!r} images: give --split=train, or build it with some held"
                        f" out")
    if cfg.scale >= 0 and cfg.scale not in there:
        raise UserError(f"--scale={cfg.scale}: {pyramids.folder} has {cfg.split!r} patches at scales {there}")
    return there if cfg.scale < 0 else [cfg.scale]


def show(model, pyramids, cfg, ranks):
    """Write every drawn patch as a PNG, and a sheet of real patches above the ones drawn from their conditions."""
    out, rows, labels = Path(cfg.out), [], []
    for s in tqdm(scales_of(cfg, pyramids), desc="scales"):
        batch = fixed_batch(pyramids, cfg.split, s, cfg.n)
        x = draw_patches(model, batch, cfg, ranks)
        for i, image in enumerate(to_uint8(x).numpy()):
            with atomic(out / f"scale{s}_{i:03d}.png") as tmp:
                Image.fromarray(image).save(tmp, "PNG")
        rows += [batch["x"], x]
        labels += [f"scale {s} real", f"scale {s} drawn"]
    save_grid(out / "sheet.png", rows, labels)
    print(f"wrote {out}: {len(rows) // 2} scales x {len(rows[-1])} patches, and sheet.png (real above drawn)")


# ----- 4. Evaluation on held-out patches -----

def truth(pyramids, batch, size):
    """Tissue shares (N,4) by the region map, for toy data. The map has a quarter of the slide's resolution."""
    rows = []
    for k, s, (i, j) in zip(batch["slide"].tolist(), batch["s"].tolist(), batch["ij"].tolist()):
        with open_tensors(pyramids.folder / pyramids.slides[k]["file"]) as f:
            side = size * 2 ** s // 4
            region = f.get_tensor("region")[i * side:(i + 1) * side, j * side:(j + 1) * side]
        rows.append(torch.bincount(region.flatten().long(), minlength=4) / region.numel())
    return torch.stack(rows)


def palette_of(pyramids):
    """Mean colour of each tissue, from training patches at scale 2 and their region maps."""
    batch, regions = fixed_batch(pyramids, "train", 2, 128), []
    for k, (i, j) in zip(batch["slide"].tolist(), batch["ij"].tolist()):
        with open_tensors(pyramids.folder / pyramids.slides[k]["file"]) as f:
            side = pyramids.patch
            region = f.get_tensor("region")[i * side:(i + 1) * side, j * side:(j + 1) * side]
        regions.append(region[::4, ::4])
    return M.fit_palette(batch["x"], torch.stack(regions))


def evaluate(model, pyramids, cfg, ranks):
    """Measure drawn patches against the real ones their conditions came from; print a table, write eval.json."""
    encoder = load_encoder(pyramids.encoder, pyramids.std)

    def describe(x):  # descriptor space: what the conditions are made of, here of the patch itself
        return standardize(encoder((x + 1) / 2)[..., None, None])[..., 0, 0]
    with open_tensors(pyramids.folder / pyramids.slides[0]["file"]) as f:
        toy = "region" in f.keys()
    try:
        palette = palette_of(pyramids) if toy and pyramids.scales > 2 else None
    except UserError as err:
        palette = print(f"tissues are not measured: {err}")
    table, rows, labels = [], [], []
    for s in tqdm(scales_of(cfg, pyramids), desc="scales"):
        few = [pyramids.count(split, s) for split in (cfg.split, "train")]
        if min(few) < 3:
            print(f"scale {s} left out: {few[0]} {cfg.split} and {few[1]} training patches are too few")
            continue
        n = min(cfg.n, few[1])                 # as many on both sides of a distance
        batch, train = fixed_batch(pyramids, cfg.split, s, n), fixed_batch(pyramids, "train", s, max(n, 256))["x"]
        real, grid = batch["x"], min(2 ** s, 8)
        fake, null = draw_patches(model, batch, cfg, ranks), draw_patches(model, batch, cfg, ranks, null=True)
        with torch.no_grad(), ranks.autocast():
            z = torch.cat([model.vae.encode(x.to(ranks.device)) for x in real.split(cfg.batch)]).float()
            coded = torch.cat([model.vae.decode(x).float().cpu().clamp(-1, 1) for x in z.split(cfg.batch)])
        used = torch.bincount(model.vae.quantize(z)[1].flatten(), minlength=len(model.vae.codebook.weight))
        row = {"scale": s, "n": len(real), "layout": M.layout_fidelity(fake, real, grid),
               "layout_vae": M.layout_fidelity(coded, real, grid), "psnr_vae": M.psnr(coded, real),
               "codes_used": perplexity(used)}
        for space, feature in (("desc", describe), ("rand", M.random_features)):
            base = feature(train)
            scale = M.standard(base)   # about the mean training patch, or any two patches would look alike
            row[f"sim_{space}"], row[f"shuffled_{space}"] = M.paired_gain(scale(feature(fake)), scale(feature(real)))
            row[f"sim_{space}_vae"] = M.similarity(scale(feature(coded)), scale(feature(real)))
            axes = M.principal(base, min(16, len(base) - 1))
            sets = {name: axes(feature(x)) for name, x in (("fake", fake), ("null", null), ("vae", coded))}
            held, floor = axes(feature(real)), axes(base)[:len(real)]
            # a Fréchet distance of few samples is mostly bias: below 256, the unbiased kernel distance and its error
            measure = (lambda a, b: (M.frechet(a, b), None)) if len(real) >= 256 else M.kernel_distance
            for name, value in {"floor": floor, **sets}.items():
                row[f"dist_{space}_{name}"] = measure(value, held)
        if palette is not None:
            cell = {0: 16, 1: 16, 2: 8}.get(s, 4)   # pixels averaged before a colour counts as a tissue
            want = truth(pyramids, batch, pyramids.patch)
            for name, x in (("fake", fake), ("real", real), ("vae", coded), ("null", null)):
                row[f"tissue_{name}"] = float((M.tissue_fractions(x, palette, cell) - want).abs().mean())
            area = M.nuclei_fraction(real)
            row["nuclei_mean"] = float(area.mean())
            for name, x in (("fake", fake), ("vae", coded), ("null", null)):
                row[f"nuclei_{name}"] = float((M.nuclei_fraction(x) - area).abs().mean())
        table.append(row)
        rows, labels = rows + [real[:12], fake[:12]], labels + [f"scale {s} real", f"scale {s} drawn"]
    if not table:
        raise UserError(f"{pyramids.folder} has too few patches to measure anything: look at the pictures instead, "
                        f"without --eval")
    out = Path(cfg.out)
    save_grid(out / "sheet.png", rows, labels)
    write_text(out / "eval.json", json.dumps({"settings": vars(cfg), "rows": table}, indent=1))
    print_table(table)
    print(f"\nwrote {out}/eval.json and sheet.png; guidance {cfg.guidance}, {cfg.steps} {cfg.sampler} steps, "
          f"seed {cfg.seed}")


def print_table(table):
    """Three blocks, a row per scale. "(vae)" columns are what coding the real patch alone loses: the ceiling."""
    def cell(v):
        if v is None:
            return "-"
        if isinstance(v, tuple):
            return f"{v[0]:.3g}" + (f"±{v[1]:.2g}" if v[1] is not None else "")
        return f"{v:d}" if isinstance(v, int) else f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}"
    blocks = [("follows its condition (1 = the real patch; shuffled = other patches' conditions)",
               ["scale", "n", "layout", "layout_vae", "sim_desc", "shuffled_desc", "sim_desc_vae", "sim_rand",
                "shuffled_rand", "sim_rand_vae", "psnr_vae", "codes_used"]),
              ("distance to held-out patches (Fréchet if n >= 256, else kernel ± standard error), 16 components",
               ["scale"] + [f"dist_{sp}_{k}" for sp in ("desc", "rand") for k in ("fake", "floor", "vae", "null")])]
    if "tissue_fake" in table[0]:
        blocks.append(("mean absolute error: tissue shares against the region map; nuclei area (by colour, mean given) "
                       "against the real patch", ["scale", "tissue_fake", "tissue_vae", "tissue_real", "tissue_null",
                                                  "nuclei_fake", "nuclei_vae", "nuclei_null", "nuclei_mean"]))
    for title, keys in blocks:
        print(f"\n{title}\n" + " ".join(f"{k.replace('_', ' '):>14}" for k in keys))
        for row in table:
            print(" ".join(f"{cell(row[k]):>14}" for k in keys))


def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run:
        raise UserError("say which run: python sample_joint.py out/toy (train one with python train.py)")
    if cfg.n < 0 or cfg.seed < 0 or cfg.steps < 1 or cfg.batch < 1:
        raise UserError(f"--n={cfg.n} --seed={cfg.seed} --steps={cfg.steps} --batch={cfg.batch}: steps and batch are "
                        f"at least 1, nothing is negative")
    if cfg.end not in ("clean", "published"):
        raise UserError(f"--end={cfg.end}: known are clean, published")
    cfg.n = cfg.n or (128 if cfg.eval else 8)
    run = Path(cfg.run).parent if Path(cfg.run).is_file() else Path(cfg.run)
    cfg.out = cfg.out or str(run / ("eval" if cfg.eval else "patches"))
    ranks = setup(cfg.device, threads=cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    info = model.info
    pyramids = Pyramids(cfg.data or info.get("data", ""), std=info.get("std"))
    if pyramids.scales > model.summarizer.cfg.scales or pyramids.patch != info.get("patch"):
        raise UserError(f"{pyramids.folder} has {pyramids.scales} scales of {pyramids.patch}-pixel patches, the run "
                        f"was trained on {model.summarizer.cfg.scales} of {info.get('patch')}: build it with these")
    if pyramids.embed_dim != model.summarizer.cfg.embed_dim or pyramids.encoder != info.get("encoder"):
        raise UserError(f"{pyramids.folder} was embedded with {pyramids.encoder!r} ({pyramids.embed_dim} numbers), the "
                        f"run with {info.get('encoder')!r} ({model.summarizer.cfg.embed_dim}): give its own data")
    (evaluate if cfg.eval else show)(model, pyramids, cfg, ranks)


if __name__ == "__main__":
    cli(main)
