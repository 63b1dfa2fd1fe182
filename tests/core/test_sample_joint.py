"""The command that draws large images, on a tiny run; and what stands between it and joint.py: windows of a trained
model, conditions, memory. Patches and their evaluation are tested in test_train.py."""
import os
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
import sample_joint as canvas
import sample_joint as joint
from common import Ranks, UserError, configure, load_tensors, save_tensors
from data import Pyramids
from diffusion import ZoomLDM, ddim_sample, guided
from large import proxy as proxies
from large import reference
from large.reference import load_grid
from sample_joint import (
    METHODS,
    PRESETS,
    Canvas,
    Config,
    Grid,
    careful,
    contexts,
    draw_large,
    pixels,
    prepare,
    repair,
    sides,
    window_eps,
)
from slides.writers import write_tiff

RANKS = Ranks(0, 1, torch.device("cpu"), None)
# 9 + 1 windows; one thread: pictures are compared bit by bit, whatever a fixture before them left
SMALL = ["--size=128", "--context=1", "--guide=x0", "--steps=2", "--device=cpu", "--amp=False", "--threads=1"]


@pytest.fixture(scope="module")
def pyramids(toy):
    return Pyramids(toy)


@pytest.fixture(scope="module")
def photo(pyramids, tmp_path_factory):
    """The picture of the first held-out slide, put together from its patches."""
    k = [x["name"] for x in pyramids.slides].index(pyramids.names("test")[0])
    image = np.zeros((256, 256, 3), np.uint8)
    for (i, j), x in zip(pyramids.tensor(k, "ij0").tolist(), pyramids.tensor(k, "x0").numpy()):
        image[i * 64:i * 64 + 64, j * 64:j * 64 + 64] = x
    path = tmp_path_factory.mktemp("photo") / "slide.png"
    Image.fromarray(image).save(path)
    return path


def settings(*args):
    return configure(Config, list(args), PRESETS, ("run", "preset"))


def draw(ready, out, *args):
    """Run the command; out: its picture."""
    sample_joint.main([str(ready), *SMALL, f"--out={out}", *args])
    return np.asarray(Image.open(out)).astype(int) if out.suffix == ".png" else None


# ----- 1. The command -----

def test_interface():
    """What checks rely on stands in sample_joint, wherever it is written."""
    assert sample_joint.Resize is canvas.Resize and sample_joint.joint_sample is joint.joint_sample


@pytest.fixture(scope="module")
def plain(ready, tmp_path_factory):
    """out: the picture of SMALL, and the folder it lies in."""
    folder = tmp_path_factory.mktemp("plain")
    return draw(ready, folder / "a.png"), folder


def test_a_picture_is_written(ready, plain):
    """Of the size asked for, with the view it was drawn with beside it; nothing unfinished stays."""
    image, folder = plain
    assert image.shape == (128, 128, 3) and image.std() > 5 and sorted(p.name for p in folder.iterdir()) == [
        "a.png", "a_scale1.png"]
    assert not (ready / "proxy.safetensors").exists()
    assert Image.open(folder / "a_scale1.png").size == (64, 64)


def test_it_depends_on_the_seed_alone(ready, plain, tmp_path):
    """Catches: noise from the global generator, or none of the scale's."""
    torch.randn(5)
    assert np.array_equal(draw(ready, tmp_path / "b.png"), plain[0])
    assert (draw(ready, tmp_path / "c.png", "--seed=1", "--method=independent") != plain[0]).mean() > 0.5


@pytest.fixture(scope="module")
def grid(model, pyramids):
    return load_grid(settings(), model, pyramids, (2, 2))


def latents(model, grid, *args, **options):
    """What draw_large makes of SMALL and these: the canvas of the finest scale."""
    return draw_large(model, grid, settings("run", *SMALL, "--steps=1", *args), RANKS, **options)[0][-1].z


@pytest.fixture(scope="module")
def drawn(model, grid):
    return latents(model, grid)


@pytest.mark.parametrize("arg", ["--method=multidiffusion", "--method=independent", "--guide=exact", "--guide=gradient",
                                 "--repair", "--A=box", "--overlap=0", "--fade=False", "--lam=0.7", "--guidance=1",
                                 "--during=500,1000", "--inner=2", "--end=published", "--seed=1"])
def test_every_setting_counts(model, grid, drawn, arg):
    """Another canvas of the same size. Catches: an option that is read and not used."""
    z = latents(model, grid, arg)
    assert z.shape == (1, 3, 32, 32) and z.isfinite().all() and (z - drawn).abs().max() > 1e-3


def test_settings_of_differences_count(model, grid):
    exact = latents(model, grid, "--guide=exact")
    for arg in ("--null=False", "--delta=0.5", "--zeta=0.05", "--lam=0.2", "--lam=0.3,0.1"):
        assert (latents(model, grid, "--guide=exact", arg) - exact).abs().max() > 1e-5, arg
    assert torch.equal(latents(model, grid, "--guide=exact", "--during=0,0"), latents(model, grid, "--lam=0.0"))


@pytest.mark.parametrize("guide", joint.GUIDES)
def test_what_lam_means(model, grid, monkeypatch, guide):
    """The share of the misfit for guides of the estimate, the size of a step for those of z_t."""
    seen = []
    monkeypatch.setattr(sample_joint, "sample_levels", lambda *args, **options: seen.append(options))
    latents(model, grid, f"--guide={guide}", "--lam=0.6,0.2")
    latents(model, grid, f"--guide={guide}", "--lam=0.6")
    assert [o["normalize"] for o in seen] == ["share" if guide.startswith("x0") else True] * 2
    assert [o["lam"] for o in seen] == [(0.6, 0.2), (0.6, 0.6)]


def test_the_batch_does_not_count(model, grid, drawn):
    """But for how kernels round. Catches: conditions of another window."""
    assert_close(latents(model, grid, "--batch=2"), drawn, 0.02)


def test_a_method_without_context_draws_one_scale(ready, tmp_path, monkeypatch):
    """Baselines cost what they should: independent windows lie side by side, MultiDiffusion's at a quarter of a side;
    bicubic draws the coarse view alone. Catches: a context sampled and thrown away, corrections in a baseline."""
    seen, real = [], joint.sample_levels

    def look(levels, *args, **options):
        seen.append(([(len(x.canvas.ij), x.canvas.overlap, x.canvas.fade, x.factor) for x in levels], options["inner"]))
        return real(levels, *args, **options)
    monkeypatch.setattr(sample_joint, "sample_levels", look)
    for method in METHODS:
        draw(ready, tmp_path / f"{method}.png", f"--method={method}", "--inner=3", "--steps=1", "--context=1")
    assert seen == [([(1, 3, True, 0), (9, 3, True, 2)], 3), ([(25, 12, False, 0)], 0), ([(4, 0, True, 0)], 0),
                    ([(1, 3, True, 0)], 0)]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["bicubic.png", "bicubic_scale1.png", "independent.png", "joint.png", "joint_scale1.png",
                     "multidiffusion.png"]
    up, coarse = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("bicubic.png", "bicubic_scale1.png"))
    assert np.abs(up.reshape(64, 2, 64, 2, 3).mean((1, 3)) - coarse).mean() < 3


def test_independent_windows_are_patches(model, pyramids, grid):
    """--method=independent is plain DDIM on every window, with the condition training gave such a patch."""
    got = latents(model, grid, "--method=independent", "--steps=2", "--seed=3")
    k = [x["split"] for x in pyramids.slides].index("test")
    z = torch.randn(1, 3, 32, 32, generator=sample_joint.generator(3, 0))
    for i, j in ((0, 0), (1, 1), (0, 1)):
        item = pyramids.item(k, 0, pyramids.tensor(k, "ij0").tolist().index([i, j]), ())
        with torch.no_grad():
            c = model.summarizer(item["tokens"][None], item["mask"][None], torch.tensor([0]))
            want = ddim_sample(model.guided(c, 2.0), z[..., 16 * i:16 * i + 16, 16 * j:16 * j + 16], model.schedule, 2,
                               end="clean")
        assert_close(got[..., 16 * i:16 * i + 16, 16 * j:16 * j + 16], want, 2e-3)


def test_three_scales_and_a_canvas_as_context(ready, tmp_path, capsys):
    """One window guides four, they guide 16; --profile says what it cost."""
    draw(ready, tmp_path / "x.png", "--size=256", "--context=1,2", "--steps=1", "--profile", "--batch=7",
         "--guidance=1", "--overlap=0")
    assert [Image.open(tmp_path / n).size for n in ("x.png", "x_scale1.png", "x_scale2.png")] == [
        (256, 256), (128, 128), (64, 64)]
    rows = {r[0]: int(r[1]) for r in map(str.split, capsys.readouterr().out.splitlines()) if r and r[0] in (
        "U-Net", "decoder", "encoder")}
    assert rows["U-Net"] == 1 + 4 + 16 and rows["encoder"] == 2 * (4 + 16)


def test_estimates_on_the_way(ready, plain, tmp_path):
    """--frames=n writes every n-th estimate, and changes nothing."""
    image = draw(ready, tmp_path / "x.png", "--frames=2")
    assert [p.name for p in sorted((tmp_path / "x_frames").iterdir())] == ["0002.png"]
    assert np.array_equal(image, plain[0])
    last = np.asarray(Image.open(tmp_path / "x_frames" / "0002.png")).astype(int)
    assert last.shape == image.shape and np.abs(last - image).max() <= 1  # end="clean": the last estimate is the image


def test_pyramid_tiff_and_deepzoom(ready, plain, tmp_path):
    """The same picture, to what JPEG loses."""
    (tmp_path / "viewer.js").write_text("OpenSeadragon")
    draw(ready, tmp_path / "x.tif", "--mpp=0.5")
    with Image.open(tmp_path / "x.tif") as tiff:
        assert tiff.size == (128, 128) and np.abs(np.asarray(tiff.convert("RGB")).astype(int) - plain[0]).mean() < 8
        assert float(tiff.tag_v2[282]) == 20000  # pixels per cm
    assert (tmp_path / "x_scale1.png").exists()
    draw(ready, tmp_path / "y.dzi", f"--viewer={tmp_path / 'viewer.js'}", "--method=independent", "--steps=1")
    assert 'Width="128" Height="128"' in (tmp_path / "y" / "image.dzi").read_text()


def test_the_proxy_is_fitted_once(run, tmp_path, monkeypatch):
    """Without proxy.safetensors the run gets one, with the proxy it is then drawn. Catches: a fit for every picture, or
    for guides that do not ask it."""
    (tmp_path / "ema.safetensors").write_bytes((run / "ema.safetensors").read_bytes())
    calls, real = [], proxies.fit

    def fit(*args, **options):
        calls.append(options)
        return real(*args, **options, n=16, steps=4, batch=8)
    monkeypatch.setattr(proxies, "fit", fit)
    large = ["--size=256", "--context=2", "--steps=1", "--guidance=1"]
    draw(tmp_path, tmp_path / "d.png", "--guide=proxy", "--method=independent", "--steps=1")
    assert not calls
    a = draw(tmp_path, tmp_path / "b.png", *large, "--guide=x0+proxy")
    asked, forward = [], proxies.Proxy.forward
    monkeypatch.setattr(proxies.Proxy, "forward", lambda self, z: asked.append(len(z)) or forward(self, z))
    b = draw(tmp_path / "ema.safetensors", tmp_path / "c.png", *large, "--guide=x0+proxy")
    assert len(calls) == 1 and (tmp_path / "proxy.safetensors").exists() and np.array_equal(a, b)
    assert asked == [25, 25]  # for the misfit, and to differentiate


def test_a_proxy_with_a_context_one_scale_up(ready, tmp_path, monkeypatch):
    """A proxy of a quarter of the side has no half of it: both are compared at the quarter."""
    monkeypatch.setattr(proxies, "load", lambda *args: proxies.Proxy(4).requires_grad_(False))
    near, free = (draw(ready, tmp_path / "x.png", "--guide=x0+proxy", f"--lam={lam}") for lam in (0.3, 0.0))
    assert near.shape == free.shape and not np.array_equal(near, free)


def test_gradient_without_the_null_branch(model, grid):
    assert latents(model, grid, "--guide=gradient", "--null=False").isfinite().all()


# ----- 2. Interruptions -----

@pytest.fixture
def hurried(monkeypatch):
    """Every look at the clock is a hundred seconds later, so that the state is kept after every step."""
    now = [0.0]

    def monotonic():
        now[0] += 100
        return now[0]
    monkeypatch.setattr(sample_joint, "time", SimpleNamespace(monotonic=monotonic))


def test_an_interrupted_picture_goes_on(ready, tmp_path, monkeypatch, hurried, capsys):
    """The same picture as without interruption, from the step it had reached. Catches: a state that lacks a scale, a
    step drawn twice."""
    args = ["--lam=0.9,0.1"]
    want = draw(ready, tmp_path / "a.png", *args)
    frames, real = [], sample_joint.picture

    def dies(*args):
        frames.append(1)
        if len(frames) == 2:
            raise KeyboardInterrupt
        return real(*args)
    out = tmp_path / "b.png"
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sample_joint, "picture", dies)
        draw(ready, out, *args, "--frames=1")
    partial = tmp_path / ".b.png.partial.safetensors"
    state, meta = load_tensors(partial)
    assert meta["step"] == 1 and [tuple(state[k].shape) for k in ("0", "1")] == [(1, 3, 16, 16), (1, 3, 32, 32)]
    capsys.readouterr()
    assert np.array_equal(draw(ready, out, *args), want)
    assert "going on from step 1" in capsys.readouterr().out and not partial.exists()


def test_resumes_with_the_same_conditions_only(ready, tmp_path, monkeypatch, hurried, capsys):
    """A reference of the same name that now holds other embeddings is another image. catches: only names compared."""
    ref, out, real, frames = tmp_path / "e.safetensors", tmp_path / "b.png", sample_joint.picture, []
    save_tensors(ref, {"e": torch.randn(8, 8, 96)}, {})

    def dies(*args):
        frames.append(1)
        if len(frames) == 2:
            raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sample_joint, "picture", dies)
        draw(ready, out, f"--reference={ref}", "--frames=1")
    assert (tmp_path / ".b.png.partial.safetensors").exists()
    save_tensors(ref, {"e": torch.randn(8, 8, 96)}, {})
    capsys.readouterr()
    got = draw(ready, out, f"--reference={ref}")
    assert "going on" not in capsys.readouterr().out
    assert np.array_equal(got, draw(ready, tmp_path / "a.png", f"--reference={ref}"))


def test_what_is_refused_is_refused_before_drawing(ready, tmp_path, monkeypatch):
    """Catches: an hour of drawing lost to a name that cannot be written."""
    monkeypatch.setattr(sample_joint, "draw_large", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    viewer = tmp_path / "openseadragon.min.js"
    viewer.write_text("/* OpenSeadragon */")
    for out, arg, says in (("x.dzi", "--viewer=/nowhere.js", "is not openseadragon"), ("x.tif", "--mpp=1e-9", "mpp="),
                           ("full.dzi", f"--viewer={viewer}", "holds other things"),
                           ("openseadragon.min.js/x.png", "--seed=1", "cannot be written"),
                           ("x.png", "--inner=-1", "inner=-1"), ("x.png", "--lam=-1", "lam="),
                           ("x.png", "--zeta=0", "zeta=0"), ("x.png", "--delta=-1", "delta=-1")):
        with pytest.raises(UserError, match=says):
            draw(ready, tmp_path / out, arg)
    with pytest.raises(UserError, match="does not exist"):
        draw(ready, tmp_path / "new" / "x.png", "--reference=/nowhere.png")
    assert not (tmp_path / "new").exists()


def test_a_damaged_state_says_so(ready, tmp_path):
    """catches: a hidden file that stops the command for good, and a remedy that does not help."""
    (tmp_path / ".x.png.partial.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="partial.safetensors.*to draw from the start, remove it"):
        draw(ready, tmp_path / "x.png")


def test_how_it_is_written_does_not_start_it_anew(model, grid, tmp_path, monkeypatch, hurried, capsys):
    """The state of one device, resolution or viewer serves another."""
    partial = tmp_path / "p.safetensors"
    latents(model, grid, "--steps=2", resume=partial)
    latents(model, grid, "--steps=2", "--mpp=0.5", "--viewer=x.js", "--compile=True", resume=partial)
    assert "going on from step" in capsys.readouterr().out


def test_the_state_of_another_picture_is_left_alone(ready, plain, tmp_path, capsys):
    """Other settings under the same name start from noise."""
    partial = tmp_path / ".x.png.partial.safetensors"
    save_tensors(partial, {"0": torch.zeros(1, 3, 16, 16), "1": torch.zeros(1, 3, 32, 32)},
                 {"settings": {"seed": 1}, "step": 1})
    assert np.array_equal(draw(ready, tmp_path / "x.png"), plain[0])
    assert "going on" not in capsys.readouterr().out


def test_the_state_is_kept_every_minute_only(model, grid, tmp_path, monkeypatch):
    """Catches: a large file written at every step."""
    now = iter(range(0, 1000, 25))
    monkeypatch.setattr(sample_joint, "time", SimpleNamespace(monotonic=lambda: next(now)))
    saved = []
    monkeypatch.setattr(sample_joint, "save_tensors", lambda path, tensors, meta: saved.append(meta["step"]))
    latents(model, grid, "--steps=8", "--method=independent", "--guidance=1", resume=tmp_path / "p.safetensors")
    assert saved == [3, 6]


# ----- 3. Conditions -----

def grid_file(folder, h, w, width=96, name="grid.safetensors"):
    save_tensors(folder / name, {"e": torch.randn(h, w, width, generator=torch.Generator().manual_seed(5)).half()})
    return folder / name


def test_grid_of_a_slide(model, pyramids, toy):
    """The stored embeddings from --at on, of the k-th held-out or training slide, in the run's own deviations."""
    test, train = ([k for k, x in enumerate(pyramids.slides) if x["split"] == s] for s in ("test", "train"))
    for args, k, at in (([], test[0], (0, 0)), (["--slide=1", "--at=1,2"], test[1], (1, 2)),
                        (["--split=train", "--slide=3"], train[3], (0, 0))):
        grid = load_grid(settings(*args), model, pyramids, (2, 2))
        want = pyramids.tensor(k, "e")[at[0]:at[0] + 2, at[1]:at[1] + 2].float().movedim(-1, 0)
        assert isinstance(grid, Grid) and torch.equal(grid.e, want)
    std = [2 * v for v in pyramids.std]
    assert torch.allclose(load_grid(settings(), model, Pyramids(toy, std=std), (2, 2)).e,
                          load_grid(settings(), model, pyramids, (2, 2)).e / 2)


def test_grid_of_a_picture(model, pyramids, photo):
    """The slide's own picture gives its stored embeddings, to half precision. Catches: rows and columns of tiles
    exchanged, deviations of another set, colours in another order."""
    stored = load_grid(settings("--at=1,0"), model, pyramids, (3, 4))
    seen = load_grid(settings("--at=1,0", f"--reference={photo}"), model, pyramids, (3, 4))
    assert_close(seen.e, stored.e, 1e-3)
    assert (stored.e[:, 0, 1] - stored.e[:, 1, 0]).abs().max() > 0.1


def test_grid_of_a_file(model, pyramids, tmp_path):
    path = grid_file(tmp_path, 3, 5)
    grid = load_grid(settings(f"--reference={path}", "--at=0,2"), model, pyramids, (3, 3))
    assert torch.equal(grid.e, load_tensors(path)[0]["e"][:, 2:].float().movedim(-1, 0))


def test_grid_of_a_file_of_data(model, pyramids, toy, monkeypatch):
    """Taken as the run's own deviations say, whatever set they come from. Catches: embeddings of another scale."""
    k = [x["name"] for x in pyramids.slides].index(pyramids.names("test")[0])
    path = toy / pyramids.slides[k]["file"]
    assert torch.equal(load_grid(settings(f"--reference={path}"), model, pyramids, (2, 2)).e,
                       load_grid(settings(), model, pyramids, (2, 2)).e)
    monkeypatch.setitem(model.info, "std", [2 * v for v in pyramids.std])
    half = load_grid(settings(f"--reference={path}"), model, pyramids, (2, 2)).e
    assert_close(half, pyramids.tensor(k, "e")[:2, :2].float().movedim(-1, 0) / 2, 1e-6)


def test_without_its_data(ready, photo, tmp_path, capsys):
    """A run that was copied alone draws from references; what only data can give is still asked for. Catches: a folder
    demanded and not read; another resolution taken without a word."""
    state, config = load_tensors(ready / "ema.safetensors")
    config["info"]["data"] = "/nowhere/data"
    folders = {}
    for mpp in (0.5, "unsaid"):
        info = {k: v for k, v in config["info"].items() if k != "mpp"} | ({} if mpp == "unsaid" else {"mpp": mpp})
        folders[mpp] = tmp_path / str(mpp)
        save_tensors(folders[mpp] / "ema.safetensors", state, config | {"info": info})
    image = np.asarray(Image.open(photo))
    write_tiff(tmp_path / "fine.tif", [image.repeat(2, 0).repeat(2, 1)], (512, 512), quality=98, mpp=0.25)
    fast = (f"--reference={tmp_path / 'fine.tif'}", "--guide=x0", "--steps=2")
    known = draw(folders[0.5], tmp_path / "a.png", *fast)
    assert "own resolution" not in capsys.readouterr().out
    assert not np.array_equal(known, draw(folders["unsaid"], tmp_path / "b.png", *fast))
    assert "fine.tif is read at its own resolution" in capsys.readouterr().out
    for args in ((), (fast[0], "--data=/nowhere/data")):
        with pytest.raises(UserError, match="/nowhere/data"):
            draw(folders[0.5], tmp_path / "c.png", *args)


def test_a_reference_is_read_where_and_as_finely_as_needed(model, pyramids, photo, tmp_path, monkeypatch):
    """A file twice as fine as the data shows the same tissue, not its upper left quarter enlarged; one that does not
    say its resolution is taken as it is. Catches: a slide embedded whole for a corner of it."""
    seen, real = [], reference.embed
    monkeypatch.setattr(reference, "embed", lambda encoder, x: (seen.append(len(x)), real(encoder, x))[1])
    want = load_grid(settings("--at=2,1", f"--reference={photo}"), model, pyramids, (1, 2))
    assert seen == [2]
    image = np.asarray(Image.open(photo))
    write_tiff(tmp_path / "fine.tif", [image.repeat(2, 0).repeat(2, 1)], (512, 512), quality=98, mpp=0.25)
    args = settings("--at=2,1", f"--reference={tmp_path / 'fine.tif'}")
    half = SimpleNamespace(mpp=0.5)
    assert_close(load_grid(args, model, half, (1, 2)).e, want.e, 0.2)
    assert (load_grid(args, model, SimpleNamespace(mpp=None), (1, 2)).e - want.e).abs().max() > 0.5
    plain = load_grid(settings("--at=2,1", f"--reference={photo}"), model, half, (1, 2))
    assert torch.equal(plain.e, want.e)
    with pytest.raises(UserError, match="has 4 x 4 base tiles, the image needs 4 x 4"):
        load_grid(args, model, half, (4, 4))


def test_edits_of_the_grid(model, pyramids):
    """--swap, then --paste; cells that neither names stay."""
    e = load_grid(settings(), model, pyramids, (4, 4)).e
    swapped = load_grid(settings("--swap=0,0:3,2;1,1:2,2"), model, pyramids, (4, 4)).e
    want = e.clone()
    for a, b in (((0, 0), (3, 2)), ((1, 1), (2, 2))):
        want[:, a[0], a[1]], want[:, b[0], b[1]] = e[:, b[0], b[1]], e[:, a[0], a[1]]
    assert torch.equal(swapped, want)
    pasted = load_grid(settings("--paste=0,0:2,1:2,3;0,3:3,0"), model, pyramids, (4, 4)).e
    want = e.clone()
    want[:, 2:4, 1:4], want[:, 3, 0] = e[:, :2, :3], e[:, 0, 3]
    assert torch.equal(pasted, want)
    both = load_grid(settings("--swap=0,0:1,1", "--paste=0,0:2,2"), model, pyramids, (4, 4)).e
    assert torch.equal(both[:, 2, 2], e[:, 1, 1])


def test_an_edit_reaches_its_windows_only(model, pyramids):
    """The tokens of windows that touch no moved cell are the same; all coarser windows over one change."""
    plain, moved = (load_grid(settings(*a), model, pyramids, (4, 4)) for a in ((), ("--swap=0,0:3,3",)))
    for s, windows, touched in ((0, 16, {(0, 0), (3, 3)}), (1, 4, {(0, 0), (1, 1)}), (2, 1, {(0, 0)})):
        lattice = Canvas(64 >> s, 64 >> s, 16)
        a, b = (contexts(model, g, s, lattice) for g in (plain, moved))
        assert len(a) == windows
        assert {(i // 16, j // 16) for i, j in a if not torch.equal(a[i, j], b[i, j])} == touched


@pytest.mark.parametrize("s", [0, 1, 2])
def test_windows_get_the_condition_of_their_patch(model, pyramids, s):
    """At whole patches the tokens are those of training, at every scale; between, they are asked for at their place,
    in base tiles. Catches: rows and columns exchanged, latents taken for tiles, the wrong scale's token."""
    k = [x["split"] for x in pyramids.slides].index("test")
    lattice = Canvas(64 >> s, 64 >> s, 16, batch=3)
    c = contexts(model, load_grid(settings(), model, pyramids, (4, 4)), s, lattice)
    for n, (i, j) in enumerate(pyramids.tensor(k, f"ij{s}").tolist()):
        item = pyramids.item(k, s, n, ())
        want = model.summarizer(item["tokens"][None], item["mask"][None], torch.tensor([s]))[0]
        assert_close(c[16 * i, 16 * j], want, 1e-5, f"{i, j}")
    asked = []

    def condition(*where):
        asked.append(where)
        return torch.randn(96, 2 ** s, 2 ** s)
    contexts(model, condition, s, Canvas(20, 24, 16, 12))
    assert asked == [(s, i / 16 * 2 ** s, j / 16 * 2 ** s) for i in (0, 4) for j in (0, 4, 8)]


# ----- 4. A trained model behind windows -----

@pytest.fixture(scope="module")
def windows(model):
    """out: tokens by corner, z, t, corners of three windows."""
    g = torch.Generator().manual_seed(1)
    ij = [(0, 0), (0, 12), (12, 0)]
    c = {p: torch.randn(65, 32, generator=g) for p in ij}
    return c, torch.randn(3, 3, 16, 16, generator=g), torch.tensor([10, 500, 900]), ij


@pytest.mark.parametrize("room", [2 ** 28, 0, 40_000])
@pytest.mark.parametrize("guidance", [1, 2.5])
def test_eps_of_windows(model, windows, guidance, room, monkeypatch):
    """What ZoomLDM.guided says, whether keys and values are kept or there is no room for them."""
    c, z, t, ij = windows
    made, real = [], model.unet.cache_context
    monkeypatch.setattr(sample_joint, "BUDGET", room)
    monkeypatch.setattr(model.unet, "cache_context", lambda tokens: made.append(len(tokens)) or real(tokens))
    eps, diff = window_eps(model, c, guidance)
    assert diff is None
    with torch.no_grad():
        want = model.guided(torch.stack([c[p] for p in ij]), guidance)(z, t)
        made.clear()
        for _ in range(3):
            assert_close(eps(z, t, ij), want, 1e-5)
        assert_close(eps(z[1:], t[1:], ij[1:]), want[1:], 1e-5)  # other windows, other keys and values
    rows = 1 if guidance == 1 else 2
    assert made == ([3 * rows] * 3 + [2 * rows] if room < 2 ** 28 else [3 * rows, 2 * rows])


def test_null_branch_left_out_of_differences(model, windows):
    """null=False: eps says both its own answer and the conditional one, which diff then gives alone."""
    c, z, t, ij = windows
    eps, diff = window_eps(model, c, 2.5, null=False)
    tokens = torch.stack([c[p] for p in ij])
    with torch.no_grad():
        out = eps(z, t, ij)
        assert out.shape == (3, 6, 16, 16)
        assert_close(out[:, :3], model.guided(tokens, 2.5)(z, t), 1e-5)
        for conditional in (out[:, 3:], diff(z, t, ij)):
            assert_close(conditional, guided(model.eps, tokens, 1.0)(z, t), 1e-5)
    eps, diff = window_eps(model, c, 1, null=False)
    assert diff is None and eps(z, t, ij).shape == z.shape


def test_guidance_in_an_interval(model, windows):
    """From the first t on and below the second both branches, elsewhere the conditional one alone, in one pass of half
    the size. catches: the interval turned round, its ends on the wrong side."""
    c, z, _, ij = windows
    tokens, seen, real = torch.stack([c[p] for p in ij]), [], model.eps
    for null in (True, False):
        eps, _ = window_eps(model, c, 2.5, null, (200, 700))
        for t, guidance in ((199, 1.0), (200, 2.5), (699, 2.5), (700, 1.0)):
            t = torch.full((3,), t)
            with torch.no_grad():
                want, plain = (guided(real, tokens, g)(z, t) for g in (guidance, 1.0))
                assert_close(eps(z, t, ij), want if null else torch.cat([want, plain], 1), 1e-5)
    model.eps = lambda z, t, kv: seen.append(len(z)) or real(z, t, kv)
    eps, _ = window_eps(model, c, 2.5, guided=(200, 700))
    for t in (100, 300):
        eps(z, torch.full((3,), t), ij)
    del model.eps
    assert seen == [3, 6]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 B"),
                                   RuntimeError("could not create a primitive")])
def test_too_little_memory_for_the_batch(error, capsys):
    """Smaller parts from then on, said aloud, the same result. Catches: arguments that are not cut along, a part lost,
    a batch that is tried in full every time."""
    tried = []

    def fn(z, t, ij):
        tried.append(len(z))
        if len(z) > 3:
            raise error
        assert len(z) == len(t) == len(ij)
        return z * t[:, None] + torch.tensor(ij)
    f, z, t, ij = careful(fn), torch.randn(10, 2), torch.randn(10), [(k, 2 * k) for k in range(10)]
    want = z * t[:, None] + torch.tensor(ij)
    assert torch.equal(f(z, t, ij), want) and tried == [10, 5, 2, 2, 2, 2, 2]
    assert torch.equal(f(z, t, ij), want) and tried[7:] == [2] * 5
    said = capsys.readouterr()
    assert (said.out + said.err).count("memory does not suffice for") == 2
    assert "for 10 windows at once: going on with 5" in said.out + said.err


def test_too_little_memory_for_one():
    def fn(z):
        raise torch.OutOfMemoryError("no")
    with pytest.raises(UserError, match="one window"):
        careful(fn)(torch.zeros(4, 1))


def test_other_errors_pass():
    """Catches: a wrong shape taken for a lack of memory, and tried again in halves."""
    def fn(z):
        calls.append(len(z))
        raise RuntimeError("shapes cannot be multiplied")
    calls = []
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        careful(fn)(torch.zeros(4, 1))
    assert calls == [4]


def test_levels(model):
    """Noise depends on seed and scale alone, so that a level is the same whatever is drawn with it."""
    def condition(s, i, j):
        return torch.randn(96, 2 ** s, 2 ** s, generator=torch.Generator().manual_seed(int(8 * i + j)))
    a = prepare(model, condition, (256, 512), [2, 0], 4, seed=3)
    b = prepare(model, condition, (256, 512), [2, 1, 0], 4, seed=3, fade=False, batch=5)
    assert [x.z.shape[2:] for x in b] == [(16, 32), (32, 64), (64, 128)]
    assert [x.factor for x in a] == [0, 4] and [x.factor for x in b] == [0, 2, 2]
    assert torch.equal(a[0].z, b[0].z) and torch.equal(a[1].z, b[2].z)
    assert not torch.equal(a[0].z.flatten(), b[1].z.flatten()[:a[0].z.numel()])
    assert (b[0].canvas.fade, b[0].canvas.batch, b[0].canvas.overlap, a[0].canvas.fade) == (False, 5, 4, True)
    assert not torch.equal(prepare(model, condition, (256,), [0], 4, seed=4)[0].z,
                           prepare(model, condition, (256,), [0], 4, seed=3)[0].z)


def test_repair(model, grid, monkeypatch):
    """Noised to t = 300, then denoised every 50 in windows at a quarter of their side, averaged uniformly. Catches: a
    repair that starts from noise, or from the windows that left the borders."""
    seen = []

    def look(levels, decode, encode, schedule, **options):
        seen.append((levels[0], options))
        return levels
    monkeypatch.setattr(sample_joint, "sample_levels", look)
    level = prepare(model, grid, (128,), [0], 4)[0]
    level.z = level.z / 2
    mended = repair(model, grid, level, 0, seed=1, batch=5)
    (_, options), = seen
    assert mended is seen[0][0] and options == {"timesteps": [50, 100, 150, 200, 250, 300], "end": "clean",
                                                             "callback": None}
    canvas = mended.canvas
    assert (canvas.overlap, canvas.fade, canvas.batch, len(canvas.ij), mended.factor) == (12, False, 5, 25, 0)
    ab = model.schedule.alpha_bar[300]
    noise = (mended.z - ab.sqrt() * level.z) / (1 - ab).sqrt()
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.05)
    assert abs(torch.cosine_similarity(noise.flatten(), level.z.flatten(), dim=0)) < 0.1


def test_sides():
    """Latents at every scale, and what does not fit."""
    assert sides((512, 1024), [3, 1, 0], 64, 4, 5) == [(16, 32), (64, 128), (128, 256)]
    assert sides((256,), [3, 1], 64, 4, 5) == [(16, 16), (64, 64)]


def test_decoding_in_strips(model, monkeypatch):
    """uint8, close to the decode at once; tiles are half as large again as a patch. Catches: a canvas decoded whole."""
    z, seen, real = torch.randn(1, 3, 72, 40), [], model.decode
    monkeypatch.setattr(model, "decode", lambda part: seen.append(tuple(part.shape)) or real(part))
    strips = list(pixels(model, z, RANKS, batch=1))
    assert set(seen) == {(1, 3, 24, 24)} and len(strips) == 4 and all(x.dtype == np.uint8 for x in strips)
    with torch.no_grad():
        whole = ((real(z).clamp(-1, 1) + 1) * 127.5)[0].movedim(0, -1).numpy()
    image = np.concatenate(strips)
    assert image.shape == whole.shape and np.corrcoef(image.ravel(), whole.ravel())[0, 1] > 0.9


# ----- 5. Bad input -----

@pytest.mark.parametrize("args, says", [
    (["--size=100"], "does not divide.*multiples of 8"),
    (["--size=128,132"], "multiples of 8"),
    (["--size=64,128,64"], "height,width"),
    (["--size=64.5"], "height,width"),
    (["--size=-128"], "less than a patch"),
    (["--context=4"], "the run knows 0 to 2"),
    (["--context=0"], "coarser ones than --scale"),
    (["--context=1,1"], "each once"),
    (["--context=-1"], "the run knows"),
    (["--scale=2"], "coarser ones"),
    (["--context=2"], "less than a patch of 64: take a larger --size, or a smaller --context"),
    (["--size=512"], r"4 x 4 base tiles, the image needs 8 x 8"),
    (["--at=3,0"], "another --at"),
    (["--at=-1,0"], "another --at"),
    (["--at=1"], "give two numbers"),
    (["--lam=1,2,3"], "one or two for lam"),
    (["--during=5"], "give two numbers"),
    (["--reference=/nowhere.png"], "/nowhere.png does not exist"),
    (["--reference=/nowhere.safetensors"], "no file /nowhere.safetensors"),
    (["--reference=WIDE"], r"holds e \(4, 4, 95\).*96"),
    (["--reference=NARROW"], "2 x 1 base tiles"),
    (["--reference=EMPTY"], "holds e None"),
    (["--reference=TEXT"], "cannot be read"),
    (["--slide=2"], "has 2 'test' images, from 0"),
    (["--slide=-1"], "has 2 'test' images"),
    (["--split=valid"], "has 0 'valid' images"),
    (["--swap=0,0:2,0"], "inside the 2 x 2 tiles"),
    (["--swap=0,0"], "write row,column:row,column"),
    (["--swap=0,0:1,1:1,1"], "write row,column:row,column"),
    (["--swap=a,b:c,d"], "write row,column:row,column"),
    (["--paste=0,0:1,1:2,2"], "inside the 2 x 2 tiles"),
    (["--method=magic"], "known are joint, multidiffusion, independent, bicubic"),
    (["--guide=magic"], "exact, gradient, proxy, x0, x0"),
    (["--A=lanczos"], "--A=lanczos: known are .*bicubic, box"),
    (["--A=lanczos", "--method=independent"], "--A=lanczos: known are .*bicubic, box"),
    (["--frames=-1"], "nothing is negative"),
    (["--overlap=-2"], "nothing is negative"),
    (["--eval"], "--eval is for patches"),
    (["--sampler=plms"], "drawn with ddim"),
    (["--guide=exact", "--delta=1e30"], "no finite numbers any more"),
    (["--out=x.jpg"], "ends in .png, .tif"),
    (["--overlap=16"], "smaller overlap"),
    (["--steps=3"], "take a divisor of 1000"),
    (["--end=never"], "known are clean, published"),
    (["--batch=0"], "at least 1"),
    (["--out=x.dzi", "--viewer=/nowhere.js"], "openseadragon.min.js"),
    (["--reference=NAN"], "no finite numbers"),
    (["--reference=HUGE"], "no finite numbers"),
    (["--condition=grid", "--reference=x.png"], "does not go with --condition=grid"),
    (["--size=()", "--swap=0,0:1,1"], "for large images"),
], ids=lambda v: "" if isinstance(v, str) else " ".join(v))
def test_what_cannot_be_drawn(ready, model, tmp_path, args, says, monkeypatch):
    """One clear error, and nothing is written."""
    monkeypatch.setattr(ZoomLDM, "from_run", lambda folder: model)
    grid_file(tmp_path, 4, 4, 95, "wide.safetensors")
    grid_file(tmp_path, 2, 1, 96, "narrow.safetensors")
    save_tensors(tmp_path / "empty.safetensors", {"f": torch.zeros(1)})
    save_tensors(tmp_path / "nan.safetensors", {"e": torch.full((4, 4, 96), torch.nan)})
    save_tensors(tmp_path / "huge.safetensors", {"e": torch.full((4, 4, 96), 1e300, dtype=torch.float64)})
    (tmp_path / "text.png").write_text("no picture")
    before = sorted(tmp_path.iterdir())
    for name in ("wide.safetensors", "narrow.safetensors", "empty.safetensors", "nan.safetensors", "huge.safetensors",
                 "text.png"):
        args = [a.replace(name.split(".")[0].upper(), str(tmp_path / name)) for a in args]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"(?s){says}"):
        sample_joint.main([str(ready), *SMALL, "--out=x.png", "--steps=1", *args])
    assert sorted(p for p in tmp_path.iterdir() if not p.name.startswith(".")) == before


@pytest.mark.parametrize("edit", ["--swap=-1,0:0,0", "--paste=0,0:9,9", "--paste=1,1:0,0:2,2", "--paste=0,0:-1,-1",
                                  "--paste=0,0:1,1:0,0"])
def test_edits_outside_the_grid(model, pyramids, edit):
    """Cells outside are refused, not wrapped around, passed over, or one of them copied over all."""
    with pytest.raises(UserError):
        load_grid(settings(edit), model, pyramids, (2, 2))


@pytest.mark.parametrize("arg", ["--context=1.5", "--at=0.5,0"])
def test_numbers_that_are_not_whole(ready, tmp_path, arg):
    with pytest.raises(UserError):
        draw(ready, tmp_path / "x.png", "--steps=1", arg)


def test_errors_at_the_shell(ready, tmp_path):
    """Exit code 2 and one sentence, no traceback."""
    command = [sys.executable, "sample_joint.py", str(ready), *SMALL, f"--out={tmp_path / 'x.png'}"]
    streams = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    calm = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    children = [(subprocess.Popen([*command, arg], env=calm, **streams), says) for arg, says in (
        ("--context=4", "the run knows 0 to 2"), ("--reference=/nowhere.png", "does not exist"))]
    for child, says in children:
        _, text = child.communicate()
        assert child.returncode == 2 and says in text and "Traceback" not in text and text.startswith("error: ")
    assert not list(tmp_path.iterdir())
