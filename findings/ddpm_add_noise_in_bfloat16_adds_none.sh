#!/bin/sh
# diffusers' add_noise on bfloat16 latents adds no noise at all at the first time step.
#
# Guess: the noise of a bfloat16 latent is right to bfloat16's rounding, half a percent.
# What is: alpha_bar is rounded to bfloat16 before 1 - alpha_bar is taken. Just below 1 bfloat16 has steps of 0.004, so
#   every alpha_bar above 0.998 becomes 1 and the noise 0; later ones come in steps. float16 is within 2 %.
# Versions: diffusers 0.42.1, torch 2.13.0; the latent-diffusion schedule, 0.0015 to 0.0195, scaled linear.
# Seen, factor of the noise, by t:
#   t          0       1       2       3       5       10      20      50
#   float32    0.0387  0.0548  0.0672  0.0777  0.0953  0.1296  0.1807  0.2886
#   bfloat16   0.0000  0.0625  0.0625  0.0884  0.0884  0.1250  0.1768  0.2871
# Why it matters: training in bfloat16 asks the network, at t = 0, for noise that is not in its input (a loss of 1 that
#   nothing can lower), and at small t for another amount than the sampler's float32 table takes away. Add noise in
#   float32, round afterwards.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q diffusers==0.42.1 torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch
from diffusers import DDPMScheduler

scheduler = DDPMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
times = [0, 1, 2, 3, 5, 10, 20, 50]
factors = {}
print("t         ", "  ".join(f"{t:<6}" for t in times))
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    ones = torch.ones(len(times), 1, dtype=dtype)
    factors[dtype] = scheduler.add_noise(ones * 0, ones, torch.tensor(times)).float().flatten()
    print(f"{str(dtype)[6:]:10}", "  ".join(f"{v:.4f}" for v in factors[dtype].tolist()))
exact = (1 - scheduler.alphas_cumprod[times]) ** 0.5
assert torch.allclose(factors[torch.float32], exact, rtol=1e-5)
assert torch.allclose(factors[torch.float16], exact, rtol=0.02)
assert factors[torch.bfloat16][0] == 0
assert factors[torch.bfloat16][1] > 1.1 * exact[1]
PY
