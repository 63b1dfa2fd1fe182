"""The lines for one GPU, in sizes that a CPU has: their logic, not their speed."""
from functools import partial

import pytest
import torch

from common import UserError
from experiments import gpu
from unet import UNet

@pytest.mark.slow
def test_every_part_is_told(monkeypatch, capsys):
    """catches: networks that differ from themselves; a part that cannot run; diffusers needed; one begun too late."""
    monkeypatch.setattr(UNet, "compile", lambda net: None)
    monkeypatch.setattr(gpu, "matmul", lambda *a: ("matmul", 2 * 8 ** 3, partial(torch.mm, *torch.randn(2, 8, 8))))
    args = "--device=cpu --tiny --batch=1 --patches=1 --steps=2 --rounds=1 --size=512 --threads=1".split()
    gpu.main(args)
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("# training")
    apart = {line[:12].strip(): [float(x) for x in line[12:].split()] for line in lines[first - 5:first - 1]}
    assert list(apart) == ["U-Net", "encoder", "decoder", "Summarizer"]
    for exact, rounded, *theirs in apart.values():
        assert exact < 1e-5 < rounded < 0.1 and all(x < 1e-4 for x in theirs)
    for text in ("training step, ours, 1 images", "ours, compiled", "training step, diffusers", "64 x 64 pixels: "):
        assert any(text in line for line in lines), text
    gpu.main([*args, "--minutes=0"])
    assert capsys.readouterr().out.count("left out after 0 minutes") == 4

@pytest.mark.parametrize("args, words", [(["--size=1000"], "powers of two"), (["--batch=0"], "--batch=0"),
                                         (["--device=tpu"], "--device=tpu cannot be used")])
def test_bad_input(args, words):
    with pytest.raises(UserError, match=words):
        gpu.main(args)
