"""Published checkpoints: key names, shapes, loading, and what is refused. Numbers are in tests/core/test_parity.py."""
import re
from functools import cache, partial

import pytest
import torch
from rule import KIND, PREFIX, assert_golden, golden, manifest, pack, small, state_dict

from common import save_tensors
from diffusion import ZoomLDM
from slides.keys import BOOKKEEPING, summarizer_name, unet_name, vae_name
from summarizer import Summarizer, SummarizerConfig
from unet import UNetConfig
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
    assert ours == manifest(SECTION[part]) and len(ours) == len(net.state_dict())

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

def test_whole_checkpoint(tmp_path):
    """The EMA U-Net, the raw Summarizer, the VAE, by their goldens; the same from a file of any form. catches: the raw
    U-Net instead of the averaged one (every weight is half)."""
    state = checkpoint()
    model = ZoomLDM.from_official(state)
    assert set(model.ignored) == set(manifest("buffers")) and not model.training
    assert model.latent_scale == 1.0 and model.pred == "eps" and model.schedule.kind == "scaled_linear"
    u, v, s = (golden(n)[0] for n in ("unet_small", "vae_small", "summarizer_small"))
    assert_golden(model.unet(u["in/x"], u["in/t"], u["in/context"]), "unet_small", "eps", SMALL)
    assert_golden(model.encode(v["in/image"]), "vae_small", "encode", SMALL)
    assert_golden(model.summarizer(*pack(s["in/feat_4x4"]), s["in/mag_4x4"]), "summarizer_small", "tokens_4x4", SMALL)
    save_tensors(tmp_path / "a.safetensors", state)
    torch.save({"state_dict": state, "global_step": 3, "epoch": 0}, tmp_path / "a.ckpt")
    torch.save(state, tmp_path / "a.pt")
    for path in tmp_path.iterdir():
        found = ZoomLDM.from_official(str(path)).state_dict()
        assert all(torch.equal(found[k], v) for k, v in model.state_dict().items()), path

@cache
def plain():
    return ZoomLDM.from_official(checkpoint())

FORMS = {"module.": lambda k: "module." + k, "compiled": lambda k: "_orig_mod." + k, "within": lambda k: "model." + k,
         "compiled within": lambda k: k.replace("diffusion_model.", "diffusion_model._orig_mod.").replace(
             "model_ema.diffusion_model", "model_ema.diffusion_model_orig_mod")}

@pytest.mark.parametrize("form", FORMS)
def test_names_that_wrappers_make_longer(form):
    whole = plain().state_dict()
    found = ZoomLDM.from_official({FORMS[form](k): v for k, v in checkpoint().items()}).state_dict()
    assert all(torch.equal(found[k], v) for k, v in whole.items())

def test_without_an_average_and_with_a_scale_factor():
    """A file without any average gives the U-Net itself, half of it here; latents are in its units. catches: a scale
    or a schedule that is passed over."""
    state = {k: v for k, v in checkpoint().items() if not k.startswith("model_ema.")}
    state |= {"scale_factor": torch.tensor(0.25), "alphas_cumprod": plain().schedule.alpha_bar.float()}
    model, whole = ZoomLDM.from_official(state), plain()
    for k, v in whole.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[k], v * 0.5)
    assert model.latent_scale == 0.25 and whole.latent_scale == 1.0  # official, too, multiplies by it in encoding
    with pytest.raises(ValueError, match="another schedule"):
        ZoomLDM.from_official(state | {"alphas_cumprod": state["alphas_cumprod"] * 0.99})
    for wrong in (torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises(ValueError, match="scale_factor"):
            ZoomLDM.from_official(state | {"scale_factor": wrong})

def test_naip_variant():
    """Published NAIP weights know 4 scales; otherwise the same network. catches: a fixed table of 8 scales."""
    state, g = state_dict("summarizer_small"), golden("summarizer_small")[0]
    state["mag_embedding.weight"] = state["mag_embedding.weight"][:4].clone()
    naip, brca, s = Summarizer.from_official(state), small("summarizer_small"), torch.arange(4)
    tokens = pack(g["in/feat_8x8"].repeat(2, 1, 1, 1))
    assert naip.cfg.scales == 4 and brca.cfg.scales == 8 and torch.equal(naip(*tokens, s), brca(*tokens, s))

def test_a_file_of_the_vae_alone():
    """With what its training loss needed. catches: a loaded module that shares memory with what it was read from."""
    state = state_dict("vae_small") | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(2)}
    codes = VQVAE.from_official(state).codebook.weight
    assert torch.equal(codes, state["quantize.embedding.weight"])
    with torch.no_grad():
        codes.zero_()
    assert state["quantize.embedding.weight"].any()

# ----- 3. What does not fit is refused, by name -----

@pytest.mark.parametrize("name, key", [
    ("vae_small", "decoder.up.1.upsample.conv.bias"), ("vae_small", "quantize.embedding.weight"),
    ("vae_small", "encoder.conv_in.weight"), ("vae_small", "encoder.conv_in.bias"),          # what sizes are read off
    ("unet_small", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"), ("unet_small", "input_blocks.0.0.weight"),
    ("unet_small", "input_blocks.0.0.bias"), ("unet_small", "input_blocks.4.0.in_layers.2.weight"),
    ("summarizer_small", "encoder.layers.encoder_layer_1.mlp.3.weight"), ("summarizer_small", "pad_token"),
    ("summarizer_small", "mag_embedding.weight"), ("whole", "model_ema.diffusion_modelout2bias"),
    ("whole", "model.diffusion_model.out.2.bias"), ("whole", "first_stage_model.quant_conv.weight")])
def test_keys(name, key):
    """Each key that is missing, unknown or of a wrong shape is named. catches: strict=False; keys outside the four
    prefixes, or raw keys that have an average, going unchecked."""
    whole = name == "whole"
    prefix, load = ("", ZoomLDM) if whole else ("pre.", KIND[name.split("_")[0]])
    state, key = checkpoint() if whole else {"pre." + k: v for k, v in state_dict(name).items()}, prefix + key
    for how, fault in (("missing", {k: v for k, v in state.items() if k != key}),
                       ("unexpected", state | {key + "_2": torch.zeros(1)}),
                       ("of another shape", state | {key: torch.zeros(*state[key].shape, 2)})):
        named = key + "_2" if how == "unexpected" else key
        with pytest.raises(ValueError, match=re.escape(named)) as err:
            load.from_official(fault, *([prefix] if prefix else []))
        assert how in str(err.value)

def test_another_architecture(tmp_path):
    for name in ("vae_small", "unet_small", "summarizer_small"):
        for kind in KIND:
            if not name.startswith(kind):
                with pytest.raises(ValueError, match="no.* published"):
                    KIND[kind].from_official(state_dict(name))
    other = tmp_path / "other.safetensors"
    save_tensors(other, {"blocks.0.attn.qkv.weight": torch.zeros(6, 2)})
    for load, source, says in ((ZoomLDM.from_official, state_dict("vae_small"), "whole published"),
                               (ZoomLDM.from_official, other, "whole published"),
                               (ZoomLDM.from_official, tmp_path / "nothing.ckpt", "no checkpoint|no file"),
                               (ZoomLDM.from_run, other, "from_official"),
                               (ZoomLDM.from_run, tmp_path, "no trained model")):
        with pytest.raises(ValueError, match=says):
            load(source)
