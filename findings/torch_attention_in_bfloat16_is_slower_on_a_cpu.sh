#!/bin/sh
# PyTorch's fused attention takes two to five times as long in bfloat16 as in float32 on a CPU, for short sequences.
#
# Guess: under bf16 autocast attention is at least as fast as in float32, at least where the CPU has bf16 arithmetic.
# What is: forward and backward of scaled_dot_product_attention over 64 tokens, as in the coarse levels of a small U-Net
#   and in a transformer over patches, take longer in bfloat16; the unfused path (SDPBackend.MATH) is faster there,
#   though the fused one is chosen. In float32 the fused path is the faster one, as one would guess.
# Version: torch 2.13.0, CPU.
# Seen, one thread, a CPU with avx512_bf16, 24 sequences of 64 queries and 65 keys, milliseconds:
#   4 heads of 32: float32 3.2, bfloat16 12.1, bfloat16 unfused 4.6; 8 heads of 16: float32 4.9, bfloat16 25.3, 6.3
# Why it matters: attention was a fifth of a training step of a small diffusion model under autocast, for a hundredth of
#   its operations.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import time
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

torch.set_num_threads(1)


def milliseconds(heads, width, dtype, backend):
    q, k, v = (torch.randn(24, heads, n, width, dtype=dtype, requires_grad=True) for n in (64, 65, 65))
    spent = []
    with sdpa_kernel(backend):
        for _ in range(13):
            began = time.process_time()
            scaled_dot_product_attention(q, k, v).sum().backward()
            spent.append(1000 * (time.process_time() - began))
    return median(spent[3:])


for heads, width in ((4, 32), (8, 16)):
    single = milliseconds(heads, width, torch.float32, SDPBackend.FLASH_ATTENTION)
    half = milliseconds(heads, width, torch.bfloat16, SDPBackend.FLASH_ATTENTION)
    plain = milliseconds(heads, width, torch.bfloat16, SDPBackend.MATH)
    print(f"{heads} heads of {width}: float32 {single:.1f}, bfloat16 {half:.1f}, bfloat16 unfused {plain:.1f} ms")
    assert half > 1.5 * single
    assert half > 1.5 * plain
PY
