"""Where a head looks: a slide, and beside it the attention of the head that had the slide in its test fold.

    python mil.py map --features=DIR --labels=FILE --slide=NAME --data=DIR         on the pyramids of data.py
    python mil.py map --features=DIR --labels=FILE --slide=NAME --image=FILE       on the slide itself

in:  as crossval.py, features with coordinates: ours, of CLAM, TRIDENT, HEST; of STAMP, if the size of pixels is known;
     of Owkin, with metadata.json beside   out: OUT/map_SLIDE_FEATURES_HEAD.png
"""
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import UserError, cli, configure, load_tensors, save_png
from data import Pyramids
from experiments.crossval import HEADS, Config, Job, out_of, run_job, slides_of
from experiments.features import of_a_part
from large.beside import LABEL
from slides.bags import placed, views
from slides.names import few, file_of, files_of, match, name_of

LARGEST = 1024  # pixels of a picture's longer side, about
LEAST = 2.0     # times the mean that full colour stands for, at least

def from_pyramids(folder, name, told):
    """A picture of a slide put together from its patches. out: (h,w,3) uint8, pixels of the slide per pixel.
    raises: UserError if coordinates of other tools are in pixels that these are not."""
    pyramids = Pyramids(folder)
    if "size" not in told and (pyramids.mpp and not told["micrometres"] or of_a_part(folder)):
        raise UserError(f"the features tell places in the slide's own pixels, which {folder} does not have: "
                        f"draw on the slide, --image=FILE")
    names = [slide["name"] for slide in pyramids.slides]
    found = match([name], names, folder)
    if not found:
        raise UserError(f"{folder} has no slide {name!r}: give the pyramids it was extracted from")
    k, P, s = names.index(found[name]), pyramids.patch, 0
    h, w = pyramids.slides[k]["size"]
    while max(h, w) >> s > LARGEST and s < pyramids.scales - 1:
        s += 1
    picture = np.full((h >> s, w >> s, 3), 255, np.uint8)
    places, tiles = pyramids.tensor(k, f"ij{s}"), pyramids.tensor(k, f"x{s}")
    for (i, j), tile in zip((P * places).tolist(), tiles):
        picture[i:i + P, j:j + P] = tile
    return picture, 2 ** s

def from_slide(path, told):
    """The same from the slide's own file. told: meta of the features, whose coordinates are in an image of that size,
    or in pixels of the slide. raises: UserError if that is but a part of it."""
    from slides.reader import open_slide
    slide = open_slide(path, mpp=1.0)  # so that a resolution is a factor
    factor = 1
    while max(slide.size) > LARGEST * factor:
        factor *= 2
    _, _, (w, h) = slide.grid(factor)
    picture = slide.read(0, 0, w, h, factor)
    height, width = told.get("size", slide.size[::-1])
    if told.get("part") or abs(slide.size[0] / width * height / slide.size[1] - 1) > 2 / min(height, width) + 0.01:
        raise UserError(f"{path} is {slide.size[0]} x {slide.size[1]}, the features are of a part, {width} x {height}: "
                        f"draw on the pyramids, --data=DIR")
    return picture, width / w

def pixels_of(cfg):
    """Micrometres per pixel of what is drawn on; None if unknown."""
    if cfg.image:
        from slides.reader import open_slide
        return open_slide(cfg.image).mpp
    return Pyramids(cfg.data).mpp

def heat_of(attention, coords, side, shape, factor):
    """A picture (h,w) of attention (N,): 0 = the mean or less, 1 = `top`; and top, how many times the mean that is: the
    highest, or LEAST if that is more, for an even attention would else look as if it said something.
    in: coords (N,2), side: of the patches, in the slide's pixels; factor: those per pixel of the picture."""
    heat = np.zeros(shape)
    weight = attention * len(attention)                        # 1: as much as the mean
    top = max(float(weight.max()), LEAST)
    shown = ((weight - 1) / (top - 1)).clamp(0, 1)             # (N,)
    corners = coords.double() / factor                         # as Python divides: float32 may miss a whole number
    ends = (coords + side).double() / factor
    for value, (x, y), (right, below) in zip(shown, corners.int(), ends.int()):
        heat[y:below, x:right] = value
    return heat, top

def overlay(picture, heat):
    """The picture and beside it the same under the heat, yellow to red: (h,2w,3) uint8."""
    hot = np.stack([np.full_like(heat, 255), 220 * (1 - heat), 0 * heat], -1)
    share = 0.6 * heat[..., None]
    over = picture * (1 - share) + hot * share
    return np.concatenate([picture, over.astype(np.uint8)], 1)

def scale_below(width, slide, top):
    """What stands below both pictures, (LABEL,2 width,3) uint8: the slide's name; the colours and what they mean."""
    white = np.full((LABEL, width, 3), 255, np.uint8)
    rising = np.tile(np.linspace(0, 1, width), (LABEL, 1))     # (LABEL,width)
    strip = Image.fromarray(overlay(white, rising))
    texts = slide, "attention: the mean or less", f"{top:.1f} times the mean"
    places = 4, width + 4, 2 * width - 4 - 6 * len(texts[-1])  # six pixels a letter
    for text, x in zip(texts, places):
        ImageDraw.Draw(strip).text((x, 2), text, fill="black")
    return np.asarray(strip)

def judge(job, t, at, x):
    """The head that did not see slide number `at`, on its features x (N,K). out: probabilities (C,), attention (N,)."""
    fold = int(t["fold"][at])
    mean, deviation = t[f"scaler.{fold}"]
    head = HEADS[job.head](x.shape[1], t["scores"].shape[1], job.cfg.width, job.cfg.dropout).eval()
    start = f"head.{fold}."
    head.load_state_dict({key.removeprefix(start): v for key, v in t.items() if key.startswith(start)})
    with torch.no_grad():
        logits, a = head((x - mean) / deviation)
    if a.ndim == 2:                        # attention of every class: that of the likeliest
        a = a[:, logits.argmax()]
    return logits.softmax(0), a

def draw_map(cfg):
    """Write the picture of one slide by the first head. raises: UserError for what cannot be drawn."""
    folder, head = (names.split(",")[0].strip() for names in (cfg.features, cfg.heads))
    if head not in HEADS:
        raise UserError(f"--heads={cfg.heads}: heads are {', '.join(HEADS)}")
    cfg = replace(cfg, heads=head, fraction=cfg.fraction[:1])
    names = slides_of(cfg, [folder])[folder]
    job = Job(cfg, folder, views(folder)[-1], head, cfg.fraction[0], names=names)
    names = job.labels().names
    slide = match([cfg.slide], names, folder).get(cfg.slide)
    if slide is None:
        raise UserError(f"--slide={cfg.slide}: the features are of {few(names)}")
    if not cfg.data and not cfg.image:
        raise UserError("say what to draw on: --data=DIR, the pyramids, or --image=FILE, the slide")
    file = next(f for f in files_of(folder) if name_of(f) == slide)
    x, coords, side, told = placed(file, pixels_of(cfg))
    if not side:
        raise UserError(f"{slide} has a single tile whose size is not told: there is nothing to map")
    picture, factor = from_slide(cfg.image, told) if cfg.image else from_pyramids(cfg.data, slide, told)
    ends = torch.tensor(picture.shape[1::-1]) * factor + side
    if (coords >= ends).any() or (coords <= -side).any():
        raise UserError(f"{file}: tiles of side {side}, as far as {coords.amax(0).tolist()}, lie outside of the image, "
                        f"which ends at {(ends - side).int().tolist()}: give the one they were cut from")
    t, meta = load_tensors(run_job(job))
    at, classes = meta["slides"].index(slide), meta["classes"]
    if t["fold"][at] < 0:
        raise UserError(f"{slide} is in no test fold: take one that is")
    probabilities, a = judge(job, t, at, x)
    heat, top = heat_of(a, coords, side, picture.shape[:2], factor)
    below = scale_below(picture.shape[1], slide, top)
    out = out_of(cfg) / f"map_{slide}_{file_of(job.name())}_{head}.png".replace(" ", "_")
    save_png(out, np.concatenate([overlay(picture, heat), below]))
    guesses = ", ".join(f"P({c}) = {p:.2f}" for c, p in zip(classes, probabilities))
    print(f"{out}: label {classes[t['y'][at]]}, {guesses}; the most attended patch weighs "
          f"{a.max() * len(a):.1f} times the mean one")

def main(argv):
    draw_map(configure(Config, argv, doc=__doc__))

if __name__ == "__main__":
    cli(main)
