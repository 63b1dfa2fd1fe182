"""Going on with a run: are its settings those it began with, and is its newest checkpoint whole?

in:  a file of a run   out: nothing, or a sentence that says what to do     read next: train.py"""
import json
import os
from dataclasses import asdict

from safetensors import SafetensorError

from common import UserError, checksum, load_meta, load_tensors, previous

# what may differ when a run goes on: it changes where, how long and how loud it runs, not what it computes
FREE = {"preset", "out", "device", "threads", "workers", "compile", "unet.checkpoint", "steps", "micro", "log_every",
        "sample_every", "save_every", "run", "sheet"}
GONE = {"disc_weight": 0.0, "lpips": "", "shares": []}  # settings of earlier versions that did change it

def flat(settings, start=""):
    """Nested settings as one dict of dotted names; those of the loop and its optimiser once stood in no group."""
    out = {}
    for key, value in settings.items():
        name = start + key
        inner = "" if name in ("optim", "loop") else name + "."
        out |= flat(value, inner) if isinstance(value, dict) else {name: value}
    return out

def compare_settings(path, cfg, only="", vae=""):
    """raises: UserError if the file at `path` was made with other settings (whose names start with `only`) than cfg, or
    on another VAE than the one of this fingerprint; earlier versions did not say which."""
    meta = load_meta(path)
    if vae and meta.get("vae", vae) != vae:
        raise UserError(f"{path} was trained on another VAE (fingerprint {meta['vae']}) than the {path.parent}/"
                        f"vae.safetensors beside it ({vae}): put its own back, or give another --out to start afresh")
    if not meta.get("settings"):
        raise UserError(f"{path} does not say what settings it belongs to, so it is none of ours: move it away")
    now, default = (GONE | flat(json.loads(json.dumps(asdict(c)))) for c in (cfg, type(cfg)()))
    then = default | flat(meta["settings"])
    changed = [k for k in now if k not in FREE and k.startswith(only) and now[k] != then[k]]
    if changed:
        afresh = "another --out" if "out" in now else f"move {path.name.split('.')[0]}*.safetensors away"
        raise UserError(f"{path} belongs to a run with other settings ({', '.join(changed)}): give the same ones to "
                        f"resume, or {afresh} to start afresh")

def read_state(path):
    """in: a checkpoint. out: (tensors, meta). raises: UserError if it is not as it was written."""
    try:
        tensors, meta = load_tensors(path)
        crc = meta.pop("crc", None)  # the first versions wrote none
        if crc not in (None, checksum(tensors, meta)) or "step" not in meta:
            raise ValueError("its checksum does not fit")
    except (ValueError, RuntimeError, SafetensorError) as err:
        raise err if isinstance(err, UserError) else UserError(f"{path} is damaged: {err}") from err
    return tensors, meta

def fall_back(path, ranks=None):
    """The newest whole checkpoint; says so if it is not `path`. in, out: as common.newest_state."""
    try:
        return path, *read_state(path)
    except UserError as err:
        fault, file = err, previous(path)
    try:
        tensors, meta = read_state(file)
    except UserError as err:
        raise UserError(f"no checkpoint is whole: {fault}; {err}; remove them to start afresh") from err
    if ranks:
        ranks.barrier()  # all have looked
        if ranks.rank == 0:
            print(f"{fault}: falling back to {file}, step {meta['step']}")
            if path.exists():
                os.replace(path, f"{path}.damaged")
    return file, tensors, meta
