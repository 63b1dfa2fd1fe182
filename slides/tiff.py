"""The tiles of a TIFF, parsed by hand with strict bounds: directories, pyramid levels, resolution, one tile decoded.

A damaged or hostile file ends in an exception: nothing is read beyond the file's end, nothing large is allocated on the
word of a tag, no loop is followed. Pillow decodes the bytes of a tile: JPEG, JPEG-2000, or what libtiff undoes.

in:  an open TIFF, BigTIFF, SVS or GeoTIFF   out: levels; tiles (th,tw,3) uint8
run: python tiff.py FILE     every directory of it     read next: reader.py
"""
import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, Jpeg2KImagePlugin, JpegImagePlugin, TiffImagePlugin

from common import UserError, cli

TIFF = {b"II*\0": "<", b"II+\0": "<", b"MM\0*": ">", b"MM\0+": ">"}  # how a file begins -> byte order; + is BigTIFF
KINDS = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 7: "u1", 12: "f8", 13: "u4", 16: "u8", 18: "u8"}  # of values
WANTED = {254, 256, 257, 258, 259, 262, 270, 277, 282, 283, 284, 296, 317, 322, 323, 324, 325, 330, 339, 347, 700,
          33550, 34735, 65420}
JPEG, JP2K, JP2K_YCBCR = 7, (33005, 34712), 33003
WRAPPED = (1, 5, 8, 32773, 32946, 50000)    # plain, LZW, deflate, packbits, deflate, zstd: left to libtiff
COLOURS = {JPEG: (1, 2, 6), JP2K_YCBCR: (2, 6)} | dict.fromkeys(JP2K, (1, 2, 6)) | dict.fromkeys(WRAPPED, (0, 1, 2))
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")  # what Pillow turns into RGB faithfully
MAX_TILE, MAX_TAG, MAX_DIRECTORIES = 2**24, 2**22, 500  # pixels of a tile; bytes of a value


# ----- 1. Directories -----

def directories(f, length):
    """Parse the image directories of a TIFF of `length` bytes, each followed by its sub-directories.

    out: [{tag: array}], of the tags WANTED, and "page", its place in the main chain; tables of tiles (324, 325) are
    left as (dtype, count, position). raises: ValueError if anything lies beyond the file, or they form a loop.
    """
    def take(at, n):
        if at + n > length:
            raise ValueError(f"it points to byte {at + n} of {length}")
        f.seek(at)
        return f.read(n)
    order, big = TIFF[take(0, 4)], b"+" in take(2, 2)
    head, word, room = (order + "Q", order + "Q", 8) if big else (order + "H", order + "I", 4)
    waiting, found, seen = [(struct.unpack(word, take(8 if big else 4, room))[0], 0)], [], set()
    while waiting:
        at, page = waiting.pop(0)
        if at in seen or len(seen) >= MAX_DIRECTORIES:
            raise ValueError("its directories form a loop")
        seen.add(at)
        n, start = struct.unpack(head, take(at, struct.calcsize(head)))[0], at + struct.calcsize(head)
        if n > 2000:
            raise ValueError(f"a directory of {n} entries")
        entries, tags = take(start, n * (4 + 2 * room) + room), {"page": page}
        for k in range(0, n * (4 + 2 * room), 4 + 2 * room):
            tag, kind, count = struct.unpack_from(order + "HH" + word[1], entries, k)
            if tag not in WANTED or kind not in KINDS:
                continue
            kind, count, at = np.dtype(order + KINDS[kind]), count * (2 if kind == 5 else 1), start + k + 4 + room
            if count * kind.itemsize > room:                                   # the value stands elsewhere
                at = struct.unpack(word, take(at, room))[0]
            if tag in (324, 325):
                tags[tag] = kind, count, at
            elif count * kind.itemsize > MAX_TAG:
                raise ValueError(f"{count} values of tag {tag}")
            else:
                tags[tag] = np.frombuffer(take(at, count * kind.itemsize), kind)
        found.append(tags)
        waiting += [(int(at), None) for at in tags.get(330, ())]
        following = struct.unpack_from(word, entries, len(entries) - room)[0]
        if following and page is not None:
            waiting.append((following, page + 1))
    return found


def number(tags, tag, default=0):
    return int(tags[tag][0]) if len(tags.get(tag, ())) else default


def text(tags, tag):
    return tags[tag].tobytes().decode("latin-1").strip("\0 ") if tag in tags else ""


def size_of(tags):
    return number(tags, 256), number(tags, 257)                                # (w,h)


def tiled(tags):
    """Whether `decode` knows the tiles of this directory: 8 bits, bands side by side, compression and colours."""
    how, bands = number(tags, 259, 1), number(tags, 277, 1)
    return (322 in tags and 323 in tags and set(tags.get(258, np.ones(1)).tolist()) == {8} and number(tags, 339, 1) == 1
            and number(tags, 284, 1) == 1 and number(tags, 262, -1) in COLOURS.get(how, ())
            and bands in ((1, 3) if how == JPEG else (1, 3, 4)))


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


def steps(whole, size):
    """How many pixels of `whole` (w,h) one pixel of `size` (w,h) spans, in x and y.

    An integer, where the size is what that leaves, rounded up or down: pyramids drop or repeat an odd last pixel, so
    the ratio of the sizes (4443 / 1110 = 4.003) would place every pixel wrong, the last ones by most.
    """
    d = max(1, round(whole[0] / size[0]))
    exact = all(n // d <= m <= -(-n // d) for n, m in zip(whole, size))
    return (d, d) if exact else (whole[0] / size[0], whole[1] / size[1])


def levels_of(f, length, found):
    """The levels: of the directories with tiles, the largest, and those that show the same in fewer pixels.

    Labels, macros, masks and thumbnails in strips fall away: they have no tiles, another aspect, or are marked so.
    raises: ValueError if tables or tiles do not fit the image, or lie beyond the file.
    """
    pages = [t for t in found if tiled(t) and not number(t, 254) & 12]         # 4: a mask; 9: Aperio's macro
    levels = []
    for tags in sorted(pages, key=lambda t: -np.prod(size_of(t), dtype=float)):
        size, tile = size_of(tags), (number(tags, 322), number(tags, 323))
        if not min(size + tile) or tile[0] * tile[1] > MAX_TILE:
            raise ValueError(f"an image of {size[0]} x {size[1]} pixels in tiles of {tile[0]} x {tile[1]}")
        step = steps(levels[0].size, size) if levels else (1, 1)
        if levels and (abs(step[0] / step[1] - 1) > 0.01 + 2 / min(size) or size[0] >= levels[-1].size[0]):
            continue
        n, tables = -(-size[0] // tile[0]) * -(-size[1] // tile[1]), []
        for tag in (324, 325):
            kind, count, at = tags.get(tag, (np.dtype("u4"), 0, 0))
            if count != n or at + n * kind.itemsize > length:
                raise ValueError(f"level {len(levels)} has {n} tiles, its table {count}, or that is beyond the file")
            f.seek(at)
            tables.append(np.frombuffer(f.read(n * kind.itemsize), kind).astype(np.uint64))
        end = np.uint64(length)
        beyond = (tables[1] > 0) & ((tables[0] > end) | (tables[1] > end - np.minimum(tables[0], end)))
        if beyond.any():
            raise ValueError(f"{beyond.sum()} of {n} tiles of level {len(levels)} lie beyond its {length} bytes")
        levels.append(Level(size, step, None, tags, tile, *tables))
    return levels


def resolution(tags):
    """Micrometres per pixel from Aperio's or OME's description, GeoTIFF's scale or the resolution tags; None if unsaid.

    A magnification alone counts as 10 / mpp. Resolution tags of 20 to 2000 micrometres are those of screens and paper
    (72 dpi is 353), which programs write unasked: not believed.
    """
    for pattern in (r"\bMPP *= *(\d*\.?\d+)", r"PhysicalSizeX=\"(\d*\.?\d+)\"", r"\bAppMag *= *(\d*\.?\d+)"):
        said = re.search(pattern, text(tags, 270))
        if said and 1e-2 <= float(said[1]) <= 1e3:
            return 10 / float(said[1]) if "Mag" in pattern else float(said[1])
    keys, scale = tags.get(34735, np.zeros(0, int)), tags.get(33550, np.zeros(1))
    keys = {int(k[0]): int(k[3]) for k in keys[:len(keys) // 4 * 4].reshape(-1, 4)[1:]}
    if keys.get(1024) == 1 and keys.get(3076) == 9001 and 1e-6 <= scale[0] <= 1e3:
        return float(scale[0]) * 1e6                                           # a map whose unit is the metre
    unit, per = {2: 25400, 3: 1e4}.get(number(tags, 296, 2), 0), tags.get(282, ())
    mpp = unit * float(per[1]) / float(per[0]) if len(per) == 2 and per[0] else 0
    return mpp if 1e-3 <= mpp < 20 or 2000 < mpp <= 1e9 else None


# ----- 3. One tile -----

def whole_jpeg(data, tables, rgb):
    """A JPEG file of a tile's bytes: tables first, and an Adobe marker that says whether its colours are RGB or YCbCr.

    What the tile itself says of colours (APP0, APP14) is left out: in a TIFF, the directory decides.
    """
    out = [b"\xff\xd8\xff\xee\0\x0eAdobe\0\x64\0\0\0\0", b"\0" if rgb else b"\1"]
    for part in (tables, data):
        at = 2                                                                 # behind the start of image
        while at + 4 <= len(part) and part[at] == 0xFF and part[at + 1] != 0xD9:
            if part[at + 1] == 0xDA:                                           # the scan, to the end of the tile
                return b"".join([*out, part[at:]])
            n = 2 + int.from_bytes(part[at + 2:at + 4], "big")
            if part[at + 1] not in (0xE0, 0xEE):
                out.append(part[at:at + n])
            at += n
    raise ValueError("no JPEG scan in it")


def wrapped(data, tags, tile):
    """A TIFF of one strip around a tile's bytes, for Pillow's libtiff to undo compression and predictor."""
    bands = number(tags, 277, 1)
    values = {256: (4, 1, tile[0]), 257: (4, 1, tile[1]), 259: (3, 1, number(tags, 259, 1)), 273: (4, 1, 0),
              258: (3, bands, 8), 262: (3, 1, number(tags, 262)), 277: (3, 1, bands), 278: (4, 1, tile[1]),
              279: (4, 1, len(data)), 317: (3, 1, number(tags, 317, 1))} | ({338: (3, 1, 0)} if bands == 4 else {})
    after = 8 + 2 + 12 * len(values) + 4                                       # the bits of each band, then the data
    values |= {273: (4, 1, after + 2 * bands)} | ({258: (3, bands, after)} if bands > 2 else {})
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(values.items()))
    return struct.pack("<2sHIH", b"II", 42, 8, len(values)) + entries + bytes(4) + struct.pack("<H", 8) * bands + data


def decode(data, level):
    """The bytes of a tile -> (th,tw,3) uint8; a fourth band is left out. raises: nearly anything, if it is damaged."""
    tags, how = level.tags, number(level.tags, 259, 1)
    if how == JPEG:
        data = whole_jpeg(data, tags[347].tobytes() if 347 in tags else b"", number(tags, 262) == 2)
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
    if number(level.tags, 259) not in (*JP2K, JP2K_YCBCR):
        return False
    f.seek(int(level.offsets[np.argmax(level.lengths > 0)]))
    start = f.read(51)                                                         # to the third component
    steps_of = {*start[43:45], *start[46:48], *start[49:]}                     # of three components, in x and y
    return start[:4] == b"\xff\x4f\xff\x51" and start[41:42] == b"\3" and steps_of != {1}


def main(argv):
    if len(argv) != 1 or argv[0].startswith("-"):
        return print(__doc__)
    try:
        with open(argv[0], "rb") as f:
            if f.read(4) not in TIFF:
                raise UserError(f"{argv[0]} is no TIFF: python reader.py shows other images")
            found, length = directories(f, Path(argv[0]).stat().st_size), Path(argv[0]).stat().st_size
            for tags in found:
                print(f"page {tags['page']}: {size_of(tags)}, compression {number(tags, 259, 1)}, tiles {tiled(tags)}")
            print("levels:", [level.size for level in levels_of(f, length, found)], "mpp:", resolution(found[0]))
    except (OSError, ValueError, ArithmeticError, LookupError, struct.error) as err:
        raise UserError(f"{argv[0]} cannot be read as a TIFF: {err}") from err


if __name__ == "__main__":
    cli(main)
