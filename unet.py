"""U-Net: predict the noise in a latent, given the time step and the conditioning tokens (Z §3.1; ADM/LDM family).

Three kinds of stage (convolution, residual block + transformer, resampling) run down, through the middle and up again;
every output on the way down is concatenated on the way up. The transformers attend to the L tokens of the Summarizer.

in:  z_t (B,3,h,w), t (B,) int64, c (B,L,D), L = 65 as published   out: eps_hat (B,3,h,w)
run: python unet.py     read next: diffusion.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError, check_official, cli, common_count, common_size, load_official, summary
from summarizer import place_code


@dataclass
class UNetConfig:
    width: int = 192               # channels of the first level
    mult: tuple = (1, 2, 3, 5)     # channel multipliers per level; each level but the last halves the resolution
    res_blocks: int = 2            # residual blocks per level on the way down (one more on the way up)
    attention: tuple = (2, 4, 8)   # down-sampling factors at which residual blocks are followed by a transformer
    context_dim: int = 512         # D, width of the conditioning tokens
    channels: int = 3              # of the latent
    heads: int = 1                 # official: one head as wide as the layer
    groups: int = 32               # of GroupNorm. One channel per group would cancel the time embedding (see ResBlock)
    positions: int = 0             # place code on the queries; 0 = none, as published (see summarizer.place_code)
    checkpoint: bool = False       # recompute activations in the backward pass: less memory, a third more time


# ----- 1. Layers -----

def time_embedding(t, dim):
    """in: t (B,) time indices, unscaled. out: (B,dim) [cos | sin] at frequencies 10000^(-i/(dim/2)), float32."""
    freq = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angle = t[:, None].float() * freq                                       # (B,dim/2)
    return torch.cat([angle.cos(), angle.sin()], 1)                         # (B,dim)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding *added* between them (not FiLM).

    The embedding is constant over a channel, so norm2 would subtract it again if its groups had one channel each.
    """

    def __init__(self, cin, cout, emb, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-5)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(emb, cout)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-5)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, c, source, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(c, c, bias=False)
        self.k = nn.Linear(source, c, bias=False)
        self.v = nn.Linear(source, c, bias=False)
        self.out = nn.Linear(c, c)

    def kv(self, source):
        """in: (B,M,source). out: keys and values, (B,heads,M,C/heads) each."""
        return tuple(f(source).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.k, self.v))

    def forward(self, x, kv):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)       # (B,heads,N,C/heads)
        return self.out(F.scaled_dot_product_attention(q, *kv).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Self-attention over positions, cross-attention to the tokens, gated MLP; added to the input."""

    def __init__(self, c, cfg):
        super().__init__()
        context_dim, heads, groups, self.positions = cfg.context_dim, cfg.heads, cfg.groups, cfg.positions
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Conv2d(c, c, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))
        self.self_attn = Attention(c, c, heads)
        self.cross = Attention(c, context_dim, heads)
        self.ff1 = nn.Linear(c, 8 * c)
        self.ff2 = nn.Linear(4 * c, c)
        self.proj_out = nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        if self.positions:
            self.start_aligned(c)

    @torch.no_grad()
    def start_aligned(self, c):
        """Give queries and keys the same view of the place code, so that a pixel attends to the token over it at first:
        logits are then the product of the two codes, about 5 for the same place and 1 for the next but one."""
        shared = nn.init.orthogonal_(torch.empty(c, self.positions)) * c ** 0.25
        for layer in (self.cross.q, self.cross.k):
            layer.weight.mul_(0.3)
            layer.weight[:, :self.positions] = shared

    def forward(self, x, kv):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)           # (B,hw,C)
        n = self.norm1(h)
        h = h + self.self_attn(n, self.self_attn.kv(n))
        q = self.norm2(h)
        if self.positions:
            q = q + F.pad(place_code(*x.shape[2:], self.positions, x.device), (0, x.shape[1] - self.positions))
        h = h + self.cross(q, kv)
        value, gate = self.ff1(self.norm3(h)).chunk(2, -1)                  # (B,hw,4C) each
        h = h + self.ff2(value * F.gelu(gate))
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Stage(nn.Module):
    """One entry of the way down or up: any of a residual block, a transformer, a resampling convolution, in order."""

    def __init__(self, res=None, attn=None, conv=None, up=False):
        super().__init__()
        self.res, self.attn, self.conv, self.up = res, attn, conv, up

    def forward(self, h, emb, kv):
        if self.res is not None:
            h = self.res(h, emb)
        if self.attn is not None:
            h = self.attn(h, kv)
        if self.conv is not None:
            h = self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest") if self.up else h)
        return h


# ----- 2. The model -----

class UNet(nn.Module):
    """The denoiser. source: Z §3.1, §4.1.1; reference: the published UNetModel (400,920,579 parameters)."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        if cfg.width % cfg.groups or cfg.width % cfg.heads:
            raise UserError(f"unet.width={cfg.width} is not a multiple of unet.groups={cfg.groups} and unet.heads="
                            f"{cfg.heads}")
        if cfg.positions % 4 or cfg.positions > min(cfg.width, cfg.context_dim):
            raise UserError(f"unet.positions={cfg.positions}: give a multiple of 4, at most the width")
        self.cfg = cfg
        emb, widths = 4 * cfg.width, [cfg.width * m for m in cfg.mult]

        def attn(level):
            has = 2 ** level in cfg.attention
            return Transformer(widths[level], cfg) if has else None
        self.time1, self.time2 = nn.Linear(cfg.width, emb), nn.Linear(emb, emb)
        c, skips = cfg.width, [cfg.width]
        self.down = nn.ModuleList([Stage(conv=nn.Conv2d(cfg.channels, c, 3, padding=1))])
        for i, w in enumerate(widths):
            for _ in range(cfg.res_blocks):
                self.down.append(Stage(ResBlock(c, w, emb, cfg.groups), attn(i)))
                c = w
                skips.append(c)
            if i < len(widths) - 1:
                self.down.append(Stage(conv=nn.Conv2d(c, c, 3, stride=2, padding=1)))  # symmetric, unlike the VAE's
                skips.append(c)
        self.middle = nn.ModuleList([Stage(ResBlock(c, c, emb, cfg.groups),
                                           Transformer(c, cfg)),
                                     Stage(ResBlock(c, c, emb, cfg.groups))])
        self.up = nn.ModuleList()
        for i, w in reversed(list(enumerate(widths))):
            for b in range(cfg.res_blocks + 1):
                conv = nn.Conv2d(w, w, 3, padding=1) if i and b == cfg.res_blocks else None
                self.up.append(Stage(ResBlock(c + skips.pop(), w, emb, cfg.groups), attn(i), conv, up=True))
                c = w
        self.norm_out = nn.GroupNorm(cfg.groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, cfg.channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def cache_context(self, c):
        """Cross-attention keys and values of every transformer, for reuse while c stays the same.

        in: c (B,L,D). out: a list that `forward` and `features` accept in place of c.
        """
        if c.shape[-1] != self.cfg.context_dim:
            raise UserError(f"got conditioning tokens of width {c.shape[-1]}, this U-Net takes {self.cfg.context_dim}")
        return [s.attn.cross.kv(c) for s in (*self.down, *self.middle, *self.up) if s.attn is not None]

    def blocks(self, z_t, t, c):
        """Yield (name, activation): "middle", then 0..len(up)-1 for the way up, then "out" = eps_hat."""
        kvs = iter(c if isinstance(c, list) else self.cache_context(c))
        emb = self.time2(F.silu(self.time1(time_embedding(t, self.cfg.width).to(self.time1.weight.dtype))))  # (B,4w)

        def run(stage, h):
            kv = next(kvs) if stage.attn is not None else None
            if self.cfg.checkpoint and torch.is_grad_enabled():
                return checkpoint(stage, h, emb, kv, use_reentrant=False)
            return stage(h, emb, kv)
        h, skips = z_t, []
        for stage in self.down:
            h = run(stage, h)
            skips.append(h)
        for stage in self.middle:
            h = run(stage, h)
        yield "middle", h
        for i, stage in enumerate(self.up):
            h = run(stage, torch.cat([h, skips.pop()], 1))
            yield i, h
        yield "out", self.conv_out(F.silu(self.norm_out(h)))

    def forward(self, z_t, t, c):
        """in: z_t (B,3,h,w), h and w multiples of 2^(levels-1); t (B,) int64; c (B,L,D) or a cached list.
        out: eps_hat (B,3,h,w). raises: ValueError for other sizes."""
        return self.features(z_t, t, c, "out")

    def features(self, z_t, t, c, block):
        """Activation of one block: "middle", or 0..11 = index into the published output_blocks (its whole stage, the
        up-sampling of blocks 2, 5 and 8 included)."""
        k = 2 ** (len(self.cfg.mult) - 1)
        if z_t.ndim != 4 or z_t.shape[1] != self.cfg.channels or z_t.shape[2] % k or z_t.shape[3] % k:
            raise UserError(f"got latents of shape {tuple(z_t.shape)}, this U-Net takes (B,{self.cfg.channels},h,w) "
                            f"with h and w multiples of {k}")
        for name, h in self.blocks(z_t, t, c):
            if name == block:
                return h
        raise UserError(f"no U-Net block {block!r}: give \"middle\" or 0..{len(self.up) - 1}")

    def official_name(self, name):
        """Our parameter name -> the published one."""
        head, _, rest = name.partition(".")
        if head not in ("down", "middle", "up"):
            for ours, theirs in (("time1", "time_embed.0"), ("time2", "time_embed.2"), ("norm_out", "out.0"),
                                 ("conv_out", "out.2")):
                name = name.replace(ours, theirs)
            return name
        i, kind, part = rest.split(".", 2)
        has_attn = getattr(self, head)[int(i)].attn is not None
        if head == "middle":
            block = f"middle_block.{2 * int(i) + (kind == 'attn')}"
        else:
            slot = {"res": 0, "attn": 1, "conv": 1 + has_attn if head == "up" else 0}[kind]
            block = f"{'input' if head == 'down' else 'output'}_blocks.{i}.{slot}"
        if kind == "conv":
            return block + (".op." if head == "down" and i != "0" else ".conv." if head == "up" else ".") + part
        if kind == "res":
            pairs = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("emb", "emb_layers.1"),
                     ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("skip", "skip_connection"))
        else:
            deep = "transformer_blocks.0."
            pairs = [(f"{ours}.{n}.", f"{deep}{theirs}.to_{n}.") for n in "qkv" for ours, theirs in
                     (("self_attn", "attn1"), ("cross", "attn2"))]
            pairs += [("self_attn.out", deep + "attn1.to_out.0"), ("cross.out", deep + "attn2.to_out.0"),
                      ("ff1", deep + "ff.net.0.proj"), ("ff2", deep + "ff.net.2"),
                      *((f"norm{n}.", f"{deep}norm{n}.") for n in (1, 2, 3))]
        for ours, theirs in pairs:
            if part.startswith(ours):
                return f"{block}.{theirs}{part[len(ours):]}"
        return f"{block}.{part}"                                              # norm, proj_in, proj_out keep their names

    @classmethod
    def from_official(cls, state, prefix=""):
        """Build from a published state dict (prefix "model.diffusion_model." in a whole checkpoint), in eval mode.

        Sizes are read off the tensors; one head. raises: ValueError listing missing, unexpected, mis-shaped keys.
        """
        with torch.device("meta"):
            model = cls(cls.infer_config(state, prefix))
        load_official(model, state, prefix, model.official_name)
        return model.eval()

    def official_start(self, state):
        """Weights to start training from: the U-Net of a published latent diffusion model, such as cin256-v2.ckpt.

        in:  a whole checkpoint's state dict, of which the raw U-Net counts, as in the papers; or the U-Net's alone
        out: {our name: tensor}; the keys of the class embedder, which has no place here and is dropped
        raises: ValueError listing missing, unexpected and mis-shaped keys.
        """
        raw = "model.diffusion_model."
        prefix = raw if any(k.startswith(raw) for k in state) else ""
        dropped = [k for k in state if k.startswith(("cond_stage_model.", prefix + "label_emb."))]
        state = {k: v for k, v in state.items() if k not in dropped}
        names = check_official(self, state, prefix, self.official_name)
        if self.cfg.heads != 1 or self.cfg.groups != 32:
            raise UserError(f"unet.heads={self.cfg.heads} and unet.groups={self.cfg.groups}, which weights do not show:"
                            f" the published ones were trained with 1 and 32")
        return {ours: state[k] for ours, k in names.items()}, dropped

    @staticmethod
    def infer_config(state, prefix=""):
        start = f"{prefix}input_blocks."
        width = common_size(state, 0, *(start + n for n in ("0.0.weight", "0.0.bias", "1.0.in_layers.0.weight")))
        if not width:
            raise UserError(f"no published U-Net under prefix {prefix!r}: missing {start}0.0.weight")
        mult, attention, blocks = [], [], [0]
        for i in range(1, common_count(state, start)):
            if any(k.startswith(f"{start}{i}.0.op.") for k in state):   # a down-sampling convolution ends the level
                blocks.append(0)
                continue
            blocks[-1] += 1
            if blocks[-1] == 1:
                w = common_size(state, 0, *(f"{start}{i}.0.{n}" for n in ("in_layers.2.weight", "in_layers.2.bias",
                                                                          "out_layers.0.weight")))
                mult.append((w or width) // width)
                if any(k.startswith(f"{start}{i}.1.") for k in state):
                    attention.append(2 ** (len(mult) - 1))
        context = common_size(state, 1, *(k for k in state if k.startswith(prefix) and k.endswith("attn2.to_k.weight")))
        channels = common_size(state, 0, prefix + "out.2.weight", prefix + "out.2.bias")
        return UNetConfig(width, tuple(mult), blocks[0], tuple(attention), context or 512, channels or 3)


def main(argv):
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        summary(unet, torch.randn(1, 3, 64, 64), torch.zeros(1, dtype=torch.long), torch.randn(1, 65, 512))
    small = UNetConfig(32, (1, 2), 1, (2,), 64, groups=8)
    eps_hat = UNet(small)(torch.randn(1, 3, 16, 16), torch.tensor([7]), torch.randn(1, 65, 64))
    print(f"\ntiny forward on the CPU: z_t (1, 3, 16, 16) -> eps_hat {tuple(eps_hat.shape)}")


if __name__ == "__main__":
    cli(main)
