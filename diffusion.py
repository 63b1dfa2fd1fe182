"""Diffusion: noise schedules, the forward process and its loss, guidance, DDIM, PLMS; and `ZoomLDM`, the whole model.

A sampler takes any function fn(z_t, t) -> prediction, so it can be tried on closed forms (tests/test_diffusion.py) and
needs no network. t is an index 0..T-1; t = -1 means clean, alpha_bar = 1.

in:  c (B,L,D) and noise z_T (B,3,h,w)   out: latents z_0 (B,3,h,w), decoded to images (B,3,4h,4w)
run: python diffusion.py     read next: data.py
"""
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from common import UserError, check_official, cli, generator, load_state_dict, load_tensors, save_tensors, summary
from summarizer import KINDS, Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

# ----- 1. Forward process (Z §3.1): z_t = sqrt(ab) z_0 + sqrt(1 - ab) eps -----

class Schedule:
    """The table alpha_bar (T,) float64, strictly falling: the share of signal power left at index t.

    kind: "scaled_linear", linear in sqrt(beta), the LDM's (official calls it "linear"); "cosine", capped at beta .999,
    the CDM's; "linear" in beta, 1e-4 .. 0.02, the workshop's EDM. source: official configs; DDPM; Nichol & Dhariwal
    Eq. 17.
    """

    def __init__(self, kind="scaled_linear", T=1000):
        f64 = {"dtype": torch.float64, "device": "cpu"}  # a table of numbers, also when the model is on the meta device
        if kind == "scaled_linear":
            beta = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T, **f64) ** 2
        elif kind == "linear":
            beta = torch.linspace(1e-4, 0.02, T, **f64)
        elif kind == "cosine":
            f = torch.cos((torch.arange(T + 1, **f64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise UserError(f"unknown schedule {kind!r}: known are scaled_linear, cosine, linear")
        self.kind, self.T, self.beta = kind, T, beta
        self.alpha_bar = torch.cumprod(1 - beta, 0)

    def at(self, t, like):
        """alpha_bar at indices t (B,), -1 giving 1; in the dtype and broadcast shape (B,1,..,1) of `like`."""
        table = torch.cat([self.alpha_bar, self.alpha_bar.new_ones(1)])                   # index -1 = the last entry
        return table.to(like.dtype).to(t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, z0, t, eps):
        """Noise z0 (B,...) to indices t (B,) with noise eps like z0."""
        ab = self.at(t, z0)
        return ab.sqrt() * z0 + (1 - ab).sqrt() * eps


# What a network predicts. "eps" as published; "x0" as the CDM; "v" = sqrt(ab) eps - sqrt(1-ab) x0, the same network
# with the known part of eps handed to it, which weighs the noisy steps, where layout is decided, as much as the others.
# ab may be a float or a broadcastable tensor.

def _root(a):
    return a.sqrt() if torch.is_tensor(a) else a ** 0.5


def to_x0(out, z_t, ab, pred):
    """The clean estimate z0_hat from a network output. source: Tweedie; DDIM Eq. 9."""
    if pred == "x0":
        return out
    if pred == "v":
        return _root(ab) * z_t - _root(1 - ab) * out
    return (z_t - _root(1 - ab) * out) / _root(ab)


def to_eps(out, z_t, ab, pred):
    """The noise estimate from a network output."""
    if pred == "eps":
        return out
    if pred == "v":
        return _root(1 - ab) * z_t + _root(ab) * out
    return (z_t - _root(ab) * out) / _root(1 - ab)


def diffusion_loss(fn, z0, t, eps, schedule, pred="eps"):
    """Squared error of the prediction, averaged per sample, without further weighting.

    in:  fn(z_t, t) -> prediction; z0, eps (B,...); t (B,). out: (B,) loss to minimise; (B,) the same error measured on
    eps, which is comparable between kinds of prediction. source: Z §3.1; official: no SNR weighting.
    """
    ab = schedule.at(t, z0)
    target = {"eps": eps, "x0": z0, "v": ab.sqrt() * eps - (1 - ab).sqrt() * z0}[pred]
    loss = (fn(schedule.q_sample(z0, t, eps), t).float() - target).square().flatten(1).mean(1)
    ab = ab.flatten()
    return loss, (loss * {"eps": 1.0, "x0": ab / (1 - ab), "v": ab}[pred]).detach()


# ----- 2. Sampling -----

def null_condition(c):
    """What stands for no condition: zeros like c, as published (not an encoding of zeros). Made here, nowhere else."""
    return torch.zeros_like(c)


def with_guidance(null, cond, guidance):
    """Classifier-free guidance: null + guidance (cond - null) of two predictions. Written here, nowhere else."""
    return null + guidance * (cond - null)


def guided(fn, c, guidance=1.0, c_null=None):
    """Classifier-free guidance of a prediction.

    in:  fn(z_t, t, c) -> prediction; c (B,...). guidance 1 = conditional only, one pass. (The published large-image
    code calls w what is guidance - 1 here.) c_null: zeros, as published (not an encoding of zeros). out: f(z_t, t).
    """
    if guidance == 1.0:
        return lambda z, t: fn(z, t, c)
    both = torch.cat([null_condition(c) if c_null is None else c_null, c])         # (2B,L,D), both in one batch

    def f(z, t):
        null, cond = fn(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return with_guidance(null, cond, guidance)
    return f


def ddim_timesteps(T, steps):
    """Ascending indices as the published sampler picks them: every (T // steps)-th, plus one (50 -> 1, 21, ..., 981).

    If steps does not divide T there are more of them (30 -> 31), also as published.
    raises: ValueError where the published sampler would leave the table.
    """
    if not 1 <= steps <= T:
        raise UserError(f"steps={steps}: give 1 to {T}")
    tau = list(range(1, T + 1, T // steps))
    if tau[-1] >= T:
        raise UserError(f"steps={steps} would need time index {tau[-1]} of a {T}-step schedule: take a divisor of {T} "
                        f"up to {T // 2}")
    return tau


def noise_levels(schedule, timesteps, end):
    """alpha_bar at the timesteps and at the step after each (towards clean), as Python floats."""
    assert end in ("published", "clean"), f"end={end!r}: 'published' or 'clean'"
    assert all(a < b for a, b in zip(timesteps, timesteps[1:])), "timesteps must ascend"
    ab = [float(schedule.alpha_bar[t]) for t in timesteps]
    # official: the last step lands on alpha_bar[0], not 1, so a trace of noise (3.9 % deviation) stays in the latent
    return ab, [float(schedule.alpha_bar[0]) if end == "published" else 1.0, *ab[:-1]]


def ddim_step(z_t, z0_hat, eps_hat, ab_prev, sigma=0.0, noise=None):
    """source: DDIM Eq. 12."""
    z = ab_prev ** 0.5 * z0_hat + max(1 - ab_prev - sigma ** 2, 0.0) ** 0.5 * eps_hat
    return z + sigma * noise if sigma else z


def ddim_sample(fn, z_T, schedule, steps=50, eta=0.0, *, pred="eps", timesteps=None, end="published", noise=None,
                callback=None):
    """Run DDIM from z_T to z_0.

    in:  fn(z_t, t (B,)) -> prediction of kind `pred`, already guided; eta 0 = deterministic, 1 = DDPM-like; timesteps:
    ascending indices (default ddim_timesteps); end: "published" or "clean" (go to alpha_bar = 1); noise: one tensor per
    step for eta > 0 (default: drawn); callback(i, t, z, z0_hat) after every step. source: DDIM Eq. 12, 16.
    """
    timesteps = [int(t) for t in (ddim_timesteps(schedule.T, steps) if timesteps is None else timesteps)]
    ab, ab_prev = noise_levels(schedule, timesteps, end)
    z = z_T
    for n, i in enumerate(reversed(range(len(timesteps)))):
        out = fn(z, torch.full((len(z),), timesteps[i], dtype=torch.long, device=z.device))
        z0_hat, eps_hat = to_x0(out, z, ab[i], pred), to_eps(out, z, ab[i], pred)
        sigma = eta * ((1 - ab_prev[i]) / (1 - ab[i]) * (1 - ab[i] / ab_prev[i])) ** 0.5
        xi = None if not sigma else noise[n] if noise is not None else torch.randn_like(z)
        z = ddim_step(z, z0_hat, eps_hat, ab_prev[i], sigma, xi)
        if callback is not None:
            callback(n, timesteps[i], z, z0_hat)
    return z


def plms_sample(eps_fn, z_T, schedule, steps=50, callback=None):
    """Pseudo linear multi-step sampling, what the published patch notebooks use: DDIM steps along an eps extrapolated
    from the last four (Adams-Bashforth); the first step averages two evaluations. source: PNDM, Liu et al. 2022."""
    timesteps = ddim_timesteps(schedule.T, steps)
    ab, ab_prev = noise_levels(schedule, timesteps, "published")
    z, old = z_T, []
    for n, i in enumerate(reversed(range(len(timesteps)))):
        def index(k):
            return torch.full((len(z_T),), timesteps[max(k, 0)], dtype=torch.long, device=z_T.device)

        def step(z, eps, i=i):
            z0_hat = to_x0(eps, z, ab[i], "eps")
            return ddim_step(z, z0_hat, eps, ab_prev[i]), z0_hat
        eps = eps_fn(z, index(i))
        if not old:
            mean = (eps + eps_fn(step(z, eps)[0], index(i - 1))) / 2
        else:
            coef = {1: (3, -1), 2: (23, -16, 5), 3: (55, -59, 37, -9)}[len(old)]
            mean = sum(k * e for k, e in zip(coef, [eps, *old])) / sum(coef)
        old = [eps, *old][:3]                                              # newest first
        z, z0_hat = step(z, mean)
        if callback is not None:
            callback(n, timesteps[i], z, z0_hat)
    return z


# ----- 3. The whole model -----

# keys of a published checkpoint that hold no weights: the schedule, recomputed here in float64, and EMA counters
BOOKKEEPING = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
               "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
               "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
               "lvlb_weights", "model_ema.decay", "model_ema.num_updates"}


class ZoomLDM(nn.Module):
    """VAE + Summarizer + U-Net, and what is needed to run them: latent scale, schedule, kind of prediction.

    `encode` and `decode` work on *scaled* latents (deviation about 1); published weights have scale 1.
    `info` describes the data the model was trained on (encoder, its deviations, patch size, ...), plain types.
    """

    def __init__(self, vae, summarizer, unet, latent_scale=1.0, pred="eps", schedule="scaled_linear", info=None):
        super().__init__()
        self.vae, self.summarizer, self.unet = vae, summarizer, unet
        self.latent_scale, self.pred, self.schedule = float(latent_scale), pred, Schedule(schedule)
        self.info, self.ignored = info or {}, []
        if unet.cfg.context_dim != summarizer.cfg.width:
            raise UserError(f"the U-Net takes tokens of width {unet.cfg.context_dim}, the Summarizer makes "
                            f"{summarizer.cfg.width}: set unet.context_dim to summarizer.width")

    def encode(self, x):
        """in: x (B,3,H,W) in [-1,1]. out: scaled latents (B,3,H/4,W/4)."""
        return self.vae.encode(x) * self.latent_scale

    def decode(self, z, quantize=True):
        """in: scaled latents (B,3,h,w). out: x (B,3,4h,4w)."""
        return self.vae.decode(z / self.latent_scale, quantize)

    def eps(self, z_t, t, c):
        """The noise estimate, whatever the network predicts. in: as UNet.forward; out: eps_hat like z_t (dtype too)."""
        return to_eps(self.unet(z_t, t, c).to(z_t.dtype), z_t, self.schedule.at(t, z_t), self.pred)

    def guided(self, c, guidance=1.0):
        """in: c (B,L,D). out: f(z_t, t) -> guided eps; the keys and values of c are computed once."""
        if guidance == 1.0:
            kv = self.unet.cache_context(c)
            return lambda z, t: self.eps(z, t, kv)
        kv = self.unet.cache_context(torch.cat([null_condition(c), c]))
        return guided(lambda z, t, _: self.eps(z, t, kv), c, guidance)

    @torch.no_grad()
    def sample(self, c, size, guidance=2.0, steps=50, seed=0, sampler="ddim", end="clean", first=0):
        """Draw latents for conditions c (B,L,D). size: latent height and width. Image i of a batch starts from noise
        that depends on (seed, first + i) alone. end: for ddim; plms ends as published. out: z (B,3,*size), scaled."""
        z_T = torch.stack([torch.randn(self.unet.cfg.channels, *size, generator=generator(seed, first + i))
                           for i in range(len(c))]).to(c.device)
        if sampler == "plms":
            return plms_sample(self.guided(c, guidance), z_T, self.schedule, steps)
        if sampler != "ddim":
            raise UserError(f"unknown sampler {sampler!r}: known are ddim, plms")
        return ddim_sample(self.guided(c, guidance), z_T, self.schedule, steps, end=end)

    @torch.no_grad()
    def draw(self, c, side, guidance=2.0, steps=50, seed=0, batch=64, sampler="ddim", end="clean"):
        """Patches for conditions c (N,L,D), latents of side x side: (N,3,4 side,4 side) in [-1,1] on the CPU. Call it
        under autocast for bf16."""
        images = []
        for first in range(0, len(c), batch):
            part = c[first:first + batch]
            z = self.sample(part, (side, side), guidance, steps, seed, sampler, end, first)
            images.append(self.decode(z).float().clamp(-1, 1).cpu())
        return torch.cat(images)

    def config(self):
        """Everything but the weights, as plain types."""
        return {"vae": asdict(self.vae.cfg), "summarizer": asdict(self.summarizer.cfg), "unet": asdict(self.unet.cfg),
                "latent_scale": self.latent_scale, "pred": self.pred, "schedule": self.schedule.kind, "info": self.info}

    @classmethod
    def from_config(cls, config):
        def cfg(kind, name):
            return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in config[name].items()})
        summarizer = cfg(SummarizerConfig, "summarizer")
        return cls(VQVAE(cfg(VAEConfig, "vae")), KINDS[summarizer.kind](summarizer), UNet(cfg(UNetConfig, "unet")),
                   *(config[k] for k in ("latent_scale", "pred", "schedule", "info")))

    def save(self, folder):
        """Write folder/ema.safetensors: all weights, the configuration in its header."""
        save_tensors(Path(folder) / "ema.safetensors", self.state_dict(), self.config())

    @classmethod
    def from_run(cls, folder):
        """Load a run folder (or its ema.safetensors), in eval mode. raises: ValueError if it is not one of ours."""
        path = Path(folder) / "ema.safetensors" if Path(folder).is_dir() else Path(folder)
        if not path.exists():
            raise UserError(f"no trained model at {path}: train one with `python train.py`, or check the run folder")
        state, config = load_tensors(path)
        try:
            model = cls.from_config(config)
            model.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as err:
            raise UserError(f"{path} does not hold a nanoZoomLDM model ({str(err).splitlines()[0]}); published "
                            f"checkpoints load with ZoomLDM.from_official") from err
        return model.eval().requires_grad_(False)

    @classmethod
    def from_official(cls, source):
        """Load a whole published checkpoint: EMA U-Net, raw Summarizer, VAE, latent scale 1; in eval mode.

        in:  a path (.ckpt, .pt: tensors only; .safetensors) or a state dict, bare or under "state_dict".
        official: only the U-Net was averaged. Ignored bookkeeping keys are listed in `.ignored`.
        raises: ValueError listing missing, unexpected and mis-shaped keys.
        """
        state = source if isinstance(source, dict) else load_state_dict(source)
        state = state.get("state_dict", state)
        raw = "model.diffusion_model."
        known = ("first_stage_model.", "cond_stage_model.", raw)
        none = [p for p in known if not any(k.startswith(p) for k in state)]
        if none:
            raise UserError(f"this is not a whole published ZoomLDM checkpoint: no keys {'*, '.join(none)}*")
        with torch.device("meta"):
            unet = UNet(UNet.infer_config(state, raw))
        names = check_official(unet, state, raw, unet.official_name).values()  # the raw U-Net is checked, but not used
        # an EMA key is the parameter's name within `model.`, all dots removed; it cannot be parsed back, so build it
        ema = {k: "model_ema." + k.removeprefix("model.").replace(".", "") for k in names}
        expected = BOOKKEEPING | set(ema.values())
        absent = [e for e in ema.values() if e not in state]
        unexpected = [k for k in state if not k.startswith(known) and k not in expected]
        shaped = [f"{e} is {tuple(state[e].shape)}, expected {tuple(state[k].shape)}"
                  for k, e in ema.items() if e in state and state[e].shape != state[k].shape]
        if absent or unexpected or shaped:
            raise UserError("this is not a whole published ZoomLDM checkpoint" + "".join(
                f"; {len(keys)} {what}: {', '.join(keys[:8])}" for keys, what in
                ((absent, "missing"), (unexpected, "unexpected"), (shaped, "of another shape")) if keys))
        unet = UNet.from_official({k: state[e] for k, e in ema.items()}, raw)
        model = cls(VQVAE.from_official(state, "first_stage_model."),
                    Summarizer.from_official(state, "cond_stage_model."), unet)
        model.ignored = sorted(k for k in state if k in BOOKKEEPING)
        return model.eval().requires_grad_(False)


def main(argv):
    with torch.device("meta"):
        model = ZoomLDM(VQVAE(VAEConfig()), Summarizer(SummarizerConfig()), UNet(UNetConfig()))
        c = torch.randn(1, 65, 512)
        for part in (model.vae, model.summarizer, model.unet):
            print(f"{type(part).__name__:<12}{sum(p.numel() for p in part.parameters()):>14,} parameters")
        model.forward = lambda z, t: model.unet(z, t, c)
        summary(model, torch.randn(1, 3, 64, 64), torch.zeros(1, dtype=torch.long), depth=1)
    ab = model.schedule.alpha_bar
    print("\nalpha_bar: " + json.dumps({t: round(float(ab[t]), 6) for t in (0, 99, 499, 999)}))
    mu = torch.randn(1, 3, 8, 8)
    z = ddim_sample(lambda z, t: (z - model.schedule.at(t, z).sqrt() * mu) / (1 - model.schedule.at(t, z)).sqrt(),
                    torch.randn(1, 3, 8, 8), model.schedule, 10, end="clean")
    print(f"DDIM towards a single point, 10 steps on the CPU: off by {(z - mu).abs().max():.1e}")


if __name__ == "__main__":
    cli(main)
