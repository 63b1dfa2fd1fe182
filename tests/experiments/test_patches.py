"""What held-out toy patches really hold. Drawing and measuring are tested in tests/whole/test_training.py."""
import pytest
import torch
from torch.utils.data import default_collate

from common import load_tensors
from data import Pyramids
from experiments.evaluate import truth

@pytest.mark.parametrize("s", [0, 1])
def test_the_patches_of_a_slide_hold_all_its_nuclei_and_tissue(toy, s):
    """Catches: rows taken for columns, a patch of another scale, nuclei counted twice on a border, radius for area."""
    pyramids = Pyramids(toy)
    x, y, radius = load_tensors(toy / pyramids.slides[0]["file"])[0]["nuclei"].double().T
    batch = default_collate([pyramids.item(0, s, n, ()) for n in range(pyramids.slides[0]["counts"][s])])
    tissue, area = truth(pyramids, batch, pyramids.patch)
    side = pyramids.patch * 2 ** s
    assert torch.allclose(area.sum() * side ** 2, torch.pi * radius.square().sum())
    n = int(area.argmax())
    i, j = batch["ij"][n].tolist()
    mine = (x >= j * side) & (x < (j + 1) * side) & (y >= i * side) & (y < (i + 1) * side)
    assert mine.any() and torch.allclose(area[n], torch.pi * radius[mine].square().sum() / side ** 2)
    assert torch.allclose(tissue.sum(1), torch.ones(len(tissue)))
