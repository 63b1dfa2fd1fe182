"""The page of claims: what it says before and after measuring, what is stale, and the arithmetic of measurements."""
import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from common import UserError, generator, save_tensors
from diffusion import ZoomLDM
from experiments import claims
from experiments import measures as M
from large import proxy as proxies

@pytest.fixture
def home(run, tmp_path):
    """A copy of the tiny run, with a proxy of it that was never fitted."""
    shutil.copytree(run, tmp_path / "run")
    save_tensors(tmp_path / "run/proxy.safetensors", proxies.Proxy(4).state_dict(), proxies.mark(ZoomLDM.from_run(run)))
    return tmp_path / "run"

def lines(capsys, *args):
    """What the command prints, by claim."""
    claims.main([*map(str, args)])
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("C")}

@pytest.fixture
def two(monkeypatch):
    """Two claims in the place of all, by measurements that count their calls. C2 may be told to fail once."""
    calls, faults = [], []

    def first(lab):
        calls.append("C1")
        return {"gain": (1.5, 0.1, 1.0)}

    def second(lab):
        calls.append("C2")
        if faults:
            raise faults.pop()
        return {"gain": (0.1, 0.1, 0)}
    table = {name: replace(claims.CLAIMS[name], measure=stub, code="experiments.metrics", made=())
             for name, stub in (("C1", first), ("C2", second))}
    monkeypatch.setattr(claims, "CLAIMS", table)
    monkeypatch.setattr(M, "Lab", lambda cfg, home: SimpleNamespace())
    return SimpleNamespace(calls=calls, faults=faults, table=table)

# ----- 1. The page -----

def test_nothing_was_run(run, capsys):
    """Fifteen lines, all open, none with a figure; each names a page that exists."""
    found = lines(capsys, run)
    assert list(found) == [f"C{n}" for n in range(1, 16)]
    for line in found.values():
        said, paper, here, status, page = line.split(" · ")
        assert here == "-" and status.startswith("open: ") and (ROOT / page).is_file(), line
        assert status == "open: not run", line

def test_what_was_measured_is_kept(home, two, capsys):
    """catches: a claim measured again; another that is measured with it; a verdict without its bound."""
    found = lines(capsys, home, "--run=C1", "--device=cpu", "--threads=1")
    assert " gain 1.500±0.100 (> 1) · holds · " in found["C1"] and "open: not run" in found["C2"]
    assert two.calls == ["C1"]
    found = lines(capsys, home, "--run", "--device=cpu", "--threads=1")
    assert two.calls == ["C1", "C2"] and " gain 0.100±0.100 · open · " in found["C2"]
    lines(capsys, home, "--run")
    assert two.calls == ["C1", "C2"]

def test_stale(home, toy, two, capsys, tmp_path):
    """catches: results of other weights, data or code that pass for today's."""
    now = ["--device=cpu", "--threads=1"]
    lines(capsys, home, "--run", *now)
    other = {**two.table, "C1": replace(two.table["C1"], code="experiments.folds")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "CLAIMS", other)
        found = lines(capsys, home)
        assert "gain 1.500±0.100 (> 1) · stale: other code" in found["C1"] and "stale" not in found["C2"]
    shutil.copytree(toy, tmp_path / "data")
    index = json.loads((tmp_path / "data/index.json").read_text())
    (tmp_path / "data/index.json").write_text(json.dumps(index, indent=2))
    assert "stale: other data ·" in lines(capsys, home, f"--data={tmp_path / 'data'}")["C1"]
    model = ZoomLDM.from_run(home)
    model.latent_scale *= 1.01
    model.save(home)
    assert "stale: other weights ·" in lines(capsys, home)["C1"]
    assert "stale" not in lines(capsys, home, "--run=C1", *now)["C1"] and two.calls == ["C1", "C2", "C1"]

def test_files_of_a_claim_count(home, two, capsys):
    """catches: a CDM trained again, whose claim stays as it was."""
    two.table["C1"].made = ("cdm.safetensors",)
    lines(capsys, home, "--run", "--device=cpu", "--threads=1")
    (home / "cdm.safetensors").write_bytes(b"another")
    found = lines(capsys, home)
    assert "stale: other weights" in found["C1"] and "stale" not in found["C2"]

def test_code_counts_and_comments_do_not(monkeypatch, tmp_path):
    """... of all that a module imports, in functions too."""
    def crc(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        claims.tree_of.cache_clear(), claims.code_of.cache_clear()
        return claims.code_of(crc, "one")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    base = crc(one="import two\n\ndef f():\n    from three import g\n", two="x = 1\n", three="g = 1\n", four="y = 1\n")
    assert crc(two="x  =  1  # why\n") == base == crc(four="y = 2\n")
    assert base != crc(two="x = 2\n") and crc(two="x = 1\n") == base != crc(three="g = 2\n")
    (tmp_path / "experiments").mkdir()
    base = crc(**{"experiments/measures": "def between():\n    return 1\n\ndef crc():\n    return help()\n"})
    assert base == crc(**{"experiments/measures": "def between():\n    return 2\n\ndef crc():\n    return help()\n"})
    assert base != crc(**{"experiments/measures": "def help():\n    return 1\n\ndef crc():\n    return help()\n"})
    claims.tree_of.cache_clear(), claims.code_of.cache_clear()

def test_an_interrupted_run_goes_on(home, two, capsys):
    """catches: what was done before Ctrl-C lost, or half a file left."""
    two.faults.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        claims.main([str(home), "--run", "--device=cpu", "--threads=1"])
    assert [p.name for p in (home / "claims").iterdir()] == ["C1.json"]
    found = lines(capsys, home, "--run", "--device=cpu", "--threads=1")
    assert two.calls == ["C1", "C2", "C2"] and "stale" not in found["C1"]

def test_what_cannot_be_measured_is_open_and_tried_again(home, two, capsys):
    two.faults.append(UserError("it needs an extra"))
    assert "- · open: it needs an extra ·" in lines(capsys, home, "--run", "--device=cpu", "--threads=1")["C2"]
    assert " · open: it needs an extra · " in lines(capsys, home)["C2"]
    assert "gain" in lines(capsys, home, "--run", "--device=cpu", "--threads=1")["C2"] and two.calls[1:] == ["C2", "C2"]

def test_shipped_weights(home, two, capsys, tmp_path, monkeypatch):
    """Their results lie elsewhere, and they stay as they are. catches: results written beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    shutil.copy(home / "ema.safetensors", tmp_path / "weights/toy.safetensors")
    monkeypatch.setattr(claims, "shipped_run", lambda: "weights/toy.safetensors")
    monkeypatch.setattr(claims, "home_of", lambda run: claims.Path("out/shipped"))
    lines(capsys, "--run", "--device=cpu", "--threads=1")
    assert (tmp_path / "out/shipped/claims/C1.json").exists()
    assert ZoomLDM.from_run("out/shipped").info == ZoomLDM.from_run(home).info
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["toy.safetensors"]
    assert "holds" in lines(capsys)["C1"]

@pytest.mark.parametrize("args, says", [
    (["nowhere"], "no trained model at nowhere/ema.safetensors: give a run"),
    (["RUN", "--run=C16"], "--run=C16: known are C1"),
    (["RUN", "--run=C1,c2"], "--run=c2: .*did you mean 'C2'"), (["RUN", "--run=C1", "--data=none"], "none holds no"),
    (["RUN", "--run=True"], "--run=True: known are")])
def test_bad_input(args, says, run):
    with pytest.raises(UserError, match=says):
        claims.main([arg.replace("RUN", str(run)) for arg in args])

def test_damaged_results_and_other_data(home, toy, tmp_path):
    (home / "claims").mkdir()
    (home / "claims/C3.json").write_text("{")
    with pytest.raises(UserError, match="C3.json is damaged: remove it, and measure again with --run=C3"):
        claims.main([str(home)])
    (home / "claims/C3.json").unlink()
    (tmp_path / "data").mkdir()
    index = json.loads((toy / "index.json").read_text())
    index["source"]["command"] = "build"
    (tmp_path / "data/index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="holds no toy slides, of which claims are measured"):
        claims.main([str(home), "--run=C6", f"--data={tmp_path / 'data'}"])

# ----- 2. The arithmetic -----

def test_errors_and_verdicts():
    assert M.spread([1.0, 3.0]) == pytest.approx((2, 1)) and M.minus((3, 0.3), (1, 0.4)) == pytest.approx((2, 0.5))
    assert M.mean_of([(1, 0.3), (3, 0.4)]) == pytest.approx((2, 0.25))
    assert M.over([1.0, 4.0], [4.0, 4.0]) == pytest.approx((0.5, 0.5 * math.log(2)))
    for found, word in (({"a": (1, 0.4, 0)}, "holds"), ({"a": (1, 0.6, 0)}, "open"), ({"a": (1, 0.4, 2)}, "fails"),
                        ({"a": (1, 0.4, 0), "b": (-1, 0.1, 0)}, "fails"), ({"a": (1, float("nan"), 0)}, "open"),
                        ({"a": (1, 0.4, 0), "b": (-1, 0.1, None)}, "holds")):
        assert claims.verdict(found) == word, found

def put(monkeypatch, module, **functions):
    for name, value in functions.items():
        monkeypatch.setattr(module, name, value if callable(value) else lambda *a, value=value, **b: value)

def test_measurements_take_the_right_numbers(monkeypatch):
    """Each from what its experiment returns. catches: a difference turned round, a row of another method."""
    lab = SimpleNamespace(home="h", folder="d", options=[], settings=lambda kind, **more: kind(**more), patch=64,
                          model=None, pyramids=None, proxy=None, ranks=None, place=lambda name: name,
                          cfg=claims.Config(), conditions=lambda command, **more: getattr(M.conditions, command))
    put(monkeypatch, M.cdm, main=None)
    row = {"true": {"desc": (1.0, 0.3)}, "cdm": {"desc": (2.0, 0.4)}, "null": {"desc": (5.0, 0.3)}}
    monkeypatch.setattr(M.conditions, "conditions", [row])
    assert M.between(lab) == {"distance, null - CDM": pytest.approx((3, 0.5, 0)),
                              "CDM - true": pytest.approx((1, 0.5, 0))}
    monkeypatch.setattr(M.conditions, "memory", {"pixels": {"each": {"drawn": [1.0, 4.0], "real": [4.0, 4.0]}}})
    assert list(M.no_copies(lab).values()) == [pytest.approx((0.5, 0.5 * math.log(2), 0.5))]
    put(monkeypatch, M.speed, cosine=[(1, 0.5, 0.6, 0), (2, 0.7, 0.8, 0)])
    assert [*map(list, M.directions(lab).values())] == [pytest.approx([0.6, 0.1, 0.5]), pytest.approx([0.7, 0.1, 0.5])]
    put(monkeypatch, M.sr, planted={1: [1.0, 1.0], 2: [0.5, 0.7], 3: [0.1, 0.3]}, table={
        "null, exact": {"psnr": [30.0, 30.0]}, "bicubic": {"desc": [0.5], "rand": [0.9]},
        "inferred, exact": {"psnr": [31.0, 33.0], "desc": [0.6, 0.6], "rand": [0.8, 0.8]}})
    ten, five, below = M.inversion(lab).values()
    assert ten[0] == 1 and five[:2] == pytest.approx((0.6, 0.1)) and below[0] == pytest.approx(0.4)
    found = M.super_resolution(lab)
    assert [value[:2] for value in found.values()] == [
        pytest.approx((2, 1)), pytest.approx((0.1, 0)), pytest.approx((-0.1, 0))]
    scores = {("both", "same stain"): 0.9, ("both", "other stain"): 0.7, ("real", "same stain"): 0.8,
              ("real", "other stain"): 0.7}
    put(monkeypatch, M.labels, extracted="f", cv_of=None, patches={
        (share, *key): torch.full((2,), value) for share in (0.1, 1.0) for key, value in scores.items()})
    assert [v[0] for v in M.samples_as_data(lab).values()] == pytest.approx([0.05, 0.05])
    put(monkeypatch, M.data, main=None)
    put(monkeypatch, M.crossval, tables={(f"unet {view}", "abmil", 1.0): torch.tensor([value, value + 0.1, value])
                                         for view, value in (("0", 0.5), ("2", 0.6), ("0+2", 0.8))})
    assert [v[0] for v in M.two_scales(lab).values()] == pytest.approx([0.3, 0.2])
    near = "A(image) to context, dB"
    put(monkeypatch, M, large_images={
        "joint": {near: [30.0, 32.0], "seconds": [1.0, 2.0]}, "patches": {near: [20.0, 24.0], "seconds": [3.0, 8.0]}})
    db, times = M.coherence(lab).values()
    assert db == pytest.approx((9, 1, 0)) and times == pytest.approx((3.5, 0.5, 1))
    put(monkeypatch, M.captions, main=None)
    monkeypatch.setattr(M.conditions, "text", {"means": {"all shares together": (0.7, 0.1)}})
    assert [*M.text_controls(lab).values()] == [(0.7, 0.1, 0.5)]

def test_where_likeness_is_lost(monkeypatch):
    """Drawn images are real ones with a known share of noise. catches: a figure under another name; glass that counts
    as tissue."""
    P, noise = 16, {"independent": 0.5, "1": 0.6, "3": 0.7, "0": 0.8, "joint": 0.4}
    real = torch.randn(8, 1, 3, 2 * P, 2 * P, generator=generator(0))
    real[:, ..., :P, :P] *= 0.01                                                          # one tile of four is glass
    real[0] = real[1]

    def drawn(lab, k, method="joint", guidance=2.0, inner=1):
        way = "0" if inner == 0 else method if guidance == 2 else f"{guidance:g}"
        other = torch.randn(real[k].shape, generator=generator(1, k))
        other[..., :P, :P] *= 0.01
        return real[k] * (1 - noise[way] ** 2) ** 0.5 + noise[way] * other
    put(monkeypatch, M, large_image=drawn, recoded=lambda lab, x: x, held_out=lambda data, k, side: (k, real[k]),
        Ruler=SimpleNamespace(spaces={"desc": (lambda x: x.flatten(1), None, lambda x: x)}))
    found = M.likeness(SimpleNamespace(pyramids=None, patch=P))
    names = ["cosine of tiles with their reference, descriptor", "of the real ones, coded and decoded",
             "of patches drawn alone", "with guidance 1", "with guidance 3", "of windows without a guide",
             "joint, of tiles of glass", "of all others"]
    shares = [noise[way] for way in ("joint", "independent", "1", "3", "0")]
    cosines = [(1 - share ** 2) ** 0.5 for share in shares]
    wanted = [cosines[0], 1, *cosines[1:], cosines[0], cosines[0]]
    assert list(found) == names
    assert [value for value, _, _ in found.values()] == pytest.approx(wanted, abs=0.03)
    assert [bound for _, _, bound in found.values()] == [0.9] + 7 * [None]

def test_learned_features_are_held_against_what_they_were_conditioned_on(monkeypatch):
    """catches: the difference turned round, slides of another encoder, features of another run; a choice of t and block
    that is not that of the sweep."""
    made, asked = [], []
    lab = SimpleNamespace(place=lambda name: name, patch=64, cfg=claims.Config(threads=1),
                          trained=lambda name, folder, *more: asked.append(folder) or "the run")
    put(monkeypatch, M.data, main=made.append)
    put(monkeypatch, M.labels, sweep=lambda cfg: asked.append(cfg) or torch.tensor([0.7, 0.8, 0.6]),
        extracted=lambda cfg, name, kind: f"{cfg.out}/{kind}", cv_of=lambda cfg, folders, views: (folders, views))
    put(monkeypatch, M.crossval, tables=lambda cv, pairs: asked.append(cv) or {
        ("descriptor 0+2", "abmil", 1.0): torch.tensor([0.6, 0.6, 0.6])})
    gap, theirs = M.learned_features(lab).values()
    assert gap == pytest.approx((0.1, 2 ** 0.5 / 10, 0)) and theirs == pytest.approx((0.6, 0, None))
    assert all("--encoder=efflite0_imagenet" in args and "--patch=64" in args for args in made)
    folder, cfg, (folders, view) = asked
    assert f"--out={folder}" in made[0] and f"--out={cfg.data}" in made[1] and "--task" in made[1]
    assert (cfg.run, folders, view) == ("the run", [f"{cfg.out}/descriptor"], "0+2")
    assert cfg.extract.scales == (0, 2) and cfg.cv.heads == "abmil"

def test_learned_features_need_an_extra(tmp_path, monkeypatch):
    """catches: hours of work before it is missed; a traceback in the place of an open claim."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    lab = SimpleNamespace(place=lambda name: str(tmp_path / name), patch=64, cfg=claims.Config(threads=1))
    with pytest.raises(UserError, match="efflite0_imagenet' needs its extra: pip install"):
        M.learned_features(lab)
    assert not list(tmp_path.rglob("*.safetensors"))

def test_steps_and_guidance_are_told(monkeypatch):
    """catches: a distance of other steps, or of another guidance, under this name."""
    put(monkeypatch, M.conditions, true_tokens=None, distances=lambda cfg, pyramids, s, sets: {
        name: {"desc": (draws[0], 0.0)} for name, draws in sets.items()},
        drawn=lambda model, c, cfg, ranks, seed, guidance: cfg.steps + guidance / 10)
    lab = SimpleNamespace(model=None, pyramids=None, ranks=None)
    values = {name.split(",")[1].split(" -")[0].strip(): v for name, v in M.enough(lab).items()}
    assert {name: round(v[0], 3) for name, v in values.items()} == {
        "100 steps": 50, "20 steps": -30, "10 steps": -40, "guidance 4": 0.2, "guidance 1": -0.1}
    assert values["10 steps"][2] is None and values["100 steps"][2] == -0.05

# ----- 3. Models trained for a claim -----

def test_models_of_a_claim(home, toy, run, monkeypatch):
    """On the tiny run in the place of each training. catches: a run that is not the one asked for; another VAE."""
    asked, told = [], []

    def copied(args):
        asked.append(args)
        shutil.copytree(run, next(a for a in args if a.startswith("--out="))[6:])
    monkeypatch.setattr(M.train, "main", copied)
    monkeypatch.setattr(M.data, "main", lambda args: None)
    lab = M.Lab(claims.Config(data=str(toy), second=str(toy), device="cpu", threads=1), home)
    lab.mark = "now"
    found = {"alone": {"desc": (0.4, 0.3)}, "shared": {"desc": (0.1, 0.4)}}
    monkeypatch.setattr(M.conditions, "scales", lambda cfg, *others: told.append(cfg) or found)
    assert [*M.shared_or_single(lab).values()] == [pytest.approx((0.3, 0.5, 0))]
    assert told[0].run == f"{home}/claims/shared_now" and told[0].single == f"{home}/claims/single_now"
    shared, single = asked
    assert "--only_scale=2" in single and "--only_scale=2" not in shared
    assert f"--data={home}/claims/slides_now" in shared and f"--vae_weights={home}/claims/vae_now" in single
    assert (home / "claims/vae_now/vae.safetensors").exists() and "--device=cpu" in single
    layout, gain = M.second_domain(lab).values()
    assert -1 <= layout[0] <= 1 and -2 <= gain[0] <= 2 and f"--data={toy}" in asked[2]
    assert [*M.summarizers(lab).values()][0][0] == pytest.approx(0)                       # again
    assert [a for args in asked[3:] for a in args if "summarizer" in a] == [
        "--summarizer=transformer", "--summarizer=cnn"]
    lab.cfg.second = "nowhere"
    with pytest.raises(UserError, match="nowhere holds no photographs"):
        M.second_domain(lab)
