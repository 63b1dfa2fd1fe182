"""Published weights: which of our parameters has which published key name, and what sizes a state dict shows.

Sizes are read off single tensors. Every key is then held against the model: one that is missing, unknown or of another
shape is named.
in:  a state dict, published name -> tensor, below a prefix   out: our model in eval mode, on the state dict's device
"""
from functools import partial

import torch

from common import UserError
from diffusion import ZoomLDM
from slides.weights import check_official, count_of, has, load_official, load_state_dict, named, place, \
    renamed, size_of
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

VAE, SUMMARIZER, UNET = "first_stage_model.", "cond_stage_model.", "model.diffusion_model."  # in a whole checkpoint

def build(kind, config):
    """A model without memory behind it: `load_official` gives it some, once the keys fit."""
    with torch.device("meta"):
        return kind(config)

# ----- 1. VQ-VAE -----

VAE_NAMES = (("to_latent", "quant_conv"), ("from_latent", "post_quant_conv"), ("codebook", "quantize.embedding"),
             (".mid.0.", ".mid.block_1."), (".mid.1.out.", ".mid.attn_1.proj_out."), (".mid.1.", ".mid.attn_1."),
             (".mid.2.", ".mid.block_2."), ("encoder.levels.", "encoder.down."), ("decoder.levels.", "decoder.up."),
             (".blocks.", ".block."), (".skip.", ".nin_shortcut."), (".down.conv", ".downsample.conv"),
             (".up.conv", ".upsample.conv"))

vae_name = partial(renamed, pairs=VAE_NAMES)

def load_vae(state, prefix=""):
    """VQVAE.from_official. A vq-f4 file of its own also holds the networks of its training loss, `loss.*`."""
    state, prefix = place(state, prefix, "encoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")
    levels = prefix + "encoder.down."
    width = size_of(state, prefix + "encoder.conv_in.bias", 0, 128, multiple=32)
    mult = []
    for i in range(count_of(state, levels)):
        mult.append(size_of(state, f"{levels}{i}.block.0.conv1.bias", 0, width, multiple=width) // width)
    codes = size_of(state, prefix + "quantize.embedding.weight", 0, 8192)
    channels = size_of(state, prefix + "quant_conv.bias", 0, 3)
    blocks = count_of(state, levels + "0.block.")
    vae = build(VQVAE, VAEConfig(width, tuple(mult) or (1,), blocks, codes, channels))
    return load_official(vae, state, prefix, vae_name, ignore=("loss.",)).eval()

# ----- 2. Summarizer -----

LAYER = "encoder.layers.encoder_layer_"
SUMMARIZER_NAMES = (("embed.", "dim_reduce."), ("pad", "pad_token"), ("scale.", "mag_embedding."),
                    ("pos", "encoder.pos_embedding"), ("norm.", "encoder.ln."), ("proj.", "final_proj."),
                    ("norm_out.", "layer_norm."), ("blocks.", LAYER), ("norm1", "ln_1"), ("norm2", "ln_2"),
                    (".qkv.", ".self_attention.in_proj_"), (".out.", ".self_attention.out_proj."),
                    ("fc1", "mlp.0"), ("fc2", "mlp.3"))
summarizer_name = partial(renamed, pairs=SUMMARIZER_NAMES)

def load_summarizer(state, prefix=""):
    """Summarizer.from_official."""
    state, prefix = place(state, prefix, "dim_reduce.weight", "mag_embedding.weight", "final_proj.weight")
    width = size_of(state, prefix + "final_proj.bias", 0, 512, multiple=8)
    embed = size_of(state, prefix + "dim_reduce.weight", 1, 1024)
    depth = count_of(state, prefix + LAYER)
    mlp = size_of(state, f"{prefix}{LAYER}0.mlp.0.bias", 0, 2048)
    scales = size_of(state, prefix + "mag_embedding.weight", 0, 8)
    net = build(Summarizer, SummarizerConfig(embed, width, depth, mlp, scales))
    return load_official(net, state, prefix, summarizer_name).eval()

# ----- 3. U-Net -----

UNET_ANCHORS = "input_blocks.0.0.weight", "time_embed.0.weight", "middle_block.0.out_layers.3.weight", "out.2.weight"
OUTER_NAMES = {"time1": "time_embed.0", "time2": "time_embed.2", "norm_out": "out.0", "conv_out": "out.2"}
DEEP = "transformer_blocks.0."
INNER_NAMES = {  # what is not listed, norm, proj_in and proj_out of a transformer, keeps its name
    "res": {"norm1": "in_layers.0", "conv1": "in_layers.2", "emb": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "skip": "skip_connection"},
    "attn": {"norm1": DEEP + "norm1", "norm2": DEEP + "norm2", "norm3": DEEP + "norm3",
             "self_attn.q": DEEP + "attn1.to_q", "self_attn.k": DEEP + "attn1.to_k",
             "self_attn.v": DEEP + "attn1.to_v", "self_attn.out": DEEP + "attn1.to_out.0",
             "cross.q": DEEP + "attn2.to_q", "cross.k": DEEP + "attn2.to_k",
             "cross.v": DEEP + "attn2.to_v", "cross.out": DEEP + "attn2.to_out.0",
             "ff1": DEEP + "ff.net.0.proj", "ff2": DEEP + "ff.net.2"}}

def unet_name(unet, name):
    """Our parameter name -> the published one. Ours have the form down.4.attn.cross.q.weight."""
    layer, _, tail = name.rpartition(".")
    if layer in OUTER_NAMES:
        return f"{OUTER_NAMES[layer]}.{tail}"
    way, i, inner = layer.split(".", 2)
    kind, _, part = inner.partition(".")
    if way == "down" and i == "0":
        return f"input_blocks.0.0.{tail}"
    slot = {"res": 0, "attn": 1, "conv": 0}[kind]                       # place in the published block
    if way == "middle":
        slot += 2 * int(i)                                              # one block there holds res, attn, res
    if way == "up" and kind == "conv":
        slot = 1 if unet.up[int(i)].attn is None else 2
    block = {"down": f"input_blocks.{i}", "middle": "middle_block", "up": f"output_blocks.{i}"}[way]
    if kind == "conv":
        part = {"down": "op", "up": "conv"}[way]
    else:
        part = INNER_NAMES[kind].get(part, part)
    return f"{block}.{slot}.{part}.{tail}"

def empty_unet(state, prefix=""):
    """A U-Net of the published sizes, without memory behind it."""
    start = f"{prefix}input_blocks."
    levels = [[]]                                                       # the residual blocks of each
    for i in range(1, count_of(state, start)):
        if has(state, f"{start}{i}.0.op."):                             # a convolution that halves ends the level
            levels.append([])
        else:
            levels[-1].append(f"{start}{i}.")
    if not all(levels):
        raise UserError(f"no published U-Net under prefix {prefix!r}: missing {start}1.*")
    width = size_of(state, start + "0.0.bias", 0, 192, multiple=32)
    mult, attention = [], []
    for level, blocks in enumerate(levels):
        mult.append(size_of(state, blocks[0] + "0.in_layers.2.bias", 0, width, multiple=width) // width)
        if has(state, blocks[0] + "1."):
            attention.append(2 ** level)
    context = size_of(state, prefix + "middle_block.1." + DEEP + "attn2.to_k.weight", 1, 512)
    channels = size_of(state, prefix + "out.2.bias", 0, 3)
    return build(UNet, UNetConfig(width, tuple(mult), len(levels[0]), tuple(attention), context, channels))

def load_unet(state, prefix=""):
    """UNet.from_official. One head, which weights do not show."""
    state, prefix = place(state, prefix, *UNET_ANCHORS)
    unet = empty_unet(state, prefix)
    return load_official(unet, state, prefix, partial(unet_name, unet)).eval()

def start_unet(unet, state):
    """Weights to start training `unet` from: a published latent diffusion model's, such as cin256-v2.ckpt.
    in:  a whole checkpoint's state dict, of which the raw U-Net counts, as in the papers; or the U-Net's alone
    out: {our name: tensor}; the keys of the class embedder, which has no place here and is dropped
    raises: ValueError listing missing, unexpected and mis-shaped keys."""
    state, prefix = place(state, "", *UNET_ANCHORS)
    dropped = [k for k in state if SUMMARIZER in k or k.startswith(prefix + "label_emb.")]
    state = {k: v for k, v in state.items() if k not in dropped}
    names = check_official(unet, state, prefix, partial(unet_name, unet))
    if unet.cfg.heads != 1 or unet.cfg.groups != 32:
        raise UserError("published weights were trained with --unet.heads=1 and --unet.groups=32: give these")
    return {ours: state[k] for ours, k in names.items()}, dropped

# ----- 4. A whole checkpoint -----

# keys that hold no weights: the schedule, recomputed here in float64, and EMA counters
BOOKKEEPING = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
               "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
               "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
               "lvlb_weights", "logvar", "model_ema.decay", "model_ema.num_updates"}

def load_whole(source):
    """ZoomLDM.from_official. in: a path (.ckpt, .pt: tensors only; .safetensors) or a state dict, bare or under
    "state_dict". out: the model; its `ignored` lists keys without weights. official: only the U-Net was averaged. A
    file without any average gives the U-Net as it is; a `scale_factor` is what it multiplied latents by."""
    with named(source):
        state = source if isinstance(source, dict) else load_state_dict(source)
        state, prefix = place(state, "", UNET + UNET_ANCHORS[0], VAE + "quant_conv.weight", SUMMARIZER + "pad_token")
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        kept = {k: v for k, v in state.items() if k not in BOOKKEEPING}
        scale = kept.pop("scale_factor", torch.ones((), device="cpu"))
        other = [k for k in kept if not k.startswith((VAE, SUMMARIZER, UNET, "model_ema."))]
        if scale.numel() != 1 or not 0 < scale.item() < torch.inf:
            raise UserError(f"its scale_factor, what latents are multiplied by, is {scale.tolist()}")
        if other:
            raise UserError(f"no whole published ZoomLDM checkpoint: {len(other)} unexpected: {', '.join(other[:8])}")
        unet = empty_unet(kept, UNET)
        check_official(unet, kept, UNET, partial(unet_name, unet))      # also where the average is used
        averaged = has(kept, "model_ema.")
        load_official(unet, kept, *(("model_ema.", partial(averaged_name, unet)) if averaged else
                                    (UNET, partial(unet_name, unet))))
        model = ZoomLDM(load_vae(kept, VAE), load_summarizer(kept, SUMMARIZER), unet, scale.item())
        said, ours = state.get("alphas_cumprod"), model.schedule.alpha_bar
        told = said is not None and not said.is_meta and said.any()
        if told and (said.shape != ours.shape or (said.cpu() - ours).abs().max() > 1e-4):
            raise UserError("it was trained with another schedule (alphas_cumprod) than the published models")
    model.ignored = sorted(BOOKKEEPING & state.keys())
    return model.eval().requires_grad_(False)

def averaged_name(unet, name):
    """Our name of a U-Net's parameter -> the key of its average: the name within `model.`, all dots removed."""
    return f"diffusion_model.{unet_name(unet, name)}".replace(".", "")

# ----- 5. The CDM -----

DIT_NAMES = (("embed", "x_embedder"), ("pos", "pos_embed"), ("time1", "t_embedder.mlp.0"),
             ("time2", "t_embedder.mlp.2"), ("scale", "y_embedder.embedding_table"), ("head", "final_layer.linear"),
             ("modulation", "final_layer.adaLN_modulation.1"), (".final_layer.ada", ".ada"),  # a block has its own
             (".qkv", ".attn.qkv"), (".out", ".attn.proj"), (".fc", ".mlp.fc"))
dit_name = partial(renamed, pairs=DIT_NAMES)

def load_dit(state, prefix="", heads=None):
    """DiT.from_official. Of a whole checkpoint the "ema" weights count, which the published sampling uses."""
    from cdm import DiT, DiTConfig  # here, for it brings the training along
    state, prefix = place(state, prefix, "x_embedder.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight")
    width = size_of(state, prefix + "x_embedder.weight", 0, size_of(state, prefix + "x_embedder.bias", 0, 768))
    outputs = size_of(state, prefix + "final_layer.linear.bias", 0,
                      size_of(state, prefix + "final_layer.linear.weight", 0, 1024))
    variance = outputs != size_of(state, prefix + "x_embedder.weight", 1, outputs // 2)
    sizes = DiTConfig(tokens=size_of(state, prefix + "pos_embed", 1, 65), width=width,
                      depth=count_of(state, prefix + "blocks."), heads=heads or max(width // 64, 1),
                      channels=outputs // 2 if variance else outputs, variance=variance,
                      mlp=size_of(state, prefix + "blocks.0.mlp.fc1.weight", 0, 4 * width),
                      scales=size_of(state, prefix + "y_embedder.embedding_table.weight", 0, 8))
    return load_official(build(DiT, sizes), state, prefix, dit_name).eval()

def load_cdm(source, model=None, heads=None):
    """The published CDM from its file or state dict, to draw tokens with. raises: ValueError if keys do not fit, or its
    tokens are not as wide as those of `model`."""
    from cdm import Conditioner, DiT
    state = source if isinstance(source, dict) else load_state_dict(source)
    with named(source):
        made = Conditioner(DiT.from_official(state, heads=heads))
    if model is not None:
        made.check_fit(model, "the published file")
    return made.eval().requires_grad_(False)
