"""Read checkpoints of others: files of tensors alone, and whether every key has its place in a model of ours.

in:  a .safetensors, .ckpt, .pt, .pth or .bin file   out: a flat state dict, published name -> tensor
read next: slides/keys.py
"""
from pathlib import Path
from textwrap import shorten

import torch

from common import UserError, load_tensors

# old checkpoints name these classes beside their tensors; they are read as empty classes that do nothing
INERT = [type("Namespace", (), {"__module__": "argparse"}),
         type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})]

def load_state_dict(path):
    """Read a foreign checkpoint (.safetensors, or .ckpt/.pt/.pth/.bin of tensors alone) as a flat state dict.
    A wrapping "state_dict" (CompVis), "ema" (the published CDM's) or "teacher" (DINO) is taken off. raises: UserError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: check the path")
    try:
        with torch.serialization.safe_globals(INERT):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch meets damaged bytes with IndexError, TypeError, struct.error and many more
        raise UserError(f"{path} is damaged or holds more than tensors (which could run code, so it is refused): "
                        f"download it again, or save its state_dict as .safetensors") from err
    for wrap in ("state_dict", "ema", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(wrap), dict):
            state = state[wrap]
    if not isinstance(state, dict) or not any(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; give a checkpoint of the published layout")
    return state

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
    shaped = [f"{key} is {tuple(state[key].shape)}, expected {tuple(ours[name].shape)}"
              for name, key in names.items() if key in state and state[key].shape != ours[name].shape]
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
