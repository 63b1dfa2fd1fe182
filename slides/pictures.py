"""Pictures that are decoded as a whole: PNG, JPEG and the like. The one place that opens files with Pillow: of few
kinds alone, within a bound on pixels. And what all images share: which way is up, what is white, what is nothing.

in:  a path   out: a Level, decoded when it is first read     read next: slides/reader.py
"""
import io
import re
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError
from slides.tiff import MODES, ONE, Level, number, palette, readable, text

MAX_PIXELS = 178_956_970  # of an image that must be decoded as a whole: 0.7 GB in Pillow
FORMATS = ("PNG", "JPEG", "TIFF", "JPEG2000", "WEBP", "BMP", "PPM", "GIF")  # not EPS, which would start a program
ORIENTATION = 274  # of EXIF, from 1 to 8: see `upright`
DARK = 3           # of 255: what is black, or any value, but for what lossy compression leaves

@contextmanager
def picture(path, page=None, max_pixels=MAX_PIXELS, data=None):
    """Open a picture, of a file or of its bytes, which decodes nothing yet.
    raises: UserError if it is too large, or for whatever goes wrong until it is closed."""
    path = Path(path)
    with readable(path), io.BytesIO(data) if data else open(path, "rb") as f:  # given a path, Pillow 13 scrambles some
        image = Image.open(f, formats=FORMATS)
        if page:
            image.seek(page)
        (w, h), length = image.size, path.stat().st_size
        if w * h > min(max_pixels, 2**25 + 1000 * length):                     # no codec here packs a picture tighter
            raise UserError(f"{path} unpacks to {w} x {h} pixels, more than --max_pixels={max_pixels} or than its "
                            f"{length} bytes can hold: make it a tiled TIFF, or tell data.py to take more if you trust "
                            f"the file")
        yield image

# ----- 1. Which way is up -----

def turn_of(image, path):
    """How a picture is to be turned, 1 to 8: 1 for TIFF, which Pillow turns, and where EXIF is beyond understanding."""
    with suppress(Exception), open(path, "rb") as f:                           # a damaged EXIF raises nearly anything
        f.seek(max(0, f.seek(0, 2) - 2**16))
        late = image.format == "PNG" and b"eXIf" in f.read()                   # behind its pixels, which this unpacks
        turn = (image.getexif() if late else Image.Image.getexif(image)).get(ORIENTATION)
        return turn if turn in range(1, 9) and image.format != "TIFF" else 1
    return 1

def upright(level, turn):
    """A level whose pixels lie turned, as it is shown: transposed for 5 to 8; after that mirrored in x for 2, 3, 6, 7,
    in y for 3, 4, 7, 8."""
    across, down, aside = turn in (2, 3, 6, 7), turn in (3, 4, 7, 8), -1 if turn >= 5 else 1
    width, height = level.size[::aside]

    def region(x, y, w, h):
        x, y = width - x - w if across else x, height - y - h if down else y
        stored = level.region(*(x, y)[::aside], *(w, h)[::aside])
        stored = stored.swapaxes(0, 1) if aside < 0 else stored
        return np.ascontiguousarray(stored[::-1 if down else 1, ::-1 if across else 1])
    return Level((width, height), level.step[::aside], region) if turn > 1 else level

# ----- 2. What is white, what is nothing -----

def white_of(x):
    """The value of deep pixels (...,3) to show as white: the largest of as many bits as they use, but for one in a
    thousand. Files say 16 bits, whatever their camera has."""
    return 2 ** max(8, int(np.percentile(x, 99.9)).bit_length()) - 1

def nodata_of(tags):
    """The value or colour of pixels that show nothing, as GDAL says it in a TIFF; None if there is none."""
    said = re.fullmatch(r"(\d{1,5})(\.0*)?", text(tags, "nodata"))
    if said and number(tags, "colours") == 3:                                  # a place in the palette
        return palette(tags)[int(said[1])]
    return int(said[1]) if said else None

@lru_cache(4)
def scaled(white):
    """The 8 bits of each value of 16, for 0..white: (65536,) uint8."""
    return ((np.arange(2**16).clip(max=white) * 255 + white // 2) // white).astype(np.uint8)

def nothing(x, nodata, near):
    """Where an image (h,w,3 or 4) shows nothing, as `to_rgb` says: (h,w) bool, or None for nowhere."""
    gone = np.False_
    if x.shape[2] > 3:
        alpha = x[..., 3]
        clear, full = alpha == 0, np.count_nonzero(alpha == alpha.max())
        if clear.any() and np.count_nonzero(clear) + full > 0.9 * alpha.size:
            gone = clear
    if nodata is not None:
        same = np.True_
        for c, value in enumerate(np.broadcast_to(nodata, 3).tolist()):
            if same.any():                                                     # one band tells most tiles apart
                band = x[..., c].copy()                                        # side by side, NumPy compares at once
                same = same & (value - near <= band) & (band <= value + near)
        gone = gone | same
    return gone if gone.any() else None

def masks_beside(path):
    """What is said of an image that GDAL keeps the places of nothing in files of their own, which are not read here."""
    mask, about = (Path(f"{path}{ending}") for ending in (".msk", ".aux.xml"))
    names = [mask.name] if mask.is_file() else []
    names += [about.name] if about.is_file() and b"<NoDataValue" in about.read_bytes()[:2**20] else []
    return f"{' and '.join(names)}, where GDAL says what shows nothing, not looked at: put that into the image, by " \
           f"gdal_translate --config GDAL_TIFF_INTERNAL_MASK YES" if names else ""

def to_rgb(x, white=None, nodata=None, near=0):
    """Pixels as they are shown, (h,w,3) uint8: black where there is nothing, by their value, to within `near`, or by a
    fourth band. One that is seldom 0 or its largest is infrared: GDAL calls any fourth band alpha.
    in:  x (h,w,3 or 4) uint8, or uint16 to be scaled from 0..white."""
    gone, deep = nothing(x, nodata, near), x.dtype == np.uint16
    if gone is None and not deep and x.shape[2] == 3 and x.flags.c_contiguous:
        return x
    out = np.empty((*x.shape[:2], 3), np.uint8)
    for c in range(3):                                                         # NumPy is slow at axes of three
        band = scaled(white)[x[..., c]] if deep else x[..., c]
        out[..., c] = band if gone is None else band * ~gone
    return out

# ----- 3. The whole of it -----

def depth(path, image):
    """Of a picture with 16 bits, "grey" or "colours", else "". raises: UserError if it would not show faithfully."""
    how = [str(tile[3]) for tile in image.tile]                                # as Pillow calls it
    deep = "grey" if image.mode.startswith("I") else "colours" if how in (["RGB;16B"], ["RGBA;16B"]) else ""
    if not deep and (image.mode not in MODES or any(";16" in each for each in how)):
        raise UserError(f"{path} has pixels of kind {image.mode!r}, which do not show as 8-bit RGB: convert it first")
    return deep

def unpack(path, page=None):
    """Decode a picture. out: (h,w,3 or 4) uint8, or uint16 of 16-bit PNG and grey; the value of nothing, or None.
    Of 16-bit colours Pillow keeps the higher byte. Told the other byte order, it takes the lower one for it."""
    with picture(path, page, np.inf) as image:
        deep = depth(path, image)
        key = image.info.pop("transparency", None) if deep else None
        mode = "RGBA" if image.has_transparency_data else "RGB"
        x = np.asarray(image if deep == "grey" else image.convert(mode))
    if deep == "grey":
        if not 0 <= x.min() <= x.max() < 2**16:
            raise UserError(f"{path} has grey levels from {x.min()} to {x.max()}: convert it to 16 bits")
        x = x.astype(np.uint16)[..., None].repeat(3, 2)
    elif deep == "colours":
        with picture(path, page, np.inf) as image:
            image.tile = [(*tile[:3], tile[3][:-1] + "L") for tile in image.tile]
            x = x.astype(np.uint16) << 8 | np.asarray(image.convert(mode))
    return x, key

def whole(path, page=None, max_pixels=MAX_PIXELS, white=None):
    """A picture. out: its Level, decoded when it is first read; and the value of deep pixels that is shown as white,
    the given one or what they use, for which these are decoded now; None of 8 bits. raises: UserError."""
    with picture(path, page, max_pixels) as image:
        deep, size, turn = depth(path, image), image.size, turn_of(image, path)

    @cache
    def pixels():
        x, key = unpack(path, page)
        used = (white or white_of(x[::1 + len(x) // 512, :, :3])) if deep else None
        return to_rgb(x, used, key), used

    def region(x, y, w, h):
        with ONE:                                                              # decoded once, whatever thread asks
            return pixels()[0][y:y + h, x:x + w]
    level = upright(Level(size, (1, 1), region), turn)
    return level, pixels()[1] if deep else None
