"""The files a training resumes from: written atomically, checked when read, the last few kept.

state.safetensors is the newest checkpoint, state.1.safetensors the one before, and so on; vae_state.safetensors and the
like are those of other stages. One that a power cut or a flipped bit has damaged is passed over for the one before it.

run: python train.py; the same command resumes      read next: log.py
"""
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common import UserError, atomic, load_tensors, open_tensors

# ----- 1. Settings: a run goes on with those it began with -----

# settings that may differ when a run is resumed: they do not change what is computed, only where, how long and how loud
# (micro: unless there is batch norm, in PatchGAN or the CNN Summarizer; max_skips: unless there is something to skip)
FREE = {"preset", "out", "device", "threads", "workers", "compile", "channels_last", "unet.checkpoint", "plot", "steps",
        "micro", "toy", "log_every", "sample_every", "save_every", "keep", "max_skips", "profile", "run", "sheet",
        "made_for"}  # made_for: cdm.py compares it, for files that lack it too


def flat(settings, start=""):
    """Nested settings as one dict, under dotted names."""
    inner = [flat(v, f"{start}{k}.") if isinstance(v, dict) else {start + k: v} for k, v in settings.items()]
    return {k: v for part in inner for k, v in part.items()}


def check_settings(path, cfg, only=""):
    """raises: UserError if the file at `path`, should it exist, was made with other settings (whose names start with
    `only`) than cfg; a setting that did not exist then counts as its default. Every rank of a run reads the same file,
    so all stop together."""
    if not path.exists():
        return
    with open_tensors(path) as f:
        then = json.loads((f.metadata() or {}).get("json", "{}")).get("settings", {})
    now, default = (flat(json.loads(json.dumps(asdict(c)))) for c in (cfg, type(cfg)()))
    if not then:
        raise UserError(f"{path} does not say what settings it belongs to, so it is none of ours: move it away")
    then = default | flat(then)
    changed = [k for k in now if k not in FREE and k.startswith(only) and now[k] != then.get(k)]
    if changed:
        afresh = "another --out" if "out" in now else f"move {path.name.split('.')[0]}*.safetensors away"
        raise UserError(f"{path} belongs to a run with other settings ({', '.join(changed)}): give the same ones to "
                        f"resume, or {afresh} to start afresh")


def fits(base, cfg, pyramids):
    """raises: UserError if the model `base` of another run cannot go on with these settings and data."""
    own = not (cfg.vae_weights or Path(cfg.out, "vae.safetensors").exists())
    parts = {"summarizer": cfg.summarizer, "unet": cfg.unet} | ({"vae": cfg.vae} if own else {})
    wrong = [f"--{name}.{key}={value}" for name, part in parts.items()
             for key, value in asdict(getattr(base, name).cfg).items() if value != getattr(part, key)
             and key not in ("checkpoint", "embed_dim", "scales")]
    wrong += [f"--{key}={value}" for key, value, given in (
        ("pred", base.pred, cfg.pred), ("schedule", base.schedule.kind, cfg.schedule)) if value != given]
    if wrong:
        raise UserError(f"--init_from={cfg.init_from} has other networks: give its preset, or {' '.join(wrong)}")
    s, info = base.summarizer.cfg, base.info
    there, here = (info.get("encoder"), s.embed_dim, s.scales), (pyramids.encoder, pyramids.embed_dim, pyramids.scales)
    if there != here or info.get("std") != pyramids.std:
        raise UserError(f"{cfg.data} does not suit --init_from={cfg.init_from}: embeddings by {here[0]}, {here[1]} "
                        f"wide, at {here[2]} scales, not by {there[0]}, {there[1]} wide, at {there[2]}; build it alike")


# ----- 2. Files -----

def fingerprint(module):
    """crc32 over all weights: tells whether latents or tokens on disk were made by this very network."""
    crc = 0
    for _, v in sorted(module.state_dict().items()):
        crc = zlib.crc32(v.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def checksum(tensors, meta):
    """crc32 over all that a state file holds. Disks and networks flip bits without an error."""
    crc = zlib.crc32(json.dumps(meta).encode())
    for k, v in sorted(tensors.items()):
        crc = zlib.crc32(f"{k} {tuple(v.shape)} {v.dtype}".encode(), crc)
        crc = zlib.crc32(v.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def older(path, k):
    """The name of the checkpoint k saves before the newest, which is `path`."""
    return path.with_name(f"{path.stem}.{k}.safetensors") if k else path


def before(path):
    """The checkpoints there are from before `path`, latest first. out: [(k of `older`, file)]."""
    return sorted((int(p.suffixes[-2][1:]), p) for p in path.parent.glob(f"{path.stem}.[0-9]*.safetensors"))


def save_state(path, cfg, step, net, ema, opt):
    """Raw weights, averaged weights, optimiser moments: tensors only, in one atomic file. cfg.keep files stay."""
    moments = {f"opt.{i}.{k}": v for i, s in opt.state_dict()["state"].items() for k, v in s.items()}
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in (ema or {}).items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in (tensors | moments).items()}
    meta = {"step": step, "settings": asdict(cfg)}
    with atomic(path) as tmp:
        save_file(tensors, tmp, {"json": json.dumps(meta | {"crc": checksum(tensors, meta)})})
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())  # before the older files move: a full disk leaves them where they are
        for k in range(cfg.keep - 1, 0, -1):
            if older(path, k - 1).exists():
                os.replace(older(path, k - 1), older(path, k))
    for k, file in before(path):
        if k >= cfg.keep:  # from when more were kept
            file.unlink()


def read_state(path):
    """in: a state file. out: (tensors, meta). raises: UserError if it is not as it was written."""
    try:
        tensors, meta = load_tensors(path)
        crc, step = meta.pop("crc", None), meta["step"]  # the first versions wrote no crc
        if crc not in (None, checksum(tensors, meta)):
            raise UserError(f"{path} is damaged: its checksum does not fit, step {step}")
    except (KeyError, ValueError, RuntimeError, SafetensorError) as err:
        raise err if isinstance(err, UserError) else UserError(f"{path} is damaged ({err})") from err
    return tensors, meta


def newest_state(path, ranks=None):
    """The newest checkpoint that is whole: `path`, else one from before it. out: (file, tensors, meta), None if there
    is no file at all. ranks, if given: rank 0 says what is wrong with newer files and puts them out of the way.
    raises: UserError if all are damaged."""
    earlier, faults = [file for _, file in before(path)], {}
    for file in (path, *earlier) if path.exists() or earlier else ():
        try:
            found = (file, *read_state(file))
            break
        except UserError as err:
            faults[file] = str(err)
    else:
        if faults:
            raise UserError(f"no checkpoint is whole: {'; '.join(faults.values())}; remove them to start afresh")
        return None
    if ranks and faults:
        ranks.barrier()  # all have looked
        for bad, why in faults.items() if ranks.rank == 0 else ():
            print(f"{why}: falling back to {file}, step {found[2]['step']}")
            if bad.exists():
                os.replace(bad, bad.with_name(bad.name + ".damaged"))
    return found


def goes_on(path, cfg):
    """Whether there is a checkpoint to go on from. raises: UserError if it was made with other settings than cfg, or
    none is whole."""
    if found := newest_state(path):
        check_settings(found[0], cfg)
    return found is not None


def resume(path, cfg, net, ema, opt, ranks):
    """Load the newest whole checkpoint into net, ema and opt. out: the step to go on from, 0 if there is none."""
    if (found := newest_state(path, ranks)) is None:
        return 0
    file, tensors, meta = found
    check_settings(file, cfg)
    groups = {"net.": {}, "ema.": {}, "opt.": {}}
    for k, v in tensors.items():
        groups[k[:4]][k[4:]] = v
    net.load_state_dict(groups["net."])
    for k, v in groups["ema."].items():
        ema[k].copy_(v)
    moments = {}
    for k, v in groups["opt."].items():
        i, _, key = k.partition(".")
        moments.setdefault(int(i), {})[key] = v.clone()  # kept: a mapped file would hold its disk space
    opt.load_state_dict({"state": moments, "param_groups": opt.state_dict()["param_groups"]})
    return meta["step"]
