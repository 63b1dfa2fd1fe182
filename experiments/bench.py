"""Speed of the networks, of training and of sampling, side by side in one run.

    python -m experiments.bench                           # reduced width, some minutes on two cores
    python -m experiments.bench --full --out=bench.md     # as published, 20 minutes; --compile: more
    python -m experiments.bench --full --compile --device=cuda --batch=32

Every line of a group is called in turn, round after round, together with what the machine can do at best, so that other
work on it slows all alike: trust the ratios. Random weights: no run is needed. The U-Net of `diffusers` runs beside
ours where the extra is installed.

in:  nothing   out: tables, on the screen and in --out     read next: ../docs/speed.md
"""
import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from statistics import median
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import zoom_vae
from common import UserError, at_least, cli, configure, setup, write_text
from diffusion import ZoomLDM
from experiments.cost import network_flops, row_flops, rows_of_step, training_flops
from large.proxy import Proxy
from large.windows import prepare
from sample_joint import sample_levels
from summarizer import SLOTS, Summarizer, SummarizerConfig
from train import Config as TrainConfig
from train import LDMStage
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

SIDE = 64  # latents of a patch of 256 pixels
LAST, FIRST = torch.channels_last, torch.contiguous_format

@dataclass
class Config:
    full: bool = False      # the published widths; False: a third or a quarter of them
    device: str = "cpu"
    threads: int = 0        # 0 = PyTorch's choice
    rounds: int = 3         # medians over so many
    steps: int = 2          # that are timed where 50 would be drawn
    batch: int = 2          # patches per call, and per training step
    compile: bool = False   # torch.compile as well
    groups: str = ""        # of GROUPS, with "," between; empty = all
    out: str = ""           # a file to write as well; empty = the screen alone

def sizes(full):
    """Configs of U-Net, VAE and Summarizer: as published, or so that a call takes a fraction of a second."""
    if full:
        return UNetConfig(), VAEConfig(), SummarizerConfig()
    return UNetConfig(64), VAEConfig(32), SummarizerConfig(depth=2)

# ----- 1. The U-Net of diffusers -----

class Diffusers(nn.Module):
    """diffusers' UNet2DConditionModel of the same shape, called as ours. raises: UserError if it is not installed."""

    def __init__(self, cfg):
        super().__init__()
        try:
            from diffusers import UNet2DConditionModel
        except ImportError as err:
            raise UserError(f"diffusers cannot be imported ({err}): pip install -e '.[bench]'") from err
        attends = [2 ** i in cfg.attention for i in range(len(cfg.mult))]
        self.net = UNet2DConditionModel(
            in_channels=cfg.channels, out_channels=cfg.channels, cross_attention_dim=cfg.context_dim,
            block_out_channels=[cfg.width * m for m in cfg.mult], layers_per_block=cfg.res_blocks,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
            norm_num_groups=cfg.groups, attention_head_dim=cfg.heads)  # by that name it takes the number of heads

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

def conv(ranks, batch, channels, side, kind, dtype, order=FIRST):
    """The line of a 3 x 3 convolution."""
    x = torch.randn(batch, channels, side, side, dtype=dtype, device=ranks.device).to(memory_format=order)
    w = torch.randn(channels, channels, 3, 3, dtype=dtype, device=ranks.device).to(memory_format=order)
    name = f"conv {batch}x{channels}->{channels} @{side} {kind}" + (" nhwc" if order == LAST else "")
    return name, 2 * 9 * batch * channels ** 2 * side ** 2, partial(F.conv2d, x, w, padding=1)

def peaks(cfg, ranks):
    """The best this machine does."""
    for kind, dtype in kinds(ranks).items():
        yield matmul(ranks, cfg.full, kind, dtype)
        for shape in ((2, 192, SIDE), (1, 512, SIDE), (1, 128, 4 * SIDE)):
            for order in (FIRST, LAST):
                yield conv(ranks, *shape, kind, dtype, order)
    memory = torch.zeros(1 << 28, dtype=torch.int8, device=ranks.device)
    yield "copy, bytes read and written", 2 << 28, memory.clone

def unet_call(net, cfg, batch, dtype, order, amp, backward):
    """One forward pass, or a forward and a backward one. cfg: a UNetConfig."""
    device = next(net.parameters()).device
    z = torch.randn(batch, cfg.channels, SIDE, SIDE).to(device, dtype, memory_format=order)
    c = torch.randn(batch, 65, cfg.context_dim).to(device, dtype)
    t = torch.full((batch,), 500, device=device)

    def call():
        with torch.set_grad_enabled(backward), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            out = net(z, t, c)
        if backward:
            out.float().square().mean().backward()
            net.zero_grad()
    return call

def unets(cfg, ranks, backward=False):
    """Our U-Net and diffusers', in every arithmetic and layout that pays somewhere."""
    shape = sizes(cfg.full)[0]
    one = row_flops(UNet(shape).to("meta"), (shape.channels, SIDE, SIDE), shape.context_dim)
    work = cfg.batch * (training_flops(shape, SIDE) if backward else one)
    ways = {"fp32": (torch.float32, FIRST, False), "fp32, channels last": (torch.float32, LAST, False)}
    if ranks.amp:
        ways["bf16 autocast"] = torch.float32, FIRST, True
        if not backward:
            ways["bf16 weights"] = torch.bfloat16, FIRST, False
            ways["bf16 weights, channels last"] = torch.bfloat16, LAST, False
    nets = {"ours": UNet} | ({"diffusers": Diffusers} if compared(shape, SIDE)[1] else {})
    for kind, dtype in kinds(ranks).items():
        yield matmul(ranks, cfg.full, kind, dtype)
    for name, build in nets.items():
        for way, (dtype, order, amp) in ways.items():
            net = build(shape).to(ranks.device, dtype, memory_format=order).requires_grad_(backward)
            yield f"{name}, {way}", work, unet_call(net, shape, cfg.batch, dtype, order, amp, backward)
            if cfg.compile and name == "ours" and "last" not in way:
                net.compile()
                yield f"ours, compiled, {way}", work, unet_call(net, shape, cfg.batch, dtype, order, amp, backward)

def vae_call(vae, encode, x, amp, order):
    """Encode or decode one patch. order: how a CPU convolves, None = as zoom_vae.layout says."""
    f = vae.encode if encode else partial(vae.decode, quantize=False)
    forced = mock.Mock(return_value=order)

    def call():
        with mock.patch.object(zoom_vae, "layout", forced) if order else nullcontext():
            with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                f(x)
    return call

def vaes(cfg, ranks):
    """Encoding and decoding one patch. On a CPU it convolves with channels last by itself: see zoom_vae.layout."""
    unet, shape, _ = sizes(cfg.full)
    pixels = SIDE * 2 ** (len(shape.mult) - 1)
    inputs = {"encode": torch.randn(1, 3, pixels, pixels), "decode": torch.randn(1, shape.channels, SIDE, SIDE)}
    ways = {"fp32": (torch.float32, False, None), "fp32, channels first": (torch.float32, False, FIRST),
            "fp32, channels last": (torch.float32, False, LAST)}
    if ranks.amp:
        ways["bf16 autocast"] = torch.float32, True, None
        ways["bf16 weights"] = torch.bfloat16, False, None
    work = network_flops(unet, shape, SIDE)
    for kind, dtype in kinds(ranks).items():
        yield conv(ranks, 1, shape.width * shape.mult[-1], SIDE, kind, dtype)
    for name, x in inputs.items():
        for way, (dtype, amp, order) in ways.items():
            vae = VQVAE(shape).to(ranks.device, dtype).requires_grad_(False)
            call = vae_call(vae, name == "encode", x.to(ranks.device, dtype), amp, order)
            yield f"{name}, {way}", work[f"{name}r"], call

def random_model(cfg, ranks):
    unet, vae, told = sizes(cfg.full)
    patch = SIDE * 2 ** (len(vae.mult) - 1)
    model = ZoomLDM(VQVAE(vae), Summarizer(told), UNet(unet), info={"patch": patch})
    return model.to(ranks.device).eval().requires_grad_(False)

def samplers(cfg, ranks):
    """Steps of 50: guided patches, and four windows drawn together with one context of the same size."""
    unet, vae, told = sizes(cfg.full)
    model, one = random_model(cfg, ranks), network_flops(unet, vae, SIDE)
    c = torch.randn(max(cfg.batch, 4), 65, told.width, device=ranks.device)

    def patches(amp):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=amp):
            model.sample(c[:cfg.batch], (SIDE, SIDE), steps=cfg.steps)

    proxy = Proxy(model.vae.factor).to(ranks.device).requires_grad_(False)

    def joint(guide):
        size = 2 * SIDE * model.vae.factor
        with ranks.autocast():
            levels = prepare(model, None, (size,), [1, 0], 0, proxy=proxy)
            sample_levels(levels, model.schedule, steps=cfg.steps, guide=guide, lam=0.1, end="clean")
    for kind, dtype in kinds(ranks).items():
        yield matmul(ranks, cfg.full, kind, dtype)
    for kind, dtype in kinds(ranks).items():
        yield f"patches, {kind}", cfg.steps * 2 * cfg.batch * one["U-Net"], partial(patches, dtype == torch.bfloat16)
    for guide in ("s2", "x0", "x0+proxy"):
        rows = rows_of_step(4, 1, guide)
        yield f"joint, {guide}", cfg.steps * sum(n * one[name] for name, n in rows.items()), partial(joint, guide)

def training_step(unet, summarizer, side, batch, ranks, compiled=False):
    """A function that takes one whole training step on random samples: forward, backward, AdamW, EMA."""
    net = LDMStage(TrainConfig(unet=unet, summarizer=summarizer, batch=batch, compile=compiled), side)
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
    unet, _, told = sizes(cfg.full)
    work = cfg.batch * training_flops(unet, SIDE, told)
    for kind, dtype in kinds(ranks).items():
        yield matmul(ranks, cfg.full, kind, dtype)
    yield "step", work, training_step(unet, told, SIDE, cfg.batch, ranks)
    if cfg.compile:
        yield "step, compiled", work, training_step(unet, told, SIDE, cfg.batch, ranks, True)

GROUPS = {"peaks": peaks, "U-Net forward": unets, "U-Net forward and backward": partial(unets, backward=True),
          "VAE": vaes, "sampling": samplers, "training": training}

# ----- 3. Timing, and saying what came out -----

def seconds_of(call, device):
    """Seconds of one call, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began

def race(lines, rounds, device):
    """Median seconds of each line, {name: seconds}: all are called in turn, a round that does not count first."""
    spent = {name: [] for name, _, _ in lines}
    for _ in range(rounds + 1):
        for name, _, call in lines:
            spent[name].append(seconds_of(call, device))
    return {name: median(times[1:]) for name, times in spent.items()}

def rate_table(title, lines, seconds):
    """Text of a group: seconds, rate, its share of the rates of matmul or conv, which lead the lines, and how much
    faster it is than the first line that does the same work."""
    rate = {name: work / seconds[name] for name, work, _ in lines}
    yardsticks = [name for name in rate if name.startswith(("matmul", "conv"))] if title != "peaks" else []
    heads = "".join(f"{'of ' + name:>28}" for name in yardsticks)
    text, first = [f"{title:<42}{'seconds':>10}{'G a second':>12}{heads}{'times':>8}"], {}
    for name, work, _ in lines:
        shares = "".join(f"{rate[name] / rate[mark]:>28.1%}" for mark in yardsticks)
        same_work = work, name.partition("@")[2][:3]  # two convolutions do as much by chance
        base = first.setdefault(same_work, seconds[name])
        text.append(f"{name:<42}{seconds[name]:>10.4f}{rate[name] / 1e9:>12.1f}{shares}{base / seconds[name]:>8.2f}")
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
    at_least(cfg, rounds=1, steps=1, batch=1)
    if cfg.steps > 500:
        raise UserError(f"--steps={cfg.steps}: at most 500")
    ranks = setup(cfg.device, threads=cfg.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    size = "published sizes" if cfg.full else "reduced width (--full: published sizes)"
    text = [machine(ranks), f"{size}, batch {cfg.batch}, latents of {SIDE} x {SIDE}, medians of {cfg.rounds} rounds",
            compared(sizes(cfg.full)[0], SIDE)[0]]
    print("\n".join(text), flush=True)
    tables = []
    for title in titles:
        lines = list(GROUPS[title](cfg, ranks))
        tables.append(rate_table(title, lines, race(lines, cfg.rounds, ranks.device)))
        print("\n" + tables[-1], flush=True)
    if cfg.out:
        command = " ".join(["python -m experiments.bench", *argv])
        body = "\n\n".join(tables)
        write_text(cfg.out, f"# `{command}`\n\n" + "\n".join(text) + f"\n```\n{body}\n```\n")
        print(f"wrote {cfg.out}")

if __name__ == "__main__":
    cli(main)
