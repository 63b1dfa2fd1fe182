"""Doors: what an import loads, that the core runs without the rooms, and that every file says how it is run."""
import importlib
import re
import runpy
import sys

import pytest
from conftest import ROOT, TINY
from test_style import CORE, FILES, ROOMS

# files with a main, as one runs them: `python train.py`, `python -m slides.reader`
RUN = {name: name if "/" not in name else "-m " + name[:-3].replace("/", ".") for name, path in FILES.items()
       if re.search("^if __name__ == .__main__.", path.read_text(), re.M)}

def ours():
    """Names of the loaded modules that are files of core and rooms."""
    return [name for name in sys.modules if name.split(".")[0] in (*CORE, *ROOMS)]

@pytest.fixture
def fresh(monkeypatch):
    """Nothing of ours is loaded, as in a new interpreter; a room whose name is given cannot be."""
    for name in ours():
        monkeypatch.delitem(sys.modules, name)

    def forbid(*rooms):
        for room in rooms:
            monkeypatch.setitem(sys.modules, room, None)
    yield forbid
    for name in ours():
        del sys.modules[name]

@pytest.mark.parametrize("name, most", [("train", 8), ("sample_joint", 10)])
def test_an_import_loads_what_it_needs(fresh, name, most):
    importlib.import_module(name)
    loaded = [n for n in ours() if getattr(sys.modules[n], "__file__", None)]
    assert name in loaded and len(loaded) <= most, loaded

def test_without_the_rooms(fresh, tmp_path, monkeypatch):
    """Only the eleven files and toy/: toys, a training from nothing, a picture of it. catches: a door not behind an
    option, a room imported for all; slides imported for the encoder `stats`."""
    fresh(*(room for room in ROOMS if room != "toy"))
    monkeypatch.chdir(tmp_path)
    data, train, sample_joint = map(importlib.import_module, ("data", "train", "sample_joint"))
    monkeypatch.setattr(train, "SHEET", {"n": 2, "steps": 1})
    data.main(["toy", "--out=toys", "--slides=2", "--test=1", "--size=256", "--workers=1"])
    train.main([*TINY, "--data=toys", "--out=run", "--steps=1", "--vae_steps=1"])
    sample_joint.main(["run", "--n=1", "--steps=1", "--scale=0", "--threads=1", "--out=pictures"])
    assert (tmp_path / "pictures" / "sheet.png").exists() and "toy.make" in sys.modules

@pytest.mark.parametrize("name", RUN)
def test_help(name, tmp_path, monkeypatch, capsys):
    """As a user asks for it, in an empty folder. catches: a file that cannot be run, works instead, or writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    code = 0
    try:
        if "/" in name:
            monkeypatch.delitem(sys.modules, RUN[name][3:], raising=False)
            runpy.run_module(RUN[name][3:], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    text = capsys.readouterr().out
    assert code == 0, f"python {RUN[name]} --help: {code}"
    assert re.search("python|torchrun", text), f"python {RUN[name]} --help does not say how it is run:\n{text[:500]}"
    assert not list(tmp_path.iterdir()), "--help wrote a file"
