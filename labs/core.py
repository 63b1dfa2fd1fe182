"""The functions of the labs as the core has them, under the labs' names: --core runs them in a student's place."""
import data
import diffusion
import invert as inversion
import sample_joint
from data import halve  # noqa: F401
from diffusion import to_x0, with_guidance  # noqa: F401
from invert import alike  # noqa: F401
from sample_joint import Canvas, Level, Resize
from summarizer import pack_grid, standardize  # noqa: F401

def grid_under(e, s, i, j):
    return data.grid_under(e, s, i, j).float()               # files hold pooled grids in f16

def starts(n, window, overlap=0):
    return sample_joint.starts(n, window, overlap)

def summarize(net, tokens, mask, s):
    return net(tokens, mask, s)

def alpha_bar(T):
    return diffusion.Schedule("scaled_linear", T).alpha_bar

def scheduled(alpha_bar):
    schedule = diffusion.Schedule()
    schedule.alpha_bar, schedule.T = alpha_bar, len(alpha_bar)
    return schedule

def q_sample(z0, t, eps, alpha_bar):
    return scheduled(alpha_bar).q_sample(z0, t, eps)

def diffusion_loss(fn, z0, t, eps, alpha_bar, pred):
    return diffusion.diffusion_loss(fn, z0, t, eps, scheduled(alpha_bar), pred)[0]

def ddim_sample(fn, z_T, alpha_bar, timesteps):
    return diffusion.ddim_sample(fn, z_T, scheduled(alpha_bar), timesteps=timesteps, end="clean")

def down(x, f):
    return Resize(f, "box").down(x)

def up(y, f):
    return Resize(f, "box").up(y)

def average(parts, ij, h, w):
    window, rows = parts.shape[-1], sorted({i for i, _ in ij})
    overlap = window - rows[1] if len(rows) > 1 else 0
    return Canvas(h, w, window, overlap).average(lambda corners: parts[[ij.index(corner) for corner in corners]])

def level(z, z0_hat, Dec, Enc, A, y, unit=None):
    """One window, and functions of whole canvases."""
    canvas = Canvas(*z.shape[2:], tuple(z.shape[2:]))
    canvas.unit = unit
    level = Level(None, Dec, Enc, canvas, z, A, target=y)
    level.z0_hat = lambda z, t, ab: (z0_hat(z), z)
    return level

def step_s2(z, z0_hat, Dec, Enc, A, y, unit, lam, delta, zeta):
    here = level(z, z0_hat, Dec, Enc, A, y, unit)
    return sample_joint.algorithm_s2(here, z, 0, 0.5, 1, lam, delta, zeta)[0]

def step_x0(z0, Dec, Enc, A, y, lam):
    here = level(z0, lambda z: z, Dec, Enc, A, y)
    return sample_joint.guide_x0(here, z0, 0, 0.5, 1, lam, 0, 0)[1]

def invert(model, x, s, u, noise):
    return inversion.invert(model, x, s, len(noise), start="noise")  # the cases' u and noise are those of seed 0

def project(x, y, f):
    return inversion.project(Resize(f, "box"), x, y, rounds=1)

def attend(net, bag):
    return net.attend(bag)

def abmil(net, bag):
    return net(bag)
