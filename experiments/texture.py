"""How true autoencoders are to what they code: sharpness, lattice, error and distance of held-out patches, coded.

in:  VAEs, as runs or their vae.safetensors, and data folders   out: tables, and a sheet of real above coded patches
run: python -m experiments.texture out/toy out/vae --data=data/toy,data/mine     read next: metrics.py
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from common import UserError, at_least, cli, configure, one_of, save_grid
from data import fixed_batch, open_data
from experiments import metrics as M
from zoom_vae import VQVAE

@dataclass
class Config:
    data: str = "data/toy"  # folders that data.py wrote, with commas between them
    split: str = "test"     # of which patches
    n: int = 64             # patches a scale, at most
    out: str = ""           # a sheet of real patches above coded ones, four times enlarged: a PNG

SHOWN = 6  # patches a scale on the sheet

def sharpness(coded, real):
    """Gradient energy: mean absolute step between neighbouring pixels, coded over real. 1 = as sharp."""
    return float(steps(coded) / steps(real))

def steps(x):
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()

@torch.no_grad()
def coded_by(vae, x):
    """Encode, snap to codes and decode x (N,3,P,P), as pictures are: within [-1,1]."""
    return torch.cat([vae.decode(vae.encode(part)).clamp(-1, 1) for part in x.split(16)])

def row_of(coded, real, train):
    """The columns of one VAE at one scale. in: images (N,3,P,P) each."""
    base, a, b = (M.random_features(x) for x in (train, coded, real))
    project = M.principal(base, min(16, len(base) - 1))
    return sharpness(coded, real), M.psnr(coded, real), M.seam_ratio(coded, 4), M.frechet(project(a), project(b))

def compare(vaes, pyramids, cfg):
    """Print a row a scale and VAE. in: vaes {name: VQVAE}. out: rows and labels of the sheet."""
    rows, labels = [], []
    for s in range(pyramids.scales):
        if min(pyramids.count(cfg.split, s), pyramids.count("train", s)) < 3:
            print(f"{s:>5}  left out: fewer than three patches")
            continue
        real = fixed_batch(pyramids, cfg.split, s, cfg.n)["x"]                              # (n,3,P,P)
        train = fixed_batch(pyramids, "train", s, 256)["x"]
        rows.append(real)
        labels.append(f"scale {s} real")
        for name, vae in vaes.items():
            coded = coded_by(vae, real)
            sharp, psnr, lattice, far = row_of(coded, real, train)
            print(f"{s:>5} {len(real):>4} {sharp:>9.2f} {psnr:>7.2f} {lattice:>8.3f} {M.seam_ratio(real, 4):>8.3f} "
                  f"{far:>9.4f}  {name}")
            rows.append(coded)
            labels.append(name[-24:])
    return [interpolate(x[:SHOWN], scale_factor=4) for x in rows], labels

def main(argv):
    names = [x for x in argv if not x.startswith("--")]
    cfg = configure(Config, [x for x in argv if x.startswith("--")], doc=__doc__)
    at_least(cfg, n=3)
    one_of(cfg, split=("train", "test"))
    if not names:
        raise UserError("say which VAEs: python -m experiments.texture out/toy")
    files = {name: Path(name, "vae.safetensors") if Path(name).is_dir() else Path(name) for name in names}
    vaes = {name: VQVAE.from_run(file)[0].eval() for name, file in files.items()}
    rows, labels = [], []
    for folder in cfg.data.split(","):
        print(f"\n{folder}, {cfg.split}\nscale    n sharpness    psnr  lattice of real  distance  VAE")
        more = compare(vaes, open_data(folder), cfg)
        rows += more[0]
        labels += more[1]
    if cfg.out:
        save_grid(cfg.out, rows, labels)
        print(f"wrote {cfg.out}")

if __name__ == "__main__":
    cli(main)
