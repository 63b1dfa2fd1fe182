"""What one GPU does with the published sizes, in at most eight minutes. Random weights: no run, no data.

    python -m experiments.gpu                        # a card with 80 GB; less: --batch=24
    python -m experiments.gpu --device=cpu --tiny    # the same lines in sizes that say nothing of speed, to try it

Networks against the CPU, and against those of `diffusers` with the same weights; a training step of `brca`; guided
patches; large images as `sample_joint.py --size` draws them by default. diffusers runs where it is installed.

in:  nothing   out: lines for docs/speed.md     read next: bench.py
"""
import time
from dataclasses import dataclass
from functools import partial

import torch

from common import UserError, at_least, cli, configure, setup
from diffusion import ZoomLDM
from experiments.bench import NOT_KEPT, Diffusers, machine, matmul, race, seconds_of, training_step
from experiments.cost import training_flops
from large.command import Settings, draw_large, enough_memory, pixels
from large.proxy import Proxy
from large.windows import Grid
from sample_joint import Config as PatchConfig
from sample_joint import full_precision
from slides.keys import UNET, VAE, unet_name, vae_name
from summarizer import SLOTS, Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

@dataclass
class Config:
    device: str = "cuda"
    tiny: bool = False          # small networks for patches of 32 pixels; sizes, too, are an eighth
    batch: int = 70             # of the training step; published: 70 on each of six cards
    patches: int = 64
    steps: int = 10             # of these, by sample_joint.py's sampler
    size: tuple = (1024, 4096)  # pixels of large images, powers of two
    rounds: int = 5             # medians over so many, of the training step
    minutes: float = 8.0        # what begins later is left out
    threads: int = 0

TINY = (UNetConfig(32, (1, 2), 1, (2,), 64, groups=8), VAEConfig(16, codes=64, groups=8),
        SummarizerConfig(64, 64, 1, 64))

# ----- 1. Do all compute the same? -----

def made(cfg):
    """A model with random weights on the CPU; what begins as zero, too, does something."""
    torch.manual_seed(0)
    unet, vae, told = TINY if cfg.tiny else (UNetConfig(), VAEConfig(), SummarizerConfig())
    model = ZoomLDM(VQVAE(vae), Summarizer(told), UNet(unet), info={"patch": 32 if cfg.tiny else 256})
    for weights in model.parameters():
        if not weights.any():
            torch.nn.init.normal_(weights, std=0.02)
    return model.eval().requires_grad_(False)

def their_unet(unet):
    """diffusers' U-Net with our weights, by way of the published names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    theirs = Diffusers(unet.cfg)
    state = {UNET + unet_name(unet, name): value for name, value in unet.state_dict().items()}
    theirs.net.load_state_dict(convert_ldm_unet_checkpoint(state, config=theirs.net.config))
    return theirs.eval().requires_grad_(False)

def their_vae(vae):
    """diffusers' VQModel with our weights."""
    from diffusers import VQModel
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    cfg = vae.cfg
    theirs = VQModel(
        latent_channels=cfg.channels, num_vq_embeddings=cfg.codes, layers_per_block=cfg.res_blocks,
        block_out_channels=[cfg.width * m for m in cfg.mult], norm_num_groups=cfg.groups, vq_embed_dim=cfg.channels,
        down_block_types=["DownEncoderBlock2D"] * len(cfg.mult), up_block_types=["UpDecoderBlock2D"] * len(cfg.mult))
    state = {VAE + vae_name(name): value for name, value in vae.state_dict().items()}
    state = convert_ldm_vae_checkpoint(state, config=theirs.config)
    theirs.load_state_dict(state | {"quantize.embedding.weight": vae.codebook.weight})
    return theirs.eval().requires_grad_(False)

def parity(cfg, ranks, model):
    """Relative differences from float32 on the CPU: here in float32 and bf16, and of diffusers in float32."""
    side, told = model.info["patch"] // 4, model.summarizer.cfg
    z, t, c = torch.randn(2, 3, side, side), torch.tensor([100, 900]), torch.randn(2, 65, told.width)
    tokens, mask = torch.randn(2, SLOTS, told.embed_dim), torch.ones(2, SLOTS, dtype=torch.bool)
    decode = partial(model.vae.decode, quantize=False)
    calls = {"U-Net": (model.unet, (z, t, c)), "encoder": (model.vae.encode, (z.repeat(1, 1, 4, 4).clamp(-1, 1),)),
             "decoder": (decode, (z,)), "Summarizer": (model.summarizer, (tokens, mask, t.clamp_max(1)))}
    rivals, why = {}, ""
    try:
        net, theirs = their_unet(model.unet).to(ranks.device), their_vae(model.vae).to(ranks.device)
        rivals = {"U-Net": net, "encoder": lambda x: theirs.encode(x).latents,
                  "decoder": lambda z: theirs.decode(z, force_not_quantize=True).sample}
    except (ImportError, UserError) as err:
        why = f" ({err})"
    yield f"relative difference from float32 on the CPU{why}\n{'':>12}{'float32':>12}{'bf16':>12}{'diffusers':>12}"
    exact = {name: net(*inputs) for name, (net, inputs) in calls.items()}
    model.to(ranks.device)
    for name, (net, inputs) in calls.items():
        inputs = [x.to(ranks.device) for x in inputs]
        with full_precision(inputs[0]):
            found = [f(*inputs) for f in (net, rivals.get(name)) if f]
        with torch.autocast(ranks.device.type, torch.bfloat16):
            found.insert(1, net(*inputs))
        apart = [float((x.float().cpu() - exact[name]).norm() / exact[name].norm()) for x in found]
        yield f"{name:>12}" + "".join(f"{x:>12.1e}" for x in apart)

# ----- 2. How fast is it? -----

def gigabytes(ranks):
    """The most memory of the device in use since the last call."""
    if ranks.device.type != "cuda":
        return "memory not measured"
    most = torch.cuda.max_memory_allocated() / 2 ** 30
    torch.cuda.reset_peak_memory_stats()
    return f"{most:.1f} GB"

def training(cfg, ranks, model):
    """A step of `brca` on one card: forward, backward, AdamW, EMA; ours compiled, and with diffusers' U-Net."""
    unet, told, side = model.unet.cfg, model.summarizer.cfg, model.info["patch"] // 4
    work = cfg.batch * training_flops(unet, side, told)
    peak = matmul(ranks, not cfg.tiny, "bf16", torch.bfloat16)
    best = peak[1] / race([peak], 20, ranks.device)[peak[0]][0]
    yield f"{peak[0]}: {best / 1e12:.4g} TFLOP/s"
    ways = {"ours": (False, UNet), "ours, compiled": (True, UNet), "diffusers": (False, Diffusers)}
    for name, (compiled, build) in ways.items():
        try:
            gigabytes(ranks)
            with enough_memory():
                step = training_step(unet, told, side, cfg.batch, ranks, compiled, build)
                seconds, first = race([(name, work, step)], cfg.rounds, ranks.device)[name]
            yield (f"training step, {name}, {cfg.batch} images: {seconds:.4g} s (the first {first:.0f} s), "
                   f"{cfg.batch / seconds:.4g} images/s, {work / seconds / best:.1%} of that, {gigabytes(ranks)}")
        except UserError as err:
            yield f"training step, {name}: {err}"

def patches(cfg, ranks, model):
    """Guided patches with the settings of sample_joint.py; then with diffusers' U-Net in the place of ours."""
    usual, side = PatchConfig(), model.info["patch"] // 4
    c = torch.randn(cfg.patches, 65, model.summarizer.cfg.width, device=ranks.device)
    how = dict(guidance=usual.guidance, steps=cfg.steps, sampler=usual.sampler, batch=usual.batch)

    def draw():
        with ranks.autocast():
            model.draw(c, side, **how)
    for name, build in (("ours", UNet), ("diffusers", Diffusers)):
        try:
            model.unet = build(model.unet.cfg).to(ranks.device).eval().requires_grad_(False)
            first, seconds = (seconds_of(draw, ranks.device) for _ in range(2))
            yield f"{cfg.patches} guided patches, {how}, {name}: {seconds:.4g} s, {gigabytes(ranks)}"
        except UserError as err:
            yield f"guided patches, {name}: {err}"
    model.unet = UNet(model.unet.cfg).to(ranks.device).eval().requires_grad_(False)

def large(cfg, ranks, model):
    """Large images as by default, with a context whose patch shows all, and their pixels."""
    proxy = Proxy(model.vae.factor).to(ranks.device).eval().requires_grad_(False)
    for size in cfg.size:
        tiles = size // 256
        settle = Settings(size=(model.info["patch"] * tiles,), context=(tiles.bit_length() - 1,))
        grid = Grid(torch.randn(model.summarizer.cfg.embed_dim, tiles, tiles))

        def draw(grid=grid, settle=settle):
            levels, _ = draw_large(model, grid, settle, ranks, proxy)
            return sum(len(strip) for strip in pixels(model, levels[-1].z, ranks))
        yield f"{settle.size[0]} x {settle.size[0]} pixels: {seconds_of(draw, ranks.device):.4g} s, {gigabytes(ranks)}"

PARTS = {"parity": parity, "training": training, "patches": patches, "large": large}

def main(argv):
    cfg = configure(Config, argv, doc=__doc__)
    at_least(cfg, batch=1, patches=1, steps=1, rounds=1, minutes=0)
    if [n for n in cfg.size if type(n) is not int or n < 512 or n & n - 1]:
        raise UserError(f"--size={cfg.size}: give powers of two, at least 512")
    ranks, began = setup(cfg.device, threads=cfg.threads), time.monotonic()
    model = made(cfg)
    print(machine(ranks), flush=True)
    for name, part in PARTS.items():
        if time.monotonic() - began > 60 * cfg.minutes:
            print(f"{name}: left out after {cfg.minutes:g} minutes")
            continue
        print(f"\n# {name}")
        for line in part(cfg, ranks, model):
            print(line, flush=True)

if __name__ == "__main__":
    cli(main, stopped=NOT_KEPT)
