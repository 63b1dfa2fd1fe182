#!/bin/sh
# A four-band tile copied by rasterio with the profile of its source has near-infrared for alpha, and water turns black.
#
# Guess: writing with the profile of the file that was read gives a file that says the same about its bands.
# What is: the profile tells neither the photometric nor what a band means, and for four bands of eight bits GDAL's
#   default is red, green, blue and alpha (ExtraSamples 2), though the source said "of no stated kind" (ExtraSamples 0).
#   GDAL's page of the format tells the default; that a copied profile falls into it is not to be seen. From then on
#   near-infrared is a mask: where it is 0, as on water, an averaged read, an averaged overview or a warp gives 0 in all
#   bands, and on shores the water does not count. Pillow opens the copy as RGBA and weighs the colours by near-infrared.
#   With photometric="RGB" given to the copy as well, or its colorinterp set, nothing of this happens.
# Versions: rasterio 1.4.4 (GDAL 3.10.3), tifffile 2026.3.3, pillow 13.0.0, numpy 2.4.6.
# Seen (water 10 30 90 and 0 in near-infrared, land 60 80 100 and 200; "shore" has lines of both by turns, halved):
#                         source: ExtraSamples 0     copy: ExtraSamples 2
#   full size, water      10 30 90 0                 10 30 90 0
#   average, water        10 30 90 0                 0 0 0 0
#   average, shore        35 55 95 100               60 80 100 100
#   overview, water       10 30 90 0                 0 0 0 0
#   overview, shore       35 55 95 100               60 80 100 200
#   WarpedVRT, water      10 30 90 0                 0 0 0 0
#   masked read, water    10                         masked
#   Pillow, mode          RGB                        RGBA
#   Pillow BOX, shore     35 55 95                   61 81 99 100
# Why it matters: NAIP and other aerial tiles are red, green, blue, near-infrared of eight bits, and copying the profile
#   is how rasterio's guide writes one raster like another. The copy is equal at full size, so a check of pixels passes;
#   what is trained on smaller scales or on warped tiles has black lakes and shores without water.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q rasterio==1.4.4 tifffile==2026.3.3 pillow==13.0.0 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
import rasterio
import tifffile
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT

WATER, LAND = (10, 30, 90, 0), (60, 80, 100, 200)
bands = np.empty((4, 128, 128), np.uint8)
bands[:] = np.array(LAND)[:, None, None]
bands[:, :, :64] = np.array(WATER)[:, None, None]
bands[:, ::2, 64:96] = np.array(WATER)[:, None, None]  # a shore: lines of water and of land
water, shore = (5, 5), (5, 40)  # row and column in the halved picture


def look(name):
    seen = {}
    with tifffile.TiffFile(name) as file:
        seen["ExtraSamples"] = int(file.pages[0].extrasamples[0])
    with rasterio.open(name) as file:
        seen["full size, water"] = file.read()[:, 5, 5].tolist()
        small = file.read(out_shape=(4, 64, 64), resampling=Resampling.average)
        with WarpedVRT(file, crs="EPSG:32617") as warped:
            middle = warped.read()[:, warped.height // 2, warped.width // 4]
        masked = file.read(1, masked=True)[5, 5]
    seen["average, water"], seen["average, shore"] = small[:, *water].tolist(), small[:, *shore].tolist()
    image = Image.open(name)
    pillow = image.resize((64, 64), Image.Resampling.BOX).getpixel(shore[::-1])
    with rasterio.open(name, "r+") as file:
        file.build_overviews([2], Resampling.average)
    with rasterio.open(name, overview_level=0) as file:
        small = file.read()
    seen["overview, water"], seen["overview, shore"] = small[:, *water].tolist(), small[:, *shore].tolist()
    seen["WarpedVRT, water"] = middle.tolist()
    seen["masked read, water"] = "masked" if masked is np.ma.masked else int(masked)
    seen["Pillow, mode"], seen["Pillow BOX, shore"] = image.mode, list(pillow)
    return seen


options = {"driver": "GTiff", "width": 128, "height": 128, "count": 4, "dtype": "uint8", "crs": "EPSG:32618",
           "transform": from_origin(500000, 4000128, 1, 1)}
with rasterio.open("source.tif", "w", photometric="RGB", **options) as file:
    file.write(bands)
with rasterio.open("source.tif") as file:
    profile = file.profile
for name, more in (("copy.tif", {}), ("careful.tif", {"photometric": "RGB"}), ("set.tif", {})):
    with rasterio.open(name, "w", **profile, **more) as file:
        if name == "set.tif":
            file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined]
        file.write(bands)
source, copy = look("source.tif"), look("copy.tif")
for key in source:
    print(f"{key:22}{source[key]!s:27}{copy[key]}")
assert source == look("careful.tif") == look("set.tif")
assert list(source.values()) == [0, [10, 30, 90, 0], [10, 30, 90, 0], [35, 55, 95, 100], [10, 30, 90, 0],
                                 [35, 55, 95, 100], [10, 30, 90, 0], 10, "RGB", [35, 55, 95]]
assert list(copy.values()) == [2, [10, 30, 90, 0], [0, 0, 0, 0], [60, 80, 100, 100], [0, 0, 0, 0],
                               [60, 80, 100, 200], [0, 0, 0, 0], "masked", "RGBA", [61, 81, 99, 100]]
PY
