"""Published checkpoints: key names, shapes, loading, and what is refused. Numbers are in tests/core/test_parity.py."""
from functools import cache, partial

import pytest
import torch
from rule import KIND, PREFIX, assert_golden, golden, manifest, pack, small, state_dict

from common import save_tensors
from diffusion import ZoomLDM
from slides.keys import BOOKKEEPING, summarizer_name, unet_name, vae_name
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

SMALL = 2e-5  # allowed max|a-b| / max(1, max|b|)
SECTION = {"vae": "first_stage", "summarizer": "cond_stage", "unet": "unet"}


# ----- 1. Key names -----

@pytest.mark.parametrize("part", ["vae", "summarizer", "unet"])
def test_manifest(part):
    """Every published key has one parameter of ours of the same shape, and the other way round. catches: any typing
    error in a key map, a missing bias, a transposed weight."""
    config = {"vae": VAEConfig, "summarizer": SummarizerConfig, "unet": UNetConfig}[part]()
    with torch.device("meta"):
        net = KIND[part](config)
    name = {"vae": vae_name, "summarizer": summarizer_name, "unet": partial(unet_name, net)}[part]
    ours = {PREFIX[part] + name(k): tuple(v.shape) for k, v in net.state_dict().items()}
    assert ours == manifest(SECTION[part])
    assert len(ours) == len(net.state_dict()) == {"vae": 205, "summarizer": 155, "unet": 688}[part]


def test_whole_manifest():
    """The whole published BRCA checkpoint. catches: a schedule buffer or EMA counter taken for an unknown key."""
    parts = ("unet", "ema", "first_stage", "cond_stage", "buffers")
    state = {k: torch.empty(shape, device="meta") for part in parts for k, shape in manifest(part).items()}
    assert len(state) == 1750
    with torch.device("meta"):
        model = ZoomLDM.from_official(state)
    assert sum(p.numel() for p in model.parameters()) == 400_920_579 + 55_322_782 + 38_656_000
    assert set(model.ignored) == set(manifest("buffers")) <= BOOKKEEPING


# ----- 2. Whole checkpoints -----

@cache
def checkpoint():
    """A whole checkpoint of the published layout with small modules; the raw U-Net differs from the averaged one."""
    state = {PREFIX["vae"] + k: v for k, v in state_dict("vae_small").items()}
    state |= {PREFIX["summarizer"] + k: v for k, v in state_dict("summarizer_small").items()}
    for k, v in state_dict("unet_small").items():
        state[PREFIX["unet"] + k] = v * 0.5
        state["model_ema." + ("diffusion_model." + k).replace(".", "")] = v
    state |= {k: torch.zeros(shape) for k, shape in manifest("buffers").items()}
    state["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    return state


@pytest.mark.parametrize("form", ["dict", "wrapped", "ckpt", "bare.pt", "safetensors"])
def test_whole_checkpoint(form, tmp_path):
    """The EMA U-Net, the raw Summarizer, the VAE, by their goldens. catches: the raw U-Net instead of the averaged one
    (every weight is half)."""
    state = source = checkpoint()
    if form == "wrapped":
        source = {"state_dict": state}
    elif form == "safetensors":
        save_tensors(source := tmp_path / "weights.safetensors", state)
    elif form in ("ckpt", "bare.pt"):
        source = tmp_path / f"weights.{form}"
        torch.save({"state_dict": state, "global_step": 3, "epoch": 0} if form == "ckpt" else state, source)
    model = ZoomLDM.from_official(str(source) if form == "ckpt" else source)
    assert set(model.ignored) == set(manifest("buffers")) and not model.training
    assert model.latent_scale == 1.0 and model.pred == "eps" and model.schedule.kind == "scaled_linear"
    u, v, s = (golden(n)[0] for n in ("unet_small", "vae_small", "summarizer_small"))
    assert_golden(model.unet(u["in/x"], u["in/t"], u["in/context"]), "unet_small", "eps", SMALL)
    assert_golden(model.encode(v["in/image"]), "vae_small", "encode", SMALL)
    assert_golden(model.summarizer(*pack(s["in/feat_4x4"]), s["in/mag_4x4"]), "summarizer_small", "tokens_4x4", SMALL)


def test_naip_variant():
    """Published NAIP weights know 4 scales; otherwise the same network. catches: a fixed table of 8 scales."""
    state, g = state_dict("summarizer_small"), golden("summarizer_small")[0]
    state["mag_embedding.weight"] = state["mag_embedding.weight"][:4].clone()
    naip, brca = Summarizer.from_official(state), small("summarizer_small")
    assert naip.cfg.scales == 4 and brca.cfg.scales == 8
    tokens, mask = pack(g["in/feat_8x8"].repeat(2, 1, 1, 1))
    s = torch.arange(4)
    assert torch.equal(naip(tokens, mask, s), brca(tokens, mask, s))
    with pytest.raises((ValueError, IndexError)):
        naip(tokens, mask, s + 1)


def test_very_old_names():
    """What old torchvision called the MLP's layers."""
    old = {k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
           for k, v in state_dict("summarizer_small").items()}
    ours, want = Summarizer.from_official(old).state_dict(), small("summarizer_small").state_dict()
    assert len(ours) == len(want) and all(torch.equal(ours[k], want[k]) for k in want)


def test_vae_of_a_file_of_its_own():
    """It also holds the networks of its training loss, which are ignored."""
    state = state_dict("vae_small") | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(2)}
    assert torch.equal(VQVAE.from_official(state).codebook.weight, state["quantize.embedding.weight"])


def test_loading_copies():
    """Writing into a loaded module leaves the state dict alone, and nothing of it is shared between modules."""
    state = state_dict("summarizer_small")
    net = Summarizer.from_official(state)
    with torch.no_grad():
        net.pad.zero_()
    assert state["pad_token"].abs().sum() > 0


# ----- 3. What does not fit is refused, by name -----

def broken(state, key, how):
    state = dict(state)
    if how == "missing":
        del state[key]
    elif how == "unexpected":
        state[key + "_2"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(*state[key].shape, 2)
    return state, key + ("_2" if how == "unexpected" else "")


@pytest.mark.parametrize("how", ["missing", "unexpected", "of another shape"])
@pytest.mark.parametrize("name, key", [
    ("vae_small", "decoder.up.1.upsample.conv.bias"), ("vae_small", "quantize.embedding.weight"),
    ("vae_small", "encoder.conv_in.weight"), ("vae_small", "encoder.down.1.block.0.conv1.weight"),
    ("unet_small", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"), ("unet_small", "out.2.bias"),
    ("unet_small", "input_blocks.0.0.weight"), ("unet_small", "input_blocks.4.0.in_layers.2.weight"),
    ("unet_small", "input_blocks.0.0.bias"), ("vae_small", "encoder.conv_in.bias"),   # what sizes are read off
    ("summarizer_small", "final_proj.bias"), ("summarizer_small", "encoder.layers.encoder_layer_1.mlp.3.weight"),
    ("summarizer_small", "pad_token"), ("summarizer_small", "mag_embedding.weight"),
    ("whole", "model_ema.diffusion_modelout2bias"), ("whole", "model.diffusion_model.out.2.bias"),
    ("whole", "first_stage_model.quant_conv.weight"), ("whole", "cond_stage_model.layer_norm.bias")])
def test_keys(name, key, how):
    """Each key that is missing, unknown or of a wrong shape is named. catches: strict=False; keys outside the four
    prefixes, or raw keys that have an average, going unchecked."""
    prefix = "" if name == "whole" else "pre."
    state = checkpoint() if name == "whole" else {prefix + k: v for k, v in state_dict(name).items()}
    state, named = broken(state, prefix + key, how)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")) as err:
        if name == "whole":
            ZoomLDM.from_official(state)
        else:
            KIND[name.split("_")[0]].from_official(state, prefix)
    assert how in str(err.value)


def test_all_faults_are_listed():
    state = state_dict("unet_small")
    state["time_embed.0.bias"] = torch.zeros(3)
    del state["out.0.weight"], state["out.0.bias"]
    state["label_emb.weight"] = torch.zeros(10, 128)
    with pytest.raises(ValueError) as err:
        UNet.from_official(state)
    for word in ("time_embed.0.bias", "(3,)", "(128,)", "out.0.weight", "out.0.bias", "label_emb.weight",
                 "missing", "unexpected", "shape"):
        assert word in str(err.value)


def test_another_architecture(tmp_path):
    for name in ("vae_small", "unet_small", "summarizer_small"):
        state = state_dict(name)
        for kind in KIND:
            if not name.startswith(kind):
                with pytest.raises(ValueError, match="no published"):
                    KIND[kind].from_official(state)
        with pytest.raises(ValueError, match="whole published"):
            ZoomLDM.from_official(state)
    save_tensors(tmp_path / "other.safetensors", {"blocks.0.attn.qkv.weight": torch.zeros(6, 2)})
    with pytest.raises(ValueError, match="whole published"):
        ZoomLDM.from_official(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="from_official"):
        ZoomLDM.from_run(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no trained model"):
        ZoomLDM.from_run(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint|no file"):
        ZoomLDM.from_official(tmp_path / "nothing.ckpt")
