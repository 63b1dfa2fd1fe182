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
import copy
import functools
import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from common import (
    UserError,
    check_settings,
    cli,
    configure,
    fingerprint,
    generator,
    newest_state,
    load_state_dict,
    load_tensors,
    open_tensors,
    restore,
    resume,
    save_grid,
    save_state,
    save_tensors,
    setup,
    write_text,
)
from data import PatchDataset, Pyramids, fixed_batch, open_data, read_index
from diffusion import Schedule, ZoomLDM, diffusion_loss
from summarizer import SummarizerConfig, build
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig, perplexity, rebase, revive_codes, vae_loss


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


def fits(base, cfg, pyramids):
    """raises: UserError if the model `base` of another run cannot go on with these settings and data."""
    own = not (cfg.vae_weights or Path(cfg.out, "vae.safetensors").exists())
    parts = {"summarizer": cfg.summarizer, "unet": cfg.unet} | ({"vae": cfg.vae} if own else {})
    wrong = [f"--{name}.{key}={value}" for name, part in parts.items()
             for key, value in asdict(getattr(base, name).cfg).items() if value != getattr(part, key)
             and key not in ("checkpoint", "embed_dim", "scales")]
    wrong += [f"--{key}={value}" for key, value, given in (
        ("pred", base.pred, cfg.pred), ("schedule", base.schedule.kind, cfg.schedule)) if value != given]
    if wrong:
        raise UserError(f"--init_from={cfg.init_from} has other networks: give its preset, or {' '.join(wrong)}")
    s, info = base.summarizer.cfg, base.info
    there, here = (info.get("encoder"), s.embed_dim, s.scales), (pyramids.encoder, pyramids.embed_dim, pyramids.scales)
    if there != here or info.get("std") != pyramids.std:
        raise UserError(f"{cfg.data} does not suit --init_from={cfg.init_from}: embeddings by {here[0]}, {here[1]} "
                        f"wide, at {here[2]} scales, not by {there[0]}, {there[1]} wide, at {there[2]}; build it alike")


def check_loop(cfg):
    """What of the settings this file reads can be refused before anything else is. raises: UserError."""
    least = {"log_every": 1, "sample_every": 1, "save_every": 1, "workers": 0, "max_skips": 0, "profile": 0,
             "warmup": 0, "lr": 0, "weight_decay": 0, "clip": 0, "ema": 0}
    for name, low in least.items():
        if getattr(cfg, name) < low:
            raise UserError(f"--{name}={getattr(cfg, name)}: it must be at least {low}")
    if cfg.decay not in ("cosine", "constant"):
        raise UserError(f"--decay={cfg.decay}: known are cosine, constant")
    if len(cfg.betas) != 2 or not all(0 <= x < 1 for x in (*cfg.betas, cfg.ema)):
        raise UserError(f"--betas={cfg.betas} takes two numbers, --ema={cfg.ema} one: each at least 0 and less than 1")


def lr_at(step, steps, lr, warmup, decay):
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, or a cosine to zero at `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr if decay == "constant" else lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loader(dataset, start, steps, batch, micro, ranks, workers, over):
    """Micro-batches of this rank from step `start` on; sample index = step * batch + position, so resume is exact."""
    per = batch // ranks.world
    order = (range(k, k + micro) for step in range(start, steps)
             for k in range(step * batch + ranks.rank * per, step * batch + (ranks.rank + 1) * per, micro))
    # forked, though Python 3.14 would not: a SIGTERM to the server that it starts processes from would end them
    how = "fork" if workers and sys.platform == "linux" else None
    return iter(DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=ranks.device.type == "cuda",
                           persistent_workers=workers > 0, worker_init_fn=partial(deaf, over),
                           multiprocessing_context=how))


def deaf(over, _):
    """Clusters send SIGTERM to every process of a job: those that load data go on until the training is over."""
    signal.signal(signal.SIGTERM, lambda *_: over.value and os._exit(0))


@contextmanager
def sigterm(over):
    """Yield a list that holds something once a SIGTERM has come, which ends nothing meanwhile; then set `over`."""
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    try:
        yield asked
    finally:
        over.value = True
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def run_stage(name, cfg, ranks, net, dataset, steps, batch, lr, ema_decay=0.0, on_sample=None):
    """Train `net` for `steps` steps, resuming from out/{name}state.safetensors. out: the steps done, and the averaged
    weights (raw, if ema_decay is 0) as a state dict. A SIGTERM saves, and exits with code 0. raises: UserError on more
    than cfg.max_skips steps in a row whose loss or gradient is not finite; the last checkpoint stays as it was."""
    out, device = Path(cfg.out), ranks.device
    state_file = out / f"{name}state.safetensors"
    per = batch // ranks.world
    micro = min(cfg.micro or per, per)
    if batch % ranks.world or per % micro:
        raise UserError(f"a global batch of {batch} does not divide into {ranks.world} ranks of micro-batches of "
                        f"{micro}: change --{name if hasattr(cfg, name + 'batch') else ''}batch or --micro")
    net = net.to(device).train()
    params = [p for p in net.parameters() if p.requires_grad]
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema_decay else None
    pairs = ema_pairs(ema, net) if ema else None
    opt = torch.optim.AdamW(params, lr=lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)
    start = resume(state_file, cfg, net, ema, opt, ranks)
    if start >= steps:
        return start, ema or net.state_dict()
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True) if ranks.world > 1 else net
    log = Log(out / "log.jsonl", name.strip("_") or "ldm", start, net, ranks)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=log.stage, disable=ranks.rank > 0)
    watch, over = Watch(net, out, log.stage, batch, cfg.max_skips, ranks), RawValue("b", False)
    with sigterm(over) as asked, profiler(cfg.profile * (ranks.rank == 0), out / f"{name}profile.txt") as tick:
        batches = loader(dataset, start, steps, batch, micro, ranks, cfg.workers, over)
        for step in bar:
            rate = lr_at(step, steps, lr, min(cfg.warmup, steps // 5), cfg.decay)
            for group in opt.param_groups:
                group["lr"] = rate
            watch.begin()
            noise = net.noise(step)
            for at in range(ranks.rank * per, (ranks.rank + 1) * per, micro):
                item = log.wait(batches) | {k: v[at:at + micro] for k, v in noise.items()}
                item = {k: v.to(device, non_blocking=True) for k, v in item.items()}
                log.flops = log.flops or count_flops(net, item, ranks)
                last = at + micro == (ranks.rank + 1) * per
                with nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
                    with ranks.autocast():
                        loss, values = wrapped(item)
                    (loss * (micro / per)).backward()
                log.add(values)
                watch.add(at, values["loss"])
            grad = torch.nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)
            opt.found_inf = watch.judge(step, grad, asked)  # where it is 1, a fused optimiser leaves the weights alone
            opt.step()
            opt.zero_grad(set_to_none=True)
            if ema:
                update_ema(pairs, min(ema_decay, (step + 2) / (step + 11)))
            done = step + 1
            stop = watch.read(1)
            if stop or done == steps or not all(done % n for n in (cfg.log_every, cfg.save_every, cfg.sample_every)):
                stop = watch.read(0)  # nothing is written before this step, too, has been looked at
                bar.set_postfix_str(log.flush(done, grad, rate, batch, watch.skipped))
            net.after_step(done, ranks)
            began = time.time()
            if done % cfg.save_every == 0 or done == steps or stop:
                if ranks.rank == 0:
                    save_state(state_file, cfg, done, net, ema, opt)
            if stop:
                leave(done, steps, ranks)
            if on_sample and ranks.rank == 0 and (done % cfg.sample_every == 0 or done == steps):
                on_sample(done, ema or net.state_dict())
            log.since += time.time() - began
            tick()
    ranks.barrier()
    return steps, ema or net.state_dict()


def leave(done, steps, ranks):
    """What a SIGTERM asks for, once the state is saved: end, on all ranks, with exit code 0."""
    ranks.barrier()
    if ranks.rank == 0:
        tqdm.write(f"SIGTERM: saved step {done} of {steps}; the same command goes on from there")
    if ranks.world > 1:
        dist.destroy_process_group()
    sys.exit(0)


def ema_pairs(ema, net):
    """Averages and weights, listed once: those to be averaged, and those to be copied, the counters of batch norm."""
    pairs = [(ema[k], v) for k, v in net.state_dict().items()]
    return [list(zip(*(p for p in pairs if p[0].is_floating_point() is floats))) for floats in (True, False)]


@torch.no_grad()
def update_ema(pairs, decay):
    """ema <- decay ema + (1 - decay) weights. official: decay min(0.9999, (1+n)/(10+n))."""
    averaged, copied = pairs
    torch._foreach_lerp_(*averaged, 1 - decay)
    if copied:
        torch._foreach_copy_(*copied)


class Watch:
    """What all ranks must agree on: samples whose loss is not finite, a gradient that is not, a SIGTERM to any of them.

    The flags of a step are reduced and copied in the device's own time, and read while it works on the next step.
    """

    def __init__(self, net, out, stage, batch, most, ranks):
        self.out, self.stage, self.batch, self.most, self.ranks = out, stage, batch, most, ranks
        self.pending, self.row, self.skipped, self.stop = [], 0, 0, False
        self.buffers = list(net.buffers()) if most else []

    def begin(self):
        self.flags = torch.zeros(self.batch + 2, device=self.ranks.device)  # one a sample, gradient, SIGTERM
        self.kept = [b.clone() for b in self.buffers]                       # what a skipped step must not move

    def add(self, at, loss):
        self.flags[at:at + len(loss)] = (~loss.isfinite()).float()

    @torch.no_grad()
    def judge(self, step, grad, asked):
        """out: 1 on the device if this step is not to change the weights, else 0."""
        self.flags[-1] = float(bool(asked))
        if self.ranks.world > 1:
            dist.all_reduce(self.flags, dist.ReduceOp.MAX)
        self.flags[-2] = (~grad.isfinite()).float()  # of the sum over ranks: the same on all
        bad = self.flags[:-1].amax()
        for now, before in zip(self.buffers, self.kept):
            now.copy_(torch.where(bad > 0, before, now))
        copied = torch.cuda.Event() if self.flags.is_cuda else None
        self.pending.append((step, self.flags.to("cpu", non_blocking=self.flags.is_cuda), copied))
        if copied:
            copied.record()
        return bad

    def read(self, leave):
        """Look at the flags of all steps but the last `leave`. out: whether a SIGTERM came. raises: UserError."""
        while len(self.pending) > leave:
            step, flags, copied = self.pending.pop(0)
            if copied:
                copied.synchronize()
            self.stop |= bool(flags[-1])
            self.row = self.row + 1 if (bad := bool(flags[:-1].any())) else 0
            if not bad:
                continue
            # a gradient tells of no sample: then all of the step are named
            at = flags[:-2].nonzero()[:, 0].tolist() or range(self.batch)
            where = (f"the {self.stage} {'loss' if flags[:-2].any() else 'gradient'} is no longer finite at step "
                     f"{step + 1}, on samples {spans([step * self.batch + k for k in at])} of the data set")
            if self.row > self.most:
                again = (f"a lower --lr (--vae_lr) and another --out, --vae_weights={self.out} keeps a VAE that is done"
                         if self.stage in ("vae", "ldm") else
                         f"a lower --lr, after moving {self.stage}_state*.safetensors away")
                raise UserError(f"{where}: the last checkpoint in {self.out} is intact; look at these samples, pass "
                                f"over up to n such steps in a row with --max_skips=n, or start again with "
                                f"{again}")
            self.skipped += 1
            if self.ranks.rank == 0:
                tqdm.write(f"{where}: skipped")
        return self.stop


def spans(numbers):
    """Ascending numbers in short: 3, 7-9."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


def sample_sheet(model, pyramids, split, seed, amp, n=16, show=8, guidance=2.0, steps=20):
    """Patches drawn from the conditions of real ones. out: picture rows, a pair per scale; labels; layout fidelity."""
    rows, labels, layout, device = [], [], [], next(model.parameters()).device
    for s in range(pyramids.scales):
        if not pyramids.count(split, s):
            layout.append(None)
            continue
        pictures = getattr(pyramids, "images", True)  # official samples may have latents alone
        batch = fixed_batch(pyramids, split, s, n, ("x",) if pictures else ("z",))
        with amp, torch.no_grad():
            c = model.summarizer(batch["tokens"].to(device), batch["mask"].to(device), batch["s"].to(device))
            x = model.decode(model.sample(c.float(), [pyramids.patch // 4] * 2, guidance, steps, seed)).float().cpu()
            real = batch["x"] if pictures else model.decode(batch["z"].to(device) * model.latent_scale).float().cpu()
        rows += [real[:show], x[:show]]
        labels += [f"scale {s} real", f"scale {s} drawn"]
        layout.append(round(layout_fidelity(x, real, min(2 ** s, 8)), 4))
    return rows, labels, layout


def read_lines(path):
    """The records of a log; none if there is no such file. A line cut short by a kill is passed over."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def append(path, record):
    """Add one line of JSON to a log. raises: UserError if it cannot be written."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as err:
        raise UserError(f"could not write {path}: {err}; check free space and permissions") from err


@functools.cache
def peak_flops(device, dtype):
    """FLOP/s of a large matrix product of this type on this device, the best of a fifth of a second."""
    n, gen = 8192 if device.type == "cuda" else 1024, torch.Generator(device).manual_seed(0)
    a, best, end = torch.randn(n, n, generator=gen, device=device).to(dtype), math.inf, time.perf_counter() + 0.2
    while time.perf_counter() < end:
        began = time.perf_counter()
        float((a @ a)[0, 0])  # to read one number waits for all of them
        best = min(best, time.perf_counter() - began)
    return 2 * n ** 3 / best


def count_flops(net, item, ranks):
    """FLOPs of one sample, forward and backward (2 per multiplication and addition; what is recomputed counts again).
    Counted on a copy, which is not compiled, so that neither batch statistics nor gradients move."""
    twin, few = copy.deepcopy(net), {k: v[:2] for k, v in item.items()}
    with FlopCounterMode(display=False) as counter:
        with ranks.autocast():
            loss, values = twin(few)
        loss.backward()
    return counter.get_total_flops() / len(values["loss"])


def peak_memory(device):
    """GB at most that this process has held so far, of the device's memory; on a CPU all that is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


@contextmanager
def profiler(steps, path):
    """Yield a function to call after each step: a table of `steps` steps, after four to warm up, goes to `path`."""
    if not steps:
        yield lambda: None
        return

    def write(prof):
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_text(path, prof.key_averages().table(sort_by=by, row_limit=40))
        tqdm.write(f"wrote {path}: {steps} steps")
    plan = torch.profiler.schedule(wait=3, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=plan, on_trace_ready=write) as prof:
        yield prof.step


class Log:
    """Averages between two log lines, per scale and per quarter of t, over all ranks; one JSON line each."""

    def __init__(self, path, stage, start, net, ranks):
        self.path, self.stage, self.net, self.ranks, self.rows = path, stage, net, ranks, []
        self.peak, self.flops = peak_flops(ranks.device, ranks.amp or torch.float32), None
        self.last, self.since, self.waited = start, time.time(), 0.0
        if ranks.rank == 0:
            keep = [r for r in read_lines(path) if r["stage"] != stage or r["step"] <= start]
            write_text(path, "".join(json.dumps(r) + "\n" for r in keep))  # without what a killed run logged too much

    def wait(self, batches):
        """The next micro-batch; counts the time until it is there."""
        began = time.time()
        item = next(batches)
        self.waited += time.time() - began
        return item

    def add(self, values):
        self.rows.append(values)

    def flush(self, step, grad, lr, batch, skipped):
        """Reduce and write. out: a short text for the progress bar. Samples whose loss is not finite, which were
        skipped, stay out of the averages."""
        rows = {k: torch.cat([r[k].float().flatten() for r in self.rows]) for k in self.rows[0]}
        rows = {k: v[rows["loss"].isfinite()] for k, v in rows.items()}
        s, t = rows.pop("s").long(), rows.pop("t", None)
        def binned(value, bins, n):
            return torch.zeros(n, device=s.device).index_add_(0, bins, value), torch.zeros(
                n, device=s.device).index_add_(0, bins, torch.ones_like(value))
        key = next(k for k in ("eps", "psnr", "x0") if k in rows)  # what is comparable between samples
        sums = {k: binned(v, torch.zeros_like(s), 1) for k, v in rows.items()} | {
            "by_scale": binned(rows[key], s, self.net.scales)}
        if t is not None:
            sums["by_t"] = binned(rows[key], (t * 4 / self.net.schedule.T).long(), 4)
        record = {"stage": self.stage, "step": step}
        for k, (total, count) in sums.items():
            if self.ranks.world > 1:
                dist.all_reduce(total)
                dist.all_reduce(count)
            mean = [round(x, 6) if n else None for x, n in zip((total / count).tolist(), count.tolist())]
            record[k] = mean if k.startswith("by_") else mean[0]
        grad, now = float(grad), time.time()
        record |= {"grad": round(grad, 4) if math.isfinite(grad) else None, "lr": lr}
        record |= {"skipped": skipped} if skipped else {}
        speed = (step - self.last) * batch / (now - self.since)  # samples a second, of all ranks
        record |= {"img_s": round(speed, 1), "peak_share": round(speed * self.flops / self.ranks.world / self.peak, 4),
                   "wait_share": round(self.waited / (now - self.since), 4), "gb": round(
                       peak_memory(self.ranks.device), 2)} | self.net.report()
        self.rows, self.last, self.since, self.waited = [], step, now, 0.0
        if self.ranks.rank == 0:
            append(self.path, record)
        scales = " ".join("-" if v is None else f"{v:.3g}" for v in record["by_scale"])
        return (f"loss {record['loss'] or math.nan:.4f}, {key} by scale {scales} | {record['img_s']} img/s, "
                f"{record['peak_share']:.0%} of {self.peak / 1e9:,.0f} GFLOP/s, {record['wait_share']:.0%} waiting "
                f"for data, {record['gb']} GB")


def goes_on(path, cfg):
    """Whether there is a checkpoint to go on from. raises: UserError if it was made with other settings than cfg, or
    none is whole."""
    found = newest_state(path)
    if found:
        check_settings(found[0], cfg)
    return found is not None


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
    only_scale: int = -1        # train on one scale alone (the papers' single-scale baseline)

    log_every: int = 25
    sample_every: int = 500
    save_every: int = 250
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
        self.disc = None
        if cfg.disc_weight:
            from experiments.workshop import PatchGAN
            self.disc = PatchGAN(weight=cfg.disc_weight)
        self.register_buffer("usage", torch.zeros(cfg.vae.codes))
        self.used = torch.zeros(cfg.vae.codes, device=anchor.device)  # by this rank in this step
        self.unquantized = 0 if start else cfg.vae_steps // 4         # steps before there are codes
        if start:
            self.vae.load_state_dict(start.state_dict())
        self.crop = min(cfg.vae_crop or anchor.shape[-1], anchor.shape[-1])
        self.perceptual = [None]                                      # in a list: not ours to train, save or switch
        if cfg.lpips:
            from experiments.metrics import load_lpips  # optional extra
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
                                               self.perceptual[0])
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
        self.summarizer, self.unet, self.cfg = build(cfg.summarizer), UNet(cfg.unet), cfg
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
        vae = VQVAE(restore(VAEConfig, meta["config"]))
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
    for name, given, known in (("pred", cfg.pred, ("eps", "x0", "v")),
                               ("summarizer", cfg.summarizer.kind, ("transformer", "cnn"))):
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
    from experiments.plot import plot
    cfg = configure(Config, argv, PRESETS, ("preset",), __doc__)
    if cfg.plot:
        return plot(Path(cfg.plot))
    check(cfg)
    cfg.out = cfg.out or f"out/{cfg.preset}"
    out, ranks = Path(cfg.out), setup(cfg.device, cfg.amp, cfg.threads)
    prepare(cfg)
    ranks.barrier()
    base = ZoomLDM.from_run(cfg.init_from) if cfg.init_from and Path(cfg.init_from).is_dir() else None
    std = base and base.info.get("std")  # embeddings must mean what they meant to the Summarizer
    pyramids = open_data(cfg.data, std=std)
    if pyramids.official and not cfg.vae_weights:
        raise UserError(f"{cfg.data} holds latents of the published VAE: give it with --vae_weights=FILE")
    cfg.summarizer.embed_dim, cfg.summarizer.scales = pyramids.embed_dim, pyramids.scales
    cfg.unet.context_dim, side = cfg.summarizer.width, pyramids.patch // 4
    if side % 2 ** (len(cfg.unet.mult) - 1):
        raise UserError(f"latents of {side} x {side} cannot be halved {len(cfg.unet.mult) - 1} times: build the data "
                        f"with another --patch, or take fewer levels, --unet.mult")
    split = "test" if pyramids.names("test") else "train"
    dataset = partial(PatchDataset, split="train", seed=cfg.seed, want=("z",),
                      only_scale=None if cfg.only_scale < 0 else cfg.only_scale)
    dataset(pyramids)  # both refuse here what does not fit, not after the VAE is trained
    with torch.device("meta"):
        trial = LDMStage(cfg, 1.0, side)
    start, dropped = {}, []
    check_settings(out / "vae.safetensors", cfg, ("vae", "data", "seed", "disc", "lpips", *["init_from"] * bool(base)))
    if base:
        fits(base, cfg, pyramids)
    if not goes_on(out / "state.safetensors", cfg) and cfg.init_from and not base:
        from slides.keys import start_unet
        start, dropped = start_unet(trial.unet, load_state_dict(cfg.init_from))
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
    if not pyramids.official:
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
    summarizer = build(cfg.summarizer)
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
