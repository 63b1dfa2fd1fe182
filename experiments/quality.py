"""How good large images are: every way of drawing them on the same conditions, noise and context.

    python quality.py out/toy_long --size=512 --n=4     # table, RUN/bench/quality_512.png and .json
    python quality.py out/toy_long --plot               # quality against cost, from those tables (extra: plot)

in:  a run folder, held-out slides   out: a table with the real images as ceiling, pictures    read next: joint_table.py
"""
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (
    UserError,
    atomic,
    cli,
    configure,
    load_tensors,
    open_tensors,
    save_grid,
    save_png,
    save_tensors,
    setup,
    to_uint8,
    write_text,
)
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM
from experiments import metrics as M
from experiments.cost import Profile, full_size
from large import proxy as proxies
from large.command import Settings, decoded, draw_large, usual_overlap
from large.windows import Grid
from sample_joint import Resize
from slides.encoders import load_encoder
from summarizer import standardize


@dataclass
class Config:
    run: str = ""           # run folder
    data: str = ""          # data folder; default: the one the run was trained on
    size: int = 512         # pixels a side
    context: int = 0        # scale of the context; 0 = the one whose patch is the whole image
    n: int = 4              # held-out slides
    steps: int = 50
    seed: int = 0
    methods: str = ""       # of METHODS, with ";" between; empty = all
    plot: bool = False      # only draw what was measured before
    device: str = "auto"
    threads: int = 2


METHODS = {  # settings of sample_joint.py
    "independent": dict(method="independent"),
    "multidiffusion": dict(method="multidiffusion", overlap=3),  # as the guided ones, in windows of 16
    "bicubic": dict(method="bicubic"),
    "S2, published": dict(guide="s2", lam=(0.5,), overlap=0, fade=False),
    "S2, repaired": dict(guide="s2", lam=(0.5,), overlap=0, fade=False, repair=True),
    "s2": dict(guide="s2"),
    "x0": dict(guide="x0"),
    "x0+proxy": dict(guide="x0+proxy"),
    "part guided": dict(guide="x0+proxy", guided=(100, 800)),  # x0+proxy without a null branch at both ends
}


def open_run(cfg, proxy=True):
    """out: model, data, proxy (None if none is wanted), ranks."""
    ranks = setup(cfg.device, threads=cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    pyramids = Pyramids(cfg.data or model.info.get("data", ""), std=model.info.get("std"))
    return model, pyramids, proxies.load(cfg.run, model, pyramids, ranks) if proxy else None, ranks


def held_out(pyramids, k, size):
    """The upper left part of the k-th held-out slide: e (E,G,G), image (1,3,size,size), region map or None."""
    slides = [i for i, x in enumerate(pyramids.slides) if x["split"] == "test" and x["size"][0] >= size
              and x["size"][1] >= size]
    if size % pyramids.patch:
        raise UserError(f"--size={size} is not a multiple of {pyramids.patch}, the side of a patch")
    if k >= len(slides):
        raise UserError(f"{pyramids.folder} has {len(slides)} held-out images of {size} pixels, and number {k + 1} is "
                        f"asked for (quality.py takes --n, and as many others): lower --n or --size")
    i, P, G = slides[k], pyramids.patch, size // pyramids.patch
    e = pyramids.tensor(i, "e")[:G, :G].float().movedim(-1, 0)
    e = e if pyramids.rescale is None else e * pyramids.rescale[:, None, None]
    x = torch.full((1, 3, size, size), torch.nan)
    for n, (r, c) in enumerate(pyramids.tensor(i, "ij0").tolist()):
        if r < G and c < G:
            x[0, :, r * P:(r + 1) * P, c * P:(c + 1) * P] = pyramids.read(i, 0, n)["x"]
    if x.isnan().any():
        raise UserError(f"{pyramids.folder}: {pyramids.slides[i]['name']} lacks patches that were left out when it was "
                        f"made: lower --size, or build held-out images whole, without --tissue and --background")
    with open_tensors(pyramids.folder / pyramids.slides[i]["file"]) as f:
        region = f.get_tensor("region")[:size // 4, :size // 4] if "region" in f.keys() else None
    return Grid(e), x, region


def settings(cfg, method, context):
    """The Config of sample_joint.py for one of METHODS."""
    return replace(Settings(run=cfg.run, size=(cfg.size,), context=(context,), steps=cfg.steps, seed=cfg.seed),
                   **METHODS[method])


def apart(cfg, name, context, window):
    """How many latents from one window to the next, for one of METHODS; the window itself where nothing overlaps."""
    if name not in METHODS or METHODS[name].get("method") in ("independent", "bicubic"):
        return window
    overlap = settings(cfg, name, context).overlap
    return window - (usual_overlap(window) if overlap < 0 else overlap)


def crops(x, side):
    """(1,3,H,W) -> all its patches (n,3,side,side)."""
    return F.unfold(x, side, stride=side)[0].T.reshape(-1, 3, side, side)


def seams_by_tissue(x, region, window):
    """Seam ratio within each tissue, {index: ratio}: steps across window borders over other steps between neighbours of
    that tissue."""
    full = region.repeat_interleave(4, 0).repeat_interleave(4, 1)
    out = {}
    for tissue in full.unique().tolist():
        across, inside = [], []
        for axis in (0, 1):
            step = x[0].diff(dim=axis + 1).abs().mean(0).movedim(axis, 0)
            mine = (full == tissue).movedim(axis, 0)
            mine, border = mine[1:] & mine[:-1], torch.arange(1, len(step) + 1) % window == 0
            across, inside = [*across, step[border][mine[border]]], [*inside, step[~border][mine[~border]]]
        across, inside = torch.cat(across), torch.cat(inside)
        if len(across) > 500:
            out[tissue] = float(across.mean() / inside.mean())
    return out


def paint(cfg, name, k, grid, shared, model, proxy, ranks):
    """One method's image of the k-th slide, from RUN/bench/quality_SIZE where the same settings drew it before.
    out: (1,3,size,size) as of 8 bits, seconds (wall clock), TFLOP at full size."""
    context = cfg.context or (cfg.size // shared.shape[-1]).bit_length() - 1
    settle, file = settings(cfg, name, context), Path(cfg.run) / "bench" / f"quality_{cfg.size}" / f"{k}_{slug(name)}"
    mark = json.loads(json.dumps(asdict(settle) | {"data": cfg.data, "model": proxies.fingerprint(model)}))
    if file.with_suffix(".safetensors").exists():
        tensors, meta = load_tensors(file.with_suffix(".safetensors"))
        if meta.get("mark") == mark:
            return tensors["x"].movedim(-1, 0)[None] / 127.5 - 1, meta["seconds"], meta["TFLOP"]
    meter, full, began = Profile(model, proxy), full_size(), time.perf_counter()
    if name == "bicubic":
        x = Resize(2 ** context).up(shared).clamp(-1, 1)
    else:
        x = decoded(model, draw_large(model, grid, settle, ranks, proxy)[0][-1].z, ranks)
    meter.close()
    spent = time.perf_counter() - began, sum(meter.rows[p] * full.get(p, 0) for p in meter.rows) / 1e12
    x = to_uint8(x)[0]                                                                  # (size,size,3)
    save_tensors(file.with_suffix(".safetensors"), {"x": x}, {"mark": mark, "seconds": spent[0], "TFLOP": spent[1]})
    return x.movedim(-1, 0)[None] / 127.5 - 1, *spent


def slug(name):
    return name.replace(", ", "_").replace(" ", "_").replace(".", "")  # a dot would start a suffix


def quality(cfg):
    """Every method on the same conditions and noise; images drawn before with the same settings are kept. psnr, ssim:
    A(large) against the context, which is the same for all; crops, views: distances of patches, and of patches at the
    scale below the context's, to the real ones; ref: similarity of each tile to its real one; seams, where patches
    meet; by cell: the same over steps between other cells of latents; edges: so, where this method's windows begin."""
    names = [n.strip() for n in cfg.methods.split(";")] if cfg.methods else list(METHODS)
    if set(names) - set(METHODS):
        raise UserError(f"--methods={cfg.methods}: known are {'; '.join(METHODS)} (put ';' between)")
    model, pyramids, proxy, ranks = open_run(cfg, False)
    P, step, out = pyramids.patch, model.vae.factor, Path(cfg.run) / "bench"
    context = cfg.context or max((cfg.size // P).bit_length() - 1, 1)
    encoder, A = load_encoder(pyramids.encoder, pyramids.std, pyramids.weights), Resize(2 ** context)
    spaces = {"desc": lambda x: standardize(encoder((x + 1) / 2)[..., None, None])[..., 0, 0],
              "rand": M.random_features}
    base = {name: f(fixed_batch(pyramids, "train", 0, 512)["x"]) for name, f in spaces.items()}
    far = {name: f(fixed_batch(pyramids, "train", context - 1, 256)["x"]) for name, f in spaces.items()}
    slides, others = ([held_out(pyramids, k, cfg.size) for k in range(a, a + cfg.n)] for a in (0, cfg.n))
    if any("proxy" in METHODS[n].get("guide", "") for n in names):  # fitted only after what may be refused
        proxy = proxies.load(cfg.run, model, pyramids, ranks)
    with torch.no_grad(), ranks.autocast():
        coded = [torch.cat([model.decode(model.encode(p.to(ranks.device))).float().clamp(-1, 1).cpu()
                            for p in crops(x, P).split(32)]).flatten(1).T[None] for _, x, _ in slides]
        whole = [decoded(model, model.encode(x.to(ranks.device)).float(), ranks) for _, x, _ in slides]
    drawn, views, table, bill = {"real": [x for _, x, _ in slides], "coded whole": whole,
                                 "coded patches": [F.fold(x, cfg.size, P, stride=P) for x in coded]}, [], [], {}
    shared = [decoded(model, draw_large(model, grid, settings(cfg, "bicubic", context), ranks)[0][0].z, ranks)
              for grid, _, _ in slides]
    for k, (grid, _, _) in enumerate(slides):
        for name in names:
            x, seconds, tflop = paint(cfg, name, k, grid, shared[k], model, proxy, ranks)
            drawn.setdefault(name, []).append(x)
            bill.setdefault(name, []).append((seconds, tflop))
    for name, images in drawn.items():
        seconds, tflop = zip(*bill.get(name, [(0, 0)]))
        row = {"method": name, "seconds": sorted(seconds)[len(seconds) // 2], "TFLOP": sum(tflop) / len(tflop)}
        aim = [Resize(2 ** context, "box").down(x) for _, x, _ in slides] if name not in bill else shared
        seen = [A.down(x).clamp(-1, 1) for x in images]
        row["psnr"], row["ssim"] = (f(torch.cat(seen), torch.cat(aim)) for f in (M.psnr, M.ssim))
        row["seams"] = M.seam_ratio(torch.cat(images), P)
        row["by_cell"] = M.seam_ratio(torch.cat(images), P, step)
        row["edges"] = M.seam_ratio(torch.cat(images), apart(cfg, name, context, P // step) * step, step)
        half = Resize(2 ** (context - 1), "box")
        near, real = (torch.cat([crops(x, P) for x in xs]) for xs in (images, drawn["real"]))
        away, real_away = (torch.cat([crops(half.down(x), P) for x in xs]) for xs in (images, drawn["real"]))
        if name == "real":  # a set against itself says nothing: take other slides, the distance between contents
            real, real_away = (torch.cat([crops(f(x), P) for _, x, _ in others]) for f in (lambda x: x, half.down))
        for space, f in spaces.items():
            for key, sample, a, b in (("crops", base, near, real), ("views", far, away, real_away)):
                axes = M.principal(sample[space], 16)
                row[f"{key}_{space}"], row[f"{key}_{space}_se"] = M.kernel_distance(axes(f(a)), axes(f(b)))
            like = M.standard(base[space])
            row[f"ref_{space}"] = M.similarity(like(f(near)), like(f(real))) if name != "real" else 1.0
        for k, (_, _, region) in enumerate(slides):
            if region is not None:
                for tissue, value in seams_by_tissue(images[k], region, P).items():
                    row.setdefault("tissue_seams", {}).setdefault(str(tissue), []).append(value)
        row["tissue_seams"] = {k: sum(v) / len(v) for k, v in sorted(row.get("tissue_seams", {}).items())}
        table.append(row)
        views.append(torch.cat(images[:2]))
        save_png(out / f"quality_{cfg.size}" / f"{slug(name)}.png", to_uint8(images[0])[0].numpy())
    save_grid(out / f"quality_{cfg.size}.png", views, list(drawn))
    write_text(out / f"quality_{cfg.size}.json", json.dumps({"settings": vars(cfg), "rows": table}, indent=1))
    keys = ["psnr", "ssim", "crops_desc", "crops_rand", "views_desc", "views_rand", "ref_desc", "ref_rand", "seams",
            "by_cell", "edges", "seconds", "TFLOP"]

    def cell(row, key):
        error = f"±{row[key + '_se']:.2f}" if key + "_se" in row else ""
        return f"{row[key]:.2f}{error}" if abs(row[key]) < 100 else f"{row[key]:.0f}"
    print(f"{cfg.n} images of {cfg.size} x {cfg.size} pixels, context at scale {context}, {cfg.steps} steps\n"
          f"{'':>16}" + "".join(f"{k.replace('_', ' '):>11}" for k in keys) + "  seams: background stroma tumour fat")
    for row in table:
        tissue = " ".join(f"{row['tissue_seams'][k]:.2f}" if k in row["tissue_seams"] else "-" for k in "0123")
        print(f"{row['method']:>16}" + "".join(f"{cell(row, k):>11}" for k in keys) + "  " + tissue)
    print(f"wrote {out}/quality_{cfg.size}.json and .png")


def plot(folder):
    """Coherence and crop distance of every method over its cost, from quality_*.json."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as err:
        raise UserError("--plot needs matplotlib: pip install -e '.[plot]'") from err
    files = sorted(folder.glob("quality_*.json"))
    if not files:
        raise UserError(f"{folder} holds no quality_*.json: measure first, without --plot")
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.8), layout="tight")
    for marker, file in zip("os^D", files):
        rows = [r for r in json.loads(file.read_text())["rows"] if r["TFLOP"]]
        for ax, key, label in ((axes[0], "psnr", "A(image) against the context, dB"),
                               (axes[1], "crops_desc", "distance of crops to real ones (descriptor)")):
            ax.set(xscale="log", xlabel="TFLOP per image, at full size", ylabel=label, xmargin=0.15)
            ax.set_xticks(ticks := (1000, 2000, 5000, 10000, 20000, 50000), ticks)
            ax.xaxis.set_minor_formatter("")
            ax.scatter([r["TFLOP"] for r in rows], [r[key] for r in rows], marker=marker, label=file.stem[8:] + " px")
            for k, r in enumerate(sorted(rows, key=lambda r: r[key])):  # labels in turn above and below: some lie near
                ax.annotate(r["method"], (r["TFLOP"], r[key]), fontsize=7, xytext=(4, 3 - 9 * (k % 2)),
                            textcoords="offset points")
    axes[0].legend()
    with atomic(folder / "quality.png") as tmp:
        figure.savefig(tmp, format="png", dpi=110)
    print(f"wrote {folder / 'quality.png'}")


def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run:
        raise UserError("say which run: python quality.py out/toy_long (train one with python train.py toy_long)")
    if min(cfg.n, cfg.steps, cfg.size) < 1:
        raise UserError(f"--n={cfg.n} --steps={cfg.steps} --size={cfg.size}: all are at least 1")
    plot(Path(cfg.run) / "bench") if cfg.plot else quality(cfg)


if __name__ == "__main__":
    cli(main)
