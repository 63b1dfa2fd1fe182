"""data.py: strips to tiles, the format on disk, the index, single patches, the data set, every message."""
import json
import os
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from rule import assert_close
from torch.nn import Module
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Subset

import data
from common import Ranks, UserError, load_tensors, save_tensors
from data import InTurn, PatchDataset, Pyramids, fixed_batch, halve, open_data
from summarizer import pack_grid, standardize
from toy.descriptor import Stats
from toy.folder import encode_latents, finished, tile_rows
from toy.tissue import toy_slide

SMALL = ["--slides=3", "--test=2", "--size=256", "--patch=16", "--scales=5", "--keep0=20", "--keep1=9", "--workers=1"]

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

def edit(folder, **changes):
    """Change index.json. out: what it was."""
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))
    return index

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)

# ----- 1. The format -----

def noise(h, w):
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)

def test_halve():
    """+ 2 rounds to nearest; + 0 would darken by 3/8 of a level per scale."""
    x, a = noise(7, 9), noise(7, 9)[:6, :8].astype(int)
    assert np.array_equal(halve(x), (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2] + 2) // 4)

@pytest.mark.parametrize("h,w", [(64, 64), (80, 112), (16, 200), (95, 33)])
def test_strips_give_the_tiles_of_the_whole_image(h, w):
    image, P = noise(h, w), 16
    got = {}
    for s, i, tiles in tile_rows((image[k:k + P] for k in range(0, h - P + 1, P)), P, 4):
        got |= {(s, i, j): tile for j, tile in enumerate(tiles)}
    want, level = {}, image
    for s in range(4):
        for i, j in np.ndindex(level.shape[0] // P, level.shape[1] // P):
            want[s, i, j] = level[i * P:(i + 1) * P, j * P:(j + 1) * P]
        level = halve(level)
    assert got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)

def test_files_follow_the_format(folder):
    index = json.loads((folder / "index.json").read_text())
    assert (index["format"], index["patch"], index["scales"], index["embed_dim"]) == (1, 16, 5, 96)
    assert [x["split"] for x in index["slides"]] == ["train"] * 3 + ["test"] * 2
    assert index["slides"][0]["counts"] == [20, 9, 16, 4, 1] and index["slides"][4]["counts"] == [256, 64, 16, 4, 1]
    encoder = Stats(index["std"])
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

def test_pooled_grids_on_disk_are_nearly_those_of_sampling(folder):
    """Files hold block means rounded to float16, sampling pools in float32 (docs/differences.md)."""
    p = Pyramids(folder)
    stored = torch.stack([p.read(k, 4, 0, ("e",))["e"] for k in range(5)])              # (5,96,8,8)
    exact = torch.stack([p.tensor(k, "e").float().permute(2, 0, 1) for k in range(5)])  # (5,96,16,16)
    off = standardize(stored) - standardize(exact)
    rms, largest = off.square().mean().sqrt(), off.abs().max()
    print(f"pooled in float16 and in float32: root mean square {rms:.1e}, largest difference {largest:.1e}")
    assert 0 < largest < 5e-3 and rms < 5e-4, (largest, rms)

# ----- 2. Reading -----

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
            want = t["e"][i << s:(i + 1) << s, j << s:(j + 1) << s] if s < 4 else t["p4"][n]
            assert torch.equal(item["e"], want.permute(2, 0, 1).float())
    other = Pyramids(folder, std=[2 * v for v in p.std])  # of a model that divides by other deviations
    torch.testing.assert_close(other.read(1, 4, 0, ("e",))["e"], item["e"] / 2)
    assert other.std == [2 * v for v in p.std]

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
    """They are multiplied by latent_scale as they are read. catches: scaled twice, or in half precision."""
    p = Pyramids(folder)
    for slide in p.slides:
        save_tensors(tmp_path / slide["file"], {f"z{s}": torch.full((n, 3, 4, 4), s + 0.5).half()
                                                for s, n in enumerate(slide["counts"])})
    own = open_data(folder)
    own.latents = tmp_path
    item = PatchDataset(own, want=("z", "x"))[5]
    assert torch.equal(item["z"], torch.full((3, 4, 4), item["s"] + 0.5))
    own.latent_scale = 0.3
    scaled = PatchDataset(own, want=("z",))[5]
    assert torch.equal(scaled["z"], item["z"] * 0.3) and scaled["z"].dtype == torch.float32
    with pytest.raises(UserError, match=r"train_000\d.safetensors: tensor z\d is missing.*train.py"):
        PatchDataset(p)[0]

def test_latents_of_what_training_reads(folder, tmp_path):
    """Of the first items of a data set; the others are NaN, so that a training which did read one would stop. Files are
    written again for other items, and only then. catches: a patch of another slide or scale; ranks that leave one out;
    a training that goes on with the latents of a shorter one."""
    d, vae, files = PatchDataset(Pyramids(folder), want=("x", "z")), Module(), {}
    d.pyramids.latents, before = tmp_path, None
    vae.encode = lambda x: avg_pool2d(x, 4)                                      # (B,3,P/4,P/4)
    places = [(i, s, n) for i in d.slides for s in range(5) for n in range(d.pyramids.slides[i]["counts"][s])]
    for items in (3, 20, 20, 9 * len(d)):
        for rank in range(2):
            ranks = Ranks(rank, 2, torch.device("cpu"), None)
            ranks.barrier = lambda: None
            encode_latents(tmp_path, vae, d, items, ranks)
        written = {p.name: p.stat().st_ino for p in tmp_path.iterdir()}
        assert (written == files) == (items == before)
        files, before = written, items
        d.pyramids.tensor.cache_clear()
        known = {at for at in places if d.pyramids.read(*at, ("z",))["z"].isfinite().all()}
        assert known == ({d.place(k) for k in range(items)} if items <= 20 else {*places})
        item = d[2]
        assert_close(item["z"], avg_pool2d(item["x"], 4), 1e-3)

def test_item_k_is_a_pure_function_of_seed_and_k(folder):
    """In any order, in forked workers with maps that the parent opened, and in a copy that is sent to spawned ones."""
    p = Pyramids(folder)
    d, again = (PatchDataset(some, seed=7, want=("x",)) for some in (p, Pyramids(folder)))
    backwards = {k: again[k] for k in reversed(range(20))}
    assert all(same(d[k], backwards[k]) for k in range(20))
    assert same(d[10**12], deepcopy(again)[10**12])  # any k, so that resuming needs no state
    other = PatchDataset(p, seed=8, want=("x",))
    assert sum(same(d[k], other[k]) for k in range(20)) < 5
    few = Subset(d, range(20))
    loader = DataLoader(few, 4, num_workers=2, multiprocessing_context="fork")
    assert all(same(a, b) for a, b in zip(DataLoader(few, 4), loader, strict=True))

def test_sets_in_turn(folder):
    """Each gives every second item, of its own numbers, without what only one of them may have."""
    one, two = (PatchDataset(Pyramids(folder), split, seed=3, want=("x",)) for split in ("train", "test"))
    both = InTurn([one, two])
    for k, part in enumerate((one, two, one, two)):
        assert both[k].keys() == {"x", "s"} and torch.equal(both[k]["x"], part[k]["x"]) and both[k]["s"] == part[k]["s"]

def test_scales_then_patches_are_uniform(folder):
    p = Pyramids(folder)
    d = PatchDataset(p, want=())
    picks = [d[k] for k in range(2000)]
    share = np.bincount([x["s"] for x in picks], minlength=5) / 2000
    assert abs(share - 0.2).max() < 0.036, share  # 4 deviations
    hits = np.bincount([x["slide"] for x in picks if x["s"] == 0], minlength=3)
    assert abs(hits / hits.sum() - 1 / 3).max() < 0.1
    seen = {(x["slide"], *x["ij"].tolist()) for x in picks if x["s"] == 1}
    assert len(seen) == 27  # every patch comes up
    assert len(d) == sum(p.count("train", s) for s in range(5))

def test_slides_and_scales_without_patches_are_passed_over(copy):
    """catches: the slide before, or after, an empty one; a scale drawn that has nothing."""
    slides = edit(copy)["slides"]
    slides[1]["counts"] = [0, 0, 0, 0, 0]
    slides[0]["counts"][2] = slides[2]["counts"][2] = 0
    edit(copy, slides=slides)
    d = PatchDataset(Pyramids(copy), want=())
    d.pyramids.item = lambda k, s, n, want: (k, s, n)
    picks = {d[k] for k in range(600)}
    assert {(k, s) for k, s, _ in picks} == {(k, s) for k in (0, 2) for s in (0, 1, 3, 4)}
    assert {n for k, s, n in picks if (k, s) == (2, 1)} == set(range(9))

def test_fixed_batch(folder):
    p = Pyramids(folder)
    a, b = fixed_batch(p, "test", 0, 6, ("x",)), fixed_batch(Pyramids(folder), "test", 0, 6, ("x",))
    assert same(a, b) and a["x"].shape == (6, 3, 16, 16) and a["slide"].tolist().count(3) == 3  # spread over both
    patches = [(s, *ij) for s, ij in zip(a["slide"].tolist(), a["ij"].tolist())]
    assert len({str(x) for x in patches}) == 6 and not same(a, fixed_batch(p, "test", 0, 6, ("x",), seed=1))
    assert len(fixed_batch(p, "test", 4, 99)["s"]) == 2  # all there are
    with pytest.raises(UserError, match="no 'test' patch at scale 5"):
        fixed_batch(p, "test", 5, 1)

def test_a_file_larger_than_memory(tmp_path):
    """Of a large slide: made of holes, but for one grey level of its last patch. Catches: a mapping of the whole file
    that could be written to, which Linux grants only up to memory and swap (safetensors 0.8 for PyTorch)."""
    n, P = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (3 * 1024 ** 2), 1024
    header, end = {"__metadata__": {"json": "{}"}}, 0
    for name, kind, shape in ("ij0", "I32", (n, 2)), ("e", "F16", (1, n, 1)), ("x0", "U8", (n, P, P, 3)):
        begin, end = end, end + int(kind[1:]) // 8 * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    with open(tmp_path / "a.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
        f.seek(-1, 2)
        f.write(b"\xff")
    slide = {"name": "a", "file": "a.safetensors", "split": "train", "size": [P, n * P], "counts": [n]}
    index = {"format": 1, "patch": P, "scales": 1, "embed_dim": 1, "encoder": "a", "std": [1.0], "source": {}}
    (tmp_path / "index.json").write_text(json.dumps(index | {"slides": [slide]}))
    x = Pyramids(tmp_path).read(0, 0, n - 1, ("x",))["x"]
    assert x.shape == (3, P, P) and x[2, -1, -1] == 1 and x.sum() == 2 - x.numel()
    assert finished(tmp_path / "a.safetensors", 1) == ([n], {})

# ----- 3. Messages and restarts -----

@pytest.mark.parametrize("text, says", [(None, "no index.json"), ("{", "damaged"), ('{"format": 2}', "no index of"),
                                        ("[]", "no index of")])
def test_folders_without_an_index(tmp_path, text, says):
    if text:
        (tmp_path / "index.json").write_text(text)
    for opening in (Pyramids, open_data):
        with pytest.raises(UserError, match=says):
            opening(tmp_path)

def test_reading_messages(copy):
    p = Pyramids(copy)
    with pytest.raises(UserError, match=r"train_0000.safetensors has no patch 20 at scale 0"):
        p.read(0, 0, 20)
    for kw in ({"only_scale": 5}, {"split": "val"}):
        with pytest.raises(UserError, match="patches per scale"):
            PatchDataset(p, **kw)
    file = copy / p.slides[0]["file"]
    t, meta = load_tensors(file)
    other = {"p4": t["p4"][:, :4], "x3": t["x3"].bfloat16()}
    save_tensors(file, {k: v for k, v in t.items() if k != "x2"} | other, meta)
    with pytest.raises(UserError, match="train_0000.safetensors: tensor x2 is missing"):
        p.read(0, 2, 0)
    with pytest.raises(UserError, match=r"tensor p4 is \(1, 4, 8, 96\), expected \(1, 8, 8, 96\)"):
        p.read(0, 4, 0, ("e",))
    with pytest.raises(UserError, match="tensor x3 is of type BF16"):
        p.read(0, 3, 0)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        p.read(0, 0, 0)
    file.unlink()
    with pytest.raises(UserError, match="no file .*train_0000"):
        p.read(0, 0, 1)
    edit(copy, slides=[])
    with pytest.raises(UserError, match="unfinished"):
        Pyramids(copy)

def test_toy_restarts_where_it_stopped(folder, copy):
    """And a set from before a setting counts as its default. catches: every folder refused as soon as the toy gets a
    setting; another value taken for the default."""
    index = edit(copy)
    source = {k: v for k, v in index["source"].items() if k != "seed"}  # as if there had been no --seed
    for slide in index["slides"]:
        tensors, _ = load_tensors(copy / slide["file"])
        save_tensors(copy / slide["file"], tensors, {"source": source})
    edit(copy, source=source, slides=[], scales=0)
    (copy / "train_0001.safetensors").unlink()
    kept = (copy / "train_0000.safetensors").stat().st_mtime_ns
    data.main(["toy", f"--out={copy}", *SMALL])
    made, meta = load_tensors(copy / "train_0001.safetensors")
    assert same(made, load_tensors(folder / "train_0001.safetensors")[0]) and meta == {"source": source}
    assert (copy / "train_0000.safetensors").stat().st_mtime_ns == kept
    assert edit(copy) | {"source": source} == index | {"source": source}
    for more, says in (("--seed=1", "seed=0 there, 1 now"), ("--encoder=efflite0_imagenet", "encoder=stats there")):
        with pytest.raises(UserError, match=f"other settings .{says}.*give another --out"):
            data.main(["toy", f"--out={copy}", *SMALL, more])
    t, _ = load_tensors(copy / "test_0000.safetensors")
    save_tensors(copy / "test_0000.safetensors", t, {"source": "another"})
    with pytest.raises(UserError, match="test_0000.safetensors was made from another image"):
        data.main(["toy", f"--out={copy}", *SMALL])
    assert sorted(f.name for f in copy.iterdir()) == sorted(f.name for f in folder.iterdir())  # nothing left behind

@pytest.mark.parametrize("argv, words", [
    ([], "no command"), (["toys"], "'toys'"), (["toy", "--size=100"], "multiple of 64"),
    (["toy", "--slides=0"], "slides=0: it must be at least 1"), (["toy", "--patch=20"], "patch one of 16"),
    (["toy", "--seed=10000"], "below 10000"), (["toy", "--task", "--size=640"], "multiple of 256"),
    (["toy", "--encoder=unni"], "unknown encoder 'unni'")])
def test_command_messages(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        data.main(argv)
    assert not (tmp_path / "data").exists()
