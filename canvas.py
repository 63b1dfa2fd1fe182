"""What a large image is made of: a canvas of latents seen through overlapping windows, and the operators on it.

`Resize` is the operator A of the constraint A Dec(z) = y (Z Eq. 1). `Canvas` cuts a canvas into windows, averages
their answers (MultiDiffusion, L §3.2), and under torchrun keeps only the rows that this rank's windows touch.
`decode_strips` turns latents into pixels from top to bottom, `Grid` answers what condition any window has. Nothing
here needs a network, and nothing but the latents, a sixteenth of the image, is held for the whole canvas.

in:  latents (1,C,H,W), embeddings (E,Gh,Gw)   out: windows, averages, strips of pixels, conditions
run: python canvas.py     read next: sample_joint.py
"""
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from common import UserError, cli
from summarizer import standardize

# ----- 1. The down-sampling operator A (Z Eq. 1) -----

def shrink_matrix(n, k):
    """A in one dimension, (n/k,n) float64: Keys' cubic (a = -0.5) stretched k times, mirrored at the borders with the
    edge repeated, each row summing to 1. reference: the Resizer of the published helpers."""
    centre = (torch.arange(n // k, dtype=torch.float64) + 0.5) * k - 0.5                # (n/k,)
    taps = (centre[:, None] - 2 * k).floor() + torch.arange(1, 4 * k + 1)               # (n/k,4k)
    d = (taps - centre[:, None]).abs() / k
    w = torch.where(d <= 1, 1.5 * d ** 3 - 2.5 * d ** 2 + 1, (-0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2) * (d < 2))
    at = taps.long() % (2 * n)
    at = torch.where(at >= n, 2 * n - 1 - at, at)                                       # ... 1 0 | 0 1 ... n-1 | n-1
    return torch.zeros(n // k, n, dtype=torch.float64).scatter_add_(1, at, w / w.sum(1, keepdim=True))


class Resize:
    """Antialiased bicubic down-sampling A by an integer factor, and `up` = factor^2 A^T, which is exactly the bicubic
    up-sampling of the published code. kind "box" averages blocks instead, as the pyramids on disk are made; then
    A A^T = 1 / factor^2. in: x (...,H,W), H and W multiples of factor. raises: ValueError for other sides.
    """

    def __init__(self, factor, kind="bicubic"):
        if not isinstance(factor, int) or factor < 1 or kind not in ("bicubic", "box"):
            raise UserError(f"factor={factor!r}, kind={kind!r}: give a whole factor of at least 1, and bicubic or box")
        self.factor, self.kind, self.cache = factor, kind, {}

    @classmethod
    @lru_cache
    def cached(cls, factor, kind="bicubic"):
        """The same operator every time, so that its matrices are made once."""
        return cls(factor, kind)

    def matrix(self, n, like):
        """A in one dimension for sides of n pixels, (n/factor,n), in the dtype and on the device of `like`."""
        if not like.is_floating_point():
            raise UserError(f"got an image of {like.dtype}: weights are fractions, give x.float()")
        key = n, like.dtype, like.device
        if key not in self.cache:
            box = torch.eye(n // self.factor, dtype=torch.float64).repeat_interleave(self.factor, 1) / self.factor
            self.cache[key] = (box if self.kind == "box" else shrink_matrix(n, self.factor)).to(like)
        return self.cache[key]

    def part(self, n, a, b, like):
        """The columns a:b of A, and only its rows that they touch: (first row, matrix (rows,b-a))."""
        key = n, a, b, like.dtype, like.device
        if key not in self.cache:
            # far from the borders A repeats itself every factor pixels: cut it out of one of a small image
            lo, hi = max(0, a // self.factor - 2), min(n, b) // self.factor + 3
            first, last = max(0, lo - 4) * self.factor, min(n, (hi + 4) * self.factor)
            small = self.matrix(last - first, torch.zeros((), dtype=torch.float64))
            del self.cache[last - first, torch.float64, torch.device("cpu")]
            hi = min(hi, n // self.factor)
            self.cache[key] = lo, small[lo - first // self.factor:hi - first // self.factor,
                                        a - first:b - first].to(like)
        return self.cache[key]

    def down(self, x):
        """A x: (...,H,W) -> (...,H/factor,W/factor)."""
        h, w = x.shape[-2:]
        if h % self.factor or w % self.factor:
            raise UserError(f"got an image of {h} x {w} pixels, which {self.factor} does not divide: crop or pad it")
        return self.matrix(h, x) @ x @ self.matrix(w, x).T

    def up(self, y):
        """factor^2 A^T y: (...,h,w) -> (...,h factor,w factor)."""
        h, w = (n * self.factor for n in y.shape[-2:])
        return self.factor ** 2 * (self.matrix(h, y).T @ y @ self.matrix(w, y))

    def project(self, x, y, rounds=20):
        """The image nearest to x (...,H,W) that A makes y of: x + A^T (A A^T)^-1 (y - A x), in [-1,1], like x.

        Clipping takes a little of it back, so it goes to and fro; a y that A cannot make of [-1,1], such as hard edges
        from black to white, is met as nearly as that can.
        """
        out, y = x.to(exact(x)), y.to(x.device, exact(x))
        left, right = (torch.linalg.solve(m @ m.T, m) for m in (self.matrix(n, out) for n in x.shape[-2:]))
        for _ in range(rounds):
            out = (out + left.T @ (y - self.down(out)) @ right).clamp(-1, 1)
        return out.to(x)

    def add_down(self, total, x, i, j):
        """Add A of an image that is x (1,C,a,b) at pixel (i,j) and zero elsewhere to total (1,C,h,w)."""
        (p, rows), (q, columns) = (self.part(n * self.factor, at, at + side, x) for n, at, side in
                                   zip(total.shape[-2:], (i, j), x.shape[-2:]))
        total[..., p:p + len(rows), q:q + len(columns)] += rows @ x @ columns.T

    def up_part(self, y, i, j, side):
        """The pixels i:i+side[0], j:j+side[1] of up(y), from those of y they depend on."""
        (p, rows), (q, columns) = (self.part(n * self.factor, at, at + size, y) for n, at, size in
                                   zip(y.shape[-2:], (i, j), side))
        return self.factor ** 2 * (rows.T @ y[..., p:p + len(rows), q:q + len(columns)] @ columns)


# ----- 2. Windows on a canvas, over ranks -----

def starts(n, window, overlap=0):
    """Where windows begin along a side of n; neighbours share `overlap`, the last two perhaps more."""
    return [*range(0, n - window, window - overlap), n - window]


def usual_overlap(window):
    """What windows share by default: nearly a quarter of a side, and odd. A U-Net that halves its windows leaves a
    faint lattice of every 2, 4, ... latents; windows an even number apart would lay all theirs on one another."""
    return max(window // 4 - 1, 0) | 1


def ramps(n, side, overlap, fade=True):
    """Weights of windows along a line, {start: (side,)}, that sum to 1 everywhere: neighbours fade into each other over
    `overlap`, or, without fade, count the same."""
    rise = (torch.arange(overlap) + 0.5) / max(overlap, 1)
    weights, total = {}, torch.zeros(n)
    for a in starts(n, side, overlap):
        w = weights[a] = torch.ones(side)
        if fade and a > 0:
            w[:overlap] = rise
        if fade and a + side < n:
            w[side - overlap:] = w[side - overlap:].minimum(rise.flip(0))
        total[a:a + side] += w
    return {a: w / total[a:a + side] for a, w in weights.items()}


def exact(like):
    """float64, in which sums hardly depend on their order: joint sampling would blow the difference between one rank
    and several up to something one can see. (MPS has no float64.)"""
    return like.dtype if like.device.type == "mps" else torch.float64


class Canvas:
    """Windows over a canvas of h x w latents, and this rank's share of them under torchrun.

    in:  window, a side or (height, width); overlap between neighbours, in latents; fade: let them fade into each other
    instead of averaging them uniformly (as L does), which leaves a step at the border of every window; batch, windows
    per network call.
    Attributes: ij, corners of this rank's windows; lo, hi: the rows they lie on, all that this rank keeps. Rows where
    windows of several ranks overlap are exchanged by `average`. A canvas of fewer rows of windows than ranks is not
    split: every rank does the whole of it. raises: ValueError if the windows do not cover the canvas.
    """

    def __init__(self, h, w, window, overlap=0, fade=False, batch=64):
        self.h, self.w, self.batch, self.overlap, self.fade = h, w, batch, overlap, fade
        self.window = wh, ww = window if isinstance(window, tuple) else (window, window)
        if h < wh or w < ww or not 0 <= overlap < min(wh, ww):
            raise UserError(f"windows of {wh} x {ww} latents that share {overlap} do not cover a canvas of {h} x {w}: "
                            f"take a larger canvas, or a smaller overlap")
        self.lines = ramps(h, wh, overlap, fade), ramps(w, ww, overlap, fade)
        rows = list(self.lines[0])
        self.rank, self.world = ((dist.get_rank(), dist.get_world_size())
                                 if dist.is_available() and dist.is_initialized() else (0, 1))
        if len(rows) < self.world:
            self.rank, self.world = 0, 1
        mine = [rows[len(rows) * r // self.world:len(rows) * (r + 1) // self.world] for r in range(self.world)]
        self.ranges = [(at[0], at[-1] + wh) for at in mine]
        self.lo, self.hi = self.ranges[self.rank]
        self.ij = [(i, j) for i in mine[self.rank] for j in self.lines[1]]

    def own(self, z):
        """This rank's rows of a whole canvas (1,C,h,w)."""
        return z[..., self.lo:self.hi, :]

    def cut(self, z, ij):
        """Windows (n,C,window) of this rank's rows."""
        (wh, ww), lo = self.window, self.lo
        return torch.cat([z[..., i - lo:i - lo + wh, j:j + ww] for i, j in ij])

    def batches(self):
        """The corners of this rank's windows, a batch at a time."""
        return (self.ij[k:k + self.batch] for k in range(0, len(self.ij), self.batch))

    def weights(self, ij, like):
        """What windows count where they overlap, (n,1,window): over all windows they sum to 1 at every place."""
        rows, columns = self.lines
        return torch.stack([rows[i][:, None] * columns[j] for i, j in ij])[:, None].to(like)

    def total(self, fn):
        """Add up fn(corners) -> (n,C,window) where it lies, over all windows of all ranks: (1,C,rows,w)."""
        total, (wh, ww) = None, self.window
        for ij in self.batches():
            parts = fn(ij)
            if total is None:
                total = parts.new_zeros(1, parts.shape[1], self.hi - self.lo, self.w, dtype=exact(parts))
            for part, (i, j) in zip(parts, ij):
                total[0, :, i - self.lo:i - self.lo + wh, j:j + ww] += part
        return self.exchange(total).to(parts.dtype)

    def average(self, fn):
        """The weighted mean of fn(corners) over all windows. Where only one lies, its values come back exactly."""
        def weighted(ij):
            parts = fn(ij)
            return parts * self.weights(ij, parts)
        return self.total(weighted)

    def exchange(self, total):
        """Add what the windows of other ranks say of the rows this one shares with them."""
        shared = [(q, slice(max(self.lo, a) - self.lo, min(self.hi, b) - self.lo))
                  for q, (a, b) in enumerate(self.ranges) if q != self.rank and max(self.lo, a) < min(self.hi, b)]
        if shared:
            mine = [total[..., rows, :].contiguous() for _, rows in shared]
            theirs = [torch.empty_like(x) for x in mine]
            ops = [dist.P2POp(send, x, q) for send, xs in ((dist.isend, mine), (dist.irecv, theirs))
                   for x, (q, _) in zip(xs, shared)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            for x, (_, rows) in zip(theirs, shared):
                total[..., rows, :] += x
        return total

    def reduce(self, x, op="sum"):
        """Sum or maximum of a small tensor over the ranks this canvas is split over."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return x

    def whole(self, z):
        """The whole canvas (1,C,h,w) on every rank, from everyone's rows."""
        if self.world == 1:
            return z
        full = z.new_zeros(*z.shape[:2], self.h, self.w)
        end = self.ranges[self.rank + 1][0] if self.rank + 1 < self.world else self.h
        full[..., self.lo:end, :] = z[..., :end - self.lo, :]
        return self.reduce(full)


# ----- 3. Latents -> pixels, from top to bottom -----

def decode_strips(decode, z, side, overlap, batch=8):
    """Decode a canvas in tiles that know their neighbours, fading from one to the next; yields strips of pixels.

    A tile is decoded once, with half an `overlap` of real neighbours around it. The decoder's GroupNorm and attention
    look at the whole tile, so even then neighbours differ a little in tone; fading hides it and costs nothing.
    in:  z (1,C,H,W). out: strips (1,3,h,W k) in [-1,1], top to bottom. deviates: the published code decodes every pixel
    16 times (windows at a quarter of their side) and averages with a Gaussian.
    """
    h, w = z.shape[-2:]
    sides = min(side, h), min(side, w)
    rows, columns = (starts(n, s, min(overlap, s - 1)) for n, s in zip((h, w), sides))
    carry = None
    for i, after in zip(rows, [*rows[1:], h]):
        tiles = torch.cat([z[..., i:i + sides[0], j:j + sides[1]] for j in columns])
        x = torch.cat([decode(part).float() for part in tiles.split(batch)])            # (n,3,k side,k side)
        k = x.shape[-1] // sides[1]                                                     # pixels per latent
        down, across = (ramps(n * k, s * k, min(overlap, s - 1) * k) for n, s in zip((h, w), sides))
        strip = x.new_zeros(1, 3, sides[0] * k, w * k)
        for part, j in zip(x, columns):
            weight = down[i * k][:, None] * across[j * k]
            strip[0, :, :, j * k:(j + sides[1]) * k] += part * weight.to(x)
        if carry is not None:
            strip[..., :carry.shape[-2], :] += carry
        carry = strip[..., (after - i) * k:, :]
        yield strip[..., :(after - i) * k, :].clamp(-1, 1)


# ----- 4. Conditions of windows anywhere -----

def slerp(a, b, f):
    """From a to b (E,...) along the sphere, f in [0,1]; linear where they are nearly parallel. source: L §3.2."""
    if f == 0:
        return a
    cos = torch.cosine_similarity(a, b, dim=0)
    angle = cos.clamp(-1, 1).acos()
    spherical = ((1 - f) * angle).sin() / angle.sin() * a + (f * angle).sin() / angle.sin() * b
    return torch.where(cos.abs() > 0.9995, (1 - f) * a + f * b, spherical)


@dataclass
class Grid:
    """Conditions from the embeddings of a region: grid(s, i, j) -> e (E,G,G), standardised, of a window at scale s
    whose upper left corner lies at base tile (i, j). Between tiles they are interpolated, beyond the last repeated.
    in:  e (E,Gh,Gw), as data.py stores them. source: Z §3.2; L §3.2; reference: the published post-processing.
    """
    e: torch.Tensor

    def __call__(self, s, i, j):
        g, (gh, gw) = 2 ** s, self.e.shape[1:]
        rows, columns = ([min(int(at) + k, n - 1) for k in range(g + 1)] for at, n in ((i, gh), (j, gw)))
        block = self.e.float()[:, rows][:, :, columns]                                  # (E,g+1,g+1)
        block = slerp(block[:, :, :-1], block[:, :, 1:], j - int(j))                    # (E,g+1,g)
        return standardize(slerp(block[:, :-1], block[:, 1:], i - int(i)))

    def inside(self, corner, size=(1, 1)):
        shape = tuple(self.e.shape[1:])
        if min(corner) < 0 or min(size) < 1 or any(a + n > m for a, n, m in zip(corner, size, shape)):
            raise UserError(f"cells {size} at {corner} do not lie inside the {shape[0]} x {shape[1]} tiles of the "
                            f"image: count rows and columns from 0")

    def swap(self, a, b):
        """Exchange cells a and b, each (row, column). Moving cells moves what is drawn there (L §3.2). raises:
        ValueError for cells outside."""
        self.inside(a)
        self.inside(b)
        self.e = self.e.clone()
        self.e[:, [a[0], b[0]], [a[1], b[1]]] = self.e[:, [b[0], a[0]], [b[1], a[1]]]

    def paste(self, a, b, size):
        """Copy the block of `size` (rows, columns) cells at a over the one at b. raises: as swap."""
        self.inside(a, size)
        self.inside(b, size)
        block, self.e = self.e[:, a[0]:a[0] + size[0], a[1]:a[1] + size[1]].clone(), self.e.clone()
        self.e[:, b[0]:b[0] + size[0], b[1]:b[1] + size[1]] = block


def main(argv):
    canvas = Canvas(40, 40, 16, 4)
    print(f"a canvas of 40 x 40 latents in windows of 16 that share 4: corners {canvas.ij}")
    z = torch.randn(1, 3, 40, 40)
    assert torch.allclose(canvas.average(lambda ij: canvas.cut(z, ij)), z)
    x = torch.randn(1, 3, 64, 64)
    for kind in ("bicubic", "box"):
        A = Resize(4, kind)
        y = A.down(x)
        print(f"A ({kind}): (64,64) -> {tuple(y.shape[2:])}; <A x, y> = {(y * y).sum():.4f}, <x, At y> = "
              f"{(x * A.up(y)).sum() / 16:.4f}")


if __name__ == "__main__":
    cli(main)
