"""Train ZoomLDM: data (if missing), VAE, latents, then U-Net and Summarizer together (Z §3.1, §4.1.1).

    python train.py                                    # preset toy: everything, minutes on two CPU cores
    python train.py toy_long --lr=5e-4                 # any setting below; the same command resumes where it stopped
    torchrun --standalone --nproc_per_node=6 train.py brca --data=DIR --vae_weights=FILE

A run folder holds ema.safetensors (what everything loads), state.safetensors and state.1.safetensors (to go on from),
config.json, log.jsonl (`python -m experiments.plot RUN` draws it) and samples/*.png. The result depends on settings and
seed, not on interruptions, nor (but for rounding) on the number of ranks.

read next: cdm.py
"""
import json
import math
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from common import UserError, at_least, check_settings, cli, configure, fingerprint, generator, load_meta
from common import load_state_dict, load_tensors, newest_state, one_of, restore, resume, save_grid, save_state
from common import save_tensors, setup, write_text
from data import PatchDataset, fixed_batch, open_data, read_index
from diffusion import Schedule, ZoomLDM, diffusion_loss, null_condition
from summarizer import SummarizerConfig, build
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig, perplexity, rebase, revive_codes, vae_loss

# ----- 1. Settings: --key=value, and --group.key=value, where the group may be left out if no other has the key -----

@dataclass
class OptimConfig:
    lr: float = 1.5e-3
    warmup: int = 100           # steps of linear warm-up
    decay: str = "cosine"       # cosine to zero, or constant (published)
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.01  # official: AdamW's default
    clip: float = 1.0           # gradient norm; 0 = none (published)
    ema: float = 0.995          # decay of the averaged weights; published 0.9999


@dataclass
class LoopConfig:               # nothing of this changes what is computed
    micro: int = 0              # samples per forward pass and rank; 0 = batch / ranks, smaller = gradient accumulation
    workers: int = 0            # data loading processes per rank
    log_every: int = 25
    sample_every: int = 500
    save_every: int = 250


@dataclass
class Config:
    preset: str = "toy"
    data: str = "data/toy"      # a folder made by data.py; presets smoke, toy and toy_long make theirs if it is missing
    out: str = ""               # run folder; default out/PRESET
    seed: int = 0
    device: str = "auto"        # auto: cuda, mps or cpu
    threads: int = 0            # CPU threads of this process; 0 = PyTorch's choice
    amp: bool = True            # bf16 autocast where the device has bf16 arithmetic
    compile: bool = False       # torch.compile the U-Net (--unet.checkpoint=True: less memory, a third more time)

    vae: VAEConfig = field(default_factory=VAEConfig)
    vae_weights: str = ""       # take the VAE from a published checkpoint or a run folder instead of training one
    vae_steps: int = 1000
    vae_batch: int = 16
    vae_lr: float = 3e-3
    vae_crop: int = 0           # train on random crops of this side, 0 = whole patches: the same pixels at less cost

    summarizer: SummarizerConfig = field(default_factory=SummarizerConfig)  # embed_dim and scales come from the data
    unet: UNetConfig = field(default_factory=UNetConfig)                    # context_dim is summarizer.width
    init_from: str = ""         # start from a run folder (all networks, whose sizes must be given as for that run), or
    #                             the U-Net alone from a published one, as the papers did: cin256-v2.ckpt
    pred: str = "eps"           # what the U-Net predicts: eps as published, x0, or v (see diffusion.py)
    schedule: str = "scaled_linear"  # of the noise; as published (see diffusion.py)
    steps: int = 1500
    batch: int = 32             # global batch, divided over ranks
    drop: float = 0.1           # share of samples whose whole condition is zeroed (published)
    only_scale: int = -1        # train on one scale alone (the papers' single-scale baseline)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


# toys: small networks for 64-pixel patches; places, v and few channels per group are what makes minutes enough. smoke:
# small rates and few codes, or 40 steps blow up the rounding by which two ranks differ from one. None: the default
TABLE = {
    "preset":               ("smoke",      "toy",      "toy_long", "gpu24",       "brca",       "naip"),
    "data":                 ("data/smoke", "data/toy", "data/toy", "data/slides", "data/brca",  "data/naip"),
    "amp":                  (False,        None,       None,       None,          None,         None),
    "vae.width":            (16,           32,         32,         64,            None,         None),
    "vae.res_blocks":       (1,            1,          1,          None,          None,         None),
    "vae.codes":            (64,           1024,       1024,       None,          None,         None),
    "vae.groups":           (8,            8,          8,          16,            None,         None),
    "vae_steps":            (40,           700,        2000,       40_000,        0,            0),
    "vae_batch":            (None,         None,       None,       32,            None,         None),
    "vae_lr":               (1e-4,         None,       None,       2e-4,          None,         None),
    "vae_crop":             (32,           32,         32,         None,          None,         None),
    "summarizer.width":     (128,          128,        128,        384,           None,         None),
    "summarizer.depth":     (2,            2,          3,          6,             None,         None),
    "summarizer.mlp":       (256,          256,        256,        1536,          None,         None),
    "summarizer.positions": (16,           16,         16,         16,            None,         None),
    "summarizer.scales":    (None,         None,       None,       None,          None,         4),
    "summarizer.side":      (None,         None,       None,       None,          128,          128),
    "unet.width":           (32,           64,         64,         96,            None,         None),
    "unet.mult":            ((1, 2),       (1, 2),     (1, 2, 2),  (1, 2, 3, 4),  None,         None),
    "unet.res_blocks":      (1,            1,          2,          1,             None,         None),
    "unet.attention":       ((2,),         (2,),       (2, 4),     None,          None,         None),
    "unet.groups":          (8,            8,          8,          None,          None,         None),
    "unet.positions":       (16,           16,         16,         16,            None,         None),
    "pred":                 ("v",          "v",        "v",        "v",           None,         None),
    "steps":                (40,           800,        4000,       100_000,       500_000,      500_000),
    "batch":                (16,           None,       None,       128,           420,          400),
    "micro":                (None,         None,       None,       64,            None,         None),
    "lr":                   (3e-4,         None,       1e-3,       1e-4,          2e-5,         2e-5),
    "warmup":               (None,         None,       None,       1000,          1000,         1000),
    "decay":                (None,         None,       None,       None,          "constant",   "constant"),
    "betas":                (None,         None,       None,       None,          (0.9, 0.999), (0.9, 0.999)),
    "clip":                 (None,         None,       None,       None,          0.0,          0.0),
    "ema":                  (None,         None,       0.999,      0.9999,        0.9999,       0.9999),
    "workers":              (None,         None,       None,       4,             4,            4),
    "log_every":            (10,           None,       None,       100,           100,          100),
    "sample_every":         (40,           200,        1000,       5000,          10_000,       10_000),
    "save_every":           (10,           None,       None,       1000,          5000,         5000),
}
PRESETS = {name: {key: row[i] for key, row in TABLE.items() if row[i] is not None}
           for i, name in enumerate(TABLE["preset"])}


# ----- 2. What each stage minimises -----

class VAEStage(nn.Module):
    """The autoencoder and its loss on crops of images; counts which codes are used, to move the unused ones.

    anchor (N,3,P,P): fixed patches, on whose latents codes are placed. start: a VAE to go on from.
    """

    def __init__(self, cfg, anchor, start=None):
        super().__init__()
        self.vae, self.cfg, self.anchor, self.scales = VQVAE(cfg.vae), cfg, anchor, cfg.summarizer.scales
        self.register_buffer("usage", torch.zeros(cfg.vae.codes))
        self.used = torch.zeros(cfg.vae.codes, device=anchor.device)    # by this rank in this step
        self.unquantized = 0 if start else cfg.vae_steps // 4           # steps before there are codes
        self.crop = min(cfg.vae_crop or anchor.shape[-1], anchor.shape[-1])
        if start:
            self.vae.load_state_dict(start.state_dict())

    def noise(self, step):
        """What is random in a step, of the whole global batch: here the corners of the crops."""
        self.step, gen = step, generator(self.cfg.seed, 1, step)
        places = (self.anchor.shape[-1] - self.crop) // self.vae.factor + 1
        return {"corner": self.vae.factor * torch.randint(places, (self.cfg.vae_batch, 2), generator=gen)}

    def forward(self, batch):
        crops = []
        for image, (i, j) in zip(batch["x"], batch["corner"].tolist()):
            crops.append(image[:, i:i + self.crop, j:j + self.crop])    # (3,crop,crop)
        x = torch.stack(crops)                                          # (B,3,crop,crop)
        loss, x_rec, indices = vae_loss(self.vae, x, self.step >= self.unquantized)
        if indices is not None:
            self.used += torch.bincount(indices.flatten(), minlength=len(self.used))
        mse = (x_rec.detach().clamp(-1, 1) - x).square().flatten(1).mean(1).clamp_min(1e-10)
        psnr = 10 * torch.log10(4 / mse)                                # (B,)
        return loss, {"loss": loss.detach().expand(len(x)), "psnr": psnr, "s": batch["s"]}

    @torch.no_grad()
    def after_step(self, step, ranks):
        """Whiten latents until there are codes; place codes on latents of fixed patches, the unused ones every 50."""
        ranks.sum(self.used)
        self.usage += self.used
        self.used.zero_()
        first = self.unquantized
        if step in (first // 8, first // 2, first):
            rebase(self.vae, self.vae.encode(self.anchor), whiten=True)
        if step >= first and (step - first) % 50 == 0 and step <= 0.8 * self.cfg.vae_steps:
            used = int((self.usage > 0).sum())
            if step > first and used < 0.1 * len(self.usage) and ranks.rank == 0:
                tqdm.write(f"step {step}: only {used} of {len(self.usage)} codes were used in 50 steps; the others are "
                           f"moved to latents. If that goes on, take fewer (--vae.codes) or a lower --vae_lr")
            revive_codes(self.vae, self.vae.encode(self.anchor), self.usage, generator(self.cfg.seed, 3, step))
            self.usage.zero_()

    def report(self):
        """What the log says beside the losses."""
        return {"perplexity": round(perplexity(self.usage), 1) if self.usage.any() else None}


class LDMStage(nn.Module):
    """U-Net and Summarizer with their denoising loss (Z §4.1.1). side: of the latents."""

    def __init__(self, cfg, side):
        super().__init__()
        self.summarizer, self.unet, self.schedule = build(cfg.summarizer), UNet(cfg.unet), Schedule(cfg.schedule)
        self.cfg, self.side, self.scales = cfg, side, cfg.summarizer.scales
        if cfg.compile:
            self.unet.compile()                                         # in place: the names of the weights stay

    def noise(self, step):
        """Time indices, drop-out and noise of the whole global batch: the same for any number of ranks."""
        gen, n, T = generator(self.cfg.seed, 2, step), self.cfg.batch, self.schedule.T
        # one t in each of n equal strata: the same uniform law, with less variance between batches
        t = ((torch.randperm(n, generator=gen) + torch.rand(n, generator=gen)) * (T / n)).long()
        keep = torch.rand(n, generator=gen) >= self.cfg.drop
        eps = torch.randn(n, self.unet.cfg.channels, self.side, self.side, generator=gen)
        return {"t": t.clamp_max(T - 1), "keep": keep, "eps": eps}

    def forward(self, batch):
        t, s = batch["t"], batch["s"]
        c = self.summarizer(batch["tokens"], batch["mask"], s)          # (B,65,D)
        c = torch.where(batch["keep"][:, None, None], c, null_condition(c))
        loss, on_eps = diffusion_loss(lambda z_t, t: self.unet(z_t, t, c), batch["z"], t, batch["eps"],
                                      self.schedule, self.cfg.pred)     # (B,) each
        return loss.mean(), {"loss": loss.detach(), "eps": on_eps, "s": s, "t": t}

    def after_step(self, step, ranks):
        pass

    def report(self):
        return {}


# ----- 3. The loop -----

def run_stage(name, cfg, ranks, net, dataset, steps, batch, lr, ema_decay=0.0, on_sample=None):
    """Train `net` for `steps` steps, or go on from out/{name}state.safetensors. out: the steps done, and the averaged
    weights (raw if ema_decay is 0). SIGTERM saves, and exits with 0. raises: UserError if a loss is not finite."""
    optim, loop, state_file = cfg.optim, cfg.loop, Path(cfg.out, f"{name}state.safetensors")
    places, micro = own_places(name, cfg, batch, ranks)
    net = net.to(ranks.device).train()
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema_decay else None
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr, optim.betas, weight_decay=optim.weight_decay, fused=True)
    start = resume(state_file, cfg, net, ema, opt, ranks)
    if start >= steps:
        return start, ema or net.state_dict()
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True) if ranks.world > 1 else net
    log = Log(Path(cfg.out), name.strip("_") or "ldm", start, net, ranks)
    with feed(dataset, range(start, steps), batch, micro, ranks, loop.workers) as (batches, asked):
        bar = tqdm(range(start, steps), log.stage, steps, initial=start, disable=ranks.rank > 0)
        for step in bar:
            rate = lr_at(step, steps, lr, min(optim.warmup, steps // 5), optim.decay)
            for group in opt.param_groups:
                group["lr"] = rate
            noise = net.noise(step)                                     # of the whole global batch
            for at in places:                                           # where micro-batches of this rank begin in it
                item = next(batches) | {k: v[at:at + micro] for k, v in noise.items()}
                log.rows.append(backward(wrapped, item, ranks, len(places), at == places[-1]))
            grad = torch.nn.utils.clip_grad_norm_(params, optim.clip or math.inf)
            stop = agree(log, step, batch, grad, asked)                 # before this step changes anything
            opt.step()
            opt.zero_grad()
            if ema:
                update_ema(ema, net, min(ema_decay, (step + 2) / (step + 11)))
            done = step + 1
            save, sample = (done == steps or done % n == 0 for n in (loop.save_every, loop.sample_every))
            if stop or save or sample or done % loop.log_every == 0:
                bar.set_postfix(loss=log.write(done, batch, grad, rate))
            net.after_step(done, ranks)
            if (stop or save) and ranks.rank == 0:
                save_state(state_file, cfg, done, net, ema, opt)
            if stop:
                leave(done, steps, ranks)
            if sample and on_sample and ranks.rank == 0:
                on_sample(done, ema or net.state_dict())
                log.since = time.time()                                 # this is no time of training
    ranks.barrier()
    return steps, ema or net.state_dict()


def own_places(name, cfg, batch, ranks):
    """Where the micro-batches of this rank begin in the global batch, and their size. raises: UserError."""
    share = batch // ranks.world
    micro = min(cfg.loop.micro or share, share)
    if batch % ranks.world or share % micro:
        option = f"{name}batch" if hasattr(cfg, f"{name}batch") else "batch"
        raise UserError(f"a global batch of {batch} does not divide into {ranks.world} ranks of micro-batches of "
                        f"{micro}: change --{option} or --micro")
    return range(ranks.rank * share, (ranks.rank + 1) * share, micro), micro


def lr_at(step, steps, lr, warmup, decay):
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, or a cosine to zero at `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return lr if decay == "constant" else lr * 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def feed(dataset, steps, batch, micro, ranks, workers):
    """Yield micro-batches of this rank, and a list that holds something once a SIGTERM came, which ends nothing here.

    A sample is step * batch + its place, so that resuming is exact. Clusters send SIGTERM to all processes of a job:
    those that load data do not hear it, and end with the training.
    """
    asked, share = [], batch // ranks.world
    own = range(ranks.rank * share, (ranks.rank + 1) * share)
    numbers = (step * batch + place for step in steps for place in own)
    how = "fork" if workers and sys.platform == "linux" else None       # a server that starts them would hear it
    loading = iter(DataLoader(dataset, micro, sampler=numbers, num_workers=workers, worker_init_fn=deafen,
                              pin_memory=ranks.device.type == "cuda", multiprocessing_context=how))
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield loading, asked
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if workers:
            loading._shutdown_workers()                                 # Python would send them a SIGTERM


def deafen(worker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def backward(net, item, ranks, parts, last):
    """Add the gradient of one of `parts` micro-batches; only with the last do ranks exchange theirs. out: values."""
    item = {k: v.to(ranks.device, non_blocking=True) for k, v in item.items()}
    with nullcontext() if last or ranks.world == 1 else net.no_sync():
        with ranks.autocast():
            loss, values = net(item)
        (loss / parts).backward()
    return values


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) weights. official: decay min(0.9999, (1+n)/(10+n))."""
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)                                      # the counters of batch norm


def agree(log, step, batch, grad, asked):
    """Tell all ranks what happened on one. out: whether a SIGTERM came. raises: UserError, on all, with the numbers of
    the samples, if a loss or the gradient of this step is not finite."""
    ranks, share = log.ranks, batch // log.ranks.world
    flags = torch.zeros(batch + 1, device=grad.device)
    losses = torch.cat([r["loss"] for r in log.rows])[-share:]
    flags[ranks.rank * share:][:share] = (~losses.isfinite()).float()
    flags[-1] = len(asked)
    bad = ranks.sum(flags)[:-1].nonzero()[:, 0].tolist()
    if bad or not grad.isfinite():
        samples = ", ".join(str(step * batch + k) for k in bad or range(batch))  # a gradient names no sample
        raise UserError(f"the {log.stage} {'loss' if bad else 'gradient'} is no longer finite at step {step + 1}, on "
                        f"samples {samples} of the data set: the last checkpoint is intact; look at these samples, or "
                        f"move the *state*.safetensors of this training away and take a lower learning rate")
    return bool(flags[-1])


def leave(done, steps, ranks):
    """What a SIGTERM asks for, once the state is saved: end, on all ranks, with exit code 0."""
    ranks.barrier()
    if ranks.rank == 0:
        tqdm.write(f"SIGTERM: saved step {done} of {steps}; the same command goes on from there")
    if ranks.world > 1:
        dist.destroy_process_group()
    sys.exit(0)


# ----- 4. The log, and samples on the way -----

def read_lines(path):
    """The records of a log; none if there is no such file. A line cut short by a kill is passed over."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Log:
    """Averages over all ranks between two lines of log.jsonl: losses, by scale and by quarter of t; the speed."""

    def __init__(self, out, stage, start, net, ranks):
        self.path, self.stage, self.net, self.ranks = out / "log.jsonl", stage, net, ranks
        self.rows, self.last, self.since = [], start, time.time()
        if ranks.rank == 0:                                             # without what a killed run logged too much
            kept = [r for r in read_lines(self.path) if r["stage"] != stage or r["step"] <= start]
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))

    def mean(self, value, bins, n):
        """Means of value (N,) in n bins, over all ranks; None for an empty one."""
        sums = torch.zeros(2, n, device=value.device)
        sums.index_add_(1, bins, torch.stack([value, torch.ones_like(value)]))
        return [round(total / count, 6) if count else None for total, count in self.ranks.sum(sums).T.tolist()]

    def write(self, step, batch, grad, lr):
        """Add a line of averages since the last one. out: the loss. raises: UserError if it cannot be written."""
        rows = {k: torch.cat([r[k] for r in self.rows]).float() for k in self.rows[0]}      # (N,) each
        s, t = rows.pop("s").long(), rows.pop("t", None)
        record = {"stage": self.stage, "step": step}
        record |= {k: self.mean(v, torch.zeros_like(s), 1)[0] for k, v in rows.items()}
        error = next(rows[k] for k in ("eps", "psnr", "x0") if k in rows)   # what is comparable between samples
        record["by_scale"] = self.mean(error, s, self.net.scales)
        if t is not None:
            record["by_t"] = self.mean(error, (t * 4 / self.net.schedule.T).long(), 4)
        speed = (step - self.last) * batch / (time.time() - self.since)
        record |= {"grad": round(float(grad), 4), "lr": lr, "img_s": round(speed, 1)} | self.net.report()
        self.rows, self.last, self.since = [], step, time.time()
        if self.ranks.rank == 0:
            append(self.path, record)
        return record["loss"]


def append(path, record):
    """Add a line to a log. raises: UserError if it cannot be written."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as err:
        raise UserError(f"could not write {path}: {err}; check free space and permissions") from err


def layout_fidelity(fake, real, grid):
    """Pearson correlation of patches (N,3,P,P) average-pooled to grid, min(2^s, 8); 1 compares mean colours.

    Each channel's mean over its set is taken off, or the stain alone would correlate. 0 if a set is constant.
    """
    if fake.shape != real.shape or fake.ndim != 4 or min(fake.shape) < 1 or min(fake.shape[2:]) < grid:
        raise UserError(f"got numbers of shape {tuple(fake.shape)} and {tuple(real.shape)}: give images (N,3,H,W) of "
                        f"one shape, with sides of at least {grid}")
    fake, real = (F.adaptive_avg_pool2d(x.double(), grid) for x in (fake, real))            # (N,3,grid,grid)
    fake, real = ((x - x.mean((0, 2, 3), keepdim=True)).flatten() for x in (fake, real))
    size = fake.norm() * real.norm()
    return float(fake @ real / size) if size > 1e-12 else 0.0


SHEET = {"n": 16, "show": 8, "steps": 20}  # patches that are drawn per scale, and shown; of so many steps


@torch.no_grad()
def export(model, pyramids, cfg, ranks, step, ema):
    """Save the averaged model as ema.safetensors, and draw patches with the conditions of held-out ones."""
    out, split = Path(cfg.out), "test" if pyramids.names("test") else "train"
    for name, part in (("summarizer.", model.summarizer), ("unet.", model.unet)):
        part.load_state_dict({k.removeprefix(name): v for k, v in ema.items() if k.startswith(name)})
    model.eval().save(out)
    rows, labels, layout = [], [], [None] * pyramids.scales
    for s in range(pyramids.scales):
        if pyramids.count(split, s):
            want = "x" if getattr(pyramids, "images", True) else "z"    # official samples may have latents alone
            batch = fixed_batch(pyramids, split, s, SHEET["n"], (want,))
            batch = {k: v.to(ranks.device) for k, v in batch.items()}
            with ranks.autocast():
                c = model.summarizer(batch["tokens"], batch["mask"], batch["s"]).float()    # (n,65,D)
                drawn = model.draw(c, pyramids.patch // 4, steps=SHEET["steps"], seed=cfg.seed)
                real = (batch["x"] if want == "x" else model.decode(batch["z"])).float().cpu()
            rows += [real[:SHEET["show"]], drawn[:SHEET["show"]]]       # (show,3,P,P)
            labels += [f"scale {s} real", f"scale {s} drawn"]
            layout[s] = round(layout_fidelity(drawn, real, min(2 ** s, 8)), 4)
    save_grid(out / f"samples/step_{step:06d}.png", rows, labels)
    records = [r for r in read_lines(out / "samples/layout.jsonl") if r["step"] < step]
    records.append({"step": step, "layout": layout})
    write_text(out / "samples/layout.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    tqdm.write(f"step {step}: layout fidelity by scale {layout}")


# ----- 5. The stages in order -----

def load_run_vae(path):
    """Read a run's vae.safetensors. out: (vae, latent scale). raises: UserError if it is missing or foreign."""
    weights, meta = load_tensors(path)
    try:
        vae = VQVAE(restore(VAEConfig, meta["config"]))
        vae.load_state_dict(weights)
        return vae, meta["latent_scale"]
    except (KeyError, TypeError, RuntimeError) as err:
        raise UserError(f"{path} does not hold a VAE of ours ({str(err).splitlines()[0]}): give a run folder, or a "
                        f"published file") from err


def make_vae(cfg, ranks, pyramids, base):
    """Load, take over from `base`, or train a VAE. out: (vae, latent scale, which gives latents deviation 1)."""
    source = Path(cfg.vae_weights)
    if cfg.vae_weights and source.is_dir():
        return load_run_vae(source / "vae.safetensors")
    if cfg.vae_weights:
        from slides import keys                                         # published weights
        state = load_state_dict(source)
        return keys.load_vae(state, keys.VAE if keys.has(state, keys.VAE) else ""), 1.0
    if base and not cfg.vae_steps:
        return base.vae, base.latent_scale
    if not cfg.vae_steps:
        raise UserError("this preset does not train a VAE: give the published one with --vae_weights=FILE, or train "
                        "your own with --vae_steps=N")

    def fixed(n):
        there = [s for s in range(pyramids.scales) if pyramids.count("train", s)]
        return [fixed_batch(pyramids, "train", s, n)["x"].to(ranks.device) for s in there]  # (n,3,P,P) each
    net = VAEStage(cfg, torch.cat(fixed(16)), base and base.vae)
    images = PatchDataset(pyramids, "train", cfg.seed, ("x",))
    run_stage("vae_", cfg, ranks, net, images, cfg.vae_steps, cfg.vae_batch, cfg.vae_lr)
    vae = net.vae.eval().requires_grad_(False)
    rebase(vae, torch.cat([vae.encode(x) for x in fixed(64)]))          # mean 0
    return vae, 1 / float(torch.cat([vae.encode(x) for x in fixed(64)]).std())


def get_vae(cfg, ranks, pyramids, base=None):
    """The VAE of a run in eval mode, and its latent scale; made if out/vae.safetensors is missing."""
    path = Path(cfg.out, "vae.safetensors")
    there = path.exists()
    ranks.barrier()                                                     # all ranks look before one writes
    if not there:
        vae, scale = make_vae(cfg, ranks, pyramids, base)
        meta = {"config": asdict(vae.cfg), "latent_scale": scale, "settings": asdict(cfg)}
        if ranks.rank == 0:
            save_tensors(path, vae.state_dict(), meta)
        ranks.barrier()
    vae, scale = load_run_vae(path)
    if ranks.rank == 0:
        print(f"VAE: {path}, latent scale {scale:.4f} (1 / deviation; 1 for published weights)")
    return vae.to(ranks.device).eval().requires_grad_(False), scale


@torch.no_grad()
def encode_latents(cfg, ranks, vae, pyramids):
    """Write out/latents/NAME.safetensors, unscaled f16 latents of the training slides, which ranks share out."""
    folder, vae_mark = Path(cfg.out, "latents"), fingerprint(vae)
    mine = [i for i, x in enumerate(pyramids.slides) if x["split"] == "train"][ranks.rank::ranks.world]
    for i in tqdm(mine, desc=f"latents -> {folder}", disable=ranks.rank > 0):
        slide = pyramids.slides[i]
        path, source = folder / slide["file"], (pyramids.folder / slide["file"]).stat()
        mark = f"{vae_mark} {source.st_size} {source.st_mtime_ns}"      # this VAE, these images
        if path.exists() and load_meta(path).get("vae") == mark:
            continue
        tensors = {}
        for s, count in enumerate(slide["counts"]):
            z = []
            for k in range(0, count, 128):
                x = torch.stack([pyramids.read(i, s, n, ("x",))["x"] for n in range(k, min(k + 128, count))])
                z.append(vae.encode(x.to(ranks.device)).half())
            if z:
                tensors[f"z{s}"] = torch.cat(z)                         # (count,3,P/4,P/4)
        save_tensors(path, tensors, {"vae": mark})
    ranks.barrier()
    return folder


# ----- 6. python train.py -----

def make_toys(cfg, ranks):
    """Make the data of a toy preset if they are missing or unfinished; never in a folder that the user named."""
    sizes = {"smoke": (8, 4, 256), "toy": (256, 64, 1024), "toy_long": (256, 64, 1024)}     # slides, held out, side
    own = cfg.preset in sizes and cfg.data == PRESETS[cfg.preset]["data"]
    if own and ranks.rank == 0 and not (Path(cfg.data, "index.json").exists() and read_index(cfg.data)["slides"]):
        slides, test, size = sizes[cfg.preset]
        data.main(["toy", f"--out={cfg.data}", f"--slides={slides}", f"--test={test}", f"--size={size}"])
    ranks.barrier()


def check_loop(cfg):
    """Hold what the loop reads against limits. raises: UserError."""
    at_least(cfg, seed=0, batch=1, steps=0)
    at_least(cfg.loop, micro=0, workers=0, log_every=1, sample_every=1, save_every=1)
    at_least(cfg.optim, lr=0, warmup=0, weight_decay=0, clip=0, ema=0)
    one_of(cfg.optim, decay=("cosine", "constant"))
    betas, ema = cfg.optim.betas, cfg.optim.ema
    if len(betas) != 2 or not all(0 <= x < 1 for x in (*betas, ema)):
        raise UserError(f"--betas={betas} takes two numbers, --ema={ema} one: each at least 0 and less than 1")


def check(cfg):
    """What can be refused before anything is read. raises: UserError."""
    check_loop(cfg)
    at_least(cfg, vae_batch=1, vae_steps=0, vae_crop=0, drop=0)
    one_of(cfg, pred=("eps", "x0", "v"))
    one_of(cfg.summarizer, kind=("transformer", "cnn"))
    if len(cfg.vae.mult) != 3 or cfg.vae.channels != cfg.unet.channels or cfg.vae_crop % 4:
        raise UserError(f"--vae.mult={cfg.vae.mult} --vae.channels={cfg.vae.channels} --vae_crop={cfg.vae_crop}: give "
                        f"three levels, as many channels as unet.channels, and a multiple of 4")
    if cfg.unet.positions != cfg.summarizer.positions:
        raise UserError(f"--unet.positions={cfg.unet.positions} and --summarizer.positions={cfg.summarizer.positions}: "
                        f"give both the same number")


def open_training(cfg, std):
    """The data, and the sizes that they decide. raises: UserError if settings and data do not go together."""
    pyramids = open_data(cfg.data, std=std)
    if pyramids.official and not cfg.vae_weights:
        raise UserError(f"{cfg.data} holds latents of the published VAE: give it with --vae_weights=FILE")
    cfg.summarizer.embed_dim, cfg.summarizer.scales = pyramids.embed_dim, pyramids.scales
    cfg.unet.context_dim = cfg.summarizer.width
    side, halvings = pyramids.patch // 4, len(cfg.unet.mult) - 1
    if side % 2 ** halvings:
        raise UserError(f"latents of {side} x {side} cannot be halved {halvings} times: build the data with another "
                        f"--patch, or take fewer levels, --unet.mult")
    return pyramids


def main(argv):
    cfg = configure(Config, argv, PRESETS, ("preset",), __doc__)
    check(cfg)
    cfg.out = cfg.out or f"out/{cfg.preset}"
    out, ranks = Path(cfg.out), setup(cfg.device, cfg.amp, cfg.threads)
    make_toys(cfg, ranks)
    base = ZoomLDM.from_run(cfg.init_from) if Path(cfg.init_from or "-").is_dir() else None
    std = base and base.info.get("std")                                 # embeddings must mean what they meant to it
    pyramids = open_training(cfg, std)
    ldm_samples(cfg, pyramids)                                          # refused here, not after the VAE is trained
    with torch.device("meta"):
        LDMStage(cfg, pyramids.patch // 4)
    check_settings(out / "vae.safetensors", cfg, ("vae", "data", "seed", *["init_from"] * bool(base)))
    found, start = newest_state(out / "state.safetensors"), {}
    if found:
        check_settings(found[0], cfg)
    if cfg.init_from:
        from slides.start import start_weights
        start = start_weights(cfg, ranks, pyramids, base, bool(found))  # {name in LDMStage: tensor}
    ranks.barrier()                                                     # all have looked before one writes
    if ranks.rank == 0:
        for left in out.rglob(".*.tmp"):                                # of a save that was killed
            left.unlink()
        print(f"run folder {out}, {ranks.world} rank(s) on {ranks.device}, "
              f"{'bf16 autocast' if ranks.amp else 'float32'}, {torch.get_num_threads()} threads")
        write_text(out / "config.json", json.dumps(asdict(cfg) | {"torch": torch.__version__}, indent=1))
    torch.manual_seed(cfg.seed)
    vae, scale = get_vae(cfg, ranks, pyramids, base)
    if cfg.steps:
        train_ldm(cfg, ranks, vae, scale, pyramids, start)
    if ranks.world > 1:
        dist.destroy_process_group()


def ldm_samples(cfg, pyramids):
    return PatchDataset(pyramids, "train", cfg.seed, only_scale=None if cfg.only_scale < 0 else cfg.only_scale)


def train_ldm(cfg, ranks, vae, scale, pyramids, start):
    """Train U-Net and Summarizer on latents, from the weights `start` on, or go on with them."""
    if pyramids.official:
        pyramids.latent_scale = scale
    else:
        pyramids = open_data(cfg.data, encode_latents(cfg, ranks, vae, pyramids), pyramids.std, scale)
    torch.manual_seed(cfg.seed + 1)
    net = LDMStage(cfg, pyramids.patch // 4)
    net.load_state_dict(net.state_dict() | start)
    info = {k: getattr(pyramids, k) for k in ("encoder", "std", "patch", "weights", "mpp")} | {"data": cfg.data}
    model = ZoomLDM(vae, build(cfg.summarizer), UNet(cfg.unet), scale, cfg.pred, cfg.schedule, info).to(ranks.device)
    draw = partial(export, model, pyramids, cfg, ranks)
    dataset = ldm_samples(cfg, pyramids)
    done, ema = run_stage("", cfg, ranks, net, dataset, cfg.steps, cfg.batch, cfg.optim.lr, cfg.optim.ema, draw)
    if ranks.rank == 0:
        picture = Path(cfg.out, f"samples/step_{done:06d}.png")
        if not picture.exists():                                        # killed after the last step
            draw(done, ema)
        print(f"done: {cfg.out}/ema.safetensors, {picture}")


if __name__ == "__main__":
    cli(main)
