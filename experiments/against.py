"""This checkout against an older one: time, counted FLOPs and quality, in turn, in one run on one machine.

    python -m experiments.speed against ../old --part=large      # large images, an hour on two cores
    python -m experiments.speed against ../old --part=patches    # patches and --eval, two hours
    python -m experiments.speed against ../old --part=demo       # what `make demo` runs, under an hour

Each checkout runs its own public commands, with the same Python, weights, data and threads. Both write into a temporary
folder of links, so neither is touched. Seconds are medians; FLOPs are counted in a run of their own.

in:  the folder of an older checkout   out: a table     read next: counted.py
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from common import UserError, at_least, configure, one_of
from data import Pyramids
from experiments.cost import full_size
from experiments.metrics import psnr, seam_ratio, similarity
from experiments.quality import Ruler, crops, held_out
from sample_joint import Resize

HERE = Path(__file__).resolve().parent.parent
RUN = ("ema.safetensors",)    # what both read of a run; no proxy, so each fits its own

@dataclass
class Config:
    old: str = ""               # folder of the older checkout
    part: str = "large"         # large, patches or demo
    run: str = ""               # run folder that both can read, default OLD/out/toy (large, patches)
    data: str = ""              # its data, default OLD/data/toy
    size: tuple = (512, 1024)   # large: pixels a side
    n: int = 0                  # large: images of 512 pixels (0 = 4), half as many of 1024; else: patches a scale
    kind: str = "toy"           # demo: the preset of train.py
    rounds: int = 3             # at least
    threads: int = 2

# ----- 1. Commands of two checkouts, in turn -----

class Checkout:
    """Commands of one checkout, run in a folder of links to its files. Attribute: home, where they write."""

    def __init__(self, root, home, cfg):
        self.home, self.threads = home, cfg.threads
        home.mkdir()
        for path in root.iterdir():
            if path.name not in ("out", "data", "run") and not path.name.startswith("."):
                (home / path.name).symlink_to(path)
        if cfg.run:
            (home / "run").mkdir()
            for name in RUN:
                shutil.copy(Path(cfg.run) / name, home / "run")

    def run(self, *command):
        """out: what it printed, seconds by the clock, seconds of CPU. raises: UserError if it fails."""
        began, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        done = subprocess.run([sys.executable, *command], cwd=self.home, env=env, capture_output=True, text=True)
        after, seconds = getrusage(RUSAGE_CHILDREN), time.perf_counter() - began
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "rror" in line] or ["it does not say why"]
            raise UserError(f"{' '.join(command)} failed in the {self.home.name} checkout: {errors[-1]}")
        return done.stdout, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def count(self, *command):
        """out: TFLOP of a command, and what the rows that its networks saw would take at full size."""
        out, *_ = self.run(str(HERE / "experiments/counted.py"), *command)
        counted = json.loads(out.splitlines()[-1])
        full = sum(rows * full_size()[name] for name, rows in counted["rows"].items())
        return counted["flops"] / 1e12, full / 1e12

def measure(title, sides, jobs, times):
    """Run jobs(side, n) -> {name: command}, n = 0 ... times - 1, of both sides in turn, and once more to count; print
    medians."""
    spent = {}                                                          # {(name, column): [of the older, of this]}
    for n in range(times + 1):
        for k, side in enumerate(sides):
            for name, command in jobs(side, n).items():
                if n < times:
                    columns = zip(("seconds", "CPU seconds"), side.run(*command)[1:])
                else:
                    columns = zip(("TFLOP", "TFLOP at full size"), side.count(*command))
                for column, value in columns:
                    spent.setdefault((name, column), ([], []))[k].append(value)
    rows = {key: [median(v or [0]) for v in values] for key, values in spent.items()}
    if len({name for name, _ in rows}) > 1:
        for column in dict.fromkeys(column for _, column in spent):
            parts = [values for key, values in rows.items() if key[1] == column]
            rows["all", column] = [sum(values) for values in zip(*parts)]
    print(HEAD.format(title, "ratio"))
    for (name, column), (old, new) in rows.items():
        if max(old, new) > 0:
            print(f"{f'{name}, {column}':>34}{old:>14.4g}{new:>14.4g}{new / old if old else math.inf:>14.3f}")

HEAD = "\n{:>34}         older          this{:>14}"

def compare(title, old, new):
    """Print two tables {column: [of each image] or (value, standard error or None)}, and their differences."""
    print(HEAD.format(title, "difference"))
    for name, a in old.items():
        b = new[name]
        if isinstance(a, list):                                         # image by image, so that errors are of pairs
            lists = a, b, np.subtract(b, a).tolist()
            values = [(mean(v), stdev(v) / len(v) ** 0.5 if len(v) > 1 else None) for v in lists]
        else:
            values = a, b, (b[0] - a[0], None if None in (a[1], b[1]) else math.hypot(a[1], b[1]))
        told = (f"{value:.3f}" + ("" if error is None else f"±{error:.2g}") for value, error in values)
        print(f"{name:>34}", *(f" {text:>13}" for text in told), sep="", flush=True)

# ----- 2. The parts -----

def read(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0)[None] / 127.5 - 1   # (1,3,H,W)

def judge(ruler, context, real, drawn):
    """Columns of large images, as `compare` takes them. in: real images, and pairs of an image and the coarse view it
    was drawn with."""
    images, A, (features, _, like) = [x for x, _ in drawn], Resize(2 ** context), ruler.spaces["desc"]
    near, own = ([like(features(crops(x, ruler.P))) for x in some] for some in (images, real))
    row = ruler.measure(images)
    return {"A(image) to context, dB": [psnr(A.down(x).clamp(-1, 1), view) for x, view in drawn],
            "similarity of crops": [similarity(*pair) for pair in zip(near, own)],
            "seams": [seam_ratio(x, ruler.P) for x in images],
            "deviation, over the real one's": [float(x.std() / y.std()) for x, y in zip(images, real)],
            "distance of crops": (row["crops_desc"], row["crops_desc_se"]),
            "distance of views": (row["views_desc"], row["views_desc_se"])}

def large(cfg, sides, pyramids, real):
    """Default large images of one size, held against real ones (n). The very first is timed apart: it fits a proxy."""
    size, n = real[0].shape[-1], len(real)
    context = (size // pyramids.patch).bit_length() - 1

    def draw(side, k):
        return {"an image": ["sample_joint.py", "run", f"--data={cfg.data}", f"--size={size}", f"--context={context}",
                             f"--slide={k % n}", f"--threads={cfg.threads}", f"--out={size}_{k}.png"]}
    first = [side.run(*draw(side, 0)["an image"])[1] for side in sides]
    title = f"{n} of {size} x {size} pixels"
    print(f"\n{title}; the very first, and what is fitted before it: {first[0]:.0f} s, {first[1]:.0f} s")
    measure(title, sides, draw, max(cfg.rounds, n))
    drawn = [[[read(side.home / f"{size}_{k}{view}.png") for view in ("", f"_scale{context}")] for k in range(n)]
             for side in sides]
    ruler = Ruler(pyramids, context, real)
    compare("", *(judge(ruler, context, real, images) for images in drawn))

def evaluated(sides, folder):
    """Print the tables of --eval: layout fidelity, similarity and distance of descriptors, by scale."""
    keys = {"layout": "layout", "similarity": "sim_desc", "distance": "dist_desc_fake"}
    tables = [{f"scale {row['scale']}, {name}": row[key] if isinstance(row[key], list) else [row[key], None]
               for row in json.loads((side.home / folder / "eval.json").read_text())["rows"]
               for name, key in keys.items()} for side in sides]
    compare("", *({name: tuple(value) for name, value in table.items()} for table in tables))

def patches(cfg, sides):
    """`sample_joint.py RUN`, and with --eval its table."""
    command = ["sample_joint.py", "run", f"--data={cfg.data}", f"--threads={cfg.threads}"]
    command += [f"--n={cfg.n}"] * bool(cfg.n)
    measure("patches", sides, lambda side, n: {"patches": command, "--eval": [*command, "--eval"]}, cfg.rounds)
    evaluated(sides, "run/eval")

def demo(cfg, sides):
    """What `make demo` runs once all is installed, as the Makefile of each checkout says; data is made before."""
    def stages(side, n):
        shutil.rmtree(side.home / "out", ignore_errors=True)            # each round begins anew
        found = {}
        for line in re.findall(r"^\t\$\(RUN\) (\w+\.py.*)", (side.home / "Makefile").read_text(), re.M):
            command = [*re.sub(r"\btoy\b", cfg.kind, line).split(), f"--threads={cfg.threads}"]
            if "toy" not in line:
                found |= {"first pictures": command} if cfg.kind == "toy" else {}   # from shipped weights
            elif "train.py" in line:
                found |= {"VAE": [*command, "--steps=0"], "latents, U-Net": command}
            else:
                found |= {"evaluation": command + [f"--n={cfg.n}"] * bool(cfg.n)}
        return found
    for side in sides:
        side.run("train.py", cfg.kind, "--vae_weights=", "--steps=0", "--vae_steps=1", "--out=none")  # makes data
    measure("make demo", sides, stages, cfg.rounds)
    evaluated(sides, f"out/{cfg.kind}/eval")

# ----- 3. The command -----

def check(cfg):
    """Hold all that is asked for against what there is. out: folder of the older checkout, data, {size: real images}.
    raises: UserError."""
    one_of(cfg, part=("large", "patches", "demo"))
    at_least(cfg, n=0, rounds=1, threads=1)
    root, real = Path(cfg.old).resolve(), {}
    if not cfg.old or not all((root / name).is_file() for name in ("train.py", "sample_joint.py", "Makefile")):
        raise UserError(f"{cfg.old or 'no folder'} is no checkout of this project: write python -m experiments.speed "
                        f"against ../old, after git worktree add ../old COMMIT")
    if cfg.part == "demo":
        cfg.run = ""
        return root, None, real
    cfg.run, cfg.data = (str(Path(given or root / usual).resolve())
                         for given, usual in ((cfg.run, "out/toy"), (cfg.data, "data/toy")))
    if lacks := [name for name in RUN if not Path(cfg.run, name).is_file()]:
        raise UserError(f"{cfg.run} lacks {', '.join(lacks)}: give a run that both can read with --run=")
    pyramids = Pyramids(cfg.data)
    for size in cfg.size if cfg.part == "large" else ():
        if size not in [pyramids.patch * 2 ** k for k in range(1, pyramids.scales)] or type(size) is not int:
            raise UserError(f"--size={size}: give 2, 4, ... {2 ** pyramids.scales // 2} times {pyramids.patch} pixels")
        n = max((cfg.n or 4) * 512 // max(size, 512), 1)
        real[size] = [held_out(pyramids, k, size)[1] for k in range(n)]
    return root, pyramids, real

def main(argv):
    cfg = configure(Config, argv, words=("old",), doc=__doc__)
    root, pyramids, real = check(cfg)
    with TemporaryDirectory() as folder:
        sides = [Checkout(path, Path(folder, name), cfg) for name, path in (("older", root), ("this", HERE))]
        for images in real.values():
            large(cfg, sides, pyramids, images)
        if not real:
            {"patches": patches, "demo": demo}[cfg.part](cfg, sides)
