"""Check what you wrote for a lab: each function passed, or failed and why, in one sentence.

    python -m labs.check 2                     labs/lab2.py, against closed forms and the core
    python -m labs.check 2 --file=mine.py      another file
    python -m labs.check 2 --core              the core's own functions in its place

Exit code 0 if all pass, and then a picture of your own work; else 1. Theory: labs/lab2.md
"""
import faulthandler
import inspect
import json
import os
import re
import subprocess
import sys
import traceback
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from common import UserError, cli, configure, save_grid
from labs import core
from labs.cases import LABS

@dataclass
class Config:
    lab: str = ""           # 1, 2, 3 or 4
    file: str = ""          # what to check; default labs/labN.py
    core: bool = False      # the core's own functions in its place
    run: str = ""           # a trained run, such as out/toy, for what only it can show (labs 2 and 4)
    out: str = ""           # the picture; default out/labN.png
    seconds: float = 20.0   # that one function may take
    inside: str = ""        # the folder of the process that waits; the command sets it

class Fault(Exception):
    """What is wrong, in one sentence, and in which line of the student's file (0: not known)."""

    def __init__(self, text, line=0):
        super().__init__(text)
        self.text, self.line = text, line

# ----- 1. Run what a student wrote, and say where it stops -----

def line_of(err, file):
    """The last line of `file` that an exception came through, 0 if none."""
    if isinstance(err, SyntaxError):
        return err.lineno or 0
    places = traceback.extract_tb(err.__traceback__)
    return max([0, *(place.lineno for place in places if place.filename == file)][-1:])

def told(err):
    """An exception in one line."""
    text = " ".join(str(getattr(err, "msg", err)).split())  # msg is without the line, which is told anyway
    return f"{type(err).__name__}: {text[:160]}" if text else type(err).__name__

class Fresh(SourceFileLoader):
    """Reads the file itself, never what Python kept of it: that is told apart by seconds and length alone."""

    def get_code(self, name):
        return self.source_to_code(self.get_data(self.path), self.path)

def load(file):
    """The student's file as a module. raises: Fault."""
    loader = Fresh("student", file)
    module = module_from_spec(spec_from_loader("student", loader))
    sys.modules["student"] = module
    try:
        loader.exec_module(module)
    except BaseException as err:
        raise Fault(f"the file does not import: {told(err)}", line_of(err, file)) from err
    return module

def call(fn, args, file):
    """out: what fn returns, the line of its return. raises: Fault."""
    plain = inspect.unwrap(fn)
    code = getattr(plain, "__code__", None)
    lines = [code.co_firstlineno if code else 0]
    try:
        inspect.signature(fn).bind(*args)
    except TypeError as err:
        raise Fault(f"it cannot take the {len(args)} arguments that it is given: {err}", lines[0]) from err

    def watch(frame, event, arg):
        if event == "return" and frame.f_code is code:
            lines.append(frame.f_lineno)

    try:
        sys.setprofile(watch)
        out = fn(*args)
    except BaseException as err:
        own = traceback.extract_tb(err.__traceback__)[-1].filename == file
        stub = isinstance(err, NotImplementedError) and own                 # torch raises it, too
        why = f"not written yet: {err}" if stub else f"it stops with {told(err)}"
        raise Fault(why, line_of(err, file) or lines[0]) from err
    finally:
        sys.setprofile(None)
    return out, lines[-1]

# ----- 2. Compare it with what is wanted -----

def kind(x):
    """What x is, in words: its type, dtype and shape; of a list, what it holds."""
    if isinstance(x, torch.Tensor | np.ndarray):
        what = "numpy array" if isinstance(x, np.ndarray) else "tensor" if x.is_cpu else f"tensor on {x.device}"
        return f"a {str(x.dtype).removeprefix('torch.')} {what} {tuple(x.shape)}"
    if isinstance(x, tuple):
        return f"({', '.join(map(kind, x))})"
    if isinstance(x, list):
        return f"the list {x}"[:100] if {*map(type, x)} <= {int} else f"a list of {', '.join(map(kind, x))}"[:200]
    return "None (is a return missing?)" if x is None else f"a {type(x).__name__}"

def learns(x):
    """Whether gradients pass through each part of it."""
    return [getattr(part, "requires_grad", False) for part in (x if isinstance(x, tuple) else [x])]

def pairs(got, want):
    """The numbers of two things of one kind, side by side, in float64."""
    for a, b in zip(got, want) if isinstance(want, tuple) else [(got, want)]:
        if not isinstance(b, list):
            yield torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()

def close(got, want, tol):
    """Where numbers agree: a tensor of bool."""
    room = tol * max(1.0, want.nan_to_num().abs().max().item())
    return ((got - want).abs() <= room) | (got.isnan() & want.isnan())

def equal(got, want, tol):
    alike = kind(got) == kind(want) and learns(got) == learns(want)
    return alike and all(close(a, b, tol).all() for a, b in pairs(got, want))

def difference(got, want, tol):
    """What is wrong with a result: its kind; or its numbers' sign, a factor, a term, their order; else where most."""
    if kind(got) != kind(want):
        return f"it returns {kind(got)}, wanted {kind(want)}"
    wrong = [(a, b) for a, b in pairs(got, want) if not close(a, b, tol).all()]
    if not wrong:
        lost = "no gradients pass through it: is there a detach, or no_grad?"
        return lost if any(learns(want)) else "it still has gradients: detach it"
    got, want = wrong[0]
    error = torch.nan_to_num((got - want).abs(), torch.inf)
    worst = error.argmax().item()
    a, b = got.flatten()[worst].item(), want.flatten()[worst].item()
    ratio, term = a / b if b else 0.0, a - b
    if not got.isfinite().all():
        text = "numbers are not finite"
    elif not got.any():
        text = "it is all zeros"
    elif close(-got, want, tol).all():
        text = "the sign is turned round"
    elif got.numel() > 1 and close(got, ratio * want, tol).all():
        text = f"everything is {ratio:.4g} times what it should be"
    elif got.numel() > 1 and close(got - term, want, tol).all():
        text = f"everything is {abs(term):.4g} too {'large' if term > 0 else 'small'}"
    elif close(got.flatten().sort()[0], want.flatten().sort()[0], tol).all():
        text = "the numbers are right, but in another order"
    else:
        text = f"{(~close(got, want, tol)).sum()} of {got.numel()} numbers differ"
    at = [n.item() for n in np.unravel_index(worst, want.shape)]
    return f"{text}: at {at} wanted {b:.4g}, got {a:.4g}"

def judge(name, task, module, file):
    """Try all cases of a function. out: nothing if it passes; else what is wrong, and in which line."""
    fn, own = getattr(module, name, None), getattr(core, name)
    if not callable(fn):
        return f"the file has no function {name}"
    faults, tried, failed = [], [], []
    for label, make in task.cases.items():
        torch.set_default_dtype(torch.float32)              # whatever a student's file has set
        torch.set_grad_enabled(True)
        want, args = own(*make()), make()
        try:
            got, line = call(fn, args, file)
        except Fault as fault:
            if fault.text.startswith("it stops"):
                fault.text = f"with {label}, {fault.text}"
            faults.append(fault)
            continue
        written = [n for n, x in enumerate(make()) if hasattr(x, "shape") and not equal(args[n], x, 0)]
        if written:
            what = [*inspect.signature(own).parameters][written[0]]
            return said(Fault(f"it writes into its argument {what}: make a new one", line), file)
        tried.append((got, make))
        if not equal(got, want, task.tol):
            failed.append((got, make))
            faults.append(Fault(f"with {label}, {difference(got, want, task.tol)}", line))
    for some in (tried, failed[:1]) if failed else ():      # which known mistake explains all of it, or its beginning?
        for sentence, mistake in task.mistakes.items():
            if all(equal(got, mistake(own, *make()), task.tol) for got, make in some):
                return said(Fault(sentence, faults[0].line), file)
    return said(faults[0], file) if faults else ""

def said(fault, file):
    return f"{fault.text} ({Path(file).name}, line {fault.line})" if fault.line else fault.text

# ----- 3. A process that may hang or die, and one that waits for it -----

def read(folder):
    """What is known by now: {name: why it fails, or nothing}."""
    path = folder / "record"
    return dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}

def note(folder, name, why, shown=True):
    """Say how a step went, and write it down, for the next process goes on from there."""
    verdict = f"failed: {why}" if why and not why.startswith("not written") else why or "passed"
    if shown:
        print(f"  {name:<16}{verdict}", flush=True)
    with open(folder / "record", "a") as f:
        f.write(json.dumps([name, why]) + "\n")

def work(cfg):
    """Check from where an earlier process ended."""
    folder, tasks = Path(cfg.inside), LABS[cfg.lab]
    torch.set_num_threads(1)                                # for small tensors more are slower
    with open(folder / "stack", "w") as stack:
        def limit(times=1):
            faulthandler.dump_traceback_later(times * cfg.seconds, exit=True, file=stack)
        limit()
        try:
            module = core if cfg.core else load(cfg.file)
            note(folder, "import", "", False)
        except Fault as fault:
            tasks = {}
            note(folder, "import", said(fault, cfg.file))
        for name in [name for name in tasks if name not in read(folder)]:
            limit()
            note(folder, name, judge(name, tasks[name], module, cfg.file))
        if not any(read(folder).values()):
            limit(10)
            why = picture(cfg, module)
            note(folder, "picture", why, why)
        faulthandler.cancel_dump_traceback_later()
    note(folder, "end", "", False)

def picture(cfg, module):
    """Draw what the functions do together. out: "" or why not."""
    from labs import pictures
    try:
        rows, names, text = getattr(pictures, f"lab{cfg.lab}")(module, cfg.run)
        save_grid(cfg.out, rows, names)
    except BaseException as err:
        return said(Fault(f"the cases pass, but drawing stops with {told(err)}", line_of(err, cfg.file)), cfg.file)
    more = "; --run=out/toy would add patches of a trained run (make demo)" if cfg.lab in "24" and not cfg.run else ""
    print(f"  wrote {cfg.out}: {text}{more}", flush=True)
    return ""

def died(code, folder, cfg):
    """Why a process ended too early, and in which line of the student's file."""
    places = re.findall(r'File "(.*)", line (\d+)', (folder / "stack").read_text())
    lines = [int(line) for file, line in places if Path(file).name == Path(cfg.file).name]
    why = f"it did not end within {cfg.seconds:g} s: does a loop end?" if places else f"it ended Python (code {code})"
    return said(Fault(why, [*lines, 0][0]), cfg.file)

def supervise(cfg):
    """Check in another process, which is begun anew after a function that hangs. out: {name: why}."""
    options = [f"--{key}={value}" for key, value in vars(cfg).items() if key not in ("lab", "inside")]
    quiet = os.environ | {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    with TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "labs.check", cfg.lab, *options, f"--inside={folder}"]
        while True:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, env=quiet).returncode
            done = read(folder)
            if "end" in done:
                return done
            step = next(step for step in ("import", *LABS[cfg.lab], "picture") if step not in done)
            note(folder, step, died(code, folder, cfg))
            if step in ("import", "picture"):
                return read(folder)

def main(argv):
    cfg = configure(Config, argv, words=("lab",), doc=__doc__)
    if cfg.lab not in LABS:
        raise UserError(f"got lab {cfg.lab!r}: write python -m labs.check 1, or 2, 3, 4")
    if cfg.inside:
        return work(cfg)
    cfg.file = core.__file__ if cfg.core else cfg.file or str(Path(__file__).with_name(f"lab{cfg.lab}.py"))
    cfg.out = cfg.out or f"out/lab{cfg.lab}.png"
    if not Path(cfg.file).is_file():
        raise UserError(f"--file={cfg.file}: there is no such file")
    if cfg.run and not Path(cfg.run).exists():
        raise UserError(f"--run={cfg.run}: there is no such run: train one with make demo, or leave the option out")
    if not cfg.seconds > 0:
        raise UserError(f"--seconds={cfg.seconds}: it must be above 0")
    print(f"lab {cfg.lab}: {cfg.file}", flush=True)
    done = supervise(cfg)
    good = [name for name in LABS[cfg.lab] if done.get(name) == ""]
    later = "" if "picture" in done else "; the picture comes when all do"
    print(f"{len(good)} of {len(LABS[cfg.lab])} pass{later}")
    if later or done["picture"]:
        sys.exit(1)

if __name__ == "__main__":
    cli(main)
