"""What a student's functions, m, do together: lab1 to lab4 return rows of pictures, their names, and a sentence."""
from functools import partial
from itertools import product
from types import SimpleNamespace

import torch
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

import sample_joint
from common import generator
from data import fixed_batch
from diffusion import Schedule, ZoomLDM, ddim_step, even_timesteps, to_eps
from experiments.metrics import seam_ratio
from labs.cases import TABLE, unit
from mil import ABMIL
from summarizer import Summarizer, SummarizerConfig, standardize, summarized
from toy.descriptor import Stats, embed
from toy.tissue import toy_slide

def enlarged(x):
    """(n,C,h,w) -> (n,3,64,64), every number a square."""
    return interpolate(x.float(), (64, 64), mode="nearest").expand(-1, 3, -1, -1)

def picture(x):
    """(64,64,3) uint8 -> (1,3,64,64) in [-1,1]."""
    x = torch.from_numpy(x.copy()).permute(2, 0, 1)
    return x[None] / 127.5 - 1

def trained(run):
    """A run, and patches of scale 1 that it has not seen."""
    model = ZoomLDM.from_run(run)
    pyramids = sample_joint.known_data(model, model.info.get("data", ""))
    return model, fixed_batch(pyramids, "test", 1, 6)

def lab1(m, run):
    x, _, _ = toy_slide(0, 1024)
    tiles = x.reshape(16, 64, 16, 64, 3).swapaxes(1, 2)
    e = embed(Stats(), tiles.reshape(256, 64, 64, 3))
    e = e.view(16, 16, 96)
    net = Summarizer(SummarizerConfig(96, 32, 2, 32, 5))
    rows = []
    for s in range(5):
        i = 8 >> s                                          # a patch right of and below the middle; then all
        part = slice(i * 64, (i + 1) * 64)
        grid = m.grid_under(e, s, i, i)
        grid = m.standardize(grid.permute(2, 0, 1))         # (96,G,G)
        tokens, mask = m.pack_grid(grid)
        with torch.no_grad():
            c = m.summarize(net, tokens[None], mask[None], torch.tensor([s]))[0, 1:]        # (64,32)
        slots = torch.where(mask[:, None], tokens[:, :3].tanh(), 1.0)
        slots = slots.T.reshape(1, 3, 8, 8)
        likeness = (c @ c.T / 32)[None, None]
        shown = [grid[None, :3].tanh(), slots, likeness]
        rows.append(torch.cat([picture(x[part, part]), *map(enlarged, shown)]))
        x = m.halve(x)
    names = ["pyramid", "grid, 3 channels", "64 slots", "likeness of tokens"]
    return torch.stack(rows, 1), names, "your pyramid, what lies under each patch, and the tokens of it"

def density(z):
    """Points (n,2,1,1) as a picture (3,64,64)."""
    count = torch.histogramdd(z.flatten(1).float(), [torch.linspace(-2.5, 2.5, 65)] * 2).hist
    return (1 - count / 2).clamp(-1, 1).expand(3, 64, 64)

def denoiser(points):
    """The perfect network where all data are these points (n,2): E[z0 | z_t], a mean weighed by likelihood."""
    def fn(z, t):
        ab = TABLE[t[0]]
        distance = torch.cdist(z.flatten(1), ab ** 0.5 * points).square()               # (B,n)
        z0_hat = (-distance / (2 * (1 - ab))).softmax(1) @ points
        return to_eps(z0_hat.view_as(z), z, ab, "x0")
    return fn

def lab2(m, run):
    angle = torch.linspace(0, 9, 200, dtype=torch.float64)
    arm = torch.stack([angle.cos(), angle.sin()], 1) * angle[:, None] / 5               # (200,2), a spiral
    null, cond = denoiser(torch.cat([arm, -arm])), denoiser(arm)
    z0 = torch.cat([arm, -arm] * 2)[:, :, None, None]
    noise = torch.randn(z0.shape, generator=generator("lab2"), dtype=z0.dtype)
    names = ["q_sample"]
    rows = [[m.q_sample(z0, torch.full((800,), t), noise, TABLE) for t in (0, 50, 100, 300, 999)]]
    for g in (0.0, 1.0, 3.0):
        def fn(z, t, g=g):
            return m.with_guidance(null(z, t), cond(z, t), g)
        rows.append([m.ddim_sample(fn, noise, TABLE, even_timesteps(1000, n)) for n in (2, 5, 10, 20, 50)])
        names.append(f"guidance {g:.0f}")
    rows = [torch.stack([*map(density, row)]) for row in rows]
    if run:
        model, batch = trained(run)
        c = model.summarizer(batch["tokens"], batch["mask"], batch["s"]).detach()
        def fn(z, t):
            return m.with_guidance(model.eps(z, t, 0 * c), model.eps(z, t, c), 2.0)
        side = batch["x"].shape[-1] // 4
        z = torch.randn(len(c), 3, side, side, generator=generator("lab2 run"))
        z = m.ddim_sample(fn, z, model.schedule.alpha_bar, even_timesteps(1000, 20))
        rows += [enlarged(batch["x"]), enlarged(model.decode(z))]
        names += ["real", "yours"]
    return rows, names, "your noise at t = 0, 50, 100, 300, 999, and your samples by 2, 5, 10, 20, 50 steps"

def clouds(window=16, width=4.0):
    """The perfect z0_hat(z, ab) where windows are smooth clouds: a Gaussian process, so a linear function."""
    at = torch.arange(window, dtype=torch.float64)
    power, waves = torch.linalg.eigh((-(at[:, None] - at).square() / (2 * width ** 2)).exp())
    power = (power[:, None] * power).clamp(min=0)
    def z0_hat(z, ab):
        gain = ab ** 0.5 * power / (ab * power + 1 - ab)
        return waves @ (gain * (waves.T @ z @ waves)) @ waves.T
    return z0_hat

def lab3(m, run):
    perfect, times = clouds(), even_timesteps(1000, 25)
    ab = Schedule().alpha_bar[times].tolist()
    ab_next = [1.0, *ab[:-1]]
    A = SimpleNamespace(down=lambda x: m.down(x, 8), up=lambda y: m.up(y, 8))
    def drawn(n):
        return torch.randn(1, 3, n, n, generator=generator("lab3", n), dtype=torch.float64)
    y = interpolate(drawn(4), (12, 12), mode="bicubic") / 2
    def Dec(z0):
        return m.up(z0, 2) / 2
    def Enc(x):
        return 2 * m.down(x, 2)

    def estimate(ij, ab, z):
        cut = torch.cat([z[:, :, i:i + 16, j:j + 16] for i, j in ij])
        return m.average(perfect(cut, ab), ij, 48, 48)

    def draw(overlap, guide=""):
        z = drawn(48)
        ij = [*product(m.starts(48, 16, overlap), repeat=2)]
        for k in reversed(range(25)):
            z0_hat = partial(estimate, ij, ab[k])
            if guide == "s2":
                z = m.step_s2(z, z0_hat, Dec, Enc, A, y, unit, 0.5, 0.005, 0.005)
            z0 = z0_hat(z)
            if guide == "x0":
                z0 = m.step_x0(z0, Dec, Enc, A, y, 0.5)
            z = ddim_step(z, z0, to_eps(z0, z, ab[k], "x0"), ab_next[k])
        return Dec(z).float()
    shown = {
        "no overlap": draw(0),
        "overlap": draw(8),
        "no overlap + x0": draw(0, "x0"),
        "overlap + s2": draw(8, "s2"),
        "overlap + x0": draw(8, "x0")}
    seams = ", ".join(f"{name} {seam_ratio(x, 32):.1f}" for name, x in shown.items())
    return [A.up(y).float(), *shown.values()], ["target y", *shown], f"your windows. Seams: {seams}"

def lab4(m, run):
    g, net = generator("lab4"), ABMIL(5, 2, 16, 0.0)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    def slide(label):
        """64 patches of 5 features; a slide of label 1 holds 2 x 2 others."""
        x, where = torch.randn(8, 8, 5, generator=g), torch.zeros(8, 8)
        i, j = torch.randint(7, (2,), generator=g).tolist()
        where[i:i + 2, j:j + 2] = label
        return (x + 3 * where[..., None]).flatten(0, 1), where
    for step in range(150):
        label = step % 2
        bag, _ = slide(label)
        logits, _ = m.abmil(net, bag)
        optimizer.zero_grad()
        cross_entropy(logits, torch.tensor(label)).backward()
        optimizer.step()
    bags, where = zip(*(slide(1) for _ in range(6)))
    maps = torch.stack([m.attend(net, bag)[1].detach().view(8, 8) for bag in bags])
    maps = maps / maps.amax((1, 2), True)
    x, _, _ = toy_slide(0, 256)
    truth = picture(x[:64, :64])
    y = avg_pool2d(truth, 4)                                # (1,3,16,16)
    smooth = interpolate(y, (64, 64), mode="bicubic")
    rows = [enlarged(2 * x[:, None] - 1) for x in (torch.stack(where), maps)]
    rows.append(torch.cat([enlarged(y), smooth, m.project(smooth, y, 4), truth]))
    names = ["what differs", "your attention", "y, bicubic, yours, truth"]
    if run:
        model, batch = trained(run)
        u = torch.randn(1, model.summarizer.cfg.embed_dim, 2, 2, generator=generator("u"))
        side = batch["x"].shape[-1] // 4
        noise = [torch.randn(1, 3, side, side, generator=generator("lab4 run", n)) for n in range(60)]
        e = m.invert(model, batch["x"], 1, u.repeat(6, 1, 1, 1), noise)
        drawn = model.draw(summarized(model.summarizer, standardize(e), 1), side, sampler="dpm", steps=10)
        rows += [enlarged(batch["x"]), enlarged(drawn)]
        names += ["given", "drawn from your e"]
    return rows, names, "where your head looks, and y enlarged so that its means are y"
