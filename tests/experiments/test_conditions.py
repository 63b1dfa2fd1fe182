"""The EDM, patches from nothing, and what conditions from nothing are worth: on a tiny run with all models."""
import json

import pytest
import torch

import cdm
import sample_joint
from common import UserError
from data import Pyramids
from diffusion import ZoomLDM
from experiments import conditions
from experiments.edm import EDM, TokenDiT

# ----- 1. The EDM -----

def test_edm_hears_everything_told():
    """Time and scale change the answer, and each token hears the others. catches: an input that is dropped."""
    net = TokenDiT(cdm.DiTConfig(9, 4, 32, 2, 4, 64, 5))
    assert not net(torch.randn(1, 9, 4), torch.tensor([3]), torch.tensor([0])).any()          # starts at zero
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, s = torch.randn(2, 9, 4), torch.tensor([5, 5]), torch.tensor([1, 1])
    base, moved = net(x, t, s), x.clone()
    moved[:, 0] += 1
    for other in (net(x, t + 300, s), net(x, t, s + 1), net(moved, t, s)):
        assert (other[:, 1:] - base[:, 1:]).abs().max() > 1e-3

def test_edm_loads(conditioned):
    """catches: the CDM's schedule, or times moved to noise, where the EDM's do without."""
    model = ZoomLDM.from_run(conditioned)
    made = cdm.load_conditioner(conditioned, "edm", model)
    assert isinstance(made, EDM) and made.shift == 1.0 and made.schedule.kind == "linear"
    assert made.tokens([0, 2], steps=3).shape == (2, 65, model.summarizer.cfg.width)

# ----- 2. Patches from nothing -----

@pytest.mark.parametrize("command, args", [(cdm.main, ["sample", "HOME", "--model=edm"]),
                                           (sample_joint.main, ["HOME", "--condition=cdm"])])
def test_sample_writes_patches(command, args, conditioned, tmp_path):
    """By either name. catches: a scale that is ignored; more or fewer files."""
    more = ["--scale=1", "--n=2", "--steps=2", f"--out={tmp_path}", "--device=cpu"]
    command([arg.replace("HOME", str(conditioned)) for arg in args] + more)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["scale1_000.png", "scale1_001.png", "sheet.png"]

@pytest.mark.parametrize("main, args, says", [
    (cdm.main, ["sample", "HOME", "--model=grid"], "known are cdm, edm"),
    (cdm.main, ["sample", "RUN", "--model=edm"], "train one with"),
    (cdm.main, ["sample", "HOME", "--steps=251"], "give 1 to 250"),
    (cdm.main, ["sample", "HOME", "--sampler=lean"], "--sampler=lean: known are dpm"),
    (cdm.main, ["sample", "HOME", "--scale=9"], "scales 0 to 2"), (cdm.main, ["sample", "HOME", "--n=0"], "--n=0"),
    (conditions.main, ["draw", "HOME"], "conditions"), (conditions.main, ["scales", "HOME"], "--single")])
def test_bad_input(main, args, says, conditioned, run):
    with pytest.raises(UserError, match=says):
        main([arg.replace("HOME", str(conditioned)).replace("RUN", str(run)) for arg in args])

# ----- 3. What they are worth -----

def test_correlation_of_neighbours():
    """Repeated cells correlate fully, independent ones not at all. catches: an axis left out, a mean left in."""
    rows = torch.randn(200, 6, 1, 5).expand(-1, -1, 4, -1) + 7
    assert conditions.correlation(rows) == pytest.approx(0.5, abs=0.05)          # down: equal; across: independent
    assert conditions.correlation(rows[..., :1].expand(-1, -1, -1, 5)) == pytest.approx(1)

def found(home, command, *args):
    conditions.main([command, str(home / "ema.safetensors"), "--n=3", "--seeds=2", "--steps=2", "--device=cpu", *args])
    return json.loads((home / "bench" / f"cdm_{command}.json").read_text())["found"]

def test_kinds_of_condition(conditioned, monkeypatch):
    """catches: a kind of condition that is left out, or drawn from another's tokens. The tiny network hardly listens
    to tokens yet, so pictures of the tokens themselves stand in for what it draws."""
    monkeypatch.setattr(conditions, "drawn", lambda model, c, *args, **more:
                        c.flatten(1).sin().repeat(1, 2)[:, :3 * 32 * 32].reshape(-1, 3, 32, 32))
    rows = found(conditioned, "conditions")
    assert [r["scale"] for r in rows] == [0, 1]                              # two held-out patches at scale 2
    for row in rows:
        values = [row[k]["rand"][0] for k in ("true", "cdm", "edm", "null", "floor")]
        assert len(set(values)) == 5 and all(abs(v) < 1e6 for v in values)
    assert conditions.mean_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))        # deviation sqrt 2, of two

def test_memory_of_copies(conditioned, monkeypatch):
    """Training images drawn again lie at distance 0. catches: distances to the wrong split."""
    assert found(conditioned, "memory")["pixels"]["drawn"] > 0
    data = Pyramids(ZoomLDM.from_run(conditioned).info["data"])
    monkeypatch.setattr(conditions, "drawn", lambda *a: conditions.fixed_batch(data, "train", 2, 3)["x"])
    again = found(conditioned, "memory")
    assert all(again[space]["drawn"] == pytest.approx(0, abs=1e-5) for space in again)

def test_scales(conditioned):
    """A model against itself. catches: two models that swap tokens, so that the same weights differ."""
    row = found(conditioned, "scales", f"--single={conditioned}", "--scale=1")
    assert row["shared"] == row["alone"]

def test_sides():
    """catches: left taken for top; a sign."""
    x = torch.zeros(1, 4, 4)
    x[..., :2] = 1                                                                          # all of it on the left
    found = [conditions.sides(lambda part: part.mean((1, 2))[:, None], image).tolist() for image in (x, x.mT)]
    assert found == [[[[1.0], [0.0]]], [[[0.0], [1.0]]]]

def test_grids_and_text(conditioned):
    """catches: shares and captions out of step."""
    sizes = ["--size=128", "--context=1", "--overlap=0", "--steps=1"]
    row = found(conditioned, "grids", *sizes, "--grids=9", "--n=1")
    assert row["psnr"]["real"][0] > 0 and row["psnr"]["invented"][0] > 0
    row = found(conditioned, "text", *sizes, f"--captions={conditioned}/heldout.tsv", "--n=2")
    assert len(row["texts"]) == 2 and sum(map(sum, row["confusion"])) == 4        # two seeds
