"""Speed and memory of large images, side by side in one run.

    python joint_table.py speed out/toy_long     # ratios to a plain transcription of Algorithm S2
    python joint_table.py flat out/toy_long      # seconds per megapixel and peak memory, 512 to 2048 pixels
    python joint_table.py cosine out/toy_long    # how far S2's direction is from S1's gradient at every t (Z Eq. 6)

in:  a run folder   out: tables     read next: rivals.py
"""
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common import UserError, cli, configure
from diffusion import ddim_step, ddim_timesteps, noise_levels, to_x0
from experiments.cost import Profile, full_size
from experiments.quality import held_out, open_run
from large.command import Settings, draw_large, pixels
from large.windows import contexts, decode_strips, prepare
from sample_joint import GUIDES, Canvas, Resize, full_precision, sample_levels


def peak(parts):
    """Largest absolute value of each window, (N,1,1,1), never zero."""
    return parts.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)


@dataclass
class Config:
    command: str = ""       # speed, flat, cosine; one = what flat runs
    run: str = ""           # run folder
    data: str = ""          # data folder; default: the one the run was trained on
    size: int = 512         # pixels a side
    steps: int = 2          # of each timed run
    rounds: int = 3         # speed: medians over so many
    guide: str = "x0+proxy" # flat: what is timed
    overlap: int = -1
    device: str = "auto"
    threads: int = 2


# ----- 1. Algorithm S2 as one would write it down -----

@torch.no_grad()
def transcribed(model, c, c_ctx, z, z_ctx, factor, steps, guidance=2.0, lam=0.5, delta=0.005, zeta=0.005, inner=1):
    """Joint sampling of a stitched grid of patches in float32, batches of 16, as published.

    in:  c {corner: tokens} and noise z of the fine canvas, c_ctx and z_ctx of the context. out: latents (1,3,H,W), and
    after the published decoding: windows at a quarter of their side, blended with a Gaussian. reference.md §7.
    """
    W, w, ij, A = z.shape[-1], z_ctx.shape[-1], list(c), Resize(factor)
    patches = torch.cat([z[..., i:i + w, j:j + w] for i, j in ij])                      # (n,3,w,w)
    tokens, columns = torch.stack([c[p] for p in ij]), W // w
    fns = [model.guided(tokens[k:k + 16], guidance) for k in range(0, len(ij), 16)]
    fn_ctx, timesteps = model.guided(torch.stack(list(c_ctx.values())), guidance), ddim_timesteps(1000, steps)
    ab, ab_prev = noise_levels(model.schedule, timesteps, "clean")

    def batches(f, x):
        return torch.cat([f(part) for part in x.split(16)])

    def stitch(x):
        return x.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]

    def cut(x, side):
        return F.unfold(x, side, stride=side)[0].T.reshape(-1, 3, side, side)

    def estimate(z, i):
        t = torch.full((16,), timesteps[i], device=z.device)
        eps = torch.cat([fn(part, t[:len(part)]) for fn, part in zip(fns, z.split(16))])
        return eps, to_x0(eps, z, ab[i], "eps")
    for i in reversed(range(len(timesteps))):
        eps_c = fn_ctx(z_ctx, torch.full((1,), timesteps[i], device=z.device))
        x0_c = to_x0(eps_c, z_ctx, ab[i], "eps")
        z_ctx, y = ddim_step(z_ctx, x0_c, eps_c, ab_prev[i]), model.decode(x0_c).clamp(-1, 1)
        eps, z0_hat = estimate(patches, i)
        for _ in range(inner):
            x = batches(model.decode, z0_hat)
            u = cut(A.up(y - A.down(stitch(x))), x.shape[-1])
            e = (batches(model.encode, x + zeta * u / peak(u)) - batches(model.encode, x)) * peak(u) / zeta
            g = (estimate(patches + delta * (e * (1 / peak(e))), i)[1] - z0_hat) / delta
            patches = patches + lam * (g * (1 / peak(g)))
            eps, z0_hat = estimate(patches, i)
        patches = ddim_step(patches, z0_hat, eps, ab_prev[i])
    return stitch(patches)


@torch.no_grad()
def published_decoding(model, z, w):
    """Windows at a quarter of their side, weighted exp(-d^2 / 0.8^2) with d from the centre. reference.md §7.6."""
    line = torch.linspace(-1, 1, w * model.vae.factor)
    weight = torch.exp(-(line[:, None] ** 2 + line ** 2) / 0.8 ** 2)
    canvas, f = Canvas(*z.shape[2:], w, w * 3 // 4), model.vae.factor
    total, weights = torch.zeros(1, 3, *(n * f for n in z.shape[2:])), torch.zeros([n * f for n in z.shape[2:]])
    for k in range(0, len(canvas.ij), 16):
        for x, (i, j) in zip(model.decode(canvas.cut(z, canvas.ij[k:k + 16])), canvas.ij[k:k + 16]):
            at = slice(i * f, (i + w) * f), slice(j * f, (j + w) * f)
            total[0, :, at[0], at[1]] += x * weight
            weights[at] += weight
    return (total / weights).clamp(-1, 1)


def speed(cfg):
    """Print seconds, full-size FLOPs and ratios to the transcription, all without overlap and with `steps` steps; the
    decoding at the end is timed apart and added once to 50 steps."""
    model, pyramids, proxy, ranks = open_run(cfg)
    grid, _, _ = held_out(pyramids, 0, cfg.size)
    context, window = (cfg.size // pyramids.patch).bit_length() - 1, pyramids.patch // model.vae.factor

    def levels(guided=(0, 1000)):
        made = prepare(model, lambda *at: grid(*at).to(kind()), (cfg.size,), [context, 0], 0, guided=guided,
                       proxy=proxy)
        for level in made:
            level.z = level.z.to(kind())
        return made

    def kind():
        return model.unet.conv_out.weight.dtype

    def ours(guide, amp, guided=(0, 1000), **options):
        made = levels(guided)
        lam = 1.0 if guide.startswith("x0") else 0.5
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=amp):
            sample_levels(made, model.schedule, steps=cfg.steps, guide=guide, end="clean", **({"lam": lam} | options))
        return made[-1].z

    def theirs():
        made = levels()
        c, c_ctx = (contexts(model, lambda *at: grid(*at).to(kind()), s, level.canvas)
                    for level, s in zip(made[::-1], (0, context)))
        return transcribed(model, c, c_ctx, made[1].z, made[0].z, 2 ** context, cfg.steps)

    def decoding(amp):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=amp):
            return list(decode_strips(model.decode, z, window * 3 // 2, window // 2))
    z = levels()[-1].z
    runs = {"transcription": (theirs, lambda: published_decoding(model, z, window)),
            "s2, float32": (lambda: ours("s2", False), lambda: decoding(False)),
            "s2, bf16": (lambda: ours("s2", True), lambda: decoding(True)),
            "x0": (lambda: ours("x0", True), lambda: decoding(True)),
            "x0+proxy": (lambda: ours("x0+proxy", True), lambda: decoding(True)),
            "part guided": (lambda: ours("x0+proxy", True, (100, 800)), lambda: decoding(True)),
            "unguided": (lambda: ours("s2", True, lam=0.0), lambda: decoding(True))}
    seconds, flops, full = {name: ([], []) for name in runs}, {}, full_size()
    for _ in range(cfg.rounds):
        for name, pair in runs.items():
            spent = []
            for k, f in enumerate(pair):
                meter, began = Profile(model, proxy), time.perf_counter()
                f()
                seconds[name][k].append(time.perf_counter() - began)
                meter.close()
                spent.append(sum(meter.rows[p] * full.get(p, 0) for p in meter.rows))
            flops[name] = spent[0] * 50 / cfg.steps + spent[1]
    far = [float((theirs() - ours("s2", False)).abs().max())]
    model.double()
    far.append(float((theirs() - ours("s2", False)).abs().max()))
    print(f"{cfg.size} x {cfg.size} pixels, no overlap, guidance 2, medians of {cfg.rounds} rounds, {cfg.steps} steps\n"
          f"largest difference of latents, transcription and s2: {far[0]:.1e} in float32, {far[1]:.1e} in float64\n"
          f"{'':>16}{'s a step':>10}{'decoding':>10}{'50 steps':>10}{'times':>8}{'full size, TFLOP':>18}{'times':>8}")
    half = {name: [sorted(v)[len(v) // 2] for v in pair] for name, pair in seconds.items()}
    total = {name: 50 / cfg.steps * a + b for name, (a, b) in half.items()}
    for name, (a, b) in half.items():
        print(f"{name:>16}{a / cfg.steps:>10.2f}{b:>10.2f}{total[name]:>10.1f}"
              f"{total['transcription'] / total[name]:>8.2f}{flops[name] / 1e12:>18.0f}"
              f"{flops['transcription'] / flops[name]:>8.2f}")


# ----- 2. Does cost grow with the canvas? -----

def one(cfg):
    """Draw one canvas in this process, on the embeddings of a held-out slide repeated; print seconds and megabytes."""
    model, pyramids, proxy, ranks = open_run(cfg)
    grid, _, _ = held_out(pyramids, 0, 512)
    times = -(-cfg.size // 512)
    grid.e = grid.e.tile(1, times, times)
    settle = Settings(run=cfg.run, size=(cfg.size,), context=(3,), steps=cfg.steps, guide=cfg.guide,
                      overlap=cfg.overlap)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw_large(model, grid, replace(settle, size=(512,), steps=1), ranks, proxy)  # the first call of a kernel is slow
    began = time.perf_counter()
    levels, _ = draw_large(model, grid, settle, ranks, proxy)
    for strip in pixels(model, levels[-1].z, ranks):
        assert strip.shape[1] == cfg.size
    seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{cfg.size} {seconds} {grown}")


def flat(cfg):
    """Run `one` for growing sizes, each in a process of its own."""
    print(f"{cfg.guide}, {cfg.steps} steps, context at scale 3\n{'side':>6}{'seconds':>10}{'s per megapixel':>17}"
          f"{'memory above the model, MB':>28}{'canvas (float32 pixels), MB':>30}")
    for size in (512, 1024, 2048):
        command = [sys.executable, __file__, "one", cfg.run, f"--size={size}", f"--steps={cfg.steps}",
                   f"--guide={cfg.guide}", f"--device={cfg.device}", f"--threads={cfg.threads}", f"--data={cfg.data}",
                   f"--overlap={cfg.overlap}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        _, seconds, grown = map(float, done.stdout.split()[-3:])
        print(f"{size:>6}{seconds:>10.1f}{seconds / size ** 2 * 1e6:>17.1f}{grown:>28.0f}{size ** 2 * 12e-6:>30.0f}",
              flush=True)


# ----- 3. Eq. 6's claim -----

def cosine(cfg):
    """At ten t of one run, the cosine between Algorithm S2's e (Eq. 6) and S1's (Eq. 3), and between the g (Eq. 4) that
    follow; of the proxy's e with S1's; seconds of Eq. 6 and Eq. 3, and the megabytes that backpropagation keeps."""
    model, pyramids, proxy, ranks = open_run(cfg)
    grid, _, _ = held_out(pyramids, 0, cfg.size)
    context = (cfg.size // pyramids.patch).bit_length() - 1
    levels = prepare(model, grid, (cfg.size,), [context, 0], 0, proxy=proxy)
    timesteps, kept = ddim_timesteps(1000, 20), [0]

    def like(a, b):
        return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))

    def keep(x):
        kept[0] += x.nbytes
        return x

    def look(n, t, levels):
        if n % 2 or n + 2 > len(timesteps):
            return
        level, at = levels[-1], timesteps[len(timesteps) - 2 - n]
        ab, unit = float(model.schedule.alpha_bar[at]), level.canvas.unit
        small = replace(level, decode=proxy, A=Resize(level.A.factor // proxy.factor))
        with full_precision(level.z):
            z0, _ = level.z0_hat(level.z, at, ab)
            x = level.Dec(z0)
            e_img, clock = unit(level.error(x)), [time.perf_counter()]
            e6 = unit(level.Enc(x + 0.005 * e_img) - level.Enc(x))
            clock.append(time.perf_counter())
            kept[0] = 0
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                e3 = unit(level.backpropagate(model.decode, z0, e_img))
            clock.append(time.perf_counter())
            ep = level.backpropagate(proxy, z0, small.error(small.Dec(z0)))
            g6, g3 = (level.z0_hat(level.z + 0.005 * e, at, ab)[0] - z0 for e in (e6, e3))
        seconds = clock[1] - clock[0], clock[2] - clock[1]
        print(f"{at:>6}" + "".join(f"{v:>18.3f}" for v in (like(e6, e3), like(g6, g3), like(ep, e3)))
              + f"{seconds[0]:>10.1f}{seconds[1]:>10.1f}{kept[0] / 2 ** 20:>16.0f}", flush=True)
    print(f"{'t':>6}{'e, S2 with S1':>18}{'g, S2 with S1':>18}{'e, proxy with S1':>18}{'Eq. 6, s':>10}{'Eq. 3, s':>10}"
          f"{'Eq. 3 keeps, MB':>16}")
    sample_levels(levels, model.schedule, steps=20, guide="x0+proxy", lam=0.3, callback=look, end="clean")


def main(argv):
    cfg = configure(Config, argv, words=("command", "run"), doc=__doc__)
    commands = {"speed": speed, "flat": flat, "cosine": cosine, "one": one}
    if cfg.command not in commands or not cfg.run:
        raise UserError("write python joint_table.py speed RUN, or flat RUN, or cosine RUN")
    if min(cfg.rounds, cfg.steps) < 1 or cfg.guide not in GUIDES or cfg.command == "cosine" and cfg.size < 256:
        raise UserError(f"--rounds={cfg.rounds} --steps={cfg.steps} --guide={cfg.guide} --size={cfg.size}: the first "
                        f"two are at least 1, guides are {', '.join(GUIDES)}, and cosine takes 256 pixels or more")
    commands[cfg.command](cfg)


if __name__ == "__main__":
    cli(main)
