"""common.py: command lines, files that survive a failed write, exit codes, devices, pictures."""
import os
import pickle
import random
import signal
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image

from common import UserError, atomic, checksum, cli, configure, generator, load_tensors, open_tensors, resume
from common import save_grid, save_state, save_tensors, setup, to_uint8, write_text

# ----- 1. Command lines -----

@dataclass
class Net:
    width: int = 32  # a comment that --help must show
    mult: tuple = (1, 2)

@dataclass
class Side:
    width: int = 3
    kind: str = "right"

@dataclass
class Config:
    preset: str = "toy"
    out: str = ""
    lr: float = 1e-3
    steps: int = 10
    amp: bool = True
    only: int | None = None
    net: Net = field(default_factory=Net)
    side: Side = field(default_factory=Side)

PRESETS = {"toy": {}, "smoke": {"steps": 3, "net.width": 8, "side": "left"}}

def parse(*argv):
    return configure(Config, list(argv), PRESETS, words=("preset",), doc="What it does.")

@pytest.mark.parametrize("arg, name, value", [
    ("--lr=1", "lr", 1.0), ("--lr=3e-4", "lr", 3e-4), ("--steps=7", "steps", 7),
    ("--amp=False", "amp", False), ("--amp", "amp", True),
    ("--only=4", "only", 4), ("--only=None", "only", None), ("--out=12", "out", "12"),
    ("--out=a=b", "out", "a=b"), ("--out=", "out", ""),
    ("--net.width=64", "net", Net(64)), ("--net.mult=(1,2,4)", "net", Net(32, (1, 2, 4))), ("--steps=4", "net", Net()),
    ("--net.mult=1,2", "net", Net()), ("--net.mult=[3]", "net", Net(32, (3,))), ("--net.mult=3", "net", Net(32, (3,))),
    ("--mult=3,4", "net", Net(32, (3, 4))), ("--kind=up", "side", Side(3, "up")),  # one group alone has the key
    ("--side=up", "side", Side(3, "up")), ("--side=12", "side", Side(3, "12")),    # a word for a group is its kind
    ("smoke", "side", Side(3, "left")), ("smoke", "steps", 3), ("smoke", "preset", "smoke"),
    ("--preset=smoke", "steps", 3), ("toy", "steps", 10),
    ("smoke --steps=5", "steps", 5), ("--steps=5 smoke", "steps", 5)])             # options count more than presets
def test_values(arg, name, value):
    """Catches: a value of another type, one run that leaks into the next, a preset that is passed over."""
    found = getattr(parse(*arg.split()), name)
    assert found == value and type(found) is type(value)

@pytest.mark.parametrize("argv, says", [
    (["--stepz=3"], "unknown option --stepz; did you mean 'steps'"),
    (["--net.widht=3"], "did you mean 'width'"), (["--mutl=3"], "did you mean 'mult'"),
    (["--width=3"], "unknown option --width"),  # of which of both?
    (["--net=3"], "unknown option --kind; known here: width, mult"),
    (["--side"], "--kind=True: expected str"), (["--side.knid=up"], "did you mean 'kind'"),
    (["--steps.x=3"], "unknown option --steps.x"),
    (["--steps=many"], "--steps=many: expected int, got str"), (["--steps=1e3"], "--steps=1000.0: expected int"),
    (["--lr=1e999"], "--lr=inf: expected float, got infinity"),
    (["--steps=True"], "expected int, got bool"), (["--amp=1"], "expected bool, got int"),
    (["--lr"], "--lr=True: expected float, got bool"), (["--only=x"], r"expected int \| None, got str"),
    (["--net.mult=(1,x)"], "expected numbers with commas"), (["--net.mult"], "expected numbers with commas"),
    (["--preset=smok"], "unknown preset 'smok'"),
    (["smok"], "unknown preset 'smok': known are toy, smoke; did you mean 'smoke'"),
    (["toy", "smoke"], "unexpected word 'smoke': options are written --key=value")])
def test_mistakes_on_the_command_line(argv, says):
    with pytest.raises(UserError, match=says):
        parse(*argv)

def test_help_shows_the_settings_with_their_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out = capsys.readouterr().out
    assert not stop.value.code
    assert "What it does." in out and "lr: float = 1e-3" in out and "a comment that --help must show" in out

def test_exit_codes(monkeypatch, capsys):
    """A user's mistake is one sentence and 2; ours is not dressed up as theirs."""
    def code(main, *argv, doc=""):
        monkeypatch.setattr(sys, "argv", ["x.py", *argv])
        with pytest.raises(SystemExit) as stop:
            cli(main, doc)
        return stop.value.code, *capsys.readouterr()

    def fails(err):
        def main(argv):
            raise err
        return main
    assert code(lambda argv: fails(UserError(f"got {argv}"))(argv), "--a") == (2, "", "error: got ['--a']\n")
    worker = UserError("Caught UserError in DataLoader worker.\nTraceback\ncommon.UserError: no file a")
    assert code(fails(worker)) == (2, "", "error: no file a\n")
    assert code(fails(KeyboardInterrupt()))[0] == 130
    assert code(fails(ValueError("ours")), "-h", doc="\nA text.\n") == (None, "A text.\n", "")
    with pytest.raises(ValueError, match="ours"):
        code(fails(ValueError("ours")))

@pytest.fixture
def sigterm():
    """What a SIGTERM does is afterwards as it was."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)

def test_a_sigterm_is_taken_as_ctrl_c(sigterm, monkeypatch, capsys):
    """One sentence that says what is true then. But torchrun ends its processes itself, at once."""
    with pytest.raises(SystemExit) as stop:
        cli(sigterm, stopped="all is kept")
    assert stop.value.code == 130 and capsys.readouterr().err == "\ninterrupted; all is kept\n"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setenv("RANK", "0")
    cli(lambda argv: None)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

def test_a_sigterm_while_samples_are_drawn(sigterm, capsys):
    """One process leaves at once, with what is saved; of several, the others would wait: the drawing is finished."""
    heard, drawn = [], []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(True))                    # as the loop of a training does

    def draw(step, weights):
        sigterm()
        drawn.append((step, weights))
    one = setup("cpu", amp=False)
    with pytest.raises(SystemExit) as stop:
        one.show(draw, 7, "w")
    assert not stop.value.code and "saved step 7, whose samples are not drawn" in capsys.readouterr().out
    assert not drawn and not heard
    signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    replace(one, world=2).show(draw, 7, "w")
    assert drawn == [(7, "w")] and heard

@pytest.mark.parametrize("argv, doc", [([], ""), (["--help"], ""), (["--help"], "a text")])
def test_a_reader_that_has_gone(monkeypatch, argv, doc):
    """`python x.py | head`, with help or without. Catches: a BrokenPipeError at the end of the process."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(f"at once with {code}"))
    monkeypatch.setattr(sys, "argv", ["x.py", *argv])
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    with pytest.raises(SystemExit) as stop:
        cli(lambda argv: configure(Net, argv) and print("text"), doc)
    assert stop.value.code == "at once with 0"
    with pytest.raises(BrokenPipeError):
        sys.stdout.close()

# ----- 2. Files -----

def test_tensors_and_meta_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
    save_tensors(tmp_path / "new" / "x.safetensors", tensors, {"step": 3, "list": [1, 2.5, None, "x"]})
    found, meta = load_tensors(tmp_path / "new" / "x.safetensors")
    assert meta == {"step": 3, "list": [1, 2.5, None, "x"]}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert os.listdir(tmp_path / "new") == ["x.safetensors"]

def test_a_failed_write_keeps_the_old_file(tmp_path):
    """Whatever fails, and a real limit of 20 kB, at which the system stops each writer half-way as on a full disk."""
    path = tmp_path / "x.txt"
    write_text(path, "the earlier file")
    with pytest.raises(ZeroDivisionError), atomic(path) as tmp:
        tmp.write_text("new")
        raise ZeroDivisionError
    with pytest.raises(UserError, match="could not write .*permissions$"):  # and no word of an earlier file
        write_text(path / "below_a_file", "x")
    resource = pytest.importorskip("resource", reason="needs Unix's limit on the size of a file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (lambda: save_tensors(path, {"a": torch.zeros(300_000)}), lambda: write_text(path, "{}" * 99_999),
                  lambda: save_grid(path, [torch.rand(2, 3, 128, 128)])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with pytest.raises(UserError, match="could not .*File too large.*earlier file is untouched"):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "the earlier file" and os.listdir(tmp_path) == ["x.txt"]

def test_files_that_are_no_safetensors(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="no file .*: check the path"):
            load_tensors(path)
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(1000)})
    whole = path.read_bytes()
    for raw in (*(whole[:size] for size in (0, 4, 40, len(whole) // 2, len(whole) - 1)), pickle.dumps({"a": 1})):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="not a complete safetensors file"):
            open_tensors(path)

# ----- 3. Devices and ranks -----

def test_generator_has_a_stream_for_each_key():
    """Catches: keys that are spread over 32 bits, where steps 37736 and 39320 had the same noise. The numbers are
    those of another MT19937, Python's; torch makes its floats of 24 bits."""
    def draw(*key):
        return torch.rand(2000, generator=generator(*key)).tolist()
    keys = ((0, 2, 37736), (0, 2, 39320), (0,), (1,), (1, 2), (2, 1), (1, 2, 0), (12,), (2**32, 1), (0, 1), (2**70,),
            (0, "a", 1), (0, "b", 1))
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(1, np.int64(2)) == draw(1, 2)
    python = random.Random("0 2 5")
    assert draw(0, 2, 5) == [python.getrandbits(32) % 2**24 / 2**24 for _ in range(2000)]

def test_resume_says_that_generators_were_others(tmp_path, capsys):
    """A checkpoint of before has no mark; the training goes on, and does not do so in silence."""
    net, path, ranks = torch.nn.Linear(2, 1), tmp_path / "state.safetensors", setup("cpu", amp=False)
    opt = torch.optim.AdamW(net.parameters())
    for mark, says in (({"streams": "of whole keys"}, ""), ({}, f"{path} is of an earlier version: it goes on")):
        save_state(path, Config(), 3, net, None, opt)
        tensors, meta = load_tensors(path)
        crc = meta.pop("crc")
        assert meta.pop("streams") and crc == checksum(tensors, meta | {"streams": "of whole keys"})
        meta |= mark
        save_tensors(path, tensors, meta | {"crc": checksum(tensors, meta)})
        assert resume(path, Config(), net, None, opt, ranks) == 3
        out = capsys.readouterr().out
        assert out.startswith(says) and bool(out) == bool(says)

def test_setup_alone_and_on_a_missing_device():
    ranks = setup("cpu", amp=False)
    assert (ranks.rank, ranks.world, ranks.device.type, ranks.amp) == (0, 1, "cpu", None)
    with ranks.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device={device} cannot be used"):
            setup(device)
    with pytest.raises(UserError, match="--threads=-1: it must be at least 0"):
        setup("cpu", threads=-1)

# ----- 4. Seeing -----

def test_pixels_and_contact_sheets(tmp_path):
    """Catches: levels that are rounded down; a sheet without its labels."""
    x = torch.cat([torch.tensor([-2.0, 0.0, 2.0]), torch.arange(256) / 127.5 - 1])
    assert to_uint8(x.expand(3, 1, -1))[0, :, 0].tolist() == [0, 128, 255, *range(256)]
    rows = [torch.zeros(3, 3, 8, 10), torch.ones(2, 3, 8, 10)]
    for name, labels in (("new/plain.png", None), ("wide.png", ["s = 0 real", "made"])):
        save_grid(tmp_path / name, rows, labels=labels)
    plain, wide = (np.asarray(Image.open(tmp_path / name)) for name in ("new/plain.png", "wide.png"))
    assert plain.shape == (2 * 10 + 2, 3 * 12 + 2, 3)
    assert (plain[2:10, 2:12] == 128).all() and (plain[0] == 255).all()
    assert wide.shape[0] == 2 * 10 + 2 and wide.shape[1] > 3 * 12 and wide[:, :60].min() < 50  # the label
