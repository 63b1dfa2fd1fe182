"""A trained model behind the windows of sample_joint.py: their conditions, their eps, and decoding without a seam.

in:  a ZoomLDM, embeddings of a region   out: `prepare`, Levels to sample; `decode_strips`, pixels from top to bottom
read next: large/command.py
"""
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.functional import pad
from tqdm import tqdm

from common import UserError, generator
from diffusion import null_condition, to_x0, with_guidance
from invert import alike, per_token
from large.ranks import open_canvas
from sample_joint import Level, Resize, full_precision, ramps, starts
from summarizer import standardize, summarized

# ----- 1. Conditions of windows anywhere -----

def slerp(a, b, f):
    """From a to b (E,...) along the sphere, f in [0,1]; linear where they are nearly parallel. source: L §3.2."""
    if f == 0:
        return a
    cos = torch.cosine_similarity(a, b, dim=0)
    angle = cos.clamp(-1, 1).acos()
    from_a = ((1 - f) * angle).sin() / angle.sin()
    from_b = (f * angle).sin() / angle.sin()
    straight = (1 - f) * a + f * b
    return torch.where(cos.abs() > 0.9995, straight, from_a * a + from_b * b)

def nearer(f):
    """The share of the second of two tiles for a window that begins a fraction f behind the first: 0 up to a quarter,
    1 from three quarters on, so that most windows that overlap know one tile alone.
    deviates: L mixes by f itself. Then half of all windows beside a border hear of it, and draw it where it is not:
    outlines in bare glass."""
    return min(max(2 * f - 0.5, 0), 1)

ALIKE = 1 / 3  # tiles are alike if they differ by no more than this share of what any two of the region do

def tiles_at(first, count, n):
    """Numbers of `count` tiles of n, counted from `first`; mirrored beyond the rim, as a wider canvas is."""
    numbers = range(math.floor(first), math.floor(first) + count)
    inside = (max(k, -1 - k) for k in numbers)
    return [max(min(k, 2 * n - 1 - k), 0) for k in inside]

@dataclass
class Grid:
    """Conditions from the embeddings of a region: grid(s, i, j) -> e (E,G,G), standardised, of a window at scale s
    whose upper left corner lies at base tile (i, j), any numbers. Beyond the rim tiles are mirrored.
    in:  e (E,Gh,Gw), as data.py stores them. source: Z §3.2; L §3.2; reference: the published post-processing."""
    e: torch.Tensor

    @cached_property
    def spread(self):
        """How much two tiles of the region differ in the mean: 1 - their correlation."""
        return 1 - float(alike(per_token(self.e[None].float())))

    def mixed(self, s, i, j):
        """The same, but None at scale 0 where a window that begins half-way would mix tiles that are not alike: what
        it is told would be nowhere. At coarser scales half a window is whole tiles."""
        if s > 0:
            return self(s, i, j)
        rows = tiles_at(i, 2 if i % 1 else 1, self.e.shape[1])
        columns = tiles_at(j, 2 if j % 1 else 1, self.e.shape[2])
        tiles = self.e.float()[:, rows][:, :, columns].flatten(1)                       # (E,1), (E,2) or (E,4)
        differ = 1 - float(torch.corrcoef(tiles.mT).min())
        return self(s, i, j) if differ <= ALIKE * self.spread else None

    def __call__(self, s, i, j):
        # A window may begin between tiles. Here i = 1.25, j = 2.5, and x is the condition of its first cell:
        #
        #            column 2    column 3       first along the columns, by the fraction of j:
        #   row 1       a           b              half of a with half of b, half of c with half of d;
        #                     x                 then down the rows, by the fraction of i:
        #   row 2       c           d              a quarter off is near enough: the upper mixture alone
        side, (high, wide) = 2 ** s, self.e.shape[1:]
        rows, columns = tiles_at(i, side + 1, high), tiles_at(j, side + 1, wide)
        tiles = self.e.float()[:, rows][:, :, columns]                                  # (E,side+1,side+1)
        tiles = slerp(tiles[:, :, :-1], tiles[:, :, 1:], nearer(j - math.floor(j)))     # (E,side+1,side)
        tiles = slerp(tiles[:, :-1], tiles[:, 1:], nearer(i - math.floor(i)))           # (E,side,side)
        return standardize(tiles)                                                       # (E,G,G), G at most 8

# ----- 2. A trained model behind windows -----

@torch.no_grad()
def contexts(model, condition, s, canvas):
    """Tokens {corner: c (L,D)} of windows. condition(s, i, j) -> e (E,G,G), such as a Grid. Where it says None, and if
    it is None, tokens are the null ones."""
    device = model.unet.conv_out.weight.device
    nothing, (high, wide) = null_condition(model.summarizer.pos[0]).to(device), canvas.window
    out = dict.fromkeys(canvas.ij, nothing)
    if condition is None:
        return out
    with full_precision(model.unet.conv_out.weight):
        for n in range(0, len(canvas.ij), canvas.batch):
            ij = canvas.ij[n:n + canvas.batch]
            said = [condition(s, i / high * 2 ** s, j / wide * 2 ** s) for i, j in ij]  # (E,G,G) each
            known = {corner: e for corner, e in zip(ij, said) if e is not None}
            if known:
                c = summarized(model.summarizer, [*known.values()], s)                  # (n,L,D)
                out.update(zip(known, c))
    return out

BUDGET = 256 * 2 ** 20  # bytes of keys and values kept from step to step; windows beyond it compute theirs anew

class WindowEps:
    """eps(z, t, ij) of windows whose tokens are c {corner: (L,D)}, both guidance branches in one batch. Where t lies
    outside `guided` (from, below), and of windows that are told nothing, there is no guidance, and no null branch
    (Kynkäänniemi et al. 2024)."""

    def __init__(self, model, c, guidance, guided=(0, math.inf)):
        self.model, self.c, self.guidance, self.guided = model, c, guidance, guided
        self.told = {corner for corner, tokens in c.items() if tokens.any()}
        self.kept, self.room = {}, BUDGET

    @torch.no_grad()
    def keys(self, ij, more):
        """Keys and values of the null branch of windows `more`, and of all, made once, while there is room for them."""
        name = (len(more), *ij) if self.told else len(ij)   # windows that are told nothing are all the same
        if name in self.kept:
            return self.kept[name]
        tokens = torch.stack([self.c[corner] for corner in ij])                         # (n,L,D)
        tokens = torch.cat([null_condition(tokens[more]), tokens])
        with full_precision(tokens):
            made = self.model.unet.cache_context(tokens)
        self.room -= sum(part.nbytes for pair in made for part in pair)
        if self.room > 0:
            self.kept[name] = made
        return made

    def __call__(self, z, t, ij):
        first, below = self.guided
        more = []                                           # windows of which the null branch is asked, too
        if self.guidance != 1 and first <= int(t[0]) < below:
            more = [k for k, corner in enumerate(ij) if corner in self.told]
        eps = self.model.eps(torch.cat([z[more], z]), torch.cat([t[more], t]), self.keys(ij, more))
        null, cond = eps.split([len(more), len(ij)])
        cond[more] = with_guidance(null, cond[more], self.guidance)
        return cond

MEND_BELOW = 400  # below this t what to draw is settled, but not how it goes on across a border

def depth(canvas):
    """How far latents lie from the nearest border between windows, or from the middle of what these share, (h,w)."""
    def along(n, side):
        at = starts(n, side, canvas.overlap)
        borders = [(a + side + b) / 2 for a, b in zip(at, at[1:])]
        return (torch.arange(n)[:, None] + 0.5 - torch.tensor([*borders, math.inf])).abs().amin(1)
    high, wide = canvas.window
    return torch.minimum(along(canvas.h, high)[:, None], along(canvas.w, wide))

@dataclass
class MendedLevel(Level):
    """A Level whose windows share nothing. At the clean end, but at t = 1, others lie between them, half a window
    further, and count beside the borders of the first. No embedding says what is between two tiles: those windows are
    told the mixture of tiles that are alike, and nothing of others. Where a border of the first crosses the middle of
    a tile, both have one.
    Attributes: between, a Level of these, on a canvas that is mirrored half a window beyond its rim, along sides of
    more than one window."""
    between: Level | None = None

    @classmethod
    def of(cls, level, model, condition, s):
        """The same, mended. condition: a Grid or None, of scale s."""
        canvas, told = level.canvas, None
        (h, high), (w, wide) = (canvas.h, canvas.window[0]), (canvas.w, canvas.window[1])
        up, left = 2 ** s / 2 * (h > high), 2 ** s / 2 * (w > wide)     # base tiles that the wider one begins before
        wider = open_canvas(h + high * (h > high), w + wide * (w > wide), canvas.window, 0, canvas.fade, canvas.batch)
        if condition is not None:
            told = lambda s, i, j: condition.mixed(s, i - up, j - left)
        eps = WindowEps(model, contexts(model, told, s, wider), 1.0)
        return cls(**vars(level), between=replace(level, eps=eps, canvas=wider, z=None, A=None, proxy=None))

    def z0_hat(self, z, t, ab):
        z0, eps = super().z0_hat(z, t, ab)
        if not 1 < t < MEND_BELOW:
            return z0, eps
        canvas, wider = self.canvas, self.between.canvas
        top, left = (wider.h - canvas.h) // 2, (wider.w - canvas.w) // 2                # of the canvas on the wider one
        inside = ..., slice(top, top + canvas.h), slice(left, left + canvas.w)
        _, eps_between = self.between.z0_hat(pad(z, (left, left, top, top), "reflect"), t, ab)
        # tiles are told different things, so where they meet shows more: the others get more room
        by_tiles = depth(canvas) > 1.5 * depth(wider)[inside]                           # (h,w)
        eps = torch.where(by_tiles.to(z.device), eps, eps_between[inside])
        return to_x0(eps, z, ab, "eps"), eps

def sides(size, scales, patch, factor, known):
    """Height and width in latents at every scale. raises: UserError if a scale does not fit the size or the model."""
    if len(size) == 1:
        size = (*size, *size)
    whole = all(isinstance(n, int) for n in (*size, *scales))
    if len(size) != 2 or not whole:
        raise UserError(f"--size={size}, scales {scales}: give a side, or height,width, in pixels, and whole scales")
    finest, coarsest = scales[-1], scales[0]                # the command sorts all but the finest
    if scales != sorted({*scales}, reverse=True) or finest < 0 or coarsest >= known:
        raise UserError(f"scales {scales}: give some of 0 to {known - 1}, --context coarser than --scale, each once")
    block = factor * 2 ** (coarsest - finest)
    if any(n % block for n in size):
        raise UserError(f"--size={size}: with --context={coarsest} both sides must be multiples of {block}")
    if min(size) < patch * block // factor:
        raise UserError(f"--size={size} is less than a patch at scale {coarsest}: a larger --size or less --context")
    out = []
    for s in scales:
        latent = factor * 2 ** (s - finest)                 # pixels of the image per latent of that scale
        out.append((size[0] // latent, size[1] // latent))
    return out

def usual_context(size, fine, patch, factor, known):
    """The coarsest scale of which a patch fits into the image, (s,). raises: UserError if none does."""
    for s in range(known - 1, fine, -1):
        zoom = 2 ** (s - fine)
        if min(size) >= patch * zoom and all(n % (factor * zoom) == 0 for n in size):
            return (s,)
    raise UserError(f"--size={size}: no scale coarser than {fine} fits: give sides of at least {2 * patch}, multiples "
                    f"of {2 * factor}, and --scale below {known - 1}; single patches need no --size")

def prepare(model, condition, size, scales, overlap, *, guidance=2.0, seed=0, batch=64, fade=True,
            guided=(0, math.inf), patch=0, kind="bicubic", proxy=None):
    """Levels for `sample_levels`, coarse to fine, with noise that depends on seed and scale alone.
    in:  condition, see `contexts`; size, of the finest scale, in pixels; overlap, latents that windows share. None:
    none, but borders are mended; patch, of a window, 0 = as trained; kind, of A.
    """
    patch, factor = patch or model.info.get("patch", 256), model.vae.factor
    window = patch // factor
    device, levels = model.unet.conv_out.weight.device, []
    shapes, above = sides(size, scales, patch, factor, model.summarizer.cfg.scales), None
    for (h, w), s in zip(shapes, scales):
        canvas = open_canvas(h, w, window, overlap or 0, fade, batch)
        z = torch.randn(1, model.unet.cfg.channels, h, w, generator=generator(seed, s))
        A = None if above is None else Resize(2 ** (above - s), kind)
        c = contexts(model, condition, s, canvas)
        level = Level(WindowEps(model, c, guidance, guided), model.decode, model.encode, canvas, z.to(device), A,
                      proxy=proxy)
        mend = overlap is None and (h, w) != (window, window)
        levels.append(MendedLevel.of(level, model, condition, s) if mend else level)
        above = s
    return levels

# ----- 3. Latents -> pixels, from top to bottom -----

def decode_strips(decode, z, side, overlap, batch=8):
    """Decode a canvas z (1,C,H,W) in tiles that know their neighbours and fade into them: strips (1,3,h,k W) in [-1,1].
    A tile is decoded once, with half an `overlap` of real neighbours around it. The decoder's GroupNorm and attention
    look at the whole tile, so even then neighbours differ a little in tone; fading hides it and costs nothing.
    deviates: the published code decodes every pixel 16 times (windows at a quarter of their side) and averages with a
    Gaussian."""
    h, w = z.shape[-2:]
    high, wide = min(side, h), min(side, w)
    over, beside = min(overlap, high - 1), min(overlap, wide - 1)
    rows, columns = starts(h, high, over), starts(w, wide, beside)
    carry = None                                            # the lower rows of a strip, which the next fades into
    for i, after in tqdm(zip(rows, [*rows[1:], h]), "decode", len(rows), delay=3, leave=False):
        tiles = torch.cat([z[..., i:i + high, j:j + wide] for j in columns])
        x = torch.cat([decode(part).float() for part in tiles.split(batch)])            # (n,3,k high,k wide)
        k = x.shape[-1] // wide
        down = ramps(h * k, high * k, over * k)[i * k]
        across = ramps(w * k, wide * k, beside * k)
        strip = x.new_zeros(1, 3, high * k, w * k)
        for tile, j in zip(x, columns):
            weight = down[:, None] * across[j * k]
            strip[0, :, :, j * k:(j + wide) * k] += tile * weight.to(x)
        if carry is not None:
            strip[..., :carry.shape[-2], :] += carry
        ready = (after - i) * k
        carry = strip[..., ready:, :]
        yield strip[..., :ready, :].clamp(-1, 1)
