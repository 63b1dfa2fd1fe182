"""The command of invert.py: any picture, everything that is promised written, everything odd refused."""
import numpy as np
import pytest
import torch
from PIL import Image

import invert as I
from common import UserError, load_tensors, to_uint8
from data import fixed_batch
from diffusion import ZoomLDM
from large import enlarge, windows
from large.enlarge import agreement, read_image
from sample_joint import Resize
from slides.encoders import load_encoder
from summarizer import standardize

FAST = ["--device=cpu", "--amp=False", "--steps=2", "--invert_steps=2", "--scale=1"]

@pytest.fixture(scope="module")
def x(pyramids):
    return fixed_batch(pyramids, "test", 1, 1)["x"]

def test_enlarged_start_is_the_encoder_of_the_tiles(model):
    """An image that is smooth loses nothing when halved: its tiles, embedded. catches: tiles in the wrong order."""
    a = torch.linspace(-0.6, 0.6, 128)
    fine = torch.stack([a[:, None] * a, a[None] + 0 * a[:, None], -a[:, None] + 0 * a])[None]     # (1,3,128,128)
    e, lr = enlarge.beginning(model, Resize(2).down(fine), (2, 2), 1, 0)
    encoder = load_encoder("stats", model.info["std"])
    tiles = [[fine[..., i:i + 64, j:j + 64] for j in (0, 64)] for i in (0, 64)]
    want = torch.stack([torch.stack([encoder((t + 1) / 2)[0] for t in row], 1) for row in tiles], 1)  # (E,2,2)
    d = torch.cdist(e[0].flatten(1).T, standardize(want).flatten(1).T)
    assert d.argmin(1).tolist() == [0, 1, 2, 3] and lr == enlarge.LR_NEAR

def save(path, x, **options):
    Image.fromarray(to_uint8(x).numpy()).save(path, **options)
    return path

def test_kinds_of_images(x, tmp_path):
    """Grey, RGBA, 16 bits, turned: all come as the same picture. catches: 16 bits clipped to white."""
    path, want = tmp_path / "a.png", to_uint8(x[0]).numpy()
    grey, exif = np.asarray(Image.fromarray(want).convert("L")), Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    fourth, greys = np.full((64, 64, 1), 9, np.uint8), np.stack([grey] * 3, -1)
    for stored, shown, options in ((want, want, {}), (np.concatenate([want, fourth], 2), want, {}), (grey, greys, {}),
                                   (grey.astype(np.uint16) * 257, greys, {}),
                                   (np.rot90(want[:40]).copy(), want[:40], {"exif": exif})):
        Image.fromarray(stored).save(path, **options)
        assert np.array_equal(to_uint8(read_image(path)).numpy(), shown), (stored.shape, stored.dtype)

def test_the_command(ready, x, tmp_path, capsys, monkeypatch):
    """A picture smaller than a tile, said aloud; everything that was promised is written. Variations are guided towards
    their conditions, super-resolution only where it is asked for, windows between tiles (1.0) never. catches: one
    setting for both, and a null branch that costs as much again."""
    asked = []

    class Spy(windows.WindowEps):
        def __init__(self, model, c, guidance, *args):
            asked.append(guidance)
            super().__init__(model, c, guidance, *args)
    monkeypatch.setattr(windows, "WindowEps", Spy)
    image, out = save(tmp_path / "a.jpg", x[0, :, :30, :70 - 6], quality=95), tmp_path / "out"
    I.main([str(ready), f"--image={image}", f"--out={out}", "--sr=2", "--variations=2", *FAST])
    said = capsys.readouterr().out
    assert "smaller than a tile" in said and "reflect-padded" in said and asked == 4 * [1.5] + 2 * [1.0]
    assert sorted(p.name for p in out.iterdir()) == ["cells_0.png", "cells_1.png", "e.safetensors", "sheet.png",
                                                     "sr.png", "variation_0.png", "variation_1.png"]
    sr = read_image(out / "sr.png")
    assert sr.shape == (3, 60, 128) and agreement(sr[None], read_image(image)[None]) >= 48
    assert read_image(out / "variation_1.png").shape == (3, 30, 64)
    assert read_image(out / "cells_1.png").shape == (3, 64, 128)
    assert (read_image(out / "cells_1.png") - read_image(out / "cells_0.png")).abs().mean() > 0.01
    assert load_tensors(out / "e.safetensors")[0]["e"].shape == (2, 2, 96)
    other = tmp_path / "other"
    I.main([str(ready), f"--image={image}", f"--out={other}", "--back_project=False", "--sr_guidance=3", *FAST])
    assert "back-projected" not in capsys.readouterr().out and asked[6:] == [3.0, 1.0]
    assert sorted(p.name for p in other.iterdir()) == ["e.safetensors", "sheet.png", "sr.png"]

@pytest.mark.parametrize("args, says", [
    ("--image=cut.png --scale=1", "cannot be read"), ("--image=none.png --scale=1", "no such file"),
    ("--scale=-1", "--scale=-1"), ("--scale=3", "0 .finest. to 2"), ("--scale=0 --sr=2", "finest"),
    ("--scale=0", "finest"), ("--scale=1 --sr=4", "power of 2 up to 2"), ("--scale=2 --sr=3", "power of 2 up to 4"),
    ("--scale=1 --A=x", "--A=x"), ("--scale=1 --start=x", "--start=x"), ("--scale=1 --steps=0", "--steps=0"),
    ("--scale=1 --steps=1001", "give 1 to 1000"), ("--scale=1 --lam=-1", "lam"), ("--scale=1 --lam=1.1", "0 to 1")])
def test_what_the_command_refuses(ready, model, x, tmp_path, monkeypatch, args, says):
    monkeypatch.setattr(ZoomLDM, "from_run", lambda folder: model)
    monkeypatch.chdir(tmp_path)
    good = save(tmp_path / "a.png", x[0])
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    with pytest.raises(UserError, match=says):
        I.main([str(ready), "--device=cpu", "--amp=False", "--image=a.png", *args.split()])
