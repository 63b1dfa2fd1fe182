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
ROUNDS = 5

def equalised(g):
    """Matrices with the singular vectors of g (k,m,n), and singular values of about 0.7 to 1.2, tiny ones aside.

    A round takes x to q x with q = a + b r + c r r and r = x x^T. The next r is q r q, and q and r may change places,
    for both are polynomials of the first r. So the rounds work on the small r, and x is multiplied once, at the end."""
    a, b, c = NEWTON_SCHULZ
    wide = g.shape[1] <= g.shape[2]
    x = g if wide else g.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)          # singular values of at most 1
    r = x @ x.mT                                                        # (k,m,m), the shorter side
    one = torch.eye(r.shape[1], device=r.device)
    p = q = a * one + torch.baddbmm(r, r, r, beta=b, alpha=c)
    for _ in range(ROUNDS - 1):
        r = q @ q @ r
        q = a * one + torch.baddbmm(r, r, r, beta=b, alpha=c)
        p = q @ p
    x = p @ x
    return x if wide else x.mT

class Muon(torch.optim.AdamW):
    """AdamW, but for matrices. in: parameters and settings as AdamW takes them."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                  # matrices of one size are equalised at once
            for p in group["params"]:
                if p.ndim > 1 and p.grad is not None:
                    alike.setdefault(p.grad.flatten(1).shape, []).append(p)
            for matrices in alike.values():
                self.step_matrices(matrices, group)
        super().step()

    def step_matrices(self, matrices, group):
        """One step of matrices of the same size (out,in), or (out,in k k)."""
        lr, decay = group["lr"], group["weight_decay"]
        moves = equalised(torch.stack([self.ahead(p) for p in matrices]))
        scale = 0.2 * max(moves.shape[1:]) ** 0.5
        for p, move in zip(matrices, moves):
            p.mul_(1 - lr * decay)
            p.add_(move.view_as(p), alpha=-lr * scale)
            p.grad = None                                               # AdamW passes it over

    def ahead(self, p):
        """The averaged gradient of a matrix, looked at from one step further (Nesterov). out: (out,in)."""
        state, g = self.state[p], p.grad.flatten(1)
        if not state:
            # AdamW looks for a step in every state it loads
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(g)}
        state["momentum"].lerp_(g, 1 - MOMENTUM)
        return g.lerp(state["momentum"], MOMENTUM)
