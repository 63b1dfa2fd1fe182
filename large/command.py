"""One large image, drawn, kept while it is drawn, and written: what `python sample_joint.py RUN --size=...` opens.

    python sample_joint.py out/toy --size=1024 --out=large.png
    python sample_joint.py out/toy --size=512,1024 --context=3,1 --reference=photo.png --out=large.tif
    python sample_joint.py out/toy --size=512 --condition=grid                 # no image behind it (python cdm.py)

in:  a run folder and Settings   out: .png, .tif (pyramid) or .dzi, and the coarse views it was drawn with beside it
The same command goes on with an image that was interrupted.     read next: large/proxy.py"""
import inspect
import json
import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from tqdm import tqdm

import sample_joint as S
from common import UserError, at_least, cli, configure, fingerprint, home_of, load_tensors, one_of, save_png
from common import save_tensors, setup, to_uint8
from diffusion import ZoomLDM, even_timesteps
from large import proxy as proxies
from large.beside import MOST, real_region, save_beside
from large.reference import Conditions, load_grid, slide_of
from large.windows import Grid, decode_strips, prepare, sides, usual_context
from weights.shipped import arguments, typed

@dataclass
class Settings(Conditions, S.Config):
    preset: str = ""           # paper, the published constants; empty = ours
    guidance: float = 2.0      # eps_null + guidance (eps_cond - eps_null), as in the papers; 1 = none
    context: tuple = ()        # coarser scales drawn with it; each guides the next finer one. Default: the coarsest
    #                            of which a patch fits into the image
    guide: str = "x0+proxy"    # s1, s2 (Z Algorithms S1, S2), x0, x0+proxy: see sample_joint.py
    sampler: str = ""          # lean: DPM-Solver++ 2M at times that crowd at the clean end; ddim: evenly spaced, as
    #                            published. The default is lean for x0 and x0+proxy, ddim for s1 and s2
    steps: int | None = None   # default: 10 of lean, 50 of ddim
    inner: int = 1             # corrections per step (K)
    lam: tuple = ()            # size of a correction, or first,last. x0, x0+proxy: share of the error, default 15 /
    #                            steps, at most 0.5, or .9 to .24 of that; s1, s2: largest change of a latent, default
    #                            0.1 (published: 0.5)
    delta: float = 0.005       # width of the denoiser's finite difference (s1, s2)
    zeta: float = 0.005        # width of the encoder's (s2)
    overlap: int = -1          # latents that windows share. -1: with lean times none, but at the clean end windows half
    #                            a side further mend borders; with ddim nearly a quarter of a side (multidiffusion: 3)
    fade: bool = True          # windows fade into each other; False = uniform averages, as published
    A: str = "bicubic"         # down-sampling of the constraint: bicubic, or box, as pyramids are made
    guided: tuple = ()         # the null branch is asked, and guidance used, only while t lies here; default: from 300
    #                            to 699 of lean, everywhere of ddim
    method: str = "joint"      # joint; or, to compare, multidiffusion, independent, bicubic (baselines)
    repair: bool = False       # end with the published repair: back to t = 300, windows at a quarter of their side
    mpp: float = 0.0           # micrometres per pixel, for .tif; 0 = unknown
    viewer: str = ""           # openseadragon.min.js, for the page beside a .dzi

LEAN = dict(sampler="lean", steps=10, guided=(300, 700))
EVEN = dict(sampler="ddim", steps=50, guided=(0, 1000))  # as published, and the default of before
PRESETS = {"": {}, "paper": EVEN | dict(guide="s2", inner=1, lam=0.5, overlap=0)}  # Z S8.2
METHODS = ("joint", "multidiffusion", "independent", "bicubic")
HOW = ("out", "batch", "threads", "device", "compile", "learned", "mpp", "viewer")  # settings that change no latent

# ----- 1. Drawing -----

def is_lean(cfg):
    """Are times lean? By default for the guides that ask the U-Net once a step."""
    return cfg.sampler == "lean" or not cfg.sampler and "x0" in cfg.guide

def settled(cfg):
    """cfg, with what its sampler decides where nothing else is asked for."""
    usual = LEAN if is_lean(cfg) else EVEN
    return replace(cfg, **{k: v for k, v in usual.items() if getattr(cfg, k) in (None, "", ())})

def usual_overlap(window):
    """What windows that overlap share by default: nearly a quarter of a side, and odd. A U-Net that halves its windows
    leaves a faint lattice of every 2, 4, ... latents; windows an even number apart would lay theirs on one another."""
    return max(window // 4 - 1, 0) | 1

def times(cfg, T):
    """The indices that are drawn at, ascending. Details are drawn at the clean end: lean times crowd there, so ten
    of them do what fifty evenly spaced ones do (docs/large.md). raises: UserError for a number that means nothing."""
    steps = settled(cfg).steps
    if not is_lean(cfg):
        return even_timesteps(T, steps)
    if not 1 <= steps <= T // 4:
        raise UserError(f"--steps={steps}: give 1 to {T // 4} of lean")
    tau, last = [], round(0.99 * T)
    for i in range(steps - 1):
        t = 1 + round((last - 1) * (i / (steps - 1)) ** 1.2)
        tau.append(max(t, tau[-1] + 1) if tau else t)                   # 1, ...
    return [*tau, last]                                                 # ..., 990

def order(cfg):
    """Of the solver: 2, DPM-Solver++ 2M, at lean times; 1, DDIM, as published."""
    return 2 if is_lean(cfg) else 1

def lams(cfg):
    """The first and the last lam, or the default of the guide."""
    steps = len(times(cfg, 1000))
    share = min(15 / steps, 0.5)
    # the last steps are the U-Net's, or corrections leave streaks in tissue that nothing mends any more
    usual = {"x0": (share,), "x0+proxy": (0.9 * share, 0.24 * share)}.get(cfg.guide, (0.1,))
    return ((cfg.lam or usual)[0], (cfg.lam or usual)[-1])

class Progress:
    """Show how far it is, and keep the latents every minute, so that the same command goes on after an interruption.
    Attributes: done, steps that were drawn before."""

    def __init__(self, levels, cfg, model, condition, proxy, path, ranks, steps):
        self.path, self.ranks, self.saved, self.done = path, ranks, time.monotonic(), 0
        self.step, self.latents = 0, {}                     # the latest step that is whole, and its latents
        mark = {k: v for k, v in asdict(cfg).items() if k not in HOW}
        mark["drawn"] = times(cfg, model.schedule.T), levels[-1].canvas.overlap, lams(cfg), order(cfg)
        mark["networks"] = [proxies.fingerprint(model), fingerprint(proxy) if proxy else ""]
        mark["grid"] = crc32(condition.e.cpu().numpy().tobytes()) if isinstance(condition, Grid) else 0
        self.mark = json.loads(json.dumps(mark))
        if path is not None and path.exists():
            try:
                state, meta = load_tensors(path)
            except UserError as err:
                raise UserError(f"{err}; to draw from the start, remove it") from err
            if meta.get("settings") == self.mark:
                self.done = meta["step"]
                for k, level in enumerate(levels):
                    level.z, level.z0 = (state[f"{k}.{name}"].to(level.z.device) for name in ("z", "z0"))
                if ranks.rank == 0:
                    print(f"going on from step {self.done}, found in {path}")
        self.bar = tqdm(total=steps, initial=self.done, desc=cfg.method, disable=ranks.rank > 0)

    def __call__(self, n, t, levels):
        self.bar.update()
        self.step, self.latents = n + 1, {}
        for k, level in enumerate(levels):
            self.latents |= {f"{k}.z": level.z, f"{k}.z0": level.z0}
        if time.monotonic() - self.saved > 60:
            self.keep()

    def keep(self):
        """Write what is drawn so far."""
        if self.ranks.rank == 0 and self.path is not None and self.latents:
            save_tensors(self.path, self.latents, {"settings": self.mark, "step": self.step})
            self.saved = time.monotonic()

@contextmanager
def enough_memory():
    """Lack of memory becomes one clear sentence; torch on the CPU and oneDNN say it by a RuntimeError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
        known = ("not enough memory", "can't allocate memory", "could not create a primitive")
        if type(err) is RuntimeError and not any(text in str(err) for text in known):
            raise
        raise UserError("memory does not suffice: give a smaller --batch, or another --device") from err

@contextmanager
def kept(progress):
    """What is drawn below is kept as far as it is when it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        progress.keep()
        progress.bar.close()
        raise

def draw_large(model, condition, cfg, ranks, proxy=None, resume=None):
    """Sample one large image as cfg, a Settings, says. condition: see windows.contexts; resume: a file that keeps the
    state every minute. out: (levels, scales), coarse to fine, on every rank."""
    from experiments import baselines
    cfg, window = settled(cfg), model.info["patch"] // model.vae.factor
    usual = None if is_lean(cfg) else usual_overlap(window)
    overlap = usual if cfg.overlap < 0 else cfg.overlap
    options = dict(guidance=cfg.guidance, seed=cfg.seed, batch=cfg.batch, fade=cfg.fade, guided=cfg.guided, kind=cfg.A)
    scales, size = [*sorted(cfg.context, reverse=True), max(cfg.scale, 0)], cfg.size
    inner = cfg.inner if cfg.method == "joint" else 0
    if cfg.method != "joint":
        size, scales, overlap, options["fade"] = baselines.layout(cfg, scales, window, overlap)
    levels = prepare(model, condition, size, scales, overlap, proxy=proxy, **options)
    timesteps = times(cfg, model.schedule.T)
    progress = Progress(levels, cfg, model, condition, proxy, resume, ranks, len(timesteps))
    with enough_memory(), kept(progress), ranks.autocast():
        S.sample_levels(levels, model.schedule, timesteps=timesteps, end=cfg.end, inner=inner, lam=lams(cfg),
                        delta=cfg.delta, zeta=cfg.zeta, guide=cfg.guide, order=order(cfg), done=progress.done,
                        callback=progress)
        if cfg.repair and cfg.method != "bicubic":
            levels[-1] = baselines.repair(model, condition, levels[-1], scales[-1], guidance=cfg.guidance,
                                          seed=cfg.seed, batch=cfg.batch)
    progress.bar.close()
    if not all(level.z.isfinite().all() for level in levels):
        raise UserError("the latents are no finite numbers any more: a smaller --lam, --guidance, --delta or --zeta")
    return levels, scales

# ----- 2. Pixels -----

def pixels(model, z, ranks, batch=8):
    """Strips (h,W,3) uint8 of a decoded canvas, from top to bottom: windows half as large again as a patch, a quarter
    of a patch of which on every side fades into the neighbours."""
    window = model.info["patch"] // model.vae.factor
    with enough_memory(), torch.no_grad(), ranks.autocast():
        for strip in decode_strips(model.decode, z, window * 3 // 2, window // 2, batch):
            yield to_uint8(strip)[0].numpy()

def picture(model, z, ranks):
    """The whole decoded canvas as one uint8 array (H,W,3)."""
    return np.concatenate(list(pixels(model, z, ranks)))

def decoded(model, z, ranks):
    """The whole decoded canvas as it would be written, (1,3,H,W) in [-1,1]."""
    return torch.from_numpy(picture(model, z, ranks)).movedim(-1, 0)[None] / 127.5 - 1

# ----- 3. The command -----

def check(cfg, schedule):
    """raises: UserError for what cannot be drawn or written, before hours are spent on drawing it."""
    from slides.writers import check_deepzoom, check_place, check_tiff
    cfg, out = settled(cfg), Path(cfg.out)
    if out.suffix not in (".png", ".tif", ".tiff", ".dzi"):
        raise UserError(f"--out={out}: give a name that ends in .png, .tif (pyramid) or .dzi (DeepZoom)")
    one_of(cfg, method=METHODS, A=("bicubic", "box"), end=("clean", "published"), condition=("reference", "grid"))
    at_least(cfg, seed=0, batch=1, overlap=-1)
    if len(cfg.guided) != 2 or len(cfg.lam) > 2 or [type(v) for v in cfg.at] != [int, int] or not cfg.size:
        raise UserError("give two numbers for --guided, two whole ones for --at, one or two for --lam and --size")
    if cfg.guided[0] > cfg.guided[1] or "x0" in cfg.guide and max(lams(cfg)) > 1:
        raise UserError(f"--guided={cfg.guided} --lam={cfg.lam}: the first t of --guided is the smaller one, and --lam "
                        f"of {cfg.guide} is a share, 0 to 1")
    if cfg.eval or cfg.sampler not in ("", "lean", "ddim"):
        raise UserError(f"--eval={cfg.eval} --sampler={cfg.sampler}: large images take lean or ddim, and no --eval")
    S.guide_of(cfg.guide, cfg.inner, lams(cfg), cfg.delta, cfg.zeta)
    times(cfg, schedule.T)
    check_place(out)
    if out.suffix == ".dzi":
        check_deepzoom(out, cfg.viewer or None)
    else:
        check_tiff(out, cfg.mpp or None)

def main(argv):
    doc = f"{S.__doc__}\nsettings of every image:\n\n{inspect.getsource(S.Config)}\nof its conditions:\n\n" \
          f"{inspect.getsource(Conditions)}\nof large images:"
    cfg = configure(Settings, argv, PRESETS, ("run", "preset"), doc=doc)
    if not cfg.run:
        return main(arguments(argv))
    cfg.out = cfg.out or str(home_of(cfg.run) / "large.png")
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    check(cfg, model.schedule)
    if cfg.compile:
        print("compiling: the first calls take a minute each")
        model.unet.compile()
        model.vae.encode, model.vae.decode = torch.compile(model.vae.encode), torch.compile(model.vae.decode)
    data = cfg.data or model.info.get("data", "")
    needed = cfg.data or not cfg.reference and cfg.condition == "reference"
    pyramids = S.known_data(model, data) if needed or (Path(data) / "index.json").is_file() else None
    fine, factor = max(cfg.scale, 0), model.vae.factor
    known, patch = model.summarizer.cfg.scales, model.info["patch"]
    cfg.context = cfg.context or usual_context(cfg.size, fine, patch, factor, known)
    scales = [*sorted(cfg.context, reverse=True), fine]
    latents = sides(cfg.size, scales, patch, factor, known)[-1]
    size = tuple(n * factor for n in latents)
    need = tuple(math.ceil(n * 2 ** fine / patch) for n in size)
    grid, proxy = load_grid(cfg, model, pyramids, need), None
    if cfg.method == "joint" and "proxy" in cfg.guide:
        proxy = proxies.load(cfg.run, model, pyramids, ranks)
    if ranks.rank == 0:
        print(f"drawing {size[0]} x {size[1]} pixels, scales {scales}, writing {cfg.out}")
    draw(model, grid, cfg, ranks, proxy, size, pyramids)

def write(out, strips, size, cfg):
    """Write the pixels of an image of size (H,W), which come in strips. out: the names of what one opens."""
    from slides.writers import write_deepzoom, write_tiff
    if out.suffix == ".png":
        save_png(out, np.concatenate(list(strips)))
    elif out.suffix == ".dzi":
        names = write_deepzoom(out, strips, size, viewer=cfg.viewer or None)
        if len(names) == 1:
            print("without openseadragon there is no page to look at it (npm install openseadragon, or --viewer=FILE)")
        return names
    else:
        write_tiff(out, strips, size, mpp=cfg.mpp or None)
    return [out.name]

def agreement(image, view, factor, kind):
    """How well an image (H,W,3) agrees with the coarse view (h,w,3) it was drawn with, both uint8, in words. Pixels far
    outside of its range tell of corrections that overshoot."""
    x, y = (torch.from_numpy(a).movedim(-1, 0).float() for a in (image, view))          # (3,H,W), (3,h,w)
    error = (S.Resize(factor, kind).down(x).clamp(0, 255) - y).square().mean().clamp_min(1e-9)
    low, high = y.amin((1, 2))[:, None, None], y.amax((1, 2))[:, None, None]
    outside = ((x < low) | (x > high)).any(0).float().mean()
    decibels = 10 * math.log10(255 ** 2 / error)
    return f"agrees with its context to {decibels:.1f} dB, {100 * outside:.1f} % of the pixels outside its range"

def draw(model, grid, cfg, ranks, proxy, size, pyramids=None):
    """Draw one large image of size (H,W) and write it, and beside it the coarse views it was drawn with. Of a slide in
    `pyramids`, all of them beside the real region, too, in one picture."""
    out, fine, real = Path(cfg.out), max(cfg.scale, 0), None
    resume = out.with_name(f".{out.name}.partial.safetensors")
    levels, scales = draw_large(model, grid, cfg, ranks, proxy, resume)
    if ranks.rank > 0:
        return ranks.barrier()
    strips = pixels(model, levels[-1].z, ranks)
    if scales[-1] != fine:   # --method=bicubic
        up = S.Resize(2 ** (scales[0] - fine)).up(decoded(model, levels[0].z, ranks)).clamp(-1, 1)
        strips = iter([to_uint8(up)[0].numpy()])
    if small := max(size) <= MOST:
        strips = list(strips)                               # they are needed twice
    if small and not cfg.reference and cfg.condition == "reference":
        real = real_region(pyramids, slide_of(cfg, pyramids), fine, cfg.at, size)
    written = write(out, strips, size, cfg)
    coarse = [s for s in scales if s != fine]
    views = [picture(model, level.z, ranks) for level, _ in zip(levels, coarse)]
    for s, view in zip(coarse, views):
        written.append(f"{out.stem}_scale{s}.png")
        save_png(out.with_name(written[-1]), view)
    if real is not None:
        written.append(f"{out.stem}_beside.png")
        edits = ", before it is edited" if cfg.swap or cfg.paste else ""
        names = [f"real{edits}", "drawn", *(f"its view at scale {s}" for s in coarse)]
        save_beside(out.with_name(written[-1]), [real, np.concatenate(strips), *views], names)
    resume.unlink(missing_ok=True)
    if small and coarse and cfg.method == "joint":
        print(agreement(np.concatenate(strips), views[-1], 2 ** (coarse[-1] - fine), cfg.A))
    view = f"--image={out.with_name(f'{out.stem}_scale{scales[0]}.png')} --scale={scales[0]} --sr=2"
    following = f"; next: python invert.py {typed(cfg.run)}{view}" if coarse else ""
    print(f"wrote {out.parent}: {', '.join(written)}{following}")
    ranks.barrier()

if __name__ == "__main__":
    cli(main, stopped="the same command goes on with this image")
