"""The down-sampling operator of the constraint. Patches and their evaluation are tested in test_train.py."""
import pytest
import torch
from rule import assert_close, golden

from common import UserError
from sample_joint import Resize


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
