#!/bin/sh
# slideio's read_block averages for a factor of 2 and samples for any other: a block 16 times smaller is noise.
#
# Guess: read_block(rect, size) averages what falls into an output pixel, as other slide readers' pyramids do.
# What is: it takes two pixels a side around the centre, whatever the factor (one, where the factor is odd). Exact means
#   come out for 2 alone.
# Versions: slideio 2.10.0, tifffile 2026.3.3, imagecodecs 2026.3.6, numpy 2.4.6; a tiled TIFF of one level, driver GDAL.
# Seen, uniform noise (deviation 73.9), deviation after shrinking against that of the means:
#   factor  2: 36.9, means 36.9
#   factor  3: 74.0, means 24.7
#   factor  4: 37.1, means 18.5
#   factor 16: 37.3, means  4.6
# Why it matters: patches of a low zoom read through it alias (nuclei turn into grain), and differ from patches of the
#   pyramid's own levels; a model that is trained on one meets the other. Read at factor 2 and halve by hand.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q slideio==2.10.0 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
import slideio
import tifffile

picture = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
tifffile.imwrite("slide.tif", picture, tile=(256, 256), compression="deflate", photometric="rgb")
scene = slideio.open_slide("slide.tif", "GDAL").get_scene(0)
for factor in (2, 3, 4, 16):
    side = 512 // factor
    span = side * factor
    seen = scene.read_block((0, 0, span, span), size=(side, side)).astype(float)
    cells = picture[:span, :span].reshape(side, factor, side, factor, 3).astype(float)
    means = cells.mean((1, 3))
    first, last = (factor - 1) // 2, factor // 2 + 1
    middle = cells[:, first:last, :, first:last].mean((1, 3))
    print(f"factor {factor:2}: {seen.std():.1f}, means {means.std():4.1f}")
    assert np.abs(seen - middle).max() <= 1
    assert factor == 2 or np.abs(seen - means).mean() > 20
PY
