"""Inversion and super-resolution on a tiny run. "catches": code changes a test was seen to fail on."""
import math

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401 - puts the repository on the path
from PIL import Image
from rule import assert_close

import invert as I
from common import UserError, load_tensors
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM
from experiments import sr as sr_table
from experiments.sr_trained import Trained
from large import proxy as proxies
from large import windows
from invert import project
from sample_joint import Resize, sample_levels
from slides.encoders import load_encoder
from summarizer import standardize

FAST = ["--device=cpu", "--amp=False", "--steps=2", "--invert_steps=2", "--scale=1"]


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


def test_grids_over_eight_are_pooled_inside(model, x):
    """A scale of 16 x 16 tiles: all of them get a gradient. catches: pooling the result instead."""
    model.summarizer.cfg.scales, scales = 5, model.summarizer.cfg.scales
    weight = model.summarizer.scale.weight
    model.summarizer.scale.weight = torch.nn.Parameter(weight.new_zeros(5, weight.shape[1]), requires_grad=False)
    try:
        a, b = (I.invert(model, x[0], 4, steps=n, start="noise") for n in (1, 2))
    finally:
        model.summarizer.cfg.scales, model.summarizer.scale.weight = scales, weight
    assert a.shape == (96, 16, 16) and ((a - b).abs().amax(0) > 1e-3).all()


def test_one_step_is_that_of_the_source(model, x, monkeypatch):
    """Adam's first step moves every number by lr against the sign of the gradient of w |eps_hat - eps|^2 - 0.05 cos.
    catches: another weight, the sign of the prior, the condition of another scale, guidance."""
    u = torch.randn(1, 96, 2, 2)
    monkeypatch.setattr(I, "beginning", lambda *args: (u.clone(), 0.1))
    got = I.invert(model, x[:1], 1, steps=1, seed=3)
    v, t = u.clone().requires_grad_(), torch.tensor([950])
    z, eps = model.encode(x[:1]), torch.randn(1, 3, 16, 16, generator=I.generator(3, 1))
    tokens, mask = I.pack_grid(standardize(v[0]))
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


def test_enlarged_start_is_the_encoder_of_the_tiles(model, toy):
    """An image that is smooth loses nothing when halved: its tiles, embedded. catches: tiles in the wrong order."""
    a = torch.linspace(-0.6, 0.6, 128)
    fine = torch.stack([a[:, None] * a, a[None] + 0 * a[:, None], -a[:, None] + 0 * a])[None]     # (1,3,128,128)
    e, lr = I.beginning(model, Resize(2).down(fine), (2, 2), 1, 0)
    encoder = load_encoder("stats", model.info["std"])
    tiles = [[fine[..., i:i + 64, j:j + 64] for j in (0, 64)] for i in (0, 64)]
    want = torch.stack([torch.stack([encoder((t + 1) / 2)[0] for t in row], 1) for row in tiles], 1)  # (E,2,2)
    d = torch.cdist(e[0].flatten(1).T, standardize(want).flatten(1).T)
    assert d.argmin(1).tolist() == [0, 1, 2, 3] and lr == I.LR_NEAR


def test_larger_images_share_their_tiles(model):
    """5 x 7 tiles under windows of 4 x 4: one embedding each, and all move. catches: windows of the wrong pixels."""
    big = I.to_tiles(torch.rand(3, 70, 100) * 2 - 1, 2, 64)
    assert big.shape == (3, 80, 112)
    a, b = (I.invert(model, big, 2, steps=n, start="noise") for n in (1, 2))
    assert a.shape == (96, 5, 7) and ((a - b).abs().amax(0) > 1e-3).all()


@pytest.mark.parametrize("shape, s", [((3, 64, 60), 2), ((3, 48, 64), 1), ((1, 64, 64), 1), ((3, 64, 64), 9)])
def test_what_does_not_fit_is_refused(model, shape, s):
    with pytest.raises(UserError, match="tiles|scale"):
        I.invert(model, torch.zeros(shape), s, steps=1)


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
    p = project(A, x, y)
    assert p.dtype == x.dtype and (A.down(p.double()) - y).abs().max() < 1e-6
    assert I.agreement(p, y, kind) > 48
    other = project(A, p + 0.1 * torch.randn(x.shape), y)
    assert (p - x).norm() < (other - x).norm() and abs(((p - x) * (other - p)).sum()) < 1e-3, "not the nearest"


def test_projection_of_what_cannot_be():
    """A checkerboard of black and white: as near as [-1,1] allows, and never beyond."""
    y = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).mul(2.0).sub(1).expand(1, 3, 8, 8)
    x = torch.zeros(1, 3, 32, 32)
    p = project(Resize(4), x, y)
    once = project(Resize(4), x, y, rounds=1)
    assert p.abs().max() <= 1
    assert (Resize(4).down(p) - y).norm() < (Resize(4).down(once) - y).norm()


@pytest.fixture(scope="module")
def drawn(model, x):
    """Three conditions of one image of odd sides, without projection."""
    y = x[0, :, :50, :61]
    options = dict(steps=2, invert_steps=2, back=False)
    return y, {c: I.super_resolve(model, y, 1, 0, c, torch.randn(96, 2, 2) if c == "gt" else None, **options)
               for c in ("infer", "null", "gt")}


def test_any_size_and_every_condition(drawn):
    y, images = drawn
    assert all(v.shape == (3, 100, 122) and v.isfinite().all() and v.abs().max() <= 1 for v in images.values())
    assert (images["infer"] - images["null"]).abs().mean() > 0.01 < (images["gt"] - images["null"]).abs().mean()


def test_the_result_reduces_to_the_image(model, drawn):
    """catches: a projection before the border is cut off, whose mirror lies elsewhere."""
    y, images = drawn
    exact = I.super_resolve(model, y, 1, 0, "null", steps=2)
    assert_close(exact, project(Resize(2), images["null"], y), 0.05)
    assert I.agreement(exact[None], y[None]) >= 48 > I.agreement(images["null"][None], y[None])


def test_the_image_is_the_target(model, x, monkeypatch):
    """One level, guided at every step by the image itself, mirrored to whole tiles. catches: no constraint at all."""
    seen = []
    monkeypatch.setattr(I, "sample_levels", lambda levels, *args, **options: (
        seen.append((levels, options)), sample_levels(levels, *args, **options))[1])
    batch = I.super_resolve(model, x, 1, 0, "null", steps=1, back=False)
    assert batch.shape == (2, 3, 128, 128) and len(seen) == 2
    (level,), options = seen[1]
    assert level.A.factor == 2 and torch.equal(level.y, x[1:]) and options["lam"] == 0.3
    assert level.canvas.overlap == 4 and level.canvas.fade
    assert_close(I.super_resolve(model, x[1], 1, 0, "null", steps=1, back=False), batch[1], 0.02)


def test_no_finer_scale(model, x):
    for s, target in ((0, 0), (1, 1), (1, 2)):
        with pytest.raises(UserError, match="finer"):
            I.super_resolve(model, x, s, target)
    with pytest.raises(UserError, match="condition"):
        I.super_resolve(model, x, 1, 0, "gt")


def test_models_that_do_not_say_their_patch(model, x):
    """As published ones: a patch is what a small image holds. catches: 64 pixels here, 256 there."""
    info, model.info = model.info, {}
    try:
        out = I.super_resolve(model, x[0, :, :50, :61], 1, 0, "null", steps=1)
        assert out.shape == (3, 100, 122) and out.isfinite().all()
        for bad in (x[0].byte(), x[0] * torch.nan, x[0, 0]):
            with pytest.raises(UserError, match="finite numbers"):
                I.invert(model, bad, 1, 1)
    finally:
        model.info = info


# ----- 3. The command -----

def save(path, x, mode="RGB", **options):
    Image.fromarray(I.to_uint8(x).numpy()).convert(mode).save(path, **options)
    return path


def test_kinds_of_images(x, tmp_path):
    """Grey, RGBA, palette, 16 bits, turned: all come as the same picture. catches: 16 bits clipped to white."""
    want = I.to_uint8(x[0]).numpy()
    a = save(tmp_path / "a.png", x[0])
    assert np.array_equal(I.to_uint8(I.read_image(a)).numpy(), want)
    rgba = np.concatenate([want, np.full((64, 64, 1), 9, np.uint8)], 2)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.array_equal(I.to_uint8(I.read_image(tmp_path / "rgba.png")).numpy(), want)
    grey = np.asarray(Image.fromarray(want).convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("grey.png", "deep.png"):
        assert np.array_equal(I.to_uint8(I.read_image(tmp_path / name)).numpy(), np.stack([grey] * 3, -1)), name
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(np.rot90(want[:40]).copy()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(I.to_uint8(I.read_image(tmp_path / "turned.png")).numpy(), want[:40])


def test_the_command(ready, x, tmp_path, capsys):
    """A picture smaller than a tile, said aloud; everything that was promised is written."""
    image, out = save(tmp_path / "a.jpg", x[0, :, :30, :70 - 6], quality=95), tmp_path / "out"
    I.main([str(ready), f"--image={image}", f"--out={out}", "--sr=2", "--variations=2", *FAST])
    said = capsys.readouterr().out
    assert "smaller than a tile" in said and "reflect-padded" in said
    assert sorted(p.name for p in out.iterdir()) == ["cells_0.png", "cells_1.png", "e.safetensors", "sheet.png",
                                                     "sr.png", "variation_0.png", "variation_1.png", "variations.png"]
    sr = I.read_image(out / "sr.png")
    assert sr.shape == (3, 60, 128) and I.agreement(sr[None], I.read_image(image)[None]) >= 48
    assert I.read_image(out / "variation_1.png").shape == (3, 30, 64)
    assert I.read_image(out / "cells_1.png").shape == (3, 64, 128)
    assert (I.read_image(out / "cells_1.png") - I.read_image(out / "cells_0.png")).abs().mean() > 0.01
    assert load_tensors(out / "e.safetensors")[0]["e"].shape == (2, 2, 96)
    I.main([str(ready), f"--image={image}", f"--out={tmp_path / 'gt'}", "--condition=gt", "--back_project=False",
            f"--reference={out / 'e.safetensors'}", *FAST])
    assert "back-projected" not in capsys.readouterr().out and not (tmp_path / "gt" / "variations.png").exists()


def test_the_image_guides_alone(ready, x, tmp_path, monkeypatch):
    """Variations are guided towards their conditions, super-resolution only where it is asked for. catches: one setting
    for both, and a null branch that costs as much again."""
    asked, real = [], windows.WindowEps
    monkeypatch.setattr(windows, "WindowEps", lambda model, c, guidance, *args: (
        asked.append(guidance), real(model, c, guidance, *args))[1])
    image = save(tmp_path / "a.png", x[0])
    I.main([str(ready), f"--image={image}", f"--out={tmp_path}", "--sr=2", "--variations=1", *FAST])
    assert asked == [2.0, 2.0, 1.0]
    I.main([str(ready), f"--image={image}", f"--out={tmp_path}", "--sr=2", "--sr_guidance=3", *FAST])
    assert asked[3:] == [3.0]


def test_what_the_command_refuses(ready, x, tmp_path):
    good = save(tmp_path / "a.png", x[0])
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    for args, text in (([f"--image={tmp_path / 'cut.png'}", "--scale=1"], "cannot be read"),
                       ([f"--image={tmp_path / 'none.png'}", "--scale=1"], "no such file"),
                       ([f"--image={good}"], "--scale=-1"), ([f"--image={good}", "--scale=3"], "0 .finest. to 2"),
                       ([f"--image={good}", "--scale=0", "--sr=2"], "finest"),
                       ([f"--image={good}", "--scale=0"], "finest"),
                       ([f"--image={good}", "--scale=1", "--sr=4"], "power of 2 up to 2"),
                       ([f"--image={good}", "--scale=2", "--sr=3"], "power of 2 up to 4"),
                       ([f"--image={good}", "--scale=1", "--condition=gt"], "--reference"),
                       ([f"--image={good}", "--scale=1", "--condition=x"], "--condition=x"),
                       ([f"--image={good}", "--scale=1", "--sr=1", "--condition=null"], "nothing to draw"),
                       ([f"--image={good}", "--scale=1", "--start=x"], "--start=x"),
                       ([f"--image={good}", "--scale=1", "--steps=0"], "--steps=0")):
        with pytest.raises(UserError, match=text):
            I.main([str(ready), "--device=cpu", "--amp=False", *args])


# ----- 4. The table -----

def test_regions_and_other_dyes(toy):
    """A region reduces to its image; dyes leave glass white and change tissue. catches: tiles in the wrong order."""
    pyramids, cfg = Pyramids(toy), sr_table.Config(scale=2)
    truth, x, e = sr_table.regions(pyramids, cfg, 2)
    assert truth.shape == (2, 3, 256, 256) and e.shape == (2, 96, 4, 4)
    assert (Resize(4, "box").down(truth) - x).abs().max() * 127.5 <= 1.01  # rounded twice
    shown = sr_table.regions(pyramids, sr_table.Config(scale=2, plain=5), 2)[1]
    assert ((127.5 * shown.mean(1)).flatten(1).std(1) >= 5).all() and len(shown) == 2
    with pytest.raises(UserError, match="--plain"):
        sr_table.regions(pyramids, sr_table.Config(scale=2, plain=100), 2)
    other, small, found = sr_table.regions(pyramids, sr_table.Config(scale=2, stain=True), 2)
    assert (Resize(4, "box").down(other) - small).abs().max() * 127.5 <= 1.01 and found.shape == e.shape
    glass = truth.amin(1) > 0.9
    moved = (other - truth).abs().amax(1)
    assert moved[~glass].mean() > 0.05 and (not glass.any() or moved[glass].mean() < 0.03)


def test_the_trained_baseline_begins_as_the_run(model, ready, toy, x, tmp_path):
    """With no step done it is the run's null branch; it learns to look at the image; it is kept."""
    pyramids, ranks = Pyramids(toy), I.setup("cpu", False)
    net = Trained(tmp_path, model, pyramids, ranks, 2, 0)
    z, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    with torch.no_grad():
        want = model.unet(z, t, torch.zeros(2, 65, model.summarizer.cfg.width))
        assert_close(net.predict(z, t, torch.randn(2, 3, 16, 16)), want, 1e-4)
    net = Trained(tmp_path, model, pyramids, ranks, 2, 2)
    y = [torch.randn(2, 3, 16, 16) for _ in range(2)]
    assert (net.predict(z, t, y[0]) - net.predict(z, t, y[1])).abs().max() > 1e-5
    again = Trained(tmp_path, model, pyramids, ranks, 2, 2)
    assert torch.equal(net.predict(z, t, y[0]), again.predict(z, t, y[0]))
    assert net.draw(x[:1], 0, 2).shape == (1, 3, 128, 128)


def test_commands_of_the_table(ready, toy, capsys):
    fast = [str(ready), f"--data={toy}", "--n=2", "--steps=1", "--invert_steps=1", "--device=cpu", "--threads=0"]
    proxy = proxies.Proxy(4)
    I.save_tensors(ready / "proxy.safetensors", proxy.state_dict(), {"model": proxies.fingerprint(
        ZoomLDM.from_run(ready))})
    sr_table.main(["table", *fast, "--scale=1", "--seeds=2", "--train_steps=1"])
    out = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines()}
    assert {"bicubic", "trained", "null", "gt", "inferred", "inferred, exact", "real"} < set(rows)
    assert float(rows["inferred, exact"][-1].split("±")[0]) >= 48 and math.isinf(float(rows["real"][0]))
    assert (ready / "bench" / "sr.png").exists() and (ready / "bench" / "sr.json").exists()
    sr_table.main(["planted", *fast])
    assert "2x2" in capsys.readouterr().out
    with pytest.raises(UserError, match="say what"):
        sr_table.main(["tables", str(ready)])
