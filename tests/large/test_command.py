"""The command that draws large images, on a tiny run: every option, interruptions, memory, bad input."""
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from rule import assert_close

import sample_joint
from common import Ranks, UserError, configure, generator, load_tensors, save_tensors
from data import halve
from diffusion import ZoomLDM, ddim_sample
from experiments import baselines
from large import command
from large import proxy as proxies
from large.beside import LABEL, real_region
from large.command import METHODS, PRESETS, Settings, draw_large, enough_memory, settled, times
from large.reference import load_grid
from large.windows import Grid, prepare, usual_context

RANKS = Ranks(0, 1, torch.device("cpu"), None)
# 9 + 1 windows; one thread: pictures are compared bit by bit, whatever a fixture before them left
SMALL = ["--size=128", "--context=1", "--guide=x0", "--steps=2", "--guided=0,1000", "--device=cpu", "--amp=False",
         "--threads=1"]

def settings(*args):
    return configure(Settings, list(args), PRESETS, ("run", "preset"))

def draw(ready, out, *args):
    """Run the command; out: its picture."""
    sample_joint.main([str(ready), *SMALL, f"--out={out}", *args])
    return np.asarray(Image.open(out)).astype(int) if out.suffix == ".png" else None

# ----- 1. The command -----

@pytest.fixture(scope="module")
def plain(ready, tmp_path_factory):
    """out: the picture of SMALL, and the folder it lies in."""
    folder = tmp_path_factory.mktemp("plain")
    return draw(ready, folder / "a.png"), folder

def test_a_picture_is_written(ready, plain, tmp_path):
    """Of the size asked for, with the view it was drawn with beside it; nothing unfinished stays. It depends on the
    seed alone. Catches: noise from the global generator."""
    image, folder = plain
    assert image.shape == (128, 128, 3) and image.std() > 5
    assert sorted(p.name for p in folder.iterdir()) == ["a.png", "a_beside.png", "a_scale1.png"]
    assert not (ready / "proxy.safetensors").exists() and Image.open(folder / "a_scale1.png").size == (64, 64)
    torch.randn(5)
    assert np.array_equal(draw(ready, tmp_path / "b.png"), image)

def test_how_well_it_agrees(ready, tmp_path, capsys):
    """In words, after the picture is drawn. Catches: the range of the image itself, or of all channels together; means
    over other blocks; a sentence of an image that no context guided."""
    view = np.full((2, 2, 3), (100, 150, 200), np.uint8)
    view[0] += 10
    image = view.repeat(4, 0).repeat(4, 1)
    image[0, 0] = (99, 150, 200)                                        # one of 64 below the range of red
    assert command.agreement(image, view, 4, "box").endswith(" dB, 1.6 % of the pixels outside its range")
    assert "to 36.1 dB, 50.0 %" in command.agreement(view + 4, view, 1, "box"), "20 log10(255 / 4); half of them above"
    draw(ready, tmp_path / "a.png")
    assert "agrees with its context to " in capsys.readouterr().out
    draw(ready, tmp_path / "b.png", "--method=multidiffusion")
    assert "agrees with" not in capsys.readouterr().out

@pytest.fixture(scope="module")
def grid(model, pyramids):
    return load_grid(settings(), model, pyramids, (2, 2))

def latents(model, grid, *args, **options):
    """What draw_large makes of SMALL and these: the canvas of the finest scale."""
    return draw_large(model, grid, settings("run", *SMALL, "--steps=1", *args), RANKS, **options)[0][-1].z

@pytest.fixture(scope="module")
def drawn(model, grid):
    return latents(model, grid)

@pytest.mark.parametrize("arg", ["--method=multidiffusion", "--method=independent", "--guide=s2", "--guide=s1",
                                 "--repair", "--A=box", "--overlap=4", "--steps=2", "--lam=0.7", "--guidance=1",
                                 "--inner=2", "--guided=200,800", "--end=published", "--seed=1"])
def test_every_setting_counts(model, grid, drawn, arg):
    """Another canvas of the same size. Catches: an option that is read and not used."""
    z = latents(model, grid, arg)
    assert z.shape == (1, 3, 32, 32) and z.isfinite().all() and (z - drawn).abs().max() > 1e-3

def test_fading_counts(model, grid):
    still = latents(model, grid, "--overlap=4")
    assert (latents(model, grid, "--overlap=4", "--fade=False") - still).abs().max() > 1e-3

def test_settings_of_differences_count(model, grid):
    s2 = latents(model, grid, "--guide=s2", "--overlap=0")
    for arg in ("--delta=0.5", "--zeta=0.05"):
        assert (latents(model, grid, "--guide=s2", "--overlap=0", arg) - s2).abs().max() > 1e-5, arg

@pytest.mark.parametrize("guide, usual", [("s1", 0.1), ("s2", 0.1), ("x0", 0.5), ("x0+proxy", (0.45, 0.12))])
def test_what_lam_is(model, grid, monkeypatch, guide, usual):
    """One for all steps, or the first and the last; without it the usual one of the guide: 0.5, or 0.45 to 0.12, for
    a few steps of x0 guides, 0.1 for those of z_t."""
    seen = []
    monkeypatch.setattr(sample_joint, "sample_levels", lambda *args, **options: seen.append(options["lam"]))
    for args in (("--lam=0.6,0.2",), ("--lam=0.6",), ()):
        latents(model, grid, f"--guide={guide}", *args)
    usual = usual if isinstance(usual, tuple) else (usual, usual)
    assert seen == [(0.6, 0.2), (0.6, 0.6), pytest.approx(usual)]
    cfg = settings("run", "paper", "--steps=4")  # the preset, and a single setting over it
    assert (cfg.guide, cfg.lam, cfg.inner, cfg.overlap, cfg.steps) == ("s2", (0.5,), 1, 0, 4)

def test_when_it_is_drawn():
    """Lean times crowd at the clean end, for as many steps as are asked for; the published ones do not. Catches: two
    steps at one t, which the sampler refuses; a run of before that is drawn at other times."""
    assert times(settings("run"), 1000) == [1, 72, 164, 266, 375, 490, 609, 733, 860, 990]
    for n in (1, 2, 3, 50, 250):
        tau = times(settings("run", f"--steps={n}"), 1000)
        assert len({*tau}) == n and tau == sorted(tau) and tau[-1] == 990
    for args in (["paper"], ["--guide=s2"], ["--sampler=ddim"], ["--sampler=ddim", "--steps=50"]):
        before = settled(settings("run", *args))
        assert times(before, 1000) == list(range(1, 1000, 20))
        assert before.guided == (0, 1000)
    mixed = settled(settings("run", "--sampler=ddim", "--guided=100,300"))
    assert (mixed.guided, mixed.steps) == ((100, 300), 50)

@pytest.mark.parametrize("size, fine, want", [((512,), 0, 3), ((1024,), 0, 4), ((4096,), 0, 4), ((512, 1024), 0, 3),
                                              ((520,), 0, 1), ((256,), 2, 4), ((128,), 0, 1)])
def test_the_context_that_is_chosen(size, fine, want):
    """The coarsest of which a patch fits into the image, and whose latents divide its sides."""
    assert usual_context(size, fine, 64, 4, 5) == (want,)

def test_a_size_is_enough(ready, plain, tmp_path):
    """Without --context the picture is that of the context that fits. catches: a size that no scale fits, drawn without
    any context; one that is told too late."""
    assert np.array_equal(draw(ready, tmp_path / "x.png", "--context=()"), plain[0])
    for args in (["--size=64"], ["--size=100"], ["--size=128", "--scale=2"]):
        with pytest.raises(UserError, match="--size=.*no scale coarser than . fits: give sides of at least 128, mult"):
            draw(ready, tmp_path / "y.png", "--context=()", *args)
    assert not (tmp_path / "y.png").exists()

def test_the_batch_does_not_count(model, grid, drawn):
    """But for how kernels round. Catches: conditions of another window."""
    assert_close(latents(model, grid, "--batch=2"), drawn, 0.02)

def test_a_method_without_context_draws_one_scale(ready, tmp_path, monkeypatch):
    """Baselines cost what they should: independent windows lie side by side, MultiDiffusion's at a quarter of a side;
    bicubic draws the coarse view alone. Catches: a context sampled and thrown away, corrections in a baseline."""
    seen, real = [], sample_joint.sample_levels

    def look(levels, *args, **options):
        told = [(len(x.canvas.ij), x.canvas.overlap, x.canvas.fade, x.A and x.A.factor) for x in levels]
        seen.append((told, options["inner"]))
        return real(levels, *args, **options)
    monkeypatch.setattr(sample_joint, "sample_levels", look)
    for method in METHODS:
        draw(ready, tmp_path / f"{method}.png", f"--method={method}", "--inner=3", "--steps=1", "--context=1")
    assert seen == [([(1, 0, True, None), (4, 0, True, 2)], 3), ([(25, 12, False, None)], 0), ([(4, 0, True, None)], 0),
                    ([(1, 0, True, None)], 0)]
    names = {f"{method}{end}.png" for method in METHODS for end in ("", "_beside")}
    names |= {"bicubic_scale1.png", "joint_scale1.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    up, coarse = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("bicubic.png", "bicubic_scale1.png"))
    assert np.abs(up.reshape(64, 2, 64, 2, 3).mean((1, 3)) - coarse).mean() < 3

def test_independent_windows_are_patches(model, pyramids, grid):
    """--method=independent is plain DDIM on every window, with the condition training gave such a patch."""
    got = latents(model, grid, "--method=independent", "--sampler=ddim", "--steps=2", "--seed=3")
    k = [x["split"] for x in pyramids.slides].index("test")
    z = torch.randn(1, 3, 32, 32, generator=generator(3, 0))
    for i, j in ((0, 0), (1, 1), (0, 1)):
        item = pyramids.item(k, 0, pyramids.tensor(k, "ij0").tolist().index([i, j]), ())
        with torch.no_grad():
            c = model.summarizer(item["tokens"][None], item["mask"][None], torch.tensor([0]))
            want = ddim_sample(model.guided(c, 2.0), z[..., 16 * i:16 * i + 16, 16 * j:16 * j + 16], model.schedule, 2,
                               end="clean")
        assert_close(got[..., 16 * i:16 * i + 16, 16 * j:16 * j + 16], want, 2e-3)

def test_three_scales_and_a_canvas_as_context(model, pyramids):
    """One window guides four, they guide 16."""
    grid = load_grid(settings(), model, pyramids, (4, 4))
    cfg = settings("run", *SMALL, "--size=256", "--context=1,2", "--steps=1", "--batch=7", "--overlap=0")
    levels, scales = draw_large(model, grid, cfg, RANKS)
    assert scales == [2, 1, 0] and [tuple(x.z.shape[2:]) for x in levels] == [(16, 16), (32, 32), (64, 64)]
    assert [x.A and x.A.factor for x in levels] == [None, 2, 2] and [len(x.canvas.ij) for x in levels] == [1, 4, 16]

def test_beside_what_is_real(plain, pyramids):
    """Real, drawn, context, in a row of which each part is as large as the image, below its name. catches: the region
    of another slide or place; a region with holes."""
    image, folder = plain
    sheet = np.asarray(Image.open(folder / "a_beside.png")).astype(int)
    assert sheet.shape == (128 + LABEL, 3 * 128 + 8, 3) and sheet[:LABEL, :60].min() < 128 < sheet[:LABEL, :60].max()
    k = [x["split"] for x in pyramids.slides].index("test")
    whole = real_region(pyramids, k, 0, (0, 0), (256, 256))
    assert np.array_equal(sheet[LABEL:, :128], whole[:128, :128]) and np.array_equal(sheet[LABEL:, 132:260], image)
    assert np.array_equal(real_region(pyramids, k, 0, (1, 2), (64, 128)), whole[64:128, 128:])
    coarse = real_region(pyramids, k, 1, (0, 2), (128, 64))
    assert np.array_equal(coarse, halve(np.ascontiguousarray(whole[:, 128:])))

def test_a_region_of_which_patches_were_not_kept(pyramids, monkeypatch):
    """It is shown as coarse as it must be; not at all, if no scale holds it."""
    k = [x["split"] for x in pyramids.slides].index("test")
    half = real_region(pyramids, k, 1, (0, 0), (128, 128))
    real = pyramids.tensor

    def fewer(k, name):
        x = real(k, name)
        return x[1:] if name in ("x0", "ij0") else x
    monkeypatch.setattr(pyramids, "tensor", fewer)
    assert np.array_equal(real_region(pyramids, k, 0, (0, 0), (256, 256)), half)
    monkeypatch.setattr(pyramids, "tensor", lambda k, name: real(k, name)[:0])
    assert real_region(pyramids, k, 0, (0, 0), (256, 256)) is None

def test_pyramid_tiff_and_deepzoom(ready, plain, tmp_path):
    """The same picture, to what JPEG loses."""
    (tmp_path / "viewer.js").write_text("OpenSeadragon")
    draw(ready, tmp_path / "x.tif", "--mpp=0.5")
    with Image.open(tmp_path / "x.tif") as tiff:
        assert tiff.size == (128, 128) and np.abs(np.asarray(tiff.convert("RGB")).astype(int) - plain[0]).mean() < 8
        assert float(tiff.tag_v2[282]) == 20000  # pixels per cm
    assert (tmp_path / "x_scale1.png").exists()
    draw(ready, tmp_path / "y.dzi", f"--viewer={tmp_path / 'viewer.js'}", "--method=independent", "--steps=1")
    assert 'Width="128" Height="128"' in (tmp_path / "y.dzi").read_text() and (tmp_path / "y_files").is_dir()

def test_the_proxy_is_fitted_once(run, tmp_path, monkeypatch):
    """Without proxy.safetensors the run gets one, with the proxy it is then drawn. Catches: a fit for every picture, or
    for guides that do not ask it."""
    (tmp_path / "ema.safetensors").write_bytes((run / "ema.safetensors").read_bytes())
    calls, real = [], proxies.fit

    def fit(*args, **options):
        calls.append(options)
        return real(*args, **options, n=16, steps=4, batch=8)
    monkeypatch.setattr(proxies, "fit", fit)
    args = "--guide=x0+proxy", "--steps=1"
    draw(tmp_path, tmp_path / "d.png", *args, "--method=independent")
    assert not calls
    a = draw(tmp_path, tmp_path / "b.png", *args)
    asked, forward = [], proxies.Proxy.forward
    monkeypatch.setattr(proxies.Proxy, "forward", lambda self, z: asked.append(len(z)) or forward(self, z))
    b = draw(tmp_path / "ema.safetensors", tmp_path / "c.png", *args)
    assert len(calls) == 1 and (tmp_path / "proxy.safetensors").exists() and np.array_equal(a, b)
    assert asked == [4, 4] * proxies.PASSES  # for the misfit, and to differentiate

# ----- 2. Interruptions -----

@pytest.fixture
def hurried(monkeypatch):
    """Every look at the clock is a hundred seconds later, so that the state is kept after every step."""
    now = iter(range(0, 10000, 100))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(now)))

def test_an_interrupted_picture_goes_on(ready, tmp_path, monkeypatch, hurried, capsys):
    """The same picture as without interruption, from the step it had reached. Catches: a state that lacks a scale or
    the latest estimate, a step drawn twice, lam or t counted from the restart."""
    args = "--lam=0.9,0.1", "--steps=4"
    want, out = draw(ready, tmp_path / "a.png", *args), tmp_path / "b.png"
    real, partial = command.save_tensors, tmp_path / ".b.png.partial.safetensors"

    def dies(*what):
        real(*what)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(command, "save_tensors", dies)
        draw(ready, out, *args)
    state, meta = load_tensors(partial)
    assert meta["step"] == 1 and {k: tuple(v.shape) for k, v in state.items()} == {
        "0.z": (1, 3, 16, 16), "0.z0": (1, 3, 16, 16), "1.z": (1, 3, 32, 32), "1.z0": (1, 3, 32, 32)}
    capsys.readouterr()
    assert np.array_equal(draw(ready, out, *args), want)
    assert "going on from step 1" in capsys.readouterr().out and not partial.exists()

def test_what_is_kept_when_it_is_interrupted(ready, tmp_path, monkeypatch):
    """The last step that is whole, within the minute. Catches: a level that is a step ahead of the other."""
    want, out = draw(ready, tmp_path / "a.png"), tmp_path / "b.png"
    real, steps = command.S.ddim_step, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 4:                                             # of the second step, the finer scale
            raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(command.S, "ddim_step", dies)
        draw(ready, out)
    assert load_tensors(tmp_path / ".b.png.partial.safetensors")[1]["step"] == 1
    assert np.array_equal(draw(ready, out), want)

def test_whose_state_it_is(model, grid, tmp_path, hurried, capsys):
    """Of the same settings and conditions, on whatever device, at whatever resolution. Catches: another picture's state
    taken, names of references compared and not what they hold; a remedy that does not help against a damaged one."""
    partial = tmp_path / "p.safetensors"
    latents(model, grid, resume=partial)
    mine = partial.read_bytes()
    for args, e, goes_on in ((("--mpp=0.5", "--viewer=x.js", "--compile=True"), grid.e, True),
                             (("--seed=1",), grid.e, False), ((), grid.e + 1, False)):
        partial.write_bytes(mine)
        capsys.readouterr()
        latents(model, Grid(e), *args, resume=partial)
        assert ("going on from step 1" in capsys.readouterr().out) == goes_on, args
    partial.write_bytes(b"cut short")
    with pytest.raises(UserError, match="p.safetensors.*to draw from the start, remove it"):
        latents(model, grid, resume=partial)

def test_the_state_is_kept_every_minute_only(model, grid, tmp_path, monkeypatch):
    """Catches: a large file written at every step."""
    now = iter(range(0, 1000, 25))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(now)))
    saved = []
    monkeypatch.setattr(command, "save_tensors", lambda path, tensors, meta: saved.append(meta["step"]))
    latents(model, grid, "--steps=8", "--method=independent", "--guidance=1", resume=tmp_path / "p.safetensors")
    assert saved == [3, 6]

def test_repair(model, grid, monkeypatch):
    """Noised to t = 300, then denoised every 50 in windows at a quarter of their side, averaged uniformly. Catches: a
    repair that starts from noise, or from the windows that left the borders."""
    seen = []

    def look(levels, schedule, **options):
        seen.append((levels[0], options))
    monkeypatch.setattr(baselines, "sample_levels", look)
    level = prepare(model, grid, (128,), [0], 4)[0]
    level.z = level.z / 2
    mended = baselines.repair(model, grid, level, 0, seed=1, batch=5)
    (_, options), = seen
    assert mended is seen[0][0] and options == {"timesteps": [50, 100, 150, 200, 250, 300], "end": "clean"}
    canvas = mended.canvas
    assert (canvas.overlap, canvas.fade, canvas.batch, len(canvas.ij), mended.A) == (12, False, 5, 25, None)
    ab = model.schedule.alpha_bar[300]
    noise = (mended.z - ab.sqrt() * level.z) / (1 - ab).sqrt()
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.05)
    assert abs(torch.cosine_similarity(noise.flatten(), level.z.flatten(), dim=0)) < 0.1

@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory"), "smaller --batch"), (MemoryError(), "smaller --batch"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 B"), "smaller --batch"),
    (RuntimeError("could not create a primitive"), "smaller --batch"),
    (RuntimeError("shapes cannot be multiplied"), None)])
def test_too_little_memory(error, says):
    """One sentence. Catches: a wrong shape taken for a lack of memory."""
    with pytest.raises(UserError if says else RuntimeError, match=says or "cannot be multiplied"):
        with enough_memory():
            raise error

# ----- 3. Bad input -----

REFUSED = {
    "multiples of 8": ["--size=100", "--size=128,132"], "each once": ["--context=1,1"],
    "height,width": ["--size=64,128,64", "--size=64.5", "--context=1.5"],
    "less than a patch at scale 1": ["--size=-128"], "coarser than --scale": ["--context=0", "--scale=2"],
    "less than a patch at scale 2: a larger --size or less --context": ["--context=2"],
    "give some of 0 to 2": ["--context=4", "--context=-1"], "another --at": ["--at=3,0", "--at=-1,0"],
    "4 x 4 base tiles, the image needs 8 x 8": ["--size=512"], "2 x 1 base tiles": ["--reference=narrow.safetensors"],
    "give two numbers": ["--at=1", "--at=0.5,0", "--guided=5"],
    "one or two for --lam and --size": ["--lam=1,2,3", "--size=() --swap=0,0:1,1"],
    "/nowhere.png does not exist": ["--reference=/nowhere.png --out=new/x.png"],
    "no file /nowhere.safetensors": ["--reference=/nowhere.safetensors"],
    r"holds e \(4, 4, 95\).*96": ["--reference=wide.safetensors"], "holds e None": ["--reference=empty.safetensors"],
    "no finite numbers under the image": ["--reference=nan.safetensors", "--reference=huge.safetensors"],
    "cannot be read": ["--reference=text.png"], "has 0 'valid' images": ["--split=valid"],
    "has 2 'test' images, from 0": ["--slide=2", "--slide=-1"],
    "inside the 2 x 2 tiles": ["--swap=0,0:2,0", "--swap=-1,0:0,0", "--paste=0,0:1,1:2,2", "--paste=0,0:9,9",
                               "--paste=1,1:0,0:2,2", "--paste=0,0:-1,-1", "--paste=0,0:1,1:0,0"],
    "write row,column:row,column": ["--swap=0,0", "--swap=0,0:1,1:1,1", "--swap=a,b:c,d"],
    "known are joint, multidiffusion, independent, bicubic": ["--method=magic"], "inner=-1": ["--inner=-1"],
    "s1, s2, x0, x0": ["--guide=magic", "--guide=proxy"], "smaller overlap": ["--overlap=16"],
    "--A=lanczos: known are .*bicubic, box": ["--A=lanczos --method=independent"], "lam=": ["--lam=-1"],
    "the smaller one, and --lam": ["--guided=800,100", "--lam=1.5", "--lam=0.3,2"],
    "overlap=-2: it must be at least -1": ["--overlap=-2"], "at least 1": ["--batch=0"], "zeta=0": ["--zeta=0"],
    "no --eval": ["--eval"], "take lean or ddim": ["--sampler=plms"],
    "give 1 to 1000": ["--sampler=ddim --steps=1001"], "give 1 to 250": ["--steps=-1", "--steps=251"],
    "no finite numbers any more": ["--guide=s2 --delta=1e30"], "delta=-1": ["--delta=-1"],
    "known are clean, published": ["--end=never"], "known are reference, grid": ["--condition=cdm"],
    "ends in .png, .tif": ["--out=x.jpg"], "nowhere.js.*openseadragon": ["--out=x.dzi --viewer=/nowhere.js"],
    "other things than a Deep": ["--out=full.dzi --viewer=openseadragon.min.js"], "mpp=": ["--out=x.tif --mpp=1e-9"],
    "cannot be written": ["--out=openseadragon.min.js/x.png"],
    "--reference does not": ["--condition=grid --reference=x.png"], "--vector go with grid": ["--caption=fat"],
}

@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of things that are no references, and no places to write to."""
    folder = tmp_path_factory.mktemp("odd")
    for name, e in (("wide", torch.randn(4, 4, 95)), ("narrow", torch.randn(2, 1, 96)),
                    ("nan", torch.full((4, 4, 96), torch.nan)), ("huge", torch.ones(4, 4, 96).double() * 1e300)):
        save_tensors(folder / f"{name}.safetensors", {"e": e})
    save_tensors(folder / "empty.safetensors", {"f": torch.zeros(1)})
    (folder / "text.png").write_text("no picture")
    (folder / "openseadragon.min.js").write_text("/* OpenSeadragon */")
    (folder / "full_files").mkdir()
    (folder / "full_files" / "notes.txt").write_text("mine")
    return folder

@pytest.mark.parametrize("args, says", [(args, says) for says, several in REFUSED.items() for args in several])
def test_what_cannot_be_drawn(ready, model, odd, args, says, monkeypatch):
    """One clear error, before anything is drawn, and nothing is written. Catches: an hour of drawing lost."""
    monkeypatch.setattr(ZoomLDM, "from_run", lambda folder: model)
    if "--delta=1e30" not in args and "--overlap" not in args:
        monkeypatch.setattr(command, "draw_large", None)
    monkeypatch.chdir(odd)
    before = sorted(odd.rglob("*"))
    with pytest.raises(UserError, match=f"(?s){says}"):
        sample_joint.main([str(ready), *SMALL, "--out=x.png", "--steps=1", *args.split()])
    assert sorted(odd.rglob("*")) == before

def test_errors_at_the_shell(ready, tmp_path):
    """Exit code 2 and one sentence, no traceback."""
    ended = subprocess.run([sys.executable, "sample_joint.py", str(ready), *SMALL, f"--out={tmp_path / 'x.png'}",
                            "--context=4"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: scales [4, 0]: give some of 0 to 2")
    assert "Traceback" not in ended.stderr and not list(tmp_path.iterdir())
