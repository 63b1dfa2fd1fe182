"""Shared by all tests: the repository on the path, threads that do not spin, equal random numbers, a tiny run."""
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

# before torch starts its threads: a spinning thread on a busy 2-core machine has made a step ten times slower; one a
# process, for two processes of pytest-xdist inherit what the first one sets
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402

# torch and our modules are imported where they are used: pytest-xdist's first process needs none, and all wait for it

@pytest.fixture(autouse=True)
def seeded():
    """Each test begins with the same random numbers; its --threads are not those of the tests and fixtures after it."""
    import torch
    torch.manual_seed(0)
    yield
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# one thread: runs are compared bit by bit, whatever a test before them left
TINY = ["smoke", "--vae_steps=8", "--steps=6", "--batch=4", "--vae_batch=4", "--save_every=3", "--log_every=1",
        "--sample_every=6", "--summarizer.width=32", "--unet.width=16", "--amp=False", "--device=cpu", "--threads=1"]

def quick(args):
    """train.main, but sheets of two patches a scale and two steps, where nothing hangs on what they show."""
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SHEET", {"n": 2, "steps": 2})
        train.main(args)

def vae_of(run, out):
    """The option that takes the VAE of `run`. Its latents go along, for `out` would get the very same."""
    shutil.copytree(run / "latents", out / "latents")
    return f"--vae_weights={run}"

def log(out, stage="ldm"):
    """The log of a training."""
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if r["stage"] == stage]

# ----- Made once for all processes of pytest-xdist: tests only read these -----

@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): the folder that make(folder) has filled, here or in the other process, for which it waits."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        folder, made = base / name, base / f"{name}.made"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                make(folder)
                made.touch()
        return folder
    return folder_of

@pytest.fixture(scope="session")
def toy(once):
    """A tiny pyramid set: 6 + 2 slides of 256 px, three scales."""
    import data
    return once("toy", lambda out: data.main(
        ["toy", f"--out={out}", "--slides=6", "--test=2", "--size=256", "--workers=1"]))

@pytest.fixture(scope="session")
def pyramids(toy):
    from data import Pyramids
    return Pyramids(toy)

@pytest.fixture(scope="session")
def run(toy, once):
    """One uninterrupted training."""
    return once("run", lambda out: quick([*TINY, f"--data={toy}", f"--out={out}"]))

@pytest.fixture(scope="session")
def cnn(toy, run, once):
    """The same with the CNN Summarizer, on the VAE of `run`."""
    args = [*TINY, "--summarizer=cnn", f"--data={toy}"]
    return once("cnn", lambda out: quick([*args, f"--out={out}", vae_of(run, out)]))

@pytest.fixture(scope="session")
def conditioned(toy, run, once):
    """A copy of the tiny run with all conditioning models, the grid's told by captions with made-up vectors."""
    return once("conditioned", lambda out: condition(toy, run, out))

def condition(toy, run, folder):
    import torch
    from cdm_runs import go, new_home
    from text import captions
    new_home(run, folder)
    captions.main(["toy", str(toy), f"--out={folder}", "--n=2", "--heldout=3", "--tiles=4"])
    for name in ("captions", "heldout"):
        texts = [c.text for c in captions.read_lines(folder / f"{name}.tsv")]
        v = torch.stack([torch.tensor([len(t) / 50, t.count("a") / 5, t.count("t") / 5]) for t in texts])
        captions.save_vectors(folder / f"{name}.safetensors", texts, v, "letters")
    told = f"--captions={folder}/captions.tsv", f"--vectors={folder}/captions.safetensors"
    for kind, more in (("cdm", ()), ("edm", ()), ("grid", told)):
        go(folder, kind, "--steps=3", "--sheet=0", *more)

@pytest.fixture(scope="session")
def task(once):
    """Eight slides of the task, and a run folder whose networks were never trained, but whose layers all act."""
    return once("eight", slides_and_run)

def slides_and_run(out):
    import torch

    import data
    from diffusion import ZoomLDM
    from summarizer import Summarizer, SummarizerConfig
    from unet import UNet, UNetConfig
    from zoom_vae import VQVAE, VAEConfig
    data.main(["toy", "--task", f"--out={out / 'task'}", "--slides=8", "--scales=3", "--workers=1"])
    torch.manual_seed(0)
    vae, unet = VQVAE(VAEConfig(4, (1, 1, 1), 1, 16, groups=2)), UNet(UNetConfig(8, (1, 2), 1, (2,), 16, groups=4))
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    info = {"encoder": "stats", "std": [0.5] * 96, "patch": 64, "data": str(out / "task")}
    ZoomLDM(vae, Summarizer(SummarizerConfig(96, 16, 1, 16, 3)), unet, 0.5, info=info).save(out / "run")

@pytest.fixture(scope="module")
def ready(run, tmp_path_factory):
    """A copy of the tiny run, without a proxy. Its U-Net is shaken, for after six steps it hardly hears conditions."""
    import torch

    from diffusion import ZoomLDM
    folder, model = tmp_path_factory.mktemp("ready"), ZoomLDM.from_run(run)
    g = torch.Generator().manual_seed(0)
    for p in model.unet.parameters():
        p += 0.1 * torch.randn(p.shape, generator=g)
    model.save(folder)
    return folder

@pytest.fixture(scope="module")
def model(ready):
    from diffusion import ZoomLDM
    return ZoomLDM.from_run(ready)

