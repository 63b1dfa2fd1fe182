"""Toy slides: numpy draws something like stained tissue, so that everything can be tried without a download.

Level lines of smooth random fields cut the slide into background, stroma, tumour and fat; each gets its texture and
its nuclei; two dyes then absorb light. Coarse scales show how the regions lie, fine scales fibres and nuclei, which is
what a multi-scale model is for. Where the regions and nuclei are is kept, so that claims can be checked.

in:  a seed   out: image (size,size,3) uint8, region (size/4,size/4) uint8, nuclei (n,3)
run: python toy.py out/toy_slide.png     read next: data.py
"""
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError, atomic, cli

TISSUES = ("background", "stroma", "tumour", "fat")


# ----- 1. Random fields and marks -----

def spline(control, factor):
    """Up-sample by a uniform cubic B-spline: (n+3,m+3) control values -> (n*factor,m*factor), smooth everywhere."""
    u = ((np.arange(factor, dtype=np.float32) + 0.5) / factor)[:, None]
    w = np.concatenate([(1 - u)**3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3], 1) / 6  # (f,4)
    for _ in range(2):  # the rows, then by transposing the columns
        n = len(control) - 3
        control = sum(control[k:k + n, None] * w[:, k, None] for k in range(4)).reshape(n * factor, -1).T
    return np.ascontiguousarray(control)


def enlarge(a, factor):
    """(n,n) -> (n*factor,n*factor), smooth."""
    return spline(np.pad(a, ((1, 2), (1, 2)), mode="edge"), factor)


def field(rng, size, cell):
    """Smooth random field (size,size), deviation about 1, its bumps about `cell` pixels apart."""
    n = -(-size // cell) + 3
    return spline(rng.standard_normal((n, n), dtype=np.float32) * 2.1, cell)[:size, :size]


def distance(f, share):
    """Signed distance in pixels, > 0 inside, to the level line of `f` that has `share` of the area above it.

    in:  f at quarter resolution. out: full resolution.
    """
    f = f - np.quantile(f, 1 - share).astype(np.float32)
    gy, gx = np.gradient(f)
    return enlarge(np.clip(4 * f / (np.hypot(gx, gy) + 0.02 * f.std()), -60, 60), 4)


def strands(rng, angle):
    """Noise (n,n) smeared along the flow `angle` (n,n), ever further: fibres that follow it."""
    n = len(angle)
    f = rng.standard_normal((n, n), dtype=np.float32)
    y, x = np.mgrid[:n, :n].astype(np.float32)
    for step in (1, 2, 4, 8, 12):
        dy, dx = step * np.sin(angle), step * np.cos(angle)
        f = f + sum(f[np.clip(np.rint(y + k * dy), 0, n - 1).astype(np.int32),
                      np.clip(np.rint(x + k * dx), 0, n - 1).astype(np.int32)] for k in (-1, 1))
        f /= f.std()
    return f


def walls(rng, n, cell):
    """Distance (n,n) to the nearest bent wall between Voronoi cells about `cell` pixels wide: fat cells."""
    k = int(np.ceil(n / cell)) + 2
    py, px = ((np.mgrid[:k, :k] - 1 + rng.uniform(0.1, 0.9, (2, k, k))) * cell).astype(np.float32)  # one seed a square
    y, x = np.mgrid[:n, :n].astype(np.float32)
    y, x = y + 3 * field(rng, n, 16), x + 3 * field(rng, n, 16)
    cy, cx = (np.clip(v // cell + 1, 1, k - 2).astype(np.int32) for v in (y, x))
    first, second = np.full((2, n, n), 1e9, np.float32)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            d = np.hypot(y - py[cy + i, cx + j], x - px[cy + i, cx + j])
            first, second = np.minimum(first, d), np.minimum(second, np.maximum(first, d))
    return second - first


def scatter(rng, angle, chance, spacing, radius, spread, ratio, depth, along=False):
    """Nuclei (n,6) = x, y, half axes, angle, depth: a jittered hexagonal grid, thinned to `chance` (size,size)."""
    size = len(angle)
    y, x = np.mgrid[0:size:spacing * 0.87, 0:size:spacing]
    x = x + spacing / 2 * (np.arange(len(x)) % 2)[:, None]
    p = np.stack([x, y], -1).reshape(-1, 2) + rng.uniform(-0.36, 0.36, (x.size, 2)) * spacing
    p = p[((p >= 0) & (p < size)).all(1)]
    p = p[rng.random(len(p)) < chance[tuple(p.T[::-1].astype(int))]]
    n = len(p)
    r = radius * np.exp(spread * rng.standard_normal(n))
    k = np.sqrt(np.maximum(ratio * np.exp(0.15 * rng.standard_normal(n)), 1))
    turn = angle[tuple(p.T[::-1].astype(int))] + 0.25 * rng.standard_normal(n) if along else rng.uniform(0, np.pi, n)
    return np.stack([*p.T, np.minimum(r * k, 13), r / k, turn, depth * rng.uniform(0.75, 1.2, n)], 1).astype(np.float32)


def stamp(nuclei, size, reach=14):
    """Draw soft ellipses with a darker rim on a canvas (size,size); where two overlap the deeper one wins."""
    x, y, a, b, angle, depth = nuclei.T[:, :, None, None]                      # (n,1,1) each
    grid = np.arange(-reach, reach + 1)
    ix, iy = np.floor(x).astype(int) + grid, np.floor(y).astype(int) + grid[:, None]
    u, v, c, s = ix + np.float32(0.5) - x, iy + np.float32(0.5) - y, np.cos(angle), np.sin(angle)
    r = np.hypot((u * c + v * s) / a, (v * c - u * s) / b)                     # (n,29,29), 1 on the rim
    ink = np.clip((1 - r) * b / 1.6 + 0.5, 0, 1) * depth * (0.8 + 0.3 * np.minimum(r, 1)**3)
    keep = (ink > 0.02) & (ix >= 0) & (ix < size) & (iy >= 0) & (iy < size)
    canvas = np.zeros(size * size, np.float32)
    np.maximum.at(canvas, (iy * size + ix)[keep], ink[keep].astype(np.float32))
    return canvas.reshape(size, size)


def stain(rng, haem, eosin, mottle):
    """Two dyes (h,w) absorb light (Beer-Lambert), more or less of each from slide to slide. out: (h,w,3) uint8."""
    haem, eosin = haem * rng.uniform(0.85, 1.15), eosin * rng.uniform(0.8, 1.2)
    dye = np.array([[0.66, 0.70, 0.28], [0.10, 0.85, 0.34]]) + rng.uniform(-0.045, 0.045, (2, 3))
    white, image = 243 + rng.uniform(-3, 3), np.empty((*haem.shape, 3), np.uint8)
    for c, (h, e) in enumerate(dye.T.astype(np.float32)):
        image[..., c] = np.rint(np.float32(white) * np.exp(-h * haem - e * eosin) + 1.2 * mottle)
    return image


# ----- 2. The slide -----

def toy_slide(seed, size=1024):
    """Draw one synthetic slide.

    in:  seed >= 0; size, a multiple of 64. out: image (size,size,3) uint8; region (size/4,size/4) uint8, indices of
    TISSUES; nuclei (n,3) float32: x, y, mean radius in pixels. The same seed and size give the same slide.
    """
    rng, q = np.random.default_rng([seed, size]), size // 4
    # regions: level lines of smooth fields at quarter resolution; a rim of stroma stays around tumour and fat
    hill = field(rng, q, 52) + 0.35 * field(rng, q, 18)
    tissue = distance(field(rng, q, 72) + 0.35 * field(rng, q, 24), rng.uniform(0.6, 0.97))
    tumour = np.minimum(distance(hill, rng.uniform(0.15, 0.55)), tissue - 9)
    fat = np.minimum(distance(field(rng, q, 64) + 0.35 * field(rng, q, 20), rng.uniform(0.05, 0.4)), tissue - 7)
    fat = np.minimum(fat, -tumour - 10)
    in_tissue, in_tumour, in_fat = (np.clip(d / 2 + 0.5, 0, 1) for d in (tissue, tumour, fat))  # anti-aliased masks
    # stroma: wavy strands that wrap around the tumour, with pale clefts
    gy, gx = np.gradient(hill + 0.8 * field(rng, q, 40))
    steep = np.hypot(gx, gy) + 1e-3
    angle = np.arctan2(enlarge(gx / steep, 2), enlarge(-gy / steep, 2))
    angle += 0.5 * field(rng, size // 2, 32) + 0.25 * field(rng, size // 2, 12)
    strand, angle = enlarge(strands(rng, angle), 2), angle.repeat(2, 0).repeat(2, 1)
    mottle = enlarge(rng.standard_normal((size // 2, size // 2), dtype=np.float32), 2)
    grain, thick = field(rng, size, 8), field(rng, size, 64)
    eosin = 0.46 + 0.10 * strand + 0.06 * thick + 0.03 * mottle
    eosin = np.maximum(eosin * (1 - 0.6 * np.clip(0.25 * thick - strand - 1.1, 0, 1)), 0.05)
    haem = 0.07 + 0.02 * grain
    # tumour: violet cytoplasm; fat: empty cells behind thin membranes
    eosin += in_tumour * (0.42 + 0.05 * grain + 0.04 * mottle - eosin)
    haem += in_tumour * (0.24 + 0.05 * grain + 0.03 * mottle - haem)
    membrane = np.exp(-(enlarge(walls(rng, size // 2, rng.integers(22, 32)), 2) / 1.7)**2)
    eosin += in_fat * (0.02 + 0.42 * membrane - eosin)
    haem += in_fat * (0.01 + 0.10 * membrane - haem)
    # nuclei: tumour, spindles along the fibres, clusters of lymphocytes, a few on fat membranes
    plain, big = (tissue > 4) & (tumour < -3) & (fat < -2), rng.uniform(4.6, 6.4)
    crowd = np.clip(0.28 * field(rng, size, 96) + rng.uniform(0.45, 0.95), 0.12, 1)
    nuclei = np.concatenate([
        scatter(rng, angle, (tumour > 3) * crowd, 2.45 * big, big, 0.17, 1.25, 0.85),
        scatter(rng, angle, plain * np.clip(0.4 + 0.25 * thick, 0.08, 1), 22, 3.8, 0.15, 4.0, 0.85, along=True),
        scatter(rng, angle, (plain & (field(rng, size, 110) > 1.7)) * 0.8, 10.5, 3.4, 0.08, 1.05, 1.1),
        scatter(rng, angle, ((fat > 2) & (membrane > 0.8)) * 0.1, 9, 2.8, 0.12, 2.2, 0.9)])
    ink = stamp(nuclei, size)
    haem += 1.05 * ink * (1 + 0.10 * mottle + 0.08 * grain)
    eosin *= 1 - 0.35 * np.minimum(ink, 1)
    tint = in_tissue * (1 + 0.08 * field(rng, size, 256))
    image = stain(rng, haem * tint, eosin * tint, mottle)
    region = np.select([in_tissue < 0.5, in_tumour > 0.5, in_fat > 0.5], [0, 2, 3], 1)[2::4, 2::4].astype(np.uint8)
    return image, region, np.stack([*nuclei.T[:2], np.sqrt(nuclei[:, 2] * nuclei[:, 3])], 1)


def main(argv):
    path = Path(argv[0] if argv else "out/toy_slide.png")
    if len(argv) > 1 or path.suffix != ".png":
        raise UserError(f"got {' '.join(argv)!r}: write python toy.py FILE.png")
    image, region, nuclei = toy_slide(0)
    with atomic(path) as tmp:
        Image.fromarray(image).save(tmp, "PNG")
    areas = ", ".join(f"{t} {(region == k).mean():.0%}" for k, t in enumerate(TISSUES))
    print(f"{path}: {areas}; {len(nuclei)} nuclei")


if __name__ == "__main__":
    cli(main)
