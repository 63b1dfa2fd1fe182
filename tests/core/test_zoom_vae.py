"""What training does to the autoencoder besides gradient steps. Parity with the published one is in test_parity.py."""

import pytest
import torch

from zoom_vae import VQVAE, VAEConfig, perplexity, rebase, revive_codes, vae_loss

SMALL = VAEConfig(8, (1, 2, 2), 1, 32, 3, 4)

@pytest.fixture
def vae():
    return VQVAE(SMALL).requires_grad_(False)

def moments(z):
    pixels = z.movedim(1, -1).flatten(0, 2)
    return pixels.mean(0), torch.cov(pixels.T)

def test_whitening_changes_the_latents_and_not_the_images(vae):
    """Catches: a factor on the wrong side, a bias forgotten, eigenvectors instead of the symmetric root."""
    vae.to_latent.bias.add_(torch.tensor([5.0, -3.0, 1.0]))
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    z = vae.encode(x)
    before = vae.decode(z, quantize=False)
    rebase(vae, z, whiten=True)
    white = vae.encode(x)
    mean, cov = moments(white)
    assert mean.abs().max() < 1e-3
    assert torch.allclose(vae.decode(white, quantize=False), before, atol=1e-4)
    power = torch.linalg.eigvalsh(cov)
    assert float(power.max()) == pytest.approx(1, rel=1e-2) and float(power.min()) >= 0.0
    before = vae.to_latent.weight.clone()
    rebase(vae, white, whiten=True)  # where all is white already, nothing turns
    assert vae.to_latent.weight.flatten() @ before.flatten() > 0

def test_moving_the_origin_keeps_every_code(vae):
    """With codes in use, only the origin moves: indices and quantised reconstructions stay."""
    vae.codebook.weight.normal_()
    vae.to_latent.bias.add_(4.0)
    vae.codebook.weight.add_(4.0)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    z = vae.encode(x)
    indices, image = vae.quantize(z)[1], vae.decode(z)
    rebase(vae, z)
    moved = vae.encode(x)
    assert moments(moved)[0].abs().max() < 1e-4 < 1 < moments(z)[0].abs().max()
    assert torch.equal(vae.quantize(moved)[1], indices)
    assert torch.allclose(vae.decode(moved), image, atol=1e-4)

def test_only_unused_codes_move_and_each_by_its_own_draw(vae):
    """One dead code more must not change where the others go, or two ranks would part at the first rounding."""
    z, before = torch.randn(2, 3, 8, 8), vae.codebook.weight.clone()
    usage = torch.ones(32)
    usage[[3, 7]] = 0
    assert revive_codes(vae, z, usage, torch.Generator().manual_seed(0)) == 2
    moved = vae.codebook.weight.clone()
    assert torch.equal((moved != before).any(1).nonzero()[:, 0], torch.tensor([3, 7]))
    usage[1] = 0
    revive_codes(vae, z, usage, torch.Generator().manual_seed(0))
    assert torch.equal(vae.codebook.weight[[3, 7]], moved[[3, 7]])

def test_codes_are_the_same_under_autocast_and_counted(vae):
    """bf16 distances would pick other codes. Perplexity is the number of codes used evenly."""
    vae.codebook.weight.normal_()
    z = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vae.quantize(z)[1]
    assert torch.equal(inside, vae.quantize(z)[1])
    assert perplexity(torch.ones(32)) == pytest.approx(32) and perplexity(torch.eye(32)[0] * 9) == pytest.approx(1)

def test_loss(vae):
    """L1 and the codebook's loss; without codes, the codebook stays in the graph. catches: a sign, a squared error."""
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    loss, x_rec, indices = vae_loss(vae, x)
    assert torch.equal(x_rec, vae.decode(vae.encode(x))) and indices.shape == (2, 4, 4)
    assert float(loss) == pytest.approx(float((x - x_rec).abs().mean() + vae.quantize(vae.encode(x))[2]))
    vae.requires_grad_(True)
    loss, x_rec, indices = vae_loss(vae, x, quantize=False)
    loss.backward()
    assert indices is None and float(loss.detach()) == pytest.approx(float((x - x_rec.detach()).abs().mean()))
    assert not vae.codebook.weight.grad.any() and vae.decoder.conv_out.weight.grad.any()
