"""What training does to the autoencoder besides gradient steps. Parity with the published one is in test_parity.py."""
import pytest
import torch
from rule import manifest, state_dict

from common import UserError, load_tensors, save_tensors
from zoom_vae import VQVAE, VAEConfig, main, perplexity, rebase, revive_codes

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
    again = vae.to_latent.weight.clone()
    rebase(vae, white, whiten=True)  # where all is white already, nothing turns
    assert torch.allclose(torch.linalg.eigvalsh(moments(vae.encode(x))[1])[-1], power[-1], rtol=1e-2)
    assert vae.to_latent.weight.flatten() @ again.flatten() > 0


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


def test_codes_are_the_same_under_autocast(vae):
    """bf16 distances would pick other codes."""
    vae.codebook.weight.normal_()
    z = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vae.quantize(z)[1]
    assert torch.equal(inside, vae.quantize(z)[1])


def test_perplexity():
    assert perplexity(torch.ones(32)) == pytest.approx(32)
    assert perplexity(torch.eye(32)[0] * 9) == pytest.approx(1)


# ----- python zoom_vae.py extract -----

def whole():
    """A checkpoint like PathLDM's: VAE with its training loss, U-Net, text encoder, buffers."""
    state = {"first_stage_model." + k: v for k, v in state_dict("vae_small").items()}
    return state | {"first_stage_model.loss.logvar": torch.zeros(()), "cond_stage_model.text.weight": torch.zeros(2),
                    "model.diffusion_model.out.2.bias": torch.zeros(3), "betas": torch.zeros(1000)}


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_extract(tmp_path, capsys, suffix):
    """Bit for bit the VAE, in a file that loads like a published vq-f4."""
    path, out = tmp_path / f"whole.{suffix}", tmp_path / "vae.safetensors"
    torch.save({"state_dict": whole(), "epoch": 3}, path) if suffix == "ckpt" else save_tensors(path, whole())
    main(["extract", str(path), f"--out={out}"])
    assert "157 of 161 tensors" in capsys.readouterr().out
    mine, reference = load_tensors(out)[0], state_dict("vae_small")
    assert mine.keys() == reference.keys() and all(torch.equal(v, reference[k]) for k, v in mine.items())
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(VQVAE.from_official(mine).encode(x), VQVAE.from_official(reference).encode(x))


def test_extract_refuses(tmp_path):
    save_tensors(tmp_path / "vae.safetensors", state_dict("vae_small"))
    broken = whole()
    del broken["first_stage_model.quant_conv.bias"]
    save_tensors(tmp_path / "broken.safetensors", broken)
    out = tmp_path / "out.safetensors"
    for args, says in (([], "write python zoom_vae.py extract"), (["vae.safetensors"], "got checkpoint 'vae.safe"),
                       (["vae.safetensors", "--out=a.ckpt"], "extract CHECKPOINT"),
                       ([str(tmp_path / "vae.safetensors"), f"--out={out}"], "holds no VAE beside"),
                       ([str(tmp_path / "broken.safetensors"), f"--out={out}"], "1 missing: first_stage_model.quant"),
                       (["/nowhere.ckpt", f"--out={out}"], "no checkpoint at")):
        with pytest.raises(UserError, match=says):
            main(["extract", *args])
    with pytest.raises(UserError, match="the one command is extract"):
        main(["extrat"])
    assert not out.exists() and len(manifest("vae_small")) == 157


def test_shape_table(capsys):
    main([])
    assert "55,322,782" in capsys.readouterr().out
