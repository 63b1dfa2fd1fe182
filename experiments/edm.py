"""The EDM: what the workshop version (W) has in the place of the CDM. It makes the same tokens, from scales and noise.

in:  scales s (n,) and noise (n,65,D)   out: tokens c (n,65,D); RUN/edm.safetensors
run: python -m experiments.edm     its size; python cdm.py train out/toy --model=edm trains it
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from cdm import Conditioner, DiT, DiTBlock, DiTConfig
from common import cli, summary
from unet import time_embedding

class PlainBlock(DiTBlock):
    """Pre-norm transformer block with norms of its own: nothing steers it."""

    def __init__(self, width, heads, mlp):
        super().__init__(width, heads, mlp)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.modulation = None

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class TokenDiT(DiT):
    """Time and scale come in as two more tokens. in, out: as DiT.
    source: W. What it leaves open follows Z: width, depth and heads."""

    def __init__(self, cfg: DiTConfig):
        super().__init__(cfg)
        self.blocks = nn.ModuleList(PlainBlock(cfg.width, cfg.heads, cfg.mlp) for _ in range(cfg.depth))
        for block in self.blocks:
            for layer in (block.qkv, block.out, block.fc1, block.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)
        self.modulation = None

    def forward(self, x, t, s):
        e = time_embedding(t, 256).to(x.dtype)
        told = torch.stack([self.time2(F.silu(self.time1(e))), self.label(s)], 1)        # (B,2,W)
        h = torch.cat([told, self.embed(x) + self.pos], 1)                               # (B,2+N,W)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, 2:]))[..., :self.cfg.channels]

class EDM(Conditioner):
    """The CDM of W, which calls it embedding diffusion model: linear schedule, and a `TokenDiT`."""
    kind, network, next = "edm", TokenDiT, "cdm.py sample {} --model=edm"
    schedule_kind = "linear"
    usual_shift = 1.0                                        # this schedule is near to noise by itself

def main(argv):
    with torch.device("meta"):
        net = TokenDiT(DiTConfig(variance=False))
        summary(net, torch.randn(1, 65, 512), torch.zeros(1), torch.zeros(1).long())

if __name__ == "__main__":
    cli(main, __doc__)
