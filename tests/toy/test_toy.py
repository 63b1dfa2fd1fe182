"""toy/: the drawing, the command, the descriptor, and that it tells the toy tissues and nuclei densities apart."""
import sys
import time
from multiprocessing import active_children, get_context

import numpy as np
import pytest
import torch

import data
from common import UserError
from data import Pyramids
from slides import encoders
from summarizer import standardize
from toy import folder, task
from toy.descriptor import PARTS, Stats, spread
from toy.folder import following, processes
from toy.tissue import TISSUES, toy_slide

SMALL = ["--slides=2", "--test=1", "--size=128", "--patch=16", "--workers=1"]

def base_tiles(image, side):
    """The base tiles (n,3,side,side) in [0,1] of a slide, row by row."""
    n = len(image) // side
    cut = image.reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, side, side, 3)
    return torch.from_numpy(cut.copy()).movedim(-1, 1) / 255

# ----- 1. Drawing -----

def test_toy_slide():
    """A function of its seed; all tissues occur; nuclei are where the list says."""
    drawn = [toy_slide(k, 512) for k in range(3)]
    share = np.mean([np.bincount(region.ravel(), minlength=4) / 128**2 for _, region, _ in drawn], 0)
    assert share.shape == (len(TISSUES),) and (share > 0.05).all(), share
    image, region, nuclei = drawn[0]
    assert image.shape == (512, 512, 3) and region.shape == (128, 128) and nuclei.shape[1] == 3
    assert (image.dtype, region.dtype, nuclei.dtype) == (np.uint8, np.uint8, np.float32)
    assert ((nuclei[:, :2] >= 0) & (nuclei[:, :2] < 512)).all() and (nuclei[:, 2] > 1).all()
    assert all(np.array_equal(a, b) for a, b in zip(toy_slide(5, 128), toy_slide(5, 128)))
    assert not np.array_equal(image, drawn[1][0])
    x, y, _ = nuclei.astype(int).T
    tumour, whole = region[y // 4, x // 4] == 2, region.repeat(4, 0).repeat(4, 1)
    assert tumour.mean() > 0.3
    assert image[y, x, 0][tumour].mean() < image[..., 0][whole == 2].mean() - 20  # nuclei are dark
    assert image[whole == 0].mean() > 230  # background is bright

def test_labels_of_the_task_follow_the_structures(tmp_path):
    """Apart from the noise; both kinds occur in every slide, and neither alone tells the label."""
    drawn = [task.structures(k, 512) for k in range(300)]
    for duct, large, _, true in drawn:
        assert true == (duct & large).any() and 0 < duct.sum() < 4 and 0 < large.sum() < 4
    true = np.array([d[3] for d in drawn])
    assert 0.02 < np.mean([d[2] != d[3] for d in drawn]) < 0.09 and 0.42 < true.mean() < 0.58
    for part in (0, 1):
        count = np.array([d[part].sum() for d in drawn])
        gaps = count[true == 1][:, None] - count[true == 0]
        assert 0.6 < (np.sign(gaps) + 1).mean() / 2 < 0.78                   # the AUC
    task.write_labels(tmp_path / "labels.csv", 10, 3, 512)
    assert (tmp_path / "labels.csv").read_text().splitlines() == ["case_id,slide_id,label"] + [
        f"patient_000{k // 2},train_000{k},{drawn[10 + k][2]}" for k in range(3)]

def test_slides_of_the_task_show_the_structures():
    """catches: large nuclei in the wrong squares; another stain for the second slide of a patient."""
    drawn = [task.task_slide(seed) for seed in (2, 3, 4)]
    image, region, nuclei = drawn[0]
    assert image.shape == (512, 512, 3) and region.shape == (128, 128) and set(np.unique(region)) == {0, 1, 2}
    x, y = nuclei[:, :2].T.astype(int)
    inside = region[y // 4, x // 4] == 2
    grade = task.structures(2, 512)[1].reshape(2, 2)[y // 256, x // 256]
    assert nuclei[inside & grade, 2].mean() > 1.25 * nuclei[inside & ~grade, 2].mean()
    first, *others = [image[region.repeat(4, 0).repeat(4, 1) == 2].mean(0) for image, region, _ in drawn]
    same, another = (abs(first - other).max() for other in others)
    assert same < another

# ----- 2. The command -----

def test_processes_draw_the_same_with_deviations_of_training_tiles(tmp_path, monkeypatch):
    if sys.platform == "linux":  # as DataLoader's; spawned ones import torch, in seconds
        monkeypatch.setattr(folder, "get_context", lambda method: get_context("fork"))
    for workers in (1, 2):
        data.main(["toy", f"--out={tmp_path / str(workers)}", *SMALL, f"--workers={workers}"])
    for file in (tmp_path / "1").iterdir():
        assert (tmp_path / "2" / file.name).read_bytes() == file.read_bytes()
    tiles = [base_tiles(toy_slide(k, 128)[0], 16).unflatten(0, (8, 8))[:, ::4].flatten(0, 1) for k in range(2)]
    std = torch.tensor(Pyramids(tmp_path / "1").std)
    torch.testing.assert_close(std, spread(torch.cat([Stats()(x) for x in tiles])), atol=1e-5, rtol=1e-4)

def test_interrupted_processes_end_at_once(monkeypatch):
    """catches: a command that waits for what its processes are at, as minutes of cross-validation."""
    if sys.platform == "linux":
        monkeypatch.setattr(folder, "get_context", lambda method: get_context("fork"))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), processes(1) as pool:
        pool.submit(time.sleep, 0).result()                             # it has started
        pool.submit(time.sleep, 100)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 90 and not active_children()

def test_what_one_types_next():
    index = {"patch": 64, "source": {"command": "toy"}}
    assert following("data/toy", index) == "train.py toy"
    assert following("data/mine", index) == "train.py toy --data=data/mine --out=out/mine"
    assert following("x", index | {"patch": 256}).startswith("train.py gpu24 --data=x")
    assert following("data/task", {"patch": 64, "source": {"command": "task"}}).startswith("mil.py extract --kind=desc")

@pytest.mark.parametrize("divided", [False, True])
def test_an_encoder_of_your_own(tmp_path, monkeypatch, divided):
    """A class in slides/encoders.py is all it takes."""
    class Mean(torch.nn.Module):
        name, embed_dim, scaled = "mean", 3, divided

        def __init__(self, std=None):
            super().__init__()
            self.std = torch.tensor(std or [1.0] * 3)

        def forward(self, image):
            return image.mean((2, 3)) / self.std
    monkeypatch.setitem(encoders.FREE, "mean", Mean)
    monkeypatch.setattr(encoders, "ENCODERS", (*encoders.ENCODERS, "mean"))
    data.main(["toy", f"--out={tmp_path}", *SMALL, "--encoder=mean"])
    p = Pyramids(tmp_path)
    assert (p.encoder, p.embed_dim, p.std == [1.0] * 3) == ("mean", 3, not divided)
    want = Mean(p.std)(base_tiles(toy_slide(1, 128)[0], 16)).view(8, 8, 3)
    torch.testing.assert_close(p.tensor(1, "e").float(), want, atol=1e-3, rtol=1e-3)

# ----- 3. The descriptor -----

def part(e, name):
    at = sum(list(PARTS.values())[:list(PARTS).index(name)])
    return e[:, at:at + PARTS[name]]

@pytest.mark.parametrize("side", [16, 80])
def test_any_multiple_of_16(side):
    """A tile does not depend on its batch, and has a gradient, which inversion needs; other shapes are refused."""
    x = torch.rand(3, 3, side, side).requires_grad_()
    e = Stats()(x)
    assert e.shape == (3, Stats.embed_dim) and e.dtype == torch.float32 and torch.isfinite(e).all()
    torch.testing.assert_close(e[1:2], Stats()(x[1:2]))
    e.square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    for bad in (x[0], x[:, :1], x[..., 1:]):
        with pytest.raises(UserError, match="multiples of 16"):
            Stats()(bad)

def test_divides_by_the_training_deviation_without_centring():
    x, std = torch.rand(8, 3, 64, 64), torch.linspace(0.5, 2, Stats.embed_dim)
    torch.testing.assert_close(Stats(std.tolist())(x), Stats()(x) / std)
    torch.testing.assert_close(spread(Stats()(x)), Stats()(x).std(0, correction=0).clamp_min(0.01))
    assert (spread(Stats()(torch.ones(4, 3, 16, 16))) == 0.01).all()  # never zero, nothing explodes

def test_numbers_mean_what_they_are_called():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    a, b = (Stats()(0.5 + 0.3 * torch.sin(v / 3).expand(1, 3, 64, 64)) for v in (x, y))
    assert (part(a, "edge orientation")[0, 0::2] > 0).all() and (part(b, "edge orientation")[0, 0::2] < 0).all()
    energy, turned = (part(e, "edge energy").view(3, 2, 2) for e in (a, b))  # octave, quadrant
    torch.testing.assert_close(energy, turned.mT, atol=1e-5, rtol=1e-4)
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0, :16] = 1  # the top quarter is red
    e = Stats()(red)
    torch.testing.assert_close(part(e, "colour mean")[0], torch.tensor([0.25, 0, 0]))
    layout = part(e, "colour layout").view(2, 4, 4)
    assert (layout[0, 0] == 1).all() and layout.sum() == 4

def labelled(seeds):
    """Descriptors (n,96), area shares (n,4) and nuclei counts (n,) of all tiles of some slides of 512 px."""
    e, share, count = [], [], []
    for seed in seeds:
        image, region, nuclei = toy_slide(seed, 512)
        e.append(Stats()(base_tiles(image, 64)))
        region = torch.from_numpy(region.reshape(8, 16, 8, 16).swapaxes(1, 2).reshape(64, 256).copy())
        share.append(torch.stack([(region == k).float().mean(1) for k in range(len(TISSUES))], 1))
        cell = (nuclei[:, 1] // 64).astype(int) * 8 + (nuclei[:, 0] // 64).astype(int)
        count.append(torch.from_numpy(np.bincount(cell, minlength=64)).float())
    return torch.cat(e), torch.cat(share), torch.cat(count)

def test_one_nearest_neighbour_tells_tissue_and_density():
    """On the whole toy set (128 training, 24 test slides): tissue 99.9 %, terciles 82 %. Fewer neighbours here."""
    (e, share, count), (e2, share2, count2) = labelled(range(5000, 5007)), labelled(range(6000, 6003))
    std = e.std(0).clamp_min(0.01)
    e, e2 = (standardize((v / std)[:, :, None, None])[:, :, 0, 0] for v in (e, e2))

    def agree(label, label2, use, use2):
        near = torch.cdist(e2[use2], e[use]).argmin(1)
        return (label[use][near] == label2[use2]).float().mean().item()
    tissues = agree(share.argmax(1), share2.argmax(1), share.amax(1) >= 0.9, share2.amax(1) >= 0.9)
    cuts = torch.quantile(count[count > 0], torch.tensor([1 / 3, 2 / 3]))
    density = agree(torch.bucketize(count, cuts), torch.bucketize(count2, cuts), count > 0, count2 > 0)
    print(f"1-NN: tissue {tissues:.3f}, nuclei-density terciles {density:.3f}")
    assert tissues >= 0.95 and density >= 0.7
