"""What sampling and training cost: counted FLOPs, rows and bytes against numbers by hand."""
import pytest
import torch
import torch.nn as nn

from common import UserError
from diffusion import ZoomLDM
from experiments import cost
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_of_attention_are_counted(device):
    """Two per multiplication and addition. Attention: two products of 2 * B * heads * L * M * D each forward, two for
    each backward. catches: the CPU's fused kernel, for which PyTorch 2.13's counter knows no formula, so it says 0."""
    assert cost.row_flops(nn.Conv2d(3, 8, 3, padding=1, device=device), (3, 4, 5)) == 2 * 3 * 8 * 9 * 20
    q, k, v = (torch.randn(2, 3, n, 8, device=device, requires_grad=True) for n in (5, 7, 7))
    forward = 2 * (2 * 2 * 3 * 5 * 7 * 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert cost.flops(lambda: attend(q, k, v)) == forward
    assert cost.flops(lambda: attend(q, k, v).sum().backward()) == 3 * forward

def test_flops_of_the_published_networks(capsys):
    """The bill of the issue: U-Net 0.21 TFLOP, decoder 0.67, encoder 0.35 for a patch of 256 x 256 pixels."""
    cost.main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [r[0] for r in rows] == ["U-Net", "decoder", "encoder"]
    assert [float(r[1]) for r in rows] == pytest.approx([0.21, 0.67, 0.35], abs=0.01)

def test_profile_counts_rows():
    """Of every network, forward, while it is open. Catches: calls counted instead of rows, hooks that stay."""
    vae, unet = VQVAE(VAEConfig(8, groups=4, codes=16)), UNet(UNetConfig(8, groups=4, context_dim=16, heads=2))
    model = ZoomLDM(vae, Summarizer(SummarizerConfig(8, 16, 1, 16, 3)), unet).eval().requires_grad_(False)
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
    assert list(cost.Profile(model, None).rows) == ["U-Net", "decoder", "encoder"]

# ----- What is reckoned -----

def test_rows_of_a_large_image():
    """4096 pixels: 1024 latents, windows of 64 every 49, so 21 a side; tiles of 96 every 64, so 16 a side."""
    rows = cost.rows_of_image(4096, "s2")
    assert rows == {"U-Net": 50 * 2 * (3 * 441 + 1), "decoder": 50 * (441 + 1) + 256 * 2.25, "encoder": 50 * 882}
    assert cost.rows_of_image(4096, "x0+proxy") == {"U-Net": 50 * 2 * 442, "decoder": 50 + 576, "encoder": 0}
    with pytest.raises(UserError, match="backwards"):
        cost.rows_of_step(4, 1, "s1")

def test_bytes_by_hand():
    """f16: 3 * 64 * 64 * 2 = 24,576 of latents; 1, 4, 16, 64, 64, ... embeddings of 2,048; 8 of place."""
    assert cost.bytes_of_sample() == [24_584 + 2048 * n for n in (1, 4, 16, 64, 64, 64, 64, 64)]
    # 4^7 patches: 16,384 + 4,096 + ... + 1 with latents, 16,384 embeddings, 64 pooled ones of 64 + 16 + 4 + 1
    assert cost.bytes_on_disk(4 ** 7) == 21_845 * 24_584 + 16_384 * 2048 + 85 * 64 * 2048
    assert cost.bytes_reduced(100, 1) == 0 and cost.bytes_reduced(100, 4) == 600
    # the all-reduce hides behind the backward pass
    assert cost.step_seconds(3.0, 1.9) == 3.0 and cost.step_seconds(3.0, 2.5) == pytest.approx(3.5)
    assert cost.step_seconds(3.0, 1.9, hidden=0) == pytest.approx(4.9)

def test_training_is_three_forward_passes():
    """Nearly: nothing is sent back to the latents and, without the Summarizer, to the tokens."""
    unet = UNetConfig(8, (1, 2), 1, (2,), 16, groups=4, heads=2)
    once = cost.row_flops(UNet(unet).to("meta"), (3, 8, 8), 16)
    alone, whole = cost.training_flops(unet, 8), cost.training_flops(unet, 8, SummarizerConfig(8, 16, 1, 16, 3))
    assert 2.5 * once < alone <= 3 * once and whole > alone
