"""Lab 3, large images: write six functions, then python -m labs.check 3. Theory: labs/lab3.md"""
import torch  # noqa: F401

def down(x, f):
    """A x: the mean of every block of f x f pixels. in: x (B,C,H,W), f int, a divisor of H and W.
    out: (B,C,H/f,W/f)."""
    raise NotImplementedError("x.unflatten(-1, (-1, f)).unflatten(-3, (-1, f)) is (B,C,H/f,f,W/f,f): which axes go?")

def up(y, f):
    """f^2 A^T y: every pixel becomes f x f equal ones. in: y (B,C,h,w). out: (B,C,h f,w f)."""
    raise NotImplementedError("y.repeat_interleave(f, -1), then the rows alike")

def starts(n, window, overlap=0):
    """Where windows begin along a side of n: every window - overlap, and the last one ends at n.
    in:  ints, overlap < window <= n. out: a list of ints, ascending, none twice."""
    raise NotImplementedError("range(0, n - window, window - overlap), then n - window")

def average(parts, ij, h, w):
    """Lay windows on a canvas; where they overlap, their mean.
    in:  parts (n,C,k,k); ij, n corners (row, column). out: (1,C,h,w), all of it covered."""
    raise NotImplementedError("add the parts up on one canvas and ones on another, then divide")

def step_s2(z, z0_hat, Dec, Enc, A, y, unit, lam, delta, zeta):
    """One correction of Algorithm S2: move z until its decoded estimate, seen through A, is y.
    in:  z (1,C,h,w); z0_hat(z), Dec(z0) and Enc(x), functions; A.down(x) and A.up(y), as above; y, the target;
         unit(d), d scaled to a largest absolute value of 1; lam, delta, zeta, floats. out: z, corrected."""
    raise NotImplementedError("e_img = A.up(y - A.down(x)); e = unit((Enc(x + zeta unit(e_img)) - Enc(x)) / zeta); "
                              "g = unit((z0_hat(z + delta e) - z0) / delta); z + lam g")

def step_x0(z0, Dec, Enc, A, y, lam):
    """One correction of the estimate guide: z0 itself moves by what the encoder makes of the error. z stays.
    in:  as in step_s2; lam, the share of the error that is taken away. out: z0 (1,C,h,w), corrected."""
    raise NotImplementedError("x = Dec(z0); z0 + lam (Enc(x + A.up(y - A.down(x))) - Enc(x))")
