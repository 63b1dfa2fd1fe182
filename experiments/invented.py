"""Patches from nothing: the CDM, or the EDM, invents the tokens, and the U-Net draws under them.

in:  a run folder with cdm.safetensors or edm.safetensors   out: RUN/cdm/*.png, and a sheet, a row for each scale
run: python cdm.py sample, or python cdm.py sample out/toy --scale=3
"""
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cdm import load_conditioner
from common import UserError, at_least, cli, configure, home_of, one_of, save_grid, save_png, setup, to_uint8
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM, even_timesteps, lean_timesteps
from summarizer import standardize, summarized
from weights.shipped import typed

@dataclass
class Config:
    run: str = ""              # run folder; default: the weights that come with this
    data: str = ""             # data folder whose patches stand above on the sheet; default: the run's, if it is there
    model: str = "cdm"         # cdm or edm; under grids draws sample_joint.py --condition=grid
    scale: int = -1            # -1 = all
    n: int = 8                 # patches per scale
    sampler: str = "dpm"       # of the patches: dpm, ddim or plms, see sample_joint.py
    steps: int = 10            # of the patches; their conditions take 50
    guidance: float = 1.5      # of the patches; the CDM has none
    seed: int = 0
    out: str = ""              # folder for the patches; default RUN/MODEL
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 autocast where the device has bf16 arithmetic

def invent(made, model, s, n, seed):
    """Tokens (n,65,D) of scale s by any of the models of cdm.py. A grid model invents the tiles under each patch."""
    if made.kind != "grid":
        return made.tokens([s] * n, seed)
    grids = [standardize(made.grid(2 ** s, 2 ** s, seed=seed + i)) for i in range(n)]                 # (E,G,G) each
    return summarized(model.summarizer, grids, s).float()

def scales_of(made, model):
    """The scales of which a conditioning model invents whole patches: of a grid model, those that its windows hold."""
    known = model.summarizer.cfg.scales
    if made.kind != "grid":
        return range(made.scales)
    side = round(made.net.cfg.tokens ** 0.5)
    return range(min(side.bit_length(), known))

def draw_sheet(made, model, ranks, path, scales, n, guidance=1.5, steps=20, seed=0, sampler="ddim", real=None):
    """Draw n patches a scale from invented tokens, and write a sheet of them: below real ones, which they do not show
    again, if there are any in `real`, a data.Pyramids. out: {scale: (n,3,P,P)}."""
    drawn, side = {}, model.info.get("patch", 256) // model.vae.factor
    rows, labels = [], []
    for s in tqdm(scales, desc="scales", disable=len(scales) < 2):
        c = invent(made, model, s, n, seed)                                    # (n,65,D)
        with ranks.autocast():
            drawn[s] = model.draw(c, side, guidance, steps, seed, sampler=sampler)
        split = "test" if real is not None and real.names("test") else "train"
        if real is not None and real.images and s < real.scales and real.count(split, s):
            rows.append(fixed_batch(real, split, s, n)["x"])
            labels.append(f"scale {s} real, others")
        rows.append(drawn[s])
        labels.append(f"scale {s} invented")
    save_grid(path, rows, labels)
    return drawn

def sample(cfg):
    """Write patches at one scale, or all."""
    one_of(cfg, model=("cdm", "edm"), sampler=("dpm", "ddim", "plms"))
    (lean_timesteps if cfg.sampler == "dpm" else even_timesteps)(1000, cfg.steps)   # are there so many?
    at_least(cfg, n=1, scale=-1)
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    made = load_conditioner(cfg.run, cfg.model, model)
    if cfg.scale >= made.scales:
        raise UserError(f"--scale={cfg.scale}: the run knows scales 0 to {made.scales - 1} (-1 = all)")
    scales = range(made.scales) if cfg.scale < 0 else [cfg.scale]
    out = Path(cfg.out or home_of(cfg.run) / cfg.model)
    data = cfg.data or model.info.get("data", "")
    known = cfg.data or (Path(data) / "index.json").is_file()
    real = Pyramids(data, std=model.info.get("std")) if known else None
    drawn = draw_sheet(made, model, ranks, out / "sheet.png", scales, cfg.n, cfg.guidance, cfg.steps, cfg.seed,
                       cfg.sampler, real)
    for s, images in drawn.items():
        for i, pixels in enumerate(to_uint8(images).numpy()):
            save_png(out / f"scale{s}_{i:03d}.png", pixels)
    above = "" if real is None else " (real patches, of other places, above the invented ones)"
    print(f"wrote {out}: {len(drawn)} scales x {cfg.n} patches, and sheet.png{above}; "
          f"next: python sample_joint.py {typed(cfg.run, cfg.data)}--size=512")

def sample_patches(cfg):
    """The same for the settings of sample_joint.py, whose --condition names the model."""
    if cfg.eval or cfg.end != "clean":
        raise UserError(f"--condition={cfg.condition} draws patches that end clean: leave --eval and --end away "
                        f"(python -m experiments.conditions measures them)")
    cfg.model = cfg.condition
    sample(cfg)

def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run:
        from weights.shipped import held_out_slides, shipped_run
        one_of(cfg, model=("cdm",))                         # of which there is one beside them
        cfg.run = shipped_run("cdm")
        cfg.data = cfg.data or held_out_slides()
    sample(cfg)

if __name__ == "__main__":
    cli(main)
