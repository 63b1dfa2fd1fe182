"""One image and nothing else: infer the conditions that explain it, draw variations, super-resolve it (Z §4.4, S8.3).

    python invert.py out/toy --image=photo.png --scale=2                    # 4 times as large, down to scale 0
    python invert.py out/toy --image=photo.png --scale=2 --sr=2 --variations=4 --out=DIR

The embeddings of its base tiles are those under which the frozen denoiser explains it best. With them the fine image
is drawn by joint sampling, the given one its fixed constraint. Any size will do.

in:  an image at a known scale   out: DIR/sr.png, e.safetensors (for sample_joint.py --reference), sheet.png, variations
run: as above     read next: sr_table.py
"""
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UserError, cli, configure, generator, save_grid, save_png, save_tensors, setup, to_uint8
from data import Pyramids
from diffusion import ZoomLDM
from sample_joint import GUIDES, Resize, sample_levels
from summarizer import pack_grid, standardize

KINDS = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "I", "I;16", "I;16B")  # of pixels, read

FIRST, LAST = 950, 50   # time steps, linearly from one to the other (Z S8.3), as are the 200 of them
LR = 0.1                # of Adam, from noise; published notebook, Z is silent, as for the next
PRIOR = 0.05            # weight of the mean cosine of all pairs of embeddings, before they are standardised
LR_NEAR = 0.0003        # from a start that is nearly right; ours, measured: more explains little better, loses cells


@dataclass
class Config:
    run: str = ""              # run folder (or an ema.safetensors)
    image: str = ""            # the image: anything Pillow reads
    data: str = ""             # data folder, should a proxy have to be fitted; default: what the run was trained on
    scale: int = -1            # its scale: 0 = finest the run knows, each +1 half the resolution
    sr: int = 0                # how many times larger, a power of 2; 0 = down to scale 0, 1 = not at all
    out: str = ""              # folder; default RUN/invert
    condition: str = "infer"   # from the image; gt: from --reference; null: none, the constraint alone
    reference: str = ""        # for gt: the true fine image, or its grid of embeddings (.safetensors)
    variations: int = 0        # images to draw at the same scale from the same conditions, and their cells at scale 0
    back_project: bool = True  # end with the nearest image whose reduction is exactly the input
    start: str = ""            # of the inference: enlarged or noise (as published); see `beginning`
    invert_steps: int = 200    # of the inference (Z S8.3)
    steps: int = 50            # of sampling
    guidance: float = 2.0      # of the variations: eps_null + guidance (eps_cond - eps_null)
    sr_guidance: float = 1.0   # of super-resolution: 1 is none, for the image itself guides
    guide: str = "x0"          # how the image constrains the sample: see sample_joint.GUIDES
    lam: float = 0.3           # share of the misfit taken away at every step
    A: str = "bicubic"         # how the input came from the fine image: bicubic, or box, as pyramids are made
    seed: int = 0
    batch: int = 8             # windows per network call of the inference; sampling takes 8 times as many
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 where the device has it and no difference is taken


# ----- 1. Inversion -----

def patch_of(model, x):
    """Side of a patch in pixels; where a published checkpoint does not say, 256, or for a smaller image as many whole
    blocks of those that the networks halve as it holds."""
    block = model.vae.factor * 2 ** (len(model.unet.cfg.mult) - 1)
    return model.info.get("patch") or max(min(256, *x.shape[-2:]) // block, 1) * block


def per_token(u):
    """Standardise every embedding of u (B,E,h,w) by itself, whatever the sides."""
    return standardize(u.flatten(2).movedim(2, 1)[..., None, None])[..., 0, 0].movedim(1, 2).unflatten(2, u.shape[2:])


def beginning(model, x, cells, s, seed, start=""):
    """Embeddings to begin with (B,E,*cells), and Adam's rate. noise: N(0,1) (published notebook). enlarged: what the
    run's encoder says of the enlarged image, the default if it needs no weights, or they lie where they lay for the
    build. deviates: noise stays wherever the denoiser does not listen at this scale, but at the finest it may."""
    from slides.encoders import ENCODERS, FREE, load_encoder
    info = model.info
    known = info.get("encoder") in (ENCODERS if info.get("weights") and Path(info["weights"]).is_file() else FREE)
    if start not in ("", "enlarged", "noise") or start == "enlarged" and not known:
        raise UserError(f"--start={start}: give noise; enlarged needs the run's encoder, with its weights where they "
                        f"lay for the build")
    if start == "noise" or not known:
        u = torch.randn(1, model.summarizer.cfg.embed_dim, *cells, generator=generator(seed))
        return u.repeat(len(x), 1, 1, 1), LR
    encoder = load_encoder(info["encoder"], info["std"], info.get("weights"))
    P, A = patch_of(model, x), Resize(2 ** s)
    high, wide = (A.along(n * A.factor, x.double()) for n in x.shape[-2:])
    rows = []
    for i in range(cells[0]):  # a row of tiles at a time: the enlarged image is larger than the input by 4^s
        strip = A.factor ** 2 * (high[:, i * P:(i + 1) * P].T @ x.double() @ wide)
        tiles = strip.float().clamp(-1, 1).unflatten(3, (-1, P)).movedim(3, 1)          # (B,Gw,3,P,P)
        rows.append(torch.stack([encoder((t + 1) / 2) for t in tiles]))                 # (B,Gw,E)
    return per_token(torch.stack(rows, 1).movedim(-1, 1)), LR_NEAR                      # (B,E,Gh,Gw)


def eps_error(model, e, s, z, t, eps):
    """Squared error (B,) of the noise estimate at time t under conditions e (B,E,k,k), differentiable in e."""
    tokens, mask = (torch.stack(v) for v in zip(*map(pack_grid, standardize(e))))
    c = model.summarizer(tokens, mask, torch.full((len(e),), s, device=z.device))
    t, eps = torch.full((len(z),), t, device=z.device), eps.expand_as(z)
    return (model.eps(model.schedule.q_sample(z, t, eps), t, c) - eps).square().mean((1, 2, 3))


def alike(u):
    """Mean cosine over all pairs of embeddings of each grid, (B,); of the unit vectors' mean, the square. Z S8.3."""
    return F.normalize(u.flatten(2), dim=1).mean(2).square().sum(1)


def invert(model, x, s, steps=200, seed=0, batch=8, start=""):
    """Infer the embeddings of the base tiles under an image: Adam on the Summarizer's input, all networks frozen.

    in:  x (3,H,W) or (B,3,H,W) in [-1,1] at scale s, sides at least a patch and multiples of a tile, patch / 2^s;
    larger images are seen through windows that share a quarter of their tiles; batch: windows per network call. Call it
    under autocast for bf16.
    out: e (E,k,k), k = 2^s, or (B,E,k,k), each embedding standardised; more of them for larger images. Depends on the
    seed, not on what else is in the batch. raises: ValueError for another size or scale. source: Z S8.3; what it leaves
    open, the published notebook. deviates: that takes alpha_bar at t - 1, and cannot pool grids over 8x8.
    """
    if x.ndim == 3:
        return invert(model, x[None], s, steps, seed, batch, start)[0]
    if x.ndim != 4 or not x.is_floating_point() or not x.isfinite().all() or steps < 0 or seed < 0:
        raise UserError(f"got {tuple(x.shape)} {x.dtype}, steps={steps}, seed={seed}: give images (B,3,H,W) of finite "
                        f"numbers in [-1,1], steps and seed of 0 or more")
    x, P, k, device = x.float(), patch_of(model, x), 2 ** s, model.unet.conv_out.weight.device
    if not 0 <= s < model.summarizer.cfg.scales or P >> s < 1:
        raise UserError(f"scale {s}: the model knows 0 to {model.summarizer.cfg.scales - 1}, and a base tile of its "
                        f"patches of {P} must keep a pixel")
    tile, (H, W) = P >> s, x.shape[2:]
    if x.shape[1] != 3 or min(H, W) < P or H % tile or W % tile:
        raise UserError(f"got images of shape {tuple(x.shape)}: at scale {s} give RGB of sides that are multiples of "
                        f"{tile} and at least {P}, as invert.to_tiles makes them")
    from large.ranks import open_canvas
    canvas = open_canvas(H // tile, W // tile, k, max(k // 4, min(k - 1, 1)), batch=batch)
    jobs = [(b, i, j) for b in range(len(x)) for i, j in canvas.ij]
    jobs = [jobs[n:n + batch] for n in range(0, len(jobs), batch)]
    with torch.no_grad():  # un-quantised
        zs = [model.encode(torch.stack([x[b, :, i * tile:i * tile + P, j * tile:j * tile + P] for b, i, j in part])
                           .to(device)).float() for part in jobs]
    u, lr = beginning(model, x.cpu(), (canvas.h, canvas.w), s, seed, start)
    u = u.to(device).requires_grad_()                                                   # (B,E,Gh,Gw)
    optimizer, times = torch.optim.Adam([u], lr), torch.linspace(FIRST, LAST, steps).long().tolist()
    with torch.enable_grad(), tqdm(times, desc="invert", leave=False) as bar:
        for n, t in enumerate(bar):
            eps = torch.randn(1, *zs[0].shape[1:], generator=generator(seed, n + 1)).to(device)
            ab = float(model.schedule.alpha_bar[t])
            grad, total = torch.zeros_like(u), torch.zeros((), device=device)
            for part, z in zip(jobs, zs):
                cut = torch.stack([u[b, :, i:i + k, j:j + k] for b, i, j in part])      # (n,E,k,k)
                loss = ab ** 0.5 * (1 - ab) * eps_error(model, per_token(cut), s, z, t, eps) - PRIOR * alike(cut)
                grad += torch.autograd.grad(loss.sum(), u)[0]
                total += loss.detach().sum()
            u.grad = canvas.share(grad)
            optimizer.step()
            bar.set_postfix_str(f"loss {float(total) / sum(map(len, jobs)):.4f}", refresh=False)
    return per_token(u.detach())


# ----- 2. Super-resolution -----

def to_tiles(x, s, patch):
    """Mirror an image (...,H,W) beyond its lower and right border, up to whole tiles and at least a patch."""
    tile = max(patch >> s, 1)
    more = [max(patch, -(-n // tile) * tile) - n for n in x.shape[-2:]]
    pad = [(0, 0)] * (x.ndim - 2) + [(0, n) for n in more]
    return torch.from_numpy(np.pad(x.cpu().numpy(), pad, "symmetric")).to(x)  # unlike torch's, any number of times


def paint(model, condition, side, s, y=None, factor=0, *, overlap=None, guidance=2.0, steps=50, seed=0, guide="x0",
          lam=0.3, kind="bicubic", proxy=None, batch=64, patch=0):
    """Draw a canvas of (height, width) = side pixels at scale s that reduces to y (1,3,h,w), if that is given.
    in: condition, see large.windows.contexts; patch, as trained if 0; the rest, sample_levels.
    out: (1,3,height,width) in [-1,1]."""
    from large.windows import decode_strips, prepare
    window = (patch or model.info.get("patch", 256)) // model.vae.factor
    level, = prepare(model, condition, side, [s], window // 4 if overlap is None else overlap, seed=seed, batch=batch,
                     patch=patch, guidance=1.0 if condition is None else guidance, proxy=proxy)
    level.A, level.y = Resize(factor or 1, kind), y
    sample_levels([level], model.schedule, steps=steps, lam=lam, guide=guide, end="clean")
    around = 0 if overlap == 0 else window // 2  # of the neighbours, as in large.command.pixels
    with torch.no_grad():
        return torch.cat(list(decode_strips(model.decode, level.z, window + around, around)), 2)


def project(A, x, y, rounds=20):
    """The image nearest to x (...,H,W) that A makes y of: x + A^T (A A^T)^-1 (y - A x), in [-1,1], like x.

    Clipping takes a little of it back, so it goes to and fro; a y that A cannot make of [-1,1], such as hard edges
    from black to white, is met as nearly as that can.
    """
    dtype = torch.float32 if x.is_mps else torch.float64
    out, y = x.to(dtype), y.to(x.device, dtype)
    rows, columns = (A.along(n, out) for n in x.shape[-2:])
    left, right = (torch.linalg.solve(m @ m.T, m) for m in (rows, columns))
    for _ in range(rounds):
        out = (out + left.T @ (y - A.down(out)) @ right).clamp(-1, 1)
    return out.to(x)


def super_resolve(model, x, s, target=0, condition="infer", e=None, back=True, seed=0, kind="bicubic", invert_steps=200,
                  start="", guidance=1.0, **options):
    """Draw an image at scale `target` that looks like x at scale s: joint sampling, x its fixed constraint.

    in:  x (3,H,W) or (B,3,H,W) in [-1,1], any size; condition: infer; gt, with e (E,Gh,Gw) the true embeddings of its
    base tiles (or (B,E,Gh,Gw)); null; back: end with `project`; options as for `paint`.
    out: as x, 2^(s-target) times as large. raises: ValueError for a target that is not finer. source: Z §4.4.
    """
    from large.windows import Grid
    batch, factor = x[None] if x.ndim == 3 else x, 2 ** max(s - target, 0)
    if not 0 <= target < s:
        raise UserError(f"from scale {s} to {target}: the target must be finer than the image, and 0 is the finest")
    if condition not in ("infer", "gt", "null") or condition == "gt" and e is None:
        raise UserError(f"--condition={condition}: known are infer, null, and gt, which takes the true embeddings")
    patch = patch_of(model, x)
    whole = to_tiles(batch, s, patch)
    if condition == "infer" and e is None:
        e = invert(model, whole, s, invert_steps, seed, start=start)
    side, out = [n * factor for n in whole.shape[2:]], []
    device = model.unet.conv_out.weight.device
    for n, y in enumerate(whole.to(device)):
        grid = None if condition == "null" else Grid((e if e.ndim == 3 else e[n]).to(device))
        free = paint(model, grid, side, target, y[None], factor, seed=seed, kind=kind, patch=patch, guidance=guidance,
                     **options)
        free = free[..., :batch.shape[2] * factor, :batch.shape[3] * factor].to(x)
        out.append(project(Resize(factor, kind), free, batch[n:n + 1]) if back else free)
    return out[0][0] if x.ndim == 3 else torch.cat(out)


def agreement(x, y, kind="bicubic"):
    """PSNR of A x, with x as it would be written in 8 bits, to y."""
    from experiments import metrics as M
    rounded = to_uint8(x).movedim(-1, -3) / 127.5 - 1
    return M.psnr(Resize(x.shape[-1] // y.shape[-1], kind).down(rounded.double()), y.double())


# ----- 3. The command -----

def read_image(path):
    """The image (3,H,W) in [-1,1], turned as its EXIF says; grey becomes RGB, a fourth band is left out, 16 bits are
    scaled from 0..65535. raises: UserError if it cannot be read."""
    if not Path(path).is_file():
        raise UserError(f"--image={path}: no such file; give the image to begin with")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*[Tt]runcated")  # Pillow only warns of a TIFF with cut tables
            image = Image.open(path)
            image.load()
    except Exception as err:  # Pillow's decoders raise nearly anything on damaged files
        raise UserError(f"{path} cannot be read ({type(err).__name__}: {err}): it is damaged, cut short or of an "
                        f"unknown kind; convert it to PNG, JPEG or TIFF") from err
    if image.mode not in KINDS:
        raise UserError(f"{path} has pixels of kind {image.mode!r}, which do not show as RGB: convert it first")
    image = ImageOps.exif_transpose(image)
    deep = image.mode.startswith("I")
    pixels = torch.from_numpy(np.asarray(image if deep else image.convert("RGB")).astype(np.float32))
    if deep and not 0 <= pixels.min() <= pixels.max() <= 65535:
        raise UserError(f"{path} has grey levels from {pixels.min():.0f} to {pixels.max():.0f}: convert it to 16 bits")
    return (pixels / 257).expand(3, -1, -1) / 127.5 - 1 if deep else pixels.movedim(-1, 0) / 127.5 - 1


def check(cfg, known):
    """Check what was asked for. out: the target scale. raises: UserError."""
    if not 0 <= cfg.scale < known:
        raise UserError(f"--scale={cfg.scale}: say at which scale the image is, 0 (finest) to {known - 1} for this run")
    if cfg.scale == 0 and cfg.sr != 1 and (cfg.sr or not cfg.variations):
        raise UserError("--scale=0 is the finest scale, so nothing finer can be drawn: give the --scale that the image "
                        "really has, or --sr=1 --variations=4")
    factor = cfg.sr or 2 ** cfg.scale
    if factor not in [2 ** n for n in range(cfg.scale + 1)]:
        raise UserError(f"--sr={cfg.sr}: from --scale={cfg.scale} give a power of 2 up to {2 ** cfg.scale}")
    if min(cfg.steps, cfg.invert_steps, cfg.batch) < 1 or min(cfg.seed, cfg.variations) < 0:
        raise UserError(f"--steps={cfg.steps} --invert_steps={cfg.invert_steps} --batch={cfg.batch} --seed={cfg.seed} "
                        f"--variations={cfg.variations}: the first three are at least 1, nothing is negative")
    if cfg.A not in ("bicubic", "box") or cfg.condition not in ("infer", "gt", "null") or cfg.guide not in GUIDES:
        raise UserError(f"--A={cfg.A} --condition={cfg.condition} --guide={cfg.guide}: known are bicubic, box; infer, "
                        f"gt, null; {', '.join(GUIDES)}")
    if (cfg.condition == "gt") != bool(cfg.reference) or cfg.condition == "null" and cfg.variations:
        raise UserError("--condition=gt needs --reference=FILE, the true fine image or its embeddings, and nothing "
                        "else does; --condition=null has nothing to draw --variations from")
    if cfg.condition == "null" and factor == 1:
        raise UserError("--sr=1 --condition=null leaves nothing to draw: take --sr=2 or more")
    return cfg.scale - factor.bit_length() + 1


def main(argv):
    from large import proxy as proxies
    from large.command import Settings
    from large.reference import load_grid
    from large.windows import Grid
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run:
        raise UserError("say which run: python invert.py out/toy --image=FILE --scale=2")
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    folder = Path(cfg.run).parent if Path(cfg.run).is_file() else Path(cfg.run)
    model, out, s = ZoomLDM.from_run(cfg.run).to(ranks.device), Path(cfg.out or folder / "invert"), cfg.scale
    target, x = check(cfg, model.summarizer.cfg.scales), read_image(cfg.image)
    (h, w), P, factor, proxy, e = x.shape[1:], patch_of(model, x), 2 ** (s - target), None, None
    whole = to_tiles(x, s, P)
    if min(h, w) < P and ranks.rank == 0:
        print(f"{cfg.image}, {w} x {h} pixels, is smaller than a tile of {P}: reflect-padded, and cut again in the end")
    if factor > 1 and "proxy" in cfg.guide:
        data = cfg.data or model.info.get("data", "")
        known = cfg.data or (Path(data) / "index.json").is_file()  # asked for only if the proxy must be fitted
        pyramids = Pyramids(data, std=model.info.get("std")) if known else None
        proxy = proxies.load(folder, model, pyramids, ranks)
    cells = tuple(math.ceil(n * 2 ** s / P) for n in (h, w))
    if cfg.condition == "gt":
        e = load_grid(Settings(reference=cfg.reference), model, None, cells).e
    sampling = dict(steps=cfg.steps, batch=8 * cfg.batch)
    with ranks.autocast():
        if cfg.condition == "infer":
            e = invert(model, whole, s, cfg.invert_steps, cfg.seed, cfg.batch, cfg.start).cpu()
        free = dict(guidance=cfg.guidance, patch=P, **sampling)
        varied = [(paint(model, Grid(e), whole.shape[1:], s, seed=cfg.seed + n, **free)[..., :h, :w],
                   paint(model, Grid(e), [P * k for k in cells], 0, seed=cfg.seed + n, overlap=0, **free))
                  for n in range(cfg.variations)]  # the image, and below every cell a patch of its own
        sr = None if factor == 1 else super_resolve(model, x, s, target, cfg.condition, e, False, cfg.seed, cfg.A,
                                                    guidance=cfg.sr_guidance, guide=cfg.guide, lam=cfg.lam, proxy=proxy,
                                                    **sampling)
    if ranks.rank > 0:
        return ranks.barrier()
    if e is not None:
        save_tensors(out / "e.safetensors", {"e": e.movedim(0, -1)}, {"image": cfg.image, "scale": s})
    for n, images in enumerate(varied):
        for name, v in zip(("variation", "cells"), images):
            save_png(out / f"{name}_{n}.png", to_uint8(v[0]).numpy())
    if varied:
        save_grid(out / "variations.png", [torch.cat([x[None], *(v.cpu() for v, _ in varied)])])
    if sr is not None:
        said = f"{agreement(sr[None], x[None], cfg.A):.1f} dB"
        if cfg.back_project:
            sr = project(Resize(factor, cfg.A), sr, x)
            said += f", back-projected {agreement(sr[None], x[None], cfg.A):.1f} dB"
        save_png(out / "sr.png", to_uint8(sr).numpy())
        nearest = x.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        save_grid(out / "sheet.png", [torch.stack([nearest, Resize(factor).up(x).clamp(-1, 1), sr])])
        print(f"{w} x {h} -> {sr.shape[2]} x {sr.shape[1]} pixels; reduced again, it agrees with the input to {said}; "
              f"sheet.png shows input, bicubic, result")
    written = ["e.safetensors"] * (e is not None) + ["sr.png", "sheet.png"] * (sr is not None)
    written += [f"{name}_{n}.png" for name in ("variation", "cells") for n in range(cfg.variations)]
    print(f"wrote {out}: {', '.join(written + ['variations.png'] * bool(varied))}")
    ranks.barrier()


if __name__ == "__main__":
    cli(main)
