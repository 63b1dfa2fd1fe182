"""DiT and the CDM: against the published one, drawing, training, and what is refused."""
import argparse
import os
import re
import shutil
import signal

import pytest
import torch
from cdm_runs import check_resume, go, new_home
from rule import assert_close, assert_golden, golden, manifest, state_dict

import cdm
from cdm import Conditioner, DiT, DiTConfig, place_table, respaced, toward_noise
from common import UserError, load_tensors, save_tensors
from data import PatchDataset, Pyramids
from diffusion import Schedule, ZoomLDM, ddim_sample
from slides.keys import load_cdm

TINY = DiTConfig(9, 4, 16, 1, 2, 16, 5)

def published():
    return state_dict("cdm_small") | {"pos_embed": place_table(65, manifest("cdm_small")["x_embedder.bias"][0])}

def tokens_first(x):
    return x.transpose(1, 2)  # published: (B,C,65)

def conditioner(cfg, std=0.3):
    """One whose weights are random, or it would answer zero."""
    made = Conditioner(DiT(cfg))
    for p in made.net.parameters():
        torch.nn.init.normal_(p, std=std)
    return made.eval()

# ----- 1. Against the published CDM -----

def test_dit():
    """catches: exact GELU; the norms' eps; shift and scale swapped; [cos | sin] places; a block without its gate."""
    net, g = DiT.from_official(published(), heads=4), golden("cdm_small")[0]
    assert not net.training and net.cfg.variance
    with torch.no_grad():
        out = net(tokens_first(g["in/x"]), g["in/t"], g["in/y"])
    assert_golden(tokens_first(out), "cdm_small", "out", 2e-5)

def test_sampling():
    """One DDIM step at 1000 and at 200 steps, with and without noise, and a loop of 10. catches: published LDM steps
    (1, 101, ...); an end at alpha_bar[0]; eps kept from another estimate."""
    net, g = DiT.from_official(published(), heads=4).requires_grad_(False), golden("cdm_small")[0]
    schedule = Schedule("cosine")
    y, x, noise = g["in/y"], tokens_first(g["in/x"]), tokens_first(g["in/noise"])
    for name, steps in (("resp10", 10), ("resp200", 200), ("full", 1000)):
        assert respaced(1000, steps) == g[f"out/{name}_timestep_map"].tolist()
    z = ddim_sample(lambda z, t: net(z, t, y), x, schedule, pred="x0", timesteps=respaced(1000, 10), end="clean")
    assert_golden(tokens_first(z), "cdm_small", "resp10_ddim_loop", 2e-5)
    for name, eta, key in (("full", 0.0, "ddim_sample"), ("resp200", 1.0, "ddim_eta1_sample")):
        tau, rows = respaced(1000, 1000 if name == "full" else 200), []
        for k, at in enumerate(g[f"in/{name}_t"].tolist()):  # one step from index `at` to the one before
            one = []
            ddim_sample(lambda z, t, k=k: net(z, t, y[k:k + 1]), x[k:k + 1], schedule, eta=eta, pred="x0",
                        timesteps=tau[at - 1:at + 1], end="clean", noise=[noise[k:k + 1]] * 2,
                        callback=lambda n, t, z, z0_hat, one=one: one.append(z))
            rows.append(one[0])
        assert_golden(tokens_first(torch.cat(rows)), "cdm_small", f"{name}_{key}", 2e-5)

def test_keys():
    """A key that is missing, new or of another shape is named. catches: strict=False."""
    state = published()
    for key in ("pos_embed", "x_embedder.weight", "blocks.2.attn.qkv.bias", "final_layer.linear.bias"):
        for fault in ({k: v for k, v in state.items() if k != key}, state | {key + "_x": torch.zeros(1)},
                      state | {key: torch.zeros(*state[key].shape[:-1], 7)}):
            with pytest.raises(ValueError, match=re.escape(key)):
                DiT.from_official(fault)

def test_checkpoint_file(tmp_path, run):
    """The published file holds model, ema, opt and args, a Namespace. catches: the raw weights; a file refused."""
    state = published()
    torch.save({"model": {k: v * 2 for k, v in state.items()}, "ema": state, "opt": {"state": {}},
                "args": argparse.Namespace(lr=1e-4)}, tmp_path / "cdm.pt")
    made = load_cdm(tmp_path / "cdm.pt", heads=4)
    assert torch.equal(made.net.embed.weight, state["x_embedder.weight"]) and made.kind == "cdm" and made.shift == 1
    assert made.tokens([3, 0], steps=2).shape == (2, 65, 24)
    with pytest.raises(UserError, match="published file makes tokens of another Summarizer"):
        load_cdm(state, ZoomLDM.from_run(run), heads=4)

# ----- 2. Drawing -----

def test_what_it_cannot_draw():
    """catches: an IndexError for a scale; a size that fails somewhere inside."""
    made = Conditioner(DiT(TINY))
    for wrong in ([], [-1, 0], [5]):
        with pytest.raises(UserError, match=r"got scales \[.*0 to 4"):
            made.tokens(wrong)
    for size in ({"heads": 0}, {"depth": 0}, {"mlp": 0}, {"width": 0}, {"width": 18}):
        with pytest.raises(UserError, match=f"{next(iter(size))}="):
            DiT(DiTConfig(**{"tokens": 4, "channels": 2, "width": 16, "depth": 1, "heads": 2, "mlp": 16} | size))

def test_tokens_depend_on_seed_and_place_alone():
    """catches: adaLN without its zero; noise that depends on the batch; scale labels shifted; time or scale unheard."""
    assert not DiT(TINY)(torch.randn(1, 9, 4), torch.tensor([3]), torch.tensor([0])).any()
    made = conditioner(DiTConfig(65, 8, 32, 1, 4, 64, 5))
    a, b = made.tokens([2, 1, 2], seed=1, steps=5), made.tokens([1, 2], seed=1, steps=5, first=1)
    assert_close(a[1:], b, 1e-5)
    assert (a[0] - a[2]).abs().max() > 0.1 and (a[0] - made.tokens([2], seed=2, steps=5)[0]).abs().max() > 0.1
    x, t, s = torch.randn(1, 65, 8), torch.tensor([5]), torch.tensor([1])
    for other in ((t + 300, s), (t, s + 1)):
        assert (made.net(x, *other) - made.net(x, t, s)).abs().max() > 1e-3

def test_times_are_moved_to_noise():
    """Drawing and training alike: half of the times lie beyond 1000 shift / (shift + 1). catches: moved to data; one of
    both not moved; the published model moved."""
    tau = respaced(1000, 50, 9.0)
    assert tau[0] == 0 and tau[-1] == 999 and tau == sorted(set(tau)) and sum(t > 899 for t in tau) == 25
    assert len(respaced(1000, 1000, 9.0)) < 1000                              # those that fall together are one
    assert toward_noise(0.3, 1.0) == pytest.approx(0.3) and toward_noise(0.5, 9.0) == pytest.approx(0.9)
    for shift, low, high in ((1.0, 0.45, 0.55), (9.0, 0.85, 0.95)):
        made = Conditioner(DiT(TINY), {"shift": shift}, cdm.Config(batch=256))
        t = made.noise(0)["t"].double() / 1000
        assert low < t.median() < high and t.max() < 1
    seen, real = [], made.net.forward
    made.net.forward = lambda z, t, s: seen.append(int(t[0])) or real(z, t, s)
    made.tokens([0], steps=50)
    assert seen == tau[::-1] and Conditioner(DiT(TINY)).shift == 1.0

# ----- 3. Training -----

@pytest.fixture(scope="module")
def home(run, tmp_path_factory):
    """A folder with a trained CDM."""
    folder = new_home(run, tmp_path_factory.mktemp("cdm") / "run")
    go(folder, "cdm", "--decay=constant")
    return folder

def test_train_resume_load(home, tmp_path):
    """catches: noise that depends on the process; EMA not restored."""
    check_resume("cdm", home, tmp_path, once=load_tensors(home / "cdm.safetensors")[0])
    model = ZoomLDM.from_run(home)
    made = cdm.load_conditioner(home, "cdm", model)
    assert made.tokens([0, 2], steps=3).shape == (2, 65, model.summarizer.cfg.width) and made.shift == 4.0
    assert (home / "samples" / "cdm_000006.png").exists()

def test_stopped_in_the_last_step(home, tmp_path, monkeypatch):
    """catches: "done" over an export of an earlier step."""
    real, args = Conditioner.noise, ("--steps=4", "--sample_every=2", "--sheet=0")

    def noise(made, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(made, step)
    monkeypatch.setattr(Conditioner, "noise", noise)
    new_home(home, tmp_path)
    with pytest.raises(SystemExit):
        go(tmp_path, "cdm", *args)
    state, final = load_tensors(tmp_path / "cdm_state.safetensors")[0], go(tmp_path, "cdm", *args)
    assert all(torch.equal(v, state[f"ema.{k}"]) for k, v in final.items())

def test_learns(home, toy, tmp_path):
    """The averaged network must beat zero, where it starts. catches: a stage that trains something else."""
    go(new_home(home, tmp_path), "cdm", "--steps=50", "--lr=1e-2", "--shift=1", "--sample_every=1000",
       "--save_every=1000", "--log_every=50", "--ema=0.9", "--sheet=0")
    model = ZoomLDM.from_run(tmp_path)
    made, dataset = cdm.load_conditioner(tmp_path, "cdm", model), PatchDataset(Pyramids(toy), "test", 0, ())
    items = [dataset[k] for k in range(32)]
    tokens, mask, s = (torch.stack([torch.as_tensor(x[k]) for x in items]) for k in ("tokens", "mask", "s"))
    c = model.summarizer(tokens, mask, s)
    t = torch.full((32,), 300)
    error = (made.net(made.schedule.q_sample(c, t, torch.randn_like(c)), t, s) - c).square().mean()
    assert error < 0.3 * c.square().mean(), f"{error} against {c.square().mean()}"

def test_files_from_before(home, tmp_path):
    """Earlier versions kept a scaling, 0 and 1, and more sizes. catches: such a file refused, an odd one taken."""
    path = new_home(home, tmp_path) / "cdm.safetensors"
    state, meta = load_tensors(home / "cdm.safetensors")
    width = meta["dit"]["channels"]
    meta["dit"] |= {"vector": 0, "cond": "adaln", "plane": False}
    scaling = {"mean": torch.zeros(width), "std": torch.ones(width), "v_mean": torch.zeros(0), "v_std": torch.ones(0)}
    save_tensors(path, state | scaling, meta)
    model = ZoomLDM.from_run(home)
    assert_close(cdm.load_conditioner(tmp_path, "cdm", model).tokens([1], steps=2),
                 cdm.load_conditioner(home, "cdm", model).tokens([1], steps=2), 0)
    save_tensors(path, state | {"more": torch.zeros(1)}, meta)
    with pytest.raises(UserError, match="holds no cdm of ours"):
        cdm.load_conditioner(tmp_path, "cdm", model)

# ----- 4. What is refused -----

def test_another_summarizer(home, tmp_path):
    """Neither its tokens are drawn, nor its state gone on with, even if it does not say from which. catches: a
    fingerprint not compared; old weights stamped with the new Summarizer's."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    model = ZoomLDM.from_run(tmp_path)
    with torch.no_grad():
        model.summarizer.embed.weight[0, 0] += 1
    model.save(tmp_path)
    with pytest.raises(UserError, match=r"another Summarizer .* move it and cdm_state\*.safetensors away"):
        cdm.load_conditioner(tmp_path, "cdm", model)
    tensors, meta = load_tensors(tmp_path / "cdm_state.safetensors")
    del meta["crc"]
    for steps in (6, 6, 7):
        with pytest.raises(UserError, match=r"other settings \(source\).*move cdm_state\*.safetensors away"):
            go(tmp_path, "cdm", "--decay=constant", f"--steps={steps}")
        meta["settings"].pop("source", None)
        save_tensors(tmp_path / "cdm_state.safetensors", tensors, meta)

@pytest.mark.parametrize("args, says", [
    (["draw"], "cdm.py train"), (["train"], "give a run folder"), (["train", "NONE", "smoke"], "no trained model"),
    (["train", "RUN", "smoke", "--captions=x.tsv"], "unknown option --captions"),
    (["train", "RUN", "smoke", "--model=gan"], "cdm, edm, grid")])
def test_bad_input(args, says, home):
    with pytest.raises(UserError, match=says):
        cdm.main([a.replace("RUN", str(home)).replace("NONE", str(home / "none")) for a in args])

def test_settings_that_cannot_work():
    """Refused before anything is read. catches: a traceback, or a training that goes another way than was asked."""
    for arg in ("steps=0", "batch=0", "micro=-1", "seed=-1", "shift=-1.0", "log_every=0", "save_every=0",
                "sample_every=0", "workers=-1", "betas=0.9", "lr=-1.0", "decay=foo", "ema=2.0", "warmup=-5", "sheet=-1",
                "betas=(0.9,1.5)", "threads=-1"):
        with pytest.raises(UserError, match=f"--{arg.partition('=')[0]}="):
            cdm.main(["train", "none", "smoke", "--device=cpu", f"--{arg}"])
