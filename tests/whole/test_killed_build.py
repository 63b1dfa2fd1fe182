"""`data.py build` killed and started again: the same bytes, by worker processes or without."""
import json
import os
import signal
import time

import numpy as np
from PIL import Image
from training import start

import data
from slides import strips

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def test_killed_and_started_again(tmp_path, monkeypatch):
    """SIGKILL in the middle of four slides that a worker reads: it ends, and a second run without workers, a strip a
    task, leaves the same bytes as one that was left alone, and nothing of the first besides."""
    (tmp_path / "in").mkdir()
    for k in range(4):
        pixels = np.random.default_rng(k).integers(4, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{k}.png", compress_level=1)
    options = [f"--images={tmp_path}/in", "--patch=32", "--scales=4"]
    process, = start(tmp_path, data.main, ["build", *options, f"--out={tmp_path}/a", "--workers=1"])
    try:
        end = time.time() + 120
        while not ((tmp_path / "a" / "0.png.safetensors").exists() and list((tmp_path / "a").glob(".*.tmp"))):
            assert process.is_alive() and time.time() < end, "it ended too soon, or hangs"
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = len(list((tmp_path / "a").glob("*.safetensors")))
    assert 1 <= done < 4 and json.loads((tmp_path / "a" / "index.json").read_text())["slides"] == []
    data.main(["build", *options, f"--out={tmp_path}/b", "--workers=0"])
    monkeypatch.setattr(strips, "TASK", 1)
    data.main(["build", *options, f"--out={tmp_path}/a", "--workers=0"])
    assert files(tmp_path / "a") == files(tmp_path / "b")
