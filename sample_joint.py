"""Draw images with a trained run: patches, or one large image and its coarse views (Z §3.2, S8.2).

    python sample_joint.py                              # with the shipped weights: patches, a large image
    python sample_joint.py out/toy                      # 8 patches a scale: PNGs and a contact sheet
    python sample_joint.py out/toy --eval               # how good they are, on held-out slides
    python sample_joint.py out/toy --size=1024 --out=large.png
    torchrun --standalone --nproc_per_node=2 sample_joint.py out/toy --size=1024

in:  a run folder, or nothing; conditions from its held-out slides, another image, or the models of cdm.py
out: RUN/patches/*.png, or one .png, .tif (pyramid) or .dzi (DeepZoom)
--size=512 --help lists the settings of large images.     read next: invert.py
"""
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from torch.nn.functional import interpolate
from tqdm import tqdm

from common import UserError, at_least, cli, configure, home_of, one_of, save_grid, save_png, setup
from common import to_uint8
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM, ddim_step, even_timesteps, extrapolation, noise_levels, null_condition
from diffusion import to_eps, to_x0

# ----- 1. The down-sampling operator A (Z Eq. 1) -----

@lru_cache(64)
def shrink_matrix(n, k, kind="bicubic", dtype=torch.float64, device="cpu"):
    """A along a side of n pixels, (n/k,n): Keys' cubic (a = -0.5), stretched k times; mirrored borders."""
    if kind == "box":
        return torch.eye(n // k, dtype=dtype, device=device).repeat_interleave(k, 1) / k
    pixels = torch.eye(5 * k, dtype=torch.float64)[None, None]
    weights = interpolate(pixels, (5, 5 * k), mode="bicubic", antialias=True)[0, 0, 2]  # (5k,), middle pixel
    reach = torch.arange(-2 * k, 3 * k) + k * torch.arange(n // k)[:, None]             # (n/k,5k)
    reach = reach % (2 * n)
    mirrored = torch.where(reach < n, reach, 2 * n - 1 - reach)                         # ... 1 0 | 0 1 ...
    A = torch.zeros(n // k, n, dtype=torch.float64)
    return A.scatter_add_(1, mirrored, weights.expand(n // k, -1)).to(device, dtype)

class Resize:
    """Antialiased bicubic down-sampling A by an integer factor, and `up` = factor^2 A^T, bicubic up-sampling,
    as in the published helpers. kind "box" averages blocks instead, as the pyramids on disk are made.
    raises: ValueError for sides that are no multiples of factor, and for images of integers."""
    def __init__(self, factor, kind="bicubic"):
        if type(factor) is not int or factor < 1 or kind not in ("bicubic", "box"):
            raise UserError(f"factor={factor!r}, kind={kind!r}: give a whole factor, and bicubic or box")
        self.factor, self.kind = factor, kind

    def along(self, n, like):
        """A along a side of n pixels, in the dtype and on the device of `like`."""
        if n % self.factor or not like.is_floating_point():
            raise UserError(f"a side is {n} pixels, {like.dtype}: {self.factor} must divide it; give x.float()")
        return shrink_matrix(n, self.factor, self.kind, like.dtype, like.device)

    def down(self, x):
        """A x: (...,H,W) -> (...,H/factor,W/factor)."""
        return self.along(x.shape[-2], x) @ x @ self.along(x.shape[-1], x).T

    def up(self, y):
        """factor^2 A^T y: (...,h,w) -> (...,h factor,w factor)."""
        rows, columns = (self.along(n * self.factor, y) for n in y.shape[-2:])
        return self.factor ** 2 * (rows.T @ y @ columns)

# ----- 2. Windows on a canvas -----

def starts(n, window, overlap=0):
    """Where windows begin along a side of n; neighbours share `overlap`, the last two perhaps more."""
    return [*range(0, n - window, window - overlap), n - window]

@lru_cache(64)
def ramps(n, side, overlap, fade=True):
    """Weights of windows, {start: (side,)}, that sum to 1: ramps over `overlap`, or all the same."""
    weights, total, rise = {}, torch.zeros(n), torch.arange(side) + 0.5
    at = starts(n, side, overlap)
    shared = overlap or max([0, *(a + side - b for a, b in zip(at, at[1:]))])   # at the end two may share
    for a in at:
        weights[a] = torch.full((side,), max(shared, 0.5))
        if fade and a > 0:
            weights[a] = weights[a].minimum(rise)
        if fade and a + side < n:
            weights[a] = weights[a].minimum(rise.flip(0))
        total[a:a + side] += weights[a]
    return {a: weight / total[a:a + side] for a, weight in weights.items()}

@dataclass
class Canvas:
    """Windows that cover a canvas of h x w latents, or its image of k pixels per latent.
    Attributes: ij, corners (row, column) of windows. raises: ValueError if they do not cover the canvas."""
    h: int
    w: int
    window: int | tuple         # a side, or (height, width)
    overlap: int = 0            # latents that neighbours share
    fade: bool = False          # they fade into each other; False: they count the same (L §3.2); borders show
    batch: int = 64             # windows per call

    def __post_init__(self):
        high, wide = self.window = self.window if isinstance(self.window, tuple) else (self.window, self.window)
        if self.h < high or self.w < wide or not 0 <= self.overlap < min(high, wide):
            raise UserError(f"windows do not cover {self}: take a larger canvas, or a smaller overlap")
        self.ij = [*product(starts(self.h, high, self.overlap), starts(self.w, wide, self.overlap))]

    def at(self, x, i, j):
        """The part of x (1,C,k h,k w) under the window at corner (i, j), a view."""
        k = x.shape[-1] // self.w
        high, wide = self.window
        return x[..., i * k:(i + high) * k, j * k:(j + wide) * k]

    def cut(self, x, ij):
        """x (1,C,k h,k w) -> its windows at corners ij, (n,C,k window,k window)."""
        return torch.cat([self.at(x, i, j) for i, j in ij])

    def average(self, fn):
        """Paste fn(corners) -> (n,C,k window,k window): the weighted mean of windows, (1,C,k h,k w)."""
        total = None
        for n in range(0, len(self.ij), self.batch):
            ij = self.ij[n:n + self.batch]
            parts = fn(ij)
            if total is None:
                high, wide = parts.shape[2:]
                k = wide // self.window[1]
                rows = ramps(self.h * k, high, self.overlap * k, self.fade)
                columns = ramps(self.w * k, wide, self.overlap * k, self.fade)
                # sums in float64 hardly depend on their order, so two ranks give what one does; MPS has none
                dtype = torch.float32 if parts.is_mps else torch.float64
                total = parts.new_zeros(1, parts.shape[1], self.h * k, self.w * k, dtype=dtype)
            for part, (i, j) in zip(parts, ij):
                weight = rows[i * k][:, None] * columns[j * k]
                self.at(total, i, j).add_(part * weight.to(total))
        return self.share(total).to(parts.dtype)

    def share(self, total):
        """Here all windows are ours. (large/ranks.py adds up those of several ranks.)"""
        return total

    def peak(self, d):
        """The largest absolute value of d (1,C,k h,k w) in every window, laid on the canvas, (1,1,h,w)."""
        def largest(ij):
            top = self.cut(d, ij).abs().amax((1, 2, 3), keepdim=True)                   # (n,1,1,1)
            return top.clamp_min(1e-12).expand(-1, 1, *self.window)
        return self.average(largest)

    def unit(self, d):
        """d, scaled to a largest absolute value of 1 in every window. official: so; Z does not say it."""
        return d / interpolate(self.peak(d), d.shape[2:])

# ----- 3. Algorithms S1 and S2, and faster guides -----

@contextmanager
def full_precision(like):
    """No autocast, no TF32: of a perturbation of 0.005, bf16 rounds away 79 %, TF32 and fp16 10 %."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.autocast(like.device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before

@dataclass
class Level:
    """One scale of the image. z0_hat, Dec and Enc of its canvas: the mean where windows overlap (L §3.2)."""
    eps: Callable                       # eps(z (n,C,window,window), t (n,), ij) -> eps of windows at ij
    decode: Callable                    # latents -> images
    encode: Callable                    # images -> latents
    canvas: Canvas
    z: torch.Tensor                     # (1,C,H,W), drawn over
    A: Resize | None = None             # from its pixels to those of the level above, which guides it
    y: torch.Tensor | None = None       # (1,3,h,w), a fixed image that it must match instead of that level
    proxy: Callable | None = None       # see large/proxy.py
    z0: torch.Tensor | None = None      # the latest estimate
    target: torch.Tensor | None = None  # y, or the latest estimate of the level above, decoded

    def z0_hat(self, z, t, ab):
        """The estimate of the clean latents, and eps, both (1,C,H,W). ab: alpha_bar at t."""
        def windows(ij):
            times = torch.full((len(ij),), t, device=z.device)
            return self.eps(self.canvas.cut(z, ij), times, ij).to(z.dtype)
        eps = self.canvas.average(windows)
        return to_x0(eps, z, ab, "eps"), eps

    def Dec(self, z):  # (1,C,H,W) -> (1,3,k H,k W); the finished canvas: large/windows.py::decode_strips, no seams
        return self.canvas.average(lambda ij: self.decode(self.canvas.cut(z, ij)).to(z.dtype))
    def Enc(self, x):  # (1,3,k H,k W) -> (1,C,H,W)
        return self.canvas.average(lambda ij: self.encode(self.canvas.cut(x, ij)).to(x.dtype))

    def error(self, x):
        """factor^2 A^T (y - A x): by it, x would meet y nearly. raises: ValueError if A x and y differ in size."""
        with full_precision(x):
            seen, y = self.A.down(x), self.target.to(x)
            if seen.shape != y.shape:
                raise UserError(f"seen through A the canvas is {seen.shape}, its target {y.shape}: "
                                f"it must be factor={self.A.factor} times as large")
            return self.A.up(y - seen)

    def backpropagate(self, fn, z0, e_img):
        """J^T e_img, J the Jacobian of fn at z0, a batch of windows at a time."""
        def windows(ij):
            part = self.canvas.cut(z0, ij).requires_grad_()
            with torch.enable_grad():
                x = fn(part)
            return torch.autograd.grad(x, part, self.canvas.cut(e_img, ij))[0]          # Eq. 3
        return self.canvas.average(windows)

    def trust(self, e_img):
        """1, or less where a window is wrong by under half a grey level: unit steps would blow up rounding."""
        return (self.canvas.peak(e_img) * 255).clamp_max(1)

def algorithm_s1(level, z, t, ab, K, lam, delta, zeta):
    """Move z (1,C,H,W) until its decode, seen through A, is y: the inner loop of S1. out: z, z0_hat, eps.
    official: e_img is y - A Dec, so that adding g descends. With Z's sign, A Dec - y, Eq. 5 would climb."""
    unit = level.canvas.unit
    for _ in range(K):                                                  # for i in {1, ..., K}
        with full_precision(z):
            z0, _ = level.z0_hat(z, t, ab)
        e_img = level.error(level.Dec(z0))                              #   A^T (y - A Dec(z0_hat))
        with full_precision(z):
            e = unit(level.backpropagate(level.decode, z0, e_img))      #   Eq. 3
            g = unit((level.z0_hat(z + delta * e, t, ab)[0] - z0) / delta)          # Eq. 4
        z = z + lam * g * level.trust(e_img)                            #   Eq. 5
    return z, *level.z0_hat(z, t, ab)

def algorithm_s2(level, z, t, ab, K, lam, delta, zeta):
    """The inner loop of Algorithm S2: as S1, but the encoder's difference stands for backpropagation."""
    unit = level.canvas.unit
    for _ in range(K):                                                  # for i in {1, ..., K}
        with full_precision(z):
            z0, _ = level.z0_hat(z, t, ab)
        x = level.Dec(z0)                                               #   (1,3,k H,k W)
        e_img = level.error(x)                                          #   A^T (y - A Dec(z0_hat))
        with full_precision(z):
            e = unit((level.Enc(x + zeta * unit(e_img)) - level.Enc(x)) / zeta)     # Eq. 6
            g = unit((level.z0_hat(z + delta * e, t, ab)[0] - z0) / delta)          # Eq. 4
        z = z + lam * g * level.trust(e_img)                            #   Eq. 5
    return z, *level.z0_hat(z, t, ab)

def guide_x0(level, z, t, ab, K, lam, delta, zeta):
    """Ours: correct z0_hat itself by what the encoder makes of the error. The U-Net is asked once a step."""
    z0, _ = level.z0_hat(z, t, ab)
    for _ in range(K):
        x = level.Dec(z0)
        z0 = z0 + lam * (level.Enc(x + level.error(x)) - level.Enc(x))
    return z, z0, to_eps(z0, z, ab, "x0")                               # z stays, so eps gives way

def guide_x0_by_proxy(*args):
    """The same through a small network from latents to a reduced image, in the place of the decoder."""
    from large.proxy import guide
    return guide(*args)

GUIDES = {"s1": algorithm_s1, "s2": algorithm_s2, "x0": guide_x0, "x0+proxy": guide_x0_by_proxy}

def guide_of(name, inner, lam, delta, zeta):
    """out: the function, (first, last) lam. raises: UserError for what means nothing."""
    lams = lam if isinstance(lam, tuple | list) else (lam,)
    good = len(lams) in (1, 2) and min(*lams, inner) >= 0 and min(delta, zeta) > 0
    if name not in GUIDES or not good:
        raise UserError(f"guide={name!r}, inner={inner}, lam={lam}, delta={delta}, zeta={zeta}: guides are "
                        f"{', '.join(GUIDES)}; inner and lam (or first,last) are 0 or more, delta and zeta above")
    return GUIDES[name], (lams[0], lams[-1])

@torch.no_grad()
def sample_levels(levels, schedule, *, steps=50, timesteps=None, end="published", inner=1, lam=0.5,
                  delta=0.005, zeta=0.005, guide="s2", order=1, done=0, callback=None):
    """Draw several scales of one image together. At every step each guides the next finer one.
    in:  levels, coarse to fine, whose z are drawn over; timesteps, ascending; end: see ddim_sample; inner: K; lam:
    for s1, s2 the largest change of a latent, for x0 guides the share of the error that is taken away; or (first,
    last), going linearly; delta, zeta: widths of finite differences, in float32 even under autocast;
    order: 1 DDIM, 2 DPM-Solver++ 2M (few steps of DDIM lose contrast); done: how many steps are drawn.
    out: levels. raises: ValueError if two levels do not match. source: Z Algorithms S1, S2."""
    correct, lams = guide_of(guide, inner, lam, delta, zeta)
    timesteps = even_timesteps(schedule.T, steps) if timesteps is None else timesteps
    ab, ab_prev = noise_levels(schedule, timesteps, end)
    last = len(timesteps) - 1
    for i in tqdm(range(last - done, -1, -1), "steps", delay=3, disable=bool(callback)):  # for t in {T_0, ...}
        t, above = timesteps[i], None
        size = lams[0] + (lams[1] - lams[0]) * (last - i) / max(last, 1)
        for level in levels:
            z, level.target = level.z, above if level.y is None else level.y
            if level.target is None or size == 0 or inner == 0:         # nothing guides it
                z0, eps = level.z0_hat(z, t, ab[i])
            else:
                z, z0, eps = correct(level, z, t, ab[i], inner, size, delta, zeta)
            ahead = z0                                                  # or where it will be in mid-step
            if order == 2 and level.z0 is not None:
                ahead = z0 + extrapolation(ab, i) * (z0 - level.z0)
                eps = to_eps(ahead, z, ab[i], "x0")
            level.z, level.z0 = ddim_step(z, ahead, eps, ab_prev[i]), z0            # DDIM(z_t, z0_hat, s)
            if level is not levels[-1]:
                above = level.Dec(z0).clamp(-1, 1)                      # y = Dec(z0_hat^L)
        if callback is not None:
            callback(last - i, t, levels)
    return levels

def joint_sample(eps_fine, eps_ctx, encode, decode, schedule, z_T, z_T_ctx, *, window, factor, steps=50,
                 inner=1, lam=0.5, delta=0.005, zeta=0.005, overlap=0, guide="s2", y=None, callback=None, **options):
    """Draw a large image and the coarse view of it together: `sample_levels` for two levels, any functions.
    in:  eps_fine(z (N,C,window,window), t (N,), ij) -> eps of windows at corners ij; eps_ctx(z, t) -> eps;
    encode, decode: images <-> latents; z_T (1,C,H,W); z_T_ctx (1,C,h,w), one window; factor: fine pixels per
    context pixel; y: a target (1,3,h,w) instead of the context; callback(n, t, z, z0_hat, target); the rest: above.
    out: (z_fine, z_ctx). s2 costs 1 + 2 K estimates, K decodes and 2 K encodes a step.
    raises: ValueError if the canvas is no place for the windows, or the context does not match it."""
    if eps_ctx is None and y is None:
        raise UserError("nothing to match: give eps_ctx or y")
    for z in [z_T] if eps_ctx is None else [z_T, z_T_ctx]:
        if z is None or z.ndim != 4 or len(z) != 1 or z.dtype not in (torch.float32, torch.float64):
            raise UserError("z_T and z_T_ctx must be (1,C,H,W), one image at a time, in float32 or float64")
    fine = Level(eps_fine, decode, encode, Canvas(*z_T.shape[2:], window, overlap), z_T, Resize(factor), y)
    levels = [fine]
    if eps_ctx is not None:
        whole = Canvas(*z_T_ctx.shape[2:], tuple(z_T_ctx.shape[2:]))
        levels = [Level(lambda z, t, ij: eps_ctx(z, t), decode, encode, whole, z_T_ctx), fine]

    report = callback and (lambda n, t, _: callback(n, t, fine.z, fine.z0, fine.target))
    sample_levels(levels, schedule, steps=steps, inner=inner, lam=lam, delta=delta, zeta=zeta, guide=guide,
                  callback=report, **options)
    return fine.z, z_T_ctx if eps_ctx is None else levels[0].z

# ----- 4. Patches, and the command -----

def draw_patches(model, batch, cfg, ranks, null=False):
    """One patch per item of a collated batch with tokens, mask, s, x: (N,3,P,P) in [-1,1] on the CPU."""
    parts = [batch[name].to(ranks.device) for name in ("tokens", "mask", "s")]
    side, guidance = batch["x"].shape[-1] // model.vae.factor, 1.0 if null else cfg.guidance
    with ranks.autocast():
        c = model.summarizer(*parts).float()                                            # (N,L,D)
        c = null_condition(c) if null else c
        return model.draw(c, side, guidance, cfg.steps, cfg.seed, cfg.batch, cfg.sampler, cfg.end)

def scales_of(cfg, pyramids):
    """The scales to draw: the one asked for, or all that the split has."""
    there = [s for s in range(pyramids.scales) if pyramids.count(cfg.split, s)]
    wanted = there if cfg.scale < 0 else [cfg.scale]
    if not wanted or wanted[0] not in there:
        raise UserError(f"--scale={cfg.scale} --split={cfg.split}: there are scales {there}; try --split=train")
    return wanted

def show(model, pyramids, cfg, ranks):
    """Write every drawn patch as a PNG, and a sheet: real patches above those drawn from their conditions."""
    rows, labels = [], []
    for s in tqdm(scales_of(cfg, pyramids), "scales"):
        batch = fixed_batch(pyramids, cfg.split, s, cfg.n)
        x = draw_patches(model, batch, cfg, ranks)
        for i, pixels in enumerate(to_uint8(x).numpy()):
            save_png(Path(cfg.out) / f"scale{s}_{i:03d}.png", pixels)
        rows += [batch["x"], x]
        labels += [f"scale {s} real", f"scale {s} drawn"]
    save_grid(Path(cfg.out) / "sheet.png", rows, labels)
    print(f"wrote {cfg.out}: up to {cfg.n} patches a scale, and sheet.png (real above drawn); "
          f"next: python sample_joint.py {cfg.run} --size=512" + f" --data={cfg.data}" * bool(cfg.data))

@dataclass
class Config:
    run: str = ""              # run folder, or a file of weights; default: those that come with this
    data: str = ""             # data folder; default: the one the run was trained on
    split: str = "test"        # whose conditions: test or train
    out: str = ""              # a folder; default RUN/patches. Large images: a file, default RUN/large.png
    scale: int = -1            # one scale, 0 = finest; -1 = all, or 0 for large images
    condition: str = "reference"  # embeddings of real images; or invented: cdm, edm; large images: grid
    n: int = 0                 # patches per scale, at most as many as there are; 0 = 8, or 128 with --eval
    guidance: float = 1.5      # eps_null + guidance (eps_cond - eps_null); 1 = none; papers, and large images, 2
    sampler: str = "dpm"       # dpm: DPM-Solver++ 2M at times that crowd at the clean end; ddim; plms
    steps: int | None = None   # None: 10 of dpm, which do what 50 of ddim do; 50 of ddim and plms
    end: str = "clean"         # of ddim: clean, or published (3.9 % of noise stay), as plms ends
    seed: int = 0
    eval: bool = False         # measure patches instead of showing them
    learned: bool = False      # --eval: in learned features, too (extra: encoders)
    size: tuple = ()           # large images: pixels, a side or height,width; with further settings
    batch: int = 64            # patches or windows per network call
    device: str = "auto"
    threads: int = 0           # 0 = PyTorch's choice
    amp: bool = True           # bf16 where the device has it and no difference is taken
    compile: bool = False      # torch.compile the networks: for long runs, and only with a compiler

def known_data(model, folder):
    """The data of a run. raises: UserError if it is none that the model knows."""
    info, told = model.info, model.summarizer.cfg
    pyramids = Pyramids(folder, std=info.get("std"))
    made = pyramids.patch, pyramids.encoder, pyramids.embed_dim
    knows = info.get("patch"), info.get("encoder"), told.embed_dim
    if made != knows or pyramids.scales > told.scales:
        raise UserError(f"{folder}: patch, encoder and width of embeddings are {made}, the run knows {knows} and "
                        f"{told.scales} scales: give its own data")
    return pyramids

def main(argv):
    if "--size=" in " ".join(argv):
        from large.command import main as draw_large_image
        return draw_large_image(argv)
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run:
        from weights.shipped import draw
        return draw(argv)
    one_of(cfg, condition=("reference", "cdm", "edm"), end=("clean", "published"))
    cfg.steps = (10 if cfg.sampler == "dpm" else 50) if cfg.steps is None else cfg.steps
    at_least(cfg, n=0, seed=0, steps=1, batch=1)
    cfg.out = cfg.out or str(home_of(cfg.run) / ("eval" if cfg.eval else "patches"))
    cfg.n = cfg.n or (128 if cfg.eval else 8)
    if cfg.condition != "reference":
        from experiments.invented import sample_patches
        return sample_patches(cfg)
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    if cfg.compile:
        print("compiling: the first calls take a minute each")
        model.unet.compile()
    pyramids = known_data(model, cfg.data or model.info.get("data", ""))
    if cfg.eval:
        from experiments.evaluate import evaluate
        return evaluate(model, pyramids, cfg, ranks)
    show(model, pyramids, cfg, ranks)

if __name__ == "__main__":
    cli(main, stopped="the same command goes on with a large image, and draws patches anew")
