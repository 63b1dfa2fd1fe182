"""Draw images with a trained run: patches at any scale, or one large image together with its coarse views.

    python sample_joint.py out/toy                          # 8 patches a scale: PNGs and a contact sheet
    python sample_joint.py out/toy --eval                   # how good they are, on held-out slides
    python sample_joint.py out/toy --size=1024 --context=4 --out=large.png
    python sample_joint.py out/toy --size=512,1024 --context=3,1 --reference=photo.png --out=large.tif
    python sample_joint.py out/toy --condition=cdm          # no image behind them (python cdm.py train out/toy first)
    python sample_joint.py out/toy paper --size=512 --context=3     # the published constants
    torchrun --standalone --nproc_per_node=2 sample_joint.py out/toy --size=1024

in:  a run folder; conditions from its held-out slides, a reference image, an embedding grid, or the models of cdm.py
out: RUN/patches/*.png, or one .png, .tif (pyramid) or .dzi (DeepZoom folder)     read next: README.md
"""
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common import (
    UserError,
    atomic,
    cli,
    configure,
    fingerprint,
    generator,
    load_tensors,
    save_grid,
    save_png,
    save_tensors,
    setup,
    to_uint8,
)
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM, ddim_step, ddim_timesteps, noise_levels, to_eps, to_x0
from summarizer import pack_grid, standardize

# ----- 1. The down-sampling operator A (Z Eq. 1) -----

def shrink_matrix(n, k):
    """A in one dimension, (n/k,n) float64: Keys' cubic (a = -0.5) stretched k times, mirrored at the borders with the
    edge repeated, each row summing to 1. reference: the Resizer of the published helpers."""
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
        if not isinstance(factor, int) or factor < 1 or kind not in ("bicubic", "box"):
            raise UserError(f"factor={factor!r}, kind={kind!r}: give a whole factor of at least 1, and bicubic or box")
        self.factor, self.kind, self.cache = factor, kind, {}

    @classmethod
    @lru_cache
    def cached(cls, factor, kind="bicubic"):
        """The same operator every time, so that its matrices are made once."""
        return cls(factor, kind)

    def matrix(self, n, like):
        """A in one dimension for sides of n pixels, (n/factor,n), in the dtype and on the device of `like`."""
        if not like.is_floating_point():
            raise UserError(f"got an image of {like.dtype}: weights are fractions, give x.float()")
        key = n, like.dtype, like.device
        if key not in self.cache:
            box = torch.eye(n // self.factor, dtype=torch.float64).repeat_interleave(self.factor, 1) / self.factor
            self.cache[key] = (box if self.kind == "box" else shrink_matrix(n, self.factor)).to(like)
        return self.cache[key]

    def part(self, n, a, b, like):
        """The columns a:b of A, and only its rows that they touch: (first row, matrix (rows,b-a))."""
        key = n, a, b, like.dtype, like.device
        if key not in self.cache:
            # far from the borders A repeats itself every factor pixels: cut it out of one of a small image
            lo, hi = max(0, a // self.factor - 2), min(n, b) // self.factor + 3
            first, last = max(0, lo - 4) * self.factor, min(n, (hi + 4) * self.factor)
            small = self.matrix(last - first, torch.zeros((), dtype=torch.float64))
            del self.cache[last - first, torch.float64, torch.device("cpu")]
            hi = min(hi, n // self.factor)
            self.cache[key] = lo, small[lo - first // self.factor:hi - first // self.factor,
                                        a - first:b - first].to(like)
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

    def project(self, x, y, rounds=20):
        """The image nearest to x (...,H,W) that A makes y of: x + A^T (A A^T)^-1 (y - A x), in [-1,1], like x.

        Clipping takes a little of it back, so it goes to and fro; a y that A cannot make of [-1,1], such as hard edges
        from black to white, is met as nearly as that can.
        """
        out, y = x.to(exact(x)), y.to(x.device, exact(x))
        left, right = (torch.linalg.solve(m @ m.T, m) for m in (self.matrix(n, out) for n in x.shape[-2:]))
        for _ in range(rounds):
            out = (out + left.T @ (y - self.down(out)) @ right).clamp(-1, 1)
        return out.to(x)

    def add_down(self, total, x, i, j):
        """Add A of an image that is x (1,C,a,b) at pixel (i,j) and zero elsewhere to total (1,C,h,w)."""
        (p, rows), (q, columns) = (self.part(n * self.factor, at, at + side, x) for n, at, side in
                                   zip(total.shape[-2:], (i, j), x.shape[-2:]))
        total[..., p:p + len(rows), q:q + len(columns)] += rows @ x @ columns.T

    def up_part(self, y, i, j, side):
        """The pixels i:i+side[0], j:j+side[1] of up(y), from those of y they depend on."""
        (p, rows), (q, columns) = (self.part(n * self.factor, at, at + size, y) for n, at, size in
                                   zip(y.shape[-2:], (i, j), side))
        return self.factor ** 2 * (rows.T @ y[..., p:p + len(rows), q:q + len(columns)] @ columns)


# ----- 2. Windows on a canvas, over ranks -----

def starts(n, window, overlap=0):
    """Where windows begin along a side of n; neighbours share `overlap`, the last two perhaps more."""
    return [*range(0, n - window, window - overlap), n - window]


def usual_overlap(window):
    """What windows share by default: nearly a quarter of a side, and odd. A U-Net that halves its windows leaves a
    faint lattice of every 2, 4, ... latents; windows an even number apart would lay all theirs on one another."""
    return max(window // 4 - 1, 0) | 1


def ramps(n, side, overlap, fade=True):
    """Weights of windows along a line, {start: (side,)}, that sum to 1 everywhere: neighbours fade into each other over
    `overlap`, or, without fade, count the same."""
    rise = (torch.arange(overlap) + 0.5) / max(overlap, 1)
    weights, total = {}, torch.zeros(n)
    for a in starts(n, side, overlap):
        w = weights[a] = torch.ones(side)
        if fade and a > 0:
            w[:overlap] = rise
        if fade and a + side < n:
            w[side - overlap:] = w[side - overlap:].minimum(rise.flip(0))
        total[a:a + side] += w
    return {a: w / total[a:a + side] for a, w in weights.items()}


def exact(like):
    """float64, in which sums hardly depend on their order: joint sampling would blow the difference between one rank
    and several up to something one can see. (MPS has no float64.)"""
    return like.dtype if like.device.type == "mps" else torch.float64


class Canvas:
    """Windows over a canvas of h x w latents, and this rank's share of them under torchrun.

    in:  window, a side or (height, width); overlap between neighbours, in latents; fade: let them fade into each other
    instead of averaging them uniformly (as L does), which leaves a step at the border of every window; batch, windows
    per network call.
    Attributes: ij, corners of this rank's windows; lo, hi: the rows they lie on, all that this rank keeps. Rows where
    windows of several ranks overlap are exchanged by `average`. A canvas of fewer rows of windows than ranks is not
    split: every rank does the whole of it. raises: ValueError if the windows do not cover the canvas.
    """

    def __init__(self, h, w, window, overlap=0, fade=False, batch=64):
        self.h, self.w, self.batch, self.overlap, self.fade = h, w, batch, overlap, fade
        self.window = wh, ww = window if isinstance(window, tuple) else (window, window)
        if h < wh or w < ww or not 0 <= overlap < min(wh, ww):
            raise UserError(f"windows of {wh} x {ww} latents that share {overlap} do not cover a canvas of {h} x {w}: "
                            f"take a larger canvas, or a smaller overlap")
        self.lines = ramps(h, wh, overlap, fade), ramps(w, ww, overlap, fade)
        rows = list(self.lines[0])
        self.rank, self.world = ((dist.get_rank(), dist.get_world_size())
                                 if dist.is_available() and dist.is_initialized() else (0, 1))
        if len(rows) < self.world:
            self.rank, self.world = 0, 1
        mine = [rows[len(rows) * r // self.world:len(rows) * (r + 1) // self.world] for r in range(self.world)]
        self.ranges = [(at[0], at[-1] + wh) for at in mine]
        self.lo, self.hi = self.ranges[self.rank]
        self.ij = [(i, j) for i in mine[self.rank] for j in self.lines[1]]

    def own(self, z):
        """This rank's rows of a whole canvas (1,C,h,w)."""
        return z[..., self.lo:self.hi, :]

    def cut(self, z, ij):
        """Windows (n,C,window) of this rank's rows."""
        (wh, ww), lo = self.window, self.lo
        return torch.cat([z[..., i - lo:i - lo + wh, j:j + ww] for i, j in ij])

    def batches(self):
        """The corners of this rank's windows, a batch at a time."""
        return (self.ij[k:k + self.batch] for k in range(0, len(self.ij), self.batch))

    def weights(self, ij, like):
        """What windows count where they overlap, (n,1,window): over all windows they sum to 1 at every place."""
        rows, columns = self.lines
        return torch.stack([rows[i][:, None] * columns[j] for i, j in ij])[:, None].to(like)

    def total(self, fn):
        """Add up fn(corners) -> (n,C,window) where it lies, over all windows of all ranks: (1,C,rows,w)."""
        total, (wh, ww) = None, self.window
        for ij in self.batches():
            parts = fn(ij)
            if total is None:
                total = parts.new_zeros(1, parts.shape[1], self.hi - self.lo, self.w, dtype=exact(parts))
            for part, (i, j) in zip(parts, ij):
                total[0, :, i - self.lo:i - self.lo + wh, j:j + ww] += part
        return self.exchange(total).to(parts.dtype)

    def average(self, fn):
        """The weighted mean of fn(corners) over all windows. Where only one lies, its values come back exactly."""
        def weighted(ij):
            parts = fn(ij)
            return parts * self.weights(ij, parts)
        return self.total(weighted)

    def exchange(self, total):
        """Add what the windows of other ranks say of the rows this one shares with them."""
        shared = [(q, slice(max(self.lo, a) - self.lo, min(self.hi, b) - self.lo))
                  for q, (a, b) in enumerate(self.ranges) if q != self.rank and max(self.lo, a) < min(self.hi, b)]
        if shared:
            mine = [total[..., rows, :].contiguous() for _, rows in shared]
            theirs = [torch.empty_like(x) for x in mine]
            ops = [dist.P2POp(send, x, q) for send, xs in ((dist.isend, mine), (dist.irecv, theirs))
                   for x, (q, _) in zip(xs, shared)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            for x, (_, rows) in zip(theirs, shared):
                total[..., rows, :] += x
        return total

    def reduce(self, x, op="sum"):
        """Sum or maximum of a small tensor over the ranks this canvas is split over."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return x

    def whole(self, z):
        """The whole canvas (1,C,h,w) on every rank, from everyone's rows."""
        if self.world == 1:
            return z
        full = z.new_zeros(*z.shape[:2], self.h, self.w)
        end = self.ranges[self.rank + 1][0] if self.rank + 1 < self.world else self.h
        full[..., self.lo:end, :] = z[..., :end - self.lo, :]
        return self.reduce(full)


# ----- 3. Latents -> pixels, from top to bottom -----

def decode_strips(decode, z, side, overlap, batch=8):
    """Decode a canvas in tiles that know their neighbours, fading from one to the next; yields strips of pixels.

    A tile is decoded once, with half an `overlap` of real neighbours around it. The decoder's GroupNorm and attention
    look at the whole tile, so even then neighbours differ a little in tone; fading hides it and costs nothing.
    in:  z (1,C,H,W). out: strips (1,3,h,W k) in [-1,1], top to bottom. deviates: the published code decodes every pixel
    16 times (windows at a quarter of their side) and averages with a Gaussian.
    """
    h, w = z.shape[-2:]
    sides = min(side, h), min(side, w)
    rows, columns = (starts(n, s, min(overlap, s - 1)) for n, s in zip((h, w), sides))
    carry = None
    for i, after in zip(rows, [*rows[1:], h]):
        tiles = torch.cat([z[..., i:i + sides[0], j:j + sides[1]] for j in columns])
        x = torch.cat([decode(part).float() for part in tiles.split(batch)])            # (n,3,k side,k side)
        k = x.shape[-1] // sides[1]                                                     # pixels per latent
        down, across = (ramps(n * k, s * k, min(overlap, s - 1) * k) for n, s in zip((h, w), sides))
        strip = x.new_zeros(1, 3, sides[0] * k, w * k)
        for part, j in zip(x, columns):
            weight = down[i * k][:, None] * across[j * k]
            strip[0, :, :, j * k:(j + sides[1]) * k] += part * weight.to(x)
        if carry is not None:
            strip[..., :carry.shape[-2], :] += carry
        carry = strip[..., (after - i) * k:, :]
        yield strip[..., :(after - i) * k, :].clamp(-1, 1)


# ----- 4. Conditions of windows anywhere -----

def slerp(a, b, f):
    """From a to b (E,...) along the sphere, f in [0,1]; linear where they are nearly parallel. source: L §3.2."""
    if f == 0:
        return a
    cos = torch.cosine_similarity(a, b, dim=0)
    angle = cos.clamp(-1, 1).acos()
    spherical = ((1 - f) * angle).sin() / angle.sin() * a + (f * angle).sin() / angle.sin() * b
    return torch.where(cos.abs() > 0.9995, (1 - f) * a + f * b, spherical)


@dataclass
class Grid:
    """Conditions from the embeddings of a region: grid(s, i, j) -> e (E,G,G), standardised, of a window at scale s
    whose upper left corner lies at base tile (i, j). Between tiles they are interpolated, beyond the last repeated.
    in:  e (E,Gh,Gw), as data.py stores them. source: Z §3.2; L §3.2; reference: the published post-processing.
    """
    e: torch.Tensor

    def __call__(self, s, i, j):
        g, (gh, gw) = 2 ** s, self.e.shape[1:]
        rows, columns = ([min(int(at) + k, n - 1) for k in range(g + 1)] for at, n in ((i, gh), (j, gw)))
        block = self.e.float()[:, rows][:, :, columns]                                  # (E,g+1,g+1)
        block = slerp(block[:, :, :-1], block[:, :, 1:], j - int(j))                    # (E,g+1,g)
        return standardize(slerp(block[:, :-1], block[:, 1:], i - int(i)))

    def inside(self, corner, size=(1, 1)):
        shape = tuple(self.e.shape[1:])
        if min(corner) < 0 or min(size) < 1 or any(a + n > m for a, n, m in zip(corner, size, shape)):
            raise UserError(f"cells {size} at {corner} do not lie inside the {shape[0]} x {shape[1]} tiles of the "
                            f"image: count rows and columns from 0")

    def swap(self, a, b):
        """Exchange cells a and b, each (row, column). Moving cells moves what is drawn there (L §3.2). raises:
        ValueError for cells outside."""
        self.inside(a)
        self.inside(b)
        self.e = self.e.clone()
        self.e[:, [a[0], b[0]], [a[1], b[1]]] = self.e[:, [b[0], a[0]], [b[1], a[1]]]

    def paste(self, a, b, size):
        """Copy the block of `size` (rows, columns) cells at a over the one at b. raises: as swap."""
        self.inside(a, size)
        self.inside(b, size)
        block, self.e = self.e[:, a[0]:a[0] + size[0], a[1]:a[1] + size[1]].clone(), self.e.clone()
        self.e[:, b[0]:b[0] + size[0], b[1]:b[1] + size[1]] = block


# ----- 1. From the misfit of the image to a direction for the latents -----

GREY = 2 / 255  # one grey level


GUIDES = {      # how the misfit of the image is turned into a direction for z0_hat, and that into one for z_t
    "exact": ("encoder", "difference"),    # Z Algorithm S2: both by a finite difference
    "gradient": ("decoder", "gradient"),   # Z Algorithm S1: both by backpropagation; the reference for the others
    "proxy": ("proxy", "difference"),      # a small network instead of A Dec: its gradient costs next to nothing
    "x0": ("encoder", None),               # z0_hat itself is corrected, so the U-Net is asked once per step
    "x0+proxy": ("proxy", None),
}


@dataclass
class Level:
    """One scale of a joint run. eps(z (n,C,window), t (n,), ij) -> eps of windows at corners ij; canvas, its windows;
    z (1,C,rows,w), this rank's rows; factor: its pixels per pixel of the next coarser level, 0 = nothing guides it;
    y (1,3,h,w): a fixed image it must match instead of that level. eps_diff: take denoiser differences of this cheaper
    function; eps then returns (n,2C,...), its own answer and below it what eps_diff would have said."""
    eps: Callable
    canvas: Canvas
    z: torch.Tensor
    factor: int = 0
    y: torch.Tensor | None = None
    eps_diff: Callable | None = None


@contextmanager
def full_precision(device):
    """No autocast, no TF32: of a perturbation of 0.005, bf16 rounds away 79 %, TF32 and fp16 10 %."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def autocasting(device):
    """A decorator that runs a function as it would run here and now: under this autocast, if there is one."""
    on, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def decorate(fn):
        def f(*args):
            with torch.autocast(device.type, dtype, enabled=on):
                return fn(*args)
        return f
    return decorate


def see(canvas, decode, z, A, keep=None):
    """A Dec(z), window by window: (1,C,h,w), whole on every rank. keep: a dict that receives the decoded windows, which
    is the one thing here that grows with the image. raises: ValueError if A does not divide the canvas."""
    total = None
    for ij in canvas.batches():
        x = decode(canvas.cut(z, ij))                                                   # (n,3,k window)
        k = x.shape[-1] // canvas.window[1]                                             # pixels per latent
        if canvas.h * k % A.factor or canvas.w * k % A.factor:
            raise UserError(f"factor={A.factor} does not divide the canvas of {canvas.h * k} x {canvas.w * k} pixels: "
                            f"take another factor, or another size")
        if keep is not None:
            keep |= zip(ij, x)
        if total is None:
            total = x.new_zeros(1, x.shape[1], canvas.h * k // A.factor, canvas.w * k // A.factor, dtype=exact(x))
        x = x.to(total.dtype) * wide(canvas.weights(ij, total), k)
        for part, (i, j) in zip(x, ij):
            A.add_down(total, part[None], i * k, j * k)
    return canvas.reduce(total).to(z.dtype)


def wide(weights, k):
    """Weights of latents -> weights of their k x k pixels."""
    return weights.repeat_interleave(k, -1).repeat_interleave(k, -2)


def misfit(canvas, decode, z0_hat, A, target, keep=None):
    """The residual y - A Dec(z0_hat). raises: ValueError if the canvas and the target do not match."""
    view = see(canvas, decode, z0_hat, A, keep)
    if view.shape != target.shape:
        raise UserError(f"the canvas seen through A is {tuple(view.shape)}, the context {tuple(target.shape)}: the "
                        f"canvas must be factor={A.factor} times as large")
    return target - view


def err_x(canvas, A, residual, ij, x):
    """A^T r under windows at ij, whose pixels are like x (n,3,P,P). As in `see`, only the result is rounded."""
    k, r = x.shape[-1] // canvas.window[1], residual.to(exact(residual))
    parts = [A.up_part(r, i * k, j * k, x.shape[2:]) for i, j in ij]
    return torch.cat(parts).to(residual) / A.factor ** 2


def err_z_by_encoder(canvas, decode, encode, z0_hat, A, target, zeta):
    """J_E A^T r by a difference of the encoder, which stands for J_D^T A^T r (Z Eq. 3-4). zeta: the largest change of a
    pixel, or None: all that the residual asks for, up(r), which asks for no precision. out: err_z, r."""
    x = {}
    residual = misfit(canvas, decode, z0_hat, A, target, x)

    def ahead(ij):
        here = torch.stack([x[p] for p in ij]).to(z0_hat.dtype)                         # (n,3,P,P)
        e = err_x(canvas, A, residual, ij, here)
        if zeta is None:
            return (encode(here + A.factor ** 2 * e) - encode(here)).to(z0_hat.dtype) / A.factor ** 2
        size = peak(e)
        return (encode(here + zeta * e / size) - encode(here)) * size / zeta
    return canvas.average(ahead), residual


def err_z_by_gradient(canvas, decode, z0_hat, A, target):
    """J_D^T A^T r exactly, a batch of windows at a time. decode may be a stand-in, as `Proxy` is. out: err_z, r."""
    residual = misfit(canvas, decode, z0_hat, A, target)

    def back(ij):
        with torch.enable_grad():
            z = canvas.cut(z0_hat, ij).requires_grad_()
            x = decode(z)
            e = err_x(canvas, A, residual, ij, x) * wide(canvas.weights(ij, x), x.shape[-1] // z.shape[-1])
            return torch.autograd.grad(x, z, e)[0]
    return canvas.total(back), residual


def g_by_difference(level, z, z0_hat, err_z, estimate, delta, t, ab):
    """J err_z, with J the Jacobian of z0_hat(z_t), which stands for J^T err_z (Z Eq. 5-6). delta 0: without a width, by
    forward-mode differentiation, which the fused attention kernels do not know; window by window, for what ranks send
    each other carries no derivatives."""
    canvas, eps = level.canvas, level.eps_diff or level.eps
    if delta == 0:
        def along(ij):
            def conditional(part):
                return eps(part, index(t, part, part.device), ij)[:, -part.shape[1]:].to(part.dtype)
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(conditional, (canvas.cut(z, ij),), (canvas.cut(err_z, ij),))[1]
        return (err_z - (1 - ab) ** 0.5 * canvas.average(along)) / ab ** 0.5
    size = canvas.reduce(err_z.abs().max().clamp_min(1e-12), "max")
    return (estimate(z + delta / size * err_z) - z0_hat) * size / delta


def g_by_gradient(level, z, err_z, t, ab):
    """J^T err_z exactly, one batch of windows at a time."""
    canvas = level.canvas

    def back(ij):
        with torch.enable_grad():
            part = canvas.cut(z, ij).requires_grad_()
            eps = level.eps(part, index(t, part, part.device), ij)[:, :part.shape[1]]
            return torch.autograd.grad(eps, part, canvas.cut(err_z, ij) * canvas.weights(ij, z))[0]
    return (err_z - (1 - ab) ** 0.5 * canvas.total(back)) / ab ** 0.5


def index(t, like, device):
    return torch.full((len(like),), t, dtype=torch.long, device=device)


def peak(parts):
    """Largest absolute value of each window, (N,1,1,1), never zero."""
    return parts.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)


def unit(canvas, d, residual=None, floor=GREY):
    """Scale a direction to a maximum of 1 in every window (the published code does, Z does not say so); where windows
    overlap, by the average of their factors. Where the residual under a window is below `floor` everywhere the step
    fades with it, or rounding errors would be blown up to steps of full size."""
    def scale(ij):
        s = 1 / peak(canvas.cut(d, ij))                                                 # (n,1,1,1)
        if residual is not None:
            r, (wh, ww) = residual.shape[-1] / canvas.w, canvas.window                  # pixels of it per latent
            under = [residual[..., int(i * r):math.ceil((i + wh) * r), int(j * r):math.ceil((j + ww) * r)]
                     for i, j in ij]
            s = s * torch.cat([peak(x) for x in under]).div(floor).clamp_max(1)
        return s.expand(-1, 1, *canvas.window)
    return d * canvas.average(scale)


# ----- 2. Sampling -----

def check_settings(guide, normalize, inner, lam, delta, zeta, end):
    """out: lam as (first, last), normalize. raises: UserError for what means nothing; to be asked before long work."""
    if guide not in GUIDES or end not in ("clean", "published"):
        raise UserError(f"guide={guide!r}, end={end!r}: known are {', '.join(GUIDES)}; clean, published")
    if GUIDES[guide][1] and normalize == "share":
        raise UserError(f"normalize='share' with guide={guide!r}: only x0 guides know it")
    lams = tuple(lam) if isinstance(lam, (tuple, list)) else (lam, lam)
    if inner < 0 or not zeta > 0 or not delta >= 0 or len(lams) != 2 or not all(0 <= v < math.inf for v in lams):
        raise UserError(f"inner={inner}, lam={lam}, delta={delta}, zeta={zeta}: inner, lam (or its first and last) and "
                        f"delta are 0 or more, zeta is more than 0")
    if normalize not in (True, False, "share"):
        raise UserError(f"normalize={normalize!r}: known are True, False and 'share'")
    return lams, normalize if normalize == "share" else bool(normalize)


@torch.no_grad()
def sample_levels(levels, decode, encode, schedule, *, steps=50, inner=1, lam=0.5, delta=0.005, zeta=0.005,
                  guide="exact", normalize=True, callback=None, end="published", kind="bicubic", floor=GREY,
                  during=(0, math.inf), proxy=None, timesteps=None, skip=0):
    """Draw several scales of one image together, each guiding the next finer one at every step.

    in:  levels, coarse to fine, whose z are drawn over; decode, encode: latents <-> images; inner: corrections per step
    (K); lam: the size of one, or (first, last), going linearly from one to the other over the steps; normalize: what
    lam means. True: the largest change of a number of z_t (of z0_hat, for x0 guides); "share", for x0 guides: the share
    of the residual that is taken away; False: the factor of the plain gradient; delta, zeta: widths of the finite
    differences of denoiser and encoder; guide: see GUIDES; during: guide only while t lies in this range; kind, floor:
    see Resize and unit; proxy: a Proxy, by default decode itself, differentiated exactly; callback(n, t, levels,
    estimates, targets) after every step, with this rank's rows. Call it under autocast for bf16: differences are taken
    in float32 whatever surrounds them. skip: steps that are done already.
    out: levels. raises: ValueError if two levels do not match, and for widths and steps that mean nothing.
    source: Z §3.2, Eq. 3-6, Algorithms S1, S2.
    deviates: Eq. 5 adds the gradient, which climbs; this descends, as the code does.
    """
    (lams, normalize), (by, pull) = check_settings(guide, normalize, inner, lam, delta, zeta, end), GUIDES[guide]
    timesteps = ddim_timesteps(schedule.T, steps) if timesteps is None else timesteps
    ab, ab_prev = noise_levels(schedule, timesteps, end)
    fast = autocasting(levels[0].z.device)  # for whatever no difference is taken of; all else is float32

    def estimate(level, z, i, eps, precise):
        """eps, z0_hat and the z0_hat differences are taken from. Overlapping windows are averaged (L §3.2)."""
        canvas = level.canvas
        call = eps if precise else fast(eps)
        out = canvas.average(lambda ij: call(canvas.cut(z, ij), index(timesteps[i], ij, z.device), ij).to(z.dtype))
        both = [to_x0(e, z, ab[i], "eps") for e in out.split(z.shape[1], 1)]
        return out[:, :z.shape[1]], both[0], both[-1]

    with full_precision(levels[0].z.device):
        for n, i in list(enumerate(reversed(range(len(timesteps)))))[skip:]:
            step = lams[0] + (lams[1] - lams[0]) * n / max(len(timesteps) - 1, 1)
            target, estimates, targets = None, [], []
            for level in levels:
                canvas, z = level.canvas, level.z
                target = level.y if level.y is not None else target if level.factor else None
                on = inner if step and target is not None and during[0] <= timesteps[i] <= during[1] else 0
                eps, z0_hat, base = estimate(level, z, i, level.eps, on and pull == "difference")
                for k in range(on):
                    if by == "encoder":
                        A = Resize.cached(level.factor, kind)
                        whole = normalize == "share"  # then nothing small is subtracted, and bf16 will do
                        err_z, residual = err_z_by_encoder(canvas, fast(decode), fast(encode) if whole else encode,
                                                           z0_hat, A, target, None if whole else zeta)
                    else:
                        image, smaller = (proxy, proxy.factor) if by == "proxy" and proxy else (decode, 1)
                        A, aim = Resize.cached(max(level.factor // smaller, 1), kind), target
                        if level.factor < smaller:  # compare what both can be reduced to
                            aim = Resize.cached(smaller // level.factor, kind).down(target)
                        err_z, residual = err_z_by_gradient(canvas, image, z0_hat, A, aim)
                    if normalize == "share":
                        err_z = err_z * A.factor ** 2
                        if by == "proxy" and proxy:
                            err_z = torch.einsum("ij,bjhw->bihw", proxy.inverse, err_z)
                    if pull == "difference":
                        err_z = unit(canvas, err_z) if normalize is True else err_z
                        err_z = g_by_difference(level, z, base, err_z, lambda z, level=level, i=i: estimate(
                            level, z, i, level.eps_diff or level.eps, True)[-1], delta, timesteps[i], ab[i])
                    elif pull == "gradient":
                        err_z = g_by_gradient(level, z, err_z, timesteps[i], ab[i])
                    change = step * (unit(canvas, err_z, residual, floor) if normalize is True else err_z)
                    if pull is None:  # z_t stays, so eps must give way; kept, it would add every correction up again
                        z0_hat = z0_hat + change
                        eps = to_eps(z0_hat, z, ab[i], "x0")
                    else:
                        z = z + change
                        eps, z0_hat, base = estimate(level, z, i, level.eps, k < on - 1 and pull == "difference")
                level.z = ddim_step(z, z0_hat, eps, ab_prev[i])
                estimates, targets = [*estimates, z0_hat], [*targets, target]
                if level is not levels[-1]:
                    target = see(canvas, fast(decode), z0_hat, Resize.cached(1)).clamp(-1, 1)
            if callback is not None:
                callback(n, timesteps[i], levels, estimates, targets)
    return levels


def joint_sample(eps_fine, eps_ctx, encode, decode, schedule, z_T, z_T_ctx, *, window, factor, steps=50, inner=1,
                 lam=0.5, delta=0.005, zeta=0.005, overlap=0, guide="exact", normalize=True, y=None, callback=None,
                 batch=64, fade=False, **options):
    """Draw a large image and the coarse view of it together: `sample_levels` for two levels and any functions.

    in:  eps_fine(z (N,C,window,window), t (N,), ij) -> eps of windows at canvas positions ij; eps_ctx(z, t) -> eps;
    encode, decode: images <-> scaled latents; z_T (1,C,H,W) the fine canvas; z_T_ctx (1,C,h,w) the context, drawn in
    one window; factor: fine pixels per context pixel; overlap of windows, in latents, uniform or with fade; batch:
    windows per call; y: a fixed target (1,3,h,w) instead of the context's estimate (eps_ctx may be None then);
    callback(n, t, z, z0_hat, target) after every step; the rest as in `sample_levels`. Under torchrun every rank gives
    and gets the whole canvas.
    out: (z_fine, z_ctx). Costs 1 + 2 K estimates, K decodes and 2 K encodes a step (guide "exact").
    raises: ValueError if the canvas is no place for the windows, or the context does not match it.
    """
    if eps_ctx is None and y is None:
        raise UserError("nothing to match: give eps_ctx or y")
    if factor < 1:
        raise UserError(f"factor={factor}: how many fine pixels a context pixel stands for, at least 1")
    for name, z in (("z_T", z_T), ("z_T_ctx", z_T_ctx)) if eps_ctx is not None else (("z_T", z_T),):
        if z is None or z.ndim != 4 or len(z) != 1 or z.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{name} is {'None' if z is None else f'{tuple(z.shape)} {z.dtype}'}: give (1,C,H,W), one "
                            f"image at a time, in float32 or float64 (bf16 is what autocast is for)")
    y = y if y is None else y.to(z_T)
    canvas = Canvas(*z_T.shape[2:], window, overlap, fade, batch)
    fine = Level(eps_fine, canvas, canvas.own(z_T), factor, y)
    levels, z_ctx = [fine], z_T_ctx
    if eps_ctx is not None:
        whole = tuple(z_T_ctx.shape[2:])
        levels = [Level(lambda z, t, ij: eps_ctx(z, t), Canvas(*whole, whole), z_T_ctx), fine]

    def report(n, t, levels, estimates, targets):
        callback(n, t, canvas.whole(levels[-1].z), canvas.whole(estimates[-1]), targets[-1])
    sample_levels(levels, decode, encode, schedule, steps=steps, inner=inner, lam=lam, delta=delta, zeta=zeta,
                  guide=guide, normalize=normalize, callback=callback and report, **options)
    return canvas.whole(fine.z), z_ctx if eps_ctx is None else levels[0].z


# ----- 1. Patches -----

@torch.no_grad()
def draw(model, c, side, ranks, guidance=2.0, steps=50, seed=0, batch=64, sampler="ddim", end="clean"):
    """Patches for given tokens c (N,L,D), side latents a side: (N,3,P,P) in [-1,1] on the CPU."""
    out = []
    for k in range(0, len(c), batch):
        with ranks.autocast():
            z = model.sample(c[k:k + batch], (side, side), guidance, steps, seed, sampler, end, first=k)
            out.append(model.decode(z).float().clamp(-1, 1).cpu())
    return torch.cat(out)


@torch.no_grad()
def draw_patches(model, batch, cfg, ranks, null=False):
    """Draw one patch per item. in: a collated batch with tokens, mask, s, x. out: (N,3,P,P) in [-1,1] on the CPU."""
    parts = zip(*(batch[key].split(cfg.batch) for key in ("tokens", "mask", "s")))
    with ranks.autocast():
        c = torch.cat([model.summarizer(*(x.to(ranks.device) for x in part)).float() for part in parts])
    return draw(model, torch.zeros_like(c) if null else c, batch["x"].shape[-1] // model.vae.factor, ranks,
                1.0 if null else cfg.guidance, cfg.steps, cfg.seed, cfg.batch, cfg.sampler, cfg.end)


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
    print(f"wrote {out}: {len(rows) // 2} scales, up to {max(map(len, rows))} patches each, and sheet.png (real "
          f"above drawn)")


@dataclass
class Config:
    run: str = ""              # run folder (or an ema.safetensors)
    preset: str = ""           # for large images: paper or notebook, the published constants; empty = ours
    data: str = ""             # data folder; default: the one the run was trained on
    split: str = "test"        # whose conditions: test or train
    out: str = ""              # patches: a folder, default RUN/patches; large images: a file, default RUN/large.png
    scale: int = -1            # one scale, 0 = finest; -1 = all, or 0 for large images
    guidance: float = 2.0      # eps_null + guidance (eps_cond - eps_null); 1 = no guidance
    steps: int = 50
    end: str = "clean"         # where ddim stops: clean, or published (leaves 3.9 % noise in the latent), as plms does
    seed: int = 0
    batch: int = 64            # patches or windows per network call; halved, aloud, where memory does not suffice
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 where the device has it and no difference is taken
    compile: bool = False      # torch.compile U-Net, encoder and decoder: for long runs, and only with a compiler
    # patches
    condition: str = "reference"  # embeddings of real images; or invented ones: cdm, edm (patches), grid (large images)
    n: int = 0                 # patches per scale, at most as many as there are; 0 = 8, or 128 with --eval
    sampler: str = "ddim"      # ddim or plms
    eval: bool = False         # measure instead of showing
    # large images
    size: tuple = ()           # pixels, a side or height,width; empty = patches
    context: tuple = (4,)      # coarser scales drawn with it; each guides the next finer one
    method: str = "joint"      # joint; or, for comparison, multidiffusion, independent, bicubic
    slide: int = 0             # whose embeddings: the k-th image of the split
    reference: str = ""        # or those of this image, read at the data's resolution if it says its own, or of a
    #                            .safetensors file with e (Gh,Gw,E), as data.py and invert.py write them
    weights: str = ""          # of the encoder that embeds the reference, if they lie elsewhere than for the build
    at: tuple = (0, 0)         # base tile (row, column) of the reference where the image begins
    caption: str = ""          # with --condition=grid: what the image shows, in words
    vector: str = ""           # or as a vector made elsewhere, a .safetensors file with v (V,)
    emphasis: float = 2.0      # guidance of the grid model towards its caption
    spread: float = 0.0        # how much chance may change the amounts a caption states; 1 = as trained
    swap: str = ""             # move what is drawn: "i,j:k,l" exchanges two base tiles, more of them after ";"
    paste: str = ""            # "i,j:k,l" or "i,j:k,l:rows,columns" copies a block over another
    overlap: int = -1          # latents that windows share; -1 = nearly a quarter of a side (multidiffusion: three)
    fade: bool = True          # windows fade into each other; False = uniform averages, as published
    guide: str = "x0+proxy"    # exact (Z Algorithm S2), gradient (S1), proxy, x0, x0+proxy: see joint.py
    inner: int = 1             # corrections per step (K)
    lam: tuple = ()            # size of a correction, or first,last. x0, x0+proxy: share of the residual, default 0.3,
    #                            with fewer than 50 steps up to 0.5; others: largest change of a latent, default 0.1
    #                            (published: 0.5)
    delta: float = 0.005       # width of the denoiser's finite difference; 0 = forward-mode differentiation instead
    zeta: float = 0.005        # width of the encoder's; x0 takes the whole misfit at once
    during: tuple = (0, 1000)  # guide only while t lies here
    A: str = "bicubic"         # down-sampling of the constraint: bicubic, or box, as pyramids are made
    guided: tuple = (0, 1000)  # the null branch is asked, and guidance used, only while t lies here (Kynkäänniemi 2024)
    null: bool = True          # False: leave the null branch out of the denoiser's finite difference
    repair: bool = False       # end with the published repair: back to t = 300, windows at a quarter of their side
    frames: int = 0            # write the estimate every so many steps
    profile: bool = False      # count calls, FLOPs and seconds
    mpp: float = 0.0           # micrometres per pixel, for .tif; 0 = unknown
    viewer: str = ""           # openseadragon.min.js, for .dzi


PRESETS = {
    "": {},
    "paper": dict(guide="exact", steps=50, inner=1, lam=0.5, guidance=2.0, overlap=0),      # Z S8.2
    "notebook": dict(guide="exact", steps=20, inner=10, lam=0.5, guidance=3.0, overlap=0),  # reference: published Colab
}


NO_MEMORY = ("not enough memory", "can't allocate memory", "could not create a primitive")  # torch, and oneDNN


METHODS = ("joint", "multidiffusion", "independent", "bicubic")


BUDGET = 256 * 2 ** 20  # bytes of keys and values kept from step to step; windows beyond it compute theirs anew


# ----- 1. A trained model behind windows -----

@torch.no_grad()
def contexts(model, condition, s, canvas):
    """Tokens {corner: c (L,D)} of this rank's windows. condition(s, i, j) -> e (E,G,G), standardised, for a window at
    scale s whose upper left corner lies at base tile (i, j), any numbers; `Grid` is one, any function will do; None is
    the null condition."""
    out, (wh, ww) = {}, canvas.window
    device = model.unet.conv_out.weight.device
    if condition is None:
        return dict.fromkeys(canvas.ij, torch.zeros(model.summarizer.pos.shape[1:], device=device))
    with full_precision(device):
        for ij in canvas.batches():
            grids = [pack_grid(condition(s, i / wh * 2 ** s, j / ww * 2 ** s)) for i, j in ij]
            tokens, mask = (torch.stack(v).to(device) for v in zip(*grids))
            c = model.summarizer(tokens, mask, torch.full((len(ij),), s, device=device))
            out |= zip(ij, c)
    return out


def window_eps(model, c, guidance, null=True, guided=(0, math.inf)):
    """eps(z, t, ij) of windows whose tokens are c, both guidance branches in one batch; keys and values are computed
    once. Where t lies outside `guided` (from, below) there is no guidance, and no null branch. out: eps, and for
    null=False the conditional branch alone, for differences, which eps then reports as well."""
    kept, room = {}, [BUDGET]

    def kv(ij, both):
        key = both, *ij
        if key in kept:
            return kept[key]
        with torch.no_grad():
            tokens = torch.stack([c[p] for p in ij])                                    # (n,L,D)
            with full_precision(tokens.device):
                made = model.unet.cache_context(torch.cat([torch.zeros_like(tokens), tokens]) if both else tokens)
        room[0] -= sum(x.nbytes for pair in made for x in pair)
        if room[0] > 0:
            kept[key] = made
        return made

    def conditional(z, t, ij):
        return model.eps(z, t, kv(ij, False))

    def eps(z, t, ij):
        if guidance == 1 or not guided[0] <= int(t[0]) < guided[1]:
            cond = conditional(z, t, ij)
            return cond if null or guidance == 1 else torch.cat([cond, cond], 1)
        without, cond = model.eps(torch.cat([z, z]), torch.cat([t, t]), kv(ij, True)).chunk(2)
        out = without + guidance * (cond - without)
        return out if null else torch.cat([out, cond], 1)
    return careful(eps), None if null or guidance == 1 else careful(conditional)


def careful(fn):
    """fn(batch, ...) in smaller parts, said aloud, from the moment that memory does not suffice for the whole."""
    most = [0]

    def f(*args):
        while True:
            n = most[0] or len(args[0])
            try:
                parts = [fn(*(a[k:k + n] for a in args)) for k in range(0, len(args[0]), n)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
                known = (isinstance(err, torch.OutOfMemoryError | MemoryError)
                         or any(says in str(err) for says in NO_MEMORY))
                if not known or n == 1:
                    raise UserError("memory does not suffice for one window: close other programs, or take another "
                                    "--device, or a smaller --batch") if known else err from err
                most[0] = n // 2
                tqdm.write(f"memory does not suffice for {n} windows at once: going on with {n // 2}")
    return f


def drawn_scales(cfg):
    """The scales that are drawn, coarse to fine."""
    fine = max(cfg.scale, 0)
    return [*sorted(cfg.context, reverse=True), fine] if cfg.method in ("joint", "bicubic") else [fine]


def sides(size, scales, patch, factor, known):
    """Height and width in latents at every scale. raises: UserError if a scale does not fit the size or the model."""
    size = tuple(size) * (2 if len(size) == 1 else 1)
    if len(size) != 2 or not all(isinstance(n, int) for n in (*size, *scales)):
        raise UserError(f"--size={size}, scales {scales}: give a side, or height,width, in pixels, and whole scales")
    if len(set(scales)) < len(scales) or min(scales) < 0 or max(scales) >= known or scales[-1] != min(scales):
        raise UserError(f"scales {scales}: the run knows 0 to {known - 1}; --context lists coarser ones than --scale, "
                        f"each once")
    out, unit = [], factor << (scales[0] - scales[-1])
    if any(n % unit for n in size):
        raise UserError(f"--size={size} does not divide: with --context={scales[0]} both sides must be multiples of "
                        f"{unit}")
    for s in scales:
        h, w = (n // factor >> (s - scales[-1]) for n in size)
        if min(h, w) < patch // factor:
            raise UserError(f"--size={size} is {h * factor} x {w * factor} pixels at scale {s}, less than a patch of "
                            f"{patch}: take a larger --size, or a smaller --context")
        out.append((h, w))
    return out


def prepare(model, condition, size, scales, overlap, *, guidance=2.0, seed=0, batch=64, fade=True, null=True,
            guided=(0, math.inf), only=None, patch=0):
    """Levels for `sample_levels`, coarse to fine (the first `only` of them), with noise that depends on seed and scale
    alone. patch: pixels of a window's side; 0 = as trained."""
    patch, factor = patch or model.info.get("patch", 256), model.vae.factor
    device = model.unet.conv_out.weight.device
    window, levels = patch // factor, []
    for (h, w), s in list(zip(sides(size, scales, patch, factor, model.summarizer.cfg.scales), scales))[:only]:
        canvas = Canvas(h, w, window, overlap, fade, batch)
        z = torch.randn(1, model.unet.cfg.channels, h, w, generator=generator(seed, s)).to(device)
        eps, eps_diff = window_eps(model, contexts(model, condition, s, canvas), guidance, null, guided)
        times = 2 ** (scales[len(levels) - 1] - s) if levels else 0    # finer than the level above
        levels.append(Level(eps, canvas, canvas.own(z), times, eps_diff=eps_diff))
    return levels


def repair(model, condition, level, s, *, guidance=2.0, seed=0, batch=64, start=300, step=50, callback=None):
    """The published way to mend borders: noise the canvas to t = start, then denoise it in windows at a quarter of
    their side, averaged uniformly. out: a Level. reference: the published post-processing (Z S8.2)."""
    old = level.canvas
    canvas = Canvas(old.h, old.w, old.window, old.window[0] * 3 // 4, batch=batch)
    z = old.whole(level.z)
    noise = torch.randn(z.shape, generator=generator(seed, s, start)).to(z)
    z = model.schedule.q_sample(z, torch.tensor([start], device=z.device), noise)
    level = Level(window_eps(model, contexts(model, condition, s, canvas), guidance)[0], canvas, canvas.own(z))
    return sample_levels([level], None, None, model.schedule, timesteps=list(range(step, start + 1, step)),
                         end="clean", callback=callback)[0]


# ----- 2. One large image -----

def draw_large(model, condition, cfg, ranks, proxy=None, resume=None, frame=None):
    """Sample one large image as cfg says. condition: see `contexts`; resume: a file that keeps the state every minute,
    so that the same call goes on after an interruption; frame(n, level, estimate) after every step.
    out: (levels, scales), coarse to fine, on every rank."""
    from large import proxy as proxies
    scales = drawn_scales(cfg)
    window = model.info["patch"] // model.vae.factor
    overlap = {"multidiffusion": 3 * window // 4, "independent": 0}.get(cfg.method, usual_overlap(window))
    overlap = overlap if cfg.overlap < 0 or cfg.method == "independent" else cfg.overlap
    levels = prepare(model, condition, cfg.size, scales, overlap, guidance=cfg.guidance, seed=cfg.seed, batch=cfg.batch,
                     fade=cfg.fade and cfg.method != "multidiffusion", null=cfg.null,
                     guided=cfg.guided, only=1 if cfg.method == "bicubic" else None)
    scales = scales[:len(levels)]
    estimate_space = GUIDES[cfg.guide][1] is None
    lam = cfg.lam or ((min(15 / cfg.steps, 0.5),) if estimate_space else (0.1,))
    settings = {k: v for k, v in asdict(cfg).items() if k not in (
        "out", "frames", "profile", "batch", "threads", "device", "compile", "mpp", "viewer")}
    settings |= {"model": proxies.fingerprint(model), "proxy": fingerprint(proxy) if proxy else "",
                 "grid": crc32(condition.e.cpu().numpy().tobytes()) if isinstance(condition, Grid) else 0}
    settings = json.loads(json.dumps(settings))
    skip, saved = 0, [time.monotonic()]
    if resume is not None and resume.exists():
        try:
            state, meta = load_tensors(resume)
        except UserError as err:
            raise UserError(f"{err}; to draw from the start, remove it") from err
        if meta.get("settings") == settings:
            skip = meta["step"]
            for k, level in enumerate(levels):
                level.z = level.canvas.own(state[str(k)].to(level.z.device))
            print(f"going on from step {skip}, found in {resume}")
    bar = tqdm(total=len(ddim_timesteps(model.schedule.T, cfg.steps)), initial=skip, desc=cfg.method,
               disable=ranks.rank > 0)

    def step(n, t, levels, estimates, targets):
        bar.update()
        if frame is not None:
            frame(n, levels[-1], estimates[-1])
        due = torch.tensor(float(resume is not None and time.monotonic() - saved[0] > 60), device=levels[0].z.device)
        if ranks.world > 1:
            torch.distributed.broadcast(due, 0)
        if due:
            whole = {str(k): level.canvas.whole(level.z) for k, level in enumerate(levels)}
            if ranks.rank == 0:
                save_tensors(resume, whole, {"settings": settings, "step": n + 1})
            saved[0] = time.monotonic()
    with ranks.autocast() if cfg.amp else nullcontext():
        sample_levels(levels, careful(model.decode), careful(model.encode), model.schedule, steps=cfg.steps,
                      inner=cfg.inner if cfg.method == "joint" else 0, lam=(lam[0], lam[-1]), delta=cfg.delta,
                      zeta=cfg.zeta, guide=cfg.guide, normalize="share" if estimate_space else True, end=cfg.end,
                      kind=cfg.A, during=cfg.during, proxy=proxy, callback=step, skip=skip)
        if cfg.repair and cfg.method != "bicubic":
            bar.set_description("repair")
            levels[-1] = repair(model, condition, levels[-1], scales[-1], guidance=cfg.guidance, seed=cfg.seed,
                                batch=cfg.batch, callback=lambda *a: bar.set_postfix_str(f"t = {a[1]}"))
    bar.close()
    if not all(level.z.isfinite().all() for level in levels):
        raise UserError(f"the latents are no finite numbers any more, nothing is written: --lam={lam}, --guidance="
                        f"{cfg.guidance}, --delta={cfg.delta} or --zeta={cfg.zeta} is too large, or the model is bad")
    return levels, scales


def pixels(model, z, ranks, batch=8):
    """Strips (h,W,3) uint8 of a decoded canvas, from top to bottom: windows half as large again as a patch, a quarter
    of a patch of which on every side fades into the neighbours."""
    window = model.info["patch"] // model.vae.factor
    with torch.no_grad(), ranks.autocast():
        for strip in decode_strips(careful(model.decode), z, window * 3 // 2, window // 2, batch):
            yield to_uint8(strip)[0].numpy()


def picture(model, z, ranks):
    """The whole decoded canvas as one uint8 array (H,W,3)."""
    return np.concatenate(list(pixels(model, z, ranks)))


def decoded(model, z, ranks):
    """The whole decoded canvas as it would be written, (1,3,H,W) in [-1,1]."""
    return torch.from_numpy(picture(model, z, ranks)).movedim(-1, 0)[None] / 127.5 - 1


def large(model, pyramids, cfg, ranks):
    """Draw one large image and write it, and the coarse views it was drawn with, beside it."""
    from experiments.cost import Profile
    from large import proxy as proxies
    from large.reference import load_grid
    from slides.writers import check_deepzoom, check_place, check_tiff, write_deepzoom, write_tiff
    out, patch = Path(cfg.out), model.info["patch"]
    if out.suffix not in (".png", ".tif", ".tiff", ".dzi"):
        raise UserError(f"--out={out}: give a name that ends in .png, .tif (pyramid) or .dzi (DeepZoom)")
    if cfg.method not in METHODS or cfg.guide not in GUIDES or cfg.A not in ("bicubic", "box"):
        raise UserError(f"--method={cfg.method} --guide={cfg.guide} --A={cfg.A}: known are {', '.join(METHODS)}; "
                        f"{', '.join(GUIDES)}; bicubic, box")
    if len(cfg.during) != 2 or len(cfg.guided) != 2 or len(cfg.lam) > 2 or [type(v) for v in cfg.at] != [int, int]:
        raise UserError(f"--during={cfg.during} --guided={cfg.guided} --at={cfg.at} --lam={cfg.lam}: give two numbers, "
                        f"whole ones for at, one or two for lam")
    if cfg.eval or cfg.sampler != Config.sampler or cfg.frames < 0 or cfg.overlap < -1:
        raise UserError(f"--eval={cfg.eval} --sampler={cfg.sampler} --frames={cfg.frames} --overlap={cfg.overlap}: "
                        f"large images are drawn with ddim, --eval is for patches, nothing is negative")
    check_settings(cfg.guide, True, cfg.inner, (*cfg.lam, *cfg.lam)[:2] or 0.0, cfg.delta, cfg.zeta, cfg.end)
    ddim_timesteps(model.schedule.T, cfg.steps)
    check_place(out)
    if out.suffix == ".dzi":  # what cannot be written is said before it is drawn
        check_deepzoom(out.with_suffix(""), cfg.viewer or None)
    else:
        check_tiff(out, cfg.mpp or None)
    fine = max(cfg.scale, 0)
    scales = drawn_scales(cfg)
    h, w = sides(cfg.size, scales, patch, model.vae.factor, model.summarizer.cfg.scales)[-1]
    need = tuple(math.ceil(n * model.vae.factor * 2 ** fine / patch) for n in (h, w))
    grid = load_grid(cfg, model, pyramids, need)
    proxy = (proxies.load(Path(cfg.run) if Path(cfg.run).is_dir() else Path(cfg.run).parent, model, pyramids, ranks)
             if cfg.method == "joint" and "proxy" in cfg.guide else None)
    if ranks.rank == 0:
        print(f"drawing {h * model.vae.factor} x {w * model.vae.factor} pixels, scales {scales}, writing {out}")

    def frame(n, level, estimate):
        if cfg.frames and (n + 1) % cfg.frames == 0:
            z = level.canvas.whole(estimate)
            if ranks.rank == 0:
                image = Image.fromarray(picture(model, z, ranks))
                image.thumbnail((1024, 1024), Image.Resampling.BOX)
                with atomic(out.with_name(f"{out.stem}_frames") / f"{n + 1:04d}.png") as tmp:
                    image.save(tmp, "PNG")
    profile = Profile(model, proxy) if cfg.profile else None
    resume = out.with_name(f".{out.name}.partial.safetensors")
    levels, scales = draw_large(model, grid, cfg, ranks, proxy, resume, frame if cfg.frames else None)
    canvases = [level.canvas.whole(level.z) for level in levels]
    if ranks.rank > 0:
        return ranks.barrier()
    if cfg.method == "bicubic":
        up = Resize(2 ** (scales[0] - fine)).up(decoded(model, canvases[0], ranks)).clamp(-1, 1)
        strips = iter([to_uint8(up)[0].numpy()])
    else:
        strips = pixels(model, canvases[-1], ranks)
    size = h * model.vae.factor, w * model.vae.factor
    if out.suffix == ".png":
        save_png(out, np.concatenate(list(strips)))
    elif out.suffix == ".dzi":
        write_deepzoom(out.with_suffix(""), strips, size, viewer=cfg.viewer or None, title=out.stem)
    else:
        write_tiff(out, strips, size, mpp=cfg.mpp or None)
    for z, s in zip(canvases[:None if cfg.method == "bicubic" else -1], scales):
        save_png(out.with_name(f"{out.stem}_scale{s}.png"), picture(model, z, ranks))
    if profile is not None:
        profile.close()
        profile.table(model.unet.cfg.context_dim)
    resume.unlink(missing_ok=True)
    print(f"wrote {out.with_suffix('') / 'index.html' if out.suffix == '.dzi' else out}"
          + "".join(f", {out.stem}_scale{s}.png" for s in scales if s != fine))
    ranks.barrier()


def known_data(model, folder):
    """The data of a run. raises: UserError if it is none that the model knows."""
    info = model.info
    pyramids = Pyramids(folder, std=info.get("std"))
    if pyramids.scales > model.summarizer.cfg.scales or pyramids.patch != info.get("patch"):
        raise UserError(f"{folder} has {pyramids.scales} scales of {pyramids.patch}-pixel patches, the run "
                        f"was trained on {model.summarizer.cfg.scales} of {info.get('patch')}: build it with these")
    if pyramids.embed_dim != model.summarizer.cfg.embed_dim or pyramids.encoder != info.get("encoder"):
        raise UserError(f"{folder} was embedded with {pyramids.encoder!r} ({pyramids.embed_dim} numbers), the "
                        f"run with {info.get('encoder')!r} ({model.summarizer.cfg.embed_dim}): give its own data")
    return pyramids


def main(argv):
    from experiments.evaluate import evaluate
    cfg = configure(Config, argv, PRESETS, ("run", "preset"), doc=__doc__)
    if not cfg.run:
        raise UserError("say which run: python sample_joint.py out/toy (train one with python train.py)")
    if cfg.n < 0 or cfg.seed < 0 or cfg.steps < 1 or cfg.batch < 1:
        raise UserError(f"--n={cfg.n} --seed={cfg.seed} --steps={cfg.steps} --batch={cfg.batch}: steps and batch are "
                        f"at least 1, nothing is negative")
    if cfg.end not in ("clean", "published"):
        raise UserError(f"--end={cfg.end}: known are clean, published")
    cfg.n = cfg.n or (128 if cfg.eval else 8)
    run = Path(cfg.run).parent if Path(cfg.run).is_file() else Path(cfg.run)
    cfg.out = cfg.out or str(run / ("large.png" if cfg.size else "eval" if cfg.eval else "patches"))
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    info = model.info
    if cfg.compile:
        model.unet.compile()
        model.vae.encode, model.vae.decode = torch.compile(model.vae.encode), torch.compile(model.vae.decode)
    data = cfg.data or info.get("data", "")
    alone = cfg.size and (cfg.reference or cfg.condition == "grid")  # conditions that do not come from the data
    pyramids = None
    if cfg.data or not alone or (Path(data) / "index.json").is_file():
        pyramids = known_data(model, data)
    if (cfg.reference or cfg.swap or cfg.paste) and not cfg.size or cfg.reference and cfg.condition == "grid":
        raise UserError("--reference, --swap and --paste are for large images: give --size (as --size=512 "
                        "--context=3); and --reference does not go with --condition=grid")
    known = ("reference", "grid") if cfg.size else ("reference", "cdm", "edm")
    if cfg.condition not in known or cfg.condition != "grid" and (cfg.caption or cfg.vector):
        raise UserError(f"--condition={cfg.condition} with{'' if cfg.size else 'out'} --size: known here are "
                        f"{', '.join(known)}; --caption and --vector go with grid")
    if cfg.condition in ("cdm", "edm"):
        if cfg.eval or (cfg.sampler, cfg.end) != (Config.sampler, Config.end):
            raise UserError(f"--condition={cfg.condition} draws patches with DDIM alone: leave --eval, --sampler and "
                            f"--end away (what its conditions are worth: python cdm_table.py conditions RUN)")
        from experiments import invented
        names = ("run", "scale", "n", "steps", "guidance", "seed", "out", "device", "threads", "amp")
        return invented.sample(invented.Config(model=cfg.condition, **{k: getattr(cfg, k) for k in names}))
    (large if cfg.size else evaluate if cfg.eval else show)(model, pyramids, cfg, ranks)


if __name__ == "__main__":
    cli(main)
