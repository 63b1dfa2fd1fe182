#!/bin/sh
# nn.MultiheadAttention gives nan or zeros for an item that is all padding, depending on how it is called.
#
# Guess: one answer, whichever it is.
# What is: with need_weights=True (the default) nan. With need_weights=False 0 while gradients are recorded, in train and
#   in eval mode; in eval mode under no_grad, where a fused path is taken, nan. scaled_dot_product_attention gives 0.
# Version: torch 2.13.0, CPU.
# Seen, values of the output (its bias is 0):
#   need_weights=True:  train nan, eval nan, eval and no_grad nan
#   need_weights=False: train 0.0, eval 0.0, eval and no_grad nan
#   scaled_dot_product_attention: 0.0
# Why it matters: a bag without tissue, a dropped condition or the filling of the last batch is such an item. Training is
#   finite and so is validation with gradients on; the first nan comes in inference, or where somebody asks for the
#   attention maps.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
attention = nn.MultiheadAttention(8, 2, batch_first=True)
x = torch.randn(2, 4, 8)
padded = torch.zeros(2, 4, dtype=torch.bool)
padded[1] = True  # the second item holds nothing
seen = {}
for need_weights in (True, False):
    row = []
    for mode, train, grad in (("train", True, True), ("eval", False, True), ("eval and no_grad", False, False)):
        attention.train(train)
        with torch.set_grad_enabled(grad):
            out, _ = attention(x, x, x, key_padding_mask=padded, need_weights=need_weights)
        assert out[0].isfinite().all()
        seen[need_weights, mode] = out[1].flatten()[0].item()
        assert out[1].isnan().all() or (out[1] == 0).all()
        row.append(f"{mode} {seen[need_weights, mode]}")
    print(f"need_weights={need_weights}:", ", ".join(row))
keep = ~padded[:, None, None, :].expand(2, 1, 4, 4)
fused = scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=keep)[1]
print("scaled_dot_product_attention:", fused.flatten()[0].item())
assert (fused == 0).all()
assert all(seen[True, mode] != seen[True, mode] for mode in ("train", "eval", "eval and no_grad"))
assert seen[False, "train"] == seen[False, "eval"] == 0
assert seen[False, "eval and no_grad"] != 0
PY
