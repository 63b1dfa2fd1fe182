"""Weights by rule: the golden files hold inputs and outputs only, and the tests rebuild the weights behind them.

A weight is a function of its published name, its shape, a seed and a short list of gains, by way of numpy's frozen
RandomState, so it has the same bits on every machine. Every tensor is u, uniform in [-1,1) from the seed
crc32(name) ^ seed (for encoders, whose seed is a list, crc32 of Python's text for (seed, name)), scaled and shifted:
1 + 0.3 u for a norm's scale, 0.1 u for a bias, else deviation `gain` ("std") or gain / sqrt(fan-in) ("fan"). A gain
is [regex, mode, gain]; the first whose regex is found in the name counts.

The files in tests/golden were derived, by `derive` below, from files that running the published ZoomLDM code made (CPU,
float32, eval mode, torch 2.13). What they leave out: all weights, inputs that stand in another file already, and most
of the large activations (every k-th element is kept, counted over the flattened tensor). Images of the encoders are
kept as grey levels; those of their weights that follow no rule (tokens, positions, LayerScale) are kept themselves.
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
from common import load_tensors, save_tensors  # noqa: E402

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
    tensors, meta = golden(name)
    state = weights(manifest(name), meta["seed"], meta["gains"])
    state |= {k[8:]: v.clone() for k, v in tensors.items() if k.startswith("weights/")}  # those that follow no rule
    assert fingerprint(state, meta["every"]) == meta["crc"], f"{name}: the rule no longer gives the published weights"
    return state


def assert_close(ours, reference, tol, what="", every=1):
    """max|a-b| / max(1, max|b|) <= tol; says where the largest difference is. every: see derive."""
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


# ----- 3. Deriving the committed files (run once: python tests/rule.py FOLDER_OF_FULL_GOLDENS) -----

THIN = {"full_unet_rule": {"out/middle_block": 7, "out/output_blocks_3": 7}, "vae_small": {"out/decode_no_quant": 5},
        "full_vae_rule": {"out/decode": 5, "out/decode_no_quant": 5},
        "full_summarizer_rule": {f"out/tokens_{g}": 3 for g in ("1x1", "2x2", "4x4", "8x8")}}


# image sizes that are kept
ENCODERS = {"uni": ("96x96", "224x224"), "uni2h": ("98x98", "224x224"), "dinov2": ("70x70", "126x126"),
            "dinov2_reg": ("70x70", "126x126"), "hipt": ("96x96", "256x256"), "phikon": ("96x96", "224x224")}
FULL = {"uni": "uni_vitl16", "uni2h": "uni2_h", "dinov2": "dinov2_vitl14", "dinov2_reg": "dinov2_vitl14_reg4",
        "hipt": "hipt_vit256_small", "phikon": "phikon"}


def picture(levels, config):
    """in: grey levels (B,3,H,W) uint8. out: float32, normalised as an encoder wants it."""
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    return (levels.float() / 255 - mean) / std


def derive_encoder(source, target, name, shapes):
    from safetensors import safe_open
    with safe_open(source / f"encoder_{name}.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
        stored = {k[8:]: f.get_tensor(k) for k in f.keys() if k.startswith("weights/")}
        kept = {k: f.get_tensor(k) for k in f.keys()
                if "pos37" in k or k[0] in "io" and k.rpartition("_")[2] in ENCODERS[name]}
    gains = [["patch_embed", "fan", 0.1], ["(qkv|query|key|value).weight", "fan", 1.5]] + (
        [["(attn.proj|output.dense|mlp.fc2).weight", "fan", 0.15]] if name in ("hipt", "phikon") else [])
    shapes[f"encoder_{name}"] = {k: list(v.shape) for k, v in stored.items()}
    by_rule = weights(shapes[f"encoder_{name}"], [31007, name], gains)
    kept |= {"weights/" + k: v for k, v in stored.items() if not torch.equal(v, by_rule[k])}
    for k in [k for k in kept if k.startswith("in/image")]:
        mean, std = (torch.tensor(config[n])[:, None, None] for n in ("mean", "std"))
        levels = ((kept[k] * std + mean) * 255).round().byte()
        assert torch.equal(picture(levels, config), kept[k])
        kept[k] = levels
    every = {k: 7 for k in kept if "patch_tokens" in k}
    kept = {k: v.flatten()[::every[k]].contiguous() if k in every else v for k, v in kept.items()}
    meta = {"config": config, "seed": [31007, name], "gains": gains, "every": 1, "crc": fingerprint(stored),
            "every_kth": every}
    save_tensors(target / f"encoder_{name}.safetensors", kept, meta)
    (target / f"encoder_{name}.safetensors").chmod(0o644)
    print(f"encoder_{name}: {len(stored)} weights, {sum(k.startswith('weights/') for k in kept)} of them stored")


def derive(source, target=GOLDEN):
    from safetensors import safe_open
    target.mkdir(exist_ok=True)
    keys = json.loads((source / "keys_brca.json").read_text())
    full = {k: keys[k] for k in ("unet", "first_stage", "cond_stage")}
    shapes = {**full, "ema": {e: keys["unet"][k] for k, e in keys["extra"]["model_ema_names"].items()},
              "buffers": {k: v["shape"] for part in ("schedule_buffers", "model_ema_scalars")
                          for k, v in keys["extra"][part].items()}}
    for name, part, cut in (("full_unet_rule", "unet", 2), ("full_vae_rule", "first_stage", 1),
                            ("full_summarizer_rule", "cond_stage", 1)):
        shapes[name] = {k.split(".", cut)[cut]: v for k, v in full[part].items()}
    # the same U-Net with 32 channels instead of 192 and a context of 64 instead of 512
    shapes["unet_1235_rule"] = {k: [d // 6 if d % 192 == 0 else 64 if d == 512 else d for d in v]
                                for k, v in shapes["full_unet_rule"].items()}
    shapes["full_cdm_rule"] = keys["cdm"]
    for name in ("vae_small", "unet_small", "unet_1235_rule", "summarizer_small", "full_vae_rule", "full_unet_rule",
                 "full_summarizer_rule", "ddim_small", "plms_small", "schedule", "cdm_small", "full_cdm_rule"):
        with safe_open(source / f"{name}.safetensors", "pt") as f:
            meta = {k: json.loads(v) for k, v in f.metadata().items() if k in ("config", "rule", "cfg_scale")}
            stored = {k[8:]: f.get_tensor(k) for k in f.keys() if k.startswith("weights/")}
            kept = {k: f.get_tensor(k) for k in f.keys() if not k.startswith("weights/")}
        if stored:
            shapes[name] = {k: list(v.shape) for k, v in stored.items()}
        rule = meta.pop("rule", None)
        if rule:
            meta |= {"seed": rule["seed"], "gains": rule["gains"], "every": 40 if name == "full_unet_rule" else 1}
            stored.pop("pos_embed", None)      # a fixed table, which the constructor makes
            shapes[name].pop("pos_embed", None)
            state = weights(shapes[name], rule["seed"], rule["gains"])
            meta["crc"] = fingerprint(state, meta["every"])
            assert all(torch.equal(state[k], v) for k, v in stored.items()), name
            print(f"{name}: {len(state)} weights rebuilt; {len(stored)} stored ones, all equal to the bit")
        if name in ("ddim_small", "plms_small"):   # the context is unet_small's, the first entries are x_T
            del kept["in/context"]
            if name == "plms_small":
                del kept["in/x_T"]                 # ddim_small's
            kept = {k: v[1:].contiguous() if k.endswith(("x_inter", "pred_x0")) else v for k, v in kept.items()}
            del kept["out/final"]                  # the last of x_inter
            kept.pop("out/eta1_final", None)
        if name == "schedule":
            kept = {k: v for k, v in kept.items() if k == "out/alphas_cumprod_float64" or k.startswith("out/ddim")
                    and "original" not in k and "sqrt" not in k and ("eta1" in k or "eta0_sigmas" in k)}
            with safe_open(source / "cdm_small.safetensors", "pt") as f:
                kept["out/cosine_alphas_cumprod_float64"] = f.get_tensor("out/full_alphas_cumprod")
        if name.endswith("summarizer_small"):
            kept = {k: v for k, v in kept.items() if "pre_encoder" not in k and "mixed" not in k}
        if name.endswith(("cdm_small", "cdm_rule")):  # of the prediction, not the variance, which is never used
            kept = {k: v for k, v in kept.items() if "_p_" not in k and "alphas" not in k and "betas" not in k}
            kept["out/out"] = kept["out/out"][:, :kept["in/x"].shape[1]].contiguous()
        meta["every_kth"] = THIN.get(name, {})
        kept = {k: v.flatten()[::meta["every_kth"].get(k, 1)].contiguous() if k in meta["every_kth"] else v
                for k, v in kept.items()}
        save_tensors(target / f"{name}.safetensors", kept, meta)
        (target / f"{name}.safetensors").chmod(0o644)
    encoders = json.loads((source / "keys_encoders.json").read_text())
    for name in ENCODERS:
        derive_encoder(source, target, name, shapes)
        shapes[f"full_{name}"] = encoders[FULL[name]]["keys"]
    text = json.dumps(shapes, separators=(",", ":"))
    (target / "keys.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    derive(Path(sys.argv[1]))
