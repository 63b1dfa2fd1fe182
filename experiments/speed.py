"""Speed and memory of large images, side by side in one run.

    python -m experiments.speed speed out/toy_long     # ratios to a plain transcription of Algorithm S2
    python -m experiments.speed flat out/toy_long      # seconds per megapixel and peak memory, of several sizes
    python -m experiments.speed cosine out/toy_long    # how far S2's direction is from S1's at every t (Z Eq. 6)
    python -m experiments.speed against ../old --part=large     # this checkout beside an older one: against.py

in:  a run folder   out: tables     read next: bench.py
"""
import resource
import time
from dataclasses import dataclass, replace
from functools import partial

import torch

from common import UserError, at_least, cli, configure
from diffusion import ddim_step, ddim_timesteps, noise_levels, to_x0
from experiments import metrics as M
from experiments.bench import NOT_KEPT
from experiments.cost import Profile
from experiments.quality import crops, held_out, open_run, tflop, uncrop
from large.command import Settings, draw_large, pixels
from large.windows import decode_strips, prepare
from sample_joint import Resize, full_precision, sample_levels

@dataclass
class Config:
    command: str = ""       # speed, flat, cosine
    run: str = ""           # run folder
    data: str = ""          # data folder; default: the one the run was trained on
    size: int = 512         # pixels a side
    sizes: tuple = (512, 1024, 2048)  # of flat, each a multiple of the first
    steps: int = 2          # of each timed run (flat: the default of the command)
    rounds: int = 3         # speed: medians over so many
    device: str = "auto"
    threads: int = 2

# ----- 1. Algorithm S2 as one would write it down -----

def largest(parts):
    """Largest absolute value of each window, (n,1,1,1), never zero."""
    return parts.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)

def batches(f, x):
    return torch.cat([f(part) for part in x.split(16)])

@torch.no_grad()
def transcribed(model, c, c_ctx, z, z_ctx, factor, steps, lam=0.5, delta=0.005, zeta=0.005):
    """Joint sampling of a stitched grid of patches in float32, batches of 16, K = 1, guidance 2, as published.
    reference.md §7.

    in:  tokens c (n,L,D) of the windows of the fine canvas, row by row, and its noise z; c_ctx (1,L,D) and z_ctx of the
    context. out: latents (1,3,H,W).
    """
    A, timesteps = Resize(factor), ddim_timesteps(1000, steps)
    patches, side = crops(z, z_ctx.shape[-1]), z_ctx.shape[-1] * model.vae.factor       # (n,3,w,w)
    fns, fn_ctx = [model.guided(part, 2.0) for part in c.split(16)], model.guided(c_ctx, 2.0)
    ab, ab_prev = noise_levels(model.schedule, timesteps, "clean")

    def estimate(z, i):
        t = torch.full((16,), timesteps[i], device=z.device)
        eps = torch.cat([fn(part, t[:len(part)]) for fn, part in zip(fns, z.split(16))])
        return eps, to_x0(eps, z, ab[i], "eps")

    for i in reversed(range(len(timesteps))):
        eps_c = fn_ctx(z_ctx, torch.full((1,), timesteps[i], device=z.device))
        x0_c = to_x0(eps_c, z_ctx, ab[i], "eps")
        y = model.decode(x0_c).clamp(-1, 1)
        z_ctx = ddim_step(z_ctx, x0_c, eps_c, ab_prev[i])
        _, z0_hat = estimate(patches, i)
        x = batches(model.decode, z0_hat)                                               # (n,3,side,side)
        canvas = uncrop(x, [n * factor for n in y.shape[2:]])
        u = crops(A.up(y - A.down(canvas)), side)
        step = largest(u)
        moved = batches(model.encode, x + zeta * u / step)
        e = (moved - batches(model.encode, x)) * step / zeta
        _, moved = estimate(patches + delta * (e * (1 / largest(e))), i)
        g = (moved - z0_hat) / delta
        patches = patches + lam * (g * (1 / largest(g)))
        eps, z0_hat = estimate(patches, i)
        patches = ddim_step(patches, z0_hat, eps, ab_prev[i])
    return uncrop(patches, z.shape[2:])

@torch.no_grad()
def published_decoding(model, z, w):
    """Windows at a quarter of their side, weighted exp(-d^2 / 0.8^2) with d from the centre. reference.md §7.6."""
    side, size = w * model.vae.factor, [n * model.vae.factor for n in z.shape[2:]]
    line = torch.linspace(-1, 1, side)
    weight = torch.exp(-(line[:, None] ** 2 + line ** 2) / 0.8 ** 2)                    # (side,side)
    x = batches(model.decode, crops(z, w, w // 4))                                      # (n,3,side,side)
    total = uncrop(x * weight, size, side // 4)
    return (total / uncrop(weight.expand_as(x), size, side // 4)).clamp(-1, 1)

# ----- 2. The table of speed -----

class Bench:
    """A run, and a held-out slide to draw: the ways that are timed, all without overlap and with `steps` steps."""

    def __init__(self, cfg):
        self.model, pyramids, self.proxy, self.ranks = open_run(cfg)
        self.grid, _ = held_out(pyramids, 0, cfg.size)
        self.cfg, self.context = cfg, (cfg.size // pyramids.patch).bit_length() - 1
        self.window = pyramids.patch // self.model.vae.factor

    def levels(self, guided=(0, 1000)):
        dtype = self.model.unet.conv_out.weight.dtype
        made = prepare(self.model, lambda *at: self.grid(*at).to(dtype), (self.cfg.size,), [self.context, 0], 0,
                       guided=guided, proxy=self.proxy)
        for level in made:
            level.z = level.z.to(dtype)
        return made

    def bf16(self, on):
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=on)

    def ours(self, guide, lam, amp=True, guided=(0, 1000)):
        made = self.levels(guided)
        with self.bf16(amp):
            sample_levels(made, self.model.schedule, steps=self.cfg.steps, guide=guide, lam=lam, end="clean")
        return made[-1].z

    def theirs(self):
        ctx, fine = self.levels()
        c, c_ctx = (torch.stack([level.eps.c[ij] for ij in level.canvas.ij]) for level in (fine, ctx))
        return transcribed(self.model, c, c_ctx, fine.z, ctx.z, 2 ** self.context, self.cfg.steps)

    def decoding(self, z, amp=True):
        with self.bf16(amp):
            return list(decode_strips(self.model.decode, z, self.window * 3 // 2, self.window // 2))

    def apart(self):
        """The largest difference of latents, transcription and s2."""
        return float((self.theirs() - self.ours("s2", 0.5, amp=False)).abs().max())

    def spent(self, call):
        """Seconds, and TFLOP at full size."""
        meter, began = Profile(self.model, self.proxy), time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        meter.close()
        return seconds, tflop(meter)

WAYS = {  # what is timed beside the transcription: arguments of Bench.ours
    "s2, float32": dict(guide="s2", lam=0.5, amp=False),
    "s2, bf16": dict(guide="s2", lam=0.5),
    "x0": dict(guide="x0", lam=1.0),
    "x0+proxy": dict(guide="x0+proxy", lam=1.0),
    "part guided": dict(guide="x0+proxy", lam=1.0, guided=(100, 800)),
    "unguided": dict(guide="s2", lam=0.0),
}

def speed(cfg):
    """Print seconds, full-size FLOPs and ratios to the transcription; the decoding at the end is timed apart and added
    once to 50 steps."""
    bench = Bench(cfg)
    z, costs = bench.levels()[-1].z, {}
    jobs = {"transcription": (bench.theirs, partial(published_decoding, bench.model, z, bench.window))}
    for name, how in WAYS.items():
        jobs[name] = partial(bench.ours, **how), partial(bench.decoding, z, how.get("amp", True))
    for _ in range(cfg.rounds):
        for name, (draw, decode) in jobs.items():
            costs.setdefault(name, []).append(bench.spent(draw) + bench.spent(decode))
    single = bench.apart()
    bench.model.double()
    print(f"{cfg.size} x {cfg.size} pixels, no overlap, guidance 2, medians of {cfg.rounds} rounds, {cfg.steps} steps\n"
          f"largest difference of latents, transcription and s2: {single:.1e} in float32, "
          f"{bench.apart():.1e} in float64\n"
          f"{'':>16}{'s a step':>10}{'decoding':>10}{'50 steps':>10}{'times':>8}{'full size, TFLOP':>18}{'times':>8}")
    for name, spent in costs.items():
        draw, flops, decode, more = torch.tensor(spent).median(0).values.tolist()
        seconds, total = 50 / cfg.steps * draw + decode, 50 / cfg.steps * flops + more
        if name == "transcription":
            first = seconds, total
        print(f"{name:>16}{draw / cfg.steps:>10.2f}{decode:>10.2f}{seconds:>10.1f}{first[0] / seconds:>8.2f}"
              f"{total:>18.0f}{first[1] / total:>8.2f}")

# ----- 3. Does cost grow with the canvas? -----

def flat(cfg):
    """Draw canvases of several sizes as the command does by default, on embeddings of a held-out slide repeated, with
    one scale for context."""
    cfg.size = cfg.sizes[0]
    if cfg.size < 1 or any(side % cfg.size for side in cfg.sizes):
        raise UserError(f"--sizes={cfg.sizes}: give sides in pixels, each a multiple of the first")
    bench = Bench(cfg)
    model, grid, ranks = bench.model, bench.grid, bench.ranks
    usual = Settings(run=cfg.run, size=(cfg.size,), context=(bench.context,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw_large(model, grid, replace(usual, steps=1), ranks, bench.proxy)  # the first call of a kernel is slow
    print(f"{usual.guide}, context at scale {bench.context}\n{'side':>6}{'windows':>9}"
          f"{'seconds':>10}{'of CPU':>9}{'CPU s per megapixel':>21}{'memory above the model, MB':>28}"
          f"{'canvas (float32), MB':>22}")
    for side in cfg.sizes:
        wide = replace(grid, e=grid.e.tile(1, side // cfg.size, side // cfg.size))
        began, busy = time.perf_counter(), time.process_time()
        levels, _ = draw_large(model, wide, replace(usual, size=(side,)), ranks, bench.proxy)
        for _ in pixels(model, levels[-1].z, ranks):
            pass
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"{side:>6}{len(levels[-1].canvas.ij):>9}{seconds:>10.1f}{busy:>9.1f}{busy / side ** 2 * 1e6:>21.1f}"
              f"{grown:>28.0f}{side ** 2 * 12e-6:>22.0f}", flush=True)

# ----- 4. Eq. 6's claim -----

def directions(level, t, ab, proxy):
    """Cosines of S2's e (Eq. 6) with S1's (Eq. 3), of the g (Eq. 4) that follow, and of the proxy's e with S1's;
    seconds of Eq. 6 and Eq. 3, and the megabytes that backpropagation keeps."""
    unit, kept = level.canvas.unit, []

    def keep(x):
        kept.append(x.nbytes)
        return x
    with full_precision(level.z):
        z0, _ = level.z0_hat(level.z, t, ab)
        x = level.Dec(z0)
        e_img = unit(level.error(x))
        clock = [time.perf_counter()]
        e6 = unit(level.Enc(x + 0.005 * e_img) - level.Enc(x))
        clock.append(time.perf_counter())
        with torch.autograd.graph.saved_tensors_hooks(keep, torch.as_tensor):
            e3 = unit(level.backpropagate(level.decode, z0, e_img))
        clock.append(time.perf_counter())
        small = replace(level, decode=proxy, A=Resize(level.A.factor // proxy.factor))
        ep = level.backpropagate(proxy, z0, small.error(small.Dec(z0)))
        g6, g3 = (level.z0_hat(level.z + 0.005 * e, t, ab)[0] - z0 for e in (e6, e3))
    cosines = [M.similarity(a.flatten(1), b.flatten(1)) for a, b in ((e6, e3), (g6, g3), (ep, e3))]
    return *cosines, clock[1] - clock[0], clock[2] - clock[1], sum(kept) / 2 ** 20

def cosine(cfg):
    """Print `directions` at ten t of one run. out: rows, t and the three cosines."""
    bench, rows = Bench(cfg), []
    timesteps, alpha_bar = ddim_timesteps(1000, 20), bench.model.schedule.alpha_bar

    def look(n, step, levels):
        if n % 2 == 0:
            t = timesteps[-2 - n]                                                       # where z lies after this step
            e, g, ep, first, second, kept = directions(levels[-1], t, float(alpha_bar[t]), bench.proxy)
            rows.append((t, e, g, ep))
            print(f"{t:>6}{e:>18.3f}{g:>18.3f}{ep:>18.3f}{first:>10.1f}{second:>10.1f}{kept:>16.0f}", flush=True)
    print(f"{'t':>6}{'e, S2 with S1':>18}{'g, S2 with S1':>18}{'e, proxy with S1':>18}{'Eq. 6, s':>10}{'Eq. 3, s':>10}"
          f"{'Eq. 3 keeps, MB':>16}")
    sample_levels(bench.levels(), bench.model.schedule, steps=20, guide="x0+proxy", lam=0.3, callback=look, end="clean")
    return rows

COMMANDS = {"speed": speed, "flat": flat, "cosine": cosine}

def main(argv):
    if argv[:1] == ["against"]:
        from experiments.against import main as compare_checkouts
        return compare_checkouts(argv[1:])
    cfg = configure(Config, argv, words=("command", "run"), doc=__doc__)
    if cfg.command not in COMMANDS or not cfg.run:
        raise UserError("write python -m experiments.speed speed RUN, or flat RUN, cosine RUN, against OLDER_CHECKOUT")
    at_least(cfg, rounds=1, steps=1, size=256 if cfg.command == "cosine" else 1)
    COMMANDS[cfg.command](cfg)

if __name__ == "__main__":
    cli(main, stopped=NOT_KEPT)
