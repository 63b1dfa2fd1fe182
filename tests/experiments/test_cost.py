"""What sampling costs: counted FLOPs against numbers by hand, rows of a profile, its table."""
import pytest
import torch
import torch.nn as nn

from diffusion import ZoomLDM
from experiments import cost
from experiments.workshop import CNNSummarizer
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig


def test_flops_of_one_convolution():
    """Two per multiplication and addition: 2 * 3 * 8 * 3 * 3 * 4 * 5. Catches: counting a batch, or both directions."""
    assert cost.flops(nn.Conv2d(3, 8, 3, padding=1), (3, 4, 5)) == 2 * 3 * 8 * 9 * 20
    assert cost.flops(nn.Sequential(nn.Linear(6, 7), nn.SiLU(), nn.Linear(7, 2)), (6,)) == 2 * (42 + 14)


def test_flops_of_the_published_networks(capsys):
    """The bill of the issue: U-Net 0.21 TFLOP, decoder 0.67, encoder 0.35 for a patch of 256 x 256 pixels."""
    cost.main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [r[0] for r in rows] == ["U-Net", "decoder", "encoder"]
    assert [float(r[1]) for r in rows] == pytest.approx([0.21, 0.67, 0.35], abs=0.01)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    if "model" in request.fixturenames:  # counting takes half a second
        monkeypatch.setattr(cost, "full_size", lambda: {"U-Net": 2e11, "decoder": 7e11, "encoder": 4e11})


@pytest.fixture
def model():
    vae, unet = VQVAE(VAEConfig(8, groups=4, codes=16)), UNet(UNetConfig(8, groups=4, context_dim=16, heads=2))
    return ZoomLDM(vae, Summarizer(SummarizerConfig(8, 16, 1, 16, 3)), unet).eval().requires_grad_(False)


def test_profile_counts_rows(model, capsys):
    """Of every network, forward, while it is open. Catches: calls counted instead of rows, hooks that stay."""
    proxy = nn.Conv2d(3, 3, 1)
    profile = cost.Profile(model, proxy)
    z, t = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    for n in (1, 2):
        model.eps(z[:n], t[:n], torch.zeros(n, 65, 16))
    model.decode(z)
    model.encode(torch.randn(1, 3, 32, 32))
    proxy(z)
    profile.close()
    model.decode(z)
    assert profile.rows == {"U-Net": 3, "decoder": 2, "encoder": 1, "proxy": 2}
    assert profile.size == {"U-Net": (3, 8, 8), "decoder": (3, 8, 8), "encoder": (3, 32, 32), "proxy": (3, 8, 8)}
    parts = [profile.seconds[k] for k in profile.rows]
    assert min(parts) > 0 and sum(parts) <= profile.seconds["all"]
    profile.table(16)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line[:2] for line in lines[1:5]] == [["U-Net", "3"], ["decoder", "2"], ["encoder", "1"], ["proxy", "2"]]
    assert float(lines[2][2]) == pytest.approx(2 * cost.flops(model.vae.decoder, (3, 8, 8)) / 1e9, abs=0.06)
    assert sum(float(line[3].rstrip("%")) for line in lines[1:5]) == pytest.approx(100, abs=0.3)
    assert float(lines[2][5]) == pytest.approx(2 * 0.7) and lines[5][0] == "all"


def test_profile_counts_the_tokens_there_are(model):
    """65 of the transformer, 64 of the CNN: attention to one more token costs that much more."""
    assert cost.Profile(model, None).length == 65
    model.summarizer = CNNSummarizer(SummarizerConfig(8, 16, scales=3, kind="cnn"))
    assert cost.Profile(model, None).length == 64
    more, less = (cost.flops(model.unet, (3, 8, 8), 16, length) for length in (65, 64))
    widths = [m.cross.q.in_features for m in model.unet.modules() if hasattr(m, "cross")]
    assert more - less >= sum(2 * 2 * 16 * w for w in widths)  # its keys and values alone


def test_profile_leaves_out_what_was_not_asked(model, capsys):
    profile = cost.Profile(model, None)
    model.decode(torch.randn(1, 3, 8, 8))
    profile.close()
    profile.table(16)
    text = capsys.readouterr().out
    assert profile.rows == {"U-Net": 0, "decoder": 1, "encoder": 0} and "encoder" not in text and "U-Net" not in text
