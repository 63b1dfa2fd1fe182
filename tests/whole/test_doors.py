"""Doors: what an import loads, that the core runs without the rooms, and that every file says how it is run."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from test_style import CORE, FILES, ROOMS

# files with a main, as one runs them: `python train.py`, `python -m slides.reader`
RUN = {name: name if "/" not in name else "-m " + name[:-3].replace("/", ".") for name, path in FILES.items()
       if re.search("^if __name__ == .__main__.", path.read_text(), re.M)}

LOADED = """
import json, sys
import {name}
files = {{n: getattr(m, "__file__", None) or "" for n, m in sys.modules.items()}}
print(json.dumps([n for n, file in files.items() if file.startswith({root!r} + "/") and "site-packages" not in file]))
"""
HELP = """
import contextlib, io, json, runpy, sys
sys.path.insert(0, {root!r})
said = {{}}
for name, command in {commands!r}.items():
    out, sys.argv = io.StringIO(), [name, "--help"]
    code = 0
    with contextlib.redirect_stdout(out):
        try:
            if command.startswith("-m "):
                runpy.run_module(command[3:], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path({root!r} + "/" + name, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as err:
            code = repr(err)
    said[name] = code, out.getvalue()
print(json.dumps(said))
"""


def python(*args, cwd=ROOT):
    """Run Python. out: what it printed, which must not end badly."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{args}: exit code {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("name, most", [("train", 8), ("sample_joint", 10)])
def test_an_import_loads_what_it_needs(name, most):
    loaded = json.loads(python("-c", LOADED.format(name=name, root=str(ROOT))))
    assert name in loaded and len(loaded) <= most, loaded


@pytest.mark.slow
def test_without_the_rooms(tmp_path):
    """Only the eleven files and toy/: a training from nothing and a picture from it. catches: a door not behind an
    option, and a room imported for all."""
    for name in CORE:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "toy", tmp_path / "toy")
    rooms = [room for room in ROOMS if (tmp_path / room).exists()]
    assert rooms == ["toy"]
    python("train.py", *TINY, "--steps=2", "--vae_steps=2", cwd=tmp_path)
    said = python("sample_joint.py", "out/smoke", "--n=1", "--steps=2", "--scale=0", "--threads=1", cwd=tmp_path)
    pictures = [p.name for p in (tmp_path / "out" / "smoke").rglob("*.png") if p.name in said]
    assert pictures, said


# ----- --help -----

@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """{file: (exit code, what it printed)} of --help, run in an empty folder."""
    empty = tmp_path_factory.mktemp("empty")
    before = listing()
    said = json.loads(python("-c", HELP.format(root=str(ROOT), commands=RUN), cwd=empty))
    assert listing() == before and not list(empty.iterdir()), "--help wrote a file"
    return said


def listing():
    """The files of the repository that no other test writes meanwhile, and when they were written."""
    paths = [p for folder in (*ROOMS, "docs", "assets") for p in (ROOT / folder).rglob("*")]
    return {str(p): p.stat().st_mtime_ns for p in paths if p.is_file() and "__pycache__" not in p.parts}


@pytest.mark.parametrize("name", RUN)
def test_help(said, name):
    """In one process, for each takes seconds to load torch: what a file does to the others would show too."""
    code, text = said[name]
    assert code == 0, f"python {RUN[name]} --help: {code}"
    assert re.search("python|torchrun", text), f"python {RUN[name]} --help does not say how it is run:\n{text[:500]}"
