"""Shared by all tests: the repository on the path, threads that do not spin, equal random numbers, a tiny run."""
import os
import shutil
import sys
from pathlib import Path

# before torch starts its threads: a spinning thread on a busy 2-core machine has made a step ten times slower
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402

THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)

@pytest.fixture(autouse=True)
def seeded():
    """Each test begins with the same random numbers; its --threads are not those of the tests and fixtures after it."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)

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

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A tiny pyramid set: 6 + 2 slides of 256 px, three scales."""
    import data
    folder = tmp_path_factory.mktemp("toy") / "data"
    data.main(["toy", f"--out={folder}", "--slides=6", "--test=2", "--size=256", "--workers=1"])
    return folder

@pytest.fixture(scope="session")
def pyramids(toy):
    from data import Pyramids
    return Pyramids(toy)

@pytest.fixture(scope="session")
def run(toy, tmp_path_factory):
    """One uninterrupted training."""
    out = tmp_path_factory.mktemp("run") / "a"
    quick([*TINY, f"--data={toy}", f"--out={out}"])
    return out

@pytest.fixture(scope="session")
def cnn(toy, run, tmp_path_factory):
    """The same with the CNN Summarizer, on the VAE of `run`."""
    out = tmp_path_factory.mktemp("run") / "cnn"
    quick([*TINY, "--summarizer=cnn", f"--data={toy}", f"--out={out}", vae_of(run, out)])
    return out

@pytest.fixture(scope="session")
def conditioned(run, toy, tmp_path_factory):
    """A copy of the tiny run with all conditioning models, the grid's told by captions with made-up vectors."""
    from cdm_runs import go, new_home
    from text import captions
    folder = new_home(run, tmp_path_factory.mktemp("conditioned") / "run")
    captions.main(["toy", str(toy), f"--out={folder}", "--n=2", "--heldout=3", "--tiles=4"])
    for name in ("captions", "heldout"):
        texts = [c.text for c in captions.read_lines(folder / f"{name}.tsv")]
        v = torch.stack([torch.tensor([len(t) / 50, t.count("a") / 5, t.count("t") / 5]) for t in texts])
        captions.save_vectors(folder / f"{name}.safetensors", texts, v, "letters")
    told = f"--captions={folder}/captions.tsv", f"--vectors={folder}/captions.safetensors"
    for kind, more in (("cdm", ()), ("edm", ()), ("grid", told)):
        go(folder, kind, "--steps=3", "--sheet=0", *more)
    return folder

@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """Eight slides of the task, and a run folder whose networks were never trained, but whose layers all act."""
    import data
    from diffusion import ZoomLDM
    from summarizer import Summarizer, SummarizerConfig
    from unet import UNet, UNetConfig
    from zoom_vae import VQVAE, VAEConfig
    out = tmp_path_factory.mktemp("task")
    data.main(["toy", "--task", f"--out={out / 'task'}", "--slides=8", "--scales=3", "--workers=1"])
    torch.manual_seed(0)
    vae, unet = VQVAE(VAEConfig(4, (1, 1, 1), 1, 16, groups=2)), UNet(UNetConfig(8, (1, 2), 1, (2,), 16, groups=4))
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    info = {"encoder": "stats", "std": [0.5] * 96, "patch": 64, "data": str(out / "task")}
    ZoomLDM(vae, Summarizer(SummarizerConfig(96, 16, 1, 16, 3)), unet, 0.5, info=info).save(out / "run")
    return out

@pytest.fixture(scope="module")
def ready(run, tmp_path_factory):
    """A copy of the tiny run, without a proxy. Its U-Net is shaken, for after six steps it hardly hears conditions."""
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

@pytest.fixture(scope="session")
def root():
    return ROOT
