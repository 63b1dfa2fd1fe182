"""Lab 4, using it: write five functions, then python -m labs.check 4. Theory: labs/lab4.md"""
import torch  # noqa: F401

from invert import eps_error, per_token  # noqa: F401  given: see labs/lab4.md

def alike(u):
    """The mean cosine over all pairs of embeddings of each grid, each with itself too.
    in:  u (B,E,h,w). out: (B,)."""
    raise NotImplementedError("divide each embedding by its length over axis 1; the mean over pairs is the squared "
                              "length of the mean")

def invert(model, x, s, u, noise):
    """Find the embeddings that explain an image: Adam (rate 0.1) on u, a step a noise, all else frozen.
    At time t: loss = sqrt(ab) (1 - ab) eps_error(model, per_token(u), s, z, t, eps) - 0.05 alike(u), summed over the
    batch; z = model.encode(x); ab = model.schedule.alpha_bar[t].
    in:  x (B,3,H,W); s int; u (B,E,k,k), to begin with; noise, a list of (1,C,h,w), one eps a step; the times go
         linearly from 950 to 50, rounded down. out: per_token(u) (B,E,k,k), detached."""
    raise NotImplementedError("u.clone().requires_grad_(), torch.optim.Adam([u], 0.1); torch.linspace(950, 50, "
                              "len(noise)).long().tolist(); zero_grad, backward, step")

def project(x, y, f):
    """The image nearest to x whose means of f x f blocks are y, then clipped to [-1,1].
    in:  x (B,3,H,W), y (B,3,H/f,W/f). out: like x."""
    raise NotImplementedError("A A^T is 1 / f^2 here: x + f^2 A^T (y - A x), down and up as in lab 3")

def attend(net, bag):
    """Gated attention: embedded patches and their weights. a = softmax over patches of w^T (tanh(V h) * sigmoid(U h)).
    in:  net with the layers embed, value (V), gate (U) and score (w); bag (N,K). out: h (N,D), a (N,)."""
    raise NotImplementedError("h = net.embed(bag); net.score(...) is (N,1): take its column, softmax over the patches")

def abmil(net, bag):
    """A slide's logits: the mean of its embedded patches, weighed by attention, through net.out.
    in:  net as above, with the layer out; bag (N,K). out: logits (C,), a (N,)."""
    raise NotImplementedError("h, a = attend(net, bag); net.out(a @ h)")
