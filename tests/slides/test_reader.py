"""tiff.py, reader.py: every compression, levels, resolutions and reductions by another road, and what is refused."""
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torture_slide
from conftest import ROOT
from PIL import Image
from torture_slide import noise, page, picture, specimens, text, write

from common import UserError
from slides import reader, tiff
from slides.reader import open_slide
from slides.writers import halve, write_tiff

DATA = Path(os.environ.get("REAL_SLIDES", ROOT.parent / "shared" / "data"))  # not in the repository
IMAGE = picture(90, 120)
TILE = (32, 48)

@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return specimens(tmp_path_factory.mktemp("kinds"))

def slide_of(tmp_path, *pages, mpp=None, name="a.tif", **options):
    write(tmp_path / name, pages, **options)
    return open_slide(tmp_path / name, mpp)

def plain(image, kind=0, **more):
    """A page of uncompressed tiles, exact; `more` are tags."""
    tags, tiles = page(image, TILE, 1, kind=kind)
    return tags | more, tiles

# ----- 1. Pixels -----

def test_every_compression(kinds, tmp_path):
    """Catches a swap of colours or axes, tables left out, the predictor, and an edge tile put in the wrong place."""
    allowed = {"jpeg.svs": 5, "rgb.svs": 3, "ycc.svs": 4, "strips.tif": 5, "photo.jpg": 12}
    for path in kinds:
        slide = open_slide(path)
        off = np.abs(slide.read(0, 0, 120, 90).astype(int) - IMAGE)
        assert slide.size == (120, 90) and off.max() <= allowed.get(path.name, 0), f"{path.name}: off by {off.max()}"
        if path.suffix == ".svs":
            assert [v.size for v in slide.levels] == [(120, 90), (60, 45)] and slide.mpp == 0.5 and slide.scanned
            off = np.abs(slide.read(0, 0, 60, 45, 1.0).astype(int) - IMAGE[::2, ::2])
            assert off.max() <= allowed.get(path.name, 0), f"{path.name}, level 1: off by {off.max()}"
    # colours are what the directory says; where it calls three bands grey, a JFIF marker says that they are YCbCr
    jfif = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    for packed, said, more in ((2, 2, jfif), (6, 1, jfif), (2, 1, b"")):
        tags, tiles = page(IMAGE, TILE, 7, colours=packed)
        slide = slide_of(tmp_path, (tags | {"colours": (3, [said])}, [t[:2] + more + t[2:] for t in tiles]))
        assert np.abs(slide.read(0, 0, 120, 90).astype(int) - IMAGE).max() <= 5

@pytest.mark.parametrize("room", [0, 2**25])
def test_windows_are_crops(kinds, room, monkeypatch):
    """Catches tiles of the wrong row, and a cache that answers for another level or is never emptied."""
    rng, decoded = np.random.default_rng(0), []

    def counted(data, level):
        decoded.append(level)
        return tiff.decode(data, level)
    slide = open_slide(kinds[0])
    slide.keep_tiles(room)
    for mpp, (w, h) in ((0.5, (120, 90)), (1.0, (60, 45)), (1.25, (48, 36))):
        whole = open_slide(kinds[0]).read(0, 0, w, h, mpp)
        with monkeypatch.context() as m:
            m.setattr(reader, "decode", counted)
            for _ in range(20):
                (x, right), (y, bottom) = (sorted(rng.choice(end + 1, 2, replace=False)) for end in (w, h))
                found = slide.read(x, y, right - x, bottom - y, mpp)
                assert np.array_equal(found, whole[y:bottom, x:right]), (mpp, x, y)
    assert (len(decoded) > 50) == (room == 0), len(decoded)

def test_white_beyond_the_image(kinds):
    found = open_slide(kinds[4]).read(-10, -5, 200, 150)
    assert np.array_equal(found[5:95, 10:130], IMAGE)
    found[5:95, 10:130] = 255
    assert (found == 255).all() and (open_slide(kinds[4]).read(500, 500, 3, 2, 1.0) == 255).all()
    with pytest.raises(UserError, match="at least 1"):
        open_slide(kinds[4]).read(0, 0, 0, 5)

@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("num, den", [(2, 1), (3, 1), (4, 1), (5, 2), (4, 3), (13, 2)])
def test_reduction_is_the_mean_over_the_area(tmp_path, monkeypatch, num, den, block):
    """By another road: every pixel repeated `den` times, then blocks of `num`. Catches a shift of half a pixel."""
    monkeypatch.setattr(reader, "BLOCK", block)
    image = noise(97, 131)
    slide = slide_of(tmp_path, plain(image), mpp=1.0)
    large = image.repeat(den, 0).repeat(den, 1).astype(int)
    h, w = large.shape[0] // num, large.shape[1] // num
    sums = large[:h * num, :w * num].reshape(h, num, w, num, 3).sum((1, 3))
    want = (2 * sums + num * num) // (2 * num * num)                           # rounded half up, in integers
    level, ratio, size = slide.grid(num / den)
    found = slide.read(0, 0, w, h, num / den)
    assert size == (w, h) and ratio == pytest.approx((num / den, num / den))
    ties = 2 * sums % (2 * num * num) == num * num                             # where floats may fall on either side
    assert np.abs(found - want)[~ties].max() == 0 and np.abs(found - want).max() <= (den > 1)
    if (num, den) == (2, 1):
        assert np.array_equal(found, halve(image[:96, :130]))

def test_the_nearest_finer_level_is_taken(tmp_path):
    """Levels of one colour each tell where pixels come from. Close resolutions count as equal."""
    pages = [plain(np.full((h, w, 3), c, np.uint8), k) for h, w, c, k in ((400, 600, 10, 0), (200, 300, 20, 1),
                                                                          (50, 75, 30, 1))]
    slide = slide_of(tmp_path, *pages, mpp=0.25)
    assert [v.step for v in slide.levels] == [(1, 1), (2, 2), (8, 8)]
    for mpp, colour, size in ((0.25, 10, (600, 400)), (0.26, 10, (600, 400)), (0.4, 10, (375, 250)),
                              (0.49, 20, (300, 200)), (0.5, 20, (300, 200)), (1.0, 20, (150, 100)),
                              (1.95, 30, (75, 50)), (2.0, 30, (75, 50)), (8.0, 30, (18, 12))):
        assert slide.read(3, 3, 2, 2, mpp)[0, 0, 0] == colour and slide.grid(mpp)[2] == size, mpp
    slide = slide_of(tmp_path, plain(noise(80, 96)), mpp=0.499)
    assert np.array_equal(slide.read(5, 6, 30, 20, 0.5), slide.read(5, 6, 30, 20))
    assert slide.grid(1.0)[1:] == ((2.0, 2.0), (48, 40))                       # 2.004 is meant as 2
    with pytest.raises(UserError, match="a.tif has pixels of 0.499 micrometres, and 0.25 were asked for"):
        slide.read(0, 0, 9, 9, 0.25)

def test_odd_sizes_keep_their_place(tmp_path):
    """4443 / 1110 is 4.003, but the fourth level's pixels span 4: an error of 3 pixels at the far end."""
    assert tiff.steps((4443, 3567), (1110, 891)) == (4, 4) and tiff.steps((4443, 3567), (1111, 892)) == (4, 4)
    assert tiff.steps((4443, 3567), (138, 111)) == (32, 32)
    assert tiff.steps((1000, 1000), (400, 401)) == (2.5, 1000 / 401)
    image = noise(101, 203)
    write_tiff(tmp_path / "a.tif", [np.kron(image, np.ones((4, 4, 1), np.uint8))], (404, 812), 16, 100, mpp=0.25)
    slide = open_slide(tmp_path / "a.tif")
    write_tiff(tmp_path / "b.tif", [noise(257, 1)], (257, 1), 16)
    assert [v.size[1] for v in open_slide(tmp_path / "b.tif").levels] == [257, 129, 65, 33, 17, 9]
    assert slide.mpp == pytest.approx(0.25) and slide.levels[2].size == (203, 101)
    assert np.abs(slide.read(190, 90, 13, 11, 1.0).astype(int) - image[90:, 190:]).mean() < 3

@pytest.mark.parametrize("tag", [{"geo_scale": (12, [1.0, 1.0, 0.0])}, {"geo_keys": (3, [1, 1, 0, 0])},
                                 {"gdal": text("<GDALMetadata/>")}, {"nodata": text("0")}, {}])
def test_gdal_overviews_lie_at_the_ratio_of_the_sizes(tmp_path, tag):
    """Red rises by 7 a column, green by 7 a row. The overview is what GDAL 3.10.3 made of it (`build_overviews([2],
    Resampling.average)` of rasterio 1.4.4): its pixels are 33 / 17 wide. Without a tag of GDAL's they count as 2."""
    def ramps(values):
        red, green = np.meshgrid(values, values)
        return np.stack([red, green, 0 * red], -1).astype(np.uint8)
    overview = ramps([3, 17, 31, 44, 58, 71, 85, 98, 112, 126, 139, 153, 166, 180, 193, 207, 221])
    slide = slide_of(tmp_path, plain(ramps(range(0, 231, 7)), **tag), plain(overview, 1), mpp=1.0)
    assert slide.levels[1].step == (pytest.approx((33 / 17, 33 / 17)) if tag else (2, 2))
    thirds = ramps(range(7, 231, 21))                                          # the middle of every three
    off = np.abs(slide.read(0, 0, 11, 11, 3.0).astype(int) - thirds).max()
    assert (off <= 2) == bool(tag), off
    assert np.array_equal(slide.read(0, 0, 17, 17, 33 / 17 if tag else 2.0), overview)  # when it is asked for itself
    if tag:
        assert np.array_equal(slide.read(0, 0, 16, 16, 2.0), ramps(range(4, 224, 14)))  # 3.5, 17.5, ... rounded up

# ----- 2. Pages -----

def test_levels_are_told_from_other_pictures(tmp_path):
    """Levels are marked as reduced (1), or Aperio's tiles, which are not; what only looks like one is another picture.
    A level that is missed costs time, a macro that is taken for one is shown."""
    wide = np.full((60, 160, 3), 9, np.uint8)
    thumbnail, macro, label = plain(IMAGE[::3, ::3]), plain(IMAGE[::4, ::4], 9), plain(wide[:50, :50])
    strip = {k: v for k, v in thumbnail[0].items() if "tile" not in k}, thumbnail[1]
    mask = page(IMAGE[..., :1], TILE, 1, kind=4)
    aperio = {"description": text("Aperio Image Library")}
    for said, kind, n in ((aperio, 0, 2), ({}, 1, 2), ({}, 0, 1), ({}, 9, 1)):
        slide = slide_of(tmp_path, plain(IMAGE, **said), strip, plain(IMAGE[::2, ::2], kind), label, macro, mask,
                         plain(wide, 1), plain(IMAGE), plain(IMAGE[:45:2, ::2]))
        assert [v.size for v in slide.levels] == [(120, 90), (60, 45)][:n], (said, kind)
    grey = page(IMAGE[::2, ::2, :1], TILE, 1, kind=1)                          # a mask that is marked as a level
    assert len(slide_of(tmp_path, plain(IMAGE), grey).levels) == 1
    write(tmp_path / "a.tif", [plain(IMAGE), plain(255 - IMAGE[::4, ::4])], sub=[plain(IMAGE[::2, ::2])])
    assert [v.size for v in open_slide(tmp_path / "a.tif").levels] == [(120, 90), (60, 45)]  # an unmarked sub-directory
    slide = slide_of(tmp_path, plain(IMAGE), sub=[plain(IMAGE[::2, ::2], 1), plain(IMAGE[::4, ::4], 1)])
    assert [v.size for v in slide.levels] == [(120, 90), (60, 45), (30, 23)]   # as OME-TIFF keeps them
    images = [Image.fromarray(x) for x in (IMAGE[:20, :20], IMAGE)]
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:])  # in strips, and not the first
    assert np.array_equal(open_slide(tmp_path / "a.tif").read(0, 0, 120, 90), IMAGE)

@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("how", [1, 5, 7, 8, 32773, 33005, 50001])
def test_bands_and_colours(tmp_path, how, planar, strips):
    """The first three bands are red, green and blue, whatever the file calls them; one or two are grey. What comes
    behind (alpha, infrared) is left out, in tiles as in strips, with its bands side by side or apart."""
    rest = noise(90, 120)
    for bands, colours in ((1, 1), (1, 0), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (5, 2), (6, 1)):
        held = 1 if planar == 2 else bands
        if how == 50001 and (held < 3 or colours != 2 or held > 4) or held > 4 and how not in (1, 8):
            continue
        if how not in (1, 8) and held == 2 or how == 33005 and (held == 4 or colours == 0):
            continue
        image = np.concatenate([IMAGE, rest], 2)[..., :bands]
        for predictor in (1, 2) if how == 8 else (1,):
            tags, tiles = page(image, TILE, how, colours, planar=planar, strips=strips, predictor=predictor)
            tags = {k: v for k, v in tags.items() if k != "jpeg_tables" or held < 4}
            slide = slide_of(tmp_path, (tags | ({"extra_bands": (3, [1])} if bands == 4 else {}), tiles))
            want = image[..., :3] if bands > 2 else image[..., :1].repeat(3, 2)
            off = np.abs(slide.read(0, 0, 120, 90).astype(int) - (255 - want if colours == 0 else want)).max()
            assert off <= (5 if how == 7 else 0) and slide.levels[0].tags, (bands, colours, predictor, off)

@pytest.mark.parametrize("planar", [1, 2])
def test_palettes_inks_and_a_band_that_is_empty(tmp_path, planar):
    """A palette holds 16 bits, and of some programs 8. Of several bands that have their own tiles, GDAL leaves out what
    is 0; where all are left out, nothing was scanned."""
    table, five = np.random.default_rng(0).integers(0, 256, (3, 256)), np.concatenate([IMAGE, noise(90, 120)], 2)
    for values, bands in ((table * 257, 1), (table, 1), (table, 2)):
        tags, tiles = page(five[..., :bands], TILE, 8, 3, planar=planar)
        more = {"palette": (3, values.ravel().tolist()), "nodata": text("7")}
        found = slide_of(tmp_path, (tags | more, tiles)).read(0, 0, 120, 90)
        assert np.array_equal(found, np.where(IMAGE[..., :1] == 7, 0, table.T[IMAGE[..., 0]]))
    want = np.asarray(Image.fromarray(five[..., :4], "CMYK").convert("RGB"))
    for bands in (4, 5):
        slide = slide_of(tmp_path, page(five[..., :bands], TILE, 8, 5, planar=planar))
        assert np.array_equal(slide.read(0, 0, 120, 90), want)
    tags, tiles = page(IMAGE, TILE, 8, planar=2)
    some = [b"" if k in (0, 8, 9, 16) else x for k, x in enumerate(tiles)]
    found = slide_of(tmp_path, (tags, some)).read(0, 0, 64, 48)
    assert (found[:, :32] == 255).all() and np.array_equal(found[:, 32:], IMAGE[:48, 32:64] * np.uint8([1, 0, 1]))

@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
def test_deep_pixels_in_tiles_and_strips(tmp_path, planar, strips):
    """16 bits of either byte order, shown in 8: rounded, not cut."""
    deep = (IMAGE.astype(int) * 257 + noise(90, 120) % 200 - 100).clip(0, 65535)
    for how, order, h, options in ((1, "<", 48, {}), (1, ">", 48, {}), (8, "<", 48, {"predictor": 2}), (8, ">", 48, {}),
                                   (1, "<", 90, {})):                          # a single strip, which is read in pieces
        pages = [page(deep.astype(order + "u2"), (32, h + h % 16), how, planar=planar, strips=strips, **options)]
        write(tmp_path / "a.tif", pages, order)
        found = open_slide(tmp_path / "a.tif", white=65535).read(0, 0, 120, 90)
        assert np.array_equal(found, np.rint(deep / 257)), (how, order)

@pytest.mark.parametrize("rows", [48, 90])
@pytest.mark.parametrize("planar", [1, 2])
def test_large_strips_of_deep_pixels(tmp_path, monkeypatch, planar, rows):
    """Strips of more bytes than a tile may have are unpacked as a whole where zlib packed them, else refused with the
    remedy, as those that are larger than their bytes can hold. Catches: a bomb, a refusal that calls them damaged."""
    monkeypatch.setattr(tiff, "MAX_TILE", 2**10)
    deep = IMAGE.astype(np.uint16) * 257
    tags, strips = page(deep, (32, rows), 8, planar=planar, strips=True, predictor=2)
    slide_of(tmp_path, (tags, strips))
    assert np.array_equal(open_slide(tmp_path / "a.tif", white=65535).read(0, 0, 120, 90), IMAGE)
    with pytest.raises(UserError, match=f"16-bit RGB .*in strips of {rows} rows.* LZW .*convert it to tiles .gdal_tr"):
        slide_of(tmp_path, (tags | {"compression": (3, [5])}, strips))
    with pytest.raises(UserError, match="3 bytes for a strip of 120 x"):
        slide_of(tmp_path, (tags, [b"abc"] * len(strips)))
    monkeypatch.setattr(tiff, "MAX_STRIP", 2**11)
    with pytest.raises(UserError, match="deflate .8., which is not read here: convert it to tiles"):
        slide_of(tmp_path, (tags, strips))

@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("bands", [1, 3])
def test_turned_pages_are_upright(tmp_path, bands, strips):
    """As photographs are, whatever they are packed in: tag 274 says where the first row and column belong."""
    image = IMAGE[..., :bands]
    turned = {1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1], 5: image.swapaxes(0, 1),
              6: np.rot90(image, -1), 7: np.rot90(image, 2).swapaxes(0, 1), 8: np.rot90(image)}
    for orientation, want in turned.items():
        for rows in (48, 90):                                                  # several strips; a single one
            tags, tiles = page(image, (32, rows + 6), 1, strips=strips)
            slide = slide_of(tmp_path, (tags | {"orientation": (3, [orientation])}, tiles))
            assert slide.size == want.shape[1::-1], orientation
            assert (slide.read(0, 0, *slide.size) == want).all(), (orientation, rows)

NOT_READ = [({"compression": 34887}, "LERC"), ({"compression": 50002}, "JPEG XL"), ({"compression": 52546}, "JPEG XL"),
            ({"compression": 999}, "compression: unknown .999"), ({"sample_format": 2}, "8-bit signed RGB"),
            ({"sample_format": 3, "bits": 32}, "32-bit float RGB"), ({"bits": 12}, "12-bit RGB"),
            ({"compression": 7, "bands": 2, "colours": 1}, "8-bit grey pixels of 2 bands, compression: JPEG"),
            ({"compression": 7, "planar": 2, "colours": 6}, "YCbCr pixels of 3 bands, apart, compression: JPEG"),
            ({"compression": 50001, "planar": 2}, "apart, compression: WebP"), ({"colours": 8}, "CIELab"),
            ({"compression": 1, "colours": 6}, "YCbCr pixels of 3 bands, compression: none"),
            ({"bands": 4, "colours": None, "bits": 8}, "8-bit unknown pixels of 4 bands"),
            ({"predictor": 3}, "8-bit RGB")]

@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("change, says", NOT_READ)
def test_what_is_not_read_is_called_by_its_name(tmp_path, change, says, strips):
    """And is not called damaged: copying it again would not help."""
    tags, tiles = page(IMAGE, TILE, 8, strips=strips)
    tags |= {k: (3, [v] * (3 if k == "bits" else 1)) for k, v in change.items()}
    tags = {k: v for k, v in tags.items() if v[1] != [None]}                   # left unsaid
    with pytest.raises(UserError, match=f"a.tif holds .*{says}.* is not read here: convert it to 8-bit RGB") as err:
        slide_of(tmp_path, (tags, tiles))
    assert "damaged" not in str(err.value)

def test_the_table_of_the_docs():
    assert tiff.table() in (ROOT / "docs" / "own_images.md").read_text(), "python -m slides.tiff prints it"

def channels(size, *said, more=""):
    """What OME says of an image that keeps its channels apart."""
    said = "".join("<Channel " + " ".join(f'{k}="{v}"' for k, v in each.items()) + "/>" for each in said)
    return f'<OME xmlns="a"><Image><Pixels PhysicalSizeX="0.5" SizeC="{size}">{said}{more}</Pixels></Image></OME>'

REDS = [{"Color": -16776961}, {"Color": 16711935}, {"Color": 65535}]           # signed RGBA, as raw2ometiff writes it
DYES = [{"Name": "DAPI"}, {"Name": "FITC"}, {"Name": "TRITC"}]
PLACES = ["".join(f'<TiffData FirstC="{c}" IFD="{k}"/>' for k, c in each) for each in
          (((0, 0), (1, 1), (2, 2)), ((0, 2), (1, 1), (2, 0)), ((2, 0), (1, 1), (0, 2)))]

@pytest.mark.parametrize("said, n, colours", [
    (channels(3), 3, True), (channels(3, *REDS), 3, True), (channels(3, *REDS[::-1]), 3, False),
    (channels(3, *({"Name": n} for n in ("Red", "Green", "Blue"))), 3, True), (channels(3, *DYES), 3, False),
    (channels(3, more=PLACES[0]), 3, True), (channels(3, more=PLACES[1]), 3, False),
    (channels(3, more=PLACES[2]), 3, False), (channels(3, more='<TiffData IFD="0" PlaneCount="3"/>'), 3, True),
    (channels(2), 2, False), (channels(7), 7, False), (channels(7), 1, False),
    (channels(3), 1, False), (channels(1), 3, None), ("ImageJ=1.53t\nimages=3\nchannels=3", 3, False),
    ("ImageJ=1.53t\nimages=7\nchannels=7", 1, False),
    (channels(3, *3 * [{"Color": -1}]), 3, False), ('{"shape": [3, 90, 120]}', 3, False), ("", 2, False)])
def test_colours_that_are_pages_of_their_own(tmp_path, said, n, colours):
    """Put together where OME says so; other channels are refused, for the first alone would be shown as grey. None: of
    planes or times of one channel the first is shown."""
    image = np.concatenate([IMAGE, noise(90, 120), noise(90, 120)], 2)
    pages = [page(image[..., k:k + 1], TILE, 8, strips=n == 2) for k in range(n)]
    pages[0] = pages[0][0] | ({"description": text(said)} if said else {}), pages[0][1]
    if colours is False:
        with pytest.raises(UserError, match=r"a.tif holds \d grey pictures.*export it as RGB"):
            slide_of(tmp_path, *pages)
    else:
        slide = slide_of(tmp_path, *pages, page(IMAGE[:20, :20, :1], TILE, 8))
        want = IMAGE if colours else IMAGE[..., :1].repeat(3, 2)
        assert np.array_equal(slide.read(0, 0, 120, 90), want) and len(slide.levels) == 1 and slide.mpp == 0.5

def test_levels_padded_to_whole_tiles(tmp_path):
    """As Philips keeps them: the ratio of the sizes (3056 / 1536) would be 8 pixels off at the right end."""
    for whole, size, tile, step in (((3056, 3072), (1536, 1536), 16, 2), ((3056, 3072), (768, 768), 16, 4),
                                    ((50176, 38400), (1024, 1024), 512, 64), ((1000, 1000), (400, 400), 256, 2.5),
                                    ((100352, 77824), (3584, 2560), 512, 32), ((1000, 800), (512, 512), 256, 2)):
        found = tiff.steps(whole, size, (tile, tile))
        assert found == ((step, step) if step else (whole[0] / size[0], whole[1] / size[1])), (whole, size)
    image = picture(192, 191 * 16)
    half = np.pad(image[::2, ::2], ((0, 0), (0, 8), (0, 0)), constant_values=255)
    xml = "".join(f'<Attribute Name="DICOM_PIXEL_SPACING">&quot;{x}&quot; &quot;{x}&quot;</Attribute>'
                  for x in ("0.000500", "2.5e-4", "0.001"))
    (tags, tiles), reduced = page(image, (16, 16), 1), page(half, (16, 16), 1, kind=1)
    slide = slide_of(tmp_path, (tags | {"description": text(xml)}, tiles), reduced)
    assert slide.mpp == 0.25 and [v.step for v in slide.levels] == [(1, 1), (2, 2)]
    assert np.array_equal(slide.read(1500, 0, 28, 96, 0.5), image[::2, 3000::2])

KEYS = 3, [1, 1, 0, 3, 1024, 0, 1, 1, 3072, 0, 1, 26914, 3076, 0, 1, 9001]

def ome(size, unit=""):
    unit = unit and f"PhysicalSizeXUnit='{unit}'"                              # single quotes, before the size: all XML
    return f'<OME:OME><OME:Image><OME:Pixels {unit} SizeX="120" PhysicalSizeX="{size}"/>'

def dots(n, per, unit):
    return {"x_dots": (5, [n, per]), "dots_unit": (3, [unit])}

# sizes and units as Bio-Formats and tifffile 2026.3.3 write them (Schemas/OME/2016-06: micrometres where no unit is
# said); decimal commas as OpenSlide 4.0.1 reads them
@pytest.mark.parametrize("tags, mpp", [
    ("Aperio x|AppMag = 40|MPP = 0.2527|Left = 3", 0.2527), ("Aperio|AppMag = 40", 0.25),
    ('<OME><Pixels PhysicalSizeX="0.3" PhysicalSizeY="0.3"/>', 0.3), ("Aperio|MPP = 1,9", 1.9),
    (ome("250", "nm"), 0.25), (ome("0.25", "\xb5m"), 0.25), (ome("0.25", "\u03bcm"), 0.25), (ome("0.25", "um"), 0.25),
    (ome("0.25", "&#181;m"), 0.25), (ome("2.5E-1"), 0.25), (ome("0.00025", "mm"), 0.25), (ome("5.0E-5", "cm"), 0.5),
    (ome("2.5e-7", "m"), 0.25), (ome("2500", "\xc5"), 0.25), (ome("1.0", "pixel"), None),
    (ome("0.25.1", "nm"), None), ("Aperio|AppMag = 20|MPP = 5.015e-1|Left = 3", 0.5015), ("Aperio|MPP = 1.2.3", None),
    (dots(40000, 1, 3), 0.25), (dots(50800, 1, 2), 0.5), (dots(72, 1, 2), None), (dots(10, 1, 3), None),
    (dots(1, 1, 1), None), (dots(0, 0, 3), None), (dots(1, 1, 3), None), (dots(2835, 1000, 2), None),
    (dots(40000, 1, 3) | {"y_dots": (5, [20000, 1])}, None), ("Aperio|AppMag = 40|MPP = 1.2.3", None),
    ("Aperio|MPP = 1,234.5", None), ("Aperio|MPP = 250 nm", 0.25), ("Aperio|MPP = 0.25 px", None),
    ("Aperio|AppMag = 40x|MPP = 0.000000", 0.25), (ome("0.25 nm", "um"), None), (ome("0.25", "PhysicalSizeY"), None),
    ('<OME><Pixels SizeX="9" PhysicalSizeX="5"/><Pixels SizeX="120" PhysicalSizeX="0.3" PhysicalSizeY="0.3"/>', 0.3),
    ('<OME><Pixels PhysicalSizeX="0.3" PhysicalSizeY="0.6"/>', None),
    (dots(40000, 1, 3) | {"description": text("MPP = 0|AppMag = .")}, 0.25),
    ({"geo_scale": (12, [0.6, 0.6, 0]), "geo_keys": KEYS}, 6e5),
    ({"geo_scale": (12, [0.6, 0.6, 0]), "geo_keys": (3, [*KEYS[1][:-1], 9003])}, None), ({}, None),  # 9003: feet
    ({"geo_scale": (12, [0.6, 0.9, 0]), "geo_keys": KEYS}, None),
    ({"geo_scale": (12, [0.6, 0.6, 0]), "geo_keys": (3, [3857 if k == 26914 else k for k in KEYS[1]])}, None)])
def test_resolution(tmp_path, tags, mpp):
    said = tags if isinstance(tags, str) else ""
    for coding in ("utf-8", "latin-1") if "\xb5" in said else ("utf-8",):
        slide = slide_of(tmp_path, plain(IMAGE, **({"description": (2, [*said.encode(coding), 0])} if said else tags)))
        assert slide.mpp == (mpp and pytest.approx(mpp)), coding
    if mpp is None:
        with pytest.raises(UserError, match=r"a.tif does not say how large its pixels are: give --mpp"):
            slide.read(0, 0, 9, 9, 0.5)
        assert np.array_equal(open_slide(slide.path, 0.5).read(0, 0, 120, 90, 0.5), IMAGE)
    assert open_slide(slide.path, 0.7).mpp == 0.7

# ----- 3. What goes wrong -----

@pytest.mark.parametrize("how", [7, 33005, 8, 5, 1])
def test_an_empty_tile_is_white_and_a_damaged_one_is_named(tmp_path, how):
    tags, tiles = page(IMAGE, TILE, how)
    some = [tiles[0], b"", *tiles[2:5], tiles[5][:len(tiles[5]) // 3], *tiles[6:]]
    slide = slide_of(tmp_path, (tags, some), name="bad.tif")
    top = slide.read(0, 0, 120, 48)
    assert (top[:, 32:64] == 255).all() and np.abs(top.astype(int) - IMAGE[:48])[:, 64:].max() <= 5
    with pytest.raises(UserError, match=r"bad.tif: tile 1, 1 of level 0 cannot be decoded .*damaged"):
        slide.read(0, 0, 120, 90)
    damaged = []
    found = open_slide(slide.path, damaged=damaged).read(0, 0, 120, 90)
    assert [d[0] for d in damaged] == [(32, 48, 64, 96)] and "tile 1, 1 of level 0" in damaged[0][1]
    assert (found[48:, 32:64] == 255).all() and np.array_equal(found[:48], slide.read(0, 0, 120, 48))

def large(tiles, side):
    """The first JPEG tile claims to be larger."""
    at = tiles[0].index(b"\xff\xc0") + 5
    tiles[0] = tiles[0][:at] + struct.pack(">HH", side, side) + tiles[0][at + 4:]

def large_strip(tags):
    """A single strip of plain pixels claims to be high."""
    tags.update(height=(4, [2**31]), strip_rows=(4, [2**31]), compression=(3, [1]), colours=(3, [2]))
    del tags["tile_width"], tags["tile_height"]

@pytest.mark.parametrize("change, says", [
    (lambda t, d: t.update(width=(4, [2**31])), r"level 0 has \d+ tiles, its table 8"),
    (lambda t, d: t.update(tile_width=(4, [2**31])), "tiles of 2147483648 x 48"),
    (lambda t, d: t.update(tile_width=(4, [0])), "tiles of 0 x 48"),
    (lambda t, d: d.pop(), "has 8 tiles, its table 7"),
    (lambda t, d: (large_strip(t), d.__delitem__(slice(1, None))), "a strip of .* bytes for 120 x 2147483648 pixels"),
    (lambda t, d: large(d, 4096), "holds 4096 x 4096 pixels"),
    (lambda t, d: large(d, 30000), "holds 30000 x 30000 pixels")])
def test_absurd_tags(tmp_path, change, says):
    """Nor may a tile unpack to more than its size."""
    tags, tiles = page(IMAGE, TILE, 7)
    change(tags, tiles)
    with pytest.raises(UserError, match="a.tif.*" + says):
        slide_of(tmp_path, (tags, tiles)).read(0, 0, 9, 9)

def test_a_file_that_points_beyond_its_end_or_to_itself(tmp_path):
    path = tmp_path / "a.tif"
    write(path, [plain(IMAGE), plain(IMAGE[::2, ::2], 1)])
    whole = path.read_bytes()
    for keep, says in ((len(whole) - 5, "1 of 2 tiles of level 1 lie beyond"), (100, "it points to byte"),
                       (len(whole) // 2, "of 8 tiles of level 0"), (6, "it points to byte"), (3, "cannot identify"),
                       (0, "cannot identify")):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=f"a.tif cannot be read.*{says}.*cut short"):
            open_slide(path)
    path.write_bytes(b"II*\0\x08\0\0\0" + tiff.pack_directory({"width": (4, [9])}, 8, following=8))
    with pytest.raises(UserError, match="form a loop"):
        open_slide(path)

def test_files_that_are_none(tmp_path, kinds):
    (tmp_path / "loop.svs").symlink_to("loop.svs")
    for name in ("none.svs", "loop.svs", "."):
        with pytest.raises(UserError, match="does not exist or is no file"):
            open_slide(tmp_path / name)
    (tmp_path / "text.svs").write_text("hello")
    (tmp_path / "program.tif").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start a program
    for name in ("text.svs", "program.tif"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            open_slide(tmp_path / name)
    (tmp_path / "wrong.svs").write_bytes(kinds[-1].read_bytes())               # a PNG, and a slide, by wrong names
    (tmp_path / "wrong.jpg").write_bytes(kinds[4].read_bytes())
    for name in ("wrong.svs", "wrong.jpg"):
        assert np.array_equal(open_slide(tmp_path / name).read(0, 0, 120, 90), IMAGE)
    with pytest.raises(UserError, match="mpp=0.0 of .*give micrometres"):
        open_slide(tmp_path / "wrong.jpg", 0.0)

def test_whole_images_have_a_bound(tmp_path, monkeypatch):
    """Ours: Pillow's plays no part, and is left as it was."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    assert open_slide(tmp_path / "a.png", max_pixels=10800).size == (120, 90)
    with pytest.raises(UserError, match="unpacks to 120 x 90 pixels, more than --max_pixels=9999"):
        open_slide(tmp_path / "a.png", max_pixels=9999)
    Image.new("1", (8000, 8000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"unpacks to 8000 x 8000 pixels.*than its \d+ bytes can hold"):
        open_slide(tmp_path / "a.png", max_pixels=10**12)
    assert Image.MAX_IMAGE_PIXELS == 1000

class Blending:
    """A slide as OpenSlide 4.0.1 reads it. Positions are pixels of level 0, divided by one factor for both axes, the
    mean ratio; within 1/512 of a pixel it gives stored ones, elsewhere it blends (half-way between 0 and 200: 100).
    Black was not scanned."""
    properties = {"openslide.mpp-x": "0.25"}

    def __init__(self, levels):
        self.levels, self.level_dimensions = levels, [(x.shape[1], x.shape[0]) for x in levels]
        (W, H), *_ = self.level_dimensions
        self.level_downsamples = [(W / w + H / h) / 2 for w, h in self.level_dimensions]

    def read_region(self, at, level, size):
        assert max(size) <= 4096 and all(isinstance(n, int) for n in (*at, *size))
        places = np.array(at) / self.level_downsamples[level]                  # x, y in pixels of the level
        parts = np.where(abs(places - places.round()) < 1 / 512, 0, places % 1)
        x, y = (int(n) for n in (places - parts).round())
        stored = Image.fromarray(self.levels[level]).crop((x, y, x + size[0] + 1, y + size[1] + 1))
        stored = np.asarray(stored, float)
        stored = stored[:, :-1] * (1 - parts[0]) + stored[:, 1:] * parts[0]
        stored = stored[:-1] * (1 - parts[1]) + stored[1:] * parts[1]
        return Image.fromarray(np.dstack([stored, 255 * stored.any(-1)]).round().astype(np.uint8))

def test_what_needs_openslide(tmp_path, monkeypatch, kinds):
    """Without it, the sentence says what to install; with it, it is asked."""
    halved = bytearray(page(IMAGE, TILE, 33003)[1][0])
    halved[46] = halved[49] = 2                                                # as Aperio's 33003 may be
    files = {"a.ndpi": plain(IMAGE), "b.tif": plain(IMAGE, hamamatsu=(4, [1])),
             "c.tif": plain(IMAGE, description=text("<scn>")), "d.tif": plain(IMAGE, xmp=(1, list(b"<iScan/>"))),
             "e.svs": (page(IMAGE, TILE, 33003)[0], [bytes(halved)] * 8),
             "f.tif": plain(IMAGE, software=text("Philips DP v1.0"))}
    for name, each in files.items():
        write(tmp_path / name, [each])

    monkeypatch.setitem(sys.modules, "openslide", None)                        # importing it fails
    for name in files:
        with pytest.raises(UserError, match=rf"{name} .*only openslide reads.*pip install -e '.\[slides\]'"):
            open_slide(tmp_path / name)
    half = IMAGE * (np.arange(120) >= 60)[:, None].astype(np.uint8)
    fake = SimpleNamespace(OpenSlide=lambda path: Blending([half, half[::2, ::2]]))
    monkeypatch.setitem(sys.modules, "openslide", fake)
    for name in files:
        slide = open_slide(tmp_path / name)
        assert slide.mpp == 0.25 and [v.step for v in slide.levels] == [(1, 1), (2, 2)] and slide.scanned
        found = slide.read(50, 10, 20, 8)
        assert (found[:, :10] == 255).all() and np.array_equal(found[:, 10:], IMAGE[10:18, 60:70])
        assert np.array_equal(slide.read(30, 20, 4, 4, 0.5), IMAGE[40:48:2, 60:68:2])

SIZES = (1001, 777), (500, 388), (250, 194)

@pytest.mark.parametrize("real", [False, True])
def test_openslide_gives_the_stored_pixels(tmp_path, monkeypatch, real):
    """Of levels whose steps are 2.0023 and 4.0046 on noise, in any window."""
    levels, rng = [noise(h, w, k).clip(1) for k, (w, h) in enumerate(SIZES)], np.random.default_rng(0)
    write(tmp_path / "a.tif", [page(x, (256, 256), 8, kind=k > 0) for k, x in enumerate(levels)])
    if real:
        pytest.importorskip("openslide", reason="pip install openslide-python openslide-bin enables this")
    else:
        monkeypatch.setitem(sys.modules, "openslide", SimpleNamespace(OpenSlide=lambda path: Blending(levels)))
    slide = reader.by_openslide(tmp_path / "a.tif", 1.0, None)
    for n, (stored, (w, h)) in enumerate(zip(levels, SIZES)):
        assert slide.levels[n].size == (w, h)
        for _ in range(8):
            (x, right), (y, bottom) = (sorted(rng.choice(end + 1, 2, replace=False)) for end in (w, h))
            found = slide.levels[n].region(x, y, right - x, bottom - y)
            assert np.array_equal(found, stored[y:bottom, x:right]), (n, x, y)

def test_openslide_levels_that_it_blends_are_passed_over():
    """40,001 in 20,000: pixels 10,000 and more from the start lie a quarter between those of level 0."""
    assert reader.starts(20_000, 2.00005)[1] > 0.2 and reader.starts(20_000, 2.0) == (list(range(0, 20_000, 512)), 0)
    found, off = reader.starts(1251, 2.0004)
    assert found == [0, 9, 9] and off < 1 / 512

def test_damaged_files_end_well(tmp_path):
    """`make torture` tries 2,000; each has two seconds and 500 MB."""
    outcomes, faults = torture_slide.torture(120, tmp_path, seed=7)
    assert not faults, faults
    assert outcomes["image"] > 10 and outcomes["refused"] > 50                # neither road is left out

# ----- 4. Real slides -----

@pytest.mark.parametrize("name, size, levels, mpp", [
    ("cmu_1_small_region.svs", (2220, 2967), 1, 0.499), ("tcga_cr_7395_ts1.svs", (4443, 3567), 2, None),
    ("tcga_cr_7395_pyramid_jpeg.tif", (4443, 3567), 6, 0.5)])
def test_by_openslide(name, size, levels, mpp):
    openslide = pytest.importorskip("openslide", reason="pip install openslide-python openslide-bin enables this")
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here")
    slide, rng = open_slide(DATA / name), np.random.default_rng(0)
    assert slide.size == size and len(slide.levels) == levels and slide.mpp == (mpp and pytest.approx(mpp))
    with openslide.OpenSlide(DATA / name) as other:
        for _ in range(6):
            x, y = int(rng.integers(0, size[0] - 256)), int(rng.integers(0, size[1] - 256))
            want = np.asarray(other.read_region((x, y), 0, (256, 256)))[..., :3]
            off = np.abs(slide.read(x, y, 256, 256).astype(int) - want).max()
            assert off <= 1, f"{name} at {x}, {y}: off by {off}"

@pytest.mark.parametrize("ending", ["jpg", "mpo", "tif"])
@pytest.mark.parametrize("orientation, upright", [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]),
                                                  (6, lambda x: np.rot90(x, -1)), (8, np.rot90)])
def test_a_photograph_stands_upright(tmp_path, ending, orientation, upright):
    """As the camera says. Catches: a portrait read as it lies on the sensor, a side taken for the other, a turn too
    many, as Pillow turns TIFF but not JPEG."""
    exif, path = Image.Exif(), tmp_path / f"a.{ending}"
    exif[0x0112] = orientation
    Image.fromarray(noise(40, 24)).save(path, exif=exif)
    want = upright(np.asarray(Image.open(path))) if ending != "tif" else upright(noise(40, 24))
    slide = open_slide(path)
    assert slide.size == want.shape[1::-1] and np.array_equal(slide.read(0, 0, *slide.size), want)
    assert np.array_equal(slide.read(3, 5, 9, 7), want[5:12, 3:12])

def test_naip_by_pillow():
    if not (path := DATA / "naip_m4709963_20200831_rgbn.tif").exists():
        pytest.skip(f"{path} is not here")
    slide = open_slide(path)
    assert slide.mpp == 5e6 and [v.size for v in slide.levels] == [(934, 723), (467, 362)]
    assert np.array_equal(slide.read(0, 0, 934, 723), np.asarray(Image.open(path))[..., :3])

def test_commands(tmp_path, kinds, capsys):
    reader.main([str(kinds[0]), f"--out={tmp_path / 'view.png'}"])
    said = capsys.readouterr().out
    assert "0.5 micrometres per pixel" in said and "level 1: 60 x 45, steps of 2, tiles of 32 x 48" in said
    assert Image.open(tmp_path / "view.png").size == (120, 90)
