"""Every command of experiments/sr.py, at the smallest size."""
import math

import pytest

from common import UserError, save_tensors
from diffusion import ZoomLDM
from experiments import sr
from large import proxy as proxies

def test_commands_of_the_table(ready, toy, capsys):
    fast = [str(ready), f"--data={toy}", "--n=1", "--steps=1", "--invert_steps=1", "--device=cpu", "--threads=0"]
    proxy = proxies.Proxy(4)
    save_tensors(ready / "proxy.safetensors", proxy.state_dict(), {"model": proxies.fingerprint(
        ZoomLDM.from_run(ready))})
    sr.main(["table", *fast, "--scale=1", "--seeds=1", "--train_steps=1"])
    out = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines()}
    assert {"bicubic", "trained", "null", "gt", "inferred", "inferred, exact", "real"} < set(rows)
    assert float(rows["inferred, exact"][-1].split("±")[0]) >= 48 and math.isinf(float(rows["real"][0]))
    assert (ready / "bench" / "sr.png").exists() and (ready / "bench" / "sr.json").exists()
    sr.main(["planted", *fast])
    assert "2x2" in capsys.readouterr().out
    with pytest.raises(UserError, match="say what"):
        sr.main(["tables", str(ready)])
