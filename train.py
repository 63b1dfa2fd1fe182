"""Train ZoomLDM: data (if missing), VAE, latents, then U-Net and Summarizer together (Z §3.1, §4.1.1).

    python train.py                                    # preset toy: everything, minutes on two CPU cores
    python train.py toy_long --lr=5e-4                 # any field below; the same command resumes where it stopped
    torchrun --standalone --nproc_per_node=8 train.py brca --data=DIR --vae_weights=FILE
    python train.py --plot=out/toy                     # draw the log (needs matplotlib)

A run folder holds ema.safetensors (what everything loads), state.safetensors (for resuming), config.json, log.jsonl and
samples/*.png. The result depends on the settings and the seed alone, not on the number of ranks or on interruptions.

read next: sample_joint.py
"""
import json
import math
import os
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from common import (
    UserError,
    atomic,
    cli,
    configure,
    generator,
    load_state_dict,
    load_tensors,
    open_tensors,
    save_grid,
    save_tensors,
    setup,
    write_text,
)
from data import PatchDataset, Pyramids, fixed_batch
from diffusion import Schedule, ZoomLDM, diffusion_loss
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, PatchGAN, VAEConfig, perplexity, revive_codes, vae_loss


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
    compile: bool = False       # torch.compile the U-Net
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
    pred: str = "eps"           # what the U-Net predicts: eps as published, or v (see diffusion.py)
    steps: int = 1500
    batch: int = 64             # global batch, divided over ranks
    micro: int = 0              # samples per forward pass and rank; 0 = batch / ranks, smaller = gradient accumulation
    lr: float = 1e-3
    warmup: int = 100           # steps of linear warm-up
    decay: str = "cosine"       # cosine to zero, or constant (published)
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 0.01  # official: AdamW's default
    clip: float = 1.0           # gradient norm; 0 = none (published)
    drop: float = 0.1           # share of samples whose whole condition is zeroed (published)
    ema: float = 0.999          # published 0.9999
    shares: tuple = ()          # share of each scale in a batch; () = uniform over scales (published)
    only_scale: int = -1        # train on one scale alone (the papers' single-scale baseline)

    log_every: int = 25
    sample_every: int = 500
    save_every: int = 250


TOY_VAE = {"vae.width": 32, "vae.res_blocks": 1, "vae.codes": 1024, "vae.groups": 8}
TOY = TOY_VAE | {"vae_steps": 800, "vae_batch": 16, "vae_lr": 1e-3, "pred": "v",
                 "summarizer.width": 128, "summarizer.depth": 3, "summarizer.mlp": 256,
                 "unet.width": 64, "unet.mult": (1, 2), "unet.res_blocks": 1, "unet.attention": (1, 2), "unet.groups": 8}
PUBLISHED = {"vae_steps": 0, "batch": 400, "lr": 2e-5, "warmup": 1000, "decay": "constant", "clip": 0.0, "ema": 0.9999,
             "steps": 500_000, "workers": 4, "log_every": 100, "sample_every": 10_000, "save_every": 5000}
PRESETS = {
    "smoke": TOY | {"data": "data/smoke", "toy": (8, 4, 256), "vae_steps": 40, "steps": 40, "batch": 16, "vae.width": 16,
                    "summarizer.depth": 1, "unet.width": 32, "log_every": 10, "sample_every": 40, "save_every": 10},
    "toy": TOY,
    "toy_long": TOY | {"steps": 9000, "sample_every": 1500},
    "gpu24": {"data": "data/slides", "vae_steps": 40_000, "vae.width": 64, "vae_batch": 32, "vae_lr": 2e-4,
              "unet.width": 96, "unet.mult": (1, 2, 3, 4), "summarizer.width": 384, "summarizer.depth": 6,
              "summarizer.mlp": 1536, "unet.context_dim": 384, "steps": 100_000, "batch": 128, "micro": 64, "lr": 1e-4,
              "warmup": 1000, "ema": 0.9999, "workers": 4, "sample_every": 5000, "save_every": 1000, "log_every": 100},
    "brca": PUBLISHED | {"data": "data/brca", "batch": 420},
    "naip": PUBLISHED | {"data": "data/naip", "summarizer.scales": 4},
}


# ----- 1. What a stage minimises: a module whose forward(batch, noise) returns the loss and values for the log -----

class VAEStage(nn.Module):
    """Autoencoder loss on images; counts code usage, the window for reviving dead codes."""

    def __init__(self, cfg):
        super().__init__()
        self.vae, self.cfg = VQVAE(cfg.vae), cfg
        self.disc = PatchGAN() if cfg.disc_weight else None
        self.register_buffer("usage", torch.zeros(cfg.vae.codes))
        self.warm = cfg.vae_steps // 4        # first quarter without quantisation
        self.perceptual = None
        if cfg.lpips:
            from metrics import load_lpips  # optional extra
            self.perceptual = load_lpips(cfg.lpips)

    def noise(self, step):
        """Corners of the random crops of the whole global batch."""
        self.quantize = step >= self.warm
        crop, factor = self.cfg.vae_crop or self.patch, self.vae.factor
        return {"corner": factor * torch.randint((self.patch - crop) // factor + 1, (self.cfg.vae_batch, 2),
                                                 generator=generator(self.cfg.seed, 1, step))}

    def forward(self, batch):
        side = self.cfg.vae_crop or self.patch
        x = torch.stack([x[:, i:i + side, j:j + side] for x, (i, j) in zip(batch["x"], batch["corner"].tolist())])
        loss, x_rec, indices, parts = vae_loss(self.vae, x, self.quantize, self.disc, self.cfg.disc_weight,
                                               self.perceptual)
        with torch.no_grad():
            if indices is not None:
                self.usage += torch.bincount(indices.flatten(), minlength=len(self.usage))
            mse = (x_rec.clamp(-1, 1) - x).square().flatten(1).mean(1)                      # (B,)
        return loss, {"loss": loss.detach().expand(len(x)), "s": batch["s"], "psnr": 10 * torch.log10(4 / mse)} | {
            k: v.expand(len(x)) for k, v in parts.items()}

    def after_step(self, step, ranks):
        """Place the codes on latents of fixed patches when quantisation begins, and the unused ones every 50 steps."""
        if step >= self.warm and (step - self.warm) % 50 == 0 and step <= 0.8 * self.cfg.vae_steps:
            if ranks.world > 1:
                dist.all_reduce(self.usage)
            with torch.no_grad():
                revive_codes(self.vae, self.vae.encode(self.anchor), self.usage, generator(self.cfg.seed, 3, step))
            self.usage.zero_()


class LDMStage(nn.Module):
    """Denoising loss of U-Net and Summarizer, trained jointly; a dropped condition is all zeros (Z §4.1.1)."""

    def __init__(self, cfg, latent_scale):
        super().__init__()
        self.summarizer, self.unet, self.cfg = Summarizer(cfg.summarizer), UNet(cfg.unet), cfg
        self.schedule, self.latent_scale = Schedule(), latent_scale
        self.denoise = torch.compile(self.unet) if cfg.compile else self.unet

    def noise(self, step):
        """Time indices, drop-out and noise of the whole global batch: the same for any number of ranks."""
        g, n = generator(self.cfg.seed, 2, step), self.cfg.batch
        side = self.latent_side
        # one t in each of n equal strata: the same uniform law, with less variance between batches
        t = ((torch.randperm(n, generator=g) + torch.rand(n, generator=g)) * (self.schedule.T / n)).long()
        return {"t": t.clamp_max(self.schedule.T - 1), "keep": torch.rand(n, generator=g) >= self.cfg.drop,
                "eps": torch.randn(n, self.unet.cfg.channels, side, side, generator=g)}

    def forward(self, batch):
        c = self.summarizer(batch["tokens"], batch["mask"], batch["s"])                    # (B,65,D)
        c = c * batch["keep"][:, None, None]
        loss, eps_loss = diffusion_loss(lambda z, t: self.denoise(z, t, c), batch["z"] * self.latent_scale,
                                        batch["t"], batch["eps"], self.schedule, self.cfg.pred)
        return loss.mean(), {"loss": loss.detach(), "eps": eps_loss, "s": batch["s"], "t": batch["t"]}

    def after_step(self, step, ranks):
        pass


# ----- 2. The loop -----

def lr_at(step, steps, lr, warmup, decay):
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, or a cosine to zero at `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr if decay == "constant" else lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loader(dataset, start, steps, batch, micro, ranks, workers):
    """Micro-batches of this rank from step `start` on; sample index = step * batch + position, so resume is exact."""
    per = batch // ranks.world
    order = [list(range(k, k + micro)) for step in range(start, steps)
             for k in range(step * batch + ranks.rank * per, step * batch + (ranks.rank + 1) * per, micro)]
    return iter(DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=ranks.device.type == "cuda",
                           persistent_workers=workers > 0))


def run_stage(name, cfg, ranks, net, dataset, steps, batch, lr, ema_decay=0.0, on_sample=None):
    """Train `net` for `steps` steps, resuming from out/{name}state.safetensors. out: the averaged weights (or raw, if
    ema_decay is 0) as a state dict. raises: UserError on a non-finite loss; the last checkpoint stays as it was."""
    out, device = Path(cfg.out), ranks.device
    state_file = out / f"{name}state.safetensors"
    per = batch // ranks.world
    micro = min(cfg.micro or per, per)
    if batch % ranks.world or per % micro:
        raise UserError(f"a global batch of {batch} does not divide into {ranks.world} ranks of micro-batches of "
                        f"{micro}: change --batch or --micro")
    net = net.to(device).train()
    params = [p for p in net.parameters() if p.requires_grad]
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema_decay else None
    opt = torch.optim.AdamW(params, lr=lr, betas=cfg.betas, weight_decay=cfg.weight_decay,
                            fused=device.type in ("cuda", "cpu"))
    start = resume(state_file, cfg, net, ema, opt) if state_file.exists() else 0
    if start >= steps:
        return ema or net.state_dict()
    wrapped = DistributedDataParallel(net) if ranks.world > 1 else net
    batches = loader(dataset, start, steps, batch, micro, ranks, cfg.workers)
    log = Log(out / "log.jsonl", name or "ldm", start, net, ranks)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name.strip("_") or "ldm", disable=ranks.rank > 0)
    for step in bar:
        rate = lr_at(step, steps, lr, min(cfg.warmup, steps // 5), cfg.decay)
        for group in opt.param_groups:
            group["lr"] = rate
        noise = net.noise(step)
        for at in range(ranks.rank * per, (ranks.rank + 1) * per, micro):
            item = next(batches) | {k: v[at:at + micro] for k, v in noise.items()}
            item = {k: v.to(device, non_blocking=True) for k, v in item.items()}
            last = at + micro == (ranks.rank + 1) * per
            with nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
                with ranks.autocast():
                    loss, values = wrapped(item)
                (loss * (micro / per)).backward()
            log.add(values)
        grad = torch.nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)
        net.after_step(step + 1, ranks)
        if ema:
            update_ema(ema, net, min(ema_decay, (step + 2) / (step + 11)))
        done = step + 1
        if done % cfg.log_every == 0 or done == steps or done % cfg.save_every == 0:
            bar.set_postfix_str(log.flush(done, grad, rate, batch))
        if done % cfg.save_every == 0 or done == steps:
            if ranks.rank == 0:
                save_state(state_file, cfg, done, net, ema, opt)
        if on_sample and ranks.rank == 0 and (done % cfg.sample_every == 0 or done == steps):
            on_sample(done, ema)
    if ranks.world > 1:
        dist.barrier()
    return ema or net.state_dict()


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) weights. official: decay min(0.9999, (1+n)/(10+n))."""
    weights = net.state_dict()
    floats = [k for k, v in weights.items() if v.is_floating_point()]
    torch._foreach_lerp_([ema[k] for k in floats], [weights[k] for k in floats], 1 - decay)


def save_state(path, cfg, step, net, ema, opt):
    """Raw weights, averaged weights, optimiser moments: tensors only, in one atomic file."""
    moments = {f"opt.{i}.{k}": v for i, s in opt.state_dict()["state"].items() for k, v in s.items()}
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in (ema or {}).items()}
    save_tensors(path, tensors | moments, {"step": step, "config": asdict(cfg)})


def resume(path, cfg, net, ema, opt):
    """Load a state file into net, ema and opt. out: the step to go on from."""
    tensors, meta = load_tensors(path)
    free = {"preset", "out", "device", "threads", "workers", "compile", "plot", "steps", "micro", "toy",
            "log_every", "sample_every", "save_every"}
    now = json.loads(json.dumps(asdict(cfg)))
    changed = [k for k in now if k not in free and now[k] != meta["config"].get(k)]
    if changed:
        raise UserError(f"{path} belongs to a run with other settings ({', '.join(changed)}): give the same ones to "
                        f"resume, or another --out to start afresh")
    groups = {"net.": {}, "ema.": {}, "opt.": {}}
    for k, v in tensors.items():
        groups[k[:4]][k[4:]] = v
    net.load_state_dict(groups["net."])
    for k, v in groups["ema."].items():
        ema[k].copy_(v)
    moments = {}
    for k, v in groups["opt."].items():
        i, _, key = k.partition(".")
        moments.setdefault(int(i), {})[key] = v
    opt.load_state_dict({"state": moments, "param_groups": opt.state_dict()["param_groups"]})
    return meta["step"]


class Log:
    """Averages between two log lines, per scale and per quarter of t, over all ranks; one JSON line each."""

    def __init__(self, path, stage, start, net, ranks):
        self.path, self.stage, self.net, self.ranks, self.rows = path, stage, net, ranks, []
        self.last, self.since = start, time.time()
        if ranks.rank == 0:
            old = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
            keep = [line for line in old if (r := json.loads(line))["stage"] != stage or r["step"] <= start]
            write_text(path, "".join(line + "\n" for line in keep))     # what a killed run logged past its checkpoint

    def add(self, values):
        self.rows.append(values)

    def flush(self, step, grad, lr, batch):
        """Reduce, check, write. out: a short text for the progress bar. raises: UserError if the loss is not finite."""
        rows = {k: torch.cat([r[k].float().flatten() for r in self.rows]) for k in self.rows[0]}
        s, t = rows.pop("s").long(), rows.pop("t", None)
        def binned(value, bins, n):
            return torch.zeros(n, device=s.device).index_add_(0, bins, value), torch.zeros(
                n, device=s.device).index_add_(0, bins, torch.ones_like(value))
        n_s, key = getattr(self.net.cfg.summarizer, "scales", 8), "eps" if "eps" in rows else "loss"
        sums = {k: binned(v, torch.zeros_like(s), 1) for k, v in rows.items()} | {
            "by_scale": binned(rows[key], s, n_s)}
        if t is not None:
            sums["by_t"] = binned(rows[key], (t * 4 / self.net.schedule.T).long(), 4)
        record = {"stage": self.stage, "step": step}
        for k, (total, count) in sums.items():
            if self.ranks.world > 1:
                dist.all_reduce(total)
                dist.all_reduce(count)
            mean = [round(x, 6) if n else None for x, n in zip((total / count).tolist(), count.tolist())]
            record[k] = mean if k.startswith("by_") else mean[0]
        if record["loss"] is None or not math.isfinite(record["loss"]) or not math.isfinite(float(grad)):
            raise UserError(f"the {self.stage} loss is no longer finite at step {step}: the last checkpoint in "
                            f"{self.path.parent} is intact; resume with a lower learning rate (--lr, --vae_lr)")
        seconds, self.since = time.time() - self.since, time.time()
        record |= {"grad": round(float(grad), 4), "lr": lr, "img_s": round((step - self.last) * batch / seconds, 1)}
        if hasattr(self.net, "usage"):
            record["perplexity"] = round(perplexity(self.net.usage), 1)
        if self.ranks.device.type == "cuda":
            record["gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.rows, self.last = [], step
        if self.ranks.rank == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")
        scales = " ".join("-" if v is None else f"{v:.3f}" for v in record["by_scale"])
        return f"loss {record['loss']:.4f} by scale {scales} | {record['img_s']} img/s"


# ----- 3. The stages in order -----

def fingerprint(module):
    """crc32 over all weights: tells whether latents or tokens on disk were made by this very network."""
    crc = 0
    for _, v in sorted(module.state_dict().items()):
        crc = zlib.crc32(v.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def get_vae(cfg, ranks, pyramids):
    """Train, resume, or load the VAE. out: (vae in eval mode, latent scale); kept in out/vae.safetensors."""
    path = Path(cfg.out) / "vae.safetensors"
    if not path.exists():
        if cfg.vae_weights and Path(cfg.vae_weights).is_dir():
            run = ZoomLDM.from_run(cfg.vae_weights)
            vae, scale = run.vae, run.latent_scale
        elif cfg.vae_weights:
            state = load_state_dict(cfg.vae_weights)
            prefix = "first_stage_model." if any(k.startswith("first_stage_model.") for k in state) else ""
            vae, scale = VQVAE.from_official(state, prefix), 1.0
        elif not cfg.vae_steps:
            raise UserError("this preset does not train a VAE: give the published one with --vae_weights=FILE, or "
                            "train your own with --vae_steps=N")
        else:
            net = VAEStage(cfg)
            net.patch = pyramids.patch
            net.anchor = torch.cat([fixed_batch(pyramids, "train", s, 16)["x"] for s in range(pyramids.scales)
                                    if pyramids.count("train", s)]).to(ranks.device)
            dataset = PatchDataset(pyramids, "train", cfg.seed, ("x",))
            run_stage("vae_", cfg, ranks, net, dataset, cfg.vae_steps, cfg.vae_batch, cfg.vae_lr)
            vae, scale = net.vae.eval(), None
        if ranks.rank == 0:
            vae = vae.to(ranks.device).requires_grad_(False)
            if scale is None:
                scale = 1 / float(encode_some(vae, pyramids, ranks).std())
            save_tensors(path, vae.state_dict(), {"config": asdict(vae.cfg), "latent_scale": scale})
        if ranks.world > 1:
            dist.barrier()
    weights, meta = load_tensors(path)
    vae = VQVAE(VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()}))
    vae.load_state_dict(weights)
    if ranks.rank == 0:
        print(f"VAE: {path}, latent scale {meta['latent_scale']:.4f} (1 / deviation; 1 for published weights)")
    return vae.to(ranks.device).eval().requires_grad_(False), meta["latent_scale"]


@torch.no_grad()
def encode_some(vae, pyramids, ranks, n=64):
    """Latents of n patches per scale, for measuring their deviation. out: (N,3,h,w)."""
    return torch.cat([vae.encode(fixed_batch(pyramids, "train", s, n)["x"].to(ranks.device)).float()
                      for s in range(pyramids.scales) if pyramids.count("train", s)])


@torch.no_grad()
def encode_latents(cfg, ranks, vae, pyramids):
    """Write out/latents/NAME.safetensors, unscaled f16 latents of the training slides, which ranks share out."""
    folder, mark = Path(cfg.out) / "latents", fingerprint(vae)
    folder.mkdir(parents=True, exist_ok=True)
    todo = [i for i, x in enumerate(pyramids.slides) if x["split"] == "train"][ranks.rank::ranks.world]
    for i in tqdm(todo, desc=f"latents -> {folder}", disable=ranks.rank > 0):
        slide = pyramids.slides[i]
        path = folder / slide["file"]
        if path.exists():
            with open_tensors(path) as f:
                if json.loads(f.metadata()["json"]).get("vae") == mark:
                    continue
        z = {}
        for s, count in enumerate(slide["counts"]):
            for k in range(0, count, 128):
                x = torch.stack([pyramids.read(i, s, n, ("x",))["x"] for n in range(k, min(k + 128, count))])
                with ranks.autocast():
                    z.setdefault(f"z{s}", []).append(vae.encode(x.to(ranks.device)).half())
        save_tensors(path, {k: torch.cat(v) for k, v in z.items()}, {"vae": mark})
    if ranks.world > 1:
        dist.barrier()
    return folder


def sample_sheet(model, pyramids, split, seed, amp, n=8, guidance=2.0, steps=20):
    """Real patches and patches drawn from their conditions, a pair of rows per scale. out: (rows, labels)."""
    rows, labels = [], []
    for s in range(pyramids.scales):
        if not pyramids.count(split, s):
            continue
        batch = fixed_batch(pyramids, split, s, n)
        device = next(model.parameters()).device
        with amp, torch.no_grad():
            c = model.summarizer(batch["tokens"].to(device), batch["mask"].to(device), batch["s"].to(device))
            x = model.decode(model.sample(c.float(), [v // 4 for v in batch["x"].shape[-2:]], guidance, steps, seed))
        rows += [batch["x"], x.float().cpu()]
        labels += [f"scale {s} real", f"scale {s} drawn"]
    return rows, labels


def prepare(cfg):
    """Make toy data if it is missing, and open the data folder."""
    folder = Path(cfg.data)
    if cfg.preset in ("smoke", "toy", "toy_long") and not (folder / "index.json").exists():
        if int(os.environ.get("RANK", 0)) == 0:
            slides, test, size = cfg.toy
            data.main(["toy", f"--out={folder}", f"--slides={slides}", f"--test={test}", f"--size={size}"])


def main(argv):
    cfg = configure(Config, argv, PRESETS, ("preset",), __doc__)
    if cfg.plot:
        return plot(Path(cfg.plot))
    cfg.out = cfg.out or f"out/{cfg.preset}"
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    prepare(cfg)
    if ranks.world > 1:
        dist.barrier()
    pyramids = Pyramids(cfg.data)
    cfg.summarizer.embed_dim, cfg.summarizer.scales = pyramids.embed_dim, pyramids.scales
    cfg.unet.context_dim = cfg.summarizer.width
    split = "test" if pyramids.names("test") else "train"
    out = Path(cfg.out)
    if ranks.rank == 0:
        print(f"run folder {out}, {ranks.world} rank(s) on {ranks.device}, "
              f"{'bf16 autocast' if ranks.amp else 'float32'}, {torch.get_num_threads()} threads")
        if split == "train":
            print(f"{cfg.data} holds no held-out images: sample grids show training patches")
        write_text(out / "config.json", json.dumps(asdict(cfg) | {"torch": torch.__version__}, indent=1))
    if ranks.world > 1:
        dist.barrier()
    torch.manual_seed(cfg.seed)
    vae, scale = get_vae(cfg, ranks, pyramids)
    pyramids = Pyramids(cfg.data, latents=encode_latents(cfg, ranks, vae, pyramids))
    torch.manual_seed(cfg.seed + 1)
    net = LDMStage(cfg, scale)
    net.latent_side = pyramids.patch // 4
    info = {"encoder": pyramids.encoder, "std": pyramids.std, "patch": pyramids.patch, "data": cfg.data}
    model = ZoomLDM(vae, Summarizer(cfg.summarizer), UNet(cfg.unet), scale, cfg.pred, info=info).to(ranks.device)

    def export(step, ema):
        """Save the averaged model and draw held-out patches with it."""
        model.summarizer.load_state_dict({k[11:]: v for k, v in ema.items() if k.startswith("summarizer.")})
        model.unet.load_state_dict({k[5:]: v for k, v in ema.items() if k.startswith("unet.")})
        model.eval().save(out)
        rows, labels = sample_sheet(model, pyramids, split, cfg.seed, ranks.autocast())
        save_grid(out / "samples" / f"step_{step:06d}.png", rows, labels)

    dataset = PatchDataset(pyramids, "train", cfg.seed, ("z",), None if cfg.only_scale < 0 else cfg.only_scale,
                           cfg.shares or None)
    ema = run_stage("", cfg, ranks, net, dataset, cfg.steps, cfg.batch, cfg.lr, cfg.ema, export)
    if ranks.rank == 0:
        export(cfg.steps, ema)
        print(f"done: {out}/ema.safetensors, {out}/samples/step_{cfg.steps:06d}.png")
    if ranks.world > 1:
        dist.destroy_process_group()


def plot(run):
    """Draw log.jsonl as log.png: eps error per scale and per quarter of t."""
    if not (run / "log.jsonl").exists():
        raise UserError(f"no log at {run / 'log.jsonl'}: give the run folder of a training, --plot=out/toy")
    try:
        import matplotlib
    except ImportError as err:
        raise UserError("--plot needs matplotlib: pip install nanozoomldm[plot]") from err
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [r for r in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if r["stage"] == "ldm"]
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    for ax, key, name in zip(axes, ("by_scale", "by_t"), ("scale", "quarter of t")):
        for i in range(len(rows[0][key]) if rows else 0):
            ax.plot([r["step"] for r in rows], [r[key][i] for r in rows], label=f"{name} {i}")
        ax.set(xlabel="step", ylabel="mean squared error of eps", yscale="log")
        ax.legend()
    with atomic(run / "log.png") as tmp:
        fig.savefig(tmp, format="png", dpi=120, bbox_inches="tight")
    print(f"wrote {run / 'log.png'}")


if __name__ == "__main__":
    cli(main)
