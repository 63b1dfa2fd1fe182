"""The notebook: small, without outputs, and its code cells run as a script."""
import json
import os
import subprocess
import sys

from conftest import ROOT
from PIL import Image

CELLS = json.loads((ROOT / "labs/tour.ipynb").read_text())["cells"]

def source(kind):
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind]

def test_ten_cells_without_outputs():
    assert len(CELLS) == 10 and not any(cell.get("outputs") for cell in CELLS)
    assert all(len(line) <= 120 for text in source("code") for line in text.splitlines())

def test_the_tour_runs(run, tmp_path):
    """Its code, as a script, in a folder of its own, on a smoke run in the place of the shipped weights.
    catches: a function or an argument that is no more."""
    shipped = '"weights/toy.safetensors"'
    script = "\n\n".join(source("code"))
    assert script.count(shipped) == 1
    last = "\n\nsheet(rows, labels).save('last.png')\nprint('seen', maps.shape[0], found.shape, drawn.shape)\n"
    (tmp_path / "tour.py").write_text(script.replace(shipped, repr(str(run))) + last)
    env = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "tour.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seen 4 torch.Size([1, 96, 2, 2]) torch.Size([3, 3, 64, 64])" in done.stdout
    assert Image.open(tmp_path / "out/tour/sheet.png").width > 64
    assert {p.name for p in tmp_path.iterdir()} == {"tour.py", "out", "last.png"}      # nothing else is written
