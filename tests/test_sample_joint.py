"""Joint sampling on closed forms, and its operator A. Patches and their evaluation are tested in test_train.py."""
import pytest
import torch
from rule import assert_close, golden

from canvas import Canvas
from common import UserError
from diffusion import Schedule, ddim_sample
from sample_joint import Resize, joint_sample

S = Schedule()
SIDE, W, K = 16, 8, 4  # canvas, window, factor


@pytest.mark.parametrize("key, call", [
    ("down4", lambda f: Resize(4).down(f["in/x"])),
    ("down16", lambda f: Resize(16).down(f["in/x"])),
    ("up2", lambda f: Resize(2).up(f["in/x"])),
    ("down4_vjp", lambda f: Resize(4).up(f["in/down4_cotangent"]) / 16),
])
def test_agrees_with_the_published_resizer(key, call):
    """Catches: another cubic, no antialiasing, a mirror that skips the edge, an up-sampling that is not the adjoint."""
    f, _ = golden("resizer")
    assert_close(call(f), f[f"out/{key}"], 2e-6)


@pytest.mark.parametrize("kind", ["bicubic", "box"])
def test_up_is_the_adjoint(kind):
    """<A x, y> = <x, At y>, also where the taps reach over both borders of a short side."""
    for factor, h, w in ((1, 5, 7), (2, 4, 16), (4, 8, 12), (16, 16, 32)):
        A = Resize(factor, kind)
        x = torch.randn(2, 3, h, w, dtype=torch.float64)
        y = torch.randn(2, 3, h // factor, w // factor, dtype=torch.float64)
        assert torch.allclose((A.down(x) * y).sum(), (x * A.up(y)).sum() / factor ** 2)
        assert torch.allclose(A.down(torch.ones_like(x)), torch.ones_like(y))


def test_box_is_the_halving_of_the_data():
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(Resize(4, "box").down(x), torch.nn.functional.avg_pool2d(x, 4))
    y = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    assert torch.allclose(Resize(4, "box").down(Resize(4, "box").up(y)), y)


def test_sides_that_do_not_divide():
    with pytest.raises(ValueError, match="4 does not divide"):
        Resize(4).down(torch.zeros(1, 3, 16, 18))
    with pytest.raises(UserError, match="kind='lanczos'"):
        Resize(4, "lanczos")


def gaussian(mean, power=0.25):
    """The exact eps of data N(mean, power): what a perfect network would answer."""
    def eps(z, t, ij=None):
        ab = S.at(t, z)
        return (z - ab.sqrt() * mean) * (1 - ab).sqrt() / (ab * power + 1 - ab)
    return eps


def identity(x):
    return x


def draw(seed=0, **options):
    """A canvas of four windows under a context that wants a ramp, identity autoencoder. out: z, z_ctx, estimates."""
    g = torch.Generator().manual_seed(seed)
    z, z_ctx = torch.randn(1, 3, SIDE, SIDE, generator=g), torch.randn(1, 3, SIDE // K, SIDE // K, generator=g)
    ramp = torch.linspace(-0.8, 0.8, SIDE // K).expand(1, 3, SIDE // K, -1)
    seen = []
    settings = {"window": W, "factor": K, "steps": 10} | options
    out = joint_sample(gaussian(0.1), gaussian(ramp, 0.01), identity, identity, S, z, z_ctx, **settings,
                       callback=lambda n, t, z, z0_hat, target: seen.append((z0_hat, target)))
    return (z, z_ctx), out, seen


def misfit(z0_hat, target):
    return float((Resize(K).down(z0_hat) - target).square().sum())


@pytest.mark.parametrize("off", [{"lam": 0.0}, {"inner": 0}])
def test_without_guidance_it_is_independent_ddim(off):
    """Bit for bit, in fine windows and context alike. Catches: any arithmetic on the canvas that windows do not see."""
    (z, z_ctx), (fine, ctx), _ = draw(**off)
    canvas = Canvas(SIDE, SIDE, W)
    alone = ddim_sample(gaussian(0.1), canvas.cut(z, canvas.ij), S, 10)
    assert torch.equal(canvas.cut(fine, canvas.ij), alone)
    ramp = torch.linspace(-0.8, 0.8, SIDE // K).expand(1, 3, SIDE // K, -1)
    assert torch.equal(ctx, ddim_sample(gaussian(ramp, 0.01), z_ctx, S, 10))


def test_overlap_without_guidance_is_multidiffusion():
    """Estimates of overlapping windows averaged at every step. The network knows its place, so windows disagree."""
    def eps(z, t, ij):
        return torch.stack([gaussian(0.1 * i - 0.05 * j)(z[n:n + 1], t[n:n + 1])[0] for n, (i, j) in enumerate(ij)])

    def averaged(z, t):
        total, count = torch.zeros_like(z), torch.zeros_like(z)
        for i in (0, 4, 8):
            for j in (0, 4, 8):
                at = (..., slice(i, i + W), slice(j, j + W))
                total[at] += eps(z[at], t, [(i, j)])
                count[at] += 1
        return total / count
    z = torch.randn(1, 3, SIDE, SIDE)
    fine, _ = joint_sample(eps, None, identity, identity, S, z, None, window=W, factor=K, steps=10, lam=0, overlap=4,
                           y=torch.zeros(1, 3, 4, 4))
    assert_close(fine, ddim_sample(averaged, z, S, 10), 1e-6)


@pytest.mark.parametrize("options", [{"normalize": False, "lam": 0.5}, {"lam": 0.02}, {"lam": 0.02, "overlap": 4}])
def test_every_correction_lowers_the_misfit(options):
    """Catches: Eq. 5's sign as printed, a target of the wrong estimate, A and its adjoint swapped."""
    costs = [misfit(*draw(inner=k, **options)[2][0]) for k in range(6)]
    assert all(b < a for a, b in zip(costs, costs[1:])), costs


def test_one_plain_correction_is_the_gradient():
    """normalize=False on a linear toy: z0_hat moves by -lam c^2 At (A z0_hat - y), c the slope of z0_hat in z."""
    z, y, seen = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64), torch.zeros(1, 3, 4, 4, dtype=torch.float64), []
    for k in (0, 1):
        joint_sample(gaussian(0.1), None, identity, identity, S, z, None, window=W, factor=K, steps=2, inner=k, y=y,
                     normalize=False, callback=lambda n, t, z, z0_hat, target: seen.append(z0_hat))
    before, after, A = seen[0], seen[2], Resize(K)
    ab = S.alpha_bar[501]
    c = (1 - (1 - ab) / (ab * 0.25 + 1 - ab)) / ab.sqrt()
    want = -0.5 * c ** 2 * A.up(A.down(before)) / K ** 2
    assert ((after - before) / want.abs().max() - want / want.abs().max()).abs().max() < 1e-6


def test_guided_images_match_their_context():
    free, _, seen = draw(lam=0.0)
    _, _, guided = draw(inner=3, lam=0.3)
    assert misfit(*guided[-1]) < 0.05 * misfit(*seen[-1])


def test_a_residual_below_one_grey_level_is_left_alone():
    """Catches: a maximum without a floor, which turns rounding into steps of full size."""
    z = torch.randn(1, 3, SIDE, SIDE)
    def run(y, lam):
        seen = []
        joint_sample(gaussian(0.0), None, identity, identity, S, z, None, window=W, factor=K, steps=2, lam=lam, y=y,
                     callback=lambda n, t, z, z0_hat, target: seen.append((z, z0_hat)))
        return seen[0]
    z_free, z0_hat = run(torch.zeros(1, 3, 4, 4), 0.0)
    there = Resize(K).down(z0_hat)
    near, far = ((run(there + d, 0.5)[0] - z_free).abs().max() for d in (1e-6, 1))
    assert near < 1e-3 < 0.05 < far


def test_what_a_step_costs():
    """1 + 2 inner estimates, inner decodes of the canvas, 2 inner encodes; one decode of the context."""
    calls = {"eps": 0, "encode": 0, "decode": 0}

    def counted(name, fn):
        def f(*args):
            calls[name] += len(args[0])
            return fn(*args)
        return f
    z, z_ctx = torch.randn(1, 3, SIDE, SIDE), torch.randn(1, 3, 4, 4)
    joint_sample(counted("eps", gaussian(0.0)), gaussian(0.0), counted("encode", identity),
                 counted("decode", identity), S, z, z_ctx, window=W, factor=K, steps=5, inner=3)
    assert calls == {"eps": 5 * 7 * 4, "encode": 5 * 6 * 4, "decode": 5 * (3 * 4 + 1)}


@pytest.mark.parametrize("options, says", [({"window": 32}, "larger canvas"), ({"overlap": 8}, "smaller overlap"),
                                           ({"factor": 2}, "factor=2 times"), ({"guide": "magic"}, "guide='magic'"),
                                           ({"end": "never"}, "end='never'")])
def test_canvas_that_does_not_fit(options, says):
    with pytest.raises(ValueError, match=says):
        draw(**options)
