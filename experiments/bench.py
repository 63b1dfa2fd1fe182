"""Speed of the networks, of training and of sampling, side by side in one run.

    python -m experiments.bench                           # reduced width, some minutes on two cores
    python -m experiments.bench --full                    # as published, 20 minutes; --compile: more
    python -m experiments.bench --toy --compile --batch=32 --groups=sampling,training     # the networks of `make demo`

Every line of a group is called in turn, round after round, together with what the machine can do at best, so that other
work on it slows all alike: trust the ratios. Random weights: no run is needed. The U-Net of `diffusers` runs beside
ours where the extra is installed.

in:  nothing   out: tables     read next: ../docs/speed.md
"""
import os
import platform
import time
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError, at_least, cli, configure, setup
from diffusion import ZoomLDM, even_timesteps
from experiments.cost import network_flops, row_flops, rows_of_step, training_flops
from large.proxy import Proxy
from large.windows import prepare
from sample_joint import sample_levels
from summarizer import SLOTS, Summarizer, SummarizerConfig
from train import PRESETS, LDMStage
from train import Config as TrainConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

@dataclass
class Config:
    full: bool = False      # the published widths; False: a third or a quarter of them
    toy: bool = False       # the networks of train.py toy instead
    device: str = "cpu"
    threads: int = 0        # 0 = PyTorch's choice
    rounds: int = 3         # medians over so many
    steps: int = 2          # that are timed where 50 would be drawn
    batch: int = 2          # patches per call, and per training step
    compile: bool = False   # torch.compile as well
    busy: bool = False      # on a CPU where other work goes on: seconds of CPU, of one thread
    groups: str = ""        # of GROUPS, with "," between; empty = all

def sizes(cfg):
    """Configs of U-Net, VAE and Summarizer, and the side of a patch's latents: as published, or so that a call takes a
    fraction of a second, or of the toy."""
    if cfg.toy:
        toy = configure(TrainConfig, ["toy"], PRESETS, ("preset",))
        return replace(toy.unet, context_dim=toy.summarizer.width), toy.vae, toy.summarizer, 16
    if cfg.full:
        return UNetConfig(), VAEConfig(), SummarizerConfig(), 64
    return UNetConfig(64), VAEConfig(32), SummarizerConfig(depth=2), 64

# ----- 1. The U-Net of diffusers -----

class Diffusers(nn.Module):
    """diffusers' UNet2DConditionModel of the same shape, called as ours. raises: UserError if it is not installed."""

    def __init__(self, cfg):
        super().__init__()
        try:
            from diffusers import UNet2DConditionModel
        except ImportError as err:
            raise UserError(f"diffusers cannot be imported ({err}): pip install -e '.[bench]'") from err
        self.cfg = cfg
        attends = [2 ** i in cfg.attention for i in range(len(cfg.mult))]
        self.net = UNet2DConditionModel(
            in_channels=cfg.channels, out_channels=cfg.channels, cross_attention_dim=cfg.context_dim,
            block_out_channels=[cfg.width * m for m in cfg.mult], layers_per_block=cfg.res_blocks,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
            norm_num_groups=cfg.groups, attention_head_dim=cfg.heads)  # by that name it takes the number of heads

    def cache_context(self, c):
        return c

    def forward(self, z, t, c):
        return self.net(z, t, c, return_dict=False)[0]

def compared(cfg, side):
    """Is there a network of diffusers to compare with? in: a UNetConfig, the side of latents. out: a sentence; and
    whether its network has the same shape, that is weights of the same sizes and the same FLOPs to a thousandth."""
    try:
        with torch.device("meta"):
            ours, theirs = UNet(cfg), Diffusers(cfg)
    except UserError as err:
        return f"diffusers: skipped, {err}", False
    shapes = [sorted(tuple(p.shape) for p in net.parameters()) for net in (ours, theirs)]
    work = [row_flops(net, (cfg.channels, side, side), cfg.context_dim) for net in (ours, theirs)]
    same = shapes[0] == shapes[1] and abs(work[0] - work[1]) < 1e-3 * work[0]
    said = "the same shape" if same else "another shape, so it is skipped"
    return f"diffusers: {work[1] / 1e9:.2f} GFLOP a row, ours {work[0] / 1e9:.2f}: {said}", same

# ----- 2. What is timed: groups of lines (name, FLOP or bytes of a call, the call) -----

def kinds(ranks):
    """The arithmetic that the device has."""
    return {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if ranks.amp else {})

def matmul(ranks, full, kind, dtype):
    n = 4096 if full else 2048
    a, b = torch.randn(2, n, n, dtype=dtype, device=ranks.device)
    return f"matmul {n} {kind}", 2 * n ** 3, partial(torch.mm, a, b)

def matmuls(cfg, ranks):
    return [matmul(ranks, cfg.full, kind, dtype) for kind, dtype in kinds(ranks).items()]

def conv(ranks, batch, channels, side, kind, dtype):
    """The line of a 3 x 3 convolution."""
    x = torch.randn(batch, channels, side, side, dtype=dtype, device=ranks.device)
    w = torch.randn(channels, channels, 3, 3, dtype=dtype, device=ranks.device)
    work = 2 * 9 * batch * channels ** 2 * side ** 2
    return f"conv {batch}x{channels}->{channels} @{side} {kind}", work, partial(F.conv2d, x, w, padding=1)

def peaks(cfg, ranks):
    """The best this machine does."""
    for kind, dtype in kinds(ranks).items():
        yield matmul(ranks, cfg.full, kind, dtype)
        for shape in ((2, 192, 64), (1, 512, 64), (1, 128, 256)):
            yield conv(ranks, *shape, kind, dtype)
    memory = torch.zeros(1 << 28, dtype=torch.int8, device=ranks.device)
    yield "copy, bytes read and written", 2 << 28, memory.clone

def ways(ranks):
    """How networks are called, {name: (type of the weights, autocast)}."""
    half = {"bf16 autocast": (torch.float32, True), "bf16 weights": (torch.bfloat16, False)}
    return {"fp32": (torch.float32, False)} | (half if ranks.amp else {})

def run(net, inputs, amp, backward=False):
    """One forward pass, or a forward and a backward one."""
    with torch.set_grad_enabled(backward), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=amp):
        out = net(*inputs)
    if backward:
        out.float().square().mean().backward()
        net.zero_grad()

def compiled_unet(cfg):
    net = UNet(cfg)
    net.compile()
    return net

def unets(cfg, ranks, backward=False):
    """Our U-Net and diffusers', in every arithmetic."""
    shape, *_, side = sizes(cfg)
    one = row_flops(UNet(shape).to("meta"), (shape.channels, side, side), shape.context_dim)
    work = cfg.batch * (training_flops(shape, side) if backward else one)
    nets = {"ours": UNet} | ({"ours, compiled": compiled_unet} if cfg.compile else {})
    if compared(shape, side)[1]:
        nets["diffusers"] = Diffusers
    z, c = torch.randn(cfg.batch, shape.channels, side, side), torch.randn(cfg.batch, 65, shape.context_dim)
    t = torch.full((cfg.batch,), 500, device=ranks.device)
    yield from matmuls(cfg, ranks)
    for name, build in nets.items():
        for way, (dtype, amp) in ways(ranks).items():
            if backward and way == "bf16 weights":
                continue
            net = build(shape).to(ranks.device, dtype).requires_grad_(backward)
            inputs = z.to(ranks.device, dtype), t, c.to(ranks.device, dtype)
            yield f"{name}, {way}", work, partial(run, net, inputs, amp, backward)

def vaes(cfg, ranks):
    """Encoding and decoding one patch."""
    unet, shape, _, side = sizes(cfg)
    pixels = side * 2 ** (len(shape.mult) - 1)
    image, z = torch.randn(1, 3, pixels, pixels), torch.randn(1, shape.channels, side, side)
    work = network_flops(unet, shape, side)
    for kind, dtype in kinds(ranks).items():
        yield conv(ranks, 1, shape.width * shape.mult[-1], side, kind, dtype)
    for name, x in ("encode", image), ("decode", z):
        for way, (dtype, amp) in ways(ranks).items():
            vae = VQVAE(shape).to(ranks.device, dtype).requires_grad_(False)
            f = vae.encode if name == "encode" else partial(vae.decode, quantize=False)
            yield f"{name}, {way}", work[f"{name}r"], partial(run, f, (x.to(ranks.device, dtype),), amp)

def samplers(cfg, ranks):
    """Steps of 50: guided patches, and four windows drawn together with one context of the same size."""
    unet, vae, told, side = sizes(cfg)
    patch, one = side * 2 ** (len(vae.mult) - 1), network_flops(unet, vae, side)
    model = ZoomLDM(VQVAE(vae), Summarizer(told), UNet(unet), info={"patch": patch})
    model.to(ranks.device).eval().requires_grad_(False)
    proxy = Proxy(model.vae.factor).to(ranks.device).requires_grad_(False)
    c = torch.randn(cfg.batch, 65, told.width, device=ranks.device)

    def patches(amp, net):
        model.unet = net
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=amp):
            model.sample(c, (side, side), steps=cfg.steps)

    def joint(guide):
        with ranks.autocast():
            levels = prepare(model, None, (2 * patch,), [1, 0], 0, proxy=proxy)
            sample_levels(levels, model.schedule, steps=cfg.steps, guide=guide, lam=0.1, end="clean")
    yield from matmuls(cfg, ranks)
    nets = {"patches": model.unet} | ({"patches, compiled": compiled_unet(unet)} if cfg.compile else {})
    for name, net in nets.items():
        net = net.to(ranks.device).eval().requires_grad_(False)
        for kind, dtype in kinds(ranks).items():
            call = partial(patches, dtype == torch.bfloat16, net)
            yield f"{name}, {kind}", cfg.steps * 2 * cfg.batch * one["U-Net"], call
    for guide in ("s2", "x0", "x0+proxy"):
        rows = rows_of_step(4, 1, guide)
        yield f"joint, {guide}", cfg.steps * sum(n * one[name] for name, n in rows.items()), partial(joint, guide)

def training_step(unet, summarizer, side, batch, ranks, compiled, build=UNet):
    """A function that takes one whole training step on random samples: forward, backward, AdamW, EMA."""
    net = LDMStage(TrainConfig(unet=unet, summarizer=summarizer, batch=batch, compile=compiled), side)
    if build is not UNet:
        net.unet = build(unet)
    net = net.to(ranks.device).train()
    weights = list(net.parameters())
    averages = [w.detach().clone() for w in weights]
    optimizer = torch.optim.AdamW(weights, fused=True)
    item = net.noise(0) | {"z": torch.randn(batch, unet.channels, side, side), "s": torch.ones(batch).long(),
                           "tokens": torch.randn(batch, SLOTS, summarizer.embed_dim),
                           "mask": torch.ones(batch, SLOTS, dtype=torch.bool)}
    item = {name: v.to(ranks.device) for name, v in item.items()}

    def step():
        with ranks.autocast():
            loss, _ = net(item)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 0.001)
    return step

def training(cfg, ranks):
    """A whole step of train.py: U-Net and Summarizer forward and backward, AdamW, EMA."""
    unet, _, told, side = sizes(cfg)
    work = cfg.batch * training_flops(unet, side, told)
    yield from matmuls(cfg, ranks)
    for name in ("step", "step, compiled")[:1 + cfg.compile]:
        yield name, work, training_step(unet, told, side, cfg.batch, ranks, name != "step")

GROUPS = {"peaks": peaks, "U-Net forward": unets, "U-Net forward and backward": partial(unets, backward=True),
          "VAE": vaes, "sampling": samplers, "training": training}

# ----- 3. Timing, and saying what came out -----

def cpu_seconds():
    """Seconds of CPU of this process, and of those it has waited for, such as compilers."""
    others = getrusage(RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime

def seconds_of(call, device, clock=time.perf_counter):
    """Seconds of one call, until the device is done."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    began = clock()
    call()
    wait()
    return clock() - began

def race(lines, rounds, device, clock=time.perf_counter):
    """Seconds of each line, {name: (median, of the first call)}: all are called in turn, a round that does not count
    first. In that one a compiled network is compiled."""
    spent = {name: [] for name, _, _ in lines}
    for n in range(rounds + 1):
        for name, _, call in tqdm(lines, f"round {n} of {rounds}", delay=3, leave=False):
            spent[name].append(seconds_of(call, device, clock))
    return {name: (median(times[1:]), times[0]) for name, times in spent.items()}

def rate_table(title, lines, spent):
    """Text of a group: seconds, of the first call too, rate, its share of the rates of matmul or conv, which lead the
    lines, and how much faster it is than the first line that does the same work."""
    seconds = {name: times[0] for name, times in spent.items()}
    rate = {name: work / seconds[name] for name, work, _ in lines}
    yardsticks = [name for name in rate if name.startswith(("matmul", "conv"))] if title != "peaks" else []
    heads = "".join(f"{'of ' + name:>28}" for name in yardsticks)
    text, first = [f"{title:<42}{'seconds':>10}{'first call':>12}{'G a second':>12}{heads}{'times':>8}"], {}
    for name, work, _ in lines:
        shares = "".join(f"{rate[name] / rate[mark]:>28.1%}" for mark in yardsticks)
        same_work = work, name.partition("@")[2][:3]  # two convolutions do as much by chance
        base = first.setdefault(same_work, seconds[name])
        text.append(f"{name:<42}{seconds[name]:>10.4f}{spent[name][1]:>12.3f}{rate[name] / 1e9:>12.1f}{shares}"
                    f"{base / seconds[name]:>8.2f}")
    for name in seconds:
        plain = name.replace(", compiled", "")
        if plain != name and seconds[plain] > seconds[name]:
            calls = (spent[name][1] - spent[plain][1]) / (seconds[plain] - seconds[name])
            text.append(f"{name}: what compiling took is won back after {calls:,.0f} calls")
    return "\n".join(text)

def machine(ranks):
    """What it ran on: the processor or the card, versions, the date."""
    card = f", {torch.cuda.get_device_name()}" if ranks.device.type == "cuda" else ""
    bf16 = "with bf16 arithmetic" if ranks.amp else "without bf16 arithmetic, so there are no lines for it"
    return (f"{platform.machine()}{card}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {bf16}; torch "
            f"{torch.__version__}, Python {platform.python_version()}; {date.today()}")

def main(argv):
    cfg = configure(Config, argv, doc=__doc__)
    titles = cfg.groups.split(",") if cfg.groups else list(GROUPS)
    if set(titles) - set(GROUPS):
        raise UserError(f"--groups={cfg.groups}: known are {', '.join(GROUPS)}")
    at_least(cfg, rounds=1, batch=1)
    even_timesteps(1000, cfg.steps)          # are there so many?
    if cfg.busy and (cfg.threads != 1 or cfg.device != "cpu"):
        raise UserError(f"--busy with --device={cfg.device} --threads={cfg.threads}: it takes --device=cpu --threads=1")
    ranks = setup(cfg.device, threads=cfg.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    size = "published sizes" if cfg.full else "the toy" if cfg.toy else "reduced width (--full: published sizes)"
    unet, *_, side = sizes(cfg)
    how = f"medians of {cfg.rounds} rounds" + ", seconds of CPU" * cfg.busy
    print(f"{machine(ranks)}\n{size}, batch {cfg.batch}, latents of {side} x {side}, {how}\n"
          f"{compared(unet, side)[0]}", flush=True)
    for title in titles:
        lines = list(GROUPS[title](cfg, ranks))
        spent = race(lines, cfg.rounds, ranks.device, cpu_seconds if cfg.busy else time.perf_counter)
        print("\n" + rate_table(title, lines, spent), flush=True)

NOT_KEPT = "whole tables above are good; nothing else is kept, and the same command begins anew"

if __name__ == "__main__":
    cli(main, stopped=NOT_KEPT)
