"""Inversion and super-resolution on a tiny run. "catches": code changes a test was seen to fail on."""
import pytest
import torch
from rule import assert_close

import invert as I
from common import UserError
from data import Pyramids, fixed_batch
from large.enlarge import agreement
from sample_joint import Resize, sample_levels
from summarizer import pack_grid, standardize

@pytest.fixture(scope="module")
def x(toy):
    return fixed_batch(Pyramids(toy), "test", 1, 2)["x"]

# ----- 1. Inversion -----

def test_constants_are_those_of_the_sources():
    """Z S8.3 and the published notebook (reference.md §8)."""
    assert (I.FIRST, I.LAST, I.LR, I.PRIOR) == (950, 50, 0.1, 0.05) and I.invert.__defaults__[0] == 200

def test_per_token_and_alike():
    """catches: statistics over the grid, not over channels; pairs without the diagonal; standardised first."""
    u = torch.randn(2, 7, 3, 4)
    e = I.per_token(u)
    assert_close(e, (u - u.mean(1, keepdim=True)) / u.std(1, keepdim=True), 1e-5)
    v = u.flatten(2).mT                                                                 # (2,12,7)
    pairs = torch.cosine_similarity(v[:, :, None], v[:, None], dim=-1)
    assert_close(I.alike(u), pairs.mean((1, 2)), 1e-5)

@pytest.mark.parametrize("s", [0, 1, 2])
@pytest.mark.parametrize("start", ["noise", "enlarged"])
def test_shapes(model, toy, s, start):
    e = I.invert(model, fixed_batch(Pyramids(toy), "test", s, 1)["x"], s, steps=1, start=start)
    assert e.shape == (1, 96, 2 ** s, 2 ** s) and not e.requires_grad
    assert_close(e, standardize(e), 1e-4)

def test_grids_over_eight_are_pooled_inside(model, x, monkeypatch):
    """A scale of 16 x 16 tiles: all of them get a gradient. catches: pooling the result instead."""
    monkeypatch.setattr(model.summarizer.cfg, "scales", 5)
    monkeypatch.setitem(model.summarizer._modules, "scale", torch.nn.Embedding(5, model.summarizer.cfg.width))
    a, b = (I.invert(model, x[0], 4, steps=n, start="noise") for n in (1, 2))
    assert a.shape == (96, 16, 16) and ((a - b).abs().amax(0) > 1e-3).all()

def test_one_step_is_that_of_the_source(model, x, monkeypatch):
    """Adam's first step moves every number by lr against the sign of the gradient of w |eps_hat - eps|^2 - 0.05 cos.
    catches: another weight, the sign of the prior, the condition of another scale, guidance."""
    u = torch.randn(1, 96, 2, 2)
    monkeypatch.setattr("large.enlarge.beginning", lambda *args: (u.clone(), 0.1))
    got = I.invert(model, x[:1], 1, steps=1, seed=3)
    v, t = u.clone().requires_grad_(), torch.tensor([950])
    z, eps = model.encode(x[:1]), torch.randn(1, 3, 16, 16, generator=I.generator(3, 1))
    tokens, mask = pack_grid(standardize(v[0]))
    c, ab = model.summarizer(tokens[None], mask[None], torch.tensor([1])), model.schedule.alpha_bar[950]
    loss = (ab.sqrt() * (1 - ab)).float() * (model.eps(model.schedule.q_sample(z, t, eps), t, c) - eps).square().mean()
    w = v.flatten(2)[0].T
    loss = loss - 0.05 * torch.cosine_similarity(w[:, None], w[None], dim=-1).mean()
    grad, = torch.autograd.grad(loss, v)
    sure = grad.abs() > 1e-2 * grad.abs().mean()
    want = I.per_token(u - 0.1 * grad / (grad.abs() + 1e-8))
    assert (got - want)[sure].abs().median() < 1e-3 and ((got - want).abs() < 0.01)[sure].double().mean() > 0.98

def test_the_seed_decides_alone(model, x):
    """catches: noise from the global generator; noise that depends on the place in the batch or on its size."""
    whole = I.invert(model, x, 1, steps=3, seed=1, start="noise")
    torch.randn(3)
    assert_close(I.invert(model, x[1], 1, steps=3, seed=1, start="noise"), whole[1], 2e-3)
    assert_close(I.invert(model, x, 1, steps=3, seed=1, start="noise", batch=1), whole, 2e-3)
    assert torch.equal(I.invert(model, x, 1, steps=3, seed=1, start="noise"), whole)
    assert (I.invert(model, x, 1, steps=3, seed=2, start="noise") - whole).abs().mean() > 0.5
    assert all(p.grad is None for p in model.parameters())

def test_it_explains_the_image_better(model, x):
    """On noise and time steps not used in the fit. catches: a step uphill, a gradient that does not reach u."""
    z, losses = model.encode(x), []
    for steps in (1, 40):
        e = I.invert(model, x, 1, steps=steps, start="noise")
        with torch.no_grad():
            losses.append(sum(float(I.eps_error(model, e, 1, z, t, torch.randn(
                z.shape, generator=torch.Generator().manual_seed(t))).mean()) for t in range(60, 950, 99)))
    assert losses[1] < 0.998 * losses[0], losses

def test_larger_images_share_their_tiles(model):
    """5 x 7 tiles under windows of 4 x 4: one embedding each, and all move. catches: windows of the wrong pixels."""
    big = I.to_tiles(torch.rand(3, 70, 100) * 2 - 1, 2, 64)
    assert big.shape == (3, 80, 112)
    a, b = (I.invert(model, big, 2, steps=n, start="noise") for n in (1, 2))
    assert a.shape == (96, 5, 7) and ((a - b).abs().amax(0) > 1e-3).all()

def test_what_does_not_fit_is_refused(model, x):
    for shape, s in (((3, 64, 60), 2), ((3, 48, 64), 1), ((1, 64, 64), 1), ((3, 64, 64), 9)):
        with pytest.raises(UserError, match="tiles|scale"):
            I.invert(model, torch.zeros(shape), s, steps=1)
    for bad in (x[0].byte(), x[0] * torch.nan, x[0, 0]):
        with pytest.raises(UserError, match="finite numbers|give \\(B,3,H,W\\)"):
            I.invert(model, bad, 1, 1)
    with pytest.raises(UserError, match="steps=-1"):
        I.invert(model, x, 1, -1)
    for s, target in ((0, 0), (1, 1), (1, 2)):
        with pytest.raises(UserError, match="finer"):
            I.super_resolve(model, x, s, target=target)

# ----- 2. Super-resolution -----

def test_mirrored_up_to_tiles():
    x = torch.arange(12.0).view(1, 3, 4)
    y = I.to_tiles(x, 1, 8)
    assert y.shape == (1, 8, 8) and torch.equal(y[:, :3, :4], x)
    assert torch.equal(y[:, 3:6, :4], x.flip(1)) and torch.equal(y[:, :3, 4:], x.flip(2))
    assert torch.equal(I.to_tiles(y, 1, 8), y) and I.to_tiles(torch.ones(3, 1, 1), 2, 64).shape == (3, 64, 64)

@pytest.mark.parametrize("kind, factor", [("bicubic", 2), ("bicubic", 4), ("box", 4), ("bicubic", 16)])
def test_projection_is_exact_and_small(kind, factor):
    """After 8-bit rounding, too, and no other image that reduces to y is nearer. catches: A^T without the inverse, one
    axis left out."""
    A, x = Resize(factor, kind), 0.2 * torch.rand(1, 3, 64, 96) - 0.1
    y = 0.2 * torch.rand(1, 3, 64 // factor, 96 // factor) - 0.1
    p = I.project(A, x, y)
    assert p.dtype == x.dtype and (A.down(p.double()) - y).abs().max() < 1e-6
    assert agreement(p, y, kind) > 48
    other = I.project(A, p + 0.1 * torch.randn(x.shape), y)
    assert (p - x).norm() < (other - x).norm() and abs(((p - x) * (other - p)).sum()) < 1e-3, "not the nearest"

def test_projection_of_what_cannot_be():
    """A checkerboard of black and white: as near as [-1,1] allows, and never beyond."""
    y = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).mul(2.0).sub(1).expand(1, 3, 8, 8)
    x = torch.zeros(1, 3, 32, 32)
    p = I.project(Resize(4), x, y)
    once = I.project(Resize(4), x, y, rounds=1)
    assert p.abs().max() <= 1
    assert (Resize(4).down(p) - y).norm() < (Resize(4).down(once) - y).norm()

def test_any_size_and_every_condition(model, x, monkeypatch):
    """An image of odd sides under no, inferred and true conditions; the result reduces to it. Of models that do not say
    their patch, as published ones, it is what a small image holds. catches: a border that was mirrored and is not cut
    off; 64 pixels here, 256 there."""
    y = x[:1, :, :50, :61]
    grids = None, I.invert(model, I.to_tiles(y, 1, 64), 1, 2), torch.randn(1, 96, 2, 2)
    null, *others = images = [I.super_resolve(model, y, 1, e, steps=1) for e in grids]
    assert min((image - null).abs().mean() for image in others) > 0.003
    assert agreement(I.project(Resize(2), null, y), y) >= 48 > agreement(null, y)
    monkeypatch.setattr(model, "info", {})
    for image in (*images, I.super_resolve(model, y, 1, steps=1)):
        assert image.shape == (1, 3, 100, 122) and image.isfinite().all() and image.abs().max() <= 1

def test_the_image_is_the_target(model, x, monkeypatch):
    """One level, guided at every step by the image itself, mirrored to whole tiles. catches: no constraint at all."""
    seen = []

    def spy(levels, *args, **options):
        seen.append((levels, options))
        return sample_levels(levels, *args, **options)
    monkeypatch.setattr(I, "sample_levels", spy)
    batch = I.super_resolve(model, x, 1, steps=1)
    assert batch.shape == (2, 3, 128, 128) and len(seen) == 2
    (level,), options = seen[1]
    assert level.A.factor == 2 and torch.equal(level.y, x[1:]) and options["lam"] == 1.0
    assert level.canvas.overlap == 0 and level.between.canvas.h == level.canvas.h + 16 and level.canvas.fade
    assert_close(I.super_resolve(model, x[1:], 1, steps=1), batch[1:], 0.02)
