"""The log of a training: losses by scale and time step, and how well the hardware is used; its plot, a profile.

out: log.jsonl, a line of JSON per --log_every steps; OUT/profile.txt by --profile=N; RUN/log.png
run: python train.py --plot=out/toy draws the log      read next: loop.py
"""
import copy
import functools
import json
import math
import resource
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import UserError, atomic, write_text

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
