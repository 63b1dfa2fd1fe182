"""Toy slides with a label that needs two scales: is there a duct with large nuclei?

A slide holds one structure in each square of 256 pixels: a duct (epithelium around a lumen) or a nest (solid, in a
cleft that stains as little as a lumen), with small or large nuclei. Large nuclei alone mean nothing, and neither do
ducts. Nuclei are told apart at scale 0, where a patch never shows the whole structure; the structure at scale 2, where
nuclei, whose share of the area is the same for both sizes, are about a pixel. Two slides of one patient share a stain.

in:  a seed   out: as toy.toy_slide; labels.csv (case_id, slide_id, label) with 5 % of the labels wrong
run: python data.py toy --task (the set), python toy_task.py out/task.png (a few slides)     read next: data.py
"""
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError, atomic, cli, write_text
from toy.tissue import enlarge, field, scatter, stain, stamp, strands

DEFAULTS = ["--out=data/task", "--slides=240", "--test=0", "--size=512", "--scales=4", "--keep0=0",
            "--keep1=0"]  # of data.py
CELL = 256                # pixels of a square with one structure: a patch of 64 pixels at scale 2
NOISE = 0.05              # share of wrong labels
RADII = (4.6, 6.4)        # of small and large nuclei, in pixels; both lie within what toy.py draws


def structures(seed, size):
    """What stands in the squares of a slide, and its labels.

    out: duct, large (size/256)^2 bool each, of both kinds one to all but one; label, true: int. As many slides are
    positive as negative; neither the number of ducts nor that of large nuclei tells more than half of it.
    """
    rng, n = np.random.default_rng([seed, size, 1]), (size // CELL) ** 2
    true = int(rng.random() < 0.5)
    while True:
        duct, large = rng.random((2, n)) < 0.5
        if 0 < duct.sum() < n and 0 < large.sum() < n and (duct & large).any() == true:
            return duct, large, true if rng.random() >= NOISE else 1 - true, true


def task_slide(seed, size=512):
    """Draw one slide. in: seed >= 0, seeds 2k and 2k+1 are one patient; size, a multiple of 256 from 512 on.
    out: as toy.toy_slide, regions 0 = lumen or cleft, 1 = stroma, 2 = epithelium."""
    rng, side, q = np.random.default_rng([seed, size, 2]), size // CELL, size // 4
    duct, large = (v.reshape(side, side) for v in structures(seed, size)[:2])
    y, x = np.mgrid[:q, :q].astype(np.float32) * 4 + 2
    ragged = 7 * field(rng, q, 12) + 3 * field(rng, q, 5)                      # (q,q) pixels by which outlines wander
    solid, clear = np.full((2, q, q), -60.0, np.float32)                       # signed distances, > 0 inside
    for i, j in np.ndindex(side, side):
        cy, cx = ((v + 0.5) * CELL + rng.uniform(-16, 16) for v in (i, j))
        radius, part, turn = rng.uniform(88, 108), rng.uniform(0.36, 0.46), rng.uniform(0, 2 * np.pi)
        away = np.hypot(y - cy, x - cx) + ragged
        if duct[i, j]:
            inside, hole = np.minimum(radius - away, away - part * radius), part * radius - away
        else:  # of the same area; it lies off the middle of its cleft
            small = radius * (1 - part ** 2) ** 0.5 - 4
            inside = small - away
            around = small + 16 - np.hypot(y - cy - 13 * np.sin(turn), x - cx - 13 * np.cos(turn)) - ragged
            hole = np.minimum(around, -inside)
        solid, clear = np.maximum(solid, inside), np.maximum(clear, hole)
    solid, clear = enlarge(solid, 4), enlarge(clear, 4)                        # (size,size)
    in_solid, in_clear = (np.clip(d / 2 + 0.5, 0, 1) for d in (solid, clear))
    angle = np.pi * enlarge(field(rng, size // 2, 32), 2)
    strand = enlarge(strands(rng, angle[::2, ::2]), 2)
    mottle = enlarge(rng.standard_normal((size // 2, size // 2), dtype=np.float32), 2)
    grain, thick = field(rng, size, 8), field(rng, size, 64)
    eosin = np.maximum(0.46 + 0.10 * strand + 0.06 * thick + 0.03 * mottle, 0.05)
    haem = 0.07 + 0.02 * grain
    eosin += in_solid * (0.42 + 0.05 * grain + 0.04 * mottle - eosin)
    haem += in_solid * (0.24 + 0.05 * grain + 0.03 * mottle - haem)
    crowd = np.clip(0.28 * field(rng, size, 96) + rng.uniform(0.5, 0.95), 0.12, 1)
    grade = np.kron(large, np.ones((CELL, CELL), bool))                        # (size,size)
    nuclei = []
    for which, radius in zip((~grade, grade), RADII):
        radius *= rng.uniform(0.93, 1.07)
        nuclei.append(scatter(rng, angle, (solid > 3) * which * crowd, 2.45 * radius, radius, 0.17, 1.25, 0.85))
    plain = (solid < -4) & (clear < -4)
    nuclei.append(scatter(rng, angle, plain * np.clip(0.4 + 0.25 * thick, 0.08, 1), 22, 3.8, 0.15, 4, 0.85, along=True))
    nuclei.append(scatter(rng, angle, (plain & (field(rng, size, 110) > 1.2)) * 0.8, 10.5, 3.4, 0.08, 1.05, 1.1))
    nuclei = np.concatenate(nuclei)
    ink = stamp(nuclei, size)
    haem += 1.05 * ink * (1 + 0.10 * mottle + 0.08 * grain)
    eosin *= 1 - 0.35 * np.minimum(ink, 1)
    tint = (1 - in_clear) * (1 + 0.08 * field(rng, size, 256))
    image = stain(np.random.default_rng([seed // 2, 3]), haem * tint, eosin * tint, mottle)
    region = np.select([in_clear > 0.5, in_solid > 0.5], [0, 2], 1)[2::4, 2::4].astype(np.uint8)
    return image, region, np.stack([*nuclei.T[:2], np.sqrt(nuclei[:, 2] * nuclei[:, 3])], 1)


def write_labels(path, first, n, size):
    """Write the CSV that mil.py reads: n slides as data.py names them, drawn from seeds first, first + 1, ..."""
    rows = [f"patient_{k // 2:04d},train_{k:04d},{structures(first + k, size)[2]}" for k in range(n)]
    write_text(path, "\n".join(["case_id,slide_id,label", *rows]) + "\n")


def main(argv):
    path = Path(argv[0] if argv else "out/task.png")
    if len(argv) > 1 or path.suffix != ".png":
        raise UserError(f"got {' '.join(argv)!r}: write python toy_task.py FILE.png")
    sheet = np.concatenate([np.concatenate([task_slide(2 * k + i)[0] for k in range(3)], 1) for i in range(2)])
    with atomic(path) as tmp:
        Image.fromarray(sheet).save(tmp, "PNG")
    print(f"{path}: two slides of each of three patients, labels (true ones)",
          ", ".join(f"{structures(k, 512)[2]} ({structures(k, 512)[3]})" for k in range(6)))


if __name__ == "__main__":
    cli(main)
