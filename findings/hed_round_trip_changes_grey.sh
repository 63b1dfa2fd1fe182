#!/bin/sh
# scikit-image's hed2rgb(rgb2hed(x)) does not give x back: background of slides turns green-less, pale pinks shift.
#
# Guess: separating stains and putting them together again is exact to rounding, for it is a 3x3 matrix and its inverse.
# What is: rgb2hed sets negative amounts of stain to 0 before it returns. Grey, many pale pinks and all colours outside
#   the cone of the three stains have one. So grey 230 comes back as (229,222,229).
# Versions: scikit-image 0.26.0, numpy 2.4.6.
# Seen:
#   white (255,255,255) -> (255,255,255)
#   background (230,230,230) -> (229,222,229)
#   eosin (230,150,190) -> (227,148,189)
#   haematoxylin (90,60,140) -> (90,60,140)
#   all colours of 180-255, 120-255, 160-255 in steps of 5: 74 % change by more than 1, by up to 111
# Why it matters: stain augmentation in HED space is said to be the identity at strength 0. It is not: augmented patches
#   all lose the same part of the colour space, and unaugmented test patches keep it.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q scikit-image==0.26.0 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
from skimage.color import hed2rgb, rgb2hed


def round_trip(rgb):
    return np.round(hed2rgb(rgb2hed(rgb)) * 255).astype(int)


expected = {"white": ((255, 255, 255), (255, 255, 255)), "background": ((230, 230, 230), (229, 222, 229)),
            "eosin": ((230, 150, 190), (227, 148, 189)), "haematoxylin": ((90, 60, 140), (90, 60, 140))}
for name, (colour, after) in expected.items():
    seen = tuple(round_trip(np.array([[colour]], np.uint8))[0, 0].tolist())
    print(name, colour, "->", seen)
    assert seen == after
axes = np.meshgrid(np.arange(180, 256, 5), np.arange(120, 256, 5), np.arange(160, 256, 5))
pinks = np.stack(axes, -1).reshape(1, -1, 3).astype(np.uint8)
error = np.abs(round_trip(pinks) - pinks).max(-1)
print(f"pale colours: {100 * (error > 1).mean():.0f} % change by more than 1, by up to {error.max()}")
assert 0.6 < (error > 1).mean() < 0.9 and error.max() > 50
PY
