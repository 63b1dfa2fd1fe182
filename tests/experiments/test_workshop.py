"""The CNN Summarizer, held against the grids it is given and against the library's batch norm."""
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, save_tensors
from diffusion import ZoomLDM
from experiments.workshop import BatchNorm, CNNSummarizer
from summarizer import Summarizer, SummarizerConfig, pack_grid
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

def cnn(**changes):
    """Tiny, in eval mode, with a FiLM, running statistics and a place code that are not those of the start."""
    net = CNNSummarizer(SummarizerConfig(**dict(embed_dim=12, width=32, scales=4, positions=8, kind="cnn") | changes))
    for block in net.blocks:
        nn.init.normal_(block.film.weight, std=0.3)
        nn.init.normal_(block.norm.running_mean)
    return net.eval().requires_grad_(False)

def batch(*sides):
    """Packed random grids, of scales 0, 1, ... out: grids, tokens, mask, s."""
    grids = [torch.randn(12, side, side) for side in sides]
    tokens, mask = (torch.stack(v) for v in zip(*map(pack_grid, grids)))
    return grids, tokens, mask, torch.arange(len(sides)) % 4

@pytest.mark.parametrize("side", [8, 32])
def test_cnn_sees_each_grid_upsampled(side):
    """Grids of all sizes in one batch. Catches: slots taken for cells, rows for columns, one size for all."""
    net, shown = cnn(side=side), []
    net.blocks[0].register_forward_pre_hook(lambda m, args: shown.append(args[0]))
    grids, tokens, mask, s = batch(4, 1, 8, 2, 4)
    net(tokens, mask, s)
    assert shown[0].shape[2:] == (side, side)
    for e, x in zip(grids, shown[0]):
        want = F.interpolate(net.embed(e.movedim(0, 2)).movedim(2, 0)[None], (side, side), mode="nearest")[0]
        assert torch.allclose(x, want, atol=1e-6)

def test_cnn_is_blind_to_empty_slots_and_to_the_rest_of_the_batch():
    net, (_, tokens, mask, s) = cnn(), batch(4, 1, 8, 2)
    c = net(tokens, mask, s)                                                       # (4,64,32)
    filled = torch.where(mask[..., None], tokens, torch.randn_like(tokens))
    assert torch.equal(net(filled, mask, s), c)
    for i in range(4):
        assert torch.allclose(net(tokens[i:i + 1], mask[i:i + 1], s[i:i + 1])[0], c[i], atol=1e-5)

def test_cnn_token_lies_over_its_cell():
    """A change of one cell of 8 x 8 shows most in that cell's token, and not at all far away."""
    net, (_, tokens, mask, s) = cnn(), batch(8)
    c, cell = net(tokens, mask, s), 3 * 8 + 5
    tokens[0, cell] += 1
    moved = (net(tokens, mask, s) - c)[0].norm(dim=1).view(8, 8)
    assert moved.argmax() == cell and moved[3, 5] > 0.1
    assert not moved[:, 0].any() and not moved[7].any()
    with pytest.raises(UserError, match="side=48.* 8, 16, 32"):
        cnn(side=48)
    with pytest.raises(UserError, match="use pack_grid"):
        net(tokens.repeat(1, 1, 2), mask, s)

def test_cnn_is_modulated_by_the_scale():
    """Each block scales by 1 + its first half of channels, shifts by the second. Catches: halves exchanged, no 1."""
    block = cnn().blocks[2]
    x, out = torch.randn(2, 16, 8, 8), []
    for s in (1, 3):
        scale, shift = block.film.weight[s].view(2, 32, 1, 1)
        h = block.norm(block.conv(x)) * (1 + scale) + shift
        out.append(block(x, torch.tensor([s, s])))
        assert torch.allclose(out[-1], block.skip(x) + F.silu(h), atol=1e-5)
    assert not torch.allclose(*out, atol=0.1)
    fresh, (_, tokens, mask, s) = CNNSummarizer(SummarizerConfig(12, 32, scales=4, kind="cnn")).eval(), batch(4)
    assert torch.equal(fresh(tokens, mask, s), fresh(tokens, mask, s + 1))         # before training: none

def test_batch_norm_across_ranks_is_batch_norm(request):
    """Output, gradient and running statistics are the library's; two ranks are in test_train.py."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    ours, theirs = BatchNorm(5, affine=False), nn.BatchNorm2d(5, affine=False)
    for _ in range(2):
        x, g = 3 * torch.randn(4, 5, 3, 3) + 7, torch.randn(4, 5, 3, 3)
        grads = []
        for net in (ours, theirs):
            x = x.detach().requires_grad_()
            y = net(x)
            y.backward(g)
            grads += [x.grad, y.detach()]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads[:2], grads[2:]))
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5), name
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)
    assert ours.train()(x.bfloat16()).dtype == torch.bfloat16

def test_cnn_of_published_size():
    """128 x 128 and 512 wide, pooled down to 8 x 8 first; the count that docs/ names."""
    seen = []
    with torch.device("meta"):
        net = CNNSummarizer(SummarizerConfig(kind="cnn", side=128))
        for block in net.blocks:
            block.register_forward_hook(lambda m, args, out: seen.append(out.shape[-1]))
        c = net(torch.zeros(2, 64, 1024), torch.ones(2, 64, dtype=torch.bool), torch.zeros(2).long())
    assert seen == [64, 32, 16, 8] and c.shape == (2, 64, 512)
    assert sum(p.numel() for p in net.parameters()) == 5_434_624

def test_models_remember_their_kind(tmp_path):
    """Saved with its statistics; a file from before there were two kinds holds a transformer."""
    unet, vae = UNet(UNetConfig(8, (1,), 1, (1,), 32, groups=4)), VQVAE(VAEConfig(8, groups=4, codes=16))
    model = ZoomLDM(vae, cnn(positions=0), unet)
    model.save(tmp_path)
    back = ZoomLDM.from_run(tmp_path)
    assert type(back.summarizer) is CNNSummarizer and back.summarizer.cfg == model.summarizer.cfg
    _, *args = batch(2, 8)
    assert torch.equal(back.summarizer(*args), model.summarizer(*args))
    model = ZoomLDM(vae, Summarizer(SummarizerConfig(8, 32, 1, 64)), unet)
    config = model.config()
    del config["summarizer"]["kind"], config["summarizer"]["side"]
    save_tensors(tmp_path / "ema.safetensors", model.state_dict(), config)
    assert type(ZoomLDM.from_run(tmp_path).summarizer) is Summarizer
