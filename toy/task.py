"""Toy slides with a label that needs two scales: is there a duct with large nuclei?

A slide holds one structure in each square of 256 pixels: a duct (epithelium around a lumen) or a nest (solid, in a
cleft that stains as little as a lumen), with small or large nuclei. Nuclei are told apart at scale 0, where a patch
never shows the whole structure; the structure at scale 2, where nuclei are about a pixel.
in:  a seed   out: as toy.tissue.toy_slide; labels.csv (case_id, slide_id, label) with 5 % of the labels wrong
run: python data.py toy --task     read next: mil.py"""
import numpy as np
from numpy import clip, cos, hypot, maximum, minimum, pi, sin

from common import write_text
from toy.tissue import connective, develop, enlarge, epithelium, field, ground, inside, scatter

CELL = 256                # pixels of a square with one structure: a patch of 64 pixels at scale 2
NOISE = 0.05              # share of wrong labels
RADII = (4.6, 6.4)        # of small and large nuclei, in pixels; both lie within what toy.tissue draws

def structures(seed, size):
    """What stands in the squares of a slide, and its labels.
    out: duct, large (size/256)^2 bool each, of both kinds one to all but one; label, true: int. As many slides are
    positive as negative; neither the number of ducts nor that of large nuclei tells more than half of it."""
    n = (size // CELL) ** 2
    rng = np.random.default_rng([seed, size, 1])
    true = int(rng.random() < 0.5)
    while True:
        duct, large = rng.random((2, n)) < 0.5
        if 0 < duct.sum() < n and 0 < large.sum() < n and (duct & large).any() == true:
            return duct, large, true if rng.random() >= NOISE else 1 - true, true

def outlines(rng, duct):
    """Signed distances, > 0 inside, to what is solid and what is clear. in: duct (n,n) bool. out: (64n,64n) each."""
    q = len(duct) * CELL // 4                                                  # quarter resolution
    y, x = np.mgrid[:q, :q].astype(np.float32) * 4 + 2
    ragged = 7 * field(rng, q, 12) + 3 * field(rng, q, 5)                      # pixels by which outlines wander
    solid, clear = np.full((2, q, q), -60.0, np.float32)
    for i, j in np.ndindex(*duct.shape):
        cy = (i + 0.5) * CELL + rng.uniform(-16, 16)
        cx = (j + 0.5) * CELL + rng.uniform(-16, 16)
        radius = rng.uniform(88, 108)
        part = rng.uniform(0.36, 0.46)                                         # the lumen's share of the radius
        turn = rng.uniform(0, 2 * pi)
        away = hypot(y - cy, x - cx) + ragged
        if duct[i, j]:
            hole = part * radius - away
            body = minimum(radius - away, away - part * radius)
        else:  # a nest of the same area; it lies off the middle of its cleft
            small = radius * (1 - part ** 2) ** 0.5 - 4
            body = small - away
            dy, dx = 13 * sin(turn), 13 * cos(turn)
            around = small + 16 - hypot(y - cy - dy, x - cx - dx) - ragged
            hole = minimum(around, -body)
        solid = maximum(solid, body)
        clear = maximum(clear, hole)
    return enlarge(solid, 4), enlarge(clear, 4)

def task_slide(seed, size=512):
    """Draw one slide. in: seed >= 0, seeds 2k and 2k+1 are one patient; size, a multiple of 256 from 512 on.
    out: as toy.tissue.toy_slide, regions 0 = lumen or cleft, 1 = stroma, 2 = epithelium."""
    rng = np.random.default_rng([seed, size, 2])
    duct, large, _, _ = structures(seed, size)
    side = size // CELL
    solid, clear = outlines(rng, duct.reshape(side, side))                     # (size,size)
    in_solid, in_clear = inside(solid), inside(clear)
    angle = pi * enlarge(field(rng, size // 2, 32), 2)
    _, mottle, grain, thick, eosin, haem = ground(rng, angle[::2, ::2])
    eosin = maximum(eosin, 0.05)
    epithelium(eosin, haem, in_solid, grain, mottle)
    crowd = clip(0.28 * field(rng, size, 96) + rng.uniform(0.5, 0.95), 0.12, 1)
    grade = np.kron(large.reshape(side, side), np.ones((CELL, CELL), bool))    # (size,size)
    nuclei = []
    for which, radius in zip((~grade, grade), RADII):
        radius *= rng.uniform(0.93, 1.07)
        nuclei.append(scatter(rng, angle, (solid > 3) * which * crowd, 2.45 * radius, radius, 0.17, 1.25, 0.85))
    plain = (solid < -4) & (clear < -4)
    nuclei += connective(rng, angle, plain, thick, 1.2)
    dyes = np.random.default_rng([seed // 2, 3])                               # one for both slides of a patient
    image, nuclei = develop(rng, eosin, haem, nuclei, 1 - in_clear, mottle, grain, dyes)
    region = np.select([in_clear > 0.5, in_solid > 0.5], [0, 2], 1)
    return image, region[2::4, 2::4].astype(np.uint8), nuclei

def write_labels(path, first, n, size):
    """Write the CSV that mil.py reads: n slides as data.py names them, drawn from seeds first, first + 1, ...
    out: how many slides have label 0, and 1."""
    labels = [structures(first + k, size)[2] for k in range(n)]
    rows = [f"patient_{k // 2:04d},train_{k:04d},{label}" for k, label in enumerate(labels)]
    write_text(path, "\n".join(["case_id,slide_id,label", *rows, ""]))
    return labels.count(0), labels.count(1)
