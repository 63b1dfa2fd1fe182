"""The table of large images: what it measures on images whose answer is known, and that nothing is drawn twice."""
import json

import pytest
import torch

from common import UserError, load_tensors
from data import Pyramids
from experiments import quality
from experiments.metrics import psnr
from large.command import settled
from sample_joint import Resize

def table(ready):
    quality.main([str(ready), "--size=256", "--n=1", "--steps=1", "--methods=bicubic;independent", "--device=cpu",
                  "--threads=1"])
    return {r["method"]: r for r in json.loads((ready / "bench" / "quality_256.json").read_text())["rows"]}

def test_rows_and_resume(ready, model, monkeypatch):
    """catches: a real image that differs from itself; images of other settings taken for these; one drawn twice."""
    monkeypatch.setattr(quality, "full_size", lambda: {"U-Net": 5e12})  # the true ones: test_cost.py
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
    other = quality.Config(run=str(ready), size=256, context=2, steps=4)
    with pytest.raises(AssertionError, match="drawn again"):
        quality.Painter(other, model, None, None).paint("independent", 0, None, torch.zeros(1, 3, 64, 64))

def test_each_is_held_to_its_own_context(ready, monkeypatch):
    """catches: an image of other times held against a context that it was not drawn with."""
    monkeypatch.setitem(quality.METHODS, "lean", dict(guide="x0", sampler="lean", steps=2))
    quality.main([str(ready), "--size=256", "--n=1", "--steps=1", "--methods=lean;independent", "--threads=1"])
    row = json.loads((ready / "bench" / "quality_256.json").read_text())["rows"][3]
    kept, other = (load_tensors(ready / "bench" / "quality_256" / f"0_{name}.safetensors")[0]
                   for name in ("lean", "independent"))
    seen = Resize(4).down(kept["x"].movedim(-1, 0)[None] / 127.5 - 1).clamp(-1, 1)
    assert row["method"] == "lean" and row["psnr"] == pytest.approx(psnr(seen, kept["y"]))
    assert psnr(other["y"], kept["y"]) < 40

def test_where_windows_begin():
    """catches: edges of overlapping windows sought where patches meet."""
    names = ("real", "independent", "bicubic", "S2, published", "x0", "x0+proxy", "multidiffusion")
    assert [quality.window_step(name, 16) for name in names] == [16] * 4 + [13] * 3
    assert [quality.window_step(name, 16, "lean") for name in ("x0", "default", "multidiffusion")] == [16, 16, 13]

def test_the_default_is_that_of_the_command():
    """catches: a row that is called so after the command has moved on."""
    row = quality.EVEN | quality.METHODS["default"]
    assert quality.Settings(run="run", **row) == settled(quality.Settings(run="run"))

def test_patches_and_back():
    x = torch.rand(1, 3, 64, 96)
    parts = quality.crops(x, 32)
    assert torch.equal(parts[1], x[0, :, :32, 32:64]) and torch.equal(quality.uncrop(parts, (64, 96)), x)

def test_images_with_gaps_are_no_ceiling(toy, monkeypatch):
    """catches: a patch that was left out shown, and measured against, as grey."""
    data = Pyramids(toy)
    whole = data.tensor
    monkeypatch.setattr(data, "tensor", lambda k, name: whole(k, name)[1:] if name == "ij0" else whole(k, name))
    with pytest.raises(UserError, match="lacks patches that were left out"):
        quality.held_out(data, 0, 256)

@pytest.mark.parametrize("args, words", [
    (["--methods=magic"], "--methods=magic"), (["--n=3"], "lower --n or --size"), (["--n=0"], "--n=0: it must be"),
    (["--sampler=foo"], "--sampler=foo: known"), (["--steps=1001"], "give 1 to 1000"),
    (["--sampler=lean", "--steps=300"], "give 1 to 250"),
    (["--size=160"], "multiple of 64"), (["--size=64", "--n=1"], "less than a patch")])
def test_bad_input(ready, args, words):
    """Refused before anything is measured or fitted."""
    with pytest.raises(UserError, match=words):
        quality.main([str(ready), "--size=256", "--device=cpu", *args])

def test_plot_wants_tables(tmp_path):
    with pytest.raises(UserError, match="measure first"):
        quality.main([str(tmp_path), "--plot"])
    with pytest.raises(UserError, match="say which run: python -m experiments.quality"):
        quality.main([])

def test_learned_features_see_files(toy):
    """The network that judges sees images of 8 bits, as they are saved: a change of a third of a level is none."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra 'encoders' is not installed")
    judge = quality.feature_spaces(Pyramids(toy), learned=True)["photo"]
    levels = torch.arange(3 * 32 * 32).view(1, 3, 32, 32) % 250
    x = levels / 127.5 - 1
    found = judge(x)
    assert found.shape == (1, 1280) and torch.equal(found, judge(x + 0.3 / 127.5))
    assert not torch.equal(found, judge(x + 1.1 / 127.5))
