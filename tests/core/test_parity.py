"""Small modules of ours against the published ones: numbers (tests/golden, weights by tests/rule.py), other sizes.

Full size is in tests/whole/test_full_size.py, key names and loading in tests/slides/test_keys.py. The checksum of every
file's weights is compared where they are rebuilt. "catches": changes of the code that a test is meant to fail on.
"""
from importlib import import_module

import pytest
import torch
from rule import assert_close, assert_golden, golden, pack, small, state_dict

from summarizer import pack_grid
from unet import UNet
from zoom_vae import VQVAE, VAEConfig

SMALL = 2e-5  # allowed max|a-b| / max(1, max|b|)

# ----- 1. Numbers, small modules -----

def test_vae():
    """catches: eps 1e-6 -> 1e-5; padding (0,1,0,1) -> (1,0,1,0); q and k swapped; the sign of -2 z.e in the distance;
    .25 and 1 swapped in the loss; decode that forgets to quantise."""
    vae, g = small("vae_small"), golden("vae_small")[0]
    assert not vae.training
    z = vae.encode(g["in/image"])
    assert_golden(z, "vae_small", "encode", SMALL)
    z_q, indices, loss = vae.quantize(g["out/encode"])
    assert indices.dtype == torch.int64 and torch.equal(indices, g["out/indices"])
    assert_golden(z_q, "vae_small", "quantized", SMALL)
    assert abs(float(loss) - float(g["out/quant_loss"])) <= SMALL * max(1, float(g["out/quant_loss"]))
    assert_golden(vae.decode(z), "vae_small", "decode", SMALL)
    assert_golden(vae.decode(z, quantize=False), "vae_small", "decode_no_quant", SMALL)

def test_quantize_gradients():
    """Straight through to z; the legacy weighting: 1 on z, 0.25 on the codes. catches: a detach moved or left out."""
    vae, z = VQVAE(VAEConfig(32, (1, 1, 1), 1, 16)), torch.randn(2, 3, 4, 6, requires_grad=True)
    z_q, indices, loss = vae.quantize(z)
    through = torch.autograd.grad((z_q * 3).sum(), z, retain_graph=True)[0]
    assert torch.equal(through, torch.full_like(z, 3.0))
    codes = vae.codebook.weight.detach()[indices].movedim(-1, 1)                    # (2,3,4,6)
    d_z, d_codes = torch.autograd.grad(loss, [z, vae.codebook.weight])
    assert_close(d_z, 2 * (z - codes) / z.numel(), 1e-6, "gradient on z")
    moved = torch.zeros_like(d_codes).index_add_(0, indices.flatten(), (codes - z).movedim(1, -1).flatten(0, 2))
    assert_close(d_codes, 0.25 * 2 * moved.detach() / z.numel(), 1e-6, "gradient on the codes")

@pytest.mark.parametrize("name", ["unet_small", "unet_1235_rule"])
def test_unet(name):
    """catches: cos and sin swapped; 1e-5 <-> 1e-6 in a norm's eps (by a factor of about 2); value and gate swapped;
    tanh GELU; [skip, h] for [h, skip]; an up-sampling before instead of after the transformer; features off by one;
    cached keys and values in another order than the layers."""
    unet, g = small(name), golden(name)[0]
    z, t, c = g["in/x"], g["in/t"], g["in/context"]
    eps, kv = unet(z, t, c), unet.cache_context(c)
    assert_golden(eps, name, "eps", SMALL)
    assert_golden(unet.features(z, t, c, "middle"), name, "middle_block", SMALL)
    assert_golden(unet.features(z, t, kv, 3), name, "output_blocks_3", SMALL)
    assert torch.equal(unet(z, t, kv), eps)

def test_summarizer():
    """One batch may mix grids; empty slots are not seen. catches: start 32 - n//2 off by one; column-major tokens; the
    scale token last; a norm's eps; tanh GELU; placement shared over a batch; a mask ignored."""
    g, net = golden("summarizer_small")[0], small("summarizer_small")
    grids = ["1x1", "2x2", "4x4", "8x8", "2x3"]
    for grid in grids:
        c = net(*pack(g[f"in/feat_{grid}"]), g[f"in/mag_{grid}"])
        assert_golden(c, "summarizer_small", f"tokens_{grid}", SMALL)
    tokens, mask = (torch.cat(v) for v in zip(*(pack(g[f"in/feat_{k}"][:1]) for k in grids)))
    s = torch.cat([g[f"in/mag_{k}"][:1] for k in grids])
    c = net(tokens, mask, s)
    assert_close(c, torch.cat([g[f"out/tokens_{k}"][:1] for k in grids]), SMALL)
    assert torch.equal(net(torch.where(mask[..., None], tokens, 1e3), mask, s), c)

# ----- 2. Other sizes -----

def turned(state):
    """The same network for transposed images: every convolution kernel transposed."""
    return {k: v.transpose(2, 3).contiguous() if v.ndim == 4 else v for k, v in state.items()}

def test_vae_any_multiple_of_4():
    """A non-square image: net(x) transposed equals the transposed net on x transposed. catches: height and width
    swapped in the attention's reshape, or in the padding (0,1,0,1) -> (0,2,0,0)."""
    vae, other = small("vae_small"), VQVAE.from_official(turned(state_dict("vae_small")))
    x = torch.rand(1, 3, 20, 28) * 2 - 1
    z = vae.encode(x)
    assert z.shape == (1, 3, 5, 7) and vae.decode(z).shape == x.shape
    assert_close(other.encode(x.mT.contiguous()).mT, z, SMALL, "encode")
    assert_close(other.decode(z.mT.contiguous(), quantize=False).mT, vae.decode(z, quantize=False), SMALL, "decode")
    assert torch.equal(other.quantize(z.mT)[1].mT, vae.quantize(z)[1])

def test_unet_non_square():
    """catches: height and width swapped where tokens become an image again."""
    unet, g = small("unet_1235_rule"), golden("unet_1235_rule")[0]
    z, args = torch.randn(2, 3, 8, 24), (g["in/t"], g["in/context"])
    eps = unet(z, *args)
    assert eps.shape == z.shape and unet.features(z, *args, "middle").shape == (2, 160, 1, 3)
    other = UNet.from_official(turned(state_dict("unet_1235_rule")))
    assert_close(other(z.mT.contiguous(), *args).mT, eps, SMALL)

def test_unusable_sizes():
    vae, unet, g = small("vae_small"), small("unet_1235_rule"), golden("unet_1235_rule")[0]
    args, seen = (g["in/t"], g["in/context"]), torch.ones(1, 64, dtype=torch.bool)
    for call, says in ((lambda: vae.encode(torch.zeros(1, 3, 30, 32)), "multiples of 4"),
                       (lambda: unet(torch.zeros(2, 3, 12, 16), *args), "multiples of 8"),
                       (lambda: unet.features(g["in/x"], *args, 12), "no U-Net block"),
                       (lambda: unet.cache_context(g["in/context"][..., :63]), "width 63"),
                       (lambda: small("summarizer_small")(torch.zeros(1, 64, 65), seen, torch.zeros(1).long()), "65"),
                       *((lambda shape=shape: pack_grid(torch.zeros(shape)), "1, 2, 4 or 8")
                         for shape in ((4, 3, 3), (4, 16, 16), (4, 2, 4), (4,), (4, 16)))):
        with pytest.raises(ValueError, match=says):
            call()

def test_full_size_table(capsys):
    """Each file told to run says the published number of parameters."""
    for name, count in (("zoom_vae", "55,322,782"), ("summarizer", "38,656,000"), ("unet", "400,920,579"),
                        ("diffusion", "494,899,361")):
        import_module(name).main([])
        assert count in capsys.readouterr().out
