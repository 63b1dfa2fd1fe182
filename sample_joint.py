"""Draw images with a trained run: patches at any scale, or one large image together with its coarse views.

    python sample_joint.py out/toy                          # 8 patches a scale: PNGs and a contact sheet
    python sample_joint.py out/toy --eval                   # how good they are, on held-out slides
    python sample_joint.py out/toy --size=1024 --context=4 --out=large.png
    python sample_joint.py out/toy --size=512,1024 --context=3,1 --reference=photo.png --out=large.tif
    python sample_joint.py out/toy --condition=cdm          # no image behind them (python cdm.py train out/toy first)
    python sample_joint.py out/toy paper --size=512 --context=3     # the published constants
    torchrun --standalone --nproc_per_node=2 sample_joint.py out/toy --size=1024

in:  a run folder; conditions from its held-out slides, a reference image, an embedding grid, or the models of cdm.py
out: RUN/patches/*.png, or one .png, .tif (pyramid) or .dzi (DeepZoom folder)     read next: README.md
"""
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import cdm
import proxy as proxies
from canvas import Canvas, Grid, Resize, decode_strips, usual_overlap  # noqa: F401 - Resize is part of this interface
from cost import Profile
from common import UserError, atomic, cli, configure, generator, load_tensors, save_tensors, setup, to_uint8
from data import Pyramids
from diffusion import ZoomLDM, ddim_timesteps
from joint import GUIDES, Level, check_settings, full_precision, joint_sample, sample_levels  # noqa: F401 - so is it
from patches import evaluate, show
from reference import load_grid
from slide import check_deepzoom, check_place, check_tiff, write_deepzoom, write_tiff
from state import fingerprint
from summarizer import pack_grid


@dataclass
class Config:
    run: str = ""              # run folder (or an ema.safetensors)
    preset: str = ""           # for large images: paper or notebook, the published constants; empty = ours
    data: str = ""             # data folder; default: the one the run was trained on
    split: str = "test"        # whose conditions: test or train
    out: str = ""              # patches: a folder, default RUN/patches; large images: a file, default RUN/large.png
    scale: int = -1            # one scale, 0 = finest; -1 = all, or 0 for large images
    guidance: float = 2.0      # eps_null + guidance (eps_cond - eps_null); 1 = no guidance
    steps: int = 50
    end: str = "clean"         # where ddim stops: clean, or published (leaves 3.9 % noise in the latent), as plms does
    seed: int = 0
    batch: int = 64            # patches or windows per network call; halved, aloud, where memory does not suffice
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 where the device has it and no difference is taken
    compile: bool = False      # torch.compile U-Net, encoder and decoder: for long runs, and only with a compiler
    # patches
    condition: str = "reference"  # embeddings of real images; or invented ones: cdm, edm (patches), grid (large images)
    n: int = 0                 # patches per scale, at most as many as there are; 0 = 8, or 128 with --eval
    sampler: str = "ddim"      # ddim or plms
    eval: bool = False         # measure instead of showing
    # large images
    size: tuple = ()           # pixels, a side or height,width; empty = patches
    context: tuple = (4,)      # coarser scales drawn with it; each guides the next finer one
    method: str = "joint"      # joint; or, for comparison, multidiffusion, independent, bicubic
    slide: int = 0             # whose embeddings: the k-th image of the split
    reference: str = ""        # or those of this image, read at the data's resolution if it says its own, or of a
    #                            .safetensors file with e (Gh,Gw,E), as data.py and invert.py write them
    weights: str = ""          # of the encoder that embeds the reference, if they lie elsewhere than for the build
    at: tuple = (0, 0)         # base tile (row, column) of the reference where the image begins
    caption: str = ""          # with --condition=grid: what the image shows, in words
    vector: str = ""           # or as a vector made elsewhere, a .safetensors file with v (V,)
    emphasis: float = 2.0      # guidance of the grid model towards its caption
    spread: float = 0.0        # how much chance may change the amounts a caption states; 1 = as trained
    swap: str = ""             # move what is drawn: "i,j:k,l" exchanges two base tiles, more of them after ";"
    paste: str = ""            # "i,j:k,l" or "i,j:k,l:rows,columns" copies a block over another
    overlap: int = -1          # latents that windows share; -1 = nearly a quarter of a side (multidiffusion: three)
    fade: bool = True          # windows fade into each other; False = uniform averages, as published
    guide: str = "x0+proxy"    # exact (Z Algorithm S2), gradient (S1), proxy, x0, x0+proxy: see joint.py
    inner: int = 1             # corrections per step (K)
    lam: tuple = ()            # size of a correction, or first,last. x0, x0+proxy: share of the residual, default 0.3,
    #                            with fewer than 50 steps up to 0.5; others: largest change of a latent, default 0.1
    #                            (published: 0.5)
    delta: float = 0.005       # width of the denoiser's finite difference; 0 = forward-mode differentiation instead
    zeta: float = 0.005        # width of the encoder's; x0 takes the whole misfit at once
    during: tuple = (0, 1000)  # guide only while t lies here
    A: str = "bicubic"         # down-sampling of the constraint: bicubic, or box, as pyramids are made
    guided: tuple = (0, 1000)  # the null branch is asked, and guidance used, only while t lies here (Kynkäänniemi 2024)
    null: bool = True          # False: leave the null branch out of the denoiser's finite difference
    repair: bool = False       # end with the published repair: back to t = 300, windows at a quarter of their side
    frames: int = 0            # write the estimate every so many steps
    profile: bool = False      # count calls, FLOPs and seconds
    mpp: float = 0.0           # micrometres per pixel, for .tif; 0 = unknown
    viewer: str = ""           # openseadragon.min.js, for .dzi


PRESETS = {
    "": {},
    "paper": dict(guide="exact", steps=50, inner=1, lam=0.5, guidance=2.0, overlap=0),      # Z S8.2
    "notebook": dict(guide="exact", steps=20, inner=10, lam=0.5, guidance=3.0, overlap=0),  # reference: published Colab
}
NO_MEMORY = ("not enough memory", "can't allocate memory", "could not create a primitive")  # torch, and oneDNN
METHODS = ("joint", "multidiffusion", "independent", "bicubic")
BUDGET = 256 * 2 ** 20  # bytes of keys and values kept from step to step; windows beyond it compute theirs anew


# ----- 1. A trained model behind windows -----

@torch.no_grad()
def contexts(model, condition, s, canvas):
    """Tokens {corner: c (L,D)} of this rank's windows. condition(s, i, j) -> e (E,G,G), standardised, for a window at
    scale s whose upper left corner lies at base tile (i, j), any numbers; `Grid` is one, any function will do; None is
    the null condition."""
    out, (wh, ww) = {}, canvas.window
    device = model.unet.conv_out.weight.device
    if condition is None:
        return dict.fromkeys(canvas.ij, torch.zeros(model.summarizer.pos.shape[1:], device=device))
    with full_precision(device):
        for ij in canvas.batches():
            grids = [pack_grid(condition(s, i / wh * 2 ** s, j / ww * 2 ** s)) for i, j in ij]
            tokens, mask = (torch.stack(v).to(device) for v in zip(*grids))
            c = model.summarizer(tokens, mask, torch.full((len(ij),), s, device=device))
            out |= zip(ij, c)
    return out


def window_eps(model, c, guidance, null=True, guided=(0, math.inf)):
    """eps(z, t, ij) of windows whose tokens are c, both guidance branches in one batch; keys and values are computed
    once. Where t lies outside `guided` (from, below) there is no guidance, and no null branch. out: eps, and for
    null=False the conditional branch alone, for differences, which eps then reports as well."""
    kept, room = {}, [BUDGET]

    def kv(ij, both):
        key = both, *ij
        if key in kept:
            return kept[key]
        with torch.no_grad():
            tokens = torch.stack([c[p] for p in ij])                                    # (n,L,D)
            with full_precision(tokens.device):
                made = model.unet.cache_context(torch.cat([torch.zeros_like(tokens), tokens]) if both else tokens)
        room[0] -= sum(x.nbytes for pair in made for x in pair)
        if room[0] > 0:
            kept[key] = made
        return made

    def conditional(z, t, ij):
        return model.eps(z, t, kv(ij, False))

    def eps(z, t, ij):
        if guidance == 1 or not guided[0] <= int(t[0]) < guided[1]:
            cond = conditional(z, t, ij)
            return cond if null or guidance == 1 else torch.cat([cond, cond], 1)
        without, cond = model.eps(torch.cat([z, z]), torch.cat([t, t]), kv(ij, True)).chunk(2)
        out = without + guidance * (cond - without)
        return out if null else torch.cat([out, cond], 1)
    return careful(eps), None if null or guidance == 1 else careful(conditional)


def careful(fn):
    """fn(batch, ...) in smaller parts, said aloud, from the moment that memory does not suffice for the whole."""
    most = [0]

    def f(*args):
        while True:
            n = most[0] or len(args[0])
            try:
                parts = [fn(*(a[k:k + n] for a in args)) for k in range(0, len(args[0]), n)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
                known = (isinstance(err, torch.OutOfMemoryError | MemoryError)
                         or any(says in str(err) for says in NO_MEMORY))
                if not known or n == 1:
                    raise UserError("memory does not suffice for one window: close other programs, or take another "
                                    "--device, or a smaller --batch") if known else err from err
                most[0] = n // 2
                tqdm.write(f"memory does not suffice for {n} windows at once: going on with {n // 2}")
    return f


def drawn_scales(cfg):
    """The scales that are drawn, coarse to fine."""
    fine = max(cfg.scale, 0)
    return [*sorted(cfg.context, reverse=True), fine] if cfg.method in ("joint", "bicubic") else [fine]


def sides(size, scales, patch, factor, known):
    """Height and width in latents at every scale. raises: UserError if a scale does not fit the size or the model."""
    size = tuple(size) * (2 if len(size) == 1 else 1)
    if len(size) != 2 or not all(isinstance(n, int) for n in (*size, *scales)):
        raise UserError(f"--size={size}, scales {scales}: give a side, or height,width, in pixels, and whole scales")
    if len(set(scales)) < len(scales) or min(scales) < 0 or max(scales) >= known or scales[-1] != min(scales):
        raise UserError(f"scales {scales}: the run knows 0 to {known - 1}; --context lists coarser ones than --scale, "
                        f"each once")
    out, unit = [], factor << (scales[0] - scales[-1])
    if any(n % unit for n in size):
        raise UserError(f"--size={size} does not divide: with --context={scales[0]} both sides must be multiples of "
                        f"{unit}")
    for s in scales:
        h, w = (n // factor >> (s - scales[-1]) for n in size)
        if min(h, w) < patch // factor:
            raise UserError(f"--size={size} is {h * factor} x {w * factor} pixels at scale {s}, less than a patch of "
                            f"{patch}: take a larger --size, or a smaller --context")
        out.append((h, w))
    return out


def prepare(model, condition, size, scales, overlap, *, guidance=2.0, seed=0, batch=64, fade=True, null=True,
            guided=(0, math.inf), only=None, patch=0):
    """Levels for `sample_levels`, coarse to fine (the first `only` of them), with noise that depends on seed and scale
    alone. patch: pixels of a window's side; 0 = as trained."""
    patch, factor = patch or model.info.get("patch", 256), model.vae.factor
    device = model.unet.conv_out.weight.device
    window, levels = patch // factor, []
    for (h, w), s in list(zip(sides(size, scales, patch, factor, model.summarizer.cfg.scales), scales))[:only]:
        canvas = Canvas(h, w, window, overlap, fade, batch)
        z = torch.randn(1, model.unet.cfg.channels, h, w, generator=generator(seed, s)).to(device)
        eps, eps_diff = window_eps(model, contexts(model, condition, s, canvas), guidance, null, guided)
        times = 2 ** (scales[len(levels) - 1] - s) if levels else 0    # finer than the level above
        levels.append(Level(eps, canvas, canvas.own(z), times, eps_diff=eps_diff))
    return levels


def repair(model, condition, level, s, *, guidance=2.0, seed=0, batch=64, start=300, step=50, callback=None):
    """The published way to mend borders: noise the canvas to t = start, then denoise it in windows at a quarter of
    their side, averaged uniformly. out: a Level. reference: the published post-processing (Z S8.2)."""
    old = level.canvas
    canvas = Canvas(old.h, old.w, old.window, old.window[0] * 3 // 4, batch=batch)
    z = old.whole(level.z)
    noise = torch.randn(z.shape, generator=generator(seed, s, start)).to(z)
    z = model.schedule.q_sample(z, torch.tensor([start], device=z.device), noise)
    level = Level(window_eps(model, contexts(model, condition, s, canvas), guidance)[0], canvas, canvas.own(z))
    return sample_levels([level], None, None, model.schedule, timesteps=list(range(step, start + 1, step)),
                         end="clean", callback=callback)[0]


# ----- 2. One large image -----

def draw_large(model, condition, cfg, ranks, proxy=None, resume=None, frame=None):
    """Sample one large image as cfg says. condition: see `contexts`; resume: a file that keeps the state every minute,
    so that the same call goes on after an interruption; frame(n, level, estimate) after every step.
    out: (levels, scales), coarse to fine, on every rank."""
    scales = drawn_scales(cfg)
    window = model.info["patch"] // model.vae.factor
    overlap = {"multidiffusion": 3 * window // 4, "independent": 0}.get(cfg.method, usual_overlap(window))
    overlap = overlap if cfg.overlap < 0 or cfg.method == "independent" else cfg.overlap
    levels = prepare(model, condition, cfg.size, scales, overlap, guidance=cfg.guidance, seed=cfg.seed, batch=cfg.batch,
                     fade=cfg.fade and cfg.method != "multidiffusion", null=cfg.null,
                     guided=cfg.guided, only=1 if cfg.method == "bicubic" else None)
    scales = scales[:len(levels)]
    estimate_space = GUIDES[cfg.guide][1] is None
    lam = cfg.lam or ((min(15 / cfg.steps, 0.5),) if estimate_space else (0.1,))
    settings = {k: v for k, v in asdict(cfg).items() if k not in (
        "out", "frames", "profile", "batch", "threads", "device", "compile", "mpp", "viewer")}
    settings |= {"model": proxies.fingerprint(model), "proxy": fingerprint(proxy) if proxy else "",
                 "grid": crc32(condition.e.cpu().numpy().tobytes()) if isinstance(condition, Grid) else 0}
    settings = json.loads(json.dumps(settings))
    skip, saved = 0, [time.monotonic()]
    if resume is not None and resume.exists():
        try:
            state, meta = load_tensors(resume)
        except UserError as err:
            raise UserError(f"{err}; to draw from the start, remove it") from err
        if meta.get("settings") == settings:
            skip = meta["step"]
            for k, level in enumerate(levels):
                level.z = level.canvas.own(state[str(k)].to(level.z.device))
            print(f"going on from step {skip}, found in {resume}")
    bar = tqdm(total=len(ddim_timesteps(model.schedule.T, cfg.steps)), initial=skip, desc=cfg.method,
               disable=ranks.rank > 0)

    def step(n, t, levels, estimates, targets):
        bar.update()
        if frame is not None:
            frame(n, levels[-1], estimates[-1])
        due = torch.tensor(float(resume is not None and time.monotonic() - saved[0] > 60), device=levels[0].z.device)
        if ranks.world > 1:
            torch.distributed.broadcast(due, 0)
        if due:
            whole = {str(k): level.canvas.whole(level.z) for k, level in enumerate(levels)}
            if ranks.rank == 0:
                save_tensors(resume, whole, {"settings": settings, "step": n + 1})
            saved[0] = time.monotonic()
    with ranks.autocast() if cfg.amp else nullcontext():
        sample_levels(levels, careful(model.decode), careful(model.encode), model.schedule, steps=cfg.steps,
                      inner=cfg.inner if cfg.method == "joint" else 0, lam=(lam[0], lam[-1]), delta=cfg.delta,
                      zeta=cfg.zeta, guide=cfg.guide, normalize="share" if estimate_space else True, end=cfg.end,
                      kind=cfg.A, during=cfg.during, proxy=proxy, callback=step, skip=skip)
        if cfg.repair and cfg.method != "bicubic":
            bar.set_description("repair")
            levels[-1] = repair(model, condition, levels[-1], scales[-1], guidance=cfg.guidance, seed=cfg.seed,
                                batch=cfg.batch, callback=lambda *a: bar.set_postfix_str(f"t = {a[1]}"))
    bar.close()
    if not all(level.z.isfinite().all() for level in levels):
        raise UserError(f"the latents are no finite numbers any more, nothing is written: --lam={lam}, --guidance="
                        f"{cfg.guidance}, --delta={cfg.delta} or --zeta={cfg.zeta} is too large, or the model is bad")
    return levels, scales


def pixels(model, z, ranks, batch=8):
    """Strips (h,W,3) uint8 of a decoded canvas, from top to bottom: windows half as large again as a patch, a quarter
    of a patch of which on every side fades into the neighbours."""
    window = model.info["patch"] // model.vae.factor
    with torch.no_grad(), ranks.autocast():
        for strip in decode_strips(careful(model.decode), z, window * 3 // 2, window // 2, batch):
            yield to_uint8(strip)[0].numpy()


def picture(model, z, ranks):
    """The whole decoded canvas as one uint8 array (H,W,3)."""
    return np.concatenate(list(pixels(model, z, ranks)))


def decoded(model, z, ranks):
    """The whole decoded canvas as it would be written, (1,3,H,W) in [-1,1]."""
    return torch.from_numpy(picture(model, z, ranks)).movedim(-1, 0)[None] / 127.5 - 1


def save_png(path, image):
    with atomic(path) as tmp:
        Image.fromarray(image).save(tmp, "PNG")


def large(model, pyramids, cfg, ranks):
    """Draw one large image and write it, and the coarse views it was drawn with, beside it."""
    out, patch = Path(cfg.out), model.info["patch"]
    if out.suffix not in (".png", ".tif", ".tiff", ".dzi"):
        raise UserError(f"--out={out}: give a name that ends in .png, .tif (pyramid) or .dzi (DeepZoom)")
    if cfg.method not in METHODS or cfg.guide not in GUIDES or cfg.A not in ("bicubic", "box"):
        raise UserError(f"--method={cfg.method} --guide={cfg.guide} --A={cfg.A}: known are {', '.join(METHODS)}; "
                        f"{', '.join(GUIDES)}; bicubic, box")
    if len(cfg.during) != 2 or len(cfg.guided) != 2 or len(cfg.lam) > 2 or [type(v) for v in cfg.at] != [int, int]:
        raise UserError(f"--during={cfg.during} --guided={cfg.guided} --at={cfg.at} --lam={cfg.lam}: give two numbers, "
                        f"whole ones for at, one or two for lam")
    if cfg.eval or cfg.sampler != Config.sampler or cfg.frames < 0 or cfg.overlap < -1:
        raise UserError(f"--eval={cfg.eval} --sampler={cfg.sampler} --frames={cfg.frames} --overlap={cfg.overlap}: "
                        f"large images are drawn with ddim, --eval is for patches, nothing is negative")
    check_settings(cfg.guide, True, cfg.inner, (*cfg.lam, *cfg.lam)[:2] or 0.0, cfg.delta, cfg.zeta, cfg.end)
    ddim_timesteps(model.schedule.T, cfg.steps)
    check_place(out)
    if out.suffix == ".dzi":  # what cannot be written is said before it is drawn
        check_deepzoom(out.with_suffix(""), cfg.viewer or None)
    else:
        check_tiff(out, cfg.mpp or None)
    fine = max(cfg.scale, 0)
    scales = drawn_scales(cfg)
    h, w = sides(cfg.size, scales, patch, model.vae.factor, model.summarizer.cfg.scales)[-1]
    need = tuple(math.ceil(n * model.vae.factor * 2 ** fine / patch) for n in (h, w))
    grid = load_grid(cfg, model, pyramids, need)
    proxy = (proxies.load(Path(cfg.run) if Path(cfg.run).is_dir() else Path(cfg.run).parent, model, pyramids, ranks)
             if cfg.method == "joint" and "proxy" in cfg.guide else None)
    if ranks.rank == 0:
        print(f"drawing {h * model.vae.factor} x {w * model.vae.factor} pixels, scales {scales}, writing {out}")

    def frame(n, level, estimate):
        if cfg.frames and (n + 1) % cfg.frames == 0:
            z = level.canvas.whole(estimate)
            if ranks.rank == 0:
                image = Image.fromarray(picture(model, z, ranks))
                image.thumbnail((1024, 1024), Image.Resampling.BOX)
                with atomic(out.with_name(f"{out.stem}_frames") / f"{n + 1:04d}.png") as tmp:
                    image.save(tmp, "PNG")
    profile = Profile(model, proxy) if cfg.profile else None
    resume = out.with_name(f".{out.name}.partial.safetensors")
    levels, scales = draw_large(model, grid, cfg, ranks, proxy, resume, frame if cfg.frames else None)
    canvases = [level.canvas.whole(level.z) for level in levels]
    if ranks.rank > 0:
        return ranks.barrier()
    if cfg.method == "bicubic":
        up = Resize(2 ** (scales[0] - fine)).up(decoded(model, canvases[0], ranks)).clamp(-1, 1)
        strips = iter([to_uint8(up)[0].numpy()])
    else:
        strips = pixels(model, canvases[-1], ranks)
    size = h * model.vae.factor, w * model.vae.factor
    if out.suffix == ".png":
        save_png(out, np.concatenate(list(strips)))
    elif out.suffix == ".dzi":
        write_deepzoom(out.with_suffix(""), strips, size, viewer=cfg.viewer or None, title=out.stem)
    else:
        write_tiff(out, strips, size, mpp=cfg.mpp or None)
    for z, s in zip(canvases[:None if cfg.method == "bicubic" else -1], scales):
        save_png(out.with_name(f"{out.stem}_scale{s}.png"), picture(model, z, ranks))
    if profile is not None:
        profile.close()
        profile.table(model.unet.cfg.context_dim)
    resume.unlink(missing_ok=True)
    print(f"wrote {out.with_suffix('') / 'index.html' if out.suffix == '.dzi' else out}"
          + "".join(f", {out.stem}_scale{s}.png" for s in scales if s != fine))
    ranks.barrier()


def known_data(model, folder):
    """The data of a run. raises: UserError if it is none that the model knows."""
    info = model.info
    pyramids = Pyramids(folder, std=info.get("std"))
    if pyramids.scales > model.summarizer.cfg.scales or pyramids.patch != info.get("patch"):
        raise UserError(f"{folder} has {pyramids.scales} scales of {pyramids.patch}-pixel patches, the run "
                        f"was trained on {model.summarizer.cfg.scales} of {info.get('patch')}: build it with these")
    if pyramids.embed_dim != model.summarizer.cfg.embed_dim or pyramids.encoder != info.get("encoder"):
        raise UserError(f"{folder} was embedded with {pyramids.encoder!r} ({pyramids.embed_dim} numbers), the "
                        f"run with {info.get('encoder')!r} ({model.summarizer.cfg.embed_dim}): give its own data")
    return pyramids


def main(argv):
    cfg = configure(Config, argv, PRESETS, ("run", "preset"), doc=__doc__)
    if not cfg.run:
        raise UserError("say which run: python sample_joint.py out/toy (train one with python train.py)")
    if cfg.n < 0 or cfg.seed < 0 or cfg.steps < 1 or cfg.batch < 1:
        raise UserError(f"--n={cfg.n} --seed={cfg.seed} --steps={cfg.steps} --batch={cfg.batch}: steps and batch are "
                        f"at least 1, nothing is negative")
    if cfg.end not in ("clean", "published"):
        raise UserError(f"--end={cfg.end}: known are clean, published")
    cfg.n = cfg.n or (128 if cfg.eval else 8)
    run = Path(cfg.run).parent if Path(cfg.run).is_file() else Path(cfg.run)
    cfg.out = cfg.out or str(run / ("large.png" if cfg.size else "eval" if cfg.eval else "patches"))
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    info = model.info
    if cfg.compile:
        model.unet.compile()
        model.vae.encode, model.vae.decode = torch.compile(model.vae.encode), torch.compile(model.vae.decode)
    data = cfg.data or info.get("data", "")
    alone = cfg.size and (cfg.reference or cfg.condition == "grid")  # conditions that do not come from the data
    pyramids = None
    if cfg.data or not alone or (Path(data) / "index.json").is_file():
        pyramids = known_data(model, data)
    if (cfg.reference or cfg.swap or cfg.paste) and not cfg.size or cfg.reference and cfg.condition == "grid":
        raise UserError("--reference, --swap and --paste are for large images: give --size (as --size=512 "
                        "--context=3); and --reference does not go with --condition=grid")
    known = ("reference", "grid") if cfg.size else ("reference", "cdm", "edm")
    if cfg.condition not in known or cfg.condition != "grid" and (cfg.caption or cfg.vector):
        raise UserError(f"--condition={cfg.condition} with{'' if cfg.size else 'out'} --size: known here are "
                        f"{', '.join(known)}; --caption and --vector go with grid")
    if cfg.condition in ("cdm", "edm"):
        if cfg.eval or (cfg.sampler, cfg.end) != (Config.sampler, Config.end):
            raise UserError(f"--condition={cfg.condition} draws patches with DDIM alone: leave --eval, --sampler and "
                            f"--end away (what its conditions are worth: python cdm_table.py conditions RUN)")
        names = ("run", "scale", "n", "steps", "guidance", "seed", "out", "data", "device", "threads", "amp")
        return cdm.sample(cdm.SampleConfig(model=cfg.condition, **{k: getattr(cfg, k) for k in names}))
    (large if cfg.size else evaluate if cfg.eval else show)(model, pyramids, cfg, ranks)


if __name__ == "__main__":
    cli(main)
