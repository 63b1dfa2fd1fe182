"""slides/writers.py: levels against numpy, files against Pillow and openslide, memory, and what is refused."""
import errno
import io
import os
import re
import struct
import tracemalloc
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from torture_slide import noise, picture

from common import UserError
from slides import writers
from slides.writers import VIEWER, jpeg, level_sizes, tile_rows, write_deepzoom, write_tiff

# (H, W, tile): even, odd everywhere, one tile row, smaller than a tile, single rows and columns
SIZES = [(128, 192, 32), (101, 75, 32), (161, 97, 16), (30, 200, 32), (7, 5, 16), (1, 90, 16), (65, 1, 16), (1, 1, 16)]

def cut(image, *heights):
    """Strips of these heights in turn, as a generator, which can be read only once."""
    at = 0
    while at < len(image):
        for h in heights:
            yield image[at:at + h]
            at += h

def pyramid(image, smallest):
    """All levels by another road than the writers: whole images, integers, the edge repeated by index."""
    levels = [image]
    while max(levels[-1].shape[:2]) > smallest:
        i, j = (np.minimum(np.arange(0, n + n % 2), n - 1) for n in levels[-1].shape[:2])
        x = levels[-1].astype(int)[i][:, j]
        blocks = x.reshape(len(i) // 2, 2, len(j) // 2, 2, 3).sum((1, 3))
        levels.append(((blocks + 2) // 4).astype(np.uint8))
    return levels

def assert_alike(found, wanted, what):
    """Within what JPEG of quality 100 loses on a smooth picture."""
    assert found.shape == wanted.shape, f"{what}: {found.shape} for {wanted.shape}"
    off = np.abs(found.astype(int) - wanted)
    assert off.max() <= 5 and off.mean() < 1, f"{what}: off by {off.max()}, {off.mean():.2f} on average"

def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

@pytest.fixture
def viewer(tmp_path):
    (path := tmp_path / "downloads" / "openseadragon.min.js").parent.mkdir()
    path.write_text("function OpenSeadragon(e) {}")
    return path

# ----- 1. Levels -----

@pytest.mark.parametrize("heights", [(1,), (7, 32, 1, 3), (0, 16), (1000,)], ids=str)
@pytest.mark.parametrize("h, w, tile", SIZES)
def test_levels_are_those_of_the_whole_image(h, w, tile, heights):
    """Exactly, whatever the strips. Catches 2 -> 1 in the rounding, an edge dropped, and a seam between tile rows."""
    image = noise(h, w)
    sizes, want = level_sizes((h, w), tile, 90, 1), pyramid(image, 1)
    assert sizes == [x.shape[:2] for x in want] and sizes[-1] == (1, 1)
    rows = [[] for _ in sizes]
    for level, row, x in tile_rows(cut(image, *heights), sizes, tile):
        assert row == len(rows[level])
        rows[level].append(x)
    for level, x in enumerate(want):
        assert all(len(r) == tile for r in rows[level][:-1]) and len(rows[level][-1]) <= tile
        assert np.array_equal(np.concatenate(rows[level]), x), f"level {level}"

def test_memory_does_not_grow_with_the_image(tmp_path):
    w, tile = 640, 64
    row, peaks = 3 * w * tile, []
    for h in (320, 1600):
        strips = (np.full((40, w, 3), k, np.uint8) for k in range(h // 40))
        tracemalloc.start()
        write_tiff(tmp_path / "x.tif", strips, (h, w), tile)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 8 * row < 3 * w * 1600 / 3 and peaks[1] < peaks[0] + 3 * row, f"{peaks}, a row of tiles: {row}"

# ----- 2. Pyramid TIFF -----

@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
@pytest.mark.parametrize("h, w, tile", SIZES)
def test_tiff_by_other_readers(tmp_path, monkeypatch, h, w, tile, big):
    """Pillow, and openslide where it is installed."""
    monkeypatch.setattr(writers, "CLASSIC", 0 if big else writers.CLASSIC)
    image, path = picture(h, w), tmp_path / "new" / "x.tif"
    write_tiff(path, cut(image, 20, 3), (h, w), tile, 100, mpp=0.2527)
    assert path.read_bytes()[:4] == (b"II+\0" if big else b"II*\0") and files(tmp_path) == ["new/x.tif"]
    levels = pyramid(image, tile)
    with Image.open(path) as f:
        assert f.n_frames == len(levels)
        for k, want in enumerate(levels):
            f.seek(k)
            tags = {n: f.tag_v2.get(n) for n in (254, 259, 262, 296, 322, 323, 530)}
            assert tags == {254: int(k > 0), 259: 7, 262: 6, 296: 3, 322: tile, 323: tile, 530: (1, 1)}
            assert 1e4 / float(f.tag_v2[282]) == pytest.approx(0.2527 * 2**k, rel=1e-6) == 1e4 / float(f.tag_v2[283])
            assert_alike(np.asarray(f.convert("RGB")), want, f"level {k}")
    openslide = pytest.importorskip("openslide", reason="pip install openslide-python openslide-bin enables the rest")
    with openslide.OpenSlide(path) as f:
        assert f.properties["openslide.vendor"] == "generic-tiff"
        assert float(f.properties["openslide.mpp-x"]) == pytest.approx(0.2527)
        assert f.level_dimensions == tuple((x.shape[1], x.shape[0]) for x in levels)
        for k, want in enumerate(levels):
            found = np.asarray(f.read_region((0, 0), k, want.shape[1::-1]))    # (h,w,4)
            assert_alike(found[..., :3], want, f"level {k} by openslide")
            assert (found[..., 3] == 255).all()

def test_tiles_are_whole_jpeg_files_of_full_chroma(tmp_path):
    """What openslide's own decoder gets. The part beyond the image repeats its edge: black there would ring inside."""
    image, path = picture(40, 50), tmp_path / "x.tif"
    write_tiff(path, [image], (40, 50), 32, 100)
    padded = np.pad(image, ((0, 24), (0, 14), (0, 0)), "edge")                 # (64,64,3)
    with Image.open(path) as f:
        at, size = f.tag_v2[324], f.tag_v2[325]
        assert not {282, 283, 296} & set(f.tag_v2)                             # no resolution is invented
    for k in range(4):
        tile = Image.open(io.BytesIO(path.read_bytes()[at[k]:at[k] + size[k]]))
        assert tile.format == "JPEG" and [part[1:3] for part in tile.layer] == [(1, 1)] * 3
        i, j = k // 2 * 32, k % 2 * 32
        assert_alike(np.asarray(tile), padded[i:i + 32, j:j + 32], f"tile {k}")
    write_tiff(tmp_path / "y.tif", [image], (40, 50), 32, 30)
    assert (tmp_path / "y.tif").stat().st_size < path.stat().st_size           # its quality counts

@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
def test_what_lenient_readers_do_not_notice(tmp_path, monkeypatch, big):
    """The directory comes first, its entries ascend, values start at even bytes, a BigTIFF's offsets are 64 bit. It is
    written where the padded tiles of all levels may pass 4 GB: even noise stays below with that bound."""
    side, worst = 64, (noise(64, 64) > 127).astype(np.uint8) * 255
    assert len(jpeg(worst, 100)) / (3 * side**2 + 1000) * writers.CLASSIC < 2**32
    raw = (4 + 1) * (3 * side**2 + 1000)                                       # of 65 x 65 pixels: 2 x 2 tiles, then 1
    monkeypatch.setattr(writers, "CLASSIC", raw - big)
    write_tiff(tmp_path / "x.tif", [picture(65, 65)], (65, 65), side, mpp=0.5)
    data = (tmp_path / "x.tif").read_bytes()
    at, head, entry = (16, "<Q", "<HHQQ") if big else (8, "<H", "<HHII")
    assert struct.unpack_from("<H", data, 2) == (43 if big else 42,)
    assert struct.unpack_from("<Q" if big else "<I", data, at // 2) == (at,)
    n, at = struct.unpack_from(head, data, at)[0], at + struct.calcsize(head)
    found = [struct.unpack_from(entry, data, at + k * struct.calcsize(entry)) for k in range(n)]
    assert [f[0] for f in found] == sorted({f[0] for f in found}) and len(found) == 16
    size = {3: 2, 4: 4, 5: 8, 16: 8}
    assert all(value % 2 == 0 for _, kind, count, value in found if count * size[kind] > (8 if big else 4))
    assert {f[0]: f[1:3] for f in found}[324] == (16 if big else 4, 4)

# ----- 3. DeepZoom -----

@pytest.mark.parametrize("h, w, tile", SIZES)
def test_deepzoom(tmp_path, viewer, h, w, tile):
    image, folder = picture(h, w), tmp_path / "new"
    assert write_deepzoom(folder / "big.dzi", cut(image, 20, 3), (h, w), tile, 100, viewer) == ["big.dzi", "big.html"]
    assert (folder / "big.dzi").read_text().startswith('<?xml version="1.0" encoding="UTF-8"?>\n<Image ')
    root, space = ET.parse(folder / "big.dzi").getroot(), "{http://schemas.microsoft.com/deepzoom/2008}"
    assert root.tag == space + "Image" and root.attrib == {"Format": "jpg", "Overlap": "0", "TileSize": str(tile)}
    assert root[0].tag == space + "Size" and root[0].attrib == {"Width": str(w), "Height": str(h)}
    levels = pyramid(image, 1)[::-1]
    assert len(levels) == int(np.ceil(np.log2(max(h, w)))) + 1                 # what every DeepZoom viewer counts with
    names = ["big.dzi", "big.html", "openseadragon.min.js"]
    for k, want in enumerate(levels):
        found = np.empty_like(want)
        for i in range(0, want.shape[0], tile):
            for j in range(0, want.shape[1], tile):
                names.append(f"big_files/{k}/{j // tile}_{i // tile}.jpg")
                x = np.asarray(Image.open(folder / names[-1]))
                assert x.shape == found[i:i + tile, j:j + tile].shape, names[-1]
                found[i:i + tile, j:j + tile] = x
        assert_alike(found, want, f"level {k}")
    assert files(folder) == sorted(names)                                      # and no temporary name

def test_page_needs_no_network_and_no_server(tmp_path, viewer, monkeypatch):
    """A viewer that is named must be one, before any work; where none is found there are tiles, and no page."""
    def strips():
        raise AssertionError("work began")
        yield
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.js").write_text("// something else")
    for path in (tmp_path / "none.js", tmp_path / "other.js", tmp_path):
        with pytest.raises(UserError, match="viewer: .*npm install openseadragon.*--viewer=FILE"):
            write_deepzoom(tmp_path / "x.dzi", strips(), (30, 50), viewer=path)
    assert sorted(os.listdir(tmp_path)) == ["downloads", "other.js"]
    assert write_deepzoom("x.dzi", [picture(30, 50)], (30, 50), 16) == ["x.dzi"]
    assert sorted(os.listdir(tmp_path)) == ["downloads", "other.js", "x.dzi", "x_files"]
    (tmp_path / VIEWER).parent.mkdir(parents=True)
    viewer.rename(tmp_path / VIEWER)
    name = "<b> & ü, 50%"
    write_deepzoom(f"{name}.dzi", [picture(30, 50)], (30, 50), 16)
    page = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
    assert "//" not in page and "<title>&lt;b&gt; &amp; ü, 50%</title>" in page and "charset=\"utf-8\"" in page
    assert re.findall(r'src="(.*?)"', page) == ["openseadragon.min.js"]
    assert (tmp_path / "openseadragon.min.js").read_bytes() == (tmp_path / VIEWER).read_bytes()
    # the buttons are pictures that we do not have, and WebGL shows nothing from file://
    for part in ("tileSize: 16, width: 50, height: 30,", "`%3Cb%3E%20%26%20%C3%BC%2C%2050%25_files/${level}/${x}_${y}",
                 "showNavigationControl: false", 'drawer: "canvas"'):
        assert part in page

def test_only_our_own_files_are_replaced(tmp_path, viewer):
    def write(h):
        write_deepzoom(tmp_path / "x.dzi", [picture(h, 50)], (h, 50), 16, viewer=viewer)
    (tmp_path / "x_files").mkdir()                                             # an empty one holds nothing to lose
    write(90)
    before = files(tmp_path)
    write(20)
    assert len(files(tmp_path)) < len(before)
    assert {"x.dzi", "x_files", "x.html"} < {*os.listdir(tmp_path)} and not list(tmp_path.glob(".*"))
    notes, page, dzi = tmp_path / "x_files" / "notes.txt", tmp_path / "x.html", tmp_path / "x.dzi"
    for change, back in ((notes.touch, notes.unlink), (lambda: page.write_text("mine"), page.unlink),
                         (lambda: dzi.rename(tmp_path / "y"), lambda: (tmp_path / "y").rename(dzi)),
                         (lambda: (dzi.unlink(), dzi.mkdir()), dzi.rmdir)):
        change()
        there = files(tmp_path)
        with pytest.raises(UserError, match="x.dzi: there are other things than a DeepZoom image.*another name"):
            write(20)
        assert files(tmp_path) == there
        back()

# ----- 4. What goes wrong -----

@pytest.fixture(params=["tiff", "deepzoom"])
def write(request, tmp_path, viewer):
    """A writer, with x as its path."""
    def call(strips, size, path=tmp_path / "x", **options):
        if request.param == "tiff":
            return write_tiff(path, strips, size, **options)
        return write_deepzoom(path, strips, size, viewer=viewer, **options)
    return call

GOOD = {"strips": [noise(30, 50)], "size": (30, 50), "tile": 16}

@pytest.mark.parametrize("options, says", [
    ([noise(16, 50), noise(13, 50)], r"strips: they end after 29 rows, size=\(30, 50\) says 30: give size=\(height"),
    ([noise(16, 50), noise(15, 50)], r"strips: uint8 \(15, 50, 3\) after 16 rows does not fit size=\(30, 50\): give"),
    ([noise(50, 30)], r"strips: uint8 \(50, 30, 3\).*uint8 strips \(h, 50, 3\)"),  # height and width swapped
    ([noise(15, 50), noise(15, 49)], r"strips: uint8 \(15, 49, 3\) after 15 rows"),
    ([noise(30, 50) / 255], "strips: float64"), ([np.zeros((30, 50, 4), np.uint8)], r"\(30, 50, 4\)"),
    (noise(30, 50), r"strips: uint8 \(50, 3\) after 0 rows"),                  # the image itself, not a list of strips
    ({"size": (0, 50)}, r"size=\(0, 50\).*at least 1 x 1"), ({"size": (30, 50, 3)}, r"size is \(height, width\)"),
    ({"tile": 100}, "tile=100.*multiple of 16"), ({"tile": 0}, "tile=0"), ({"tile": 8192}, "up to 4096"),
    ({"quality": 0}, "quality=0.*1 to 100"), ({"quality": 101}, "quality=101"),
    ({"path": "file/x"}, "could not write .*file/x: .*check free space and permissions")])
def test_what_does_not_make_up_an_image(tmp_path, write, options, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=says):
        write(**GOOD | (options if isinstance(options, dict) else {"strips": options}))
    assert sorted(os.listdir(tmp_path)) == ["downloads", "file"]

def test_what_a_tiff_cannot_say(tmp_path):
    for path, mpp, says in ((tmp_path, None, "path: .* is a folder: give the name of a file"),
                            *((tmp_path / "x.tif", mpp, "mpp=.*micrometres") for mpp in (0, -0.5, np.nan, np.inf))):
        with pytest.raises(UserError, match=says):
            write_tiff(path, **GOOD, mpp=mpp)

@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=repr)
def test_an_interruption_leaves_what_was_there(tmp_path, write, error, monkeypatch):
    """A slide that cannot be read on, or a full disk at the third tile: one sentence for that."""
    image, done = picture(60, 50), []

    def fails(pixels, quality):
        done.append(pixels)
        if len(done) == 3:
            raise error
        return jpeg(pixels, quality)

    def there():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for _ in range(2):
        before, names, done[:] = there(), os.listdir(tmp_path), []
        with monkeypatch.context() as m, pytest.raises((KeyboardInterrupt, UserError)) as err:
            m.setattr(writers, "jpeg", fails)
            write([image], (60, 50), tile=16)
        assert there() == before and sorted(os.listdir(tmp_path)) == sorted(names)
        assert err.type is KeyboardInterrupt or re.search("could not .*x: .*No space left.*check free", str(err.value))
        write([image], (60, 50), tile=16)
