"""The four labs as data: for each function its cases, and mistakes that are known by what comes out.

A mistake is f, the core's function, asked for something else, or a formula of its own; several, if one sentence says
what is wrong with all of them. Arguments are made anew for every call, so that nothing written into them stays.
Cases differ in all that a function might take for granted: sides, channels, the size of a batch, the table."""
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import Identity
from torch.nn.functional import adaptive_avg_pool2d, interpolate, max_pool2d, normalize, pad

from common import generator
from diffusion import Schedule
from invert import eps_error, per_token
from labs import core
from mil import ABMIL
from sample_joint import Resize
from summarizer import Summarizer, SummarizerConfig

@dataclass
class Task:
    cases: dict[str, Callable]                              # what it is like: a function that makes the arguments
    mistakes: dict[str, Callable | tuple]                   # what is wrong: f and the arguments -> what comes out
    tol: float = 1e-4

    def known(self):
        """Pairs (sentence, mistake)."""
        for sentence, some in self.mistakes.items():
            yield from ((sentence, mistake) for mistake in (some if isinstance(some, tuple) else [some]))

def r(*shape, dtype=torch.float32):
    """Standard normal numbers, the same for the same shape."""
    return torch.randn(shape, generator=generator("labs", *shape), dtype=torch.float64).to(dtype)

@torch.no_grad()
def filled(net):
    """A network that is the same every time, and all of whose layers act."""
    for n, p in enumerate(net.parameters()):
        p.copy_(0.4 * torch.randn(p.shape, generator=generator("labs", n)))
    return net.eval()

def but(**changes):
    """The mistake of hearing some arguments changed: name=function of the argument."""
    def mistake(f, *args):
        names = inspect.signature(f).parameters
        return f(*(changes[name](value) if name in changes else value for name, value in zip(names, args)))
    return mistake

def minus(x):
    return -x

def same(x):
    return x

# ----- Lab 1 -----

def pixels(h, w):
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)

def quads(x):
    """The four pixels of every block of 2 x 2."""
    x = x[:len(x) // 2 * 2, :x.shape[1] // 2 * 2]
    return np.stack([x[i::2, j::2] for i in (0, 1) for j in (0, 1)])

def pairwise(x):
    """Rounded twice."""
    a, b, c, d = quads(x).astype(np.uint16)
    left, right = (a + c + 1) // 2, (b + d + 1) // 2
    return ((left + right + 1) // 2).astype(np.uint8)

def blocks(*shape, over):
    """`grid_under` with other blocks: how 2^s x 2^s tiles are viewed, k a side of a block, and the axes of means."""
    def mistake(f, e, s, i, j):
        tiles, k = e[i << s:(i + 1) << s, j << s:(j + 1) << s], 2 ** s // 8
        if k < 2:
            return tiles
        return tiles.reshape(*(k if n == 0 else n for n in shape), -1).mean(over)
    return mistake

def picked(f, e, s, i, j):
    k = max(2 ** s // 8, 1)
    return e[i << s:(i + 1) << s:k, j << s:(j + 1) << s:k]

def pooled(e):
    return adaptive_avg_pool2d(e, min(8, e.shape[-1]))

def over(e, *axes, correction=1, small=1e-8):
    return (e - e.mean(axes, True)) / (e.std(axes, correction=correction, keepdim=True) + small)

def faint():
    """Embeddings (5,2,2): one of zeros, one of small numbers, two others."""
    return r(5, 2, 2) * torch.tensor([[0, 1e-3], [1, 1]])

def with_zero():
    e = r(4, 4, 4)
    e[:, 2, 1] = 0
    return (e,)

def rolled(by):
    """All of `pack_grid` further on, by so many slots where n are filled."""
    return lambda f, e: tuple(v.roll(by(e[0].numel()), 0) for v in f(e))

def in_picture(first):
    """`pack_grid` of a grid of side g that begins at row and column first(g) of a picture of 8 x 8."""
    def mistake(f, e):
        a, g = first(e.shape[1]), e.shape[1]
        around = (a, 8 - g - a, a, 8 - g - a)
        return pad(e, around).flatten(1).T, pad(torch.ones(g, g), around).flatten() > 0
    return mistake

def small_summarizer():
    return filled(Summarizer(SummarizerConfig(5, 16, 2, 16, 4)))

def slots(*sides):
    """Arguments of `summarize`: a network, and a grid of each side."""
    tokens, mask = zip(*(core.pack_grid(r(5, k, k)) for k in sides))
    return small_summarizer(), torch.stack(tokens), torch.stack(mask), torch.arange(len(sides)) + 1

def altered(**parts):
    """A network with other parts: name=function of the network."""
    def change(net):
        new = copy.deepcopy(net)
        for name, part in parts.items():
            value = part(net)
            setattr(new, name, torch.nn.Parameter(value) if isinstance(value, torch.Tensor) else value)
        return new
    return but(net=change)

def scale_last(f, *args):
    return altered(pos=lambda net: net.pos.roll(1, 1))(f, *args).roll(-1, 1)

LAB1 = {
    "halve": Task({
        "6 x 8 pixels": lambda: (pixels(6, 8),),
        "white pixels, whose sums need more than 8 bits": lambda: (pixels(4, 4) | 240,),
        "5 x 7 pixels, an odd row and column": lambda: (pixels(5, 7),),
    }, {
        "the sum of four pixels does not fit into 8 bits: make x uint16 first":
            lambda f, x: (quads(x).sum(0, np.uint8) + np.uint8(2)) // np.uint8(4),
        "the mean is rounded down: add 2 before // 4":
            lambda f, x: (quads(x).sum(0) // 4).astype(np.uint8),
        "halves are rounded to even: (sum + 2) // 4":
            lambda f, x: quads(x).mean(0).round().astype(np.uint8),
        "it is rounded twice: add up all four, then round": lambda f, x: pairwise(x),
        "an odd first row or column is left out: leave out the last":
            lambda f, x: f(x[len(x) % 2:, x.shape[1] % 2:]),
        "every second pixel is taken, not the mean of four": lambda f, x: quads(x)[0]}),
    "grid_under": Task({
        "patch (2,5) of scale 1": lambda: (r(32, 40, 3), 1, 2, 5),
        "patch (1,2) of scale 3, whose 8 x 8 tiles stay as they are": lambda: (r(32, 40, 3), 3, 1, 2),
        "patch (1,0) of scale 4, whose 16 x 16 tiles are pooled": lambda: (r(32, 48, 2), 4, 1, 0),
        "patch (0,0) of scale 5, whose 32 x 32 tiles are pooled": lambda: (r(32, 32, 4), 5, 0, 0),
    }, {
        "row and column are swapped: i counts rows": lambda f, e, s, i, j: f(e, s, j, i),
        "a patch begins at tile i 2^s, not at tile i": lambda f, e, s, i, j: f(e[i:, j:], s, 0, 0),
        "a patch begins a tile too late, at i 2^s + 1":
            lambda f, e, s, i, j: f(e.roll((-1, -1), (0, 1)), s, i, j),
        "tiles that are not neighbours are averaged: view as (8, k, 8, k, E), then the mean over axes 1 and 3":
            (blocks(8, 8, 0, 0, over=(2, 3)), blocks(0, 8, 0, 8, over=(0, 2))),
        "single tiles are picked where blocks must be averaged": picked}, 2e-3),
    "standardize": Task({
        "a grid of 4 x 4": lambda: (2 * r(16, 4, 4) + 1,),
        "a grid of 32 x 32, pooled to 8 x 8 first": lambda: (r(12, 32, 32) + 1,),
        "a single embedding": lambda: (r(16, 1, 1) - 1,),
        "an embedding of zeros, and one of small numbers": lambda: (faint(),),
    }, {
        "it is standardised over the places: over the channels, axis 0":
            tuple(lambda f, e, axes=axes: over(pooled(e), *axes) for axes in ((1, 2), (1,), (2,))),
        "one mean and one deviation for all: every place has its own":
            lambda f, e: over(pooled(e), 0, 1, 2),
        "it is pooled after it was standardised: pool first": lambda f, e: pooled(over(e, 0)),
        "places that are not neighbours are pooled: view as (E, 8, k, 8, k), then the mean over axes 2 and 4":
            lambda f, e: f(e if e.shape[1] <= 8 else e.reshape(len(e), 8, 8, -1).mean(3)),
        "it divides by 0 where all channels are alike: add 1e-8 to the deviation":
            lambda f, e: over(pooled(e), 0, small=0),
        "the deviation divides by E: by E - 1, as torch's own":
            lambda f, e: over(pooled(e), 0, correction=0),
        "it divides by the variance: a root is forgotten":
            lambda f, e: over(pooled(e), 0) / pooled(e).std(0),
        "it divides by the length: by the deviation": lambda f, e: normalize(pooled(e), dim=0),
        "brackets are missing: (e - mean) / deviation":
            lambda f, e: pooled(e) - pooled(e).mean(0) / pooled(e).std(0),
        "the mean is not taken off": lambda f, e: pooled(e) / pooled(e).std(0),
        "it is not divided by the deviation": lambda f, e: pooled(e) - pooled(e).mean(0)}),
    "pack_grid": Task({
        "a grid of 2 x 2": lambda: (r(3, 2, 2),),
        "a single embedding, which stands in slot 32": lambda: (r(5, 1, 1),),
        "a grid of 8 x 8, which fills all slots": lambda: (r(2, 8, 8),),
        "a grid of 4 x 4, one embedding of which is zero": with_zero,
    }, {
        "the slots are filled from 0 on: n embeddings begin in slot 32 - n // 2":
            rolled(lambda n: n // 2 - 32),
        "the slots are filled column by column: row by row": lambda f, e: f(e.mT),
        "the first stands a slot too early: in 32 - n // 2": rolled(lambda n: -1),
        "they lie in a picture of 8 x 8: all n stand in a row of 64 slots, from slot 32 - n // 2 on":
            (in_picture(lambda g: (8 - g) // 2), in_picture(lambda g: 0)),
        "channels are taken for places: e.flatten(1).T":
            lambda f, e: f(e.view(-1, len(e)).T.reshape(e.shape)),
        "the mask looks at numbers: an embedding of zeros fills its slot, too":
            lambda f, e: (f(e)[0], f(e)[0].any(1)),
        "the mask is True everywhere: in the filled slots alone": lambda f, e: (f(e)[0], f(e)[1] | True),
        "the mask begins at slot 0: at 32 - n // 2, as the tokens":
            lambda f, e: (f(e)[0], f(e)[1].sort()[0].flip(0)),
        "the mask is turned round: True where a slot is filled": lambda f, e: (f(e)[0], ~f(e)[1])}),
    "summarize": Task({
        "grids of 2 x 2 and 4 x 4": lambda: slots(2, 4),
        "a full grid": lambda: slots(8),
    }, {
        "empty slots hold net.embed(0): net.pad stands there":
            altered(pad=lambda net: net.embed.bias[None, None]),
        "empty slots hold zeros: net.pad stands there": altered(pad=lambda net: 0 * net.pad),
        "net.pad stands in the filled slots: the mask is turned round": but(mask=torch.logical_not),
        "net.pos is not added": altered(pos=lambda net: 0 * net.pos),
        "net.pos is not added to the scale's token: put the token in front, then add":
            altered(pos=lambda net: net.pos * (torch.arange(65) > 0)[:, None]),
        "net.scale hears s - 1: it wants s": but(s=lambda s: s - 1),
        "one scale for the whole batch: s holds one a sample": but(s=lambda s: s[:1].expand(len(s))),
        "some of net.blocks are left out": tuple(altered(blocks=lambda net, part=part: net.blocks[part])
                                                 for part in (slice(1), slice(1, None), slice(0))),
        **{f"net.{name} is missing": altered(**{name: lambda net: Identity()})
           for name in ("norm", "proj", "norm_out")},
        "the scale's token comes last: it is the first": scale_last}),
}

# ----- Lab 2 -----

TABLE = Schedule().alpha_bar

def images(*shape):
    return r(2, *shape).unbind()

def table(T):
    """Of the labs' own T = 1000; of any other T another one."""
    return Schedule("scaled_linear" if T == 1000 else "cosine", T).alpha_bar

def noising(*times, T=1000, shape=(2, 4, 4)):
    """Arguments of `q_sample`."""
    z0, eps = images(len(times), *shape)
    return z0, torch.tensor(times), eps, table(T)

def betas(T, first=0.0015, last=0.0195, power=0.5):
    """Rising linearly between the ends, or the roots of them."""
    return torch.linspace(first ** power, last ** power, T, dtype=torch.float64)

def product(beta):
    return (1 - beta).cumprod(0)

def late(f, T):
    return torch.cat([torch.ones(1, dtype=torch.float64), f(T)[:-1]])

def at(t, table=TABLE):
    return torch.where(t < 0, 1.0, table[t].float()).view(-1, 1, 1, 1)

def shifted(k):
    """alpha_bar[t + k]; before the first entry and after the last stands 1."""
    return lambda f, z0, t, eps, table: f(z0, (t + k + 1) % (len(table) + 1) - 1, eps, table)

def mixed(signal, noise):
    """q_sample with other weights of alpha_bar."""
    def mistake(f, z0, t, eps, table):
        ab = at(t, table)
        return signal(ab) * z0 + noise(ab) * eps
    return mistake

def root(x):
    return x ** 0.5

def solving(**formulas):
    """to_x0 with another formula of out, z_t, sqrt(ab) and sqrt(1 - ab) for some pred."""
    def mistake(f, out, z, ab, pred):
        return formulas[pred](out, z, root(ab), root(1 - ab)) if pred in formulas else f(out, z, ab, pred)
    return mistake

def losing(how=lambda error: error.square().flatten(1).mean(1), v=lambda z0, eps, a, b: a * eps - b * z0):
    """diffusion_loss that makes something else of the error, or aims at another v."""
    def mistake(f, fn, z0, t, eps, table, pred):
        ab = at(t, table)
        target = {"eps": eps, "x0": z0, "v": v(z0, eps, root(ab), root(1 - ab))}[pred]
        return how(fn(core.q_sample(z0, t, eps, table), t) - target)
    return mistake

def net(z, t):
    """A network that hears the time, one an image."""
    assert t.shape == z.shape[:1], f"the network wants t of shape ({len(z)},), one an image, not {tuple(t.shape)}"
    return torch.tanh(z + t.view(-1, 1, 1, 1) / 500)

GAIN = torch.nn.Parameter(torch.ones(()))

def learner(z, t):
    """... that can learn, too."""
    return GAIN * net(z, t)

def point(z, t):
    """What the perfect network says where all images are 0.7."""
    return (z - 0.7 * at(t) ** 0.5) / (1 - at(t)) ** 0.5

def by(*times, fn=net, T=1000, shape=(3, 2, 4, 4)):
    return lambda: (fn, r(*shape), table(T), list(times))

def walk(ends=-1, up=False, leads=None, powers=(0.5,) * 4, signs=(-1, 1), shift=0, step=False, bend=lambda z0: z0):
    """DDIM with what one may get wrong: where it ends, its order, where steps lead, roots, signs, what fn hears ..."""
    def mistake(f, fn, z, table, times):
        for n, t in enumerate(times if up else times[::-1]):
            after = leads(t, table, times) if leads else max([v for v in times if v < t], default=ends)
            ab, ab_next = (1.0 if k < 0 else float(table[k + shift]) for k in (t, after))
            shares = 1 - ab, ab, ab_next, 1 - ab_next
            noise, signal, signal_next, noise_next = (share ** power for share, power in zip(shares, powers))
            eps = fn(z, torch.full((len(z),), n if step else t))
            z0 = bend((z + signs[0] * noise * eps) / signal)
            z = signal_next * z0 + signs[1] * noise_next * eps
        return z
    return mistake

KINDS = ("eps", "v", "x0")
LAB2 = {
    "alpha_bar": Task({"T = 1000": lambda: (1000,), "T = 10": lambda: (10,)}, {
        "beta rises linearly: its root must": lambda f, T: product(betas(T, power=1)),
        "beta is not squared: its root rises linearly": lambda f, T: product(betas(T)),
        "the ends have no root: from sqrt(0.0015) to sqrt(0.0195), then squared":
            lambda f, T: product(betas(T, power=1) ** 2),
        "linspace has T + 1 points: T, the last is sqrt(0.0195)": (
            lambda f, T: product(betas(T + 1)[1:] ** 2),
            lambda f, T: product(betas(T + 1)[:-1] ** 2)),
        "the table is late by one: alpha_bar[0] is 1 - beta[0], not 1": late,
        "these are the roots of alpha_bar": lambda f, T: f(T) ** 0.5,
        "these are beta, or their product: alpha_bar is the product of 1 - beta": (
            lambda f, T: betas(T) ** 2,
            lambda f, T: (betas(T) ** 2).cumprod(0),
            lambda f, T: 1 - (betas(T) ** 2).cumprod(0)),
        "beta are added up: multiply 1 - beta": lambda f, T: 1 - (betas(T) ** 2).cumsum(0),
        "this is 1 - beta: alpha_bar is the product of all up to t":
            lambda f, T: 1 - betas(T) ** 2}, 1e-11),
    "q_sample": Task({
        "t = 20, 500 and 900": lambda: noising(20, 500, 900),
        "t = -1, which means clean, and t = 300": lambda: noising(-1, 300),
        "t = 0 and 999, the ends": lambda: noising(0, 999),
        "another table, of T = 50": lambda: noising(20, -1, T=50, shape=(3, 2, 6)),
    }, {
        "noise and data are swapped: sqrt(ab) belongs to z0": mixed(lambda ab: root(1 - ab), root),
        "the roots are forgotten": mixed(lambda ab: ab, lambda ab: 1 - ab),
        "the root of 1 - ab is forgotten": mixed(root, lambda ab: 1 - ab),
        "the root of ab is forgotten": mixed(lambda ab: ab, lambda ab: root(1 - ab)),
        "the noise's weight is sqrt(1 - ab), not 1 - sqrt(ab)": mixed(root, lambda ab: 1 - root(ab)),
        "z0 keeps its size: its weight is sqrt(ab)": mixed(lambda ab: 1, lambda ab: root(1 - ab)),
        "it is off by one in time: alpha_bar[t - 1] stands for alpha_bar[t]": shifted(-1),
        "it is off by one in time: alpha_bar[t + 1] stands for alpha_bar[t]": shifted(1),
        "the noise is taken off: it is added": but(eps=minus),
        "one time for the whole batch: t holds one a sample": but(t=lambda t: t[:1].expand(len(t))),
        "alpha_bar is not heard: the table is an argument": but(alpha_bar=lambda table: TABLE),
        "t = -1 reads the last entry, the noisiest: it means clean":
            lambda f, z0, t, eps, table: f(z0, t % len(table), eps, table)}),
    "to_x0": Task({f"pred {pred!r}": lambda pred=pred: (*images(3, 2, 4, 4), 0.3, pred) for pred in KINDS}, {
        "the roots of ab and 1 - ab are forgotten": solving(
            eps=lambda out, z, a, b: (z - b ** 2 * out) / a ** 2,
            v=lambda out, z, a, b: a ** 2 * z - b ** 2 * out),
        "the root of 1 - ab is forgotten": solving(eps=lambda out, z, a, b: (z - b ** 2 * out) / a),
        "it is not divided by sqrt(ab)": solving(eps=lambda out, z, a, b: z - b * out),
        "it is divided by ab: by sqrt(ab)": solving(eps=lambda out, z, a, b: (z - b * out) / a ** 2),
        "brackets are missing: (z_t - sqrt(1 - ab) eps) / sqrt(ab)":
            solving(eps=lambda out, z, a, b: z - b * out / a),
        "the sign of the network's part is turned round": (
            lambda f, out, z, ab, pred: f(out if pred == "x0" else -out, z, ab, pred),
            solving(eps=lambda out, z, a, b: (z + b * out) / a),
            solving(v=lambda out, z, a, b: a * z + b * out)),
        "another formula is wanted for v: z0 = sqrt(ab) z_t - sqrt(1 - ab) v": (
            solving(v=lambda out, z, a, b: b * z + a * out),
            solving(v=lambda out, z, a, b: b * z - a * out),
            solving(v=lambda out, z, a, b: (a * z - b * out) / a),
            solving(v=lambda out, z, a, b: (z - b * out) / a)),
        "for x0 the network says z0 itself: return that": (
            solving(x0=lambda out, z, a, b: z),
            solving(x0=lambda out, z, a, b: (z - b * out) / a)),
        "ab and 1 - ab are swapped": (
            but(ab=lambda ab: 1 - ab),
            solving(eps=lambda out, z, a, b: (z - a * out) / b)),
        "pred is not heard: this is the formula for eps": but(pred=lambda pred: "eps")}),
    "diffusion_loss": Task({
        **{f"pred {pred!r}": lambda pred=pred: (learner, *noising(20, 500, 900), pred) for pred in KINDS},
        "pred 'v' and t = -1, which means clean": lambda: (learner, *noising(-1, 500), "v"),
        "another table, of T = 50": lambda: (learner, *noising(20, 40, T=50, shape=(3, 2, 6)), "eps"),
    }, {
        "one mean of the whole batch: one a sample": lambda f, *args: f(*args).mean(),
        "this is the sum of squares: their mean": losing(lambda error: error.square().flatten(1).sum(1)),
        "the error is not squared": losing(lambda error: error.abs().flatten(1).mean(1)),
        "the network sees z0: it must see the noised z_t": lambda f, fn, z0, *rest:
            f(lambda z, t: fn(z0, t), z0, *rest),
        "the network is told t - 1: it wants t": but(fn=lambda fn: lambda z, t: fn(z, t - 1)),
        "the network is told t + 1: it wants t": but(fn=lambda fn: lambda z, t: fn(z, t + 1)),
        "alpha_bar is not heard: the table is an argument": but(alpha_bar=lambda table: TABLE),
        "pred is not heard: the target is always eps": but(pred=lambda pred: "eps"),
        "the target is z0 where it must be eps or v": but(pred=lambda pred: "x0"),
        "the targets of eps and x0 are swapped":
            but(pred=lambda pred: {"eps": "x0", "x0": "eps"}.get(pred, pred)),
        "the roots in v are forgotten": losing(v=lambda z0, eps, a, b: a * a * eps - b * b * z0),
        "the roots in v are swapped: sqrt(ab) eps - sqrt(1 - ab) z0":
            losing(v=lambda z0, eps, a, b: b * eps - a * z0),
        "the sign of v is turned round": (
            losing(v=lambda z0, eps, a, b: b * z0 - a * eps),
            losing(v=lambda z0, eps, a, b: a * eps + b * z0)),
        "the root of the error: the mean of squares alone": lambda f, *args: f(*args).sqrt()}),
    "with_guidance": Task({f"guidance {g}": lambda g=g: (*images(3, 2, 4, 4), g) for g in (2.5, 1.0, 0.0)}, {
        "the guidance is on the wrong branch: begin at null, go towards cond":
            lambda f, n, c, g: f(c, n, g),
        "it is one guidance too strong: 1 is cond, not 0": but(guidance=lambda g: g + 1),
        "it is one guidance too weak: 1 is cond, 0 is null": but(guidance=lambda g: g - 1),
        "it goes away from cond: the sign is turned round": but(guidance=minus),
        "null must be taken off cond: null + guidance (cond - null)":
            lambda f, n, c, g: n + g * c,
        "null is lost: null + guidance (cond - null)":
            (lambda f, n, c, g: g * (c - n), lambda f, n, c, g: g * c)}),
    "ddim_sample": Task({
        "five steps of a small network": by(1, 150, 401, 640, 801),
        "images that are all 0.7, in four steps": by(5, 300, 600, 990, fn=point),
        "a single step": by(500),
        "another table, of T = 50": by(3, 20, 48, T=50, shape=(2, 3, 2, 6)),
    }, {
        "it ends at alpha_bar[0], not at 1: the last step leads to clean": walk(ends=0),
        "the last step leads up to timesteps[-1]: it leads to clean":
            lambda f, *args: walk(args[-1][-1])(f, *args),
        "it goes from clean to noisy: begin with the last timestep": walk(up=True),
        "the lowest timestep is left out": but(timesteps=lambda times: times[1:]),
        "the highest timestep is left out": but(timesteps=lambda times: times[:-1]),
        "the table is read a step too early: alpha_bar[t], not of t - 1": walk(shift=-1),
        "the table is read a step too late: alpha_bar[t], not of t + 1": walk(shift=1),
        "alpha_bar is not heard: the table is an argument": but(alpha_bar=lambda table: TABLE),
        "a step leads to t - 1: it leads to the next lower timestep":
            walk(leads=lambda t, table, times: t - 1),
        "a step leads to t - T // n: it leads to the next lower timestep, whatever that is":
            walk(leads=lambda t, table, times: t - len(table) // len(times)),
        "the roots of alpha_bar are forgotten": walk(powers=(1, 1, 1, 1)),
        "a root is forgotten":
            tuple(walk(powers=[1 if n == k else 0.5 for n in range(4)]) for k in range(4)),
        "z0_hat is clipped: nothing bounds a latent": walk(bend=lambda z0: z0.clamp(-1, 1)),
        "the sign of eps_hat is turned round":
            tuple(walk(signs=signs) for signs in ((1, -1), (1, 1), (-1, -1))),
        "the network is told t - 1: it wants t": but(fn=lambda fn: lambda z, t: fn(z, t - 1)),
        "the network is told the number of the step: it wants t itself": walk(step=True)}, 1e-3),
}

# ----- Lab 3 -----

def pasted(add):
    """Windows on a canvas, where `add` says what becomes of what lies there."""
    def mistake(f, parts, ij, h, w):
        canvas, k = torch.zeros(1, parts.shape[1], h, w), parts.shape[-1]
        for part, (i, j) in zip(parts, ij):
            canvas[0, :, i:i + k, j:j + k] = add(canvas[0, :, i:i + k, j:j + k], part)
        return canvas
    return mistake

def turned(f, parts, ij, h, w):
    return f(parts[[ij.index((j, i)) for i, j in ij]], ij, h, w) if h == w else parts

def windows(h, w, overlap, C=3, k=4, order=1):
    ij = [(i, j) for i in core.starts(h, k, overlap) for j in core.starts(w, k, overlap)][::order]
    return lambda: (r(len(ij), C, k, k) + 2, list(ij), h, w)

def unit(d):
    return d / d.abs().max()

# a denoiser, a decoder and an encoder that bend
def z0_hat(z):
    return 0.8 * z + 0.3 * torch.sin(2 * z).roll(1, -1)

def Dec(z0):
    return torch.tanh(core.up(z0, 2) / 2).roll(1, -1)

def Enc(x):
    return core.down(x + 0.3 * x ** 2, 2).roll(1, -2)

def guided(lam, *more):
    """z and y, in float64: what is left of finite differences is exact enough to compare."""
    z = r(1, 3, 4, 6, dtype=torch.float64)
    functions = (z0_hat, Dec, Enc) if more else (Dec, Enc)
    return z, *functions, Resize(2, "box"), z.flip(3) / 3, *([unit] if more else []), lam, *more

def scaled(by, down=1):
    """A whose parts are so many times as large."""
    return lambda A: SimpleNamespace(down=lambda x: down * A.down(x), up=lambda y: by * A.up(y), factor=A.factor)

def then(first, *later):
    """A function that is the first of these when called for the first time, the next the next time; then stays."""
    rest = [first, *later]
    return lambda x: (rest.pop(0) if len(rest) > 1 else rest[0])(x)

def with_Enc(change):
    """The mistake of another second encoding: change(Enc, x, z0)."""
    def mistake(f, z, *rest):
        at = [*inspect.signature(f).parameters].index("Enc") - 1
        Enc, z0 = rest[at], rest[0](z) if at == 2 else z
        return f(z, *rest[:at], then(Enc, lambda x: change(Enc, x, z0)), *rest[at + 1:])
    return mistake

LAB3 = {
    "down": Task({
        "8 x 12 pixels, f = 4": lambda: (r(2, 3, 8, 12), 4),
        "6 x 4 pixels, f = 2": lambda: (r(1, 2, 6, 4), 2),
    }, {
        "every f-th pixel is taken: the mean of the block": (
            lambda f, x, k: x[..., ::k, ::k],
            lambda f, x, k: x[..., k // 2::k, k // 2::k]),
        "the sum of a block: its mean": lambda f, x, k: f(x, k) * k ** 2,
        "it is divided by f, not by f^2: a block has f^2 pixels": lambda f, x, k: f(x, k) * k,
        "pixels that are not neighbours are averaged: view as (B, C, H/f, f, W/f, f), the mean over axes 3 and 5": (
            lambda f, x, k: x.reshape(-1, k * k).mean(1).view(f(x, k).shape),
            lambda f, x, k: x.unflatten(3, (k, -1)).unflatten(2, (k, -1)).mean((2, 4))),
        "the greatest of a block: its mean": lambda f, x, k: max_pool2d(x, k)}),
    "up": Task({
        "2 x 3 pixels, f = 4": lambda: (r(2, 3, 2, 3), 4),
        "3 x 3 pixels, f = 2": lambda: (r(1, 2, 3, 3), 2),
    }, {
        "this is A^T: f^2 is missing": lambda f, y, k: f(y, k) / k ** 2,
        "one pixel of each block is filled: all of them":
            lambda f, y, k: torch.kron(y, pad(torch.ones(1, 1), (0, k - 1, 0, k - 1))),
        "pixels are repeated along a row, and rows broken elsewhere: a view without permute": lambda f, y, k:
            y.flatten().repeat_interleave(k * k).view(f(y, k).shape),
        "it is smoothed: each pixel becomes f x f equal ones":
            lambda f, y, k: interpolate(y, scale_factor=k, mode="bilinear"),
        "the picture is tiled: each pixel is to be repeated": lambda f, y, k: y.repeat(1, 1, k, k)}),
    "starts": Task({f"n, window, overlap = {args}": lambda args=args: args
                    for args in ((9, 4, 2), (10, 4, 1), (12, 4), (4, 4, 2), (7, 4, 3))}, {
        "the last window is missing: it ends at n": lambda f, n, k, o=0: list(range(0, n - k, k - o)),
        "the last window begins at n - window, neither before nor after": (
            lambda f, n, k, o=0: [*range(0, n - k, k - o), n - k - 1],
            lambda f, n, k, o=0: [*range(0, n - k, k - o), n]),
        "one begins twice where steps fit: none twice": (
            lambda f, n, k, o=0: [*range(0, n - k + 1, k - o), n - k],
            lambda f, n, k, o=0: [min(i, n - k) for i in range(0, n, k - o)]),
        "where steps do not fit the border stays bare: the last window ends at n":
            lambda f, n, k, o=0: list(range(0, n - k + 1, k - o)),
        "a window ends beyond n: the last begins at n - window":
            lambda f, n, k, o=0: list(range(0, n, k - o)),
        "windows begin every window - overlap, no other step": (
            lambda f, n, k, o=0: [*range(0, n - k, k + o), n - k],
            lambda f, n, k, o=0: [*range(0, n - k, o or k), n - k]),
        "overlap is not heard: windows begin every window - overlap": but(overlap=lambda o: 0)}),
    "average": Task({
        "windows of 4 on 7 x 8 that share 2": windows(7, 8, 2),
        "windows of 4 on 8 x 8 that share 2": windows(8, 8, 2),
        "windows of 4 on 8 x 8 that share nothing": windows(8, 8, 0),
        "windows of 6 with one channel, the last one first": windows(9, 9, 3, 1, 6, -1),
    }, {
        "where windows overlap stands their sum: divide by how many there are": pasted(torch.add),
        "where windows overlap the last one stands: their mean": pasted(lambda old, part: part),
        "where windows overlap the first one stands: their mean":
            pasted(lambda old, part: torch.where(old == 0, part, old)),
        "where three overlap the last one counts most: add all, then divide": (
            pasted(lambda old, part: torch.where(old == 0, part, (old + part) / 2)),
            pasted(lambda old, part: (old + part) / 2)),
        "it is divided by the number of windows: by how many lie there": lambda f, parts, *rest:
            pasted(torch.add)(f, parts, *rest) / len(parts),
        "row and column of the corners are swapped": turned}),
    "step_s2": Task({f"lam = {lam}": lambda lam=lam: guided(lam, 0.05, 0.03) for lam in (0.5, 0.1)}, {
        "the sign of the correction is turned round: z + lam g": but(lam=minus),
        "the sign of the error is turned round: y - A x": but(A=scaled(-1)),
        "A x is not taken off: y - A x": but(A=scaled(1, 0)),
        "z is decoded, not its estimate: x = Dec(z0_hat(z))": lambda f, z, z0_hat, Dec, *rest:
            f(z, z0_hat, lambda z0: Dec(z), *rest),
        "Eq. 4 is skipped: e goes through the denoiser before it is added":
            lambda f, z, z0_hat, *rest: f(z, lambda v: z0_hat(z) + v - z, *rest),
        "in Eq. 4 z0_hat(z) is taken off, not z": lambda f, z, z0_hat, *rest:
            f(z, then(z0_hat, lambda v: z0_hat(v) - z + z0_hat(z)), *rest),
        "in Eq. 4 the denoiser sees z + delta e, not z0 + delta e": lambda f, z, z0_hat, *rest:
            f(z, then(z0_hat, lambda v: z0_hat(v - z + z0_hat(z))), *rest),
        "Enc(x) is not taken off in Eq. 6": with_Enc(lambda Enc, x, z0: 0 * z0),
        "in Eq. 6 Enc(x) is taken off, not z0": with_Enc(lambda Enc, x, z0: z0),
        "delta and zeta are swapped: zeta goes with Enc":
            lambda f, *args: f(*args[:-2], args[-1], args[-2]),
        "delta goes with z0_hat, zeta with Enc": (
            lambda f, *args: f(*args[:-2], args[-1], args[-1]),
            lambda f, *args: f(*args[:-2], args[-2], args[-2])),
        "delta or zeta is missing inside the brackets": (
            but(delta=lambda delta: 1),
            but(zeta=lambda zeta: 1)),
        "unit is not applied": but(unit=lambda unit: lambda d: d),
        "unit is missing at one place: e_img, e and g are all scaled": tuple(
            but(unit=lambda unit, n=n: then(*[unit] * n, lambda d: d, unit)) for n in range(3)),
        "lam is not heard: z + lam g": but(lam=lambda lam: 1.0),
        "the correction alone is returned: z + lam g": lambda f, z, *rest: f(z, *rest) - z,
        "z0_hat is returned: z moves": (
            lambda f, z, z0_hat, *rest: z0_hat(f(z, z0_hat, *rest)),
            lambda f, z, z0_hat, *rest: f(z, z0_hat, *rest) - z + z0_hat(z))}, 1e-7),
    "step_x0": Task({f"lam = {lam}": lambda lam=lam: guided(lam) for lam in (0.3, 1.0)}, {
        "the sign of the correction is turned round: z0 + lam ( ... )": but(lam=minus),
        "the sign of the error is turned round: y - A x": but(A=scaled(-1)),
        "A x is not taken off: y - A x": but(A=scaled(1, 0)),
        "Enc(x) is not taken off": with_Enc(lambda Enc, x, z0: 0 * z0),
        "Enc(x) is taken off, not z0": with_Enc(lambda Enc, x, z0: z0),
        "the error alone is encoded: the difference of two encodings must be":
            lambda f, z0, Dec, Enc, A, y, lam: z0 + lam * Enc(A.up(y - A.down(Dec(z0)))),
        "lam stands inside of Enc: it scales the difference of the encodings":
            lambda f, z0, Dec, Enc, A, y, lam: f(z0, Dec, Enc, scaled(lam)(A), y, 1.0),
        "the correction alone is returned: z0 + lam ( ... )": lambda f, z0, *rest: f(z0, *rest) - z0,
        "lam is not heard": but(lam=lambda lam: 1.0),
        "lam is in it twice": but(lam=lambda lam: lam ** 2)}, 1e-7),
}

# ----- Lab 4 -----

def listener(z, t, c):
    """A network of which every time and every token of a small grid says something else."""
    heard = 2 * c[:, 25:41].mean(1)[:, :3, None, None]
    return torch.tanh(z + heard * (1 + t % 3).view(-1, 1, 1, 1))

def small_model():
    """What `invert` takes. Its latents are the means of 4 x 4 pixels; its table jumps: no time is like another."""
    schedule = Schedule()
    schedule.alpha_bar = r(1000, dtype=torch.float64).sigmoid()
    return SimpleNamespace(info={"patch": 32}, summarizer=small_summarizer(), encode=lambda x: core.down(x, 4),
                           unet=SimpleNamespace(conv_out=torch.nn.Linear(1, 1)), eps=listener, schedule=schedule)

def inversion(s, images, steps):
    """The core draws u and noise from seed 0, so these are the same."""
    u = torch.randn(1, 5, 2 ** s, 2 ** s, generator=generator(0)).repeat(images, 1, 1, 1)
    noise = [torch.randn(1, 3, 8, 8, generator=generator(0, n + 1)) for n in range(steps)]
    return small_model(), r(images, 3, 32, 32) / 3, s, u, noise

def times(first=950, last=50, rounded=np.floor):
    return lambda n: rounded(np.linspace(first, last, n)).astype(int).tolist()

def descend(weight=lambda ab: ab ** 0.5 * (1 - ab), prior=-0.05, sign=1, times=times(), keep=False, anew=False, late=0,
            finish=per_token, optimizer=torch.optim.Adam, rate=0.1, noises=same, likened=same):
    """Inversion with what one may get wrong."""
    def mistake(f, model, x, s, u, noise):
        u, z = u.clone().requires_grad_(), model.encode(x)
        steps = optimizer([u], rate)
        for t, eps in zip(times(len(noise)), noises(noise)):
            error = eps_error(model, per_token(u), s, z, t, eps)
            loss = weight(float(model.schedule.alpha_bar[t + late])) * error + prior * core.alike(likened(u))
            if anew:
                steps = optimizer([u], rate)
            if not keep:
                steps.zero_grad()
            (sign * loss).sum().backward()
            steps.step()
        return finish(u.detach())
    return mistake

def apart(f, u):
    """The mean over pairs of two."""
    n = u[0, 0].numel()
    return (f(u) * n ** 2 - n) / max(n ** 2 - n, 1)

def moved(how):
    """`project` by another rule, from x, y seen large and what x lacks of it."""
    return lambda f, x, y, k: how(x, core.up(y, k), core.up(y - core.down(x, k), k), k).clamp(-1, 1)

def bag(n):
    """The attention alone learns: gradients must pass through it."""
    head = filled(ABMIL(5, 3, 8)).requires_grad_(False)
    head.score.requires_grad_()
    return head, r(n, 5)

def gated(v=torch.tanh, g=torch.sigmoid, join=torch.mul, to=lambda score: score[:, 0].softmax(0)):
    """Attention with what one may get wrong."""
    def mistake(f, net, bag):
        h = net.embed(bag)
        return h, to(net.score(join(v(net.value(h)), g(net.gate(h)))))
    return mistake

def gathered(how, of=same):
    """Logits from another summary of the patches than their weighted mean, or something of the logits."""
    def mistake(f, net, bag):
        h, a = net.attend(bag)
        return of(net.out(how(h, a))), a
    return mistake

BAGS = {f"a bag of {n}": lambda n=n: bag(n) for n in (6, 1)}
LAB4 = {
    "alike": Task({
        "two grids of 2 x 3": lambda: ((r(2, 5, 2, 3) * 2).requires_grad_(),),
        "a single embedding, which is like itself": lambda: (r(1, 5, 1, 1),),
    }, {
        "the embeddings are not divided by their lengths":
            lambda f, u: u.flatten(2).mean(2).square().sum(1),
        "the lengths go over the places: over axis 1":
            lambda f, u: normalize(u.flatten(2), dim=2).mean(2).square().sum(1),
        "the mean of embeddings is divided by its length: divide each before": lambda f, u:
            normalize(u.flatten(2).mean(2), dim=1).square().sum(1),
        "a mean over channels is taken off: that is no cosine": lambda f, u: f(u - u.mean(1, True)),
        "channels are taken for places: a view without permute":
            lambda f, u: f(u.reshape(len(u), -1, u.shape[1], 1).mT),
        "the pairs of an embedding with itself count too": apart,
        "the length of the mean: its square": lambda f, u: f(u).sqrt()}),
    "invert": Task({
        "one image of scale 2, three steps": lambda: inversion(2, 1, 3),
        "two images of scale 1, eight steps": lambda: inversion(1, 2, 8),
    }, {
        "it climbs: the loss must fall": descend(sign=-1),
        "the prior's sign is turned round: - 0.05 alike(u)": descend(prior=0.05),
        "the prior is missing: - 0.05 alike(u)": descend(prior=0),
        "the prior is of u, not of per_token(u)": descend(likened=per_token),
        "the weight is missing: sqrt(ab) (1 - ab)": descend(lambda ab: 1.0),
        "the root in the weight is forgotten: sqrt(ab) (1 - ab)": descend(lambda ab: ab * (1 - ab)),
        "the root in the weight is of ab alone: sqrt(ab) (1 - ab)":
            descend(lambda ab: (ab * (1 - ab)) ** 0.5),
        "a factor of the weight is missing: sqrt(ab) (1 - ab)": (
            descend(lambda ab: 1 - ab),
            descend(lambda ab: ab ** 0.5)),
        "the weight is off by one in time: alpha_bar[t]": (descend(late=-1), descend(late=1)),
        "the gradients add up: zero_grad before backward": descend(keep=True),
        "Adam begins anew at every step: make it once, before the loop": descend(anew=True),
        "the times go from 50 to 950: the noisy ones come first": descend(times=times(50, 950)),
        "the times are rounded: rounded down, .long()": (
            descend(times=times(rounded=np.round)),
            descend(times=times(rounded=np.ceil))),
        "the times go from 950 to 50, both with them": (
            descend(times=times(949, 49)),
            descend(times=times(950, 0)),
            descend(times=times(999, 50))),
        "one noise for all steps: each has its own": descend(noises=lambda noise: noise[:1] * len(noise)),
        "Adam's rate is 0.1": tuple(descend(rate=rate) for rate in (0.001, 0.01, 1.0)),
        "u itself is returned: per_token(u)": descend(finish=same),
        "u stays as it was: give it a gradient, backward, a step":
            lambda f, m, x, s, u, noise: per_token(u),
        "this is plain descent: Adam": descend(optimizer=torch.optim.SGD)}, 1e-3),
    "project": Task({
        "two images of 8 x 12 pixels, f = 4": lambda: (r(2, 3, 8, 12) / 9, r(2, 3, 2, 3) / 9, 4),
        "pixels that leave [-1,1]": lambda: (1.5 * r(1, 3, 8, 8), r(1, 3, 4, 4) / 3, 2),
    }, {
        "the sign of the error is turned round: y - A x": moved(lambda x, y, lack, k: x - lack),
        "A x is not taken off: y - A x": moved(lambda x, y, lack, k: x + y),
        "f^2 is missing: x + f^2 A^T (y - A x)": (
            moved(lambda x, y, lack, k: x + lack / k ** 2),
            moved(lambda x, y, lack, k: x + lack / k)),
        "the error is tiled: each of its pixels is to be repeated":
            lambda f, x, y, k: (x + (y - core.down(x, k)).repeat(1, 1, k, k)).clamp(-1, 1),
        "x is lost: it stays where its block's mean is right": moved(lambda x, y, lack, k: y),
        "it is clipped before, too: once, at the end": (
            lambda f, x, y, k: f(x.clamp(-1, 1), y, k),
            moved(lambda x, y, lack, k: x + lack.clamp(-1, 1))),
        "it is repeated after clipping: once": (
            lambda f, x, y, k: f(f(x, y, k), y, k),
            lambda f, x, y, k: core.inversion.project(Resize(k, "box"), x, y)),
        "it is not clipped to [-1,1]": lambda f, x, y, k: x + core.up(y - core.down(x, k), k)}),
    "attend": Task(BAGS, {
        "there is no softmax: the weights must sum to 1": gated(to=lambda score: score[:, 0]),
        "the softmax goes over an axis of length 1: over the patches":
            gated(to=lambda score: score.softmax(1)[:, 0]),
        "a sigmoid of the scores: a softmax over the patches":
            gated(to=lambda score: score[:, 0].sigmoid()),
        "the logarithm of the softmax: the softmax": gated(to=lambda score: score[:, 0].log_softmax(0)),
        "the scores are divided by a root: plain softmax":
            gated(to=lambda score: (score[:, 0] / 2).softmax(0)),
        "the sign of the scores is turned round": gated(to=lambda score: (-score[:, 0]).softmax(0)),
        "tanh and sigmoid are swapped: tanh of value, sigmoid of gate": gated(torch.sigmoid, torch.tanh),
        "tanh goes with value, sigmoid with gate, both with one": (
            gated(same), gated(g=same), gated(same, same),
            gated(g=torch.tanh), gated(torch.sigmoid), gated(torch.relu)),
        "the gate is added: it multiplies": gated(join=torch.add),
        "the gate is missing": gated(join=lambda v, g: v)}),
    "abmil": Task(BAGS, {
        "the plain mean over patches: weigh them by attention": gathered(lambda h, a: h.mean(0)),
        "the plain sum over patches: weigh them by attention": gathered(lambda h, a: h.sum(0)),
        "the weighted patches are averaged: the weights sum to 1, so add":
            gathered(lambda h, a: a @ h / len(a)),
        "the highest of the patches: their weighted mean": (
            gathered(lambda h, a: h.amax(0)),
            gathered(lambda h, a: (a[:, None] * h).amax(0))),
        "the most attended patch alone: the weighted mean of all": gathered(lambda h, a: h[a.argmax()]),
        "the logits went through a softmax or a sigmoid: return them as they are": tuple(
            gathered(lambda h, a: a @ h, of) for of in (partial(torch.softmax, dim=0), torch.sigmoid))}),
}
LABS = {"1": LAB1, "2": LAB2, "3": LAB3, "4": LAB4}
