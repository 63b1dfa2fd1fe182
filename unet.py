"""U-Net: predict the noise in a latent from the time step and the conditioning tokens (Z §3.1; ADM/LDM family).

Stages run down, through the middle and up again. A stage holds a residual block, a transformer, a convolution
that halves or doubles the resolution, or several of them. What a stage on the way down puts out is concatenated
on the way up. The transformers attend to the L tokens of the Summarizer.

in:  z_t (B,3,h,w), t (B,) int64, c (B,L,D), L = 65 as published   out: eps_hat (B,3,h,w)
run: python unet.py     read next: diffusion.py
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import Conv2d, GroupNorm, Identity, LayerNorm, Linear, Module, ModuleList
from torch.nn.functional import gelu, interpolate, pad, scaled_dot_product_attention, silu
from torch.nn.init import orthogonal_, zeros_
from torch.utils.checkpoint import checkpoint

from common import UserError, cli, summary
from summarizer import place_code

@dataclass
class UNetConfig:
    width: int = 192               # channels of the first level
    mult: tuple = (1, 2, 3, 5)     # channels of each level by the first's; between levels the resolution halves
    res_blocks: int = 2            # residual blocks per level on the way down (one more on the way up)
    attention: tuple = (2, 4, 8)   # down-sampling factors at which a transformer follows a residual block
    context_dim: int = 512         # D, width of the conditioning tokens
    channels: int = 3              # of the latent
    heads: int = 1                 # official: one head as wide as the layer
    groups: int = 32               # of GroupNorm; one channel a group cancels the time embedding
    positions: int = 0             # channels of the place code (see there) on queries; 0 = none, as published
    checkpoint: bool = False       # recompute activations going backward: less memory, a third more time

# ----- 1. Layers -----

def time_embedding(t, dim):
    """in: t (B,) time indices, unscaled. out: (B,dim) [cos | sin], float32, frequencies 1 down to 1/10000."""
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)            # (dim/2,)
    freq = torch.exp(-math.log(10000) * i / half)
    angle = t[:, None].float() * freq                                       # (B,dim/2)
    return torch.cat([angle.cos(), angle.sin()], 1)                         # (B,dim)

def zeroed(layer):
    """The same layer with zero weights, so that the block it ends adds nothing before training."""
    zeros_(layer.weight)
    zeros_(layer.bias)
    return layer

class ResBlock(Module):
    """Two convolutions with the time embedding *added* between them (not FiLM).
    The embedding is constant over a channel: norm2 would take it off again if a group were one channel."""
    def __init__(self, cin, cout, emb, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, cin, eps=1e-5)
        self.conv1 = Conv2d(cin, cout, 3, padding=1)
        self.emb = Linear(emb, cout)
        self.norm2 = GroupNorm(groups, cout, eps=1e-5)
        self.conv2 = zeroed(Conv2d(cout, cout, 3, padding=1))
        self.skip = Conv2d(cin, cout, 1) if cin != cout else Identity()

    def forward(self, x, emb):
        h = self.conv1(silu(self.norm1(x)))                                 # (B,cout,h,w)
        h = h + self.emb(silu(emb))[:, :, None, None]                       # the same at every pixel
        h = self.conv2(silu(self.norm2(h)))
        return self.skip(x) + h                                             # (B,cout,h,w)

class Attention(Module):
    """Attention of x (B,N,C) to M tokens. `kv` computes their keys and values, which may be kept."""
    def __init__(self, c, source, heads):
        super().__init__()
        self.heads = heads
        self.q = Linear(c, c, bias=False)
        self.k = Linear(source, c, bias=False)
        self.v = Linear(source, c, bias=False)
        self.out = Linear(c, c)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)            # (B,heads,N,C/heads)

    def kv(self, source):
        """in: (B,M,source). out: keys and values, (B,heads,M,C/heads) each."""
        return self.split(self.k(source)), self.split(self.v(source))

    def forward(self, x, kv):
        q = self.split(self.q(x))                                           # (B,heads,N,C/heads)
        h = scaled_dot_product_attention(q, *kv)                            # (B,heads,N,C/heads)
        return self.out(h.transpose(1, 2).flatten(2))                       # (B,N,C)

class Transformer(Module):
    """Self-attention over positions, cross-attention to the tokens, gated MLP; added to the input."""
    def __init__(self, c, cfg):
        super().__init__()
        self.positions = cfg.positions
        self.norm = GroupNorm(cfg.groups, c, eps=1e-6)
        self.proj_in = Conv2d(c, c, 1)
        self.norm1, self.norm2 = LayerNorm(c), LayerNorm(c)
        self.norm3 = LayerNorm(c)
        self.self_attn = Attention(c, c, cfg.heads)
        self.cross = Attention(c, cfg.context_dim, cfg.heads)
        self.ff1 = Linear(c, 8 * c)
        self.ff2 = Linear(4 * c, c)
        self.proj_out = zeroed(Conv2d(c, c, 1))
        if self.positions:
            self.start_aligned(c)

    @torch.no_grad()
    def start_aligned(self, c):
        """Give queries and keys the same view of the place code: a pixel first attends to the token over it.
        A logit is then the product of two codes: about 5 for the same place, 1 for the next but one."""
        shared = orthogonal_(torch.empty(c, self.positions)) * c ** 0.25
        for layer in (self.cross.q, self.cross.k):
            weight = layer.weight
            weight.mul_(0.3)
            weight[:, :self.positions] = shared

    def forward(self, x, kv):
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)                                    # (B,hw,C)
        n = self.norm1(h)
        h = h + self.self_attn(n, self.self_attn.kv(n))
        q = self.norm2(h)
        if self.positions:
            code = place_code(*x.shape[2:], self.positions, x.device)       # (hw,positions)
            q = q + pad(code, (0, x.shape[1] - self.positions))             # the other channels stay free
        h = h + self.cross(q, kv)
        value, gate = self.ff1(self.norm3(h)).chunk(2, -1)                  # (B,hw,4C) each
        h = h + self.ff2(value * gelu(gate))
        h = h.transpose(1, 2).reshape(x.shape)                              # (B,C,h,w)
        return x + self.proj_out(h)

class Stage(Module):
    """One entry of the way down or up: any of a residual block, a transformer, a resampling convolution."""
    def __init__(self, res=None, attn=None, conv=None, up=False):
        super().__init__()
        self.res, self.attn = res, attn
        self.conv, self.up = conv, up

    def forward(self, h, emb, kv):
        if self.res is not None:
            h = self.res(h, emb)
        if self.attn is not None:
            h = self.attn(h, kv)
        if self.conv is None:
            return h
        if self.up:
            h = interpolate(h, scale_factor=2.0, mode="nearest")
        return self.conv(h)

# ----- 2. The model -----

class UNet(Module):
    """The denoiser. source: Z §3.1, §4.1.1; reference: the published UNetModel (400,920,579 parameters)."""
    def __init__(self, cfg: UNetConfig):
        super().__init__()
        width, groups = cfg.width, cfg.groups
        if width % groups or width % cfg.heads:
            raise UserError(f"unet.width={width}: give a multiple of unet.groups={groups} and of unet.heads")
        if cfg.positions % 4 or cfg.positions > min(width, cfg.context_dim):
            raise UserError(f"unet.positions={cfg.positions}: give a multiple of 4, at most the width")
        self.cfg = cfg
        emb = 4 * width                                                     # of the time embedding
        self.time1 = Linear(width, emb)
        self.time2 = Linear(emb, emb)
        # the way down; `skips` lists the widths of its outputs
        c, skips = width, [width]
        self.down = ModuleList([Stage(conv=Conv2d(cfg.channels, c, 3, padding=1))])
        last = len(cfg.mult) - 1
        for level, m in enumerate(cfg.mult):
            for _ in range(cfg.res_blocks):
                res = ResBlock(c, m * width, emb, groups)
                self.down.append(Stage(res, self.transformer(level)))
                c = m * width
                skips.append(c)
            if level < last:
                halve = Conv2d(c, c, 3, stride=2, padding=1)            # padded all round, unlike the VAE's
                self.down.append(Stage(conv=halve))
                skips.append(c)
        before = Stage(ResBlock(c, c, emb, groups), Transformer(c, cfg))
        after = Stage(ResBlock(c, c, emb, groups))
        self.middle = ModuleList([before, after])
        # the way up: a stage takes the newest skip left; a level's last stage doubles the resolution
        self.up = ModuleList()
        for level in reversed(range(len(cfg.mult))):
            w = cfg.mult[level] * width
            for b in range(cfg.res_blocks + 1):
                double = Conv2d(w, w, 3, padding=1) if level and b == cfg.res_blocks else None
                res = ResBlock(c + skips.pop(), w, emb, groups)
                self.up.append(Stage(res, self.transformer(level), double, up=True))
                c = w
        self.norm_out = GroupNorm(groups, c, eps=1e-5)
        self.conv_out = zeroed(Conv2d(c, cfg.channels, 3, padding=1))

    def transformer(self, level):
        """A new transformer if the resolution of this level has them, else None."""
        if 2 ** level not in self.cfg.attention:
            return None
        return Transformer(self.cfg.width * self.cfg.mult[level], self.cfg)

    def cache_context(self, c):
        """Cross-attention keys and values of every transformer, for reuse while c stays the same.
        in: c (B,L,D). out: a list that `forward` and `features` accept in place of c."""
        if c.shape[-1] != self.cfg.context_dim:
            raise UserError(f"got tokens of width {c.shape[-1]}, this U-Net takes {self.cfg.context_dim}")
        stages = [*self.down, *self.middle, *self.up]
        return [stage.attn.cross.kv(c) for stage in stages if stage.attn is not None]

    def run(self, stage, h, emb, kvs):
        # a transformer takes the next of the keys and values
        kv = next(kvs) if stage.attn is not None else None
        if self.cfg.checkpoint and torch.is_grad_enabled():
            return checkpoint(stage, h, emb, kv, use_reentrant=False)
        return stage(h, emb, kv)

    def forward(self, z_t, t, c, until="out"):
        """Predict the noise: eps_hat (B,3,h,w), or what `features` asks for. raises: ValueError.
        in:  z_t (B,3,h,w), h and w multiples of 2^(levels-1); t (B,) int64; c (B,L,D) or a cached list."""
        k, channels = 2 ** (len(self.cfg.mult) - 1), self.cfg.channels
        shape = tuple(z_t.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % k or shape[3] % k:
            raise UserError(f"got latents {shape}, this U-Net takes (B,{channels},h,w), sides multiples of {k}")
        kvs = iter(c if isinstance(c, list) else self.cache_context(c))
        emb = time_embedding(t, self.cfg.width).to(self.time1.weight.dtype)
        emb = self.time2(silu(self.time1(emb)))                             # (B,4w)
        h, skips = z_t, []
        for stage in self.down:
            h = self.run(stage, h, emb, kvs)
            skips.append(h)
        for stage in self.middle:
            h = self.run(stage, h, emb, kvs)                                # (B,C,h/k,w/k)
        if until == "middle":
            return h
        for i, stage in enumerate(self.up):
            h = torch.cat([h, skips.pop()], 1)
            h = self.run(stage, h, emb, kvs)
            if until == i:
                return h
        return self.conv_out(silu(self.norm_out(h)))                        # (B,3,h,w)

    def features(self, z_t, t, c, block):
        """Activation of one block, for MIL. in: as `forward`; block "middle", or 0..11 = index into the published
        output_blocks, each the whole stage, with the doubling of blocks 2, 5 and 8."""
        if block != "middle" and block not in range(len(self.up)):
            raise UserError(f"no U-Net block {block!r}: give \"middle\" or 0..{len(self.up) - 1}")
        return self(z_t, t, c, block)

    @classmethod
    def from_official(cls, state, prefix=""):
        """Build from a published state dict (prefix "model.diffusion_model." in a whole checkpoint); in eval mode.
        raises: ValueError listing missing, unexpected and mis-shaped keys."""
        from slides import keys  # the published names
        return keys.load_unet(state, prefix)

def main(argv):
    z_t, t, c = torch.randn(1, 3, 64, 64), torch.zeros(1).long(), torch.randn(1, 65, 512)
    with torch.device("meta"):
        summary(UNet(UNetConfig()), z_t.to("meta"), t.to("meta"), c.to("meta"))
    small = UNetConfig(32, (1, 2), 1, (2,), 512, groups=8)
    eps_hat = UNet(small)(z_t, t, c)
    print(f"\na small one on the CPU: z_t {tuple(z_t.shape)} -> eps_hat {tuple(eps_hat.shape)}")

if __name__ == "__main__":
    cli(main, __doc__)
