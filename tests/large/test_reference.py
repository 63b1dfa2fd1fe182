"""Whose conditions a large image has: those of a slide, a picture, a file; cells moved and copied."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rule import assert_close

import sample_joint
from common import UserError, configure, load_tensors, save_tensors
from data import Pyramids
from large import reference
from large.command import PRESETS, Settings
from large.reference import load_grid
from large.windows import Grid, contexts
from sample_joint import Canvas
from slides.writers import write_tiff

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

def draw(run, out, *args):
    sample_joint.main([str(run), "--size=128", "--context=1", "--steps=2", "--device=cpu", "--amp=False", "--threads=1",
                       f"--out={out}", *args])
    return np.asarray(Image.open(out)).astype(int)

def settings(*args):
    return configure(Settings, list(args), PRESETS, ("run", "preset"))

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

def test_swap_and_paste():
    """Cells move, all others stay, and so does the tensor that was given (a slide's own, mapped from its file)."""
    e = torch.randn(12, 5, 7)
    given, want = e.clone(), e.clone()
    want[:, 0, 1], want[:, 3, 5] = e[:, 3, 5], e[:, 0, 1]
    moved = reference.swapped(e, (0, 1), (3, 5))
    assert torch.equal(moved, want)
    before, want = want.clone(), want.clone()
    want[:, 1:4, 1:5] = before[:, 0:3, 0:4]
    assert torch.equal(reference.pasted(moved, (0, 0), (1, 1), (3, 4)), want)  # source and target share cells
    assert torch.equal(e, given)

def test_a_swap_reaches_its_neighbourhood_only():
    """Windows that touch no moved cell keep their condition. Catches: an edit that changes the whole image."""
    e = torch.randn(12, 6, 6)
    there, moved = Grid(e), Grid(reference.swapped(e, (1, 1), (4, 4)))
    for k in range(11):
        for m in range(11):
            i, j = k / 2, m / 2
            near = any(abs(i - a) < 1 and abs(j - a) < 1 for a in (1, 4))
            assert torch.equal(there(0, i, j), moved(0, i, j)) != near, (i, j)

def test_an_edit_reaches_its_windows_only(model, pyramids):
    """The tokens of windows that touch no moved cell are the same; all coarser windows over one change."""
    plain, moved = (load_grid(settings(*a), model, pyramids, (4, 4)) for a in ((), ("--swap=0,0:3,3",)))
    for s, windows, touched in ((0, 16, {(0, 0), (3, 3)}), (1, 4, {(0, 0), (1, 1)}), (2, 1, {(0, 0)})):
        lattice = Canvas(64 >> s, 64 >> s, 16)
        a, b = (contexts(model, g, s, lattice) for g in (plain, moved))
        assert len(a) == windows
        assert {(i // 16, j // 16) for i, j in a if not torch.equal(a[i, j], b[i, j])} == touched

@pytest.mark.parametrize("edit", ["--swap=-1,0:0,0", "--paste=0,0:9,9", "--paste=1,1:0,0:2,2", "--paste=0,0:-1,-1",
                                  "--paste=0,0:1,1:0,0"])
def test_edits_outside_the_grid(model, pyramids, edit):
    """Cells outside are refused, not wrapped around, passed over, or one of them copied over all."""
    with pytest.raises(UserError):
        load_grid(settings(edit), model, pyramids, (2, 2))
