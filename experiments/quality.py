"""How good large images are: every way of drawing them on the same conditions, noise and context.

    python -m experiments.quality weights/toy.safetensors --size=512 --n=2   # out/shipped/bench/quality_512.png, .json
    python -m experiments.quality out/toy_long --plot      # quality against cost of such tables (extra: plot)

in:  a run, held-out slides   out: a table with the real images as ceiling, pictures    read next: speed.py
"""
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import torch
from torch import cat, stack
from torch.nn.functional import fold, unfold
from tqdm import tqdm

from common import UserError, at_least, cli, configure, home_of, load_tensors, one_of, save_grid, save_png
from common import save_tensors, setup, to_uint8, write_text
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM
from experiments.cost import Profile, full_size
from experiments.metrics import kernel_distance, principal, psnr, random_features, seam_ratio, similarity, ssim
from experiments.metrics import standard
from large import proxy as proxies
from large.command import EVEN, LEAN, Settings, decoded, draw_large, times, usual_overlap
from large.windows import Grid, sides
from sample_joint import Resize
from slides.encoders import load_encoder
from summarizer import standardize
from text.grid import embeddings

@dataclass
class Config:
    run: str = ""           # run folder, or the shipped weights
    data: str = ""          # data folder; default: the one the run was trained on
    size: int = 512         # pixels a side
    context: int = 0        # scale of the context; 0 = the one whose patch is the whole image
    n: int = 4              # held-out slides
    sampler: str = "ddim"   # of all methods, so that they share a context: ddim, or lean (large/command.py)
    steps: int = 50
    seed: int = 0
    methods: str = ""       # of METHODS, with ";" between; empty = all
    learned: bool = False   # judge in learned features, too (extra: encoders)
    plot: bool = False      # only draw what was measured before
    device: str = "auto"
    threads: int = 2

METHODS = {  # settings of large/command.py
    "independent": dict(method="independent"),
    "multidiffusion": dict(method="multidiffusion", overlap=3),  # as the guided ones, in windows of 16
    "bicubic": dict(method="bicubic"),
    "S2, published": dict(guide="s2", lam=(0.5,), overlap=0, fade=False),
    "S2, repaired": dict(guide="s2", lam=(0.5,), overlap=0, fade=False, repair=True),
    "s2": dict(guide="s2"),
    "x0": dict(guide="x0"),
    "x0+proxy": dict(guide="x0+proxy"),
    "default": LEAN | dict(guide="x0+proxy"),
}

# ----- 1. A run and its held-out slides -----

def open_run(cfg, proxy=True, amp=True):
    """out: model, data, proxy (None if none is wanted), ranks."""
    ranks = setup(cfg.device, amp, cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    pyramids = Pyramids(cfg.data or model.info.get("data", ""), std=model.info.get("std"))
    return model, pyramids, proxies.load(cfg.run, model, pyramids, ranks) if proxy else None, ranks

def feature_spaces(pyramids, learned=False):
    """Ways to describe patches (N,3,P,P): what conditions are made of, and one that nothing is ever conditioned on.
    learned: also by a network that learned to name what is in photographs, as those of published FIDs did."""
    encoder = load_encoder(pyramids.encoder, pyramids.std, pyramids.weights)

    def described(x):
        e = encoder((x + 1) / 2)[..., None, None]                                   # (N,E,1,1): grids of one cell
        return standardize(e)[..., 0, 0]
    spaces = {"desc": described, "rand": random_features}
    if learned:
        spaces["photo"] = partial(photo_features, load_encoder("efflite0_imagenet"))
    return spaces

def photo_features(encoder, x):
    """out: (N,1280). As published FID code: images as files hold them, of 8 bits, enlarged to the side that the network
    was trained with, and the mean of its last feature map. Unlike it: EfficientNet-Lite0 with its own range and bicubic
    resizing, for Inception's weights come in no package."""
    levels = to_uint8(x).movedim(-1, 1)                                             # (N,3,P,P)
    return cat([encoder(part / 255) for part in levels.split(64)])

def base_tiles(pyramids, k, i, j, side):
    """The pixels (1,3,P side,P side) of side x side base tiles of slide k, from row i and column j on."""
    kept = {tuple(ij): n for n, ij in enumerate(pyramids.tensor(k, "ij0").tolist())}
    wanted = list(product(range(i, i + side), range(j, j + side)))
    if not kept.keys() >= {*wanted}:
        raise UserError(f"{pyramids.folder}: {pyramids.slides[k]['name']} lacks patches that were left out when it was "
                        f"made: lower --size, take another --split, or build it without --tissue and --background")
    tiles = stack([pyramids.read(k, 0, kept[ij])["x"] for ij in wanted])                # (side side,3,P,P)
    pixels = side * pyramids.patch
    return uncrop(tiles, (pixels, pixels))

def held_out(pyramids, k, size):
    """The upper left part of the k-th held-out slide: a Grid, and the image (1,3,size,size)."""
    side = size // pyramids.patch
    if size % pyramids.patch:
        raise UserError(f"--size={size} is not a multiple of {pyramids.patch}, the side of a patch")
    slides = [i for i, x in enumerate(pyramids.slides) if x["split"] == "test" and min(x["size"]) >= size]
    if k >= len(slides):
        raise UserError(f"{pyramids.folder} has {len(slides)} held-out images of {size} pixels, and number {k + 1} is "
                        f"asked for (a table takes --n, and as many others): lower --n or --size")
    e = embeddings(pyramids, slides[k], (0, 0, side, side))                             # (side,side,E)
    return Grid(e.movedim(-1, 0)), base_tiles(pyramids, slides[k], 0, 0, side)

def crops(x, side, apart=0):
    """(1,3,H,W) -> patches (n,3,side,side), row by row, every `apart` pixels; by default side by side."""
    return unfold(x, side, stride=apart or side)[0].T.reshape(-1, 3, side, side)

def uncrop(parts, size, apart=0):
    """The reverse: (n,3,side,side) -> (1,3,*size), the sum where they overlap."""
    side = parts.shape[-1]
    return fold(parts.flatten(1).T[None], size, side, stride=apart or side)

# ----- 2. Drawing -----

def tflop(meter):
    """What the rows that a Profile has counted would cost at full size."""
    full = full_size()
    return sum(rows * full.get(part, 0) for part, rows in meter.rows.items()) / 1e12

def slug(name):
    return name.replace(", ", "_").replace(" ", "_")

@dataclass
class Painter:
    """Draws the slides, and keeps what it drew in RUN/bench/quality_SIZE."""
    cfg: Config             # its context is known
    model: ZoomLDM
    proxy: torch.nn.Module | None
    ranks: object

    def settings(self, name):
        cfg = self.cfg
        how = EVEN | dict(sampler=cfg.sampler, steps=cfg.steps, seed=cfg.seed) | METHODS[name]
        return Settings(run=cfg.run, size=(cfg.size,), context=(cfg.context,), **how)

    def draw(self, name, grid):
        """out: an image (1,3,H,W) in [-1,1], and the context it was drawn with. Of bicubic both are the context; of
        methods that know none, both are the image."""
        levels, _ = draw_large(self.model, grid, self.settings(name), self.ranks, self.proxy)
        x, y = (decoded(self.model, levels[at].z, self.ranks) for at in (-1, 0))
        return x, y

    def paint(self, name, k, grid, shared):
        """One method's image of the k-th slide, not drawn again where the same settings drew it before. shared: the
        context of methods that draw none. out: (1,3,size,size) as of 8 bits, its context, seconds (wall clock), TFLOP
        at full size."""
        cfg = self.cfg
        file = home_of(cfg.run) / "bench" / f"quality_{cfg.size}" / f"{k}_{slug(name)}.safetensors"
        mark = asdict(self.settings(name)) | {"data": cfg.data, "model": proxies.mark(self.model)}
        mark = json.loads(json.dumps(mark))                                             # plain types, as files hold
        tensors, meta = load_tensors(file) if file.exists() else ({}, {})
        if meta.get("mark") != mark or "y" not in tensors:
            meter, began = Profile(self.model, self.proxy), time.perf_counter()
            bicubic = Resize(2 ** cfg.context).up(shared).clamp(-1, 1)
            x, y = (bicubic, shared) if name == "bicubic" else self.draw(name, grid)
            seconds = time.perf_counter() - began
            meter.close()
            y = shared if "method" in METHODS[name] else y
            tensors, meta = {"x": to_uint8(x)[0], "y": y}, {"mark": mark, "seconds": seconds, "TFLOP": tflop(meter)}
            save_tensors(file, tensors, meta)
        return tensors["x"].movedim(-1, 0)[None] / 127.5 - 1, tensors["y"], meta["seconds"], meta["TFLOP"]

@torch.no_grad()
def coded(model, x, P, ranks):
    """A real image (1,3,H,W) through the autoencoder and nothing else: in one piece, and patch by patch."""
    x = x.to(ranks.device)
    with ranks.autocast():
        z = model.encode(x).float()
        parts = [model.decode(model.encode(part)).float() for part in crops(x, P).split(32)]
    patches = cat(parts).clamp(-1, 1).cpu()
    return decoded(model, z, ranks), uncrop(patches, x.shape[2:])

# ----- 3. Measuring -----

def window_step(name, window, sampler="ddim"):
    """How many latents from one window's border to the next, for one of METHODS; the window itself where nothing
    overlaps."""
    how = METHODS.get(name, {"overlap": 0})
    lean = how.get("sampler", sampler) == "lean" and "overlap" not in how
    if lean or how.get("method") in ("independent", "bicubic"):
        return window
    return window - how.get("overlap", usual_overlap(window))

class Ruler:
    """Distances of images to the real ones, in each feature space: of their patches ("crops"), and ("views") of their
    patches at the scale below the context's."""

    def __init__(self, pyramids, context, real, learned=False):
        self.P, self.half = pyramids.patch, Resize(2 ** (context - 1), "box")
        self.real, self.spaces = self.patches(real), {}
        near = fixed_batch(pyramids, "train", 0, 512)["x"]
        far = fixed_batch(pyramids, "train", context - 1, 256)["x"]
        for space, features in feature_spaces(pyramids, learned).items():
            base = features(near)
            axes = {"crops": principal(base, 16), "views": principal(features(far), 16)}
            self.spaces[space] = features, axes, standard(base)

    def patches(self, images):
        return {"crops": cat([crops(x, self.P) for x in images]),
                "views": cat([crops(self.half.down(x), self.P) for x in images])}

    def measure(self, images, others=None):
        """out: {column: value}. others: take these slides instead, for a set against itself says nothing."""
        drawn, row = self.patches(images), {}
        real = self.real if others is None else self.patches(others)
        for space, (features, axes, like) in self.spaces.items():
            for what, project in axes.items():
                found = kernel_distance(project(features(drawn[what])), project(features(real[what])))
                row[f"{what}_{space}"], row[f"{what}_{space}_se"] = found
            near, its_own = features(drawn["crops"]), features(self.real["crops"])
            row[f"ref_{space}"] = similarity(like(near), like(its_own))
        return row

# ----- 4. The table -----

def quality(cfg):
    """Every method on the same conditions and noise; images drawn before with the same settings are kept. psnr, ssim:
    A(large) against the context, one and the same but for lean times; crops, views: see Ruler; ref: similarity of each
    tile to its real one; seams, where patches meet; by cell: the same over steps between other cells of latents; edges:
    so, where this method's windows begin."""
    names = [name.strip() for name in cfg.methods.split(";")] if cfg.methods else list(METHODS)
    if set(names) - set(METHODS):
        raise UserError(f"--methods={cfg.methods}: known are {'; '.join(METHODS)} (put ';' between)")
    model, pyramids, _, ranks = open_run(cfg, proxy=False)
    P, cell, out = pyramids.patch, model.vae.factor, home_of(cfg.run) / "bench"
    slides = [held_out(pyramids, k, cfg.size) for k in range(2 * cfg.n)]
    cfg.context = cfg.context or max((cfg.size // P).bit_length() - 1, 1)
    sides((cfg.size,), [cfg.context, 0], P, cell, model.summarizer.cfg.scales)
    grids, real = zip(*slides[:cfg.n])
    others = [x for _, x in slides[cfg.n:]]
    asks = any("proxy" in METHODS[name].get("guide", "") for name in names)  # fitted after what may be refused
    painter = Painter(cfg, model, open_run(cfg)[2] if asks else None, ranks)
    ruler, A = Ruler(pyramids, cfg.context, real, cfg.learned), Resize(2 ** cfg.context)
    near = [Resize(A.factor, "box").down(x) for x in real]                              # real contexts
    whole, patches = zip(*(coded(model, x, P, ranks) for x in tqdm(real, "coded")))
    drawn, bill = {"real": real, "coded whole": whole, "coded patches": patches}, {}
    aims = dict.fromkeys(drawn, near)
    shared = [painter.draw("bicubic", grid)[1] for grid in grids]
    for k, grid in enumerate(grids):
        for name in names:
            x, y, *cost = painter.paint(name, k, grid, shared[k])
            drawn.setdefault(name, []).append(x)
            aims.setdefault(name, []).append(y)
            bill.setdefault(name, []).append(cost)
    table = []
    for name, images in tqdm(drawn.items(), "measured"):
        seconds, flops = zip(*bill.get(name, [(0, 0)]))
        row = {"method": name, "seconds": sorted(seconds)[len(seconds) // 2], "TFLOP": sum(flops) / len(flops)}
        seen = cat([A.down(x).clamp(-1, 1) for x in images])
        row |= {"psnr": psnr(seen, cat(aims[name])), "ssim": ssim(seen, cat(aims[name]))}
        x, begins = cat(images), window_step(name, P // cell, cfg.sampler) * cell
        row |= {"seams": seam_ratio(x, P), "by_cell": seam_ratio(x, P, cell), "edges": seam_ratio(x, begins, cell)}
        row |= ruler.measure(images, others if name == "real" else None)
        table.append(row)
        save_png(out / f"quality_{cfg.size}" / f"{slug(name)}.png", to_uint8(images[0])[0].numpy())
    save_grid(out / f"quality_{cfg.size}.png", [cat(images[:2]) for images in drawn.values()], list(drawn))
    write_text(out / f"quality_{cfg.size}.json", json.dumps({"settings": vars(cfg), "rows": table}, indent=1))
    show(cfg, table)
    print(f"wrote {out}/quality_{cfg.size}.json and .png; next: python -m experiments.quality {cfg.run} --plot")

def show(cfg, table):
    keys = ["psnr", "ssim", "crops_desc", "crops_rand", "views_desc", "views_rand", "ref_desc", "ref_rand", "seams",
            "by_cell", "edges", "seconds", "TFLOP"]
    if cfg.learned:
        keys += ["crops_photo", "views_photo", "ref_photo"]
    print(f"{cfg.n} images of {cfg.size} x {cfg.size} pixels, context at scale {cfg.context}, "
          f"{cfg.steps} {cfg.sampler} steps\n{'':>16}", *(f"{key.replace('_', ' '):>11}" for key in keys), sep="")
    for row in table:
        print(f"{row['method']:>16}", end="")
        for key in keys:
            value = f"{row[key]:.2f}" if abs(row[key]) < 100 else f"{row[key]:.0f}"
            error = f"±{row[key + '_se']:.2f}" if key + "_se" in row else ""
            print(f"{value + error:>11}", end="")
        print()

def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run:
        raise UserError("say which run: python -m experiments.quality out/toy_long (train one with python train.py "
                        "toy_long)")
    at_least(cfg, n=1, steps=1, size=1, context=0)
    one_of(cfg, sampler=("ddim", "lean"))
    times(Settings(sampler=cfg.sampler, steps=cfg.steps), 1000)  # are there so many?
    if cfg.plot:
        from experiments.plot import draw_trade
        return draw_trade(home_of(cfg.run) / "bench")
    quality(cfg)

if __name__ == "__main__":
    cli(main, stopped="images that are drawn are kept, and the same command goes on with the others")
