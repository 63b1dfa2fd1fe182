"""Lab 1, from a slide to tokens: write five functions, then python -m labs.check 1. Theory: labs/lab1.md"""
import numpy as np  # noqa: F401
import torch  # noqa: F401

def halve(x):
    """Halve the resolution: each pixel is the mean of 2 x 2, rounded, halves up.
    in:  x (h,w,3) uint8, numpy; an odd last row or column is left out. out: (h//2,w//2,3) uint8."""
    raise NotImplementedError("add up x[0::2, 0::2], x[0::2, 1::2], ... as uint16, then (sum + 2) // 4, as uint8 again")

def grid_under(e, s, i, j):
    """The embeddings under patch (i,j) of scale s, which covers 2^s x 2^s base tiles.
    in:  e (Gh,Gw,E), a float32 tensor, one embedding a base tile; s, i, j ints. out: (2^s,2^s,E); from s = 4 on
    means of blocks, (8,8,E)."""
    raise NotImplementedError("rows i 2^s to (i + 1) 2^s, columns alike; then, if 2^s > 8, the mean of k x k blocks")

def standardize(e):
    """Pool a grid to at most 8 x 8, then give each embedding mean 0 and deviation 1 over its channels.
    in:  e (E,G,G) float32, G up to 8, or a multiple of 8. out: (E,min(G,8),min(G,8))."""
    raise NotImplementedError("pool first; then mean and std (torch's own, with n - 1) over axis 0; "
                              "(e - mean) / (std + 1e-8)")

def pack_grid(e):
    """Place the embeddings of one patch into 64 slots, row by row, centred: the first of n in slot 32 - n // 2.
    in:  e (E,G,G), G = 1, 2, 4 or 8. out: tokens (64,E), zero where empty; mask (64,) bool, True = filled."""
    raise NotImplementedError("e.flatten(1).T is (G*G,E), row by row; its place is torch.zeros(64, E)")

def summarize(net, tokens, mask, s):
    """The Summarizer's forward pass.
    in:  net with the layers embed, scale, blocks (a list), norm, proj, norm_out and the parameters pad (1,1,D) and
         pos (1,65,D); tokens (B,64,E), mask (B,64) bool, s (B,) int64.
    out: c (B,65,D): the scale's token first, then the slots."""
    raise NotImplementedError("torch.where(mask[..., None], net.embed(tokens), net.pad); net.scale(s), (B,D), "
                              "in front: [:, None]; + net.pos; each block in turn; norm, proj, norm_out")
