"""Numbers that compare generated with real images: the scores of Z Tables 1-5, and checks against toy slides.

Name the feature space beside each distance: only the Fréchet distance of `inception_features` is a FID.
`random_features` are a fair judge, because no model here is ever conditioned on them.

in:  features (N,D), or images (N,3,H,W) in [-1,1], torch or numpy     out: floats, computed in float64
raises: UserError (a ValueError) from every function for wrong shapes, NaN, infinity or too few rows
run: python metrics.py     read next: zoom_vae.py
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from common import UserError, cli, generator, load_official, load_state_dict, to_uint8


def _need(ok, text):
    if not ok:
        raise UserError(text)


def _double(sets, fits, wanted):
    sets = [torch.as_tensor(x).detach().double() for x in sets]
    _need(all(fits(x, sets[0]) and x.isfinite().all() for x in sets),
          f"got numbers of shape {[tuple(x.shape) for x in sets]}: give {wanted}, without NaN or infinity")
    return sets


def _features(*sets, rows=1):
    return _double(sets, lambda x, y: x.ndim == y.ndim == 2 and len(x) >= rows and x.shape[1] == y.shape[1],
                   f"features (N,D) of one width D, in at least {rows} rows")


def _images(*sets, side=1):
    sets = _double(sets, lambda x, y: (x.shape == y.shape and x.ndim > 2 and x.shape[-3] == 3
                                       and x.numel() > 0 and min(x.shape[-2:]) >= side),
                   f"images (N,3,H,W) of one shape, at least {side} pixels a side")
    return [x.reshape(-1, *x.shape[-3:]) for x in sets]


# ----- 1. Sets of features -----

def frechet(a, b):
    """Fréchet distance of fitted Gaussians, |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^.5) (Heusel 2017).

    in:  a (N,D), b (M,D), at least 2 rows. Biased upwards at small N: compare only at equal N.
    """
    a, b = _features(a, b, rows=2)
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], -1) for x in (a, b))                 # (D,D)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                                 # S_a^1/2
    # S_a S_b has the eigenvalues of the symmetric S_a^1/2 S_b S_a^1/2, which are real
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance.clamp(min=0))


def kernel_distance(a, b):
    """Unbiased squared MMD under (x.y / D + 1)^3, which is KID without subsets (Binkowski 2018).

    in:  a (N,D), b (M,D), at least 3 rows; memory grows with (N+M)^2.
    out: (value, standard error). The value may be below 0. The error is the two-sample delete-one jackknife;
    where both sets have one distribution the statistic is degenerate and the error too large, by sqrt(2).
    """
    a, b = _features(a, b, rows=3)
    n, m, d = len(a), len(b), a.shape[1]
    aa, bb = (((x @ x.T / d + 1) ** 3).fill_diagonal_(0).sum(1) for x in (a, b))            # (N,), (M,)
    ab = (a @ b.T / d + 1) ** 3                                                             # (N,M)
    mean_a, mean_b = aa.sum() / (n * (n - 1)), bb.sum() / (m * (m - 1))
    # the value with row i of one set left out
    less_a = (aa.sum() - 2 * aa) / ((n - 1) * (n - 2)) + mean_b - 2 * (ab.sum() - ab.sum(1)) / ((n - 1) * m)
    less_b = (bb.sum() - 2 * bb) / ((m - 1) * (m - 2)) + mean_a - 2 * (ab.sum() - ab.sum(0)) / ((m - 1) * n)
    variance = (n - 1) * less_a.var(correction=0) + (m - 1) * less_b.var(correction=0)
    return float(mean_a + mean_b - 2 * ab.mean()), float(variance.sqrt())


def principal(train, k=16):
    """Return a function that projects features (N,D) on the first k principal components of train: (N,k)."""
    train, = _features(train, rows=2)
    most = min(len(train) - 1, train.shape[1])
    _need(1 <= k <= most, f"k={k} components of {tuple(train.shape)} features: choose k from 1 to {most}")
    axes = torch.linalg.svd(train - train.mean(0), full_matrices=False)[2][:k].T            # (D,k)
    return lambda x: (_features(train, x)[1] - train.mean(0)) @ axes


def standard(train):
    """Return a function that centres features on train and divides by its deviations, to take cosines of."""
    train, = _features(train, rows=2)
    std = train.std(0).clamp(min=1e-6 * float(train.std(0).max()) + 1e-12)
    return lambda x: (_features(train, x)[1] - train.mean(0)) / std


def similarity(a, b):
    """Mean cosine between row i of a (N,D) and row i of b (N,D)."""
    _need(len(a) == len(b), f"got {len(a)} and {len(b)} rows: pairs need as many of each")
    return float(F.cosine_similarity(*_features(a, b)).mean())


def paired_gain(a, b):
    """Mean cosine of the N pairs (a_i, b_i), and of the N (N-1) wrong pairs. in: a, b (N,D), N at least 2."""
    right, (a, b) = similarity(a, b), (F.normalize(x) for x in _features(a, b, rows=2))
    return right, float((a.sum(0) @ b.sum(0) - (a * b).sum()) / (len(a) * (len(a) - 1)))


def nearest(a, train):
    """Distance (N,) of each row of a (N,D) to the nearest row of train (M,D): near 0 = a memorised image."""
    a, train = _features(a, train)
    exact = "donot_use_mm_for_euclid_dist"  # the fast form rounds small distances away, and those matter
    return torch.cat([torch.cdist(part, train, compute_mode=exact).amin(1) for part in a.split(256)])


def auc(scores, labels):
    """Area under the ROC curve: the chance that a 1 outscores a 0, ties half. in: (N,), (N,) of 0 and 1."""
    scores, labels = (torch.as_tensor(v).double().flatten() for v in (scores, labels))
    _need(len(scores) == len(labels) and not scores.isnan().any() and set(labels.tolist()) == {0, 1},
          f"auc got {len(scores)} scores, {len(labels)} labels: give as many of each, no NaN, both 0 and 1")
    _, place, ties = scores.unique(return_inverse=True, return_counts=True)
    rank, ones = (ties.cumsum(0) - (ties - 1) / 2)[place], labels.sum()                     # ranks from 1
    return float(((rank * labels).sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


# ----- 2. Images in [-1,1], data range 2 -----

def psnr(a, b):
    """Peak signal-to-noise ratio in dB, mean over the images (inf if two are equal). in: a, b (...,3,H,W)."""
    a, b = _images(a, b)
    return float((10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))).mean())


def ssim(a, b):
    """Structural similarity (Wang 2004): Gaussian 11x11, sigma 1.5, windows inside the image, mean."""
    a, b = _images(a, b, side=11)
    line = torch.exp(-(torch.arange(11, device=a.device).double() - 5) ** 2 / (2 * 1.5 ** 2))
    window = (line.outer(line) / line.sum() ** 2).expand(3, 1, 11, 11)
    mean_a, mean_b, aa, bb, ab = (F.conv2d(x, window, groups=3) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (aa - mean_a**2 + bb - mean_b**2 + c2))).mean())


def gms(a, b):
    """Gradient-magnitude similarity (Xue 2014), mean over the image: 1 = the same edges in the same places.

    in:  a, b (...,3,H,W), sides >= 6. Prewitt gradients of the mean of three channels at half size, c = 170 of 255^2.
    """
    a, b = (F.avg_pool2d(x.mean(1, True), 2) for x in _images(a, b, side=6))
    across = torch.tensor([1, 0, -1.0]).to(a).expand(3, 3) / 3
    kernel = torch.stack([across, across.T])[:, None]                                       # (2,1,3,3)
    a, b = (F.conv2d(x, kernel).square().sum(1).sqrt() for x in (a, b))
    c = 170 / 127.5 ** 2
    return float(((2 * a * b + c) / (a * a + b * b + c)).mean())


def seam_ratio(x, window, every=1):
    """Mean absolute step across window borders, over that between other neighbours: 1 = no seams.

    in:  x (B,3,H,W), borders at the multiples of window. An axis without a border does not count at all. every: compare
    with steps at multiples of this alone. Enlarging, and a decoder of cells of 4 pixels, make steps of their own there.
    """
    x, = _images(x)
    _need(2 <= window < max(x.shape[2:]), f"no borders of window {window} in images {tuple(x.shape[2:])}: "
                                          f"choose a window from 2 pixels to less than the image")
    _need(1 <= every < window, f"every={every}: give a number of pixels below the window of {window}")
    across, inside = [], []
    for axis in (axis for axis in (2, 3) if x.shape[axis] > window):
        step = x.diff(dim=axis).abs().movedim(axis, 0).flatten(1)                           # (H-1, B*3*W)
        at = torch.arange(1, len(step) + 1, device=x.device)
        border = at % window == 0
        across, inside = [*across, step[border].flatten()], [*inside, step[~border & (at % every == 0)].flatten()]
    across, inside = float(torch.cat(across).mean()), float(torch.cat(inside).mean())
    return across / inside if inside else float("inf") if across else 1.0


from train import layout_fidelity  # noqa


def fit_palette(images, regions, tissues=4):
    """Mean colour of each tissue, (tissues,3). in: images (N,3,P,P), regions (N,h,w) ints below tissues."""
    regions, (images,) = torch.as_tensor(regions), _images(images)
    pixels = F.adaptive_avg_pool2d(images, regions.shape[1:]).movedim(1, -1)                # (N,h,w,3)
    _need(len(images) == len(regions) and all((regions == i).any() for i in range(tissues)),
          f"need one region map per image and all {tissues} tissues in them: fit the palette on more patches")
    return torch.stack([pixels[regions == i].mean(0) for i in range(tissues)])


def tissue_fractions(x, palette, cell=8):
    """Share (N,K) of each tissue: the palette colour (K,3) nearest to the mean of cell x cell pixels.

    in:  x (N,3,P,P). Best cell on toy slides: 16 at scales 0 and 1, 8 at 2, 4 above (error .05 .05 .04 .03).
    """
    cells = F.avg_pool2d(_images(x)[0], cell).flatten(2).mT                                 # (N,cells,3)
    label = torch.cdist(cells, palette.to(cells).expand(len(cells), -1, -1)).argmin(-1)     # (N,cells)
    return F.one_hot(label, len(palette)).double().mean(1)


def nuclei_fraction(x, red=0.35):
    """Share (N,) of nuclear pixels: those of little red, which haematoxylin absorbs and eosin hardly."""
    return (_images(x)[0][:, 0] < red).double().mean((1, 2))


# ----- 3. Feature spaces -----

@torch.no_grad()
def random_features(x):
    """Fixed random convolutions, mean and deviation at four depths (B,240). in: x (B,3,H,W), sides >= 32."""
    h, out, rng = _images(x, side=32)[0].float(), [], generator(2025)
    for width in (8, 16, 32, 64):
        weight = torch.randn(width, h.shape[1], 5, 5, generator=rng) * (2 / (25 * h.shape[1])) ** 0.5
        bias = 0.1 * torch.randn(width, generator=rng)
        h = F.conv2d(F.pad(h, (2, 2, 2, 2), "replicate"), weight.to(h), bias.to(h), stride=2).relu()
        out += [h.mean((2, 3)), h.std((2, 3))]
    return torch.cat(out, 1)


@torch.no_grad()
def inception_features(x, weights):
    """Features (B,2048) for a true FID. in: weights, NVIDIA's inception-2015-12-05.pt, a TorchScript file."""
    _need(Path(weights).is_file(), f"no Inception weights at {weights}: bring inception-2015-12-05.pt")
    x = to_uint8(_images(x)[0]).movedim(-1, 1)                                              # (B,3,H,W)
    try:
        net = torch.jit.load(str(weights), map_location="cpu").eval()
    except (RuntimeError, ValueError) as err:
        raise UserError(f"{weights} is not TorchScript: bring NVIDIA's inception-2015-12-05.pt") from err
    return torch.cat([net(part, return_features=True) for part in x.split(64)])


def load_lpips(weights):
    """LPIPS as a frozen module (a, b) -> (B,1,1,1). in: weights, a file of torchvision's VGG16 or AlexNet."""
    try:
        import lpips as published
    except ImportError as err:
        raise UserError(f"LPIPS needs the extra: pip install -e '.[metrics]', and {weights} as backbone") from err
    state = load_state_dict(weights)
    alex = state["features.0.weight"].shape[-1] == 11 if "features.0.weight" in state else False
    net = published.LPIPS(net="alex" if alex else "vgg", pnet_rand=True, verbose=False)  # random: no download
    load_official(net.net, state, "", lambda key: "features." + key.split(".", 1)[1], ignore=("classifier.",))
    return net.eval().requires_grad_(False)


def lpips(a, b, weights):
    """Mean LPIPS of two image batches, weights as for load_lpips."""
    return float(load_lpips(weights)(*(x.float() for x in _images(a, b))).mean())


def main(argv):
    print(__doc__ if argv else "two Gaussians one apart in 8 dimensions, and noise against half the noise:")
    a, b = (torch.randn(512, 8, generator=generator(i)) + i for i in (0, 1))
    x = torch.rand(32, 3, 64, 64, generator=generator(2)) * 2 - 1
    print(f"Fréchet {frechet(a, b):.2f} (exactly 8)   kernel distance, error", kernel_distance(a, b))
    print(f"PSNR {psnr(x, x / 2):.2f} dB   SSIM {ssim(x, x / 2):.3f}   seams {seam_ratio(x, 16):.3f}   "
          f"layout {layout_fidelity(x / 2, x, 4):.3f}   cosine of right, wrong pairs", paired_gain(a, a + b))


if __name__ == "__main__":
    cli(main)
