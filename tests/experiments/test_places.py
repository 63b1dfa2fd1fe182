"""What a caption's vector tells of places: what is measured."""
import pytest
import torch

from common import UserError
from experiments import places

def test_what_is_foretold():
    """catches: left taken for top; a share that is 1 of a wrong guess."""
    truth = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert all(share == pytest.approx(1) for share in places.foretold(truth, truth).values())
    found = places.foretold(truth.flip(3), truth)
    assert found["mean"] == pytest.approx(1) == found["top - bottom"]
    assert found["left - right"] < -2

def test_least_squares():
    """catches: a solve with its sides exchanged."""
    g = torch.Generator().manual_seed(0)
    W, v = torch.randn(6, 8, generator=g), torch.randn(400, 6, generator=g)
    aim = (v @ W).view(400, 2, 2, 2)
    assert torch.allclose(places.ridge(v, aim, 1e-9)(v), aim, atol=1e-3)

def test_bad_input():
    with pytest.raises(UserError, match="say which slides"):
        places.main([])
    with pytest.raises(UserError, match="--epochs=0"):
        places.main(["data/toy", "--epochs=0"])
