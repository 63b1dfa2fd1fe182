#!/bin/sh
# libvips reads a TIFF of separate planes in strips from the wrong rows, if its photometric is MINISBLACK.
#
# Guess: libvips puts planes together or refuses them: it says "tiled separate planes not supported" for tiles.
# What is: for strips with photometric MINISBLACK it joins the planes, then steps on by the length of one plane's row
#   instead of that of all bands. With N bands row y begins where row y / N is: the top Nth of each strip is drawn over
#   the strip's whole height, shifted by parts of a row, and where N does not divide the width the bands are mixed too.
#   No error, also not with fail_on="error" or in sequential access. Compression makes no difference.
# Versions: pyvips 3.2.0 with pyvips-binary 8.18.7, tifffile 2026.3.3, imagecodecs 2026.3.6, rasterio 1.4.4
#   (GDAL 3.10.3), numpy 2.4.6.
# Seen (band k holds 50 k + row; 64 rows of 64 pixels; column 0 of band 0 in rows 0, 20, 40, 60; share of right values):
#   bands  strips of  photometric  libvips       right    tifffile and GDAL
#       2    64 rows  MINISBLACK    0 10 20 30     2 %     0 20 40 60
#       4    64 rows  MINISBLACK    0 5 10 15      2 %     0 20 40 60
#       4    16 rows  MINISBLACK    0 17 34 51     8 %     0 20 40 60
#       5    64 rows  MINISBLACK    0 4 8 12       2 %     0 20 40 60
#       4    64 rows  RGB           0 20 40 60   100 %     0 20 40 60
# Why it matters: rasterio's interleave="band" (also of a copied profile) writes this for five and more bands of aerial
#   pictures, and tifffile's planarconfig="separate" for the channels of fluorescence slides. Thumbnails and tiles made
#   by libvips look like pictures, but show the top only and no longer lie under their labels.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q pyvips==3.2.0 pyvips-binary==8.18.7 tifffile==2026.3.3 imagecodecs==2026.3.6 \
    rasterio==1.4.4 numpy==2.4.6
VIPS_CONCURRENCY=1 venv/bin/python -W ignore - <<'PY'
import numpy as np
import pyvips
import rasterio
import tifffile

y = np.mgrid[:64, :64][0]
cases = [(2, 64, "minisblack"), (4, 64, "minisblack"), (4, 16, "minisblack"), (5, 64, "minisblack"), (4, 64, "rgb")]
places = {(2, 64): [0, 10, 20, 30], (4, 64): [0, 5, 10, 15], (4, 16): [0, 17, 34, 51], (5, 64): [0, 4, 8, 12]}
for number, (count, rows, photometric) in enumerate(cases):
    bands = np.stack([50 * k + y for k in range(count)]).astype(np.uint16)
    joined = bands.transpose(1, 2, 0)
    for compression in (None, "deflate"):
        name = f"{number}_{compression}.tif"
        tifffile.imwrite(name, bands, photometric=photometric, planarconfig="separate", rowsperstrip=rows,
                         compression=compression, metadata=None)
        with rasterio.open(name) as file:
            assert (file.read() == bands).all()
        assert (tifffile.imread(name) == bands).all()
        seen = pyvips.Image.new_from_file(name, fail_on="error").numpy()
        again = pyvips.Image.new_from_file(name, access="sequential").numpy()
        assert seen.shape == joined.shape and (seen == again).all()
        right = 100 * float((seen == joined).mean())
        line = seen[[0, 20, 40, 60], 0, 0].tolist()
        if photometric == "rgb":
            assert right == 100
        else:
            assert right < 10 and line == places[count, rows]
            starts = np.stack([joined[s:s + rows].ravel()[64 * r:64 * (r + count)].reshape(64, count)
                               for s in range(0, 64, rows) for r in range(rows)])
            assert (seen == starts).all()
        if compression is None:
            print(f"{count} bands, strips of {rows}, {photometric:10}  libvips", *line, f"  {right:3.0f} % right")
tifffile.imwrite("tiled.tif", bands, photometric="minisblack", planarconfig="separate", tile=(64, 64), metadata=None)
try:
    pyvips.Image.new_from_file("tiled.tif").numpy()
    raise SystemExit("tiles of separate planes are read now")
except pyvips.Error as error:
    print("tiled:", str(error).split("\n")[1].strip())
    assert "tiled separate planes not supported" in str(error)
with rasterio.open("by_gdal.tif", "w", driver="GTiff", width=64, height=64, count=5, dtype="uint8",
                   interleave="band") as file:
    file.write(np.stack([20 * k + y for k in range(5)]).astype(np.uint8))
seen = pyvips.Image.new_from_file("by_gdal.tif").numpy()
print("5 bands by rasterio, interleave='band':", *seen[[0, 20, 40, 60], 0, 0])
assert seen[[0, 20, 40, 60], 0, 0].tolist() == [0, 4, 8, 12]
PY
