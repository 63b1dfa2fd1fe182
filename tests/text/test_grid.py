"""The grid model: places, guidance, what a caption's vector says, stitching, regions, training, and what is refused."""
import pytest
import torch
from cdm_runs import check_resume, go, new_home, stub
from PIL import Image
from rule import assert_close

import cdm
from common import UserError, load_tensors, save_tensors
from diffusion import ZoomLDM
from experiments.invented import invent, scales_of
from large.windows import Grid, contexts
from sample_joint import Canvas
from text import captions, grid
from text.clauses import Listener, clauses, over, quarters
from text.grid import GridDiT, GridModel, GridSizes, Regions, padded, plane_table, vector_of
from text.wording import STYLES

@pytest.fixture(scope="module")
def zoomldm(conditioned):
    return ZoomLDM.from_run(conditioned)

def small(side=4, channels=2, vector=3):
    return GridModel(GridDiT(GridSizes(side * side, channels, 32, 1, 4, 64, 0, vector=vector)))

# ----- 1. The network -----

def test_everything_told_is_heard():
    """Time, vector and its absence change the answer; rows and columns are told apart. catches: an input dropped."""
    table = plane_table(3, 8)[0].unflatten(0, (3, 3))                                        # (3,3,8)
    assert torch.equal(table[1, 0, :4], table[1, 2, :4]) and torch.equal(table[0, 1, 4:], table[2, 1, 4:])
    assert not torch.equal(table[0, 1], table[1, 0])
    net = GridDiT(GridSizes(9, 4, 32, 2, 4, 64, 0, vector=6))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, v, known = torch.randn(2, 9, 4), torch.tensor([5, 5]), torch.randn(2, 6), torch.tensor([True, True])
    base = net(x, t, (v, known))
    assert base.shape == x.shape
    for other in (net(x, t + 300, (v, known)), net(x, t, (v + 1, known)), net(x, t, (v, ~known))):
        assert (other - base).abs().max() > 1e-3
    assert torch.equal(net(x, t, (v, ~known)), net(x, t, (v * 9, ~known))), "an unknown vector must not be heard"

# ----- 2. Clauses -----

def test_captions_fall_into_clauses():
    """catches: a style of text/wording.py whose joints are not known."""
    for joint in [join for _, _, joins in STYLES.values() for join in joins]:
        assert clauses(f"Half fat on the left{joint}No tumour.") == ["half fat on the left", "no tumour"]

def test_listener_adds_up_clauses():
    """Two clauses whose order does not matter, and a row of none. catches: a row of none that counts; weights that
    training could still change."""
    g = torch.Generator().manual_seed(0)
    W, v = torch.randn(6, 8, generator=g), torch.randn(800, 6, generator=g)
    aim = (v @ W).view(400, 2, 2, 2, 2).sum(1)
    said, there = padded([*v.view(400, 2, 6)[:399], v[798:]])
    made = Listener(6, 2).learn(said, there, aim, 30)
    guess = made(said, there)
    assert (guess - aim).square().mean() < 0.3 * aim.square().mean() and made.heard
    none = torch.cat([said, torch.full((400, 1, 6), 1e3)], 1), torch.cat([there, torch.zeros(400, 1).bool()], 1)
    assert_close(made(*none), guess, 1e-5)
    assert not any(p.requires_grad for p in made.parameters())

def test_quarters_and_back():
    q = torch.arange(4.0).view(1, 1, 2, 2)
    assert torch.equal(quarters(over(q, torch.zeros(1, 1, 6, 8))), q)

# ----- 3. Drawing -----

def test_grid_is_stitched_and_unscaled():
    """A network that always sees the same block: each window must come back at its place, scaled back.
    catches: rows and columns swapped; the mean forgotten; windows in the wrong order."""
    made = small(4, 3, 0)
    made.mean.fill_(5.0)
    made.std.fill_(2.0)
    block = torch.arange(16.0).view(4, 4)[None].expand(3, 4, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    stub(made, lambda x, t, told: block.flatten(1).T.expand(len(x), -1, -1))
    assert_close(made.grid(4, 4, steps=5), block * 2 + 5, 1e-5)
    assert_close(made.grid(3, 2, steps=5), (block * 2 + 5)[:, :3, :2], 1e-5)
    ends = made.grid(4, 6, steps=5)[:, :, [0, 1, 4, 5]]                  # only the first window, only the last
    assert_close(ends, block * 2 + 5, 1e-5)

def test_grid_guidance():
    """x0_null + g (x0_v - x0_null). catches: the published w = g - 1; branches swapped."""
    made = stub(small(2), lambda x, t, told: torch.where(told[1][:, None, None], 3.0, 1.0).expand_as(x))
    for g, want in ((1.0, 3.0), (2.0, 5.0), (0.0, 1.0)):
        assert_close(made.grid(2, 2, torch.ones(3), g, steps=4), torch.full((2, 2, 2), want), 1e-5)
    assert_close(made.grid(2, 2, None, 9.0, steps=4), torch.ones(2, 2, 2), 1e-5)
    with pytest.raises(UserError, match=r"takes \(3,\)"):
        made.grid(2, 2, torch.ones(4))
    with pytest.raises(UserError, match="takes none"):
        small(2, 2, 0).grid(2, 2, torch.ones(4))

def test_grid_holds_what_is_said(monkeypatch):
    """The means of the quarters are what the clauses say, scaled back; with half the spread they are half way. catches:
    the means of each window; rows and columns swapped; the sentence taken for a clause; a vector that is not
    standardised; tiles that are all alike."""
    made = stub(small(), lambda x, t, told: x.roll(1, 1) / 2)
    made.says.heard.fill_(1)
    monkeypatch.setattr(made.says, "forward", lambda v, there: (
        v.sum(1)[:, :, None, None] * torch.tensor([[1.0, 0.0], [0.0, -1.0]])).expand(1, 3, 2, 2)[:, :2])
    made.std.copy_(torch.tensor([3.0, 5.0]))
    made.v_mean.fill_(1.0)
    told = torch.tensor([[9.0, 9.0, 9.0], [2.0, 3.0, 1.0], [1.0, 2.0, 1.0]])    # clauses less 1 add up to 1, 3
    want = torch.tensor([3.0, 15.0])[:, None, None] * torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    for size in (4, 6):                                                     # one window, and nine that overlap
        e = made.grid(size, size, told, steps=5)
        assert_close(quarters(e[None])[0], want, 1e-4)
        assert e.std((1, 2)).min() > 0.01
    left = [float((quarters(made.grid(4, 4, told, steps=2, spread=f)[None])[0] - want).norm()) for f in (0.0, 0.5, 1.0)]
    assert left[0] < 1e-3 < left[1] < 0.8 * left[2], left
    made = stub(small(), lambda x, t, told: x + 3)      # it says nothing: the noise that a quarter shares is left out
    a, b = (made.grid(4, 4, torch.ones(3), seed=seed, steps=2) for seed in (0, 1))
    assert_close(quarters(a[None]), quarters(b[None]), 1e-4)
    assert (a - b).abs().max() > 0.5                                        # or kept, all of it, as without a caption
    assert_close(made.grid(4, 4, torch.ones(3), steps=2, spread=1.0), made.grid(4, 4, steps=2), 1e-4)

# ----- 4. Data -----

def test_regions_are_places_of_the_slides(pyramids):
    """catches: rows and columns swapped; test slides; a draw that depends on its history."""
    regions = Regions(pyramids, 2, 7)
    blocks = {tuple(pyramids.tensor(i, "e")[r:r + 2, c:c + 2].float().flatten().tolist())
              for i, (_, _, h, w) in regions.slides for r in range(h - 1) for c in range(w - 1)}
    drawn = [regions[n]["tokens"] for n in (5, 0, 11, 5)]
    assert all(tuple(tokens.flatten().tolist()) in blocks for tokens in drawn) and not regions[5]["known"]
    assert torch.equal(drawn[0], drawn[3]) and torch.equal(drawn[0], Regions(pyramids, 2, 7)[5]["tokens"])
    assert any((regions[n]["tokens"] != Regions(pyramids, 2, 8)[n]["tokens"]).any() for n in range(4))
    with pytest.raises(UserError, match="9 x 9"):
        Regions(pyramids, 9, 0)

def test_quarters_of_regions(pyramids):
    """catches: captions and regions paired wrongly; rows and columns swapped."""
    places = [(i, (r, c, 2, 2)) for i, (_, _, h, w) in Regions(pyramids, 2, 0).slides
              for r in range(h - 1) for c in range(w - 1)]
    found = grid.quarters_of([captions.Caption("", "", (), 0, *at) for at in places], pyramids)
    for (i, (r, c, _, _)), q in zip(places, found):
        tiles = pyramids.tensor(i, "e")[r:r + 2, c:c + 2].float() * pyramids.rescale       # (2,2,E)
        assert_close(q, tiles.movedim(-1, 0), 1e-5)

def test_what_is_learnt_of_captions(pyramids, monkeypatch):
    """Clauses and whole captions say the same quarters. catches: a vector of a file that was never listened to; aims
    out of step; numbers that are not standardised."""
    made, learnt = small(2, pyramids.embed_dim), {}
    described = [captions.Caption("", "", (), 0, i, (0, 0, 2, 2)) for i in range(2)]
    told = [torch.tensor([[5.0, 0, 0], [1, 2, 3], [4, 5, 6]]), torch.tensor([[7.0, 2, 0], [9, 9, 9]])]
    monkeypatch.setattr(made.says, "learn", lambda v, there, aim: learnt.update(v=v, there=there, aim=aim))
    made.measure(Regions(pyramids, 2, 0), told, described)
    assert learnt["there"].sum(1).tolist() == [2, 1, 1, 1]
    assert_close(learnt["v"][2:, 0], made.standard(torch.stack([v[0] for v in told])), 1e-6)
    assert_close(learnt["v"][0], made.standard(told[0][1:]), 1e-6)
    want = (grid.quarters_of(described, pyramids) - made.mean[:, None, None]) / made.std[:, None, None]
    assert_close(learnt["aim"], torch.cat([want, want]), 1e-5)

# ----- 5. Training -----

def test_train_resume_load(conditioned, zoomldm, tmp_path):
    """catches: noise that depends on the process; EMA not restored; a shift that is not kept."""
    check_resume("grid", conditioned, tmp_path, f"--captions={conditioned}/captions.tsv",
                 f"--vectors={conditioned}/captions.safetensors", "--gap=0.1", "--shift=5")
    made = cdm.load_conditioner(tmp_path / "once", "grid", zoomldm)
    assert made.shift == 5.0 and cdm.load_conditioner(conditioned, "grid", zoomldm).shift == 16.0
    assert made.grid(4, 4, torch.ones(3), steps=3).shape == (zoomldm.summarizer.cfg.embed_dim, 4, 4)
    assert made.std.min() > 0 and made.mean.abs().max() > 0 and made.says.heard and made.v_mean.any()

def test_files_from_before_and_of_others(conditioned, zoomldm, tmp_path, monkeypatch):
    """catches: a file refused for what it can lack; a fault that goes unnoticed; tokens of an encoder that the run does
    not know."""
    state, meta = load_tensors(conditioned / "grid.safetensors")
    meta["dit"] |= {"cond": "adaln", "plane": True}
    state = {k: v for k, v in state.items() if not k.startswith("says.")}
    save_tensors(tmp_path / "grid.safetensors", state, meta)
    made = cdm.load_conditioner(tmp_path, "grid", zoomldm)
    assert not made.says.heard and torch.equal(made.mean, state["mean"])
    save_tensors(tmp_path / "grid.safetensors", state | {"says": torch.zeros(3, 96)}, meta)
    with pytest.raises(UserError, match="was told sentences, not clauses: move grid.safetensors"):
        cdm.load_conditioner(tmp_path, "grid", zoomldm)
    save_tensors(tmp_path / "grid.safetensors", {k: v for k, v in state.items() if k != "mean"}, meta)
    with pytest.raises(UserError, match="holds no grid of ours"):
        cdm.load_conditioner(tmp_path, "grid", zoomldm)
    monkeypatch.setitem(zoomldm.info, "encoder", "uni")
    with pytest.raises(UserError, match="embeddings of 'stats'"):
        cdm.load_conditioner(conditioned, "grid", zoomldm)

def test_vector_of_a_caption(conditioned, zoomldm, tmp_path):
    """catches: a caption encoded by another encoder than the one the model was trained with."""
    made, path = cdm.load_conditioner(conditioned, "grid", zoomldm), tmp_path / "v.safetensors"
    assert vector_of(made) is None
    for v in (torch.ones(3), torch.ones(1, 3), torch.ones(4)):
        save_tensors(path, {"v": v})
        if v.numel() == 3:
            assert vector_of(made, file=path).shape == (3,)
    for more, says in (({"caption": "mostly fat"}, "'letters'"), ({"file": path}, r"no finite v of \(3,\)")):
        with pytest.raises(UserError, match=says):
            vector_of(made, **more)
    del made.info["text"]
    with pytest.raises(UserError, match="without captions"):
        vector_of(made, "mostly fat")

def test_sheets_on_the_way(conditioned, tmp_path, capsys):
    """One patch a scale that its 4 x 4 tiles hold, each below a real one. catches: a training that shows nothing."""
    go(new_home(conditioned, tmp_path), "grid")
    assert Image.open(tmp_path / "samples" / "grid_000006.png").height == 2 * 3 * 66 + 2
    assert f"grid.safetensors; next: python sample_joint.py {tmp_path} --condition=grid" in capsys.readouterr().out

def test_patches_of_invented_tiles(conditioned, zoomldm):
    """The condition is that of the tiles under the patch, another for each. catches: a crop of another place."""
    made = stub(cdm.load_conditioner(conditioned, "grid", zoomldm), lambda x, t, told: x.roll(1, 1) / 2)
    c = invent(made, zoomldm, 1, 2, seed=3)
    assert c.shape == (2, 65, zoomldm.summarizer.cfg.width) and list(scales_of(made, zoomldm)) == [0, 1, 2]
    want = next(iter(contexts(zoomldm, Grid(made.grid(2, 2, seed=4)), 1, Canvas(16, 16, 16)).values()))
    assert_close(c[1], want, 1e-4)
    assert (c[0] - c[1]).abs().max() > 1e-2

# ----- 6. The command -----

@pytest.mark.parametrize("arg, says", [
    ("--side=64", "lower --side"), ("--captions=x.tsv", "give both"), ("--side=0", "--side=0"), ("--gap=-1", "--gap=")])
def test_bad_input(arg, says, run, tmp_path):
    with pytest.raises(UserError, match=says):
        go(new_home(run, tmp_path), "grid", arg)

def test_help_lists_its_own_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        cdm.main(["train", "--model=grid", "--help"])
    assert stop.value.code == 0 and "captions: str" in capsys.readouterr().out
