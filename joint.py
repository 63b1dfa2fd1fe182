"""Joint multi-scale sampling (Z §3.2): a large image and its coarse view are drawn together, the one guiding the other.

At every step the coarse image's estimate y says how the fine canvas should look from afar: A Dec(z0_hat) = y, with A a
down-sampling. The misfit is turned into a direction for the latents, by gradients (Z Algorithm S1) or by two finite
differences (Algorithm S2) or, cheaper, for the estimate alone; then DDIM goes on. All of it works on plain functions,
so that tests can pass in closed forms.

in:  functions eps, encode, decode and noise on canvases   out: latents of every scale
run: python joint.py (a Gaussian toy)     read next: patches.py
"""
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from canvas import Canvas, Resize, exact
from common import UserError, cli
from diffusion import Schedule, ddim_step, ddim_timesteps, noise_levels, to_eps, to_x0

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


def main(argv):
    """Without a network: pixels that want to be 0.1 under a context that wants a ramp."""
    schedule, ramp = Schedule(), torch.linspace(-0.8, 0.8, 4).expand(1, 3, 4, 4)

    def gaussian(mean, power):
        def eps(z, t, ij=None):
            ab = schedule.at(t, z)
            return (z - ab.sqrt() * mean) * (1 - ab).sqrt() / (ab * power + 1 - ab)
        return eps
    for lam in (0.0, 0.5):
        torch.manual_seed(0)
        z, y = joint_sample(gaussian(0.1, 0.25), gaussian(ramp, 0.01), lambda x: x, lambda z: z, schedule,
                            torch.randn(1, 3, 16, 16), torch.randn(1, 3, 4, 4), window=8, factor=4, lam=lam)
        print(f"lam {lam}: rms of A x - y is {(Resize(4).down(z) - y).square().mean().sqrt():.3f}")


if __name__ == "__main__":
    cli(main)
