#!/bin/sh
# On a CPU group_norm of a channels_last tensor goes wrong where the mean is large, and blows up beyond 300 deviations.
#
# Guess: the memory format changes the speed, and the result in its last digit. (The contiguous kernel was mended for
#   such means in 2021, so both are.)
# What is: the kernel for channels_last still takes the variance as mean of squares less square of the mean, in float32,
#   summed number by number. A mean of 10 deviations costs three digits, 100 all but one; then the difference comes out
#   as 0 and eps is all that is divided by. A constant picture, whose norm is 0, can give 10.
# Version: torch 2.13.0, CPU.
# Seen, largest error of group_norm (128 channels in 32 groups, 256 x 256) of normal numbers of deviation 1:
#   mean             0        10       100      1000
#   contiguous       7e-07    1e-06    9e-06    8e-05
#   channels_last    2e-05    2e-03    3e-01    2e+03
#   bfloat16 input, channels_last: 0.02, 0.04, 0.4, 1e+03
#   of a constant 777.7 (32 channels in 8 groups, 64 x 64): contiguous 0, channels_last 10
# Why it matters: channels_last makes the convolutions of a VAE or U-Net on a CPU nearly twice as fast, and diffusion's
#   networks have a group_norm before each of them. Activations of a trained network lie off zero, and plain background
#   makes their deviation small. Nothing warns.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch
from torch.nn.functional import group_norm

LAST = torch.channels_last


def errors(dtype, memory_format, channels=128, side=256, groups=32):
    found = []
    for mean in (0, 10, 100, 1000):
        torch.manual_seed(0)
        x = (torch.randn(1, channels, side, side) + mean).to(dtype)
        right = group_norm(x.double(), groups)
        y = group_norm(x.to(memory_format=memory_format), groups)
        found.append(float((y - right).abs().max()))
    return found


table = {(dtype, how): errors(dtype, how) for dtype in (torch.float32, torch.bfloat16)
         for how in (torch.contiguous_format, LAST)}
for (dtype, how), row in table.items():
    print(dtype, how, "  ".join(f"{v:.0e}" for v in row))
flat = torch.full((1, 32, 64, 64), 777.7)
plain = [float(group_norm(x, 8).abs().max()) for x in (flat, flat.to(memory_format=LAST))]
print("constant: contiguous, channels_last", plain)
good, bad = table[torch.float32, torch.contiguous_format], table[torch.float32, LAST]
assert max(good) < 2e-4
assert bad[1] > 1e-4 and bad[2] > 0.01 and bad[3] > 10
assert max(table[torch.bfloat16, torch.contiguous_format]) < 0.05
assert table[torch.bfloat16, LAST][2] > 0.1
assert plain[0] == 0 and plain[1] > 1
PY
