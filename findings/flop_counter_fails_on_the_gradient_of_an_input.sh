#!/bin/sh
# torch's FlopCounterMode cannot count torch.autograd.grad with respect to the input of a module.
#
# Guess: it counts whatever runs under it, and changes nothing; guidance by a gradient (of a decoder, a classifier, a
#   loss on an estimate) is then counted as training is.
# What is: the same call raises RuntimeError under FlopCounterMode as soon as the tensor whose gradient is asked for is
#   a leaf that went into an nn.Module: the module tracker behind the counter hooks the module's inputs. Without the
#   counter it works; with .backward() it is counted; and it is counted where the module's function is called instead.
# Version: torch 2.13.0.
# Seen, a convolution of 3 to 3 channels, 3 x 3, on 8 x 8 pixels (exact: 10,368 forward and as many backward, for the
#   weights are frozen):
#   without the counter:     works
#   autograd.grad, module:   RuntimeError: A leaf node was passed to _will_engine_execute_node ...
#   backward, module:        20,736
#   autograd.grad, function: 20,736
# Why it matters: the cost of sampling that is guided by a gradient cannot be counted by the tool that counts training.
#   A TorchDispatchMode that adds up torch.utils.flop_counter's formulas, without following modules, can.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

net = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)


def gradient(forward, backward=False):
    x = torch.ones(1, 3, 8, 8, requires_grad=True)
    loss = forward(x).square().sum()
    return loss.backward() if backward else torch.autograd.grad(loss, x)


def counted(*how):
    with FlopCounterMode(display=False) as counter:
        gradient(*how)
    return counter.get_total_flops()


gradient(net)
print("without the counter:     works")
try:
    counted(net)
    raise SystemExit("FlopCounterMode counts it now: this finding is out of date")
except RuntimeError as err:
    print(f"autograd.grad, module:   RuntimeError: {err}")
    assert "leaf node" in str(err)
seen = counted(net, True), counted(lambda x: conv2d(x, net.weight, net.bias, padding=1))
print(f"backward, module:        {seen[0]:,}\nautograd.grad, function: {seen[1]:,}")
exact = 2 * 3 * 3 * 9 * 64
assert seen == (2 * exact, 2 * exact)
PY
