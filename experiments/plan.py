"""Planning past one machine: what a full training and a million large images take in time, network and disk.

    python bench.py plan --gpus=256 --patches=12.5e6 --img_s=60     # img_s: per GPU, as train.py logs it
    python bench.py plan out/toy --gpus=256       # or from the speed of a run, by FLOPs; or, without one, measured here
    python bench.py plan --check                  # the formula on this CPU: 2 ranks predicted from 1, and measured
    python bench.py loader out/toy                # does reading keep up with training?

What is reckoned, and how, stands in cost.py; here it is put together. (python plan.py takes the same words.)

in:  sizes, a speed   out: tables     read next: bench.py
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common import UserError, cli, configure, read_lines, setup
from data import PatchDataset, Pyramids
from diffusion import ZoomLDM
from experiments.cost import (
    bytes_of_sample,
    bytes_on_disk,
    bytes_reduced,
    full_size,
    rows_of_image,
    step_seconds,
    training_flops,
)
from summarizer import SLOTS, Summarizer, SummarizerConfig
from train import Config as TrainConfig
from train import LDMStage, update_ema
from unet import UNet, UNetConfig


@dataclass
class Config:
    command: str = ""          # plan or loader; step = what --check starts
    run: str = ""              # run folder: the loader's, or whose log tells the speed
    gpus: int = 8
    patches: float = 12.5e6    # at scale 0; BRCA: 12.5 million
    epochs: float = 16.8       # of as many samples; published: 500,000 steps of 420
    per_gpu: int = 70          # samples per GPU and step, as published
    img_s: float = 0.0         # samples a GPU trains on per second; 0 = see above
    net_gbit: float = 100.0    # of each GPU's link
    images: float = 1e6        # large images to draw
    size: int = 4096           # their side in pixels
    image_s: float = 0.0       # seconds one takes on one GPU; 0 = by FLOPs, at the rate of training
    check: bool = False
    data: str = ""             # loader: data folder; default: the one the run was trained on
    batch: int = 32            # loader: per step
    workers: int = 0           # loader: processes that read
    rounds: int = 3            # medians over so many
    device: str = "cpu"
    threads: int = 0           # 0 = PyTorch's choice


TOY = UNetConfig(64, (1, 2, 4), 1, (2, 4), 128, groups=8), SummarizerConfig(96, 128, 2, 256, 5)  # 16 x 16 latents


def seconds(f, device):
    """Seconds of one call of f, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def clock(f, times, device):
    """Median seconds of f(), after one call that does not count."""
    f()
    return median(seconds(f, device) for _ in range(times))


def training_step(unet, summarizer, side, batch, ranks, compiled=False):
    """A function that takes one whole training step on random samples: forward, backward, gradients of all ranks
    averaged, AdamW, EMA. in: configs, latents of `side`, samples per rank."""
    cfg = TrainConfig(unet=unet, summarizer=summarizer, batch=batch, compile=compiled)
    net = LDMStage(cfg, side).to(ranks.device).train()
    wrapped = DistributedDataParallel(net) if ranks.world > 1 else net
    opt = torch.optim.AdamW(net.parameters(), fused=True)
    ema = {k: v.clone() for k, v in net.state_dict().items()}
    item = net.noise(0) | {"z": torch.randn(batch, unet.channels, side, side), "s": torch.ones(batch).long(),
                           "tokens": torch.randn(batch, SLOTS, summarizer.embed_dim),
                           "mask": torch.ones(batch, SLOTS, dtype=torch.bool)}
    item = {k: v.to(ranks.device) for k, v in item.items()}

    def step():
        with ranks.autocast():
            loss, _ = wrapped(item)
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        update_ema(ema, net, 0.999)
    return step


# ----- 1. The plan -----

def parameters():
    """Of what is trained at full size: U-Net and Summarizer."""
    with torch.device("meta"):
        return sum(p.numel() for net in (UNet(UNetConfig()), Summarizer(SummarizerConfig())) for p in net.parameters())


def speed(cfg):
    """Samples per second of full size that one GPU trains on, and where that number comes from. A speed of smaller
    networks counts by FLOPs, as if the large ones reached the same FLOP/s; larger ones reach more, as a rule."""
    if cfg.img_s:
        return cfg.img_s, "given"
    full = training_flops(UNetConfig(), 64, SummarizerConfig())
    if cfg.run:
        rows = [r["img_s"] for r in read_lines(Path(cfg.run) / "log.jsonl") if r["stage"] == "ldm"]
        if not rows:
            raise UserError(f"{cfg.run}/log.jsonl tells no speed: give the folder of a run, or --img_s=N")
        model, s = ZoomLDM.from_run(cfg.run), median(rows)
        mine = training_flops(model.unet.cfg, model.info.get("patch", 256) // model.vae.factor, model.summarizer.cfg)
        return s * mine / full, f"{s:.1f} samples/s of {cfg.run}, which ran on one device, by FLOPs"
    ranks = setup(cfg.device, threads=cfg.threads)
    s = 8 / clock(training_step(*TOY, 16, 8, ranks), cfg.rounds, ranks.device)
    return s * training_flops(TOY[0], 16, TOY[1]) / full, f"{s:.1f} samples/s of a toy on this {cfg.device}, by FLOPs"


def plan(cfg):
    """Print what a training and a set of large images take.

    step: C + max(0, R - 2/3 C), C = per_gpu / img_s, R = 4 N 2 (n-1)/n bytes over the link: DDP sends gradients while
    the backward pass, two thirds of C, goes on. training: epochs * patches / (gpus * per_gpu) steps. storage: the bytes
    of a sample, averaged over scales, which are drawn alike. images: the FLOPs of their rows, at the FLOP/s of training
    (image_s, if given). out: {name: number}, the numbers behind the text.
    """
    if min(cfg.gpus, cfg.per_gpu, cfg.patches, cfg.epochs, cfg.net_gbit, cfg.size // 256) <= 0 or cfg.img_s < 0:
        raise UserError(f"--gpus={cfg.gpus} --per_gpu={cfg.per_gpu} --patches={cfg.patches} --epochs={cfg.epochs} "
                        f"--net_gbit={cfg.net_gbit} --size={cfg.size}: all must be positive, size 256 or more")
    n, (img_s, source), sample = parameters(), speed(cfg), bytes_of_sample()
    compute, sent = cfg.per_gpu / img_s, bytes_reduced(n, cfg.gpus)
    reduce, flop = sent * 8 / (cfg.net_gbit * 1e9), training_flops(UNetConfig(), 64, SummarizerConfig())
    step = step_seconds(compute, reduce)
    steps = cfg.epochs * cfg.patches / (cfg.gpus * cfg.per_gpu)
    mean, full = sum(sample) / len(sample), full_size()
    out = {"compute": compute, "reduce": reduce, "step": step, "steps": steps, "training": step * steps, "sent": sent,
           "read": mean * cfg.gpus * cfg.per_gpu / step, "stored": bytes_on_disk(cfg.patches),
           "encode": sum(cfg.patches / 4 ** s for s in range(8)) * full["encoder"] / (img_s * flop * cfg.gpus)}
    print(f"speed: {img_s:.3g} samples/s per GPU ({source}) = {img_s * flop / 1e12:.3g} TFLOP/s\n"
          f"bytes read per sample, scale 0 to 7: {', '.join(f'{b:,}' for b in sample)}; mean {mean:,.0f}\n"
          f"training of {n:,} parameters on {cfg.gpus} GPUs, {cfg.per_gpu} samples each: {steps:,.0f} steps\n"
          f"  step      {step:.3f} s: compute {compute:.3f}, all-reduce {reduce:.3f}, of which "
          f"{step - compute:.3f} shows; {step_seconds(compute, reduce, 0):.3f} if none of it were hidden\n"
          f"  time      {out['training'] / 3600:.1f} hours, {out['training'] * cfg.gpus / 3600:,.0f} GPU-hours; before "
          f"it, encoding latents, {out['encode'] / 3600:.2f} hours\n"
          f"  network   {sent / 1e9:.2f} GB sent per GPU and step, {sent * 8 / step / 1e9:.1f} Gbit/s of "
          f"{cfg.net_gbit:g}; storage gives {out['read'] / 1e9:.3f} GB/s to all\n"
          f"  disk      {out['stored'] / 1e12:.2f} TB of latents and embeddings, {16 * n / 1e9:.1f} GB a checkpoint\n"
          f"{cfg.images:,.0f} images of {cfg.size} x {cfg.size} pixels on {cfg.gpus} GPUs: 50 steps, a context")
    for guide in ("s2", "x0+proxy"):
        flops = sum(k * full[name] for name, k in rows_of_image(cfg.size, guide, context=4).items())
        each = cfg.image_s or flops / (img_s * flop)
        out[guide], out[guide + " FLOP"] = each * cfg.images / cfg.gpus, flops
        print(f"  {guide:<10}{flops / 1e15:.2f} PFLOP, {each:.1f} GPU-seconds each: {out[guide] / 86400:.1f} days, "
              f"written at {cfg.images * cfg.size ** 2 * 3 / out[guide] / 1e9:.3f} GB/s"
              + (" (--image_s, whatever the guide)" if cfg.image_s else ""))
    out["pixels"], out["latents"] = cfg.images * cfg.size ** 2 * 3, cfg.images * (cfg.size // 4) ** 2 * 3 * 2
    print(f"  disk      {out['pixels'] / 1e12:.1f} TB of plain pixels, {out['latents'] / 1e12:.1f} TB of latents")
    return out


# ----- 2. The plan against measurement -----

def step(cfg):
    """On every rank that torchrun started: print seconds of a step, and of an all-reduce of as many bytes alone."""
    ranks, alone = setup("cpu", amp=False, threads=1), 0.0
    torch.manual_seed(0)
    take = training_step(*TOY, 16, 8, ranks)
    if ranks.world > 1:
        flat = torch.zeros(toy_parameters())
        alone = clock(lambda: dist.all_reduce(flat), 8, ranks.device)
        ranks.barrier()
    spent = clock(take, 12, ranks.device)
    ranks.barrier()
    if ranks.rank == 0:
        print(json.dumps({"step": spent, "reduce": alone}))
    if ranks.world > 1:
        dist.destroy_process_group()


def toy_parameters():
    with torch.device("meta"):
        return sum(p.numel() for net in (UNet(TOY[0]), Summarizer(TOY[1])) for p in net.parameters())


def start(world):
    """Run `step` on so many ranks of one thread. out: what it measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__,
               "step"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(cfg):
    """The step of 2 ranks, of one thread each and as many samples each, predicted from that of 1 and an all-reduce: on
    a CPU nothing is hidden, for sending is work of the same cores. out: predicted seconds, measured ones."""
    one, two = zip(*[(start(1), start(2)) for _ in range(cfg.rounds)])
    alone, reduce, measured = (median(r[k] for r in rows) for rows, k in ((one, "step"), (two, "reduce"),
                                                                          (two, "step")))
    predicted = step_seconds(alone, reduce, hidden=0)
    print(f"1 rank: {alone:.4f} s a step; 2 ranks: {reduce:.4f} s to all-reduce {4 * toy_parameters() / 1e6:.1f} MB\n"
          f"2 ranks: predicted {predicted:.4f} s, measured {measured:.4f} s, off by {predicted / measured - 1:+.1%} "
          f"(asked: within 25 %; medians of {cfg.rounds} rounds)")
    return predicted, measured


# ----- 3. Reading against training -----

def loader(cfg):
    """How many samples a second the data loader alone gives, and how many a training step takes. out: both."""
    if not cfg.run:
        raise UserError("say which run: python bench.py loader out/toy (train one with python train.py)")
    ranks, model = setup(cfg.device, threads=cfg.threads), ZoomLDM.from_run(cfg.run)
    latents = Path(cfg.run) / "latents"
    if not latents.is_dir():
        raise UserError(f"{cfg.run} keeps no latents to read: run its training once more, which makes them")
    pyramids = Pyramids(cfg.data or model.info.get("data", ""), latents)
    dataset, times = PatchDataset(pyramids, length=cfg.batch * 8 * (cfg.rounds + 1)), []
    batches = iter(DataLoader(dataset, cfg.batch, num_workers=cfg.workers))
    next(batches)  # workers start, files are mapped
    for _ in range(cfg.rounds):
        began = time.perf_counter()
        for _ in range(8):
            next(batches)
        times.append((time.perf_counter() - began) / 8)
    take = training_step(model.unet.cfg, model.summarizer.cfg, pyramids.patch // model.vae.factor, cfg.batch, ranks)
    read, used = cfg.batch / median(times), cfg.batch / clock(take, cfg.rounds, ranks.device)
    for name, sample in (("here", bytes_of_sample(pyramids.patch, pyramids.embed_dim, pyramids.scales)),
                         ("full", bytes_of_sample())):
        print(f"bytes read per sample, {name}, scale 0 to {len(sample) - 1}: {', '.join(f'{b:,}' for b in sample)}; "
              f"mean {sum(sample) / len(sample):,.0f}")
    print(f"reading alone {read:.0f} samples/s with {cfg.workers} workers, a training step of {cfg.batch} takes "
          f"{used:.1f}: {read / used:.1f} times as many (asked at toy size: 10)")
    return read, used


def main(argv):
    cfg = configure(Config, argv, words=("command", "run"), doc=__doc__)
    commands = {"plan": check if cfg.check else plan, "loader": loader, "step": step}
    if cfg.command not in commands:
        raise UserError(f"got {cfg.command or 'no command'!r}: write python bench.py plan, or loader RUN")
    commands[cfg.command](cfg)


if __name__ == "__main__":
    cli(main)
