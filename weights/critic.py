"""What an autoencoder that one keeps is trained with besides L1 and codes: learned features and a PatchGAN.

L1 alone makes grain and edges too weak, for blur costs it least. So two critics look at the coded image, too. The first
layers of a network trained on photographs must see the same there as in the real one (as LPIPS, Zhang et al. 2018, in
vq-f4). And a small network that learns to tell real from coded crops must fail (PatchGAN, Isola et al. 2017; its weight
is that of VQGAN, Esser et al. 2021, Eq. 7). Its strides of 4 pixels let it see the cells that a latent stands for.
Crops are turned, flipped and coloured otherwise, so that a few images stand for many stains and seasons.

Then encoder and codes rest, and the decoder learns on alone (as the decoders that were published for Stable Diffusion's
first stage afterwards): latents stay what they are, and what was trained on them goes on to fit. A latent of 4 x 4
pixels cannot say where each grain lies. So the decoder is not asked to, but for as much of it, and for no pattern that
returns in every cell.

in:  crops x (B,3,H,W) in [-1,1], and coded ones     out: their loss
run: python train.py vae [--vae_weights=RUN]     needs: pip install -e '.[encoders]'     read next: ship.py
"""
from dataclasses import replace

import torch
from torch.autograd import grad
from torch.nn import Conv2d, GroupNorm, LeakyReLU, Module, Sequential
from torch.nn.functional import avg_pool2d, l1_loss, pad, relu
from torch.nn.init import normal_

from common import UserError, generator
from zoom_vae import VAEStage

SEEN = 0.3   # weight of learned features; larger ones cost colour
FOOL = 0.75  # weight of the PatchGAN against all other terms, as in vq-f4
CRITIC_LR = 4e-4  # of the PatchGAN; constant, while the autoencoder's falls: in the end it knows it well
MIX = 0.1    # deviation of the entries of a change of colours
# of the decoder alone
LOOK = 250   # steps of the PatchGAN before the decoder is to fool it
GENTLE = 0.3  # FOOL of a PatchGAN that is shown detail, and knows more
GRAIN = 2.0  # weight of the sharpness of places
FOLD = 2.0   # weight of what returns in every cell of 4 pixels
SHAKE = 0.4  # largest deviation of what is added to latents, in theirs

class Features:
    """The first layers of EfficientNet-Lite0: features at halves, quarters and eighths of the resolution.
    Not a Module: its weights belong in no checkpoint."""

    def __init__(self, device):
        from slides.encoders import EffLite0
        self.net = EffLite0().eval().requires_grad_(False).net.to(device)

    def __call__(self, x):
        """in: x (B,3,H,W) in [-1,1]. out: [(B,C,h,w), ...], of length 1 at each place."""
        net, found = self.net, []
        h = net._bn0(net._conv_stem(x))                                     # (B,32,H/2,W/2)
        found.append(unit(h))
        h = net._swish(h)
        for i in range(5):
            h = net._blocks[i](h)
            if i in (0, 2, 4):                                              # the last blocks before a stride
                found.append(unit(h))
        return found

    def distance(self, x_rec, x):
        """How differently the network sees two batches of images."""
        with torch.no_grad():
            real = self(x)
        return sum((a - b).square().sum(1).mean() for a, b in zip(self(x_rec), real))

def unit(h):
    h = h.float()
    power = h.square().sum(1, keepdim=True)                                 # (B,1,h,w)
    return h / (power + 1e-6).sqrt()

class PatchGAN(Module):
    """How real each part of an image looks: (B,3,H,W) -> (B,1,H/4-2,W/4-2). Each answer sees 34 x 34 pixels.
    deviates: vq-f4 has batch norm, whose answers depend on how a batch is divided over ranks."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = Sequential(
            Conv2d(3, width, 4, 2, 1), LeakyReLU(0.2),
            Conv2d(width, 2 * width, 4, 2, 1, bias=False), GroupNorm(8, 2 * width), LeakyReLU(0.2),
            Conv2d(2 * width, 4 * width, 4, 1, 1, bias=False), GroupNorm(8, 4 * width), LeakyReLU(0.2),
            Conv2d(4 * width, 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, Conv2d):
                normal_(layer.weight, 0, 0.02)                              # official

    def forward(self, x):
        return self.layers(x).float()

class CriticStage(VAEStage):
    """An autoencoder and its critics, which learn together, by one optimiser. Each rank weighs the PatchGAN on its own
    part of a batch, so another number of ranks changes more than the rounding."""

    def __init__(self, cfg, anchor, start=None):
        super().__init__(cfg, anchor, start)
        self.features = Features(anchor.device)
        self.critic = PatchGAN()
        self.fooling = self.first                                       # the step from which it is to be fooled
        self.pull = FOOL

    def groups(self):
        """Parameters for the optimiser: those of the autoencoder, and the critic's with a learning rate."""
        return [{"params": list(self.vae.parameters())}, {"params": list(self.critic.parameters()), "lr": CRITIC_LR}]

    def noise(self, step):
        noise, n = super().noise(step), self.cfg.vae_batch
        gen = generator(self.cfg.seed, "look", step)
        strength = MIX * torch.randint(2, (n, 1, 1), generator=gen)         # half of the crops keep their colours
        noise["turn"] = torch.randint(8, (n,), generator=gen)
        noise["mix"] = strength * torch.randn(n, 3, 3, generator=gen)
        noise["shift"] = strength * torch.randn(n, 3, 1, generator=gen)
        return noise

    def crops(self, batch):
        x = torch.stack([turned(*each) for each in zip(super().crops(batch), batch["turn"].tolist())])
        flat = x.flatten(2)                                                 # (B,3,HW)
        mean = flat.mean(2, keepdim=True)
        flat = flat + batch["mix"] @ (flat - mean) + batch["shift"]
        return flat.view_as(x).clamp(-1, 1)

    def judge(self, x):
        return self.critic(x)

    def critique(self, loss, x_rec, x):
        """Add what the critics say to the loss of a batch. The PatchGAN learns from the first step on, and is to be
        fooled once there are codes."""
        texture = self.cfg.vae.texture
        real, coded = self.judge(x), self.judge(x_rec.detach())
        tell = (relu(1 - real).mean() + relu(1 + coded).mean()) / 2         # hinge loss
        loss = loss + texture * SEEN * self.features.distance(x_rec, x)
        if self.step < self.fooling:
            return loss + tell
        self.critic.requires_grad_(False)                                   # to fool it must not change it
        fool = -self.judge(x_rec).mean()
        self.critic.requires_grad_(True)
        last = self.vae.decoder.conv_out.weight
        strong, weak = (grad(part, last, retain_graph=True)[0].norm() for part in (loss, fool))
        # both pull equally at the last layer. official: up to 10,000, but a PatchGAN that knows nothing is no guide
        weight = (strong / weak).clamp(0, 1)
        return loss + texture * self.pull * weight * fool + tell

class DecoderStage(CriticStage):
    """The decoder of a finished autoencoder. What it is to do better is grain, so the PatchGAN is shown grain. Half of
    the latents are shaken first, for drawn ones are not quite what the encoder makes."""

    def __init__(self, cfg, anchor, start):
        sizes = replace(start.cfg, texture=cfg.vae.texture)
        super().__init__(replace(cfg, vae=sizes), anchor, start)
        if self.crop % 16:
            raise UserError(f"--vae_crop={cfg.vae_crop}: a decoder learns alone on whole patches, --vae_crop=0, or on "
                            f"crops of a multiple of 16")
        self.vae.encoder.requires_grad_(False)
        self.vae.to_latent.requires_grad_(False)
        self.vae.codebook.requires_grad_(False)
        self.fooling = LOOK
        self.pull = GENTLE
        with torch.no_grad():
            self.deviation = start.encode(anchor.cpu()).std().item()
        self.vae.to_latent.register_forward_hook(lambda layer, args, z: z + self.shake)

    def groups(self):
        vae, critic = self.vae, super().groups()[1]
        return [{"params": [*vae.from_latent.parameters(), *vae.decoder.parameters()]}, critic]

    def noise(self, step):
        # where the PatchGAN begins to look, so that its strides fall everywhere in a cell
        gen, n, side = generator(self.cfg.seed, "where", step), self.cfg.vae_batch, self.crop // self.vae.factor
        self.look = torch.randint(4, (2,), generator=gen).tolist()
        most = SHAKE * torch.randint(2, (n, 1, 1, 1), generator=gen) * torch.rand(n, 1, 1, 1, generator=gen)
        return super().noise(step) | {"shake": most * torch.randn(n, 3, side, side, generator=gen)}

    def crops(self, batch):
        self.shake = batch["shake"] * self.deviation
        return super().crops(batch)

    def judge(self, x):
        i, j = self.look
        return self.critic(detail(x)[:, :, i:, j:])

    def critique(self, loss, x_rec, x):
        coded, real = sharpness(x_rec), sharpness(x)
        grain = l1_loss(coded, real) + l1_loss(lattice(coded), lattice(real))
        return super().critique(loss + GRAIN * grain + FOLD * l1_loss(folded(x_rec), folded(x)), x_rec, x)

    def after_step(self, step, ranks):
        pass                                                            # no code moves

def critic_stage(cfg, anchor, start):
    """What train.py trains. A finished VAE (--vae_weights) keeps its latents."""
    return DecoderStage(cfg, anchor, start) if cfg.vae_weights else CriticStage(cfg, anchor, start)

def detail(x):
    """An image (B,3,H,W) with half of its contrast, and eight times as much in its detail. By it a PatchGAN soon finds
    a smooth image out; by the image itself, not for long."""
    blur = avg_pool2d(pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)     # (B,3,H,W)
    return 0.5 * blur + 4 * (x - blur)

def sharpness(x):
    """How sharp an image (B,3,H,W) is here and there: logarithm of the mean step between neighbouring pixels, over
    places of 16 x 16 pixels that overlap by half; of steps from one cell of 4 pixels to the next, and of all others.
    out: (B,6,h,w). Sides of 16 pixels or more."""
    right = pad(x, (0, 1, 0, 0), mode="replicate").diff(dim=3).abs()    # (B,3,H,W)
    below = pad(x, (0, 0, 0, 1), mode="replicate").diff(dim=2).abs()
    across, down = (torch.arange(n, device=x.device) % 4 == 3 for n in (x.shape[3], x.shape[2]))
    down = down[:, None]                                                # (H,1)
    between = 4 * (right * across + below * down)                       # one step in four
    within = 4 / 3 * (right * ~across + below * ~down)
    return (avg_pool2d(torch.cat([between, within], 1), 16, 8) + 0.01).log()

def lattice(places):
    """How much larger steps from cell to cell are than those within, in the mean of an image; strong edges count most.
    in: what `sharpness` says. out: logarithms (B,)."""
    between, within = (part.mean((1, 2, 3)) for part in places.exp().chunk(2, 1))
    return (between / within).log()

def folded(x):
    """What all cells of 4 pixels have in common: their mean over places of 4 x 4 cells. in: x (B,3,H,W), sides
    multiples of 16. out: (B,3,H/16,4,W/16,4). Grain that differs from cell to cell is gone; a lattice stays."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 16, 4, 4, w // 16, 4, 4).mean((3, 6))

def turned(x, turn):
    """One of the eight turned and mirrored views of a crop (3,H,W)."""
    if turn >= 4:
        x = x.flip(2)
    return x.rot90(turn % 4, (1, 2))
