"""The Summarizer of the workshop version (W): a convolutional network. The CVPR version has a transformer instead.

The CNN makes one token per cell of 8x8 and no scale token: c (B,64,D). Its batch norm works over all ranks.

run: python -m experiments.workshop     sizes; trained by: python train.py --summarizer=cnn
"""
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function
from torch.nn import BatchNorm2d, Conv2d, LayerNorm, Linear, Module, ModuleList
from torch.nn.functional import interpolate, max_pool2d, pad, silu

from common import UserError, cli, summary
from summarizer import SLOTS, SummarizerConfig, grid_of, place_code

# ----- 1. Batch norm over all ranks -----

class RankSum(Function):
    """The sum over all ranks. Every rank's loss hangs on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return RankSum.apply(grad)

class BatchNorm(BatchNorm2d):
    """Over all ranks, so that without --micro their number changes nothing: a SyncBatchNorm that takes CPUs."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        h = x.float()
        n = dist.get_world_size() * h.numel() // h.shape[1]               # values a channel has, on all ranks
        mean = RankSum.apply(h.sum((0, 2, 3), keepdim=True)) / n          # (1,C,1,1)
        h = h - mean
        var = RankSum.apply(h.square().sum((0, 2, 3), keepdim=True)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        h = h * (var + self.eps).rsqrt()
        return h.to(x.dtype)

# ----- 2. The Summarizer of the workshop version -----

class ConvBlock(Module):
    """x + SiLU(FiLM(batch norm(convolution of x))), then max-pooling unless it is down to 8x8."""

    def __init__(self, cin, cout, scales):
        super().__init__()
        self.conv = Conv2d(cin, cout, 3, padding=1, bias=False)
        self.norm = BatchNorm(cout, affine=False)                         # FiLM has its scale and shift
        self.film = nn.Embedding.from_pretrained(torch.zeros(scales, 2 * cout), freeze=False)
        self.skip = Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, s):
        scale, shift = self.film(s)[:, :, None, None].chunk(2, 1)         # (B,C,1,1) each
        h = self.norm(self.conv(x)) * (1 + scale) + shift
        x = self.skip(x) + silu(h)
        if x.shape[-1] > 8:
            x = max_pool2d(x, 2)
        return x

class CNNSummarizer(Module):
    """The network of the workshop version, called as `Summarizer`. out: c (B,64,D).
    source: W: grid up-sampled by nearest neighbour to 128x128, four residual blocks of convolution, batch norm and
    max-pooling, FiLM from a learned embedding of the scale, 8x8 tokens. Left open there, chosen here: a Linear
    E -> D/2 first, which commutes with up-sampling; one 3x3 convolution a block, D/2, D/2, D, D wide; SiLU; a
    position, or the U-Net could not tell tokens apart; the transformer's end. If `side` is smaller, the *first*
    log2(side/8) blocks pool: cells are constant, so pooling early loses nothing and costs least."""

    def __init__(self, cfg: SummarizerConfig):
        super().__init__()
        if cfg.side not in (8, 16, 32, 64, 128) or cfg.positions % 4 or cfg.positions > cfg.width:
            raise UserError(f"summarizer.side={cfg.side} positions={cfg.positions}: give a side of 8, 16, 32, 64 or "
                            f"128, and positions a multiple of 4, at most the width")
        self.cfg = cfg
        width, half = cfg.width, cfg.width // 2
        self.embed = Linear(cfg.embed_dim, half)
        sizes = ((half, half), (half, half), (half, width), (width, width))
        self.blocks = ModuleList(ConvBlock(cin, cout, cfg.scales) for cin, cout in sizes)
        self.pos = nn.Parameter(torch.randn(1, SLOTS, width) * 0.02)
        self.norm = LayerNorm(width, eps=1e-6)
        self.norm_out = LayerNorm(width, eps=1e-5)
        self.proj = Linear(width, width)
        nn.init.zeros_(self.proj.weight[:cfg.positions])                  # as in Summarizer.start_aligned
        nn.init.zeros_(self.proj.bias[:cfg.positions])

    def cells(self, tokens, mask):
        """The token under each cell of 8 x 8, whatever the side of the grid is: (B,64,E)."""
        side = 2 ** grid_of(tokens, mask, self.cfg)[:, None]              # (B,1)
        first = SLOTS // 2 - side ** 2 // 2                               # slot of a grid's first token
        cell = torch.arange(SLOTS, device=mask.device)
        row = cell // 8 * side // 8                                       # (B,64): in the grid
        column = cell % 8 * side // 8
        slot = first + row * side + column
        return tokens.gather(1, slot[..., None].expand_as(tokens))

    def forward(self, tokens, mask, s):
        x = self.embed(self.cells(tokens, mask))                          # (B,64,D/2)
        x = x.mT.unflatten(2, (8, 8))                                     # (B,D/2,8,8)
        x = interpolate(x, self.cfg.side)                                 # (B,D/2,side,side)
        for block in self.blocks:
            x = block(x, s)                                               # the last (B,D,8,8)
        c = self.proj(self.norm(x.flatten(2).mT + self.pos))              # (B,64,D)
        place = place_code(8, 8, self.cfg.positions, x.device)            # (64,positions)
        free = self.cfg.width - self.cfg.positions                        # channels without a place
        return self.norm_out(c + pad(place, (0, free)))

def main(argv):
    with torch.device("meta"):
        net = CNNSummarizer(SummarizerConfig(kind="cnn", side=128))
        summary(net, torch.randn(2, 64, 1024), torch.ones(2, 64, dtype=torch.bool), torch.zeros(2).long())

if __name__ == "__main__":
    cli(main, __doc__)
