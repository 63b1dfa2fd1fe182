#!/bin/sh
# safetensors.numpy writes an array that is not in C order with its values in the wrong places.
#
# Guess: save() copies a transposed array into order, or refuses it, as safetensors.torch does for a tensor.
# What is: it writes the memory as it lies, under the transposed shape. Reading gives other numbers; there is no
#   warning. An array in Fortran order comes back scrambled likewise. numpy.ascontiguousarray before saving helps.
# Versions: safetensors 0.8.0, numpy 2.4.6, torch 2.13.0.
# Seen:
#   saved  [[0, 3], [1, 4], [2, 5]]   a transposed (2,3)
#   loaded [[0, 1], [2, 3], [4, 5]]
#   Fortran order: saved [[0, 1, 2], [3, 4, 5]], loaded [[0, 3, 1], [4, 2, 5]]
#   torch refuses the same: ValueError
# Why it matters: features (patches, channels) that were kept as (channels, patches), and weights that other frameworks
#   keep transposed, are stored with .T. Shape and sums agree afterwards, so only a look at single values shows it.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q safetensors==0.8.0 numpy==2.4.6 torch==2.13.0
venv/bin/python - <<'PY'
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

a = np.arange(6, dtype=np.float32).reshape(2, 3)


def there_and_back(x):
    return safetensors.numpy.load(safetensors.numpy.save({"x": x}))["x"]


turned = there_and_back(a.T)
fortran = there_and_back(np.asfortranarray(a))
print("saved ", a.T.astype(int).tolist(), "  a transposed (2,3)")
print("loaded", turned.astype(int).tolist())
print("Fortran order: saved", a.astype(int).tolist(), "loaded", fortran.astype(int).tolist())
assert np.array_equal(there_and_back(a), a)
assert np.array_equal(there_and_back(np.ascontiguousarray(a.T)), a.T)
assert turned.tolist() == [[0, 1], [2, 3], [4, 5]]
assert fortran.tolist() == [[0, 3, 1], [4, 2, 5]]
try:
    safetensors.torch.save({"x": torch.from_numpy(a).T})
except ValueError:
    print("torch refuses the same: ValueError")
else:
    raise SystemExit("safetensors.torch no longer refuses")
PY
