"""What joint sampling is compared with: independent windows, MultiDiffusion, bicubic, and the published repair.

in:  Settings of a large image (large/command.py) with --method or --repair   out: levels, as sample_joint draws them
run: python sample_joint.py out/toy --size=512 --context=3 --method=multidiffusion     read next: experiments/quality.py
"""
import torch

from common import generator
from large.ranks import open_canvas
from large.windows import WindowEps, contexts
from sample_joint import Level, sample_levels

def layout(cfg, scales, window, overlap):
    """What --method draws. out: size in pixels, scales, overlap of windows, fade. None of them is guided."""
    if cfg.method == "bicubic":                    # the context alone, enlarged afterwards
        shift = scales[0] - scales[-1]
        return tuple(n >> shift for n in cfg.size), scales[:1], overlap, cfg.fade
    if cfg.method == "independent":                # patches side by side
        return cfg.size, scales[-1:], 0, cfg.fade
    return cfg.size, scales[-1:], 3 * window // 4 if cfg.overlap < 0 else overlap, False   # multidiffusion (L §3.2)

@torch.no_grad()
def repair(model, condition, level, s, *, guidance=2.0, seed=0, batch=64, start=300, step=50):
    """Mend the borders of windows: noise the canvas to t = start, then denoise it in windows at a quarter of their
    side, averaged uniformly. out: a Level. reference: the published post-processing (Z S8.2)."""
    old, rng = level.canvas, generator(seed, s, start)
    canvas = open_canvas(old.h, old.w, old.window, old.window[0] * 3 // 4, batch=batch)
    noise = torch.randn(level.z.shape, generator=rng).to(level.z)
    t = torch.tensor([start], device=noise.device)
    z = model.schedule.q_sample(level.z, t, noise)
    eps = WindowEps(model, contexts(model, condition, s, canvas), guidance)
    mended = Level(eps, model.decode, model.encode, canvas, z)
    sample_levels([mended], model.schedule, timesteps=list(range(step, start + 1, step)), end="clean")
    return mended
