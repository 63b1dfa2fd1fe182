"""What sampling and training cost: rows and FLOPs of each network, bytes read and sent, here and at full size.

in:  a model, while it samples; or sizes alone   out: numbers, a table
run: python -m experiments.cost (FLOPs of the full-size networks)     read next: plan.py
"""
import time
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import UserError, cli
from data import GRID
from large.command import usual_overlap
from sample_joint import starts
from summarizer import SLOTS, Summarizer
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

# What a guide asks for K times a step, beside the one estimate of every window: (estimates, decodes, encodes)
CORRECTION = {"s2": (2, 1, 2), "x0": (0, 1, 2), "x0+proxy": (0, 0, 0)}

# ----- 1. Counted -----

def flops(call):
    """FLOPs (2 per multiplication and addition) of everything that call() does.

    Attention is computed as plain matrix products meanwhile: PyTorch 2.13's counter has no formula for the CPU's fused
    kernel and reports 0 FLOPs for it. On the meta device both ways give the same.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()

@torch.no_grad()
def row_flops(net, shape, width=0, length=65):
    """FLOPs of one forward pass of a network on one row of this shape; width, length: of c, if it takes one."""
    device = next(net.parameters()).device
    inputs = [torch.zeros(1, *shape, device=device)]
    if width:
        inputs += [torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, length, width, device=device)]
    return flops(lambda: net(*inputs))

def network_flops(unet, vae, side=64):
    """FLOPs of the networks of these configs on one patch, latents of `side`."""
    pixels = side * 2 ** (len(vae.mult) - 1)
    latent = (vae.channels, side, side)
    with torch.device("meta"):  # costs no memory
        autoencoder = VQVAE(vae)
        return {"U-Net": row_flops(UNet(unet), latent, unet.context_dim),
                "decoder": row_flops(autoencoder.decoder, latent),
                "encoder": row_flops(autoencoder.encoder, (3, pixels, pixels))}

@cache
def full_size():
    """FLOPs of the published networks on one patch of 256 x 256 pixels."""
    return network_flops(UNetConfig(), VAEConfig())

def training_flops(unet, side=64, summarizer=None):
    """FLOPs of the forward and backward pass on one sample, latents of `side`. in: configs; summarizer None = without.
    About three times the forward pass: backwards, a product each for inputs and for weights."""
    with torch.device("meta"):
        net, z = UNet(unet), torch.randn(1, unet.channels, side, side)
        t, c = torch.zeros(1, dtype=torch.long), torch.randn(1, 65, unet.context_dim)
        if summarizer is not None:
            told = Summarizer(summarizer)
            tokens, mask = torch.randn(1, SLOTS, summarizer.embed_dim), torch.ones(1, SLOTS, dtype=torch.bool)

        def step():
            condition = c if summarizer is None else told(tokens, mask, t)
            net(z, t, condition).sum().backward()
        return flops(step)

class Profile:
    """Counts rows and seconds of the networks by hooks, while it is open; FLOPs come from the shapes it saw."""

    def __init__(self, model, proxy):
        self.parts = {"U-Net": model.unet, "decoder": model.vae.decoder, "encoder": model.vae.encoder}
        if proxy is not None:
            self.parts["proxy"] = proxy
        self.length, self.size = model.summarizer.pos.shape[1], {}
        self.rows, self.seconds = dict.fromkeys(self.parts, 0), dict.fromkeys(self.parts, 0.0)
        self.began, self.hooks = time.perf_counter(), []
        for name, part in self.parts.items():
            self.watch(name, part)

    def watch(self, name, part):
        def before(module, inputs):
            self.start = self.now()

        def after(module, inputs, output):
            self.seconds[name] += self.now() - self.start
            self.rows[name] += len(inputs[0])
            self.size.setdefault(name, tuple(inputs[0].shape[1:]))
        self.hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]

    def now(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def close(self):
        for hook in self.hooks:
            hook.remove()
        self.seconds["all"] = time.perf_counter() - self.began

    def flops(self, width):
        """FLOPs of the forward passes so far, {network: FLOPs}: of these networks, and of the published ones. width: of
        the tokens. Backward passes of gradient guides come on top."""
        full, mine, large = full_size(), {}, {}
        for name, part in self.parts.items():
            if self.rows[name]:
                one = row_flops(part, self.size[name], width if name == "U-Net" else 0, self.length)
                mine[name] = self.rows[name] * one
                large[name] = self.rows[name] * full.get(name, 0)
        return mine, large

# ----- 2. Reckoned -----

def rows_of_step(n, views, guide="s2", inner=1, guidance=2.0):
    """Rows that the networks see in one step of joint sampling with n fine windows and `views` coarse ones, K = inner.
    Every coarse window is estimated and decoded once; estimates count twice under guidance."""
    if guide not in CORRECTION:
        raise UserError(f"guide={guide!r} runs backwards, which is not counted here: take {', '.join(CORRECTION)}")
    estimates, decodes, encodes = CORRECTION[guide]
    branches = 1 if guidance == 1 else 2
    return {"U-Net": branches * (n * (1 + inner * estimates) + views), "decoder": n * inner * decodes + views,
            "encoder": n * inner * encodes}

def rows_of_image(size, guide="s2", steps=50, patch=256, context=4, window=64):
    """Rows for a square image of `size` pixels with one coarser scale, decoded at the end in tiles half as large again
    as a patch, which count by their area. window: in latents."""
    side, overlap = size * window // patch, usual_overlap(window)
    fine, coarse = len(starts(side, window, overlap)), len(starts(side >> context, window, overlap))
    tiles = len(starts(side, window * 3 // 2, window // 2))
    rows = {name: steps * n for name, n in rows_of_step(fine ** 2, coarse ** 2, guide).items()}
    rows["decoder"] += tiles ** 2 * 1.5 ** 2
    return rows

def bytes_of_sample(patch=256, embed_dim=1024, scales=8):
    """Bytes a training sample takes from disk, per scale: latents 3 (P/4)^2, embeddings of its 4^s base tiles, or the
    8 x 8 they are pooled to, both float16, and two int32 that say where it lies."""
    latents = 2 * 3 * (patch // 4) ** 2
    return [latents + 2 * min(4 ** s, GRID ** 2) * embed_dim + 8 for s in range(scales)]

def bytes_on_disk(patches, patch=256, embed_dim=1024, scales=8):
    """Latents and embeddings of a set with so many patches at scale 0 and 4^s times fewer at scale s, bytes. Every base
    tile has one embedding, and patches from scale 4 on have 8 x 8 pooled ones besides."""
    latents, pooled = 2 * 3 * (patch // 4) ** 2 + 8, 2 * GRID ** 2 * embed_dim
    total = patches * 2 * embed_dim
    for s in range(scales):
        total += patches / 4 ** s * (latents + (pooled if 4 ** s > GRID ** 2 else 0))
    return total

def bytes_reduced(parameters, ranks):
    """Bytes each rank sends, and receives, in a ring all-reduce of float32 gradients: 4 N 2 (n-1)/n."""
    return 4 * parameters * 2 * (ranks - 1) / ranks

def step_seconds(compute, reduce, hidden=2 / 3):
    """Seconds of a training step on many ranks: compute + what of the all-reduce is not hidden behind the share
    `hidden` of it, the backward pass, during which gradients that are ready travel. hidden 0: none is."""
    return compute + max(0.0, reduce - hidden * compute)

def main(argv):
    for name, n in full_size().items():
        print(f"{name:>8}{n / 1e12:>8.3f} TFLOP for a patch of 256 x 256 pixels, one pass")

if __name__ == "__main__":
    cli(main, __doc__)
