"""Captions of toy slides: how much of each tissue there is, and where it lies, in coarse words and many phrasings.

in:  region (h,w), indices of TISSUES   out: a sentence, the same for the same random.Random     read next: tissues.py
"""
import numpy as np

from toy.tissue import TISSUES

# ----- 1. The vocabulary -----

NOUNS = (("background", "empty background", "white background"), ("stroma", "fibrous stroma", "connective tissue"),
         ("tumour", "dense tumour", "tumour tissue"), ("fat", "fat tissue", "adipose tissue"))
AMOUNTS = (  # share of the area below this, words before a tissue, words before "of the image"
    (0.01, ("no",), ("none",)),
    (0.05, ("hardly any", "almost no", "a trace of"), ("hardly any", "almost none", "a tiny part")),
    (0.15, ("a little", "a small amount of", "a bit of"), ("a little", "a small part", "a small share")),
    (0.40, ("some", "a moderate amount of", "a fair amount of"), ("some", "a part", "a fair share")),
    (0.60, ("about half", "roughly half", "half"), ("about half", "roughly half", "nearly half")),
    (0.85, ("mostly", "mainly", "largely"), ("most", "the greater part", "more than half")),
    (1.01, ("almost only", "nothing but", "almost entirely"), ("almost all", "nearly all")))
PLACES = {"left": ("on the left", "along the left", "in the left half"),
          "right": ("on the right", "along the right", "in the right half"),
          "top": ("at the top", "along the top", "in the upper half"),
          "bottom": ("at the bottom", "along the bottom", "in the lower half"),
          "top left": ("in the top left corner", "at the top left", "in the upper left"),
          "top right": ("in the top right corner", "at the top right", "in the upper right"),
          "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left"),
          "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right"),
          "centre": ("in the centre", "in the middle", "at the centre"),
          "edges": ("around the edges", "along the borders", "at the edges"),
          "scattered": ("scattered", "here and there", "in scattered patches"),
          "everywhere": ("throughout", "everywhere", "all over")}
STYLES = {  # clauses, what is said of a tissue that is absent, and what joins them; a caption does not mix styles
    "phrases": (("{amount} {noun}{where}", "{noun} ({part}{where})", "{noun} in {part} of the {image}{where}"),
                ("no {noun}", "without {noun}", "{noun} absent"), (", ", "; ")),
    "sentences": (("there is {amount} {noun}{where}", "the {image} shows {amount} {noun}{where}",
                   "{noun} covers {part} of the {image}{where}", "{part} of the {image} is {noun}{where}"),
                  ("there is no {noun}", "{noun} is absent", "{noun} is missing"), (". ", "; ", ", and ")),
    "labels": (("{noun}: {part}{where}", "{amount} {noun}{where}"), ("{noun}: none", "no {noun}"), (", ", " | "))}
IMAGES = ("image", "picture", "region", "field")

# ----- 2. From a region map to a caption -----

def lie(mask):
    """Where a tissue lies, a key of PLACES or "". in: mask (h,w) bool, some of it True.
    Decided by the mean and the spread of its coordinates, which run from -1 to 1."""
    h, w = mask.shape
    share = mask.mean()
    if share > 0.8:
        return "everywhere"
    places = (np.argwhere(mask) * 2 + 1) / (h, w) - 1                          # (n,2) y, x
    y, x = places.mean(0)
    sides = []
    if abs(y) > 0.28:
        sides.append("top" if y < 0 else "bottom")
    if abs(x) > 0.28:
        sides.append("left" if x < 0 else "right")
    if sides:
        return " ".join(sides)
    far = (places ** 2).sum(1).mean() / (2 / 3)                                # 1 = evenly spread
    if far < 0.6:
        return "centre"
    if far > 1.25:
        return "edges"
    rows = np.add.reduceat(mask, np.arange(4) * h // 4, 0)
    cells = np.add.reduceat(rows, np.arange(4) * w // 4, 1)                    # (4,4) how much lies in each sixteenth
    return "scattered" if share < 0.5 and (cells > h * w / 1600).sum() >= 8 else ""

def clause(style, share, mask, noun, image, rng):
    """One tissue in words. in: its share of the area, its mask (h,w), names for it and the image, a random.Random."""
    frames, absent, _ = STYLES[style]
    if share < AMOUNTS[0][0]:
        return rng.choice(absent).format(noun=noun)
    _, amounts, parts = next(row for row in AMOUNTS if share < row[0])
    place, where = lie(mask), ""
    if place and rng.random() < 0.75:
        where = " " + rng.choice(PLACES[place])
    return rng.choice(frames).format(noun=noun, amount=rng.choice(amounts), part=rng.choice(parts), image=image,
                                     where=where)

def shares_of(region):
    """Share of the area of each of TISSUES, [float]."""
    return [float((region == t).mean()) for t in range(len(TISSUES))]

def describe(region, rng):
    """One of many captions of a region map. in: region (h,w), indices of TISSUES; rng, a random.Random."""
    shares = shares_of(region)
    order = sorted(range(len(TISSUES)), key=lambda t: -shares[t])              # the largest first, as people say it
    if rng.random() < 0.25:
        rng.shuffle(order)
    style, image = rng.choice(tuple(STYLES)), rng.choice(IMAGES)
    said = []
    for t in order:
        chance = 0.35 if shares[t] < 0.01 else 0.85 if shares[t] < 0.05 else 1  # else it goes without saying
        if rng.random() < chance:
            said.append(clause(style, shares[t], region == t, rng.choice(NOUNS[t]), image, rng))
    join = rng.choice(STYLES[style][2])
    if join == ". ":
        said = [part[0].upper() + part[1:] for part in said]
    text = join.join(said)
    return text[0].upper() + text[1:] + "." if join == ". " or rng.random() < 0.5 else text
