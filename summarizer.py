"""Summarizer: compress the SSL embeddings under a patch into 65 conditioning tokens (Z §3.1, S8.1).

A patch at scale s covers 2^s x 2^s base tiles, each with one embedding of width E. `standardize` pools the grid to at
most 8x8 and normalises each embedding; `pack_grid` lays it into 64 slots; the `Summarizer`, a small transformer that
also sees the scale, turns the slots into tokens that the U-Net attends to; so does the workshop's `CNNSummarizer` (W).

in:  e (E,G,G), scale s   out: c (65,D): one scale token (not from the CNN), 64 grid tokens. The null is c = zeros.
run: python summarizer.py     read next: unet.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    positions: int = 0     # channels of the place code added to the tokens; 0 = none, as published (see place_code)
    kind: str = "transformer"  # of the CVPR version; or cnn, of the workshop's, which has no use for depth and mlp
    side: int = 32         # cnn: what grids are up-sampled to; published: 128, for patches of 256


def pack_grid(e):
    """Place the embeddings of one patch into the 64 slots, row by row, centred in the flattened order.

    in:  e (E,G,G) with G in 1, 2, 4, 8, already standardised. out: tokens (64,E), zero where empty; mask (64,) bool,
    True = real token. raises: ValueError for another grid. source: Z S8.1; official: n tokens start at 32 - n//2.
    """
    if e.ndim != 3 or e.shape[1] != e.shape[2] or e.shape[1] not in (1, 2, 4, 8):
        raise UserError(f"got embeddings of shape {tuple(e.shape)}, the Summarizer takes (E,G,G) with G = 1, 2, 4 or 8:"
                        f" pool larger grids with summarizer.standardize(e)")
    n = e.shape[1] * e.shape[2]
    start = SLOTS // 2 - n // 2  # a single token goes to slot 32
    tokens = e.new_zeros(SLOTS, e.shape[0])            # (64,E)
    tokens[start:start + n] = e.flatten(1).T           # row-major
    mask = torch.zeros(SLOTS, dtype=torch.bool, device=e.device)
    mask[start:start + n] = True
    return tokens, mask


def standardize(e):
    """Pool a grid to at most 8x8, then give each embedding mean 0 and deviation 1 over its channels.

    in:  e (...,E,G,G), any float type; G up to 8, or a multiple of 8. out: (...,E,min(G,8),min(G,8)) float32;
    differentiable. raises: ValueError for a grid that does not pool evenly.
    source: Z S8.1 "element-wise normalisation"; official: per location over channels, unbiased deviation + 1e-8, in
    float16; deviates: float32, and the order pool -> standardise is kept in large-image sampling too.
    """
    e = e.float()
    side = e.shape[-1]
    if e.ndim < 3 or e.shape[-2] != side or side > 8 and side % 8:
        raise UserError(f"got embeddings of shape {tuple(e.shape)}, expected (...,E,G,G), G <= 8 or a multiple of 8")
    if side > 8:
        e = e.unflatten(-1, (8, side // 8)).unflatten(-3, (8, side // 8)).mean((-3, -1))  # block means (...,E,8,8)
    return (e - e.mean(-3, keepdim=True)) / (e.std(-3, keepdim=True) + 1e-8)


def place_code(h, w, dim, device=None):
    """Where each cell of an h x w grid over [0,1]^2 lies: sines and cosines of y and x at dim/4 octaves, (h*w,dim).

    deviates: the published network has to discover which of 64 tokens lies under which pixel, and until it has, coarse
    scales follow only the mean of their condition. With this code on the tokens here and on the queries of the U-Net's
    cross-attention (`UNetConfig.positions`, the same number), attention starts on the token under the pixel, and small
    models follow the layout after minutes instead of hours. Off by default; published weights never use it.
    """
    freq = math.pi * 2.0 ** torch.arange(dim // 4, device=device)
    y, x = (((torch.arange(n, device=device) + 0.5) / n)[:, None] * freq for n in (h, w))    # (n,dim/4)
    y, x = torch.cat([y.sin(), y.cos()], 1), torch.cat([x.sin(), x.cos()], 1)                # (n,dim/2)
    return torch.cat([y[:, None].expand(h, w, -1), x[None].expand(h, w, -1)], 2).flatten(0, 1)


def grid_of(tokens, mask, cfg):
    """Which grid fills the slots: g (B,), its side is 2^g. raises: ValueError for tokens of another shape."""
    if tokens.shape[1:] != (SLOTS, cfg.embed_dim):
        raise UserError(f"got tokens of shape {tuple(tokens.shape)}, this Summarizer takes (B,{SLOTS},{cfg.embed_dim})"
                        f": use pack_grid, and embeddings of the encoder it was trained with")
    return mask.sum(1).float().log2().div(2).round().long()            # 1, 4, 16, 64 real tokens -> 0, 1, 2, 3


class SummarizerBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, width, mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B,8,65,D/8) each
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))    # (B,65,D)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Summarizer(nn.Module):
    """The transformer of the CVPR version.

    in:  tokens (B,64,E) and mask (B,64) from `pack_grid`, s (B,) int64. out: c (B,65,D).
    source: Z §3.1, S8.1; reference: official EmbeddingViT2_5.
    """

    def __init__(self, cfg: SummarizerConfig):
        super().__init__()
        if cfg.width % HEADS:
            raise UserError(f"summarizer width {cfg.width} is not a multiple of {HEADS} heads")
        if cfg.positions % 4 or cfg.positions > cfg.width:
            raise UserError(f"summarizer.positions={cfg.positions}: give a multiple of 4, at most the width")
        self.cfg = cfg
        self.embed = nn.Linear(cfg.embed_dim, cfg.width)
        self.pad = nn.Parameter(torch.zeros(1, 1, cfg.width))      # stands in every empty slot
        self.scale = nn.Embedding(cfg.scales, cfg.width)
        self.pos = nn.Parameter(torch.randn(1, SLOTS + 1, cfg.width) * 0.02)
        self.blocks = nn.ModuleList(SummarizerBlock(cfg.width, cfg.mlp) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)
        self.proj = nn.Linear(cfg.width, cfg.width)                # official: Linear and a second norm, not in the text
        self.norm_out = nn.LayerNorm(cfg.width, eps=1e-5)
        if cfg.positions:
            # row g: the 64 slots of a grid of side 2^g, as pack_grid fills them; empty slots have no place
            codes = [pack_grid(place_code(2 ** g, 2 ** g, cfg.positions).T.unflatten(1, (2 ** g, 2 ** g)))[0]
                     for g in range(4)]
            self.register_buffer("place", torch.stack(codes), persistent=False)              # (4,64,positions)
            self.start_aligned()

    @torch.no_grad()
    def start_aligned(self):
        """Let the place code reach the tokens undisturbed at first: quiet blocks, proj = identity, free channels."""
        for block in self.blocks:
            for layer in (block.out, block.fc2):
                layer.weight.mul_(0.1)
                layer.bias.zero_()
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.embed.weight[:self.cfg.positions].mul_(0.1)
        self.embed.bias[:self.cfg.positions].zero_()

    def forward(self, tokens, mask, s):
        grid = grid_of(tokens, mask, self.cfg)                          # (B,)
        x = torch.where(mask[..., None], self.embed(tokens), self.pad)  # (B,64,D)
        if self.cfg.positions:
            x = x + F.pad(self.place[grid], (0, self.cfg.width - self.cfg.positions))
        x = torch.cat([self.scale(s)[:, None], x], 1) + self.pos       # (B,65,D), scale token first
        for block in self.blocks:
            x = block(x)
        return self.norm_out(self.proj(self.norm(x)))                  # (B,65,D)

    @classmethod
    def from_official(cls, state, prefix=""):
        """Build from a published state dict (prefix "cond_stage_model." in a whole checkpoint); in eval mode.
        raises: ValueError listing missing, unexpected and mis-shaped keys."""
        from slides import keys  # the published names
        return keys.load_summarizer(state, prefix)


def build(cfg):
    """The network that cfg.kind names. raises: UserError for an unknown one."""
    if cfg.kind == "transformer":
        return Summarizer(cfg)
    if cfg.kind == "cnn":
        from experiments.workshop import CNNSummarizer  # of the workshop version
        return CNNSummarizer(cfg)
    raise UserError(f"--summarizer={cfg.kind}: known are transformer, cnn")


def main(argv):
    with torch.device("meta"):
        net = Summarizer(SummarizerConfig())
        summary(net, torch.randn(2, 64, 1024), torch.ones(2, 64, dtype=torch.bool), torch.zeros(2).long())
    tokens, mask = pack_grid(standardize(torch.randn(96, 4, 4)))
    c = Summarizer(SummarizerConfig(96, 64, 2, 128, 5))(tokens[None], mask[None], torch.tensor([2]))
    print(f"\ntiny forward on the CPU: a 4x4 grid fills {int(mask.sum())} of 64 slots -> c {tuple(c.shape)}")


if __name__ == "__main__":
    cli(main, __doc__)
