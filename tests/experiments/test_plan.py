"""Plans: against numbers by hand, and from the speed of a run."""
import pytest

from common import UserError, read_lines
from experiments import plan

def test_plan_by_hand(monkeypatch, capsys):
    """Round numbers in, round numbers out."""
    monkeypatch.setattr(plan, "parameters", lambda: 1_000_000_000)
    monkeypatch.setattr(plan, "training_flops", lambda *a: 1e12)
    monkeypatch.setattr(plan, "full_size", lambda: {"U-Net": 2e14, "decoder": 7e14, "encoder": 4e14})
    monkeypatch.setattr(plan, "rows_of_image", lambda size, guide: {"U-Net": 10, "encoder": guide == "s2"})
    plan.main(["--gpus=2", "--per_gpu=50", "--img_s=100", "--net_gbit=80", "--patches=1e6", "--epochs=2",
               "--images=1e6", "--size=4096"])
    text = capsys.readouterr().out
    step = 0.5 + 4e9 * 8 / 80e9 - 0.5 * 2 / 3
    encoded = sum(1e6 / 4 ** s for s in range(8)) * 4e14 / 1e14 / 2 / 3600
    read, written = 111_880 * 100 / step / 1e9, 1e6 * 4096 ** 2 * 3 / 12e6 / 1e9
    for part in ("100 samples/s per GPU (given) = 100 TFLOP/s", "26,632, 32,776", "mean 111,880", ": 20,000 steps",
                 f"step      {step:.3f} s: compute 0.500, all-reduce 0.400, of which 0.067 shows; 0.900 if none",
                 f"time      {step * 20_000 / 3600:.1f} hours", f"encoding latents, {encoded:.2f} hours",
                 f"4.00 GB sent per GPU and step, {32 / step:.1f} Gbit/s of 80; storage gives {read:.3f} GB/s",
                 "16.0 GB a checkpoint",
                 f"s2        2.40 PFLOP, 24.0 GPU-seconds each: {12e6 / 86400:.1f} days, "
                 f"written at {written:.3f} GB/s", "x0+proxy  2.00 PFLOP",
                 "50.3 TB of plain pixels, 6.3 TB of latents"):
        assert part in text, part

def test_speed_of_a_run_counts_by_flops(run, monkeypatch):
    logged = sorted(r["img_s"] for r in read_lines(run / "log.jsonl") if r["stage"] == "ldm")
    monkeypatch.setattr(plan, "training_flops", lambda unet, side, told: {32: 3.0, 16: 2.0}.get(unet.width, 30.0))
    speed, source = plan.speed(plan.Config(run=str(run)))
    assert logged[0] * 2 / 30 <= speed <= logged[-1] * 2 / 30 and str(run) in source

@pytest.mark.parametrize("args, message", [
    (["--gpus=0"], "--gpus=0: it must be"), (["--size=128", "--img_s=1"], "--size=128"),
    (["nowhere"], "nowhere tells no speed"), ([], "no run tells no speed")])
def test_what_cannot_be_planned_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        plan.main(args)
