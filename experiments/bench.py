"""Speed and memory of the networks, of training and of sampling, side by side in one run.

    python bench.py                            # reduced width, some minutes on two cores -> out/bench.md
    python bench.py --full                     # as published, 20 minutes -> out/bench_full.md; --compile: more
    python bench.py --full --compile --device=cuda --batch=32
    python bench.py plan --gpus=256            # past one machine: see plan.py; so is python bench.py loader RUN

Everything is called in turn, round after round, together with what the machine can do at best, so that other work on it
slows all alike: trust the ratios. Random weights: no run is needed.

in:  nothing   out: tables, on the screen and in --out     read next: README.md
"""
import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F

import zoom_vae
from common import UserError, cli, configure, setup, write_text
from diffusion import ZoomLDM
from experiments import plan
from experiments.cost import meta_flops, network_flops, rows_of_step, training_flops
from experiments.rivals import Diffusers, compared, plain
from large.proxy import Proxy
from large.windows import prepare
from sample_joint import sample_levels
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig


@dataclass
class Config:
    command: str = ""       # empty; plan or loader: see plan.py; one = what measures memory
    full: bool = False      # the published widths; False: a third or a quarter of them
    device: str = "cpu"
    threads: int = 0        # 0 = PyTorch's choice
    rounds: int = 3         # medians over so many
    steps: int = 2          # that are timed where 50 would be drawn
    batch: int = 2          # patches per call, and per training step
    compile: bool = False   # torch.compile as well
    groups: str = ""        # of GROUPS, with "," between; empty = all
    only: str = ""          # one: a line of a table, "group: line"
    out: str = ""           # empty = out/bench.md, and out/bench_full.md with --full


SIDE = 64  # latents of a patch of 256 pixels
HALF, FLOAT, LAST, FIRST = torch.bfloat16, torch.float32, torch.channels_last, torch.contiguous_format


def sizes(full):
    """Configs of U-Net, VAE and Summarizer: as published, or so that a call takes a fraction of a second."""
    return (UNetConfig(), VAEConfig(), SummarizerConfig()) if full else (
        UNetConfig(64), VAEConfig(32), SummarizerConfig(depth=2))


# ----- 1. What is timed: groups of lines (name, FLOP or bytes of a call, a function that builds the call) -----

def kinds(ranks):
    return (("fp32", FLOAT), ("bf16", HALF)) if ranks.amp else (("fp32", FLOAT),)


def conv(ranks, b, c, side, kind, dtype, order=FIRST):
    """The line of a 3 x 3 convolution."""
    def build():
        x, w = (torch.randn(shape, dtype=dtype, device=ranks.device).to(memory_format=order)
                for shape in ((b, c, side, side), (c, c, 3, 3)))
        return partial(F.conv2d, x, w, padding=1)
    name = f"conv {b}x{c}->{c} @{side} {kind}" + " nhwc" * (order == LAST)
    return name, 2 * 9 * b * c * c * side ** 2, build


def matmul(ranks, full, kind, dtype):
    n = 4096 if full else 2048
    return f"matmul {n} {kind}", 2 * n ** 3, lambda: partial(torch.mm, *torch.randn(
        2, n, n, dtype=dtype, device=ranks.device))


def peaks(cfg, ranks):
    """The best this machine does."""
    for kind in kinds(ranks):
        yield matmul(ranks, cfg.full, *kind)
        for shape in ((2, 192, SIDE), (1, 512, SIDE), (1, 128, 4 * SIDE)):
            for order in (FIRST, LAST):
                yield conv(ranks, *shape, *kind, order)
    yield "copy, bytes read and written", 2 << 28, lambda: torch.zeros(1 << 28, dtype=torch.int8,
                                                                       device=ranks.device).clone


def unets(cfg, ranks, backward=False):
    """Our U-Net, diffusers', and the plain one: a forward pass, or a forward and a backward one."""
    shape, device = sizes(cfg.full)[0], ranks.device
    z, c = torch.randn(cfg.batch, shape.channels, SIDE, SIDE), torch.randn(cfg.batch, 65, shape.context_dim)
    t = torch.full((cfg.batch,), 500, device=device)

    @cache
    def net(kind, dtype, order):
        return kind(shape).to(device, dtype, memory_format=order).requires_grad_(backward)

    def build(kind, how, dtype=FLOAT, order=FIRST, amp=False):
        model, x, context = net(kind, dtype, order), z.to(device, dtype, memory_format=order), c.to(device, dtype)
        f = how(model)

        def call():
            with torch.set_grad_enabled(backward), torch.autocast(device.type, HALF, enabled=amp):
                out = f(x, t, context)
            if backward:
                out.float().square().mean().backward()
                model.zero_grad()
        return call
    ways = {"fp32": {}, "fp32, channels last": {"order": LAST}}
    if ranks.amp:
        ways |= {"bf16 autocast": {"amp": True}} | ({} if backward else {
            "bf16 weights": {"dtype": HALF}, "bf16 weights, channels last": {"dtype": HALF, "order": LAST}})
    # weights that stay what they are can be laid out anew, which torch does for a CPU
    freeze = {"freezing": True} if device.type == "cpu" and not backward else None
    nets = {"ours": (UNet, lambda net: net, list(ways)),
            "plain": (UNet, lambda net: partial(plain, net), [w for w in ways if w in ("fp32", "bf16 autocast")])}
    if compared(shape, SIDE)[1]:
        nets["diffusers"] = Diffusers, lambda net: net, [w for w in ways if "last" not in w]
    if cfg.compile:
        nets["ours, compiled"] = UNet, partial(torch.compile, options=freeze), ["fp32", list(ways)[-1]]
    work = cfg.batch * (training_flops(shape, SIDE) if backward else
                        meta_flops(lambda: UNet(shape), z.shape[1:], shape.context_dim))
    yield from (matmul(ranks, cfg.full, *kind) for kind in kinds(ranks))
    for name, (kind, how, mine) in nets.items():
        for way in mine:
            yield f"{name}, {way}", work, partial(build, kind, how, **ways[way])


def vaes(cfg, ranks):
    """Encoding and decoding one patch. On a CPU it convolves with channels last by itself: see zoom_vae.layout."""
    unet, shape, _ = sizes(cfg.full)
    z = torch.randn(1, shape.channels, SIDE, SIDE, device=ranks.device)
    x = torch.randn(1, 3, *[SIDE << len(shape.mult) - 1] * 2, device=ranks.device)

    @cache
    def vae(dtype):
        return VQVAE(shape).to(ranks.device, dtype).requires_grad_(False)

    def build(f, dtype=FLOAT, amp=False, order=None):
        model, otherwise = vae(dtype), lambda *_: order

        def call():
            with mock.patch.object(zoom_vae, "layout", otherwise) if order else nullcontext():
                with torch.no_grad(), torch.autocast(ranks.device.type, HALF, enabled=amp):
                    f(model, dtype)
        return call
    ways = {"fp32": {}, "fp32, channels first": {"order": FIRST}, "fp32, channels last": {"order": LAST}}
    ways |= {"bf16 autocast": {"amp": True}, "bf16 weights": {"dtype": HALF}} if ranks.amp else {}
    work = network_flops(unet, shape, SIDE)
    yield from (conv(ranks, 1, shape.width * shape.mult[-1], SIDE, *kind) for kind in kinds(ranks))
    for name, f in (("encode", lambda vae, dtype: vae.encode(x.to(dtype))),
                    ("decode", lambda vae, dtype: vae.decode(z.to(dtype), quantize=False)),
                    ("decode quantised", lambda vae, dtype: vae.decode(z.to(dtype)))):
        for way in list(ways)[:1 if "quantised" in name else None]:
            yield f"{name}, {way}", work[name[:6] + "r"], partial(build, f, **ways[way])


def samplers(cfg, ranks):
    """Steps of 50: guided patches, and four windows drawn together with one context of the same size."""
    unet, vae, told = sizes(cfg.full)
    factor = 1 << len(vae.mult) - 1

    @cache
    def model():
        net = ZoomLDM(VQVAE(vae), Summarizer(told), UNet(unet), info={"patch": SIDE * factor})
        return net.to(ranks.device).eval().requires_grad_(False)

    def patches(amp):
        net, c = model(), torch.randn(cfg.batch, 65, told.width, device=ranks.device)

        def call():
            with torch.autocast(ranks.device.type, HALF, enabled=amp):
                net.sample(c, (SIDE, SIDE), steps=cfg.steps)
        return call

    def joint(guide):
        net, proxy = model(), Proxy(factor).to(ranks.device).requires_grad_(False)

        def call():
            with ranks.autocast():
                levels = prepare(net, None, (2 * SIDE * factor,), [1, 0], 0, proxy=proxy)
                sample_levels(levels, net.schedule, steps=cfg.steps, guide=guide, lam=0.1, end="clean")
        return call
    one = network_flops(unet, vae, SIDE)
    yield from (matmul(ranks, cfg.full, *kind) for kind in kinds(ranks))
    for kind, dtype in kinds(ranks):
        yield f"patches, {kind}", cfg.steps * 2 * cfg.batch * one["U-Net"], partial(patches, dtype == HALF)
    for guide in ("s2", "x0+proxy"):
        rows = rows_of_step(4, 1, guide)
        yield f"joint, {guide}", cfg.steps * sum(n * one[k] for k, n in rows.items()), partial(joint, guide)


def training(cfg, ranks):
    """A whole step of train.py: U-Net and Summarizer forward and backward, AdamW, EMA."""
    unet, _, told = sizes(cfg.full)
    work = cfg.batch * training_flops(unet, SIDE, told)
    yield from (matmul(ranks, cfg.full, *kind) for kind in kinds(ranks))
    for name, compiled in (("step", False), ("step, compiled", True))[:1 + cfg.compile]:
        yield name, work, partial(plan.training_step, unet, told, SIDE, cfg.batch, ranks, compiled)


GROUPS = {"peaks": peaks, "U-Net forward": unets, "U-Net forward and backward": partial(unets, backward=True),
          "VAE": vaes, "sampling": samplers, "training": training}
MEMORY = ("U-Net forward: ours, fp32", "U-Net forward: ours, bf16 autocast", "U-Net forward and backward: ours, fp32",
          "VAE: encode, fp32", "VAE: decode, fp32", "sampling: patches, fp32", "sampling: joint, s2",
          "sampling: joint, x0+proxy", "training: step")


# ----- 2. Timing, and saying what came out -----

def race(lines, rounds, device):
    """Median seconds of each line, {name: seconds}: all are called in turn, a round that does not count first."""
    calls = {name: build() for name, _, build in lines}
    spent = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, f in calls.items():
            spent[name].append(plan.seconds(f, device))
    return {name: median(times[1:]) for name, times in spent.items()}


def table(title, lines, seconds):
    """Text of a group: seconds, rate, its share of the rates of matmul or conv, which lead the lines, and how much
    faster it is than the first line that does the same work."""
    work, first = {name: w for name, w, _ in lines}, {}
    marks = [n for n in work if n.startswith(("matmul", "conv"))] if title != "peaks" else []
    text = [f"{title:<42}{'seconds':>10}{'G a second':>12}" + "".join(f"{'of ' + n:>28}" for n in marks)
            + f"{'times':>8}"]
    for name, s in seconds.items():
        shares = "".join(f"{work[name] / s / (work[m] / seconds[m]):>28.1%}" for m in marks)
        base = first.setdefault((work[name], name.partition("@")[2][:3]), s)  # two convolutions do as much by chance
        text.append(f"{name:<42}{s:>10.4f}{work[name] / s / 1e9:>12.1f}{shares}{base / s:>8.2f}")
    return text


ASKED = (  # device, group, whose rate, over whose, at least; at full size
    ("cpu", "U-Net forward", "ours, fp32", "matmul", 0.90),
    ("cpu", "U-Net forward", "ours, fp32", "diffusers, fp32", 1 / 1.05),
    ("cpu", "U-Net forward", "ours, bf16 weights", "ours, fp32", 1.7),
    ("cpu", "U-Net forward", "ours, compiled, bf16 weights, channels last", "ours, fp32", 2.0),
    ("cpu", "VAE", "decode, fp32", "conv", 0.75),
    ("cuda", "training", "step, compiled", "matmul 4096 bf16", 0.40))


def findings(cfg, found):
    """What is asked of the numbers, and what they say of 50 steps. in: {group: {name: (work, seconds)}}."""
    text = []
    for device, title, name, over, bound in ASKED:
        lines = found.get(title, {})
        other = next((n for n in lines if n.startswith(over)), None)
        if device == cfg.device and name in lines and other:
            ratio = lines[name][0] / lines[name][1] / (lines[other][0] / lines[other][1])
            text.append(f"{title}: {name}, {ratio:.2f} times the rate of {other} (asked at full size: {bound:.2f})")
    for name, (_, s) in found.get("sampling", {}).items():
        if not name.startswith("matmul"):
            what = f"{cfg.batch} guided patches" if "patches" in name else "four windows and a context"
            text.append(f"50 steps, {name}: {s * 50 / cfg.steps:.3g} s for {what} ({cfg.steps} steps were timed)")
    return text


def one(cfg, ranks):
    """Run one line in this process, print the most memory that it took, in MB: of the card, or of the process."""
    title, _, name = cfg.only.partition(": ")
    build = {n: b for n, _, b in GROUPS[title](cfg, ranks)}.get(name) if title in GROUPS else None
    if build is None:
        raise UserError(f"--only={cfg.only}: no such line, write 'group: line' as the tables have it")
    build()()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    most = (torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    print(most / 2 ** 20)


def memory(cfg, titles):
    """Peak memory of some lines, each run once in a process of its own. out: text."""
    text = [f"{'peak memory, MB':<42}{'of the card' if cfg.device == 'cuda' else 'of a process, PyTorch included'}"]
    for item in (m for m in MEMORY if m.partition(": ")[0] in titles):
        command = [sys.executable, __file__, "one", f"--only={item}"] + [
            f"--{k}={v}" for k, v in vars(cfg).items() if k in ("full", "device", "threads", "steps", "batch")]
        done = subprocess.run(command, capture_output=True, text=True)
        said = (done.stdout or done.stderr).strip().splitlines()[-1:]
        text.append(f"{item:<42}{float(said[0]):>10.0f}" if not done.returncode else f"{item:<42}failed: {said}")
    return text


def machine(cfg, ranks):
    """What it ran on: the names of the processor or the card, versions, the date."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", info)
    flags = sorted(set(re.findall(r"avx512_bf16|amx_\w+|avx2|avx512f", info)))
    card = f", {torch.cuda.get_device_name()}" if ranks.device.type == "cuda" else ""
    return (f"{name[1] if name else platform.processor()}{card}, {os.cpu_count()} cores, {torch.get_num_threads()} "
            f"threads, {' '.join(flags) or platform.machine()}; torch {torch.__version__}, Python "
            f"{platform.python_version()}; {date.today()}")


def main(argv):
    if argv[:1] in (["plan"], ["loader"]):
        return plan.main(argv)
    cfg = configure(Config, argv, words=("command",), doc=__doc__)
    titles = cfg.groups.split(",") if cfg.groups else list(GROUPS)
    if set(titles) - set(GROUPS):
        raise UserError(f"--groups={cfg.groups}: known are {', '.join(GROUPS)}")
    if cfg.command not in ("", "one") or min(cfg.rounds, cfg.steps, cfg.batch) < 1 or 1000 // cfg.steps < 2:
        raise UserError(f"got {cfg.command!r} --rounds={cfg.rounds} --steps={cfg.steps} --batch={cfg.batch}: write "
                        f"python bench.py, python bench.py plan or python bench.py loader RUN; numbers are positive")
    ranks = setup(cfg.device, threads=cfg.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    if cfg.command == "one":
        return one(cfg, ranks)
    size = "published sizes" if cfg.full else "reduced width (--full: published sizes)"
    text = [machine(cfg, ranks), f"{size}, batch {cfg.batch}, latents of {SIDE} x {SIDE}, medians of {cfg.rounds} "
            f"rounds" + ("" if ranks.amp else "; this device has no bf16 arithmetic, so there are no lines for it"), "",
            compared(sizes(cfg.full)[0], SIDE)[0], ""]
    print("\n".join(text), flush=True)
    parts, found = [memory(cfg, titles)], {}
    print("\n".join(parts[0]), flush=True)
    for title in titles:
        lines = list(GROUPS[title](cfg, ranks))
        seconds = race(lines, cfg.rounds, ranks.device)
        found[title] = {name: (work, seconds[name]) for name, work, _ in lines}
        parts.append(table(title, lines, seconds))
        print("\n" + "\n".join(parts[-1]), flush=True)
    parts.append(findings(cfg, found))
    print("\n" + "\n".join(parts[-1]))
    command = " ".join(["python bench.py", *argv])
    body = "\n\n".join("\n".join(part) for part in parts)
    out = cfg.out or f"out/bench{'_full' * cfg.full}.md"
    write_text(out, f"# `{command}`\n\n" + "\n".join(text) + f"\n```\n{body}\n```\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
