"""Files that ask for more than they hold, and names that lead out of their folder, are refused in time."""
import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from torture_slide import KINDS, page, torture

from common import UserError
from data import read_index
from slides.bags import read_bag
from toy.index import inside
from slides.reader import open_slide
from slides.tiff import pack_directory

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB on Linux

def chain(path, count, shared, n):
    """A TIFF of `count` directories, 5000, 4999 ... pixels wide, whose tags `shared` point to the same 4 n bytes."""
    tags, _ = page(np.zeros((8, 8, 1), np.uint8), (8, 8), 1)
    tags |= {"height": (4, [3200]), "subfile": (4, [1])}
    at = 8 + 4 * n
    out = b"II*\0" + struct.pack("<I", at) + bytes(4 * n)
    for k in range(count):
        tags["width"] = 4, [5000 - k]
        size, plain = 6 + 12 * (len(tags) + len(shared)), pack_directory(tags, 0)[2:-4]
        entries = [plain[i:i + 12] for i in range(0, len(plain), 12)]
        entries += [struct.pack("<HHII", tag, kind, many, 8) for tag, (kind, many) in shared.items()]
        out += struct.pack("<H", len(entries)) + b"".join(entries)
        at += size
        out += struct.pack("<I", at if k < count - 1 else 0)
    path.write_bytes(out)

@pytest.mark.parametrize("shared, says", [({270: (2, 2**20)}, "values of tag 270"),
                                          ({324: (4, 250_000), 325: (4, 250_000)}, "tables are shared")])
def test_directories_that_share_bytes(tmp_path, shared, says):
    """Each points to the same megabyte, of text or of tables of tiles: gigabytes, if there were as many as may be."""
    count = 40 if 270 in shared else 8
    chain(tmp_path / "a.tif", count, shared, 2**18)
    before = peak()
    with pytest.raises(UserError, match=says):
        open_slide(tmp_path / "a.tif")
    assert peak() - before < 100

@pytest.mark.parametrize("name, good", [
    ("a.safetensors", True), ("b/a b.x", True), ("..a/b..", True), ("../a", False), ("a/../../b", False), ("/a", False),
    ("", False), (".", False), ("a\0b", False), (3, False), (None, False), ("a" * 300, False), ("..", False)])
def test_names_stay_inside_their_folder(name, good):
    assert inside(name) == good

@pytest.mark.parametrize("name", ["a.h5", "a.pt", "a.npy", "a.safetensors", "a.svs", "a.tif", "a.jpg", "a.png"])
@pytest.mark.parametrize("begins, says", [(b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
                                          (b"<!DOCTYPE html><html></html>", "is a web page")])
def test_what_was_put_in_place_of_a_file(tmp_path, name, begins, says):
    (tmp_path / name).write_bytes(begins)
    read = read_bag if Path(name).suffix in (".h5", ".pt", ".npy", ".safetensors") else open_slide
    with pytest.raises(UserError, match=f"{name} .*{says}"):
        read(tmp_path / name)

SLIDE = {"name": "a", "file": "a.safetensors", "split": "train", "size": [32, 32], "counts": [4, 1]}
INDEX = {"format": 1, "patch": 16, "scales": 2, "embed_dim": 3, "encoder": "stats", "std": [1.0, 2, 0.5], "source": {},
         "slides": [SLIDE]}

@pytest.mark.parametrize("change, says", [
    ({}, None), ({"slides": []}, None), ({"slides": [SLIDE, SLIDE | {"file": "../../a"}]}, "at slide 1: make"),
    ({"slides": [SLIDE | {"name": "/etc/a"}]}, "slide 0"), ({"slides": [SLIDE | {"counts": [1]}]}, "slide 0"),
    ({"slides": [{}]}, "slide 0"), ({"slides": [3]}, "slide 0"), ({"slides": {}}, "slides"),
    ({"patch": 0, "std": [1.0, 2]}, "at patch, std:"),
    ({"std": [1.0, 0.0, 1.0]}, "std"), ({"scales": True}, "scales"), ({"source": {"mpp": "x"}}, "source"),
    ({"source": {"white": "x"}}, "source"), ({"std": [1.0, 10**400, 1.0]}, "std"), ({"std": [1.0, 1e-300, 1.0]}, "std"),
    ({"embed_dim": 10**30}, "embed_dim"), ({"encoder": None}, "encoder"), ({"format": 2}, "no index of this program")])
def test_an_index_from_elsewhere(tmp_path, change, says):
    """It says where it is wrong, before anything is read or written by what it names."""
    Path(tmp_path, "index.json").write_text(json.dumps(INDEX | change))
    if says is None:
        assert read_index(tmp_path) == INDEX | change
    else:
        with pytest.raises(UserError, match=f"index.json is damaged.*{says}"):
            read_index(tmp_path)
    Path(tmp_path, "index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="index.json is damaged"):
        read_index(tmp_path)

@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "TIFF and photographs"])
def test_damaged_files_end_in_a_sentence(tmp_path, kind):
    """`make torture` tries 500 of each; each has two seconds and 500 MB."""
    if kind == "h5":
        pytest.importorskip("h5py", reason="pip install -e '.[h5]'")
    outcomes, faults = torture(60, tmp_path, 3, kind)
    assert not faults and min(outcomes.values()) > 0, (outcomes, faults)
