"""Start a training from another run, from weights of ours, or, as the papers did, from a published VAE or U-Net
(cin256-v2.ckpt).

run: python train.py PRESET --init_from=RUN_OR_FILE"""
from dataclasses import asdict
from pathlib import Path

import torch

from common import UserError, load_meta
from diffusion import ZoomLDM
from slides.keys import load_vae, start_unet
from slides.weights import load_state_dict, named, sign_of
from unet import UNet
from zoom_vae import VQVAE

def model_of(source):
    """The whole model in a run folder or in a file of ours, such as weights/toy.safetensors; None of a published file.
    raises: UserError."""
    path = Path(source)
    ours = path.suffix == ".safetensors" and path.is_file() and not sign_of(path) and "unet" in load_meta(path)
    return ZoomLDM.from_run(path) if path.is_dir() or ours else None

def finished_vae(path):
    """A VAE that needs no training: of a run folder; of a file of ours, such as weights/vae.safetensors; or of a
    published file, which may be a whole latent diffusion checkpoint. out: (vae, latent scale). raises: UserError."""
    if path.is_dir():
        return VQVAE.from_run(path / "vae.safetensors")
    if model := model_of(path):
        return model.vae, model.latent_scale
    if path.suffix == ".safetensors" and not sign_of(path) and "latent_scale" in load_meta(path):
        return VQVAE.from_run(path)                         # {} of a published file
    with named(path):
        return load_vae(load_state_dict(path)), 1.0

def start_weights(cfg, ranks, pyramids, base, resumed):
    """out: {name in train.LDMStage: tensor}. in: base, the model of another run, or None for a published file, which
    is not read if the run is `resumed`. raises: UserError if they do not fit settings and data."""
    if base is not None:
        check_start(base, cfg, pyramids)
        if ranks.rank == 0:
            print(f"start: {'U-Net and Summarizer' if cfg.vae_weights else 'all networks'} of {cfg.init_from}")
        parts = {"unet": base.unet, "summarizer": base.summarizer}
        return {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    if resumed:
        return {}
    with torch.device("meta"):
        unet = UNet(cfg.unet)
    with named(cfg.init_from):
        weights, dropped = start_unet(unet, load_state_dict(cfg.init_from))
    if cfg.pred != "eps" or cfg.schedule != "scaled_linear":
        raise UserError(f"--init_from={cfg.init_from} is a published U-Net: give --pred=eps --schedule=scaled_linear")
    if ranks.rank == 0:
        print(f"U-Net: {len(weights)} tensors of {cfg.init_from}; dropped, for the class embedder: "
              f"{', '.join(dropped) or 'nothing'}")
    return {f"unet.{k}": v for k, v in weights.items()}

def check_start(base, cfg, pyramids):
    """raises: UserError if the model `base` of another run cannot go on with these settings and data."""
    parts = {"summarizer": cfg.summarizer, "unet": cfg.unet}
    if not cfg.vae_weights and not Path(cfg.out, "vae.safetensors").exists():
        parts["vae"] = cfg.vae
    wrong = []
    for name, part in parts.items():
        for key, value in asdict(getattr(base, name).cfg).items():
            if value != getattr(part, key) and key not in ("checkpoint", "embed_dim", "scales", "texture"):
                wrong.append(f"--{name}.{key}={value}")
    for key, value in ("pred", base.pred), ("schedule", base.schedule.kind):
        if value != getattr(cfg, key):
            wrong.append(f"--{key}={value}")
    if wrong:
        raise UserError(f"--init_from={cfg.init_from} has other networks: give its preset, or {' '.join(wrong)}")
    there = (base.info.get("encoder"), base.summarizer.cfg.embed_dim, base.summarizer.cfg.scales)
    here = (pyramids.encoder, pyramids.embed_dim, pyramids.scales)
    if there != here or base.info.get("std") != pyramids.std:
        raise UserError(f"{cfg.data} does not suit --init_from={cfg.init_from}: embeddings by {here[0]}, {here[1]} "
                        f"wide, at {here[2]} scales, not by {there[0]}, {there[1]} wide, at {there[2]}; build it alike")
