"""Heads on bags as large as slides."""
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def test_a_large_bag_fits_in_memory():
    """50,000 instances of width 1024, forward and backward, of each head in a process of its own: under 2 GB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process of its own is read from /proc")
    # VmHWM, not ru_maxrss: that one starts at what the parent had
    code = """
import torch, mil
torch.set_num_threads(1)
x = torch.empty(50_000, 1024).uniform_(-1, 1)
for name in ("dsmil", "clam"):
    mil.HEADS[name](1024, 2).train().loss(x, torch.tensor(1)).backward()
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 2e9, f"{int(done.stdout) / 1e6:.2f} GB"
