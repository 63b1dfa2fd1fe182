"""Check what you wrote for a lab: each function passed, or failed and why, in one sentence.

    python -m labs.check 2                     labs/lab2.py, against closed forms and the core
    python -m labs.check 2 --file=mine.py      another file
    python -m labs.check 2 --core              the core's own functions in its place

Exit code 0 if all pass, and then a picture of your own work; else 1. Theory: labs/lab2.md
"""
import faulthandler
import inspect
import io
import json
import os
import re
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
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

def signature(fn):
    """None for what does not tell, as a function written in C."""
    try:
        return inspect.signature(fn)
    except ValueError:
        return None

def call(fn, args, file):
    """out: what fn returns, the line of its return. raises: Fault."""
    plain = inspect.unwrap(fn)
    code = getattr(plain, "__code__", None)
    lines = [code.co_firstlineno if code else 0]
    try:
        if takes := signature(fn):
            takes.bind(*args)
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

def parts(x):
    """The numbers in x, of all that a list, a tuple or a network holds: tensors in float64."""
    if isinstance(x, torch.nn.Module):
        x = [*x.state_dict().values()]
    if isinstance(x, list | tuple):
        return [part for one in x for part in parts(one)]
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x.copy())
    return [torch.as_tensor(x).detach().double()] if isinstance(x, torch.Tensor | int | float) else []

def learns(x):
    """Whether gradients pass through each part of it."""
    return [getattr(part, "requires_grad", False) for part in (x if isinstance(x, tuple) else [x])]

def close(got, want, tol):
    """Where numbers agree: a tensor of bool."""
    room = tol * max(1.0, want.nan_to_num().abs().max().item())
    return ((got - want).abs() <= room) | (got == want) | (got.isnan() & want.isnan())

def equal(got, want, tol):
    if kind(got) != kind(want) or learns(got) != learns(want):
        return False
    some, others = parts(got), parts(want)
    return len(some) == len(others) and all(close(a, b, tol).all() for a, b in zip(some, others))

def guesses(want, a, b):
    """What is often there in the place of `want`: pairs (what is wrong, what then comes out). b is one of its numbers,
    a is what stands there."""
    yield "it is all zeros", 0 * want
    yield "the sign is turned round", -want
    yield "it is clipped to [-1,1]", want.clamp(-1, 1)
    yield "it is clipped to [0,1]", want.clamp(0, 1)
    yield "these are the squares of what is wanted", want.square()
    yield "these are the roots of what is wanted", want.sqrt()
    yield "this is 1 less what is wanted", 1 - want
    if want.numel() > 1:
        yield f"everything is {a / b if b else 0:.4g} times what it should be", a / b * want if b else want
        yield f"everything is {abs(a - b):.4g} too {'large' if a > b else 'small'}", want + (a - b)
    for axis in range(want.ndim):
        yield f"axis {axis} is turned round", want.flip(axis)
        yield f"along axis {axis} all stands a place too late", want.roll(1, axis)
        yield f"along axis {axis} all stands a place too early", want.roll(-1, axis)
    if want.ndim > 1 and want.shape[-1] == want.shape[-2]:
        yield "rows and columns are swapped", want.mT

def where(wrong):
    """On which axis the wrong numbers keep to some places."""
    for axis, size in enumerate(wrong.shape):
        at = wrong.movedim(axis, 0).reshape(size, -1).any(1).nonzero()[:, 0].tolist()
        if len(at) < min(size, 5):
            return f", all at {', '.join(map(str, at))} of axis {axis}"
    return ""

def difference(got, want, tol):
    """What is wrong with a result: its kind; or what its numbers are instead; else where most."""
    if kind(got) != kind(want):
        return f"it returns {kind(got)}, wanted {kind(want)}"
    both = [*zip(parts(got), parts(want))]
    wrong = [n for n, (a, b) in enumerate(both) if not close(a, b, tol).all()]
    if not wrong:
        lost = "no gradients pass through it: is there a detach, or no_grad?"
        return lost if any(learns(want)) else "it still has gradients: detach it"
    got, want = both[wrong[0]]
    error = torch.nan_to_num((got - want).abs(), torch.inf)
    worst = error.argmax().item()
    a, b = got.flatten()[worst].item(), want.flatten()[worst].item()
    unlike = ~close(got, want, tol)
    text = f"{unlike.sum()} of {got.numel()} numbers differ{where(unlike)}"
    guess = next((guess for guess, there in guesses(want, a, b) if close(got, there, tol).all()), "")
    if not got.isfinite().all():
        text = "numbers are not finite"
    elif guess:
        text = guess
    elif close(got.flatten().sort()[0], want.flatten().sort()[0], tol).all():
        text = "the numbers are right, but in another order (a view where a permute is needed?)"
    elif error.max() < 0.01 * want.abs().max():
        text += " by little (is it rounded, or float32 or float16 in between?)"
    at = [n.item() for n in np.unravel_index(worst, want.shape)]
    which = f" of result {wrong[0]}" if len(both) > 1 else ""
    digits = 4 if f"{a:.4g}" != f"{b:.4g}" else 9
    return f"{text}: at {at}{which} wanted {b:.{digits}g}, got {a:.{digits}g}"

def wanted(name, task):
    """What the core makes of each case."""
    return [getattr(core, name)(*make()) for make in task.cases.values()]

def judge(name, task, module, file, wants=None):
    """Try all cases of a function. out: nothing if it passes; else what is wrong, and in which line."""
    fn, own = getattr(module, name, None), getattr(core, name)
    if not callable(fn):
        near = get_close_matches(name, [other for other in vars(module) if not hasattr(core, other)], 1)
        return f"the file has no function {name}" + (f", but {near[0]}: the name must be the same" if near else "")
    names = [*inspect.signature(own).parameters]
    mine = [*signature(fn).parameters] if signature(fn) else names
    if mine != names and sorted(mine) == sorted(names):
        return f"its arguments are in another order: they come as {', '.join(names)}"
    faults, tried, failed = [], [], []
    for (label, make), want in zip(task.cases.items(), wants or wanted(name, task)):
        torch.set_default_dtype(torch.float32)              # whatever a student's file has set
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        args = make()
        try:
            got, line = call(fn, args, file)
            written = [names[n] for n, x in enumerate(make()) if not equal(args[n], x, 0)]
            if written:
                return said(Fault(f"it writes into its argument {written[0]}: make a new one", line), file)
            tried.append((got, make))
            if equal(got, want, task.tol):
                continue
            if kind(got) == kind(want) and not equal(got, call(fn, make(), file)[0], 0):
                return said(Fault(f"with {label}, the same arguments give something else the second time: does it draw "
                                  "its own random numbers, or keep something between calls?", line), file)
            failed.append((got, make))
            faults.append(Fault(f"with {label}, {difference(got, want, task.tol)}", line))
        except Fault as fault:
            if fault.text.startswith("it stops"):
                fault.text = f"with {label}, {fault.text}"
            faults.append(fault)
    faulthandler.cancel_dump_traceback_later()              # nothing of the student's runs from here on
    partly = ""                                             # what explains the first failure, if nothing explains all
    for sentence, mistake in task.known() if failed else ():
        if agree(mistake, own, failed[:1], task.tol):
            if agree(mistake, own, tried, task.tol):
                return said(Fault(sentence, faults[0].line), file)
            partly = partly or sentence
    if partly:
        faults[0].text = partly
    return said(faults[0], file) if faults else ""

def agree(mistake, own, results, tol):
    """Whether a mistake explains what came out."""
    return all(equal(got, mistake(own, *make()), tol) for got, make in results)

def said(fault, file):
    return f"{fault.text} ({Path(file).name}, line {fault.line})" if fault.line else fault.text

# ----- 3. A process that may hang or die, and one that waits for it -----

class Short(io.TextIOBase):
    """What a student's file prints, the first characters of it: a loop may print for ever."""
    room = 2000

    def write(self, text):
        if self.room > 0:
            sys.__stdout__.write(text[:self.room])
            self.room -= len(text)
            if self.room <= 0:
                sys.__stdout__.write("\n  ... what it prints from here on is not shown\n")
                sys.__stdout__.flush()          # before it may be killed
        return len(text)

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
    wants = {name: wanted(name, task) for name, task in tasks.items()}      # while torch is as it was
    if sys.platform == "linux":
        import resource
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        room = 2 ** 33 if most == resource.RLIM_INFINITY else min(2 ** 33, most)
        resource.setrlimit(resource.RLIMIT_DATA, (room, most))              # a list that grows would take all memory
    with open(folder / "stack", "w") as stack:
        faulthandler.enable(stack)
        def limit(times=1):
            faulthandler.dump_traceback_later(times * cfg.seconds, exit=True, file=stack)
        limit()
        try:
            with redirect_stdout(Short()):
                module = core if cfg.core else load(cfg.file)
            note(folder, "import", "", False)
        except Fault as fault:
            tasks = {}
            note(folder, "import", said(fault, cfg.file))
        for name in [name for name in tasks if name not in read(folder)]:
            limit()
            try:
                with redirect_stdout(Short()):
                    why = judge(name, tasks[name], module, cfg.file, wants[name])
            except Exception as err:
                why = f"it cannot be judged ({type(err).__name__}): does it return something odd, or change torch?"
            note(folder, name, why)
        if not any(read(folder).values()):
            limit(10)
            why = picture(cfg, module)
            note(folder, "picture", why, why)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
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
    stack = (folder / "stack").read_text()
    places = re.findall(r'File "(.*)", line (\d+)', stack)
    lines = [int(line) for file, line in places if Path(file).name == Path(cfg.file).name]
    why = f"it ended Python (code {code})"
    if stack.startswith("Timeout"):     # whatever the code: a loop that runs on may crash what writes down its lines
        why = f"it did not end within {cfg.seconds:g} s: does a loop end?"
    elif code < 0:
        why += ": a recursion without end, or no memory left?"
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
    if not Path(cfg.file).is_file() or Path(cfg.file).suffix == ".ipynb":
        raise UserError(f"--file={cfg.file}: there is no such file of Python (no folder, no notebook)")
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
    os._exit(0)                                             # a thread that a student's file began would go on
