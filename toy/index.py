"""index.json of a folder of pyramids, held against what it must be: such folders come from other people, too.

in:  the path   out: the index, whose names lead to places inside the folder that they are joined to"""
import json
from math import inf
from pathlib import Path

from common import UserError

INDEX = ("format", "patch", "scales", "embed_dim", "encoder", "std", "source", "slides")

def read(path):
    """raises: UserError if it is damaged, of another program, or names what lies outside its folder."""
    try:
        index = json.loads(path.read_text())
    except (ValueError, RecursionError):  # no text, no JSON, or nested without end
        index = None
    if not isinstance(index, dict) or {*INDEX} - index.keys() or index["format"] != 1:
        raise UserError(f"{path} is damaged, or no index of this program (format 1): make the data again")
    patch, scales, width, encoder, std, source, slides = (index[key] for key in INDEX[1:])
    checks = {"patch": whole(patch, 1), "scales": whole(scales) and scales <= 32, "embed_dim": whole(width, 1),
              "encoder": isinstance(encoder, str), "source": isinstance(source, dict),
              "std": isinstance(std, list) and len(std) == width and all(map(positive, std)),
              "slides": isinstance(slides, list) and all(isinstance(slide, dict) for slide in slides)}
    if all(checks.values()):
        checks["source"] = isinstance(source.get("weights", ""), str | None) and positive(source.get("mpp") or 1)
        checks |= {f"slide {k}": fits(slide, scales) for k, slide in enumerate(slides)}
    if wrong := [name for name, good in checks.items() if not good]:
        raise UserError(f"{path} is damaged at {', '.join(wrong[:8])}: make the data again, or fetch them anew")
    return index

def whole(x, least=0):
    return type(x) is int and least <= x < 2**40

def positive(x):
    return type(x) in (int, float) and 0 < x < inf

def inside(name):
    """Whether a name, with folders or without, leads to a place in the folder that it is joined to."""
    parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in parts), default=0)
    return 0 < longest < 256 and not Path(name).is_absolute() and ".." not in parts

def fits(slide, scales):
    """Whether a slide's entry has all that is read of it."""
    size, counts = slide.get("size"), slide.get("counts")
    lists = isinstance(size, list) and len(size) == 2 and isinstance(counts, list) and len(counts) >= scales
    named = inside(slide.get("name")) and inside(slide.get("file")) and isinstance(slide.get("split"), str)
    return lists and named and all(map(whole, [*size, *counts]))
