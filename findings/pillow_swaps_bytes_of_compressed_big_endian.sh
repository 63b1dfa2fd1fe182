#!/bin/sh
# Pillow swaps the bytes of a compressed TIFF of big-endian order if its numbers are float32, int16 or int32.
#
# Guess: a TIFF says its byte order in its first two letters, and compression does not change what the numbers are.
# What is: libtiff, which Pillow uses for compressed files only, gives the numbers in the order of the machine. Pillow
#   knows that for uint16, but takes signed and float numbers for big-endian still and swaps them a second time. No
#   error, no warning. Without compression, or in little-endian order, the same numbers are right.
# Versions: pillow 13.0.0, tifffile 2026.3.3, imagecodecs 2026.3.6, rasterio 1.4.4 (GDAL 3.10.3), pyvips 3.2.0 with
#   pyvips-binary 8.18.7, numpy 2.4.6. On a little-endian machine.
# Seen, deflate, big-endian; tifffile, GDAL and libvips give the written numbers; LZW is the same as deflate:
#   written                       Pillow
#   float32  0.5 1 100 -9999      8.8e-44 4.6e-41 7.2e-41 5.5e-39
#   int16    1 2 300 -1000        256 512 11265 6396
#   int32    1 2 70000 -1000      16777216 33554432 1880162560 419233791
#   uint16   1 2 300 60000        1 2 300 60000
# Why it matters: Java software often writes big-endian order (ImageJ does), and heights, probabilities and normalised
#   stains are float32. A loader by Pillow trains on numbers near zero (a mask of probabilities above 0.5 is empty), or
#   on noise for int16, while the same folder saved without compression is right.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q pillow==13.0.0 tifffile==2026.3.3 imagecodecs==2026.3.6 rasterio==1.4.4 \
    pyvips==3.2.0 pyvips-binary==8.18.7 numpy==2.4.6
VIPS_CONCURRENCY=1 venv/bin/python -W ignore - <<'PY'
import numpy as np
import pyvips
import rasterio
import tifffile
from PIL import Image

rows = {"float32": [0.5, 1, 100, -9999], "int16": [1, 2, 300, -1000], "int32": [1, 2, 70000, -1000],
        "uint16": [1, 2, 300, 60000]}
for kind, row in rows.items():
    written = np.tile(np.repeat(np.array(row, kind), 16), (64, 1))
    for order in "<>":
        for compression in (None, "deflate", "lzw"):
            name = f"{kind}_{'little' if order == '<' else 'big'}_{compression}.tif"
            tifffile.imwrite(name, written, byteorder=order, compression=compression, photometric="minisblack",
                             metadata=None)
            assert (tifffile.imread(name) == written).all()
            assert (pyvips.Image.new_from_file(name).numpy().reshape(64, 64) == written).all()
            with rasterio.open(name) as file:
                assert (file.read(1) == written).all()
            seen = np.array(Image.open(name))
            swapped = order == ">" and compression is not None and kind != "uint16"
            expected = written.byteswap() if swapped else written
            assert (seen == expected).all(), name
            if order == ">" and compression == "deflate":
                print(f"{kind:8}", *row, "    Pillow", *(f"{x:.2g}" if kind == "float32" else x for x in seen[0, ::16]))
PY
