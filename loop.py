"""The training loop that every stage shares: global batches over any number of ranks, EMA, exact resume, a log.

A stage is a module with noise(step) -> the random tensors of one global batch, forward(batch) -> (loss, values to log),
after_step(step, ranks) and report() -> more to log. All randomness is a pure function of (seed, step), so a run that
was killed, or spread over more ranks, goes the same way. Between log lines the host never waits for the device.

run: python train.py      read next: train.py
"""
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import UserError
from data import fixed_batch
from log import Log, count_flops, profiler
from metrics import layout_fidelity
from state import resume, save_state


def check_loop(cfg):
    """What of the settings this file reads can be refused before anything else is. raises: UserError."""
    least = {"log_every": 1, "sample_every": 1, "save_every": 1, "keep": 1, "workers": 0, "max_skips": 0, "profile": 0,
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
