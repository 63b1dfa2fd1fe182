"""Timings and plans: lines that compute what they say, plans against numbers by hand, rows against counted ones."""
import json
import sys
from functools import partial

import pytest
import torch
import torch.nn as nn

from common import UserError, setup
from diffusion import ZoomLDM
from experiments import bench, cost, plan, rivals
from large.proxy import Proxy
from large.windows import prepare
from sample_joint import sample_levels
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig, layout

TINY = UNetConfig(8, (1, 2), 1, (2,), 16, groups=4, heads=2), VAEConfig(8, (1, 2, 2), 1, 16, groups=4)
TOLD = SummarizerConfig(8, 16, 1, 16, 3)


@pytest.fixture
def small(monkeypatch):
    """Sizes that take no time; what is timed is still called."""
    monkeypatch.setattr(bench, "sizes", lambda full: (*TINY, TOLD))
    monkeypatch.setattr(bench, "SIDE", 8)
    monkeypatch.setattr(bench, "matmul", lambda ranks, full, kind, dtype: (
        f"matmul {kind}", 2 * 8 ** 3, lambda: partial(torch.mm, *torch.randn(2, 8, 8, dtype=dtype))))
    return setup("cpu", threads=torch.get_num_threads())


# ----- 1. What is compared -----

def test_plain_is_the_same_network():
    """Catches: a skip connection popped from the wrong end, heads mixed up, the scale of the logits, gate and value
    exchanged, the up-sampling left out."""
    net = UNet(TINY[0]).requires_grad_(False)
    for p in net.parameters():
        p += 0.1 * torch.randn_like(p)
    z, t, c = torch.randn(2, 3, 8, 8), torch.tensor([7, 900]), torch.randn(2, 65, 16)
    ours = net(z, t, c)
    assert ours.abs().mean() > 0.05
    assert torch.allclose(rivals.plain(net, z, t, c), ours, atol=2e-5 * float(ours.abs().max()))


def test_diffusers_is_skipped_with_a_reason(monkeypatch, small):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    text, same = rivals.compared(TINY[0], 8)
    assert not same and "skipped" in text and "pip install -e '.[bench]'" in text
    with pytest.raises(UserError, match="cannot be imported"):
        rivals.Diffusers(TINY[0])
    assert not any("diffusers" in name for name, _, _ in bench.unets(bench.Config(), small))


def test_a_network_of_another_shape_is_not_compared(monkeypatch):
    """Catches: counts alone compared, FLOPs forgotten."""
    for other, same in ((UNetConfig(8, (1, 2), 1, (2,), 16, groups=4), True),  # heads: no weights, no FLOPs
                        (UNetConfig(8, (1, 2), 1, (1,), 16, groups=4), False)):
        monkeypatch.setattr(rivals, "Diffusers", lambda cfg, other=other: UNet(other))
        assert rivals.compared(TINY[0], 8)[1] is same

    class Idle(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.net = UNet(cfg)

        def forward(self, z, t, c):
            return z
    monkeypatch.setattr(rivals, "Diffusers", Idle)
    assert "another shape" in rivals.compared(TINY[0], 8)[0]


def test_diffusers_is_the_published_shape():
    pytest.importorskip("diffusers", reason="needs the extra bench: pip install -e '.[bench]'")
    text, same = rivals.compared(UNetConfig(), 64)
    assert same and "400,920,579 weights" in text
    net = rivals.Diffusers(UNetConfig(8, (1, 2), 1, (2,), 16, groups=4))
    assert {m.heads for m in net.modules() if hasattr(m, "to_q")} == {1}
    assert net(torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.randn(1, 65, 16)).shape == (1, 3, 8, 8)


# ----- 2. What is timed -----

def test_every_line_runs_and_is_told(small, monkeypatch, tmp_path, capsys):
    """The whole command, tiny. Catches: a line that cannot be built, a share of the wrong yardstick."""
    clock = iter(range(1, 10 ** 6))

    def seconds(f, device):
        f()
        return next(clock) * 1e-3
    monkeypatch.setattr(plan, "seconds", seconds)
    monkeypatch.setattr(bench, "memory", lambda cfg, titles: [f"memory of {len(titles)} groups"])
    monkeypatch.setitem(bench.GROUPS, "peaks", lambda cfg, ranks: [("copy", 8, lambda: torch.zeros(8).clone)])
    out = tmp_path / "bench.md"
    bench.main([f"--out={out}", "--rounds=1", "--steps=1", "--batch=1"])
    said = capsys.readouterr().out
    body = out.read_text()
    assert body.startswith("# `python bench.py --out=") and f"torch {torch.__version__}" in body and "wrote" in said
    for text in ("memory of 6 groups", "\ncopy  ", "ours, fp32  ", "plain, fp32  ", "decode quantised, fp32  ",
                 "joint, x0+proxy  ", "\nstep  ", "U-Net forward: ours, fp32, ", "VAE: decode, fp32, ",
                 "50 steps, joint"):
        assert text in body and text in said, text


def test_peaks_count_what_they_do(small, monkeypatch):
    """The convolutions' lines by themselves: shapes, layouts, 2 * 9 * C^2 FLOP a pixel."""
    name, work, build = bench.conv(small, 2, 3, 5, "fp32", torch.float32, torch.channels_last)
    f = build()
    assert name == "conv 2x3->3 @5 fp32 nhwc" and work == 2 * 2 * 9 * 3 * 3 * 25
    assert f().shape == (2, 3, 5, 5) and f.args[0].is_contiguous(memory_format=torch.channels_last)
    assert cost.flops(nn.Conv2d(3, 3, 3, padding=1), (3, 5, 5)) * 2 == work


def test_table_shares_and_times():
    lines = [("matmul a", 100, None), ("one, fp32", 50, None), ("one, bf16", 50, None), ("two", 70, None)]
    rows = bench.table("title", lines, {"matmul a": 1.0, "one, fp32": 1.0, "one, bf16": 0.25, "two": 7.0})
    assert [r.split()[-2:] for r in rows[1:]] == [["100.0%", "1.00"], ["50.0%", "1.00"], ["200.0%", "4.00"],
                                                  ["10.0%", "1.00"]]


def test_findings_are_ratios_of_rates():
    found = {"U-Net forward": {"matmul 4096 fp32": (100, 1.0), "ours, fp32": (50, 0.6), "diffusers, fp32": (50, 0.9),
                               "ours, bf16 weights": (50, 0.3)},
             "sampling": {"patches, fp32": (1, 3.0)}}
    said = "\n".join(bench.findings(bench.Config(steps=2), found))
    assert "0.83 times the rate of matmul" in said and "1.50 times the rate of diffusers" in said
    assert "bf16 weights, 2.00 times the rate of ours, fp32" in said and "50 steps, patches, fp32: 75 s" in said
    assert "VAE" not in said


def test_race_is_a_median_of_rounds_in_turn(monkeypatch):
    order, times = [], iter([9.0, 9.0, 1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    monkeypatch.setattr(plan, "seconds", lambda f, device: (f(), next(times))[1])
    lines = [(n, 1, lambda n=n: lambda: order.append(n)) for n in "ab"]
    assert bench.race(lines, 3, torch.device("cpu")) == {"a": 2.0, "b": 20.0} and order == list("abababab")


def test_memory_of_one_line(small, capsys):
    bench.one(bench.Config(only="VAE: decode, fp32"), small)
    assert 50 < float(capsys.readouterr().out) < 20_000
    with pytest.raises(UserError, match="no such line"):
        bench.one(bench.Config(only="VAE: nonsense"), small)
    there = {title: [n for n, _, _ in bench.GROUPS[title](bench.Config(), small)]
             for title in {item.partition(": ")[0] for item in bench.MEMORY}}
    for item in bench.MEMORY:  # what is to be measured exists
        title, _, name = item.partition(": ")
        assert name in there[title] or "bf16" in name and not small.amp


@pytest.mark.parametrize("args", [["nonsense"], ["--steps=0"], ["--groups=nonsense"], ["--steps=600"]])
def test_what_cannot_be_is_refused(args):
    with pytest.raises(UserError):
        bench.main(args)


def test_high_resolution_is_convolved_with_channels_last():
    """And comes out as it always did. Catches: another layout of the result, one for the toy's small patches too."""
    vae, x = VQVAE(TINY[1]).requires_grad_(False), torch.randn(1, 3, 128, 128)
    seen = []
    for part in (vae.encoder, vae.decoder):
        part.conv_in.register_forward_pre_hook(lambda m, args: seen.append(
            args[0].is_contiguous(memory_format=torch.channels_last) and not args[0].is_contiguous()))
    z = vae.encode(x)
    image = vae.decode(z, quantize=False)
    assert seen == [True, True] and z.is_contiguous() and image.is_contiguous() and image.shape == x.shape
    vae.encode(x[..., :64, :64])
    vae.decode(z[..., :16, :16])
    assert seen[2:] == [False, False] and layout(x.to("meta"), 256) == torch.contiguous_format


# ----- 3. Plans -----

def test_rows_are_those_that_sampling_asks_for():
    """Counted while it runs. Catches: one estimate, decode or encode too few, the context left out."""
    net = ZoomLDM(VQVAE(TINY[1]), Summarizer(TOLD), UNet(TINY[0]), info={"patch": 32}).eval().requires_grad_(False)
    for guide in ("s2", "x0", "x0+proxy"):
        meter = cost.Profile(net, None)
        levels = prepare(net, None, (64,), [1, 0], 0, proxy=Proxy(4).requires_grad_(False))
        sample_levels(levels, net.schedule, steps=2, guide=guide, end="clean")
        meter.close()
        want = cost.rows_of_step(4, 1, guide)
        assert {k: meter.rows[k] for k in want} == {k: 2 * n for k, n in want.items()}, guide
    with pytest.raises(UserError, match="backwards"):
        cost.rows_of_step(4, 1, "s1")


def test_rows_of_a_large_image():
    """4096 pixels: 1024 latents, windows of 64 every 49, so 21 a side; tiles of 96 every 64, so 16 a side."""
    rows = cost.rows_of_image(4096, "s2")
    assert rows == {"U-Net": 50 * 2 * (3 * 441 + 1), "decoder": 50 * (441 + 1) + 256 * 2.25, "encoder": 50 * 882}
    assert cost.rows_of_image(4096, "x0+proxy") == {"U-Net": 50 * 2 * 442, "decoder": 50 + 576, "encoder": 0}


def test_bytes_by_hand():
    """f16: 3 * 64 * 64 * 2 = 24,576 of latents; 1, 4, 16, 64, 64, ... embeddings of 2,048; 8 of place."""
    assert cost.bytes_of_sample() == [24_584 + 2048 * n for n in (1, 4, 16, 64, 64, 64, 64, 64)]
    # 4^4 patches: 256 + 64 + 16 + 4 + 1 with latents, 256 embeddings, and 64 pooled ones
    assert cost.bytes_on_disk(256, scales=5) == 341 * 24_584 + 256 * 2048 + 64 * 2048
    assert cost.bytes_reduced(100, 1) == 0 and cost.bytes_reduced(100, 4) == 600


def test_all_reduce_hides_behind_the_backward_pass():
    assert cost.step_seconds(3.0, 1.9) == 3.0 and cost.step_seconds(3.0, 2.5) == pytest.approx(3.5)
    assert cost.step_seconds(3.0, 1.9, hidden=0) == pytest.approx(4.9)


def test_training_is_three_forward_passes():
    """Nearly: nothing is sent back to the latents and, without the Summarizer, to the tokens."""
    once = cost.meta_flops(lambda: UNet(TINY[0]), (3, 8, 8), 16)
    assert 2.5 * once < cost.training_flops(TINY[0], 8) <= 3 * once
    assert cost.training_flops(TINY[0], 8, TOLD) > cost.training_flops(TINY[0], 8)


def test_plan_by_hand(monkeypatch, capsys):
    """Round numbers in, round numbers out."""
    monkeypatch.setattr(plan, "parameters", lambda: 1_000_000_000)
    monkeypatch.setattr(plan, "training_flops", lambda *a: 1e12)
    monkeypatch.setattr(plan, "full_size", lambda: {"U-Net": 2e11, "decoder": 7e11, "encoder": 4e11})
    monkeypatch.setattr(plan, "rows_of_image", lambda size, guide, context: {"U-Net": 10, "encoder": guide == "s2"})
    cfg = plan.Config(gpus=2, per_gpu=50, img_s=100.0, net_gbit=80.0, patches=1e6, epochs=2.0, images=1000, size=4096)
    out = plan.plan(cfg)
    assert out["compute"] == 0.5 and out["sent"] == 4e9 and out["reduce"] == pytest.approx(0.4)
    assert out["step"] == pytest.approx(0.5 + 0.4 - 0.5 * 2 / 3) and out["steps"] == 2e6 / 100
    assert out["training"] == pytest.approx(out["step"] * 20_000)
    assert out["read"] == pytest.approx(111_880 * 100 / out["step"])
    assert out["s2"] == pytest.approx(2.4e12 / 1e14 * 1000 / 2) and out["x0+proxy FLOP"] == 2e12
    assert out["pixels"] == 1000 * 4096 ** 2 * 3 and out["latents"] == out["pixels"] / 8
    text = capsys.readouterr().out
    assert "20,000 steps" in text and "26,632, 32,776" in text and "16.0 GB a checkpoint" in text
    assert plan.plan(plan.Config(img_s=1.0, image_s=7.0, images=80, gpus=8))["s2"] == 70
    with pytest.raises(UserError, match="must be positive"):
        plan.plan(plan.Config(gpus=0))


def test_speed_of_a_run_counts_by_flops(run, monkeypatch):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = sorted(r["img_s"] for r in rows if r["stage"] == "ldm")
    monkeypatch.setattr(plan, "training_flops", lambda unet, side, told: {32: 3.0, 16: 2.0}.get(unet.width, 30.0))
    speed, source = plan.speed(plan.Config(run=str(run)))
    assert logged[0] * 2 / 30 <= speed <= logged[-1] * 2 / 30 and str(run) in source
    with pytest.raises(UserError, match="tells no speed"):
        plan.speed(plan.Config(run=str(run / "nothing")))


def test_check_compares_medians(monkeypatch, capsys):
    """Predicted: the step of one rank plus the all-reduce, nothing hidden."""
    told = {1: {"step": 2.0, "reduce": 0.0}, 2: {"step": 2.5, "reduce": 0.25}}
    monkeypatch.setattr(plan, "start", lambda world: told[world])
    assert plan.check(plan.Config(rounds=2)) == (2.25, 2.5) and "-10.0%" in capsys.readouterr().out


def test_a_rank_measures_its_step(monkeypatch, capsys):
    """What torchrun starts, in this process."""
    monkeypatch.setattr(plan, "TOY", (TINY[0], TOLD))
    threads = torch.get_num_threads()
    plan.main(["step"])
    torch.set_num_threads(threads)
    said = json.loads(capsys.readouterr().out)
    assert said["step"] > 0 and said["reduce"] == 0


def test_loader_against_training(run, toy, capsys):
    read, used = plan.loader(plan.Config(run=str(run), data=str(toy), batch=4, rounds=1))
    text = capsys.readouterr().out
    assert read > 0 < used and f"{read / used:.1f} times" in text and "26,632" in text
    with pytest.raises(UserError, match="say which run"):
        plan.loader(plan.Config())


@pytest.mark.parametrize("args", [["nonsense"], ["loader"]])
def test_words_of_plan_are_checked(args):
    with pytest.raises(UserError):
        plan.main(args)
