"""Numbers that compare generated with real images: the scores of Z Tables 1-5, and checks against toy slides.

Name the feature space beside each distance: only the Fréchet distance of `inception_features` is a FID.
`random_features` are a fair judge, because no model here is ever conditioned on them.

in:  features (N,D), or images (N,3,H,W) in [-1,1], torch or numpy     out: floats, computed in float64
raises: UserError (a ValueError) from every function for wrong shapes, NaN, infinity or too few rows
run: python -m experiments.metrics     read next: evaluate.py
"""
import torch
from torch import as_tensor, cat, stack
from torch.linalg import qr, svd, svdvals
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, cosine_similarity, normalize, one_hot, pad

from common import UserError, cli, generator, to_uint8
from diffusion import layout_fidelity
from slides.weights import load_official, load_state_dict

def need(ok, text):
    if not ok:
        raise UserError(text)

def checked(sets, fits, wanted):
    """Sets of numbers in float64. raises: UserError that says what is wanted, unless `fits` likes their shapes."""
    sets = [as_tensor(x).detach().double() for x in sets]
    shapes = [tuple(x.shape) for x in sets]
    good = fits(shapes) and all(x.isfinite().all() for x in sets)
    need(good, f"got numbers of shape {shapes}: give {wanted}, without NaN or infinity")
    return sets

def as_features(*sets, rows=1):
    """Sets of features as float64 matrices of one width."""
    def fits(shapes):
        matrices = all(len(shape) == 2 and shape[0] >= rows for shape in shapes)
        return matrices and len({shape[1] for shape in shapes}) == 1
    return checked(sets, fits, f"features (N,D) of one width D, in at least {rows} rows")

def as_images(*sets, side=1):
    """Sets of images as float64 (N,3,H,W) of one shape."""
    def fits(shapes):
        shape = shapes[0]
        rgb = len(set(shapes)) == 1 and shape[-3:-2] == (3,)
        return rgb and min(shape) > 0 and min(shape[-2:]) >= side
    sets = checked(sets, fits, f"images (N,3,H,W) of one shape, at least {side} pixels a side")
    return [x.reshape(-1, *x.shape[-3:]) for x in sets]

# ----- 1. Sets of features -----

def root_of_covariance(x):
    """R with R^T R the covariance of features x (N,D): (min(N,D),D)."""
    spread = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return qr(spread, mode="r").R

def frechet(a, b):
    """Fréchet distance of fitted Gaussians, |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^.5) (Heusel 2017).

    in:  a (N,D), b (M,D), at least 2 rows. Biased upwards at small N: compare only at equal N.
    """
    a, b = as_features(a, b, rows=2)
    apart = (a.mean(0) - b.mean(0)).square().sum()
    root_a, root_b = root_of_covariance(a), root_of_covariance(b)
    # the eigenvalues of S_a S_b are the squares of these singular values
    shared = svdvals(root_a @ root_b.T).sum()
    traces = root_a.square().sum() + root_b.square().sum()
    distance = apart + traces - 2 * shared
    return float(distance.clamp(min=0))

def without_row(kernel):
    """Mean of a kernel (N,N) off its diagonal, and the same with row and column i left out, (N,)."""
    n = len(kernel)
    rows = kernel.clone().fill_diagonal_(0).sum(1)                                          # (N,)
    total = rows.sum()
    left = (total - 2 * rows) / ((n - 1) * (n - 2))
    return total / (n * (n - 1)), left

def kernel_distance(a, b):
    """Unbiased squared MMD under (x.y / D + 1)^3, which is KID without subsets (Binkowski 2018).

    in:  a (N,D), b (M,D), at least 3 rows; memory grows with (N+M)^2.
    out: (value, standard error). The value may be below 0. The error is the two-sample delete-one jackknife;
    where both sets have one distribution the statistic is degenerate and the error too large, by sqrt(2).
    """
    a, b = as_features(a, b, rows=3)
    n, m = len(a), len(b)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3
    mean_a, left_a = without_row(kernel(a, a))                                              # (), (N,)
    mean_b, left_b = without_row(kernel(b, b))                                              # (), (M,)
    between = kernel(a, b)                                                                  # (N,M)
    total = between.sum()
    less_a = (total - between.sum(1)) / ((n - 1) * m)                                       # without row i of a
    less_b = (total - between.sum(0)) / ((m - 1) * n)                                       # without row j of b
    spread_a = (left_a - 2 * less_a).var(correction=0)
    spread_b = (left_b - 2 * less_b).var(correction=0)
    variance = (n - 1) * spread_a + (m - 1) * spread_b
    value = mean_a + mean_b - 2 * between.mean()
    return float(value), float(variance.sqrt())

def principal(train, k=16):
    """Return a function that projects features (N,D) on the first k principal components of train: (N,k)."""
    train, = as_features(train, rows=2)
    most = min(len(train) - 1, train.shape[1])
    need(1 <= k <= most, f"k={k} components of {tuple(train.shape)} features: choose k from 1 to {most}")
    mean = train.mean(0)
    axes = svd(train - mean, full_matrices=False).Vh[:k].T                                  # (D,k)

    def project(x):
        return (as_features(train, x)[1] - mean) @ axes
    return project

def standard(train):
    """Return a function that centres features on train and divides by its deviations, to take cosines of."""
    train, = as_features(train, rows=2)
    mean, std = train.mean(0), train.std(0)
    std = std.clamp(min=1e-6 * float(std.max()) + 1e-12)  # a constant column stays 0

    def centre(x):
        return (as_features(train, x)[1] - mean) / std
    return centre

def similarity(a, b):
    """Mean cosine between row i of a (N,D) and row i of b (N,D)."""
    need(len(a) == len(b), f"got {len(a)} and {len(b)} rows: pairs need as many of each")
    a, b = as_features(a, b)
    return float(cosine_similarity(a, b).mean())

def paired_gain(a, b):
    """Mean cosine of the N pairs (a_i, b_i), and of the N (N-1) wrong pairs. in: a, b (N,D), N at least 2."""
    right = similarity(a, b)
    a, b = map(normalize, as_features(a, b, rows=2))
    all_pairs = a.sum(0) @ b.sum(0)
    wrong = all_pairs - (a * b).sum()
    return right, float(wrong / (len(a) * (len(a) - 1)))

def nearest(a, train):
    """Distance (N,) of each row of a (N,D) to the nearest row of train (M,D): near 0 = a memorised image."""
    a, train = as_features(a, train)
    exact = "donot_use_mm_for_euclid_dist"  # the fast form rounds small distances away, and those matter
    return cat([torch.cdist(part, train, compute_mode=exact).amin(1) for part in a.split(256)])

# ----- 2. Pairs of images -----

def psnr(a, b):
    """Peak signal-to-noise ratio in dB, mean over the images (inf if two are equal). in: a, b (...,3,H,W), range 2."""
    a, b = as_images(a, b)
    error = (a - b).square().mean((1, 2, 3))                                                # (N,)
    db = 10 * torch.log10(4 / error)
    return float(db.mean())

def ssim(a, b):
    """Structural similarity (Wang 2004): windows of 11 x 11 under a Gaussian of 1.5, only those inside the image, mean
    over them and the channels.

    in:  a, b (...,3,H,W) in [-1,1], sides >= 11. They are compared on [0,1], with the constants for range 1: the
    measure divides by means, so the same pictures on [-1,1] give other numbers. This is scikit-image's with
    gaussian_weights, and pytorch-msssim's; libraries that pad the border or halve the picture first say otherwise.
    """
    a, b = ((x + 1) / 2 for x in as_images(a, b, side=11))
    offset = torch.arange(-5.0, 6, device=a.device, dtype=torch.double)
    line = torch.exp(-offset ** 2 / (2 * 1.5 ** 2))
    line = line / line.sum()
    window = line.outer(line).expand(3, 1, 11, 11)

    def local(x):
        return conv2d(x, window, groups=3)                                                  # (N,3,H-10,W-10)
    mean_a, mean_b = local(a), local(b)
    means = mean_a ** 2 + mean_b ** 2
    product = mean_a * mean_b
    variances = local(a * a + b * b) - means
    covariance = local(a * b) - product
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    brightness = (2 * product + c1) / (means + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return float((brightness * structure).mean())

def gms(a, b):
    """Gradient-magnitude similarity (Xue 2014), mean over the image: 1 = the same edges in the same places.

    in:  a, b (...,3,H,W), sides >= 6. Prewitt gradients of the mean of three channels at half size, c = 170 of 255^2.
    """
    across = torch.tensor([1, 0, -1.0]).double().expand(3, 3) / 3
    kernel = stack([across, across.T])[:, None]                                             # (2,1,3,3)
    steepness = []
    for x in as_images(a, b, side=6):
        half = avg_pool2d(x.mean(1, True), 2)                                               # (N,1,H/2,W/2)
        gradient = conv2d(half, kernel.to(x.device))                                        # (N,2,H/2-2,W/2-2)
        steepness.append(gradient.norm(dim=1))
    a, b = steepness
    c = 170 / 127.5 ** 2
    alike = (2 * a * b + c) / (a ** 2 + b ** 2 + c)
    return float(alike.mean())

def seam_ratio(x, window, every=1):
    """Mean absolute step across window borders, over that between other neighbours: 1 = no seams.

    in:  x (B,3,H,W), borders at the multiples of window. An axis without a border does not count at all. every: compare
    with steps at multiples of this alone. Enlarging, and a decoder of cells of 4 pixels, make steps of their own there.
    """
    x, = as_images(x)
    need(2 <= window < max(x.shape[2:]), f"no borders of window {window} in images {tuple(x.shape[2:])}: choose a "
                                         f"window from 2 pixels to less than the image")
    need(1 <= every < window, f"every={every}: give a number of pixels below the window of {window}")
    at_border, inside = [], []
    for axis in (2, 3):
        if x.shape[axis] <= window:
            continue
        step = x.diff(dim=axis).abs().movedim(axis, 0).flatten(1)                           # (H-1, B*3*W)
        place = torch.arange(1, len(step) + 1, device=x.device)
        border = place % window == 0
        other = ~border & (place % every == 0)
        at_border.append(step[border].flatten())
        inside.append(step[other].flatten())
    at_border, inside = float(cat(at_border).mean()), float(cat(inside).mean())
    if inside == 0:
        return float("inf") if at_border else 1.0
    return at_border / inside

# ----- 3. What colours say of toy slides -----

def fit_palette(images, regions):
    """Mean colour of each of the four tissues, (4,3). in: images (N,3,P,P), regions (N,h,w) ints below 4."""
    images, = as_images(images)
    need(len(images) == len(regions) and len(regions.unique()) == 4,
         "need one region map per image and all 4 tissues in them: fit the palette on more patches")
    pixels = adaptive_avg_pool2d(images, regions.shape[1:]).movedim(1, -1)                  # (N,h,w,3)
    return stack([pixels[regions == i].mean(0) for i in range(4)])

def tissue_fractions(x, palette, cell=8):
    """Share (N,K) of each tissue: the palette colour (K,3) nearest to the mean of cell x cell pixels.

    in:  x (N,3,P,P). Best cell on toy slides: 16 at scales 0 and 1, 8 at 2, 4 above (error .05 .05 .04 .03).
    """
    x, = as_images(x)
    cells = avg_pool2d(x, cell).movedim(1, -1)                                              # (N,h,w,3)
    label = torch.cdist(cells, palette.to(cells)).argmin(-1)                                # (N,h,w)
    votes = one_hot(label, len(palette)).double()                                           # (N,h,w,K)
    return votes.mean((1, 2))

def nuclei_fraction(x, red=0.35):
    """Share (N,) of nuclear pixels: those of little red, which haematoxylin absorbs and eosin hardly."""
    x, = as_images(x)
    return (x[:, 0] < red).double().mean((1, 2))

# ----- 4. Feature spaces -----

@torch.no_grad()
def random_features(x):
    """Fixed random convolutions, mean and deviation at four depths (B,240). in: x (B,3,H,W), sides >= 32."""
    x, = as_images(x, side=32)
    rng = torch.Generator().manual_seed(3758518978)  # of the first version: scores of different days compare
    h, inputs, out = x.float(), 3, []
    for width in (8, 16, 32, 64):
        weight = torch.randn(width, inputs, 5, 5, generator=rng) * (2 / (25 * inputs)) ** 0.5
        bias = 0.1 * torch.randn(width, generator=rng)
        h = pad(h, (2, 2, 2, 2), "replicate")
        h = conv2d(h, weight.to(h), bias.to(h), stride=2).relu()                            # (B,width,H/2,W/2)
        out += [h.mean((2, 3)), h.std((2, 3))]
        inputs = width
    return cat(out, 1)

@torch.no_grad()
def inception_features(x, weights):
    """Features (B,2048) for a true FID. in: weights, NVIDIA's inception-2015-12-05.pt, a TorchScript file."""
    x, = as_images(x)
    pixels = to_uint8(x).movedim(-1, 1)                                                     # (B,3,H,W)
    try:
        net = torch.jit.load(str(weights), map_location="cpu").eval()
    except (RuntimeError, ValueError) as err:
        raise UserError(f"{weights} is missing or no TorchScript: bring NVIDIA's inception-2015-12-05.pt") from err
    return cat([net(part, return_features=True) for part in pixels.split(64)])

def load_lpips(weights):
    """LPIPS as a frozen module (a, b) -> (B,1,1,1). in: weights, a file of torchvision's VGG16 or AlexNet."""
    try:
        from lpips import LPIPS
    except ImportError as err:
        raise UserError(f"LPIPS needs the extra: pip install -e '.[metrics]', and {weights} as backbone") from err
    state = load_state_dict(weights)
    first = state.get("features.0.weight")
    kind = "alex" if first is not None and first.shape[-1] == 11 else "vgg"
    net = LPIPS(net=kind, pnet_rand=True, verbose=False)  # random: no download

    def their_name(key):
        return "features." + key.split(".", 1)[1]
    load_official(net.net, state, "", their_name, ignore=("classifier.",))
    return net.eval().requires_grad_(False)

def main(argv):
    print("two Gaussians one apart in 8 dimensions, and noise against half the noise:")
    a = torch.randn(512, 8, generator=generator(0))
    b = torch.randn(512, 8, generator=generator(1)) + 1
    x = torch.rand(4, 3, 64, 64, generator=generator(2)) * 2 - 1
    print(f"Fréchet {frechet(a, b):.2f} (exactly 8)   kernel distance, error", kernel_distance(a, b))
    print(f"PSNR {psnr(x, x / 2):.2f} dB   SSIM {ssim(x, x / 2):.3f}   seams {seam_ratio(x, 16):.3f}   "
          f"layout {layout_fidelity(x / 2, x, 4):.3f}   cosine of right, wrong pairs", paired_gain(a, a + b))

if __name__ == "__main__":
    cli(main, __doc__)
