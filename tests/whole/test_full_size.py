"""The published networks at full size, by their goldens (weights by tests/rule.py). About 3 GB of memory."""
from functools import partialmethod

import pytest
import torch
from rule import assert_golden, golden, manifest, pack, state_dict

from cdm import DiT, DiTConfig, place_table
from summarizer import Summarizer
from unet import UNet
from zoom_vae import VQVAE

pytestmark = pytest.mark.slow
FULL = 1e-4  # allowed max|a-b| / max(1, max|b|)

@pytest.fixture(autouse=True)
def no_copies(monkeypatch):
    """Networks take the tensors that were made for them: half the memory."""
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", partialmethod(torch.nn.Module.load_state_dict, assign=True))

@torch.no_grad()
def test_full_vae():
    vae, g = VQVAE.from_official(state_dict("full_vae_rule")), golden("full_vae_rule")[0]
    assert sum(p.numel() for p in vae.parameters()) == 55_322_782
    z = vae.encode(g["in/image"])
    assert_golden(z, "full_vae_rule", "encode", FULL)
    z_q, indices, _ = vae.quantize(g["out/encode"])
    pixels, codes = g["out/encode"].movedim(1, -1).double(), vae.codebook.weight.double()
    distance, published = ((pixels - codes[i]).square().sum(-1) for i in (indices, g["out/indices"]))
    assert ((distance - published)[indices != g["out/indices"]].abs() < 1e-6).all(), "another code, and not a tie"
    assert (indices == g["out/indices"]).float().mean() > 0.999
    assert_golden(vae.decode(z, quantize=False), "full_vae_rule", "decode_no_quant", FULL)

@torch.no_grad()
def test_full_summarizer():
    net, g = Summarizer.from_official(state_dict("full_summarizer_rule")), golden("full_summarizer_rule")[0]
    assert sum(p.numel() for p in net.parameters()) == 38_656_000
    for grid in ("1x1", "2x2", "4x4", "8x8"):
        tokens, mask = pack(g[f"in/feat_{grid}"])
        assert_golden(net(tokens, mask, g[f"in/mag_{grid}"]), "full_summarizer_rule", f"tokens_{grid}", FULL)

@torch.no_grad()
def test_full_unet():
    unet, g = UNet.from_official(state_dict("full_unet_rule")), golden("full_unet_rule")[0]
    assert sum(p.numel() for p in unet.parameters()) == 400_920_579
    found, args = {}, (g["in/x"], g["in/t"], g["in/context"])
    for name, block in (("middle", unet.middle[1]), (3, unet.up[3])):
        block.register_forward_hook(lambda m, args, h, name=name: found.__setitem__(name, h))
    assert_golden(unet(*args), "full_unet_rule", "eps", FULL)
    assert_golden(found["middle"], "full_unet_rule", "middle_block", FULL)
    assert_golden(found[3], "full_unet_rule", "output_blocks_3", FULL)

@torch.no_grad()
def test_full_cdm():
    """catches: heads of another width; a size that is not inferred."""
    g, width = golden("full_cdm_rule")[0], manifest("full_cdm_rule")["x_embedder.bias"][0]
    net = DiT.from_official(state_dict("full_cdm_rule") | {"pos_embed": place_table(65, width)})
    assert net.cfg == DiTConfig() and sum(p.numel() for p in net.parameters()) == 130_696_960
    out = net(g["in/x"].transpose(1, 2), g["in/t"], g["in/y"])                           # published: (B,C,65)
    assert_golden(out.transpose(1, 2), "full_cdm_rule", "out", 1e-4)
