"""Summarizer: compress the SSL embeddings under a patch into 65 conditioning tokens (Z §3.1, S8.1).

A patch at scale s covers 2^s x 2^s base tiles, each with one embedding of width E. `standardize` pools this grid
to at most 8x8. `pack_grid` lays it into 64 slots. The `Summarizer`, a transformer that also sees the scale, turns
the slots into tokens that the U-Net attends to.

in:  e (E,G,G), scale s   out: c (65,D): one scale token, then 64 grid tokens
run: python summarizer.py     read next: unet.py
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import Embedding, LayerNorm, Linear, Module, ModuleList, Parameter
from torch.nn.functional import gelu, pad, scaled_dot_product_attention
from torch.nn.init import eye_, zeros_

from common import UserError, cli, summary

SLOTS = 64  # Z S8.1: grids are padded or pooled to 8x8
HEADS = 8   # official: 8 heads at any width

@dataclass
class SummarizerConfig:
    embed_dim: int = 1024  # E, width of one SSL embedding
    width: int = 512       # D, also the width of the tokens
    depth: int = 12        # transformer blocks
    mlp: int = 2048        # hidden width of their MLPs
    scales: int = 8        # levels of the scale embedding (NAIP: 4)
    positions: int = 0     # channels of the place code added to the tokens; 0 = none, as published
    kind: str = "transformer"  # of the CVPR version; or cnn, of the workshop's, without use for depth and mlp
    side: int = 32         # cnn: what grids are up-sampled to; published: 128, for patches of 256

# ----- 1. From a grid of embeddings to 64 slots -----

def standardize(e):
    """Pool a grid to at most 8x8, then give each embedding mean 0 and deviation 1 over its channels (Z S8.1).
    in:  e (...,E,G,G), G up to 8, or a multiple of 8. out: (...,E,min(G,8),min(G,8)) float32. raises: ValueError."""
    e = e.float()
    side = e.shape[-1]
    if e.ndim < 3 or e.shape[-2] != side or side > 8 and side % 8:
        raise UserError(f"got embeddings {tuple(e.shape)}, expected (...,E,G,G), G <= 8 or a multiple of 8")
    if side > 8:
        k = side // 8
        e = e.unflatten(-1, (8, k)).unflatten(-3, (8, k))            # (...,E,8,k,8,k)
        e = e.mean((-3, -1))                                         # (...,E,8,8)
    # official: per place, over channels, unbiased deviation; deviates: in float32, not float16
    mean = e.mean(-3, keepdim=True)                                  # (...,1,G,G)
    std = e.std(-3, keepdim=True)
    return (e - mean) / (std + 1e-8)

def pack_grid(e):
    """Place the embeddings of one patch into the 64 slots, row by row, centred in the flattened order.
    in:  e (E,G,G), standardised. out: tokens (64,E), zero where empty; mask (64,), True = real. raises: ValueError."""
    if e.ndim != 3 or e.shape[1] != e.shape[2] or e.shape[1] not in (1, 2, 4, 8):
        raise UserError(f"got embeddings {tuple(e.shape)}, not (E,G,G) with G = 1, 2, 4 or 8: use standardize")
    n = e.shape[1] ** 2
    start = SLOTS // 2 - n // 2                                      # official: a single token is in slot 32
    tokens = e.new_zeros(SLOTS, len(e))                              # (64,E)
    tokens[start:start + n] = e.flatten(1).T                         # (G*G,E), row-major
    mask = torch.zeros(SLOTS, dtype=torch.bool, device=e.device)
    mask[start:start + n] = True
    return tokens, mask

def summarized(summarizer, grids, s):
    """Conditions c (n,65,D) of patches of scale s. in: their grids, standardised, (n,E,G,G) or a list."""
    tokens, mask = (torch.stack(part) for part in zip(*map(pack_grid, grids)))
    device = next(summarizer.parameters()).device
    return summarizer(tokens.to(device), mask.to(device), torch.full((len(grids),), s, device=device))

def grid_of(tokens, mask, cfg):
    """Which grid fills the slots: g (B,), of side 2^g. raises: ValueError for tokens of another shape."""
    if tokens.shape[1:] != (SLOTS, cfg.embed_dim):
        raise UserError(f"got tokens {tuple(tokens.shape)}, not (B,64,{cfg.embed_dim}): use pack_grid, and the "
                        f"encoder of the training")
    side = mask.sum(1).float().sqrt()                                # (B,) of 1, 2, 4, 8
    return side.log2().round().long()

# ----- 2. Where a token lies -----

def place_code(h, w, dim, device=None):
    """Sines and cosines of where each cell of an h x w grid over [0,1]^2 lies: (h*w,dim), at dim/4 octaves.
    deviates: with it on tokens and on the U-Net's queries, a pixel first attends to the token under it. Published
    networks must find out which that is. Small models follow the layout after minutes so."""
    freq = math.pi * 2.0 ** torch.arange(dim // 4, device=device)    # (dim/4,)
    axes = []
    for n in (h, w):
        centre = (torch.arange(n, device=device) + 0.5) / n          # of each cell
        angle = centre[:, None] * freq                               # (n,dim/4)
        axes.append(torch.cat([angle.sin(), angle.cos()], 1))        # (n,dim/2)
    y, x = axes
    return torch.cat([y.repeat_interleave(w, 0), x.repeat(h, 1)], 1)                         # (h*w,dim)

def slot_codes(dim):
    """The place codes of the 64 slots for grids of side 1, 2, 4, 8: (4,64,dim), zero where a slot is empty."""
    rows = []
    for side in (1, 2, 4, 8):
        code = place_code(side, side, dim)                           # (side*side,dim)
        rows.append(pack_grid(code.T.view(dim, side, side))[0])      # (64,dim)
    return torch.stack(rows)

# ----- 3. The transformer -----

class SummarizerBlock(Module):  # x + attention(norm x), then x + mlp(norm x)
    def __init__(self, width, mlp):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.fc1 = Linear(width, mlp)
        self.fc2 = Linear(mlp, width)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))  # (B,65,3,8,D/8)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # (B,8,65,D/8) each
        h = scaled_dot_product_attention(q, k, v)
        h = h.transpose(1, 2).flatten(2)                             # (B,65,D)
        x = x + self.out(h)
        h = gelu(self.fc1(self.norm2(x)))
        return x + self.fc2(h)

class Summarizer(Module):
    """The transformer of the CVPR version. in: tokens (B,64,E), mask (B,64), s (B,) int64. out: c (B,65,D).
    source: Z §3.1, S8.1; reference: official EmbeddingViT2_5."""

    def __init__(self, cfg: SummarizerConfig):
        super().__init__()
        width = cfg.width
        if width % HEADS:
            raise UserError(f"summarizer.width={width} is not a multiple of {HEADS} heads")
        if cfg.positions % 4 or cfg.positions > width:
            raise UserError(f"summarizer.positions={cfg.positions}: give a multiple of 4, at most the width")
        self.cfg = cfg
        self.embed = Linear(cfg.embed_dim, width)
        self.pad = Parameter(torch.zeros(1, 1, width))               # stands in every empty slot
        self.scale = Embedding(cfg.scales, width)
        self.pos = Parameter(torch.randn(1, SLOTS + 1, width) * 0.02)
        self.blocks = ModuleList(SummarizerBlock(width, cfg.mlp) for _ in range(cfg.depth))
        self.norm = LayerNorm(width, eps=1e-6)
        self.proj = Linear(width, width)                             # official: it and the next are not in Z
        self.norm_out = LayerNorm(width, eps=1e-5)
        if cfg.positions:
            self.register_buffer("place", slot_codes(cfg.positions), persistent=False)
            self.start_aligned()

    @torch.no_grad()
    def start_aligned(self):
        """Let the place code reach the tokens at first: quiet blocks, proj = identity, channels kept free."""
        for block in self.blocks:
            for layer in (block.out, block.fc2):
                layer.weight.mul_(0.1)
                layer.bias.zero_()
        eye_(self.proj.weight)
        zeros_(self.proj.bias)
        n = self.cfg.positions
        self.embed.weight[:n].mul_(0.1)
        self.embed.bias[:n].zero_()

    def forward(self, tokens, mask, s):
        grid = grid_of(tokens, mask, self.cfg)                       # (B,)
        x = torch.where(mask[..., None], self.embed(tokens), self.pad)                       # (B,64,D)
        if self.cfg.positions:
            x = x + pad(self.place[grid], (0, self.cfg.width - self.cfg.positions))
        x = torch.cat([self.scale(s)[:, None], x], 1) + self.pos     # (B,65,D), scale token first
        for block in self.blocks:
            x = block(x)
        return self.norm_out(self.proj(self.norm(x)))                # (B,65,D)

    @classmethod
    def from_official(cls, state, prefix=""):
        """From a published state dict, in eval mode. raises: ValueError listing the keys that do not fit."""
        from slides import keys  # the published names
        return keys.load_summarizer(state, prefix)

def build(cfg):
    """The network that cfg.kind names. raises: UserError for an unknown one."""
    if cfg.kind == "cnn":
        from experiments import workshop  # the workshop version's
        return workshop.CNNSummarizer(cfg)
    if cfg.kind != "transformer":
        raise UserError(f"--summarizer={cfg.kind}: known are transformer, cnn")
    return Summarizer(cfg)

def main(argv):
    with torch.device("meta"):
        tokens, mask = pack_grid(standardize(torch.randn(1024, 4, 4)))
        summary(Summarizer(SummarizerConfig()), tokens[None], mask[None], torch.zeros(1).long())

if __name__ == "__main__":
    cli(main, __doc__)
