"""strips.py, build.py: which images, which patches, every resolution; shards, restarts, damage, workers."""
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torture_slide import page, picture, text, write

import data
from common import UserError, load_meta, load_tensors
from data import Pyramids
from slides import strips
from large.enlarge import read_image
from slides.reader import open_slide
from slides.strips import Job, image_jobs, otsu, plan, tissue_of
from slides.writers import halve, write_tiff

P = 16

def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(4, 256, (h, w, 3), dtype=np.uint8)

def build(out, images, *more):
    data.main(["build", f"--images={images}", f"--out={out}", f"--patch={P}", "--scales=3", *map(str, more)])
    return Pyramids(out)

def tensors(out, name):
    return load_tensors(out / f"{name}.safetensors")[0]

def places(t, s=0):
    """Where the patches of scale s are: {(row, column)}."""
    return set(map(tuple, t[f"ij{s}"].tolist()))

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

@pytest.fixture
def slides(tmp_path):
    """Six images in nested folders, two of them slides whose pixels measure 0.25 and 0.5."""
    root = tmp_path / "in"
    for k, name in enumerate(("a.png", "b.png", "sub/a.png", "sub/deep/c.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(64, 96, k)).save(root / name)
    for name, mpp in (("fine.tif", 0.25), ("coarse.tif", 0.5)):
        write_tiff(root / name, [picture(128, 192)], (128, 192), 32, 95, mpp=mpp)
    return root

# ----- 1. Which images -----

def names(images, out="none", holdout=0.0):
    return [job.name for job in image_jobs(str(images), str(out), holdout)]

def test_folders_with_loops_patterns_and_lists(slides, tmp_path, capsys):
    (slides / "loop").symlink_to(slides, target_is_directory=True)
    (slides / "sub" / "self.svs").symlink_to("self.svs")
    for name in (".hidden.png", "notes.txt"):
        (slides / name).write_text("")
    (slides / "out").mkdir()
    (slides / "out" / "mask.png").write_text("")
    everything = ["a.png", "b.png", "coarse.tif", "fine.tif", "sub/a.png", "sub/deep/c.png", "sub/self.svs"]
    assert names(slides, slides / "out") == everything
    assert "2 entries are not images and are passed over: .hidden.png, notes.txt" in capsys.readouterr().out
    assert names(f"{slides}/*.tif") == ["coarse.tif", "fine.tif"]
    assert names(f"{slides}/sub/**/*.png") == ["a.png", "deep/c.png"]
    (slides / "list.csv").write_text("path, mpp,split,note\nsub/a.png,0.5,test,x\n\nb.png,,train,\na.png,1e6,,\n")
    jobs = image_jobs(str(slides / "list.csv"), "none", 0.5)
    assert [(j.name, j.own, j.split) for j in jobs] == [("a.png", 1e6, "train"), ("b.png", None, "train"),
                                                        ("sub/a.png", 0.5, "test")]
    for table, says in (("path,mpp\na.png,x\n", "2: give path"), ("path,split\na.png,\nb.png,held\n", "3: give path"),
                        ("path,split\na.png,train\na.png,test\n", "3: a.png is there twice")):
        (slides / "list.csv").write_text(table)
        with pytest.raises(UserError, match=f"list.csv, line {says}"):
            names(slides / "list.csv")
    (slides / "sub" / "list.csv").write_text("path\na.png\n../b.png\n")      # names lead out of no folder
    assert names(slides / "sub" / "list.csv") == ["b.png", "sub/a.png"]
    (slides / "sub__a.png").write_bytes((slides / "a.png").read_bytes())
    with pytest.raises(UserError, match="two images the same name, sub__a.png: rename one"):
        names(slides)
    for images, says in (("nowhere", "does not exist"), (f"{slides}/*.bmp", "holds no image")):
        with pytest.raises(UserError, match=says):
            names(images)

def test_the_same_images_are_held_out_whatever_comes_later(slides):
    def held():
        return [job.name for job in image_jobs(str(slides), "none", 0.3) if job.split == "test"]
    before = held()
    next(slides / name for name in names(slides) if name not in before).unlink()
    assert len(before) == 2 and held() == before

def test_parts_of_one_image(tmp_path):
    """Cut into columns and rows, an image becomes what its parts, saved one by one, would; some are held out. catches:
    rows for columns, a mask of the whole image."""
    x, at = picture(130, 192), [(i, j) for i in (0, 1) for j in (0, 1, 2)]
    x[:, :80] = 255                                                            # glass
    (tmp_path / "parts").mkdir()
    for i, j in at:
        Image.fromarray(x[65 * i:65 * i + 65, 64 * j:64 * j + 64]).save(tmp_path / "parts" / f"{i}{j}.png")
    Image.fromarray(x).save(tmp_path / "a.png")
    cut = build(tmp_path / "cut", tmp_path / "a.png", "--cut=3x2", "--tissue=0.2")
    one = build(tmp_path / "one", tmp_path / "parts", "--tissue=0.2")
    assert [v["name"] for v in cut.slides] == [f"a.png@{i}-{j}" for i, j in at]
    assert sum(v["split"] == "test" for v in cut.slides) == sum(v["split"] == "test" for v in one.slides) == 1
    for i, j in at:
        part, whole = tensors(tmp_path / "cut", f"a.png@{i}-{j}"), tensors(tmp_path / "one", f"{i}{j}.png")
        assert part.keys() == whole.keys() and all(torch.equal(part[k], whole[k]) for k in part if k != "e"), (i, j)
    assert [v["counts"] for v in cut.slides] == [v["counts"] for v in one.slides]

# ----- 2. Which pixels -----

def test_base_pixels_are_those_of_the_resolution_asked_for(slides, tmp_path, capsys):
    p = build(tmp_path / "out", slides, "--mpp=0.5", "--holdout=0")
    said = capsys.readouterr().out
    assert "a.png: 96 x 64, pixels taken to be 0.5 micrometres each, which it does not say" in said
    assert "fine.tif: 96 x 64, pixels 0.5 micrometres each" in said and "6 images built" in said
    fine, coarse = tensors(tmp_path / "out", "fine.tif"), tensors(tmp_path / "out", "coarse.tif")
    assert fine["e"].shape == (4, 6, 96) and coarse["e"].shape == (8, 12, 96)
    want = np.asarray(Image.open(slides / "fine.tif").convert("RGB"))
    assert np.abs(fine["x0"][7].numpy().astype(int) - halve(want)[16:32, 16:32]).max() <= 8  # a level is JPEG again
    assert p.slides[3]["name"] == "fine.tif" and p.slides[3]["size"] == [64, 96]
    assert "sub__deep__c.png.safetensors" in [x["file"] for x in p.slides]

def test_a_slide_that_does_not_say_its_resolution(tmp_path):
    write(tmp_path / "a.svs", [page(noise(64, 96), (32, 32), 1)])
    with pytest.raises(UserError, match=r"a.svs does not say how large its pixels are: give --mpp"):
        build(tmp_path / "out", tmp_path / "a.svs")
    build(tmp_path / "out", tmp_path / "a.svs", "--mpp=0.5")
    assert np.array_equal(tensors(tmp_path / "out", "a.svs")["x0"][7], noise(64, 96)[16:32, 16:32])
    (tmp_path / "list.csv").write_text("path,mpp\na.svs,0.25\n")
    build(tmp_path / "fine", tmp_path / "list.csv", "--mpp=0.5")
    assert np.array_equal(tensors(tmp_path / "fine", "a.svs")["x0"][0], halve(noise(64, 96))[:16, :16])
    with pytest.raises(UserError, match="has pixels of 0.25 micrometres, and 0.1 were"):
        build(tmp_path / "none", tmp_path / "list.csv", "--mpp=0.1")

def test_what_is_left_out_is_told(tmp_path, capsys):
    """Corners without data; plain patches; scales that no image holds."""
    image = noise(64, 64)
    image[:32, :24] = (0, 2, 1)
    Image.fromarray(image).save(tmp_path / "a.png")
    p = build(tmp_path / "out", tmp_path / "a.png")
    # tiles 0 and 1 of rows 0 and 1 are all or half black, and so is what covers them
    assert p.slides[0]["counts"] == [12, 3, 0] and "6 without data" in capsys.readouterr().out
    assert not {(0, 0), (0, 1), (1, 0), (1, 1)} & places(tensors(tmp_path / "out", "a.png"))
    assert build(tmp_path / "all", tmp_path / "a.png", "--nodata=1").slides[0]["counts"] == [16, 4, 1]
    image[:, :32] = 240
    Image.fromarray(image).save(tmp_path / "a.png")
    p, said = build(tmp_path / "more", tmp_path / "a.png", "--background=5", "--scales=5"), capsys.readouterr().out
    assert p.scales == 3 and p.slides[0]["counts"] == [8, 2, 1, 0, 0] and "10 plain patches" in said
    assert "scale 3 is dropped" in said and "scale 4 is dropped: no image holds a patch of 256 x 256" in said
    t = tensors(tmp_path / "more", "a.png")
    assert (t["ij0"][:, 1] >= 2).all() and t["e"].shape == (4, 4, 96)          # embeddings of all tiles stay
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    with pytest.raises(UserError, match="lower --background"):
        build(tmp_path / "none", tmp_path / "white.png", "--background=5")

def test_tissue(tmp_path, capsys):
    """Pink on grey glass: the mask is a picture of it, and patches follow it, of every scale by their own share."""
    image = (235 + np.random.default_rng(0).integers(0, 4, (128, 192, 1)) * np.ones(3)).astype(np.uint8)
    image[32:96, 64:128] = (200, 120, 170)
    Image.fromarray(image).save(tmp_path / "a.png")
    p = build(tmp_path / "out", tmp_path / "a.png", "--tissue=0.6")
    t = tensors(tmp_path / "out", "a.png")
    assert places(t) == {(i, j) for i in range(2, 6) for j in range(4, 8)}
    assert places(t, 1) == {(1, 2), (1, 3), (2, 2), (2, 3)} and p.slides[0]["counts"][2] == 0
    assert build(tmp_path / "some", tmp_path / "a.png", "--tissue=0.2").slides[0]["counts"] == [16, 4, 2]
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png.png"))
    truth = np.zeros((128, 192), bool)
    truth[32:96, 64:128] = True
    assert mask.shape == truth.shape and (mask.astype(bool) != truth).mean() < 0.05
    assert "106 without tissue" in capsys.readouterr().out
    share = tissue_of(plan(Job("a", tmp_path / "a.png"), None, P))[0]
    assert (share[2:6, 4:8] > 0.9).all() and share[2:6, :3].max() < 0.1

def test_a_slide_full_of_tissue_is_not_split():
    def parted(*counts):
        return otsu(np.concatenate([np.full(n, value) for n, value in counts]).astype(np.uint8))
    assert 90 <= parted((500, 90), (500, 160)) < 160 and strips.HIGH < 90      # alone it would drop the paler half
    assert 5 <= parted((900, 5), (100, 80), (1, 255)) < 80 and parted((9, 0)) == 0

# ----- 3. Damage, restarts, shards, workers -----

def test_a_damaged_tile_costs_the_patches_over_it(tmp_path, capsys):
    tags, tiles = page(picture(128, 192), (48, 32), 8)
    write(tmp_path / "a.tif", [(tags, [*tiles[:6], b"nonsense", *tiles[7:]])])  # column 2, row 1: x 96-144, y 32-64
    p = build(tmp_path / "out", tmp_path / "a.tif")
    said, t = capsys.readouterr().out, tensors(tmp_path / "out", "a.tif")
    assert "a.tif: tile 2, 1 of level 0 cannot be decoded" in said and "left out: 10 unreadable" in said
    bad = {(i, j) for i in (2, 3) for j in (6, 7, 8)}
    assert not bad & places(t) and p.slides[0]["counts"] == [96 - 6, 24 - 2, 6 - 2]
    for (i, j), x in zip(t["ij0"].tolist(), t["x0"]):
        assert np.array_equal(x, picture(128, 192)[i * P:i * P + P, j * P:j * P + P])
    p = build(tmp_path / "cut", tmp_path / "a.tif", "--cut=3x2")               # damage keeps its place in each part
    assert [v["counts"][0] for v in p.slides] == [16, 16 - 4, 16 - 2, 16, 16, 16]

def test_damage_that_hides_tissue(tmp_path):
    """A broken tile of the level that tissue is looked for in costs no patch: the pixels of the finer one are whole."""
    x = picture(2048, 2048)
    write(tmp_path / "a.tif", [page(x, (256, 256), 8), (page(halve(x), (256, 256), 8, kind=1)[0], [b"nonsense"] * 16)])
    slide = open_slide(tmp_path / "a.tif", damaged=[])
    assert len(slide.levels) == 2
    data.main(["build", f"--images={tmp_path / 'a.tif'}", f"--out={tmp_path / 'out'}", "--patch=32", "--scales=1",
               "--tissue=0.5", "--workers=0"])
    assert Pyramids(tmp_path / "out").slides[0]["counts"] == [64 * 64]
    assert np.asarray(Image.open(tmp_path / "out" / "masks" / "a.tif.png")).all()          # not shown as glass

def test_failed_images_do_not_stop_the_others(slides, tmp_path, capsys):
    (slides / "b.png").write_bytes((slides / "b.png").read_bytes()[:3000])
    (slides / "text.svs").write_text("hello")
    with pytest.raises(SystemExit) as stop:
        build(tmp_path / "out", slides)
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "5 images built, 0 there before, 2 failed" in said
    assert all(f"failed: {slides}/{name} cannot be read" in said for name in ("b.png", "text.svs"))
    assert Pyramids(tmp_path / "out").scales == 3 and len(Pyramids(tmp_path / "out").slides) == 5
    assert "cannot be read" in (tmp_path / "out" / "b.png.failed.txt").read_text()
    Image.fromarray(noise(64, 96, 1)).save(slides / "b.png")                   # mended: only that one is made
    (slides / "text.svs").unlink()
    p = build(tmp_path / "out", slides)
    assert "1 images built, 5 there before, 0 failed" in capsys.readouterr().out and len(p.slides) == 6
    assert not (tmp_path / "out" / "b.png.failed.txt").exists()
    for name in "ab":
        (tmp_path / f"{name}.svs").write_text("hello")
    with pytest.raises(UserError, match=r"\w.svs cannot be read"):            # and if there is none that can be
        build(tmp_path / "none", f"{tmp_path}/*.svs")

def test_shards_make_what_one_process_makes(slides, tmp_path, capsys):
    build(tmp_path / "one", slides, "--tissue=0.001")
    with pytest.raises(UserError, match="unfinished"):
        build(tmp_path / "two", slides, "--tissue=0.001", "--shard=1/2")
    assert "3 images are left to other shards" in capsys.readouterr().out
    build(tmp_path / "two", slides, "--tissue=0.001", "--shard=0/2")
    assert files(tmp_path / "one") == files(tmp_path / "two")

def test_memory_does_not_grow_with_the_image(tmp_path):
    """What is held of an image is a few strips, and a mask of 8 pixels a tile: tasks come one by one, small."""
    write_tiff(tmp_path / "a.tif", [np.full((64, 512, 3), 99, np.uint8)] * 80, (5120, 512), 64)
    job = plan(Job("a", tmp_path / "a.tif"), None, 64)
    share, mask = tissue_of(job)
    assert share.shape == (80, 8) and mask.shape == (1280, 128) and share.max() == 0
    assert job.rows * 64 * 512 <= strips.TASK
    job = replace(job, rows=3)
    asked = []
    for n, _ in enumerate(strips.ahead([job], set(), None, 0.0, lambda task: asked.append(task) or task, 2)):
        assert len(asked) <= n + 3
    assert sum(task.args[-1] for task in asked) == 80

# ----- 4. What is nothing, what is white -----

IMAGE, MAP, CELL = noise(64, 96), {"geo_scale": (12, [0.5, 0.5, 0])}, (32, 32)
GONE = np.arange(96)[None, :].repeat(64, 0) < 48                               # the left half: 3 of 6 columns of tiles

def with_band(band, *kinds, planar=1):
    """A page of the image and a band of the last of the kinds, those before it are infrared."""
    tags, tiles = page(np.dstack([IMAGE, *[noise(64, 96, 1)[..., 0]] * (len(kinds) - 1), band]), CELL, 8, planar=planar)
    return [(tags | {"extra_bands": (3, kinds)}, tiles)]

def half(colour):
    return np.where(GONE[..., None], np.array(colour, np.uint8), IMAGE)

def masked(tile):
    """GDAL's: a page of one bit, in tiles of its own, marked 4."""
    cut = [~GONE[y:y + tile[1], x:x + tile[0]] for y in range(0, 64, tile[1]) for x in range(0, 96, tile[0])]
    tags, _ = page(IMAGE[..., :1], tile, 1, kind=4)
    tags |= {"bits": (3, [1]), "colours": (3, [4])}
    return [page(IMAGE, CELL, 8), (tags, [np.packbits(x, 1).tobytes() for x in cut])]

def with_tags(more, image):
    tags, tiles = page(image, CELL, 8)
    return [(tags | more, tiles)]

def some_left_out(more):
    tags, tiles = page(IMAGE, (48, 64), 8)
    return [(tags | more, [b"", tiles[1]])]

KINDS = {
    "nodata": lambda: with_tags(MAP | {"nodata": text("255")}, half(255)),
    "alpha": lambda: with_band(np.where(GONE, 0, 255).astype(np.uint8), 2),
    "alpha behind infrared": lambda: with_band(np.where(GONE, 0, 255).astype(np.uint8), 0, 2),
    "alpha apart": lambda: with_band(np.where(GONE, 0, 255).astype(np.uint8), 0, 2, planar=2),
    "mask": lambda: masked(CELL), "mask in other tiles": lambda: masked((96, 16)),
    "sparse map": lambda: some_left_out(MAP),
    "clear.png": lambda: Image.fromarray(np.dstack([IMAGE, np.where(GONE, 0, 255).astype(np.uint8)])),
    "black": lambda: [page(half(0), CELL, 8)]}
ALL = {"infrared called alpha": lambda: with_band(noise(64, 96, 1)[..., 0], 2),
       "another band of two values": lambda: with_band(np.where(GONE, 0, 255).astype(np.uint8), 0),
       "sparse slide": lambda: some_left_out({}), "white": lambda: [page(half(255), CELL, 8)]}

@pytest.mark.parametrize("kind", [*KINDS, *ALL])
def test_what_shows_nothing_is_left_out(tmp_path, capsys, kind):
    """Each way to say it makes half the image nothing; what only looks so, as infrared that GDAL calls alpha, does not.
    The empty tile of a map is nothing, that of a slide is white."""
    made, path = (KINDS | ALL)[kind](), tmp_path / ("a.png" if kind.endswith("png") else "a.tif")
    made.save(path) if kind.endswith("png") else write(path, made)
    counts, said = build(tmp_path / "out", path).slides[0]["counts"], capsys.readouterr().out
    assert counts == ([12, 2, 0] if kind in KINDS else [24, 6, 1]) and ("17 without data" in said) == (kind in KINDS)
    found = open_slide(path).read(0, 0, 96, 64)
    assert np.array_equal(found[:, 48:], IMAGE[:, 48:])
    if kind in KINDS or kind == "sparse slide":
        assert (found[:, :48] == (0 if kind in KINDS else 255)).all()

def test_masks_beside_an_image_are_named(tmp_path, capsys):
    """GDAL's files beside: one with statistics alone says nothing of where nothing is."""
    for name, beside in (("a", {".msk": "", ".aux.xml": "<NoDataValue>7<"}), ("b", {".aux.xml": "<Metadata/>"})):
        Image.fromarray(IMAGE).save(tmp_path / f"{name}.png")
        for ending, held in beside.items():
            (tmp_path / f"{name}.png{ending}").write_text(held)
    build(tmp_path / "out", f"{tmp_path}/*.png")
    said = capsys.readouterr().out
    assert "a.png: a.png.msk and a.png.aux.xml, where GDAL says what shows nothing, not looked at: put" in said
    assert "b.png.aux.xml" not in said

def png16(path, x):
    """A PNG of 16-bit RGB, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)),
             (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(
        ">I", zlib.crc32(name + data)) for name, data in parts))

@pytest.mark.parametrize("factor, white", [(257, 65535), (16, 4095), (8, 2047)])
def test_deep_images_are_shown_by_the_bits_they_use(tmp_path, capsys, factor, white):
    """16-bit files of cameras with 16, 12 and 11 bits, alike as PNG, TIFF in tiles and grey; alike in the build and for
    one image. Catches: the higher byte alone (at most 15 of 255)."""
    image = noise(64, 96).astype(np.uint16)
    image[0, 0] = 255
    png16(tmp_path / "a.png", image * factor)
    write(tmp_path / "b.tif", [page(image * factor, CELL, 8)])
    Image.fromarray(image[..., 0] * factor).save(tmp_path / "c.png")
    pages = masked(CELL)
    pages[0] = page(np.where(GONE[..., None], 65535, image * factor).astype(np.uint16), CELL, 8)
    write(tmp_path / "d.tif", pages)
    assert open_slide(tmp_path / "d.tif").white == white                       # and nothing counts for nothing
    for name, want in (("a.png", image), ("b.tif", image), ("c.png", image[..., :1].repeat(3, 2))):
        build(tmp_path / name[0], tmp_path / name)
        x = tensors(tmp_path / name[0], name)["x0"][7].numpy().astype(int)
        assert np.abs(x - want[16:32, 16:32]).max() <= 1 and f"{white} shown as white" in capsys.readouterr().out
        assert load_meta(tmp_path / name[0] / f"{name}.safetensors")["white"] == white
        one = ((read_image(tmp_path / name).movedim(0, -1) + 1) * 127.5).round()
        assert np.array_equal(one[16:32, 16:32], x)
    build(tmp_path / "given", tmp_path / "a.png", f"--white={white // 2}")
    assert tensors(tmp_path / "given", "a.png")["x0"].max() == 255 and "shown as white" in capsys.readouterr().out

def test_turned_tiles_stand_upright(tmp_path):
    """As a TIFF's orientation says, which viewers of photographs follow."""
    write(tmp_path / "a.tif", with_tags({"orientation": (3, [6])}, IMAGE))
    build(tmp_path / "out", tmp_path / "a.tif")
    assert np.array_equal(tensors(tmp_path / "out", "a.tif")["x0"][0], np.rot90(IMAGE, -1)[:16, :16])

def test_a_build_that_keeps_nothing_says_why(tmp_path, capsys):
    tags, tiles = page(picture(64, 96), CELL, 8)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "bad.tif", [(tags, [b"nonsense"] * len(tiles))])
    Image.new("RGB", (96, 64)).save(tmp_path / "in" / "black.png")
    Image.fromarray(noise(64, 96)).save(tmp_path / "in" / "good.png")
    with pytest.raises(SystemExit, match="1"):
        build(tmp_path / "out", tmp_path / "in")
    said = capsys.readouterr().out
    assert "2 images built, 0 there before, 1 failed" in said and "bad.tif keeps no patch: 31 unreadable (copy" in said
    assert "black.png keeps no patch: 31 without data (raise --nodata" in said
    assert not (tmp_path / "out" / "bad.tif.safetensors").exists()
    with pytest.raises(UserError, match="no patch is left in .*31 without data .raise --nodata"):
        build(tmp_path / "none", tmp_path / "in" / "black.png")

# ----- 5. Plain pictures -----

def test_pictures_of_every_kind(tmp_path, capsys):
    """The fourth band of a picture leaves no trace; what is there is not made again, and not mixed with another."""
    (tmp_path / "in").mkdir()
    rgb, infrared, file = noise(70, 90), noise(70, 90, 1)[..., :1], tmp_path / "out" / "a.png.safetensors"
    Image.fromarray(rgb).save(tmp_path / "in" / "a.png")
    Image.fromarray(rgb).save(tmp_path / "in" / "b.jpg", quality=95)
    Image.fromarray(np.concatenate([rgb, infrared], 2)).save(tmp_path / "in" / "c.tif")
    p = build(tmp_path / "out", tmp_path / "in")
    assert "dropped 10 columns, 6 rows at the edge" in capsys.readouterr().out
    assert p.names("train") == ["a.png", "b.jpg", "c.tif"] and p.scales == 3 and p.slides[0]["counts"] == [20, 4, 1]
    a, b, c = (tensors(tmp_path / "out", name) for name in p.names("train"))
    assert np.array_equal(a["x0"][7], rgb[16:32, 32:48]) and np.array_equal(a["x1"][3], halve(rgb)[16:32, 16:32])
    assert all(torch.equal(a[k], c[k]) for k in a) and a["e"].shape == (4, 5, 96)
    assert np.array_equal(b["x0"][7], np.asarray(Image.open(tmp_path / "in" / "b.jpg"))[16:32, 32:48])
    before = file.stat().st_mtime_ns
    build(tmp_path / "out", tmp_path / "in")
    assert file.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="scales=3 there, 2 now"):
        build(tmp_path / "out", tmp_path / "in", "--scales=2")
    Image.fromarray(noise(80, 90)).save(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match="a.png.safetensors was made from another image"):
        build(tmp_path / "out", tmp_path / "in")

def test_pictures_that_cannot_be_used(tmp_path):
    for name in ("cut.png", "cut.jpg", "cut.tif"):
        Image.fromarray(noise(200, 200)).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20_000])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((32, 32), np.float32)).save(tmp_path / "deep.tif")
    Image.fromarray(noise(20, 100)).save(tmp_path / "small.png")
    for name, words in (("text.png", "cannot be read"), ("none.png", "does not exist"),
                        ("empty", "holds no image"), ("deep.tif", "deep.tif .*float"),
                        ("small.png", "100 x 20 pixels, smaller than a tile: take --patch below 32"),
                        *((f"cut.{kind}", f"cut.{kind} cannot be read.*cut short") for kind in ("png", "jpg", "tif"))):
        with pytest.raises(UserError, match=words):
            build(tmp_path / "out", tmp_path / name, "--patch=32")
        assert not list(tmp_path.glob("out/*.safetensors"))

@pytest.mark.parametrize("option, words", [
    ("--mpp=-1", "give micrometres per pixel"),
    ("--tissue=2", "tissue, nodata in"), ("--nodata=-1", "nodata in"), ("--workers=-1", "must be at least 0"),
    ("--patch=20", "multiple of 16"), ("--encoder=uni3", "unknown encoder"), ("--weights=w.bin", "no weights"),
    ("--pach=16", "did you mean 'patch'"), ("--images=", "say what to read"), ("--holdout=1.5", "holdout in"),
    ("--shard=2/2", "--shard=2/2: write i/n"), ("--shard=1", "write i/n"), ("--shard=a/b", "write i/n"),
    ("--cut=3", "--cut="), ("--cut=0x2", "--cut="), ("--cut=ax2", "--cut="), ("--cut=3x2x1", "--cut="),
    ("--cut=16x1", "a part of .*a.png is 6 x 64 pixels, smaller"), ("--out=FILE", "could not write")])
def test_messages(tmp_path, option, words):
    Image.fromarray(noise(64, 96)).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=words):
        build(tmp_path / "out", tmp_path / "a.png", option.replace("FILE", f"{tmp_path}/file/out"))
