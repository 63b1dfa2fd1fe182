"""VQ-VAE, the first stage: a 4-fold smaller, 3-channel latent image that diffusion works on (Z §4.1.1, VQ-f4).

Encoder and decoder are convolutional with one attention block in their middle, so any height and width that are
multiples of 4 work. The latent that diffusion sees is *not* quantised; decoding first snaps every pixel of it to the
nearest codebook vector.

in:  x (B,3,H,W) in [-1,1]   out: z (B,3,H/4,W/4), and back
run: python zoom_vae.py      trained by: python train.py      read next: summarizer.py
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from common import UserError, cli, summary


@dataclass
class VAEConfig:
    width: int = 128          # channels at full resolution
    mult: tuple = (1, 2, 4)   # channel multipliers per level; each level but the last halves the resolution
    res_blocks: int = 2       # residual blocks per encoder level (the decoder has one more)
    codes: int = 8192         # codebook vectors
    channels: int = 3         # of the latent and of a code
    groups: int = 32          # of GroupNorm; with few channels per group it acts like instance norm and loses colour


# ----- 1. Layers -----

def layout(x, side):
    """The memory format to convolve images of `side` pixels in. On a CPU the few channels of high resolution go twice
    as fast with channels last (float32: 228 for 120 GFLOP/s at 128 channels and 256 pixels), the rest as fast."""
    return torch.channels_last if x.device.type == "cpu" and side >= 128 else torch.contiguous_format


class VAEResBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class VAEAttention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B,1,HW,C) each
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)                       # (B,C,HW)
        return x + self.out(h.reshape(x.shape))


class Down(nn.Module):
    """Halve the resolution. official: zeros are padded on the right and bottom only."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(c, groups):
    return nn.Sequential(VAEResBlock(c, c, groups), VAEAttention(c, groups), VAEResBlock(c, c, groups))


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.width * m for m in cfg.mult]
        self.conv_in = nn.Conv2d(3, cfg.width, 3, padding=1)
        self.levels, c = nn.ModuleList(), cfg.width
        for i, w in enumerate(widths):
            level = nn.Module()
            level.blocks = nn.Sequential(*(VAEResBlock(w if b else c, w, cfg.groups) for b in range(cfg.res_blocks)))
            level.down = Down(w) if i < len(widths) - 1 else nn.Identity()
            self.levels.append(level)
            c = w
        self.mid = middle(c, cfg.groups)
        self.norm_out = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, cfg.channels, 3, padding=1)

    def forward(self, x):                                    # (B,3,H,W)
        h = self.conv_in(x.contiguous(memory_format=layout(x, x.shape[-1])))
        for level in self.levels:
            h = level.down(level.blocks(h))
        h = self.mid(h)                                      # (B,4w,H/4,W/4)
        return self.conv_out(F.silu(self.norm_out(h))).contiguous()    # (B,3,H/4,W/4)


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.width * m for m in cfg.mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(cfg.channels, c, 3, padding=1)
        self.mid = middle(c, cfg.groups)
        self.levels = nn.ModuleList(nn.Module() for _ in widths)   # index 0 = highest resolution, as published
        for i, w in reversed(list(enumerate(widths))):
            self.levels[i].blocks = nn.Sequential(*(VAEResBlock(w if b else c, w, cfg.groups)
                                                    for b in range(cfg.res_blocks + 1)))
            self.levels[i].up = Up(w) if i else nn.Identity()
            c = w
        self.norm_out = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):                                    # (B,3,H/4,W/4)
        side = z.shape[-1] << len(self.levels) - 1           # of the image
        h = self.mid(self.conv_in(z.contiguous(memory_format=layout(z, side))))
        for level in reversed(self.levels):                  # lowest resolution first
            h = level.up(level.blocks(h))
        return self.conv_out(F.silu(self.norm_out(h))).contiguous()    # (B,3,H,W), no tanh


# ----- 2. The model -----

class VQVAE(nn.Module):
    """VQ-f4 autoencoder. source: Z §4.1.1; reference: the published first stage (`vq-f4`, with mid attention)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        if cfg.width % cfg.groups:
            raise UserError(f"vae.width={cfg.width} is not a multiple of vae.groups={cfg.groups}")
        self.cfg = cfg
        self.factor = 2 ** (len(cfg.mult) - 1)
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.to_latent = nn.Conv2d(cfg.channels, cfg.channels, 1)
        self.from_latent = nn.Conv2d(cfg.channels, cfg.channels, 1)
        self.codebook = nn.Embedding(cfg.codes, cfg.channels)
        nn.init.uniform_(self.codebook.weight, -1 / cfg.codes, 1 / cfg.codes)

    def encode(self, x):
        """in: x (B,3,H,W) in [-1,1], H and W multiples of 4. out: z (B,3,H/4,W/4), un-quantised and unscaled.
        raises: ValueError for other sizes."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise UserError(f"got an image batch of shape {tuple(x.shape)}, the VAE takes (B,3,H,W) with H and W "
                            f"multiples of {self.factor}: crop or pad it")
        return self.to_latent(self.encoder(x))

    def quantize(self, z):
        """Snap every latent pixel to its nearest code (squared Euclidean distance, first minimum).

        out: z_q, equal to the code in value while gradients pass straight to z; indices (B,h,w) int64; the codebook
        loss. official: the legacy weighting, 1 on the commitment of z to its code and 0.25 on the code's own move.
        """
        codes = self.codebook.weight
        flat = z.to(codes.dtype).movedim(1, -1)                                            # (B,h,w,3)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):  # bf16 distances pick a tenth wrongly
            indices = torch.cat([(codes.square().sum(1) - 2 * part @ codes.T).argmin(1)    # |z|^2 changes no minimum
                                 for part in flat.flatten(0, 2).split(1 << 14)])           # rows x K floats at a time
            indices = indices.view(flat.shape[:-1])                                        # (B,h,w)
        z_q = F.embedding(indices, codes).movedim(-1, 1)                                   # (B,3,h,w)
        loss = F.mse_loss(z_q.detach(), z.to(z_q.dtype)) + 0.25 * F.mse_loss(z_q, z.detach().to(z_q.dtype))
        return z + (z_q - z).detach(), indices, loss

    def decode(self, z, quantize=True):
        """in: z (B,3,h,w) unscaled. out: x (B,3,4h,4w), roughly in [-1,1] (not clamped)."""
        return self.decoder(self.from_latent(self.quantize(z)[0] if quantize else z))

    @classmethod
    def from_official(cls, state, prefix=""):
        """Build from a published state dict (prefix "first_stage_model." in a whole checkpoint); in eval mode.
        raises: ValueError listing missing, unexpected and mis-shaped keys."""
        from slides import keys  # the published names
        return keys.load_vae(state, prefix)


# ----- 3. Training: L1 + codebook (+ perceptual + adversarial), CompVis' recipe for vq-f4 -----

class PatchGAN(nn.Module):
    """Patch discriminator: 4x4 convolutions; out: one logit per patch. reference: taming's NLayerDiscriminator."""

    def __init__(self, width=64):
        super().__init__()
        def conv(cin, cout, stride):
            return [nn.Conv2d(cin, cout, 4, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), *conv(width, 2 * width, 2),
                                 *conv(2 * width, 4 * width, 2), *conv(4 * width, 8 * width, 1),
                                 nn.Conv2d(8 * width, 1, 4, 1, 1))
        for m in self.net:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, x):
        return self.net(x)

    def loss(self, x, x_rec):
        """Hinge loss of the discriminator on real and reconstructed images, both detached."""
        return 0.5 * (F.relu(1 - self(x.detach())).mean() + F.relu(1 + self(x_rec.detach())).mean())


def vae_loss(vae, x, quantize=True, disc=None, disc_weight=0.75, perceptual=None):
    """Training loss of the autoencoder.

    in:  x (B,3,H,W) in [-1,1]; quantize False leaves the codebook out, for the first steps, until there are latents to
    place the codes on; disc, a PatchGAN or None; perceptual, a callable (x, x_rec) -> (B,1,1,1) or None.
    out: the loss, x_rec, the code indices (B,h,w) or None, {name: float tensor} for the log.
    The adversarial term is weighted so that its gradient at the last layer is disc_weight times that of the rest.
    """
    z = vae.encode(x)
    # `0 *` keeps the idle codebook in the graph, which DDP insists on
    z_q, indices, codebook = vae.quantize(z) if quantize else (z, None, 0 * vae.codebook.weight.sum())
    x_rec = vae.decode(z_q, quantize=False).float()
    rec = (x - x_rec).abs()
    if perceptual is not None:
        rec = rec + perceptual(x, x_rec)
    nll = rec.mean()
    loss, parts = nll + codebook, {"rec": nll.detach(), "codebook": codebook.detach()}
    if disc is not None:
        # the generator's term must not train the discriminator: its weights enter detached
        fool = -functional_call(disc, {k: v.detach() for k, v in disc.named_parameters()}, x_rec).mean()
        last = vae.decoder.conv_out.weight
        g_nll, g_fool = (torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (nll, fool))
        weight = disc_weight * (g_nll / (g_fool + 1e-4)).clamp(0, 1e4).detach()
        d_loss = disc.loss(x, x_rec)
        loss = loss + weight * fool + d_loss                     # two disjoint sets of weights, one backward pass
        parts |= {"adv": fool.detach(), "disc": d_loss.detach()}
    return loss, x_rec, indices, parts


@torch.no_grad()
def rebase(vae, z, whiten=False):
    """Move the origin of the latent space to the mean of z (B,C,h,w); whiten: also give it unit covariance there.

    The change is absorbed by the two 1x1 convolutions and the codebook, so reconstructions stay what they were (with
    `whiten` only as long as nothing is quantised). Left alone, an autoencoder trained for minutes puts nearly all
    variance into one direction, far from zero: the codes then index one number, and diffusion sees almost constants.
    """
    pixels = z.cpu().double().movedim(1, -1).flatten(0, 2)                        # (Bhw,C); not all devices have f64
    mean, there = pixels.mean(0), torch.eye(z.shape[1], dtype=torch.float64)
    back = there
    if whiten:  # the symmetric root: eigenvectors alone would turn with the rounding where two powers are equal
        power, axes = torch.linalg.eigh(torch.cov(pixels.T))
        root = power.clamp_min(0.01 * float(power.max()) + 1e-12).sqrt()
        there, back = axes / root @ axes.T, axes * root @ axes.T                  # (C,C), inverse to each other
    w_in, b_in, w_out, b_out, codes = (p.cpu().double() for p in (
        vae.to_latent.weight[:, :, 0, 0], vae.to_latent.bias, vae.from_latent.weight[:, :, 0, 0], vae.from_latent.bias,
        vae.codebook.weight))
    for p, value in ((vae.to_latent.weight, there @ w_in), (vae.to_latent.bias, there @ (b_in - mean)),
                     (vae.from_latent.weight, w_out @ back), (vae.from_latent.bias, b_out + w_out @ mean),
                     (vae.codebook.weight, (codes - mean) @ there.T)):
        p.copy_(value.view(p.shape))


@torch.no_grad()
def revive_codes(vae, z, usage, gen):
    """Move every code that `usage` (K,) counts as unused onto a random latent pixel of z (B,3,h,w).

    Without this a small codebook collapses onto the few codes that won early. out: the number of codes moved.
    """
    dead = (usage == 0).nonzero()[:, 0]
    pixels = z.detach().float().movedim(1, -1).flatten(0, 2)                      # (Bhw,3)
    pick = torch.randint(len(pixels), (len(usage),), generator=gen).to(z.device)    # a code's pick hangs on no other's
    vae.codebook.weight[dead] = pixels[pick[dead]]
    return len(dead)


def perplexity(usage):
    """exp(entropy) of the code histogram (K,): the number of codes in effective use, 1..K."""
    p = usage.cpu().double() / usage.sum().clamp_min(1).cpu()
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def main(argv):
    with torch.device("meta"):
        vae = VQVAE(VAEConfig())
        vae.forward = lambda x: vae.decoder(vae.from_latent(vae.to_latent(vae.encoder(x))))
        summary(vae, torch.randn(1, 3, 256, 256))
    vae = VQVAE(VAEConfig(32, (1, 2, 4), 1, 64))
    z = vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    print(f"\ntiny forward on the CPU: x (1, 3, 64, 64) -> z {tuple(z.shape)} -> x {tuple(vae.decode(z).shape)}")


if __name__ == "__main__":
    cli(main, __doc__)
