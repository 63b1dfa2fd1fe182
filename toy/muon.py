"""Muon: an optimiser for weight matrices that needs a third of the steps of AdamW on the toy.

A step's gradients, averaged over the steps before, form a matrix with a few strong directions and many weak ones.
Muon makes all of them equally strong (K. Jordan et al. 2024), and scales the result so that a learning rate of AdamW
fits (J. Liu et al. 2025, 0.2 sqrt of the longer side). A convolution counts as a matrix (out, in k k). What is no
matrix, biases and norms, stays with AdamW.

PyTorch's own torch.optim.Muon takes no convolutions, and computes in bf16 on any device: on a CPU without bf16
arithmetic a step of it takes 13 times as long as in float32 (findings/torch_muon_computes_in_bfloat16.sh).

in:  parameters with gradients   out: the same, one step further     read next: train.py::run_stage
"""
import torch

MOMENTUM = 0.95                 # of the averaged gradient
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a polynomial that drives singular values to about 1 in five rounds

def equalised(g):
    """The matrix with the singular vectors of g (m,n), and singular values of about 0.7 to 1.2, tiny ones aside.

    A round takes x to (a + b r + c r r) x with r = x x^T. All rounds together multiply x by one small matrix p, and r
    follows from r, so that the long side of x is met twice, not ten times."""
    a, b, c = NEWTON_SCHULZ
    x = g if g.shape[0] <= g.shape[1] else g.T
    x = x / (x.norm() + 1e-7)                                           # singular values of at most 1
    r = x @ x.T                                                         # (m,m), the shorter side
    p = one = torch.eye(len(r), device=r.device)
    for _ in range(5):
        q = a * one + b * r + c * r @ r
        p, r = q @ p, q @ r @ q
    x = p @ x
    return x if g.shape[0] <= g.shape[1] else x.T

class Muon(torch.optim.AdamW):
    """AdamW, but for matrices. in: parameters and settings as AdamW takes them."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1 and p.grad is not None:
                    self.step_matrix(p, group)
                    p.grad = None                                       # AdamW passes it over
        super().step()

    def step_matrix(self, p, group):
        state, g = self.state[p], p.grad.flatten(1)                     # (out,in) or (out,in k k)
        if not state:
            # AdamW looks for a step in every state it loads
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(g)}
        state["momentum"].lerp_(g, 1 - MOMENTUM)
        ahead = g.lerp(state["momentum"], MOMENTUM)                     # Nesterov's
        scale = 0.2 * max(g.shape) ** 0.5
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(equalised(ahead).view_as(p), alpha=-group["lr"] * scale)
