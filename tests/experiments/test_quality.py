"""The table of large images: what it measures on images whose answer is known, and that nothing is drawn twice."""
import json

import pytest
import torch

from common import UserError
from data import Pyramids
from experiments import quality


def table(ready, *args):
    quality.main([str(ready), "--size=256", "--n=1", "--steps=2", "--methods=bicubic;independent", "--device=cpu",
                  *args])
    return {r["method"]: r for r in json.loads((ready / "bench" / "quality_256.json").read_text())["rows"]}


def test_rows_and_resume(ready, monkeypatch):
    """catches: a real image that differs from itself; images of other settings taken for these; one drawn twice."""
    first = table(ready)
    assert list(first) == ["real", "coded whole", "coded patches", "bicubic", "independent"]
    assert first["real"]["psnr"] > 40 > first["independent"]["psnr"] # box against bicubic
    assert first["bicubic"]["TFLOP"] == 0 < first["independent"]["TFLOP"]
    assert first["coded whole"]["by_cell"] < first["coded patches"]["by_cell"]
    assert all(r["edges"] == r["by_cell"] for r in first.values())  # nothing here overlaps

    def drawn_again(*a):
        raise AssertionError("drawn again")
    monkeypatch.setattr(quality, "Profile", drawn_again)
    assert table(ready) == first
    with pytest.raises(AssertionError, match="drawn again"):
        table(ready, "--steps=4")


def test_seams_by_tissue():
    """catches: borders counted among the rest, a tissue's steps taken from its neighbour's."""
    x, region = torch.rand(1, 3, 256, 256), torch.zeros(64, 64, dtype=torch.long)
    region[:, 32:] = 2
    x[..., 192:] += 5                                                              # a step at a border inside tissue 2
    found = quality.seams_by_tissue(x, region, 64)
    assert set(found) == {0, 2} and found[0] == pytest.approx(1, abs=0.02) and found[2] > 3


def test_where_windows_begin():
    """catches: edges of overlapping windows sought where patches meet."""
    cfg = quality.Config(run="r")
    assert [quality.apart(cfg, name, 3, 16) for name in ("real", "independent", "bicubic", "S2, published", "x0",
                                                         "x0+proxy", "multidiffusion")] == [16] * 4 + [13] * 3


def test_images_with_gaps_are_no_ceiling(toy, monkeypatch):
    """catches: a patch that was left out shown, and measured against, as grey."""
    data = Pyramids(toy)
    assert quality.held_out(data, 0, 256)[1].abs().max() <= 1
    whole = data.tensor
    monkeypatch.setattr(data, "tensor", lambda k, name: whole(k, name)[1:] if name == "ij0" else whole(k, name))
    with pytest.raises(UserError, match="lacks patches that were left out"):
        quality.held_out(data, 0, 256)


def test_bad_input(ready, tmp_path):
    with pytest.raises(UserError, match="--methods=magic"):
        table(ready, "--methods=magic")
    with pytest.raises(UserError, match="lower --n or --size"):
        table(ready, "--n=3")
    for arg in ("--n=0", "--steps=0", "--size=0"):
        with pytest.raises(UserError, match="all are at least 1"):
            table(ready, arg)
    with pytest.raises(UserError, match="multiple of 64"):
        quality.main([str(ready), "--size=160", "--device=cpu"])
    with pytest.raises(UserError, match="less than a patch of 64"):
        quality.main([str(ready), "--size=64", "--n=1", "--device=cpu"])
    with pytest.raises(UserError, match="measure first"):
        quality.main([str(tmp_path), "--plot"])
