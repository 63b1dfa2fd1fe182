"""A trained model behind windows: decoding without a seam, conditions anywhere, keys and values, levels."""
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rule import assert_close

from common import Ranks
from diffusion import Schedule, to_x0
from large import windows as module
from large.command import pixels, usual_overlap
from large.ranks import RankCanvas
from large.windows import Grid, MendedLevel, WindowEps, contexts, decode_strips, depth, prepare, sides, slerp
from sample_joint import Canvas, Level, sample_levels, starts
from summarizer import standardize

RANKS = Ranks(0, 1, torch.device("cpu"), None)

# ----- 1. Latents -> pixels -----

def pointwise(z):
    """A decoder of four pixels a side per latent that looks at no neighbour, and says more than a picture holds."""
    x = 1.5 * (2 * z).tanh()
    return x.repeat_interleave(4, -1).repeat_interleave(4, -2) + 0.01 * torch.arange(4).repeat(z.shape[-1])

@pytest.mark.parametrize("h, w, side, overlap, batch", [(16, 16, 24, 8, 8), (40, 56, 24, 8, 2), (41, 30, 24, 8, 8),
                                                        (24, 25, 24, 16, 1), (20, 70, 24, 0, 3), (50, 24, 24, 20, 8)])
def test_strips_are_the_whole_decode(h, w, side, overlap, batch):
    """Within [-1,1]. Catches: a strip cut at the wrong row, a carry lost or added twice, tiles of a row exchanged."""
    z = torch.randn(1, 3, h, w)
    strips = list(decode_strips(pointwise, z, side, overlap, batch))
    assert all(x.shape[:2] == (1, 3) and x.shape[3] == 4 * w and x.shape[2] > 0 for x in strips)
    assert_close(torch.cat(strips, 2), pointwise(z).clamp(-1, 1), 1e-6)

def test_strips_are_streamed():
    """Tiles of one row at a time, decoded when their strip is asked for. Catches: a canvas decoded at once, tiles or
    strips kept to the end, a batch larger than was asked for, a tile decoded twice."""
    side, overlap, batch, alive, calls = 12, 4, 3, [], []

    def decode(z):
        calls.append(len(z))
        assert len(z) <= batch and z.shape[2:] == (side, side)
        x = pointwise(z)
        alive.append(weakref.ref(x))
        return x
    strips = decode_strips(decode, torch.zeros(1, 3, 172, 44), side, overlap, batch)
    assert not calls
    for row, strip in enumerate(strips):
        assert strip.shape[2] <= 4 * side and sum(calls) == 5 * (row + 1)
        alive.append(weakref.ref(strip))
        assert sum(x() is not None for x in alive) <= 4
    assert row + 1 == len(starts(172, side, overlap))

def test_no_seams():
    """Every tile is off by a constant of its own, as GroupNorm makes them: no step may show where they meet. Catches:
    tiles cut hard, a ramp over latents instead of pixels, strips that do not fade into each other."""
    side, overlap, n = 16, 8, [0]

    def decode(z):
        tone = torch.tensor([0.5 * (-1) ** (n[0] + k) * (1 - 0.1 * k) for k in range(len(z))])
        n[0] += len(z)
        return tone[:, None, None, None].expand(-1, 3, 4 * z.shape[2], 4 * z.shape[3])
    x = torch.cat(list(decode_strips(decode, torch.zeros(1, 3, 45, 51), side, overlap, 8)), 2)
    assert x.shape == (1, 3, 180, 204) and x.std() > 0.1
    for dim in (2, 3):
        assert x.diff(dim=dim).abs().max() <= 1.02 / (4 * overlap), dim

def test_decoding_in_strips(model, monkeypatch):
    """uint8, close to the decode at once; tiles are half as large again as a patch. Catches: a canvas decoded whole."""
    z, seen, real = torch.randn(1, 3, 72, 24), [], model.decode
    monkeypatch.setattr(model, "decode", lambda part: seen.append(tuple(part.shape)) or real(part))
    strips = list(pixels(model, z, RANKS, batch=1))
    assert set(seen) == {(1, 3, 24, 24)} and len(strips) == 4 and all(x.dtype == np.uint8 for x in strips)
    with torch.no_grad():
        whole = ((real(z).clamp(-1, 1) + 1) * 127.5)[0].movedim(0, -1).numpy()
    image = np.concatenate(strips)
    assert image.shape == whole.shape and np.corrcoef(image.ravel(), whole.ravel())[0, 1] > 0.9

def test_views_are_summed_as_they_look(monkeypatch):
    """gloo takes the numbers of a view to lie side by side. Catches: a column of a canvas given to it as it is."""
    monkeypatch.setattr(dist, "all_reduce", lambda x: torch.as_strided(x, (x.numel(),), (1,)).mul_(2))
    plane = torch.arange(6.0).view(2, 3)
    canvas = SimpleNamespace(shared=True)
    assert torch.equal(RankCanvas.share(canvas, plane[:, 1]), torch.tensor([2.0, 8.0]))
    assert RankCanvas.share(canvas, plane) is plane and plane[1, 2] == 10

# ----- 2. Conditions -----

def by_hand(a, b, f):
    """slerp of two vectors, one number at a time."""
    cos = sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    if abs(cos) > 0.9995:
        return [(1 - f) * x + f * y for x, y in zip(a, b)]
    angle = math.acos(cos)
    return [(math.sin((1 - f) * angle) * x + math.sin(f * angle) * y) / math.sin(angle) for x, y in zip(a, b)]

def grid(h=5, w=7, width=12):
    return torch.randn(width, h, w)

def test_conditions_at_tiles_are_the_stored_ones():
    """Exactly, for a window that covers whole tiles, as training saw them; beyond the border the last tile is repeated.
    Catches: an index beyond the grid, or one that wraps around."""
    e = grid()
    for s, i, j in ((0, 0, 0), (0, 4, 6), (0, 2.0, 3.0), (1, 1, 2), (2, 1, 3), (1, 3, 5)):
        g = 2 ** s
        assert torch.equal(Grid(e)(s, i, j), standardize(e[:, int(i):int(i) + g, int(j):int(j) + g])), (s, i, j)
    assert_close(Grid(e)(0, 4.5, 6.5), standardize(e[:, 4:, 6:]), 1e-5)
    assert_close(Grid(e)(1, 4, 0), standardize(e[:, [4, 4], :2]), 1e-5)
    assert_close(Grid(e)(1, 0, 6), standardize(e[:, :2, [6, 6]]), 1e-5)

def test_slerp():
    """Along the sphere; parallel vectors, where the formula divides by 0, are mixed linearly."""
    a, b = torch.randn(12, 3), torch.randn(12, 3)
    b[:, 1], b[:, 2] = 2 * a[:, 1], a[:, 2] * 1.5
    b[0, 2] += 1e-3
    for f in (0.25, 0.5, 1.0):
        want = torch.tensor([by_hand(a[:, k].tolist(), b[:, k].tolist(), f) for k in range(3)]).T
        assert_close(slerp(a, b, f), want, 1e-5, f"f={f}")

@pytest.mark.parametrize("s, di, dj", [(0, 0, 0.375), (0, 0.625, 0), (0, 0.375, 0.5), (1, 0.375, 0.5)])
def test_conditions_between_tiles(s, di, dj):
    """From the four tiles around, along columns, then along rows, then standardised. Catches: a fraction from the
    wrong side, rows and columns exchanged, embeddings standardised before they are mixed only."""
    e, g = grid(), 2 ** s
    out = Grid(e)(s, 1 + di, 2 + dj)
    di, dj = 2 * di - 0.5 if di else 0, 2 * dj - 0.5 if dj else 0

    def mix(r, c):
        top, low = (by_hand(e[:, r + k, c].tolist(), e[:, r + k, c + 1].tolist(), dj) if dj else e[:, r + k, c].tolist()
                    for k in (0, 1))
        return by_hand(top, low, di) if di else top
    want = torch.tensor([[mix(1 + r, 2 + c) for c in range(g)] for r in range(g)]).movedim(-1, 0)
    assert out.shape == (12, g, g)
    assert_close(out, standardize(want), 1e-5)
    assert torch.allclose(out.mean(0), torch.zeros(g, g), atol=1e-6) and torch.allclose(out.std(0), torch.ones(g, g))

def test_up_to_a_quarter_off_a_tile_its_condition_is_enough():
    """catches: bare glass that is told of the border in the next tile, and draws an outline where it is not."""
    e = grid()
    for f in (0.1, 0.25):
        assert_close(Grid(e)(0, 1 + f, 3 - f), standardize(e[:, 1:2, 3:4]), 1e-5)
        assert_close(Grid(e)(1, 2 - f, 2 + f), standardize(e[:, 2:4, 2:4]), 1e-5)

def test_windows_between_alike_tiles_are_told_their_mixture():
    """Beside the rim tiles are mirrored, as the canvas is. catches: a mixture of a tile in which the window does not
    lie; tiles held against their neighbours alone; a corner of four of which one is another."""
    one, other, spread = torch.randn(2, 32, 1, 1).unbind() + (0.05 * torch.randn(32, 4, 4),)
    e = torch.cat([one.expand(32, 4, 2), other.expand(32, 4, 2)], 2) + spread           # two halves, (32,4,4)
    g = Grid(e)
    assert torch.equal(g.mixed(0, 1.5, 0.5), g(0, 1.5, 0.5)) and torch.equal(g.mixed(0, 2.5, 2), g(0, 2.5, 2))
    assert_close(g.mixed(0, 1, 0.5), standardize((e[:, 1:2, :1] + e[:, 1:2, 1:2]) / 2), 0.02)
    assert g.mixed(0, 1, 1.5) is None and g.mixed(0, 0.5, 1.5) is None
    assert torch.equal(g.mixed(0, 2, 1), g(0, 2, 1)), "a whole tile"
    assert torch.equal(g.mixed(1, 0, 1), g(1, 0, 1)), "no mixture, though its tiles are not alike"
    assert_close(g.mixed(0, -0.5, 3.5), standardize(e[:, :1, 3:]), 1e-5)
    assert_close(g(1, -1, 2), standardize(e[:, [0, 0], 2:]), 1e-5)
    assert_close(g(2, -2, 0), standardize(e[:, [1, 0, 0, 1]]), 1e-5)
    assert_close(g(2, 0, 2), standardize(e[:, :, [2, 3, 3, 2]]), 1e-5)
    three = e[:, :2, :2].clone()
    three[:, 1, 1] = other[:, 0, 0]
    assert Grid(three).mixed(0, 0.5, 0.5) is None and Grid(three).mixed(0, 0, 0.5) is not None

def test_conditions_of_coarse_scales_are_pooled():
    """16 x 16 tiles become 8 x 8, pooled before they are standardised; half-precision grids are read as float32."""
    e = grid(20, 18).half()
    out = Grid(e)(4, 3, 1)
    mean = e[:, 3:19, 1:17].float().unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4))
    assert out.shape == (12, 8, 8) and out.dtype == torch.float32
    assert_close(out, (mean - mean.mean(0)) / mean.std(0), 1e-5)
    assert Grid(e)(4, 3.5, 1.25).shape == (12, 8, 8)

@pytest.mark.parametrize("s", [0, 1, 2])
def test_windows_get_the_condition_of_their_patch(model, pyramids, s):
    """At whole patches the tokens are those of training, at every scale; between, they are asked for at their place,
    in base tiles. Catches: rows and columns exchanged, latents taken for tiles, the wrong scale's token."""
    k = [x["split"] for x in pyramids.slides].index("test")
    lattice = Canvas(64 >> s, 64 >> s, 16, batch=3)
    c = contexts(model, Grid(pyramids.tensor(k, "e").movedim(-1, 0)), s, lattice)
    for n, (i, j) in enumerate(pyramids.tensor(k, f"ij{s}").tolist()):
        item = pyramids.item(k, s, n, ())
        want = model.summarizer(item["tokens"][None], item["mask"][None], torch.tensor([s]))[0]
        assert_close(c[16 * i, 16 * j], want, 1e-5, f"{i, j}")
    asked = []

    def condition(*where):
        asked.append(where)
        return torch.randn(96, 2 ** s, 2 ** s)
    contexts(model, condition, s, Canvas(20, 24, 16, 12))
    assert asked == [(s, i / 16 * 2 ** s, j / 16 * 2 ** s) for i in (0, 4) for j in (0, 4, 8)]

# ----- 3. A trained model behind windows -----

@pytest.fixture(scope="module")
def windows(model):
    """out: tokens by corner, z, t, corners of three windows."""
    g = torch.Generator().manual_seed(1)
    ij = [(0, 0), (0, 12), (12, 0)]
    c = {p: torch.randn(65, 32, generator=g) for p in ij}
    return c, torch.randn(3, 3, 16, 16, generator=g), torch.tensor([10, 500, 900]), ij

@pytest.mark.parametrize("room", [2 ** 28, 0, 40_000])
@pytest.mark.parametrize("guidance", [1, 2.5])
def test_eps_of_windows(model, windows, guidance, room, monkeypatch):
    """What ZoomLDM.guided says, whether keys and values are kept or there is no room for them."""
    c, z, t, ij = windows
    made, real = [], model.unet.cache_context
    monkeypatch.setattr(module, "BUDGET", room)
    monkeypatch.setattr(model.unet, "cache_context", lambda tokens: made.append(len(tokens)) or real(tokens))
    eps = WindowEps(model, c, guidance)
    with torch.no_grad():
        want = model.guided(torch.stack([c[p] for p in ij]), guidance)(z, t)
        made.clear()
        for _ in range(3):
            assert_close(eps(z, t, ij), want, 1e-5)
        assert_close(eps(z[1:], t[1:], ij[1:]), want[1:], 1e-5)  # other windows, other keys and values
    rows = 1 if guidance == 1 else 2
    assert made == ([3 * rows] * 3 + [2 * rows] if room < 2 ** 28 else [3 * rows, 2 * rows])

def test_guidance_in_an_interval(model, windows, monkeypatch):
    """From the first t on and below the second both branches, elsewhere the conditional one alone, in one pass of half
    the size. catches: the interval turned round, its ends on the wrong side."""
    c, z, _, ij = windows
    tokens, seen, real = torch.stack([c[p] for p in ij]), [], model.eps
    eps = WindowEps(model, c, 2.5, (200, 700))
    monkeypatch.setattr(model, "eps", lambda z, t, kv: seen.append(len(z)) or real(z, t, kv))
    for t, guidance, rows in ((199, 1.0, 3), (200, 2.5, 6), (699, 2.5, 6), (700, 1.0, 3)):
        t = torch.full((3,), t)
        with torch.no_grad():
            want = model.guided(tokens, guidance)(z, t)
            assert_close(eps(z, t, ij), want, 1e-5)
        assert seen[-1] == rows, t

def test_windows_that_are_told_nothing(model, windows, monkeypatch):
    """Their null branch is their only one. catches: a pass too many, guidance of another window."""
    c, z, t, ij = windows
    c[ij[1]] = torch.zeros(65, 32)
    seen, real, eps = [], model.eps, WindowEps(model, c, 2.5)
    with torch.no_grad():
        want = model.guided(torch.stack([c[p] for p in ij]), 2.5)(z, t)
        monkeypatch.setattr(model, "eps", lambda z, t, kv: seen.append(len(z)) or real(z, t, kv))
        assert_close(eps(z, t, ij), want, 1e-5)
    assert seen == [5]

def test_levels(model):
    """Noise depends on seed and scale alone, so that a level is the same whatever is drawn with it."""
    condition = Grid(torch.randn(96, 4, 8, generator=torch.Generator().manual_seed(0)))
    a = prepare(model, condition, (256, 512), [2, 0], 4, seed=3)
    b = prepare(model, condition, (256, 512), [2, 1, 0], 4, seed=3, fade=False, batch=5)
    assert [x.z.shape[2:] for x in b] == [(16, 32), (32, 64), (64, 128)]
    assert [x.A and x.A.factor for x in a + b] == [None, 4, None, 2, 2]
    assert torch.equal(a[0].z, b[0].z) and torch.equal(a[1].z, b[2].z)
    assert not torch.equal(a[0].z.flatten(), b[1].z.flatten()[:a[0].z.numel()])
    assert (b[0].canvas.fade, b[0].canvas.batch, b[0].canvas.overlap, a[0].canvas.fade) == (False, 5, 4, True)
    assert not torch.equal(prepare(model, condition, (256, 512), [0], 4, seed=4)[0].z, a[1].z)
    one, many = prepare(model, condition, (64, 64), [0], None)[0], prepare(model, condition, (256, 512), [0], None)[0]
    assert type(one) is type(a[1]) is Level and type(many) is MendedLevel and many.canvas.overlap == 0
    assert {*many.canvas.ij} == many.eps.told and {*many.between.canvas.ij} == many.between.eps.c.keys()
    corners = {(i, j) for i in (0, 64) for j in (0, 128)}
    assert many.between.eps.told == corners, "each of one tile and its mirror image; all others of tiles unlike"
    row, = prepare(model, condition, (64, 128), [0], None)              # shifted along its length alone
    assert (row.between.canvas.h, row.between.canvas.w) == (16, 48) and row.z.shape == (1, 3, 16, 32)
    assert [x.shape for x in row.z0_hat(row.z, 20, 0.9)] == [row.z.shape] * 2
    blind, = prepare(model, None, (256, 512), [0], None, batch=15)
    blind.z0_hat(blind.z, 20, 0.9)
    assert len(blind.between.eps.kept) == 1, "keys of windows that are told nothing are kept once"
    coarse, = prepare(model, condition, (128, 256), [1], None)          # a window begins on a whole tile there
    c = contexts(model, lambda s, i, j: condition(s, i - 1, j - 1), 1, coarse.between.canvas)
    assert all(torch.equal(coarse.between.eps.c[corner], c[corner]) for corner in c)

def test_how_deep_a_latent_lies():
    """Counted from the middle of a latent to the nearest border inside of the canvas. catches: its rim as a border;
    the last two windows, which share some, with a border where one of them begins."""
    assert depth(Canvas(4, 8, 4))[0].tolist() == [3.5, 2.5, 1.5, 0.5, 0.5, 1.5, 2.5, 3.5]
    assert depth(Canvas(8, 8, 4))[:, 1].tolist() == [2.5, 2.5, 1.5, 0.5, 0.5, 1.5, 2.5, 2.5]
    assert depth(Canvas(4, 6, 4))[0].tolist() == [2.5, 1.5, 0.5, 0.5, 1.5, 2.5]
    assert depth(Canvas(4, 4, 4)).isinf().all()

@pytest.mark.parametrize("n", [20, 24, 32, 40, 48, 56, 64, 136])
def test_no_border_is_in_both(n):
    """But where they cross, no latent lies at a border of the windows that count. catches: sides of an odd number of
    halves, at whose end both have one."""
    tiles, between = (depth(Canvas(more, more, 16)) for more in (n, n + 16))            # (n,n)
    between = between[8:-8, 8:-8]
    counts = torch.where(tiles > 1.5 * between, tiles, between)
    assert counts[0].min() >= 1 and tiles[0].min() <= 0.5, "along a line"
    assert (counts < 1).sum() <= 4 * 2 * len(starts(n, 16)) ** 2, "four latents at a crossing"

def test_borders_are_mended():
    """Below t = 400, but for the last step, windows between the first count beside the borders of these, the first in
    their middles. catches: windows that are asked when nothing is settled yet; mirrored latents left on the canvas; one
    set where the other lies deeper; eps of the one and z0_hat of the other."""
    asked, tiles, wider = [], Canvas(16, 16, 8), Canvas(24, 24, 8)

    def eps_of(value):
        def eps(part, t, ij):
            asked.append((int(t[0]), value))
            return torch.full_like(part, value)
        return eps
    z = torch.randn(1, 3, 16, 16)
    level = Level(eps_of(0.0), None, None, tiles, z)
    level = MendedLevel(**vars(level), between=replace(level, eps=eps_of(1.0), canvas=wider))
    sample_levels([level], Schedule(), timesteps=[1, 20, 399, 400, 990])
    assert asked == [(990, 0), (400, 0), (399, 0), (399, 1), (20, 0), (20, 1), (1, 0)]
    z0, eps = level.z0_hat(z, 20, 0.5)
    assert_close(z0, to_x0(eps, z, 0.5, "eps"), 1e-6)
    which = eps[0, 0]                                                   # (16,16), 1 beside a border
    assert which[7:9].min() == 1 and which[:, 7:9].min() == 1, "tiles meet at 8"
    assert which[3:5, 3:5].max() == 0 and which[11:13, 3:5].max() == 0 and which[0, 0] == 0
    assert torch.equal(which, which.T) and torch.equal(which, which.flip(0))

def test_what_windows_between_see():
    """The canvas around them, mirrored beyond its rim. catches: windows that lie a latent off."""
    seen, z = [], torch.randn(1, 3, 16, 16)

    def look(part, t, ij):
        seen.extend(zip(ij, part))
        return part
    level = Level(lambda part, t, ij: part, None, None, Canvas(16, 16, 8), z)
    level = MendedLevel(**vars(level), between=replace(level, eps=look, canvas=Canvas(24, 24, 8)))
    _, eps = level.z0_hat(z, 20, 0.5)
    assert torch.equal(eps, z), "who gives back what it sees gives back the canvas"
    seen = dict(seen)
    assert len(seen) == 9 and torch.equal(seen[8, 8], z[0, :, 4:12, 4:12])
    assert torch.equal(seen[0, 8][:, 4:], z[0, :, :4, 4:12]) and torch.equal(seen[0, 8][:, 3], z[0, :, 1, 4:12])

def test_sides():
    """Latents at every scale (what does not fit: test_command.py)."""
    assert sides((512, 1024), [3, 1, 0], 64, 4, 5) == [(16, 32), (64, 128), (128, 256)]
    assert sides((256,), [3, 1], 64, 4, 5) == [(16, 16), (64, 64)]

def test_usual_overlap():
    """Windows an odd number of latents apart, so that no lattice of theirs lies on the next one's; nearly a quarter."""
    for window in (2, 4, 8, 12, 16, 24, 32, 64):
        overlap = usual_overlap(window)
        assert (window - overlap) % 2 == 1 and 0 < overlap < window and abs(overlap - window / 4) <= 1, window
