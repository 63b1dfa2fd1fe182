"""Read checkpoints of others: files of tensors alone, and whether every key has its place in a model of ours.

in:  a .safetensors, .ckpt, .pt, .pth or .bin file   out: a flat state dict, published name -> tensor
read next: slides/keys.py
"""
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch

from common import UserError, load_tensors

# ----- 1. Files -----

SHIPPED = Path(__file__).resolve().parents[1] / "weights"  # the files that come with the repository

# how files begin that are no data at all: what they are, and what to do
SIGNS = ((rb"version https://git-lfs", "is a Git LFS pointer, a note of where the file lies: run `git lfs pull`"),
         (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|!--)",
          "is a web page: log in where the file lies, accept its licence, and download it"),
         (rb"(\xef\xbb\xbf)?\s*<", "is XML: give the file that it describes"),
         (rb"\s*[{\[]\s*[]}{\[\"]", "is JSON, settings or an index: give the file that it belongs to"),
         (rb"\x1f\x8b|BZh|\xfd7zXZ|Rar!|7z\xbc\xaf", "is a packed archive: unpack it first"),
         (rb"%PDF|%!PS", "is PDF or PostScript: export it as an image"),
         (rb"[\t\n\r -~\x80-\xff]{8,}\Z", "is text: download the file itself"))
ARRAYS = (rb"\x89HDF", "is HDF5, as of Keras: save them by PyTorch"), \
         (rb"\x93NUMPY", "is a NumPy array: save them by PyTorch")

# objects of these classes stand beside the tensors of training checkpoints: read as empty ones that do nothing
SCALARS = "scalar _reconstruct"
BESIDE = {"argparse": "Namespace", "builtins": "bool dict float int list object slice str tuple",
          "collections": "defaultdict", "datetime": "datetime timedelta", "pathlib": "PosixPath WindowsPath",
          "typing": "Any", "numpy": "dtype ndarray", "numpy.core.multiarray": SCALARS,
          "numpy._core.multiarray": SCALARS, "omegaconf.base": "ContainerMetadata Metadata",
          "omegaconf.dictconfig": "DictConfig", "omegaconf.listconfig": "ListConfig",
          "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode",
          "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
          "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint"}

class Inert:
    """What is made of them, whatever they were made with."""

    def __init__(self, *_):
        pass

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

INERT = [type(name, (Inert,), {"__module__": module}) for module, names in BESIDE.items() for name in names.split()]

def sign_of(path, signs=SIGNS):
    """What a file is that was taken for data, by its first bytes, and the remedy; "" if they do not say."""
    if not Path(path).is_file():
        return ""
    with open(path, "rb") as f:
        begins = f.read(256)
    return next((what for sign, what in signs if re.match(sign, begins, re.DOTALL)), "")

def way_back(path):
    """How to get a damaged or missing file again: one of weights/ comes with the repository, others are made."""
    here = Path(path).resolve().parent == SHIPPED
    return "`git checkout -- weights` brings it back (docs/weights.md)" if here else "make it again"

def explain(path, err):
    """Why a safetensors file cannot be opened, and what to do: one sentence. in: the path; what open raised."""
    path = Path(path)
    if path.is_file():
        return f"{path} is not a complete safetensors file ({sign_of(path) or err}); {way_back(path)}"
    if path.name == "ema.safetensors":
        return f"no trained model at {path}: check the folder, or train one with train.py"
    if path.resolve().parent == SHIPPED:
        return f"no file {path}: {way_back(path)}"
    return f"no file {path}: check the path, or run the command that makes it"

def load_state_dict(path):
    """Read a foreign checkpoint (.safetensors, or .ckpt/.pt/.pth/.bin of tensors alone) as a flat state dict, what
    stands around and before its keys taken off (see `bare`). raises: UserError that says what the file is instead."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: check the path")
    if what := sign_of(path, SIGNS + ARRAYS):
        raise UserError(f"{path} holds no weights, it {what}")
    state = load_tensors(path)[0] if path.suffix == ".safetensors" else unpickled(path)
    with named(path):
        found = bare(state) if isinstance(state, dict) else {}
    if not found:
        raise UserError(f"{path} holds no state dict of tensors: give a checkpoint of the published layout")
    return found

def unpickled(path):
    """What a file of torch.save holds. raises: UserError if that could run code, naming the class, or it is damaged."""
    try:
        with torch.serialization.safe_globals(INERT):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch meets damaged bytes with IndexError, TypeError, struct.error and many more
        said = str(err)
        if foreign := re.findall(r"GLOBAL (\S+) was not|but got <class '(.+)'>|(TorchScript)", said):
            raise UserError(f"{path} is damaged or holds more than tensors: {''.join(foreign[0])}, which could run "
                            f"code, so it is refused: save its state_dict as .safetensors where it was made") from err
        why = (re.findall(r"WeightsUnpickler error:\s*(.+)", said) or said.splitlines() or [type(err).__name__])[0]
        raise UserError(f"{path} is damaged or no file of tensors ({shorten(why, 200)}): download it again, or save "
                        f"its state_dict as .safetensors") from err

@contextmanager
def named(source):
    """Put the name of a file before what is found wrong with it."""
    try:
        yield
    except UserError as err:
        if isinstance(source, dict) or str(source) in str(err):
            raise
        raise UserError(f"{source}: {err}") from err

# ----- 2. What stands around and before the keys -----

# under which names checkpoints keep state dicts; the first counts, an average before what it was taken of
WRAPS = ("state_dict_ema", "model_ema", "state_dict", "ema", "teacher", "model_state_dict", "model", "module", "net")
AVERAGES = {"teacher", "ema", "ema_model", "model_ema"}
# what DistributedDataParallel, FSDP, recomputed activations, torch.compile and DINOv2's chunks of blocks put into names
WRAPPED = re.compile(r"(?:^|(?<=\.))(?:module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|_orig_mod\.?|"
                     r"(?<=\bblocks\.)\d+\.(?=\d+\.)")

def bare(state):
    """The tensors of what a checkpoint holds, by name: out of the dicts around them, names without what wrappers add.
    raises: UserError if there are several dicts of tensors of which none counts more, or names become the same."""
    for _ in range(4):  # deep at most
        inner = {k: v for k, v in state.items() if holds_tensors(v) and "optim" not in str(k)}
        known, flat = [k for k in WRAPS if k in inner], any(map(torch.is_tensor, state.values()))
        if len(inner) > 1 and not known and not flat:
            raise UserError(f"several state dicts in it, {', '.join(map(str, inner))}: save one of them alone")
        if inner and (known or not flat):
            state = inner[known[0] if known else next(iter(inner))]
    found = {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
    names = {k: WRAPPED.sub("", k) for k in found}
    if len({*names.values()}) < len(names):
        raise UserError("keys in it with and without the name of a wrapper (module., _orig_mod.): keep one of both")
    return {names[k]: v for k, v in found.items()}

def holds_tensors(x, depth=3):
    """Whether x is a dict with tensors in it, or in dicts in it."""
    return isinstance(x, dict) and any(torch.is_tensor(v) or depth and holds_tensors(v, depth - 1) for v in x.values())

def place(state, prefix, *anchors):
    """Where in a checkpoint a network stands. in: prefix, "" to find it; anchors, some of the network's keys.
    out: its tensors by name; the prefix before most anchors, that of an average first. raises: UserError if several
    networks fit alike."""
    if prefix:
        return state, prefix
    state = bare(state)
    hits = Counter(k.removesuffix(a) for a in anchors for k in state if f".{k}".endswith(f".{a}"))
    rank = {p: (bool({*p.split(".")} & AVERAGES), n) for p, n in hits.items() if n > 1}
    best = [p for p in rank if rank[p] == max(rank.values())]
    if len(best) > 1:
        raise UserError(f"several such networks in it, below {shorten(', '.join(sorted(best)), 300)}: save one alone")
    prefix, own = "".join(best), tuple(a.split(".")[0] + "." for a in anchors)
    astray = [k for k in state if k.startswith(own) and not k.startswith(prefix)]
    if astray:
        raise UserError(f"{len(astray)} unexpected: {shorten(', '.join(astray), 300)}, not below {prefix}")
    return state, prefix

# ----- 3. Against a model of ours -----

def form(x):
    return f"{tuple(x.shape)}" + ("" if x.is_floating_point() else f" {x.dtype}")  # quantised weights are none

def check_official(module, state, prefix, rename, ignore=()):
    """Hold a published state dict against `module`. in: rename maps our parameter names to published ones, after
    `prefix`; ignore, beginnings of keys that are bookkeeping. out: {our name: published key}. raises: ValueError that
    lists missing, unexpected and mis-shaped keys."""
    ours = module.state_dict()
    names = {name: prefix + rename(name) for name in ours}
    known = {*names.values()}
    ignored = tuple(prefix + i for i in ignore)
    extra = [k for k in state if k.startswith(prefix) and k not in known and not k.startswith(ignored)]
    missing = [key for key in names.values() if key not in state]
    shaped = [f"{key} is {form(state[key])}, expected {form(ours[name])}"
              for name, key in names.items() if key in state and form(state[key]) != form(ours[name])]
    text = ""
    for what, keys in ("missing", missing), ("unexpected", sorted(extra)), ("of another shape", shaped):
        text += f"; {len(keys)} {what}: {shorten(', '.join(keys), 300)}" if keys else ""
    if text:
        raise UserError(f"this is not a published {type(module).__name__} checkpoint{text}")
    return names

def load_official(module, state, prefix, rename, ignore=()):
    """Copy a published state dict into `module`, which may be on the meta device. in, raises: as check_official.
    out: module."""
    names = check_official(module, state, prefix, rename, ignore)
    if next(module.parameters()).is_meta:
        module.to_empty(device=next(iter(state.values())).device)
    module.load_state_dict({name: state[key] for name, key in names.items()})
    return module

def has(state, start):
    """Whether there is a key that begins so."""
    return any(k.startswith(start) for k in state)

def count_of(state, start):
    """How many numbers, from 0 on, follow `start` in the keys."""
    n = 0
    while has(state, f"{start}{n}."):
        n += 1
    return n

def size_of(state, key, dim, default, multiple=1):
    """The size of one tensor along `dim`, of a bias where one tells. A tensor that is missing, or cannot be, gives
    `default`: it is named afterwards, when the keys are checked."""
    shape = state[key].shape if key in state else ()
    size = shape[dim] if len(shape) > dim else 0
    return size if size and size % multiple == 0 else default

def renamed(name, pairs):
    """Our name of a tensor -> the published one, by replacements (ours, theirs) in this order."""
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name
