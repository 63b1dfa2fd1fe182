"""Diffusion: schedules, forward process, loss, guidance, DDIM, PLMS; and `ZoomLDM`, the whole model.

A sampler takes any function fn(z_t, t) -> prediction, a closed form too (tests/core/test_diffusion.py).
t is an index 0..T-1; t = -1 means clean, alpha_bar = 1.

in:  c (B,L,D) and noise z_T (B,3,h,w)   out: latents z_0 (B,3,h,w), decoded to images (B,3,4h,4w)
run: python diffusion.py     read next: data.py
"""
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common import UserError, cli, generator, load_tensors, restore, save_tensors, summary
from summarizer import SummarizerConfig, build
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

# ----- 1. Forward process (Z §3.1): z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps -----

class Schedule:
    """The table alpha_bar (T,) float64, strictly falling: the share of signal power left at index t."""
    def __init__(self, kind="scaled_linear", T=1000):
        f64 = {"dtype": torch.float64, "device": "cpu"}  # a table, also when the model is on the meta device
        if kind == "scaled_linear":                      # the LDM's: root linear; official calls it "linear"
            beta = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T, **f64) ** 2
        elif kind == "cosine":                           # the CDM's: Nichol & Dhariwal Eq. 17
            angle = (torch.arange(T + 1, **f64) / T + 0.008) / 1.008 * math.pi / 2
            signal = angle.cos() ** 2                    # (T+1,) from clean on
            beta = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
        elif kind == "linear":                           # DDPM's, of the workshop's EDM
            beta = torch.linspace(1e-4, 0.02, T, **f64)
        else:
            raise UserError(f"unknown schedule {kind!r}: known are scaled_linear, cosine, linear")
        self.kind, self.T = kind, T
        self.alpha_bar = torch.cumprod(1 - beta, 0)      # (T,)

    def at(self, t, like):
        """alpha_bar at indices t (B,), -1 giving 1. out: (B,1,..,1), of the dtype and axes of `like`."""
        ab = self.alpha_bar
        ab = torch.cat([ab, ab.new_ones(1)])                                # index -1 is the last entry
        ab = ab.to(like.dtype).to(t.device)[t]                              # (B,)
        return ab.view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, z0, t, eps):
        """Noise z0 (B,...) to indices t (B,) with noise eps like z0."""
        ab = self.at(t, z0)
        return ab ** 0.5 * z0 + (1 - ab) ** 0.5 * eps

# A network predicts "eps", as published; or "x0", as the CDM; or "v" = sqrt(ab) eps - sqrt(1-ab) x0. v is eps
# with its known part taken off. It weighs the noisy steps, where layout is decided, as much as the others.
# Below, ab is alpha_bar: a float, or a tensor that broadcasts.

def to_x0(out, z_t, ab, pred):
    """The clean estimate z0_hat from a network's output. source: Tweedie; DDIM Eq. 9."""
    if pred == "x0":
        return out
    if pred == "v":
        return ab ** 0.5 * z_t - (1 - ab) ** 0.5 * out
    return (z_t - (1 - ab) ** 0.5 * out) / ab ** 0.5

def to_eps(out, z_t, ab, pred):
    """The noise estimate eps_hat from a network's output."""
    if pred == "eps":
        return out
    if pred == "v":
        return (1 - ab) ** 0.5 * z_t + ab ** 0.5 * out
    return (z_t - ab ** 0.5 * out) / (1 - ab) ** 0.5

def diffusion_loss(fn, z0, t, eps, schedule, pred="eps"):
    """Squared error of fn(z_t, t), one mean a sample, not weighted (Z §3.1). in: z0, eps (B,...); t (B,).
    out: (B,) loss to minimise; (B,) the same error on eps, whatever is predicted."""
    ab = schedule.at(t, z0)                                                 # (B,1,..,1)
    v = ab ** 0.5 * eps - (1 - ab) ** 0.5 * z0
    target = {"eps": eps, "x0": z0, "v": v}[pred]
    out = fn(schedule.q_sample(z0, t, eps), t).float()
    loss = (out - target).square().flatten(1).mean(1)                       # (B,)
    ab = ab.flatten()
    return loss, (loss * {"eps": 1.0, "x0": ab / (1 - ab), "v": ab}[pred]).detach()

# ----- 2. Guidance: written here, nowhere else -----

def null_condition(c):
    """What stands for no condition: zeros like c, as published (not an encoding of zeros)."""
    return torch.zeros_like(c)

def with_guidance(null, cond, guidance):
    """Classifier-free guidance of two predictions, 1 = conditional only. L's published code: w = guidance - 1."""
    return null + guidance * (cond - null)

def guided(fn, c, guidance=1.0, prepare=None):
    """fn(z_t, t, c) with guidance, both branches in one batch. in: c (B,L,D). out: f(z_t, t). prepare: called once
    with all tokens; fn gets what it returns."""
    tokens = c if guidance == 1.0 else torch.cat([null_condition(c), c])    # (2B,L,D); 1 needs no null branch
    if prepare is not None:
        tokens = prepare(tokens)

    def f(z, t):
        if guidance == 1.0:
            return fn(z, t, tokens)
        null, cond = fn(torch.cat([z, z]), torch.cat([t, t]), tokens).chunk(2)
        return with_guidance(null, cond, guidance)
    return f

# ----- 3. Sampling -----

def ddim_timesteps(T, steps):
    """Ascending indices as published: every (T // steps)-th, plus one (50 -> 1, 21, ..., 981); more than steps, if
    it does not divide T. raises: ValueError where the published sampler would leave the table."""
    tau = list(range(1, T + 1, T // steps)) if 1 <= steps <= T else [T]
    if tau[-1] >= T:
        raise UserError(f"steps={steps}: this sampler takes a divisor of {T} up to {T // 2}")
    return tau

def even_timesteps(T, steps):
    """`steps` ascending indices for our own commands; those of ddim_timesteps where steps divides T, up to T / 2."""
    if not 1 <= steps <= T:
        raise UserError(f"steps={steps}: give 1 to {T}")
    first = 1 if steps <= T // 2 else 0                     # the published table begins at 1
    return [first + i * T // steps for i in range(steps)]

def lean_timesteps(T, steps):
    """`steps` ascending indices that crowd at the clean end, where details are drawn: 10 -> 1, 14, 52, ..., 999."""
    if not 1 <= steps <= T // 4:
        raise UserError(f"--steps={steps}: give 1 to {T // 4} of dpm")
    last, room = max(steps - 1, 1), T - 1 - steps           # room: what may lie between them
    shares = [(1 - i / last) ** 2 for i in reversed(range(steps))]
    return [1 + i + round(room * share) for i, share in enumerate(shares)]

def noise_levels(schedule, timesteps, end):
    """alpha_bar at the timesteps, and at the step after each (towards clean), as lists of floats."""
    assert sorted(set(timesteps)) == list(timesteps), "timesteps must ascend"
    ab = [float(schedule.alpha_bar[t]) for t in timesteps]
    # official: the last step lands on alpha_bar[0], not 1: noise of deviation .039 stays in the latent
    last = {"published": float(schedule.alpha_bar[0]), "clean": 1.0}[end]
    return ab, [last, *ab[:-1]]

def extrapolation(ab, i):
    """What share of its latest change DPM-Solver++ 2M adds to z0_hat at step i; ab: of ascending times.
    At first there was no change yet; at the last step clean is infinitely far. source: Lu et al. 2022."""
    if not 0 < i < len(ab) - 1:
        return 0.0
    lam = [math.log(a / (1 - a)) for a in ab[i - 1:i + 2]]  # of signal to noise: next, here, before
    return (lam[0] - lam[1]) / (lam[1] - lam[2]) / 2

def ddim_step(z_t, z0_hat, eps_hat, ab_prev, sigma=0.0, noise=None):
    """z at the next step, of alpha_bar ab_prev; noise: else drawn, if sigma > 0. source: DDIM Eq. 12."""
    z = ab_prev ** 0.5 * z0_hat + max(1 - ab_prev - sigma ** 2, 0.0) ** 0.5 * eps_hat
    if sigma == 0:
        return z
    return z + sigma * (torch.randn_like(z) if noise is None else noise)

def ddim_sample(fn, z_T, schedule, steps=50, eta=0.0, *, pred="eps", timesteps=None, end="published",
                noise=None, callback=None):
    """Run DDIM from z_T to z_0. source: DDIM Eq. 12, 16.
    in:  fn(z_t, t (B,)) -> prediction of kind `pred`; eta 0 = deterministic, 1 = DDPM-like; timesteps: ascending
    (default ddim_timesteps); end: "published", or "clean", alpha_bar = 1; noise: one tensor a step, for eta > 0
    (default: drawn); callback(i, t, z, z0_hat) after every step."""
    timesteps = ddim_timesteps(schedule.T, steps) if timesteps is None else [int(t) for t in timesteps]
    ab, ab_prev = noise_levels(schedule, timesteps, end)
    z, last = z_T, len(timesteps) - 1
    for n, i in enumerate(tqdm(range(last, -1, -1), "steps", delay=3, leave=False)):    # seen if it takes long
        out = fn(z, torch.full((len(z),), timesteps[i], device=z.device))   # t (B,) int64
        z0_hat = to_x0(out, z, ab[i], pred)
        eps_hat = to_eps(out, z, ab[i], pred)
        sigma = eta * ((1 - ab_prev[i]) / (1 - ab[i]) * (1 - ab[i] / ab_prev[i])) ** 0.5
        xi = None if noise is None else noise[n]
        z = ddim_step(z, z0_hat, eps_hat, ab_prev[i], sigma, xi)
        if callback is not None:
            callback(n, timesteps[i], z, z0_hat)
    return z

def plms_sample(eps_fn, z_T, schedule, steps=50, timesteps=None, callback=None):
    """The sampler of the published patch notebooks: DDIM along an eps extrapolated from the last four.
    source: pseudo linear multi-step, Liu et al. 2022."""
    timesteps = ddim_timesteps(schedule.T, steps) if timesteps is None else timesteps
    ab, ab_prev = noise_levels(schedule, timesteps, "published")
    # Adams-Bashforth, by the number of earlier steps, whose eps are in `old`, newest first
    weights, old = {1: (3, -1), 2: (23, -16, 5), 3: (55, -59, 37, -9)}, []
    def extrapolated(z, t):
        eps = eps_fn(z, t)
        if old:
            w = weights[len(old)]
            mean = sum(a * e for a, e in zip(w, [eps, *old])) / sum(w)
        else:                                                               # ask again, where this eps leads
            z_next = ddim_step(z, to_x0(eps, z, ab[-1], "eps"), eps, ab_prev[-1])
            t_next = torch.full_like(t, timesteps[-2:][0])
            mean = (eps + eps_fn(z_next, t_next)) / 2
        old[:] = [eps, *old][:3]
        return mean
    return ddim_sample(extrapolated, z_T, schedule, timesteps=timesteps, callback=callback)

def dpm_sample(fn, z_T, schedule, timesteps, pred="eps", callback=None):
    """DPM-Solver++ 2M: DDIM along a z0_hat extrapolated from the last two. source: Lu et al. 2022."""
    ab, _ = noise_levels(schedule, timesteps, "clean")
    past = []                                               # the latest two z0_hat, newest first
    def ahead(z, t):
        z0_hat = to_x0(fn(z, t), z, schedule.at(t, z), pred)
        past[:] = [z0_hat, *past][:2]
        return z0_hat + extrapolation(ab, timesteps.index(int(t[0]))) * (z0_hat - past[-1])
    return ddim_sample(ahead, z_T, schedule, pred="x0", timesteps=timesteps, end="clean", callback=callback)

# ----- 4. The whole model -----

class ZoomLDM(nn.Module):
    """VAE, Summarizer, U-Net, and what it takes to run them. The latents of `encode`, `decode` and the samplers are
    scaled to a deviation of about 1. info: what the data were, in plain types."""
    def __init__(self, vae, summarizer, unet, latent_scale=1.0, pred="eps", schedule="scaled_linear", info=None):
        super().__init__()
        if unet.cfg.context_dim != summarizer.cfg.width:
            raise UserError(f"unet.context_dim={unet.cfg.context_dim}: it must be summarizer.width")
        self.vae, self.summarizer = vae, summarizer
        self.unet, self.pred = unet, pred
        self.latent_scale = float(latent_scale)
        self.schedule, self.info = Schedule(schedule), info or {}

    def encode(self, x):
        """in: x (B,3,H,W) in [-1,1]. out: scaled latents (B,3,H/4,W/4)."""
        return self.vae.encode(x) * self.latent_scale

    def decode(self, z, quantize=True):
        """in: scaled latents (B,3,h,w). out: x (B,3,4h,4w)."""
        return self.vae.decode(z / self.latent_scale, quantize)

    def eps(self, z_t, t, c):
        """The noise estimate, whatever is predicted. in: as UNet.forward. out: like z_t, dtype too."""
        out = self.unet(z_t, t, c).to(z_t.dtype)                            # autocast may have made it bf16
        return to_eps(out, z_t, self.schedule.at(t, z_t), self.pred)

    def guided(self, c, guidance=1.0, span=(0, math.inf)):
        """in: c (B,L,D); span, where t must lie for guidance. out: f(z_t, t) -> eps; keys are kept."""
        fn, plain = (guided(self.eps, c, g, prepare=self.unet.cache_context) for g in (guidance, 1.0))
        return lambda z, t: (fn if span[0] <= t[0] < span[1] else plain)(z, t)

    @torch.no_grad()
    def sample(self, c, size, guidance=2.0, steps=50, seed=0, sampler="ddim", end="clean", first=0):
        """Scaled latents (B,3,*size) for conditions c (B,L,D). The noise of image i of a batch depends on
        (seed, first + i) alone. end: for ddim; plms ends as published, dpm clean."""
        if sampler not in ("dpm", "ddim", "plms"):
            raise UserError(f"unknown sampler {sampler!r}: known are dpm, ddim, plms")
        shape, T = (self.unet.cfg.channels, *size), self.schedule.T
        noise = [torch.randn(shape, generator=generator(seed, first + i)) for i in range(len(c))]
        z_T = torch.stack(noise).to(c.device)                               # (B,3,*size)
        if sampler == "dpm":                # outside of this span guidance changes next to nothing
            fn = self.guided(c, guidance, (100, 800))
            return dpm_sample(fn, z_T, self.schedule, lean_timesteps(T, steps))
        fn, timesteps = self.guided(c, guidance), even_timesteps(T, steps)
        if sampler == "plms":
            return plms_sample(fn, z_T, self.schedule, timesteps=timesteps)
        return ddim_sample(fn, z_T, self.schedule, timesteps=timesteps, end=end)

    @torch.no_grad()
    def draw(self, c, side, guidance=2.0, steps=50, seed=0, batch=64, sampler="ddim", end="clean"):
        """Patches for conditions c (N,L,D): (N,3,4 side,4 side) in [-1,1], on the CPU."""
        images = []
        for first in tqdm(range(0, len(c), batch), "batches", delay=3, leave=False):
            z = self.sample(c[first:first + batch], (side, side), guidance, steps, seed, sampler, end, first)
            images.append(self.decode(z).float().clamp(-1, 1).cpu())
        return torch.cat(images)

    def config(self):
        """Everything but the weights, as plain types."""
        return {"vae": asdict(self.vae.cfg), "summarizer": asdict(self.summarizer.cfg),
                "unet": asdict(self.unet.cfg), "latent_scale": self.latent_scale, "pred": self.pred,
                "schedule": self.schedule.kind, "info": self.info}

    def save(self, folder):
        """Write folder/ema.safetensors: all weights, the configuration in its header."""
        save_tensors(Path(folder) / "ema.safetensors", self.state_dict(), self.config())

    @classmethod
    def from_run(cls, folder):
        """Load a run folder, or its ema.safetensors, in eval mode. raises: ValueError for other files."""
        path = Path(folder)
        if path.is_dir() or not path.suffix:
            path = path / "ema.safetensors"
        state, config = load_tensors(path)
        if "vae_file" in config:                            # as shipped, the VAE in a file of its own
            from weights.shipped import with_vae
            state = with_vae(path, state, config)
        try:
            vae = VQVAE(restore(VAEConfig, config["vae"]))
            summarizer = build(restore(SummarizerConfig, config["summarizer"]))
            unet = UNet(restore(UNetConfig, config["unet"]))
            model = cls(vae, summarizer, unet, *(config[k] for k in ("latent_scale", "pred", "schedule", "info")))
            model.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as err:
            raise UserError(f"{path} holds no model of ours ({str(err).splitlines()[0]}): try from_official") from err
        return model.eval().requires_grad_(False)

    @classmethod
    def from_official(cls, source):
        """Load a whole published checkpoint, a path or a state dict: EMA U-Net, raw Summarizer, VAE; latent
        scale 1, in eval mode. raises: ValueError listing missing, unexpected and mis-shaped keys."""
        from slides import keys  # the published names
        return keys.load_whole(source)

def layout_fidelity(fake, real, grid):
    """Pearson correlation of patches (N,3,P,P) average-pooled to grid, min(2^s, 8); 1 compares mean colours.
    Each channel's mean over its set is taken off, or the stain alone would correlate. 0 if a set is constant."""
    if fake.shape != real.shape or fake.ndim != 4 or min(fake.shape) < 1 or min(fake.shape[2:]) < grid:
        raise UserError(f"got patches {tuple(fake.shape)} and {tuple(real.shape)}: give images (N,3,H,W) of one "
                        f"shape, with sides of at least {grid}")
    cells = []
    for x in (fake, real):
        x = nn.functional.adaptive_avg_pool2d(x.double(), grid)                     # (N,3,grid,grid)
        cells.append((x - x.mean((0, 2, 3), keepdim=True)).flatten())
    size = cells[0].norm() * cells[1].norm()
    return float(cells[0] @ cells[1] / size) if size > 1e-12 else 0.0

def main(argv):
    with torch.device("meta"):
        model = ZoomLDM(VQVAE(VAEConfig()), build(SummarizerConfig()), UNet(UNetConfig()))
        model.forward = model.eps
        summary(model, torch.randn(1, 3, 64, 64), torch.zeros(1).long(), torch.randn(1, 65, 512), depth=1)

if __name__ == "__main__":
    cli(main, __doc__)
