"""A proxy for A Dec: a small convolutional map from latents straight to the decoded image at a quarter of its side.

A few thousand parameters learn that in ten seconds, and their gradient costs next to nothing, so that decoder and
encoder leave the loop. Reductions beyond 4 follow by `Resize`. It is taught on noisy estimates of every t.
in:  scaled latents (B,3,h,w)   out: images (B,3,h,w) in [-1,1]; RUN/proxy.safetensors     read next: large/command.py
"""
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from common import UserError, generator, load_tensors, save_tensors
from data import PatchDataset
from diffusion import to_eps, to_x0
from sample_joint import Resize, full_precision

PASSES = 3  # corrections by a proxy where the decoder makes one: each takes away less of what is sharp

class Proxy(nn.Module):
    """Three convolutions over the latents; 7 x 7 of them are seen, and the mean and deviation of the whole window, for
    the decoder's GroupNorm and attention look at all of it too. No gradient goes through these two.
    Attributes: factor, by how much its image is smaller than the decoder's; inverse (3,3): the mean of J^T J, damped
    and inverted, with J (3,3) what an even change of the latents does to a pixel; it makes of a gradient J^T r the
    change that takes the error r away (Gauss-Newton)."""

    def __init__(self, factor=4, width=32):
        super().__init__()
        self.factor = factor
        self.linear = nn.Conv2d(9, 3, 1)
        self.deep = nn.Sequential(nn.Conv2d(9, width, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))
        self.register_buffer("inverse", torch.eye(3))

    def forward(self, z):
        var, mean = torch.var_mean(z, (2, 3), correction=0, keepdim=True)
        # what the whole window has in common is not a latent's to change: through these, one that stands out of a flat
        # window is driven on by whatever is wrong elsewhere, and one on which four windows lie four times as far
        mean, std = mean.detach(), (var + 1e-4).sqrt().detach()
        z = torch.cat([z, mean.expand_as(z), std.expand_as(z)], 1)                      # (B,9,h,w)
        return self.linear(z) + self.deep(z)                                            # (B,3,h,w)

def guide(level, z, t, ab, K, lam, delta, zeta):
    """See sample_joint.guide_x0_by_proxy. Without a proxy the decoder itself is differentiated. out: z, z0_hat, eps."""
    image, smaller, proxy, A, y = level.decode, 1, level.proxy, level.A, level.target
    if proxy is not None:
        image, smaller, K = proxy, proxy.factor, PASSES * K
    if smaller > A.factor:  # the proxy's image is smaller than the target: both are compared at its size
        y = Resize(smaller // A.factor, A.kind).down(y)
    small = replace(level, decode=image, A=Resize(max(A.factor // smaller, 1), A.kind), target=y)
    z0, _ = level.z0_hat(z, t, ab)
    for _ in range(K):
        with full_precision(z):
            change = small.backpropagate(image, z0, small.error(small.Dec(z0)))
            if proxy is not None:
                change = torch.einsum("ij,bjhw->bihw", proxy.inverse, change)
        z0 = z0 + lam * change
    return z, z0, to_eps(z0, z, ab, "x0")

@torch.no_grad()
def lesson(model, pyramids, split, n, guidance, seed, ranks):
    """What a sampler would ask: estimates z0_hat (n,3,h,w) from latents noised to random t, and what the decoder
    makes of them, reduced (n,3,h,w). All scales in turn."""
    patches = Subset(PatchDataset(pyramids, split, seed, want=("x",)), range(n))
    A, z, x = Resize(model.vae.factor), [], []
    for k, items in enumerate(tqdm(DataLoader(patches, 32), "proxy, examples")):
        image, tokens, mask, s = (items[name].to(ranks.device) for name in ("x", "tokens", "mask", "s"))
        rng = generator(seed, 32 * k)
        with ranks.autocast():
            z0 = model.encode(image).float()
            c = model.summarizer(tokens, mask, s).float()
            ts = torch.randint(1000, (len(z0),), generator=rng).to(z0.device)
            noise = torch.randn(z0.shape, generator=rng).to(z0)
            z_t = model.schedule.q_sample(z0, ts, noise)
            eps = model.guided(c, guidance)(z_t, ts)
            z0_hat = to_x0(eps, z_t, model.schedule.at(ts, z_t), "eps")
            decoded = model.decode(z0_hat).float()
        z.append(z0_hat)
        x.append(A.down(decoded))
    return torch.cat(z), torch.cat(x)

def fit(model, pyramids, ranks, n=160, steps=600, batch=16, lr=1e-2):
    """Fit a Proxy to the decoder of `model` on n estimates of training patches. deterministic. Few patches are enough,
    for every pixel is an example; a short memory of the squared gradients (0.95) halves the error left."""
    z, x = lesson(model, pyramids, "train", n, 2.0, 1, ranks)
    torch.manual_seed(0)
    proxy = Proxy(model.vae.factor).to(z.device)
    optimizer = torch.optim.AdamW(proxy.parameters(), lr, betas=(0.9, 0.95))
    for step in tqdm(range(steps), desc="proxy"):
        warm = min(1, (step + 1) / 20)
        optimizer.param_groups[0]["lr"] = lr * warm * (1 - step / steps) ** 1.5
        rng = generator(0, step)
        pick = torch.randint(len(z), (batch,), generator=rng).to(z.device)
        optimizer.zero_grad()
        F.mse_loss(proxy(z[pick]), x[pick]).backward()
        optimizer.step()
    proxy.eval().requires_grad_(False)
    few, columns = z[:256], []
    for channel in torch.eye(3).to(z):                                                  # one latent channel at a time
        moved = proxy(few + 0.05 * channel[:, None, None]) - proxy(few)                 # (n,3,h,w)
        columns.append(moved / 0.05)
    J = torch.stack(columns, 1)                                                         # (n,3 latent,3 colours,h,w)
    # the mean of J^T J, not of J: a channel that darkens here and brightens there would seem to do nothing, and be
    # driven far to do it
    G = torch.einsum("nichw,njchw->ij", J, J) / J[:, 0, 0].numel()                      # (3,3)
    # tissue has hardly more than two colours, so G is nearly singular: what it cannot do is not asked of it
    damping = 0.04 * torch.linalg.matrix_norm(G, 2)
    proxy.inverse.copy_(torch.linalg.inv(G + damping * torch.eye(3).to(G)))
    return proxy

def fingerprint(model):
    """Tells models apart: a hash of the last layers of U-Net and decoder."""
    parts = (model.unet.conv_out.weight, model.vae.decoder.conv_out.weight)
    return sha256(b"".join(w.detach().float().cpu().numpy().tobytes() for w in parts)).hexdigest()[:16]

def mark(model):
    """What the file of a proxy of this model says; others are fitted anew."""
    return {"model": fingerprint(model), "inverse": "of the mean of J^T J"}

def load(run, model, pyramids, ranks):
    """The proxy of a run (its folder, or its file of weights), saved beside the model; fitted to `pyramids`, if there
    are any, where none fits the model."""
    path = Path(run).with_name("proxy.safetensors") if Path(run).is_file() else Path(run, "proxy.safetensors")
    state, meta = load_tensors(path) if path.exists() else ({}, {})
    ranks.barrier()                                         # all have looked before one writes
    if mark(model).items() <= meta.items():
        proxy = Proxy(model.vae.factor)
        try:
            proxy.load_state_dict(state)
        except RuntimeError as err:
            raise UserError(f"{path} does not fit this program: remove it, it is made again in a minute") from err
        return proxy.to(ranks.device).eval().requires_grad_(False)
    if pyramids is None:
        raise UserError(f"no {path} of this model, and no data to fit one to: give --data=, or another --guide")
    proxy = fit(model, pyramids, ranks)
    if ranks.rank == 0:
        save_tensors(path, proxy.state_dict(), mark(model))
        print(f"wrote {path}")
    return proxy
