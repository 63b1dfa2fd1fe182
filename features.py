"""Features of patches from a trained ZoomLDM, for slide-level learning (Z §4.5; L §7).

A patch is encoded, noised to t and passed once through the U-Net, conditioned on its own embeddings; the activation of
one block, averaged over space, is its feature. With several scales, each patch of the finest is joined with the coarser
patches that it lies in. Papers leave open: the pooling, the noise (here seeded), and how scales are joined.

in:  a run and pyramids   out: OUT/SLIDE.safetensors with features (N,K) float32, coords (N,2) int32 = x, y in pixels
run: python mil.py extract RUN (python features.py: sizes of the full-size blocks)     read next: bags.py
"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from common import UserError, cli, generator, open_tensors, save_tensors, setup
from data import Pyramids
from diffusion import ZoomLDM
from encoder import load_encoder
from patches import draw_patches
from train import fingerprint
from unet import UNet, UNetConfig


@dataclass
class ExtractConfig:
    run: str = ""             # run folder
    data: str = ""            # pyramids; default: those the run was trained on
    out: str = ""             # folder to write; default RUN/features
    scales: tuple = (0,)      # of the features, finest first
    kind: str = "unet"        # unet; untrained, the same with a random U-Net; descriptor, the encoder on the patch
    #                           itself; drawn, the same on a patch drawn from the condition
    t: int = 100              # time index that patches are noised to (Z 100, L 50)
    block: str = ""           # middle (L), or an index into the published output_blocks; default 3 (Z), or the last
    weights: str | None = None  # of the encoder, for kinds descriptor and drawn
    seed: int = 0             # of the noise
    guidance: float = 2.0     # of kind drawn
    steps: int = 10           # of kind drawn
    batch: int = 64           # patches per network call
    device: str = "auto"
    threads: int = 0
    amp: bool = True          # bf16 where the device has it


def open_all(cfg, ranks):
    """out: the model, with a random U-Net for kind untrained, or None; the pyramids; the encoder, or None; the block.
    raises: UserError for bad settings, or pyramids that the run was not trained on the like of."""
    if cfg.kind not in ("unet", "untrained", "descriptor", "drawn") or cfg.batch < 1 or cfg.steps < 1 or cfg.seed < 0:
        raise UserError(f"--kind={cfg.kind} --batch={cfg.batch} --steps={cfg.steps} --seed={cfg.seed}: kinds are unet, "
                        f"untrained, descriptor, drawn; batch and steps at least 1")
    if not cfg.run and (cfg.kind != "descriptor" or not cfg.data):
        raise UserError("say which run: python mil.py extract RUN --data=DIR (only --kind=descriptor --data=DIR --out="
                        "DIR needs none)")
    model = ZoomLDM.from_run(cfg.run).to(ranks.device) if cfg.run else None
    info = model.info if model else {}
    pyramids = Pyramids(cfg.data or info.get("data", ""), std=info.get("std"))
    if model and (pyramids.patch != info.get("patch") or pyramids.encoder != info.get("encoder")
                  or pyramids.embed_dim != model.summarizer.cfg.embed_dim):
        raise UserError(f"{pyramids.folder} has {pyramids.patch}-pixel patches embedded with {pyramids.encoder!r}, the "
                        f"run was trained on {info.get('patch')} and {info.get('encoder')!r}: build it with these")
    top = min(pyramids.scales, model.summarizer.cfg.scales if model else pyramids.scales)
    if not cfg.scales or list(cfg.scales) != sorted({s for s in cfg.scales if s in range(top)}):
        raise UserError(f"--scales={cfg.scales}: give some of 0 to {top - 1}, finest first")
    block, encoder = None, None
    if cfg.kind in ("unet", "untrained"):
        names = ["middle", *map(str, range(len(model.unet.up)))]
        block = cfg.block or str(min(3, len(model.unet.up) - 1))
        if block not in names or not 0 <= cfg.t < model.schedule.T:
            raise UserError(f"--block={cfg.block} --t={cfg.t}: blocks of this run are {', '.join(names)}; t is from 0 "
                            f"to {model.schedule.T - 1}")
        block = block if block == "middle" else int(block)
    else:
        encoder = load_encoder(pyramids.encoder, pyramids.std, cfg.weights, ranks.device)
    if cfg.kind == "untrained":
        torch.manual_seed(cfg.seed)
        model.unet = UNet(model.unet.cfg).to(ranks.device).eval().requires_grad_(False)
    return model, pyramids, encoder, block


@torch.no_grad()
def scale_features(model, pyramids, encoder, block, k, s, cfg, ranks):
    """Features (n,K) float32 of all patches of scale s of slide k. The noise of a patch is a function of seed, slide
    and place alone: batches, ranks and interruptions change nothing."""
    mark, out = crc32(pyramids.slides[k]["name"].encode()), []
    for first in range(0, pyramids.slides[k]["counts"][s], cfg.batch):
        rows = range(first, min(first + cfg.batch, pyramids.slides[k]["counts"][s]))
        batch = default_collate([pyramids.item(k, s, n, ("x",)) for n in rows])
        x = batch["x"]
        if cfg.kind == "drawn":
            x = draw_patches(model, batch, SimpleNamespace(
                batch=cfg.batch, guidance=cfg.guidance, steps=cfg.steps, sampler="ddim", end="clean",
                seed=int(generator(cfg.seed, mark, s, first).initial_seed())), ranks)
        x = x.to(ranks.device)
        if encoder is not None:
            out.append(encoder((x + 1) / 2).float().cpu())                                 # (b,E)
            continue
        tokens, mask, scale = (batch[key].to(ranks.device) for key in ("tokens", "mask", "s"))
        with ranks.autocast():
            z, c = model.encode(x).float(), model.summarizer(tokens, mask, scale).float()
            eps = torch.stack([torch.randn(z.shape[1:], generator=generator(cfg.seed, mark, s, *ij))
                               for ij in batch["ij"].tolist()])
            t = torch.full((len(z),), cfg.t, device=z.device)
            z_t = model.schedule.q_sample(z, t, eps.to(z.device))
            out.append(model.unet.features(z_t, t, c, block).float().mean((2, 3)).cpu())   # (b,K)
    return torch.cat(out) if out else torch.zeros(0, 0)


def extract(cfg):
    """Write OUT/SLIDE.safetensors for every slide: features (N,K), coords (N,2), one slide in memory at a time. Slides
    that are done are passed over; ranks share the others. raises: UserError if they were made with other settings."""
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model, pyramids, encoder, block = open_all(cfg, ranks)
    out = Path(cfg.out or Path(cfg.run) / "features")
    same = {k: v for k, v in asdict(cfg).items() if k not in ("run", "data", "out", "batch", "device", "threads")}
    same |= {"block": block, "model": fingerprint(model) if model and cfg.kind != "descriptor" else None}
    P, lost, none = pyramids.patch, 0, []
    if ranks.rank == 0:
        print(f"{cfg.kind} features of {len(pyramids.slides)} slides at scales {cfg.scales}"
              f"{f', block {block}, t = {cfg.t}' if block is not None else ''} -> {out}")
    for k in tqdm(range(ranks.rank, len(pyramids.slides), ranks.world), disable=ranks.rank > 0):
        slide, source = pyramids.slides[k], (pyramids.folder / pyramids.slides[k]["file"]).stat()
        path = out / f"{slide['name']}.safetensors"
        meta = json.loads(json.dumps({"settings": same, "source": [source.st_size, source.st_mtime_ns], "patch": P,
                                      "size": slide["size"], "scales": cfg.scales}))
        if path.exists():
            with open_tensors(path) as f:
                there = json.loads((f.metadata() or {}).get("json", "{}"))
            if {key: there.get(key) for key in meta} != meta:
                raise UserError(f"{path} was made from other images or with other settings: give another --out, or "
                                f"remove it")
            continue
        ij = [[tuple(v) for v in pyramids.tensor(k, f"ij{s}").tolist()] if slide["counts"][s] else []
              for s in cfg.scales]
        place = [{v: n for n, v in enumerate(places)} for places in ij]
        rows = [[at.get((i >> s - cfg.scales[0], j >> s - cfg.scales[0]), -1) for s, at in zip(cfg.scales, place)]
                for i, j in ij[0]]
        whole = torch.tensor([row for row in rows if min(row) >= 0], dtype=torch.long).reshape(-1, len(cfg.scales))
        lost += len(rows) - len(whole)
        if not len(whole):
            none.append(slide["name"])
            continue
        parts = [scale_features(model, pyramids, encoder, block, k, s, cfg, ranks) for s in cfg.scales]
        coords = torch.tensor(ij[0])[whole[:, 0]].flip(1) * (P << cfg.scales[0])           # (N,2) x, y at full size
        save_tensors(path, {"features": torch.cat([p[n] for p, n in zip(parts, whole.T)], 1), "coords": coords.int()},
                     meta | {"widths": [p.shape[1] for p in parts]})
    if lost:
        print(f"{lost} patches of scale {cfg.scales[0]} lie in no patch of {cfg.scales[1:]} and are left out")
    if none:
        print(f"{len(none)} slides have no patch and get no file: {', '.join(none[:8])}")
    ranks.barrier()


def main(argv):
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        for name, h in unet.blocks(torch.zeros(1, 3, 64, 64), torch.zeros(1).long(), torch.zeros(1, 65, 512)):
            what = {"middle": "L", 3: "Z, the default", 2: "Z read otherwise", "out": "eps_hat, not a feature"}
            print(f"{name!s:>8}  {'x'.join(map(str, h.shape[1:])):<12} {what.get(name, '')}")


if __name__ == "__main__":
    cli(main)
