"""Trainings that are killed, starved, damaged, poisoned, or spread over ranks, in real processes."""
import json
import os
import random
import resource
import signal
from functools import partial

import pytest
import torch
from conftest import log
from safetensors.torch import save_file
from training import BATCH, STEPS, by_launcher, codes, damage, same, seen, start, step_of, tiny, wait_for

import common as state
import train as loop
from common import UserError, load_tensors
from train import Config

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to."""
    tiny(out := tmp_path_factory.mktemp("whole"))
    return out

def test_nothing_happens(whole):
    """It learns, sees every sample once, in order, and its log says how fast."""
    rows = log(whole)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and [r["step"] for r in rows] == list(range(5, STEPS + 1, 5))
    assert seen(whole) == {s: list(range(s * BATCH, (s + 1) * BATCH)) for s in range(STEPS)}
    assert all(row["img_s"] > 0 for row in rows)
    assert sorted(p.name for p in whole.glob("state*")) == ["state.1.safetensors", "state.safetensors"]
    assert (step_of(whole / "state.safetensors"), step_of(whole / "state.1.safetensors")) == (STEPS, STEPS - 5)

def test_sigkill(whole, tmp_path):
    """Twice, at any moment. Catches: a generator or an order that hangs on the start, a moment not saved."""
    path, rng = tmp_path / "state.safetensors", random.Random(0)
    for wanted in (5, 20):
        process = start(tmp_path, tiny, tmp_path, pause=0.01)
        wait_for(path, wanted, process)
        process[0].join(rng.random() * 0.05)
        os.kill(process[0].pid, signal.SIGKILL)
        assert codes(process) == [-signal.SIGKILL]
    tiny(tmp_path)
    assert same(whole / "state.safetensors", path) and seen(tmp_path) == seen(whole)
    assert [r | {"img_s": 0} for r in log(tmp_path)] == [r | {"img_s": 0} for r in log(whole)]

def test_sigterm_to_all_processes_of_a_job(whole, tmp_path):
    """As clusters send it: also to the data loading process, which must not take the training with it."""
    path = tmp_path / "state.safetensors"
    process = start(tmp_path, tiny, tmp_path, pause=0.01, workers=1)
    wait_for(path, 5, process)
    os.killpg(process[0].pid, signal.SIGTERM)
    assert codes(process) == [0]
    assert f"SIGTERM: saved step {step_of(path)} of {STEPS}" in (tmp_path / "text").read_text()
    assert 5 <= step_of(path) < STEPS
    tiny(tmp_path)
    assert same(whole / "state.safetensors", path)

def test_sigterm_to_one_of_two_ranks(whole, tmp_path):
    """Both stop after the same step, and one rank goes on where two were. Catches: ranks that wait for each other for
    ever, samples that are lost or come twice."""
    path = tmp_path / "state.safetensors"
    processes = start(tmp_path, tiny, tmp_path, pause=0.01, ranks=2)
    wait_for(path, 5, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert codes(processes) == [0, 0]
    assert 5 <= step_of(path) < STEPS
    tiny(tmp_path)
    assert seen(tmp_path) == seen(whole)
    assert same(whole / "state.safetensors", path, 1e-4)
    for a, b in zip(log(whole)[-3:], log(tmp_path)[-3:], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-6)

def test_torchrun_restarts_what_a_killed_worker_stopped(whole, tmp_path):
    """The code of torchrun --max-restarts=1: two ranks, one of which is killed at step 12."""
    assert codes(start(tmp_path, by_launcher, tmp_path, 2, 1)) == [0], (tmp_path / "text").read_text()[-2000:]
    lines = (tmp_path / "seen").read_text().splitlines()
    assert sum(line.startswith("11 ") for line in lines) == 4  # step 11 once in each life, of two ranks
    assert sum(line.startswith("9 ") for line in lines) == 2   # what was saved at 10 is not done again
    assert seen(tmp_path) == seen(whole) and same(whole / "state.safetensors", tmp_path / "state.safetensors", 1e-4)

def test_full_disk(whole, tmp_path):
    """A limit on the size of files, so that the save at step 10 fails. The one of step 5 stays; one sentence."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4000, 4000))
    assert codes(start(tmp_path, tiny, tmp_path, {7: limit})) == [2]
    text = (tmp_path / "text").read_text()
    assert "error: could not write" in text and "the earlier file is untouched" in text and "Traceback" not in text
    assert [p.name for p in tmp_path.glob("*state*")] == ["state.safetensors"]
    assert step_of(tmp_path / "state.safetensors") == 5
    tiny(tmp_path)
    assert same(whole / "state.safetensors", tmp_path / "state.safetensors")

@pytest.mark.parametrize("how", ["cut", "flip", "lost", "half", "old"])
def test_damaged_checkpoint(whole, tmp_path, how, capsys):
    """Falls back to the one before, says so, ends the same; the damaged one never takes the place of a whole one. One
    from before checksums resumes, unchecked."""
    def stop():
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path, {18: stop})
    path = tmp_path / "state.safetensors"
    assert (step_of(path), step_of(tmp_path / "state.1.safetensors")) == (15, 10)
    if how == "lost":    # killed between the two renamings of a save
        path.unlink()
    elif how == "half":  # killed while it wrote: nothing is lost
        (tmp_path / ".state.safetensors.99.tmp").write_bytes(path.read_bytes()[:2000])
    elif how == "old":
        tensors, meta = load_tensors(path)
        del meta["crc"]
        save_file(tensors, path, {"json": json.dumps(meta)})
    else:
        damage(path, random.Random(3), how)
    capsys.readouterr()
    tiny(tmp_path)
    said = capsys.readouterr().out
    assert ("falling back to" in said and "state.1.safetensors, step 10" in said) == (how not in ("half", "old"))
    assert {"cut": "not a complete", "flip": "damaged", "lost": "no file"}.get(how, "") in said
    assert (tmp_path / "state.safetensors.damaged").exists() == (how in ("cut", "flip"))
    assert same(whole / "state.safetensors", path)
    assert same(whole / "state.1.safetensors", tmp_path / "state.1.safetensors")

def test_every_flipped_bit_is_noticed(whole, tmp_path):
    """In the header as in the tensors; a whole file passes. And days of work are not begun again in silence."""
    path, rng = tmp_path / "state.safetensors", random.Random(0)
    raw = (whole / "state.safetensors").read_bytes()
    path.write_bytes(raw)
    assert state.newest_state(path)[2]["step"] == STEPS
    for _ in range(50):
        path.write_bytes(raw)
        damage(path, rng, "flip")
        with pytest.raises(UserError, match="no checkpoint is whole"):
            state.newest_state(path)
    state.previous(path).write_bytes(raw[:1000])
    with pytest.raises(UserError, match="no checkpoint is whole: .*state.saf.*state.1.*remove them to start afresh"):
        tiny(tmp_path)

def test_resuming_lets_go_of_the_file(tmp_path):
    """What training goes on with is no view of the checkpoint: wiping that changes nothing. Otherwise a checkpoint that
    was removed holds its disk space until the training ends."""
    file, cfg, net = tmp_path / "state.safetensors", Config(), torch.nn.Linear(64, 64)
    opt, ema = torch.optim.AdamW(net.parameters()), {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.ones(1, 64)).sum().backward()
    opt.step()
    state.save_state(file, cfg, 7, net, ema, opt)
    assert state.resume(file, cfg, net, ema, opt, None) == 7
    tensors = [*net.parameters(), *ema.values(), *(v for s in opt.state.values() for v in s.values())]
    then = [v.detach().clone() for v in tensors]
    with open(file, "r+b") as f:
        f.write(bytes(file.stat().st_size))
    assert len(then) == 2 + 2 + 6 and all(a.equal(b) for a, b in zip(then, tensors))

def test_sample_that_is_not_finite_is_named(tmp_path):
    """Step 12, of samples 44 to 47; nothing of it is saved, and what stands resumes. Not indices within a batch."""
    with pytest.raises(UserError, match=r"the ldm loss is no longer finite at step 12, on samples 45, 47 of the data"):
        tiny(tmp_path, bad=(45, 47), norm=False)
    assert step_of(tmp_path / "state.safetensors") == 10
    tiny(tmp_path, norm=False)
    tiny(tmp_path / "good", norm=False)
    assert same(tmp_path / "good/state.safetensors", tmp_path / "state.safetensors")

@pytest.mark.parametrize("how", [{"ranks": 2}, {"workers": 1}])
def test_all_stop_where_a_sample_is_not_finite(tmp_path, how):
    """Both ranks name it; the data loading process, which hears no SIGTERM, does not keep the training from ending."""
    assert 2 in codes(start(tmp_path, tiny, tmp_path, bad=(47,), norm=False, **how))
    assert (tmp_path / "text").read_text().count("finite at step 12, on samples 47 of") == how.get("ranks", 1)

def test_gradient_that_is_not_finite(tmp_path, monkeypatch):
    """The loss is finite, and a gradient names no sample: all of the step are named."""
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(params, most):
        calls.append(1)
        if len(calls) == 7:
            params[0].grad[0, 0] = float("inf")
        return real(params, most)
    monkeypatch.setattr(loop.torch.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(UserError, match=r"gradient is no longer finite at step 7, on samples 24, 25, 26, 27 of"):
        tiny(tmp_path)
    assert step_of(tmp_path / "state.safetensors") == 5

def test_a_batch_that_does_not_divide(tmp_path):
    with pytest.raises(UserError, match="change --batch or --micro"):
        tiny(tmp_path, micro=3)
