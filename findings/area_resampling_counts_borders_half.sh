#!/bin/sh
# torch's interpolate(mode="area") from 10 to 8 gives the border pixels half the weight of the others.
#
# Guess: "area" weighs every input pixel by the area it shares with an output pixel, so all count alike, as in OpenCV.
# What is: it is adaptive average pooling: whole pixels in windows that overlap where sizes do not divide. Of 10 pixels
#   the first, the last and the two in the middle count once in a window of two, the others twice.
# Versions: torch 2.13.0, opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Seen, what a pixel of value 1 adds to the sum of 8 outputs, by its place:
#   torch area      0.50 1.00 1.00 1.00 0.50 0.50 1.00 1.00 1.00 0.50
#   adaptive pool   0.50 1.00 1.00 1.00 0.50 0.50 1.00 1.00 1.00 0.50
#   cv2.INTER_AREA  0.80 0.80 0.80 0.80 0.80 0.80 0.80 0.80 0.80 0.80
# Why it matters: grids of embeddings of slides are pooled to a fixed size and seldom divide. The mean of the grid changes,
#   features at the seams are blurred over two cells, and counts (cells in a tile) are not kept.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
venv/bin/python - <<'PY'
import cv2
import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate


def by_torch(x):
    return interpolate(torch.from_numpy(x)[None, None], (1, 8), mode="area")


def by_pool(x):
    return adaptive_avg_pool2d(torch.from_numpy(x)[None, None], (1, 8))


def by_opencv(x):
    return cv2.resize(x, (8, 1), interpolation=cv2.INTER_AREA)


weights = {}
for name, resize in (("torch area", by_torch), ("adaptive pool", by_pool), ("cv2.INTER_AREA", by_opencv)):
    weights[name] = [float(resize(row[None]).sum()) for row in np.eye(10, dtype=np.float32)]
    print(f"{name:15}", " ".join(f"{w:.2f}" for w in weights[name]))
assert np.allclose(weights["torch area"], [0.5, 1, 1, 1, 0.5, 0.5, 1, 1, 1, 0.5])
assert np.allclose(weights["adaptive pool"], weights["torch area"])
assert np.allclose(weights["cv2.INTER_AREA"], 0.8)
PY
