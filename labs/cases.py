"""The four labs as data: for each function its cases, and mistakes that are known by what comes out.

A mistake is f, the core's function, asked for something else, or a formula of its own; the sentence says what is wrong.
Arguments are made anew for every call, so that nothing written into them stays."""
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

from common import generator
from diffusion import Schedule
from invert import eps_error, per_token
from labs import core
from mil import ABMIL
from sample_joint import Resize
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig

@dataclass
class Task:
    cases: dict[str, Callable]                              # what it is like: a function that makes the arguments
    mistakes: dict[str, Callable]                           # what is wrong: f and the arguments -> what comes out
    tol: float = 1e-4

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

# ----- Lab 1 -----

def pixels(h, w):
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)

def quads(x):
    """The four pixels of every block of 2 x 2."""
    x = x[:len(x) // 2 * 2, :x.shape[1] // 2 * 2]
    return np.stack([x[i::2, j::2] for i in (0, 1) for j in (0, 1)])

def picked(f, e, s, i, j):
    k = max(2 ** s // 8, 1)
    return e[i << s:(i + 1) << s:k, j << s:(j + 1) << s:k]

def pooled(e):
    return adaptive_avg_pool2d(e, min(8, e.shape[-1]))

def over(e, *axes, correction=1):
    return (e - e.mean(axes, True)) / e.std(axes, correction=correction, keepdim=True)

def from_slot_0(f, e):
    return tuple(v.roll(e[0].numel() // 2 - 32, 0) for v in f(e))

@lru_cache
def small_summarizer():
    return filled(Summarizer(SummarizerConfig(3, 16, 1, 16, 4)))

def slots(*sides):
    """Arguments of `summarize`: a network, and a grid of each side."""
    tokens, mask = zip(*(core.pack_grid(r(3, k, k)) for k in sides))
    return small_summarizer(), torch.stack(tokens), torch.stack(mask), torch.arange(len(sides)) + 1

def altered(**parameters):
    """A copy of a network with other parameters."""
    def change(net):
        new = copy.deepcopy(net)
        for name, value in parameters.items():
            setattr(new, name, torch.nn.Parameter(value(net)))
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
        "the mean is rounded down: add 2 before // 4": lambda f, x: (quads(x).sum(0) // 4).astype(np.uint8),
        "halves are rounded to even: (sum + 2) // 4": lambda f, x: quads(x).mean(0).round().astype(np.uint8),
        "every second pixel is taken, not the mean of four": lambda f, x: quads(x)[0]}),
    "grid_under": Task({
        "patch (2,5) of scale 1": lambda: (r(32, 32, 2), 1, 2, 5),
        "patch (1,0) of scale 4, whose 16 x 16 tiles are pooled": lambda: (r(32, 32, 2), 4, 1, 0),
        "patch (0,0) of scale 5, whose 32 x 32 tiles are pooled": lambda: (r(32, 32, 2), 5, 0, 0),
    }, {
        "row and column are swapped: i counts rows": lambda f, e, s, i, j: f(e, s, j, i),
        "a patch begins at tile i 2^s, not at tile i": lambda f, e, s, i, j: f(e[i:, j:], s, 0, 0),
        "single tiles are picked where blocks must be averaged": picked}, 2e-3),
    "standardize": Task({
        "a grid of 4 x 4": lambda: (2 * r(16, 4, 4) + 1,),
        "a grid of 16 x 16, pooled to 8 x 8 first": lambda: (r(16, 16, 16) + 1,),
        "a single embedding": lambda: (r(16, 1, 1) - 1,),
    }, {
        "it is standardised over the places: over the channels, axis 0": lambda f, e: over(pooled(e), 1, 2),
        "one mean and one deviation for all: every place has its own": lambda f, e: over(pooled(e), 0, 1, 2),
        "it is pooled after it was standardised: pool first": lambda f, e: pooled(over(e, 0)),
        "the deviation divides by E: by E - 1, as torch's own": lambda f, e: over(pooled(e), 0, correction=0),
        "it divides by the variance: a root is forgotten": lambda f, e: over(pooled(e), 0) / pooled(e).std(0),
        "the mean is not taken off": lambda f, e: pooled(e) / pooled(e).std(0),
        "it is not divided by the deviation": lambda f, e: pooled(e) - pooled(e).mean(0)}),
    "pack_grid": Task({
        "a grid of 2 x 2": lambda: (r(3, 2, 2),),
        "a single embedding, which stands in slot 32": lambda: (r(3, 1, 1),),
        "a grid of 8 x 8, which fills all slots": lambda: (r(3, 8, 8),),
    }, {
        "the slots are filled from 0 on: n embeddings begin in slot 32 - n // 2": from_slot_0,
        "the slots are filled column by column: row by row": lambda f, e: f(e.mT),
        "the first stands a slot too early: in 32 - n // 2": lambda f, e: tuple(v.roll(-1, 0) for v in f(e)),
        "channels are taken for places: e.flatten(1).T": lambda f, e: f(e.view(-1, len(e)).T.reshape(e.shape)),
        "the mask is turned round: True where a slot is filled": lambda f, e: (f(e)[0], ~f(e)[1])}),
    "summarize": Task({
        "grids of 2 x 2 and 4 x 4": lambda: slots(2, 4),
        "a full grid": lambda: slots(8),
    }, {
        "empty slots hold net.embed(0): net.pad stands there": altered(pad=lambda net: net.embed.bias[None, None]),
        "net.pad stands in the filled slots: the mask is turned round": but(mask=torch.logical_not),
        "net.pos is not added": altered(pos=lambda net: 0 * net.pos),
        "the scale's token comes last: it is the first": scale_last}),
}

# ----- Lab 2 -----

TABLE = Schedule().alpha_bar

def images():
    return r(3, 2, 4, 4), r(6, 4, 4).view(3, 2, 4, 4)

def noising(*times):
    """Arguments of `q_sample`."""
    z0, eps = (x[:len(times)] for x in images())
    return z0, torch.tensor(times), eps, TABLE.clone()

def betas(T, *ends):
    return torch.linspace(*ends, T, dtype=torch.float64)

def late(f, T):
    return torch.cat([torch.ones(1, dtype=torch.float64), f(T)[:-1]])

def at(t):
    return TABLE[t].float().view(-1, 1, 1, 1)

def mixed(signal, noise):
    """q_sample with other weights of alpha_bar."""
    def mistake(f, z0, t, eps, table):
        ab = torch.where(t < 0, 1.0, TABLE[t].float()).view(-1, 1, 1, 1)
        return signal(ab) * z0 + noise(ab) * eps
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

def by(*times, fn=net):
    return lambda: (fn, images()[0], TABLE.clone(), list(times))

def walk(ends=-1, up=False, next_t=False, power=0.5, shift=0, told=lambda t, n: t):
    """DDIM with what one may get wrong: where it ends, its order, where steps lead, roots, what the network hears."""
    def mistake(f, fn, z, table, times):
        for n, t in enumerate(times if up else times[::-1]):
            after = t - 1 if next_t else max([v for v in times if v < t], default=ends)
            ab, ab_next = (1.0 if k < 0 else float(TABLE[k + shift]) for k in (t, after))
            eps = fn(z, torch.full((len(z),), told(t, n)))
            z0 = (z - (1 - ab) ** power * eps) / ab ** power
            z = ab_next ** power * z0 + (1 - ab_next) ** power * eps
        return z
    return mistake

KINDS = ("eps", "v", "x0")
LAB2 = {
    "alpha_bar": Task({"T = 1000": lambda: (1000,), "T = 10": lambda: (10,)}, {
        "beta rises linearly: its root must": lambda f, T: (1 - betas(T, 0.0015, 0.0195)).cumprod(0),
        "the table is late by one: alpha_bar[0] is 1 - beta[0], not 1": late,
        "these are the roots of alpha_bar": lambda f, T: f(T) ** 0.5,
        "this is 1 - beta: alpha_bar is the product of all up to t":
            lambda f, T: 1 - betas(T, 0.0015 ** 0.5, 0.0195 ** 0.5) ** 2}, 1e-6),
    "q_sample": Task({
        "t = 20, 500 and 900": lambda: noising(20, 500, 900),
        "t = -1, which means clean": lambda: noising(-1, -1),
        "t = 0 and 999, the ends": lambda: noising(0, 999),
    }, {
        "noise and data are swapped: sqrt(ab) belongs to z0": mixed(lambda ab: (1 - ab) ** 0.5, lambda ab: ab ** 0.5),
        "the roots are forgotten": mixed(lambda ab: ab, lambda ab: 1 - ab),
        "the root of 1 - ab is forgotten": mixed(lambda ab: ab ** 0.5, lambda ab: 1 - ab),
        "it is off by one in time: alpha_bar[t - 1] stands for alpha_bar[t]": but(t=lambda t: (t - 1).clamp(-1)),
        "it is off by one in time: alpha_bar[t + 1] stands for alpha_bar[t]": but(t=lambda t: (t + 1) % 1000),
        "the noise is taken off: it is added": but(eps=minus),
        "t = -1 reads the last entry, the noisiest: it means clean": but(t=lambda t: t % 1000)}),
    "to_x0": Task({f"pred {pred!r}": lambda pred=pred: (*images(), 0.3, pred) for pred in KINDS}, {
        "the roots of ab and 1 - ab are forgotten": lambda f, out, z, ab, pred: {
            "x0": out, "v": ab * z - (1 - ab) * out, "eps": (z - (1 - ab) * out) / ab}[pred],
        "it is not divided by sqrt(ab)": lambda f, out, z, ab, pred: z - (1 - ab) ** 0.5 * out,
        "the sign of the network's part is turned round": lambda f, out, z, ab, pred:
            f(out if pred == "x0" else -out, z, ab, pred),
        "ab and 1 - ab are swapped": but(ab=lambda ab: 1 - ab),
        "pred is not heard: this is the formula for eps": but(pred=lambda pred: "eps")}),
    "diffusion_loss": Task({
        **{f"pred {pred!r}": lambda pred=pred: (learner, *noising(20, 500, 900), pred) for pred in KINDS},
        "pred 'v' and t = -1, which means clean": lambda: (learner, *noising(-1, 500), "v"),
    }, {
        "one mean of the whole batch: one a sample": lambda f, *args: f(*args).mean(),
        "the network sees z0: it must see the noised z_t": lambda f, fn, z0, *rest:
            f(lambda z, t: fn(z0, t), z0, *rest),
        "the network is told t - 1: it wants t": but(fn=lambda fn: lambda z, t: fn(z, t - 1)),
        "the network is told t + 1: it wants t": but(fn=lambda fn: lambda z, t: fn(z, t + 1)),
        "pred is not heard: the target is always eps": but(pred=lambda pred: "eps"),
        "the target is z0 where it must be eps or v": but(pred=lambda pred: "x0"),
        "the sign of v is turned round": lambda f, fn, *rest:
            f((lambda z, t: -fn(z, t)) if rest[-1] == "v" else fn, *rest),
        "the root of the error: the mean of squares alone": lambda f, *args: f(*args).sqrt()}),
    "with_guidance": Task({f"guidance {g}": lambda g=g: (*images(), g) for g in (3.0, 1.0, 0.0)}, {
        "the guidance is on the wrong branch: begin at null, go towards cond": lambda f, n, c, g: f(c, n, g),
        "it is one guidance too strong: 1 is cond, not 0": but(guidance=lambda g: g + 1),
        "it is one guidance too weak: 1 is cond, 0 is null": but(guidance=lambda g: g - 1),
        "it goes away from cond: the sign is turned round": but(guidance=minus),
        "null must be taken off cond: null + guidance (cond - null)": lambda f, n, c, g: n + g * c,
        "null is lost: null + guidance (cond - null)": lambda f, n, c, g: g * (c - n)}),
    "ddim_sample": Task({
        "five steps of a small network": by(1, 201, 401, 601, 801),
        "images that are all 0.7, in four steps": by(5, 300, 600, 990, fn=point),
        "a single step": by(500),
    }, {
        "it ends at alpha_bar[0], not at 1: the last step leads to clean": walk(ends=0),
        "the last step leads up to timesteps[-1]: it leads to clean": lambda f, *args: walk(args[-1][-1])(f, *args),
        "it goes from clean to noisy: begin with the last timestep": walk(up=True),
        "the table is read a step too early: alpha_bar[t], not of t - 1": walk(shift=-1),
        "the table is read a step too late: alpha_bar[t], not of t + 1": walk(shift=1),
        "a step leads to t - 1: it leads to the next lower timestep": walk(next_t=True),
        "the roots of alpha_bar are forgotten": walk(power=1.0),
        "the network is told the number of the step: it wants t itself": walk(told=lambda t, n: n)}, 1e-3),
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

def windows(h, w, overlap):
    ij = [(i, j) for i in core.starts(h, 4, overlap) for j in core.starts(w, 4, overlap)]
    return lambda: (r(len(ij), 3, 4, 4) + 2, list(ij), h, w)

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
    z = r(1, 3, 4, 4, dtype=torch.float64)
    functions = (z0_hat, Dec, Enc) if more else (Dec, Enc)
    return z, *functions, Resize(2, "box"), z.flip(3) / 3, *([unit] if more else []), lam, *more

def negated(A):
    return SimpleNamespace(down=A.down, up=lambda y: -A.up(y), factor=A.factor)

def first_call(fn):
    """fn the first time; then nothing."""
    calls = []
    return lambda x: calls.append(x) or fn(x) * (len(calls) == 1)

LAB3 = {
    "down": Task({
        "8 x 12 pixels, f = 4": lambda: (r(2, 3, 8, 12), 4),
        "6 x 4 pixels, f = 2": lambda: (r(1, 3, 6, 4), 2),
    }, {
        "every f-th pixel is taken: the mean of the block": lambda f, x, k: x[..., ::k, ::k],
        "the sum of a block: its mean": lambda f, x, k: f(x, k) * k ** 2,
        "it is divided by f, not by f^2: a block has f^2 pixels": lambda f, x, k: f(x, k) * k}),
    "up": Task({
        "2 x 3 pixels, f = 4": lambda: (r(2, 3, 2, 3), 4),
        "3 x 3 pixels, f = 2": lambda: (r(1, 3, 3, 3), 2),
    }, {
        "this is A^T: f^2 is missing": lambda f, y, k: f(y, k) / k ** 2,
        "the picture is tiled: each pixel is to be repeated": lambda f, y, k: y.repeat(1, 1, k, k)}),
    "starts": Task({f"n {n}, window {k}, overlap {o}": lambda args=(n, k, o): args
                    for n, k, o in ((9, 4, 2), (10, 4, 1), (12, 4, 0), (4, 4, 2))}, {
        "the last window is missing: it ends at n": lambda f, n, k, o: list(range(0, n - k, k - o)),
        "where steps do not fit the border stays bare: the last window ends at n":
            lambda f, n, k, o: list(range(0, n - k + 1, k - o)),
        "a window ends beyond n: the last begins at n - window": lambda f, n, k, o: list(range(0, n, k - o)),
        "overlap is not heard: windows begin every window - overlap": but(overlap=lambda o: 0)}),
    "average": Task({
        "windows of 4 on 6 x 8 that share 2": windows(6, 8, 2),
        "windows of 4 on 8 x 8 that share 2": windows(8, 8, 2),
        "windows of 4 on 8 x 8 that share nothing": windows(8, 8, 0),
    }, {
        "where windows overlap stands their sum: divide by how many there are": pasted(torch.add),
        "where windows overlap the last one stands: their mean": pasted(lambda old, part: part),
        "where windows overlap the first one stands: their mean":
            pasted(lambda old, part: torch.where(old == 0, part, old)),
        "row and column of the corners are swapped": turned}),
    "step_s2": Task({f"lam = {lam}": lambda lam=lam: guided(lam, 0.05, 0.03) for lam in (0.5, 0.1)}, {
        "the sign of the correction is turned round: z + lam g": but(lam=minus),
        "the sign of the error is turned round: y - A x": but(A=negated),
        "Eq. 4 is skipped: e goes through the denoiser before it is added":
            lambda f, z, z0_hat, *rest: f(z, lambda v: z0_hat(z) + v - z, *rest),
        "Enc(x) is not taken off in Eq. 6": but(Enc=first_call),
        "delta and zeta are swapped: zeta goes with Enc": lambda f, *args: f(*args[:-2], args[-1], args[-2]),
        "unit is not applied": but(unit=lambda unit: lambda d: d),
        "z0_hat is returned: z moves": lambda f, z, z0_hat, *rest: z0_hat(f(z, z0_hat, *rest))}, 1e-7),
    "step_x0": Task({f"lam = {lam}": lambda lam=lam: guided(lam) for lam in (0.3, 1.0)}, {
        "the sign of the correction is turned round: z0 + lam ( ... )": but(lam=minus),
        "the sign of the error is turned round: y - A x": but(A=negated),
        "Enc(x) is not taken off": but(Enc=first_call),
        "the error alone is encoded: the difference of two encodings must be":
            lambda f, z0, Dec, Enc, A, y, lam: z0 + lam * Enc(A.up(y - A.down(Dec(z0)))),
        "lam is not heard": but(lam=lambda lam: 1.0)}, 1e-7),
}

# ----- Lab 4 -----

def small_model():
    """A model whose layers all act; its latents are the means of 4 x 4 pixels."""
    unet = filled(UNet(UNetConfig(8, (1, 2), 1, (2,), 16, groups=4)))
    return SimpleNamespace(info={"patch": 32}, vae=SimpleNamespace(factor=4), unet=unet, summarizer=small_summarizer(),
                           eps=unet.forward, encode=lambda x: core.down(x, 4), schedule=Schedule())

def inversion(s):
    """The core draws u and noise from seed 0, so these are the same."""
    u = torch.randn(1, 3, 2 ** s, 2 ** s, generator=generator(0)).repeat(2, 1, 1, 1)
    noise = [torch.randn(1, 3, 8, 8, generator=generator(0, n + 1)) for n in range(3)]
    return small_model(), r(2, 3, 32, 32) / 3, s, u, noise

def descend(weight=lambda ab: ab ** 0.5 * (1 - ab), prior=-0.05, sign=1, times=(950, 500, 50), keep=False,
            finish=per_token, optimizer=torch.optim.Adam):
    """Inversion with what one may get wrong."""
    def mistake(f, model, x, s, u, noise):
        u, z = u.clone().requires_grad_(), model.encode(x)
        steps = optimizer([u], 0.1)
        for t, eps in zip(times, noise):
            error = eps_error(model, per_token(u), s, z, t, eps)
            loss = weight(float(model.schedule.alpha_bar[t])) * error + prior * core.alike(u)
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
    return lambda f, x, y, k: how(x, core.up(y, k), core.up(y - core.down(x, k), k), k)

@lru_cache
def head():
    return filled(ABMIL(5, 3, 8))

def bag():
    return head(), r(6, 5)

def gated(v=torch.tanh, g=torch.sigmoid, join=torch.mul, to=lambda score: score[:, 0].softmax(0)):
    """Attention with what one may get wrong."""
    def mistake(f, net, bag):
        h = net.embed(bag)
        return h, to(net.score(join(v(net.value(h)), g(net.gate(h)))))
    return mistake

def gathered(how):
    """Logits from another summary of the patches than their weighted mean."""
    def mistake(f, net, bag):
        h, a = net.attend(bag)
        return net.out(how(h, a)), a
    return mistake

LAB4 = {
    "alike": Task({
        "two grids of 2 x 3": lambda: (r(2, 5, 2, 3) * 2,),
        "a single embedding, which is like itself": lambda: (r(1, 5, 1, 1),),
    }, {
        "the embeddings are not divided by their lengths": lambda f, u: u.flatten(2).mean(2).square().sum(1),
        "the lengths go over the places: over axis 1":
            lambda f, u: normalize(u.flatten(2), dim=2).mean(2).square().sum(1),
        "the pairs of an embedding with itself count too": apart,
        "the length of the mean: its square": lambda f, u: f(u).sqrt()}),
    "invert": Task({
        "two images of scale 1, three steps": lambda: inversion(1),
        "two images of scale 0, where alike is always 1": lambda: inversion(0),
    }, {
        "it climbs: the loss must fall": descend(sign=-1),
        "the prior's sign is turned round: - 0.05 alike(u)": descend(prior=0.05),
        "the prior is missing: - 0.05 alike(u)": descend(prior=0),
        "the weight is missing: sqrt(ab) (1 - ab)": descend(lambda ab: 1.0),
        "the root in the weight is forgotten: sqrt(ab) (1 - ab)": descend(lambda ab: ab * (1 - ab)),
        "the gradients add up: zero_grad before backward": descend(keep=True),
        "the times go from 50 to 950: the noisy ones come first": descend(times=(50, 500, 950)),
        "u itself is returned: per_token(u)": descend(finish=lambda u: u),
        "u stays as it was: give it a gradient, backward, a step": lambda f, m, x, s, u, noise: per_token(u),
        "this is plain descent: Adam": descend(optimizer=torch.optim.SGD)}, 1e-3),
    "project": Task({
        "8 x 8 pixels, f = 4": lambda: (r(1, 3, 8, 8) / 9, r(1, 3, 2, 2) / 9, 4),
        "pixels that leave [-1,1]": lambda: (r(1, 3, 8, 8) / 2, r(1, 3, 4, 4) / 3, 2),
    }, {
        "the sign of the error is turned round: y - A x": moved(lambda x, y, lack, k: (x - lack).clamp(-1, 1)),
        "f^2 is missing: x + f^2 A^T (y - A x)": moved(lambda x, y, lack, k: (x + lack / k ** 2).clamp(-1, 1)),
        "x is lost: it stays where its block's mean is right": moved(lambda x, y, lack, k: y.clamp(-1, 1)),
        "it is not clipped to [-1,1]": moved(lambda x, y, lack, k: x + lack)}),
    "attend": Task({"a bag of 6 patches": bag}, {
        "there is no softmax: the weights must sum to 1": gated(to=lambda score: score[:, 0]),
        "the softmax goes over an axis of length 1: over the patches": gated(to=lambda score: score.softmax(1)[:, 0]),
        "a sigmoid of the scores: a softmax over the patches": gated(to=lambda score: score[:, 0].sigmoid()),
        "tanh and sigmoid are swapped: tanh of value, sigmoid of gate": gated(torch.sigmoid, torch.tanh),
        "the gate is added: it multiplies": gated(join=torch.add),
        "the gate is missing": gated(join=lambda v, g: v)}),
    "abmil": Task({"a bag of 6 patches": bag}, {
        "the plain mean over patches: weigh them by attention": gathered(lambda h, a: h.mean(0)),
        "the highest of the patches: their weighted mean": gathered(lambda h, a: h.amax(0)),
        "the most attended patch alone: the weighted mean of all": gathered(lambda h, a: h[a.argmax()])}),
}
LABS = {"1": LAB1, "2": LAB2, "3": LAB3, "4": LAB4}
