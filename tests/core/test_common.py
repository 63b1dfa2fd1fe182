"""common.py: command lines, files that survive a failed write, foreign checkpoints, exit codes, pictures."""
import errno
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
from common import (
    UserError,
    atomic,
    cli,
    configure,
    generator,
    load_tensors,
    open_tensors,
    save_grid,
    save_tensors,
    setup,
    summary,
    to_uint8,
    write_text,
)
from slides.weights import load_official, load_state_dict

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
    ("--out=a=b", "out", "a=b"), ("--out=", "out", "")])
def test_values(arg, name, value):
    found = getattr(parse(arg), name)
    assert found == value and type(found) is type(value)


def test_nested_values_and_tuples():
    cfg = parse("--net.width=64", "--net.mult=(1,2,4)")
    assert cfg.net == Net(64, (1, 2, 4)) and parse().net == Net()  # one run does not leak into the next
    assert parse("--net.mult=1,2").net.mult == (1, 2)
    assert parse("--net.mult=[3]").net.mult == parse("--net.mult=3").net.mult == (3,)


def test_a_group_may_be_left_out_where_one_alone_has_the_key():
    assert parse("--mult=3,4").net.mult == (3, 4) and parse("--kind=up").side.kind == "up"


def test_a_word_for_nested_settings_is_their_kind():
    """--summarizer=cnn. --net=3 is refused below, for those have none."""
    assert parse("--side=up").side == parse("--side.kind=up").side == Side(3, "up")
    assert parse("--side=12", "--side.width=4").side == Side(4, "12") and parse("smoke").side.kind == "left"


def test_presets_lie_between_defaults_and_options():
    assert (parse("smoke").steps, parse("smoke").net.width, parse("smoke").preset) == (3, 8, "smoke")
    assert parse("smoke", "--steps=5").steps == parse("--steps=5", "smoke").steps == 5
    assert parse("--preset=smoke").steps == 3 and parse().steps == 10


@pytest.mark.parametrize("argv, says", [
    (["--stepz=3"], "unknown option --stepz; did you mean 'steps'"),
    (["--net.widht=3"], "did you mean 'width'"), (["--mutl=3"], "did you mean 'mult'"),
    (["--width=3"], "unknown option --width"),  # of which of both?
    (["--net=3"], "unknown option --kind; known here: width, mult"),
    (["--side"], "--kind=True: expected str"),
    (["--side.knid=up"], "did you mean 'kind'"),
    (["--steps.x=3"], "unknown option --steps.x"),
    (["--steps=many"], "--steps=many: expected int, got str"),
    (["--steps=1e3"], "--steps=1000.0: expected int, got float"),
    (["--steps=True"], "--steps=True: expected int, got bool"),
    (["--amp=1"], "expected bool, got int"),
    (["--lr"], "--lr=True: expected float, got bool"),
    (["--only=x"], r"expected int \| None, got str"),
    (["--net.mult=(1,x)"], "expected numbers with commas"),
    (["--net.mult"], "expected numbers with commas"),
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


def run_python(code, *argv):
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_exit_codes():
    code = ("import sys, os, signal\nfrom common import UserError, cli\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background inherits "ignore"
            "def main(argv):\n"
            "    if argv == ['user']: raise UserError('no such file: give one')\n"
            "    if argv == ['stop']: os.kill(os.getpid(), signal.SIGINT)\n"
            "    if argv == ['bug']: raise ValueError('ours')\n"
            "cli(main)")
    assert run_python(code, "user") == (2, "", "error: no such file: give one\n")
    status, _, err = run_python(code, "stop")
    assert status == 130 and "Traceback" not in err
    status, _, err = run_python(code, "bug")
    assert status == 1 and "Traceback" in err  # a mistake of ours is not dressed up as the user's


def test_cli_in_process(monkeypatch, capsys):
    def main(argv):
        raise UserError(f"got {argv}")
    monkeypatch.setattr(sys, "argv", ["x.py", "--a"])
    with pytest.raises(SystemExit) as stop:
        cli(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: got ['--a']\n"


# ----- 2. Files -----

def leftovers(folder):
    return [p.name for p in Path(folder).iterdir() if p.name.endswith(".tmp")]


def test_tensors_and_meta_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
    save_tensors(tmp_path / "new" / "x.safetensors", tensors, {"step": 3, "list": [1, 2.5, None, "x"]})
    found, meta = load_tensors(tmp_path / "new" / "x.safetensors")
    assert meta == {"step": 3, "list": [1, 2.5, None, "x"]}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert not leftovers(tmp_path / "new")


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(3)})

    def full(tensors, tmp, meta):
        Path(tmp).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(common, "save_file", full)
    with pytest.raises(UserError, match="could not write .*x.safe.*: .*No space left.*file is untouched"):
        save_tensors(path, {"a": torch.zeros(3)})
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(3)) and not leftovers(tmp_path)
    with pytest.raises(UserError, match="No space left.*permissions$"):  # and no word of an earlier file
        save_tensors(tmp_path / "y.safetensors", {"a": torch.zeros(3)})
    assert not (tmp_path / "y.safetensors").exists()


def test_writers_that_meet_a_real_limit(tmp_path):
    """No file may grow past 20 kB here: the system stops each real writer half-way, as a full disk does."""
    resource = pytest.importorskip("resource", reason="needs Unix's limit on the size of a file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in (("x.safetensors", lambda p: save_tensors(p, {"a": torch.zeros(300_000)})),
                        ("x.json", lambda p: write_text(p, "{}" * 99_999)),
                        ("x.png", lambda p: save_grid(p, [torch.rand(2, 3, 128, 128)]))):
        path = tmp_path / name
        path.write_bytes(b"the earlier file")
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with pytest.raises(UserError, match="could not .*File too large.*earlier file is untouched"):
                write(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == b"the earlier file" and not leftovers(tmp_path)


def test_any_failure_inside_atomic_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic(path) as tmp:
        tmp.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and not leftovers(tmp_path)
    with pytest.raises(UserError, match="could not write"):
        write_text(path / "below_a_file", "x")


def test_files_that_are_no_safetensors(tmp_path):
    with pytest.raises(UserError, match="no file .*none: check the path"):
        load_tensors(tmp_path / "none")
    with pytest.raises(UserError, match="no file"):
        load_tensors(tmp_path)
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(1000)})
    whole = path.read_bytes()
    for size in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a complete safetensors file"):
            load_tensors(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_tensors(path)


class Trap:
    """Unpickling this runs code."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, legacy):
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Trap(str(tmp_path / "ran"))}, tmp_path / "bad.ckpt",
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="could run code, so it is refused.*safetensors"):
        load_state_dict(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()


def test_state_dicts(tmp_path):
    state = {"a.weight": torch.randn(40, 50), "a.bias": torch.randn(4)}
    for name, saved in (("x.pt", state), ("x.ckpt", {"state_dict": state, "epoch": 3, "lr": [0.1]})):
        torch.save(saved, tmp_path / name)
        found = load_state_dict(tmp_path / name)
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    save_tensors(tmp_path / "x.safetensors", state)
    assert load_state_dict(tmp_path / "x.safetensors").keys() == state.keys()
    with pytest.raises(UserError, match="no checkpoint at"):
        load_state_dict(tmp_path / "none.pt")
    for name, saved in (("list.pt", [torch.ones(2)]), ("empty.pt", {}), ("plain.pt", {"a": 1})):
        torch.save(saved, tmp_path / name)
        with pytest.raises(UserError, match="no state dict of tensors"):
            load_state_dict(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_cut_short(tmp_path, legacy):
    """At every length: always one clear sentence, never another exception."""
    torch.save({"a": torch.randn(20, 20), "b": torch.arange(9)}, tmp_path / "x.pt",
               _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "x.pt").read_bytes()
    for size in {*range(0, len(whole), 37), 0, 1, 2, len(whole) // 2, len(whole) - 1}:
        (tmp_path / "x.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match="x.pt is damaged or"):
            load_state_dict(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"<html>404</html>")  # what a failed download often is
    with pytest.raises(UserError, match="x.pt"):
        load_state_dict(tmp_path / "x.pt")


def test_official_keys_must_all_be_used():
    def rename(name):
        return "old." + name
    published = {"m.old." + k: torch.full_like(v, 2) for k, v in torch.nn.Linear(3, 2).state_dict().items()}
    net = torch.nn.Linear(3, 2)
    others = {"other.x": torch.ones(1), "m.count": torch.ones(1)}
    load_official(net, published | others, "m.", rename, ignore=("count",))
    assert (net.weight == 2).all() and (net.bias == 2).all()
    before = torch.nn.Linear(3, 2)
    kept = before.weight.clone()
    bad = {"m.old.weight": torch.ones(2, 4), "m.extra": torch.ones(1)}
    with pytest.raises(ValueError) as err:
        load_official(before, bad, "m.", rename)
    for part in ("not a published Linear", "1 missing: m.old.bias", "1 unexpected: m.extra",
                 "1 of another shape: m.old.weight is (2, 4), expected (2, 3)"):
        assert part in str(err.value)
    assert torch.equal(before.weight, kept)  # nothing was loaded by halves
    many = published | {f"m.number{i:02}": torch.ones(1) for i in range(40)}
    with pytest.raises(ValueError, match=r"40 unexpected: m.number00, .*\[\.\.\.\]"):
        load_official(before, many, "m.", rename)


# ----- 3. Devices and ranks -----

def test_generator_depends_on_every_key():
    def draw(*key):
        return torch.rand(4, generator=generator(*key)).tolist()
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in ((0,), (1,), (1, 2), (2, 1), (1, 2, 3), (0, 1))}) == 6


def test_a_negative_seed():
    with pytest.raises(UserError, match=r"seed \(-1, 4\): each number"):
        generator(-1, 4)


def test_setup_alone_and_on_a_missing_device():
    ranks = setup("cpu", amp=False)
    assert (ranks.rank, ranks.world, ranks.device.type, ranks.amp) == (0, 1, "cpu", None)
    with ranks.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device={device} cannot be used"):
            setup(device)


def test_threads_are_not_negative():
    with pytest.raises(UserError, match="--threads=-1: it must be at least 0"):
        setup("cpu", threads=-1)


# ----- 4. Seeing -----

def test_uint8_rounds():
    x = torch.tensor([-2, -1, 0, 1, 2]).float().view(1, 1, 5).expand(3, 1, 5)
    assert to_uint8(x)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256).byte()
    assert torch.equal(to_uint8((levels / 127.5 - 1).view(1, 1, 256).expand(3, 1, 256))[0, :, 0], levels)


def test_contact_sheet(tmp_path):
    rows = [torch.zeros(3, 3, 8, 10), torch.ones(2, 3, 8, 10)]
    save_grid(tmp_path / "new" / "plain.png", rows)
    sheet = np.asarray(Image.open(tmp_path / "new" / "plain.png"))
    assert sheet.shape == (2 * 10 + 2, 3 * 12 + 2, 3)
    assert (sheet[2:10, 2:12] == 128).all() and (sheet[0] == 255).all()
    save_grid(tmp_path / "wide.png", rows, labels=["s = 0 real", "made"])
    wide = Image.open(tmp_path / "wide.png")
    assert wide.height == 2 * 10 + 2 and wide.width > 3 * 12
    assert np.asarray(wide)[:, :60].min() < 50  # the label


def test_summary(capsys):
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    summary(net, torch.zeros(5, 4, device="meta"))
    out = capsys.readouterr().out
    assert "5x8" in out and "5x2" in out and out.splitlines()[-1].split() == ["total", "5x2", "58"]
