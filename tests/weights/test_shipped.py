"""The shipped weights: written from a run, read as one, used where no run is named; what is damaged is refused."""
import json
import re
import shlex
import shutil
from hashlib import sha256

import pytest
import torch
from conftest import ROOT, TINY, quick
from PIL import Image

import cdm
import invert
import sample_joint
import slides.weights
import train
from common import UserError, checksum, configure, fingerprint, load_meta, load_tensors, save_tensors
from diffusion import ZoomLDM
from large import proxy as proxies
from large.resume import flat
from slides.start import finished_vae
from weights import ship, shipped
from zoom_vae import VQVAE

FEW = ("--slides=1", "--test=1", "--size=512", "--scales=3", "--workers=1")    # the tiny run knows three scales

@pytest.fixture(scope="module")
def home(run, toy, tmp_path_factory):
    """A copy of the tiny run with a CDM, and what is shipped of it: HOME/run, HOME/weights."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "run").mkdir()
    for name in ("ema.safetensors", "vae.safetensors", "config.json"):
        shutil.copy(run / name, folder / "run")
    cdm.main(["train", str(folder / "run"), "smoke", "--steps=2", "--sheet=0", "--device=cpu", "--threads=1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxies, "fit", lambda model, *_: proxies.Proxy(model.vae.factor))
        ship.main([str(folder / "run"), f"--out={folder / 'weights'}", "--commit=abc", "--threads=1"])
    return folder

@pytest.fixture
def weights(home, tmp_path, monkeypatch):
    """A copy of the files that a test may damage, in the place of weights/; an empty folder to work in."""
    folder = shutil.copytree(home / "weights", tmp_path / "weights")
    for module in (slides.weights, shipped, ship):
        monkeypatch.setattr(module, "SHIPPED", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder

# ----- 1. Written -----

def test_all_that_a_run_has_in_float16(home):
    """Every weight of the run, rounded to float16, in three files; the VAE but once. The proxy stays as it is."""
    old, new = ZoomLDM.from_run(home / "run"), ZoomLDM.from_run(home / "weights" / "toy.safetensors")
    for name, x in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], x.half().float()), name
    assert new.latent_scale == old.latent_scale and new.unet.cfg == old.unet.cfg and not new.training
    files = {name: load_tensors(home / "weights" / f"{name}.safetensors")[0] for name in shipped.NAMES}
    assert not any(k.startswith("vae") for k in files["toy"])
    kinds = {name: {x.dtype for x in state.values()} for name, state in files.items()}
    assert kinds.pop("proxy") == {torch.float32} and set.union(*kinds.values()) == {torch.float16}

def test_the_files_know_one_another(home):
    """VAE, CDM and proxy count as those of the shipped model, without any data."""
    folder = home / "weights"
    model = ZoomLDM.from_run(folder / "toy.safetensors")
    assert load_meta(folder / "toy.safetensors")["vae_fingerprint"] == fingerprint(model.vae)
    made = cdm.load_conditioner(folder / "toy.safetensors", "cdm", model)
    assert made.tokens([0, 2], steps=2).shape == (2, 65, 32)
    ranks = train.setup("cpu", False)
    proxy = proxies.load(folder, model, None, ranks)        # None: one that must be fitted is refused
    assert proxy(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 16, 16)

def test_headers_say_where_they_come_from(home, run, toy, capsys):
    """The command gives the settings of the run again, but for the folders; nothing tells where they lay."""
    for name in shipped.NAMES:
        told = load_meta(home / "weights" / f"{name}.safetensors")
        assert told["commit"] == "abc" and told["data"] == {toy.name: {
            "command": "toy", "slides": "6", "test": "2", "size": "256", "patch": "64", "scales": "5", "keep0": "24",
            "keep1": "24", "seed": "0"}}
        assert str(home) not in json.dumps(told) and str(toy.parent) not in json.dumps(told)
        words = shlex.split(told["command"])
        assert words[:3] == (["python", "cdm.py", "train"] if name == "cdm" else ["python", "train.py", "smoke"])
    words = shlex.split(load_meta(home / "weights" / "toy.safetensors")["command"])
    cfg = configure(train.Config, words[2:], train.PRESETS, ("preset",))
    was = flat(json.loads((run / "config.json").read_text()))
    free = ship.DECIDED | {"torch"}
    now = flat(json.loads(json.dumps(train.asdict(cfg))))
    assert {k: v for k, v in now.items() if k not in free} == {k: v for k, v in was.items() if k not in free}
    ship.main([f"--out={home / 'weights'}"])
    text = capsys.readouterr().out
    for name in shipped.NAMES:
        assert sha256((home / "weights" / f"{name}.safetensors").read_bytes()).hexdigest() in text

def test_what_is_not_shipped(home, tmp_path):
    """Weights beyond float16, a run without its settings, a VAE from elsewhere: refused, and nothing is written. A VAE
    that is there and fits stays, bit by bit."""
    copy = shutil.copytree(home / "run", tmp_path / "run")
    out = tmp_path / "out"
    state, config = load_tensors(copy / "ema.safetensors")
    save_tensors(copy / "ema.safetensors", state | {"unet.conv_out.bias": torch.tensor([0.0, 7e4, 0.0])}, config)
    (copy / "cdm.safetensors").unlink()
    args = [str(copy), f"--out={out}", "--commit=abc"]
    with pytest.raises(UserError, match="unet: conv_out.bias holds 7e.04, and float16 ends at 65504"):
        ship.main(args)
    save_tensors(copy / "ema.safetensors", {k: v + 0.5 if k == "vae.to_latent.bias" else v for k, v in state.items()},
                 config)
    with pytest.raises(UserError, match="is not the one that .*run was trained on: say by --vae=RUN"):
        ship.main(args)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="no .*config.json: give a run folder"):
        ship.main(args)
    assert not out.exists()
    out.mkdir()
    shutil.copy(home / "weights" / "vae.safetensors", out)
    before = (out / "vae.safetensors").stat().st_mtime_ns
    shutil.copy(home / "weights" / "proxy.safetensors", out)
    ship.main([str(home / "run"), f"--out={out}", "--commit=other", "--vae=/nowhere", "--data=data/others"])
    assert (out / "vae.safetensors").stat().st_mtime_ns == before
    told = load_meta(out / "toy.safetensors")
    assert (told["commit"], told["info"]["data"]) == ("other", "data/others")

# ----- 2. Damaged, missing, of another version -----

def other_vae(folder):
    state, meta = load_tensors(folder / "vae.safetensors")
    state["codebook.weight"] += 0.01
    save_tensors(folder / "vae.safetensors", state, meta)

def cut(name):
    def spoil(folder):
        path = folder / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    return spoil

def flip(folder):
    path = folder / "toy.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-50] ^= 1
    path.write_bytes(bytes(whole))

def newer(folder):
    state, meta = load_tensors(folder / "toy.safetensors")
    save_tensors(folder / "toy.safetensors", state, meta | {"format": 2})

def lost(name):
    return lambda folder: (folder / f"{name}.safetensors").unlink()

@pytest.mark.parametrize("spoil, says", [
    (other_vae, "toy.safetensors was trained on another VAE .fingerprint .* than .*vae.safetensors"),
    (cut("vae"), "vae.safetensors is not a complete"), (cut("toy"), "toy.safetensors is not a complete"),
    (flip, "toy.safetensors is damaged"), (newer, "toy.safetensors is of another version .*format 2, not 1"),
    (lost("vae"), "no file .*vae.safetensors"), (lost("toy"), "no file .*toy.safetensors")])
def test_damage_is_told_with_the_remedy(weights, spoil, says):
    """catches: a traceback, a model of halves, a remedy that does not help, as training a run."""
    spoil(weights)
    with pytest.raises(UserError, match=says + ".*: `git checkout -- weights` brings it back|"
                       + says + ".*; `git checkout -- weights` brings it back"):
        ZoomLDM.from_run(weights / "toy.safetensors")
    with pytest.raises(UserError, match=says):
        sample_joint.main(["--data=nowhere"])

@pytest.mark.parametrize("main, args, name", [(sample_joint.main, [], "toy"), (cdm.main, ["sample"], "cdm"),
                                              (invert.main, ["--image=x.png", "--scale=1"], "vae")])
def test_a_command_says_what_is_missing(weights, main, args, name):
    lost(name)(weights)
    with pytest.raises(UserError, match=f"no file .*{name}.safetensors: `git checkout -- weights` .*or give a RUN"):
        main(args)

def test_only_a_cdm_is_shipped(weights):
    with pytest.raises(UserError, match="--model=edm: known are cdm"):
        cdm.main(["sample", "--model=edm"])

# ----- 3. Without a run -----

def test_patches_and_a_large_image(weights, monkeypatch, capsys):
    """On slides that it draws itself, once; and what to type next. A setting of patches alone leaves out the image."""
    from large import command
    asked = []
    monkeypatch.setattr(shipped, "HELD_OUT", FEW)
    monkeypatch.setattr(shipped, "home_of", lambda run: shipped.Path("out/shipped"))
    monkeypatch.setattr(sample_joint, "home_of", lambda run: shipped.Path("out/shipped"))
    monkeypatch.setattr(command, "main", asked.append)
    sample_joint.main(["--seed=1"])
    sheet = Image.open("out/shipped/patches/sheet.png")
    assert sheet.height > 6 * 64 and (shipped.Path("out/shipped/slides") / "index.json").exists()
    assert asked == [[str(shipped.shipped_run()), "--data=out/shipped/slides", "--seed=1", "--size=512"]]
    said = capsys.readouterr().out
    following, = re.findall("; next: python sample_joint.py (.*)$", said, re.M)
    assert following.split() == [asked[0][0], "--size=512", "--data=out/shipped/slides"]
    assert "there is no data/toy" in said
    sample_joint.main(["--scale=0", "--n=1"])
    assert len(asked) == 1 and "there is no data/toy" not in capsys.readouterr().out

def test_the_other_commands(weights, toy, tmp_path, capsys):
    """A large image with the shipped proxy, an image enlarged, patches from nothing."""
    out = tmp_path / "out"
    quickly = ["--device=cpu", "--threads=1", "--amp=False"]
    sample_joint.main([*quickly, "--size=128", "--context=1", "--steps=1", f"--data={toy}", f"--out={out / 'a.png'}"])
    said = capsys.readouterr().out
    assert Image.open(out / "a.png").size == (128, 128) and "proxy" not in said
    args = re.search("; next: python invert.py (.*)", said)[1].split()              # what it says to type
    assert args[1:] == [f"--image={out / 'a_scale1.png'}", "--scale=1", "--sr=2"]
    invert.main([*quickly, *args, "--invert_steps=1", "--steps=1", "--out=enlarged"])
    assert Image.open("enlarged/sr.png").size == (128, 128)
    args = re.search("; next: python sample_joint.py (.*)", capsys.readouterr().out)[1].split()
    assert args[1:] == ["--reference=enlarged/e.safetensors", "--size=128,128"]
    sample_joint.main([*quickly, *args, "--steps=1", f"--out={out / 'b.png'}"])
    assert Image.open(out / "b.png").size == (128, 128)
    cdm.main(["sample", *quickly, "--scale=0", "--n=2", "--steps=1", "--out=nothing", f"--data={toy}"])
    assert Image.open("nothing/scale0_001.png").size == (64, 64)
    assert Image.open("nothing/sheet.png").height == 2 * 66 + 2             # real ones above

def test_where_results_go(monkeypatch, run):
    """Those of the shipped weights to out/shipped, not into weights/; those of a run into it."""
    from common import home_of
    monkeypatch.chdir(ROOT)
    assert str(home_of("weights/ship.py")) == str(home_of(ROOT / "weights")) == "out/shipped"
    assert home_of(run) == home_of(run / "ema.safetensors") == run

# ----- 4. A training on them -----

def test_every_finished_vae(home, tmp_path):
    """Of a run folder, a file of ours of each kind: the same network and scale."""
    want, scale = VQVAE.from_run(home / "run" / "vae.safetensors")
    for name in ("run", "run/vae.safetensors", "run/ema.safetensors", "weights/vae.safetensors",
                 "weights/toy.safetensors"):
        vae, got = finished_vae(home / name)
        assert got == scale, name
        for k, v in want.state_dict().items():
            assert torch.equal(vae.state_dict()[k], v.half().float() if "weights" in name else v), (name, k)
    with pytest.raises(UserError, match="no file .*none.safetensors"):
        finished_vae(tmp_path / "none.safetensors")

def test_a_training_goes_on_with_its_own_vae_only(run, toy, tmp_path):
    """catches: a U-Net that goes on learning latents that mean something else; a run of before, which cannot tell."""
    out = shutil.copytree(run, tmp_path / "run")
    state, meta = load_tensors(out / "vae.safetensors")
    save_tensors(out / "vae.safetensors", state | {"to_latent.bias": state["to_latent.bias"] + 1}, meta)
    args = [*TINY, f"--data={toy}", f"--out={out}", "--steps=7"]
    before = (out / "state.safetensors").read_bytes()
    with pytest.raises(UserError, match="state.safetensors was trained on another VAE .* than the .*vae.safetensors"):
        quick(args)
    assert (out / "state.safetensors").read_bytes() == before
    tensors, told = load_tensors(out / "state.safetensors")
    told.pop("vae"), told.pop("crc")
    save_tensors(out / "state.safetensors", tensors, told | {"crc": checksum(tensors, told)})
    quick(args)

# ----- 5. The files of this repository -----

@pytest.mark.parametrize("name", shipped.NAMES)
def test_the_files_are_those_of_docs(name):
    path = ROOT / "weights" / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no {path.name} yet")
    page = (ROOT / "docs/weights.md").read_text()
    told = re.findall(rf"`weights/{path.name}` \| ([\d,]+) \| ([0-9a-f]{{64}}) ", page)
    assert told == [(f"{path.stat().st_size:,}", sha256(path.read_bytes()).hexdigest())]
    shipped.check_seal(path, *load_tensors(path))

def test_the_shipped_model_loads():
    path = ROOT / "weights" / "toy.safetensors"
    if not path.exists():
        pytest.skip("no weights yet")
    model = ZoomLDM.from_run(path)
    assert model.info["encoder"] == "stats" and model.info["patch"] == 64

def test_bare_glass_stays_bare():
    """A pink disc on glass, enlarged by the shipped model under no condition. catches: a share of the misfit so small
    that what the network guesses at first, the walls of fat, is left as dark lines in white."""
    u = torch.arange(64)
    far = (u[:, None] ** 2 + u ** 2).sqrt()
    glass = ((far - 30) / 3).clamp(0, 1)                                                    # (64,64)
    pink = torch.tensor([0.8, 0.2, 0.5])[:, None, None]
    x = (pink + (0.9 - pink) * glass)[None]                                                 # (1,3,64,64)
    model = ZoomLDM.from_run(ROOT / "weights" / "toy.safetensors")
    drawn = invert.super_resolve(model, x, 1, steps=5, batch=16)
    assert drawn[..., 80:, 80:].min() > 0.8
