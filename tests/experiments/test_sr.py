"""experiments/sr.py: regions, other dyes, the trained baseline, its commands."""
import math

import pytest
import torch
from rule import assert_close

from common import UserError, save_tensors, setup
from data import Pyramids, fixed_batch
from experiments import sr
from experiments.sr import Trained
from large import proxy as proxies
from sample_joint import Resize

def test_regions_and_other_dyes(toy):
    """A region reduces to its image; dyes leave glass white and change tissue. catches: tiles in the wrong order."""
    pyramids, cfg = Pyramids(toy), sr.Config(scale=2)
    truth, x, e = sr.regions(pyramids, cfg, 2)
    assert truth.shape == (2, 3, 256, 256) and e.shape == (2, 96, 4, 4)
    assert (Resize(4, "box").down(truth) - x).abs().max() * 127.5 <= 1.01  # rounded twice
    shown = sr.regions(pyramids, sr.Config(scale=2, plain=5), 2)[1]
    assert ((127.5 * shown.mean(1)).flatten(1).std(1) >= 5).all() and len(shown) == 2
    with pytest.raises(UserError, match="--plain"):
        sr.regions(pyramids, sr.Config(scale=2, plain=100), 2)
    other, small, found = sr.regions(pyramids, sr.Config(scale=2, stain=True), 2)
    assert (Resize(4, "box").down(other) - small).abs().max() * 127.5 <= 1.01 and found.shape == e.shape
    glass = truth.amin(1) > 0.9
    moved = (other - truth).abs().amax(1)
    assert moved[~glass].mean() > 0.05 and (not glass.any() or moved[glass].mean() < 0.03)

def test_the_trained_baseline_begins_as_the_run(model, ready, toy, tmp_path):
    """With no step done it is the run's null branch; it learns to look at the image; it is kept."""
    pyramids, ranks = Pyramids(toy), setup("cpu", False)
    net = Trained(tmp_path, model, pyramids, ranks, 2, 0)
    z, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    with torch.no_grad():
        want = model.unet(z, t, torch.zeros(2, 65, model.summarizer.cfg.width))
        assert_close(net.predict(z, t, torch.randn(2, 3, 16, 16)), want, 1e-4)
    net = Trained(tmp_path, model, pyramids, ranks, 2, 2)
    y = [torch.randn(2, 3, 16, 16) for _ in range(2)]
    assert (net.predict(z, t, y[0]) - net.predict(z, t, y[1])).abs().max() > 1e-5
    again = Trained(tmp_path, model, pyramids, ranks, 2, 2)
    assert torch.equal(net.predict(z, t, y[0]), again.predict(z, t, y[0]))
    assert net.draw(fixed_batch(pyramids, "test", 1, 1)["x"], 0, 2).shape == (1, 3, 128, 128)

def test_commands(model, ready, toy, capsys):
    """The table and planted conditions at the smallest size."""
    fast = [str(ready), f"--data={toy}", "--n=1", "--steps=1", "--invert_steps=1", "--device=cpu", "--threads=0"]
    proxy = proxies.Proxy(4)
    save_tensors(ready / "proxy.safetensors", proxy.state_dict(), proxies.mark(model))
    sr.main(["table", *fast, "--scale=1", "--seeds=1", "--train_steps=1"])
    rows = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    assert {"bicubic", "trained", "null", "gt", "inferred", "inferred, exact", "real"} < set(rows)
    assert float(rows["inferred, exact"][-1].split("±")[0]) >= 48 and math.isinf(float(rows["real"][0]))
    assert (ready / "bench" / "sr.png").exists() and (ready / "bench" / "sr.json").exists()
    sr.main(["planted", *fast])
    assert "2x2" in capsys.readouterr().out
    with pytest.raises(UserError, match="say what"):
        sr.main(["tables", str(ready)])
