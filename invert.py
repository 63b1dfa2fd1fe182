"""One image and nothing else: infer the conditions that explain it, and enlarge it with them (Z §4.4, S8.3).

    python invert.py out/toy --image=photo.png --scale=2          4 times as large, down to scale 0
    python invert.py out/toy --image=photo.png --scale=2 --sr=2 --variations=4 --out=DIR

Its conditions are the embeddings under which the frozen denoiser explains it best. With them a finer image is
drawn by joint sampling, the given one its fixed constraint. The command is in large/enlarge.py.

in:  an image at a known scale   out: DIR/sr.png, e.safetensors, sheet.png, variations     read next: mil.py
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError, cli, generator
from sample_joint import Resize, sample_levels, starts
from summarizer import standardize, summarized

# ----- 1. Inversion: conditions from one image (Z S8.3) -----

FIRST, LAST = 950, 50   # time steps, linearly from one to the other (Z S8.3), as are the 200 of them
LR = 0.1                # of Adam, from noise; published notebook, Z is silent, as for the next
PRIOR = 0.05            # weight of the mean cosine of all pairs of embeddings, before they are standardised

def patch_of(model, x):
    """Side of a patch in pixels. Published models do not say it: 256, or of a smaller image what they can halve."""
    if model.info.get("patch"):
        return model.info["patch"]
    block = model.vae.factor * 2 ** (len(model.unet.cfg.mult) - 1)
    blocks = min(256, *x.shape[-2:]) // block
    return max(blocks, 1) * block

def per_token(u):
    """Give each embedding of u (B,E,h,w) mean 0 and deviation 1: as `standardize` does, but of any sides."""
    mean, deviation = u.mean(1, keepdim=True), u.std(1, keepdim=True)
    return (u - mean) / (deviation + 1e-8)

def eps_error(model, e, s, z, t, eps):
    """Squared error (B,) of the noise estimate at time t under conditions e (B,E,k,k). Gradients reach e."""
    c = summarized(model.summarizer, standardize(e), s)     # (B,65,D)
    t = torch.full((len(z),), t, device=z.device)
    z_t = model.schedule.q_sample(z, t, eps.expand_as(z))
    error = model.eps(z_t, t, c) - eps
    return error.square().mean((1, 2, 3))

def alike(u):
    """Mean cosine over all pairs of embeddings of each grid, (B,). source: Z S8.3."""
    units = F.normalize(u.flatten(2), dim=1)                # (B,E,k k)
    mean = units.mean(2)
    return mean.square().sum(1)                             # the mean over pairs is the mean's square

def check_image(model, x, s, steps):
    """raises: UserError unless x (B,3,H,W) is what `invert` takes."""
    P, known = patch_of(model, x), model.summarizer.cfg.scales
    tile = P >> s if 0 <= s < known else 0
    if tile == 0:
        raise UserError(f"scale {s}: the model knows 0 to {known - 1}, and its tiles must keep a pixel there")
    numbers = x.is_floating_point() and x.isfinite().all()
    whole = all(n >= P and n % tile == 0 for n in x.shape[2:])
    if x.ndim != 4 or x.shape[1] != 3 or not numbers or not whole or steps < 0:
        raise UserError(f"got {tuple(x.shape)} {x.dtype}, steps={steps}: at scale {s} give (B,3,H,W) of finite numbers "
                        f"in [-1,1], sides multiples of {tile} and at least {P} (invert.to_tiles makes them so), "
                        f"and steps of 0 or more")

def window_jobs(images, cells, k, batch):
    """Windows of k x k tiles over the cells (rows, columns) of every image; neighbours share a quarter.
    out: lists of at most `batch` places (image, row, column)."""
    overlap = max(k // 4, min(k - 1, 1))
    rows, columns = (starts(n, k, overlap) for n in cells)
    places = [(b, i, j) for b in range(images) for i in rows for j in columns]
    return [places[n:n + batch] for n in range(0, len(places), batch)]

def cut(x, places, side):
    """The squares of x (B,C,H,W) at places (image, row, column): (n,C,side,side)."""
    return torch.stack([x[b, :, i:i + side, j:j + side] for b, i, j in places])

def invert(model, x, s, steps=200, seed=0, batch=8, start=""):
    """Infer the embeddings of the base tiles under an image: Adam on the Summarizer's input, all else frozen.
    in:  x (3,H,W) or (B,3,H,W) in [-1,1] at scale s, sides at least a patch and multiples of a tile, patch/2^s;
         larger images are seen through windows; batch: windows per network call; start: see large/enlarge.py.
         Call it under autocast for bf16.
    out: e (E,k,k), k = 2^s, or (B,E,k,k), each embedding standardised; more for larger images. Depends on the
         seed, not on what else is in the batch. raises: ValueError for another size or scale.
    source: Z S8.3; what it leaves open, the published notebook. deviates: that takes alpha_bar at t - 1, and
    cannot pool grids over 8x8."""
    from large.enlarge import beginning
    if x.ndim == 3:
        return invert(model, x[None], s, steps, seed, batch, start)[0]
    check_image(model, x, s, steps)
    x, P, k = x.float(), patch_of(model, x), 2 ** s
    tile, device = P // k, model.unet.conv_out.weight.device
    cells = x.shape[2] // tile, x.shape[3] // tile
    jobs, zs = window_jobs(len(x), cells, k, batch), []
    for job in jobs:
        windows = cut(x, [(b, i * tile, j * tile) for b, i, j in job], P)  # (n,3,P,P)
        with torch.no_grad():
            z = model.encode(windows.to(device))            # un-quantised
        zs.append(z.float())
    u, lr = beginning(model, x.cpu(), cells, s, seed, start)
    u = u.to(device).requires_grad_()                       # (B,E,*cells)
    optimizer = torch.optim.Adam([u], lr)
    times = torch.linspace(FIRST, LAST, steps).long().tolist()
    for n, t in enumerate(tqdm(times, desc="invert")):
        eps = torch.randn(1, *zs[0].shape[1:], generator=generator(seed, n + 1)).to(device)
        ab = float(model.schedule.alpha_bar[t])
        weight = ab ** 0.5 * (1 - ab)
        optimizer.zero_grad()
        for job, z in zip(jobs, zs):
            with torch.enable_grad():
                e = cut(u, job, k)                          # (n,E,k,k)
                error = eps_error(model, per_token(e), s, z, t, eps)  # (n,)
                loss = weight * error - PRIOR * alike(e)
                loss.sum().backward()                       # gradients of all windows add up
        optimizer.step()
    return per_token(u.detach())

# ----- 2. Super-resolution: the image as a fixed constraint (Z §4.4) -----

def to_tiles(x, s, patch):
    """Mirror an image (...,H,W) beyond its lower and right border, up to whole tiles and at least a patch."""
    tile = max(patch >> s, 1)
    pad = [(0, 0)] * (x.ndim - 2)
    for n in x.shape[-2:]:
        whole = math.ceil(n / tile) * tile
        pad.append((0, max(patch, whole) - n))
    mirrored = np.pad(x.cpu().numpy(), pad, "symmetric")    # unlike torch's, any number of times
    return torch.from_numpy(mirrored).to(x)

def project(A, x, y, rounds=20):
    """The image nearest to x (...,H,W) that A makes y of: x + A^T (A A^T)^-1 (y - A x), in [-1,1], like x.
    Clipping takes a little of it back, so it goes to and fro. A y that A cannot make of [-1,1], such as hard
    edges from black to white, is met as nearly as that can."""
    out = x.float() if x.is_mps else x.double()
    y = y.to(out)
    h, w = x.shape[-2:]
    rows, columns = A.along(h, out), A.along(w, out)        # A along each side: (h/f,h), (w/f,w)
    left = torch.linalg.solve(rows @ rows.T, rows)          # (A A^T)^-1 A
    right = torch.linalg.solve(columns @ columns.T, columns)
    for _ in range(rounds):
        error = y - A.down(out)                             # (...,h/f,w/f)
        out = (out + left.T @ error @ right).clamp(-1, 1)
    return out.to(x)

def paint(model, condition, side, s, y=None, A=None, *, overlap=None, guidance=2.0, steps=50, seed=0,
          guide="x0", lam=1.0, proxy=None, batch=64, patch=0):
    """Draw a canvas of (height, width) = side pixels at scale s, of which A makes y (1,3,h,w), if given.
    in:  condition, a large.windows.Grid or None; overlap, see large.windows.prepare; patch, as trained if 0.
    out: (1,3,height,width) in [-1,1]."""
    from large.windows import decode_strips, prepare
    window = (patch or model.info.get("patch", 256)) // model.vae.factor
    guidance = 1.0 if condition is None else guidance
    level, = prepare(model, condition, side, [s], overlap, guidance=guidance, seed=seed, batch=batch,
                     guided=(300, 1000), patch=patch, proxy=proxy)  # at less noise it does little
    level.A, level.y = A, y
    sample_levels([level], model.schedule, steps=steps, lam=lam, guide=guide, end="clean")
    around = 0 if overlap == 0 else window // 2             # latents of its neighbours that a tile knows
    with torch.no_grad():
        strips = decode_strips(model.decode, level.z, window + around, around)
        return torch.cat(list(strips), 2)

def super_resolve(model, x, s, e=None, target=0, kind="bicubic", guidance=1.0, **options):
    """Draw images at scale `target` that look like x at scale s: joint sampling, x its fixed constraint.
    in:  x (B,3,H,W) in [-1,1], any size; e (B,E,Gh,Gw), embeddings of its base tiles, by `invert` or true ones;
         None: no condition, the image alone guides; kind, of A; options: see `paint`.
    out: (B,3,f H,f W), f = 2^(s-target). `project` then makes of it what reduces to x exactly.
    raises: ValueError for a target that is not finer. source: Z §4.4."""
    from large.windows import Grid
    if not 0 <= target < s:
        raise UserError(f"from scale {s} to {target}: the target must be finer than the image, and 0 or more")
    A = Resize(2 ** (s - target), kind)
    patch, device = patch_of(model, x), model.unet.conv_out.weight.device
    whole = to_tiles(x, s, patch).to(device)
    side = [n * A.factor for n in whole.shape[2:]]
    h, w = x.shape[2] * A.factor, x.shape[3] * A.factor
    images = []
    for n, y in enumerate(whole.split(1)):                  # (1,3,h,w)
        grid = None if e is None else Grid(e[n].to(device))
        fine = paint(model, grid, side, target, y, A, patch=patch, guidance=guidance, **options)
        images.append(fine[..., :h, :w].to(x))              # what was mirrored goes again
    return torch.cat(images)

def main(argv):
    from large import enlarge
    enlarge.main(argv)

if __name__ == "__main__":
    cli(main, stopped="nothing of it is kept, and the same command begins anew")
