"""Random access to slides and aerial images: any region at any resolution, with Pillow alone, in little memory.

TIFF, BigTIFF, SVS and cloud-optimised GeoTIFF are read tile by tile (tiff.py), whatever their size. Strips, PNG, JPEG
and the like are decoded as a whole, within a bound. What only openslide knows (ndpi, mrxs ...) goes through it where it
is installed (extra `slides`). All are upright, of 8 bits, and black where they say that they show nothing.

in:  a file   out: Slide, with .size .mpp .levels and .read(x, y, w, h, mpp) -> (h,w,3) uint8
run: python -m slides.reader FILE [--out=view.png]     what is in it, and a small view
read next: slides/build.py
"""
import threading
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError, cli, configure, save_png
from data import halve
from slides.pictures import DARK, MAX_PIXELS, masks_beside, nodata_of, to_rgb, upright, white_of, whole
from slides.tiff import (JPEG, MAP, ONE, Level, amount, decode, decode_mask, directories, halved_chroma, levels_of,
                         number, pieces_of, readable, resolution, shown, square, steps, text, with_masks)

CACHE = 2**25             # bytes of decoded tiles kept, of each level; openslide keeps as many
NEAR = 1.05               # resolutions this close count as the same: scanners differ by more, and resampling would blur
BLOCK = 1024              # pixels of the finer level, in x and y, that are reduced at a time
LARGE = 2**22             # pixels of a tile that is not to be decoded by all threads at once
TILE, BACK = 512, 3072    # pixels that openslide reads at a time, and at most before them; it splits windows at 4096
VENDORS = {".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm"}  # left to openslide

# ----- 1. Reading regions -----

def area(x, edges, axis):
    """Sums over [edges[i],edges[i+1]) along an axis of x (h,w,3), a fraction of a pixel counting as that: float64."""
    whole = np.minimum(edges.astype(int), x.shape[axis] - 1)                   # (n+1,) the pixel that each edge cuts
    part = edges - whole                                                       # (n+1,) of that pixel, before the edge
    cut = x.take(whole, axis) * np.expand_dims(part, (1, 2) if axis == 0 else (0, 2))
    n = len(edges) - 1
    sums = np.add.reduceat(x, whole, axis, np.float64)                         # from whole pixel to whole pixel
    return sums.take(range(n), axis) + cut.take(range(1, n + 1), axis) - cut.take(range(n), axis)

class Slide:
    """An open slide or image; open_slide makes it.
    Attributes: path; size (w,h) of level 0; mpp, micrometres per pixel of level 0, None if unknown; said, whether the
    file or the user told it; levels, of tiff.Level; scanned, whether a slide scanner made it; damaged, None or a list
    to which tiles that cannot be decoded are added as (box (x0,y0,x1,y1) in level-0 pixels, why, their level), while
    white stands for them; white, the value that is shown as white, of pixels of more than 8 bits, else None; empty, the
    grey of tiles that are left out; nodata, the value of pixels that show nothing."""

    def __init__(self, path, levels, mpp=None, scanned=False, file=None, damaged=None, white=None, empty=255,
                 nodata=None):
        self.path, self.levels, self.size = path, levels, levels[0].size
        self.mpp, self.said, self.scanned = mpp, mpp is not None, scanned
        self.file, self.damaged, self.near = file, damaged, NEAR
        self.white, self.empty, self.nodata = white, empty, nodata
        self.reading = threading.Lock()                                        # a file has one position for all threads
        self.keep_tiles(CACHE)

    def keep_tiles(self, room):
        """Keep as many decoded tiles of each level as fit into `room` bytes, those used last."""
        for level in self.levels:
            if min(level.tile):
                most = max(1, room // (3 * level.tile[0] * level.tile[1]))
                tile_of = lru_cache(most)(level.tile_of or partial(self._shown, level))
                large = level.tile[0] * level.tile[1] > LARGE
                level.region = partial(self._region, level, alone(tile_of) if large else tile_of)

    def grid(self, mpp=None):
        """Where pixels of `mpp` micrometres come from (None: of level 0).
        out: the level, the coarsest that is fine enough; (rx,ry), how many of its pixels one spans; size (w,h) of the
        image at that resolution. Within 5 % of a level, or of a whole multiple of level 0, the nearest of these is what
        is meant: an image of 0.499 is read as it is for 0.5. A level of steps of 15.88 is not read for 16, for it would
        be a pixel off at the end, but a finer one. raises: UserError if the file does not say its mpp, or is coarser.
        """
        if mpp is None:
            return self.levels[0], (1, 1), self.size
        if self.mpp is None:
            raise UserError(f"{self.path} does not say how large its pixels are: give --mpp (0.25 at 40x, 0.5 at 20x)")
        f = mpp / self.mpp
        if not 1 / NEAR <= f <= max(self.size):
            raise UserError(f"{self.path} has pixels of {self.mpp:.4g} micrometres, and {mpp:.4g} were asked for: give "
                            f"an --mpp between its own and that of the whole image in one pixel, or if the file is "
                            f"wrong, its true one in a column mpp of a CSV")
        whole = max(1, round(f))
        near = min(self.levels, key=lambda level: abs(np.log(f / level.step[0])))
        off, other = abs(np.log([f / near.step[0], f / whole]))
        if off <= np.log(self.near) and (off < other or near.step == (whole, whole)):
            return near, (1, 1), near.size
        f = whole if other <= np.log(self.near) else f
        level = [level for level in self.levels if self.near * max(level.step) <= f][-1]
        w, h = self.size
        return level, (f / level.step[0], f / level.step[1]), (max(1, int(w / f)), max(1, int(h / f)))

    def read(self, x, y, w, h, mpp=None):
        """Read a region.
        in:  x, y, w, h in pixels of `mpp` micrometres, of the image whose size `grid` tells (None: of level 0).
        out: (h,w,3) uint8, white beyond the image. A pixel is the mean of the area it covers in the nearest finer
        level, rounded half up: the same, whatever window it is read in. raises: UserError as grid, or for a damaged
        tile, named by level, column and row, unless those are collected."""
        level, (rx, ry), (width, height) = self.grid(mpp)
        if w < 1 or h < 1:
            raise UserError(f"got a region of {w} x {h} pixels: w and h are at least 1")
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + w, width), min(y + h, height)
        if rx == ry == 1 and (x0, y0, x1, y1) == (x, y, x + w, y + h):
            return level.region(x, y, w, h)
        out = np.full((h, w, 3), 255, np.uint8)
        bw, bh = max(1, int(BLOCK / rx)), max(1, int(BLOCK / ry))              # a block at a time, to bound the memory
        for top in range(y0, y1, bh):
            for left in range(x0, x1, bw):
                block = reduced(level, left, top, min(bw, x1 - left), min(bh, y1 - top), rx, ry)
                paste(out, block, left - x, top - y)
        return out

    def _region(self, level, tile_of, x, y, w, h, bands=3):
        """Put a region of a level together from its tiles."""
        tw, th = level.tile
        out = np.empty((h, w, bands), np.uint8)
        for row in range(y // th, ceil((y + h) / th)):
            for column in range(x // tw, ceil((x + w) / tw)):
                paste(out, tile_of(column, row), column * tw - x, row * th - y)
        return out

    def _shown(self, level, column, row):
        lossy = number(level.tags, "compression") == JPEG
        return to_rgb(self._tile(level, column, row), self.white, self.nodata, DARK if lossy else 0)

    def find_white(self):
        """Measure which value of deep pixels to show as white, on up to 64 tiles of the coarsest level."""
        level, found = self.levels[-1], [np.zeros((1, 3))]
        columns = ceil(level.size[0] / level.tile[0])
        many = columns * ceil(level.size[1] / level.tile[1])
        for k in range(0, many, 1 + many // 64):
            x = self._tile(level, k % columns, k // columns)
            there = (x[..., :3] != self.nodata).any(-1) & (x[..., 3:] > 0).all(-1)
            if x.dtype == np.uint16:                                           # not damaged, nor empty
                found.append(x[there][::61, :3])
        self.white = white_of(np.concatenate(found))

    def _masked(self, level, tile, x, y):
        """A tile with what its mask says of it as a fourth band, if it hides anything."""
        w, h = (min(n, whole - at) for n, whole, at in zip(tile.shape[1::-1], level.size, (x, y)))
        with self.reading:
            there = self._region(level.mask, partial(decode_mask, self.file, level.mask), x, y, w, h, 1)
        if there.all():
            return tile[..., :3]
        beyond = (0, tile.shape[0] - h), (0, tile.shape[1] - w), (0, 0)
        return np.concatenate([tile[..., :3], np.pad(there, beyond).astype(tile.dtype)], 2)

    def _tile(self, level, column, row):
        """Decode a tile, (th,tw,3) uint8, or uint16 if deep, or (th,tw,4) if something tells where it shows anything.
        Scanners leave out what they did not scan: that is white, but of a map nothing."""
        (tw, th), (sx, sy) = level.tile, level.step
        try:
            with self.reading:
                data, cut = pieces_of(self.file, level, column, row)
            x = decode(data, cut) if any(data) else np.full((th, tw, 3), self.empty, np.uint8)
            return self._masked(level, x, column * tw, row * th) if level.mask else x
        except Exception as err:  # Pillow's decoders raise nearly anything on damaged bytes
            n = self.levels.index(level)
            why = f"tile {column}, {row} of level {n} cannot be decoded ({type(err).__name__}: {err})"
            if self.damaged is None:
                raise UserError(f"{self.path}: {why}: the file is damaged, copy it again") from err
            box = column * tw * sx, row * th * sy, (column + 1) * tw * sx, (row + 1) * th * sy
            self.damaged.append((tuple(int(n) for n in box), why, level))
            return np.full((th, tw, 3), 255, np.uint8)

def alone(f):
    """f for one thread at a time: the others find what it kept."""
    def waiting(*args):
        with ONE:
            return f(*args)
    return waiting

def paste(out, block, x, y):
    """Copy a block (h,w,3) into `out` with its corner at x, y, which may be negative; what sticks out is left."""
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + block.shape[1], out.shape[1]), min(y + block.shape[0], out.shape[0])
    out[top:bottom, left:right] = block[top - y:bottom - y, left - x:right - x]

def reduced(level, x, y, w, h, rx, ry):
    """(h,w,3) uint8: means over rx x ry pixels of a level, from x, y on, counted in those blocks."""
    if rx == ry == 1:
        return level.region(x, y, w, h)
    ex, ey = (x + np.arange(w + 1)) * rx, (y + np.arange(h + 1)) * ry          # (w+1,), (h+1,) edges, in level pixels
    left, top = int(ex[0]), int(ey[0])
    right, bottom = min(level.size[0], ceil(ex[-1])), min(level.size[1], ceil(ey[-1]))
    source = level.region(left, top, right - left, bottom - top)
    if rx == ry == 2:
        return halve(source)                                                   # the same numbers, sooner
    sums = area(source, np.minimum(ey, bottom) - top, 0)
    sums = area(sums, np.minimum(ex, right) - left, 1)
    return (sums / (rx * ry) + 0.5).astype(np.uint8)

# ----- 2. Opening -----

def open_slide(path, mpp=None, max_pixels=MAX_PIXELS, damaged=None, white=None):
    """Open a slide or image for random access.
    in:  mpp, micrometres per pixel of level 0, where the file does not say it or says it wrong; max_pixels, of an image
         that cannot be read tile by tile; damaged, a list that collects damaged tiles, which else end the reading;
         white, the value to show as white, of pixels of more than 8 bits: None, as they say (pictures.white_of).
    out: Slide. raises: UserError if it is missing, damaged, too large, or needs openslide, which is not there."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file: give a slide or an image")
    if mpp is not None and not 1e-3 <= mpp <= 1e9:
        raise UserError(f"mpp={mpp} of {path}: give micrometres per pixel, 0.5 for a 20x scan")
    if path.suffix.lower() in VENDORS:
        return by_openslide(path, mpp, damaged)
    with readable(path):
        f = open(path, "rb")
        found = directories(f)
        foreign = any("hamamatsu" in tags or "<scn" in text(tags, "description") or "<iScan" in text(tags, "xmp")
                      or text(tags, "software").startswith("Philips") for tags in found)  # and Leica, Ventana
        if foreign:
            return by_openslide(path, mpp, damaged)
        found, main, how = shown(path, found)
        levels = levels_of(f, found, main) if how == "tiles" else []
        if levels and halved_chroma(f, levels[0]):
            return by_openslide(path, mpp, damaged)
        with_masks(f, found, levels)
        mpp = mpp or resolution(main)
        scanned = path.suffix.lower() == ".svs" or text(main, "description").startswith("Aperio")
        empty, turn = 0 if any(tags.keys() & MAP for tags in found) else 255, number(main, "orientation", 1)
        nodata = nodata_of(main)
    if not levels:
        f.close()
        level, white = whole(path, main.get("page"), max_pixels, white)
        return Slide(path, [level], mpp, scanned, None, damaged, white)
    turned, deep = turn in range(2, 9), max(main.get("bits", [8])) > 8
    slide = Slide(path, levels, mpp, scanned, f, None if turned else damaged, white if deep else None, empty,
                  nodata)                                                      # damage would not lie where it is found
    if deep and not white:
        slide.find_white()
    if turned:
        return Slide(path, [upright(v, turn) for v in levels], mpp, scanned, None, damaged, slide.white)
    return slide

def by_openslide(path, mpp, damaged):
    """A slide of a kind that only openslide knows. raises: UserError if that is missing or does not know it either."""
    try:
        import openslide
    except (ImportError, OSError) as err:
        raise UserError(f"{path} is of a kind that only openslide reads: pip install -e '.[slides]'") from err
    with readable(path):
        handle = openslide.OpenSlide(str(path))
    sizes, about = handle.level_dimensions, handle.properties
    said = about.get("openslide.mpp-x", "")

    def tile(n, step, columns, rows, column, row):
        x, y = columns[column], rows[row]
        left, top = column * TILE - x, row * TILE - y
        with readable(path):
            image = handle.read_region((round(x * step), round(y * step)), n, (left + TILE, top + TILE))
        image = image.crop((left, top, left + TILE, top + TILE))
        paper = Image.new("RGB", image.size, "white")                          # where nothing was scanned
        paper.paste(image, mask=image.getchannel("A"))
        return np.asarray(paper)
    levels = []
    for n, (size, step) in enumerate(zip(sizes, handle.level_downsamples)):
        (columns, across), (rows, down) = starts(size[0], step), starts(size[1], step)
        if max(across, down) <= 1 / 16:                                        # else a finer level serves
            tile_of = partial(tile, n, step, columns, rows)
            levels.append(Level(size, steps(sizes[0], size), tile=(TILE, TILE), tile_of=tile_of))
    mpp = mpp or square(amount(said), amount(about.get("openslide.mpp-y", said)))
    return Slide(path, levels, mpp, True, None, damaged)

def starts(size, step):
    """Where to begin each tile along an axis of a level, at or before it, so that openslide does not blend.
    It takes positions in pixels of level 0, and mixes neighbours where they are not whole at the level to within 1/512.
    in: pixels of the level; step, of level 0 in one. out: positions, in pixels of the level; how far the worst is from
    whole, as large slides have none nearby."""
    pixels = np.arange(size)
    off = abs(np.round(pixels * step) / step - pixels)                         # (size,)
    found = []
    for x in range(0, size, TILE):
        before = off[max(0, x - BACK):x + 1][::-1]
        found.append(x - int(np.argmin(before > 1 / 512)))                     # the nearest; x itself if there is none
    return found, off[found].max()

@dataclass
class Config:
    file: str = ""               # the slide or image
    out: str = "out/reader.png"  # a view of it, of 1024 pixels at most

def main(argv):
    cfg = configure(Config, argv, words=("file",), doc=__doc__)
    if not cfg.file:
        return print("to see what is in a slide or image: python -m slides.reader FILE")
    slide = open_slide(cfg.file)
    print(f"{cfg.file}: " + (f"{slide.mpp:.4g} micrometres per pixel" if slide.mpp else "size of pixels unknown"))
    for n, level in enumerate(slide.levels):
        (w, h), (tw, th) = level.size, level.tile
        print(f"level {n}: {w} x {h}, steps of {level.step[0]:.5g}" + (f", tiles of {tw} x {th}" if tw else ""))
    if unread := masks_beside(cfg.file):
        print(unread)
    slide.mpp = 1.0                                                            # for the view, any unit will do
    mpp = max(1, max(slide.size) / 1024)
    w, h = slide.grid(mpp)[2]
    save_png(cfg.out, slide.read(0, 0, w, h, mpp))
    print(f"{cfg.out}: {w} x {h} pixels of it all")

if __name__ == "__main__":
    cli(main, __doc__)
