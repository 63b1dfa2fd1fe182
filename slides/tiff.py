"""The tiles of a TIFF, parsed by hand with strict bounds: directories, pyramid levels, resolution, one tile decoded.

A hostile file ends in an exception: nothing is read beyond the file's end, nothing large is allocated on the word of a
tag, no loop is followed. Pillow decodes the bytes of a tile: JPEG, JPEG-2000, or what libtiff undoes.

in:  an open TIFF, BigTIFF, SVS or GeoTIFF   out: levels; tiles (th,tw,3) uint8
read next: slides/reader.py
"""
import io
import re
import struct
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from math import ceil

import numpy as np
from PIL import Image, Jpeg2KImagePlugin, JpegImagePlugin, TiffImagePlugin

from common import UserError

TIFF = {b"II*\0": "<", b"II+\0": "<", b"MM\0*": ">", b"MM\0+": ">"}  # how a file begins -> byte order; + is BigTIFF
# TIFF's types of values, for numpy; a RATIONAL is two numbers
KINDS = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 7: "u1", 12: "f8", 13: "u4", 16: "u8", 18: "u8"}
SHORT, LONG, RATIONAL, LONG8 = 3, 4, 5, 16
TAGS = dict(subfile=254, width=256, height=257, bits=258, compression=259, colours=262, description=270, bands=277,
            x_dots=282, y_dots=283, planar=284, dots_unit=296, predictor=317, tile_width=322, tile_height=323,
            offsets=324, lengths=325, sub_directories=330, sample_format=339, jpeg_tables=347, xmp=700,
            geo_scale=33550, geo_keys=34735, gdal=42112, nodata=42113, hamamatsu=65420)
NAMES = {tag: name for name, tag in TAGS.items()}  # what is read; other tags are passed over
WRITTEN = TAGS | dict(strip_offsets=273, strip_rows=278, strip_lengths=279, extra_bands=338, chroma=530)
# compressions, and the colours that each may come with: 0, 1 grey; 2 RGB; 6 YCbCr
JPEG, JP2K, JP2K_YCBCR = 7, (33005, 34712), 33003
WRAPPED = (1, 5, 8, 32773, 32946, 50000)  # plain, LZW, deflate, packbits, deflate, zstd: left to libtiff
COLOURS = {JPEG: (1, 2, 6), JP2K_YCBCR: (2, 6)} | dict.fromkeys(JP2K, (1, 2, 6)) | dict.fromkeys(WRAPPED, (0, 1, 2))
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")  # what Pillow turns into RGB faithfully
# OME's units, \xc5 for angstrom; the letter of micro has two codes, and is none where a file is not in UTF-8
MICROMETRES = dict.fromkeys(("um", "\xb5m", "\u03bcm", "\ufffdm"), 1)
MICROMETRES |= {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "\xc5": 1e-4}
MAX_TILE, MAX_TAG, MAX_DIRECTORIES, MAX_ENTRIES = 2**24, 2**22, 500, 2000  # pixels of a tile; bytes of a value
MAX_VALUES = 2**25  # bytes of all values of a file, its tables of tiles apart: directories may point to the same ones
NONE = None, 0, 0  # a table of tiles that is missing

# ----- 1. Directories -----

def numbers(f, at, count, kind):
    """`count` numbers of an open file, from byte `at` on. raises: ValueError if they lie beyond its end."""
    length, end = f.seek(0, 2), at + count * kind.itemsize
    if end > length:
        raise ValueError(f"it points to byte {end} of {length}")
    f.seek(at)
    return np.frombuffer(f.read(end - at), kind)

def read_directory(f, at, order, count, word, left):
    """Parse a directory, whose count of entries and offsets are of these numpy types, with values of `left` bytes at
    most. out: {name: array} of the tags in TAGS, the tables of tiles as (type, count, position); where the next
    directory stands, 0 for nowhere; what is left."""
    n, tags = int(numbers(f, at, 1, count)[0]), {}
    if n > MAX_ENTRIES:
        raise ValueError(f"a directory of {n} entries")
    entry = np.dtype([("tag", order + "u2"), ("kind", order + "u2"), ("count", word), ("value", word)])
    at += count.itemsize
    for tag, kind, many, value in numbers(f, at, n, entry).tolist():
        at += entry.itemsize
        if tag not in NAMES or kind not in KINDS:
            continue
        many *= 2 if kind == RATIONAL else 1
        name, kind = NAMES[tag], np.dtype(order + KINDS[kind])
        size, table = many * kind.itemsize, name in ("offsets", "lengths", "gdal")  # GDAL's text may be long
        left -= 0 if table else size
        if left < 0 or size > MAX_TAG and not table:
            raise ValueError(f"{many} values of tag {tag}")
        place = value if size > word.itemsize else at - word.itemsize          # short values stand in the entry itself
        tags[name] = (kind, many, place) if table else numbers(f, place, many, kind)
    return tags, int(numbers(f, at, 1, word)[0]), left

def directories(f):
    """Parse the image directories of an open TIFF, each of the main chain followed by its sub-directories.
    out: [{name: array}], with "page", the place in the main chain or None; [] if it is no TIFF. raises: ValueError."""
    begins, found, seen, left = f.read(4), [], set(), MAX_VALUES
    if begins not in TIFF:
        return []
    order, big = TIFF[begins], b"+" in begins
    count, word = np.dtype(order + ("u8" if big else "u2")), np.dtype(order + ("u8" if big else "u4"))
    waiting = [(int(numbers(f, word.itemsize, 1, word)[0]), 0)]                # where they begin, and their pages
    while waiting:
        at, page = waiting.pop(0)
        if at in seen or len(seen) + len(waiting) >= MAX_DIRECTORIES:
            raise ValueError("its directories form a loop")
        seen.add(at)
        tags, following, left = read_directory(f, at, order, count, word, left)
        found.append(tags | {"page": page})
        waiting += [(int(sub), None) for sub in tags.get("sub_directories", ())]
        if following and page is not None:
            waiting.append((following, page + 1))
    return found

def number(tags, name, default=0):
    return int(tags[name][0]) if len(tags.get(name, ())) else default

def text(tags, name):
    return tags[name].tobytes().decode("utf-8", "replace").strip("\0 ") if name in tags else ""

def amount(said):
    """A number as people write it, with a decimal point or comma, maybe an exponent; 0 for anything else."""
    said = said.strip().replace(",", ".")
    return float(said) if re.fullmatch(r"\d*\.?\d+([eE][-+]?\d+)?", said) else 0.0

def size_of(tags):
    return number(tags, "width"), number(tags, "height")                       # (w,h)

def tiled(tags):
    """Whether `decode` knows the tiles of this directory: 8 bits, bands side by side, compression and colours."""
    how, bands = number(tags, "compression", 1), number(tags, "bands", 1)
    in_bytes = set(tags.get("bits", np.ones(1)).tolist()) == {8} and number(tags, "sample_format", 1) == 1
    side_by_side = number(tags, "planar", 1) == 1 and bands in ((1, 3) if how == JPEG else (1, 3, 4))
    in_tiles = "tile_width" in tags and "tile_height" in tags
    return in_tiles and in_bytes and side_by_side and number(tags, "colours", -1) in COLOURS.get(how, ())

# ----- 2. Levels -----

@dataclass
class Level:
    """One resolution of an image: region(x,y,w,h) -> (h,w,3) uint8, for regions inside it; tiles, if it has them."""
    size: tuple                        # (w,h)
    step: tuple                        # (x,y) pixels of level 0 that one of its pixels spans
    region: object = None
    tags: dict | None = None           # its directory
    tile: tuple = (0, 0)               # (w,h)
    offsets: np.ndarray | None = None  # (n,) uint64, row by row
    lengths: np.ndarray | None = None
    tile_of: object = None             # (column, row) -> (th,tw,3) uint8, where openslide reads them

def steps(whole, size, ratio=False):
    """How many pixels of `whole` (w,h) one pixel of `size` (w,h) spans, in x and y: the ratio of the sizes for GDAL.
    Of other programs an integer, where the size is what that leaves, rounded up or down: they drop or repeat an odd
    last pixel, so the ratio (4443 / 1110 = 4.003) would place every pixel wrong, the last ones by most."""
    d = max(1, round(whole[0] / size[0]))
    exact = not ratio and all(n // d <= m <= ceil(n / d) for n, m in zip(whole, size))
    return (d, d) if exact else (whole[0] / size[0], whole[1] / size[1])

def levels_of(f, found):
    """The levels: of the directories with tiles, the largest, and those that show the same in fewer pixels.
    Labels, macros, masks and thumbnails in strips fall away: they have no tiles, another aspect, or are marked so.
    raises: ValueError if tables or tiles do not fit the image."""
    pages = [tags for tags in found if tiled(tags) and not number(tags, "subfile") & 12]  # 4: a mask; 9: Aperio's macro
    pages.sort(key=lambda tags: number(tags, "width") * number(tags, "height"), reverse=True)
    levels, end, left = [], np.uint64(f.seek(0, 2)), f.seek(0, 2)
    gdal = any(tags.keys() & {"geo_scale", "geo_keys", "gdal", "nodata"} for tags in found)
    for tags in pages:
        size, tile = size_of(tags), (number(tags, "tile_width"), number(tags, "tile_height"))
        if min(size + tile) < 1 or tile[0] * tile[1] > MAX_TILE:
            raise ValueError(f"an image of {size[0]} x {size[1]} pixels in tiles of {tile[0]} x {tile[1]}")
        step = steps(levels[0].size, size, gdal) if levels else (1, 1)
        other_aspect = abs(step[0] / step[1] - 1) > 0.01 + 2 / min(size)
        if levels and (other_aspect or size[0] >= levels[-1].size[0]):
            continue
        n, tables = ceil(size[0] / tile[0]) * ceil(size[1] / tile[1]), []
        for kind, count, at in (tags.get("offsets", NONE), tags.get("lengths", NONE)):
            if count != n:
                raise ValueError(f"level {len(levels)} has {n} tiles, its table {count}")
            left -= n * kind.itemsize
            if left < 0:
                raise ValueError("its levels have more tiles than its bytes could tell of: tables are shared")
            tables.append(numbers(f, at, n, kind).astype(np.uint64))
        offsets, lengths = tables
        beyond = ((lengths > 0) & ((offsets > end) | (lengths > end - np.minimum(offsets, end)))).sum()
        if beyond:
            raise ValueError(f"{beyond} of {n} tiles of level {len(levels)} lie beyond its {end} bytes")
        levels.append(Level(size, step, None, tags, tile, offsets, lengths))
    return levels

def resolution(tags):
    """Micrometres per pixel from Aperio's or OME's description, GeoTIFF's scale or the resolution tags; None if unsaid.
    A magnification alone counts as 10 / mpp. Resolution tags of 20 to 2000 micrometres are those of screens and paper
    (72 dpi is 353), which programs write unasked: not believed."""
    said = unescape(text(tags, "description"))                                 # XML may write a micro sign as &#181;
    pixels = "".join(re.findall(r"<(?:\w+:)?Pixels\b([^>]*)", said)[:1])
    ome = dict(re.findall(r"(\w+) *= *[\"'](.*?)[\"']", pixels))
    if "PhysicalSizeX" in ome:
        mpp = amount(ome["PhysicalSizeX"]) * MICROMETRES.get(ome.get("PhysicalSizeXUnit", "um"), 0)
        return mpp if 1e-3 <= mpp <= 1e3 else None                             # half understood is unknown
    for name in ("MPP", "AppMag"):
        value = amount("".join(re.findall(rf"\b{name} *= *([^|\r\n]*)", said)[:1]))
        if 1e-2 <= value <= 1e3:
            return value if name == "MPP" else 10 / value
    geo = tags.get("geo_keys", np.zeros(0)).tolist()
    keys, scale = dict(zip(geo[4::4], geo[7::4])), float(tags.get("geo_scale", (0,))[0])
    if keys.get(1024) == 1 and keys.get(3076) == 9001 and 1e-6 <= scale <= 1e3:
        return scale * 1e6                                                     # a map whose unit is the metre
    unit = {2: 25400, 3: 10000}.get(number(tags, "dots_unit", 2), 0)             # micrometres of an inch, a centimetre
    dots = tags.get("x_dots", np.zeros(0)).tolist()
    mpp = unit * dots[1] / dots[0] if len(dots) == 2 and dots[0] else 0
    return mpp if 1e-3 <= mpp < 20 or 2000 < mpp <= 1e9 else None

# ----- 3. One tile -----

@contextmanager
def readable(path):
    """Turn whatever is raised inside, on damaged bytes nearly anything, into a UserError that names the file."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None               # reader.py has its own bound
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*[Tt]runcated")                 # Pillow only warns of cut TIFF tables
            yield
    except UserError:
        raise
    except Exception as err:
        raise UserError(f"{path} cannot be read ({type(err).__name__}: {err}): it is damaged, cut short or of an "
                        f"unknown kind; convert it to PNG, JPEG or TIFF, or take it out") from err
    finally:
        Image.MAX_IMAGE_PIXELS = limit

def pack_directory(tags, at, following=0, big=False, order="<"):
    """The bytes of a directory that is to stand at byte `at`, the next at `following`; tags {name: (type, values)}."""
    head, word, room = (order + "Q", order + "Q", 8) if big else (order + "H", order + "I", 4)
    entries, longer = struct.pack(head, len(tags)), b""
    after = at + len(entries) + len(tags) * (4 + 2 * room) + room              # values over `room` bytes stand there
    for name in sorted(tags, key=WRITTEN.get):
        kind, values = tags[name]
        data = np.array(values, order + KINDS[kind]).tobytes()
        entries += struct.pack(order + "HH", WRITTEN[name], kind)
        entries += struct.pack(word, len(values) // (2 if kind == RATIONAL else 1))
        if len(data) > room:
            entries += struct.pack(word, after + len(longer))
            longer += data
        else:
            entries += data.ljust(room, b"\0")
    return entries + struct.pack(word, following) + longer

def whole_jpeg(data, tables, rgb):
    """A JPEG file of a tile's bytes: tables first, and an Adobe marker that says whether its colours are RGB or YCbCr.
    What the tile itself says of colours (APP0, APP14) is left out: in a TIFF, the directory decides."""
    out = b"\xff\xd8\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + (b"\0" if rgb else b"\1")
    for part in (tables, data):
        at = 2                                                                 # behind the start of image
        while at + 4 <= len(part) and part[at] == 0xFF and part[at + 1] != 0xD9:
            if part[at + 1] == 0xDA:                                           # the scan, to the end of the tile
                return out + part[at:]
            end = at + 2 + int.from_bytes(part[at + 2:at + 4], "big")
            out += b"" if part[at + 1] in (0xE0, 0xEE) else part[at:end]
            at = end
    raise ValueError("no JPEG scan in it")

def wrapped(data, tags, tile):
    """A TIFF of one strip around a tile's bytes, for Pillow's libtiff to undo compression and predictor."""
    (w, h), bands = tile, number(tags, "bands", 1)
    values = dict(width=(LONG, [w]), height=(LONG, [h]), bits=(SHORT, [8] * bands), bands=(SHORT, [bands]),
                  strip_offsets=(LONG, [0]), strip_rows=(LONG, [h]), strip_lengths=(LONG, [len(data)]))
    for name, default in (("compression", 1), ("colours", 0), ("predictor", 1)):
        values[name] = SHORT, [number(tags, name, default)]
    if bands == 4:
        values["extra_bands"] = SHORT, [0]
    values["strip_offsets"] = LONG, [8 + len(pack_directory(values, 8))]       # the tile comes behind the directory
    return b"II*\0\x08\0\0\0" + pack_directory(values, 8) + data

def decode(data, level):
    """The bytes of a tile -> (th,tw,3) uint8; a fourth band is left out. raises: nearly anything, if it is damaged."""
    tags, how = level.tags, number(level.tags, "compression", 1)
    if how == JPEG:
        tables = tags["jpeg_tables"].tobytes() if "jpeg_tables" in tags else b""
        data = whole_jpeg(data, tables, number(tags, "colours") == 2)
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    elif how in WRAPPED:
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(wrapped(data, tags, level.tile)))
    else:
        image = Jpeg2KImagePlugin.Jpeg2KImageFile(io.BytesIO(data))
    if image.size != level.tile or image.mode not in MODES:                    # before it is unpacked: a bomb ends here
        raise ValueError(f"it holds {image.size[0]} x {image.size[1]} pixels {image.mode}, not {level.tile}")
    image.load()
    if how == JP2K_YCBCR:                                                      # which its codestream does not say
        image = Image.frombytes("YCbCr", image.size, image.convert("RGB").tobytes())
    return np.asarray(image.convert("RGB"))

def halved_chroma(f, level):
    """Whether the first JPEG-2000 tile has components of several sizes, which Pillow refuses."""
    if number(level.tags, "compression") not in (*JP2K, JP2K_YCBCR):
        return False
    f.seek(int(level.offsets[np.argmax(level.lengths > 0)]))
    start = f.read(51)                                                         # to the third component
    steps_of = {*start[43:45], *start[46:48], *start[49:]}                     # of three components, in x and y
    return start[:4] == b"\xff\x4f\xff\x51" and start[41:42] == b"\3" and steps_of != {1}
