"""Train ZoomLDM: data (if missing), VAE, latents, then U-Net and Summarizer together (Z §3.1, §4.1.1).

    python train.py                                    # preset toy: everything, minutes on two CPU cores
    python train.py toy_long --lr=5e-4                 # any field below; the same command resumes where it stopped
    torchrun --standalone --nproc_per_node=6 train.py brca --data=DIR --vae_weights=FILE
    python train.py --plot=out/toy                     # draw the log (needs matplotlib)

A run folder holds ema.safetensors (what everything loads), state.safetensors and state.1.safetensors (for resuming, the
latter should the former be damaged), config.json, log.jsonl and samples/*.png. The result depends on settings and seed,
not on interruptions, nor (but for rounding, and the batch statistics of PatchGAN) on the number of ranks.

read next: sample_joint.py
"""
import json
import os
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

import data
from common import UserError, cli, configure, generator, load_state_dict, load_tensors, open_tensors, save_grid
from common import save_tensors, setup, write_text
from data import PatchDataset, Pyramids, fixed_batch
from diffusion import Schedule, ZoomLDM, diffusion_loss
from log import plot, read_lines
from loop import check_loop, run_stage, sample_sheet
from published import Samples, layout_of
from pyramid import read_index
from state import check_settings, fingerprint, fits, goes_on
from summarizer import KINDS, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, PatchGAN, VAEConfig, perplexity, rebase, revive_codes, vae_loss


@dataclass
class Config:
    preset: str = "toy"
    data: str = "data/toy"      # a folder made by data.py; preset smoke, toy and toy_long make theirs if it is missing
    out: str = ""               # run folder; default out/PRESET
    toy: tuple = (256, 64, 1024)  # slides to train on, slides held out, and their side, when toy data is made
    seed: int = 0
    device: str = "auto"        # auto: cuda, mps or cpu
    threads: int = 0            # CPU threads of this process; 0 = PyTorch's choice
    workers: int = 0            # data loading processes per rank
    amp: bool = True            # bf16 autocast where the device has bf16 arithmetic
    compile: bool = False       # torch.compile the U-Net (--unet.checkpoint=True: less memory, a third more time)
    channels_last: bool = False  # keep the channels of a pixel of the U-Net's activations together
    profile: int = 0            # write a table of what this many steps cost to OUT/profile.txt, and go on
    plot: str = ""              # draw the log of this run folder, and stop

    vae: VAEConfig = field(default_factory=VAEConfig)
    vae_weights: str = ""       # take the VAE from a published checkpoint or a run folder instead of training one
    vae_steps: int = 1000
    vae_batch: int = 16
    vae_lr: float = 3e-3
    vae_crop: int = 0           # train on random crops of this side, 0 = whole patches: the same pixels at less cost
    disc_weight: float = 0.0    # PatchGAN term; published vq-f4: 0.75
    lpips: str = ""             # VGG weights for the perceptual term (extra "metrics"); "" = none

    summarizer: SummarizerConfig = field(default_factory=SummarizerConfig)  # embed_dim and scales come from the data
    unet: UNetConfig = field(default_factory=UNetConfig)                    # context_dim is summarizer.width
    init_from: str = ""         # start from a run folder (all networks, whose sizes must be given as for that run), or
    #                             the U-Net alone from a published one, as the papers did: cin256-v2.ckpt
    pred: str = "eps"           # what the U-Net predicts: eps as published, x0, or v (see diffusion.py)
    schedule: str = "scaled_linear"  # of the noise; as published (see diffusion.py)
    steps: int = 1500
    batch: int = 32             # global batch, divided over ranks
    micro: int = 0              # samples per forward pass and rank; 0 = batch / ranks, smaller = gradient accumulation
    lr: float = 1.5e-3
    warmup: int = 100           # steps of linear warm-up
    decay: str = "cosine"       # cosine to zero, or constant (published)
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.01  # official: AdamW's default
    clip: float = 1.0           # gradient norm; 0 = none (published)
    drop: float = 0.1           # share of samples whose whole condition is zeroed (published)
    ema: float = 0.995          # published 0.9999
    shares: tuple = ()          # share of each scale in a batch; () = uniform over scales (published)
    only_scale: int = -1        # train on one scale alone (the papers' single-scale baseline)

    log_every: int = 25
    sample_every: int = 500
    save_every: int = 250
    keep: int = 2               # checkpoints kept, should the newest be damaged
    max_skips: int = 0          # steps in a row whose loss or gradient is not finite that are passed over


# small networks for 64-pixel patches; places, v and few channels per group are what makes minutes enough (README)
TOY = {"vae.width": 32, "vae.res_blocks": 1, "vae.codes": 1024, "vae.groups": 8, "vae_steps": 700, "vae_crop": 32,
       "summarizer.width": 128, "summarizer.depth": 2, "summarizer.mlp": 256, "summarizer.positions": 16,
       "unet.width": 64, "unet.mult": (1, 2), "unet.res_blocks": 1, "unet.attention": (2,), "unet.groups": 8,
       "unet.positions": 16, "pred": "v", "steps": 800, "sample_every": 200}
PUBLISHED = {"vae_steps": 0, "lr": 2e-5, "betas": (0.9, 0.999), "warmup": 1000, "decay": "constant", "clip": 0.0,
             "ema": 0.9999, "steps": 500_000, "workers": 4, "log_every": 100, "sample_every": 10_000,
             "save_every": 5000, "summarizer.side": 128}
PRESETS = {
    # small rates and few codes: otherwise 40 steps blow up the rounding by which two ranks differ from one
    "smoke": TOY | {"data": "data/smoke", "amp": False, "toy": (8, 4, 256), "vae_steps": 40, "vae_lr": 1e-4,
                    "vae.codes": 64, "steps": 40, "lr": 3e-4, "batch": 16, "vae.width": 16, "unet.width": 32,
                    "log_every": 10, "sample_every": 40, "save_every": 10},
    "toy": TOY,
    "toy_long": TOY | {"vae_steps": 2000, "unet.mult": (1, 2, 2), "unet.res_blocks": 2, "unet.attention": (2, 4),
                       "summarizer.depth": 3, "steps": 4000, "ema": 0.999, "lr": 1e-3, "sample_every": 1000},
    "gpu24": {"data": "data/slides", "vae_steps": 40_000, "vae.width": 64, "vae.groups": 16, "vae_batch": 32,
              "vae_lr": 2e-4, "unet.width": 96, "unet.mult": (1, 2, 3, 4), "unet.res_blocks": 1, "unet.positions": 16,
              "pred": "v", "summarizer.positions": 16, "summarizer.width": 384, "summarizer.depth": 6,
              "summarizer.mlp": 1536, "steps": 100_000, "batch": 128, "micro": 64, "lr": 1e-4, "warmup": 1000,
              "ema": 0.9999, "workers": 4, "sample_every": 5000, "save_every": 1000, "log_every": 100},
    "brca": PUBLISHED | {"data": "data/brca", "batch": 420},
    "naip": PUBLISHED | {"data": "data/naip", "batch": 400, "summarizer.scales": 4},  # as many as its data has
}


# ----- 1. What each stage minimises (loop.py says what a stage is) -----

class VAEStage(nn.Module):
    """Autoencoder loss on images; counts code usage, the window for reviving dead codes."""

    def __init__(self, cfg, anchor, start=None):
        """anchor (N,3,P,P): fixed patches whose latents decide where codes are placed; start: a VAE to go on from."""
        super().__init__()
        self.vae, self.cfg, self.anchor, self.scales = VQVAE(cfg.vae), cfg, anchor, cfg.summarizer.scales
        self.disc = PatchGAN() if cfg.disc_weight else None
        self.register_buffer("usage", torch.zeros(cfg.vae.codes))
        self.used = torch.zeros(cfg.vae.codes, device=anchor.device)  # by this rank in this step
        self.unquantized = 0 if start else cfg.vae_steps // 4         # steps before there are codes
        if start:
            self.vae.load_state_dict(start.state_dict())
        self.crop = min(cfg.vae_crop or anchor.shape[-1], anchor.shape[-1])
        self.perceptual = [None]                                      # in a list: not ours to train, save or switch
        if cfg.lpips:
            from metrics import load_lpips  # optional extra
            self.perceptual = [load_lpips(cfg.lpips).to(anchor.device).eval()]

    def noise(self, step):
        """Corners of the random crops of the whole global batch."""
        self.step, factor = step, self.vae.factor
        places = (self.anchor.shape[-1] - self.crop) // factor + 1
        return {"corner": factor * torch.randint(places, (self.cfg.vae_batch, 2),
                                                 generator=generator(self.cfg.seed, 1, step))}

    def forward(self, batch):
        i, j = (batch["corner"][:, k, None] + torch.arange(self.crop, device=batch["x"].device) for k in (0, 1))
        n = torch.arange(len(i), device=i.device)[:, None, None]
        x = batch["x"].movedim(1, -1)[n, i[:, :, None], j[:, None]].movedim(-1, 1).contiguous()   # (B,3,crop,crop)
        loss, x_rec, indices, parts = vae_loss(self.vae, x, self.step >= self.unquantized, self.disc,
                                               self.cfg.disc_weight, self.perceptual[0])
        with torch.no_grad():
            if indices is not None:
                self.used += torch.bincount(indices.flatten(), minlength=len(self.used))
            mse = (x_rec.clamp(-1, 1) - x).square().flatten(1).mean(1).clamp_min(1e-10)     # (B,)
        return loss, {"loss": loss.detach().expand(len(x)), "s": batch["s"], "psnr": 10 * torch.log10(4 / mse)} | {
            k: v.expand(len(x)) for k, v in parts.items()}

    @torch.no_grad()
    def after_step(self, step, ranks):
        """Whiten latents until there are codes; place codes on latents of fixed patches, the unused ones every 50."""
        if ranks.world > 1:
            dist.all_reduce(self.used)
        self.usage += self.used
        self.used.zero_()
        start = self.unquantized
        if step in (start // 8, start // 2, start):
            rebase(self.vae, self.vae.encode(self.anchor), whiten=True)
        if step >= start and (step - start) % 50 == 0 and step <= 0.8 * self.cfg.vae_steps:
            if step > start and (used := int((self.usage > 0).sum())) < 0.1 * len(self.usage) and ranks.rank == 0:
                tqdm.write(f"step {step}: only {used} of {len(self.usage)} codes were used in 50 steps; the others are "
                           f"moved to latents. If that goes on, take fewer (--vae.codes) or a lower --vae_lr")
            revive_codes(self.vae, self.vae.encode(self.anchor), self.usage, generator(self.cfg.seed, 3, step))
            self.usage.zero_()

    def report(self):
        return {"perplexity": round(perplexity(self.usage), 1) if self.usage.any() else None}


class LDMStage(nn.Module):
    """Denoising loss of U-Net and Summarizer, trained jointly; a dropped condition is all zeros (Z §4.1.1)."""

    def __init__(self, cfg, latent_scale, latent_side):
        super().__init__()
        self.summarizer, self.unet, self.cfg = KINDS[cfg.summarizer.kind](cfg.summarizer), UNet(cfg.unet), cfg
        self.schedule, self.latent_scale, self.side = Schedule(cfg.schedule), latent_scale, latent_side
        self.scales = cfg.summarizer.scales
        if cfg.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if cfg.compile:
            self.unet.compile()  # in place: the names of the weights stay

    def noise(self, step):
        """Time indices, drop-out and noise of the whole global batch: the same for any number of ranks."""
        g, n = generator(self.cfg.seed, 2, step), self.cfg.batch
        # one t in each of n equal strata: the same uniform law, with less variance between batches
        t = ((torch.randperm(n, generator=g) + torch.rand(n, generator=g)) * (self.schedule.T / n)).long()
        return {"t": t.clamp_max(self.schedule.T - 1), "keep": torch.rand(n, generator=g) >= self.cfg.drop,
                "eps": torch.randn(n, self.unet.cfg.channels, self.side, self.side, generator=g)}

    def forward(self, batch):
        c = self.summarizer(batch["tokens"], batch["mask"], batch["s"])                    # (B,L,D)
        c = c * batch["keep"][:, None, None]
        loss, eps_loss = diffusion_loss(lambda z, t: self.unet(z, t, c), batch["z"] * self.latent_scale,
                                        batch["t"], batch["eps"], self.schedule, self.cfg.pred)
        return loss.mean(), {"loss": loss.detach(), "eps": eps_loss, "s": batch["s"], "t": batch["t"]}

    def after_step(self, step, ranks):
        pass

    def report(self):
        return {}


# ----- 2. The stages in order -----

def get_vae(cfg, ranks, pyramids, base=None):
    """Train, resume, or load the VAE, from that of the model `base` on. out: (vae in eval mode, latent scale); kept in
    out/vae.safetensors."""
    path = Path(cfg.out) / "vae.safetensors"
    there = path.exists()
    ranks.barrier()  # all ranks look before one writes
    if not there:
        if cfg.vae_weights and Path(cfg.vae_weights).is_dir():
            vae, scale = load_vae(Path(cfg.vae_weights) / "vae.safetensors")
        elif cfg.vae_weights:
            state = load_state_dict(cfg.vae_weights)
            prefix = "first_stage_model." if any(k.startswith("first_stage_model.") for k in state) else ""
            vae, scale = VQVAE.from_official(state, prefix), 1.0
        elif base and not cfg.vae_steps:
            vae, scale = base.vae, base.latent_scale
        elif not cfg.vae_steps:
            raise UserError("this preset does not train a VAE: give the published one with --vae_weights=FILE, or "
                            "train your own with --vae_steps=N")
        else:
            anchor = torch.cat([fixed_batch(pyramids, "train", s, 16)["x"] for s in range(pyramids.scales)
                                if pyramids.count("train", s)])
            net = VAEStage(cfg, anchor.to(ranks.device), base and base.vae)
            dataset = PatchDataset(pyramids, "train", cfg.seed, ("x",))
            run_stage("vae_", cfg, ranks, net, dataset, cfg.vae_steps, cfg.vae_batch, cfg.vae_lr)
            vae, scale = net.vae.eval(), None
        if ranks.rank == 0:
            vae = vae.to(ranks.device).requires_grad_(False)
            if scale is None:
                rebase(vae, encode_some(vae, pyramids, ranks))
                scale = 1 / float(encode_some(vae, pyramids, ranks).std())
            save_tensors(path, vae.state_dict(), {"config": asdict(vae.cfg), "latent_scale": scale,
                                                  "settings": asdict(cfg)})
        ranks.barrier()
    vae, scale = load_vae(path)
    if ranks.rank == 0:
        print(f"VAE: {path}, latent scale {scale:.4f} (1 / deviation; 1 for published weights)")
    return vae.to(ranks.device).eval().requires_grad_(False), scale


def load_vae(path):
    """Read a run's vae.safetensors. out: (vae, latent scale). raises: UserError if it is missing or foreign."""
    weights, meta = load_tensors(path)
    try:
        vae = VQVAE(VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()}))
        vae.load_state_dict(weights)
        return vae, meta["latent_scale"]
    except (KeyError, TypeError, RuntimeError) as err:
        raise UserError(f"{path} does not hold a VAE of ours ({str(err).splitlines()[0]}): give a run folder, or a "
                        f"published file") from err


@torch.no_grad()
def encode_some(vae, pyramids, ranks, n=64):
    """Latents of n patches per scale, for measuring their deviation. out: (N,3,h,w)."""
    return torch.cat([vae.encode(fixed_batch(pyramids, "train", s, n)["x"].to(ranks.device)).float()
                      for s in range(pyramids.scales) if pyramids.count("train", s)])


@torch.no_grad()
def encode_latents(cfg, ranks, vae, pyramids):
    """Write out/latents/NAME.safetensors, unscaled f16 latents of the training slides, which ranks share out."""
    folder, vae_mark = Path(cfg.out) / "latents", fingerprint(vae)
    todo = [i for i, x in enumerate(pyramids.slides) if x["split"] == "train"][ranks.rank::ranks.world]
    for i in tqdm(todo, desc=f"latents -> {folder}", disable=ranks.rank > 0):
        slide = pyramids.slides[i]
        path, source = folder / slide["file"], (pyramids.folder / slide["file"]).stat()
        mark = f"{vae_mark} {source.st_size} {source.st_mtime_ns}"  # this VAE, these images
        if path.exists():
            with open_tensors(path) as f:
                if json.loads((f.metadata() or {}).get("json", "{}")).get("vae") == mark:
                    continue
        z = {}
        for s, count in enumerate(slide["counts"]):
            for k in range(0, count, 128):
                x = torch.stack([pyramids.read(i, s, n, ("x",))["x"] for n in range(k, min(k + 128, count))])
                z.setdefault(f"z{s}", []).append(vae.encode(x.to(ranks.device)).half())
        save_tensors(path, {k: torch.cat(v) for k, v in z.items()}, {"vae": mark})
    ranks.barrier()
    return folder


def prepare(cfg):
    """Make the toy data of a toy preset if they are missing or unfinished; never in a folder that the user named."""
    folder = Path(cfg.data)
    mine = cfg.preset in ("smoke", "toy", "toy_long") and cfg.data == PRESETS[cfg.preset].get("data", Config.data)
    if mine and not ((folder / "index.json").exists() and read_index(folder)["slides"]):
        if int(os.environ.get("RANK", 0)) == 0:
            slides, test, size = cfg.toy
            data.main(["toy", f"--out={folder}", f"--slides={slides}", f"--test={test}", f"--size={size}"])


def check(cfg):
    """What can be refused before anything is read. raises: UserError."""
    check_loop(cfg)
    least = {"batch": 1, "vae_batch": 1, "steps": 0, "vae_steps": 0, "seed": 0, "micro": 0, "vae_crop": 0}
    for name, low in least.items():
        if getattr(cfg, name) < low:
            raise UserError(f"--{name}={getattr(cfg, name)}: it must be at least {low}")
    for name, given, known in (("pred", cfg.pred, ("eps", "x0", "v")), ("summarizer", cfg.summarizer.kind, KINDS)):
        if given not in known:
            raise UserError(f"--{name}={given}: known are {', '.join(known)}")
    if len(cfg.toy) != 3:
        raise UserError(f"--toy={cfg.toy} takes three numbers: slides, held-out slides, side")
    if len(cfg.vae.mult) != 3 or cfg.vae.channels != cfg.unet.channels or cfg.vae_crop % 4:
        raise UserError(f"--vae.mult={cfg.vae.mult} --vae.channels={cfg.vae.channels} --vae_crop={cfg.vae_crop}: give "
                        f"three levels, as many channels as unet.channels, and a multiple of 4")
    if cfg.unet.positions != cfg.summarizer.positions:
        raise UserError(f"--unet.positions={cfg.unet.positions} and --summarizer.positions={cfg.summarizer.positions}: "
                        f"give both the same number")


def main(argv):
    cfg = configure(Config, argv, PRESETS, ("preset",), __doc__)
    if cfg.plot:
        return plot(Path(cfg.plot))
    check(cfg)
    cfg.out = cfg.out or f"out/{cfg.preset}"
    out, ranks = Path(cfg.out), setup(cfg.device, cfg.amp, cfg.threads)
    prepare(cfg)
    ranks.barrier()
    official = bool(layout_of(cfg.data))
    base = ZoomLDM.from_run(cfg.init_from) if cfg.init_from and Path(cfg.init_from).is_dir() else None
    std = base and base.info.get("std")  # embeddings must mean what they meant to the Summarizer
    pyramids = Samples(cfg.data) if official else Pyramids(cfg.data, std=std)
    if official and not cfg.vae_weights:
        raise UserError(f"{cfg.data} holds latents of the published VAE: give it with --vae_weights=FILE")
    cfg.summarizer.embed_dim, cfg.summarizer.scales = pyramids.embed_dim, pyramids.scales
    cfg.unet.context_dim, side = cfg.summarizer.width, pyramids.patch // 4
    if side % 2 ** (len(cfg.unet.mult) - 1):
        raise UserError(f"latents of {side} x {side} cannot be halved {len(cfg.unet.mult) - 1} times: build the data "
                        f"with another --patch, or take fewer levels, --unet.mult")
    split = "test" if pyramids.names("test") else "train"
    dataset = partial(PatchDataset, split="train", seed=cfg.seed, want=("z",), shares=cfg.shares or None,
                      only_scale=None if cfg.only_scale < 0 else cfg.only_scale)
    dataset(pyramids)  # both refuse here what does not fit, not after the VAE is trained
    with torch.device("meta"):
        trial = LDMStage(cfg, 1.0, side)
    start, dropped = {}, []
    check_settings(out / "vae.safetensors", cfg, ("vae", "data", "seed", "disc", "lpips", *["init_from"] * bool(base)))
    if base:
        fits(base, cfg, pyramids)
    if not goes_on(out / "state.safetensors", cfg) and cfg.init_from and not base:
        start, dropped = trial.unet.official_start(load_state_dict(cfg.init_from))
    ranks.barrier()
    if ranks.rank == 0:
        for left in out.rglob(".*.tmp"):  # of a save that was killed
            left.unlink()
        print(f"run folder {out}, {ranks.world} rank(s) on {ranks.device}, "
              f"{'bf16 autocast' if ranks.amp else 'float32'}, {torch.get_num_threads()} threads")
        if base:
            print(f"start: {'U-Net and Summarizer' if cfg.vae_weights else 'all networks'} of {cfg.init_from}")
        if split == "train":
            print(f"{cfg.data} holds no held-out images: sample grids show training patches")
        if start:
            print(f"U-Net: {len(start)} tensors of {cfg.init_from}; dropped, for the class embedder: "
                  f"{', '.join(dropped) or 'nothing'}")
        write_text(out / "config.json", json.dumps(asdict(cfg) | {"torch": torch.__version__}, indent=1))
    torch.manual_seed(cfg.seed)
    vae, scale = get_vae(cfg, ranks, pyramids, base)
    if not cfg.steps:
        return  # --steps=0: the VAE alone
    if not official:
        pyramids = Pyramids(cfg.data, latents=encode_latents(cfg, ranks, vae, pyramids), std=std)
    torch.manual_seed(cfg.seed + 1)
    net = LDMStage(cfg, scale, side)
    if start:
        net.unet.load_state_dict(start)
    if base:
        net.unet.load_state_dict(base.unet.state_dict())
        net.summarizer.load_state_dict(base.summarizer.state_dict())
    info = {"encoder": pyramids.encoder, "std": pyramids.std, "patch": pyramids.patch, "data": cfg.data,
            "weights": pyramids.weights, "mpp": pyramids.mpp}
    summarizer = KINDS[cfg.summarizer.kind](cfg.summarizer)
    model = ZoomLDM(vae, summarizer, UNet(cfg.unet), scale, cfg.pred, cfg.schedule, info).to(ranks.device)

    def export(step, ema):
        """Save the averaged model and draw held-out patches with it."""
        for name, part in (("summarizer.", model.summarizer), ("unet.", model.unet)):
            part.load_state_dict({k.removeprefix(name): v for k, v in ema.items() if k.startswith(name)})
        model.eval().save(out)
        rows, labels, layout = sample_sheet(model, pyramids, split, cfg.seed, ranks.autocast())
        table = out / "samples" / "layout.jsonl"
        kept = [r for r in read_lines(table) if r["step"] < step]
        write_text(table, "".join(json.dumps(r) + "\n" for r in [*kept, {"step": step, "layout": layout}]))
        tqdm.write(f"step {step}: layout fidelity by scale {layout}")
        save_grid(out / "samples" / f"step_{step:06d}.png", rows, labels)

    done, ema = run_stage("", cfg, ranks, net, dataset(pyramids), cfg.steps, cfg.batch, cfg.lr, cfg.ema, export)
    if ranks.rank == 0:
        if not (picture := out / "samples" / f"step_{done:06d}.png").exists():  # killed after the last step
            export(done, ema)
        print(f"done: {out}/ema.safetensors, {picture}")
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
