"""The critics of the autoencoder to keep: what they add to its loss, and how crops are changed for them."""
import sys

import pytest
import torch
from conftest import TINY, quick
from torch.nn.functional import avg_pool2d

import weights.critic as critic
from common import UserError, load_tensors
from train import Config
from zoom_vae import VAEConfig, VAEStage, vae_loss

class Halves:
    """In the place of learned features, which are an extra: the image at half of its size."""

    def __init__(self, device):
        pass

    def distance(self, x_rec, x):
        return (avg_pool2d(x_rec, 2) - avg_pool2d(x, 2)).square().mean()

@pytest.fixture
def stage(monkeypatch):
    monkeypatch.setattr(critic, "Features", Halves)
    cfg = Config(vae=VAEConfig(width=16, res_blocks=1, codes=16, groups=8, texture=1.0), vae_batch=16, vae_crop=32,
                 vae_steps=8)
    return critic.CriticStage(cfg, torch.rand(4, 3, 64, 64) * 2 - 1)

def gradients(part, loss):
    return torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True)

def test_who_learns_from_what(stage):
    """The critic learns to tell real from coded, the autoencoder to fool it: with equal pull at its last layer.
    catches: a critic that helps to be fooled; coded images that learn to be told; a sign; a weight left out."""
    stage.step, x = stage.first, torch.rand(2, 3, 32, 32) * 2 - 1
    loss, x_rec, _ = vae_loss(stage.vae, x)
    total = stage.critique(loss, x_rec, x)
    real, coded = stage.critic(x), stage.critic(x_rec.detach())
    tell = ((1 - real).clamp_min(0).mean() + (1 + coded).clamp_min(0).mean()) / 2
    learns, told = gradients(stage.critic, total), gradients(stage.critic, tell)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(learns, told)) and learns[0].any()
    like = loss + critic.SEEN * stage.features.distance(x_rec, x)
    fool = -stage.critic(x_rec).mean()
    last = stage.vae.decoder.conv_out.weight
    pull, other, both = (torch.autograd.grad(part, last, retain_graph=True)[0] for part in (like, fool, total))
    share = float((pull.norm() / other.norm()).clamp(0, 1))
    assert torch.allclose(both, pull + critic.FOOL * share * other, rtol=1e-3, atol=1e-6)
    stage.step = 0                                                          # before there are codes
    early = stage.critique(loss, x_rec, x)
    assert float(early.detach()) == pytest.approx(float((like + tell).detach()))

def test_crops_are_turned_and_coloured(stage):
    """About half of the crops are the plain ones, turned; eight turns differ; colours stay in range. catches: one
    change for all crops; changes that depend on the batch and not on the step."""
    noise = stage.noise(3)
    batch = {"x": torch.rand(16, 3, 64, 64) * 2 - 1} | noise
    plain, changed = VAEStage.crops(stage, batch), stage.crops(batch)
    same = [critic.turned(*each) for each in zip(plain, noise["turn"].tolist())]
    kept = [torch.allclose(a, b, atol=1e-6) for a, b in zip(same, changed)]
    assert 3 <= sum(kept) <= 13 and changed.abs().max() <= 1
    views = {tuple(critic.turned(plain[0], turn).flatten().tolist()) for turn in range(8)}
    assert len(views) == 8 and len(noise["turn"].unique()) > 3
    again = stage.noise(3)
    assert all(torch.equal(noise[name], again[name]) for name in noise) and noise.keys() > {"corner"}

def test_a_decoder_learns_on_alone(toy, tmp_path, monkeypatch):
    """Encoder, codes and scale of the latents stay what they were to the bit, whatever --vae.* says; the decoder does
    not. catches: an origin that moves, a gradient for what rests."""
    monkeypatch.setattr(critic, "Features", Halves)
    monkeypatch.setattr(critic, "LOOK", 3)
    args = [*TINY, f"--data={toy}", "--vae.texture=1", "--steps=0"]
    quick([*args, f"--out={tmp_path / 'a'}"])
    more = f"--vae_weights={tmp_path / 'a'}", "--vae.codes=7", "--vae_crop=0"
    quick([*args, *more, f"--out={tmp_path / 'b'}"])
    (a, told), (b, now) = (load_tensors(tmp_path / name / "vae.safetensors") for name in "ab")
    moved = {name for name in a if not torch.equal(a[name], b[name])}
    assert moved == {name for name in a if name.startswith(("decoder.", "from_latent."))}
    assert told["latent_scale"] == now["latent_scale"] and told["config"] == now["config"]
    with pytest.raises(UserError, match="multiple of 16"):
        quick([*args, more[0], "--vae_crop=20", f"--out={tmp_path / 'c'}"])

def test_what_the_decoder_is_asked_for(stage):
    """As much grain, no lattice, and to fool a PatchGAN that is shown detail, anywhere in a cell. catches: a term left
    out; a PatchGAN that is fooled before it knows anything; codes that move; all latents shaken, or none."""
    decoder = critic.DecoderStage(stage.cfg, torch.rand(4, 3, 64, 64) * 2 - 1, stage.vae)
    decoder.shake = 0
    codes, looks = decoder.vae.codebook.weight.clone(), set()
    for step in range(40):
        shake = decoder.noise(step)["shake"]                                # (16,3,8,8)
        assert 0 < int((shake == 0).all((1, 2, 3)).sum()) < 16 and shake.std((1, 2, 3)).max() < 1.3 * critic.SHAKE
        decoder.after_step(50 * step, None)
        looks.add(tuple(decoder.look))
    assert len(looks) > 10 and torch.equal(codes, decoder.vae.codebook.weight)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    loss, x_rec, _ = vae_loss(decoder.vae, x)
    decoder.step = 0
    total = decoder.critique(loss, x_rec, x)
    i, j = decoder.look
    real, coded = (decoder.critic(critic.detail(image)[:, :, i:, j:]) for image in (x, x_rec))
    tell = ((1 - real).clamp_min(0).mean() + (1 + coded).clamp_min(0).mean()) / 2
    there, wanted = critic.sharpness(x_rec), critic.sharpness(x)
    grain = (there - wanted).abs().mean() + (critic.lattice(there) - critic.lattice(wanted)).abs().mean()
    lattice = (critic.folded(x_rec) - critic.folded(x)).abs().mean()
    like = critic.SEEN * decoder.features.distance(x_rec, x)
    asked = loss + like + critic.GRAIN * grain + critic.FOLD * lattice + tell
    assert float(total.detach()) == pytest.approx(float(asked.detach()), rel=1e-5)
    decoder.step = critic.LOOK
    fool, last = -coded.mean(), decoder.vae.decoder.conv_out.weight
    pull, other = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (asked - tell, fool))
    asked = asked + critic.GENTLE * (pull / other).clamp(0, 1) * fool
    assert float(decoder.critique(loss, x_rec, x).detach()) == pytest.approx(float(asked.detach()), rel=1e-4)

def test_measures_of_grain():
    """catches: a fold that mixes places of a cell; a sharpness that sees one direction, or takes steps from cell to
    cell for steps within; a detail that keeps a plane."""
    cell = torch.rand(1, 3, 4, 4)
    lattice, noise = cell.repeat(1, 1, 8, 8), torch.rand(1, 3, 32, 32)
    there = critic.folded(lattice)                                          # (1,3,2,4,2,4)
    assert there.shape == (1, 3, 2, 4, 2, 4) and torch.allclose(there[:, :, 1, :, 0], cell, atol=1e-6)
    assert critic.folded(noise).std() < 0.4 * noise.std()
    stripes = (torch.arange(32) % 2).float().expand(1, 3, 32, 32)
    for x in (stripes, stripes.mT):
        assert torch.allclose(critic.sharpness(x)[..., :-1, :-1].exp(), torch.tensor(1.01))
    cells = (torch.arange(32) // 4 % 2).float().expand(1, 3, 32, 32)        # steps lie between cells alone
    for x in (cells, cells.mT):
        between, within = critic.sharpness(x)[..., :-1, :-1].exp().chunk(2, 1)
        assert torch.allclose(between, torch.tensor(1.01)) and torch.allclose(within, torch.tensor(0.01))
    faint = torch.cat([noise, noise * 1e-3])                                # 0.01 of a step counts as grain, too
    assert torch.allclose(critic.lattice(critic.sharpness(faint)), torch.zeros(2), atol=0.1)
    assert critic.lattice(critic.sharpness(cells)).item() > 2
    plane = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert torch.allclose(critic.detail(plane)[..., 2:-2], plane[..., 2:-2] / 2, atol=1e-5)
    assert critic.detail(stripes).std() > 3 * stripes.std()

def test_answers_of_the_critic_are_local():
    """An answer sees 34 x 34 pixels. catches: a stride or a kernel of another size."""
    net = critic.PatchGAN(8)
    for k in (3, 6):
        net.layers[k] = torch.nn.Identity()                                 # the norms look at the whole crop
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    answers = net(x)
    assert answers.shape == (1, 1, 14, 14)
    answers[0, 0, 7, 7].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()[:, 0]
    assert int(rows[-1] - rows[0]) + 1 == 34

def test_learned_features():
    """Nothing between an image and itself, little between it and a darker one, much after a blur."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra 'encoders' is not installed")
    features = critic.Features("cpu")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    blurred = avg_pool2d(x, 3, 1, 1)
    assert [f.shape[1:] for f in features(x)] == [(32, 32, 32), (16, 32, 32), (24, 16, 16), (40, 8, 8)]
    assert float(features.distance(x, x)) == 0 < float(features.distance(x - 0.01, x)) < float(
        features.distance(blurred, x))

def test_the_preset_without_its_extra(monkeypatch):
    """One sentence that names the extra."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="needs its extra: pip install"):
        critic.Features("cpu")

def test_a_training_with_critics_resumes(toy, tmp_path, monkeypatch):
    """Interrupted and resumed, it ends with the same weights. catches: a critic that begins anew."""
    monkeypatch.setattr(critic, "Features", Halves)
    args = [*TINY, f"--data={toy}", "--vae.texture=1", "--steps=0", "--save_every=4"]
    quick([*args, f"--out={tmp_path / 'whole'}"])
    crops = critic.CriticStage.crops

    def interrupted(self, batch):
        if self.step == 6:
            raise KeyboardInterrupt
        return crops(self, batch)
    monkeypatch.setattr(critic.CriticStage, "crops", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick([*args, f"--out={tmp_path / 'parts'}"])
    monkeypatch.setattr(critic.CriticStage, "crops", crops)
    quick([*args, f"--out={tmp_path / 'parts'}"])
    a, b = (load_tensors(tmp_path / name / "vae.safetensors")[0] for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
