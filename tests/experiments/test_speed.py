"""The table of speed: that what is timed side by side is the same sampling, and that cost is counted as it is spent."""
from types import SimpleNamespace

import pytest
import torch

from common import UserError
from experiments import quality, speed
from large.proxy import Proxy

@pytest.fixture
def printed(task, toy, capsys, monkeypatch):
    """Run a command, with networks that cost little, and take the lines that it prints."""
    monkeypatch.setattr(quality.proxies, "load", lambda *args: Proxy())

    def run(command, *more):
        speed.main([command, f"{task}/run", f"--data={toy}", "--device=cpu", "--threads=1", *more])
        return capsys.readouterr().out.splitlines()
    return run

def test_s2_is_the_transcription_and_what_is_saved(printed):
    """The same latents, written twice: in float32 two nested finite differences make 1e-3 of rounding. FLOPs at full
    size. catches: a sign, a floor, another order of updates in either; rounding where the other does not; work counted
    twice or not at all; estimates not passed on to the DDIM step."""
    lines = printed("speed", "--size=128", "--steps=2", "--rounds=1")
    far = next(line for line in lines if line.startswith("largest difference")).split(": ")[1]
    single, double = (float(part.split()[0]) for part in far.split(", "))
    assert double < 1e-9 and single < 0.2, (single, double)     # one latent that snaps to another code makes 0.05
    rows = {line[:16].strip(): [float(x) for x in line[16:].split()] for line in lines[-7:]}
    flops = {name: row[4] for name, row in rows.items()}
    assert list(rows)[0] == "transcription" and rows["transcription"][3] == rows["transcription"][5] == 1
    assert flops["s2, float32"] == flops["s2, bf16"] < flops["transcription"]
    assert flops["unguided"] <= flops["x0+proxy"] < flops["x0"] < flops["s2, bf16"]
    assert flops["part guided"] < flops["x0+proxy"]
    for step, decoding, total, *_ in rows.values():
        assert total == pytest.approx(50 * step + decoding, abs=0.31)                # as printed, rounded to 0.01

def test_published_decoding():
    """Where all windows show the same, so does their mean; catches: weights that do not sum to what was added."""
    def decode(z):
        return z.repeat_interleave(4, 2).repeat_interleave(4, 3)
    z, model = torch.rand(1, 3, 32, 32), SimpleNamespace(vae=SimpleNamespace(factor=4), decode=decode)
    assert (speed.published_decoding(model, z, 16) - decode(z)).abs().max() < 1e-5

def test_flat(printed):
    """catches: a canvas that was not drawn at the size told."""
    rows = [line.split() for line in printed("flat", "--sizes=128,256")[-2:]]
    assert [row[:2] for row in rows] == [["128", "4"], ["256", "16"]]

def test_cosine(printed, monkeypatch):
    """catches: a direction that is no vector; columns mixed up."""
    monkeypatch.setattr(speed, "ddim_timesteps", lambda T, steps: [1, 501])

    def one_step(levels, *args, callback, **options):
        levels[-1].target = torch.zeros(1, 3, 64, 64)
        callback(0, 501, levels)
    monkeypatch.setattr(speed, "sample_levels", one_step)
    t, *cosines, first, second, kept = map(float, printed("cosine", "--size=256")[-1].split())
    assert t == 1 and all(-1 <= c <= 1 for c in cosines) and kept > 1

@pytest.mark.parametrize("args, words", [
    (["fast", "RUN"], "experiments.speed speed RUN"), (["speed"], "experiments.speed speed RUN"),
    (["speed", "RUN", "--rounds=0"], "--rounds=0: it must be"), (["flat", "RUN", "--steps=0"], "--steps=0: it must be"),
    (["flat", "RUN", "--sizes=512,700"], "each a multiple of the first"),
    (["cosine", "RUN", "--size=128"], "--size=128: it must be at least 256")])
def test_bad_input(args, words):
    with pytest.raises(UserError, match=words):
        speed.main(args)
