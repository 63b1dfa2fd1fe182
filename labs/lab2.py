"""Lab 2, diffusion: write six functions, then python -m labs.check 2. Theory: labs/lab2.md"""
import torch  # noqa: F401

def alpha_bar(T):
    """The table of the LDM: roots of beta rise linearly from sqrt(0.0015) to sqrt(0.0195); alpha_bar[t] is the
    product of 1 - beta[0], ..., 1 - beta[t]. in: T int. out: (T,) float64."""
    raise NotImplementedError("torch.linspace(..., T, dtype=torch.float64) ** 2, then torch.cumprod(1 - beta, 0)")

def q_sample(z0, t, eps, alpha_bar):
    """Noise z0 to the times t: sqrt(ab) z0 + sqrt(1 - ab) eps with ab = alpha_bar[t].
    in:  z0, eps (B,C,h,w) float32; t (B,) int64, -1 = clean, ab = 1; alpha_bar (T,) float64. out: like z0."""
    raise NotImplementedError("append a 1 to alpha_bar, so that index -1 is clean; .to(z0.dtype)[t].view(-1, 1, 1, 1)")

def to_x0(out, z_t, ab, pred):
    """The estimate of the clean latent from what a network says.
    pred: what that is: "eps", "x0" (z0 itself), or "v" = sqrt(ab) eps - sqrt(1 - ab) z0.
    in:  out, z_t (B,C,h,w); ab, a float: alpha_bar at the time of z_t. out: like z_t."""
    raise NotImplementedError("solve z_t = sqrt(ab) z0 + sqrt(1 - ab) eps for z0; for v: what is sqrt(ab) z_t?")

def diffusion_loss(fn, z0, t, eps, alpha_bar, pred):
    """The squared error of fn(z_t, t) against what it should say: eps, z0 ("x0") or v. One mean a sample.
    in:  fn(z_t (B,C,h,w), t (B,)) -> like z_t; the others as in q_sample and to_x0. out: (B,)."""
    raise NotImplementedError("z_t by q_sample; the target by pred; (out - target).square().flatten(1).mean(1)")

def with_guidance(null, cond, guidance):
    """Classifier-free guidance: from the estimate without condition, by `guidance` towards the one with; 1 = cond.
    in:  null, cond (B,C,h,w); guidance, a float. out: like cond."""
    raise NotImplementedError("a point on the line through null (guidance 0) and cond (guidance 1)")

def ddim_sample(fn, z_T, alpha_bar, timesteps):
    """DDIM without noise, from the last of the timesteps to the first, then to clean, alpha_bar = 1.
    in:  fn(z (B,C,h,w), t (B,) int64) -> eps_hat; z_T (B,C,h,w); alpha_bar (T,) float64; timesteps, ascending ints.
    out: z_0, like z_T."""
    raise NotImplementedError("z = sqrt(ab_prev) z0_hat + sqrt(1 - ab_prev) eps_hat, with ab_prev of the next lower "
                              "timestep, 1 after the lowest; make ab a float: float(alpha_bar[t])")
