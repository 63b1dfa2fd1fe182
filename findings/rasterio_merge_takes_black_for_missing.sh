#!/bin/sh
# rasterio.merge, method "first", replaces black pixels of the first raster by those of the second.
#
# Guess: a raster without a nodata value has no missing pixels, so where two overlap all pixels come from the first.
# What is: without nodata, 0 counts as missing. With nodata=255 in both files the zeros are kept.
# Versions: rasterio 1.4.4 (GDAL 3.10.3), numpy 2.4.6.
# Seen (two bands; first raster 9, but band 1 is 0 on its right half; second 50 throughout, from the middle on):
#   no nodata:  band 1: 9 9 50 50 50   band 2: 9 9 9 9 50
#   nodata 255: band 1: 9 9  0  0 50   band 2: 9 9 9 9 50
# Why it matters: aerial and satellite tiles of eight bits have true zeros (water in the near infrared, deep shadow), and
#   NAIP quarter quads overlap by 300 m or more. The mosaic then mixes two flights pixel by pixel, in one band and not in
#   the other, since each band is judged by itself.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q rasterio==1.4.4 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
import rasterio
from rasterio.merge import merge
from rasterio.transform import from_origin


def write(name, bands, left, nodata):
    place = from_origin(left, 64, 1, 1)
    with rasterio.open(name, "w", driver="GTiff", width=64, height=64, count=2, dtype="uint8",
                       transform=place, crs="EPSG:32618", nodata=nodata) as file:
        file.write(bands)


first = np.full((2, 64, 64), 9, np.uint8)
first[0, :, 32:] = 0  # band 1 is black on the right, band 2 is not
second = np.full((2, 64, 64), 50, np.uint8)
seen = {}
for nodata in (None, 255):
    write("first.tif", first, 0, nodata)
    write("second.tif", second, 32, nodata)
    mosaic, _ = merge(["first.tif", "second.tif"], method="first")
    seen[nodata] = mosaic[:, 0, [0, 31, 32, 63, 64]].tolist()
    print("nodata", nodata, "band 1:", seen[nodata][0], "band 2:", seen[nodata][1])
assert seen[None] == [[9, 9, 50, 50, 50], [9, 9, 9, 9, 50]]
assert seen[255] == [[9, 9, 0, 0, 50], [9, 9, 9, 9, 50]]
PY
