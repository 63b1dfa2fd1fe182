"""metrics.py against closed forms and brute force. "catches": code changes a test was seen to fail on."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError, generator
from diffusion import layout_fidelity
from experiments import metrics
from experiments.metrics import fit_palette, frechet, gms, inception_features, kernel_distance, load_lpips, nearest
from experiments.metrics import nuclei_fraction, paired_gain, principal, psnr, random_features, seam_ratio
from experiments.metrics import similarity, ssim, standard, tissue_fractions

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))

def images(n, side, seed=0):
    """Smooth random images in [-1,1]."""
    coarse = normal(n, 3, max(side // 8, 1), max(side // 8, 1), seed=seed)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").clamp(-2, 2) / 2

def with_moments(n, mean, cov, seed=0):
    """n rows whose sample mean and sample covariance are exactly these."""
    x = normal(n, len(mean), seed=seed).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(cov).T + mean

# ----- sets of features -----

def test_frechet_of_known_gaussians():
    """catches: a trace without the 2, biased covariance, |mu| not squared."""
    # covariances that do not commute: 2x2, tr (S1 S2)^1/2 = sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2))
    s1, s2 = torch.tensor([[2., .9], [.9, 1.]]).double(), torch.tensor([[1., -.5], [-.5, 3.]]).double()
    cross = ((s1 @ s2).trace() + 2 * (s1.det() * s2.det()).sqrt()).sqrt()
    a, b = with_moments(40, torch.zeros(2), s1), with_moments(60, torch.ones(2), s2, seed=1)
    assert frechet(a, b) == pytest.approx(2 + float(s1.trace() + s2.trace() - 2 * cross))
    # fewer rows than columns: the root's trace by the eigenvalues of S_a S_b
    a, b = normal(10, 30).double(), normal(12, 30, seed=1).double() + 1
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    exact = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * root
    assert frechet(a, b) == pytest.approx(float(exact), abs=1e-4) and frechet(b, a) == pytest.approx(frechet(a, b))
    assert frechet([[0.], [2.]], [[1.], [3.]]) == pytest.approx(1)
    assert frechet(a.numpy(), b) == frechet(a, b)

def test_features_that_cannot_be_compared():
    good = torch.zeros(5, 3)
    for a, b in ((good[:, 0], good[:, 0]), (good, good[:, :2]), (good[:1], good), (good, good[None]),
                 (good * torch.nan, good), (good, good + torch.inf)):
        for distance in (frechet, kernel_distance):
            with pytest.raises(UserError, match=r"give features \(N,D\).* at least [23] rows, without NaN"):
                distance(a, b)

def test_kernel_distance_by_brute_force():
    """catches: the diagonal kept, degree, n - 1 -> n, a jackknife row left out wrongly."""
    a, b = normal(6, 3).double(), normal(5, 3, seed=1).double()

    def mmd(a, b):
        k = lambda x, y: (float(x @ y) / 3 + 1) ** 3
        within = [np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
                  for x in (a, b)]
        return sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])
    left_a = [mmd(torch.cat([a[:i], a[i + 1:]]), b) for i in range(6)]
    left_b = [mmd(a, torch.cat([b[:i], b[i + 1:]])) for i in range(5)]
    value, error = kernel_distance(a, b)
    assert value == pytest.approx(mmd(a, b))
    assert error == pytest.approx((5 * np.var(left_a) + 4 * np.var(left_b)) ** 0.5)

def test_principal_and_standard():
    train = normal(200, 5) * torch.tensor([1., 9., 3., .1, .01]) + 7
    low = principal(train, 2)(train)
    assert torch.allclose(low.var(0), torch.linalg.eigvalsh(torch.cov(train.T.double())).flip(0)[:2])
    for k in (0, 6):
        with pytest.raises(UserError, match="choose k from 1 to 5"):
            principal(train, k)
    with pytest.raises(UserError, match="one width"):
        principal(train, 2)(train[:, :4])
    more = torch.cat([train, torch.ones(200, 1)], 1)
    flat = standard(more)(more)
    assert torch.allclose(flat.std(0), torch.tensor([1., 1, 1, 1, 1, 0]).double())  # a constant column: no 0 / 0

def test_similarity_and_paired_gain():
    a, b = normal(7, 4), normal(7, 4, seed=1)
    cosine = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
    assert similarity(a, b) == pytest.approx(float(cosine.diagonal().mean()), abs=1e-6)
    wrong = [float(cosine[i, j]) for i in range(7) for j in range(7) if i != j]
    assert paired_gain(a, b) == pytest.approx((similarity(a, b), np.mean(wrong)), abs=1e-6)
    with pytest.raises(UserError, match="7 and 1 rows"):
        paired_gain(a, b[:1])

def test_nearest():
    """catches: the matrix-product form of cdist, which loses the small distance; one chunk only."""
    train = normal(500, 8).double() + 1e4
    a = torch.cat([train[100:101] + 1e-5, train[:1], normal(600, 8, seed=1).double() + 1e4])
    found = nearest(a, train)
    assert found[1] == 0 and float(found[0]) == pytest.approx(1e-5 * 8**0.5, rel=1e-3)
    assert torch.allclose(found, (a[:, None] - train).norm(dim=-1).amin(1))

# ----- images -----

def waves():
    """Pictures (40,48,3) in [0,1] that any program can make anew, and one that is noisy, brighter, or both flat."""
    i, j, channel = np.meshgrid(np.arange(40), np.arange(48), np.arange(3), indexing="ij")
    a = 0.5 + 0.3 * np.sin(0.3 * i + channel) * np.cos(0.2 * j)
    noise = 0.15 * np.sin(12.9898 * i + 78.233 * j + 37.7 * channel)
    return {"noisy": (a, (a + noise).clip(0, 1)), "brighter": (a, (a + 0.05).clip(0, 1)),
            "flat": (np.full_like(a, 0.48), np.full_like(a, 0.52))}

# scikit-image 0.26.0: structural_similarity with gaussian_weights=True, use_sample_covariance=False, data_range=1, and
# peak_signal_noise_ratio, data_range=1. pytorch-msssim 1.0.0 gives the same SSIM in float32: .492901, .994555, .996806
@pytest.mark.parametrize("name, ssim_01, psnr_01", [
    ("noisy", 0.4929005360329955, 19.495625208564608), ("brighter", 0.9945547028305451, 26.02059991327962),
    ("flat", 0.9968057496506288, 27.958800173440746)])
def test_ssim_and_psnr_against_scikit_image(name, ssim_01, psnr_01):
    """catches: SSIM on [-1,1], which gives -.73 for two even greys that differ by .04."""
    a, b = (torch.from_numpy(x).movedim(-1, 0)[None] * 2 - 1 for x in waves()[name])
    assert ssim(a, b) == pytest.approx(ssim_01, abs=1e-9)
    assert psnr(a, b) == pytest.approx(psnr_01, abs=1e-9)
    assert ssim(a, a) == pytest.approx(1) and psnr(a, a) == float("inf")
    x = images(2, 16)
    assert gms(x, x) == pytest.approx(1) and gms(x, x.flip(2)) < 0.99
    assert psnr(x, torch.stack([x[0] + 0.02, x[1] + 0.2])) == pytest.approx(30, abs=1e-4)      # a mean of dB

def test_images_that_cannot_be_compared():
    for bad in (lambda: ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20)),
                lambda: psnr(images(2, 16), images(1, 16)), lambda: psnr(images(1, 16) * torch.nan, images(1, 16)),
                lambda: psnr(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)),
                lambda: psnr(torch.zeros(3), torch.zeros(3)), lambda: psnr(*[torch.zeros(0, 3, 8, 8)] * 2),
                lambda: random_features(images(1, 16)), lambda: seam_ratio(torch.zeros(3, 8, 8) * torch.nan, 4),
                lambda: gms(images(1, 32), images(1, 16)), lambda: layout_fidelity(images(1, 4), images(1, 4), 8)):
        with pytest.raises(UserError, match=r"give images \(N,3,H,W\)"):
            bad()

def test_seam_ratio():
    """catches: borders one pixel off, the two axes swapped, a border counted inside; `every` unheard."""
    assert seam_ratio(normal(4, 3, 64, 64), 16) == pytest.approx(1, abs=0.03)
    tiles = normal(1, 3, 4, 6).repeat_interleave(16, 2).repeat_interleave(16, 3)             # flat tiles
    assert seam_ratio(tiles, 16) == float("inf") and seam_ratio(tiles[..., 1:, 1:], 16) == 0
    assert seam_ratio(torch.ones(1, 3, 8, 8), 4) == 1
    # by hand: steps 1 1 5 1 1 with the border in the middle; the other axis is one window, so has none
    x = torch.tensor([0., 1, 2, 7, 8, 9]).expand(1, 3, 3, 6)
    assert seam_ratio(x, 3) == pytest.approx(5) and seam_ratio(x.mT, 3) == pytest.approx(5)
    # cells of 4 pixels make steps at all multiples of 4, no more at those of 16: a seam to the plain ratio alone
    x = normal(2, 3, 16, 16).repeat_interleave(4, 2).repeat_interleave(4, 3) + 0.1 * normal(2, 3, 64, 64)
    assert seam_ratio(x, 16) > 2 and seam_ratio(x, 16, 4) == pytest.approx(1, abs=0.06)
    for args, says in (((1,), "choose a window"), ((64,), "choose a window"), ((16, 16), "every=16")):
        with pytest.raises(UserError, match=says):
            seam_ratio(torch.zeros(1, 3, 32, 64), *args)

def test_layout_fidelity():
    """catches: no centring per channel; rows and columns, or the grid, ignored."""
    real = images(40, 32)
    for grid in (1, 8):
        assert layout_fidelity(real, real, grid) == pytest.approx(1)
        tinted = 0.5 * real + torch.tensor([.1, -.2, .3])[:, None, None]
        assert layout_fidelity(tinted, real, grid) == pytest.approx(1)
        assert abs(layout_fidelity(images(40, 32, seed=1), real, grid)) < 0.3
    stain = torch.tensor([.8, 0, -.8])[:, None, None]
    assert abs(layout_fidelity(0.1 * images(40, 32, seed=1) + stain, 0.1 * real + stain, 1)) < 0.3  # all share it
    assert layout_fidelity(real.flip(2), real, 1) == pytest.approx(1)      # right colours in the wrong places
    assert layout_fidelity(real.flip(2), real, 8) < 0.5
    assert layout_fidelity(torch.zeros_like(real), real, 4) == 0

def test_tissues_and_nuclei():
    palette = torch.tensor([[.9, .9, .9], [.7, .2, .6], [.3, 0., .4], [-.8, .8, -.8]])
    regions = torch.randint(4, (6, 8, 8), generator=generator(0))
    x = palette[regions].movedim(-1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)      # (6,3,64,64)
    x = x + 0.05 * normal(*x.shape)
    fitted = fit_palette(x, regions)
    assert torch.allclose(fitted, palette.double(), atol=0.01)
    share = torch.stack([(regions == i).double().mean((1, 2)) for i in range(4)], 1)
    assert torch.allclose(tissue_fractions(x, fitted), share)
    with pytest.raises(UserError, match="fit the palette on more patches"):
        fit_palette(x, regions.clamp(max=2))
    x = torch.full((2, 3, 32, 32), 0.8)
    x[1, :, 8:16, :] = torch.tensor([-.1, -.4, .5])[:, None, None]
    assert nuclei_fraction(x).tolist() == [0, 0.25]

# ----- feature spaces -----

def test_random_features_are_fixed():
    x = torch.linspace(-1, 1, 4 * 3 * 32 * 32).mul(50).sin().reshape(4, 3, 32, 32)
    found = random_features(x)
    assert found.shape == (4, 240) and found.dtype == torch.float32
    torch.manual_seed(99)
    assert torch.allclose(found[1:2], random_features(x[1:2]), atol=1e-6)
    known = torch.tensor([0.3274, 0.1311, 0.1842])  # if they change, old scores are no longer comparable
    assert torch.allclose(found[:, [0, 100, 200]].mean(0), known, atol=1e-4), found[:, [0, 100, 200]].mean(0)
    assert random_features(images(1, 48)[..., :40]).shape == (1, 240)

class FakeInception(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8 and return_features
        return x.float().mean(2).flatten(1)

@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inception_takes_a_local_torchscript_file(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"not a script")
    for name in ("none", "bad"):
        with pytest.raises(UserError, match=f"{name}.pt is missing or no TorchScript: bring"):
            inception_features(images(2, 32), tmp_path / f"{name}.pt")
    torch.jit.script(FakeInception()).save(str(tmp_path / "net.pt"))
    found = inception_features(torch.ones(70, 3, 8, 8), tmp_path / "net.pt")
    assert found.shape == (70, 24) and (found == 255).all()

class FakeLPIPS(torch.nn.Module):
    """A stand-in of the package's class: slice1 holds features 0-1, slice2 2-3, as in the published one."""

    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        assert pnet_rand and net == "alex"
        self.net = torch.nn.Module()
        self.net.slice1, self.net.slice2 = torch.nn.Sequential(), torch.nn.Sequential()
        self.net.slice1.add_module("0", torch.nn.Conv2d(3, 4, 11, padding=5))
        self.net.slice2.add_module("3", torch.nn.Conv2d(4, 4, 3))

def test_lpips_reads_torchvision_names(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[metrics\]', and .*alex.pth as backbone"):
        load_lpips(tmp_path / "alex.pth")
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=FakeLPIPS))
    state = {"features.0.weight": normal(4, 3, 11, 11), "features.0.bias": normal(4), "features.3.weight":
             normal(4, 4, 3, 3), "features.3.bias": normal(4), "classifier.1.weight": normal(2, 2)}
    torch.save(state, tmp_path / "alex.pth")
    net = load_lpips(tmp_path / "alex.pth")
    assert torch.equal(net.net.slice1[0].weight, state["features.0.weight"])
    assert torch.equal(net.net.slice2[0].weight, state["features.3.weight"]) and not net.training
    assert not any(p.requires_grad for p in net.parameters())
    del state["features.3.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match="missing: features.3.bias"):
        load_lpips(tmp_path / "part.pth")

def test_demo(capsys):
    metrics.main([])
    out = capsys.readouterr().out
    assert "exactly 8" in out and "nan" not in out
