"""Random access to slides and aerial images: any region at any resolution, with Pillow alone, in little memory.

TIFF, BigTIFF, SVS and cloud-optimised GeoTIFF are read tile by tile (tiff.py), whatever their size. Strips, PNG, JPEG
and the like are decoded as a whole, within a bound. What only openslide knows (ndpi, mrxs ...) goes through it where it
is installed (extra `slides`).

in:  a file   out: Slide, with .size .mpp .levels and .read(x, y, w, h, mpp) -> (h,w,3) uint8
run: python reader.py FILE [--mpp=0.5] [--out=view.png]     what is in it, and a small view
read next: encoder.py
"""
import struct
import time
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError, atomic, cli, configure
from slides.tiff import (
    MODES,
    TIFF,
    Level,
    decode,
    directories,
    halved_chroma,
    levels_of,
    resolution,
    size_of,
    steps,
    text,
    tiled,
)
from slides.writers import halve

MAX_PIXELS = 178_956_970  # of an image that must be decoded as a whole: 0.7 GB in Pillow
CACHE = 2**25             # bytes of decoded tiles that a slide keeps; openslide keeps as many
NEAR = 1.05               # resolutions this close count as the same: scanners differ by more, and resampling would blur
BLOCK = 1024              # pixels of the finer level, in x and y, that are reduced at a time
VENDORS = {".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm"}  # left to openslide
FORMATS = ("PNG", "JPEG", "TIFF", "JPEG2000", "WEBP", "BMP", "PPM", "GIF")  # not EPS, which would start a program


# ----- 1. Reading regions -----

def area(x, edges, axis):
    """Sums over [edges[i],edges[i+1]) along an axis of x (h,w,3), a fraction of a pixel counting as that: float64."""
    whole = np.minimum(edges.astype(int), x.shape[axis] - 1)                   # (n+1,)
    part = np.expand_dims(edges - whole, [a for a in range(3) if a != axis])
    cut, n = x.take(whole, axis) * part, len(edges) - 1                        # what lies beyond the whole ones
    sums = np.add.reduceat(x, whole, axis, np.float64)
    return sums.take(range(n), axis) + cut.take(range(1, n + 1), axis) - cut.take(range(n), axis)


class Slide:
    """An open slide or image; open_slide makes it.

    Attributes: path; size (w,h) of level 0; mpp, micrometres per pixel of level 0, None if unknown; said, whether the
    file or the user told it; levels, of tiff.Level; scanned, whether a slide scanner made it; damaged, None or a list
    to which tiles that cannot be decoded are added as (box (x0,y0,x1,y1) in level-0 pixels, why), while white stands
    for them; room, bytes of decoded tiles to keep; waited, seconds spent reading bytes.
    """

    def __init__(self, path, levels, mpp=None, scanned=False, file=None, damaged=None):
        self.path, self.levels, self.mpp, self.scanned, self.size = path, levels, mpp, scanned, levels[0].size
        self.said = mpp is not None
        self.file, self.damaged, self.room, self.waited = file, damaged, CACHE, 0.0
        self._tiles, self._bytes = OrderedDict(), 0                            # least recently used first
        for n, level in enumerate(levels):
            level.region = level.region or partial(self._region, n)

    def close(self):
        self._tiles.clear()
        if self.file:
            self.file.close()

    def grid(self, mpp=None):
        """Where pixels of `mpp` micrometres come from (None: of level 0).

        out: the level, the coarsest that is fine enough; (rx,ry), how many of its pixels one spans; size (w,h) of the
        image at that resolution. Within 5 % of a level, or of a whole multiple of level 0, that is what is meant: an
        image of 0.499 is read as it is for 0.5. raises: UserError if the file does not say its own mpp, or is coarser.
        """
        if mpp is None:
            return self.levels[0], (1, 1), self.size
        if self.mpp is None:
            raise UserError(f"{self.path} does not say how large its pixels are: give --mpp, in micrometres (0.25 for "
                            f"a 40x scan, 0.5 for 20x)")
        f = mpp / self.mpp
        if not 1 / NEAR <= f <= max(self.size):
            raise UserError(f"{self.path} has pixels of {self.mpp:.4g} micrometres, and {mpp:.4g} were asked for: give "
                            f"an --mpp between its own and that of the whole image in one pixel")
        near = min(self.levels, key=lambda v: abs(np.log(f / v.step[0])))
        if 1 / NEAR <= f / near.step[0] <= NEAR:
            return near, (1, 1), near.size
        f = round(f) if 1 / NEAR <= f / round(f) <= NEAR else f
        level = [v for v in self.levels if max(v.step) <= f][-1]
        return level, tuple(f / s for s in level.step), tuple(max(1, int(n / f)) for n in self.size)

    def read(self, x, y, w, h, mpp=None):
        """Read a region.

        in:  x, y, w, h in pixels of `mpp` micrometres, of the image whose size `grid` tells (None: of level 0).
        out: (h,w,3) uint8, white beyond the image. A pixel is the mean of the area it covers in the nearest finer
        level, rounded half up: the same, whatever window it is read in. raises: UserError as grid, or for a damaged
        tile, named by level, column and row, unless those are collected.
        """
        level, (rx, ry), size = self.grid(mpp)
        if w < 1 or h < 1:
            raise UserError(f"got a region of {w} x {h} pixels: w and h are at least 1")
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])
        if rx == ry == 1 and (x0, y0, x1, y1) == (x, y, x + w, y + h):
            return level.region(x, y, w, h)
        out = np.full((h, w, 3), 255, np.uint8)
        bw, bh = max(1, int(BLOCK / rx)), max(1, int(BLOCK / ry))              # a block at a time, to bound the memory
        for top in range(y0, y1, bh):
            for left in range(x0, x1, bw):
                n, m = min(bw, x1 - left), min(bh, y1 - top)
                out[top - y:top - y + m, left - x:left - x + n] = self._reduced(level, left, top, n, m, rx, ry)
        return out

    def _reduced(self, level, x, y, w, h, rx, ry):
        """(h,w,3) uint8: means over rx x ry pixels of a level, from x, y on, counted in those blocks."""
        if rx == ry == 1:
            return level.region(x, y, w, h)
        ex, ey = (x + np.arange(w + 1)) * rx, (y + np.arange(h + 1)) * ry      # (w+1,), (h+1,) edges, in level pixels
        left, top, right, bottom = int(ex[0]), int(ey[0]), *level.size
        right, bottom = min(right, int(np.ceil(ex[-1]))), min(bottom, int(np.ceil(ey[-1])))
        source = level.region(left, top, right - left, bottom - top)
        if rx == ry == 2:
            return halve(source)                                               # the same numbers, sooner
        sums = area(area(source, np.minimum(ey, bottom) - top, 0), np.minimum(ex, right) - left, 1)
        return (sums / (rx * ry) + 0.5).astype(np.uint8)

    def _region(self, n, x, y, w, h):
        """Put a region of level n together from its tiles."""
        tw, th = self.levels[n].tile
        out = np.empty((h, w, 3), np.uint8)
        for top in range(y // th * th, y + h, th):
            for left in range(x // tw * tw, x + w, tw):
                x0, y0, x1, y1 = max(x, left), max(y, top), min(x + w, left + tw), min(y + h, top + th)
                tile = self._tile(n, left // tw, top // th)
                out[y0 - y:y1 - y, x0 - x:x1 - x] = tile[y0 - top:y1 - top, x0 - left:x1 - left]
        return out

    def _tile(self, n, column, row):
        """One tile of level n, (th,tw,3) uint8, decoded unless it is kept from before."""
        key, level = (n, column, row), self.levels[n]
        if key in self._tiles:
            self._tiles.move_to_end(key)
            return self._tiles[key]
        k, (tw, th) = row * -(-level.size[0] // level.tile[0]) + column, level.tile
        length, tile = int(level.lengths[k]), np.broadcast_to(np.uint8(255), (th, tw, 3))  # white if empty, as scanners
        try:                                                                   # leave out what they did not scan
            if length > 16 * tw * th + 2**16:
                raise ValueError(f"{length} bytes for {tw} x {th} pixels")
            if length:
                start = time.perf_counter()
                self.file.seek(int(level.offsets[k]))
                data = self.file.read(length)
                self.waited += time.perf_counter() - start
                tile = decode(data, level)
        except Exception as err:  # Pillow's decoders raise nearly anything on damaged bytes
            why = f"tile {column}, {row} of level {n} cannot be decoded ({type(err).__name__}: {err})"
            if self.damaged is None:
                raise UserError(f"{self.path}: {why}: the file is damaged, copy it again") from err
            (sx, sy), left, top = level.step, column * tw, row * th
            self.damaged.append(((int(left * sx), int(top * sy), int((left + tw) * sx), int((top + th) * sy)), why))
        self._tiles[key] = tile
        self._bytes += tile.nbytes
        while self._bytes > self.room and len(self._tiles) > 1:
            self._bytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile


# ----- 2. Opening -----

def open_slide(path, mpp=None, max_pixels=MAX_PIXELS, damaged=None):
    """Open a slide or image for random access.

    in:  mpp, micrometres per pixel of level 0, where the file does not say it or says it wrong; max_pixels, of an image
         that cannot be read tile by tile; damaged, a list that collects damaged tiles, which else end the reading.
    out: Slide. raises: UserError if it is missing, damaged, too large, or needs openslide, which is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file: give a slide or an image")
    if mpp is not None and not 1e-3 <= mpp <= 1e9:
        raise UserError(f"mpp={mpp} of {path}: give micrometres per pixel, 0.5 for a 20x scan")
    if path.suffix.lower() in VENDORS:
        return by_openslide(path, mpp, damaged)
    try:
        f, length = open(path, "rb"), path.stat().st_size
        found = directories(f, length) if f.read(4) in TIFF else []
        main = max(found, key=lambda t: np.prod(size_of(t), dtype=float), default={})
        levels = levels_of(f, length, found) if tiled(main) else []
        foreign = any(65420 in t or "<scn" in text(t, 270) or "<iScan" in text(t, 700) for t in found)
        if foreign or levels and halved_chroma(f, levels[0]):                  # Hamamatsu, Leica, Ventana
            return by_openslide(path, mpp, damaged)
        said = mpp or resolution(main)
        scanned = path.suffix.lower() == ".svs" or text(main, 270).startswith("Aperio")
    except (OSError, ValueError, ArithmeticError, LookupError, MemoryError, struct.error) as err:
        raise err if isinstance(err, UserError) else unreadable(path, err) from err
    if levels:
        return Slide(path, levels, said, scanned, f, damaged)
    f.close()
    return Slide(path, [by_pillow(path, main.get("page") or 0, max_pixels)], said, scanned, None, damaged)


def unreadable(path, err):
    return UserError(f"{path} cannot be read ({type(err).__name__}: {err}): it is damaged, cut short or of an unknown "
                     f"kind; convert it to PNG, JPEG or TIFF, or take it out")


def by_pillow(path, page, max_pixels):
    """The level of an image that is decoded as a whole, once it is read. raises: UserError for its kind or size."""
    def guarded(action):
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None           # ours is checked below
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*[Tt]runcated")             # Pillow only warns of cut TIFF tables
                return action()
        except Exception as err:  # Pillow's decoders raise nearly anything on damaged files
            raise unreadable(path, err) from err
        finally:
            Image.MAX_IMAGE_PIXELS = limit

    def opened():
        image = Image.open(path, formats=FORMATS)
        if page:
            image.seek(page)
        return image
    image, length = guarded(opened), path.stat().st_size
    w, h = image.size
    if w * h > min(max_pixels, 2**25 + 1000 * length):                         # no codec here packs a picture tighter
        raise UserError(f"{path} unpacks to {w} x {h} pixels, more than --max_pixels={max_pixels} or than its {length} "
                        f"bytes can hold: make it a tiled TIFF, or tell data.py to take more if you trust the file")
    if image.mode not in MODES:
        raise UserError(f"{path} has pixels of kind {image.mode!r}, which do not show as 8-bit RGB: convert it first")
    loaded = []

    def region(x, y, w, h):
        if not loaded:
            loaded.append(guarded(image.load))
        return np.asarray(image.crop((x, y, x + w, y + h)).convert("RGB"))     # a fourth band is left out, not blended
    return Level((w, h), (1, 1), region)


def by_openslide(path, mpp, damaged):
    """A slide of a kind that only openslide knows. raises: UserError if that is missing or does not know it either."""
    try:
        import openslide
    except (ImportError, OSError) as err:
        raise UserError(f"{path} is of a kind that only openslide reads, and that is not installed: pip install "
                        f"'nanozoomldm[slides]', or pip install openslide-python openslide-bin") from err

    def guarded(action, *args):
        try:
            return action(*args)
        except Exception as err:  # of openslide, or of the library below it
            raise unreadable(path, err) from err
    handle = guarded(openslide.OpenSlide, str(path))
    sizes, said = handle.level_dimensions, handle.properties.get("openslide.mpp-x")

    def region(n, x, y, w, h):
        at = [round(k * whole / size) for k, whole, size in zip((x, y), sizes[0], sizes[n])]  # in level-0 pixels
        image = guarded(handle.read_region, at, n, (w, h))
        white = Image.new("RGB", image.size, "white")                          # where nothing was scanned
        white.paste(image, mask=image.getchannel("A"))
        return np.asarray(white)
    levels = [Level(size, steps(sizes[0], size), partial(region, n)) for n, size in enumerate(sizes)]
    return Slide(path, levels, mpp or (float(said) if said else None), True, None, damaged)


@dataclass
class Config:
    file: str = ""               # the slide or image
    mpp: float | None = None     # micrometres per pixel, where it does not say so itself
    out: str = "out/reader.png"  # a view of it
    side: int = 1024             # pixels of the view, at most


def main(argv):
    cfg = configure(Config, argv, words=("file",), doc=__doc__)
    if not cfg.file:
        return print("to see what is in a slide or image: python reader.py FILE")
    slide = open_slide(cfg.file, cfg.mpp)
    print(f"{cfg.file}: {f'{slide.mpp:.4g} micrometres per pixel' if slide.mpp else 'size of pixels unknown (--mpp)'}")
    for n, level in enumerate(slide.levels):
        tiles = f", tiles of {level.tile[0]} x {level.tile[1]}" if level.tags else ""
        print(f"level {n}: {level.size[0]} x {level.size[1]}, steps of {level.step[0]:.5g}{tiles}")
    slide.mpp = slide.mpp or 1.0                                               # for the view, any unit will do
    mpp = slide.mpp * max(1, max(slide.size) / max(1, cfg.side))
    view = slide.read(0, 0, *slide.grid(mpp)[2], mpp)
    with atomic(cfg.out) as tmp:
        Image.fromarray(view).save(tmp, "PNG")
    print(f"{cfg.out}: {view.shape[1]} x {view.shape[0]} pixels of it all")


if __name__ == "__main__":
    cli(main)
