"""The tiles of a TIFF, parsed by hand with strict bounds: directories, pyramid levels, resolution, one tile decoded.

A hostile file ends in an exception: nothing is read beyond the file's end, nothing large is allocated on the word of a
tag, no loop is followed. Pillow undoes the compression of a tile; what its numbers mean is said here, in one table.

in:  an open TIFF, BigTIFF, SVS or GeoTIFF   out: levels; tiles (th,tw,3) uint8
run: python -m slides.tiff     the table of docs/own_images.md
read next: slides/reader.py
"""
import io
import re
import struct
import threading
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import unescape
from math import ceil

import numpy as np
from PIL import Image, Jpeg2KImagePlugin, JpegImagePlugin, TiffImagePlugin, WebPImagePlugin

from common import UserError, cli
from slides.weights import sign_of

TIFF = {b"II*\0": "<", b"II+\0": "<", b"MM\0*": ">", b"MM\0+": ">"}  # how a file begins -> byte order; + is BigTIFF
# TIFF's types of values, for numpy; a RATIONAL is two numbers
KINDS = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 7: "u1", 12: "f8", 13: "u4", 16: "u8", 18: "u8"}
SHORT, LONG, RATIONAL, LONG8 = 3, 4, 5, 16
TAGS = dict(subfile=254, width=256, height=257, bits=258, compression=259, colours=262, fill_order=266,
            description=270, strip_offsets=273, orientation=274, bands=277, strip_rows=278, strip_lengths=279,
            x_dots=282, y_dots=283, planar=284, dots_unit=296, software=305, predictor=317, palette=320,
            tile_width=322, tile_height=323, offsets=324, lengths=325, sub_directories=330, extra_bands=338,
            sample_format=339, jpeg_tables=347, chroma=530, xmp=700, geo_scale=33550, geo_keys=34735, gdal=42112,
            nodata=42113, hamamatsu=65420)
NAMES = {tag: name for name, tag in TAGS.items()}  # what is read; other tags are passed over
TABLES = "offsets", "lengths", "strip_offsets", "strip_lengths", "gdal"  # may be long, and are read when needed
# What a pixel is. Compressions: libtiff gives back the bytes of these, the next three are pictures to Pillow
LOSSLESS, DEFLATE = (1, 5, 8, 32773, 32946, 34925, 50000), (8, 32946)
JPEG, JP2K_YCBCR, JP2K, WEBP = 7, 33003, (33005, 34712), 50001
PACKED = {1: "none", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 6: "old JPEG", 7: "JPEG", 8: "deflate",
          22610: "JPEG XR", 32771: "CCITT", 32773: "PackBits", 32809: "ThunderScan", 32946: "deflate",
          33003: "JPEG 2000", 33005: "JPEG 2000", 34661: "JBIG", 34676: "LogLuv", 34677: "LogLuv",
          34712: "JPEG 2000", 34887: "LERC", 34892: "lossy JPEG", 34925: "LZMA", 34933: "PNG", 34934: "JPEG XR",
          50000: "zstd", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL"}
GREY, RGB, PALETTE, CMYK, YCBCR = {0, 1}, {2}, {3}, {5}, {6}                   # colours of a page; 0: white is zero
COLOURS = dict(zip(range(9), ("grey", "grey", "RGB", "palette", "mask", "CMYK", "YCbCr", "unknown", "CIELab")))
ALPHA = 1, 2       # kinds of a band beyond the colours: premultiplied or not
FORMATS = {1: "", 2: "signed ", 3: "float ", 4: "", 5: "complex ", 6: "complex "}  # of numbers; 4: undefined
ANY = range(1, 1000)
# The first row that fits: compression, colours, bands in a tile (one, if each band has its own tiles), bits; and how it
# is read: tile by tile (strips are tiles as wide as the image), or by Pillow as a whole page. What fits none is
# refused. Of more bands the first three are red, green and blue, whatever the file calls them. Alpha and infrared are
# left out: colours are as they are stored, neither blended nor divided by alpha.
ROWS = ((LOSSLESS, GREY | RGB, ANY, (8, 16), "tiles"), (LOSSLESS, PALETTE | CMYK, ANY, (8,), "tiles"),
        ((JPEG,), GREY | RGB, (1, 3, 4), (8,), "tiles"), ((JPEG, JP2K_YCBCR), YCBCR, (3,), (8,), "tiles"),
        ((JP2K_YCBCR,), RGB, (3,), (8,), "tiles"), (JP2K, {1} | RGB | YCBCR, (1, 3, 4), (8,), "tiles"),
        ((WEBP,), RGB, (3, 4), (8,), "tiles"),
        (LOSSLESS, GREY | PALETTE, (1,), (1, 2, 4), "page"), ((2, 3, 4, 32771, 32809), GREY, (1,), (1, 4), "page"),
        ((5, 8, 32773, 32946), YCBCR, (3,), (8,), "page"), ((JPEG,), CMYK, (4,), (8,), "page"),
        ((6,), GREY | RGB | YCBCR, (1, 3), (8,), "page"))
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")  # what Pillow turns into RGB faithfully
# OME's units, \xc5 for angstrom; the letter of micro has two codes, and is none where a file is not in UTF-8
MICROMETRES = dict.fromkeys(("um", "\xb5m", "\u03bcm", "\ufffdm"), 1)
MICROMETRES |= {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25400, "\xc5": 1e-4, "": 1}
MAX_TILE, MAX_TAG, MAX_DIRECTORIES, MAX_ENTRIES = 2**26, 2**22, 500, 2000  # bytes of a tile, of a value
MAX_STRIP, DEFLATED = 2**30, 1032  # bytes of a strip that zlib unpacks, and of each that is packed
MAX_VALUES = 2**25  # bytes of all values of a file, its tables of tiles apart: directories may point to the same ones
NONE = None, 0, 0  # a table of tiles that is missing
CUT = 64           # rows of a piece of a single strip
MAP = {"geo_scale", "geo_keys", "gdal", "nodata"}  # GDAL writes some of these
ONE = threading.RLock()
WEB = 3857         # a projection whose metres are longer than the ground's, twice so at 60 degrees

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
        size, table = many * kind.itemsize, name in TABLES
        left -= 0 if table else size
        if left < 0 or size > MAX_TAG and not table:
            raise ValueError(f"{many} values of tag {tag}")
        place = value if size > word.itemsize else at - word.itemsize          # short values stand in the entry itself
        tags[name] = (kind, many, place) if table else numbers(f, place, many, kind)
    return tags, int(numbers(f, at, 1, word)[0]), left

def directories(f):
    """Parse the image directories of an open TIFF, each of the main chain followed by its sub-directories.
    out: [{name: array}], with "order", of bytes; "page", the place in the main chain; "sub", which of its
    sub-directories it is, or None; [] if it is no TIFF. raises: ValueError."""
    begins, found, seen, left = f.read(4), [], set(), MAX_VALUES
    if begins not in TIFF:
        return []
    order, big = TIFF[begins], b"+" in begins
    count, word = np.dtype(order + ("u8" if big else "u2")), np.dtype(order + ("u8" if big else "u4"))
    waiting = [(int(numbers(f, word.itemsize, 1, word)[0]), 0, None)]          # where they begin, their pages and subs
    while waiting:
        at, page, sub = waiting.pop(0)
        if at in seen or len(seen) + len(waiting) >= MAX_DIRECTORIES:
            raise ValueError("its directories form a loop")
        seen.add(at)
        tags, following, left = read_directory(f, at, order, count, word, left)
        found.append(strips_as_tiles(tags) | {"order": order, "page": page, "sub": sub})
        if sub is None:
            waiting += [(int(start), page, k) for k, start in enumerate(tags.get("sub_directories", ()))]
            waiting += [(following, page + 1, None)] if following else []
    return found

def strips_as_tiles(tags):
    """Strips are tiles as wide as the image; the last one is cut short. A single one of plain pixels is cut into many,
    as programs that do not compress write all rows at once."""
    if "tile_width" in tags or "strip_offsets" not in tags:
        return tags
    rows = min(number(tags, "strip_rows", 2**32), number(tags, "height"))
    tables = {name: tags[f"strip_{name}"] for name in ("offsets", "lengths") if f"strip_{name}" in tags}
    single = tables.get("offsets", NONE)[1] == 1 and number(tags, "compression", 1) == 1
    rows = min(rows, CUT) if single else rows
    return tags | tables | {"tile_width": tags.get("width", ()), "tile_height": [rows], "single": single}

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

def tile_of(tags):
    return number(tags, "tile_width"), number(tags, "tile_height")             # (w,h)

def layout(tags):
    """out: bands of an image; bands in each of its tiles; bits of a number; its colours (if unsaid, by the bands)."""
    bands = number(tags, "bands", 1)
    colours = number(tags, "colours", {1: 1, 3: 2}.get(bands, -1))
    return bands, 1 if number(tags, "planar", 1) == 2 else bands, int(max(tags.get("bits", [1])[:bands])), colours

def used(tags):
    """Which bands of a tile tell what it shows: those of colours, and one of ink or alpha, wherever it lies."""
    bands, _, _, colours = layout(tags)
    kinds = tags.get("extra_bands", ())
    first = bands - len(kinds)                                                 # they are the last ones
    alpha = [k for k, kind in enumerate(kinds, first) if kind in ALPHA and 0 < k < bands]
    if alpha and alpha[0] > 3:
        return [0, 1, 2, alpha[0]]
    return slice(4 if alpha or colours == 5 else 3)

def in_strips_of(tags):
    """Bytes of a strip; 0 if there are tiles."""
    (w, rows), (_, held, bits, _) = tile_of(tags), layout(tags)
    return w * rows * held * bits // 8 if "strip_offsets" in tags else 0

def how_read(tags):
    """How the pixels of a directory are read: "tiles", "page", or "" if they are not."""
    codec, (bands, held, bits, colours) = number(tags, "compression", 1), layout(tags)
    rows = [row for row in ROWS if codec in row[0] and colours in row[1] and held in row[2] and bits in row[3]]
    alike = {*tags.get("bits", [1])[:bands]} == {bits} and FORMATS.get(number(tags, "sample_format", 1)) == ""
    if not rows or not alike or bands < {2: 3, 5: 4}.get(colours, 1) or number(tags, "predictor", 1) > 2:
        return ""
    in_tiles = rows[0][-1] == "tiles" and "tile_width" in tags and number(tags, "fill_order", 1) == 1
    large, most = in_strips_of(tags), MAX_STRIP if codec in DEFLATE else MAX_TILE
    if in_tiles and large <= MAX_TILE:
        return "tiles"
    by_pillow = rows[0][-1] == "page" or codec in (*LOSSLESS, JPEG) and (bands == 1 or colours not in GREY)
    if by_pillow and bits <= 8 and held == bands <= 4:
        return "page"
    return "tiles" if in_tiles and large <= most else ""

def largest(found):
    return max(found, key=lambda tags: number(tags, "width") * number(tags, "height"), default={})

def unread(tags):
    """What the pixels of a directory are, in words."""
    (bands, held, bits, colours), codec = layout(tags), number(tags, "compression", 1)
    kind = f"{bits}-bit {FORMATS.get(number(tags, 'sample_format', 1), 'unknown ')}{COLOURS.get(colours, 'unknown')}"
    th, packed = tile_of(tags)[1], PACKED.get(codec, "unknown")
    piece = ", apart" * (held < bands) + f", in strips of {th} rows" * (in_strips_of(tags) > MAX_TILE)
    return f"holds {kind} pixels of {bands} bands{piece}, compression: {packed} ({codec})"

def shown(path, found):
    """The picture to show: the largest. out: the directories, the main one, how it is read.
    raises: UserError if that is not known, or if its channels are no colours."""
    found = with_channels(path, found, largest(found))
    main = largest(found)
    how = how_read(main) if main else "page"
    if not how:
        in_tiles = how_read(main | {"tile_height": [1]})                       # if its strips were shorter
        remedy = "tiles (gdal_translate -co TILED=YES" if in_tiles else "8-bit RGB (gdal_translate -ot Byte -scale"
        raise UserError(f"{path} {unread(main)}, which is not read here: convert it to {remedy}, or vips)")
    return found, main, how

# ----- 2. Levels -----

@dataclass
class Level:
    """One resolution of an image: region(x,y,w,h) -> (h,w,3) uint8, for regions inside it; tiles, if it has them."""
    size: tuple                        # (w,h)
    step: tuple                        # (x,y) pixels of level 0 that one of its pixels spans
    region: object = None
    tags: dict | None = None           # its directory
    tile: tuple = (0, 0)               # (w,h)
    offsets: np.ndarray | None = None  # (n,) uint64, row by row; band after band, if each has its own tiles
    lengths: np.ndarray | None = None
    tile_of: object = None             # (column, row) -> (th,tw,3) uint8, where openslide reads them
    mask: object = None                # a Level that tells where it shows something

def steps(whole, size, tile=None, ratio=False):
    """How many pixels of `whole` (w,h) one pixel of `size` (w,h) spans, in x and y: the ratio of the sizes for GDAL.
    Of other programs an integer, where the size is what that leaves, rounded up or down: they drop or repeat an odd
    last pixel, so the ratio (4443 / 1110 = 4.003) would place every pixel wrong, the last ones by most. The same power
    of two in x and y, where sizes are whole tiles and within a tile of what that leaves: they were padded or cut."""
    d = max(1, *(round(n / m) for n, m in zip(whole, size)))
    if not ratio and all(n // d <= m <= ceil(n / d) for n, m in zip(whole, size)):
        return d, d
    if tile and not ratio and not any(m % t for m, t in zip(size, tile)):
        twos = [2**k for k in range(1, 24) if all(abs(n / 2**k - m) < t for n, m, t in zip(whole, size, tile))]
        if len(twos) == 1:                                                     # else the size does not tell
            return twos[0], twos[0]
    return whole[0] / size[0], whole[1] / size[1]

def is_level(tags, main):
    """Whether a directory may show the main one in fewer pixels: in tiles, and marked as reduced, its sub-directory, or
    a page of Aperio's, who marks none. Labels (strips), macros (9), masks (4) and other pictures are not."""
    kind, in_tiles = number(tags, "subfile"), how_read(tags) == "tiles" and "strip_offsets" not in tags
    marked = kind & 1 or text(main, "description").startswith("Aperio")
    its = tags["page"] == main["page"] if tags["sub"] is not None else marked
    return in_tiles and its and not kind & 12 and number(tags, "bands", 1) == number(main, "bands", 1)

def tables(f, tags, what):
    """out: offsets and lengths (n,) of all tiles of a directory, band after band where each has its own."""
    if "channels" in tags:                                                     # each in a directory of its own
        return [np.concatenate(x) for x in zip(*(tables(f, each, what) for each in tags["channels"]))]
    (w, h), (tw, th), (bands, held, bits, _), end = size_of(tags), tile_of(tags), layout(tags), np.uint64(f.seek(0, 2))
    n, found = 1 if tags.get("single") else ceil(w / tw) * ceil(h / th) * (bands // held), []
    for kind, count, at in (tags.get("offsets", NONE), tags.get("lengths", NONE)):
        if count != n:
            raise ValueError(f"{what} has {n} tiles, its table {count}")
        found.append(numbers(f, at, n, kind).astype(np.uint64))
    offsets, lengths = found
    beyond = ((lengths > 0) & ((offsets > end) | (lengths > end - np.minimum(offsets, end)))).sum()
    if beyond:
        raise ValueError(f"{beyond} of {n} tiles of {what} lie beyond its {end} bytes")
    if tags.get("single"):
        row = w * held * bits // 8
        if lengths[0] < row * h:
            raise ValueError(f"a strip of {lengths[0]} bytes for {w} x {h} pixels")
        starts = np.arange(0, h, th, np.uint64) * np.uint64(row)
        return [offsets + starts, np.diff(starts, append=np.uint64(row * h))]
    return found

def levels_of(f, found, main):
    """The levels: the main directory, and those that show the same in fewer pixels.
    raises: ValueError if tables or tiles do not fit the image."""
    pages = [main, *(tags for tags in found if tags is not main and is_level(tags, main))]
    pages.sort(key=lambda tags: -number(tags, "width") * number(tags, "height"))
    levels, left = [], f.seek(0, 2)
    gdal = any(tags.keys() & MAP for tags in found)
    for tags in pages:
        size, tile, (_, held, bits, _) = size_of(tags), tile_of(tags), layout(tags)
        room, large = tile[0] * tile[1] * held * bits // 8, in_strips_of(tags) > MAX_TILE
        if min(size + tile) < 1 or room > MAX_TILE and not large:
            raise ValueError(f"an image of {size[0]} x {size[1]} pixels in tiles of {tile[0]} x {tile[1]}")
        step = steps(levels[0].size, size, tile, gdal) if levels else (1, 1)
        other_aspect = abs(step[0] / step[1] - 1) > 0.01 + 2 / min(size)
        if not levels or not other_aspect and size[0] * size[1] < levels[-1].size[0] * levels[-1].size[1]:
            levels.append(Level(size, step, None, tags, tile, *tables(f, tags, f"level {len(levels)}")))
            if large and room > DEFLATED * int(levels[-1].lengths.min()):          # or nothing is in it
                raise ValueError(f"{levels[-1].lengths.min()} bytes for a strip of {tile[0]} x {tile[1]} pixels")
            left -= 4 * len(levels[-1].offsets)                                # of an offset and a length, at least
            if left < 0:
                raise ValueError("its levels have more tiles than its bytes could tell of: tables are shared")
    return levels

RED_GREEN_BLUE = ["-16776961", "16711935", "65535"], ["red", "green", "blue"]  # as OME says it, in colours or names

def channels_of(description):
    """What OME says of its first image. out: how many channels it has, 0 if unsaid; whether they are red, green and
    blue, in this order, or of unsaid kinds: dyes are not."""
    pixels = "".join(re.findall(r"<(?:\w+:)?Pixels\b.*?(?:</(?:\w+:)?Pixels>|$)", description, re.S)[:1])
    n, channels = re.search(r"\bSizeC=[\"'](\d+)", pixels), "".join(re.findall(r"<(?:\w+:)?Channel\b[^>]*", pixels))
    told = [[x.lower() for x in re.findall(rf"\b{key}=[\"'](.*?)[\"']", channels)]
            for key in ("Color", "Name", "Fluor", "EmissionWavelength")]
    places = [re.findall(rf"\b{key}=[\"'](\d+)", pixels) for key in ("FirstC", "IFD")]
    in_order = all(x in ([], ["0"], ["0", "1", "2"]) for x in places)
    return int(n[1]) if n else 0, in_order and all(x in ([], *RED_GREEN_BLUE) for x in told)

def with_channels(path, found, main):
    """Put the colours together where each is a page of its own, as of an OME-TIFF that does not say RGB.
    out: the directories. raises: UserError if they are other channels, as of fluorescence, or planes or times."""
    said, (bands, _, bits, colours) = unescape(text(main, "description")), layout(main)
    (n, rgb), key = channels_of(said), (size_of(main), bands, colours)
    if n == 1 or bands > 1 or bits == 1 or colours not in GREY:
        return found
    apart = [tags for tags in found if tags["sub"] is None and not number(tags, "subfile")
             and (size_of(tags), layout(tags)[0], layout(tags)[3]) == key]
    stacked = re.search(r"^images=(\d+)", said, re.M) if said.startswith("ImageJ=") else None  # behind one directory
    many = max(n, len(apart), int(stacked[1]) if stacked else 1)
    if many > 1 and not (many == n == len(apart) == 3 and rgb):
        raise UserError(f"{path} holds {many} grey pictures, channels, planes or times, and does not say that they are "
                        f"red, green and blue: export it as RGB (raw2ometiff --rgb), or one of them alone")
    together = []
    for first in [tags for tags in found if many > 1 and tags["page"] == apart[0]["page"]]:
        parts = [tags for each in apart for tags in found
                 if (tags["page"], tags["sub"], size_of(tags)) == (each["page"], first["sub"], size_of(first))]
        if len(parts) == 3:
            more = dict(channels=parts, bands=[3], bits=3 * [bits], colours=[2], planar=[2])
            together.append(first | more)
    return together or found

def square(x, y, least=1e-3, most=1e3):
    """The size of pixels that measure x and y; None if that is unknown, absurd, or they are no squares."""
    return x if least <= x < most and y and abs(x / y - 1) < 0.05 else None

def length(said, unit=""):
    """Micrometres of a number with a unit, behind it or apart, in micrometres if without; 0 if half understood."""
    number, behind = re.fullmatch(r"([\d.,]*(?:[eE][-+]?\d+)?)\s*(.*)", said.strip(), re.S).groups()
    return amount(number) * MICROMETRES.get(unit.strip() + behind, 0)

def said_by_ome(description, width):
    """{attribute: text} of the OME description of the image that is so wide; the first one's if none says how wide."""
    found = [dict(re.findall(r"(\w+)\s*=\s*[\"'](.*?)[\"']", pixels, re.S))
             for pixels in re.findall(r"<(?:\w+:)?Pixels\b([^>]*)", description)]
    return next((x for x in found if x.get("SizeX", str(width)) == str(width)), {})

def resolution(tags):
    """Micrometres per pixel from Aperio's or OME's description, GeoTIFF's scale or the resolution tags; None if unsaid,
    or half understood. A magnification alone counts as 10 / mpp. Resolution tags of 20 micrometres and more are those
    of screens and paper (72 dpi is 353), which programs write unasked, or made up: not believed."""
    said = unescape(text(tags, "description"))                                 # XML may write a micro sign as &#181;
    ome = said_by_ome(said, number(tags, "width"))
    if "PhysicalSizeX" in ome:
        x, y = (length(ome.get(f"PhysicalSize{axis}", ome["PhysicalSizeX"]),
                       ome.get(f"PhysicalSize{axis}Unit", ome.get("PhysicalSizeXUnit", ""))) for axis in "XY")
        return square(x, y)
    philips = re.findall(r'DICOM_PIXEL_SPACING"[^>]*>[\s"]*([^\s"<]+)', said)
    if philips:                                                                # of every level, in millimetres
        return square(*2 * [min(length(x, "mm") for x in philips)])
    for name in ("MPP", "AppMag"):
        value = "".join(re.findall(rf"\b{name} *= *([^|\r\n]*)", said)[:1]).strip()
        if value.strip("0., "):                                                # zero is as good as unsaid
            x = length(value) if name == "MPP" else 10 / (amount(value.rstrip("xX")) or 1e9)
            return square(x, x, 1e-2)
    geo, scale = (tags.get(name, np.zeros(0)).tolist() for name in ("geo_keys", "geo_scale"))
    keys = dict(zip(geo[4::4], geo[7::4]))
    if len(scale) > 1:                                                         # a map; its unit is the metre
        metres = keys.get(1024) == 1 and keys.get(3076) == 9001 and keys.get(3072) != WEB
        return square(scale[0] * 1e6, scale[1] * 1e6, 1, 1e9) if metres else None
    unit = {2: 25400, 3: 10000}.get(number(tags, "dots_unit", 2), 0)           # micrometres of an inch, a centimetre
    dots = [tags[name].tolist() for name in ("x_dots", "y_dots") if len(tags.get(name, ())) == 2]
    sizes = [unit * many / n if n else 0 for n, many in dots]
    return square(sizes[0], sizes[-1], 1e-3, 20) if sizes else None

# ----- 3. One tile -----

@contextmanager
def readable(path):
    """Turn whatever is raised inside, on damaged bytes nearly anything, into a UserError that names the file.
    One thread at a time: Pillow's bound and Python's warnings are those of all."""
    ONE.acquire()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None               # reader.py has its own bound
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*[Tt]runcated")                 # Pillow only warns of cut TIFF tables
            yield
    except UserError:
        raise
    except Exception as err:
        if what := sign_of(path):
            raise UserError(f"{path} cannot be read, it {what}") from err
        raise UserError(f"{path} cannot be read ({type(err).__name__}: {err}): it is damaged, cut short or of an "
                        f"unknown kind; convert it to PNG, JPEG or TIFF, or take it out") from err
    finally:
        Image.MAX_IMAGE_PIXELS = limit
        ONE.release()

def pack_directory(tags, at, following=0, big=False, order="<"):
    """The bytes of a directory that is to stand at byte `at`, the next at `following`; tags {name: (type, values)}."""
    head, word, room = (order + "Q", order + "Q", 8) if big else (order + "H", order + "I", 4)
    entries, longer = struct.pack(head, len(tags)), b""
    after = at + len(entries) + len(tags) * (4 + 2 * room) + room              # values over `room` bytes stand there
    for name in sorted(tags, key=TAGS.get):
        kind, values = tags[name]
        data = np.array(values, order + KINDS[kind]).tobytes()
        entries += struct.pack(order + "HH", TAGS[name], kind)
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

def unpacked(data, how, rows, length):
    """Undo a lossless compression. out: (rows,length) bytes; libtiff takes them for a grey image of one strip."""
    if how in DEFLATE:
        data = zlib.decompressobj().decompress(data, rows * length)            # no more than that of a bomb
    if how == 1 or how in DEFLATE:
        return np.frombuffer(data, np.uint8, rows * length).reshape(rows, length)
    tags = dict(width=(LONG, [length]), height=(LONG, [rows]), bits=(SHORT, [8]), compression=(SHORT, [how]),
                colours=(SHORT, [1]), bands=(SHORT, [1]), strip_offsets=(LONG, [0]), strip_rows=(LONG, [rows]),
                strip_lengths=(LONG, [len(data)]))
    tags["strip_offsets"] = LONG, [8 + len(pack_directory(tags, 8))]           # the tile comes behind the directory
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(b"II*\0\x08\0\0\0" + pack_directory(tags, 8) + data))
    image.load()
    return np.asarray(image)

def pieces_of(f, level, column, row):
    """Read a tile. out: its bytes, or those of each band; the level, or one of shorter tiles for the last strip.
    raises: ValueError if they are too many."""
    (w, h), (tw, th) = level.size, level.tile
    columns, rows = ceil(w / tw), ceil(h / th)
    places, pieces = range(row * columns + column, len(level.offsets), columns * rows), []
    for k in np.array(places)[used(level.tags) if len(places) > 1 else slice(1)].tolist():
        length = int(level.lengths[k])
        if length > 8 * layout(level.tags)[0] * tw * th + 2**16:
            raise ValueError(f"{length} bytes for {tw} x {th} pixels")
        f.seek(int(level.offsets[k]))
        pieces.append(f.read(length))
    return pieces, replace(level, tile=(tw, min(th, h - row * th))) if "strip_offsets" in level.tags else level

def stored(data, tags, width, rows):
    """The bytes of a tile -> its numbers (rows,width,bands), up to 4, as they are stored; JPEG's colours as RGB.
    raises: nearly anything, if it is damaged."""
    how, (_, held, bits, colours) = number(tags, "compression", 1), layout(tags)
    mine = used(tags) if held > 1 else slice(1)
    if not data:                                                               # other bands are there: GDAL means 0
        return np.zeros((rows, width, held), np.uint8)
    if how in LOSSLESS:
        x = unpacked(data, how, rows, width * held * bits // 8)
        x = x.view(tags["order"] + f"u{bits // 8}").reshape(rows, width, held)[..., mine]
        differences = number(tags, "predictor", 1) == 2 and how not in (1, 32773)
        return np.cumsum(x, 1, f"u{bits // 8}") if differences else x.astype(f"u{bits // 8}", copy=False)
    if how == JPEG:
        tables = tags["jpeg_tables"].tobytes() if "jpeg_tables" in tags else b""
        told = colours in GREY and held == 3 and data[2:4] == b"\xff\xe0"      # by JFIF, where the directory does not
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(whole_jpeg(data, tables, not told and colours != 6)))
    else:
        image = (WebPImagePlugin.WebPImageFile if how == WEBP else Jpeg2KImagePlugin.Jpeg2KImageFile)(io.BytesIO(data))
    w, h = image.size                                                          # before it is unpacked: a bomb ends here
    if w != width or not rows <= h <= tile_of(tags)[1] or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        raise ValueError(f"it holds {w} x {h} pixels {image.mode}, not ({width}, {rows})")
    image.load()
    if how == JP2K_YCBCR:                                                      # which its codestream does not say
        image = Image.frombytes("YCbCr", image.size, image.convert("RGB").tobytes()).convert("RGB")
    x = np.asarray(image).reshape(h, w, -1)[:rows, :, mine]
    return 255 - x if image.mode == "CMYK" else x                              # four bands: Pillow takes them for inks

def palette(tags):
    """The colours of a palette (256,3) uint8. They are of 16 bits; some write 8."""
    table = tags["palette"].reshape(3, -1).T
    return (table >> 8 if table.max() > 255 else table).astype(np.uint8)

def decode(pieces, level):
    """The bytes of a tile, or of each of its bands -> (th,tw,3) uint8 or uint16, or (th,tw,4) if there is alpha.
    raises: as `stored`."""
    tags, colours = level.tags, layout(level.tags)[3]
    parts = [stored(data, tags, *level.tile) for data in pieces]
    x = np.concatenate(parts, 2) if len(parts) > 1 else parts[0]
    if colours == 3:
        return palette(tags)[x[..., 0]]
    if colours == 5:
        return np.asarray(Image.frombytes("CMYK", level.tile, x.tobytes()).convert("RGB"))
    n = 3 if x.shape[2] >= 3 else 1
    if n == 3 and colours:
        return x                                                               # to put it together anew takes time
    shown, alpha = x[..., :n], x[..., n:n + (used(tags) != slice(3))]
    shown = shown if colours else np.iinfo(x.dtype).max - shown                # 0: white is zero
    return np.concatenate([shown] * (3 // n) + [alpha], 2)

def with_masks(f, found, levels):
    """Give the levels what GDAL says beside them: a page of one bit, where there is something. raises: ValueError."""
    masks = {size_of(tags): tags for tags in found if number(tags, "subfile") & 4 and layout(tags)[2] in (1, 8)}
    for level in levels:
        if level.size in masks:
            tags = masks[level.size]
            if number(tags, "compression", 1) not in LOSSLESS or not 0 < np.prod(tile_of(tags)) <= MAX_TILE:
                raise ValueError(f"a mask in tiles of {tile_of(tags)}, of compression {number(tags, 'compression', 1)}")
            level.mask = Level(level.size, level.step, None, tags, tile_of(tags), *tables(f, tags, "a mask"))

def decode_mask(f, mask, column, row):
    """A tile of a mask, (th,tw,1) uint8, 0 where there is nothing. raises: as `stored`."""
    (data,), cut = pieces_of(f, mask, column, row)
    tw, th = cut.tile
    if not data:
        return np.zeros((th, tw, 1), np.uint8)
    bits = layout(mask.tags)[2]
    there = unpacked(data, number(mask.tags, "compression", 1), th, ceil(tw * bits / 8))
    there = np.unpackbits(there, axis=1)[:, :tw] if bits == 1 else there
    return (there > 0)[..., None].astype(np.uint8)

def halved_chroma(f, level):
    """Whether the first JPEG-2000 tile has components of several sizes, which Pillow refuses."""
    if number(level.tags, "compression") not in (*JP2K, JP2K_YCBCR):
        return False
    f.seek(int(level.offsets[np.argmax(level.lengths > 0)]))
    start = f.read(51)                                                         # to the third component
    steps_of = {*start[43:45], *start[46:48], *start[49:]}                     # of three components, in x and y
    return start[:4] == b"\xff\x4f\xff\x51" and start[41:42] == b"\3" and steps_of != {1}

def table():
    """The lines of docs/own_images.md that tell which TIFFs are read."""
    lines = ["| compression | colours | bands in a tile | bits | read |", "|---|---|---|---|---|"]
    for codecs, colours, bands, bits, how in ROWS:
        names = [", ".join(dict.fromkeys(map(of.get, x))) for of, x in ((PACKED, codecs), (COLOURS, colours))]
        numbers = ["any" if x == ANY else ", ".join(map(str, x)) for x in (bands, bits)]
        lines.append(f"| {' | '.join(names + numbers)} | {'tile by tile' if how == 'tiles' else 'as a whole'} |")
    return "\n".join(lines)

def main(argv):
    print(table())

if __name__ == "__main__":
    cli(main, __doc__)
