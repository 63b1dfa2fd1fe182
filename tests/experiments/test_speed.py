"""The table of speed: that what is timed side by side is the same sampling, and that cost is counted as it is spent."""
import contextlib
import io

import pytest
import torch

from common import UserError
from experiments import quality, speed
from large.proxy import Proxy

@pytest.fixture(scope="module")
def printed(ready):
    """What `speed` prints: {name: [s a step, decoding, 50 steps, times, TFLOP, times]}, and the differences. Its proxy
    has not learnt anything, and costs the same."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(out):
        patched.setattr(quality.proxies, "load", lambda *args: Proxy())
        speed.main(["speed", str(ready), "--size=128", "--steps=2", "--rounds=1", "--device=cpu", "--threads=1"])
    lines = out.getvalue().splitlines()
    far = next(line for line in lines if line.startswith("largest difference")).split(": ")[1]
    rows = {line[:16].strip(): [float(x) for x in line[16:].split()] for line in lines[-7:]}
    return rows, [float(part.split()[0]) for part in far.split(", ")]

def test_s2_is_the_transcription(printed):
    """The same latents, written twice. catches: a sign, a floor, another order of updates in either; rounding where the
    other does not, for in float32 two nested finite differences make 1e-3 and more of it."""
    single, double = printed[1]
    assert double < 1e-9 and single < 5e-3, (single, double)

def test_what_is_saved(printed):
    """FLOPs at full size. catches: work counted twice or not at all; estimates not passed on to the DDIM step."""
    rows = printed[0]
    flops = {name: row[4] for name, row in rows.items()}
    assert list(rows)[0] == "transcription" and rows["transcription"][3] == rows["transcription"][5] == 1
    assert flops["s2, float32"] == flops["s2, bf16"] < flops["transcription"]
    assert flops["unguided"] <= flops["x0+proxy"] < flops["x0"] < flops["s2, bf16"]
    assert flops["part guided"] < flops["x0+proxy"]
    for step, decoding, total, *_ in rows.values():
        assert total == pytest.approx(50 * step + decoding, abs=0.3)                # as printed, rounded to 0.01

def test_published_decoding(model):
    """Where all windows show the same, so does their mean; catches: weights that do not sum to what was added."""
    class Same:
        vae = model.vae

        @staticmethod
        def decode(z):
            return z.repeat_interleave(4, 2).repeat_interleave(4, 3)
    z = torch.rand(1, 3, 32, 32)
    assert (speed.published_decoding(Same, z, 16) - Same.decode(z)).abs().max() < 1e-5

def test_flat(ready, capsys, monkeypatch):
    """catches: a canvas that was not drawn at the size told."""
    monkeypatch.setattr(quality.proxies, "load", lambda *args: Proxy())
    speed.main(["flat", str(ready), "--size=128", "--steps=1", "--device=cpu", "--threads=1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["128", "256", "512"] and all(float(row[1]) > 0 for row in rows)

def test_cosine(ready, capsys, monkeypatch):
    """catches: a direction that is no vector; columns mixed up."""
    monkeypatch.setattr(quality.proxies, "load", lambda *args: Proxy())
    monkeypatch.setattr(speed, "ddim_timesteps", lambda T, steps: [1, 501])

    def one_step(levels, *args, callback, **options):
        levels[-1].target = torch.zeros(1, 3, 64, 64)
        callback(0, 501, levels)
    monkeypatch.setattr(speed, "sample_levels", one_step)
    speed.main(["cosine", str(ready), "--size=256", "--device=cpu", "--threads=1"])
    t, *cosines, first, second, kept = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert t == 1 and all(-1 <= c <= 1 for c in cosines) and kept > 1

@pytest.mark.parametrize("args, words", [
    (["fast", "RUN"], "experiments.speed speed RUN"), (["speed"], "experiments.speed speed RUN"),
    (["speed", "RUN", "--rounds=0"], "--rounds=0: it must be"), (["flat", "RUN", "--steps=0"], "--steps=0: it must be"),
    (["cosine", "RUN", "--size=128"], "--size=128: it must be at least 256")])
def test_bad_input(args, words):
    with pytest.raises(UserError, match=words):
        speed.main(args)
