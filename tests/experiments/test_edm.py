"""The workshop version's conditioning model: what it hears, training and loading."""
import torch
from cdm_runs import check_resume, go, new_home

from cdm import DiTConfig, load_conditioner
from diffusion import ZoomLDM
from experiments.edm import EDM, TokenDiT


def test_everything_told_is_heard():
    """Time and scale change the answer, and each token hears the others. catches: an input that is dropped."""
    net = TokenDiT(DiTConfig(9, 4, 32, 2, 4, 64, 5))
    assert not net(torch.randn(1, 9, 4), torch.tensor([3]), torch.tensor([0])).any()          # starts at zero
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, s = torch.randn(2, 9, 4), torch.tensor([5, 5]), torch.tensor([1, 1])
    base = net(x, t, s)
    assert base.shape == x.shape
    moved = x.clone()
    moved[:, 0] += 1
    for other in (net(x, t + 300, s), net(x, t, s + 1), net(moved, t, s)):
        assert (other[:, 1:] - base[:, 1:]).abs().max() > 1e-3


def test_train_resume_load(run, tmp_path):
    """catches: the CDM's schedule, or times moved to noise, where the EDM's do without."""
    check_resume("edm", run, tmp_path)
    home = new_home(run, tmp_path / "home")
    go(home, "edm")
    model = ZoomLDM.from_run(home)
    made = load_conditioner(home, "edm", model)
    assert isinstance(made, EDM) and made.shift == 1.0 and made.schedule.kind == "linear"
    assert made.tokens([0, 2], steps=3).shape == (2, 65, model.summarizer.cfg.width)
    assert (home / "samples" / "edm_000006.png").exists()
