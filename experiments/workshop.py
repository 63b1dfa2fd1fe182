"""What the workshop version had and the CVPR version has not (W): the convolutional Summarizer.

run: python -m experiments.workshop     sizes; trained by: python train.py --summarizer=cnn
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, cli, summary
from summarizer import SLOTS, SummarizerConfig, grid_of, place_code


class RankSum(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        torch.distributed.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, grad):
        return RankSum.apply(grad)


class BatchNorm(nn.BatchNorm2d):
    """Over all ranks, so that without --micro their number changes nothing: a SyncBatchNorm that takes CPUs."""

    def forward(self, x):
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        h, n = x.float(), torch.distributed.get_world_size() * x.numel() // x.shape[1]
        h = h - (mean := RankSum.apply(h.sum((0, 2, 3), keepdim=True)) / n)                # (1,C,1,1)
        var = RankSum.apply(h.square().sum((0, 2, 3), keepdim=True)) / n
        self.running_mean.lerp_(mean.detach().flatten(), self.momentum)
        self.running_var.lerp_(var.detach().flatten() * n / (n - 1), self.momentum)
        self.num_batches_tracked += 1
        return (h * (var + self.eps).rsqrt()).to(x.dtype)


class ConvBlock(nn.Module):
    """x + SiLU(FiLM(batch norm(convolution of x))), then max-pooling unless it is down to 8x8."""

    def __init__(self, cin, cout, scales):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.norm = BatchNorm(cout, affine=False)                      # FiLM has its scale and shift
        self.film = nn.Embedding.from_pretrained(torch.zeros(scales, 2 * cout), freeze=False)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, s):
        scale, shift = self.film(s)[:, :, None, None].chunk(2, 1)      # (B,C,1,1) each
        x = self.skip(x) + F.silu(self.norm(self.conv(x)) * (1 + scale) + shift)
        return F.max_pool2d(x, 2) if x.shape[-1] > 8 else x


class CNNSummarizer(nn.Module):
    """The network of the workshop version. Called as `Summarizer`, it makes one token per cell of 8x8: c (B,64,D).

    source: W: grid up-sampled by nearest neighbour to 128x128, four residual blocks of convolution, batch norm and
    max-pooling, FiLM from a learned embedding of the scale, 8x8 tokens. Left open there, chosen here: a Linear E -> D/2
    first, which commutes with up-sampling; one 3x3 convolution a block, D/2, D/2, D, D wide; SiLU; a position, or the
    U-Net could not tell tokens apart; the transformer's end. If `side` is smaller, the *first* log2(side/8) blocks
    pool: cells are constant, so pooling early loses nothing and costs least, and the others see whole neighbours.
    """

    def __init__(self, cfg: SummarizerConfig):
        super().__init__()
        if cfg.side not in (8, 16, 32, 64, 128) or cfg.positions % 4 or cfg.positions > cfg.width:
            raise UserError(f"{cfg}: give a side of 8, 16, 32, 64 or 128, positions a multiple of 4, at most the width")
        self.cfg, widths = cfg, (cfg.width // 2,) * 3 + (cfg.width,) * 2
        self.embed = nn.Linear(cfg.embed_dim, widths[0])
        self.blocks = nn.ModuleList(ConvBlock(*widths[i:i + 2], cfg.scales) for i in range(4))
        self.pos = nn.Parameter(torch.randn(1, SLOTS, cfg.width) * 0.02)
        self.norm, self.norm_out = nn.LayerNorm(cfg.width, eps=1e-6), nn.LayerNorm(cfg.width, eps=1e-5)
        self.proj = nn.Linear(cfg.width, cfg.width)
        nn.init.zeros_(self.proj.weight[:cfg.positions])               # as in Summarizer.start_aligned
        nn.init.zeros_(self.proj.bias[:cfg.positions])

    def forward(self, tokens, mask, s):
        g, cell = grid_of(tokens, mask, self.cfg)[:, None], torch.arange(SLOTS, device=mask.device)
        i, j, start = cell // 8 >> 3 - g, cell % 8 >> 3 - g, SLOTS // 2 - 4 ** g // 2      # in the grid; its first slot
        x = self.embed(tokens.gather(1, (start + i * 2 ** g + j)[..., None].expand_as(tokens)))     # (B,64,D/2)
        x = F.interpolate(x.mT.unflatten(2, (8, 8)), self.cfg.side)                        # (B,D/2,side,side)
        for block in self.blocks:
            x = block(x, s)
        place = F.pad(place_code(8, 8, self.cfg.positions, x.device), (0, self.cfg.width - self.cfg.positions))
        return self.norm_out(self.proj(self.norm(x.flatten(2).mT + self.pos)) + place)     # (B,64,D)


def main(argv):
    with torch.device("meta"):
        net = CNNSummarizer(SummarizerConfig(kind="cnn", side=128))
        summary(net, torch.randn(2, 64, 1024), torch.ones(2, 64, dtype=torch.bool), torch.zeros(2).long())


if __name__ == "__main__":
    cli(main, __doc__)
