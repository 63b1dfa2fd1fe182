"""Our modules against the published ones: numbers (tests/golden, weights by tests/rule.py), key names, shapes, loading.

Each docstring ends with small changes of the code that the test is meant to fail on ("catches: ..."; most were tried).
"""
import gc
from functools import cache, partial

import pytest
import rule
import torch
from rule import assert_close, assert_golden, golden, manifest, state_dict

from common import save_tensors
from diffusion import ZoomLDM
from slides.keys import BOOKKEEPING, summarizer_name, unet_name, vae_name
from summarizer import Summarizer, SummarizerConfig, pack_grid
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

SMALL, FULL = 2e-5, 1e-4  # allowed max|a-b| / max(1, max|b|)
KIND = {"vae": VQVAE, "summarizer": Summarizer, "unet": UNet}
PREFIX = {"vae": "first_stage_model.", "summarizer": "cond_stage_model.", "unet": "model.diffusion_model."}
SECTION = {"vae": "first_stage", "summarizer": "cond_stage", "unet": "unet"}


@cache
def small(name):
    """The small module behind a golden file."""
    return KIND[name.split("_")[0]].from_official(state_dict(name)).requires_grad_(False)


def pack(e, slots=64):
    """pack_grid over a batch (B,E,h,w); a grid that is not square is laid out by hand, by the published rule."""
    if e.shape[2] == e.shape[3]:
        tokens, masks = zip(*(pack_grid(x) for x in e))
        return torch.stack(tokens), torch.stack(masks)
    n = e.shape[2] * e.shape[3]
    tokens, mask = e.new_zeros(len(e), slots, e.shape[1]), torch.zeros(len(e), slots, dtype=torch.bool)
    tokens[:, 32 - n // 2:32 + n // 2] = e.flatten(2).transpose(1, 2)
    mask[:, 32 - n // 2:32 + n // 2] = True
    return tokens, mask


# ----- 1. Numbers, small modules -----

def test_weight_rule_is_frozen():
    """The four kinds of the rule, by value; `state_dict` also checks every tensor of every file by its checksum."""
    for args, values in ((("a.weight", (2,), 7, []), [0.9023483395576477, 0.8449257612228394]),
                         (("a.bias", (2,), 7, []), [0.042814407497644424, 0.06405556201934814]),
                         (("a.conv.weight", (1, 2, 1, 1), 7, [["conv", "fan", 0.5]]),
                          [-0.6039614677429199, 0.27426961064338684]),
                         (("pad", (1, 2), 7, [["pad", "std", 0.05]]), [0.05140344798564911, 0.0018698463682085276])):
        assert rule.tensor(*args).flatten().tolist() == values
    for name in ("vae_small", "unet_small", "unet_1235_rule", "summarizer_small"):
        state_dict(name)


def test_vae():
    """catches: eps 1e-6 -> 1e-5; padding (0,1,0,1) -> (1,0,1,0); q and k swapped; the sign of -2 z.e in the distance;
    .25 and 1 swapped in the loss; decode that forgets to quantise."""
    vae, g = small("vae_small"), golden("vae_small")[0]
    assert not vae.training
    z = vae.encode(g["in/image"])
    assert_golden(z, "vae_small", "encode", SMALL)
    z_q, indices, loss = vae.quantize(g["out/encode"])
    assert indices.dtype == torch.int64 and torch.equal(indices, g["out/indices"])
    assert_golden(z_q, "vae_small", "quantized", SMALL)
    assert abs(float(loss) - float(g["out/quant_loss"])) <= SMALL * max(1, float(g["out/quant_loss"]))
    assert_golden(vae.decode(z), "vae_small", "decode", SMALL)
    assert_golden(vae.decode(z, quantize=False), "vae_small", "decode_no_quant", SMALL)


def test_quantize_gradients():
    """Straight through to z; the legacy weighting: 1 on z, 0.25 on the codes. catches: a detach moved or left out."""
    vae, z = VQVAE(VAEConfig(32, (1, 1, 1), 1, 16)), torch.randn(2, 3, 4, 6, requires_grad=True)
    z_q, indices, loss = vae.quantize(z)
    through = torch.autograd.grad((z_q * 3).sum(), z, retain_graph=True)[0]
    assert torch.equal(through, torch.full_like(z, 3.0))
    codes = vae.codebook.weight.detach()[indices].movedim(-1, 1)                    # (2,3,4,6)
    d_z, d_codes = torch.autograd.grad(loss, [z, vae.codebook.weight])
    assert_close(d_z, 2 * (z - codes) / z.numel(), 1e-6, "gradient on z")
    moved = torch.zeros_like(d_codes).index_add_(0, indices.flatten(), (codes - z).movedim(1, -1).flatten(0, 2))
    assert_close(d_codes, 0.25 * 2 * moved.detach() / z.numel(), 1e-6, "gradient on the codes")


@pytest.mark.parametrize("name", ["unet_small", "unet_1235_rule"])
def test_unet(name):
    """catches: cos and sin swapped; 1e-5 <-> 1e-6 in a norm's eps (by a factor of about 2); value and gate swapped;
    tanh GELU; [skip, h] for [h, skip]; an up-sampling before instead of after the transformer; features off by one."""
    unet, g = small(name), golden(name)[0]
    args = g["in/x"], g["in/t"], g["in/context"]
    assert_golden(unet(*args), name, "eps", SMALL)
    assert_golden(unet.features(*args, "middle"), name, "middle_block", SMALL)
    assert_golden(unet.features(*args, 3), name, "output_blocks_3", SMALL)


def test_unet_cached_context():
    """Keys and values computed once give the same numbers. catches: caches in another order than the layers."""
    unet, g = small("unet_1235_rule"), golden("unet_1235_rule")[0]
    z, t, c = g["in/x"], g["in/t"], g["in/context"]
    kv = unet.cache_context(c)
    for when in (t, torch.full_like(t, 500)):
        assert torch.equal(unet(z, when, kv), unet(z, when, c))
    assert torch.equal(unet.features(z, t, kv, 3), unet.features(z, t, c, 3))
    with pytest.raises(ValueError, match="width 63"):
        unet.cache_context(c[..., :63])


@pytest.mark.parametrize("grid", ["1x1", "2x2", "4x4", "8x8", "2x3"])
def test_summarizer(grid):
    """catches: start 32 - n//2 off by one; column-major tokens; the scale token last; a norm's eps; tanh GELU."""
    g = golden("summarizer_small")[0]
    tokens, mask = pack(g[f"in/feat_{grid}"])
    c = small("summarizer_small")(tokens, mask, g[f"in/mag_{grid}"])
    assert_golden(c, "summarizer_small", f"tokens_{grid}", SMALL)


def test_summarizer_does_not_see_empty_slots():
    """catches: a mask that is ignored, or inverted."""
    g = golden("summarizer_small")[0]
    tokens, mask = pack(g["in/feat_4x4"])
    junk = torch.where(mask[..., None], tokens, torch.full_like(tokens, 1e3))
    s, net = g["in/mag_4x4"], small("summarizer_small")
    assert torch.equal(net(tokens, mask, s), net(junk, mask, s))


def test_summarizer_batch_of_different_grids():
    """One batch may mix grids. catches: placement shared over a batch."""
    g, net = golden("summarizer_small")[0], small("summarizer_small")
    grids = ["1x1", "2x2", "4x4", "8x8"]
    packed = [pack(g[f"in/feat_{k}"][:1]) for k in grids]
    s = torch.cat([g[f"in/mag_{k}"][:1] for k in grids])
    c = net(torch.cat([p[0] for p in packed]), torch.cat([p[1] for p in packed]), s)
    assert_close(c, torch.cat([g[f"out/tokens_{k}"][:1] for k in grids]), SMALL)


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


# ----- 2. Other sizes -----

def turned(state):
    """The same network for transposed images: every convolution kernel transposed."""
    return {k: v.transpose(2, 3).contiguous() if v.ndim == 4 else v for k, v in state.items()}


@pytest.mark.parametrize("size", [(64, 32), (20, 28), (4, 12)])
def test_vae_any_multiple_of_4(size):
    """A non-square image: net(x) transposed equals the transposed net on x transposed. catches: height and width
    swapped in the attention's reshape, or in the padding (0,1,0,1) -> (0,2,0,0)."""
    vae, state = small("vae_small"), state_dict("vae_small")
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = vae.encode(x)
    assert z.shape == (1, 3, size[0] // 4, size[1] // 4)
    rec = vae.decode(z)
    assert rec.shape == x.shape
    other = VQVAE.from_official(turned(state))
    assert_close(other.encode(x.mT.contiguous()).mT, z, SMALL, "encode")
    assert_close(other.decode(z.mT.contiguous(), quantize=False).mT, vae.decode(z, quantize=False), SMALL, "decode")
    assert torch.equal(other.quantize(z.mT)[1].mT, vae.quantize(z)[1])


def test_unet_non_square():
    """catches: height and width swapped where tokens become an image again."""
    unet, g = small("unet_1235_rule"), golden("unet_1235_rule")[0]
    z = torch.randn(2, 3, 8, 24, generator=torch.Generator().manual_seed(0))
    args = g["in/t"], g["in/context"]
    eps = unet(z, *args)
    assert eps.shape == z.shape
    assert unet.features(z, *args, "middle").shape == (2, 160, 1, 3)
    other = UNet.from_official(turned(state_dict("unet_1235_rule")))
    assert_close(other(z.mT.contiguous(), *args).mT, eps, SMALL)


def test_unusable_sizes():
    vae, unet, g = small("vae_small"), small("unet_1235_rule"), golden("unet_1235_rule")[0]
    with pytest.raises(ValueError, match="multiples of 4"):
        vae.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="multiples of 8"):
        unet(torch.zeros(2, 3, 12, 16), g["in/t"], g["in/context"])
    with pytest.raises(ValueError, match="no U-Net block"):
        unet.features(g["in/x"], g["in/t"], g["in/context"], 12)
    for shape in ((4, 3, 3), (4, 16, 16), (4, 2, 4), (4,), (4, 16)):
        with pytest.raises(ValueError, match="1, 2, 4 or 8"):
            pack_grid(torch.zeros(shape))
    with pytest.raises(ValueError, match="65"):
        small("summarizer_small")(torch.zeros(1, 64, 65), torch.ones(1, 64, dtype=torch.bool), torch.zeros(1).long())


# ----- 3. Numbers, full size -----

@pytest.mark.slow
@torch.no_grad()
def test_full_vae():
    vae, g = VQVAE.from_official(state_dict("full_vae_rule")), golden("full_vae_rule")[0]
    assert sum(p.numel() for p in vae.parameters()) == 55_322_782
    z = vae.encode(g["in/image"])
    assert_golden(z, "full_vae_rule", "encode", FULL)
    z_q, indices, _ = vae.quantize(g["out/encode"])
    pixels, codes = g["out/encode"].movedim(1, -1).double(), vae.codebook.weight.double()
    distance, published = ((pixels - codes[i]).square().sum(-1) for i in (indices, g["out/indices"]))
    assert ((distance - published)[indices != g["out/indices"]].abs() < 1e-6).all(), "another code, and not a tie"
    assert (indices == g["out/indices"]).float().mean() > 0.999
    assert_golden(vae.decode(g["out/quantized"]), "full_vae_rule", "decode", FULL)  # quantising twice changes nothing
    assert_golden(vae.decode(z, quantize=False), "full_vae_rule", "decode_no_quant", FULL)


@pytest.mark.slow
@torch.no_grad()
def test_full_summarizer():
    net, g = Summarizer.from_official(state_dict("full_summarizer_rule")), golden("full_summarizer_rule")[0]
    assert sum(p.numel() for p in net.parameters()) == 38_656_000
    for grid in ("1x1", "2x2", "4x4", "8x8"):
        tokens, mask = pack(g[f"in/feat_{grid}"])
        assert_golden(net(tokens, mask, g[f"in/mag_{grid}"]), "full_summarizer_rule", f"tokens_{grid}", FULL)


@pytest.mark.slow
@torch.no_grad()
def test_full_unet():
    """About 4 GB of memory."""
    unet, g = UNet.from_official(state_dict("full_unet_rule")), golden("full_unet_rule")[0]
    assert sum(p.numel() for p in unet.parameters()) == 400_920_579
    found, args = {}, (g["in/x"], g["in/t"], g["in/context"])
    for name, block in (("middle", unet.middle[1]), (3, unet.up[3])):
        block.register_forward_hook(lambda m, args, h, name=name: found.__setitem__(name, h))
    assert_golden(unet(*args), "full_unet_rule", "eps", FULL)
    assert_golden(found["middle"], "full_unet_rule", "middle_block", FULL)
    assert_golden(found[3], "full_unet_rule", "output_blocks_3", FULL)
    del unet
    gc.collect()


# ----- 4. Key names -----

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


def meta_checkpoint():
    """The whole published BRCA checkpoint, 1750 keys, without memory behind it."""
    return {k: torch.empty(shape, device="meta")
            for part in ("unet", "ema", "first_stage", "cond_stage", "buffers") for k, shape in manifest(part).items()}


def test_whole_manifest():
    """catches: a schedule buffer or EMA counter taken for an unknown key."""
    state = meta_checkpoint()
    assert len(state) == 1750
    with torch.device("meta"):
        model = ZoomLDM.from_official(state)
    assert sum(p.numel() for p in model.parameters()) == 400_920_579 + 55_322_782 + 38_656_000
    assert set(model.ignored) == set(manifest("buffers")) <= BOOKKEEPING


# ----- 5. Whole checkpoints -----

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


def assert_is_checkpoint(model):
    """The EMA U-Net, the raw Summarizer, the VAE, by their goldens."""
    u, v, s = (golden(n)[0] for n in ("unet_small", "vae_small", "summarizer_small"))
    assert_golden(model.unet(u["in/x"], u["in/t"], u["in/context"]), "unet_small", "eps", SMALL)
    assert_golden(model.encode(v["in/image"]), "vae_small", "encode", SMALL)
    assert_golden(model.decode(v["out/encode"]), "vae_small", "decode", SMALL)
    tokens, mask = pack(s["in/feat_4x4"])
    assert_golden(model.summarizer(tokens, mask, s["in/mag_4x4"]), "summarizer_small", "tokens_4x4", SMALL)
    assert model.latent_scale == 1.0 and model.pred == "eps" and model.schedule.kind == "scaled_linear"
    assert not model.training


@pytest.mark.parametrize("form", ["dict", "wrapped", "ckpt", "bare.pt", "safetensors", "run"])
def test_whole_checkpoint(form, tmp_path):
    """catches: the raw U-Net instead of the averaged one (every weight is half)."""
    state = source = checkpoint()
    if form == "wrapped":
        source = {"state_dict": state}
    elif form == "safetensors":
        save_tensors(source := tmp_path / "weights.safetensors", state)
    elif form in ("ckpt", "bare.pt"):
        source = tmp_path / f"weights.{form}"
        extra = {"state_dict": state, "global_step": 3, "epoch": 0} if form == "ckpt" else state
        torch.save(extra, source)
    model = ZoomLDM.from_official(str(source) if form == "ckpt" else source)
    assert set(model.ignored) == set(manifest("buffers"))
    if form == "run":
        model.save(tmp_path / "run")
        model = ZoomLDM.from_run(tmp_path / "run")
    assert_is_checkpoint(model)


def test_from_run_keeps_everything(tmp_path):
    """catches: a latent scale, prediction or note that is not written."""
    one = ZoomLDM.from_official(checkpoint())
    two = ZoomLDM(one.vae, one.summarizer, one.unet, latent_scale=0.37, pred="x0", schedule="cosine",
                  info={"encoder": "stats", "std": [1.0, 2.5]})
    two.save(tmp_path)
    three = ZoomLDM.from_run(str(tmp_path))
    assert three.config() == two.config() and three.latent_scale == 0.37
    ours = three.state_dict()
    assert ours.keys() == two.state_dict().keys() and all(torch.equal(v, ours[k]) for k, v in two.state_dict().items())
    z = torch.randn(1, 3, 4, 4)
    assert_close(three.decode(z, quantize=False), one.decode(z / 0.37, quantize=False), 1e-6)
    x = torch.rand(1, 3, 16, 16)
    assert_close(three.encode(x), one.encode(x) * 0.37, 1e-6)


# ----- 6. What does not fit is refused, by name -----

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
    ("summarizer_small", "pad_token"), ("summarizer_small", "mag_embedding.weight"),
    ("summarizer_small", "encoder.layers.encoder_layer_1.mlp.3.weight")])
def test_module_keys(name, key, how):
    """Each key that is missing, unknown or of a wrong shape is named. catches: strict=False."""
    state, named = broken({"pre." + k: v for k, v in state_dict(name).items()}, "pre." + key, how)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")) as err:
        KIND[name.split("_")[0]].from_official(state, "pre.")
    assert how in str(err.value)


@pytest.mark.parametrize("how", ["missing", "unexpected", "of another shape"])
@pytest.mark.parametrize("key", ["model_ema.diffusion_modelout2bias", "model.diffusion_model.out.2.bias",
                                 "first_stage_model.quant_conv.weight", "cond_stage_model.layer_norm.bias"])
def test_whole_checkpoint_keys(key, how):
    """catches: keys outside the four prefixes, or raw keys that have an average, going unchecked."""
    state, named = broken(checkpoint(), key, how)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")) as err:
        ZoomLDM.from_official(state)
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


def test_unsafe_or_damaged_checkpoint(tmp_path):
    """A pickle that would run code is refused unread; a file cut short is named. catches: weights_only=False."""
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()
    torch.save({"state_dict": {"a": Bomb()}}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match="could run code"):
        ZoomLDM.from_official(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "ran").exists()
    for suffix in ("ckpt", "safetensors"):
        path = tmp_path / f"whole.{suffix}"
        state = {"a": torch.zeros(1000)}
        torch.save(state, path) if suffix == "ckpt" else save_tensors(path, state)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(ValueError, match="cut"):
            ZoomLDM.from_official(cut)


def test_standalone_vae_file():
    """A vq-f4 file of its own also holds the networks of its training loss, which are ignored."""
    state = state_dict("vae_small") | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(2)}
    assert torch.equal(VQVAE.from_official(state).codebook.weight, state["quantize.embedding.weight"])


def test_loading_copies():
    """Writing into a loaded module leaves the state dict alone, and nothing of it is shared between modules."""
    state = state_dict("summarizer_small")
    net = Summarizer.from_official(state)
    with torch.no_grad():
        net.pad.zero_()
    assert state["pad_token"].abs().sum() > 0
