"""What the published weights do without: the Summarizer of the workshop version (W), a convolutional network; and the
discriminator that vq-f4 was trained against.

The CNN makes one token per cell of 8x8 and no scale token: c (B,64,D). Its batch norm works over all ranks.

run: python -m experiments.workshop     sizes; trained by: python train.py --summarizer=cnn
"""
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn import BatchNorm2d, Conv2d, LayerNorm, LeakyReLU, Linear, Module, ModuleList, Sequential
from torch.nn.functional import interpolate, max_pool2d, pad, relu, silu

from common import UserError, cli, summary
from summarizer import SLOTS, SummarizerConfig, grid_of, place_code

# ----- 1. Batch norm over all ranks -----

class RankSum(torch.autograd.Function):
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
        unbiased = var.detach().flatten() * n / (n - 1)
        self.running_mean.lerp_(mean.detach().flatten(), self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked += 1
        return (h * (var + self.eps).rsqrt()).to(x.dtype)


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
        return max_pool2d(x, 2) if x.shape[-1] > 8 else x


class CNNSummarizer(Module):
    """The network of the workshop version, called as `Summarizer`. out: c (B,64,D).

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
        return self.norm_out(c + pad(place, (0, self.cfg.width - self.cfg.positions)))


# ----- 3. The discriminator of vq-f4 -----

class PatchGAN(Module):
    """Patch discriminator: 4x4 convolutions; out: one logit per patch. reference: taming's NLayerDiscriminator."""

    def __init__(self, width=64, weight=0.75):
        """weight: of the generator's term, see `terms`."""
        super().__init__()
        self.weight = weight
        layers = [Conv2d(3, width, 4, 2, 1), LeakyReLU(0.2)]
        for k, stride in ((1, 2), (2, 2), (4, 1)):
            layers.append(Conv2d(k * width, 2 * k * width, 4, stride, 1, bias=False))
            layers += [BatchNorm2d(2 * k * width), LeakyReLU(0.2)]
        layers.append(Conv2d(8 * width, 1, 4, 1, 1))
        self.net = Sequential(*layers)
        for layer in layers:
            if isinstance(layer, Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x):
        return self.net(x)

    def loss(self, x, x_rec):
        """Hinge loss of the discriminator on real and reconstructed images, both detached."""
        real, fake = self(x.detach()), self(x_rec.detach())
        return 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())

    def terms(self, vae, x, x_rec, rec):
        """What the adversarial game adds to the loss `rec` of an autoencoder. out: the sum of two terms, for two
        disjoint sets of weights, so that one backward pass serves both; {name: float tensor} for the log.

        The generator's gradient at the last layer is weighted to be self.weight times that of rec.
        """
        # the generator's term must not train the discriminator: its weights enter detached
        fixed = {k: v.detach() for k, v in self.named_parameters()}
        fool = -functional_call(self, fixed, x_rec).mean()
        last = vae.decoder.conv_out.weight
        g_rec, = torch.autograd.grad(rec, last, retain_graph=True)
        g_fool, = torch.autograd.grad(fool, last, retain_graph=True)
        balance = (g_rec.norm() / (g_fool.norm() + 1e-4)).clamp(0, 1e4).detach()
        loss = self.loss(x, x_rec)
        return self.weight * balance * fool + loss, {"adv": fool.detach(), "disc": loss.detach()}


def main(argv):
    with torch.device("meta"):
        net = CNNSummarizer(SummarizerConfig(kind="cnn", side=128))
        summary(net, torch.randn(2, 64, 1024), torch.ones(2, 64, dtype=torch.bool), torch.zeros(2).long())


if __name__ == "__main__":
    cli(main, __doc__)
