"""Write the files of weights/ from a trained run: float16, each with a header that says what it came from.

    python -m weights.ship out/toy_on_vae            # its VAE, Summarizer and U-Net, a proxy, and its CDM if it has one
    python -m weights.ship                           # what is there: bytes, SHA-256, commit, data, command

A file is replaced as a whole. A VAE that is there already, and is the run's, stays as it is.
in:  a run folder   out: weights/*.safetensors     read next: docs/weights.md"""
import json
import os
import subprocess
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

import torch

import cdm
import train
from common import UserError, cli, configure, fingerprint, load_meta, load_tensors, save_tensors, setup
from data import Pyramids, read_index
from diffusion import ZoomLDM
from large import proxy as proxies
from large.resume import FREE, flat
from weights.shipped import NAMES, SHIPPED, check_seal, sealed
from zoom_vae import VQVAE

# settings that data and run decide, or that change nothing
DECIDED = FREE - {"steps"} | {"summarizer.embed_dim", "summarizer.scales", "unet.context_dim", "dit.tokens",
                              "dit.channels", "dit.scales", "source", "data"}

@dataclass
class Config:
    run: str = ""       # run folder; empty: only look
    vae: str = ""       # run folder of the training that made its VAE; default: what the run says itself
    data: str = ""      # data folder that commands read where none is given; default: that of the training
    out: str = ""       # folder to write; default: weights/ of this repository
    commit: str = ""    # at which the run was trained; default: the one that is checked out
    threads: int = 0    # 0 = PyTorch's choice

# ----- 1. Where weights come from -----

def short(value):
    """A setting as one would type it. Of paths that are whole, only the last name: others have other folders."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    if not isinstance(value, str):
        return str(value)
    return ",".join(Path(part).name if Path(part).is_absolute() else part for part in value.split(","))

def command_of(words, cls, presets, settings):
    """The command line that gives these settings, dicts in dicts as files hold them. in: words before the options;
    cls, presets: what reads them."""
    preset = settings["preset"]
    cfg = configure(cls, [preset], presets, ("preset",))
    usual, now = flat(json.loads(json.dumps(asdict(cfg)))), flat(settings)
    options = []
    for key in usual.keys() & now.keys() - DECIDED:
        if now[key] != usual[key]:
            options.append(f"--{key}={short(now[key])}")
    return " ".join([*words, *sorted(options)])

def training_of(run):
    """What config.json of a run says: (command, data), its data folders as their index.json describes them."""
    path = Path(run, "config.json")
    if not path.is_file():
        raise UserError(f"no {path}: give a run folder that train.py wrote")
    settings = json.loads(path.read_text())
    words = ["python train.py", settings["preset"], f"--data={short(settings['data'])}"]
    told = {short(folder): described(folder) for folder in settings["data"].split(",")}
    return command_of(words, train.Config, train.PRESETS, settings), told

def described(folder):
    """Plain types that say how a data folder is made again."""
    index = read_index(folder)
    source = {k: short(v) for k, v in index["source"].items() if v not in (None, "")}
    if source["command"] == "build":
        source["images"] = sorted({slide["name"].split("@")[0] for slide in index["slides"]})
    return source

def checked_out():
    """The commit of this checkout, with -dirty if files differ. raises: UserError if git does not say."""
    answer = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                            cwd=SHIPPED.parent, capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"git does not say which commit this is ({answer.stderr.strip()}): give --commit=")
    return answer.stdout.strip()

# ----- 2. Writing -----

def halved(tensors, name):
    """{name: tensor} in float16. raises: UserError if one of them does not fit in."""
    out = {}
    for key, x in tensors.items():
        out[key] = x.half() if x.is_floating_point() else x
        if not out[key].isfinite().all():
            raise UserError(f"{name}: {key} holds {float(x.abs().max()):.3g}, and float16 ends at 65504: train with "
                            f"weight decay, or ship float32")
    return out

@torch.no_grad()
def rounded(module, name):
    """Round the weights of a module to what float16 holds, in place. out: its state in float16."""
    state = halved(module.state_dict(), name)
    module.load_state_dict(state)
    return state

def vae_source(cfg, mark):
    """The training that made the VAE of this fingerprint: (command, data). raises: UserError if it is not known."""
    told = json.loads(Path(cfg.run, "config.json").read_text())["vae_weights"]
    run = cfg.vae or told or cfg.run
    if not Path(run).is_dir():
        raise UserError(f"{cfg.run} took its VAE from {run}: say by --vae=RUN which run trained it")
    vae, _ = VQVAE.from_run(Path(run) / "vae.safetensors")
    if fingerprint(vae) != mark:
        raise UserError(f"the VAE of {run} is not the one that {cfg.run} was trained on: say by --vae=RUN which run is")
    return training_of(run)

def has_vae(path, mark):
    """Whether the shipped file at `path` is a VAE of this fingerprint already."""
    if not path.exists():
        return False
    vae, _ = VQVAE.from_run(path)
    return fingerprint(vae) == mark

def write(path, state, config, made):
    """Write one shipped file. made: (command, data, commit)."""
    command, data, commit = made
    told = config | {"command": command, "data": data, "commit": commit}
    save_tensors(path, state, sealed(state, told))

def load_cdm(run, model):
    """The CDM of a run and the settings of its training; None without one."""
    if not Path(run, "cdm.safetensors").exists():
        print(f"{run} has no cdm.safetensors: none is shipped (python cdm.py train {run} --dit.width=96)")
        return None
    return cdm.load_conditioner(run, "cdm", model), load_meta(Path(run, "cdm_state.safetensors"))["settings"]

def write_cdm(path, run, invented, summarizer, made):
    """Write the CDM, which from now on makes the tokens of the rounded Summarizer."""
    net, settings = invented
    state = rounded(net, "the CDM")
    sizes = {f.name: getattr(net.net.cfg, f.name) for f in fields(net.sizes)}
    info = net.info | {"summarizer": fingerprint(summarizer)}
    words = ["python cdm.py train", short(run), settings["preset"]]
    command = command_of(words, cdm.Config, cdm.PRESETS, settings)
    write(path, state, {"kind": "cdm", "dit": sizes, "info": info}, (command, *made[1:]))

def ship(cfg):
    """Write the files. raises: UserError before anything is written, if weights do not fit into float16, or it is not
    known where they come from."""
    out, commit = Path(cfg.out or SHIPPED), cfg.commit or checked_out()
    ranks, model = setup("cpu", False, cfg.threads), ZoomLDM.from_run(cfg.run)
    pyramids = Pyramids(model.info["data"], std=model.info["std"])
    made = *training_of(cfg.run), commit
    invented = load_cdm(cfg.run, model)
    trained = fingerprint(model.vae)
    vae, summarizer, unet = (rounded(getattr(model, name), name) for name in ("vae", "summarizer", "unet"))
    mark, vae_file = fingerprint(model.vae), out / "vae.safetensors"
    if has_vae(vae_file, mark):
        print(f"{vae_file} is the VAE of {cfg.run} already")
    else:
        vae_made = *vae_source(cfg, trained), commit
        write(vae_file, vae, {"config": asdict(model.vae.cfg), "latent_scale": model.latent_scale}, vae_made)
    toy = {f"summarizer.{k}": v for k, v in summarizer.items()} | {f"unet.{k}": v for k, v in unet.items()}
    model.info["data"] = cfg.data or short(model.info["data"])
    write(out / "toy.safetensors", toy, model.config() | {"vae_file": vae_file.name, "vae_fingerprint": mark}, made)
    proxy = proxies.load(out, model, pyramids, ranks)
    write(out / "proxy.safetensors", proxy.state_dict(), proxies.mark(model), made)
    if invented is not None:
        write_cdm(out / "cdm.safetensors", cfg.run, invented, model.summarizer, made)

# ----- 3. Looking -----

def look(folder):
    """Print what is there: a row a file as docs/weights.md has it, then what the headers say."""
    files = [folder / f"{name}.safetensors" for name in NAMES]
    there = [file for file in files if file.exists()]
    print("| file | bytes | SHA-256 |\n|---|---|---|")
    for file in there:
        print(f"| `weights/{file.name}` | {file.stat().st_size:,} | {sha256(file.read_bytes()).hexdigest()} |")
    print(f"together {sum(file.stat().st_size for file in there):,} bytes")
    for file in there:
        state, told = load_tensors(file)
        check_seal(file, state, told)
        print(f"\n{file.name}: {sum(x.numel() for x in state.values()):,} numbers, commit {told['commit']}")
        print(f"  {told['command']}\n  data: {json.dumps(told['data'])}")

def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if cfg.run:
        ship(cfg)
    look(Path(os.path.relpath(cfg.out or SHIPPED)))

if __name__ == "__main__":
    cli(main)
