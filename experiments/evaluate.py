"""How good patches are: drawn from the conditions of held-out patches, and measured against these.

Columns that end in "vae" are what coding the real patch alone loses: the ceiling of any latent model. "null" is drawn
without a condition, "shuffled" is held against another patch's.

in:  a trained model and the pyramids it was trained on   out: a table, RUN/eval/eval.json and sheet.png
run: python sample_joint.py RUN --eval     read next: quality.py
"""
import json
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, open_tensors, save_grid, write_text
from data import fixed_batch
from experiments import metrics as M
from experiments.quality import feature_spaces
from sample_joint import draw_patches, scales_of
from text.tissues import region_map
from weights.shipped import typed
from zoom_vae import perplexity

KINDS = ("fake", "real", "vae", "null")  # what is measured: drawn, real, real but coded, drawn without a condition

# ----- 1. What toy slides say of themselves -----

def truth(pyramids, batch, size):
    """For toy data, tissue shares (N,4) by the region map, and the share of nuclei (N,) by the list of those drawn:
    their discs' area, where the centre lies in the patch."""
    shares, areas = [], []
    for k, s, (i, j) in zip(batch["slide"].tolist(), batch["s"].tolist(), batch["ij"].tolist()):
        n, side = 2 ** s, size * 2 ** s                     # of the patch, in base tiles and in pixels of the slide
        region = torch.from_numpy(region_map(pyramids, k, (i * n, j * n, n, n)))
        shares.append(torch.bincount(region.flatten().long(), minlength=4) / region.numel())
        with open_tensors(pyramids.folder / pyramids.slides[k]["file"], "pt") as f:
            x, y, radius = f.get_tensor("nuclei").double().T
        inside = (x // side == j) & (y // side == i)
        areas.append(torch.pi * radius[inside].square().sum() / side ** 2)
    return torch.stack(shares), torch.stack(areas)

def palette_of(pyramids):
    """Mean colour of each tissue, from training patches at scale 2 and their region maps; None for other data."""
    try:
        batch = fixed_batch(pyramids, "train", 2, 128)
        places = zip(batch["slide"].tolist(), (4 * batch["ij"]).tolist())
        maps = [torch.from_numpy(region_map(pyramids, k, (i, j, 4, 4)))[::4, ::4] for k, (i, j) in places]
        return M.fit_palette(batch["x"], torch.stack(maps))
    except UserError as err:
        print(f"tissues are not measured: {err}")

# ----- 2. One scale -----

@torch.no_grad()
def coded(model, real, batch, ranks):
    """Encode and decode real patches. out: images like real; how many codes they use."""
    images, used = [], 0
    for x in real.split(batch):
        with ranks.autocast():
            z = model.vae.encode(x.to(ranks.device)).float()
            images.append(model.vae.decode(z).float().cpu().clamp(-1, 1))
        indices = model.vae.quantize(z)[1].flatten()
        used = used + torch.bincount(indices, minlength=len(model.vae.codebook.weight))
    return torch.cat(images), perplexity(used)

def in_space(name, feature, sets, train, null):
    """Similarities and distances in one feature space. in: sets {kind: images}; null: features. out: a row."""
    base, features = feature(train), {kind: feature(x) for kind, x in sets.items()}
    real = features.pop("real")
    # about the mean training patch, or any two patches would look alike
    centre = M.standard(base)
    right, wrong = M.paired_gain(centre(features["fake"]), centre(real))
    row = {f"sim_{name}": right, f"shuffled_{name}": wrong,
           f"sim_{name}_vae": M.similarity(centre(features["vae"]), centre(real))}
    project = M.principal(base, min(16, len(base) - 1))
    for kind, x in {"floor": base[:len(real)], "null": null[:len(real)], **features}.items():
        # a Fréchet distance of few samples is mostly bias: below 256, the unbiased kernel distance and its error
        a, b = project(x), project(real)
        row[f"dist_{name}_{kind}"] = (M.frechet(a, b), None) if len(real) >= 256 else M.kernel_distance(a, b)
    return row

def by_colour(sets, batch, pyramids, palette, s):
    """Mean absolute errors of what colours say of tissues and nuclei. out: {column: value}."""
    shares, area = truth(pyramids, batch, pyramids.patch)
    cell = {0: 16, 1: 16, 2: 8}.get(s, 4)   # pixels averaged before a colour counts as a tissue
    row = {"nuclei_mean": float(area.mean())}
    for kind in KINDS:
        found = M.tissue_fractions(sets[kind], palette, cell)
        row[f"tissue_{kind}"] = float((found - shares).abs().mean())
        row[f"nuclei_{kind}"] = float((M.nuclei_fraction(sets[kind]) - area).abs().mean())
    return row

def contrast(x):
    """Mean deviation of colours within a patch. in: (N,3,P,P)."""
    return float(x.std((2, 3)).mean())

def measure(model, pyramids, cfg, ranks, s, spaces, palette, null):
    """All columns of scale s. null: patches drawn without a condition, the same at every scale, and their features
    {space: (N,D)}. out: the row; the real and the drawn patches."""
    n = min(cfg.n, pyramids.count("train", s))              # as many on both sides of a distance
    batch = fixed_batch(pyramids, cfg.split, s, n)
    train = fixed_batch(pyramids, "train", s, max(n, 256))["x"]
    real, grid = batch["x"], min(2 ** s, 8)
    fake = draw_patches(model, batch, cfg, ranks)
    vae, codes = coded(model, real, cfg.batch, ranks)
    sets, (unguided, features) = {"fake": fake, "vae": vae, "real": real}, null
    row = {"scale": s, "n": len(real), "layout": M.layout_fidelity(fake, real, grid),
           "layout_vae": M.layout_fidelity(vae, real, grid), "psnr_vae": M.psnr(vae, real), "codes_used": codes,
           "contrast": contrast(fake) / contrast(real), "contrast_vae": contrast(vae) / contrast(real)}
    for name, feature in tqdm(spaces.items(), "features", leave=False):
        row |= in_space(name, feature, sets, train, features[name])
    if palette is not None:
        row |= by_colour(sets | {"null": unguided[:len(real)]}, batch, pyramids, palette, s)
    return row, real, fake

def draw_null(model, pyramids, cfg, ranks, scales, spaces):
    """Patches without a condition, as many as any scale takes, and their features {space: (N,D)}."""
    most = {s: min(cfg.n, pyramids.count(cfg.split, s), pyramids.count("train", s)) for s in scales}
    s = max(most, key=most.get)
    x = draw_patches(model, fixed_batch(pyramids, cfg.split, s, most[s]), cfg, ranks, null=True)
    return x, {name: feature(x) for name, feature in spaces.items()}

# ----- 3. All scales -----

def evaluate(model, pyramids, cfg, ranks):
    """Measure drawn patches against the real ones their conditions came from; print a table, write eval.json."""
    spaces, palette = feature_spaces(pyramids, cfg.learned), palette_of(pyramids)
    table, rows, labels, scales = [], [], [], []
    for s in scales_of(cfg, pyramids):
        held_out, train = pyramids.count(cfg.split, s), pyramids.count("train", s)
        if min(held_out, train) >= 3:
            scales.append(s)
        else:
            print(f"scale {s} left out: {held_out} {cfg.split} and {train} training patches are too few")
    if not scales:
        raise UserError(f"{pyramids.folder} has too few patches to measure anything: look at the pictures instead, "
                        f"without --eval")
    null = draw_null(model, pyramids, cfg, ranks, scales, spaces)
    for s in tqdm(scales, desc="scales"):
        row, real, fake = measure(model, pyramids, cfg, ranks, s, spaces, palette, null)
        table.append(row)
        rows += [real[:12], fake[:12]]
        labels += [f"scale {s} real", f"scale {s} drawn"]
    out = Path(cfg.out)
    save_grid(out / "sheet.png", rows, labels)
    write_text(out / "eval.json", json.dumps({"settings": vars(cfg), "rows": table}, indent=1))
    print_table(table)
    print(f"\nwrote {out}/eval.json and sheet.png; guidance {cfg.guidance}, {cfg.steps} {cfg.sampler} steps, "
          f"seed {cfg.seed}; next: python sample_joint.py {typed(cfg.run, cfg.data)}--size=512")

def as_cell(value):
    """A number as the table shows it; a distance with its error."""
    if isinstance(value, tuple):
        return f"{value[0]:.3g}" + ("" if value[1] is None else f"±{value[1]:.2g}")
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

def print_table(table):
    """Two blocks, three for toy data, a row per scale."""
    blocks = {
        "follows its condition (1 = the real patch; shuffled = other patches' conditions)":
            "n layout layout_vae sim_desc shuffled_desc sim_desc_vae sim_rand shuffled_rand sim_rand_vae psnr_vae "
            "codes_used contrast contrast_vae",
        "distance to held-out patches (Fréchet if n >= 256, else kernel ± standard error), 16 components":
            "dist_desc_fake dist_desc_floor dist_desc_vae dist_desc_null dist_rand_fake dist_rand_floor dist_rand_vae "
            "dist_rand_null"}
    if "sim_photo" in table[0]:
        blocks["the same in features of a network that learned from photographs, EfficientNet-Lite0"] = (
            "sim_photo shuffled_photo sim_photo_vae dist_photo_fake dist_photo_floor dist_photo_vae dist_photo_null")
    if "tissue_fake" in table[0]:
        blocks["mean absolute error of what colours say: tissue shares against the region map, the share of nuclei "
               "against those drawn (mean given)"] = (
            "tissue_fake tissue_vae tissue_real tissue_null nuclei_fake nuclei_vae nuclei_real nuclei_null nuclei_mean")
    for title, keys in blocks.items():
        keys = ["scale", *keys.split()]
        print(f"\n{title}\n" + " ".join(f"{key.replace('_', ' '):>14}" for key in keys))
        for row in table:
            print(" ".join(f"{as_cell(row[key]):>14}" for key in keys))
