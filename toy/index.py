"""index.json of a folder of pyramids, held against what it must be: such folders come from other people, too.

in:  the path   out: the index, whose names lead to places inside the folder that they are joined to"""
import json
from pathlib import Path

from common import UserError

KINDS = dict(patch=int, scales=int, embed_dim=int, encoder=str, std=list, source=dict, slides=list)
INDEX = ("format", *KINDS)

def read(path):
    """raises: UserError if it is damaged, of another program, or names what lies outside its folder."""
    try:
        index = json.loads(path.read_text())
    except (ValueError, RecursionError):  # no text, no JSON, or nested without end
        index = None
    if not isinstance(index, dict) or {*INDEX} - index.keys() or index["format"] != 1:
        raise UserError(f"{path} is damaged, or no index of this program (format 1): make the data again")
    wrong = [key for key, kind in KINDS.items() if type(index[key]) is not kind] or list(misfits(index))
    if wrong:
        raise UserError(f"{path} is damaged at {', '.join(wrong[:8])}: make the data again, or fetch them anew")
    return index

def misfits(index):
    """What holds values that cannot be, of an index whose fields are of the right types: yields their names."""
    for key, least, most in ("patch", 1, 2**20), ("scales", 0, 32), ("embed_dim", 1, 2**20):
        if not least <= index[key] <= most:
            yield key
    if len(index["std"]) != index["embed_dim"] or not all(map(positive, index["std"])):
        yield "std"
    source = index["source"]
    mpp, weights, white = (source.get(key) for key in ("mpp", "weights", "white"))
    if not positive(mpp or 1) or not isinstance(weights, str | None) or not whole(white or 0):
        yield "source"
    for k, slide in enumerate(index["slides"]):
        if not isinstance(slide, dict) or not fits(slide, index["scales"]):
            yield f"slide {k}"

def whole(x):
    return type(x) is int and 0 <= x < 2**40

def positive(x):
    return type(x) in (int, float) and 1e-30 < x < 1e30  # as float32 holds it

def inside(name):
    """Whether a name, with folders or without, leads to a place in the folder that it is joined to."""
    parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in parts), default=0)
    return 0 < longest < 256 and not Path(name).is_absolute() and ".." not in parts

def fits(slide, scales):
    """Whether a slide's entry has all that is read of it."""
    size, counts = slide.get("size"), slide.get("counts")
    if type(size) is not list or type(counts) is not list or not isinstance(slide.get("split"), str):
        return False
    numbers = len(size) == 2 and len(counts) >= scales and all(map(whole, size + counts))
    return numbers and inside(slide.get("name")) and inside(slide.get("file"))
