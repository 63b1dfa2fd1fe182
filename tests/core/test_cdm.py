"""Conditioning models: against the published CDM, sampling in closed forms, training, and what is refused."""
import argparse
import os
import signal

import pytest
import torch
from rule import assert_close, assert_golden, golden, manifest, state_dict

import cdm
import cdm as dit
from cdm import Conditioner, DiT, DiTConfig, Regions, lean, place_table, respaced
from common import UserError, load_tensors, save_tensors
from data import Pyramids
from diffusion import Schedule, ZoomLDM, ddim_sample
from text import captions


def published(name="cdm_small"):
    width = manifest(name)["x_embedder.bias"][0]
    return state_dict(name) | {"pos_embed": place_table(65, width)}


def tokens_first(x):
    return x.transpose(1, 2)  # published: (B,C,65)


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
    assert respaced(1000, 10) == g["out/resp10_timestep_map"].tolist()
    assert respaced(1000, 200) == g["out/resp200_timestep_map"].tolist()
    assert respaced(1000, 1000) == g["out/full_timestep_map"].tolist()
    z = ddim_sample(lambda z, t: net(z, t, y), x, schedule, pred="x0", timesteps=respaced(1000, 10), end="clean")
    assert_golden(tokens_first(z), "cdm_small", "resp10_ddim_loop", 2e-5)
    for name, steps in (("full", 1000), ("resp200", 200)):
        tau = respaced(1000, steps)
        for key, eta in (("ddim_sample", 0.0), ("ddim_eta1_sample", 1.0)):
            rows = []
            for k, at in enumerate(g[f"in/{name}_t"].tolist()):  # one step from index `at` to the one before
                one = []
                ddim_sample(lambda z, t, k=k: net(z, t, y[k:k + 1]), x[k:k + 1], schedule, eta=eta, pred="x0",
                            timesteps=tau[at - 1:at + 1], end="clean", noise=[noise[k:k + 1]] * 2,
                            callback=lambda n, t, z, z0_hat, one=one: one.append(z))
                rows.append(one[0])
            assert_golden(tokens_first(torch.cat(rows)), "cdm_small", f"{name}_{key}", 2e-5)


def test_times_lean_to_noise(home, toy, tmp_path):
    """Drawing and training alike: half of the times lie beyond 1000 shift / (shift + 1). catches: leaning to data; one
    of both not leaning; the published model leaning."""
    tau = respaced(1000, 50, 9.0)
    assert tau[0] == 0 and tau[-1] == 999 and tau == sorted(set(tau)) and sum(t > 899 for t in tau) == 25
    assert len(respaced(1000, 1000, 9.0)) < 1000                              # those that fall together are one
    made = Conditioner("cdm", DiTConfig(65, 8, 16, 1, 2, 16, 3), {"shift": 9.0})
    seen, real = [], made.net.forward
    made.net.forward = lambda z, t, s: seen.append(int(t[0])) or real(z, t, s)
    made.tokens([0], steps=50)
    assert seen == tau[::-1] and Conditioner("cdm", made.net.cfg).shift == 1.0
    u = torch.linspace(0, 1, 11, dtype=torch.double)
    assert torch.equal(lean(u, 1.0), u) and float(lean(torch.tensor(0.5), 9.0)) == pytest.approx(0.9)
    for shift, low, high in ((1.0, 0.45, 0.55), (9.0, 0.85, 0.95)):
        cfg = cdm.Config(batch=256, shift=shift)
        t = cdm.ConditionStage(cfg, made, None).noise(0)["t"].double() / 1000
        assert low < t.median() < high and t.max() < 1
    (tmp_path / "ema.safetensors").write_bytes((home / "ema.safetensors").read_bytes())
    go(tmp_path, "grid", "--shift=5")
    assert cdm.load(tmp_path, "grid", ZoomLDM.from_run(home)).shift == 5.0


def test_full_size():
    """catches: heads of another width; a size that is not inferred."""
    g = golden("full_cdm_rule")[0]
    net = DiT.from_official(published("full_cdm_rule"))
    assert net.cfg == DiTConfig() and sum(p.numel() for p in net.parameters()) == 130_696_960
    with torch.no_grad():
        assert_golden(tokens_first(net(tokens_first(g["in/x"]), g["in/t"], g["in/y"])), "full_cdm_rule", "out", 1e-4)


@pytest.mark.parametrize("key", ["pos_embed", "y_embedder.embedding_table.weight", "blocks.2.attn.qkv.bias",
                                 "final_layer.linear.weight", "x_embedder.weight"])
@pytest.mark.parametrize("how", ["missing", "renamed", "shape"])
def test_keys(key, how):
    """Every fault is named. catches: strict=False."""
    state = published()
    value = state.pop(key)
    if how == "renamed":
        state[key + "x"] = value
    elif how == "shape":
        state[key] = torch.zeros(*value.shape[:-1], value.shape[-1] + 1)
    with pytest.raises(ValueError, match=key.replace(".", r"\.") + ("x" if how == "renamed" else "")):
        DiT.from_official(state)


def test_checkpoint_file(tmp_path):
    """The published file holds model, ema, opt and args, a Namespace. catches: the raw weights; a file refused."""
    state = published()
    torch.save({"model": {k: v * 2 for k, v in state.items()}, "ema": state, "opt": {"state": {}},
                "args": argparse.Namespace(lr=1e-4)}, tmp_path / "cdm.pt")
    made = cdm.from_official(tmp_path / "cdm.pt", heads=4)
    assert torch.equal(made.net.embed.weight, state["x_embedder.weight"]) and made.kind == "cdm"
    assert made.tokens([3, 0], steps=2).shape == (2, 65, 24)


# ----- 2. Networks -----

@pytest.mark.parametrize("cond", ["adaln", "tokens"])
def test_everything_told_is_heard(cond):
    """Time, scale, vector and its absence all change the answer. catches: an input that is dropped."""
    net = DiT(DiTConfig(9, 4, 32, 2, 4, 64, 5, vector=6, cond=cond, plane=True))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, s, v, known = torch.randn(2, 9, 4), torch.tensor([5, 5]), torch.tensor([1, 1]), torch.randn(2, 6), \
        torch.tensor([True, True])
    base = net(x, t, s, v, known)
    assert base.shape == x.shape
    for other in (net(x, t + 300, s, v, known), net(x, t, s + 1, v, known), net(x, t, s, v + 1, known),
                  net(x, t, s, v, ~known)):
        assert (other - base).abs().max() > 1e-3
    assert torch.equal(net(x, t, s, v, ~known), net(x, t, s, v * 9, ~known)), "an unknown vector must not be heard"
    assert_close(net(x, t, s, known=None), net(x, t, s, v, ~known), 1e-6)


def test_starts_at_zero():
    """catches: adaLN without its zero."""
    assert not DiT(DiTConfig(9, 4, 32, 2, 4, 64, 5))(torch.randn(1, 9, 4), torch.tensor([3]), torch.tensor([0])).any()


def test_places_on_a_plane():
    """Rows and columns told apart. catches: a transposed table."""
    table = place_table(9, 8, plane=True)[0].unflatten(0, (3, 3))                           # (3,3,8)
    assert torch.equal(table[1, 0, :4], table[1, 2, :4]) and torch.equal(table[0, 1, 4:], table[2, 1, 4:])
    assert not torch.equal(table[0, 1], table[1, 0])


def test_what_a_network_cannot_be_told():
    """catches: IndexError, TypeError, a vector that is ignored, the wrong scale named."""
    made = Conditioner("cdm", DiTConfig(9, 4, 16, 1, 2, 16, 5))
    x, t, s = torch.randn(2, 9, 4), torch.tensor([5, 5]), torch.tensor([1, 4])
    for wrong, says in (((s + 1,), "scales 0 to 4"), ((None,), "scales 0 to 4"), ((s - 2,), "scales 0 to 4"),
                        ((s, torch.ones(2, 3)), "takes none")):
        with pytest.raises(UserError, match=says):
            made.net(x, t, *wrong)
    with pytest.raises(UserError, match=r"takes \(B,6\)"):
        DiT(DiTConfig(9, 4, 16, 1, 2, 16, 0, vector=6))(x, t, v=torch.ones(2, 3))
    for wrong, says in (([], "none given"), ([-1, 0], "scale -1:"), ([7, 0, 5], "scale 7, 5:")):
        with pytest.raises(UserError, match=says):
            made.tokens(wrong)


# ----- 3. Drawing -----

def stub(made, fn):
    made.net.forward = fn
    return made.eval()


def test_tokens_depend_on_seed_and_place_alone():
    """catches: noise that depends on the batch; scale labels shifted."""
    made = Conditioner("cdm", DiTConfig(65, 8, 32, 1, 4, 64, 5))
    for p in made.net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    a, b = made.tokens([2, 1, 2], seed=1, steps=5), made.tokens([1, 2], seed=1, steps=5, first=1)
    assert_close(a[1:], b, 1e-5)
    assert (a[0] - a[2]).abs().max() > 0.1 and (a[0] - made.tokens([2], seed=2, steps=5)[0]).abs().max() > 0.1
    with pytest.raises(UserError, match="scale 5"):
        made.tokens([5])


def test_grid_is_stitched_and_unscaled():
    """A network that always sees the same block: each window must come back at its place, scaled back.
    catches: rows and columns swapped; the mean forgotten; windows in the wrong order."""
    made = Conditioner("grid", DiTConfig(16, 3, 32, 1, 4, 64, 0, plane=True))
    made.mean.fill_(5.0)
    made.std.fill_(2.0)
    block = torch.arange(16.0).view(4, 4)[None].expand(3, 4, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    stub(made, lambda x, t, known=None: block.flatten(1).T.expand(len(x), -1, -1))
    assert_close(made.grid(4, 4, steps=5), block * 2 + 5, 1e-5)
    assert_close(made.grid(3, 2, steps=5), (block * 2 + 5)[:, :3, :2], 1e-5)
    large = made.grid(4, 6, steps=5)
    assert_close(large[:, :, :2], (block * 2 + 5)[:, :, :2], 1e-5)       # only the first window
    assert_close(large[:, :, 4:], (block * 2 + 5)[:, :, 2:], 1e-5)       # only the last


def test_grid_guidance():
    """x0_null + g (x0_v - x0_null). catches: the published w = g - 1; branches swapped."""
    made = Conditioner("grid", DiTConfig(4, 2, 32, 1, 4, 64, 0, vector=3, plane=True))
    stub(made, lambda x, t, v=None, known=None: torch.where(known[:, None, None], 3.0, 1.0).expand_as(x))
    for g, want in ((1.0, 3.0), (2.0, 5.0), (0.0, 1.0)):
        assert_close(made.grid(2, 2, torch.ones(3), g, steps=4), torch.full((2, 2, 2), want), 1e-5)
    assert_close(made.grid(2, 2, None, 9.0, steps=4), torch.ones(2, 2, 2), 1e-5)
    with pytest.raises(UserError, match=r"takes \(3,\)"):
        made.grid(2, 2, torch.ones(4))


def test_grid_spread():
    """What noise all tiles share is left out with a caption, and kept without: a grid's mean is v's, or not.
    catches: the mean over channels, or of each tile; spread turned round."""
    made = Conditioner("grid", DiTConfig(16, 2, 32, 1, 4, 64, 0, vector=3, plane=True))
    stub(made, lambda x, t, v=None, known=None: x + 3)
    (a, b), kept = (made.grid(4, 4, torch.ones(3), seed=seed, steps=2) for seed in (0, 1)), made.grid(
        4, 4, torch.ones(3), steps=2, spread=1.0)
    assert_close(a.mean((1, 2)), b.mean((1, 2)), 1e-4)
    assert (a - b).abs().max() > 0.5 and (kept.mean((1, 2)) - a.mean((1, 2))).abs().max() > 0.05
    assert_close(kept, made.grid(4, 4, steps=2), 1e-4)                      # all of it, as without a caption


def test_grid_holds_what_is_said():
    """The mean of the grid is what the vector says, scaled back; with half the spread it is half way. catches: the mean
    of each window; a vector that is not standardised; tiles that are all alike."""
    made = Conditioner("grid", DiTConfig(16, 2, 32, 1, 4, 64, 0, vector=3, plane=True))
    stub(made, lambda x, t, v=None, known=None: x.roll(1, 1) / 2)
    made.says.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    made.std.copy_(torch.tensor([3.0, 5.0]))
    made.v_mean.fill_(1.0)
    want = torch.tensor([3.0, 20.0])                                        # (2,3,1) less 1 says 1, 4
    for size in (4, 6):                                                     # one window, and nine that overlap
        e = made.grid(size, size, torch.tensor([2.0, 3.0, 1.0]), steps=5)
        assert_close(e.mean((1, 2)), want, 1e-4)
        assert e.std((1, 2)).min() > 0.01
    left = [float((made.grid(4, 4, torch.tensor([2.0, 3.0, 1.0]), steps=2, spread=f).mean((1, 2)) - want).norm())
            for f in (0.0, 0.5, 1.0)]
    assert left[0] < 1e-3 < left[1] < 0.8 * left[2], left


def test_files_from_before(tmp_path, monkeypatch):
    """catches: a model without a vector that must have what only vectors need; a grid refused for what it can lack."""
    monkeypatch.setattr(dit, "fits", lambda *args: None)
    torch.manual_seed(0)
    for kind, sizes in (("cdm", (4, 2, 32, 1, 4, 64, 2)), ("grid", (4, 2, 32, 1, 4, 64, 0, 3))):
        made = Conditioner(kind, DiTConfig(*sizes))
        made.save(tmp_path / f"{kind}.safetensors")
        state, meta = load_tensors(tmp_path / f"{kind}.safetensors")
        assert (state.pop("says", None) is None) == (kind == "cdm")
        save_tensors(tmp_path / f"{kind}.safetensors", state, meta)
        again = cdm.load(tmp_path, kind, torch.nn.Linear(1, 1)).state_dict()
        assert all(torch.equal(v, again[k]) for k, v in made.state_dict().items()) and len(again) >= len(state)


# ----- 4. Training -----

@pytest.fixture(scope="module")
def home(run, tmp_path_factory):
    """A copy of the tiny run, to train in."""
    folder = tmp_path_factory.mktemp("cdm") / "run"
    folder.mkdir()
    (folder / "ema.safetensors").write_bytes((run / "ema.safetensors").read_bytes())
    return folder


def go(folder, kind, *args):
    cdm.main(["train", str(folder), "smoke", f"--model={kind}", "--steps=6", "--save_every=3", "--log_every=3",
              "--sample_every=6", "--sheet=1", "--device=cpu", *args])
    return load_tensors(folder / f"{kind}.safetensors")


@pytest.mark.parametrize("kind", ["cdm", "edm", "grid"])
def test_train_resume_load(kind, home, toy, tmp_path):
    """Three steps and three more equal six. catches: noise that depends on the process; EMA not restored."""
    whole = go(home, kind)[0]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ema.safetensors").write_bytes((home / "ema.safetensors").read_bytes())
    # a cosine to zero depends on the number of steps: stop by copying the state after three
    go(tmp_path / "a", kind, "--decay=constant")
    go(tmp_path / "b", kind, "--decay=constant", "--steps=3")
    again = go(tmp_path / "b", kind, "--decay=constant")[0]
    once = load_tensors(tmp_path / "a" / f"{kind}.safetensors")[0]
    assert all(torch.equal(once[k], again[k]) for k in once) and whole.keys() == once.keys()
    model = ZoomLDM.from_run(home)
    made = cdm.load(home, kind, model)
    if kind == "grid":
        assert made.grid(4, 4, steps=3).shape == (model.summarizer.cfg.embed_dim, 4, 4)
        assert made.std.min() > 0 and made.mean.abs().max() > 0
    else:
        assert made.tokens([0, 2], steps=3).shape == (2, 65, model.summarizer.cfg.width)
        assert (home / "samples" / f"{kind}_000006.png").exists()


def test_stopped_in_the_last_step(home, toy, tmp_path, monkeypatch):
    """catches: "done" over an export of an earlier step."""
    (tmp_path / "ema.safetensors").write_bytes((home / "ema.safetensors").read_bytes())
    real, args = cdm.ConditionStage.noise, ("--steps=4", "--sample_every=2")

    def noise(stage, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(stage, step)
    monkeypatch.setattr(cdm.ConditionStage, "noise", noise)
    with pytest.raises(SystemExit):
        go(tmp_path, "grid", *args)
    state, final = load_tensors(tmp_path / "grid_state.safetensors")[0], go(tmp_path, "grid", *args)[0]
    assert all(torch.equal(v, state[f"ema.{k}"]) for k, v in final.items())


def test_learns(home, toy):
    """The averaged network must beat zero, where it starts. catches: a stage that trains something else."""
    folder = home.parent / "learn"
    folder.mkdir()
    (folder / "ema.safetensors").write_bytes((home / "ema.safetensors").read_bytes())
    cdm.main(["train", str(folder), "smoke", "--steps=150", "--lr=3e-3", "--shift=1", "--device=cpu",
              "--sample_every=1000", "--save_every=1000", "--log_every=150", "--ema=0.9", "--sheet=0"])
    model = ZoomLDM.from_run(folder)
    made, pyramids = cdm.load(folder, "cdm", model), Pyramids(toy)
    dataset = cdm.PatchDataset(pyramids, "test", 0, ())
    items = [dataset[k] for k in range(32)]
    tokens, mask, s = (torch.stack([torch.as_tensor(x[k]) for x in items]) for k in ("tokens", "mask", "s"))
    c = model.summarizer(tokens, mask, s)
    t = torch.full((32,), 300)
    error = (made.net(made.schedule.q_sample(c, t, torch.randn_like(c)), t, s) - c).square().mean()
    assert error < 0.3 * c.square().mean(), f"{error} against {c.square().mean()}"


def test_regions_are_places_of_the_slides(toy):
    """catches: rows and columns swapped; test slides; a draw that depends on its history."""
    pyramids = Pyramids(toy)
    regions = Regions(pyramids, 2, 7)
    blocks = {tuple(pyramids.tensor(i, "e")[r:r + 2, c:c + 2].float().flatten().tolist())
              for i, (_, _, h, w) in regions.slides for r in range(h - 1) for c in range(w - 1)}
    for n in (5, 0, 11, 5):
        item = regions[n]
        assert tuple(item["tokens"].flatten().tolist()) in blocks and not item["known"]
    assert torch.equal(regions[5]["tokens"], Regions(pyramids, 2, 7)[5]["tokens"])
    assert any((regions[n]["tokens"] != Regions(pyramids, 2, 8)[n]["tokens"]).any() for n in range(4))
    with pytest.raises(UserError, match="9 x 9"):
        Regions(pyramids, 9, 0)


def test_spoken(toy):
    """A vector that holds a region's mean embedding says it. catches: captions and regions paired wrongly; rows and
    columns swapped; another scaling than the tokens'."""
    pyramids = Pyramids(toy)
    places = [(i, (r, c, 2, 1)) for i, (_, _, h, w) in Regions(pyramids, 2, 0).slides
              for r in range(h - 1) for c in range(w)]
    mean = torch.stack([pyramids.tensor(i, "e")[r:r + h, c:c + w].float().mean((0, 1)) for i, (r, c, h, w) in places])
    made = argparse.Namespace(mean=mean.mean(0), std=mean.std(0) + 0.1)
    aim = (mean - made.mean) / made.std
    torch.manual_seed(0)
    mix = torch.linalg.qr(torch.randn(aim.shape[1], aim.shape[1]))[0]
    says = cdm.spoken(aim @ mix, [captions.Caption("", "", (), 0, *at) for at in places], pyramids, made, 1e-9)
    assert_close(aim @ mix @ says, aim, 0.02)


# ----- 5. What is refused -----

def test_another_summarizer(home, toy):
    """catches: a fingerprint that is not compared."""
    go(home, "cdm")
    model = ZoomLDM.from_run(home)
    with torch.no_grad():
        model.summarizer.embed.weight[0, 0] += 1
    with pytest.raises(UserError, match="another Summarizer"):
        cdm.load(home, "cdm", model)
    with pytest.raises(UserError, match="24 numbers per token"):
        cdm.from_official(published(), model, heads=4)


@pytest.mark.parametrize("noted", [True, False])
def test_a_state_of_another_summarizer(noted, home, toy, tmp_path):
    """Neither finished nor resumed, with or without its export; one from before sources were noted goes on where its
    export fits. catches: old weights that are stamped with the new Summarizer's fingerprint."""
    (tmp_path / "ema.safetensors").write_bytes((home / "ema.safetensors").read_bytes())
    path, args = tmp_path / "cdm.safetensors", ("--steps=1", "--save_every=1", "--sheet=0")
    go(tmp_path, "cdm", *args)
    if not noted:
        tensors, meta = load_tensors(tmp_path / "cdm_state.safetensors")
        del meta["crc"], meta["settings"]["made_for"]
        save_tensors(tmp_path / "cdm_state.safetensors", tensors, meta)
    go(tmp_path, "cdm", *args)
    model = ZoomLDM.from_run(tmp_path)
    with torch.no_grad():
        model.summarizer.embed.weight[0, 0] += 1
    model.save(tmp_path)
    with pytest.raises(UserError, match=r"after moving the old one away, and cdm_state\*.safetensors"):
        cdm.load(tmp_path, "cdm", model)
    for more in ((), ("--steps=2",)):
        with pytest.raises(UserError, match=r"learnt from another Summarizer.*cdm_state\*.safetensors and cdm.saf"):
            go(tmp_path, "cdm", *args, *more)
        path.unlink(missing_ok=True)
    assert not path.exists()


def test_grid_of_another_encoder(home, toy):
    go(home, "grid")
    model = ZoomLDM.from_run(home)
    model.info["encoder"] = "uni"
    with pytest.raises(UserError, match="embeddings of 'stats'"):
        cdm.load(home, "grid", model)


@pytest.mark.parametrize("args, says", [
    (["draw"], "cdm.py train"), (["train"], "give a run folder"), (["sample", "RUN", "--model=grid"], "sample_joint"),
    (["sample", "RUN", "--model=edm", "--scale=9"], "0 to"), (["train", "RUN", "smoke", "--model=grid", "--side=64"],
    "lower --side"), (["train", "RUN", "smoke", "--steps=0"], "at least 1"), (["sample", "NONE"], "no trained model"),
    (["train", "RUN", "smoke", "--model=grid", "--captions=x.tsv"], "give both"),
    (["train", "RUN", "smoke", "--captions=x.tsv"], "are for --model=grid"),
    (["train", "RUN", "smoke", "--model=gan"], "cdm, edm, grid")])
def test_bad_input(args, says, home, toy):
    go(home, "edm")
    with pytest.raises(UserError, match=says):
        cdm.main([a.replace("RUN", str(home)).replace("NONE", str(home / "none")) for a in args])


@pytest.mark.parametrize("arg", ["log_every=0", "save_every=0", "sample_every=0", "workers=-1", "betas=0.9", "lr=-1.0",
                                 "micro=-1", "decay=foo", "drop=3.0", "ema=2.0", "warmup=-5",
                                 "sheet=-1", "betas=(0.9,1.5)", "threads=-1"])
def test_settings_that_cannot_work(arg):
    """Refused before anything is read. catches: a traceback, or a training that goes another way than was asked."""
    with pytest.raises(UserError, match=f"--{arg.partition('=')[0]}="):
        cdm.main(["train", "none", "smoke", "--device=cpu", f"--{arg}"])


@pytest.mark.parametrize("size", [{"heads": 0}, {"heads": -1}, {"depth": 0}, {"mlp": 0}, {"width": 0}])
def test_sizes_that_cannot_work(size):
    with pytest.raises(UserError, match="each is at least 1"):
        DiT(DiTConfig(**{"tokens": 4, "channels": 2, "width": 16, "depth": 1, "heads": 2, "mlp": 16} | size))


def test_missing(run):
    with pytest.raises(UserError, match="train one with python cdm.py train"):
        cdm.load(run, "cdm", ZoomLDM.from_run(run))


def test_sample_writes_patches(home, toy, tmp_path):
    """catches: a scale that is ignored; more or fewer files."""
    go(home, "cdm")
    cdm.main(["sample", str(home), "--scale=1", "--n=2", "--steps=2", f"--out={tmp_path}", "--device=cpu"])
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["scale1_000.png", "scale1_001.png", "sheet.png"]
