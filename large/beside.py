"""Pictures side by side under their names: a drawn image beside the real region and its context.

in:  pictures (H,W,3) uint8 of any sizes   out: one PNG     read next: large/enlarge.py"""
import numpy as np
from PIL import Image, ImageDraw

from common import save_png

SIDE = 768     # pixels of the longer side of a picture, at most, unless another is asked for
LABEL = 16     # rows for the names
MOST = 2048    # pixels a side up to which a drawn image is shown beside others: it is held in memory for that

def save_beside(path, pictures, names, side=SIDE):
    """Write pictures in a row, all as large as the largest (at most `side`), each under its name."""
    height, width = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    shrink = min(1, side / max(height, width))
    height, width = round(height * shrink), round(width * shrink)
    sheet = Image.new("RGB", ((width + 4) * len(pictures) - 4, height + LABEL), "white")
    for k, (pixels, name) in enumerate(zip(pictures, names)):
        left = k * (width + 4)
        sheet.paste(Image.fromarray(pixels).resize((width, height), Image.BICUBIC), (left, LABEL))
        ImageDraw.Draw(sheet).text((left + 2, 2), name, fill="black")
    save_png(path, sheet)

def real_region(pyramids, k, s, at, size):
    """The pixels (h,w,3) uint8 of slide k under an image of size (H,W) at scale s that begins at base tile `at`; at the
    finest scale from s on of which the folder holds every patch there; None if it holds them at none."""
    P = pyramids.patch
    for coarser in range(s, pyramids.scales):
        zoom = 2 ** (coarser - s)
        if any(n % zoom for n in size):
            return None
        h, w = (n // zoom for n in size)
        top, left = (a * P >> coarser for a in at)
        found = np.zeros((h, w, 3), np.uint8)
        missing = h * w
        if pyramids.slides[k]["counts"][coarser]:
            x, ij = pyramids.tensor(k, f"x{coarser}"), pyramids.tensor(k, f"ij{coarser}")
            for n, (i, j) in enumerate((ij * P - ij.new_tensor([top, left])).tolist()):    # the patch's corner
                up, down, west, east = max(i, 0), min(i + P, h), max(j, 0), min(j + P, w)
                if up < down and west < east:
                    found[up:down, west:east] = x[n, up - i:down - i, west - j:east - j].numpy()
                    missing -= (down - up) * (east - west)
        if missing == 0:
            return found
    return None
