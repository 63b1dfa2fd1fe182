"""What a large image is made of: the operator A, windows on a canvas and their weights."""
import pytest
import torch
from rule import assert_close, golden

from common import UserError
from sample_joint import Canvas, Resize, ramps, shrink_matrix, starts

KINDS = pytest.mark.parametrize("kind", ["bicubic", "box"])
D = torch.float64

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
        x, y = torch.randn(2, 3, h, w, dtype=D), torch.randn(2, 3, h // factor, w // factor, dtype=D)
        assert torch.allclose((A.down(x) * y).sum(), (x * A.up(y)).sum() / factor ** 2)
        assert torch.allclose(A.down(torch.ones_like(x)), torch.ones_like(y))

def test_box_averages_blocks_and_factor_one_changes_nothing():
    """Catches: a level's own decode, seen through A of factor 1, that comes back blurred or shifted."""
    x, y, box = torch.randn(1, 3, 16, 16, dtype=D), torch.randn(1, 3, 4, 4, dtype=D), Resize(4, "box")
    assert torch.allclose(box.down(x), torch.nn.functional.avg_pool2d(x, 4))
    assert torch.allclose(box.down(box.up(y)), y)
    assert torch.equal(Resize(1).down(x), x) and torch.equal(Resize(1).up(x), x)

@pytest.mark.parametrize("n, k", [(16, 2), (48, 3), (64, 16), (16, 16), (8, 4)])
def test_the_border_is_a_mirror(n, k):
    """Also where the taps reach over both: the middle of a long row of images and mirror images."""
    x = torch.randn(1, n, dtype=D)
    row = torch.cat([x, x.flip(1), x, x.flip(1), x], 1)
    assert_close(x @ shrink_matrix(n, k).T, (row @ shrink_matrix(5 * n, k).T)[:, 2 * n // k:3 * n // k], 1e-12)

def test_what_resize_refuses():
    """catches: matrices of integers, which are zero; a crop without a word."""
    for shape in ((16, 18), (18, 16)):
        with pytest.raises(ValueError, match="18 pixels.*4 must divide"):
            Resize(4).down(torch.zeros(1, 3, *shape))
    for factor, kind in ((4, "lanczos"), (0, "box"), (2.0, "box"), ("2", "bicubic")):
        with pytest.raises(UserError, match="whole factor, and bicubic or box"):
            Resize(factor, kind)
    for f in (Resize(2).down, Resize(2).up):
        with pytest.raises(UserError, match="x.float"):
            f(torch.full((8, 8), 129, dtype=torch.uint8))

# ----- 2. Windows -----

LINES = [(16, 16, 0), (16, 16, 5), (32, 16, 0), (40, 16, 0), (40, 16, 4), (41, 16, 4), (53, 16, 8), (64, 16, 12),
         (37, 16, 15), (17, 16, 1)]

@pytest.mark.parametrize("fade", [False, True])
@pytest.mark.parametrize("n, side, overlap", LINES)
def test_windows_of_a_line(n, side, overlap, fade):
    """They cover it from end to end; neighbours share `overlap`, the last two at least that. Their weights sum to 1.
    Uniform: all that lie over a place count the same. Fading: from place to place a weight changes by no more than
    1 / overlap, about twice that where three windows meet; at the ends one counts in full."""
    at, lines = starts(n, side, overlap), ramps(n, side, overlap, fade)
    assert at[0] == 0 and at[-1] == n - side and list(lines) == at
    shared = [a + side - b for a, b in zip(at, at[1:])]
    assert all(s == overlap for s in shared[:-1]) and all(overlap <= s < side for s in shared)
    rows = torch.zeros(len(lines), n)
    for row, (a, w) in zip(rows, lines.items()):
        assert w.shape == (side,) and (w > 0).all()
        row[a:a + side] = w
    assert torch.allclose(rows.sum(0), torch.ones(n))
    if not fade:
        assert torch.allclose(rows, (rows > 0) / (rows > 0).sum(0))
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
@pytest.mark.parametrize("k", [1, 3])
def test_average(window, overlap, fade, k):
    """Windows that agree come back, exactly where only one lies; windows that do not are mixed by weights that sum to
    1, of latents or of their k x k pixels. Catches: rows and columns exchanged, a window at another's place, ramps that
    are steps in pixels."""
    z = torch.randn(1, 3, 19 * k, 22 * k)
    canvas = Canvas(19, 22, window, overlap, fade, batch=4)
    high, wide = canvas.window
    assert canvas.ij == [(i, j) for i in starts(19, high, overlap) for j in starts(22, wide, overlap)]
    back, count = canvas.average(lambda ij: canvas.cut(z, ij)), torch.zeros(19 * k, 22 * k)
    rows, columns = (ramps(n * k, side * k, overlap * k, fade) for n, side in ((19, high), (22, wide)))
    mixed = canvas.average(lambda ij: torch.stack([torch.full((1, high * k, wide * k), 10.0 * i + j) for i, j in ij]))
    want = torch.zeros(19 * k, 22 * k)
    for i, j in canvas.ij:
        at = slice(i * k, (i + high) * k), slice(j * k, (j + wide) * k)
        count[at] += 1
        want[at] += (10.0 * i + j) * rows[i * k][:, None] * columns[j * k]
    assert torch.allclose(back, z, atol=1e-6) and torch.equal(back[..., count == 1], z[..., count == 1])
    assert torch.allclose(mixed[0, 0], want, rtol=1e-5) and (count == 1).any()

@pytest.mark.parametrize("k", [1, 2])
def test_unit(k):
    """Every window's largest value becomes 1; where windows overlap, it is divided by the mean of theirs. Catches:
    one maximum for the whole canvas, steps at the border of windows."""
    canvas, d = Canvas(8, 12, 8, 4), torch.ones(1, 3, 8 * k, 12 * k)
    d[..., 8 * k:] = -4
    peak = torch.tensor([1.0] * 4 + [2.5] * 4 + [4.0] * 4)
    assert_close(canvas.peak(d), peak.expand(1, 1, 8, 12), 1e-6)
    assert_close(canvas.unit(d)[0, 0, 0], d[0, 0, 0] / peak.repeat_interleave(k), 1e-6)
    assert canvas.unit(torch.zeros(1, 3, 8, 12)).abs().max() == 0

@pytest.mark.parametrize("args", [(16, 16, 17), (15, 16, 16), (16, 12, 16), (32, 32, 16, 16), (32, 32, (8, 16), 8),
                                  (32, 32, 16, -1)])
def test_windows_that_do_not_cover(args):
    """Catches: windows that never advance, or a canvas with places that none covers."""
    with pytest.raises(UserError, match="larger canvas, or a smaller overlap"):
        Canvas(*args)
