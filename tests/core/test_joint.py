"""Joint sampling on closed forms: what a correction is, what it costs, how levels and ranks work together."""
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rule import assert_close

from common import UserError, load_tensors, save_tensors
from diffusion import Schedule, ddim_sample, to_x0
from sample_joint import (
    GUIDES,
    Canvas,
    Level,
    Resize,
    err_z_by_encoder,
    err_z_by_gradient,
    g_by_difference,
    g_by_gradient,
    joint_sample,
    sample_levels,
    starts,
    unit,
)

S = Schedule()
SIDE, W, K = 16, 8, 4  # canvas, window, factor
IN_X0 = [g for g in GUIDES if GUIDES[g][1] is None]


# ----- 1. The toy: a Gaussian, an identity for the autoencoder -----

def gaussian(mean, power=0.25):
    """The exact eps of data N(mean, power): what a perfect network would answer."""
    def eps(z, t, ij=None):
        ab = S.at(t, z)
        return (z - ab.sqrt() * mean) * (1 - ab).sqrt() / (ab * power + 1 - ab)
    return eps


def identity(x):
    return x


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


def cost(z0_hat, target):
    return float((Resize(K).down(z0_hat) - target).square().sum())


@pytest.mark.parametrize("off", [{"lam": 0.0}, {"inner": 0}, {"lam": (0.0, 0.0)}, {"during": (5, 50)}])
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
    fine, none = joint_sample(eps, None, identity, identity, S, z, None, window=W, factor=K, steps=10, lam=0, overlap=4,
                              y=torch.zeros(1, 3, 4, 4))
    assert_close(fine, ddim_sample(averaged, z, S, 10), 1e-6)
    assert none is None


@pytest.mark.parametrize("end", ["clean", "published"])
def test_where_it_ends(end):
    _, (fine, _), _ = draw(lam=0.0, end=end)
    z = normal(1, 3, SIDE, SIDE)
    assert_close(fine, ddim_sample(gaussian(0.1), z, S, 10, end=end), 1e-6)


# ----- 2. Corrections go down -----

@pytest.mark.parametrize("overlap, fade", [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_descends(guide, overlap, fade):
    """More corrections, less misfit, with plain steps below 2/L. Catches: Eq. 5's sign as printed, a target of the
    wrong estimate, A and its adjoint swapped, an x0 guide that drops its corrections."""
    lam = 8.0 if guide in IN_X0 else 200.0  # the slope of z0_hat in z_t is 0.2 there
    costs = [cost(*draw(inner=k, lam=lam, normalize=False, timesteps=[500], guide=guide, overlap=overlap, fade=fade
                        )[2][0]) for k in range(5)]
    assert all(b < 0.95 * a for a, b in zip(costs, costs[1:])), costs


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("overlap", [0, 4])
def test_steps_of_one_size_descend(guide, overlap):
    """normalize=True, from the start until the residual is of the size of the step."""
    costs = [cost(*draw(inner=k, lam=0.02, guide=guide, overlap=overlap, timesteps=[901])[2][0]) for k in range(6)]
    assert all(b < a for a, b in zip(costs, costs[1:])), costs


@pytest.mark.parametrize("options", [{"normalize": False, "lam": 0.5}, {"lam": 0.02}, {"lam": 0.02, "overlap": 4}])
def test_every_correction_lowers_the_misfit(options):
    """The defaults, from the first of ten steps on."""
    costs = [cost(*draw(inner=k, **options)[2][0]) for k in range(6)]
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


@pytest.mark.parametrize("guide, lam, normalize", [("exact", 0.3, True), ("gradient", 0.3, True), ("x0", 1.0, "share"),
                                                   ("x0+proxy", 1.0, "share")])
def test_guided_images_match_their_context(guide, lam, normalize):
    free, _, seen = draw(lam=0.0)
    _, _, guided = draw(inner=3, lam=lam, guide=guide, normalize=normalize, overlap=4, fade=True)
    assert cost(*guided[-1]) < 0.05 * cost(*seen[-1])


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


@pytest.mark.parametrize("guide", ["exact", "gradient", "x0"])
def test_steps_are_as_large_as_lam_says(guide):
    """normalize=True: the largest change of every window is lam, and where one already fits, it is left alone while its
    neighbours move. Catches: one maximum for the whole canvas, the residual of another window."""
    A, z, seen = Resize(K, "box"), normal(1, 3, SIDE, SIDE), []

    def run(y, lam):
        joint_sample(gaussian(0.0), None, identity, identity, S, z, None, window=W, factor=K, timesteps=[500], lam=lam,
                     y=y, kind="box", guide=guide, callback=lambda n, t, z, z0_hat, target: seen.append(z0_hat))
        return seen[-1]
    before = run(torch.zeros(1, 3, 4, 4), 0.0)
    y = A.down(before) + torch.tensor([[1.0, 3.0], [-2.0, 0.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    ab = S.alpha_bar[500]
    slope = 1 if guide == "x0" else (1 - (1 - ab) / (ab * 0.25 + 1 - ab)) / ab.sqrt()  # of the estimate in z_t
    change = (run(y, 0.25) - before) / slope
    largest = F.max_pool2d(change.abs().amax(1, keepdim=True), W)[0, 0]
    assert_close(largest, torch.tensor([[0.25, 0.25], [0.25, 0.0]]), 1e-3)
    assert change[..., :W, :].mean() > 0 > change[..., W:, :W].mean()


def test_scale_of_overlapping_windows_is_averaged():
    """Every window's own factor 1 / max, averaged where they overlap. Catches: steps at the border of windows."""
    canvas, d = Canvas(W, 12, W, 4), torch.ones(1, 3, W, 12)
    d[..., 8:] = 4
    assert_close(unit(canvas, d)[0, 0, 0], torch.tensor([1.0] * 4 + [0.625] * 4 + [1.0] * 4), 1e-6)
    residual = torch.zeros(1, 3, 2, 3)
    residual[..., 2] = 1  # under the second window alone
    assert_close(unit(canvas, d, residual)[0, 0, 0], torch.tensor([0.0] * 4 + [0.125] * 4 + [1.0] * 4), 1e-6)


# ----- 3. Gradients against torch.autograd, on networks that are neither linear nor symmetric -----

D = torch.float64
FADES = pytest.mark.parametrize("overlap, fade", [(0, False), (3, False), (3, True)])


def networks():
    """A denoiser that knows its place, a decoder of two pixels a side per latent that knows the mean of its window, an
    encoder."""
    a, b, c = (normal(3, 3, n, n, seed=n, dtype=D) / n for n in (3, 2, 1))

    def eps(z, t, ij):
        place = torch.tensor([[0.1 * i - 0.2 * j] for i, j in ij], dtype=D)[..., None, None]
        return torch.tanh(F.conv2d(z, a, padding=1) + place) + 0.3 * z

    def decode(z):
        return torch.tanh(F.conv_transpose2d(F.conv2d(z, c), b, stride=2)) * (1 + z.mean((1, 2, 3), keepdim=True))

    def encode(x):
        return F.conv2d(F.avg_pool2d(torch.tanh(x), 2), a.flip(0), padding=1)
    return eps, decode, encode


def weights(n, side, overlap, fade):
    """Rows of window weights on a line, (windows,n), written another way than in canvas.py."""
    at = torch.arange(n, dtype=D)
    rows = []
    for a in starts(n, side, overlap):
        inside = ((at >= a) & (at < a + side)).to(D)
        if fade:
            left = torch.ones(n, dtype=D) if a == 0 else (at - a + 0.5) / overlap
            right = torch.ones(n, dtype=D) if a + side == n else (a + side - at - 0.5) / overlap
            inside = inside * left.clamp(0, 1).minimum(right.clamp(0, 1))
        rows.append(inside)
    rows = torch.stack(rows)
    return rows / rows.sum(0)


def stitched(fn, z, overlap, fade, k=1):
    """The weighted mean of fn(window, corner) over all windows of the canvas, in one differentiable expression."""
    h, w = z.shape[2:]
    rows, columns, total = weights(h, W, overlap, fade), weights(w, W, overlap, fade), 0
    for p, i in zip(rows, starts(h, W, overlap)):
        for q, j in zip(columns, starts(w, W, overlap)):
            part = fn(z[..., i:i + W, j:j + W], (i, j))
            whole = F.pad(part, (k * j, k * (w - W - j), k * i, k * (h - W - i)))
            total = total + whole * (p[:, None] * q).repeat_interleave(k, 0).repeat_interleave(k, 1)
    return total


def half_square(z, y, eps, decode, t, overlap, fade):
    """C = |y - A Dec(z0_hat(z))|^2 / 2 and z0_hat, as published: each on its own canvas of windows."""
    out = stitched(lambda part, ij: eps(part, torch.tensor([t]), [ij]), z, overlap, fade)
    z0_hat = to_x0(out, z, S.alpha_bar[t], "eps")
    x = stitched(lambda part, ij: decode(part), z0_hat, overlap, fade, 2)
    return (y - Resize(K).down(x)).square().sum() / 2, z0_hat


@FADES
def test_gradient_guide_is_the_gradient(overlap, fade):
    """guide="gradient" moves z_t against the exact gradient of the misfit, through windows, decoder and denoiser.
    Catches: a transpose left out, weights used twice or not at all, ab at another t."""
    eps, decode, encode = networks()
    z, y, t, lam = normal(1, 3, 18, 18, dtype=D), normal(1, 3, 9, 9, seed=5, dtype=D), 500, 0.03
    with torch.enable_grad():
        x = z.clone().requires_grad_()
        C, before = half_square(x, y, eps, decode, t, overlap, fade)
        grad, = torch.autograd.grad(C, x)
    after = half_square(z - lam * grad, y, eps, decode, t, overlap, fade)[1]
    levels, seen = [Level(eps, Canvas(18, 18, W, overlap, fade, 2), z, K, y)], []
    sample_levels(levels, decode, encode, S, timesteps=[t], lam=lam, normalize=False, guide="gradient",
                  callback=lambda n, t, levels, estimates, targets: seen.append(estimates[0]))
    want, got = after - before.detach(), seen[0] - before.detach()
    assert want.abs().max() > 0.01
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    ab, last = float(S.alpha_bar[t]), float(S.alpha_bar[0])
    noise = (z - lam * grad - ab ** 0.5 * after) / (1 - ab) ** 0.5
    assert_close(levels[0].z, last ** 0.5 * after + (1 - last) ** 0.5 * noise, 1e-6, "the DDIM step goes on from there")


@FADES
def test_parts_of_the_gradient(overlap, fade):
    """J_D^T A^T r and J^T v, each against autograd. Catches: one of them scaled, as normalising would hide."""
    eps, decode, _ = networks()
    canvas, t = Canvas(18, 18, W, overlap, fade, 4), 700
    z, y, v = normal(1, 3, 18, 18, dtype=D), normal(1, 3, 9, 9, seed=5, dtype=D), normal(1, 3, 18, 18, seed=6, dtype=D)
    with torch.enable_grad():
        x = z.clone().requires_grad_()
        r = y - Resize(K).down(stitched(lambda part, ij: decode(part), x, overlap, fade, 2))
        down, = torch.autograd.grad(-r.square().sum() / 2, x)
        out = stitched(lambda part, ij: eps(part, torch.tensor([t]), [ij]), x, overlap, fade)
        back, = torch.autograd.grad((to_x0(out, x, S.alpha_bar[t], "eps") * v).sum(), x)
    err_z, residual = err_z_by_gradient(canvas, decode, z, Resize(K), y)
    assert_close(residual, r, 1e-6)
    assert_close(err_z, down, 1e-6)
    assert_close(g_by_gradient(Level(eps, canvas, z), z, v, t, float(S.alpha_bar[t])), back, 1e-6)


@FADES
def test_differences_are_forward_derivatives(overlap, fade):
    """J_E A^T r and J v: the directions of Algorithm S2, by central differences of much smaller width. Catches: a width
    that is not divided out, differences from another base, A^T without its factor."""
    eps, decode, encode = networks()
    canvas, t, h, A = Canvas(18, 18, W, overlap, fade, 4), 700, 1e-6, Resize(K)
    z, y, v = normal(1, 3, 18, 18, dtype=D), normal(1, 3, 9, 9, seed=5, dtype=D), normal(1, 3, 18, 18, seed=6, dtype=D)

    x = {(i, j): decode(z[..., i:i + W, j:j + W]) for i, j in canvas.ij}
    whole = stitched(lambda part, ij: x[ij], z, overlap, fade, 2)
    r = y - A.down(whole)
    pulled = A.up(r) / K ** 2

    def ahead(part, ij):
        i, j = ij
        e = pulled[..., 2 * i:2 * i + 2 * W, 2 * j:2 * j + 2 * W]
        return (encode(x[ij] + h * e) - encode(x[ij] - h * e)) / (2 * h)
    err_z, residual = err_z_by_encoder(canvas, decode, encode, z, A, y, 1e-6)
    assert_close(residual, r, 1e-6)
    assert_close(err_z, stitched(ahead, z, overlap, fade), 1e-5)
    err_z, _ = err_z_by_encoder(canvas, decode, encode, z, A, y, None)      # all that the residual asks for, at once
    assert_close(err_z, stitched(lambda part, ij: (encode(x[ij] + A.up(r)[..., 2 * ij[0]:2 * ij[0] + 2 * W,
                                                                       2 * ij[1]:2 * ij[1] + 2 * W])
                                                   - encode(x[ij])) / K ** 2, z, overlap, fade), 1e-5)

    def z0_hat(z):
        return to_x0(stitched(lambda part, ij: eps(part, None, [ij]), z, overlap, fade), z, S.alpha_bar[t], "eps")
    want = (z0_hat(z + h * v) - z0_hat(z - h * v)) / (2 * h)
    assert_close(g_by_difference(Level(eps, canvas, z), z, z0_hat(z), v, z0_hat, 1e-4, t, S.alpha_bar[t]), want, 1e-3)
    assert_close(g_by_difference(Level(eps, canvas, z), z, z0_hat(z), v, z0_hat, 0, t, S.alpha_bar[t]), want, 1e-6)


@pytest.mark.parametrize("t", [200, 600])
def test_exact_points_where_gradient_does(t):
    """With orthogonal decoder, encoder = its transpose, and a denoiser whose Jacobian is symmetric, S2 is S1 (Z Eq. 4,
    6). Catches: the encoder's difference at another image, the Jacobian left out."""
    Q = torch.linalg.qr(normal(12, 3, seed=1, dtype=D))[0]                              # (12,3), orthonormal columns
    n = 3 * W * W
    M = normal(n, n, seed=2, dtype=D) / n ** 0.5
    M = (M + M.T) / 2

    def decode(z):
        return F.pixel_shuffle(torch.einsum("pc,nchw->nphw", Q, z), 2)

    def encode(x):
        return torch.einsum("pc,nphw->nchw", Q, F.pixel_unshuffle(x, 2))

    def eps(z, t, ij):
        return (torch.tanh(z.flatten(1) @ M) @ M).view_as(z) + 0.2 * z
    z, y = normal(1, 3, SIDE, SIDE, dtype=D), normal(1, 3, 8, 8, seed=5, dtype=D)

    def estimate(guide, lam):
        seen = []
        sample_levels([Level(eps, Canvas(SIDE, SIDE, W), z, K, y)], decode, encode, S, timesteps=[t], guide=guide,
                      lam=lam, normalize=False, delta=1e-4, callback=lambda *args: seen.append(args[3][0]))
        return seen[0]
    d = {guide: estimate(guide, 1e-3) - estimate(guide, 0) for guide in ("exact", "gradient", "proxy")}
    for guide in ("exact", "proxy"):
        assert torch.cosine_similarity(d[guide].flatten(), d["gradient"].flatten(), dim=0) > 0.999
        assert d[guide].norm() / d["gradient"].norm() == pytest.approx(1, rel=0.01)


class Mix:
    """A stand-in for a `Proxy`: decodes to a part of decode's side, by a matrix of colours that is not symmetric."""

    def __init__(self, factor=2):
        self.M, self.factor, self.rows, self.states = normal(3, 3, seed=7) + 2 * torch.eye(3), factor, 0, []
        self.inverse = torch.linalg.inv(self.M.T @ self.M)

    def __call__(self, z):
        self.rows += len(z)
        self.states.append(torch.is_autocast_enabled("cpu"))
        return torch.einsum("ij,njhw->nihw", self.M, z)


@pytest.mark.parametrize("guide, overlap", [("x0+proxy", 0), ("x0+proxy", 4), ("proxy", 4)])
def test_proxy_stands_in_for_the_decoder(guide, overlap):
    """Its image is smaller than decode's by `factor`, so A shrinks less; a full share of what even changes can do makes
    it match. Catches: the inverse left out, A of the decoder's factor, a decode where the proxy should be asked."""
    z, y, mix, seen = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=1), Mix(), []
    share = {"normalize": "share", "lam": 1.0} if guide == "x0+proxy" else {"normalize": False, "lam": 0.0}
    for settings in (share, share | {"lam": 30.0} if guide == "proxy" else {}):
        joint_sample(gaussian(0.1), None, None, None, S, z, None, window=W, factor=8, y=y, timesteps=[500], kind="box",
                     guide=guide, overlap=overlap, fade=True, proxy=mix, **{"lam": 0.0} | settings,
                     callback=lambda n, t, z, z0_hat, target: seen.append(z0_hat))
    off = [float((Resize(4, "box").down(mix(x)) - y).norm() / y.norm()) for x in seen]
    assert off[0] < 1e-4 < 0.5 < off[1] if guide == "x0+proxy" else off[1] < 0.95 * off[0], off


# ----- 4. In the space of the estimate -----

@pytest.mark.parametrize("overlap, fade", [(0, False), (4, True)])
@pytest.mark.parametrize("guide", IN_X0)
def test_a_full_share_hits_the_target(guide, overlap, fade):
    """normalize="share", lam=1: the estimate matches at once, and eps gives way, so that z_t is what it was. Catches: a
    DDIM step with the old eps, which adds every correction up again."""
    z, y, seen, A = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=1), [], Resize(K, "box")
    joint_sample(gaussian(0.1), None, identity, identity, S, z, None, window=W, factor=K, y=y, timesteps=[100, 500],
                 guide=guide, normalize="share", lam=1.0, kind="box", overlap=overlap, fade=fade,
                 callback=lambda n, t, z, z0_hat, target: seen.append((t, z, z0_hat)))
    assert [t for t, _, _ in seen] == [500, 100]
    for (t, after, z0_hat), ab_prev in zip(seen, (S.alpha_bar[100], S.alpha_bar[0])):
        assert (A.down(z0_hat) - y).norm() < 1e-2 * y.norm()
        noise = (z - S.alpha_bar[t].sqrt() * z0_hat) / (1 - S.alpha_bar[t]).sqrt()
        assert_close(after, ab_prev.sqrt() * z0_hat + (1 - ab_prev).sqrt() * noise, 1e-5, f"t={t}")
        z = after


def taken(**settings):
    """The share of the misfit that every step takes away, with corrections in the space of the estimate."""
    z, y, A, shares = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=1), Resize(K, "box"), []
    before = [z]

    def look(n, t, z, z0_hat, target):
        free = to_x0(gaussian(0.1)(before[0], torch.tensor([t])), before[0], float(S.alpha_bar[t]), "eps")
        shares.append(float(1 - (A.down(z0_hat) - y).norm() / (A.down(free) - y).norm()))
        before[0] = z
    joint_sample(gaussian(0.1), None, identity, identity, S, z, None, window=W, factor=K, y=y, steps=5, guide="x0",
                 normalize="share", kind="box", callback=look, **settings)
    return pytest.approx(shares, abs=2e-3)


def test_lam_goes_from_first_to_last():
    """Linear over the steps, reaching the last value at the last step; inner corrections compound."""
    assert taken(lam=(0.9, 0.1)) == [0.9, 0.7, 0.5, 0.3, 0.1]
    assert taken(lam=0.5, inner=2) == [0.75] * 5
    assert taken(lam=(0.0, 1.0)) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_guided_only_during():
    """Both ends of the range count; t goes 801, 601, 401, 201, 1."""
    assert taken(lam=0.5, during=(201, 601)) == [0, 0.5, 0.5, 0.5, 0]
    assert taken(lam=0.5, during=(202, 600)) == [0, 0, 0.5, 0, 0]


# ----- 5. Levels -----

def shades(z):
    """A decoder whose windows differ in tone, as GroupNorm makes them."""
    return z + 0.5 * z.mean((1, 2, 3), keepdim=True)


def three(overlap=2, fade=True, batch=64, z=None, eps=None, **options):
    """Scales of 8, 16 and 32 latents in windows of 8. out: levels, the (estimates, targets) of every step."""
    canvases = [Canvas(n, n, W, 0 if n == W else overlap, fade, batch) for n in (8, 16, 32)]
    eps = eps or [gaussian(0.9), gaussian(-0.2), gaussian(0.1)]
    z = z or [normal(1, 3, n, n, seed=n, dtype=D) for n in (8, 16, 32)]
    levels, seen = [Level(*x, f) for *x, f in zip(eps, canvases, map(Canvas.own, canvases, z), (0, 2, 2))], []
    sample_levels(levels, shades, identity, S, **{"steps": 4} | options, callback=lambda n, t, levels, *both:
                  seen.append((*both, [x.z for x in levels])))
    return levels, seen


@pytest.mark.parametrize("overlap, fade", [(0, False), (4, True)])
def test_each_level_guides_the_next_finer_one(overlap, fade):
    """Targets are the decoded estimates of the level above, after its own correction, stitched window by window and
    clamped. Catches: all levels after the coarsest one, z_t decoded for its estimate, windows of a context in the wrong
    place."""
    _, seen = three(overlap, fade, guide="x0", normalize="share", lam=1.0, kind="box")
    for estimates, targets, _ in seen:
        assert targets[0] is None
        for above, target in zip(estimates, targets[1:]):
            n = above.shape[-1]
            want = stitched(lambda part, ij: shades(part), above, 0 if n == W else overlap, fade).clamp(-1, 1)
            assert_close(target, want, 1e-6)
            assert n > W or target.abs().max() == 1
    final, targets, _ = seen[-1]
    free = three(overlap, fade, guide="x0", lam=0.0)[1][-1][0]
    off = [[Resize(2, "box").down(shades_of(x, overlap, fade)) - y for x, y in zip(a[1:], targets[1:])]
           for a in (final, free)]
    assert all(a.norm() < 0.5 * b.norm() for a, b in zip(*off))


def shades_of(z, overlap, fade):
    return stitched(lambda part, ij: shades(part), z, overlap, fade)


def test_the_guide_is_not_changed_by_what_it_guides():
    """One way: a coarse level is drawn as if it were alone."""
    levels, _ = three(lam=0.5)
    alone = ddim_sample(gaussian(0.9), normal(1, 3, 8, 8, seed=8, dtype=D), S, 4)
    assert torch.equal(levels[0].z, alone)


def test_a_fixed_target_replaces_the_level_above():
    """y counts, although a context is drawn beside it."""
    y = normal(1, 3, 4, 4, seed=3)
    _, (_, ctx), seen = draw(y=y, lam=1.0, guide="x0", normalize="share", kind="box")
    assert all(torch.equal(target, y) for _, target in seen) and ctx.shape == (1, 3, 4, 4)
    assert (Resize(K, "box").down(seen[-1][0]) - y).norm() < 0.01 * y.norm()


def test_one_step_may_be_the_last():
    """lam=(first, last) of a single step. Catches: a division by the number of steps less one."""
    _, (fine, _), _ = draw(timesteps=[500], lam=(0.5, 0.1))
    assert fine.isfinite().all()


@pytest.mark.parametrize("guide, normalize", [("exact", True), ("x0", "share")])
def test_resumed_is_bit_identical(guide, normalize):
    """skip= goes on from the latents after that many steps. Catches: lam or t counted from the restart."""
    settings = {"steps": 5, "lam": (0.8, 0.2), "guide": guide, "normalize": normalize, "inner": 2}
    levels, seen = three(**settings)
    for skip in (1, 4, 5):
        again, later = three(z=seen[skip - 1][2], skip=skip, **settings)
        assert len(later) == 5 - skip
        assert all(torch.equal(a.z, b.z) for a, b in zip(levels, again))


# ----- 6. What it costs, and in which precision -----

class Counted:
    """A function that remembers how many windows it saw in each call, and whether autocast was on."""

    def __init__(self, fn):
        self.fn, self.rows, self.states = fn, [], []

    def __call__(self, x, *args):
        self.rows.append(len(x))
        self.states.append(torch.is_autocast_enabled("cpu"))
        assert x.dtype == torch.float32
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        return self.fn(x, *args)


def counted(guide, steps=5, inner=3, proxy=None, batch=3, **options):
    """out: fine eps, context eps, encode, decode after a run with four fine windows."""
    f = [Counted(gaussian(0.0)), Counted(gaussian(0.0)), Counted(identity), Counted(identity)]
    z, z_ctx = torch.randn(1, 3, SIDE, SIDE), torch.randn(1, 3, 4, 4)
    joint_sample(*f, S, z, z_ctx, window=W, factor=K, steps=steps, inner=inner, guide=guide, batch=batch, proxy=proxy,
                 **options)
    return f


@pytest.mark.parametrize("guide, eps, encode, decode", [
    ("exact", 7, 6, 3),     # 1 + 2 inner estimates, 2 inner encodes, inner decodes of the canvas
    ("gradient", 7, 0, 6),  # a decode for the misfit, one to differentiate
    ("proxy", 7, 0, 6),     # without a proxy: the decoder in its place
    ("x0", 1, 6, 3),
    ("x0+proxy", 1, 0, 6),
])
def test_what_a_step_costs(guide, eps, encode, decode):
    """Per window; the context's estimate is decoded once. No call has more windows than `batch`. Catches: anything
    computed twice, as the estimate after the last correction, or a batch that is not cut up."""
    fine, ctx, E, Dec = counted(guide)
    assert [sum(f.rows) for f in (fine, ctx, E, Dec)] == [5 * 4 * eps, 5, 5 * 4 * encode, 5 * (4 * decode + 1)]
    assert max(fine.rows + E.rows + Dec.rows) == 3


def test_what_a_proxy_costs():
    """Two small passes per correction, no encoder, and no decoder but for the context."""
    mix = Mix(1)
    fine, _, E, Dec = counted("x0+proxy", proxy=mix, normalize="share")
    assert (sum(fine.rows), E.rows, sum(Dec.rows), mix.rows) == (5 * 4, [], 5, 5 * 4 * 6)


def test_what_is_outside_the_range_costs_nothing():
    fine, _, E, Dec = counted("exact", during=(0, 300))
    assert (sum(fine.rows), sum(E.rows), sum(Dec.rows)) == (4 * (2 * 7 + 3), 4 * 2 * 6, 4 * 2 * 3 + 5)


@pytest.mark.parametrize("guide, eps, encode, decode, other", [
    # steps at t = 801 (not guided) and 1 (guided, two corrections); the context is decoded first
    ("exact", "1 0000 1", "00 00", "1 1 1 1", None),
    ("gradient", "1 1 01 01", "", "1 1 00 00", None),
    ("x0", "1 1", "00 00", "1 1 1 1", None),
    ("proxy", "1 0000 1", "", "1 1", "00 00"),
])
def test_differences_and_gradients_are_float32(guide, eps, encode, decode, other):
    """Under bf16 autocast: 1 where it is on, which is wherever nothing is differentiated. What the last estimate of a
    step is made with is not. TF32 is off, and all of it is put back."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    mix = Mix(1) if other else None
    try:
        with torch.autocast("cpu", torch.bfloat16):
            fine, ctx, E, Dec = counted(guide, 2, 2, mix, 4, during=(0, 500))
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
    for f, want in ((fine, eps), (ctx, "11"), (E, encode), (Dec, decode), *([(mix, other)] if mix else ())):
        assert "".join(str(int(x)) for x in f.states) == want.replace(" ", "")


def test_without_autocast_nothing_is_cast():
    """Catches: bf16 switched on by the program itself."""
    for f in counted("exact", 2, 1):
        assert f.states and not any(f.states)


def test_bf16_changes_little():
    """Catches: a correction taken in bf16, whose finite difference is mostly rounding."""
    a, b, c = (normal(3, 3, 3, 3, seed=n) / 5 for n in (1, 2, 3))

    def conv(w):
        return lambda z, *args: F.conv2d(z, w, padding=1)
    z, y, seen = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=5), []

    def moved(on):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            for lam in (0.0, 0.5):
                joint_sample(conv(a), None, conv(b), conv(c), S, z, None, window=W, factor=K, y=y, timesteps=[300],
                             lam=lam, callback=lambda n, t, z, z0_hat, target: seen.append(z0_hat))
        assert seen[-1].dtype == torch.float32
        return (seen[-1] - seen[-2]).flatten()
    assert torch.cosine_similarity(moved(False), moved(True), dim=0) > 0.99


@pytest.mark.parametrize("guide", [g for g in GUIDES if g != "gradient"])
@pytest.mark.parametrize("overlap", [0, 4])
def test_a_cheaper_function_for_differences(guide, overlap):
    """eps_diff that says the same changes nothing, and takes over the calls of the differences, one a correction."""
    z, y = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=1)
    plain, cheap, both = Counted(gaussian(0.1)), Counted(gaussian(0.1)), Counted(
        lambda *args: torch.cat([gaussian(0.1)(*args)] * 2, 1))
    out = []
    for eps, diff in ((plain, None), (both, cheap)):
        canvas = Canvas(SIDE, SIDE, W, overlap)
        out += sample_levels([Level(eps, canvas, z, K, y, diff)], identity, identity, S, steps=4, inner=2, guide=guide)
    assert torch.equal(out[0].z, out[1].z)
    n, k = 4 * len(canvas.ij), 0 if guide in IN_X0 else 2
    assert [sum(f.rows) for f in (plain, both, cheap)] == [n * (1 + 2 * k), n * (1 + k), n * k]


def test_a_cheaper_function_is_the_one_differences_are_taken_of():
    """Base and shifted point of a difference are both of eps_diff. Catches: a base that belongs to eps, whose distance
    would be divided by delta."""
    z, y = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=1)
    seen = []

    def moved(mean):
        for lam in (0.0, 0.5):
            level = Level(lambda *args: torch.cat([gaussian(0.1)(*args), gaussian(mean)(*args)], 1),
                          Canvas(SIDE, SIDE, W, 4), z, K, y, gaussian(mean))
            sample_levels([level], identity, identity, S, timesteps=[500], lam=lam,
                          callback=lambda *args: seen.append(args[3][0]))
        return seen[-1] - seen[-2]
    assert_close(moved(2.0), moved(0.1), 2e-3)  # another mean has the same slope


def test_a_cheaper_function_with_gradients():
    z, y = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=1)
    level = Level(lambda *args: torch.cat([gaussian(0.1)(*args)] * 2, 1), Canvas(SIDE, SIDE, W), z, K, y, gaussian(0.1))
    sample_levels([level], identity, identity, S, steps=2, guide="gradient")


# ----- 7. Bad input -----

@pytest.mark.parametrize("options, says", [
    ({"window": 32}, "larger canvas"), ({"overlap": 8}, "smaller overlap"), ({"factor": 2}, "factor=2 times"),
    ({"guide": "magic"}, "guide='magic'"), ({"end": "never"}, "end='never'"), ({"kind": "lanczos"}, "kind='lanczos'"),
    ({"guide": "exact", "normalize": "share"}, "only x0 guides"), ({"y": torch.zeros(1, 3, 8, 8)}, "factor=4 times"),
    ({"steps": 0}, "steps=0"),
])
def test_what_does_not_fit(options, says):
    with pytest.raises(ValueError, match=says):
        draw(**options)


def test_nothing_to_match():
    with pytest.raises(UserError, match="give eps_ctx or y"):
        joint_sample(gaussian(0.1), None, identity, identity, S, torch.zeros(1, 3, 16, 16), None, window=W, factor=K)


@pytest.mark.parametrize("guide", ["exact", "gradient"])
def test_a_factor_that_does_not_divide_the_canvas(guide):
    """One clear error, not one of matrices that do not fit."""
    with pytest.raises(UserError, match="factor=3"):
        draw(factor=3, guide=guide)


@pytest.mark.parametrize("guide", [*GUIDES])
@pytest.mark.parametrize("C", [1, 4])
def test_any_number_of_channels(C, guide):
    """Gaussian toys of 1 and 4 channels stand under their context, as those of 3 do."""
    z, ctx = (normal(1, C, n, n, seed=n) for n in (16, 4))
    ramp, share = torch.linspace(-0.8, 0.8, 4).expand(1, C, 4, 4), "x0" in guide
    off = [float((Resize(4).down(fine) - ctx).square().mean()) for fine, ctx in (joint_sample(
        gaussian(0.1), gaussian(ramp, 0.01), identity, identity, S, z, ctx, window=W, factor=4, steps=10, lam=lam,
        guide=guide, normalize="share" if share else True) for lam in (0.0, 0.3))]
    assert off[1] < 0.7 * off[0]


def test_guided_at_all_times_of_any_schedule():
    """catches: guidance that ends at t = 1000 of 2000."""
    long, seen = Schedule("scaled_linear", 2000), []

    def eps(z, t, ij=None):
        return torch.zeros_like(z)
    joint_sample(eps, eps, lambda x: seen.append(1) or x, identity, long, normal(1, 3, 16, 16), normal(1, 3, 4, 4),
                 window=W, factor=4, steps=6, normalize="share", guide="x0")
    assert len(seen) >= 2 * 6


@pytest.mark.parametrize("options, message", [
    ({"zeta": 0.0}, "zeta is more than 0"), ({"inner": -1}, "inner=-1"), ({"lam": -3.0}, "lam=-3"),
    ({"lam": float("nan")}, "lam=nan"), ({"lam": (0.5, 0.1, 0.2)}, "first and last"), ({"delta": -1}, "delta=-1"),
    ({"normalize": "foo"}, "normalize='foo'"), ({"factor": 0}, "factor=0"),
    ({"z_T": torch.zeros(2, 3, 16, 16)}, "one image at a time"), ({"z_T_ctx": None}, "z_T_ctx is None"),
    ({"z_T": torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)}, "in float32 or float64")])
def test_settings_no_one_can_mean(options, message):
    settings = {"z_T": normal(1, 3, 16, 16), "z_T_ctx": normal(1, 3, 4, 4), "window": W, "factor": 4, "steps": 2}
    with pytest.raises(UserError, match=message):
        joint_sample(gaussian(0.1), gaussian(0.5), identity, identity, S, **settings | options)


def test_settings_in_other_words():
    """A list of two for lam, 1 for True, a target of another precision."""
    z, ctx, y = normal(1, 3, 16, 16), normal(1, 3, 4, 4), normal(1, 3, 4, 4, seed=9)
    one, other = (joint_sample(gaussian(0.1), gaussian(0.5), identity, identity, S, z, ctx, window=W, factor=4, steps=4,
                               **options)[0] for options in ({"lam": (0.5, 0.1), "normalize": True, "y": y},
                                                             {"lam": [0.5, 0.1], "normalize": 1, "y": y.double()}))
    assert torch.equal(one, other) and other.dtype == torch.float32


# ----- 8. Ranks -----

CASES = {  # name: height of the canvas, options
    "exact": (28, {}),
    "exact, overlap": (28, {"overlap": 4, "inner": 2}),
    "forward mode, overlap": (28, {"overlap": 4, "fade": True, "delta": 0}),  # ranks exchange no derivatives
    "gradient, fade": (28, {"overlap": 4, "fade": True, "guide": "gradient"}),
    "x0, overlap": (28, {"overlap": 4, "guide": "x0", "normalize": "share"}),
    "x0+proxy, fade": (28, {"overlap": 4, "fade": True, "guide": "x0+proxy", "normalize": "share"}),
    "all ranks over one row": (12, {"overlap": 6, "fade": True}),  # rows 4 to 8 belong to three ranks
    "fewer rows than ranks": (8, {"guide": "x0"}),
}
SINGLE = ("exact", "exact, overlap", "gradient, fade", "x0, overlap")  # those tried in float32 as well


def place_aware(seen):
    """An eps that looks at neighbours and at its place, and remembers which windows it was asked about. One window at a
    time, for kernels may round otherwise in another batch."""
    weight = normal(3, 3, 3, 3, seed=1, dtype=D) / 4

    def eps(z, t, ij):
        seen.append(ij)
        mixed = [torch.tanh(F.conv2d(x, weight.to(x), padding=1) + 0.02 * i - 0.04 * j) for x, (i, j) in
                 zip(z.split(1), ij)]
        return gaussian(0.1)(z, t) + 0.1 * torch.cat(mixed)
    return eps


def every_case(dtype):
    """out: {name: canvas, or what the last callback saw}, {name: corners this process was asked about, in order}."""
    out, corners = {}, {}
    for name in CASES if dtype == D else SINGLE:
        (h, options), seen, looks = CASES[name], [], []

        def look(n, t, *rest, looks=looks):
            looks.append(rest)
        z, z_ctx = normal(1, 3, h, 16, dtype=dtype), normal(1, 3, h // 4, 4, seed=1, dtype=dtype)
        fine, ctx = joint_sample(place_aware(seen), gaussian(0.3), identity, shades, S, z, z_ctx, window=W, factor=K,
                                 timesteps=[300, 700], batch=3, callback=look, **options)
        corners[name] = torch.tensor([p for ij in seen for p in ij])
        out |= {f"{name}: fine": fine, f"{name}: context": ctx, f"{name}: estimate": looks[-1][1],
                f"{name}: target": looks[-1][2], f"{name}: last": looks[-1][0].clone()}
    if dtype == D:
        seen = [[], [], []]
        levels, _ = three(4, eps=[place_aware(s) for s in seen], timesteps=[300, 700])  # 1, 3 and 7 rows of windows
        out |= {f"level {k}": x.canvas.whole(x.z) for k, x in enumerate(levels)}
        corners |= {f"level {k}": torch.tensor([p for ij in s for p in ij]) for k, s in enumerate(seen)}
    return out, corners


def on_rank(rank, folder):
    """What a process of the tests below does: all cases among two ranks, then among three."""
    torch.set_num_threads(1)
    for world in (2, 3):
        if rank < world:
            dist.init_process_group("gloo", f"file://{folder}/{world}", timedelta(seconds=120), world, rank)
            for dtype in (D, torch.float32):
                out, corners = every_case(dtype)
                corners = {f"{name}: corners": x for name, x in corners.items()}
                save_tensors(f"{folder}/{dtype}_{world}_{rank}.safetensors", out | corners)
            dist.destroy_process_group()
    os._exit(0)  # three Pythons that tidy up on two cores take seconds


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """out: f(dtype, world) -> what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_rank, (str(folder),), nprocs=3)
    return lambda dtype, world: [load_tensors(folder / f"{dtype}_{world}_{r}.safetensors")[0] for r in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one(ranks, world):
    """Every rank gets the whole canvas. In float64, for differences blow rounding up. Catches: rows that are exchanged
    twice or not at all, a maximum of one rank's windows, a target that only one rank knows."""
    want, _ = every_case(D)
    for r, got in enumerate(ranks(D, world)):
        for name, x in want.items():
            assert_close(got[name], x, 1e-6, f"{name}, rank {r} of {world}")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("guide", ["difference", "gradient or x0"])
def test_ranks_equal_one_in_float32(ranks, guide, world):
    want, _ = every_case(torch.float32)
    mine = {name.partition(":")[0] for name in want if (GUIDES[CASES[name.partition(":")[0]][1].get(
        "guide", "exact")][1] == "difference") == (guide == "difference")}
    assert len(mine) == 2
    for r, got in enumerate(ranks(torch.float32, world)):
        for name, x in want.items():
            assert name.partition(":")[0] not in mine or assert_close(got[name], x, 1e-5, f"{name}, rank {r}") is None


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_windows(ranks, world):
    """Each rank asks about the windows of its own rows only, as many rows as the others, give or take one. A canvas
    with fewer rows than ranks is not split."""
    _, corners = every_case(D)
    parts = ranks(D, world)
    for name, all_of_them in corners.items():
        rows = [{int(i) for i, _ in got[f"{name}: corners"]} for got in parts]
        calls, every = [len(got[f"{name}: corners"]) for got in parts], {int(i) for i, _ in all_of_them}
        if len(every) < world:
            assert calls == [len(all_of_them)] * world
        else:
            assert set.union(*rows) == every and sum(map(len, rows)) == len(every), name
            assert sum(calls) == len(all_of_them) and max(map(len, rows)) - min(map(len, rows)) <= 1, name
