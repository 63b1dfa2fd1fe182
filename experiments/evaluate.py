"""TODO"""
import json
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, open_tensors, save_grid, write_text
from data import fixed_batch
from experiments import metrics as M
from sample_joint import draw_patches, scales_of
from slides.encoders import load_encoder
from summarizer import standardize
from zoom_vae import perplexity

# ----- 2. Evaluation on held-out patches -----

def truth(pyramids, batch, size):
    """For toy data, tissue shares (N,4) by the region map, which has a quarter of the slide's resolution, and the share
    of nuclei (N,) by the list of those drawn: their discs' area, where the centre lies in the patch."""
    rows, areas = [], []
    for k, s, (i, j) in zip(batch["slide"].tolist(), batch["s"].tolist(), batch["ij"].tolist()):
        side = size * 2 ** s
        with open_tensors(pyramids.folder / pyramids.slides[k]["file"]) as f:
            region = f.get_tensor("region")[i * side // 4:(i + 1) * side // 4, j * side // 4:(j + 1) * side // 4]
            x, y, radius = f.get_tensor("nuclei").double().T
        rows.append(torch.bincount(region.flatten().long(), minlength=4) / region.numel())
        inside = (x >= j * side) & (x < (j + 1) * side) & (y >= i * side) & (y < (i + 1) * side)
        areas.append(torch.pi * radius[inside].square().sum() / side ** 2)
    return torch.stack(rows), torch.stack(areas)


def palette_of(pyramids):
    """Mean colour of each tissue, from training patches at scale 2 and their region maps."""
    batch, regions = fixed_batch(pyramids, "train", 2, 128), []
    for k, (i, j) in zip(batch["slide"].tolist(), batch["ij"].tolist()):
        with open_tensors(pyramids.folder / pyramids.slides[k]["file"]) as f:
            side = pyramids.patch
            region = f.get_tensor("region")[i * side:(i + 1) * side, j * side:(j + 1) * side]
        regions.append(region[::4, ::4])
    return M.fit_palette(batch["x"], torch.stack(regions))


def evaluate(model, pyramids, cfg, ranks):
    """Measure drawn patches against the real ones their conditions came from; print a table, write eval.json."""
    encoder = load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)

    def describe(x):  # descriptor space: what the conditions are made of, here of the patch itself
        return standardize(encoder((x + 1) / 2)[..., None, None])[..., 0, 0]
    with open_tensors(pyramids.folder / pyramids.slides[0]["file"]) as f:
        toy = "region" in f.keys()
    try:
        palette = palette_of(pyramids) if toy and pyramids.scales > 2 else None
    except UserError as err:
        palette = print(f"tissues are not measured: {err}")
    table, rows, labels = [], [], []
    for s in tqdm(scales_of(cfg, pyramids), desc="scales"):
        few = [pyramids.count(split, s) for split in (cfg.split, "train")]
        if min(few) < 3:
            print(f"scale {s} left out: {few[0]} {cfg.split} and {few[1]} training patches are too few")
            continue
        n = min(cfg.n, few[1])                 # as many on both sides of a distance
        batch, train = fixed_batch(pyramids, cfg.split, s, n), fixed_batch(pyramids, "train", s, max(n, 256))["x"]
        real, grid = batch["x"], min(2 ** s, 8)
        fake, null = draw_patches(model, batch, cfg, ranks), draw_patches(model, batch, cfg, ranks, null=True)
        with torch.no_grad(), ranks.autocast():
            z = torch.cat([model.vae.encode(x.to(ranks.device)) for x in real.split(cfg.batch)]).float()
            coded = torch.cat([model.vae.decode(x).float().cpu().clamp(-1, 1) for x in z.split(cfg.batch)])
        used = torch.bincount(model.vae.quantize(z)[1].flatten(), minlength=len(model.vae.codebook.weight))
        row = {"scale": s, "n": len(real), "layout": M.layout_fidelity(fake, real, grid),
               "layout_vae": M.layout_fidelity(coded, real, grid), "psnr_vae": M.psnr(coded, real),
               "codes_used": perplexity(used)}
        for space, feature in (("desc", describe), ("rand", M.random_features)):
            base = feature(train)
            scale = M.standard(base)   # about the mean training patch, or any two patches would look alike
            row[f"sim_{space}"], row[f"shuffled_{space}"] = M.paired_gain(scale(feature(fake)), scale(feature(real)))
            row[f"sim_{space}_vae"] = M.similarity(scale(feature(coded)), scale(feature(real)))
            axes = M.principal(base, min(16, len(base) - 1))
            sets = {name: axes(feature(x)) for name, x in (("fake", fake), ("null", null), ("vae", coded))}
            held, floor = axes(feature(real)), axes(base)[:len(real)]
            # a Fréchet distance of few samples is mostly bias: below 256, the unbiased kernel distance and its error
            measure = (lambda a, b: (M.frechet(a, b), None)) if len(real) >= 256 else M.kernel_distance
            for name, value in {"floor": floor, **sets}.items():
                row[f"dist_{space}_{name}"] = measure(value, held)
        if palette is not None:
            cell = {0: 16, 1: 16, 2: 8}.get(s, 4)   # pixels averaged before a colour counts as a tissue
            want, area = truth(pyramids, batch, pyramids.patch)
            for name, x in (("fake", fake), ("real", real), ("vae", coded), ("null", null)):
                row[f"tissue_{name}"] = float((M.tissue_fractions(x, palette, cell) - want).abs().mean())
            row["nuclei_mean"] = float(area.mean())
            for name, x in (("fake", fake), ("real", real), ("vae", coded), ("null", null)):
                row[f"nuclei_{name}"] = float((M.nuclei_fraction(x) - area).abs().mean())
        table.append(row)
        rows, labels = rows + [real[:12], fake[:12]], labels + [f"scale {s} real", f"scale {s} drawn"]
    if not table:
        raise UserError(f"{pyramids.folder} has too few patches to measure anything: look at the pictures instead, "
                        f"without --eval")
    out = Path(cfg.out)
    save_grid(out / "sheet.png", rows, labels)
    write_text(out / "eval.json", json.dumps({"settings": vars(cfg), "rows": table}, indent=1))
    print_table(table)
    print(f"\nwrote {out}/eval.json and sheet.png; guidance {cfg.guidance}, {cfg.steps} {cfg.sampler} steps, "
          f"seed {cfg.seed}")


def print_table(table):
    """Three blocks, a row per scale. "(vae)" columns are what coding the real patch alone loses: the ceiling."""
    def cell(v):
        if v is None:
            return "-"
        if isinstance(v, tuple):
            return f"{v[0]:.3g}" + (f"±{v[1]:.2g}" if v[1] is not None else "")
        return f"{v:d}" if isinstance(v, int) else f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}"
    blocks = [("follows its condition (1 = the real patch; shuffled = other patches' conditions)",
               ["scale", "n", "layout", "layout_vae", "sim_desc", "shuffled_desc", "sim_desc_vae", "sim_rand",
                "shuffled_rand", "sim_rand_vae", "psnr_vae", "codes_used"]),
              ("distance to held-out patches (Fréchet if n >= 256, else kernel ± standard error), 16 components",
               ["scale"] + [f"dist_{sp}_{k}" for sp in ("desc", "rand") for k in ("fake", "floor", "vae", "null")])]
    if "tissue_fake" in table[0]:
        blocks.append(("mean absolute error of what colours say: tissue shares against the region map, the share of "
                       "nuclei against those drawn (mean given)",
                       ["scale", *(f"{what}_{name}" for what in ("tissue", "nuclei")
                                   for name in ("fake", "vae", "real", "null")), "nuclei_mean"]))
    for title, keys in blocks:
        print(f"\n{title}\n" + " ".join(f"{k.replace('_', ' '):>14}" for k in keys))
        for row in table:
            print(" ".join(f"{cell(row[k]):>14}" for k in keys))
