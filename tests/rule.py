"""Weights by rule: the golden files hold inputs and outputs only, and the tests rebuild the weights behind them.

A weight is a function of its published name, its shape, a seed and a few gains, by numpy's frozen RandomState: u,
uniform in [-1,1) from the seed crc32(name) ^ seed (for encoders, whose seed is a list, crc32 of Python's text for
(seed, name)); then 1 + 0.3 u for a norm's scale, 0.1 u for a bias, else deviation `gain` ("std") or gain / sqrt(fan-in)
("fan"). A gain is [regex, mode, gain]; the first whose regex is found in the name counts.

The files in tests/golden were derived from what running the published ZoomLDM code made (CPU, float32, eval mode, torch
2.13), at commit 3203289. Of large activations every k-th element is kept, counted over the flattened tensor; images of
the encoders are grey levels; weights that follow no rule (tokens, positions, LayerScale) are kept themselves.
"""
import gzip
import json
import math
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the tests run whether or not the project is installed
from common import load_tensors  # noqa: E402
from summarizer import Summarizer, pack_grid  # noqa: E402
from unet import UNet  # noqa: E402
from zoom_vae import VQVAE  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"

# ----- 1. The rule -----

def tensor(name, shape, seed, gains):
    """One weight as a float32 tensor."""
    mode, gain = next(((m, g) for pattern, m, g in gains if re.search(pattern, name)), ("fan", 1.0))
    if mode == "std":
        scale, shift = gain * math.sqrt(3), 0.0
    elif len(shape) > 1:
        scale, shift = gain * math.sqrt(3 / math.prod(shape[1:])), 0.0
    else:
        scale, shift = (0.3, 1.0) if name.endswith("weight") else (0.1, 0.0)
    key = zlib.crc32(name.encode()) ^ seed if isinstance(seed, int) else zlib.crc32(repr((tuple(seed), name)).encode())
    draw, out = np.random.RandomState(key), np.empty(math.prod(shape), np.float32)
    for part in np.split(out, range(1 << 16, out.size, 1 << 16)):  # in pieces that stay in the cache
        u = draw.random_sample(part.size)
        u *= 2
        u -= 1
        u *= scale
        u += shift
        part[:] = u
    return torch.from_numpy(out).view(*shape)

def weights(shapes, seed, gains):
    """in: {name: shape}. out: {name: tensor}. On two threads: numpy releases the lock."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(shapes, pool.map(lambda item: tensor(*item, seed, gains), shapes.items()), strict=True))

def fingerprint(state, every=1):
    """One number that changes with any bit of every `every`-th tensor of a state dict, in order of name."""
    crc = 0
    for name in sorted(state)[::every]:
        crc = zlib.crc32(state[name].numpy().tobytes(), crc)
    return crc

# ----- 2. Reading -----

@cache
def golden(name):
    """out: ({"in/..", "out/.."}, meta) of one golden file. Nobody may write into the tensors."""
    return load_tensors(GOLDEN / f"{name}.safetensors")

@cache
def manifest(name):
    """Published name -> shape. name: unet, first_stage, cond_stage (all of full size, with the prefix of a whole
    checkpoint), ema, buffers, full_uni and the like, or one of the golden modules (both without prefix)."""
    keys = json.loads(gzip.decompress((GOLDEN / "keys.json.gz").read_bytes()))
    return {k: tuple(v) for k, v in keys[name].items()}

def state_dict(name):
    """The weights behind a golden file, by published name. Fresh tensors each time."""
    if name.startswith("full_"):  # too large to keep
        return rebuilt(name)
    return {k: v.clone() for k, v in kept(name).items()}

@cache
def kept(name):
    return rebuilt(name)

def rebuilt(name):
    tensors, meta = golden(name)
    state = weights(manifest(name), meta["seed"], meta["gains"])
    state |= {k[8:]: v.clone() for k, v in tensors.items() if k.startswith("weights/")}  # those that follow no rule
    assert fingerprint(state, meta["every"]) == meta["crc"], f"{name}: the rule no longer gives the published weights"
    return state

def assert_close(ours, reference, tol, what="", every=1):
    """max|a-b| / max(1, max|b|) <= tol; says where the largest difference is. reference: every `every`-th element."""
    assert every > 1 or ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} for {tuple(reference.shape)}"
    a, b = ours.detach().flatten()[::every].double(), reference.detach().flatten().double()
    assert a.shape == b.shape and a.isfinite().all(), f"{what}: {len(a)} numbers for {len(b)}, or not finite"
    i = int((a - b).abs().argmax())
    rel = float((a - b).abs()[i] / b.abs().max().clamp_min(1))
    assert rel <= tol, f"{what}: off by {rel:.2e} (allowed {tol:.0e}), element {i * every}: {a[i]:.7g} for {b[i]:.7g}"

def assert_golden(ours, name, key, tol):
    """Compare with out/`key` of the golden file `name`."""
    tensors, meta = golden(name)
    assert_close(ours, tensors["out/" + key], tol, f"{name} {key}", meta["every_kth"].get("out/" + key, 1))

# image sizes that are kept
ENCODERS = {"uni": ("96x96", "224x224"), "uni2h": ("98x98", "224x224"), "dinov2": ("70x70", "126x126"),
            "dinov2_reg": ("70x70", "126x126"), "hipt": ("96x96", "256x256"), "phikon": ("96x96", "224x224")}

def picture(levels, config):
    """in: grey levels (B,3,H,W) uint8. out: float32, normalised as an encoder wants it."""
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    return (levels.float() / 255 - mean) / std

# ----- 3. Our modules behind the published weights -----

KIND = {"vae": VQVAE, "summarizer": Summarizer, "unet": UNet}
PREFIX = {"vae": "first_stage_model.", "summarizer": "cond_stage_model.", "unet": "model.diffusion_model."}

@cache
def small(name):
    """The small module behind a golden file."""
    return KIND[name.split("_")[0]].from_official(state_dict(name)).requires_grad_(False)

def pack(e):
    """pack_grid over a batch (B,E,h,w); a grid that is not square is laid out by hand, by the published rule."""
    if e.shape[2] == e.shape[3]:
        tokens, masks = zip(*(pack_grid(x) for x in e))
        return torch.stack(tokens), torch.stack(masks)
    n = e.shape[2] * e.shape[3]
    tokens, mask = e.new_zeros(len(e), 64, e.shape[1]), torch.zeros(len(e), 64, dtype=torch.bool)
    tokens[:, 32 - n // 2:32 + n // 2] = e.flatten(2).transpose(1, 2)
    mask[:, 32 - n // 2:32 + n // 2] = True
    return tokens, mask
