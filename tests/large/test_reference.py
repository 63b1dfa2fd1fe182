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
from large import command, reference
from large.command import PRESETS, Settings
from large.reference import load_grid
from large.windows import Grid, contexts
from sample_joint import Canvas
from slides.writers import write_tiff

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

@pytest.fixture(scope="module")
def fine(photo):
    """The same picture twice as fine, in a file that says so."""
    image, path = np.asarray(Image.open(photo)), photo.with_name("fine.tif")
    write_tiff(path, [image.repeat(2, 0).repeat(2, 1)], (512, 512), quality=98, mpp=0.25)
    return path

def settings(*args):
    return configure(Settings, list(args), PRESETS, ("run", "preset"))

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

def test_grid_of_a_file(model, pyramids, toy, tmp_path, monkeypatch):
    """From --at on. One of data.py is taken as the run's own deviations say. Catches: embeddings of another scale."""
    path, e = tmp_path / "grid.safetensors", torch.randn(3, 5, 96).half()
    save_tensors(path, {"e": e})
    grid = load_grid(settings(f"--reference={path}", "--at=0,2"), model, pyramids, (3, 3))
    assert torch.equal(grid.e, e[:, 2:].float().movedim(-1, 0))
    k = [x["split"] for x in pyramids.slides].index("test")
    args, e = settings(f"--reference={toy / pyramids.slides[k]['file']}"), pyramids.tensor(k, "e")[:2, :2].float()
    assert torch.equal(load_grid(args, model, pyramids, (2, 2)).e, e.movedim(-1, 0))
    monkeypatch.setitem(model.info, "std", [2 * v for v in pyramids.std])
    assert_close(load_grid(args, model, pyramids, (2, 2)).e, e.movedim(-1, 0) / 2, 1e-6)

def test_without_its_data(ready, fine, tmp_path, capsys, monkeypatch):
    """A run that was copied alone draws from references; what only data can give is still asked for. Catches: a folder
    demanded and not read; another resolution taken without a word."""
    (state, config), grids = load_tensors(ready / "ema.safetensors"), []
    monkeypatch.setattr(command, "draw", lambda model, grid, *args: grids.append(grid.e))

    def main(mpp, *args):
        info = config["info"] | {"data": "/nowhere/data", "mpp": mpp}
        save_tensors(tmp_path / "ema.safetensors", state, config | {"info": info})
        sample_joint.main([str(tmp_path), "--size=128", "--context=1", "--device=cpu", "--guide=x0", *args])
        return "fine.tif is read at its own resolution" in capsys.readouterr().out
    from_file = f"--reference={fine}"
    assert not main(0.5, from_file) and main(None, from_file) and not torch.equal(*grids)
    for args in ((), (from_file, "--data=/nowhere/data")):
        with pytest.raises(UserError, match="/nowhere/data"):
            main(0.5, *args)

def test_a_reference_is_read_where_and_as_finely_as_needed(model, pyramids, photo, fine, monkeypatch):
    """The slide's own picture gives its stored embeddings. A file twice as fine as the data shows the same tissue, not
    its upper left quarter enlarged; one that does not say its resolution is taken as it is. Catches: rows and columns
    of tiles exchanged, deviations of another set, colours in another order; a slide embedded whole for a corner."""
    seen, real = [], reference.embed
    monkeypatch.setattr(reference, "embed", lambda encoder, x: seen.append(len(x)) or real(encoder, x))
    half, unsaid, need = SimpleNamespace(mpp=0.5), SimpleNamespace(mpp=None), (2, 3)
    stored = load_grid(settings("--at=2,1"), model, pyramids, need).e
    of_photo, of_fine = (settings("--at=2,1", f"--reference={path}") for path in (photo, fine))
    want = load_grid(of_photo, model, pyramids, need).e
    assert_close(want, stored, 1e-3)
    assert seen == [3, 3] and (stored[:, 0, 1] - stored[:, 1, 0]).abs().max() > 0.1
    assert_close(load_grid(of_fine, model, half, need).e, want, 0.2)
    assert (load_grid(of_fine, model, unsaid, need).e - want).abs().max() > 0.5
    assert torch.equal(load_grid(of_photo, model, half, need).e, want)
    with pytest.raises(UserError, match="has 4 x 4 base tiles, the image needs 4 x 4"):
        load_grid(of_fine, model, half, (4, 4))

def test_edits_of_the_grid(model, pyramids):
    """--swap, then --paste; cells that neither names stay, and so does what was given (a slide's own, mapped from its
    file). Catches: a block that is copied over itself while it is read."""
    e = load_grid(settings(), model, pyramids, (4, 4)).e
    given, want = e.clone(), e.clone()
    for (i, j), (k, l) in (((0, 0), (3, 2)), ((1, 1), (2, 2))):
        want[:, i, j], want[:, k, l] = e[:, k, l], e[:, i, j]
    swap, paste = "--swap=0,0:3,2;1,1:2,2", "--paste=0,0:1,1:2,3;0,3:3,0"
    assert torch.equal(reference.edited(e, settings(swap)), want)
    before = want.clone()
    want[:, 1:3, 1:4], want[:, 3, 0] = before[:, :2, :3], before[:, 0, 3]
    assert torch.equal(load_grid(settings(swap, paste), model, pyramids, (4, 4)).e, want) and torch.equal(e, given)

def test_an_edit_reaches_its_windows_only(model, pyramids):
    """The tokens of windows that touch no moved cell are the same; all coarser windows over one change."""
    plain, moved = (load_grid(settings(*a), model, pyramids, (4, 4)) for a in ((), ("--swap=0,0:3,3",)))
    for s, windows, touched in ((0, 16, {(0, 0), (3, 3)}), (1, 4, {(0, 0), (1, 1)}), (2, 1, {(0, 0)})):
        lattice = Canvas(64 >> s, 64 >> s, 16)
        a, b = (contexts(model, g, s, lattice) for g in (plain, moved))
        assert len(a) == windows
        assert {(i // 16, j // 16) for i, j in a if not torch.equal(a[i, j], b[i, j])} == touched
