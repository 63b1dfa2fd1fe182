"""Places of tokens, our one addition to the published networks, whose parity is in test_parity.py."""
import pytest
import torch

from common import UserError
from summarizer import Summarizer, SummarizerConfig, build, pack_grid, place_code
from unet import UNet, UNetConfig

def test_codes_of_the_same_place_agree_most():
    """Finest grid against itself, and a pixel of 16 x 16 against the 8 x 8 token that covers it."""
    token, pixel = place_code(8, 8, 16), place_code(16, 16, 16)
    assert torch.equal((token @ token.T).argmax(1), torch.arange(64))
    over = torch.arange(64).view(8, 8).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    assert torch.equal((pixel @ token.T).argmax(1), over)

def test_tokens_get_the_place_of_their_cell():
    """Catches: slots counted instead of cells, a scale that reads another grid's places."""
    cfg = SummarizerConfig(embed_dim=12, width=32, depth=0, mlp=32, positions=16)
    net, shown = Summarizer(cfg).requires_grad_(False), []
    net.norm.register_forward_hook(lambda m, args, out: shown.append(args[0]))
    for p in (net.embed.weight, net.embed.bias, net.pad, net.pos):
        p.zero_()  # so that nothing but the place is left in a token
    for side, row in ((1, 0), (2, 1), (4, 2), (8, 3)):
        _, mask = pack_grid(torch.randn(12, side, side))
        assert torch.equal(net.place[row][mask], place_code(side, side, 16))
        assert not net.place[row][~mask].any()
        net(torch.randn(1, 64, 12), mask[None], torch.tensor([row]))
        assert torch.equal(shown[-1][0, 1:, :16], net.place[row])

@pytest.mark.parametrize("kind", ["transformer", "cnn"])
def test_attention_starts_on_the_token_over_the_pixel(kind):
    """What `start_aligned` promises: the last level's queries find their token before any training."""
    torch.manual_seed(0)
    summarizer = build(SummarizerConfig(12, 64, 2, 64, 3, 16, kind)).requires_grad_(False)
    unet = UNet(UNetConfig(32, (1, 2), 1, (2,), 64, groups=8, positions=16)).requires_grad_(False)
    tokens, mask = pack_grid(torch.randn(12, 8, 8))
    c = summarizer(tokens[None], mask[None], torch.tensor([0]))
    cross = next(m for m in unet.modules() if hasattr(m, "cross")).cross
    side, width = 8, cross.q.in_features
    q = torch.cat([place_code(side, side, 16), torch.zeros(side * side, width - 16)], 1)
    near = ((cross.q(q) @ cross.k(c[0, -64:]).T).argmax(1) == torch.arange(64)).float().mean()
    assert near > 0.9

def test_places_are_off_by_default_and_fit_or_are_refused():
    """The published networks have none: same weights, same names."""
    plain, placed = (Summarizer(SummarizerConfig(12, 32, 1, 32, positions=n)).state_dict() for n in (0, 16))
    assert placed.keys() == plain.keys() and not any("place" in k for k in plain)
    for positions in (6, 64):
        for kind in ("transformer", "cnn"):
            with pytest.raises(UserError, match="multiple of 4"):
                build(SummarizerConfig(12, 32, 1, 32, positions=positions, kind=kind))
        with pytest.raises(UserError, match="multiple of 4"):
            UNet(UNetConfig(32, (1,), 1, (1,), 32, positions=positions))
