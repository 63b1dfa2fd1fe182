"""How much contrast a sampler takes away: it draws from N(0,1), whose best denoiser is known in closed form."""
import pytest
import torch

from diffusion import Schedule, ddim_sample, dpm_sample, lean_timesteps, plms_sample

def kept(sample, steps, **options):
    """The share of the deviation that is left. z_t is N(0,1) at every t, so the expected eps is sqrt(1 - ab) z_t:
    every step is linear, and one number tells all."""
    schedule = Schedule()
    z = sample(lambda z, t: (1 - schedule.at(t, z)) ** 0.5 * z, torch.ones(1, 1, dtype=torch.float64), schedule, steps,
               **options)
    return float(z)

# frozen: both written down in numpy, one number a step
@pytest.mark.parametrize("steps, ddim, plms", [(10, 0.8427, 0.9875), (20, 0.9156, 0.9946), (50, 0.9636, 0.9990)])
def test_few_steps_of_ddim_take_contrast_away(steps, ddim, plms):
    """catches: a sampler that loses more than its order must. Prints the row of docs/differences.md."""
    found = kept(ddim_sample, steps, end="clean"), kept(plms_sample, steps)
    print(f"{steps} steps: DDIM keeps {found[0]:.3f} of the deviation, PLMS {found[1]:.3f}")
    assert found == pytest.approx((ddim, plms), abs=1e-4)

# frozen: written down in numpy as the paper prints it, x = s_n / s_t x - a_n (exp(-h) - 1) D
@pytest.mark.parametrize("steps, want", [(5, (0.9830, 0.9530, 0.7077)), (10, (1.0096, 1.0243, 0.8434)),
                                         (20, (1.0005, 1.0006, 0.8745))])
def test_ten_steps_of_dpm_keep_it(steps, want):
    """The same for data N(0,v), v = 1, .1 and .01. catches: the extrapolation in eps, in t or from the wrong side."""
    schedule, found = Schedule(), []
    for v in (1, 0.1, 0.01):
        def exact(z, t, v=v):
            ab = schedule.at(t, z)
            return ab ** 0.5 * v / (ab * v + 1 - ab) * z                        # E[z0 | z_t]
        one = torch.ones(1, 1, dtype=torch.float64)
        found.append(float(dpm_sample(exact, one, schedule, lean_timesteps(1000, steps), "x0")) / v ** 0.5)
    print(f"{steps} steps: DPM-Solver++ 2M keeps {found[0]:.3f}, {found[1]:.3f} and {found[2]:.3f} of the deviation")
    assert found == pytest.approx(want, abs=1e-4)
