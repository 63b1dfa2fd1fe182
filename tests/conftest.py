"""Shared by all tests: the repository on the path, two threads that do not spin, the same random numbers."""
import os
import sys
from pathlib import Path

# before torch starts its threads: a spinning thread on a busy 2-core machine has made a step ten times slower
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root():
    return ROOT
