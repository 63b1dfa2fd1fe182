"""Captions of toy slides: what a region map holds, in words, in many phrasings.

A caption says in coarse words how much of each tissue there is, and where it lies. Its words are those listed below;
a model that has seen them put together in many ways should also understand them put together in others.

in:  region (h,w), indices of toy.TISSUES   out: a sentence, the same for the same random.Random
run: python wording.py     read next: tissues.py
"""
import random

import numpy as np

from common import UserError, cli
from toy.tissue import TISSUES, toy_slide

# ----- 1. The vocabulary -----

NOUNS = (("background", "empty background", "white background"), ("stroma", "fibrous stroma", "connective tissue"),
         ("tumour", "dense tumour", "tumor", "tumour tissue"), ("fat", "fat tissue", "adipose tissue"))
AMOUNTS = (  # share of the area below this, words before a tissue, words before "of the image"
    (0.01, ("no",), ("none",)),
    (0.05, ("hardly any", "barely any", "almost no", "a trace of"), ("hardly any", "almost none", "a tiny part")),
    (0.15, ("a little", "a small amount of", "a bit of"), ("a little", "a small part", "a small share")),
    (0.40, ("some", "a moderate amount of", "a fair amount of"), ("some", "a part", "a fair share")),
    (0.60, ("about half", "roughly half", "half"), ("about half", "roughly half", "nearly half")),
    (0.85, ("mostly", "mainly", "largely", "predominantly"), ("most", "the greater part", "more than half")),
    (1.01, ("almost only", "nothing but", "almost entirely"), ("almost all", "nearly all")))
SPOKEN = ((1 / 4, "a quarter"), (1 / 3, "a third"), (2 / 3, "two thirds"), (3 / 4, "three quarters"))
SIDES = {"left": ("left", "on"), "right": ("right", "on"), "top": ("upper", "at"), "bottom": ("lower", "at")}
PLACES = {a: (f"{at} the {a}", f"at the {a} edge", f"along the {a}", f"on the {a} side", f"in the {b} half",
              f"in the {b} part", f"towards the {a}") for a, (b, at) in SIDES.items()}
PLACES |= {f"{a} {b}": (f"in the {a} {b} corner", f"at the {a} {b}", f"towards the {SIDES[a][0]} {b}",
                        f"in the {SIDES[a][0]} {b}") for a in ("top", "bottom") for b in ("left", "right")}
PLACES |= {"centre": ("in the centre", "in the middle", "at the centre"),
           "edges": ("around the edges", "along the borders", "at the edges"),
           "scattered": ("scattered", "scattered throughout", "here and there", "in scattered patches", "spread out"),
           "everywhere": ("throughout", "everywhere", "all over")}
SHAPES = {"band": ("a band", "a strip", "a broad band"), "patch": ("a patch", "an area", "an island", "a nest"),
          "patches": ("patches", "islands", "several areas")}
IMAGES = ("image", "picture", "region", "field", "view")
ABSENT = {"phrases": ("no {noun}", "without {noun}", "{noun} absent", "free of {noun}"),
          "sentences": ("there is no {noun}", "{noun} is absent", "{noun} is missing", "the {image} has no {noun}"),
          "labels": ("{noun}: none", "no {noun}")}
CLAUSES = {  # of three styles, which a caption does not mix; {where} and {shape} only where there is one
    "phrases": ("{det} {noun}{at}", "{det} {noun}{at}", "{det} {noun}{comma}", "{noun} ({part}{comma})",
                "{noun} in {part} of the {image}{comma}", "{where} {det} {noun}", "{shape} of {noun} {where}",
                "{where} {shape} of {noun}", "{det} {noun} as {shape} {where}", "{shape} with {det} {noun}"),
    "sentences": ("there is {det} {noun}{at}", "one sees {det} {noun}{at}", "the {image} shows {det} {noun}{at}",
                  "{noun} covers {part} of the {image}{comma}", "{part} of the {image} is {noun}{comma}",
                  "{noun} fills {part} of the {image}{comma}", "{noun} makes up {part} of the {image}{comma}",
                  "{part} of the {image} is covered by {noun}{comma}", "{noun} takes up {part} of it{comma}",
                  "{where} there is {det} {noun}", "{where} lies {det} {noun}", "{noun} accounts for {part} of it{at}",
                  "{where}, {noun} covers {part} of the {image}", "{noun} lies {where} and fills {part} of the {image}",
                  "{noun}, {where}, occupies {part} of the {image}", "there is {shape} of {noun} {where}",
                  "{noun} forms {shape} {where} and takes up {part} of it", "{where} one sees {shape} of {noun}"),
    "labels": ("{noun}: {part}{comma}", "{noun} {part}{at}", "{noun}: {part}{at}", "{det} {noun}{comma}")}
OPENINGS = {"phrases": ("", "", "", "{a} {image} of ", "{a} {image} with ", "{a} {image} showing ", "{image}: "),
            "sentences": ("", "", "", "in this {image}, ", "here "), "labels": ("", "", "{image}: ")}
JOINS = {"phrases": (", ", ", ", "; ", " and ", " with ", ", with "),
         "sentences": (". ", ". ", "; ", ", ", " and ", ", while ", ", and "), "labels": (", ", "; ", ". ", " | ")}
RANKS = ("more {a} than {b}", "less {b} than {a}", "dominated by {a}", "above all {a}", "first {a}, then {b}")


# ----- 2. From a region map to a caption -----

def lie(mask):
    """Where a tissue lies, a key of PLACES or "", and its shape, a key of SHAPES. in: mask (h,w) bool, some of it True.

    Decided by the mean and the spread of its coordinates, which run from -1 to 1.
    """
    h, w = mask.shape
    p = (np.argwhere(mask) * 2 + 1) / (h, w) - 1                               # (n,2) y, x
    (y, x), (dy, dx), share = p.mean(0), p.std(0), mask.mean()
    ends = [a if v < 0 else b for v, a, b in ((y, "top", "bottom"), (x, "left", "right")) if abs(v) > 0.28]
    if share > 0.8:
        return "everywhere", "patches"
    if ends:
        along, across = (dx, dy) if abs(y) > abs(x) else (dy, dx)
        return " ".join(ends), "band" if len(ends) == 1 and along > 0.45 > 1.3 * across else "patch"
    far = (p**2).sum(1).mean() / (2 / 3)                                       # 1 = evenly spread
    if far < 0.6 or far > 1.25:
        return ("centre", "patch") if far < 0.6 else ("edges", "patches")
    cells = np.add.reduceat(np.add.reduceat(mask, np.arange(4) * h // 4, 0), np.arange(4) * w // 4, 1)
    return ("scattered" if share < 0.5 and (cells > h * w / 1600).sum() >= 8 else ""), "patches"


def clause(style, share, mask, noun, image, rng):
    """One tissue in words. in: its share of the area, its mask (h,w), names for it and the image, a random.Random."""
    _, *words = next(a for a in AMOUNTS if share < a[0])
    spoken = [f"about {word}" for at, word in SPOKEN if abs(share - at) < 0.04]
    det, part = (rng.choice(spoken if spoken and rng.random() < 0.25 else w) for w in words)
    place, shape = lie(mask) if mask.any() else ("", "patches")
    where = rng.choice(PLACES[place]) if place and rng.random() < (0.75 if share < 0.6 else 0.3) else ""
    shaped = 0.02 < share < 0.45 and (shape == "band" or rng.random() < 0.4)  # a shape says little of the amount
    frames = [f for f in (CLAUSES if share >= AMOUNTS[0][0] else ABSENT)[style]
              if ("{where}" in f) <= bool(where) and ("{shape}" in f) <= shaped]
    return rng.choice(frames).format(noun=noun, det=det, part=part, shape=rng.choice(SHAPES[shape]), image=image,
                                     where=where, at=where and f" {where}", comma=where and f", {where}")


def shares_of(region):
    """Share of the area of each of TISSUES, [float]."""
    return [float((region == t).mean()) for t in range(len(TISSUES))]


def describe(region, rng):
    """One of many captions of a region map. in: region (h,w), indices of TISSUES; rng, a random.Random."""
    shares, name = shares_of(region), [rng.choice(words) for words in NOUNS]
    order = sorted(range(len(TISSUES)), key=lambda t: -shares[t])
    few = order[:rng.choice((1, 2, 2))] if rng.random() < 0.05 else order
    # what is hardly there may go without saying
    chance = [0.35 if share < 0.01 else 0.85 if share < 0.05 else 1 for share in shares]
    said = [t for t in few if t == order[0] or rng.random() < chance[t]]
    if rng.random() < 0.25:  # else the largest comes first, as people would say it
        rng.shuffle(said)
    style = rng.choices(tuple(CLAUSES), (0.4, 0.45, 0.15))[0]
    image, join = rng.choice(IMAGES), rng.choice(JOINS[style])
    parts = [clause(style, shares[t], region == t, name[t], image, rng) for t in said]
    if len(said) > 1 and rng.random() < 0.2:
        a, b = (name[t] for t in order[:2])
        even = shares[order[0]] - shares[order[1]] < 0.07
        parts.insert(rng.choice((0, len(parts))), f"{a} and {b} in about equal parts" if even else
                     rng.choice(RANKS).format(a=a, b=b))
    elif len(said) > 1 and said[-1] == order[0] and rng.random() < 0.3:
        parts[-1] = f"the rest is {rng.choice(AMOUNTS[-2][1])} {name[said[-1]]}"
    if join == ". ":
        parts = [p[0].upper() + p[1:] for p in parts]
    elif "w" in join or "n" in join:  # "with", "and", "while" only once, then commas
        cut = 1 if "w" in join else -1
        parts = [", ".join(p) for p in (parts[:cut], parts[cut:]) if p]
    opening = rng.choice(OPENINGS[style]).format(a="an" if image[0] == "i" else "a", image=image)
    if opening:
        parts[0] = parts[0][0].lower() + parts[0][1:]
    text = opening + join.join(parts)
    return text[0].upper() + text[1:] + "." if join == ". " or rng.random() < 0.5 else text


def main(argv):
    if argv:
        print(__doc__)
        raise UserError("wording.py takes no options: python wording.py shows captions of a toy slide")
    region, rng = toy_slide(0, 512)[1], random.Random(0)
    print("shares of the area: " + ", ".join(f"{t} {share:.2f}" for t, share in zip(TISSUES, shares_of(region))))
    for _ in range(8):
        print(describe(region, rng))


if __name__ == "__main__":
    cli(main)
