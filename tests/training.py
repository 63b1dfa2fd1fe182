"""A training of milliseconds a step, and processes to run trainings in: what the fault tests kill and damage."""
import os
import random
import signal
import socket
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401 - the first optimiser imports it, in two seconds: once here, for all that are forked
import torch.nn as nn
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train  # noqa: E402
from common import UserError, cli, generator, load_tensors, setup  # noqa: E402
from experiments.workshop import BatchNorm  # noqa: E402
from train import run_stage  # noqa: E402

BATCH, STEPS = 4, 40

class Numbers(Dataset):
    """Item k: four numbers that depend on k alone; the items `bad` are not finite."""

    def __init__(self, bad=()):
        self.bad = bad

    def __len__(self):
        return 1000

    def __getitem__(self, k):
        x = torch.randn(4, generator=generator(1, k))
        return {"x": x * float("nan") if k in self.bad else x, "s": k % 3, "k": k}

class Stage(nn.Module):
    """Turn four numbers round. Writes what it saw to OUT/seen unless it is quiet: step, then samples.

    No bias before the batch norm: its gradient is rounding alone, of which Adam makes whole steps.
    """
    scales = 3

    def __init__(self, out, at=None, pause=0.0, norm=True):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16, bias=False), nn.Linear(16, 4)
        self.norm = BatchNorm(16, affine=False) if norm else nn.Identity()
        self.out, self.at, self.pause, self.quiet = Path(out), at or {}, pause, False

    def noise(self, step):
        self.step = step
        if step in self.at:
            self.at[step]()
        time.sleep(self.pause)
        return {"eps": torch.randn(BATCH, 4, generator=generator(2, step))}

    def forward(self, batch):
        if not self.quiet:
            fd = os.open(self.out / "seen", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.write(fd, f"{self.step} {' '.join(map(str, batch['k'].tolist()))}\n".encode())
            os.close(fd)
        h = self.norm(self.first(batch["x"] + 0.1 * batch["eps"])[:, :, None, None])[:, :, 0, 0]
        loss = (self.last(h.tanh()) - batch["x"].flip(1)).square().mean(1)                  # (B,)
        return loss.mean(), {"loss": loss.detach(), "eps": loss.detach(), "s": batch["s"]}

    def after_step(self, step, ranks):
        pass

    def report(self):
        return {}

def tiny(out, at=None, pause=0.0, bad=(), norm=True, **more):
    """Train Stage in this process, or go on with it. at: {step: function called when it begins}; norm: with statistics
    over a batch, through which one bad sample spoils the loss of all."""
    Path(out).mkdir(exist_ok=True)
    loop = train.LoopConfig(save_every=5, log_every=5, sample_every=1000, **more)
    cfg = train.Config(out=str(out), device="cpu", amp=False, threads=1, loop=loop)
    cfg.optim.warmup = 0
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    torch.manual_seed(0)
    run_stage("", cfg, ranks, Stage(out, at, pause, norm), Numbers(bad), STEPS, BATCH, 0.01, 0.9)
    if ranks.world > 1:
        torch.distributed.destroy_process_group()

def seen(out):
    """{step: the samples of its last life, sorted}, of all ranks together."""
    lines = [list(map(int, line.split())) for line in (Path(out) / "seen").read_text().splitlines()]
    return {s: sorted({k for step, *ks in lines for k in ks if step == s}) for s in {line[0] for line in lines}}

# ----- Processes: forked from one that has imported everything, so that each costs no more than it does -----

def child(env, text, function, args, more):
    os.setsid()  # a process group of its own, as a cluster's job has
    os.environ.update(env)
    fd = os.open(text, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.manual_seed(0)
    cli(lambda argv: function(*args, **more))

def forkserver(method=""):
    """The context of such processes."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    context = get_context("forkserver")
    context.set_forkserver_preload(["training"])
    return context

def start(folder, function, *args, ranks=1, **more):
    """Run function(*args, **more) in as many processes; what they print goes to folder/text. out: the processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    started = [forkserver().Process(target=child, args=(env | {"RANK": str(r), "LOCAL_RANK": str(r)}, f"{folder}/text",
                                                        function, args, more)) for r in range(ranks)]
    for p in started:
        p.start()
    return started

def codes(processes, seconds=120):
    """Their exit codes, once all have ended."""
    for p in processes:
        p.join(seconds)
    return [p.exitcode for p in processes]

def step_of(path):
    """The step of a state file, 0 if there is none yet, or it is just being renamed."""
    try:
        return load_tensors(path)[1]["step"]
    except (UserError, RuntimeError):
        return 0

def wait_for(path, step, processes=(), seconds=300):
    """Until the state file at `path`, which these processes write, is of this step or a later one."""
    end = time.time() + seconds
    while step_of(path) < step:
        assert time.time() < end, f"no step {step} in {path} after {seconds} s"
        assert not processes or any(p.is_alive() for p in processes), f"ended before step {step} of {path}"
        time.sleep(0.01)

def same(a, b, atol=0.0):
    """Two safetensors files hold the same tensors, bit by bit, or to rounding."""
    (a, _), (b, _) = load_tensors(a), load_tensors(b)
    return a.keys() == b.keys() and all(torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=atol) for k in a)

def damage(path, rng: random.Random, how):
    """What a power cut or a failing disk does to a file: cut it short, or flip one bit of one byte."""
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw))
    if how == "flip":
        raw[at] ^= 1 << rng.randrange(8)
    path.write_bytes(raw[:at] if how == "cut" else raw)

def by_launcher(out, ranks, restarts):
    """`tiny` as torchrun runs it. The second rank kills itself at step 12 of its first life."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    plan = LaunchConfig(1, 1, ranks, run_id="tiny", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                        monitor_interval=0.1, max_restarts=restarts, start_method="fork")
    elastic_launch(plan, dies_once)(str(out))

def dies_once(out):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
    tiny(out, {12: lambda: os.kill(os.getpid(), signal.SIGKILL)} if first else None)
