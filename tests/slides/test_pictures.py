"""data.py build on plain pictures: kinds of files, scales, background, held-out images, every message."""
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import UserError, load_tensors
from data import Pyramids, halve


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def build(out, images, *more):
    data.main(["build", f"--images={images}", f"--out={out}", "--patch=16", "--scales=3", *more])
    return Pyramids(out)


def test_build_reads_png_jpeg_and_tiff_with_infrared(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    rgb, infrared = noise(70, 90), noise(70, 90, 1)[..., :1]
    Image.fromarray(rgb).save(tmp_path / "in" / "a.png")
    Image.fromarray(rgb).save(tmp_path / "in" / "b.jpg", quality=95)
    Image.fromarray(np.concatenate([rgb, infrared], 2)).save(tmp_path / "in" / "c.tif")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    p = build(tmp_path / "out", tmp_path / "in")
    said = capsys.readouterr().out
    assert "1 entries are not images" in said and "dropped 10 columns, 6 rows at the edge" in said
    assert p.names("train") == ["a.png", "b.jpg", "c.tif"] and p.scales == 3 and p.slides[0]["counts"] == [20, 4, 1]
    a, b, c = (load_tensors(tmp_path / "out" / x["file"])[0] for x in p.slides)
    assert np.array_equal(a["x0"][7], rgb[16:32, 32:48]) and np.array_equal(a["x1"][3], halve(rgb)[16:32, 16:32])
    assert all(torch.equal(a[k], c[k]) for k in a)  # the fourth band leaves no trace
    shown = np.asarray(Image.open(tmp_path / "in" / "b.jpg"))
    assert np.array_equal(b["x0"][7], shown[16:32, 32:48]) and a["e"].shape == (4, 5, 96)
    before = (tmp_path / "out" / "a.png.safetensors").stat().st_mtime_ns
    build(tmp_path / "out", tmp_path / "in")
    assert (tmp_path / "out" / "a.png.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="scales=3 there, 2 now"):
        build(tmp_path / "out", tmp_path / "in", "--scales=2")
    Image.fromarray(noise(80, 90)).save(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match="a.png.safetensors was made from another image"):
        build(tmp_path / "out", tmp_path / "in")


def test_build_drops_scales_and_background_aloud(tmp_path, capsys):
    image = noise(64, 64)
    image[:, :32] = 240
    Image.fromarray(image).save(tmp_path / "a.png")
    p = build(tmp_path / "out", tmp_path / "a.png", "--background=5", "--scales=5")
    said = capsys.readouterr().out
    assert p.scales == 3 and p.slides[0]["counts"] == [8, 2, 1, 0, 0] and "10 plain patches" in said
    assert "scale 3 is dropped" in said and "scale 4 is dropped: no image holds a patch of 256 x 256" in said
    t, _ = load_tensors(tmp_path / "out" / "a.png.safetensors")
    assert (t["ij0"][:, 1] >= 2).all() and t["e"].shape == (4, 4, 96)  # embeddings of all tiles stay
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    with pytest.raises(UserError, match="lower --background"):
        build(tmp_path / "none", tmp_path / "white.png", "--background=5")


def test_build_holds_out_the_same_images_whatever_comes_later(tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(10):
        Image.fromarray(noise(16, 16, k)).save(tmp_path / "in" / f"{k}.png")
    held = build(tmp_path / "a", tmp_path / "in", "--holdout=0.2").names("test")
    assert len(held) == 2
    (tmp_path / "in" / next(f"{k}.png" for k in range(10) if f"{k}.png" not in held)).unlink()
    assert build(tmp_path / "b", tmp_path / "in", "--holdout=0.2").names("test") == held


def damaged(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(noise(200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    return path


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.tif"])
def test_build_refuses_truncated_images(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} cannot be read.*cut short"):
        build(tmp_path / "out", damaged(tmp_path, name))
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_build_messages(tmp_path):
    image = tmp_path / "a.png"
    Image.fromarray(noise(20, 100)).save(image)
    parts = (b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(99)))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x) - 4) + x + struct.pack(">I", zlib.crc32(x)) for x in parts))
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "deep.png")
    Image.MAX_IMAGE_PIXELS, limit = 1000, Image.MAX_IMAGE_PIXELS  # Pillow's own plays no part, and is put back
    try:
        for path, words in (("bomb.png", "60000 x 60000 pixels, more than"), ("text.png", "cannot be read"),
                            ("none.png", "does not exist"), ("empty", "holds no image"), ("deep.png", "kind 'I;16'")):
            with pytest.raises(UserError, match=words):
                build(tmp_path / "out", tmp_path / path)
        with pytest.raises(UserError, match="100 x 20 pixels, smaller than a tile: take --patch below 32"):
            build(tmp_path / "out", image, "--patch=32")
        assert Image.MAX_IMAGE_PIXELS == 1000
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    for more, words in ((["--patch=20"], "multiple of 16"), (["--encoder=uni3"], "unknown encoder"),
                        (["--weights=w.bin"], "no weights"), (["--pach=16"], "did you mean 'patch'"),
                        (["--images="], "say what to read"), (["--holdout=1.5"], "holdout in")):
        with pytest.raises(UserError, match=words):
            build(tmp_path / "out", image, *more)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        build(tmp_path / "file" / "out", image)


def test_command_line_exits_with_2(root, tmp_path):
    done = subprocess.run([sys.executable, root / "data.py", "build", "--images=nowhere", f"--out={tmp_path}"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --images=nowhere does not exist")
    assert "Traceback" not in done.stderr
