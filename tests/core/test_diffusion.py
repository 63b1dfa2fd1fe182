"""Schedules, DDIM, PLMS, guidance: against the published samplers (tests/golden) and against closed forms.

A single point as data finds a wrong end and a table index that is not the network's. Each docstring ends with small
changes of the code that the test is meant to fail on ("catches: ...").
"""
import pytest
import torch
from rule import assert_close, assert_golden, golden, small

from common import generator
from diffusion import Schedule, ZoomLDM, ddim_sample, ddim_timesteps, diffusion_loss, dpm_sample, even_timesteps
from diffusion import guided, lean_timesteps, plms_sample, to_eps, to_x0
from summarizer import Summarizer, SummarizerConfig
from zoom_vae import VQVAE, VAEConfig

LDM = Schedule("scaled_linear")
KINDS = ("scaled_linear", "cosine", "linear")

def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

# ----- 1. Schedules -----

def test_schedules():
    """catches: linear in beta; a table shifted by one; .008 misplaced or no cap in the cosine; a wrong end of beta."""
    g = golden("schedule")[0]
    assert_close(LDM.alpha_bar, g["out/alphas_cumprod_float64"], 1e-12)
    assert_close(Schedule("cosine").alpha_bar.log(), g["out/cosine_alphas_cumprod_float64"].log(), 1e-12)
    beta = torch.tensor([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)], dtype=torch.float64)
    assert_close(Schedule("linear").alpha_bar, (1 - beta).cumprod(0), 1e-12)
    for kind in KINDS:
        ab = Schedule(kind, 250).alpha_bar
        assert len(ab) == 250 and ab.dtype == torch.float64 and 0 < ab[-1] < ab[0] < 1 and (ab.diff() < 0).all()
    with pytest.raises(ValueError, match="scaled_linear, cosine, linear"):
        Schedule("sqrt_linear")                            # a published word that means something else here

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
def test_loss(pred):
    """From any prediction to x0 and eps. A perfect network has loss 0; a constant error gives its square, per sample;
    the second number is the error on eps whatever is predicted. catches: + for -; ab and 1 - ab swapped; a target of
    another kind; a mean over the batch; a weight upside down."""
    t = torch.tensor([3, 400, 990])
    z0, eps = rand(3, 3, 4, 4), rand(3, 3, 4, 4, seed=1)
    ab, z_t = LDM.alpha_bar[t].view(-1, 1, 1, 1), LDM.q_sample(z0, t, eps)
    off = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64).view(-1, 1, 1, 1)
    out = prediction(pred, z0, eps, ab)
    assert_close(to_x0(out, z_t, ab, pred), z0, 1e-10)
    assert_close(to_eps(out, z_t, ab, pred), eps, 1e-10)
    assert_close(to_x0(out[:1], z_t[:1], float(ab[0]), pred), z0[:1], 1e-10)

    def fn(noised, when):
        assert torch.equal(when, t) and torch.equal(noised, z_t)
        return out + off
    loss, on_eps = diffusion_loss(fn, z0, t, eps, LDM, pred)
    assert_close(loss, off.flatten() ** 2, 1e-6)
    error = to_eps(out + off, z_t, ab, pred) - eps
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
    """The published indices; any other number of steps gives ascending ones inside the table, or is refused exactly
    where the published sampler raises IndexError. catches: the missing + 1 (50 -> 0, 20, ..); linspace; 30 -> 30."""
    g = golden("schedule")[0]
    for steps in (50, 20, 10, 30):
        assert list(map(int, ddim_timesteps(1000, steps))) == g[f"out/ddim{steps}_eta1_timesteps"].tolist()
    assert list(ddim_timesteps(250, 50)) == list(range(1, 250, 5))
    refused = [-1, 0, 3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1002)]
    for steps in range(-1, 1002):
        if steps in refused:
            with pytest.raises(ValueError, match=f"{steps}"):
                ddim_timesteps(1000, steps)
        else:
            tau = list(ddim_timesteps(1000, steps))
            assert len(tau) >= steps and tau[0] == 1 and tau[-1] < 1000 and all(a < b for a, b in zip(tau, tau[1:]))

def test_own_commands_draw_in_as_many_steps_as_are_asked_for():
    """Catches: 56 steps for 53; other times than the published ones where those exist."""
    for steps in range(1, 1001):
        tau = even_timesteps(1000, steps)
        assert len({*tau}) == steps and tau == sorted(tau) and 0 <= tau[0] and tau[-1] <= 999
        if 1000 % steps == 0 and steps <= 500:
            assert tau == ddim_timesteps(1000, steps)
        if steps <= 250:
            lean = lean_timesteps(1000, steps)
            assert len({*lean}) == steps and lean == sorted(lean) and lean[0] in (1, 999) and lean[-1] == 999
    for table, most in ((even_timesteps, 1000), (lean_timesteps, 250)):
        for steps in (0, most + 1):
            with pytest.raises(ValueError, match=f"give 1 to {most}"):
                table(1000, steps)

# ----- 5. The published samplers -----

@pytest.mark.parametrize("name, sampler, key", [("ddim_small", ddim_sample, ""), ("ddim_small", ddim_sample, "eta1_"),
                                                ("plms_small", plms_sample, "")])
def test_published_samplers(name, sampler, key):
    """catches: noise in the wrong order; sqrt(1 - ab_prev) without - sigma^2; any coefficient of Adams-Bashforth;
    guidance after instead of before the extrapolation's memory."""
    net, c = small("unet_small"), golden("unet_small")[0]["in/context"]
    trace, g = [], golden("ddim_small")[0]
    more = {"eta": 1.0, "noise": g["in/eta1_noise"]} if key else {}
    z = sampler(guided(net, c, 2.0), g["in/x_T"], LDM, 10, callback=lambda i, t, z, z0: trace.append((z, z0)), **more)
    assert_golden(torch.stack([z for z, _ in trace]), name, f"{key}x_inter", 1e-4)
    assert torch.equal(z, trace[-1][0])
    if not key:
        assert_golden(torch.stack([z0 for _, z0 in trace]), name, "pred_x0", 1e-4)
        assert_golden(sampler(guided(net, c), g["in/x_T"], LDM, 10), name, "noguidance_final", 1e-4)

# ----- 6. Oracles -----

def towards(mu, schedule, pred="eps"):
    """The exact network for data that is the single point mu, keyed by the t that it is given."""
    def fn(z, t):
        ab = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        eps = (z - ab.sqrt() * mu) / (1 - ab).sqrt()
        return prediction(pred, mu.expand_as(z), eps, ab)
    return fn

@pytest.mark.parametrize("kind, pred", [("scaled_linear", "eps"), ("scaled_linear", "v"), ("cosine", "x0"),
                                        ("cosine", "v"), ("linear", "eps")])
def test_point_mass(kind, pred):
    """Every z0_hat is mu, and so is the end, or what the published end leaves of the noise. catches: alpha_bar[t-1] for
    alpha_bar[t], which shows in z0_hat alone; a stop one step early; noise in the last step; PLMS's end."""
    schedule, mu, z_T = Schedule(kind), rand(2, 3, 4, 6), rand(2, 3, 4, 6, seed=1)
    net = towards(mu, schedule, pred)
    for steps in ([999], torch.linspace(0, 999, 37).round().long().tolist()):
        for eta in (0.0, 0.3):
            seen = []
            z = ddim_sample(net, z_T, schedule, eta=eta, pred=pred, timesteps=steps, end="clean",
                            callback=lambda i, t, z, z0_hat, seen=seen: seen.append(z0_hat - mu))
            assert len(seen) == len(steps) and torch.stack([z - mu, *seen]).abs().max() < 1e-5
    z = dpm_sample(net, z_T, schedule, steps, pred, callback=lambda i, t, z, z0_hat: seen.append(z0_hat - mu))
    assert torch.stack([z - mu, *seen]).abs().max() < 1e-5
    ab, last = schedule.alpha_bar[ddim_timesteps(1000, 50)[-1]], schedule.alpha_bar[0]
    want = last.sqrt() * mu + (1 - last).sqrt() * (z_T - ab.sqrt() * mu) / (1 - ab).sqrt()
    assert_close(ddim_sample(net, z_T, schedule, 50, pred=pred), want, 1e-5)
    if pred == "eps":
        assert_close(plms_sample(net, z_T, schedule, 50), want, 1e-5)

def test_what_the_network_is_asked():
    """catches: a start at 999 or 980; a step left out; timesteps=tensor; another dtype; an input written into."""
    asked, z_T = [], rand(3, 3, 2, 2, dtype=torch.float32)

    def spy(z, t):
        assert t.dtype == torch.int64 and t.shape == (len(z),) and (t == t[0]).all()
        asked.append(int(t[0]))
        return torch.zeros_like(z)
    for n in (50, 10, 1):
        tau = list(ddim_timesteps(1000, n))[::-1]
        for sampler, want in ((ddim_sample, tau), (plms_sample, [tau[0], tau[min(1, n - 1)], *tau[1:]])):
            asked.clear()
            assert sampler(spy, z_T, LDM, n).dtype == torch.float32 and asked == want     # PLMS asks twice at first
    for steps in ([3, 4, 7, 500], torch.tensor([0, 10, 20]), torch.tensor([0, 10, 20]).numpy()):
        asked.clear()
        ddim_sample(spy, z_T, LDM, timesteps=steps)
        assert asked == [int(t) for t in steps][::-1]
    assert torch.equal(z_T, rand(3, 3, 2, 2, dtype=torch.float32))

# ----- 7. The whole model -----

@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    parts = VQVAE(VAEConfig(32, (1, 1, 1), 1, 16)), Summarizer(SummarizerConfig(16, 64, 1, 64, 5)), small("unet_small")
    return ZoomLDM(*parts, latent_scale=2.0).eval().requires_grad_(False)

def test_model_sample(model):
    """An image depends on its seed and place in the batch alone. catches: cached keys of c and null in the wrong order;
    noise drawn for the batch as a whole."""
    g, net = golden("unet_small")[0], model.unet
    z, t, c = g["in/x"], g["in/t"], g["in/context"]
    assert_close(model.guided(c, 2.0)(z, t), guided(net, c, 2.0)(z, t), 2e-6)
    assert torch.equal(model.guided(c, 1.0)(z, t), net(z, t, c))
    a = model.sample(c, (16, 8), guidance=2.0, steps=2, seed=3)
    assert a.shape == (2, 3, 16, 8) and torch.equal(a, model.sample(c, (16, 8), guidance=2.0, steps=2, seed=3))
    assert not torch.equal(a, model.sample(c, (16, 8), guidance=2.0, steps=2, seed=4))
    assert_close(model.sample(c[:1], (16, 8), guidance=2.0, steps=2, seed=3), a[:1], 1e-5)
    x = model.draw(c, 8, steps=2, seed=3, batch=1)                                # patches, in batches
    assert_close(x, model.decode(model.sample(c, (8, 8), steps=2, seed=3)).clamp(-1, 1), 1e-4)
    for sampler in ("plms", "dpm"):
        p = model.sample(c, (16, 8), steps=2, sampler=sampler)
        assert p.shape == a.shape and p.isfinite().all()
    with pytest.raises(ValueError, match="ddim, plms"):
        model.sample(c, (16, 8), sampler="euler")
    with pytest.raises(ValueError, match="64"):
        ZoomLDM(None, Summarizer(SummarizerConfig(16, 32, 1, 64, 5)), net)

def test_dpm_asks_the_null_branch_where_it_counts(model, monkeypatch):
    """Inside of the span two rows an image, outside one; as `dpm_sample` by hand. catches: a span without its ends."""
    c, rows, real = golden("unet_small")[0]["in/context"], [], model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda z, t, c: rows.append((int(t[0]), len(z))) or real(z, t, c))
    z = model.sample(c, (8, 8), 2.0, 10, sampler="dpm")
    tau = [1, 14, 52, 114, 200, 311, 447, 606, 790, 999]
    assert rows == [(t, len(c) * (2 if 100 <= t < 800 else 1)) for t in tau[::-1]]
    z_T = torch.stack([torch.randn(3, 8, 8, generator=generator(0, i)) for i in range(len(c))])
    fn = model.guided(c, 2.0, (100, 800))
    assert torch.equal(z, dpm_sample(fn, z_T, model.schedule, tau))

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
