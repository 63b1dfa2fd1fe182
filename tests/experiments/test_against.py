"""Two checkouts side by side: what is refused, what is run where, and what the table says of it."""
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from common import UserError, save_png
from experiments import against, counted, speed

@pytest.fixture
def spoken(monkeypatch):
    """All commands that are run, [(checkout, command)], none of them really: the older one takes 9 s, this one 3."""
    log, told = [], iter(range(10 ** 6))

    def run(side, *command):
        log.append((side.home.name, command))
        for option in command:
            if option.startswith("--out=") and option.endswith(".png"):
                name, level = option[6:-4], 40 * next(told) % 256
                for view, n in (("", 128), ("_scale1", 64)):
                    save_png(side.home / f"{name}{view}.png", torch.full((n, n, 3), level, dtype=torch.uint8).numpy())
        counted = {"flops": 3e12, "rows": {"U-Net": 2}} if "counted.py" in command[0] else 0
        seconds = 9.0 if side.home.name == "older" else 3.0
        return f"words\n{json.dumps(counted)}", seconds, 2 * seconds
    monkeypatch.setattr(against.Checkout, "run", run)
    monkeypatch.setattr(against, "full_size", lambda: {"U-Net": 1e12})
    return log

def test_large_images_in_turn(task, toy, spoken, capsys, monkeypatch):
    """catches: one side drawn after the other; the first image, which fits a proxy, among the timed; a ratio upside
    down; images of one side measured as the other's."""
    monkeypatch.setattr(against, "Ruler", lambda *args: None)
    seen = []
    monkeypatch.setattr(against, "judge", lambda ruler, context, real, drawn: seen.append(drawn) or {"x": [1.0, 2.0]})
    speed.main(["against", str(ROOT), f"--run={task}/run", f"--data={toy}", "--size=128", "--n=2", "--rounds=3"])
    told = capsys.readouterr().out
    assert [side for side, _ in spoken] == ["older", "this"] * 5            # first, three rounds, counted
    assert "--slide=1" in spoken[4][1] and "--slide=0" in spoken[6][1] and "counted.py" in spoken[8][1][0]
    rows = {line[:34].strip(): line[34:].split() for line in told.splitlines()}
    assert rows["an image, seconds"] == ["9", "3", "0.333"] and rows["an image, CPU seconds"][0] == "18"
    assert rows["an image, TFLOP at full size"] == ["2", "2", "1.000"]
    assert rows["x"] == ["1.500±0.5", "1.500±0.5", "0.000±0"]
    assert [tuple(x.shape) for pair in seen[0] for x in pair] == [(1, 3, 128, 128), (1, 3, 64, 64)] * 2
    assert not torch.equal(seen[0][0][0], seen[1][0][0])

def test_what_a_demo_runs(tmp_path, spoken, capsys, monkeypatch):
    """By the Makefile of each checkout. catches: a run that goes on where the last round ended; data timed."""
    monkeypatch.setattr(against, "evaluated", lambda sides, folder: None)
    speed.main(["against", str(ROOT), "--part=demo", "--rounds=1", "--kind=smoke", "--n=4"])
    assert re.search(r"all, seconds +27 +9 +0.333", capsys.readouterr().out)
    older = [" ".join(command) for side, command in spoken if side == "older"]
    made, vae, unet, table, *counted = older
    assert "--steps=0" in made and "--out=none" in made
    assert vae.startswith("train.py smoke") and vae.endswith("--steps=0") and "--steps=0" not in unet
    assert table.startswith("sample_joint.py out/smoke --eval") and table.endswith("--n=4") and len(counted) == 3

def test_differences():
    """catches: errors of two sets where pairs are known; a lost sign."""
    def told(a, b):
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr("builtins.print", lambda *words, **_: lines.append("".join(words)))
            against.compare("", {"x": a}, {"x": b})
        return lines[-1][34:].split()
    assert told([1.0, 3.0], [0.0, 2.0]) == ["2.000±1", "1.000±1", "-1.000±0"]
    assert told((0.5, 0.3), (0.25, 0.4)) == ["0.500±0.3", "0.250±0.4", "-0.250±0.5"]
    assert told((0.5, None), (0.25, None)) == ["0.500", "0.250", "-0.250"]

def test_a_command_that_fails_is_told(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('error: no such thing')")
    side = against.Checkout(tmp_path, tmp_path.parent / "older", SimpleNamespace(threads=1, run=""))
    with pytest.raises(UserError, match="train.py toy failed in the older checkout: error: no such thing"):
        side.run("train.py", "toy")

def test_counted(tmp_path, monkeypatch, capsys):
    """A product of 2 x 3 with 3 x 4 matrices: 48 FLOP. catches: modules of this checkout where another's are meant."""
    (tmp_path / "diffusion.py").write_text("class ZoomLDM:\n    from_run = print\n")
    (tmp_path / "work.py").write_text("import sys, torch, diffusion\nprint(sys.argv[1], diffusion.__file__)\n"
                                      "torch.ones(2, 3) @ torch.ones(3, 4)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["elsewhere", *sys.path])
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.delitem(sys.modules, "diffusion")
    counted.main(["work.py", "hello"])
    said, *_, last = capsys.readouterr().out.splitlines()
    assert said == f"hello {tmp_path}/diffusion.py" and json.loads(last) == {"flops": 48, "rows": {}}

@pytest.mark.parametrize("args, words", [
    ([], "no folder is no checkout"), (["."], "is no checkout of this project"),
    ([str(ROOT), "--part=small"], "--part=small: known are large, patches, demo"),
    ([str(ROOT), "--rounds=0"], "--rounds=0"), ([str(ROOT), "--run=nowhere"], "lacks ema.safetensors"),
    ([str(ROOT), "--run={run}", "--data={toy}", "--size=96"], "--size=96: give 2, 4, ... 4 times 64 pixels"),
    ([str(ROOT), "--run={run}", "--data={toy}", "--size=128", "--n=9"], "lower --n or --size")])
def test_bad_input(task, toy, args, words, tmp_path, monkeypatch, spoken):
    """In one sentence, before anything runs."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        speed.main(["against", *(arg.format(run=task / "run", toy=toy) for arg in args)])
    assert not spoken
