"""How much contrast a sampler takes away: it draws from N(0,1), whose best denoiser is known in closed form."""
import pytest
import torch

from diffusion import Schedule, ddim_sample, plms_sample

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
