"""What sampling costs: rows, FLOPs and seconds of each network, here and at full size.

in:  a model, while it samples   out: a table
run: python cost.py (FLOPs of the full-size networks), python sample_joint.py RUN --size=1024 --profile
read next: sample_joint.py
"""
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import cli
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig


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


def full_size():
    """FLOPs of the published networks on one patch of 256 x 256 pixels."""
    with torch.device("meta"):
        vae = VQVAE(VAEConfig())
        return {"U-Net": flops(UNet(UNetConfig()), (3, 64, 64), 512), "decoder": flops(vae.decoder, (3, 64, 64)),
                "encoder": flops(vae.encoder, (3, 256, 256))}


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


def main(argv):
    for name, n in full_size().items():
        print(f"{name:>8}{n / 1e12:>8.3f} TFLOP for a patch of 256 x 256 pixels, one pass")


if __name__ == "__main__":
    cli(main)
