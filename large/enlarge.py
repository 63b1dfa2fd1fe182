"""The command of invert.py: any picture in; embeddings, a finer image and variations out.

    python invert.py --image=photo.png --scale=2         # with the weights that come with this
    python invert.py out/toy --image=photo.png --scale=2 --sr=4 --variations=4

in:  an image or slide, its scale   out: DIR/sr.png, e.safetensors (for sample_joint.py --reference), sheet.png
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UserError, at_least, cli, configure, generator, home_of, one_of, save_png, save_tensors, setup
from common import to_uint8
from data import Pyramids
from diffusion import ZoomLDM, even_timesteps
from invert import LR, invert, paint, patch_of, per_token, project, super_resolve, to_tiles
from large import proxy as proxies
from large.beside import save_beside
from large.windows import Grid
from sample_joint import GUIDES, Resize, guide_of
from slides.encoders import FREE, load_encoder
from slides.reader import MAX_PIXELS, open_slide
from weights.shipped import shipped_run, typed

LR_NEAR = 0.0003    # of Adam, from a start that is nearly right; ours, measured: more explains little, loses cells

@dataclass
class Config:
    run: str = ""              # run folder, or a file of weights; default: those that come with this
    image: str = ""            # the image: anything that slides/reader.py opens
    data: str = ""             # data folder, should a proxy have to be fitted; default: what the run was trained on
    scale: int = -1            # its scale: 0 = finest the run knows, each +1 half the resolution
    white: int = 0             # of more than 8 bits, the value to show as white; 0 = the largest of the bits it uses
    sr: int = 0                # how many times larger, a power of 2; 0 = down to scale 0, 1 = not at all
    out: str = ""              # folder; default RUN/invert, or out/shipped/invert
    variations: int = 0        # images to draw at the same scale from the same conditions, and their cells at scale 0
    back_project: bool = True  # end with the nearest image whose reduction is exactly the input
    start: str = ""            # of the inference: enlarged or noise (as published); see `beginning`
    invert_steps: int = 200    # of the inference (Z S8.3)
    steps: int = 25            # of sampling
    guidance: float = 1.5      # of the variations: eps_null + guidance (eps_cond - eps_null)
    sr_guidance: float = 1.0   # of super-resolution: 1 is none, for the image itself guides
    guide: str = "x0"          # how the image constrains the sample: see sample_joint.GUIDES
    lam: float = 1.0           # share of the misfit taken away at every step; less leaves lines in bare glass
    A: str = "bicubic"         # how the input came from the fine image: bicubic, or box, as pyramids are made
    seed: int = 0
    batch: int = 8             # windows per network call of the inference; sampling takes 8 times as many
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 where the device has it and no difference is taken

# ----- 1. Reading -----

def read_image(path, white=0):
    """The image (3,H,W) in [-1,1], as `data.py build` reads it (docs/own_images.md). raises: UserError if it cannot."""
    if not Path(path).is_file():
        raise UserError(f"--image={path}: no such file; give the image to begin with")
    slide = open_slide(path, white=white)
    if math.prod(slide.size) > MAX_PIXELS:
        raise UserError(f"{path} has {slide.size[0]} x {slide.size[1]} pixels: cut out less, up to {MAX_PIXELS}")
    if slide.white:
        print(f"{path}: its value {slide.white} is shown as white")
    return torch.tensor(slide.read(0, 0, *slide.size)).movedim(-1, 0) / 127.5 - 1

def embed_enlarged(model, x, cells, s, P):
    """What the run's encoder says of the tiles of the enlarged image: (B,E,*cells); None if its weights are not where
    they lay for the build. in: x (B,3,h,w) at scale s; P, side of a tile."""
    info = model.info
    weights = info.get("weights")
    if info.get("encoder") not in FREE and not (weights and Path(weights).is_file()):
        return None
    encoder, A, y = load_encoder(info["encoder"], info["std"], weights), Resize(2 ** s), x.double()
    h, w = (n * A.factor for n in y.shape[2:])
    down, across = A.along(h, y), A.along(w, y)[:, :cells[1] * P]          # (h/f,h), (w/f,w)
    rows = []
    for strip in down.split(P, 1)[:cells[0]]:  # a row of tiles at a time: the whole is larger than the input by 4^s
        fine = A.factor ** 2 * strip.T @ y @ across                        # (B,3,P,P Gw)
        tiles = fine.float().clamp(-1, 1).unflatten(3, (-1, P)).movedim(3, 1)              # (B,Gw,3,P,P)
        rows.append(torch.stack([encoder((some + 1) / 2) for some in tiles]))              # (B,Gw,E)
    return torch.stack(rows, 1).movedim(-1, 1)

def beginning(model, x, cells, s, seed, start=""):
    """Embeddings to begin with, u (B,E,*cells), and Adam's rate.
    noise: N(0,1), as published. enlarged: what the run's encoder says of the enlarged image; the default, if
    it can be had. deviates: noise stays wherever the denoiser does not listen at this scale, at the finest it may."""
    if start not in ("", "noise", "enlarged"):
        raise UserError(f"--start={start}: known are enlarged, noise")
    if start != "noise":
        u = embed_enlarged(model, x, cells, s, patch_of(model, x))
        if u is not None:
            return per_token(u), LR_NEAR
        if start:
            raise UserError("--start=enlarged needs the run's encoder, its weights where they lay for the build")
    u = torch.randn(1, model.summarizer.cfg.embed_dim, *cells, generator=generator(seed))
    return u.repeat(len(x), 1, 1, 1), LR

def check(cfg, known):
    """Check what was asked for. out: the target scale. raises: UserError."""
    if not 0 <= cfg.scale < known:
        raise UserError(f"--scale={cfg.scale}: say at which scale the image is, 0 (finest) to {known - 1} for this run")
    if cfg.scale == 0 and cfg.sr != 1 and (cfg.sr or not cfg.variations):
        raise UserError("--scale=0 is the finest scale: give the image's real --scale, or --sr=1 --variations=4")
    factor = cfg.sr or 2 ** cfg.scale
    if factor not in [2 ** n for n in range(cfg.scale + 1)]:
        raise UserError(f"--sr={cfg.sr}: from --scale={cfg.scale} give a power of 2 up to {2 ** cfg.scale}")
    at_least(cfg, white=0, steps=1, invert_steps=1, batch=1, seed=0, variations=0)
    one_of(cfg, A=("bicubic", "box"), guide=GUIDES)
    guide_of(cfg.guide, 1, cfg.lam, 1, 1)
    even_timesteps(1000, cfg.steps)                         # are there so many?
    if cfg.lam > 1 and "x0" in cfg.guide:
        raise UserError(f"--lam={cfg.lam}: it is the share of the misfit that is taken away, 0 to 1")
    return cfg.scale - factor.bit_length() + 1

# ----- 2. Drawing -----

def agreement(x, y, kind="bicubic"):
    """PSNR in dB of A x, with x (...,H,W) as it would be written in 8 bits, to y (...,h,w)."""
    from experiments.metrics import psnr
    rounded = to_uint8(x).movedim(-1, -3) / 127.5 - 1
    A = Resize(x.shape[-1] // y.shape[-1], kind)
    return psnr(A.down(rounded.double()), y.double())

def vary(cfg, model, x, e, P):
    """{file: image}: images of the same conditions (1,3,h,w), and of their cells, a fine patch each (1,3,P Gh,P Gw)."""
    (h, w), s, out = x.shape[1:], cfg.scale, {}
    side = to_tiles(x, s, P).shape[1:]
    fine = [P * math.ceil(n * 2 ** s / P) for n in (h, w)]
    for n in range(cfg.variations):
        how = dict(guidance=cfg.guidance, patch=P, steps=cfg.steps, batch=8 * cfg.batch, seed=cfg.seed + n)
        out[f"variation_{n}.png"] = paint(model, Grid(e), side, s, **how)[..., :h, :w]
        out[f"cells_{n}.png"] = paint(model, Grid(e), fine, 0, overlap=0, **how)
    return out

def write_enlarged(cfg, out, x, sr):
    """Write the finer image sr (3,H,W), and beside it the input, enlarged in the usual ways. out: names of files."""
    (h, w), factor = x.shape[1:], sr.shape[1] // x.shape[1]
    said = f"{agreement(sr[None], x[None], cfg.A):.1f} dB"
    if cfg.back_project:
        sr = project(Resize(factor, cfg.A), sr, x)
        said += f", back-projected {agreement(sr[None], x[None], cfg.A):.1f} dB"
    save_png(out / "sr.png", to_uint8(sr).numpy())
    nearest = x.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    shown = [to_uint8(image).numpy() for image in (nearest, Resize(factor).up(x).clamp(-1, 1), sr)]     # (H,W,3) each
    save_beside(out / "sheet.png", shown, [f"input, scale {cfg.scale}", "bicubic", "drawn"], max(sr.shape))
    print(f"{w} x {h} -> {sr.shape[2]} x {sr.shape[1]} pixels; reduced again, it agrees with the input to {said}; "
          f"sheet.png shows input, bicubic, result")
    return ["sr.png", "sheet.png"]

def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run:
        cfg.run = shipped_run()
    ranks, s = setup(cfg.device, cfg.amp, cfg.threads), cfg.scale
    model, out = ZoomLDM.from_run(cfg.run).to(ranks.device), Path(cfg.out or home_of(cfg.run) / "invert")
    target, x = check(cfg, model.summarizer.cfg.scales), read_image(cfg.image, cfg.white)
    (h, w), P = x.shape[1:], patch_of(model, x)
    if min(h, w) < P and ranks.rank == 0:
        print(f"{cfg.image}, {w} x {h} pixels, is smaller than a tile of {P}: reflect-padded, and cut again in the end")
    proxy = sr = None
    if target < s and "proxy" in cfg.guide:
        data = cfg.data or model.info.get("data", "")
        known = cfg.data or (Path(data) / "index.json").is_file()  # asked for only if the proxy must be fitted
        pyramids = Pyramids(data, std=model.info.get("std")) if known else None
        proxy = proxies.load(cfg.run, model, pyramids, ranks)
    with ranks.autocast():
        e = invert(model, to_tiles(x, s, P), s, cfg.invert_steps, cfg.seed, cfg.batch, cfg.start).cpu()
        varied = vary(cfg, model, x, e, P)
        if target < s:
            sr = super_resolve(model, x[None], s, e[None], target, cfg.A, cfg.sr_guidance, seed=cfg.seed,
                               guide=cfg.guide, lam=cfg.lam, proxy=proxy, steps=cfg.steps, batch=8 * cfg.batch)[0]
    if ranks.rank == 0:
        save_tensors(out / "e.safetensors", {"e": e.movedim(0, -1)}, {"image": cfg.image, "scale": s})
        written = ["e.safetensors", *varied]
        for name, image in varied.items():
            save_png(out / name, to_uint8(image[0]).numpy())
        if sr is not None:
            written += write_enlarged(cfg, out, x, sr)
        size = f"{P * e.shape[1]},{P * e.shape[2]}"         # one patch of scale 0 a tile
        told = f"python sample_joint.py {typed(cfg.run)}--reference={out}/e.safetensors --size={size}"
        print(f"wrote {out}: {', '.join(written)}" + f"; next: {told}" * (s > 0))
    ranks.barrier()

if __name__ == "__main__":
    cli(main, stopped="nothing of it is kept, and the same command begins anew")
