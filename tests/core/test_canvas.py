"""What a large image is made of: the operator A and its parts, windows and weights, strips of pixels, conditions."""
import math
import weakref

import pytest
import torch
from rule import assert_close, golden

from common import UserError
from sample_joint import Canvas, Grid, Resize, decode_strips, ramps, shrink_matrix, slerp, starts, usual_overlap
from summarizer import standardize

KINDS = pytest.mark.parametrize("kind", ["bicubic", "box"])


# ----- 1. The operator A -----

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


@KINDS
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


def test_factor_one_changes_nothing():
    """Catches: a level's own decode, seen through A of factor 1, that comes back blurred or shifted."""
    x = torch.randn(1, 3, 5, 9)
    assert torch.equal(Resize(1).down(x), x) and torch.equal(Resize(1).up(x), x)


def test_sides_that_do_not_divide():
    with pytest.raises(ValueError, match="4 does not divide"):
        Resize(4).down(torch.zeros(1, 3, 16, 18))
    for factor, kind in ((4, "lanczos"), (0, "box")):
        with pytest.raises(UserError, match="at least 1, and bicubic or box"):
            Resize(factor, kind)


def test_resize_wants_fractions():
    """catches: matrices of integers, which are zero."""
    for image in (torch.full((8, 8), 129, dtype=torch.uint8), torch.full((8, 8), 100)):
        for f in (Resize(2).down, Resize(2).up):
            with pytest.raises(UserError, match="x.float"):
                f(image)
    for factor in (2.0, "2"):
        with pytest.raises(UserError, match="whole factor"):
            Resize(factor)


def test_the_same_operator_is_kept():
    """Catches: matrices made anew for every window and step, or one kind standing in for the other."""
    assert Resize.cached(4) is Resize.cached(4) and Resize.cached(4, "box").kind == "box"
    A = Resize(4)
    assert A.matrix(64, torch.zeros(1)) is A.matrix(64, torch.zeros(1))
    assert A.matrix(64, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert A.part(64, 8, 24, torch.zeros(1))[1] is A.part(64, 8, 24, torch.zeros(1))[1]


TILES = [(0, 0, 16, 32), (0, 5, 7, 11), (31, 17, 9, 30), (1, 2, 1, 1), (80, 64, 16, 32), (95, 127, 1, 1),
         (3, 0, 90, 128)]


@KINDS
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_parts_are_the_whole(factor, kind):
    """A of a tile anywhere, added in; and what of up(y) a tile shows. Catches: a row of A cut off too early, a tile
    that lies off by some pixels, borders mirrored at the edge of the part instead of the image."""
    H, W = 96, 128
    A, y = Resize(factor, kind), torch.randn(1, 3, H // factor, W // factor, dtype=torch.float64)
    up = A.up(y)
    for i, j, h, w in TILES:
        x = torch.randn(1, 3, h, w, dtype=torch.float64)
        whole = torch.zeros(1, 3, H, W, dtype=torch.float64)
        whole[..., i:i + h, j:j + w] = x
        total = torch.ones_like(y)
        A.add_down(total, x, i, j)
        assert_close(total, 1 + A.down(whole), 1e-12, f"tile {i, j, h, w}")
        assert_close(A.up_part(y, i, j, (h, w)), up[..., i:i + h, j:j + w], 1e-12, f"tile {i, j, h, w}")


@KINDS
def test_parts_on_a_long_side(kind):
    """The part is cut out of a small image's A: it must be the same in the middle of a long side and at its ends, and
    as small as its tile. Catches: a matrix as long as the whole side, kept for every window."""
    n, side, A = 4096, 48, Resize(16, kind)
    full = shrink_matrix(n, 16) if kind == "bicubic" else A.matrix(n, torch.zeros((), dtype=torch.float64))
    for a in (0, 8, 24, 100, 2000, n - side - 8, n - side):
        p, rows = A.part(n, a, a + side, torch.zeros((), dtype=torch.float64))
        assert len(rows) <= side // 16 + 6
        want = full[:, a:a + side].clone()
        assert torch.allclose(rows, want[p:p + len(rows)], atol=1e-15)
        want[p:p + len(rows)] = 0
        assert not want.any(), f"rows left out at {a}"


# ----- 2. Windows -----

LINES = [(16, 16, 0), (16, 16, 5), (32, 16, 0), (40, 16, 0), (40, 16, 4), (41, 16, 4), (53, 16, 8), (64, 16, 12),
         (37, 16, 15), (17, 16, 1)]


@pytest.mark.parametrize("window", [2, 4, 8, 12, 16, 24, 32, 64])
def test_usual_overlap(window):
    """Windows an odd number of latents apart, so that no lattice of theirs lies on the next one's; nearly a quarter."""
    overlap = usual_overlap(window)
    assert (window - overlap) % 2 == 1 and 0 < overlap < window and abs(overlap - window / 4) <= 1


@pytest.mark.parametrize("n, side, overlap", LINES)
def test_windows_cover_a_line(n, side, overlap):
    """From end to end, without gaps, none beyond; neighbours share `overlap`, the last two at least that."""
    at = starts(n, side, overlap)
    assert at[0] == 0 and at[-1] == n - side and len(set(at)) == len(at)
    shared = [a + side - b for a, b in zip(at, at[1:])]
    assert all(s == overlap for s in shared[:-1]) and all(overlap <= s < side for s in shared)


@pytest.mark.parametrize("fade", [False, True])
@pytest.mark.parametrize("n, side, overlap", LINES)
def test_weights_of_a_line(n, side, overlap, fade):
    """They sum to 1. Uniform: all that lie over a place count the same. Fading: from place to place a weight changes
    by no more than 1 / overlap, about twice that where three windows meet; at the ends one counts in full."""
    total, lines = torch.zeros(n), ramps(n, side, overlap, fade)
    assert list(lines) == starts(n, side, overlap)
    rows = torch.zeros(len(lines), n)
    for row, (a, w) in zip(rows, lines.items()):
        assert w.shape == (side,) and (w > 0).all()
        row[a:a + side] = w
        total[a:a + side] += 1
    assert torch.allclose(rows.sum(0), torch.ones(n))
    if not fade:
        assert torch.allclose(rows, (rows > 0) / total)
    elif overlap:
        even = 2 * overlap <= side and (n - side) % (side - overlap) == 0
        assert rows.diff(dim=1).abs().max() <= (1.01 if even else 2.3) / overlap
    assert rows[0, 0] == rows[-1, -1] == 1


def test_fading_is_linear():
    """Two windows that share four: 1/8, 3/8, 5/8, 7/8. Catches: ramps from 0, where a window would not count."""
    lines = ramps(28, 16, 4)
    assert torch.allclose(lines[12][:5], torch.tensor([1, 3, 5, 7, 8]) / 8)
    assert torch.allclose(lines[0][11:], torch.tensor([8, 7, 5, 3, 1]) / 8)


@pytest.mark.parametrize("fade", [False, True])
@pytest.mark.parametrize("window, overlap", [(8, 0), (8, 3), (8, 6), ((6, 10), 4)])
def test_average(window, overlap, fade):
    """Weights sum to 1 at every place; windows that agree come back, exactly where only one lies; windows that do not
    are mixed by their weights. Catches: rows and columns of weights exchanged, a window at another's place."""
    z = torch.randn(1, 3, 19, 22)
    canvas = Canvas(19, 22, window, overlap, fade, batch=4)
    wh, ww = canvas.window
    assert (canvas.lo, canvas.hi) == (0, 19) and torch.equal(canvas.whole(canvas.own(z)), z)
    assert canvas.ij == [(i, j) for i in starts(19, wh, overlap) for j in starts(22, ww, overlap)]
    back = canvas.average(lambda ij: canvas.cut(z, ij))
    assert torch.allclose(back, z, atol=1e-6)
    count = canvas.total(lambda ij: torch.ones(len(ij), 1, wh, ww))
    alone = (count == 1).expand_as(z)
    assert torch.equal(back[alone], z[alone]) and alone.any()
    one = canvas.average(lambda ij: torch.ones(len(ij), 2, wh, ww, dtype=torch.float64))
    assert torch.allclose(one, torch.ones(1, 2, 19, 22, dtype=torch.float64)) and one.dtype == torch.float64
    rows, columns = ramps(19, wh, overlap, fade), ramps(22, ww, overlap, fade)
    mixed = canvas.average(lambda ij: torch.stack([torch.full((1, wh, ww), 10.0 * i + j) for i, j in ij]))
    want = torch.zeros(19, 22)
    for i, j in canvas.ij:
        want[i:i + wh, j:j + ww] += (10.0 * i + j) * rows[i][:, None] * columns[j]
    assert torch.allclose(mixed[0, 0], want, rtol=1e-5)


def test_batches():
    """All windows once, at most `batch` of them in a call."""
    canvas, seen = Canvas(40, 40, 16, 4, batch=4), []
    canvas.total(lambda ij: seen.append(ij) or torch.zeros(len(ij), 1, 16, 16))
    assert [len(ij) for ij in seen] == [4, 4, 1] and sum(seen, []) == canvas.ij


@pytest.mark.parametrize("args", [(16, 16, 17), (15, 16, 16), (16, 12, 16), (32, 32, 16, 16), (32, 32, (8, 16), 8),
                                  (32, 32, 16, -1)])
def test_windows_that_do_not_cover(args):
    """Catches: windows that never advance, or a canvas with places that none covers."""
    with pytest.raises(UserError, match="larger canvas, or a smaller overlap"):
        Canvas(*args)


# ----- 3. Latents -> pixels -----

def pointwise(z):
    """A decoder of four pixels a side per latent that looks at no neighbour."""
    return (2 * z).tanh().repeat_interleave(4, -1).repeat_interleave(4, -2) + 0.01 * torch.arange(4).repeat(z.shape[-1])


@pytest.mark.parametrize("h, w, side, overlap, batch", [(16, 16, 24, 8, 8), (40, 56, 24, 8, 2), (41, 30, 24, 8, 8),
                                                        (24, 25, 24, 16, 1), (20, 70, 24, 0, 3), (50, 24, 24, 20, 8)])
def test_strips_are_the_whole_decode(h, w, side, overlap, batch):
    """Catches: a strip cut at the wrong row, a carry that is lost or added twice, tiles side by side exchanged."""
    z = torch.randn(1, 3, h, w)
    strips = list(decode_strips(pointwise, z, side, overlap, batch))
    assert all(x.shape[:2] == (1, 3) and x.shape[3] == 4 * w and x.shape[2] > 0 for x in strips)
    assert_close(torch.cat(strips, 2), pointwise(z).clamp(-1, 1), 1e-6)


def test_strips_are_pictures():
    """Within [-1,1], whatever the decoder says."""
    x = torch.cat(list(decode_strips(lambda z: 3 * z, torch.randn(1, 3, 20, 20), 12, 4)), 2)
    assert x.max() == 1 and x.min() == -1


def test_strips_are_streamed():
    """Tiles of one row at a time, decoded when their strip is asked for. Catches: a canvas decoded at once, tiles or
    strips kept to the end, a batch larger than was asked for, a tile decoded twice."""
    side, overlap, batch, most = 12, 4, 3, {}
    for h in (44, 172):
        alive, calls, tiles = [], [], 0

        def decode(z, alive=alive, calls=calls):
            calls.append(len(z))
            assert len(z) <= batch and z.shape[2:] == (side, side)
            x = pointwise(z)
            alive.append(weakref.ref(x))
            return x
        strips = decode_strips(decode, torch.zeros(1, 3, h, 44), side, overlap, batch)
        assert not calls
        most[h] = 0
        for row, strip in enumerate(strips):
            assert strip.shape[2] <= 4 * side and sum(calls) == 5 * (row + 1)
            alive.append(weakref.ref(strip))
            most[h] = max(most[h], sum(x() is not None for x in alive))
            tiles += 5
        assert tiles == 5 * len(starts(h, side, overlap)) == sum(calls)
    assert most[44] == most[172] <= 4


@pytest.mark.parametrize("h, w", [(40, 40), (45, 51)])
def test_no_seams(h, w):
    """Every tile is off by a constant of its own, as GroupNorm makes them: no step may show where they meet. Catches:
    tiles cut hard, a ramp over latents instead of pixels, strips that do not fade into each other."""
    side, overlap, n = 16, 8, [0]

    def decode(z):
        tone = torch.tensor([0.5 * (-1) ** (n[0] + k) * (1 - 0.1 * k) for k in range(len(z))])
        n[0] += len(z)
        return tone[:, None, None, None].expand(-1, 3, 4 * z.shape[2], 4 * z.shape[3])
    x = torch.cat(list(decode_strips(decode, torch.zeros(1, 3, h, w), side, overlap, 8)), 2)
    assert x.shape == (1, 3, 4 * h, 4 * w) and x.std() > 0.1
    for dim in (2, 3):
        assert x.diff(dim=dim).abs().max() <= 1.02 / (4 * overlap), dim


# ----- 4. Conditions -----

def by_hand(a, b, f):
    """slerp of two vectors, one number at a time."""
    cos = sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    if abs(cos) > 0.9995:
        return [(1 - f) * x + f * y for x, y in zip(a, b)]
    angle = math.acos(cos)
    return [(math.sin((1 - f) * angle) * x + math.sin(f * angle) * y) / math.sin(angle) for x, y in zip(a, b)]


def grid(h=5, w=7, width=12):
    return torch.randn(width, h, w)


@pytest.mark.parametrize("s, i, j", [(0, 0, 0), (0, 4, 6), (0, 2.0, 3.0), (1, 1, 2), (2, 1, 3), (1, 3, 5)])
def test_conditions_at_tiles_are_the_stored_ones(s, i, j):
    """Exactly, for a window that covers whole tiles, as training saw them."""
    e, g = grid(), 2 ** s
    assert torch.equal(Grid(e)(s, i, j), standardize(e[:, int(i):int(i) + g, int(j):int(j) + g]))


def test_slerp():
    """Half-way stays on the sphere; parallel vectors, where the formula divides by 0, are mixed linearly."""
    a, b = torch.randn(12, 3), torch.randn(12, 3)
    b[:, 1], b[:, 2] = 2 * a[:, 1], a[:, 2] * 1.5
    b[0, 2] += 1e-3
    for f in (0.25, 0.5, 1.0):
        out = slerp(a, b, f)
        want = torch.tensor([by_hand(a[:, k].tolist(), b[:, k].tolist(), f) for k in range(3)]).T
        assert_close(out, want, 1e-5, f"f={f}")
    unit = torch.nn.functional.normalize(a, dim=0)
    assert torch.allclose(slerp(unit, unit.roll(1, 0), 0.5).norm(dim=0), torch.ones(3))
    assert torch.equal(slerp(a, b, 0), a)


@pytest.mark.parametrize("s", [0, 1])
@pytest.mark.parametrize("di, dj", [(0, 0.25), (0.75, 0), (0.25, 0.5)])
def test_conditions_between_tiles(s, di, dj):
    """From the four tiles around, along columns, then along rows, then standardised. Catches: a fraction from the
    wrong side, rows and columns exchanged, embeddings standardised before they are mixed only."""
    e, g = grid(), 2 ** s
    out = Grid(e)(s, 1 + di, 2 + dj)

    def mix(r, c):
        top, low = (by_hand(e[:, r + k, c].tolist(), e[:, r + k, c + 1].tolist(), dj) if dj else e[:, r + k, c].tolist()
                    for k in (0, 1))
        return by_hand(top, low, di) if di else top
    want = torch.tensor([[mix(1 + r, 2 + c) for c in range(g)] for r in range(g)]).movedim(-1, 0)
    assert out.shape == (12, g, g)
    assert_close(out, standardize(want), 1e-5)
    assert torch.allclose(out.mean(0), torch.zeros(g, g), atol=1e-6) and torch.allclose(out.std(0), torch.ones(g, g))


def test_conditions_beyond_the_border():
    """The last tile is repeated. Catches: an index beyond the grid, or one that wraps around."""
    e = grid(3, 4)
    assert torch.allclose(Grid(e)(0, 2.5, 3.5), standardize(e[:, 2:3, 3:4]), atol=1e-5)
    assert torch.allclose(Grid(e)(1, 2, 0), standardize(e[:, [2, 2], :2]), atol=1e-5)
    assert torch.allclose(Grid(e)(1, 0, 3), standardize(e[:, :2, [3, 3]]), atol=1e-5)


def test_conditions_of_coarse_scales_are_pooled():
    """16 x 16 tiles become 8 x 8, pooled before they are standardised; half-precision grids are read as float32."""
    e = grid(20, 18).half()
    out = Grid(e)(4, 3, 1)
    mean = e[:, 3:19, 1:17].float().unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4))
    assert out.shape == (12, 8, 8) and out.dtype == torch.float32
    assert_close(out, (mean - mean.mean(0)) / mean.std(0), 1e-5)
    assert Grid(e)(4, 3.5, 1.25).shape == (12, 8, 8)


def test_swap_and_paste():
    """Cells move, all others stay, and so does the tensor that was given (a slide's own, mapped from its file)."""
    e = grid()
    given, moved = e.clone(), Grid(e)
    moved.swap((0, 1), (3, 5))
    want = e.clone()
    want[:, 0, 1], want[:, 3, 5] = e[:, 3, 5], e[:, 0, 1]
    assert torch.equal(moved.e, want)
    moved.paste((0, 0), (1, 1), (3, 4))  # source and target share cells
    before, want = want.clone(), want.clone()
    want[:, 1:4, 1:5] = before[:, 0:3, 0:4]
    assert torch.equal(moved.e, want) and torch.equal(e, given)
    Grid(e).paste((0, 0), (1, 1), (1, 1))
    assert torch.equal(e, given)
    with pytest.raises(UserError, match="do not lie inside"):
        moved.swap((0, 0), (5, 0))


def test_a_swap_reaches_its_neighbourhood_only():
    """Windows that touch no moved cell keep their condition. Catches: an edit that changes the whole image."""
    e = grid(6, 6)
    there, moved = Grid(e), Grid(e)
    moved.swap((1, 1), (4, 4))
    for k in range(11):
        for m in range(11):
            i, j = k / 2, m / 2
            near = any(abs(i - a) < 1 and abs(j - a) < 1 for a in (1, 4))
            assert torch.equal(there(0, i, j), moved(0, i, j)) != near, (i, j)
