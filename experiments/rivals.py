"""U-Nets to compare ours with: the same one written down plainly, and that of `diffusers`.

in:  as UNet   out: as UNet; what is slower or faster in ours is what bench.py measures against them
run: python rivals.py (is that of diffusers of the same shape?)     read next: plan.py
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, cli
from experiments.cost import meta_flops
from unet import UNet, UNetConfig, time_embedding


def plain(net, z, t, c):
    """The U-Net as one would write it down: softmax(Q K^T) V as such, GroupNorm in float32, keys and values of c at
    every call. in: our network, whose weights it takes, without a place code; z, t, c. out: as UNet.forward."""
    def norm(m, x):
        return F.group_norm(x.float(), m.num_groups, m.weight.float(), m.bias.float(), m.eps).to(x.dtype)

    def attend(a, x, source):
        q, k, v = (f.unflatten(-1, (a.heads, -1)).transpose(1, 2) for f in (a.q(x), a.k(source), a.v(source)))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)      # (B,heads,N,M)
        return a.out((weights @ v).transpose(1, 2).flatten(2))

    def run(stage, h):
        if m := stage.res:
            x = m.conv1(F.silu(norm(m.norm1, h))) + m.emb(F.silu(emb))[:, :, None, None]
            h = m.skip(h) + m.conv2(F.silu(norm(m.norm2, x)))
        if m := stage.attn:
            x = m.proj_in(norm(m.norm, h)).flatten(2).transpose(1, 2)           # (B,hw,C)
            n = m.norm1(x)
            x = x + attend(m.self_attn, n, n)
            x = x + attend(m.cross, m.norm2(x), c)
            value, gate = m.ff1(m.norm3(x)).chunk(2, -1)
            x = x + m.ff2(value * F.gelu(gate))
            h = h + m.proj_out(x.transpose(1, 2).reshape(h.shape))
        if m := stage.conv:
            h = m(F.interpolate(h, scale_factor=2.0, mode="nearest") if stage.up else h)
        return h
    emb, h, skips = net.time2(F.silu(net.time1(time_embedding(t, net.cfg.width).to(z.dtype)))), z, []
    for stage in net.down:
        h = run(stage, h)
        skips.append(h)
    for stage in net.middle:
        h = run(stage, h)
    for stage in net.up:
        h = run(stage, torch.cat([h, skips.pop()], 1))
    return net.conv_out(F.silu(norm(net.norm_out, h)))


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
            shapes = [sorted(tuple(p.shape) for p in kind(cfg).parameters()) for kind in (UNet, Diffusers)]
    except UserError as err:
        return f"diffusers: skipped, {err}", False
    work = [meta_flops(partial(kind, cfg), (cfg.channels, side, side), cfg.context_dim) for kind in (UNet, Diffusers)]
    count = [sum(torch.Size(s).numel() for s in mine) for mine in shapes]
    same = shapes[0] == shapes[1] and abs(work[0] - work[1]) < 1e-3 * work[0]
    said = "the same shape" if same else "another shape, so it is skipped"
    return (f"diffusers: {count[1]:,} weights, {work[1] / 1e9:.2f} GFLOP a row, ours {count[0]:,} and "
            f"{work[0] / 1e9:.2f}: {said}"), same


def main(argv):
    print(compared(UNetConfig(), 64)[0])
    small = UNet(UNetConfig(32, (1, 2), 1, (2,), 64, groups=8)).requires_grad_(False)
    for p in small.parameters():
        p += 0.05 * torch.randn_like(p)  # the last layers begin at zero
    z, t, c = torch.randn(1, 3, 16, 16), torch.tensor([7]), torch.randn(1, 65, 64)
    print(f"plain against ours, tiny, on the CPU: off by {(plain(small, z, t, c) - small(z, t, c)).abs().max():.1e}")


if __name__ == "__main__":
    cli(main)
