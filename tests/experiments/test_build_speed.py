"""The comparison of two checkouts: that it measures what it says, and refuses what it cannot run."""
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from torture_slide import page, picture, write

from common import UserError
from experiments import build_speed

def test_a_table_of_ratios(tmp_path, monkeypatch, capsys):
    """Here is divided by there; the slide is read by the code that both checkouts run."""
    write(tmp_path / "a.tif", [page(picture(300, 400), (64, 64), 8)])
    numbers = {"old": (100, 8.0, 4.0, 400.0, 2.0), ".": (300, 2.0, 1.0, 300.0, 1.0)}
    monkeypatch.setattr(build_speed, "measured", lambda folder, slide: numbers[folder])
    monkeypatch.setattr(build_speed.os.path, "isfile", lambda path: True)
    monkeypatch.setitem(sys.modules, "openslide", SimpleNamespace())           # as if it did not know the file
    build_speed.main(["old", str(tmp_path / "a.tif"), "--rounds=2"])
    lines = capsys.readouterr().out.splitlines()
    assert [row.split()[-1] for row in lines[1:6]] == ["3.00", "0.25", "0.25", "0.75", "0.50"]
    assert lines[6].startswith("openslide: ")

def test_one_checkout(tmp_path, monkeypatch):
    """What a build says, and what the process used."""
    def popen(command, **options):
        said = f"print('9 base tiles in 0.1 s: 90 a second, 1 MB'); assert {command[2]!r} == 'build'"
        return real([sys.executable, "-S", "-c", said], **options)
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(stdout="1.5\n"))
    rate, cpu, seconds, peak, read = build_speed.measured(ROOT, "a.tif")
    assert (rate, read) == (90, 1.5) and cpu > 0 and seconds > 0 and peak > 1

def test_what_it_cannot_compare():
    with pytest.raises(UserError, match="give another checkout, and a slide"):
        build_speed.main(["nowhere", "none.tif"])
