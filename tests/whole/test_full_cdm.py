"""The published CDM at full size."""
import torch
from rule import assert_golden, golden, manifest, state_dict

from cdm import DiT, DiTConfig, place_table


def test_full_size():
    """catches: heads of another width; a size that is not inferred."""
    g, width = golden("full_cdm_rule")[0], manifest("full_cdm_rule")["x_embedder.bias"][0]
    net = DiT.from_official(state_dict("full_cdm_rule") | {"pos_embed": place_table(65, width)})
    assert net.cfg == DiTConfig() and sum(p.numel() for p in net.parameters()) == 130_696_960
    with torch.no_grad():
        out = net(g["in/x"].transpose(1, 2), g["in/t"], g["in/y"])                       # published: (B,C,65)
    assert_golden(out.transpose(1, 2), "full_cdm_rule", "out", 1e-4)
