#!/bin/sh
# The square (10,10) to (20,20) of an annotation becomes 121 pixels in Pillow, OpenCV and scikit-image, 100 in rasterio.
#
# Guess: a square of 10 by 10 covers 100 pixels in every library, give or take the rule for pixels on the border.
# What is: annotations (GeoJSON, QuPath, ASAP) give corners of pixels. Pillow, OpenCV and scikit-image take the numbers
#   for pixel centres and fill the border as well: a row and a column too many, on the right and at the bottom, so the
#   mask also lies half a pixel off. rasterio takes corners and fills a pixel if its centre lies inside.
# Versions: pillow 13.0.0, opencv-python-headless 5.0.0.93, scikit-image 0.26.0, rasterio 1.4.4, numpy 2.4.6.
# Seen, pixels and area above the true one, squares of 10 and of 4 (the same at 1/2.5 of the size):
#   ImageDraw.polygon     121  21 %      25  56 %
#   cv2.fillPoly          121  21 %      25  56 %
#   skimage.draw.polygon  121  21 %      25  56 %
#   rasterio.features     100   0 %      16   0 %
# Why it matters: a mask drawn at a low level of a slide is larger than the same one drawn at level 0 and halved, two
#   neighbouring annotations overlap, and a Dice score between masks of two libraries is 0.905 for the same square.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q pillow==13.0.0 opencv-python-headless==5.0.0.93 scikit-image==0.26.0 rasterio==1.4.4 numpy==2.4.6
venv/bin/python - <<'PY'
import cv2
import numpy as np
import rasterio.features
import skimage.draw
from PIL import Image, ImageDraw


def by_pillow(corners):
    mask = Image.new("L", (40, 40))
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    return np.array(mask)


def by_opencv(corners):
    return cv2.fillPoly(np.zeros((40, 40), np.uint8), [np.array(corners, np.int32)], 1)


def by_skimage(corners):
    x, y = np.array(corners).T
    mask = np.zeros((40, 40), np.uint8)
    mask[skimage.draw.polygon(y, x)] = 1
    return mask


def by_rasterio(corners):
    ring = {"type": "Polygon", "coordinates": [[*corners, corners[0]]]}
    return rasterio.features.rasterize([(ring, 1)], out_shape=(40, 40))


expected = {"ImageDraw.polygon": (by_pillow, 121, 25), "cv2.fillPoly": (by_opencv, 121, 25),
            "skimage.draw.polygon": (by_skimage, 121, 25), "rasterio.features": (by_rasterio, 100, 16)}
masks = []
for name, (draw, large, small) in expected.items():
    line = f"{name:20}"
    for side, pixels in ((10, large), (4, small)):
        mask = draw([(10, 10), (10 + side, 10), (10 + side, 10 + side), (10, 10 + side)])
        count = int(mask.sum())
        line += f"  {count:4} {100 * (count / side ** 2 - 1):3.0f} %    "
        assert count == pixels
        assert mask[10:10 + side, 10:10 + side].all()
        if side == 10:
            masks.append(mask)
    print(line)
dice = 2 * int((masks[0] & masks[3]).sum()) / int(masks[0].sum() + masks[3].sum())
print(f"Dice of Pillow's and rasterio's mask: {dice:.3f}")
PY
