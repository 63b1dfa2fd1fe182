"""train.py killed, moved to other ranks, damaged and filled up, for minutes (make torture). tests/whole/test_faults.py
is the quick part. Prints a line per fault, and exits with code 1 if a run did not end as the undisturbed one."""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from training import ROOT, codes, same, start, step_of, wait_for

from common import load_tensors

# the smoke preset, 50 steps, without the sheets of patches, which take most of its time
SMOKE = ["smoke", "--steps=50", "--save_every=5", "--log_every=1", "--sample_every=1000", "--vae_steps=20",
         "--amp=False", "--device=cpu", "--threads=1"]
failed = []


def train(args):
    """train.py in this process, with a sheet of one patch."""
    import train as module
    module.SHEET = {"n": 2, "steps": 1}
    module.main(args)


def check(name, good, more=""):
    print(f"{'ok  ' if good else 'FAIL'} {name} {more}", flush=True)
    if not good:
        failed.append(name)


def losses(out, stage="ldm"):
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in rows if r["stage"] == stage}


def apart(a, b):
    """The largest difference between the losses of two runs, which are logged to 6 digits; inf if steps are missing."""
    a, b = losses(a), losses(b)
    return round(max(abs(a[k] - b[k]) for k in a), 6) if a.keys() == b.keys() else float("inf")


def run(out, *more, ranks=1):
    """To the end, in new processes. out: exit codes."""
    return codes(start(out, train, [*SMOKE, f"--data={out.parent / 'data'}", f"--out={out}", *more], ranks=ranks), 600)


def folder(home, name):
    (home / name).mkdir()
    return home / name


def kills(home, whole, n=20):
    """n SIGKILLs at random moments, of VAE, latents, U-Net and saves alike."""
    out, rng, steps = folder(home, "kills"), random.Random(0), []
    began = time.time()
    run(folder(home, "timed"))
    lasts = time.time() - began
    for _ in range(n):
        process, = start(out, train, [*SMOKE, f"--data={home / 'data'}", f"--out={out}"])
        process.join(rng.uniform(0.05, 0.5) * lasts)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        steps.append((step_of(out / "vae_state.safetensors"), step_of(out / "state.safetensors")))
        if steps[-1][1] >= 40:  # nearly done: from the beginning again
            for file in out.glob("*state*"):
                file.unlink()
            (out / "vae.safetensors").unlink(missing_ok=True)
    check("killed runs end", run(out) == [0], f"saved steps of VAE and U-Net after each kill: {steps}")
    check(f"{n} SIGKILLs, then bit-identical", same(whole / "ema.safetensors", out / "ema.safetensors")
          and same(whole / "state.safetensors", out / "state.safetensors"))
    check("no temporary file is left", not list(out.rglob(".*.tmp")))


def ranks(home, whole):
    """Two ranks by torchrun, which restarts them; then stopped by it, and gone on with as one."""
    vae, base = f"--vae_weights={whole}", folder(home, "base")
    run(base, vae)
    for name in ("killed", "stopped"):
        out = folder(home, name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   "--max-restarts=3", "train.py", *SMOKE, f"--data={home / 'data'}", f"--out={out}", vae]
        text = open(out / "text", "w")
        agent = subprocess.Popen(command, cwd=ROOT, stdout=text, stderr=text)
        wait_for(out / "state.safetensors", 10)
        if name == "killed":
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            check("torchrun restarts a killed worker", agent.wait(600) == 0)
        else:
            agent.send_signal(signal.SIGTERM)
            agent.wait(600)
            check("SIGTERM to torchrun saves", "SIGTERM: saved step" in (out / "text").read_text())
            check("and one process goes on", run(out, vae) == [0])
        worst = apart(base, out)
        check("no sample lost or repeated", worst <= 2e-6, f"losses differ by {worst:.1e}")


def full_disk(home, whole):
    """A file system of its own that fills up; only root can mount one."""
    out = folder(home, "full")
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", out]).returncode:
        return print("skip a disk that is full: mounting one needs root")
    try:
        args = ["--save_every=5", f"--vae_weights={whole}"]
        first = run(out, *args)
        text = (out / "text").read_text() if (out / "text").exists() else ""
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 2**20
        check("full disk: exit code 2, one sentence", first == [2] and "error: could not write" in text and
              "Traceback" not in text, f"{first}, {size:.0f} MiB on it")
        kept = sorted(out.glob("state*.safetensors"))
        for file in kept[1:]:
            file.unlink()
        check("with room again it goes on", bool(kept) and run(out, *args) == [0])
        check("and ends bit-identical", same(home / "base/state.safetensors", out / "state.safetensors"))
    finally:
        subprocess.run(["umount", out])


def main():
    began = time.time()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        import data
        data.main(["toy", f"--out={home / 'data'}", "--slides=6", "--test=2", "--size=256", "--workers=1"])
        whole = folder(home, "whole")
        check("the undisturbed run ends", run(whole) == [0])
        assert load_tensors(whole / "state.safetensors")[1]["step"] == 50
        for part in (kills, ranks, full_disk):
            part(home, whole)
    print(f"{len(failed)} faults, {time.time() - began:.0f} s", *failed, sep="\n  ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
