"""What sampling and training cost: rows, FLOPs and seconds of each network, bytes read and sent, here and at full size.

in:  a model, while it samples; or sizes alone   out: a table; numbers that bench.py plans with
run: python cost.py (FLOPs of the full-size networks), python sample_joint.py RUN --size=1024 --profile
read next: sample_joint.py
"""
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import UserError, cli
from data import GRID
from large.command import usual_overlap
from sample_joint import starts
from summarizer import SLOTS, Summarizer
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

# ----- 1. Counted -----

@torch.no_grad()
def flops(part, shape, width=0, length=65):
    """FLOPs (2 per multiplication and addition) of one forward pass on one row of this shape; width, length: of c."""
    device = next(part.parameters()).device
    args = [torch.zeros(1, *shape, device=device)]
    if width:
        args += [torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, length, width, device=device)]
    with FlopCounterMode(display=False) as counter:
        part(*args)
    return counter.get_total_flops()


def meta_flops(build, shape, width=0):
    """FLOPs of one row through the network that build() makes, which costs no memory."""
    with torch.device("meta"):
        return flops(build(), shape, width)


def network_flops(unet, vae, side=64):
    """FLOPs of the networks of these configs on one patch, latents of `side`."""
    pixels = side << len(vae.mult) - 1
    return {"U-Net": meta_flops(lambda: UNet(unet), (unet.channels, side, side), unet.context_dim),
            "decoder": meta_flops(lambda: VQVAE(vae).decoder, (vae.channels, side, side)),
            "encoder": meta_flops(lambda: VQVAE(vae).encoder, (3, pixels, pixels))}


def full_size():
    """FLOPs of the published networks on one patch of 256 x 256 pixels."""
    return network_flops(UNetConfig(), VAEConfig())


class Profile:
    """Counts rows, FLOPs and seconds of the networks by hooks, while it is open."""

    def __init__(self, model, proxy):
        self.parts = {"U-Net": model.unet, "decoder": model.vae.decoder, "encoder": model.vae.encoder}
        if proxy is not None:
            self.parts["proxy"] = proxy
        self.rows, self.seconds, self.hooks = dict.fromkeys(self.parts, 0), dict.fromkeys(self.parts, 0.0), []
        self.began, self.size, self.length = time.perf_counter(), {}, model.summarizer.pos.shape[1]
        for name, part in self.parts.items():
            self.hooks += [part.register_forward_pre_hook(lambda *a, name=name: self.begin(name)),
                           part.register_forward_hook(lambda m, args, out, name=name: self.end(name, args))]

    def sync(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def begin(self, name):
        self.sync()
        self.start = time.perf_counter()

    def end(self, name, args):
        self.sync()
        self.seconds[name] += time.perf_counter() - self.start
        self.rows[name] += len(args[0])
        if name not in self.size:
            self.size[name] = tuple(args[0].shape[1:])

    def close(self):
        for hook in self.hooks:
            hook.remove()
        self.seconds["all"] = time.perf_counter() - self.began

    def table(self, width):
        """Print a row per network. width: of the tokens."""
        full = full_size()
        mine = {name: self.rows[name] * flops(part, self.size[name], width if name == "U-Net" else 0, self.length)
                for name, part in self.parts.items() if self.rows[name]}
        large = {name: self.rows[name] * full.get(name, 0) for name in mine}
        print(f"\n{'':>8}{'patches':>10}{'GFLOP':>12}{'share':>8}{'seconds':>10}{'full size, TFLOP':>18}{'share':>8}")
        for name in mine:
            print(f"{name:>8}{self.rows[name]:>10}{mine[name] / 1e9:>12.1f}{mine[name] / sum(mine.values()):>8.1%}"
                  f"{self.seconds[name]:>10.1f}{large[name] / 1e12:>18.1f}{large[name] / sum(large.values()):>8.1%}")
        print(f"{'all':>8}{'':>10}{sum(mine.values()) / 1e9:>12.1f}{'':>8}{self.seconds['all']:>10.1f}"
              f"{sum(large.values()) / 1e12:>18.1f}   (forward passes; backward ones of gradient guides come on top)")


# ----- 2. Reckoned -----

def training_flops(unet, side=64, summarizer=None):
    """FLOPs of the forward and backward pass on one sample, latents of `side`. in: configs; summarizer None = without.
    About three times the forward pass: backwards, a product each for inputs and for weights."""
    with torch.device("meta"):
        net, z, t = UNet(unet), torch.randn(1, unet.channels, side, side), torch.zeros(1, dtype=torch.long)
        told = Summarizer(summarizer) if summarizer else None
        tokens = torch.randn(1, SLOTS, summarizer.embed_dim) if summarizer else torch.randn(1, 65, unet.context_dim)
        with FlopCounterMode(display=False) as counter:
            c = told(tokens, torch.ones(1, SLOTS, dtype=torch.bool), t) if told else tokens
            net(z, t, c).sum().backward()
    return counter.get_total_flops()


def rows_of_step(n, views, guide="s2", inner=1, guidance=2.0):
    """Rows that the networks see in one step of joint sampling with n fine windows and `views` coarse ones, K = inner:
    estimates n (1 + 2 K) where the guide takes differences of the denoiser, else n, and one per coarse window, twice
    under guidance; decodes n K, where the guide needs them, and one per coarse window; encodes 2 n K."""
    if guide not in ("s2", "x0", "x0+proxy"):
        raise UserError(f"guide={guide!r} runs backwards, which is not counted here: take s2, x0 or x0+proxy")
    estimates = n * (1 + 2 * inner if guide == "s2" else 1) + views
    return {"U-Net": estimates * (1 if guidance == 1 else 2), "decoder": n * inner * (guide != "x0+proxy") + views,
            "encoder": 2 * n * inner * (guide != "x0+proxy")}


def rows_of_image(size, guide="s2", steps=50, patch=256, context=4, overlap=None, window=64):
    """Rows for a square image of `size` pixels with one coarser scale, decoded at the end in tiles half as large again
    as a patch, which count by their area. overlap (None: `usual_overlap`), window: in latents."""
    overlap, side = usual_overlap(window) if overlap is None else overlap, size * window // patch
    n, views = (len(starts(w, window, overlap)) ** 2 for w in (side, side >> context))
    rows = {k: v * steps for k, v in rows_of_step(n, views, guide).items()}
    rows["decoder"] += len(starts(side, window * 3 // 2, window // 2)) ** 2 * 1.5 ** 2
    return rows


def bytes_of_sample(patch=256, embed_dim=1024, scales=8):
    """Bytes a training sample takes from disk, per scale: latents 3 (P/4)^2, embeddings of its 4^s base tiles, or the
    8 x 8 they are pooled to, both float16, and two int32 that say where it lies."""
    return [2 * 3 * (patch // 4) ** 2 + 2 * min(4 ** s, GRID ** 2) * embed_dim + 8 for s in range(scales)]


def bytes_on_disk(patches, patch=256, embed_dim=1024, scales=8):
    """Latents and embeddings of a set with so many patches at scale 0 and 4^s times fewer at scale s, bytes. Every base
    tile has one embedding, and patches from scale 4 on have 8 x 8 pooled ones besides."""
    total = patches * 2 * embed_dim
    for s in range(scales):
        total += patches / 4 ** s * (2 * 3 * (patch // 4) ** 2 + 8 + 2 * GRID ** 2 * embed_dim * (4 ** s > GRID ** 2))
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
    cli(main)
