"""Muon: an optimiser for matrices, beside AdamW for the rest."""
import pytest
import torch
from conftest import TINY, quick, vae_of
from training import same

import train
from toy.muon import Muon, equalised

@pytest.mark.parametrize("shape", [(8, 8), (8, 72), (72, 8), (1, 5)])
def test_singular_values_become_about_one(shape):
    """Of a matrix whose own reach over a factor of 100; its singular vectors stay."""
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    g = u @ torch.diag(torch.logspace(0, -2, len(s))) @ v
    made, again = equalised(torch.stack([g, 3 * g]))                    # several at once, each by its own size
    assert torch.allclose(made, again, atol=1e-4)
    inner = u.T @ made @ v.T                                            # diagonal, if the vectors stayed
    assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3
    assert (inner - inner.diag().diag()).abs().max() < 1e-3
    assert equalised(torch.zeros(1, *shape)).abs().max() == 0               # nothing to learn: no step, no nan

def test_it_agrees_with_pytorch():
    """On a matrix, which is all that torch.optim.Muon takes; that one computes in bf16. Catches: another momentum,
    scale, decay or order of them."""
    torch.manual_seed(0)
    start, grads = torch.randn(6, 20), torch.randn(4, 6, 20)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = Muon([ours], 0.1, weight_decay=0.02)
    b = torch.optim.Muon([theirs], 0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for g in grads:
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert (ours - start).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 0.01

def test_convolutions_are_matrices_and_the_rest_is_adamw():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8))
    plain = torch.nn.Parameter(net[0].weight.detach().flatten(1).clone())
    other = [torch.nn.Parameter(p.detach().clone()) for p in net.parameters() if p.ndim == 1]
    muon, alone, adamw = Muon(net.parameters(), 0.1), Muon([plain], 0.1), torch.optim.AdamW(other, 0.1)
    for _ in range(3):
        net(torch.randn(2, 3, 6, 6)).square().sum().backward()
        plain.grad = net[0].weight.grad.flatten(1).clone()
        for p, q in zip(other, (p for p in net.parameters() if p.ndim == 1)):
            p.grad = q.grad.clone()
        for opt in (muon, alone, adamw):
            opt.step()
            opt.zero_grad()
    assert torch.equal(net[0].weight.flatten(1), plain)
    for p, q in zip(other, (p for p in net.parameters() if p.ndim == 1)):
        assert torch.equal(p, q)

def test_an_interrupted_run_with_it_ends_bit_identical(toy, run, tmp_path, monkeypatch):
    """Catches: momenta that are not saved, a state that AdamW cannot load."""
    real, steps = train.agree, []

    def dies(*args):
        steps.append(args)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*args)
    for name in ("whole", "parts"):
        out = tmp_path / name
        out.mkdir()
        args = [*TINY, "--muon", f"--data={toy}", f"--out={out}", vae_of(run, out)]
        if name == "parts":
            monkeypatch.setattr(train, "agree", dies)
            with pytest.raises(KeyboardInterrupt):
                quick(args)
        quick(args)
    for name in ("state", "ema"):
        assert same(tmp_path / f"whole/{name}.safetensors", tmp_path / f"parts/{name}.safetensors"), name
    assert not same(tmp_path / "whole/ema.safetensors", run / "ema.safetensors")
