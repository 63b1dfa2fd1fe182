"""Timings: lines that compute what they say, tables of what was timed, and what is compared with what."""
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from common import UserError, cli, setup
from experiments import bench
from summarizer import SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

TINY = UNetConfig(8, (1, 2), 1, (2,), 16, groups=4, heads=2), VAEConfig(8, (1, 2, 2), 1, 16, groups=4)
TOLD = SummarizerConfig(8, 16, 1, 16, 3)

def test_diffusers_is_skipped_or_compared(monkeypatch):
    """Missing, with a reason; of another shape, not raced. catches: counts alone compared, FLOPs forgotten."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    text, same = bench.compared(TINY[0], 8)
    assert not same and "diffusers cannot be imported" in text and "pip install -e '.[bench]'" in text
    for attention, same in (((2,), True), ((1,), False)):
        other = UNet(UNetConfig(8, (1, 2), 1, attention, 16, groups=4))        # one head for two: same weights, FLOPs
        monkeypatch.setattr(bench, "Diffusers", lambda cfg, other=other: other)
        assert bench.compared(TINY[0], 8)[1] is same

def test_diffusers_is_the_published_shape():
    pytest.importorskip("diffusers", reason="needs the extra bench: pip install -e '.[bench]'")
    assert bench.compared(UNetConfig(), 64)[1]
    net = bench.Diffusers(UNetConfig(8, (1, 2), 1, (2,), 16, groups=4))
    assert {m.heads for m in net.modules() if hasattr(m, "to_q")} == {1}
    assert net(torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.randn(1, 65, 16)).shape == (1, 3, 8, 8)

@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_every_line_runs_and_is_told(bf16, monkeypatch, capsys):
    """The whole command in sizes that take no time; FLOPs are counted in test_cost.py. Catches: a line that cannot be
    built, a share of the wrong yardstick, a compiled network timed as a plain one."""
    ticks, nets = iter(range(1, 10 ** 6)), []
    flops = {"U-Net": 4, "decoder": 2, "encoder": 1}
    for name, value in {"sizes": (*TINY, TOLD, 8), "row_flops": 4, "training_flops": 12, "network_flops": flops,
                        "compared": ("no diffusers", False)}.items():
        monkeypatch.setattr(bench, name, lambda *args, value=value: value)
    monkeypatch.setattr(bench, "matmul", lambda ranks, full, kind, dtype: (
        f"matmul {kind}", 2 * 8 ** 3, partial(torch.mm, *torch.randn(2, 8, 8, dtype=dtype))))
    monkeypatch.setattr(bench, "seconds_of", lambda call, device, clock: (call(), next(ticks) * 1e-3)[1])
    monkeypatch.setitem(bench.GROUPS, "peaks", lambda cfg, ranks: [("copy", 8, torch.zeros(8).clone)])
    monkeypatch.setattr(UNet, "compile", lambda net: nets.append(net))
    ranks = replace(setup("cpu"), amp=torch.bfloat16 if bf16 else None)     # the machine has it, or not
    monkeypatch.setattr(bench, "setup", lambda *args, **options: ranks)
    lines = {name: call for name, _, call in bench.unets(bench.Config(compile=True), setup("cpu", amp=False))}
    assert list(lines) == ["matmul fp32", "ours, fp32", "ours, compiled, fp32"]
    assert nets == [lines["ours, compiled, fp32"].args[0]] != [lines["ours, fp32"].args[0]]
    bench.main(["--rounds=1", "--steps=1", "--batch=1"])
    said = capsys.readouterr().out
    for text in (f"torch {torch.__version__}", "\ncopy ", "ours, fp32 ", "decode, fp32 ", "joint, x0 ", "\nstep "):
        assert text in said, text
    assert ("bf16 autocast" in said) == ("matmul bf16" in said) == bf16

def test_lines_races_and_tables(monkeypatch):
    """A convolution's line: shape, 2 * 9 * C^2 FLOP a pixel; a race: medians of rounds in turn; shares of the
    yardstick. catches: FLOPs of one product, lines timed one after the other, a mean."""
    name, work, call = bench.conv(setup("cpu"), 2, 3, 5, "fp32", torch.float32)
    assert name == "conv 2x3->3 @5 fp32" and work == 2 * 2 * 9 * 3 * 3 * 25 and call().shape == (2, 3, 5, 5)
    order, times = [], iter([9.0, 9.0, 1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    monkeypatch.setattr(bench, "seconds_of", lambda call, device, clock: (call(), next(times))[1])
    lines = [(name, 1, partial(order.append, name)) for name in "ab"]
    assert bench.race(lines, 3, torch.device("cpu")) == {"a": (2.0, 9.0), "b": (20.0, 9.0)}
    assert order == list("abababab")
    spent = {"matmul a": (1.0, 1.0), "one, fp32": (1.0, 2.0), "one, compiled, fp32": (0.25, 17.0), "two": (7.0, 7.0)}
    lines = [(name, work, None) for name, work in zip(spent, (100, 50, 50, 70))]
    *rows, last = bench.rate_table("title", lines, spent).splitlines()[1:]
    assert [row.split()[-2:] for row in rows] == [["100.0%", "1.00"], ["50.0%", "1.00"], ["200.0%", "4.00"],
                                                  ["10.0%", "1.00"]]
    assert last == "one, compiled, fp32: what compiling took is won back after 20 calls"

def test_ctrl_c_says_what_is_true(capsys):
    """catches: a checkpoint promised where there is none."""
    def stop(argv):
        raise KeyboardInterrupt
    for stopped, said in (({"stopped": bench.NOT_KEPT}, "begins anew"), ({}, "goes on from the last checkpoint")):
        with pytest.raises(SystemExit) as left:
            cli(stop, **stopped)
        assert left.value.code == 130 and said in capsys.readouterr().err

def test_sizes_of_the_toy():
    """catches: the default sizes in place of those that the preset trains."""
    unet, vae, told, side = bench.sizes(bench.Config(toy=True))
    assert (unet.width, unet.context_dim, vae.width, told.width, side) == (64, 128, 32, 128, 16)

@pytest.mark.parametrize("args", [["nonsense"], ["--steps=0"], ["--groups=nonsense"], ["--steps=1001"],
                                  ["--busy"]])
def test_what_cannot_be_is_refused(args):
    with pytest.raises(UserError):
        bench.main(args)

def test_autoencoder_convolves_with_channels_last():
    """And comes out as it always did. catches: another layout of the result."""
    vae, seen = VQVAE(TINY[1]).requires_grad_(False), []
    for part in (vae.encoder, vae.decoder):
        part.conv_in.register_forward_pre_hook(lambda m, args: seen.append(not args[0].is_contiguous()))
    for side in (128, 64):
        z = vae.encode(torch.randn(1, 3, side, side))
        assert z.is_contiguous() and vae.decode(z, quantize=False).is_contiguous()
    assert seen == [True] * 4
