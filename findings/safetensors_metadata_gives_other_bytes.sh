#!/bin/sh
# Two safetensors files of the same tensors and the same metadata differ in their bytes, unless there is only one key.
#
# Guess: the format is deterministic; the same content gives the same file and the same checksum.
# What is: the metadata are written in the order of a hash table that is seeded anew each time. One key, or none, gives
#   the same bytes always; two keys either of two files, six hardly ever the same twice. Tensors are in fixed order.
# Versions: safetensors 0.8.0, numpy 2.4.6.
# Seen, kinds of files among 12 savings:
#   no key: 1, one key: 1, two keys: 2, six keys: 12
# Why it matters: checksums of weights, caches by content, and tests that a resumed run ends with the same bits fail
#   now and then. Put everything into one key, as JSON, or compare what was loaded.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q safetensors==0.8.0 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
from safetensors.numpy import save

tensors = {"weight": np.zeros(2), "bias": np.ones(3)}
kinds = {}
for keys in (0, 1, 2, 6):
    metadata = {f"key{i}": str(i) for i in range(keys)}
    kinds[keys] = len({save(tensors, metadata=metadata) for _ in range(12)})
print("no key: {}, one key: {}, two keys: {}, six keys: {}".format(*kinds.values()))
assert kinds[0] == kinds[1] == 1
assert kinds[6] > 6
PY
