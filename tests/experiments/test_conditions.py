"""What conditions from nothing are worth: the measures in closed forms, and every command on a tiny run."""
import json

import pytest
import torch
from cdm_runs import go, new_home

import cdm
from common import UserError
from data import Pyramids
from experiments import conditions
from text import captions


def test_correlation_of_neighbours():
    """Repeated cells correlate fully, independent ones not at all. catches: an axis left out, a mean left in."""
    rows = torch.randn(200, 6, 1, 5).expand(-1, -1, 4, -1) + 7
    assert conditions.correlation(rows) == pytest.approx(0.5, abs=0.05)          # down: equal; across: independent
    assert conditions.correlation(rows[..., :1].expand(-1, -1, -1, 5)) == pytest.approx(1)
    assert conditions.correlation(torch.randn(200, 6, 4, 5) + 7) == pytest.approx(0, abs=0.05)


def test_mean_error():
    assert conditions.mean_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))        # deviation sqrt 2, of two
    assert conditions.mean_error([4.0])[0] == 4.0


@pytest.fixture(scope="module")
def home(run, toy, tmp_path_factory):
    """A copy of the tiny run with all conditioning models, the grid's told by captions with made-up vectors."""
    folder = new_home(run, tmp_path_factory.mktemp("conditions") / "run")
    captions.main(["toy", str(toy), f"--out={folder}", "--n=2", "--heldout=3", "--tiles=4"])
    for name in ("captions", "heldout"):
        texts = [c.text for c in captions.read_lines(folder / f"{name}.tsv")]
        v = torch.stack([torch.tensor([len(t) / 50, t.count("a") / 5, t.count("t") / 5]) for t in texts])
        captions.save_vectors(folder / f"{name}.safetensors", texts, v, "letters")
    told = f"--captions={folder}/captions.tsv", f"--vectors={folder}/captions.safetensors"
    for kind, more in (("cdm", ()), ("edm", ()), ("grid", told)):
        go(folder, kind, "--steps=3", "--sheet=0", *more)
    return folder


def found(home, command, *args):
    conditions.main([command, str(home), "--n=3", "--seeds=2", "--steps=2", "--device=cpu", *args])
    return json.loads((home / "bench" / f"cdm_{command}.json").read_text())["found"]


def test_kinds_of_condition(home):
    """catches: a kind of condition that is left out, or drawn from another's tokens."""
    rows = found(home, "conditions")
    assert [r["scale"] for r in rows] == [0, 1]                              # two held-out patches at scale 2
    for row in rows:
        values = [row[k]["rand"][0] for k in ("true", "cdm", "edm", "null", "floor")]
        assert len(set(values)) > 2 and values[0] != values[-1] and all(abs(v) < 1e6 for v in values)


def test_memory_of_copies(home, monkeypatch):
    """Training images drawn again lie at distance 0. catches: distances to the wrong split."""
    assert found(home, "memory")["pixels"]["drawn"] > 0
    data = Pyramids(cdm.ZoomLDM.from_run(home).info["data"])
    monkeypatch.setattr(conditions, "drawn", lambda *a: conditions.fixed_batch(data, "train", 2, 3)["x"])
    again = found(home, "memory")
    assert all(again[space]["drawn"] == pytest.approx(0, abs=1e-5) for space in again)


def test_scales(home):
    """A model against itself. catches: two models that swap tokens, so that the same weights differ."""
    row = found(home, "scales", f"--single={home}", "--scale=1")
    assert row["shared"] == row["alone"]
    with pytest.raises(UserError, match="--single"):
        found(home, "scales")


def test_grids_and_text(home):
    """catches: shares and captions out of step."""
    sizes = ["--size=128", "--context=1"]
    row = found(home, "grids", *sizes, "--grids=12", "--n=1")
    assert row["psnr"]["real"][0] > 0 and row["psnr"]["invented"][0] > 0
    row = found(home, "text", *sizes, f"--captions={home}/heldout.tsv", "--n=2")
    assert len(row["texts"]) == 2 and sum(map(sum, row["confusion"])) == 4        # two seeds


def test_unknown_command(home):
    with pytest.raises(UserError, match="conditions"):
        conditions.main(["draw", str(home)])
