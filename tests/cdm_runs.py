"""Shared by the tests of conditioning models: run folders to train in, a quick training, and an exact resume."""
import shutil

import torch

import cdm
from common import load_tensors

def new_home(run, folder):
    """A folder with the model of a tiny run, to train conditioning models in."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "ema.safetensors", folder)
    return folder

def go(folder, kind, *args):
    """Train for six steps, and read what was written."""
    cdm.main(["train", str(folder), "smoke", f"--model={kind}", "--steps=6", "--save_every=3", "--log_every=3",
              "--sample_every=6", "--sheet=1", "--device=cpu", "--threads=1", *args])
    return load_tensors(folder / f"{kind}.safetensors")[0]

def check_resume(kind, home, folder, *args, once=None):
    """Three steps and three more equal six, `once`. A cosine to zero would depend on the number of steps."""
    args = ("--decay=constant", "--sheet=0", *args)
    once = once or go(new_home(home, folder / "once"), kind, *args)
    twice = new_home(home, folder / "twice")
    go(twice, kind, *args, "--steps=3")
    again = go(twice, kind, *args)
    differ = [k for k in once if not torch.equal(once[k], again[k])]
    assert once.keys() == again.keys() and not differ, differ

def stub(made, fn):
    """A network that answers fn(x, t, told)."""
    made.net.forward = fn
    return made.eval()
