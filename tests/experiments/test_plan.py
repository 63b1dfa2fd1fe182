"""Plans: against numbers by hand, and from the speed of a run."""
import json

import pytest

from common import UserError
from experiments import plan

def test_plan_by_hand(monkeypatch, capsys):
    """Round numbers in, round numbers out."""
    monkeypatch.setattr(plan, "parameters", lambda: 1_000_000_000)
    monkeypatch.setattr(plan, "training_flops", lambda *a: 1e12)
    monkeypatch.setattr(plan, "full_size", lambda: {"U-Net": 2e11, "decoder": 7e11, "encoder": 4e11})
    monkeypatch.setattr(plan, "rows_of_image", lambda size, guide: {"U-Net": 10, "encoder": guide == "s2"})
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

def test_speed_of_a_run_counts_by_flops(run, monkeypatch):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = sorted(r["img_s"] for r in rows if r["stage"] == "ldm")
    monkeypatch.setattr(plan, "training_flops", lambda unet, side, told: {32: 3.0, 16: 2.0}.get(unet.width, 30.0))
    speed, source = plan.speed(plan.Config(run=str(run)))
    assert logged[0] * 2 / 30 <= speed <= logged[-1] * 2 / 30 and str(run) in source

@pytest.mark.parametrize("args, message", [
    (["--gpus=0"], "--gpus=0: it must be positive"), (["--size=128", "--img_s=1"], "--size=128"),
    (["nowhere"], "nowhere tells no speed"), ([], "no run tells no speed")])
def test_what_cannot_be_planned_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        plan.main(args)
