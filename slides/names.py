"""What an image is called: in folders, in tables, in the files of features that this and other tools write.

An image is named by its path below the folder that was built, as UUID/a.svs; its files join that by __. Tables and
other tools leave out folders, the ending, or both. Two names are of one image if nothing differs that both have.
in:  names, a table   out: which name is which; rows"""
import csv
import io
import re
from pathlib import Path

from common import UserError

SUFFIXES = (".safetensors", ".pt", ".npy", ".h5")  # of features
ENDING = re.compile(r"((\.ome)?\.(svs|tiff?|ndpi|mrxs|scn|bif|vms|vmu|svslide|czi|dcm|qptiff|btf|tf[28]|isyntax|png|"
                    r"jpe?g|jp2|j2k|webp|bmp|gif|p[gp]m)|\.ome)$", re.IGNORECASE)
NOTHING = {"", "nan", "na", "n/a", "null", "<na>"}  # how tables say that a cell is empty

# ----- 1. Names -----

def parts(name):
    """in: "UUID/a.svs" or "UUID__a". out: its folders, the name proper, the ending or "". 7.0 is 7, as tables say."""
    *folders, last = str(name).replace("\\", "/").replace("__", "/").strip("/").split("/")
    proper = ENDING.sub("", last)
    ending = last[len(proper):].lower().removesuffix(".ome")                # of a.ome.tiff, tools leave a.ome
    return [f for f in folders if f], re.sub(r"^(\d+)\.0+$", r"\1", proper), ending

def file_of(name):
    """What the files of an image are called, without ending: data, latents, features, masks."""
    return name.replace("/", "__")

def same(one, other):
    """Whether two names, as `parts`, can be of one image: folders and endings that only one has do not matter."""
    (folders, a, ending), (others, b, end) = one, other
    n = min(len(folders), len(others))
    tails = folders[len(folders) - n:], others[len(others) - n:]
    return a == b and tails[0] == tails[1] and (ending == end or not ending or not end)

def match(names, known, where):
    """Which known name each name means, an exact one first. out: {name: known one}, without those that mean none.
    raises: UserError if one could mean two, or two mean the same."""
    alike, found, taken = {}, {}, {}
    for k in known:
        alike.setdefault(parts(k)[1], []).append(k)
    for name in names:
        mine = parts(name)
        near = [k for k in alike.get(mine[1], ()) if same(mine, parts(k))]
        near = [k for k in near if parts(k) == mine] or near
        if len(near) > 1:
            raise UserError(f"{where}: {name} can be {near[0]} or {near[1]}: write folder and ending, as there")
        if near and taken.setdefault(near[0], name) != name:
            raise UserError(f"{where}: {taken[near[0]]} and {name} can both be {near[0]}: write its folder and ending")
        if near:
            found[name] = near[0]
    return found

def few(names, comma=", "):
    names = list(map(str, names))
    return comma.join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

def name_of(file):
    """What a file of features is of: its name without suffix; of SLIDE/features.npy (Owkin) that of the folder."""
    file = Path(file)
    return file.parent.name if file.stem == "features" else file.stem

def files_of(folder):
    """The files of features in a folder, or CLAM's in its h5_files or pt_files, sorted. raises: UserError if there is
    none, or two of one slide."""
    for pattern in ("*", "h5_files/*", "pt_files/*", "*/features.npy"):
        files = sorted(f for f in Path(folder).glob(pattern) if f.suffix in SUFFIXES and not f.name.startswith("."))
        if files:
            break
    else:
        raise UserError(f"{folder} holds no features ({', '.join(SUFFIXES)}): make them with python mil.py extract")
    for a, b in zip(files, files[1:]):
        if name_of(a) == name_of(b):
            raise UserError(f"{a} and {b} are features of one slide: take one of them out")
    return files

# ----- 2. Tables -----

def decoded(path):
    """The text of a table, whatever a spreadsheet wrote it as."""
    raw = Path(path).read_bytes()
    if raw[:2] in (b"PK", b"\xd0\xcf"):
        raise UserError(f"{path} is a spreadsheet: save it as CSV")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:2]:
        kind = "utf-16-be" if raw[0] in (0, 0xFE) else "utf-16-le"
        return raw[:len(raw) // 2 * 2].decode(kind, "replace").lstrip("\ufeff")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")

def read_table(path, needed):
    """The rows of a table as dicts of text; commas, semicolons or tabs between its columns; `Slide ID` is slide_id.
    raises: UserError if it cannot be read, lacks a column, has one twice, or a row is longer than the first."""
    try:
        text = re.sub(r"^sep=.\r?\n", "", decoded(path))             # a line for Excel
        first = text.partition("\n")[0]
        comma = max(",;\t", key=first.count)
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=comma, skipinitialspace=comma != "\t"))
    except (OSError, csv.Error) as err:
        raise UserError(f"{path} cannot be read as CSV ({err}): give a file with columns {', '.join(needed)}") from err
    rows = [[cell.strip() for cell in row] for row in rows if any(map(str.strip, row))]
    words = [re.sub(r"(?<=[a-z])(?=[A-Z])|\W+", "_", cell) for cell in rows[0]] if rows else []  # SlideID, Slide ID
    head = [word.lower().strip("_") for word in words]
    lacking = [c for c in needed if c not in head]
    if lacking or len(rows) < 2:
        raise UserError(f"{path} has no column {', '.join(lacking)}, or no row, but columns {few(head)}: give a CSV "
                        f"with {', '.join(needed)}")
    twice = [c for c in needed if head.count(c) > 1]
    long = [row for row in rows if any(row[len(head):])]
    if twice or long:
        raise UserError(f"{path}: " + (f"column {twice[0]} is there twice" if twice else f"more cells than columns in "
                                       f"{few(long[0])}") + ": write it again")
    return [dict(zip(head, row + [""] * len(head))) for row in rows[1:]]
