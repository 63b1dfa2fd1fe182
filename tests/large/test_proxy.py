"""The proxy of A Dec: it learns from the decoder, is the same every time, and comes back from its file."""
import pytest
import torch
import torch.nn.functional as F

from common import Ranks, UserError, load_tensors, save_tensors
from diffusion import ZoomLDM
from large import proxy as proxies
from sample_joint import Canvas, Level, Resize

RANKS = Ranks(0, 1, torch.device("cpu"), None)

@pytest.fixture(scope="module")
def trained(run, pyramids):
    return ZoomLDM.from_run(run), pyramids

@pytest.fixture(scope="module")
def fitted(trained):
    """out: a proxy, and the estimates that it was fitted to."""
    lesson = proxies.lesson(*trained, "train", 32, 2.0, 1, RANKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxies, "lesson", lambda *args: lesson)
        return proxies.fit(*trained, RANKS, n=32, steps=40, batch=16), lesson[0]

def test_lesson_is_the_reduced_decode(trained, monkeypatch):
    """What the constraint would see of estimates at every t; at t = 0 the estimate is the latent itself. Catches: a
    decode of z_t, a target reduced by another operator, test patches of the training set."""
    model, pyramids = trained
    z, x = proxies.lesson(model, pyramids, "test", 2, 2.0, 1, RANKS)
    assert z.shape == x.shape == (2, 3, 16, 16)
    again, other = (proxies.lesson(model, pyramids, "test", 2, 2.0, seed, RANKS)[0] for seed in (1, 2))
    assert torch.equal(z, again) and not torch.equal(z, other)
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.zeros(size, dtype=torch.long))
    clean, _ = proxies.lesson(model, pyramids, "test", 33, 1.0, 1, RANKS)
    data = proxies.PatchDataset(pyramids, "test", 1, want=("x",))
    with torch.no_grad():
        assert torch.allclose(x, Resize(4).down(model.decode(z)), atol=1e-5)
        real = model.encode(torch.stack([data[k]["x"] for k in (0, 1, 31, 32)]))
    assert (clean[[0, 1, 31, 32]] - real).square().mean() < 0.01 * real.square().mean()

def test_fitting_lowers_the_error_on_held_out_estimates(trained, fitted):
    """Against an untrained proxy, and against always saying the mean picture."""
    model, pyramids = trained
    z, x = proxies.lesson(model, pyramids, "test", 16, 2.0, 2, RANKS)
    torch.manual_seed(0)
    with torch.no_grad():
        found, untrained = (F.mse_loss(proxy(z), x) for proxy in (fitted[0], proxies.Proxy(model.vae.factor)))
    assert found < 0.5 * untrained and found < (x - x.mean((0, 2, 3), keepdim=True)).square().mean()
    assert not fitted[0].training and not any(p.requires_grad for p in fitted[0].parameters())

def test_inverse(fitted):
    """(mean of J^T J + damping)^-1, with J what an even change of a latent's channel does to a pixel. Catches: J
    transposed, a step that is not divided out, and the mean of J, in which changes up and down cancel: its inverse is
    too large, and corrections overshoot until colours burn."""
    proxy, z = fitted
    J = torch.stack([(proxy(z + 0.05 * d[:, None, None]) - proxy(z)) / 0.05 for d in torch.eye(3)])     # (3,n,3,h,w)
    G = torch.tensor([[(a * b).sum(1).mean() for b in J] for a in J])
    damped = G + 0.04 * torch.linalg.matrix_norm(G, 2) * torch.eye(3)
    assert torch.allclose(proxy.inverse @ damped, torch.eye(3), atol=1e-3)
    M = J.mean((1, 3, 4))                                                                               # (3,3)
    assert torch.trace(M @ M.T) < 0.95 * torch.trace(G)

def test_fitting_is_deterministic(trained):
    """Whatever random numbers were drawn before."""
    states = []
    for _ in range(2):
        states.append(proxies.fit(*trained, RANKS, n=8, steps=3, batch=4).state_dict())
        torch.randn(7)
    a, b = states
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_saved_and_loaded(trained, tmp_path, monkeypatch, capsys):
    """Fitted once; the second time it comes from the file, the same to the bit, and needs no data. catches: a folder
    asked for and not read."""
    with pytest.raises(UserError, match="no data to fit one to: give --data="):
        proxies.load(tmp_path, trained[0], None, RANKS)
    calls = []

    def fit(*args, **settings):
        calls.append(settings)
        return proxies.Proxy(4).eval().requires_grad_(False)
    monkeypatch.setattr(proxies, "fit", fit)
    first, second = proxies.load(tmp_path, *trained, RANKS), proxies.load(tmp_path, trained[0], None, RANKS)
    assert calls == [{}] and f"wrote {tmp_path / 'proxy.safetensors'}" in capsys.readouterr().out
    z = torch.randn(2, 3, 16, 16)
    assert torch.equal(first(z), second(z)) and second.factor == 4
    assert not second.training and not any(p.requires_grad for p in second.parameters())
    assert load_tensors(tmp_path / "proxy.safetensors")[0].keys() == first.state_dict().keys()

@pytest.mark.parametrize("tensors", [{}, {"w": torch.zeros(3)}, proxies.Proxy(width=16).state_dict()])
def test_a_foreign_file(trained, tmp_path, tensors):
    save_tensors(tmp_path / "proxy.safetensors", tensors, proxies.mark(trained[0]))
    with pytest.raises(UserError, match="proxy.safetensors does not fit.*remove it"):
        proxies.load(tmp_path, *trained, RANKS)

def test_the_window_is_seen_as_a_whole():
    """Its mean and deviation reach every pixel, as GroupNorm's do, plain windows included."""
    proxy, z = proxies.Proxy(), torch.randn(1, 3, 32, 32)
    far = z.clone()
    far[..., :2, :2] += 1
    assert (proxy(far) - proxy(z)).abs()[..., 20:, 20:].min() > 0 and proxy(0 * z).isfinite().all()

def test_nothing_far_away_pulls_at_a_latent_that_stands_out():
    """A residual has no gradient for latents that the convolutions there do not see. Catches: one through the mean or
    the deviation of the window, which drove such latents on until red squares stood on bare glass, most where windows
    overlap and each of them pulls, and turned white areas pink."""
    torch.manual_seed(0)
    proxy, z = proxies.Proxy(), 0.01 * torch.randn(1, 3, 16, 16)
    z[..., 3, 3] += 2
    grad, = torch.autograd.grad(proxy(z.requires_grad_())[..., 12:, 12:].sum(), z)
    assert grad[..., 12:, 12:].abs().min() > 0 and grad[..., :9, :].abs().max() == 0

def test_a_correction_goes_on_until_most_of_the_error_is_gone(fitted):
    """By one call of the guide, from one image to another. catches: one pass, which leaves what is sharp as it is:
    outlines that the context does not have stood in bare glass."""
    proxy, z = fitted
    z0, canvas = z[:1], Canvas(*z.shape[2:], z.shape[2])
    level = Level(None, None, None, canvas, z0, Resize(4), proxy=proxy, target=proxy(z[1:2]))
    level.z0_hat = lambda z, t, ab: (z, z)
    _, moved, _ = proxies.guide(level, z0, 500, 0.5, 1, 0.4, 0, 0)
    before, after = (F.mse_loss(proxy(z), level.target) for z in (z0, moved))
    assert after < 0.4 * before
