"""toy.py, pyramid.py, data.py: the drawing, the format on disk, the commands, the items, every message."""
import json
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from common import UserError, load_tensors, save_tensors
from data import PatchDataset, Pyramids, fixed_batch, halve, tile_rows
from slides.encoders import Stats, load_encoder
from summarizer import pack_grid, standardize
from toy import tissue as toy
from toy.tissue import TISSUES, toy_slide

SMALL = ["--slides=3", "--test=2", "--size=256", "--patch=16", "--keep0=20", "--keep1=9", "--workers=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """5 slides of 256 px in patches of 16, so that the coarsest of 5 scales has 16x16 base tiles like the real set."""
    out = tmp_path_factory.mktemp("data") / "toy"
    data.main(["toy", f"--out={out}", *SMALL])
    return out


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


# ----- 1. Drawing -----

def test_toy_slide_is_a_function_of_its_seed():
    image, region, nuclei = toy_slide(3, 256)
    assert image.shape == (256, 256, 3) and image.dtype == np.uint8
    assert region.shape == (64, 64) and region.dtype == np.uint8 and region.max() < len(TISSUES)
    assert nuclei.ndim == 2 and nuclei.shape[1] == 3 and nuclei.dtype == np.float32
    assert ((nuclei[:, :2] >= 0) & (nuclei[:, :2] < 256)).all() and (nuclei[:, 2] > 1).all()
    for a, b in zip((image, region, nuclei), toy_slide(3, 256)):
        assert np.array_equal(a, b)
    assert not np.array_equal(image, toy_slide(4, 256)[0])


def test_toy_slide_has_all_tissues_and_nuclei_where_they_say():
    share = np.mean([np.bincount(toy_slide(k, 512)[1].ravel(), minlength=4) / 128**2 for k in range(6)], 0)
    assert (share > 0.05).all(), share
    image, region, nuclei = toy_slide(0, 512)
    x, y, _ = nuclei.astype(int).T
    tumour = region[y // 4, x // 4] == 2
    assert tumour.mean() > 0.3
    assert image[y, x, 0][tumour].mean() < image[..., 0][region.repeat(4, 0).repeat(4, 1) == 2].mean() - 20  # dark
    assert image[region.repeat(4, 0).repeat(4, 1) == 0].mean() > 230  # background is bright


def test_toy_command(tmp_path, capsys):
    toy.main([str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").size == (1024, 1024) and "nuclei" in capsys.readouterr().out
    with pytest.raises(UserError, match="FILE.png"):
        toy.main(["a.jpg"])


# ----- 2. The format -----

def test_halve():
    x = noise(7, 9)
    small = halve(x)
    assert small.shape == (3, 4, 3)
    a = x.astype(int)
    for i, j, c in np.ndindex(small.shape):  # + 2 rounds to nearest; + 0 would darken by 3/8 of a level per scale
        assert small[i, j, c] == (a[2*i, 2*j, c] + a[2*i+1, 2*j, c] + a[2*i, 2*j+1, c] + a[2*i+1, 2*j+1, c] + 2) // 4


@pytest.mark.parametrize("h,w", [(64, 64), (80, 112), (16, 200), (95, 33)])
def test_strips_give_the_tiles_of_the_whole_image(h, w):
    image, P = noise(h, w), 16
    got = {}
    for s, i, tiles in tile_rows((image[k:k + P] for k in range(0, h - P + 1, P)), P, 4):
        for j, tile in enumerate(tiles):
            got[s, i, j] = tile
    want, level = {}, image
    for s in range(4):
        for i in range(level.shape[0] // P):
            for j in range(level.shape[1] // P):
                want[s, i, j] = level[i * P:(i + 1) * P, j * P:(j + 1) * P]
        level = halve(level)
    assert got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)


def test_files_follow_the_format(folder):
    index = json.loads((folder / "index.json").read_text())
    assert (index["format"], index["patch"], index["scales"], index["embed_dim"]) == (1, 16, 5, 96)
    assert [x["split"] for x in index["slides"]] == ["train"] * 3 + ["test"] * 2
    assert index["slides"][0]["counts"] == [20, 9, 16, 4, 1] and index["slides"][4]["counts"] == [256, 64, 16, 4, 1]
    encoder = load_encoder("stats", index["std"])
    for k, slide in enumerate(index["slides"]):
        image, region, nuclei = toy_slide(k if k < 3 else 50_000 + k - 3, 256)
        t, _ = load_tensors(folder / slide["file"])
        assert np.array_equal(t["region"], region) and np.array_equal(t["nuclei"], nuclei)
        assert {n: x.dtype for n, x in t.items()} == {
            "e": torch.float16, "p4": torch.float16, "region": torch.uint8, "nuclei": torch.float32,
            **{f"x{s}": torch.uint8 for s in range(5)}, **{f"ij{s}": torch.int32 for s in range(5)}}
        level = image
        for s in range(5):
            assert len(set(map(tuple, t[f"ij{s}"].tolist()))) == len(t[f"x{s}"]) == slide["counts"][s]
            for (i, j), x in zip(t[f"ij{s}"].tolist(), t[f"x{s}"]):
                assert np.array_equal(x, level[i * 16:(i + 1) * 16, j * 16:(j + 1) * 16])
            level = halve(level)
        cut = torch.from_numpy(image.reshape(16, 16, 16, 16, 3).swapaxes(1, 2).reshape(256, 16, 16, 3).copy())
        with torch.no_grad():
            e = encoder(cut.movedim(-1, 1) / 255).view(16, 16, 96)
        torch.testing.assert_close(t["e"].float(), e, atol=1e-3, rtol=2e-3)
        pooled = t["e"].float().view(8, 2, 8, 2, 96).mean((1, 3))
        torch.testing.assert_close(t["p4"][0].float(), pooled, atol=1e-7, rtol=5e-4)  # half's rounding


def test_standard_deviations_come_from_training_tiles(folder):
    index = json.loads((folder / "index.json").read_text())
    tiles = [toy_slide(k, 256)[0].reshape(16, 16, 16, 16, 3).swapaxes(1, 2)[:, ::4].reshape(-1, 16, 16, 3)
             for k in range(3)]
    want = Stats.fit(torch.from_numpy(t.copy()).movedim(-1, 1) / 255 for t in tiles)
    torch.testing.assert_close(torch.tensor(index["std"]), want, atol=1e-5, rtol=1e-4)


# ----- 3. Reading -----

def test_read_takes_the_block_under_the_patch(folder):
    p = Pyramids(folder)
    assert p.names("test") == ["test_0000", "test_0001"] and p.count("train", 1) == 27 and p.count("test", 0) == 512
    t, _ = load_tensors(folder / p.slides[1]["file"])
    for s in range(5):
        for n in range(p.slides[1]["counts"][s]):
            item = p.read(1, s, n, ("x", "e"))
            i, j = item["ij"].tolist()
            assert [i, j] == t[f"ij{s}"][n].tolist() and item["ij"].dtype == torch.int64
            assert torch.equal((item["x"].permute(1, 2, 0) + 1).mul(127.5).round().byte(), t[f"x{s}"][n])
            G = min(2**s, 8)
            assert item["e"].shape == (96, G, G) and item["e"].dtype == torch.float32
            if s < 4:
                assert torch.equal(item["e"], t["e"][i << s:(i + 1) << s, j << s:(j + 1) << s].permute(2, 0, 1).float())
            else:
                assert torch.equal(item["e"], t["p4"][n].permute(2, 0, 1).float())


def test_items_hold_what_a_model_takes(folder):
    p = Pyramids(folder)
    for s in range(5):
        item = PatchDataset(p, want=("x", "e"), only_scale=s)[0]
        tokens, mask = pack_grid(standardize(item["e"]))
        assert torch.equal(item["tokens"], tokens) and torch.equal(item["mask"], mask) and item["s"] == s
        assert mask.sum() == min(4**s, 64)
    batch = next(iter(DataLoader(PatchDataset(p, want=("x",)), 8)))
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "x": ((8, 3, 16, 16), torch.float32), "tokens": ((8, 64, 96), torch.float32), "mask": ((8, 64), torch.bool),
        "s": ((8,), torch.int64), "slide": ((8,), torch.int64), "ij": ((8, 2), torch.int64)}


def test_latents_from_a_folder_of_their_own(folder, tmp_path):
    p = Pyramids(folder)
    for slide in p.slides:
        save_tensors(tmp_path / slide["file"], {f"z{s}": torch.full((n, 3, 4, 4), s + 0.5).half()
                                                for s, n in enumerate(slide["counts"])})
    item = PatchDataset(Pyramids(folder, latents=tmp_path), want=("z", "x"))[5]
    assert torch.equal(item["z"], torch.full((3, 4, 4), item["s"] + 0.5))
    scaled = PatchDataset(Pyramids(folder, latents=tmp_path, latent_scale=0.3), want=("z",))[5]
    assert torch.equal(scaled["z"], item["z"] * 0.3) and scaled["z"].dtype == torch.float32
    with pytest.raises(UserError, match=r"train_000\d.safetensors: tensor z\d is missing.*train.py"):
        PatchDataset(p)[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_item_k_is_a_pure_function_of_seed_and_k(folder):
    p = Pyramids(folder)
    d, again = PatchDataset(p, seed=7, want=("x",)), PatchDataset(Pyramids(folder), seed=7, want=("x",))
    backwards = {k: again[k] for k in reversed(range(20))}
    assert all(same(d[k], backwards[k]) for k in range(20))
    other = PatchDataset(p, seed=8, want=("x",))
    assert sum(same(d[k], other[k]) for k in range(20)) < 5
    assert same(d[10**12], again[10**12])  # any k, so that resuming needs no state


def test_workers_read_the_same(folder):
    """Forked and spawned workers, opened maps in the parent."""
    p = Pyramids(folder)
    alone = list(DataLoader(PatchDataset(p, seed=1, want=("x",), length=32), 8))
    for context in ("fork", "spawn"):
        loader = DataLoader(PatchDataset(p, seed=1, want=("x",), length=32), 8, num_workers=2,
                            multiprocessing_context=context)
        assert all(same(a, b) for a, b in zip(alone, loader, strict=True))


def test_scales_then_patches_are_uniform(folder):
    p = Pyramids(folder)
    d = PatchDataset(p, want=())
    picks = [d[k] for k in range(3000)]
    share = np.bincount([x["s"] for x in picks], minlength=5) / 3000
    assert abs(share - 0.2).max() < 0.03, share  # 4 deviations
    hits = np.bincount([x["slide"] for x in picks if x["s"] == 0], minlength=3)
    assert abs(hits / hits.sum() - 1 / 3).max() < 0.08
    seen = {(x["slide"], *x["ij"].tolist()) for x in picks if x["s"] == 1}
    assert len(seen) == 27  # every patch comes up
    d3 = PatchDataset(p, want=(), shares=(3, 0, 0, 0, 1))
    share = np.bincount([d3[k]["s"] for k in range(400)], minlength=5) / 400
    assert share[1:4].sum() == 0 and abs(share[0] - 0.75) < 0.09
    assert len(d) == sum(p.count("train", s) for s in range(5)) and len(PatchDataset(p, length=9)) == 9


def test_fixed_batch(folder):
    p = Pyramids(folder)
    a, b = fixed_batch(p, "test", 0, 6, ("x",)), fixed_batch(Pyramids(folder), "test", 0, 6, ("x",))
    assert same(a, b) and a["x"].shape == (6, 3, 16, 16) and a["slide"].tolist().count(3) == 3  # spread over both
    patches = [(s, *ij) for s, ij in zip(a["slide"].tolist(), a["ij"].tolist())]
    assert len({str(x) for x in patches}) == 6 and not same(a, fixed_batch(p, "test", 0, 6, ("x",), seed=1))
    assert len(fixed_batch(p, "test", 4, 99)["s"]) == 2  # all there are
    with pytest.raises(UserError, match="no 'test' patch at scale 5"):
        fixed_batch(p, "test", 5, 1)


def test_reading_messages(folder, copy, tmp_path):
    with pytest.raises(UserError, match="no index.json"):
        Pyramids(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Pyramids(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="not an index"):
        Pyramids(tmp_path)
    p = Pyramids(copy)
    with pytest.raises(UserError, match=r"train_0000.safetensors has no patch 20 at scale 0"):
        p.read(0, 0, 20)
    for kw in ({"only_scale": 5}, {"shares": (1, 1)}, {"shares": (-1, 1, 1, 1, 1)}, {"split": "val"}):
        with pytest.raises(UserError, match="patches per scale"):
            PatchDataset(p, **kw)
    file = copy / p.slides[0]["file"]
    t, meta = load_tensors(file)
    save_tensors(file, {k: v for k, v in t.items() if k != "x2"} | {"p4": t["p4"][:, :4]}, meta)
    with pytest.raises(UserError, match="train_0000.safetensors: tensor x2 is missing"):
        p.read(0, 2, 0)
    with pytest.raises(UserError, match=r"tensor p4 is \(1, 4, 8, 96\), expected \(1, 8, 8, 96\)"):
        p.read(0, 4, 0, ("e",))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        p.read(0, 0, 0)
    file.unlink()
    with pytest.raises(UserError, match="no file .*train_0000"):
        p.read(0, 0, 1)
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"slides": []}))
    with pytest.raises(UserError, match="unfinished"):
        Pyramids(copy)


# ----- 4. Commands -----

def test_toy_restarts_where_it_stopped(folder, copy):
    before = (copy / "train_0001.safetensors").read_bytes()
    kept = (copy / "train_0000.safetensors").stat().st_mtime_ns
    (copy / "train_0001.safetensors").unlink()
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"slides": [], "scales": 0}))
    data.main(["toy", f"--out={copy}", *SMALL])
    assert (copy / "train_0001.safetensors").read_bytes() == before
    assert (copy / "train_0000.safetensors").stat().st_mtime_ns == kept
    assert json.loads((copy / "index.json").read_text()) == index
    with pytest.raises(UserError, match="other settings .seed=0 there, 1 now.: give another --out"):
        data.main(["toy", f"--out={copy}", *SMALL, "--seed=1"])
    t, _ = load_tensors(copy / "test_0000.safetensors")
    save_tensors(copy / "test_0000.safetensors", t, {"source": "another"})
    with pytest.raises(UserError, match="test_0000.safetensors was made from another image"):
        data.main(["toy", f"--out={copy}", *SMALL])
    assert sorted(f.name for f in copy.iterdir()) == sorted(f.name for f in folder.iterdir())  # nothing left behind


def test_two_processes_draw_the_same(folder, tmp_path):
    data.main(["toy", f"--out={tmp_path / 'two'}", *SMALL[:-1], "--workers=2"])
    for f in folder.iterdir():
        assert (tmp_path / "two" / f.name).read_bytes() == f.read_bytes()


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
    for argv, words in (([], "no command"), (["toys"], "'toys'"), (["toy", "--size=100"], "multiple of 64"),
                        (["toy", "--slides=0"], "at least 1")):
        with pytest.raises(UserError, match=words):
            data.main(argv)


def test_command_line_exits_with_2(root, tmp_path):
    done = subprocess.run([sys.executable, root / "data.py", "build", "--images=nowhere", f"--out={tmp_path}"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --images=nowhere does not exist")
    assert "Traceback" not in done.stderr
