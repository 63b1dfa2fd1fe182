#!/bin/sh
# torch's bicubic uses another kernel with antialias=True, even for enlarging, and agrees with Pillow only on uint8.
#
# Guess: antialias=True is a filter for shrinking, without effect on enlargement; bicubic is bicubic.
# What is: without it the kernel's parameter is -0.75, as in OpenCV; with it -0.5, as in Pillow. On float tensors even
#   then up to 18 grey values differ from Pillow, which clips to 0 ... 255 between its two passes.
# Versions: torch 2.13.0, pillow 13.0.0, opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Seen, noise of 256x256, largest difference in grey values (share of pixels that differ):
#                                   256 -> 512         256 -> 224
#   antialias, uint8 and Pillow      0  ( 0 %)         1  ( 1 %)
#   antialias, float and Pillow     18  (24 %)        18  (22 %)
#   plain, float and OpenCV          0  ( 0 %)         1  ( 0 %)
#   plain, float and Pillow         28  (92 %)        58  (97 %)
# Why it matters: encoders whose published preprocessing is Pillow's get other pixels from "the same" resize on tensors,
#   and a decoder's or super-resolution's bicubic baseline is one of two.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
venv/bin/python - <<'PY'
import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

picture = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
tensor = torch.from_numpy(picture)[None, None]


def by_torch(x, side, antialias):
    y = interpolate(x, (side, side), mode="bicubic", antialias=antialias)
    return y.clamp(0, 255).round()[0, 0].numpy().astype(int)


seen = {}
for side in (512, 224):
    pillow = np.array(Image.fromarray(picture).resize((side, side), Image.BICUBIC)).astype(int)
    opencv = cv2.resize(picture, (side, side), interpolation=cv2.INTER_CUBIC).astype(int)
    pairs = {"antialias, uint8 and Pillow": (by_torch(tensor, side, True), pillow),
             "antialias, float and Pillow": (by_torch(tensor.float(), side, True), pillow),
             "plain, float and OpenCV": (by_torch(tensor.float(), side, False), opencv),
             "plain, float and Pillow": (by_torch(tensor.float(), side, False), pillow)}
    for name, (a, b) in pairs.items():
        seen[name, side] = int(np.abs(a - b).max())
        print(f"256 -> {side}  {name:28} {seen[name, side]:3}  ({100 * (a != b).mean():.0f} %)")
for side in (512, 224):
    assert seen["antialias, uint8 and Pillow", side] <= 1
    assert seen["antialias, float and Pillow", side] > 10
    assert seen["plain, float and OpenCV", side] <= 1
    assert seen["plain, float and Pillow", side] > 20
PY
