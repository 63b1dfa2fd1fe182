#!/bin/sh
# safetensors cannot open a file for PyTorch that is larger than memory and swap, not even for one small tensor of it.
#
# Guess: safe_open maps the file and reads what is asked for, so its size does not matter.
# What is: for framework="pt" the whole file is mapped private and writable, and Linux (vm.overcommit_memory 0, as usual)
#   refuses such a mapping if it alone exceeds memory and swap. Not even names and metadata can be read. For "np" the
#   mapping is read-only, and anything can be opened; get_slice reads a part.
# Versions: safetensors 0.8.0, torch 2.13.0, numpy 2.4.6, Linux 6.18; 23 GB of memory, no swap.
# Seen, for a file of holes twice as large as memory and swap, with one tensor of 2 numbers and one of the rest:
#   pt: RuntimeError: unable to mmap ... Cannot allocate memory (12)
#   np: metadata, both names, the small tensor, a row of the large one; 2 MB more memory
# Why it matters: patches of one whole slide, or the weights of a large model, may be tens of gigabytes. A machine with
#   less memory does not read them for PyTorch, even if it wrote the file itself, piece by piece.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import json
import resource
from pathlib import Path

import numpy as np
import torch  # noqa: F401
from safetensors import safe_open

mode = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
assert mode == "0", f"vm.overcommit_memory is {mode}: this is about 0, the usual one"
lines = Path("/proc/meminfo").read_text().splitlines()
kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
rows = 2 * (kilobytes["MemTotal"] + kilobytes["SwapTotal"]) // 1024
header = {"__metadata__": {"made": "of holes"}, "small": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]},
          "large": {"dtype": "U8", "shape": [rows, 2**20], "data_offsets": [8, 8 + rows * 2**20]}}
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open("large.safetensors", "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    f.truncate(8 + len(text) + 8 + rows * 2**20)


def look(framework):
    with safe_open("large.safetensors", framework) as f:
        return f.metadata(), sorted(f.keys()), f.get_tensor("small").tolist(), f.get_slice("large")[rows - 1:].shape


try:
    said = look("pt")
except RuntimeError as err:
    said = str(err)
print("pt:", said)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seen = look("np")
more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(f"np: {seen}, {more:.0f} MB more memory")
assert "unable to mmap" in said and "Cannot allocate memory" in said
assert seen == ({"made": "of holes"}, ["large", "small"], [0, 0], (1, 2**20)) and more < 100
assert np.__version__ == "2.4.6"
PY
