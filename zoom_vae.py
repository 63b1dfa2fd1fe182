"""VQ-VAE, the first stage: a 4-fold smaller latent image that diffusion works on (Z §4.1.1, VQ-f4).

Encoder and decoder are convolutions with one attention block in the middle: any height and width that are
multiples of 4 work. The latent that diffusion sees is *not* quantised. Decoding first snaps each pixel of it to
the nearest codebook vector.

in:  x (B,3,H,W) in [-1,1]   out: z (B,3,H/4,W/4), and back
run: python zoom_vae.py      trained by: python train.py      read next: summarizer.py
"""
from dataclasses import dataclass

import torch
from torch.nn import Conv2d, Embedding, GroupNorm, Identity, Module, ModuleList, Sequential
from torch.nn.functional import embedding, interpolate, mse_loss, pad, scaled_dot_product_attention, silu
from torch.nn.init import uniform_
from tqdm import tqdm

from common import UserError, cli, generator, load_tensors, restore, summary

@dataclass
class VAEConfig:
    width: int = 128          # channels at full resolution
    mult: tuple = (1, 2, 4)   # channel multipliers per level; each level but the last halves the resolution
    res_blocks: int = 2       # residual blocks per encoder level (the decoder has one more)
    codes: int = 8192         # codebook vectors
    channels: int = 3         # of the latent and of a code
    groups: int = 32          # of GroupNorm; few channels a group make it instance norm, which loses colour
    texture: float = 0.0      # weight of critics of texture in training (weights/critic.py); 0 = none

# ----- 1. Layers -----

class VAEResBlock(Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = Conv2d(cin, cout, 3, padding=1)
        self.norm2 = GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = Conv2d(cout, cout, 3, padding=1)
        self.skip = Conv2d(cin, cout, 1) if cin != cout else Identity()

    def forward(self, x):
        h = self.conv1(silu(self.norm1(x)))                           # (B,cout,h,w)
        h = self.conv2(silu(self.norm2(h)))
        return self.skip(x) + h

class VAEAttention(Module):  # single-head self-attention over all positions
    def __init__(self, c, groups):
        super().__init__()
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.q = Conv2d(c, c, 1)
        self.k = Conv2d(c, c, 1)
        self.v = Conv2d(c, c, 1)
        self.out = Conv2d(c, c, 1)

    def forward(self, x):                                             # (B,C,h,w)
        n = self.norm(x)
        qkv = torch.stack([self.q(n), self.k(n), self.v(n)])          # (3,B,C,h,w)
        q, k, v = qkv.flatten(3).mT[:, :, None]                       # (B,1,hw,C) each
        h = scaled_dot_product_attention(q, k, v)[:, 0]               # (B,hw,C)
        h = h.mT.reshape(x.shape)
        return x + self.out(h)

class Resample(Module):  # doubles the resolution, or halves it
    def __init__(self, c, double):
        super().__init__()
        self.double = double
        self.conv = Conv2d(c, c, 3, padding=1) if double else Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        if self.double:
            x = interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = pad(x, (0, 1, 0, 1))                                  # official: on the right and bottom only
        return self.conv(x)

def level_blocks(cin, cout, n, groups):
    rest = (VAEResBlock(cout, cout, groups) for _ in range(n - 1))    # the first goes from cin to cout
    return Sequential(VAEResBlock(cin, cout, groups), *rest)

def middle(c, groups):
    return Sequential(VAEResBlock(c, c, groups), VAEAttention(c, groups), VAEResBlock(c, c, groups))

def pixels_of(z):
    return z.movedim(1, -1).flatten(0, 2)                             # (B,C,h,w) -> (Bhw,C)

def layout(x):
    # up to twice as fast on a CPU: at 128 channels and full resolution 228 for 120 GFLOP/s
    return torch.channels_last if x.is_cpu else torch.contiguous_format

class Encoder(Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        c, groups = cfg.width, cfg.groups
        last = len(cfg.mult) - 1
        self.conv_in = Conv2d(3, c, 3, padding=1)
        self.levels = ModuleList()
        for i, m in enumerate(cfg.mult):
            w = cfg.width * m
            level = Module()
            level.blocks = level_blocks(c, w, cfg.res_blocks, groups)
            level.down = Resample(w, double=False) if i < last else Identity()
            self.levels.append(level)
            c = w
        self.mid = middle(c, groups)
        self.norm_out = GroupNorm(groups, c, eps=1e-6)
        self.conv_out = Conv2d(c, cfg.channels, 3, padding=1)

    def forward(self, x):                                             # (B,3,H,W)
        h = self.conv_in(x.contiguous(memory_format=layout(x)))
        for level in self.levels:
            h = level.down(level.blocks(h))
        h = self.mid(h)                                               # (B,4w,H/4,W/4)
        h = self.conv_out(silu(self.norm_out(h)))
        return h.contiguous()                                         # (B,3,H/4,W/4)

class Decoder(Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        mult, groups = cfg.mult, cfg.groups
        c = cfg.width * mult[-1]
        self.conv_in = Conv2d(cfg.channels, c, 3, padding=1)
        self.mid = middle(c, groups)
        self.levels = ModuleList(Module() for _ in mult)              # 0 = highest resolution, as published
        for i in reversed(range(len(mult))):
            w = cfg.width * mult[i]
            level = self.levels[i]
            level.blocks = level_blocks(c, w, cfg.res_blocks + 1, groups)
            level.up = Resample(w, double=True) if i else Identity()
            c = w
        self.norm_out = GroupNorm(groups, c, eps=1e-6)
        self.conv_out = Conv2d(c, 3, 3, padding=1)

    def forward(self, z):                                             # (B,3,H/4,W/4)
        h = self.conv_in(z.contiguous(memory_format=layout(z)))
        h = self.mid(h)
        for level in reversed(self.levels):                           # lowest resolution first
            h = level.up(level.blocks(h))
        h = self.conv_out(silu(self.norm_out(h)))
        return h.contiguous()                                         # (B,3,H,W), no tanh

# ----- 2. The model -----

class VQVAE(Module):
    """VQ-f4 autoencoder. source: Z §4.1.1; reference: the published first stage, `vq-f4` with mid attention."""
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        if cfg.width % cfg.groups:
            raise UserError(f"vae.width={cfg.width} is not a multiple of vae.groups={cfg.groups}")
        self.cfg = cfg
        self.factor = 2 ** (len(cfg.mult) - 1)                        # image side / latent side
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        c, codes = cfg.channels, cfg.codes
        self.to_latent = Conv2d(c, c, 1)
        self.from_latent = Conv2d(c, c, 1)
        self.codebook = Embedding(codes, c)
        uniform_(self.codebook.weight, -1 / codes, 1 / codes)

    def encode(self, x):
        """in: x (B,3,H,W) in [-1,1], sides multiples of 4, or ValueError. out: z (B,3,H/4,W/4), unscaled."""
        shape, k = tuple(x.shape), self.factor
        if len(shape) != 4 or shape[1] != 3 or shape[2] % k or shape[3] % k:
            raise UserError(f"got images {shape}, expected (B,3,H,W), sides multiples of {k}: crop or pad them")
        return self.to_latent(self.encoder(x))

    def quantize(self, z):
        """Snap every latent pixel to its nearest code (squared Euclidean distance, first minimum).
        out: z_q, the code in value, while gradients pass straight to z; indices (B,h,w) int64; the loss, 1 for z
        to move to its code, 0.25 for the code to move to z (official: legacy weights)."""
        codes = self.codebook.weight                                  # (K,3)
        z = z.to(codes.dtype)
        # bf16 distances would pick a tenth of the codes wrongly
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            power = codes.square().sum(1)                             # (K,); |z|^2 changes no minimum
            nearest, n = [], 256 if z.is_cpu else 1 << 14             # n x K floats stay in a CPU's cache
            for part in pixels_of(z).split(n):
                distance = torch.addmm(power, part, codes.T, alpha=-2)  # (n,K)
                nearest.append(distance.argmin(1))
        indices = torch.cat(nearest).view_as(z[:, 0])                 # (B,h,w)
        z_q = embedding(indices, codes).movedim(-1, 1)                # (B,3,h,w)
        loss = mse_loss(z_q.detach(), z) + 0.25 * mse_loss(z_q, z.detach())
        return z + (z_q - z).detach(), indices, loss

    def decode(self, z, quantize=True):
        """in: z (B,3,h,w) unscaled. out: x (B,3,4h,4w), roughly in [-1,1] (not clamped)."""
        if quantize:
            z = self.quantize(z)[0]
        return self.decoder(self.from_latent(z))

    @classmethod
    def from_official(cls, state, prefix=""):
        """From a published state dict, in eval mode. raises: ValueError listing the keys that do not fit."""
        from slides import keys  # the published names
        return keys.load_vae(state, prefix)

    @classmethod
    def from_run(cls, path):
        """Read a run's vae.safetensors. out: (vae, latent scale). raises: UserError if it is missing or foreign."""
        weights, meta = load_tensors(path)
        try:
            vae = cls(restore(VAEConfig, meta["config"]))
            vae.load_state_dict(weights)
            return vae, meta["latent_scale"]
        except (KeyError, TypeError, RuntimeError) as err:
            reason = str(err).splitlines()[0]
            raise UserError(f"{path} holds no VAE of ours ({reason}): give a run, or a published file") from err

# ----- 3. Training: L1 and the codebook -----

def vae_loss(vae, x, quantize=True):
    """Training loss for x (B,3,H,W) in [-1,1]. out: loss, x_rec, code indices (B,h,w), None without codes.
    quantize False: as long as no codes are placed. deviates: vq-f4 had LPIPS and a PatchGAN, too; so has the
    VAE that this project ships (weights/critic.py)."""
    z = vae.encode(x)
    indices, codebook = None, 0 * vae.codebook.weight.sum()           # DDP wants every weight in the graph
    if quantize:
        z, indices, codebook = vae.quantize(z)
    x_rec = vae.decode(z, quantize=False).float()
    loss = (x - x_rec).abs().mean() + codebook
    return loss, x_rec, indices

@torch.no_grad()
def rebase(vae, z, whiten=False):
    """Move the origin of the latent space to the mean of z (B,C,h,w); whiten: unit covariance there, too.
    The 1x1 convolutions and the codebook take the change back: reconstructions stay (quantised ones not, after
    whitening). Left alone, minutes of training put nearly all variance into one direction, far from zero."""
    pixels = f64(pixels_of(z))                                        # (Bhw,C)
    mean = pixels.mean(0)
    there = back = torch.eye(len(mean), dtype=torch.float64)          # (C,C), inverse to each other
    if whiten:
        power, axes = torch.linalg.eigh(torch.cov(pixels.T))          # ascending
        root = power.clamp_min(0.01 * float(power[-1]) + 1e-12).sqrt()
        # the symmetric root: eigenvectors alone would turn with the rounding where two powers are equal
        there = axes / root @ axes.T
        back = axes * root @ axes.T
    w_in, b_in = vae.to_latent.parameters()                           # (C,C,1,1), (C,)
    w_out, b_out = vae.from_latent.parameters()
    w_in, w_out = w_in.flatten(1), w_out.flatten(1)                   # (C,C), views
    codes = vae.codebook.weight                                       # (K,C)
    b_out.copy_(f64(b_out) + f64(w_out) @ mean)
    b_in.copy_(there @ (f64(b_in) - mean))
    w_in.copy_(there @ f64(w_in))
    w_out.copy_(f64(w_out) @ back)
    codes.copy_((f64(codes) - mean) @ there.T)

def f64(x):
    return x.cpu().double()                                           # not all devices have it

@torch.no_grad()
def revive_codes(vae, z, usage, gen):
    """Move every code that `usage` (K,) counts as unused onto a random latent pixel of z (B,3,h,w). out: how many.
    Without this a small codebook collapses onto the few codes that won early."""
    dead = usage == 0                                                 # (K,)
    pixels = pixels_of(z).float()                                     # (Bhw,3)
    # a pixel is drawn for every code, so that where one goes does not depend on the others
    pick = torch.randint(len(pixels), usage.shape, generator=gen).to(z.device)
    vae.codebook.weight[dead] = pixels[pick[dead]]
    return int(dead.sum())

def perplexity(usage):
    """exp(entropy) of the code histogram (K,): the number of codes in effective use, 1..K."""
    count = f64(usage)
    share = count / count.sum().clamp_min(1)
    return float(torch.special.entr(share).sum().exp())

class VAEStage(Module):
    """The autoencoder and its loss on crops of images; counts which codes are used, to move the unused ones.
    anchor (N,3,P,P): fixed patches, on whose latents codes are placed. start: a VAE to go on from."""
    def __init__(self, cfg, anchor, start=None):
        super().__init__()
        self.cfg, self.scales = cfg, cfg.summarizer.scales
        self.anchor, side = anchor, anchor.shape[-1]
        self.vae = VQVAE(cfg.vae)
        self.register_buffer("usage", torch.zeros(cfg.vae.codes))
        self.used = torch.zeros_like(self.usage, device=anchor.device)  # by this rank in this step
        self.crop = min(cfg.vae_crop or side, side)
        self.first = 0 if start else cfg.vae_steps // 4                 # the step from which there are codes
        if start:
            self.vae.load_state_dict(start.state_dict())

    def noise(self, step):
        """What is random in a step, of the whole global batch: here the corners of the crops."""
        self.step = step
        gen, factor = generator(self.cfg.seed, 1, step), self.vae.factor
        places = (self.anchor.shape[-1] - self.crop) // factor + 1
        return {"corner": factor * torch.randint(places, (self.cfg.vae_batch, 2), generator=gen)}

    def crops(self, batch):
        crops = []
        for image, (i, j) in zip(batch["x"], batch["corner"].tolist()):
            crops.append(image[:, i:i + self.crop, j:j + self.crop])    # (3,crop,crop)
        return torch.stack(crops)                                       # (B,3,crop,crop)

    def critique(self, loss, x_rec, x):
        return loss                                                     # critics add to it (weights/critic.py)

    def forward(self, batch):
        x = self.crops(batch)
        loss, x_rec, indices = vae_loss(self.vae, x, quantize=self.step >= self.first)
        if indices is not None:
            self.used += torch.bincount(indices.flatten(), minlength=len(self.used))
        error = x_rec.detach().clamp(-1, 1) - x
        mse = error.square().flatten(1).mean(1).clamp_min(1e-10)        # (B,)
        psnr = 10 * torch.log10(4 / mse)
        values = {"loss": loss.detach().expand(len(x)), "psnr": psnr, "s": batch["s"]}
        return self.critique(loss, x_rec, x), values

    @torch.no_grad()
    def after_step(self, step, ranks):
        """Whiten latents until there are codes; then place codes on fixed patches', unused ones every 50."""
        ranks.sum(self.used)
        self.usage += self.used
        self.used.zero_()
        first, codes = self.first, len(self.usage)
        if step in (first // 8, first // 2, first):
            rebase(self.vae, self.vae.encode(self.anchor), whiten=True)
        if step < first or (step - first) % 50 or step > 0.8 * self.cfg.vae_steps:
            return
        z, gen = self.vae.encode(self.anchor), generator(self.cfg.seed, 3, step)
        used = codes - revive_codes(self.vae, z, self.usage, gen)
        if step > first and used < 0.1 * codes and ranks.rank == 0:
            tqdm.write(f"step {step}: only {used} of {codes} codes were used in 50 steps; the others are moved to "
                       f"latents. If that goes on, take fewer (--vae.codes) or a lower --vae_lr")
        self.usage.zero_()

    def report(self):
        """What the log says beside the losses."""
        return {"perplexity": round(perplexity(self.usage), 1) if self.usage.any() else None}

def main(argv):
    with torch.device("meta"):
        vae = VQVAE(VAEConfig())
        vae.forward = lambda x: vae.decode(vae.encode(x), quantize=False)
        summary(vae, torch.randn(1, 3, 256, 256))

if __name__ == "__main__":
    cli(main, __doc__)
