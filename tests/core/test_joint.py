"""Algorithms S1 and S2 and the faster guides on closed forms: what a correction is, what it costs, how levels work."""
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from rule import assert_close

from common import UserError
from diffusion import Schedule, ddim_sample, ddim_step, ddim_timesteps, dpm_sample, noise_levels, to_x0
from sample_joint import GUIDES, Canvas, Level, Resize, joint_sample, ramps, sample_levels, starts

S = Schedule()
SIDE, W, K = 16, 8, 4  # canvas, window, factor
D = torch.float64
IN_X0 = ("x0", "x0+proxy")
FADES = pytest.mark.parametrize("overlap, fade", [(0, False), (3, False), (3, True)])

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
    z, z_ctx = normal(1, 3, SIDE, SIDE, seed=seed), normal(1, 3, SIDE // K, SIDE // K, seed=seed + 100)
    ramp = torch.linspace(-0.8, 0.8, SIDE // K).expand(1, 3, SIDE // K, -1)
    settings, seen = dict(eps_fine=gaussian(0.1), eps_ctx=gaussian(ramp, 0.01), encode=identity, decode=identity,
                          schedule=S, z_T=z, z_T_ctx=z_ctx, window=W, factor=K, steps=10), []
    out = joint_sample(**settings | options, callback=lambda n, t, z, z0_hat, target: seen.append((z0_hat, target)))
    return (z, z_ctx), out, seen

def against(y, z=None, eps=None, decode=identity, encode=identity, overlap=0, fade=False, kind="box", proxy=None,
            factor=K, batch=64, **options):
    """One level that must match y. out: the level, its (t, z, z0_hat) after every step."""
    z, seen = normal(1, 3, SIDE, SIDE, dtype=y.dtype) if z is None else z, []
    canvas = Canvas(*z.shape[2:], W, overlap, fade, batch)
    level = Level(eps or gaussian(0.1), decode, encode, canvas, z, Resize(factor, kind), y, proxy)
    sample_levels([level], S, callback=lambda n, t, levels: seen.append((t, level.z, level.z0)), **options)
    return level, seen

def cost(z0_hat, target):
    return float((Resize(K).down(z0_hat) - target).square().sum())

@pytest.mark.parametrize("off", [{"lam": 0.0}, {"inner": 0}, {"lam": (0.0, 0.0)}])
@pytest.mark.parametrize("end", ["clean", "published"])
def test_without_guidance_it_is_independent_ddim(off, end):
    """Bit for bit, in fine windows and context alike. Catches: any arithmetic on the canvas that windows do not see."""
    (z, z_ctx), (fine, ctx), _ = draw(**off, end=end)
    canvas = Canvas(SIDE, SIDE, W)
    alone = ddim_sample(gaussian(0.1), canvas.cut(z, canvas.ij), S, 10, end=end)
    assert torch.equal(canvas.cut(fine, canvas.ij), alone)
    ramp = torch.linspace(-0.8, 0.8, SIDE // K).expand(1, 3, SIDE // K, -1)
    assert torch.equal(ctx, ddim_sample(gaussian(ramp, 0.01), z_ctx, S, 10, end=end))

def test_second_order_is_dpm_solver():
    """Of one window without a guide; begun anew in the middle it goes on to the same image. catches: a trend of the
    extrapolated estimates; one at the last step; one that is lost where a run goes on."""
    tau, z = [1, 30, 160, 400, 700, 990], normal(1, 3, W, W, dtype=D)

    def drawn(z, order, kept=None, **options):
        level = Level(gaussian(0.1), identity, identity, Canvas(W, W, W), z, z0=kept)
        states = []
        sample_levels([level], S, timesteps=tau, end="clean", order=order,
                      callback=lambda n, t, levels: states.append((level.z, level.z0)), **options)
        return states
    states = drawn(z, 2)
    assert_close(states[-1][0], dpm_sample(gaussian(0.1), z, S, tau), 1e-12)
    assert (drawn(z, 1)[-1][0] - states[-1][0]).abs().max() > 1e-3
    assert torch.equal(drawn(states[2][0], 2, states[2][1], done=3)[-1][0], states[-1][0])

def test_overlap_without_guidance_is_multidiffusion():
    """Estimates of overlapping windows averaged at every step. The network knows its place, so windows disagree."""
    def eps(z, t, ij):
        return torch.stack([gaussian(0.1 * i - 0.05 * j)(z[n:n + 1], t[n:n + 1])[0] for n, (i, j) in enumerate(ij)])

    def averaged(z, t):
        return stitched(lambda part, ij: eps(part, t, [ij]), z, 4, False)
    z = normal(1, 3, SIDE, SIDE)
    fine, none = joint_sample(eps, None, identity, identity, S, z, None, window=W, factor=K, steps=10, lam=0, overlap=4,
                              y=torch.zeros(1, 3, 4, 4))
    assert_close(fine, ddim_sample(averaged, z, S, 10), 1e-6)
    assert none is None

# ----- 2. The equations -----

# What each equation is, as Z prints them: a piece of the line that does it, and how often
TAGS = {
    3: (r"autograd\.grad\(|backpropagate\(", 1),    # e by backpropagation through the decoder
    4: (r"z0_hat\(z \+ delta \* e", 1),             # g by the finite difference of z0_hat
    5: (r"z = z \+ lam \* g", 1),                   # the step
    6: (r"\bEnc\(", 2),                             # e by the finite difference of the encoder
}

def test_equation_tags():
    """Every line of sample_joint.py that a comment calls Eq. n does what n is in Z; S1 is Eq. 3, 4, 5, S2 is Eq. 6, 4,
    5, in this order of lines. Catches: a swapped number."""
    found = set()
    for line in (ROOT / "sample_joint.py").read_text().splitlines():
        code, _, comment = line.partition("#")
        for number in map(int, re.findall(r"Eq\. (\d)", comment)):
            if code.strip():
                pattern, times = TAGS[number]
                assert len(re.findall(pattern, code)) == times, f"Eq. {number}: {line.strip()}"
                found.add(number)
    assert found == TAGS.keys()
    for guide, numbers in (("s1", ["3", "4", "5"]), ("s2", ["6", "4", "5"])):
        assert re.findall(r"# +Eq\. (\d)", inspect.getsource(GUIDES[guide])) == numbers
        assert GUIDES[guide].__name__ == f"algorithm_{guide}"

def networks():
    """A denoiser that knows its place, a decoder of two pixels a side per latent that knows the mean of its window, an
    encoder."""
    a, b, c = (normal(3, 3, n, n, seed=n, dtype=D) / n for n in (3, 2, 1))

    def eps(z, t, ij):
        place = torch.tensor([[0.1 * i - 0.2 * j] for i, j in ij], dtype=D)[..., None, None]
        return gaussian(0.3 * torch.tanh(F.conv2d(z, a, padding=1) + place))(z, t)

    def decode(z):
        return torch.tanh(F.conv_transpose2d(F.conv2d(z, c), b, stride=2)) * (1 + z.mean((1, 2, 3), keepdim=True))

    def encode(x):
        return F.conv2d(F.avg_pool2d(torch.tanh(x), 2), a.flip(0), padding=1)
    return eps, decode, encode

@pytest.mark.parametrize("guide", ["s1", "s2"])
@pytest.mark.parametrize("inner", [1, 2])
def test_a_plain_transcription(guide, inner):
    """Windows side by side in one batch, as one would write it down from the paper and the released code; to 1e-9 in
    float64. Catches: a sign, a width, a normalisation, another order of updates."""
    eps, decode, encode = networks()
    z, z_ctx, lam, delta, zeta = normal(1, 3, SIDE, SIDE, dtype=D), normal(1, 3, 8, 8, seed=5, dtype=D), 0.3, 0.01, 0.02
    ij, A, steps = [(i, j) for i in (0, 8) for j in (0, 8)], Resize(2), ddim_timesteps(1000, 4)
    ab, ab_prev = noise_levels(S, steps, "published")

    def stitch(x):
        return torch.cat([torch.cat([x[0], x[1]], 2), torch.cat([x[2], x[3]], 2)], 1)[None]

    def cut(x):
        return torch.cat([half for row in x.chunk(2, 2) for half in row.chunk(2, 3)])

    def unit(x):
        return x / x.abs().amax((1, 2, 3), keepdim=True)

    def estimate(z, i):
        return to_x0(eps(z, torch.full((4,), steps[i]), ij), z, ab[i], "eps")
    p, c = cut(z), z_ctx
    for i in (3, 2, 1, 0):
        e_c = eps(c, torch.full((1,), steps[i]), [(0, 0)])
        c0 = to_x0(e_c, c, ab[i], "eps")
        y, c = decode(c0).clamp(-1, 1), ddim_step(c, c0, e_c, ab_prev[i])
        for _ in range(inner):
            z0 = estimate(p, i).requires_grad_()
            x = decode(z0)
            e_img = cut(A.up(y - A.down(stitch(x)))).detach() / 4
            if guide == "s1":
                e, = torch.autograd.grad(x, z0, e_img)
            else:
                e = encode(x + zeta * unit(e_img)) - encode(x)
            p = (p + lam * unit(estimate(p + delta * unit(e), i) - z0)).detach()
        p = ddim_step(p, estimate(p, i), eps(p, torch.full((4,), steps[i]), ij), ab_prev[i])
    fine, ctx = joint_sample(eps, lambda z, t: eps(z, t, [(0, 0)]), encode, decode, S, z, z_ctx, window=W, factor=2,
                             steps=4, inner=inner, lam=lam, delta=delta, zeta=zeta, guide=guide)
    assert_close(fine, stitch(p), 1e-9)
    assert_close(ctx, c, 1e-12)

def stitched(fn, z, overlap, fade, k=1):
    """The weighted mean of fn(window, corner) over all windows of the canvas, in one differentiable expression."""
    h, w = z.shape[2:]
    rows, columns, total = ramps(h * k, W * k, overlap * k, fade), ramps(w * k, W * k, overlap * k, fade), 0
    for i in starts(h, W, overlap):
        for j in starts(w, W, overlap):
            part = fn(z[..., i:i + W, j:j + W], (i, j)) * (rows[i * k][:, None] * columns[j * k])
            total = total + F.pad(part, (k * j, k * (w - W - j), k * i, k * (h - W - i)))
    return total

@FADES
def test_parts_of_the_algorithms(overlap, fade):
    """z0_hat, Dec, Enc and A^T (y - A Dec) of the whole canvas, each against one plain expression; and the gradient of
    the misfit, which without overlap is exactly what backpropagation through Dec gives. Catches: a window at another's
    place, weights used twice or not at all, a factor left out."""
    eps, decode, encode = networks()
    z, y, t = normal(1, 3, 18, 18, dtype=D), normal(1, 3, 9, 9, seed=5, dtype=D), 700
    z = z[..., :16, :16] if not overlap else z
    y = y[..., :8, :8] if not overlap else y
    level = Level(eps, decode, encode, Canvas(*z.shape[2:], W, overlap, fade, 4), z, Resize(4), target=y)
    out = stitched(lambda part, ij: eps(part, torch.tensor([t]), [ij]), z, overlap, fade)
    z0, got = level.z0_hat(z, t, float(S.alpha_bar[t]))
    assert_close(got, out, 1e-6)
    assert_close(z0, to_x0(out, z, S.alpha_bar[t], "eps"), 1e-6)
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        x = stitched(lambda part, ij: decode(part), leaf, overlap, fade, 2)
        r = y - Resize(4).down(x)
        down, = torch.autograd.grad(-r.square().sum() / 2, leaf)
    assert_close(level.Dec(z), x.detach(), 1e-6)
    assert_close(level.error(x.detach()), Resize(4).up(r).detach(), 1e-6)
    pixels = normal(1, 3, *x.shape[2:], seed=3, dtype=D)
    assert_close(level.Enc(pixels), level.canvas.average(lambda ij: encode(level.canvas.cut(pixels, ij))), 1e-12)
    e = level.backpropagate(decode, z, level.error(level.Dec(z)) / 16)
    if overlap:  # the mean over windows; near, but not it
        assert torch.cosine_similarity(e.flatten(), down.flatten(), dim=0) > 0.9
    else:
        assert_close(e, down, 1e-6)

# ----- 3. Corrections go down -----

@pytest.mark.parametrize("overlap, fade, C", [(0, False, 1), (4, False, 3), (4, True, 4)])
@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_descends(guide, overlap, fade, C):
    """More corrections, less misfit, whatever the number of channels. Catches: Eq. 5's sign as printed, a target of the
    wrong estimate, A and its adjoint swapped, an x0 guide that drops its corrections; three channels for granted."""
    lam, z = 0.5 if guide in IN_X0 else 0.02, normal(1, C, SIDE, SIDE, dtype=D)
    y = torch.linspace(-0.8, 0.8, 4, dtype=D).expand(1, C, 4, 4)
    costs = [cost(against(y, z, kind="bicubic", inner=k, lam=lam, timesteps=[901], guide=guide, overlap=overlap,
                          fade=fade)[1][0][2], y) for k in range(6)]
    assert all(b < a for a, b in zip(costs, costs[1:])), costs

@pytest.mark.parametrize("guide", GUIDES)
def test_what_fits_is_left_alone(guide):
    """A constant canvas under a constant context, or one wrong by rounding alone, is not changed; one wrong by more is.
    Catches: a unit step that turns rounding into steps of full size."""
    still = gaussian(0.3, 1e-12)                           # its estimate is 0.3, whatever z
    free, drawn = (joint_sample(still, still, identity, identity, S, normal(1, 3, 16, 16, dtype=D), normal(
        1, 3, 4, 4, dtype=D), window=W, factor=K, steps=4, lam=lam, guide=guide)[0] for lam in (0.0, 0.5))
    assert_close(drawn, free, 1e-6)
    there = Resize(K).down(against(torch.zeros(1, 3, 4, 4), lam=0.0, steps=2)[1][0][2])
    z = against(there, lam=0.0, steps=2, kind="bicubic")[1][0][1]
    near, far = ((against(there + d, lam=0.5, steps=2, kind="bicubic", guide=guide)[1][0][1] - z).abs().max()
                 for d in (1e-6, 1))
    assert near < 1e-3 < 0.05 < far

class Mix:
    """A stand-in for a `Proxy`: decodes to a part of decode's side, by a matrix of colours that is not symmetric."""

    def __init__(self, factor=2):
        self.M, self.factor, self.rows, self.states = normal(3, 3, seed=7) + 2 * torch.eye(3), factor, 0, []
        self.inverse = torch.linalg.inv(self.M.T @ self.M)

    def __call__(self, z):
        self.rows += len(z)
        self.states.append(torch.is_autocast_enabled("cpu"))
        return torch.einsum("ij,njhw->nihw", self.M, z)

# ----- 4. In the space of the estimate -----

@pytest.mark.parametrize("overlap, fade", [(0, False), (4, True)])
@pytest.mark.parametrize("guide", IN_X0)
def test_a_full_share_hits_the_target(guide, overlap, fade):
    """lam=1: the estimate matches at once, and eps gives way, so that z_t is what it was. Catches: a DDIM step with the
    old eps, which adds every correction up again."""
    z, y, A = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=1), Resize(K, "box")
    _, seen = against(y, z, timesteps=[100, 500], guide=guide, lam=1.0, overlap=overlap, fade=fade)
    assert [t for t, _, _ in seen] == [500, 100]
    for (t, after, z0_hat), ab_prev in zip(seen, (S.alpha_bar[100], S.alpha_bar[0])):
        assert (A.down(z0_hat) - y).norm() < 1e-2 * y.norm()
        noise = (z - S.alpha_bar[t].sqrt() * z0_hat) / (1 - S.alpha_bar[t]).sqrt()
        assert_close(after, ab_prev.sqrt() * z0_hat + (1 - ab_prev).sqrt() * noise, 1e-5, f"t={t}")
        z = after

def taken(**settings):
    """The share of the misfit that every step takes away, with corrections in the space of the estimate."""
    z, y, A, shares = normal(1, 3, SIDE, SIDE), normal(1, 3, 4, 4, seed=1), Resize(K, "box"), []
    for t, after, z0_hat in against(y, z, steps=5, guide="x0", **settings)[1]:
        free = to_x0(gaussian(0.1)(z, torch.tensor([t])), z, float(S.alpha_bar[t]), "eps")
        shares.append(float(1 - (A.down(z0_hat) - y).norm() / (A.down(free) - y).norm()))
        z = after
    return pytest.approx(shares, abs=2e-3)

def test_lam_goes_from_first_to_last():
    """Linear over the steps, reaching the last value at the last step; inner corrections compound; a single step takes
    the first. Catches: a division by the number of steps less one."""
    assert taken(lam=(0.9, 0.1)) == [0.9, 0.7, 0.5, 0.3, 0.1] and taken(lam=[0.5, 0.5]) == [0.5] * 5
    assert taken(lam=0.5, inner=2) == [0.75] * 5
    assert taken(lam=(0.0, 1.0)) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert draw(timesteps=[500], lam=(0.5, 0.1))[1][0].isfinite().all()

@pytest.mark.parametrize("overlap", [0, 4])
@pytest.mark.parametrize("smaller, factor", [(2, 8), (8, 4)])
def test_proxy_stands_in_for_the_decoder(overlap, smaller, factor):
    """Its image is smaller than decode's by `smaller`, so A shrinks less; if it is smaller than the target, this is
    reduced too. A full share of what even changes can do makes it match. Catches: the inverse left out, A of the
    decoder's factor, a decode where the proxy should be asked."""
    mix, off = Mix(smaller), []
    side = SIDE * smaller // factor
    y = normal(1, 3, side, side, seed=1)
    A, small = Resize(max(factor // smaller, 1), "box"), Resize(max(smaller // factor, 1), "box").down(y)
    for lam in (1.0, 0.0):
        z0 = against(y, decode=None, encode=None, factor=factor, timesteps=[500], guide="x0+proxy", overlap=overlap,
                     fade=True, proxy=mix, lam=lam)[1][0][2]
        off.append(float((A.down(mix(z0)) - small).norm() / small.norm()))
    assert off[0] < 1e-4 < 0.5 < off[1], off

# ----- 5. Levels -----

def shades(z):
    """A decoder whose windows differ in tone, as GroupNorm makes them."""
    return z + 0.5 * z.mean((1, 2, 3), keepdim=True)

def three(overlap=2, fade=True, **options):
    """Scales of 8, 16 and 32 latents in windows of 8. out: levels, the (estimates, targets) of every step."""
    levels, seen = [], []
    for n, mean in ((8, 0.9), (16, -0.2), (32, 0.1)):
        canvas = Canvas(n, n, W, 0 if n == W else overlap, fade)
        levels.append(Level(gaussian(mean), shades, identity, canvas, normal(1, 3, n, n, seed=n, dtype=D),
                            Resize(2, "box")))
    sample_levels(levels, S, **{"steps": 4} | options,
                  callback=lambda n, t, levels: seen.append([(x.z0, x.target) for x in levels]))
    return levels, seen

@pytest.mark.parametrize("overlap, fade", [(0, False), (4, True)])
def test_each_level_guides_the_next_finer_one(overlap, fade):
    """Targets are the decoded estimates of the level above, after its own correction, stitched and clamped. Catches:
    all levels after the coarsest one, z_t decoded for its estimate, windows of a context in the wrong place."""
    def shaded(x):
        return stitched(lambda part, ij: shades(part), x, 0 if x.shape[-1] == W else overlap, fade)
    _, seen = three(overlap, fade, guide="x0", lam=1.0)
    for step in seen:
        assert step[0][1] is None
        for (above, _), (_, target) in zip(step, step[1:]):
            assert_close(target, shaded(above).clamp(-1, 1), 1e-6)
            assert above.shape[-1] > W or target.abs().max() == 1
    targets = [target for _, target in seen[-1][1:]]
    off = [[Resize(2, "box").down(shaded(x)) - y for (x, _), y in zip(steps[-1][1:], targets)]
           for steps in (seen, three(overlap, fade, lam=0.0)[1])]
    assert all(a.norm() < 0.5 * b.norm() for a, b in zip(*off))

def test_the_guide_is_not_changed_by_what_it_guides():
    """One way: a coarse level is drawn as if it were alone."""
    levels, _ = three(lam=0.5)
    assert torch.equal(levels[0].z, ddim_sample(gaussian(0.9), normal(1, 3, 8, 8, seed=8, dtype=D), S, 4))

def test_a_fixed_target_replaces_the_level_above():
    """y counts, although a context is drawn beside it."""
    y = normal(1, 3, 4, 4, seed=3, dtype=D)
    _, (_, ctx), seen = draw(y=y, lam=1.0, guide="x0", inner=8)
    assert all(torch.equal(target, y) for _, target in seen) and ctx.shape == (1, 3, 4, 4)
    assert (Resize(K).down(seen[-1][0]) - y).norm() < 0.05 * y.norm()

# ----- 6. What it costs, and in which precision -----

class Counted:
    """A function that remembers how many windows it saw in each call, and whether autocast was on."""

    def __init__(self, fn):
        self.fn, self.rows, self.states = fn, [], []

    def __call__(self, x, *args):
        self.rows.append(len(x))
        self.states.append(torch.is_autocast_enabled("cpu"))
        assert x.dtype == torch.float32
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert tf32 == (self.states[-1], self.states[-1]) or tf32 == (False, True)
        return self.fn(x, *args)

def counted(guide, steps=5, inner=3, proxy=None, batch=3, **options):
    """out: fine eps, context eps, encode, decode after a run with four fine windows."""
    f = [Counted(gaussian(0.0)), Counted(gaussian(0.0)), Counted(identity), Counted(identity)]
    fine = Level(f[0], f[3], f[2], Canvas(SIDE, SIDE, W, batch=batch), normal(1, 3, SIDE, SIDE), Resize(2), proxy=proxy)
    coarse = Level(f[1], f[3], f[2], Canvas(W, W, W), normal(1, 3, W, W))
    sample_levels([coarse, fine], S, steps=steps, inner=inner, guide=guide, **options)
    return f

@pytest.mark.parametrize("guide, eps, encode, decode, small", [
    ("s1", 7, 0, 6, None),        # 1 + 2 inner estimates; a decode for the misfit, one to differentiate
    ("s2", 7, 6, 3, None),        # 2 inner encodes, inner decodes of the canvas
    ("x0", 1, 6, 3, None),
    ("x0+proxy", 1, 0, 6, None),  # without a proxy: the decoder in its place
    ("x0+proxy", 1, 0, 0, 18),    # two small passes per correction, of which it makes three in place of one
])
def test_what_a_step_costs(guide, eps, encode, decode, small):
    """Per window; the context's estimate is decoded once. No call has more windows than `batch`. Catches: anything
    computed twice, as the estimate after the last correction, or a batch that is not cut up."""
    mix = Mix(1) if small else None
    fine, ctx, E, Dec = counted(guide, proxy=mix)
    assert [sum(f.rows) for f in (fine, ctx, E, Dec)] == [5 * 4 * eps, 5, 5 * 4 * encode, 5 * (4 * decode + 1)]
    assert not small or mix.rows == 5 * 4 * small
    assert max(fine.rows + E.rows + Dec.rows) == 3
    assert not any(fine.states + E.states + Dec.states), "bf16 is switched on by the caller alone"

@pytest.mark.parametrize("guide, eps, encode, decode, other", [
    # one step, two corrections; the context is decoded first
    ("s1", "00001", "", "1 1010", None),
    ("s2", "00001", "0000", "1 11", None),
    ("x0", "1", "1111", "1 11", None),
    ("x0+proxy", "1", "", "1", "0000 0000 0000"),
])
def test_differences_and_gradients_are_float32(guide, eps, encode, decode, other):
    """Under bf16 autocast: 1 where it is on, which is wherever no small difference is taken. Where it is off, so is
    TF32, and all of it is put back."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    mix = Mix(1) if other else None
    try:
        with torch.autocast("cpu", torch.bfloat16):
            fine, ctx, E, Dec = counted(guide, 1, 2, mix, 4)
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
    for f, want in ((fine, eps), (ctx, "1"), (E, encode), (Dec, decode), *([(mix, other)] if mix else ())):
        assert "".join(str(int(x)) for x in f.states) == want.replace(" ", ""), f

# ----- 7. Bad input -----

@pytest.mark.parametrize("options, says", [
    ({"window": 32}, "larger canvas"), ({"overlap": 8}, "smaller overlap"), ({"factor": 2}, "factor=2 times"),
    ({"guide": "magic"}, "guide='magic'"), ({"y": torch.zeros(1, 3, 8, 8)}, "factor=4 times"),
    ({"steps": 0}, "steps=0"),
    ({"factor": 3}, "3 must divide"), ({"factor": 3, "guide": "s1"}, "3 must divide"), ({"factor": 0}, "factor=0"),
    ({"zeta": 0.0}, "zeta=0"), ({"inner": -1}, "inner=-1"), ({"lam": -3.0}, "lam=-3"), ({"delta": 0}, "delta=0"),
    ({"lam": float("nan")}, "lam=nan"), ({"lam": (0.5, 0.1, 0.2)}, "first,last"), ({"lam": ()}, "first,last"),
    ({"eps_ctx": None}, "give eps_ctx or y"), ({"z_T_ctx": None}, "one image at a time"),
    ({"z_T": torch.zeros(2, 3, 16, 16)}, "one image at a time"),
    ({"z_T": torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)}, "in float32 or float64")])
def test_what_does_not_fit(options, says):
    with pytest.raises(UserError, match=says):
        draw(**options)
