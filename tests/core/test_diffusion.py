"""Schedules, DDIM, PLMS, guidance: against the published samplers (tests/golden) and against closed forms.

No single oracle suffices. A single point finds a wrong end and a table index that is not the network's; a Gaussian
finds a wrong update; a spy finds a wrong start. Each docstring ends with small changes of the code that the test is
meant to fail on ("catches: ...").
"""
import math

import pytest
import torch
from rule import assert_close, assert_golden, golden, state_dict

from diffusion import Schedule, ZoomLDM, ddim_sample, ddim_timesteps, diffusion_loss, guided, plms_sample, to_eps, to_x0
from summarizer import Summarizer, SummarizerConfig
from unet import UNet
from zoom_vae import VQVAE, VAEConfig

LDM = Schedule("scaled_linear")
KINDS = ("scaled_linear", "cosine", "linear")


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spaced(n, T=1000):
    """n ascending indices from 0 to T-1 (n = 1: the last)."""
    return torch.linspace(0, T - 1, n).round().long().tolist() if n > 1 else [T - 1]


# ----- 1. Schedules -----

def test_scaled_linear():
    """catches: linear in beta; a table shifted by one."""
    assert LDM.alpha_bar.dtype == torch.float64 and LDM.alpha_bar.shape == (1000,)
    assert_close(LDM.alpha_bar, golden("schedule")[0]["out/alphas_cumprod_float64"], 1e-12)
    known = {0: 0.9985, 1: 0.9969944271, 49: 0.9184478420, 99: 0.8250844393, 299: 0.4091116796, 499: 0.1158444908,
             949: 3.678913e-4, 999: 1.423040e-4}
    for t, value in known.items():
        assert float(LDM.alpha_bar[t]) == pytest.approx(value, rel=1e-6)


def test_cosine():
    """Nichol & Dhariwal Eq. 17 with beta capped at 0.999, as in the published CDM. catches: .008 misplaced; no cap."""
    ab = Schedule("cosine").alpha_bar
    assert_close(ab.log(), golden("schedule")[0]["out/cosine_alphas_cumprod_float64"].log(), 1e-12)
    for t in (0, 99, 499, 899):  # telescopes to f(t+1) / f(0) until the cap
        f = math.cos(((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert float(ab[t]) == pytest.approx(f, rel=1e-9)
    assert float(ab[999]) == pytest.approx(2.4e-9, rel=0.02)


def test_linear():
    """DDPM: beta from 1e-4 to 0.02. catches: a wrong end of the range; a missing step."""
    beta = torch.tensor([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)], dtype=torch.float64)
    assert_close(Schedule("linear").alpha_bar, (1 - beta).cumprod(0), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1000, 250])
def test_alpha_bar_falls(kind, T):
    ab = Schedule(kind, T).alpha_bar
    assert len(ab) == T and ab.dtype == torch.float64 and 0 < ab[-1] < ab[0] < 1 and (ab.diff() < 0).all()


def test_unknown_schedule():
    """"sqrt_linear" is a published word that means something else here."""
    with pytest.raises(ValueError, match="scaled_linear, cosine, linear"):
        Schedule("sqrt_linear")


# ----- 2. Forward process, loss, kinds of prediction -----

def test_q_sample():
    """Every sample gets its own t; -1 is clean. catches: sqrt left out; alpha_bar[t-1]; a batch that shares one t."""
    t = torch.tensor([0, 1, 500, 999, -1])
    z0, eps = rand(5, 3, 2, 4), rand(5, 3, 2, 4, seed=1)
    z_t = LDM.q_sample(z0, t, eps)
    for i, k in enumerate(t.tolist()):
        ab = 1.0 if k < 0 else float(LDM.alpha_bar[k])
        assert_close(z_t[i], ab ** 0.5 * z0[i] + (1 - ab) ** 0.5 * eps[i], 1e-12)
    assert LDM.q_sample(z0.float(), t, eps.float()).dtype == torch.float32


def prediction(pred, z0, eps, ab):
    return {"eps": eps, "x0": z0, "v": ab ** 0.5 * eps - (1 - ab) ** 0.5 * z0}[pred]


@pytest.mark.parametrize("pred", ["eps", "x0", "v"])
@pytest.mark.parametrize("k", [0, 500, 999])
def test_round_trip(pred, k):
    """From any prediction to x0 and eps. catches: + for -; ab and 1 - ab swapped."""
    z0, eps, ab = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1), LDM.alpha_bar[k]
    z_t = LDM.q_sample(z0, torch.full((2,), k), eps)
    for level in (float(ab), ab, ab.expand(2, 1, 1, 1)):
        out = prediction(pred, z0, eps, ab)
        assert_close(to_x0(out, z_t, level, pred), z0, 1e-10)
        assert_close(to_eps(out, z_t, level, pred), eps, 1e-10)


@pytest.mark.parametrize("pred", ["eps", "x0", "v"])
def test_loss(pred):
    """A perfect network has loss 0; a constant error gives its square, per sample; the second number is the error on
    eps whatever is predicted. catches: a target of another kind; a mean over the batch; a weight upside down."""
    t = torch.tensor([3, 400, 990])
    z0, eps = rand(3, 3, 4, 4), rand(3, 3, 4, 4, seed=1)
    ab = LDM.alpha_bar[t].view(-1, 1, 1, 1)
    off = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64).view(-1, 1, 1, 1)

    def fn(z_t, when):
        assert torch.equal(when, t) and torch.equal(z_t, LDM.q_sample(z0, t, eps))
        return prediction(pred, z0, eps, ab) + off
    loss, on_eps = diffusion_loss(fn, z0, t, eps, LDM, pred)
    assert_close(loss, off.flatten() ** 2, 1e-6)
    z_t = LDM.q_sample(z0, t, eps)
    error = to_eps(prediction(pred, z0, eps, ab) + off, z_t, ab, pred) - eps
    assert torch.allclose(on_eps.double(), error.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-9)


# ----- 3. Guidance -----

def test_guidance():
    """eps_null + guidance (eps_cond - eps_null); 1 is one conditional pass, exactly. catches: the published w
    convention, (1 + w) cond - w null; null and cond swapped; a null that is not zeros."""
    calls, z, t = [], rand(2, 3, 4, 4), torch.tensor([5, 900])

    def fn(z, t, c):
        calls.append(len(z))
        return torch.sin(z) * t.view(-1, 1, 1, 1) + c.sum((1, 2)).view(-1, 1, 1, 1)
    c = rand(2, 65, 8, seed=1)
    cond, null = fn(z, t, c), fn(z, t, torch.zeros_like(c))
    calls.clear()
    assert torch.equal(guided(fn, c, 1.0)(z, t), cond) and calls == [2]
    assert torch.equal(guided(fn, c)(z, t), cond)
    assert_close(guided(fn, c, 0.0)(z, t), null, 1e-12)
    assert_close(guided(fn, c, 2.5)(z, t), null + 2.5 * (cond - null), 1e-12)


# ----- 4. Steps -----

def test_ddim_timesteps():
    """catches: the missing + 1 (50 -> 0, 20, ..); linspace; 30 -> 30 steps."""
    g = golden("schedule")[0]
    for steps in (50, 20, 10, 30):
        assert list(map(int, ddim_timesteps(1000, steps))) == g[f"out/ddim{steps}_eta1_timesteps"].tolist()
    assert list(ddim_timesteps(1000, 1)) == [1] and list(ddim_timesteps(1000, 50))[-1] == 981
    assert list(ddim_timesteps(250, 50)) == list(range(1, 250, 5))


def test_ddim_timesteps_stay_in_the_table():
    """For any number of steps: at least as many ascending indices inside the table, or a clear refusal exactly where
    the published sampler raises IndexError."""
    refused = [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]
    for steps in range(1, 1001):
        if steps in refused:
            with pytest.raises(ValueError, match=f"{steps}"):
                ddim_timesteps(1000, steps)
        else:
            tau = list(ddim_timesteps(1000, steps))
            assert len(tau) >= steps and tau[0] == 1 and tau[-1] < 1000 and all(a < b for a, b in zip(tau, tau[1:]))
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError):
            ddim_timesteps(1000, steps)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [50, 20, 10, 30])
def test_ddim_coefficients(steps, eta):
    """One step at a time: network and noise set to 0 or 1 read the published alphas, alphas_prev and sigmas off the
    sampler. catches: any index off by one; an end at 1; eta squared; sigma without its second factor."""
    g, seen = golden("schedule")[0], []
    tau = g[f"out/ddim{steps}_eta1_timesteps"]
    a = g[f"out/ddim{steps}_eta1_alphas"].double()
    prev = g[f"out/ddim{steps}_eta1_alphas_prev"].double()
    sigma = g[f"out/ddim{steps}_eta{int(eta)}_sigmas"].double()
    one = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).view(3, 1, 1, 1)  # z, eps, noise in turn
    eps, xi = one.roll(1, 0), one.roll(2, 0)
    state = []

    def fn(z, t):
        assert z.shape == (3, 1, 1, 1) and t.shape == (3,) and t.dtype == torch.int64
        state.append(z.clone())
        return eps
    out = ddim_sample(fn, one, LDM, steps, eta, noise=xi.expand(len(tau), 3, 1, 1, 1),
                      callback=lambda i, t, z, z0_hat: seen.append((i, int(t), z.clone(), z0_hat.clone())))
    assert [s[1] for s in seen] == tau.flip(0).tolist() and [s[0] for s in seen] == list(range(len(tau)))
    for (_, _, z_next, z0_hat), z, k in zip(seen, state, reversed(range(len(tau)))):
        assert_close(z0_hat, (z - (1 - a[k]).sqrt() * eps) / a[k].sqrt(), 1e-6)
        want = prev[k].sqrt() * z0_hat + (1 - prev[k] - sigma[k] ** 2).sqrt() * eps + sigma[k] * xi
        assert_close(z_next, want, 1e-6)
    assert torch.equal(out, seen[-1][2])


# ----- 5. The published samplers -----

@pytest.fixture(scope="module")
def net():
    return UNet.from_official(state_dict("unet_small")).requires_grad_(False)


def run(net, guidance, sampler, **kw):
    """out: z, [z after each step], [z0_hat of each step]."""
    c, x_T, trace = golden("unet_small")[0]["in/context"], golden("ddim_small")[0]["in/x_T"], []
    z = sampler(guided(net, c, guidance), x_T, LDM, 10, callback=lambda i, t, z, z0: trace.append((z, z0)), **kw)
    return z, torch.stack([z for z, _ in trace]), torch.stack([z0 for _, z0 in trace])


def test_ddim_published(net):
    z, inter, x0 = run(net, 2.0, ddim_sample)
    assert_golden(inter, "ddim_small", "x_inter", 1e-4)
    assert_golden(x0, "ddim_small", "pred_x0", 1e-4)
    assert torch.equal(z, inter[-1])
    assert_golden(run(net, 1.0, ddim_sample)[0], "ddim_small", "noguidance_final", 1e-4)


def test_ddim_published_with_noise(net):
    """catches: noise taken in the wrong order; sqrt(1 - ab_prev) without - sigma^2."""
    noise = golden("ddim_small")[0]["in/eta1_noise"]
    z, inter, _ = run(net, 2.0, ddim_sample, eta=1.0, noise=noise)
    assert_golden(inter, "ddim_small", "eta1_x_inter", 1e-4)
    assert torch.equal(run(net, 2.0, ddim_sample, eta=1.0, noise=list(noise))[0], z)
    assert torch.equal(run(net, 2.0, ddim_sample, noise=noise)[0], run(net, 2.0, ddim_sample)[0])  # eta 0 has none


def test_plms_published(net):
    """catches: any coefficient of Adams-Bashforth; guidance after instead of before the extrapolation's memory."""
    z, inter, x0 = run(net, 2.0, plms_sample)
    assert_golden(inter, "plms_small", "x_inter", 1e-4)
    assert_golden(x0, "plms_small", "pred_x0", 1e-4)
    assert torch.equal(z, inter[-1])
    assert_golden(run(net, 1.0, plms_sample)[0], "plms_small", "noguidance_final", 1e-4)


# ----- 6. Oracles -----

def towards(mu, schedule, pred="eps"):
    """The exact network for data that is the single point mu, keyed by the t that it is given."""
    def fn(z, t):
        ab = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        eps = (z - ab.sqrt() * mu) / (1 - ab).sqrt()
        return prediction(pred, mu.expand_as(z), eps, ab)
    return fn


def expected_end(z_T, mu, schedule, start, end):
    """Where DDIM goes when the data is the point mu: eps stays what it was at the start."""
    ab = schedule.alpha_bar[start]
    last = 1.0 if end == "clean" else float(schedule.alpha_bar[0])
    return last ** 0.5 * mu + (1 - last) ** 0.5 * (z_T - ab.sqrt() * mu) / (1 - ab).sqrt()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pred", ["eps", "x0", "v"])
@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_point_mass(kind, pred, n):
    """Every z0_hat is mu, and so is the output. catches: alpha_bar[t-1] for alpha_bar[t] (off by .015 at 5 steps, 1.6
    at 1000, while the *output* stays exact); an end at alpha_bar[0] (off by .0387); a stop one step early."""
    schedule, mu, seen = Schedule(kind), rand(2, 3, 4, 6), []
    z_T = rand(2, 3, 4, 6, seed=1)
    steps = spaced(n)
    z = ddim_sample(towards(mu, schedule, pred), z_T, schedule, n, pred=pred, timesteps=steps, end="clean",
                    callback=lambda i, t, z, z0_hat: seen.append(float((z0_hat - mu).abs().max())))
    tol = 1e-6 if float(schedule.alpha_bar[-1]) > 1e-6 else 1e-5  # the cosine schedule ends at 2e-9
    assert len(seen) == n and max(seen) < tol and float((z - mu).abs().max()) < tol
    z = ddim_sample(towards(mu, schedule, pred), z_T, schedule, n, pred=pred, timesteps=steps, end="published")
    assert_close(z, expected_end(z_T, mu, schedule, steps[-1], "published"), 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 500])
def test_point_mass_default_steps(steps):
    mu, z_T, seen = rand(1, 3, 4, 4), rand(1, 3, 4, 4, seed=1), []
    z = ddim_sample(towards(mu, LDM), z_T, LDM, steps, end="clean",
                    callback=lambda i, t, z, z0_hat: seen.append(float((z0_hat - mu).abs().max())))
    assert max(seen) < 1e-6 and float((z - mu).abs().max()) < 1e-6
    top = 1 + (steps - 1) * (1000 // steps)
    for sampler in (ddim_sample, plms_sample)[:steps]:  # PLMS too (from two steps on): eps is constant on the way
        assert_close(sampler(towards(mu, LDM), z_T, LDM, steps), expected_end(z_T, mu, LDM, top, "published"), 1e-6)


def test_point_mass_with_noise():
    """Any eta, any noise: the end is mu. catches: noise added in the last step."""
    mu = rand(1, 3, 4, 4)
    for eta in (0.3, 1.0):
        torch.manual_seed(0)
        z = ddim_sample(towards(mu, LDM), rand(1, 3, 4, 4, seed=1), LDM, 20, eta, end="clean")
        assert float((z - mu).abs().max()) < 1e-6


MEAN, STD = 1.5, 0.3


def gaussian(z, t, schedule=LDM):
    """The exact eps for data N(MEAN, STD^2)."""
    ab = schedule.alpha_bar[t].view(-1, *[1] * (z.ndim - 1))
    return (1 - ab).sqrt() * (z - ab.sqrt() * MEAN) / (ab * STD ** 2 + 1 - ab)


def spread(sampler, **kw):
    """Mean and deviation of the output for z_T ~ N(0,1), exact: the samplers are linear in z_T here."""
    low, high = sampler(gaussian, torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1), LDM, **kw).flatten()
    return float(low + high) / 2, float(high - low) / 2


def flow(start, end):
    """The same for the exact probability flow from index `start` to alpha_bar = end."""
    a, var = float(LDM.alpha_bar[start]), end * STD ** 2 + 1 - end
    gain = (var / (a * STD ** 2 + 1 - a)) ** 0.5
    return end ** 0.5 * MEAN - gain * a ** 0.5 * MEAN, gain


def test_order_of_samplers():
    """Against the exact flow of data N(MEAN, STD^2) DDIM's error falls like 1/steps, PLMS's faster and from a lower
    level. catches: a wrong Adams-Bashforth coefficient whose sum is right; the update of Z Eq. 2 as printed."""
    def error(sampler, n):
        mean, std = spread(sampler, steps=n)
        want = flow(1 + (n - 1) * (1000 // n), float(LDM.alpha_bar[0]))
        return abs(std - want[1]) + abs(mean - want[0])
    ddim = [error(ddim_sample, n) for n in (50, 100, 200)]
    plms = [error(plms_sample, n) for n in (50, 100, 200)]
    assert 1.6 < ddim[0] / ddim[1] < 2.4 and 1.6 < ddim[1] / ddim[2] < 2.4, ddim
    assert all(p < d / 3 for p, d in zip(plms, ddim)) and plms[2] < plms[0] / 4, (plms, ddim)


class Spy:
    def __init__(self):
        self.t = []

    def __call__(self, z, t):
        assert t.dtype == torch.int64 and t.shape == (len(z),) and (t == t[0]).all()
        self.t.append(int(t[0]))
        return torch.zeros_like(z)


def test_spy():
    """What the network is asked. catches: a start at 999 or 980; a repeated or left out step; timesteps=tensor."""
    for n, start in ((50, 981), (20, 951), (10, 901), (30, 991), (1, 1)):
        spy = Spy()
        ddim_sample(spy, rand(3, 3, 2, 2), LDM, n)
        assert spy.t == list(ddim_timesteps(1000, n))[::-1] and spy.t[0] == start and spy.t[-1] == 1
    for steps in ([999], [0, 999], [3, 4, 7, 500], torch.tensor([0, 10, 20]), torch.tensor([0, 10, 20]).numpy()):
        spy = Spy()
        ddim_sample(spy, rand(1, 3, 2, 2), LDM, timesteps=steps)
        assert spy.t == [int(t) for t in steps][::-1]
    for n in (50, 10, 1):
        spy, tau = Spy(), list(ddim_timesteps(1000, n))[::-1]
        plms_sample(spy, rand(1, 3, 2, 2), LDM, n)
        assert spy.t == [tau[0], tau[min(1, n - 1)], *tau[1:]]  # the first step asks twice


# ----- 7. The whole model -----

@pytest.fixture(scope="module")
def model(net):
    torch.manual_seed(0)
    return ZoomLDM(VQVAE(VAEConfig(32, (1, 1, 1), 1, 16)), Summarizer(SummarizerConfig(16, 64, 1, 64, 5)), net,
                   latent_scale=2.0).eval().requires_grad_(False)


def test_model_guidance_with_cached_keys(model, net):
    """catches: cached keys of c and null in the wrong order."""
    g = golden("unet_small")[0]
    z, t, c = g["in/x"], g["in/t"], g["in/context"]
    for guidance in (1.0, 2.0, 3.5):
        assert_close(model.guided(c, guidance)(z, t), guided(net, c, guidance)(z, t), 2e-6)
    assert torch.equal(model.guided(c, 1.0)(z, t), net(z, t, c))


def test_samplers_keep_dtype_and_input():
    z_T = rand(2, 3, 4, 4, dtype=torch.float32)
    before = z_T.clone()
    for sampler in (ddim_sample, plms_sample):
        out = sampler(Spy(), z_T, LDM, 10)
        assert out.dtype == torch.float32 and out.shape == z_T.shape and torch.equal(z_T, before)


def test_model_sample(model, net):
    """An image depends on its seed and place in the batch alone. catches: noise drawn for the batch as a whole."""
    c = golden("unet_small")[0]["in/context"]
    a = model.sample(c, (16, 8), guidance=2.0, steps=2, seed=3)
    assert a.shape == (2, 3, 16, 8) and torch.equal(a, model.sample(c, (16, 8), guidance=2.0, steps=2, seed=3))
    assert not torch.equal(a, model.sample(c, (16, 8), guidance=2.0, steps=2, seed=4))
    assert_close(model.sample(c[:1], (16, 8), guidance=2.0, steps=2, seed=3), a[:1], 1e-5)
    p = model.sample(c, (16, 8), steps=2, sampler="plms")
    assert p.shape == a.shape and p.isfinite().all()
    with pytest.raises(ValueError, match="ddim, plms"):
        model.sample(c, (16, 8), sampler="euler")


def test_from_run_keeps_everything(model, tmp_path):
    """catches: a latent scale, prediction or note that is not written; a scale that only one direction knows."""
    two = ZoomLDM(model.vae, model.summarizer, model.unet, latent_scale=0.37, pred="x0", schedule="cosine",
                  info={"encoder": "stats", "std": [1.0, 2.5]})
    two.save(tmp_path)
    three = ZoomLDM.from_run(str(tmp_path))
    assert three.config() == two.config() and three.latent_scale == 0.37 and not three.training
    ours = three.state_dict()
    assert ours.keys() == two.state_dict().keys() and all(torch.equal(v, ours[k]) for k, v in two.state_dict().items())
    x = torch.rand(1, 3, 16, 16)
    assert_close(three.encode(x), model.encode(x) * 0.37 / 2, 1e-6)
    z = torch.randn(1, 3, 16, 16)
    assert_close(three.decode(z, quantize=False), model.decode(z / 0.37 * 2, quantize=False), 1e-6)


def test_draw_is_sample_decoded(model):
    """Patches in batches are those drawn at once. catches: noise that starts again with each batch."""
    c = golden("unet_small")[0]["in/context"].repeat(2, 1, 1)[:3]
    x = model.draw(c, 8, steps=2, seed=1, batch=2)
    want = model.decode(model.sample(c, (8, 8), steps=2, seed=1)).clamp(-1, 1)
    assert x.shape == want.shape and x.max() <= 1
    assert_close(x, want, 1e-4)


def test_model_needs_matching_widths(net):
    with pytest.raises(ValueError, match="64"):
        ZoomLDM(None, Summarizer(SummarizerConfig(16, 32, 1, 64, 5)), net)
