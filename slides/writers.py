"""Large images as files that a viewer opens: a pyramid TIFF (openslide, QuPath) and DeepZoom tiles (any browser).

Images come in strips from top to bottom: one row of tiles of each level is all that stands in memory, however large the
image. Each level halves the one before; an odd last row or column is repeated, so that no pixel is dropped.

in:  strips (h,W,3) uint8 of any heights   out: large.tif; or large.dzi, large_files/ and large.html
run: python sample_joint.py RUN --out=large.tif, or large.dzi     read next: slides/reader.py
"""
import io
import os
import shutil
import tempfile
from html import escape
from math import ceil
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from common import UserError, atomic, write_text
from data import halve
from slides.tiff import LONG, LONG8, RATIONAL, SHORT, pack_directory

CLASSIC = 5 * 2**29  # bytes of raw tiles above which a TIFF is a BigTIFF: noise at quality 100 grows 1.6 fold, to 4 GB
VIEWER = "node_modules/openseadragon/build/openseadragon/openseadragon.min.js"  # where npm puts it
MARK = b"OpenSeadragon"  # stands in the viewer, and in our pages
DZI = ('<?xml version="1.0" encoding="UTF-8"?>\n'                              # large-image insists on it
       '<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="jpg" Overlap="0" TileSize="%d">'
       '<Size Width="%d" Height="%d"/></Image>')
# The size stands here as well, and a canvas draws: on a page from file://, scripts and WebGL may not read other files.
PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>%s</title></head>
<body style="margin: 0"><div id="image" style="height: 100vh"></div>
<script src="openseadragon.min.js"></script><script>
OpenSeadragon({ id: "image", drawer: "canvas", showNavigationControl: false, showNavigator: true, tileSources: {
  tileSize: %d, width: %d, height: %d, getTileUrl: (level, x, y) => `%s/${level}/${x}_${y}.jpg` } });
</script></body></html>
"""

# ----- 1. Strips -> rows of tiles of every level -----

def level_sizes(size, tile, quality, smallest):
    """out: [(H,W), ...], halved and rounded up until the larger side is at most `smallest`. raises: UserError."""
    if len(size) != 2 or min(size) < 1 or tile % 16 or not 16 <= tile <= 4096 or not 1 <= quality <= 100:
        raise UserError(f"got size={tuple(size)} tile={tile} quality={quality}: size is (height, width), at least 1 x "
                        f"1, tile a multiple of 16 up to 4096, quality 1 to 100")
    sizes = [(int(size[0]), int(size[1]))]
    while max(sizes[-1]) > smallest:
        sizes.append((ceil(sizes[-1][0] / 2), ceil(sizes[-1][1] / 2)))
    return sizes

def tile_rows(strips, sizes, tile):
    """Gather strips into rows of tiles of every level: yields (level, row, pixels (h,W,3) uint8 of that level).
    in:  strips, uint8 (h,W,3) of any h, top to bottom; sizes, from level_sizes. h = tile out, but for the last row.
         Each row comes as soon as it is full, so those of one level are in order and the levels mixed.
    raises: UserError if a strip has another width or type, or their heights do not sum to H."""
    rows, done = [None] * len(sizes), [0] * len(sizes)                         # by level: the row in work, pixel rows

    def push(level, strip):
        height, width = sizes[level]
        while len(strip):
            at = done[level] % tile
            if at == 0:
                rows[level] = np.empty((min(tile, height - done[level]), width, 3), np.uint8)
            row = rows[level]                                                  # (h,W,3)
            n = min(len(strip), len(row) - at)
            row[at:at + n] = strip[:n]
            strip = strip[n:]
            done[level] += n
            if at + n == len(row):
                yield level, (done[level] - 1) // tile, row
                if level + 1 < len(sizes):
                    if len(row) % 2 or width % 2:  # tile is even: only the very last row of pixels is repeated
                        row = np.pad(row, ((0, len(row) % 2), (0, width % 2), (0, 0)), "edge")
                    yield from push(level + 1, halve(row))

    H, W = sizes[0]
    for strip in map(np.asarray, strips):
        if strip.dtype != np.uint8 or strip.ndim != 3 or strip.shape[1:] != (W, 3) or done[0] + len(strip) > H:
            raise UserError(f"strips: {strip.dtype} {strip.shape} after {done[0]} rows does not fit size={(H, W)}: "
                            f"give size=(height, width) of the image, and uint8 strips (h, {W}, 3) that make it up")
        yield from push(0, strip)
    if done[0] < H:
        raise UserError(f"strips: they end after {done[0]} rows, size={(H, W)} says {H}: give size=(height, width)")

def jpeg(pixels, quality):
    """The bytes of a tile (h,w,3). Chroma stays whole (4:4:4): halved, it would smear the edges of stained nuclei."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()

# ----- 2. Pyramid TIFF -----

def write_tiff(path, strips, size, tile=256, quality=90, mpp=None):
    """Write a tiled pyramid TIFF that openslide ("generic-tiff") and QuPath open; nothing half-written stays.
    in:  strips, an iterable of uint8 (h,W,3), top to bottom; size (H,W) of the image, in pixels; quality of its JPEG
         tiles; mpp, micrometres per pixel. Levels halve until the larger side is at most `tile`, a multiple of 16.
    raises: UserError if strips do not make up the image, for other bad arguments, or if path cannot be written."""
    sizes = level_sizes(size, tile, quality, tile)
    check_tiff(path, mpp)
    counts = [ceil(h / tile) * ceil(w / tile) for h, w in sizes]
    big = sum(counts) * (3 * tile * tile + 1000) > CLASSIC                     # 1000: a JPEG's tables
    places = [np.zeros((2, n), np.uint64) for n in counts]                     # offsets and lengths of each level
    with atomic(path) as tmp, open(tmp, "wb") as f:
        f.write(header(sizes, tile, places, mpp, big))                         # only to keep its room
        for level, i, row in tile_rows(strips, sizes, tile):
            first = i * ceil(row.shape[1] / tile)
            for k, x in enumerate(range(0, row.shape[1], tile), first):
                part = row[:, x:x + tile]                                      # (h,w,3); a TIFF's tiles are all whole
                part = np.pad(part, ((0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)), "edge")
                data = jpeg(part, quality)
                places[level][:, k] = f.tell(), len(data)
                f.write(data)
        f.seek(0)
        f.write(header(sizes, tile, places, mpp, big))

def check_place(path):
    """raises: UserError if no file can be made where path is to lie; to be asked before long work."""
    there = next(p for p in Path(path).resolve().parents if p.exists())        # made on writing: what is missing below
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as err:
        raise UserError(f"{path} cannot be written: {err}; give another place") from err

def check_tiff(path, mpp=None):
    """raises: UserError for a name or a resolution that write_tiff will not take; to be asked before long work."""
    if mpp is not None and not 1e-3 <= mpp <= 1e7:
        raise UserError(f"mpp={mpp}: give micrometres per pixel, 0.5 for a 20x scan, or None if unknown")
    if Path(path).is_dir():
        raise UserError(f"path: {path} is a folder: give the name of a file, as {path}/image.tif")

def header(sizes, tile, places, mpp, big):
    """How a TIFF begins: its header, then a directory per level. First in the file, for Pillow loses any above 4 GB."""
    out = b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" if big else b"II*\0\x08\0\0\0"
    for level, (h, w) in enumerate(sizes):
        tags = dict(subfile=(LONG, [int(level > 0)]), width=(LONG, [w]), height=(LONG, [h]), bits=(SHORT, [8, 8, 8]),
                    bands=(SHORT, [3]), compression=(SHORT, [7]), colours=(SHORT, [6]), planar=(SHORT, [1]),
                    chroma=(SHORT, [1, 1]), tile_width=(LONG, [tile]), tile_height=(LONG, [tile]),  # JPEG, whole YCbCr
                    offsets=(LONG8 if big else LONG, places[level][0]), lengths=(LONG, places[level][1]))
        if mpp:
            dots = 1e4 / (mpp * 2**level)                                      # pixels per cm, as a fraction
            below = int(2**31 / max(1, dots))
            tags["x_dots"] = tags["y_dots"] = RATIONAL, [round(dots * below), below]
            tags["dots_unit"] = SHORT, [3]
        end = len(out) + len(pack_directory(tags, len(out), 0, big))           # where the next one begins
        out += pack_directory(tags, len(out), end if level + 1 < len(sizes) else 0, big)
    return out

# ----- 3. DeepZoom: NAME.dzi and NAME_files/, as other tools write them, and a page to look at it -----

def beside(path):
    """What lies beside NAME.dzi: the folder of tiles, the page, and the viewer that the page opens."""
    return path.with_name(f"{path.stem}_files"), path.with_suffix(".html"), path.with_name("openseadragon.min.js")

def check_deepzoom(path, viewer=None):
    """out: the path of the .dzi, in full, and the viewer's, None if there is none. raises: UserError if write_deepzoom
    will not take them, or would write over what is none of ours; to be asked early."""
    path, found = Path(path).resolve(), Path(viewer or VIEWER)
    if found.is_file() and MARK in found.read_bytes():
        viewer = found
    elif viewer is not None:
        raise UserError(f"viewer: {viewer} is not openseadragon: npm install openseadragon, or give --viewer=FILE")
    tiles, *more = beside(path)
    held = [p.name for p in tiles.iterdir()] if tiles.is_dir() else []
    ours = not path.is_dir() and not tiles.is_file()
    if held:
        ours = ours and path.is_file() and all(map(str.isdigit, held))         # its levels
    for page in more if viewer is not None else ():
        ours = ours and (not page.exists() or page.is_file() and MARK in page.read_bytes())
    if not ours:
        raise UserError(f"{path}: there are other things than a DeepZoom image of this name, in {tiles.name} or beside "
                        f"it: give another name")
    return path, viewer

def write_deepzoom(path, strips, size, tile=256, quality=90, viewer=None):
    """Write NAME.dzi and NAME_files/LEVEL/COLUMN_ROW.jpg; and, if there is a viewer, NAME.html, which opens from disk
    without a network. out: the names of what one opens.
    in:  path, which ends in .dzi; strips, size, tile, quality: as write_tiff; viewer, a file openseadragon.min.js, to
         be copied beside it (None: where `npm install openseadragon` puts it). What this wrote earlier is replaced in
         the end. Tiles do not overlap: the viewer closes the gaps, and a row needs no pixel of the next.
    raises: UserError as write_tiff and check_deepzoom."""
    sizes = level_sizes(size, tile, quality, 1)
    path, viewer = check_deepzoom(path, viewer)
    tiles, page, script = beside(path)
    tmp, old = (tiles.with_name(f".{tiles.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        tmp.mkdir(parents=True)
        for level, i, row in tile_rows(strips, sizes, tile):
            place = tmp / str(len(sizes) - 1 - level)                          # levels are counted from 1 x 1 upwards
            place.mkdir(exist_ok=True)
            for j in range(ceil(row.shape[1] / tile)):
                (place / f"{j}_{i}.jpg").write_bytes(jpeg(row[:, j * tile:j * tile + tile], quality))
        if tiles.exists():
            os.replace(tiles, old)
        os.replace(tmp, tiles)
        shutil.rmtree(old, ignore_errors=True)
        if viewer is not None and not script.exists():
            shutil.copyfile(viewer, script)
    except OSError as err:
        raise UserError(f"could not write {path}: {err}; check free space and permissions") from err
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    H, W = sizes[0]
    write_text(path, DZI % (tile, W, H))
    if viewer is None:
        return [path.name]
    write_text(page, PAGE % (escape(path.stem), tile, W, H, quote(tiles.name)))
    return [path.name, page.name]
