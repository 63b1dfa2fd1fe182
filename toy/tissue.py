"""Toy slides: numpy draws something like stained tissue, so that everything can be tried without a download.

Level lines of smooth random fields cut the slide into background, stroma, tumour and fat; each gets its texture and
its nuclei; two dyes then absorb light. Where the regions and nuclei are is kept, so that claims can be checked.
in:  a seed   out: image (size,size,3) uint8, region (size/4,size/4) uint8, nuclei (n,3)     read next: toy/make.py"""
import numpy as np
from numpy import arange, arctan2, clip, cos, exp, float32, gradient, hypot, maximum, mgrid, minimum, pi, rint, sin
from numpy import sqrt, stack, uint8

TISSUES = ("background", "stroma", "tumour", "fat")

# ----- 1. Random fields -----

def noise(rng, n):
    """White noise (n,n) float32."""
    return rng.standard_normal((n, n), dtype=float32)

def spline(control, factor):
    """Up-sample by a uniform cubic B-spline: (n+3,m+3) control values -> (n*factor,m*factor), smooth everywhere."""
    u = (arange(factor, dtype=float32) + 0.5) / factor
    weights = [                                                                # of four neighbours, times six
        (1 - u)**3,
        3 * u**3 - 6 * u**2 + 4,
        -3 * u**3 + 3 * u**2 + 3 * u + 1,
        u**3,
    ]
    for _ in range(2):  # the rows, then by transposing the columns
        n = len(control) - 3
        fine = 0
        for k, w in enumerate(weights):
            w = w[:, None] / 6                                                 # (factor,1)
            fine = fine + control[k:k + n, None] * w                           # (n,factor,m)
        control = fine.reshape(n * factor, -1).T
    return np.ascontiguousarray(control)

def enlarge(a, factor):
    """(n,n) -> (n*factor,n*factor), smooth."""
    return spline(np.pad(a, ((1, 2), (1, 2)), mode="edge"), factor)

def field(rng, size, cell):
    """Smooth random field (size,size), deviation about 1, its bumps about `cell` pixels apart."""
    n = -(-size // cell) + 3
    return spline(noise(rng, n) * 2.1, cell)[:size, :size]

def distance(f, share):
    """Signed distance in pixels, > 0 inside, to the level line of `f` that has `share` of the area above it.
    in:  f at quarter resolution. out: full resolution."""
    level = np.quantile(f, 1 - share)
    f = f - level.astype(float32)
    gy, gx = gradient(f)
    steep = hypot(gx, gy) + 0.02 * f.std()
    return enlarge(clip(4 * f / steep, -60, 60), 4)

def inside(distance):
    """How much of a pixel lies inside (0 to 1), by its signed distance: an edge two pixels wide."""
    return clip(distance / 2 + 0.5, 0, 1)

def strands(rng, angle):
    """Noise (n,n) smeared along the flow `angle` (n,n), ever further: fibres that follow it."""
    n = len(angle)
    f = noise(rng, n)
    y, x = mgrid[:n, :n].astype(float32)
    dy, dx = sin(angle), cos(angle)
    for step in (1, 2, 4, 8, 12):
        moved = 0
        for k in (-step, step):
            row = rint(y + k * dy).clip(0, n - 1)
            column = rint(x + k * dx).clip(0, n - 1)
            moved = moved + f[row.astype(int), column.astype(int)]
        f = f + moved
        f /= f.std()
    return f

def walls(rng, n, cell):
    """Distance (n,n) to the nearest bent wall between Voronoi cells about `cell` pixels wide: fat cells."""
    k = -(-n // cell) + 2
    seeds = mgrid[:k, :k] - 1 + rng.uniform(0.1, 0.9, (2, k, k))            # one in each square of a grid
    py, px = (seeds * cell).astype(float32)
    y, x = mgrid[:n, :n].astype(float32)
    y += 3 * field(rng, n, 16)
    x += 3 * field(rng, n, 16)
    cy = clip(y // cell + 1, 1, k - 2).astype(int)                             # the square that a pixel lies in
    cx = clip(x // cell + 1, 1, k - 2).astype(int)
    first, second = np.full((2, n, n), 1e9, float32)                        # distances to the two nearest seeds
    for i, j in np.ndindex(3, 3):
        at = cy + i - 1, cx + j - 1
        d = hypot(y - py[at], x - px[at])
        second = minimum(second, maximum(first, d))
        first = minimum(first, d)
    return second - first

# ----- 2. Texture, nuclei, dyes -----

def ground(rng, angle):
    """Stroma everywhere: fibres that follow `angle` (n,n), which is at half resolution.
    out: textures strand, mottle, grain and thick, and the two dyes eosin and haem, each (2n,2n)."""
    n = len(angle)
    strand = enlarge(strands(rng, angle), 2)
    mottle = enlarge(noise(rng, n), 2)
    grain = field(rng, 2 * n, 8)
    thick = field(rng, 2 * n, 64)
    eosin = 0.46 + 0.10 * strand + 0.06 * thick + 0.03 * mottle
    return strand, mottle, grain, thick, eosin, 0.07 + 0.02 * grain

def epithelium(eosin, haem, where, grain, mottle):
    """Blend violet cytoplasm into both dyes, in place; where (size,size) is its share of each pixel."""
    eosin += where * (0.42 + 0.05 * grain + 0.04 * mottle - eosin)
    haem += where * (0.24 + 0.05 * grain + 0.03 * mottle - haem)

def scatter(rng, angle, chance, spacing, radius, spread, ratio, depth, along=False):
    """Nuclei (n,6) = x, y, half axes, angle, depth: a jittered hexagonal grid, thinned to `chance` (size,size)."""
    size = len(angle)
    y, x = mgrid[0:size:spacing * 0.87, 0:size:spacing]
    x[1::2] += spacing / 2
    p = stack([x, y], -1).reshape(-1, 2)                                    # (n,2)
    p = p + rng.uniform(-0.36, 0.36, p.shape) * spacing
    p = p[((p >= 0) & (p < size)).all(1)]
    column, row = p.astype(int).T
    stay = rng.random(len(p)) < chance[row, column]
    x, y = p[stay].T
    n = len(x)
    r = radius * exp(spread * rng.standard_normal(n))
    k = sqrt(maximum(ratio * exp(0.15 * rng.standard_normal(n)), 1))
    if along:
        turn = angle[row[stay], column[stay]] + 0.25 * rng.standard_normal(n)
    else:
        turn = rng.uniform(0, pi, n)
    depth = depth * rng.uniform(0.75, 1.2, n)
    return stack([x, y, minimum(r * k, 13), r / k, turn, depth], 1).astype(float32)

def connective(rng, angle, where, thick, rare):
    """Nuclei of stroma, in where (size,size) bool: spindles along the fibres, and clusters of lymphocytes."""
    spindles = where * clip(0.4 + 0.25 * thick, 0.08, 1)
    spindles = scatter(rng, angle, spindles, 22, 3.8, 0.15, 4, 0.85, along=True)
    clusters = where & (field(rng, len(angle), 110) > rare)
    return [spindles, scatter(rng, angle, 0.8 * clusters, 10.5, 3.4, 0.08, 1.05, 1.1)]

def stamp(nuclei, size):
    """Draw soft ellipses with a darker rim on a canvas (size,size); where two overlap the deeper one wins."""
    x, y, a, b, angle, depth = nuclei.T[:, :, None, None]                      # (n,1,1) each
    grid = arange(-14, 15)
    column = x.astype(int) + grid                                              # (n,1,29)
    row = y.astype(int) + grid[:, None]                                        # (n,29,1)
    u = column + float32(0.5) - x
    v = row + float32(0.5) - y
    along, across = cos(angle), sin(angle)
    r = hypot((u * along + v * across) / a, (v * along - u * across) / b)      # (n,29,29), 1 on the rim
    body = clip((1 - r) * b / 1.6 + 0.5, 0, 1)
    rim = 0.8 + 0.3 * minimum(r, 1)**3
    ink = body * depth * rim
    row, column = np.broadcast_arrays(row, column)
    keep = (ink > 0.02) & (column >= 0) & (column < size) & (row >= 0) & (row < size)
    canvas = np.zeros((size, size), float32)
    maximum.at(canvas, (row[keep], column[keep]), ink[keep].astype(float32))
    return canvas

def develop(rng, eosin, haem, nuclei, tissue, mottle, grain, dyes=None):
    """Put nuclei, a list of (n,6), on top; then dyes absorb light (Beer-Lambert), more or less from slide to slide.
    in:  tissue (size,size), its share of each pixel; dyes, random numbers for what varies, by default rng.
    out: image (size,size,3) uint8; nuclei (n,3) = x, y, mean radius."""
    dyes, size = dyes or rng, len(eosin)
    nuclei = np.concatenate(nuclei)
    ink = stamp(nuclei, size)
    haem += 1.05 * ink * (1 + 0.10 * mottle + 0.08 * grain)
    eosin *= 1 - 0.35 * minimum(ink, 1)
    thickness = 1 + 0.08 * field(rng, size, 256)
    tint = tissue * thickness
    haem = haem * tint * dyes.uniform(0.85, 1.15)
    eosin = eosin * tint * dyes.uniform(0.8, 1.2)
    colours = np.array([[0.66, 0.70, 0.28], [0.10, 0.85, 0.34]])               # what red, green, blue lose to each dye
    colours = (colours + dyes.uniform(-0.045, 0.045, (2, 3))).astype(float32)
    white = float32(243 + dyes.uniform(-3, 3))
    bands = [rint(white * exp(-h * haem - e * eosin) + 1.2 * mottle) for h, e in colours.T]
    x, y, a, b, *_ = nuclei.T
    return stack(bands, -1).astype(uint8), stack([x, y, sqrt(a * b)], 1)

# ----- 3. The slide -----

def bumps(rng, n, large, small):
    """A field (n,n) of large bumps with small ones on them."""
    return field(rng, n, large) + 0.35 * field(rng, n, small)

def regions(rng, q):
    """Where tissue, tumour and fat lie. in: q, a quarter of the side.
    out: hill (q,q), whose summits are tumour; three signed distances (4q,4q), > 0 inside."""
    hill = bumps(rng, q, 52, 18)
    plain = bumps(rng, q, 72, 24)
    tissue = distance(plain, rng.uniform(0.6, 0.97))
    tumour = distance(hill, rng.uniform(0.15, 0.55))
    tumour = minimum(tumour, tissue - 9)                                       # a rim of stroma stays around it
    lobes = bumps(rng, q, 64, 20)
    fat = distance(lobes, rng.uniform(0.05, 0.4))
    fat = minimum(fat, tissue - 7)
    return hill, tissue, tumour, minimum(fat, -tumour - 10)

def flow(rng, hill):
    """Angle (2q,2q) of fibres that wrap around the hills (q,q)."""
    n = 2 * len(hill)
    gy, gx = gradient(hill + 0.8 * field(rng, n // 2, 40))
    steep = hypot(gx, gy) + 1e-3
    angle = arctan2(enlarge(gx / steep, 2), enlarge(-gy / steep, 2))
    return angle + (0.5 * field(rng, n, 32) + 0.25 * field(rng, n, 12))

def toy_slide(seed, size=1024):
    """Draw one synthetic slide.
    in:  seed >= 0; size, a multiple of 64. out: image (size,size,3) uint8; region (size/4,size/4) uint8, indices of
    TISSUES; nuclei (n,3) float32: x, y, mean radius in pixels. The same seed and size give the same slide."""
    rng = np.random.default_rng([seed, size])
    hill, tissue, tumour, fat = regions(rng, size // 4)
    in_tissue, in_tumour, in_fat = inside(tissue), inside(tumour), inside(fat)
    # stroma: wavy strands with pale clefts
    angle = flow(rng, hill)                                                    # (size/2,size/2)
    strand, mottle, grain, thick, eosin, haem = ground(rng, angle)
    clefts = clip(0.25 * thick - strand - 1.1, 0, 1)
    eosin = maximum(eosin * (1 - 0.6 * clefts), 0.05)
    epithelium(eosin, haem, in_tumour, grain, mottle)
    # fat: empty cells behind thin membranes
    wall = enlarge(walls(rng, size // 2, rng.integers(22, 32)), 2)
    membrane = exp(-(wall / 1.7)**2)
    eosin += in_fat * (0.02 + 0.42 * membrane - eosin)
    haem += in_fat * (0.01 + 0.10 * membrane - haem)
    # nuclei: tumour, spindles along the fibres, clusters of lymphocytes, a few on fat membranes
    angle = angle.repeat(2, 0).repeat(2, 1)                                    # (size,size)
    stroma = (tissue > 4) & (tumour < -3) & (fat < -2)
    big = rng.uniform(4.6, 6.4)
    crowd = 0.28 * field(rng, size, 96) + rng.uniform(0.45, 0.95)
    crowd = (tumour > 3) * clip(crowd, 0.12, 1)
    on_fat = 0.1 * ((fat > 2) & (membrane > 0.8))
    nuclei = [scatter(rng, angle, crowd, 2.45 * big, big, 0.17, 1.25, 0.85)]
    nuclei += connective(rng, angle, stroma, thick, 1.7)
    nuclei.append(scatter(rng, angle, on_fat, 9, 2.8, 0.12, 2.2, 0.9))
    image, nuclei = develop(rng, eosin, haem, nuclei, in_tissue, mottle, grain)
    region = np.select([in_tissue < 0.5, in_tumour > 0.5, in_fat > 0.5], [0, 2, 3], 1)
    return image, region[2::4, 2::4].astype(uint8), nuclei
