"""Planning past one machine: what a full training and a million large images take in time, network and disk.

    python -m experiments.plan --gpus=256 --patches=12.5e6 --img_s=60     # img_s: per GPU, as train.py logs it
    python -m experiments.plan out/toy --gpus=256       # from the speed of a run, by FLOPs

A step takes C + max(0, R - 2/3 C) seconds: C = per_gpu / img_s, R = 4 N 2 (n-1)/n bytes over the link. DDP sends
gradients while the backward pass, two thirds of C, goes on. Storage: the bytes of a sample, averaged over scales, which
are drawn alike. Images: the FLOPs of their rows, at the FLOP/s of training. What is reckoned stands in cost.py.

in:  sizes, a speed   out: tables     read next: bench.py
"""
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from common import UserError, at_least, cli, configure, read_lines
from diffusion import ZoomLDM
from experiments.cost import bytes_of_sample, bytes_on_disk, bytes_reduced, full_size, rows_of_image
from experiments.cost import step_seconds, training_flops
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig

@dataclass
class Config:
    run: str = ""              # run folder whose log tells the speed
    gpus: int = 8
    patches: float = 12.5e6    # at scale 0; BRCA: 12.5 million
    epochs: float = 16.8       # of as many samples; published: 500,000 steps of 420
    per_gpu: int = 70          # samples per GPU and step, as published
    img_s: float = 0.0         # samples a GPU trains on per second; 0 = from the run
    net_gbit: float = 100.0    # of each GPU's link
    images: float = 1e6        # large images to draw
    size: int = 4096           # their side in pixels

def parameters():
    """Of what is trained at full size: U-Net and Summarizer."""
    with torch.device("meta"):
        nets = UNet(UNetConfig()), Summarizer(SummarizerConfig())
    return sum(p.numel() for net in nets for p in net.parameters())

def speed(cfg):
    """Samples per second of full size that one GPU trains on, and where that number comes from. A speed of smaller
    networks counts by FLOPs, as if the large ones reached the same FLOP/s; larger ones reach more, as a rule."""
    if cfg.img_s:
        return cfg.img_s, "given"
    log = read_lines(Path(cfg.run) / "log.jsonl") if cfg.run else []
    rates = [record["img_s"] for record in log if record["stage"] == "ldm"]
    if not rates:
        raise UserError(f"{cfg.run or 'no run'} tells no speed: give the folder of a trained run, or --img_s=N")
    model, rate = ZoomLDM.from_run(cfg.run), median(rates)
    side = model.info.get("patch", 256) // model.vae.factor
    mine = training_flops(model.unet.cfg, side, model.summarizer.cfg)
    full = training_flops(UNetConfig(), 64, SummarizerConfig())
    return rate * mine / full, f"{rate:.1f} samples/s of {cfg.run}, which ran on one device, by FLOPs"

def plan_training(cfg, img_s, flop):
    """Print what the training takes. img_s: samples a GPU and second, of `flop` each."""
    n, samples = parameters(), bytes_of_sample()
    compute, sent = cfg.per_gpu / img_s, bytes_reduced(n, cfg.gpus)
    reduce = sent * 8 / (cfg.net_gbit * 1e9)
    step = step_seconds(compute, reduce)
    batch, mean = cfg.gpus * cfg.per_gpu, sum(samples) / len(samples)
    steps = cfg.epochs * cfg.patches / batch
    encoded = sum(cfg.patches / 4 ** s for s in range(8))
    encode = encoded * full_size()["encoder"] / (img_s * flop * cfg.gpus)
    hours, read, stored = step * steps / 3600, mean * batch / step, bytes_on_disk(cfg.patches)
    print(f"bytes read per sample, scale 0 to 7: {', '.join(f'{b:,}' for b in samples)}; mean {mean:,.0f}\n"
          f"training of {n:,} parameters on {cfg.gpus} GPUs, {cfg.per_gpu} samples each: {steps:,.0f} steps\n"
          f"  step      {step:.3f} s: compute {compute:.3f}, all-reduce {reduce:.3f}, of which {step - compute:.3f} "
          f"shows; {step_seconds(compute, reduce, 0):.3f} if none of it were hidden\n"
          f"  time      {hours:.1f} hours, {hours * cfg.gpus:,.0f} GPU-hours; before it, encoding latents, "
          f"{encode / 3600:.2f} hours\n"
          f"  network   {sent / 1e9:.2f} GB sent per GPU and step, {sent * 8 / step / 1e9:.1f} Gbit/s of "
          f"{cfg.net_gbit:g}; storage gives {read / 1e9:.3f} GB/s to all\n"
          f"  disk      {stored / 1e12:.2f} TB of latents and embeddings, {16 * n / 1e9:.1f} GB a checkpoint")

def plan_images(cfg, rate):
    """Print what the images take, at `rate` FLOP/s a GPU."""
    full, pixels = full_size(), cfg.images * cfg.size ** 2 * 3
    print(f"{cfg.images:,.0f} images of {cfg.size} x {cfg.size} pixels on {cfg.gpus} GPUs: 50 steps, a context")
    for guide in ("s2", "x0+proxy"):
        work = sum(n * full[name] for name, n in rows_of_image(cfg.size, guide).items())
        total = work / rate * cfg.images / cfg.gpus
        print(f"  {guide:<10}{work / 1e15:.2f} PFLOP, {work / rate:.1f} GPU-seconds each: {total / 86400:.1f} days, "
              f"written at {pixels / total / 1e9:.3f} GB/s")
    latents = pixels / 8  # float16, a sixteenth of the numbers
    print(f"  disk      {pixels / 1e12:.1f} TB of plain pixels, {latents / 1e12:.1f} TB of latents")

def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    at_least(cfg, gpus=1, per_gpu=1, patches=1, epochs=1e-3, net_gbit=1e-3, images=1, size=256, img_s=0)
    img_s, source = speed(cfg)
    flop = training_flops(UNetConfig(), 64, SummarizerConfig())
    print(f"speed: {img_s:.3g} samples/s per GPU ({source}) = {img_s * flop / 1e12:.3g} TFLOP/s")
    plan_training(cfg, img_s, flop)
    plan_images(cfg, img_s * flop)

if __name__ == "__main__":
    cli(main)
