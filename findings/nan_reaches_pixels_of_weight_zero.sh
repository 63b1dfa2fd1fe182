#!/bin/sh
# An identity grid_sample turns one nan pixel into four, bicubic into sixteen; interpolate does likewise.
#
# Guess: a resampling that moves nothing gives the picture back; a nan touches those outputs whose weight for it is not 0.
# What is: torch multiplies the neighbours of weight 0 too, and 0 * nan is nan. interpolate at its own size copies for
#   bilinear but not for bicubic; to 2n - 1 with align_corners, where every second output is an input pixel, 16 pixels
#   are nan instead of 9. OpenCV's warpAffine and scipy's shift by one whole pixel spread it as well (4 and 6 pixels).
# Versions: torch 2.13.0, scipy 1.17.1, opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Seen, nan pixels of a 4x4 picture with one nan at (2,2):
#   grid_sample, identity:   nearest 1, bilinear 4, bicubic 16
#   interpolate 4 -> 4:      bilinear 1, bicubic 16
#   interpolate 4 -> 7, align_corners: 16
#   moved by one pixel:      cv2.warpAffine 4, scipy.ndimage.shift 6 (order 1)
# Why it matters: float rasters mark missing ground by nan, and masks are applied after warping, for "the weight is 0
#   there". A single missing pixel eats its neighbours with every warp, and a loss over a warped picture becomes nan.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 scipy==1.17.1 opencv-python-headless==5.0.0.93 numpy==2.4.6
venv/bin/python - <<'PY'
import cv2
import numpy as np
import scipy.ndimage
import torch
from torch.nn.functional import affine_grid, grid_sample, interpolate

x = torch.zeros(1, 1, 4, 4)
x[..., 2, 2] = float("nan")


def holes(y):
    return int(np.isnan(np.asarray(y)).sum())


identity = affine_grid(torch.eye(2, 3)[None], (1, 1, 4, 4), align_corners=False)
sampled = [holes(grid_sample(x, identity, mode=m, align_corners=False)) for m in ("nearest", "bilinear", "bicubic")]
same = [holes(interpolate(x, (4, 4), mode=m)) for m in ("bilinear", "bicubic")]
doubled = holes(interpolate(x, (7, 7), mode="bilinear", align_corners=True))
picture = x[0, 0].numpy()
moved = holes(cv2.warpAffine(picture, np.float32([[1, 0, 1], [0, 1, 0]]), (4, 4)))
shifted = holes(scipy.ndimage.shift(picture, (1, 0), order=1))
print("grid_sample, identity: nearest, bilinear, bicubic", sampled)
print("interpolate 4 -> 4: bilinear, bicubic", same)
print("interpolate 4 -> 7, align_corners:", doubled)
print("moved by one pixel: cv2.warpAffine", moved, "scipy.ndimage.shift", shifted)
assert sampled == [1, 4, 16]
assert same == [1, 16]
assert doubled == 16
assert moved == 4 and shifted == 6
PY
