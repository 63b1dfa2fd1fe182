"""Patches from nothing: what is written, and what is refused."""
import pytest
from cdm_runs import go, new_home

import cdm
import sample_joint
from common import UserError


@pytest.fixture(scope="module")
def home(run, tmp_path_factory):
    folder = new_home(run, tmp_path_factory.mktemp("invented") / "run")
    go(folder, "cdm", "--steps=1", "--sheet=0")
    return folder


@pytest.mark.parametrize("command, args", [(cdm.main, ["sample", "HOME"]),
                                           (sample_joint.main, ["HOME", "--condition=cdm"])])
def test_sample_writes_patches(command, args, home, tmp_path):
    """By either name. catches: a scale that is ignored; more or fewer files."""
    more = ["--scale=1", "--n=2", "--steps=2", f"--out={tmp_path}", "--device=cpu"]
    command([arg.replace("HOME", str(home)) for arg in args] + more)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["scale1_000.png", "scale1_001.png", "sheet.png"]


@pytest.mark.parametrize("args, says", [
    (["HOME", "--model=grid"], "known are cdm, edm"), (["HOME", "--model=edm"], "train one with"), ([], "run folder"),
    (["HOME", "--scale=9"], "scales 0 to 2"), (["HOME", "--n=0"], "--n=0"), (["none"], "no trained model")])
def test_bad_input(args, says, home):
    with pytest.raises(UserError, match=says):
        cdm.main(["sample", *(arg.replace("HOME", str(home)) for arg in args)])
