"""The training loop that every stage shares: global batches over any number of ranks, EMA, exact resume, a log.

A stage is a module with noise(step) -> the random tensors of one global batch, forward(batch) -> (loss, values to log),
after_step(step, ranks) and report() -> more to log. All randomness is a pure function of (seed, step), so a run that
was killed, or spread over more ranks, goes the same way.

run: python train.py --plot=out/toy draws the log      read next: train.py
"""
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import UserError, atomic, load_tensors, open_tensors, save_tensors, write_text


def lr_at(step, steps, lr, warmup, decay):
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, or a cosine to zero at `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr if decay == "constant" else lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loader(dataset, start, steps, batch, micro, ranks, workers):
    """Micro-batches of this rank from step `start` on; sample index = step * batch + position, so resume is exact."""
    per = batch // ranks.world
    order = [range(k, k + micro) for step in range(start, steps)
             for k in range(step * batch + ranks.rank * per, step * batch + (ranks.rank + 1) * per, micro)]
    return iter(DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=ranks.device.type == "cuda",
                           persistent_workers=workers > 0))


def run_stage(name, cfg, ranks, net, dataset, steps, batch, lr, ema_decay=0.0, on_sample=None):
    """Train `net` for `steps` steps, resuming from out/{name}state.safetensors. out: the steps done, and the averaged
    weights (raw, if ema_decay is 0) as a state dict. raises: UserError on a non-finite loss; the last checkpoint stays
    as it was."""
    out, device = Path(cfg.out), ranks.device
    state_file = out / f"{name}state.safetensors"
    per = batch // ranks.world
    micro = min(cfg.micro or per, per)
    if batch % ranks.world or per % micro:
        raise UserError(f"a global batch of {batch} does not divide into {ranks.world} ranks of micro-batches of "
                        f"{micro}: change --{name}batch or --micro")
    net = net.to(device).train()
    params = [p for p in net.parameters() if p.requires_grad]
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema_decay else None
    opt = torch.optim.AdamW(params, lr=lr, betas=cfg.betas, weight_decay=cfg.weight_decay,
                            fused=device.type in ("cuda", "cpu"))
    start = resume(state_file, cfg, net, ema, opt) if state_file.exists() else 0
    if start >= steps:
        return start, ema or net.state_dict()
    wrapped = DistributedDataParallel(net) if ranks.world > 1 else net
    batches = loader(dataset, start, steps, batch, micro, ranks, cfg.workers)
    log = Log(out / "log.jsonl", name.strip("_") or "ldm", start, net, ranks)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=log.stage, disable=ranks.rank > 0)
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
        if ema:
            update_ema(ema, net, min(ema_decay, (step + 2) / (step + 11)))
        done = step + 1
        if done == steps or not all(done % n for n in (cfg.log_every, cfg.save_every, cfg.sample_every)):
            bar.set_postfix_str(log.flush(done, grad, rate, batch))  # stops here if the loss is no number
        net.after_step(done, ranks)
        if done % cfg.save_every == 0 or done == steps:
            if ranks.rank == 0:
                save_state(state_file, cfg, done, net, ema, opt)
        if on_sample and ranks.rank == 0 and (done % cfg.sample_every == 0 or done == steps):
            on_sample(done, ema or net.state_dict())
    ranks.barrier()
    return steps, ema or net.state_dict()


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) weights. official: decay min(0.9999, (1+n)/(10+n))."""
    weights = net.state_dict()
    floats = [k for k, v in weights.items() if v.is_floating_point()]
    torch._foreach_lerp_([ema[k] for k in floats], [weights[k] for k in floats], 1 - decay)
    for k in weights.keys() - set(floats):
        ema[k].copy_(weights[k])  # the batch counters of batch norm


def save_state(path, cfg, step, net, ema, opt):
    """Raw weights, averaged weights, optimiser moments: tensors only, in one atomic file."""
    moments = {f"opt.{i}.{k}": v for i, s in opt.state_dict()["state"].items() for k, v in s.items()}
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in (ema or {}).items()}
    save_tensors(path, tensors | moments, {"step": step, "settings": asdict(cfg)})


# settings that may differ when a run is resumed: they do not change what is computed, only where, how long and how loud
# (micro: unless there is batch norm, in PatchGAN or the CNN Summarizer)
FREE = {"preset", "out", "device", "threads", "workers", "compile", "plot", "steps", "micro", "toy", "log_every",
        "sample_every", "save_every", "run", "sheet"}


def completed(then, default):
    """in: settings as stored, and the defaults, both nested dicts. out: those stored, the missing at their default."""
    return default | {k: completed(v, default[k]) if isinstance(default.get(k), dict) else v for k, v in then.items()}


def check_settings(path, cfg, only=""):
    """raises: UserError if the file at `path`, should it exist, was made with other settings (whose names start with
    `only`) than cfg; a setting that did not exist then counts as its default. Every rank of a run reads the same file,
    so all stop together."""
    if not path.exists():
        return
    with open_tensors(path) as f:
        then = json.loads(f.metadata()["json"]).get("settings", {})
    now, default = (json.loads(json.dumps(asdict(c))) for c in (cfg, type(cfg)()))
    then = then and completed(then, default)  # a file without any settings is none of ours
    changed = [k for k in now if k not in FREE and k.startswith(only) and now[k] != then.get(k)]
    if changed:
        raise UserError(f"{path} belongs to a run with other settings ({', '.join(changed)}): give the same ones to "
                        f"resume, or another --out to start afresh")


def resume(path, cfg, net, ema, opt):
    """Load a state file into net, ema and opt. out: the step to go on from."""
    check_settings(path, cfg)
    tensors, meta = load_tensors(path)
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


class Log:
    """Averages between two log lines, per scale and per quarter of t, over all ranks; one JSON line each."""

    def __init__(self, path, stage, start, net, ranks):
        self.path, self.stage, self.net, self.ranks, self.rows = path, stage, net, ranks, []
        self.last, self.since = start, time.time()
        if ranks.rank == 0:
            keep = [r for r in read_lines(path) if r["stage"] != stage or r["step"] <= start]
            write_text(path, "".join(json.dumps(r) + "\n" for r in keep))  # without what a killed run logged too much

    def add(self, values):
        self.rows.append(values)

    def flush(self, step, grad, lr, batch):
        """Reduce, check, write. out: a short text for the progress bar. raises: UserError if the loss is not finite."""
        rows = {k: torch.cat([r[k].float().flatten() for r in self.rows]) for k in self.rows[0]}
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
        if record["loss"] is None or not math.isfinite(record["loss"]) or not math.isfinite(float(grad)):
            raise UserError(f"the {self.stage} loss is no longer finite at step {step}: the last checkpoint in "
                            f"{self.path.parent} is intact; start again with a lower --lr (--vae_lr) and another --out,"
                            f" --vae_weights={self.path.parent} keeps a VAE that is done")
        seconds, self.since = time.time() - self.since, time.time()
        record |= {"grad": round(float(grad), 4), "lr": lr, "img_s": round((step - self.last) * batch / seconds, 1)}
        record |= self.net.report()
        if self.ranks.device.type == "cuda":
            record["gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.rows, self.last = [], step
        if self.ranks.rank == 0:
            append(self.path, record)
        scales = " ".join("-" if v is None else f"{v:.3g}" for v in record["by_scale"])
        return f"loss {record['loss']:.4f}, {key} by scale {scales} | {record['img_s']} img/s"


def plot(run):
    """Draw RUN/log.png: eps error per scale and per quarter of t, layout fidelity of the patches drawn on the way."""
    if not (run / "log.jsonl").exists():
        raise UserError(f"no log at {run / 'log.jsonl'}: give the run folder of a training, --plot=out/toy")
    try:
        import matplotlib
    except ImportError as err:
        raise UserError("--plot needs matplotlib: pip install -e '.[plot]'") from err
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    loss = [r for r in read_lines(run / "log.jsonl") if r["stage"] == "ldm"]
    drawn = read_lines(run / "samples/layout.jsonl")
    fig, axes = plt.subplots(1, 3, figsize=(15, 4))
    for ax, mine, key, name in ((axes[0], loss, "by_scale", "scale"), (axes[1], loss, "by_t", "quarter of t"),
                                (axes[2], drawn, "layout", "scale")):
        for i in range(len(mine[0][key]) if mine else 0):
            ax.plot([r["step"] for r in mine], [r[key][i] for r in mine], label=f"{name} {i}")
        ax.set(xlabel="step", ylabel="mean squared error of eps", yscale="log")
        ax.legend(fontsize="small")
    axes[2].set(ylabel="layout fidelity of drawn patches", yscale="linear")
    fig.tight_layout()
    with atomic(run / "log.png") as tmp:
        fig.savefig(tmp, format="png", dpi=80)
    print(f"wrote {run / 'log.png'}")
