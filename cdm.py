"""Conditions from nothing: models that invent what a reference image would otherwise have to supply.

    python cdm.py train out/toy                    # CDM: summarizer tokens (Z §3.1). --model=edm: the workshop's kind
    python cdm.py sample out/toy --scale=3         # patches at one scale, or all, with no image behind them
    python cdm.py train out/toy --model=grid       # p(k x k embeddings of a region | caption, or nothing) (L §3.3)
    python sample_joint.py out/toy --condition=grid --size=512 --context=3     # a large image with no image behind it
    torchrun --standalone --nproc_per_node=2 cdm.py train RUN published        # DiT-B, as published

The CDM makes tokens, which serve one patch. A large image needs an embedding for every tile: that is the grid model.

in:  a run folder, and the data it was trained on   out: RUN/cdm.safetensors (edm, grid), RUN/cdm/*.png
read next: sample_joint.py
"""
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

import captions
from common import UserError, atomic, cli, configure, generator, load_tensors, save_grid, setup, to_uint8
from data import PatchDataset, Pyramids
from diffusion import ZoomLDM, diffusion_loss
from dit import KINDS, Conditioner, DiT, DiTConfig, from_official, lean, load, vector_of  # noqa: F401 - this file's interface
from loop import check_loop, run_stage
from patches import draw
from published import Samples, layout_of
from state import newest_state
from train import fingerprint


@dataclass
class Config:
    run: str = ""              # run folder whose Summarizer, and data, this is for
    preset: str = "toy"        # sizes and rates: toy, smoke, published
    model: str = "cdm"         # cdm (Z), edm (W), grid (L)
    data: str = ""             # data folder; default: the one the run was trained on
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    workers: int = 0
    amp: bool = True           # bf16 autocast where the device has bf16 arithmetic
    dit: DiTConfig = field(default_factory=DiTConfig)  # tokens, channels, scales and vector come from run and data
    side: int = 8              # grid: k, tiles a side of the regions it learns
    captions: str = ""         # grid: a captions.tsv (image, caption); empty = unconditional
    vectors: str = ""          # grid: the captions' vectors (python captions.py embed)
    drop: float = 0.15         # grid: share of regions trained without their caption, for guidance
    gap: float = 0.0           # grid: variance of noise on (standardised) vectors; 0.1 bridges modalities (L §3.3)
    shift: float = 0.0         # how far times lean to noise, where tokens that agree are decided; 1 = not (published),
    #                            0 = 4 for the cdm, 16 for the grid, 1 for the edm
    steps: int = 1500
    batch: int = 32            # global batch, divided over ranks
    micro: int = 0             # per forward pass and rank; 0 = batch / ranks
    lr: float = 1e-3
    warmup: int = 100
    decay: str = "cosine"      # or constant (published)
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0          # 0 = none (published)
    ema: float = 0.995
    log_every: int = 50
    sample_every: int = 500
    save_every: int = 250
    keep: int = 2              # checkpoints kept
    max_skips: int = 0         # steps in a row whose loss or gradient is not finite that are passed over
    profile: int = 0           # steps to profile
    sheet: int = 8             # patches per scale on the contact sheets drawn on the way; 0 = no sheets
    made_for: str = ""         # set by train: the Summarizer, or encoder and deviations, that it learns the tokens of


@dataclass
class SampleConfig:
    run: str = ""              # run folder
    model: str = "cdm"         # cdm or edm
    scale: int = -1            # -1 = all
    n: int = 8                 # patches per scale
    steps: int = 50            # of the patches; their conditions take 50
    guidance: float = 2.0      # of the patches; the CDM has none
    seed: int = 0
    out: str = ""              # folder for the patches; default RUN/MODEL
    data: str = ""             # data folder; default: the one the run was trained on
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 autocast where the device has bf16 arithmetic


TOY = {"dit.width": 192, "dit.depth": 4, "dit.heads": 4, "dit.mlp": 768, "dit.variance": False}
PRESETS = {
    "toy": TOY,
    "smoke": TOY | {"dit.width": 32, "dit.mlp": 64, "dit.depth": 2, "steps": 20, "batch": 8, "side": 4, "log_every": 5,
                    "sample_every": 20, "save_every": 10, "amp": False},
    "published": {"steps": 500_000, "batch": 256, "lr": 1e-4, "warmup": 0, "decay": "constant", "clip": 0.0,
                  "shift": 1.0, "ema": 0.9999, "betas": (0.9, 0.999), "log_every": 100, "sample_every": 10_000,
                  "save_every": 5000, "workers": 4, "side": 16},
}


# ----- 1. Training -----

class Regions(Dataset):
    """k x k blocks of embeddings at random places of the slides, or of the regions that captions describe.

    Item n is a pure function of (seed, n). in: captions, [Caption] with slide and block, and their vectors (n,V); drop:
    share of the items whose caption is left out. out: tokens (k*k,E), v (V,) and known: False without a caption.
    raises: UserError if no slide holds such a block, or a caption describes less than one.
    """

    def __init__(self, pyramids, k, seed, split="train", described=(), vectors=None, drop=0.0):
        self.pyramids, self.k, self.seed, self.described, self.vectors, self.drop = (pyramids, k, seed, described,
                                                                                     vectors, drop)
        self.slides = [(i, (0, 0, *(n // pyramids.patch for n in x["size"]))) for i, x in enumerate(pyramids.slides)
                       if x["split"] == split and min(x["size"]) >= k * pyramids.patch]
        small = [c.image for c in described if min(c.block[2:]) < k]
        if not self.slides or small:
            raise UserError(f"{small[0] if small else f'every {split!r} image of {pyramids.folder}'} has fewer than "
                            f"{k} x {k} tiles: lower --side")

    def __len__(self):
        return 1 << 40

    def __getitem__(self, n):
        rng, v, known = random.Random(f"{self.seed} {n}"), torch.zeros(0), False
        if self.vectors is None or rng.random() < self.drop:
            i, block = rng.choice(self.slides)
            v = v if self.vectors is None else torch.zeros(self.vectors.shape[1])
        else:
            at, known = rng.randrange(len(self.described)), True
            i, block, v = self.described[at].slide, self.described[at].block, self.vectors[at]
        row, column = (a + rng.randint(0, size - self.k) for a, size in zip(block[:2], block[2:]))
        e = self.pyramids.tensor(i, "e")[row:row + self.k, column:column + self.k].float()   # (k,k,E)
        e = e if self.pyramids.rescale is None else e * self.pyramids.rescale
        return {"tokens": e.flatten(0, 1), "v": v, "known": torch.tensor(known)}


class ConditionStage(nn.Module):
    """Squared error of x0, on tokens that the frozen Summarizer makes, or on blocks of embeddings (Z S8.1; L §3.3).
    deviates: no variance term; it never reaches the samples."""

    def __init__(self, cfg, made, summarizer):
        super().__init__()
        self.net, self.schedule, self.cfg = made.net, made.schedule, cfg
        for name, _ in made.named_buffers(recurse=False):
            self.register_buffer(name, getattr(made, name))
        self.frozen, self.scales = [summarizer], max(made.net.cfg.scales, 1)  # in a list: not ours to train or save

    def noise(self, step):
        g, n, cfg = generator(self.cfg.seed, 4, step), self.cfg.batch, self.net.cfg
        t = (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n
        t = (lean(t, self.cfg.shift) * self.schedule.T).long()
        return {"t": t.clamp_max(self.schedule.T - 1), "eps": torch.randn(n, cfg.tokens, cfg.channels, generator=g),
                "shift": torch.randn(n, cfg.vector, generator=g) * self.cfg.gap ** 0.5}

    def forward(self, batch):
        if self.cfg.model == "grid":
            x = (batch["tokens"] - self.mean) / self.std                                     # (B,k*k,E)
            s = torch.zeros(len(x), dtype=torch.long, device=x.device)
            v = (batch["v"] - self.v_mean) / self.v_std + batch["shift"]
            more = {"v": v, "known": batch["known"]} if self.net.cfg.vector else {}
        else:
            s, more = batch["s"], {}
            with torch.no_grad():
                x = self.frozen[0](batch["tokens"], batch["mask"], s).float()                # (B,65,D)
        loss, eps = diffusion_loss(lambda z, t: self.net(z, t, s, **more), x, batch["t"], batch["eps"], self.schedule,
                                   "x0")
        return loss.mean(), {"loss": loss.detach(), "x0": loss.detach(), "s": s, "t": batch["t"]}

    def after_step(self, step, ranks):
        pass

    def report(self):
        return {}


def spoken(v, described, pyramids, made, damp=1e-3):
    """(V,E): a ridge regression from the vectors v (n,V) of captions to the mean embedding, standardised, of the region
    each describes. A denoiser learns that late, as most of what it needs can be seen in what is noisy."""
    means = {}
    for c in described:
        if (c.slide, c.block) not in means:
            row, column, height, width = c.block
            e = pyramids.tensor(c.slide, "e")[row:row + height, column:column + width].float().mean((0, 1))   # (E,)
            e = e if pyramids.rescale is None else e * pyramids.rescale
            means[c.slide, c.block] = (e - made.mean) / made.std
    aim, v = torch.stack([means[c.slide, c.block] for c in described]).double(), v.double()  # (n,E), (n,V)
    return torch.linalg.solve(v.mT @ v + damp * len(v) * torch.eye(v.shape[1]).double(), v.mT @ aim).float()


def make(cfg, model, pyramids):
    """An untrained Conditioner of the sizes that run and data ask for, and the data set it learns from."""
    _, cfg.dit.cond, lean_by = KINDS[cfg.model]
    cfg.shift = cfg.shift or lean_by
    if cfg.model == "grid" and isinstance(pyramids, Samples):
        raise UserError(f"--model=grid learns from whole images, {pyramids.folder} holds single samples: give --data=")
    if cfg.model != "grid":
        if cfg.captions or cfg.vectors:
            raise UserError("--captions and --vectors are for --model=grid: give it too, or leave them out")
        dataset = PatchDataset(pyramids, "train", cfg.seed, ())
        device, first = next(model.parameters()).device, dataset[0]
        with torch.no_grad():
            c = model.summarizer(*(torch.as_tensor(first[k], device=device)[None] for k in ("tokens", "mask", "s")))
        cfg.dit.tokens, cfg.dit.channels, cfg.dit.scales = *c.shape[1:], model.summarizer.cfg.scales
        info = {"summarizer": fingerprint(model.summarizer), "shift": cfg.shift}
        return Conditioner(cfg.model, cfg.dit, info), dataset
    cfg.dit.tokens, cfg.dit.channels, cfg.dit.scales, cfg.dit.plane = cfg.side ** 2, pyramids.embed_dim, 0, True
    info, described, vectors = {"encoder": pyramids.encoder, "std": pyramids.std, "shift": cfg.shift}, [], None
    if bool(cfg.captions) != bool(cfg.vectors):
        raise UserError(f"--captions={cfg.captions} --vectors={cfg.vectors}: give both, or neither (python captions.py "
                        f"embed {cfg.captions or 'captions.tsv'} makes the vectors)")
    if cfg.captions:
        described = captions.read_captions(cfg.captions, pyramids)
        vectors, info["text"] = captions.load_vectors(cfg.vectors, [c.text for c in described])
        cfg.dit.vector = vectors.shape[1]
    dataset = Regions(pyramids, cfg.side, cfg.seed, "train", described, vectors, cfg.drop)
    made, few = Conditioner("grid", cfg.dit, info), Regions(pyramids, cfg.side, cfg.seed + 1)
    e = torch.cat([few[n]["tokens"] for n in range(256)])                                    # (N,E)
    made.mean.copy_(e.mean(0))
    made.std.copy_(e.std(0).clamp_min(1e-6))
    if vectors is not None:
        made.v_mean.copy_(vectors.mean(0))
        made.v_std.copy_(vectors.std(0).clamp_min(1e-6))
        made.says.copy_(spoken((vectors - made.v_mean) / made.v_std, described, pyramids, made))
    return made, dataset


def same_source(cfg, path, info):
    """Note in cfg what the tokens are made by. raises: UserError if there is a state to go on from that learnt those of
    another. One from before this was noted is taken for what the model at `path`, its export, says."""
    def source(info):
        return json.dumps({k: v for k, v in info.items() if k != "shift"})
    cfg.made_for = source(info)
    if (found := newest_state(path.with_name(f"{cfg.model}_state.safetensors"))) is None:
        return
    then = found[2].get("settings", {}).get("made_for")
    if then is None and path.exists():
        then = source(load_tensors(path)[1].get("info", {}))
    if then != cfg.made_for:
        raise UserError(f"{found[0]} learnt from another Summarizer or encoder than this run has, or does not say from "
                        f"which: move {cfg.model}_state*.safetensors and {path.name} away to train anew")


def train(cfg):
    """Train one conditioning model, or go on with it."""
    cfg.out, ranks = cfg.run, setup(cfg.device, cfg.amp, cfg.threads)
    model, pyramids = open_run(cfg, ranks)
    torch.manual_seed(cfg.seed + 2)
    made, dataset = make(cfg, model, pyramids)
    made, path = made.to(ranks.device), Path(cfg.run) / f"{cfg.model}.safetensors"
    if ranks.rank == 0:
        print(f"{cfg.model}: {sum(p.numel() for p in made.parameters()):,} parameters, {ranks.world} rank(s) on "
              f"{ranks.device}, writing {path}")
    same_source(cfg, path, made.info)
    stage, exported = ConditionStage(cfg, made, model.summarizer), []
    final = Conditioner(cfg.model, cfg.dit, made.info).to(ranks.device).eval()

    def export(step, ema):
        final.load_state_dict(ema)
        final.save(path)
        exported.append(step)
        if cfg.model != "grid" and cfg.sheet:
            show(final, model, pyramids, SampleConfig(steps=20, n=cfg.sheet), ranks, range(pyramids.scales),
                 sheet=Path(cfg.run) / "samples" / f"{cfg.model}_{step:06d}.png")
    done, ema = run_stage(f"{cfg.model}_", cfg, ranks, stage, dataset, cfg.steps, cfg.batch, cfg.lr, cfg.ema, export)
    if ranks.rank == 0:
        if not exported:  # stopped after the last step: what is there is older
            export(done, ema)
        print(f"done: {path}")


# ----- 2. Patches from nothing -----

def open_run(cfg, ranks):
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    data = cfg.data or model.info.get("data", "")
    return model, Samples(data) if layout_of(data) else Pyramids(data, std=model.info.get("std"))


def show(made, model, pyramids, cfg, ranks, scales, folder=None, sheet=None):
    """Draw cfg.n patches a scale from invented tokens: single PNGs in a folder, and a contact sheet, a row a scale."""
    rows, side = [], pyramids.patch // model.vae.factor
    for s in tqdm(scales, desc="scales", disable=len(scales) < 2):
        c = made.tokens([s] * cfg.n, cfg.seed)
        rows.append(draw(model, c, side, ranks, cfg.guidance, cfg.steps, cfg.seed))
        for i, image in enumerate(to_uint8(rows[-1]).numpy() if folder else ()):
            with atomic(folder / f"scale{s}_{i:03d}.png") as tmp:
                Image.fromarray(image).save(tmp, "PNG")
    save_grid(sheet or folder / "sheet.png", rows, [f"scale {s}" for s in scales])


def sample(cfg):
    """Patches at one scale, or all, without any image behind them."""
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model, pyramids = open_run(cfg, ranks)
    made, out = load(cfg.run, cfg.model, model), Path(cfg.out or Path(cfg.run) / cfg.model)
    if cfg.n < 1 or not -1 <= cfg.scale < pyramids.scales:
        raise UserError(f"--n={cfg.n} --scale={cfg.scale}: n is at least 1, the run knows scales 0 to "
                        f"{pyramids.scales - 1} (-1 = all)")
    scales = range(pyramids.scales) if cfg.scale < 0 else [cfg.scale]
    show(made, model, pyramids, cfg, ranks, scales, out)
    print(f"wrote {out}: {len(scales)} scales x {cfg.n} patches, and sheet.png")


def main(argv):
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if not command:
        return table()
    if command in ("--help", "-h"):
        return print(__doc__ + "\nsettings: python cdm.py train --help, python cdm.py sample --help")
    if command not in ("train", "sample"):
        raise UserError(f"got {command!r}: write python cdm.py train RUN, or python cdm.py sample RUN")
    cfg = (configure(Config, rest, PRESETS, ("run", "preset"), __doc__) if command == "train" else
           configure(SampleConfig, rest, words=("run",), doc=__doc__))
    if not cfg.run or cfg.model not in KINDS or command == "sample" and cfg.model == "grid":
        raise UserError(f"python cdm.py {command} {cfg.run} --model={cfg.model}: give a run folder, and a model of "
                        f"{', '.join(KINDS)} (grid is sampled by sample_joint.py)")
    for name, least, most in (("steps", 1, None), ("batch", 1, None), ("side", 1, None), ("micro", 0, None),
                              ("seed", 0, None), ("gap", 0, None), ("drop", 0, 1), ("shift", 0, None),
                              ("sheet", 0, None)):
        value = getattr(cfg, name, least)
        if value < least or most is not None and value > most:
            raise UserError(f"--{name}={value}: it must be at least {least}" + (f", at most {most}" if most else ""))
    if command == "train":
        check_loop(cfg)
    (train if command == "train" else sample)(cfg)


def table():
    """Sizes, and a tiny draw."""
    for kind, cfg in (("cdm", DiTConfig()), ("edm", DiTConfig(cond="tokens", variance=False)),
                      ("grid", DiTConfig(256, 1024, scales=0, vector=384, plane=True, variance=False))):
        with torch.device("meta"):
            count = sum(p.numel() for p in Conditioner(kind, cfg).parameters())
        print(f"{kind:<6}{cfg.tokens} tokens x {cfg.channels:<6}{count:>14,} parameters, {KINDS[kind][0]} schedule")
    tiny = Conditioner("grid", DiTConfig(16, 8, 32, 2, 4, 64, 0, plane=True)).eval()
    e = tiny.grid(6, 6, steps=4)
    print(f"\ntiny draw on the CPU: a grid of 6 x 6 tiles in windows of 4 x 4 -> e {tuple(e.shape)}")


if __name__ == "__main__":
    cli(main)
