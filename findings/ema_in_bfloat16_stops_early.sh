#!/bin/sh
# An average of weights kept in bfloat16 stops a quarter of the way, for good.
#
# Guess: an EMA in bfloat16 is right to bfloat16's half percent, only noisy.
# What is: a step adds (1 - decay) of the distance, and once that is less than half of bfloat16's spacing the sum rounds
#   back to what it was. From 0 towards weights of 1 it stops at 0.8, 0.25, 0.03 for decay 0.99, 0.999, 0.9999; float16
#   stops too, later. AveragedModel keeps the type of the model, without a word; so does a plain average over checkpoints.
# Version: torch 2.13.0, CPU.
# Seen:
#   decay            0.99     0.999    0.9999
#   bfloat16         0.8047   0.2500   0.0312
#   float16          0.9756   0.7559   0.2500
#   float32          1.0000   1.0000   0.9997
#   AveragedModel, decay 0.999, of a bfloat16 model: 0.25
#   AveragedModel, plain average of 1000 times 0 and 2000 times 1, bfloat16: 0.25
# Why it matters: model.bfloat16() before the EMA is made halves its memory and leaves, after any training, weights near
#   the start. Samples from the raw weights are good and from the averaged ones bad, at every check.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def end_of_ema(decay, dtype):
    average, weight = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    for _ in range(80000):
        before = average.clone()
        average.lerp_(weight, 1 - decay)
        if torch.equal(before, average):
            break
    return average.item()


def averaged(values, **options):
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    average = AveragedModel(model, **options)
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
    return average.module.weight.item()


decays = (0.99, 0.999, 0.9999)
end = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    end[dtype] = [end_of_ema(decay, dtype) for decay in decays]
    print(f"{str(dtype)[6:]:10}", "  ".join(f"{v:.4f}" for v in end[dtype]))
ema = averaged([0] + 5000 * [1], multi_avg_fn=get_ema_multi_avg_fn(0.999))
plain = averaged(1000 * [0] + 2000 * [1])
print("AveragedModel, decay 0.999:", ema, " plain average:", plain)
assert end[torch.bfloat16][1:] == [0.25, 0.03125]
assert end[torch.float16][2] < 0.3
assert min(end[torch.float32]) > 0.999
assert ema == 0.25 and plain == 0.25
PY
