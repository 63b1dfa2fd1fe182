"""What sampling and training cost: rows and FLOPs of each network, bytes read and sent.

in:  a model, while it samples; or sizes alone   out: numbers, a table
run: python -m experiments.cost (FLOPs of the full-size networks)     read next: plan.py
"""
from functools import cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import UserError, cli
from data import GRID, POOLED
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
def row_flops(net, shape, width=0):
    """FLOPs of one forward pass of a network on one row of this shape; width: of c, if it takes one."""
    device = next(net.parameters()).device
    inputs = [torch.zeros(1, *shape, device=device)]
    if width:
        inputs += [torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, 65, width, device=device)]
    return flops(lambda: net(*inputs))

def network_flops(unet, vae, side):
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
    return network_flops(UNetConfig(), VAEConfig(), 64)

def training_flops(unet, side, summarizer=None):
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
    """Counts the rows that networks see, by hooks, while it is open. Attribute: rows {network: number}."""

    def __init__(self, model, proxy):
        parts = {"U-Net": model.unet, "decoder": model.vae.decoder, "encoder": model.vae.encoder}
        parts |= {"proxy": proxy} if proxy is not None else {}
        self.rows = dict.fromkeys(parts, 0)
        self.hooks = [part.register_forward_pre_hook(partial(self.count, name)) for name, part in parts.items()]

    def count(self, name, module, inputs):
        self.rows[name] += len(inputs[0])

    def close(self):
        for hook in self.hooks:
            hook.remove()

# ----- 2. Reckoned -----

def rows_of_step(n, views, guide="s2"):
    """Rows that the networks see in one step of joint sampling with n fine windows and `views` coarse ones, K = 1.
    Every coarse window is estimated and decoded once; estimates count twice, for they are guided."""
    if guide not in CORRECTION:
        raise UserError(f"guide={guide!r} runs backwards, which is not counted here: take {', '.join(CORRECTION)}")
    estimates, decodes, encodes = CORRECTION[guide]
    return {"U-Net": 2 * (n * (1 + estimates) + views), "decoder": n * decodes + views, "encoder": n * encodes}

def rows_of_image(size, guide="s2"):
    """Rows of 50 steps for a square image of `size` pixels with the published patches of 256 pixels and a context at
    scale 4, decoded at the end in tiles half as large again as a patch, which count by their area."""
    side, window = size // 4, 64                                # in latents
    fine, coarse = (len(starts(n, window, usual_overlap(window))) for n in (side, side >> 4))
    tiles = len(starts(side, window * 3 // 2, window // 2))
    rows = {name: 50 * n for name, n in rows_of_step(fine ** 2, coarse ** 2, guide).items()}
    rows["decoder"] += tiles ** 2 * 1.5 ** 2
    return rows

SCALES, LATENTS, EMBEDDING = 8, 2 * 3 * 64 ** 2, 2 * 1024       # as published; bytes in float16

def bytes_of_sample():
    """Bytes a training sample takes from disk, per scale: latents, embeddings of its 4^s base tiles, or the 8 x 8 they
    are pooled to, and two int32 that say where it lies."""
    return [LATENTS + min(4 ** s, GRID ** 2) * EMBEDDING + 8 for s in range(SCALES)]

def bytes_on_disk(patches):
    """Latents and embeddings of a set with so many patches at scale 0 and 4^s times fewer at scale s, bytes. Every base
    tile has one embedding, and patches from scale 4 on have 8 x 8 pooled ones besides."""
    total = patches * EMBEDDING
    for s in range(SCALES):
        pooled = GRID ** 2 * EMBEDDING if s >= POOLED else 0
        total += patches / 4 ** s * (LATENTS + 8 + pooled)
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
