#!/bin/sh
# torch.optim.Muon orthogonalises float32 and float64 gradients in bfloat16, and so takes 13 times as long on some CPUs.
#
# Guess: an optimiser computes in the dtype of its parameters, as AdamW does.
# What is: Muon casts every update to bfloat16 for its matrix products. Of parameters in float64 two digits are left,
#   and where the CPU has no bfloat16 arithmetic (here oneDNN is told to use AVX2, as laptops have) the products fall
#   to a slow kernel: a step costs 13 times what the same products cost in float32. No setting changes it, and its
#   documentation does not tell.
# Version: torch 2.13.0, CPU.
# Seen, twenty matrices of 128 x 1152 (convolutions of a small U-Net), one thread:
#   largest error of a step in float64, over its largest entry: 0.02 (the same formula in float64: 0)
#   seconds a step with AVX2: torch 1.2, the same formula in float32 0.09 (with bfloat16 arithmetic: 0.03)
# Why it matters: Muon halves the steps of training small diffusion models. On a laptop its optimiser step is then
#   longer than forward and backward pass together.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
ONEDNN_MAX_CPU_ISA=AVX2 venv/bin/python - <<'PY'
import time

import torch

torch.set_num_threads(1)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def formula(g):
    """What Muon documents for one first step with Nesterov momentum 0.95: five rounds of Newton-Schulz."""
    a, b, c = COEFFICIENTS
    x = g / g.norm()
    for _ in range(5):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x


def step_of(dtype, n):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(128, 1152, dtype=dtype)) for _ in range(n)]
    for w in weights:
        w.grad = torch.randn(128, 1152, dtype=dtype)
    opt = torch.optim.Muon(weights, lr=1.0, weight_decay=0.0)
    return weights, opt


def seconds(run):
    run()
    began = time.process_time()
    for _ in range(3):
        run()
    return (time.process_time() - began) / 3


weights, opt = step_of(torch.float64, 1)
opt.step()
right = -formula(weights[0].grad)
scale = float((weights[0].detach() * right).sum() / (right * right).sum())      # Muon may scale by the shape
error = float((weights[0] / scale - right).abs().max() / right.abs().max())
print(f"largest error of a step in float64, over its largest entry: {error:.3f}")

weights, opt = step_of(torch.float32, 20)
theirs = seconds(opt.step)
ours = seconds(lambda: [formula(w.grad) for w in weights])
print(f"seconds a step: torch {theirs:.2f}, the same formula in float32 {ours:.3f}, {theirs / ours:.0f} times")
assert error > 1e-3
assert theirs > 4 * ours
PY
