#!/bin/sh
# torch's FlopCounterMode counts 0 operations for scaled_dot_product_attention on a CPU.
#
# Guess: the count depends on shapes only, so CPU, GPU and meta tensors give the same.
# What is: the fused attention of the CPU has no formula and counts 0, forward and backward. On the meta device, and on
#   the CPU under the MATH kernel, the count is right.
# Version: torch 2.13.0.
# Seen, 4 heads of 64 x 32 (exact: 2,097,152 forward, twice that backward where nothing is computed again):
#   cpu:             0 forward, 0 backward
#   cpu, MATH:       2,097,152 forward, 4,194,304 backward
#   meta:            2,097,152 forward, 4,194,304 backward
# Why it matters: a cost table made on a laptop leaves attention out, which for a transformer over long sequences is most
#   of it; two networks of equal cost seem to differ by their share of attention.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode


def count(device, kernel):
    q = torch.randn(1, 4, 64, 32, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter, kernel:
        out = scaled_dot_product_attention(q, q, q)
        forward = counter.get_total_flops()
        out.sum().backward()
        return forward, counter.get_total_flops() - forward


seen = {"cpu": count("cpu", nullcontext()), "cpu, MATH": count("cpu", sdpa_kernel(SDPBackend.MATH)),
        "meta": count("meta", nullcontext())}
for name, (forward, backward) in seen.items():
    print(f"{name + ':':12} {forward:10,} forward, {backward:,} backward")
exact = 2 * 2 * 4 * 64 * 64 * 32  # two matrix products, a multiplication and an addition each
assert seen["cpu"] == (0, 0)
assert seen["cpu, MATH"] == seen["meta"] == (exact, 2 * exact)
PY
