#!/bin/sh
# diffusers' DDIM with "linspace" steps tells the network another noise level than the one it left in the sample.
#
# Guess: each step ends at the noise level of the next time in scheduler.timesteps, whatever the spacing.
# What is: a step goes from t to t - 1000 // steps. "linspace" times lie (1000 - 1) / (steps - 1) apart, which is
#   more, so the sample is noisier than the network is told, most of all at the end, where noise is small. "leading"
#   agrees exactly; "trailing" only where the number of steps divides 1000.
# Versions: diffusers 0.42.1, torch 2.13.0.
# Seen, for a data set of one point, whose noise is known exactly (noise left / noise of the time told, largest):
#   leading  10: 1.000  30: 1.000  50: 1.000
#   linspace 10: 3.499  30: 1.416  50: 1.024
#   trailing 10: 1.000  30: 1.016  50: 1.000
#   With 10 steps linspace tells t = 0 for a sample that is at t = 11.
# Why it matters: sampler and spacing are often exchanged by name alone. With few steps the last ones see an input that
#   no training step had, and a comparison of spacings measures this and not the spacing.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q diffusers==0.42.1 torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY' 2>/dev/null
import torch
from diffusers import DDIMScheduler

schedule = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
seen = {}
for spacing in ("leading", "linspace", "trailing"):
    for steps in (10, 30, 50):
        sampler = DDIMScheduler(**schedule, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=False)
        sampler.set_timesteps(steps)
        noise = (1 - sampler.alphas_cumprod) ** 0.5  # the data are zero, so a sample at time t is noise[t] * eps
        eps = torch.ones(1)
        largest = 0.0
        for t, told in zip(sampler.timesteps[:-1], sampler.timesteps[1:]):
            left = sampler.step(eps, t, noise[t] * eps).prev_sample
            largest = max(largest, float(left / noise[told]))
        seen[spacing, steps] = largest
    print(f"{spacing:8}", "  ".join(f"{n}: {seen[spacing, n]:.3f}" for n in (10, 30, 50)))
assert all(abs(seen["leading", n] - 1) < 1e-3 for n in (10, 30, 50))
assert all(abs(seen["trailing", n] - 1) < 1e-3 for n in (10, 50))
assert seen["linspace", 10] > 3 and seen["linspace", 50] > 1.01 and seen["trailing", 30] > 1.005
PY
