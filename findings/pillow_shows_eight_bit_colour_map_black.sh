#!/bin/sh
# Pillow shows a TIFF with a colour map of eight-bit numbers as black.
#
# Guess: such a colour map looks alike in every reader: old software writes them, and libtiff's own tools look for them.
# What is: TIFF wants numbers up to 65535 in a colour map, but not all writers scale. If no number is above 255, GDAL,
#   libvips and OpenSlide take them as they are, as libtiff's tools do. Pillow takes number // 256, which is 0
#   throughout (its issue 2157 of 2016 tells this). tifffile gives the numbers of the file, in both cases.
# Versions: pillow 13.0.0, tifffile 2026.3.3, rasterio 1.4.4 (GDAL 3.10.3), pyvips 3.2.0 with pyvips-binary 8.18.7,
#   openslide-python 1.4.7 with openslide-bin 4.0.1.2, numpy 2.4.6.
# Seen, the colour of one pixel:
#                        numbers up to 65535     numbers up to 255
#   Pillow               200 100 50              0 0 0
#   GDAL                 200 100 50              200 100 50
#   libvips              200 100 50              200 100 50
#   OpenSlide            200 100 50              200 100 50
#   tifffile.colormap    51400 25700 12850       200 100 50
# Why it matters: label pictures, land-cover maps and scanned topographic sheets are kept as indices with a colour map.
#   convert("RGB"), as most loaders call it, gives black pictures without an error, and a folder of mixed origin has
#   some black ones only.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q pillow==13.0.0 tifffile==2026.3.3 rasterio==1.4.4 pyvips==3.2.0 \
    pyvips-binary==8.18.7 openslide-python==1.4.7 openslide-bin==4.0.1.2 numpy==2.4.6
VIPS_CONCURRENCY=1 venv/bin/python -W ignore - <<'PY'
import numpy as np
import openslide
import pyvips
import rasterio
import tifffile
from PIL import Image

indices = np.repeat(np.arange(16, dtype=np.uint8), 4) * np.ones((64, 1), np.uint8)
colours = np.zeros((3, 256), np.uint16)
colours[:, :16] = np.linspace((200, 100, 50), (255, 255, 255), 16).T
seen = {}
for factor in (257, 1):
    name = f"by_{factor}.tif"
    tifffile.imwrite(name, indices, photometric="palette", colormap=colours * factor, tile=(64, 64), metadata=None)
    pillow = np.array(Image.open(name).convert("RGB"))
    vips = pyvips.Image.new_from_file(name).numpy()
    slide = np.array(openslide.OpenSlide(name).read_region((0, 0), 0, (64, 64)))
    with rasterio.open(name) as file:
        table = file.colormap(1)
    gdal = np.array([table[i] for i in range(256)])[indices]
    with tifffile.TiffFile(name) as file:
        raw = file.pages[0].colormap
    true = colours.T[indices]
    assert (vips == true).all() and (gdal[..., :3] == true).all() and (slide[..., :3] == true).all()
    assert (raw == colours * factor).all()
    assert (pillow == (true if factor == 257 else 0)).all()
    seen[factor] = {"Pillow": pillow[0, 0], "GDAL": gdal[0, 0, :3], "libvips": vips[0, 0], "OpenSlide": slide[0, 0, :3],
                    "tifffile.colormap": raw[:, 0]}
for reader in seen[1]:
    print(f"{reader:19}", *(f"{' '.join(map(str, seen[factor][reader])):23}" for factor in (257, 1)))
PY
