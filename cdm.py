"""Conditions from nothing: models that invent what a reference image would otherwise have to supply.

    python cdm.py train out/toy                    # CDM: summarizer tokens (Z §3.1). --model=edm: the workshop's kind
    python cdm.py sample out/toy --scale=3         # patches at one scale, or all, with no image behind them
    python cdm.py train out/toy --model=grid       # p(k x k embeddings of a region | caption, or nothing) (L §3.3)
    python sample_joint.py out/toy --condition=grid --size=512 --context=3     # a large image with no image behind it
    torchrun --standalone --nproc_per_node=2 cdm.py train RUN published        # DiT-B, as published

The CDM makes tokens, which serve one patch. A large image needs an embedding for every tile: that is the grid model.

in:  a run folder, and the data it was trained on   out: RUN/cdm.safetensors (edm, grid), RUN/cdm/*.png
read next: sample_joint.py
"""
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from common import (
    UserError,
    atomic,
    cli,
    common_count,
    common_size,
    configure,
    generator,
    load_official,
    load_state_dict,
    load_tensors,
    newest_state,
    save_grid,
    save_tensors,
    setup,
    to_uint8,
)
from data import PatchDataset, open_data
from diffusion import Schedule, ZoomLDM, ddim_sample, diffusion_loss
from train import LoopConfig, OptimConfig, check_loop, fingerprint, run_stage
from unet import time_embedding

KINDS = {"cdm": ("cosine", "adaln", 4.0), "edm": ("linear", "tokens", 1.0),  # schedule, DiT.cond, and how far times
         "grid": ("cosine", "adaln", 16.0)}                                  # `lean`; W's schedule does by itself


@dataclass
class DiTConfig:
    tokens: int = 65       # N
    channels: int = 512    # C, width of one token
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072        # hidden width of the MLPs
    scales: int = 8        # labels; 0 = no scale is told
    vector: int = 0        # V, width of a conditioning vector; 0 = none
    cond: str = "adaln"    # how time, scale and vector come in: "adaln" (Z), or as more "tokens" (W)
    plane: bool = False    # the tokens are a square grid: places in two dimensions instead of one
    variance: bool = True  # C more output channels, which the published file has and sampling does not use


# ----- 1. The network -----

def place_table(n, width, plane=False):
    """Fixed sines and cosines of the places of n tokens, (1,n,width): [sin | cos] at 10000^(-j / (width/2)); on a
    plane, half the channels for the row and half for the column. reference: official CDM, first kind."""
    if plane:
        side = round(n ** 0.5)
        line = place_table(side, width // 2)[0]                                              # (side,width/2)
        return torch.cat([line[:, None].expand(-1, side, -1), line.expand(side, -1, -1)], 2).flatten(0, 1)[None]
    freq = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(n, dtype=torch.float64)[:, None] * freq                             # (n,width/2)
    return torch.cat([angle.sin(), angle.cos()], 1).float()[None]


class Block(nn.Module):
    """Transformer block whose norms are shifted and scaled, and whose branches are gated, by the condition c (B,W):
    adaLN-zero. Without c it is a plain pre-norm block with norms of its own."""

    def __init__(self, width, heads, mlp, adaln):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not adaln)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not adaln)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)
        self.modulation = nn.Linear(width, 6 * width) if adaln else None

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)      # (B,heads,N,W/heads) each
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B,N,W)

    def mlp(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))                             # official: tanh GELU

    def forward(self, x, c=None):
        if self.modulation is None:
            x = x + self.attend(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, 2)  # (B,1,W) each
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """The network of all conditioning models.

    in:  x (B,N,C); t (B,) time indices; s (B,) scales, if it was built with them; v (B,V) vectors, and known (B,) bool,
    False where the learned null stands in for v. out: x0_hat (B,N,C).
    source: Z S8.1; W; reference: official DiT. Sizes that W leaves open follow Z: the same width, depth and heads.
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        if min(cfg.tokens, cfg.channels, cfg.width, cfg.depth, cfg.heads, cfg.mlp) < 1:
            raise UserError(f"DiT of width {cfg.width}, depth {cfg.depth}, {cfg.heads} heads, mlp {cfg.mlp}, over "
                            f"{cfg.tokens} tokens of {cfg.channels}: each is at least 1")
        if cfg.cond not in ("adaln", "tokens") or cfg.width % cfg.heads or cfg.width % (4 if cfg.plane else 2):
            raise UserError(f"DiT width {cfg.width}, {cfg.heads} heads, cond={cfg.cond!r}: the width is a multiple of "
                            f"the heads and of 4, cond is adaln or tokens")
        if cfg.plane and round(cfg.tokens ** 0.5) ** 2 != cfg.tokens:
            raise UserError(f"DiT with plane=True over {cfg.tokens} tokens: they must fill a square")
        self.cfg, adaln, outputs = cfg, cfg.cond == "adaln", cfg.channels * (2 if cfg.variance else 1)
        self.embed = nn.Linear(cfg.channels, cfg.width)
        self.register_buffer("pos", place_table(cfg.tokens, cfg.width, cfg.plane))
        self.time1, self.time2 = nn.Linear(256, cfg.width), nn.Linear(cfg.width, cfg.width)
        self.scale = nn.Embedding(cfg.scales, cfg.width) if cfg.scales else None
        if cfg.vector:
            self.vector1, self.vector2 = nn.Linear(cfg.vector, cfg.width), nn.Linear(cfg.width, cfg.width)
            self.null = nn.Parameter(torch.randn(cfg.width) * 0.02)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.mlp, adaln) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6, elementwise_affine=not adaln)
        self.modulation = nn.Linear(cfg.width, 2 * cfg.width) if adaln else None
        self.head = nn.Linear(cfg.width, outputs)
        self.start()

    @torch.no_grad()
    def start(self):
        """Initial weights. source: DiT §3.2: every block starts as the identity, the network as zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
        for layer in (self.time1, self.time2):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.head, self.modulation, *(block.modulation for block in self.blocks)):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(self, x, t, s=None, v=None, known=None):
        cfg = self.cfg
        if x.shape[1:] != (cfg.tokens, cfg.channels):
            raise UserError(f"got tokens of shape {tuple(x.shape)}, this DiT takes (B,{cfg.tokens},{cfg.channels}): it "
                            f"was made for another Summarizer or grid")
        if cfg.scales and (s is None or s.device.type == "cpu" and not 0 <= s.min() <= s.max() < cfg.scales):
            raise UserError(f"got s={s}: this DiT takes scales 0 to {cfg.scales - 1}")       # elsewhere it would wait
        if v is not None and v.shape[1:] != (cfg.vector or None,):
            raise UserError(f"got vectors of shape {tuple(v.shape)}, this DiT takes "
                            f"{f'(B,{cfg.vector})' if cfg.vector else 'none'}")
        told = [self.time2(F.silu(self.time1(time_embedding(t, 256).to(x.dtype))))]          # each (B,W)
        if self.scale is not None:
            told.append(self.scale(s))
        if cfg.vector:
            null = self.null.expand(len(x), -1)
            given = null if v is None else self.vector2(F.silu(self.vector1(v)))
            told.append(given if known is None else torch.where(known[:, None], given, null))
        h = self.embed(x) + self.pos                                                         # (B,N,W)
        c, extra = sum(told), len(told)
        if cfg.cond == "tokens":
            h, c = torch.cat([torch.stack(told, 1), h], 1), None                             # (B,extra+N,W)
        for block in self.blocks:
            h = block(h, c)
        h = self.norm(h)
        if c is None:
            return self.head(h[:, extra:])[..., :cfg.channels]
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, 2)                       # (B,1,W) each
        return self.head(h * (1 + scale) + shift)[..., :cfg.channels]                        # without the variance

    @staticmethod
    def official_name(name):
        """Our parameter name -> the published one."""
        if name.startswith("blocks."):
            for ours, theirs in (("qkv", "attn.qkv"), ("out", "attn.proj"), ("fc", "mlp.fc"),
                                 ("modulation", "adaLN_modulation.1")):
                name = name.replace(f".{ours}", f".{theirs}")
            return name
        head, _, tail = name.partition(".")
        return {"embed": "x_embedder", "pos": "pos_embed", "time1": "t_embedder.mlp.0", "time2": "t_embedder.mlp.2",
                "scale": "y_embedder.embedding_table", "modulation": "final_layer.adaLN_modulation.1",
                "head": "final_layer.linear"}[head] + ("." + tail if tail else "")

    @classmethod
    def from_official(cls, state, prefix="", heads=None):
        """Build from a published state dict, sizes inferred, in eval mode. A whole checkpoint is taken too: its "ema"
        weights, which the published sampling uses. heads: None = width / 64, as all published sizes have.

        raises: ValueError listing missing, unexpected and mis-shaped keys.
        """
        if not prefix and isinstance(state.get("ema"), dict):
            state = state["ema"]

        def size(dim, *names):
            return common_size(state, dim, *(prefix + n for n in names))
        width, depth = size(0, "x_embedder.weight", "x_embedder.bias"), common_count(state, prefix + "blocks.")
        if not width or not depth:
            raise UserError(f"no published DiT under prefix {prefix!r}: missing {prefix}x_embedder.weight")
        channels = size(1, "x_embedder.weight")
        outputs = size(0, "final_layer.linear.weight", "final_layer.linear.bias") or 2 * (channels or 512)
        if outputs not in (channels, 2 * (channels or 0)):  # one of both is damaged: suppose it is not the last
            channels = outputs // 2
        with torch.device("meta"):
            model = cls(DiTConfig(size(1, "pos_embed") or 65, channels, width, depth,
                                  heads or max(width // 64, 1), size(0, "blocks.0.mlp.fc1.weight") or 4 * width,
                                  size(0, "y_embedder.embedding_table.weight") or 8,
                                  variance=outputs != channels))
        load_official(model, state, prefix, cls.official_name)
        return model.eval()


# ----- 2. A conditioning model -----

def lean(u, shift):
    """A share u in [0,1] of the way from data to noise -> one nearer to noise: shift u / (1 + (shift - 1) u), 1 = as it
    is. Many tokens that say the same thing together drown in noise late: 64 cells agree on what a region shows down to
    a signal that hides any one of them, so that on an even schedule nearly all of it is decided in the last tenth.
    source: the shift that Stable Diffusion 3 (§5.3.2) makes for larger images."""
    return shift * u / (1 + (shift - 1) * u)


def respaced(T, steps, shift=1.0):
    """`steps` indices from 0 to T-1, evenly spaced before they `lean`, and rounded, as the published CDM (shift 1) is
    sampled; those that fall together are one. reference.md §6."""
    if not 2 <= steps <= T:
        raise UserError(f"steps={steps} of a schedule of {T}: give 2 to {T}")
    return sorted({round(lean(i / (steps - 1), shift) * (T - 1)) for i in range(steps)})


class Conditioner(nn.Module):
    """A DiT that predicts x0, with its noise schedule and the scaling of its tokens.

    mean, std (C,): tokens are modelled as (x - mean) / std; 0 and 1 for summarizer tokens, as published. v_mean, v_std
    (V,): the same for vectors, whose numbers may be as small as text encoders make them. says (V,C): what of a region's
    mean token can be told from its vector by a linear map; 0 = nothing is known of that. info: plain
    types: what it was trained for (fingerprint of the Summarizer, encoder and deviations, encoder of the captions), and
    shift, how far its times `lean` to noise.
    """

    def __init__(self, kind, cfg: DiTConfig, info=None):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"model={kind!r}: known are {', '.join(KINDS)}")
        self.kind, self.net, self.schedule, self.info = kind, DiT(cfg), Schedule(KINDS[kind][0]), info or {}
        self.shift = self.info.get("shift", 1.0)
        self.register_buffer("mean", torch.zeros(cfg.channels))
        self.register_buffer("std", torch.ones(cfg.channels))
        self.register_buffer("v_mean", torch.zeros(cfg.vector))
        self.register_buffer("v_std", torch.ones(cfg.vector))
        if cfg.vector:
            self.register_buffer("says", torch.zeros(cfg.vector, cfg.channels))

    @torch.no_grad()
    def tokens(self, s, seed=0, steps=50, first=0):
        """Draw summarizer tokens for scales s (n,): c (n,65,D). Row i starts from noise of (seed, first + i) alone.
        source: Z §3.1, S8.1: DDIM, no guidance."""
        cfg, device = self.net.cfg, self.mean.device
        if self.kind == "grid":
            raise UserError("the grid model draws embeddings, not tokens: take --model=cdm or edm")
        wrong = [str(int(k)) for k in s if not 0 <= k < cfg.scales]
        if wrong or not len(s):
            raise UserError(f"scale {', '.join(wrong) or '(none given)'}: this {self.kind} knows 0 to {cfg.scales - 1}")
        z = torch.stack([torch.randn(cfg.tokens, cfg.channels, generator=generator(seed, 11, first + i))
                         for i in range(len(s))]).to(device)
        s = torch.as_tensor(s, device=device)
        z = ddim_sample(lambda z, t: self.net(z, t, s).float(), z, self.schedule, pred="x0", end="clean",
                        timesteps=respaced(self.schedule.T, steps, self.shift))
        return z * self.std + self.mean

    @torch.no_grad()
    def grid(self, rows, columns, v=None, guidance=2.0, seed=0, steps=50, spread=0.0):
        """Draw the embeddings of a region of rows x columns tiles: e (E,rows,columns), as data.py stores them (times
        the model's deviations). Grids larger than the ones it learnt are drawn in overlapping windows. v (V,): what the
        region shows, None = anything; guidance: x0_null + guidance (x0_v - x0_null). spread: how far chance decides how
        much there is of what, over the head of v. At 0 no noise common to all tiles stays, and the estimates' mean is
        moved to what v `says` at every step; chance only arranges. source: L §3.3; spread is ours."""
        from sample_joint import Canvas
        cfg, device = self.net.cfg, self.mean.device
        if self.kind != "grid":
            raise UserError(f"the {self.kind} draws tokens, not embeddings: take --model=grid")
        if v is not None and (not cfg.vector or v.shape != (cfg.vector,)):
            raise UserError(f"got a vector of shape {tuple(v.shape)}, this grid model takes "
                            f"{f'({cfg.vector},)' if cfg.vector else 'none: it was trained without --captions'}")
        v = v if v is None else (v.to(device) - self.v_mean) / self.v_std
        says = None if v is None or not self.says.any() else (v.to(self.says) @ self.says)[:, None, None]    # (E,1,1)
        k = round(cfg.tokens ** 0.5)
        canvas = Canvas(max(rows, k), max(columns, k), k, k // 2 if max(rows, columns) > k else 0, fade=True)
        z = torch.randn(1, cfg.channels, canvas.h, canvas.w, generator=generator(seed, 12)).to(device)
        z = z if v is None else z - (1 - spread) * z.mean((2, 3), keepdim=True)

        def x0(z, t):
            def windows(ij):
                x = canvas.cut(z, ij).flatten(2).mT                                          # (n,k*k,E)
                n, null = len(x), torch.zeros(len(x), dtype=torch.bool, device=device)
                if v is None:
                    out = self.net(x, t.expand(n), known=null if cfg.vector else None)
                else:
                    both = self.net(torch.cat([x, x]), t.expand(2 * n), v=v.to(x).expand(2 * n, -1),
                                    known=torch.cat([null, ~null]))
                    out = both[:n] + guidance * (both[n:] - both[:n])
                return out.float().mT.unflatten(2, (k, k))                                   # (n,E,k,k)
            return canvas.average(windows)

        def told(z, t):
            x = canvas.whole(x0(canvas.own(z), t))                                           # (1,E,rows,columns)
            return x if says is None else x + (1 - spread) * (says - x.mean((2, 3), keepdim=True))
        z = ddim_sample(told, z, self.schedule, pred="x0", end="clean",
                        timesteps=respaced(self.schedule.T, steps, self.shift))
        e = z * self.std[:, None, None] + self.mean[:, None, None]
        return e[0, :, :rows, :columns].cpu()

    def save(self, path):
        save_tensors(path, self.state_dict(), {"kind": self.kind, "dit": asdict(self.net.cfg), "info": self.info})


def load(run, kind, model):
    """The conditioning model of a run, for its ZoomLDM, in eval mode. raises: UserError if it is missing, foreign, or
    made for another Summarizer or encoder."""
    path = Path(run if Path(run).is_dir() else Path(run).parent) / f"{kind}.safetensors"
    if not path.exists():
        raise UserError(f"no {kind} at {path}: train one with python cdm.py train {run} --model={kind}")
    state, meta = load_tensors(path)
    try:
        made = Conditioner(meta["kind"], DiTConfig(**meta["dit"]), meta["info"])
        if made.net.cfg.vector:
            state.setdefault("says", made.says)  # files from before it was kept
        made.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as err:
        raise UserError(f"{path} does not hold a conditioning model of ours ({str(err).splitlines()[0]})") from err
    fits(made, model, path)
    return made.to(next(model.parameters()).device).eval().requires_grad_(False)


def from_official(source, model=None, heads=None):
    """The published CDM from its file or state dict: EMA weights, cosine schedule. raises: ValueError if keys do not
    fit, or its tokens are not those of `model`."""
    net = DiT.from_official(source if isinstance(source, dict) else load_state_dict(source), heads=heads)
    with torch.device("meta"):
        made = Conditioner("cdm", net.cfg)
    made.net, made.mean, made.std = net, torch.zeros(net.cfg.channels), torch.ones(net.cfg.channels)
    made.v_mean, made.v_std = torch.zeros(0), torch.ones(0)
    if model is not None:
        fits(made, model, "the published file")
    return made.eval().requires_grad_(False)


def vector_of(made, caption="", file=""):
    """What a grid model is told: the vector (V,) of a caption, or of a file with v (V,); None without either."""
    from text import captions
    if not caption and not file:
        return None
    text = made.info.get("text")
    if text is None:
        raise UserError("this grid model was trained without captions: train it with --captions and --vectors, or "
                        "leave --caption and --vector out")
    if caption:
        if text != captions.ENCODER:
            raise UserError(f"--caption needs a grid model trained with vectors of {captions.ENCODER!r}, this one was "
                            f"with those of {text!r}: make the vector with that encoder and give --vector=FILE")
        return captions.encode_texts([caption])[0]
    v = load_tensors(file)[0].get("v")
    if v is None or v.shape not in ((made.net.cfg.vector,), (1, made.net.cfg.vector)) or not v.isfinite().all():
        raise UserError(f"--vector={file} holds v {None if v is None else tuple(v.shape)}, this grid model takes "
                        f"({made.net.cfg.vector},), all of them finite")
    return v.flatten().float()


def fits(made, model, path):
    """raises: UserError if a conditioning model was made for another model than this one."""
    cfg, info = made.net.cfg, made.info
    width = model.summarizer.cfg.embed_dim if made.kind == "grid" else model.summarizer.cfg.width
    if cfg.channels != width:
        raise UserError(f"{path} makes {cfg.channels} numbers per token, the run takes {width}: train one for this run")
    if made.kind != "grid" and info.get("summarizer") not in (None, fingerprint(model.summarizer)):
        raise UserError(f"{path} was trained on the tokens of another Summarizer: train it again, with "
                        f"python cdm.py train RUN --model={made.kind}, after moving the old one away, and "
                        f"{made.kind}_state*.safetensors")
    if made.kind == "grid" and (info["encoder"], info["std"]) != (model.info["encoder"], model.info["std"]):
        raise UserError(f"{path} makes embeddings of {info['encoder']!r}, the run takes those of "
                        f"{model.info['encoder']!r} with its own deviations: train it again for this run, "
                        f"after moving the old one away, and {made.kind}_state*.safetensors")


@dataclass
class Config:
    run: str = ""              # run folder whose Summarizer, and data, this is for
    preset: str = "toy"        # sizes and rates: toy, smoke, published
    model: str = "cdm"         # cdm (Z), edm (W), grid (L)
    data: str = ""             # data folder; default: the one the run was trained on
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 autocast where the device has bf16 arithmetic
    dit: DiTConfig = field(default_factory=DiTConfig)  # tokens, channels, scales and vector come from run and data
    side: int = 8              # grid: k, tiles a side of the regions it learns
    captions: str = ""         # grid: a captions.tsv (image, caption); empty = unconditional
    vectors: str = ""          # grid: the captions' vectors (python captions.py embed)
    drop: float = 0.15         # grid: share of regions trained without their caption, for guidance
    gap: float = 0.0           # grid: variance of noise on (standardised) vectors; 0.1 bridges modalities (L §3.3)
    shift: float = 0.0         # how far times lean to noise, where tokens that agree are decided; 1 = not (published),
    #                            0 = 4 for the cdm, 16 for the grid, 1 for the edm
    steps: int = 1500
    batch: int = 32            # global batch, divided over ranks
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, weight_decay=0.0))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=50))
    sheet: int = 8             # patches per scale on the contact sheets drawn on the way; 0 = no sheets
    made_for: str = ""         # set by train: the Summarizer, or encoder and deviations, that it learns the tokens of


@dataclass
class SampleConfig:
    run: str = ""              # run folder
    model: str = "cdm"         # cdm or edm
    scale: int = -1            # -1 = all
    n: int = 8                 # patches per scale
    steps: int = 50            # of the patches; their conditions take 50
    guidance: float = 2.0      # of the patches; the CDM has none
    seed: int = 0
    out: str = ""              # folder for the patches; default RUN/MODEL
    data: str = ""             # data folder; default: the one the run was trained on
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 autocast where the device has bf16 arithmetic


TOY = {"dit.width": 192, "dit.depth": 4, "dit.heads": 4, "dit.mlp": 768, "dit.variance": False}


PRESETS = {
    "toy": TOY,
    "smoke": TOY | {"dit.width": 32, "dit.mlp": 64, "dit.depth": 2, "steps": 20, "batch": 8, "side": 4, "log_every": 5,
                    "sample_every": 20, "save_every": 10, "amp": False},
    "published": {"steps": 500_000, "batch": 256, "lr": 1e-4, "warmup": 0, "decay": "constant", "clip": 0.0,
                  "shift": 1.0, "ema": 0.9999, "betas": (0.9, 0.999), "log_every": 100, "sample_every": 10_000,
                  "save_every": 5000, "workers": 4, "side": 16},
}


# ----- 1. Training -----

class Regions(Dataset):
    """k x k blocks of embeddings at random places of the slides, or of the regions that captions describe.

    Item n is a pure function of (seed, n). in: captions, [Caption] with slide and block, and their vectors (n,V); drop:
    share of the items whose caption is left out. out: tokens (k*k,E), v (V,) and known: False without a caption.
    raises: UserError if no slide holds such a block, or a caption describes less than one.
    """

    def __init__(self, pyramids, k, seed, split="train", described=(), vectors=None, drop=0.0):
        self.pyramids, self.k, self.seed, self.described, self.vectors, self.drop = (pyramids, k, seed, described,
                                                                                     vectors, drop)
        self.slides = [(i, (0, 0, *(n // pyramids.patch for n in x["size"]))) for i, x in enumerate(pyramids.slides)
                       if x["split"] == split and min(x["size"]) >= k * pyramids.patch]
        small = [c.image for c in described if min(c.block[2:]) < k]
        if not self.slides or small:
            raise UserError(f"{small[0] if small else f'every {split!r} image of {pyramids.folder}'} has fewer than "
                            f"{k} x {k} tiles: lower --side")

    def __len__(self):
        return 1 << 40

    def __getitem__(self, n):
        rng, v, known = random.Random(f"{self.seed} {n}"), torch.zeros(0), False
        if self.vectors is None or rng.random() < self.drop:
            i, block = rng.choice(self.slides)
            v = v if self.vectors is None else torch.zeros(self.vectors.shape[1])
        else:
            at, known = rng.randrange(len(self.described)), True
            i, block, v = self.described[at].slide, self.described[at].block, self.vectors[at]
        row, column = (a + rng.randint(0, size - self.k) for a, size in zip(block[:2], block[2:]))
        e = self.pyramids.tensor(i, "e")[row:row + self.k, column:column + self.k].float()   # (k,k,E)
        e = e if self.pyramids.rescale is None else e * self.pyramids.rescale
        return {"tokens": e.flatten(0, 1), "v": v, "known": torch.tensor(known)}


class ConditionStage(nn.Module):
    """Squared error of x0, on tokens that the frozen Summarizer makes, or on blocks of embeddings (Z S8.1; L §3.3).
    deviates: no variance term; it never reaches the samples."""

    def __init__(self, cfg, made, summarizer):
        super().__init__()
        self.net, self.schedule, self.cfg = made.net, made.schedule, cfg
        for name, _ in made.named_buffers(recurse=False):
            self.register_buffer(name, getattr(made, name))
        self.frozen, self.scales = [summarizer], max(made.net.cfg.scales, 1)  # in a list: not ours to train or save

    def noise(self, step):
        g, n, cfg = generator(self.cfg.seed, 4, step), self.cfg.batch, self.net.cfg
        t = (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n
        t = (lean(t, self.cfg.shift) * self.schedule.T).long()
        return {"t": t.clamp_max(self.schedule.T - 1), "eps": torch.randn(n, cfg.tokens, cfg.channels, generator=g),
                "shift": torch.randn(n, cfg.vector, generator=g) * self.cfg.gap ** 0.5}

    def forward(self, batch):
        if self.cfg.model == "grid":
            x = (batch["tokens"] - self.mean) / self.std                                     # (B,k*k,E)
            s = torch.zeros(len(x), dtype=torch.long, device=x.device)
            v = (batch["v"] - self.v_mean) / self.v_std + batch["shift"]
            more = {"v": v, "known": batch["known"]} if self.net.cfg.vector else {}
        else:
            s, more = batch["s"], {}
            with torch.no_grad():
                x = self.frozen[0](batch["tokens"], batch["mask"], s).float()                # (B,65,D)
        loss, eps = diffusion_loss(lambda z, t: self.net(z, t, s, **more), x, batch["t"], batch["eps"], self.schedule,
                                   "x0")
        return loss.mean(), {"loss": loss.detach(), "x0": loss.detach(), "s": s, "t": batch["t"]}

    def after_step(self, step, ranks):
        pass

    def report(self):
        return {}


def spoken(v, described, pyramids, made, damp=1e-3):
    """(V,E): a ridge regression from the vectors v (n,V) of captions to the mean embedding, standardised, of the region
    each describes. A denoiser learns that late, as most of what it needs can be seen in what is noisy."""
    means = {}
    for c in described:
        if (c.slide, c.block) not in means:
            row, column, height, width = c.block
            e = pyramids.tensor(c.slide, "e")[row:row + height, column:column + width].float().mean((0, 1))   # (E,)
            e = e if pyramids.rescale is None else e * pyramids.rescale
            means[c.slide, c.block] = (e - made.mean) / made.std
    aim, v = torch.stack([means[c.slide, c.block] for c in described]).double(), v.double()  # (n,E), (n,V)
    return torch.linalg.solve(v.mT @ v + damp * len(v) * torch.eye(v.shape[1]).double(), v.mT @ aim).float()


def make(cfg, model, pyramids):
    """An untrained Conditioner of the sizes that run and data ask for, and the data set it learns from."""
    from text import captions
    _, cfg.dit.cond, lean_by = KINDS[cfg.model]
    cfg.shift = cfg.shift or lean_by
    if cfg.model == "grid" and pyramids.official:
        raise UserError(f"--model=grid learns from whole images, {pyramids.folder} holds single samples: give --data=")
    if cfg.model != "grid":
        if cfg.captions or cfg.vectors:
            raise UserError("--captions and --vectors are for --model=grid: give it too, or leave them out")
        dataset = PatchDataset(pyramids, "train", cfg.seed, ())
        device, first = next(model.parameters()).device, dataset[0]
        with torch.no_grad():
            c = model.summarizer(*(torch.as_tensor(first[k], device=device)[None] for k in ("tokens", "mask", "s")))
        cfg.dit.tokens, cfg.dit.channels, cfg.dit.scales = *c.shape[1:], model.summarizer.cfg.scales
        info = {"summarizer": fingerprint(model.summarizer), "shift": cfg.shift}
        return Conditioner(cfg.model, cfg.dit, info), dataset
    cfg.dit.tokens, cfg.dit.channels, cfg.dit.scales, cfg.dit.plane = cfg.side ** 2, pyramids.embed_dim, 0, True
    info, described, vectors = {"encoder": pyramids.encoder, "std": pyramids.std, "shift": cfg.shift}, [], None
    if bool(cfg.captions) != bool(cfg.vectors):
        raise UserError(f"--captions={cfg.captions} --vectors={cfg.vectors}: give both, or neither (python captions.py "
                        f"embed {cfg.captions or 'captions.tsv'} makes the vectors)")
    if cfg.captions:
        described = captions.read_captions(cfg.captions, pyramids)
        vectors, info["text"] = captions.load_vectors(cfg.vectors, [c.text for c in described])
        cfg.dit.vector = vectors.shape[1]
    dataset = Regions(pyramids, cfg.side, cfg.seed, "train", described, vectors, cfg.drop)
    made, few = Conditioner("grid", cfg.dit, info), Regions(pyramids, cfg.side, cfg.seed + 1)
    e = torch.cat([few[n]["tokens"] for n in range(256)])                                    # (N,E)
    made.mean.copy_(e.mean(0))
    made.std.copy_(e.std(0).clamp_min(1e-6))
    if vectors is not None:
        made.v_mean.copy_(vectors.mean(0))
        made.v_std.copy_(vectors.std(0).clamp_min(1e-6))
        made.says.copy_(spoken((vectors - made.v_mean) / made.v_std, described, pyramids, made))
    return made, dataset


def same_source(cfg, path, info):
    """Note in cfg what the tokens are made by. raises: UserError if there is a state to go on from that learnt those of
    another. One from before this was noted is taken for what the model at `path`, its export, says."""
    def source(info):
        return json.dumps({k: v for k, v in info.items() if k != "shift"})
    cfg.made_for = source(info)
    if (found := newest_state(path.with_name(f"{cfg.model}_state.safetensors"))) is None:
        return
    then = found[2].get("settings", {}).get("made_for")
    if then is None and path.exists():
        then = source(load_tensors(path)[1].get("info", {}))
    if then != cfg.made_for:
        raise UserError(f"{found[0]} learnt from another Summarizer or encoder than this run has, or does not say from "
                        f"which: move {cfg.model}_state*.safetensors and {path.name} away to train anew")


def train(cfg):
    """Train one conditioning model, or go on with it."""
    cfg.out, ranks = cfg.run, setup(cfg.device, cfg.amp, cfg.threads)
    model, pyramids = open_run(cfg, ranks)
    torch.manual_seed(cfg.seed + 2)
    made, dataset = make(cfg, model, pyramids)
    made, path = made.to(ranks.device), Path(cfg.run) / f"{cfg.model}.safetensors"
    if ranks.rank == 0:
        print(f"{cfg.model}: {sum(p.numel() for p in made.parameters()):,} parameters, {ranks.world} rank(s) on "
              f"{ranks.device}, writing {path}")
    same_source(cfg, path, made.info)
    stage, exported = ConditionStage(cfg, made, model.summarizer), []
    final = Conditioner(cfg.model, cfg.dit, made.info).to(ranks.device).eval()

    def export(step, ema):
        final.load_state_dict(ema)
        final.save(path)
        exported.append(step)
        if cfg.model != "grid" and cfg.sheet:
            show(final, model, pyramids, SampleConfig(steps=20, n=cfg.sheet), ranks, range(pyramids.scales),
                 sheet=Path(cfg.run) / "samples" / f"{cfg.model}_{step:06d}.png")
    done, ema = run_stage(f"{cfg.model}_", cfg, ranks, stage, dataset, cfg.steps, cfg.batch, cfg.optim.lr,
                          cfg.optim.ema, export)
    if ranks.rank == 0:
        if not exported:  # stopped after the last step: what is there is older
            export(done, ema)
        print(f"done: {path}")


# ----- 2. Patches from nothing -----

def open_run(cfg, ranks):
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    data = cfg.data or model.info.get("data", "")
    return model, open_data(data, std=model.info.get("std"))


def show(made, model, pyramids, cfg, ranks, scales, folder=None, sheet=None):
    """Draw cfg.n patches a scale from invented tokens: single PNGs in a folder, and a contact sheet, a row a scale."""
    from sample_joint import draw
    rows, side = [], pyramids.patch // model.vae.factor
    for s in tqdm(scales, desc="scales", disable=len(scales) < 2):
        c = made.tokens([s] * cfg.n, cfg.seed)
        rows.append(draw(model, c, side, ranks, cfg.guidance, cfg.steps, cfg.seed))
        for i, image in enumerate(to_uint8(rows[-1]).numpy() if folder else ()):
            with atomic(folder / f"scale{s}_{i:03d}.png") as tmp:
                Image.fromarray(image).save(tmp, "PNG")
    save_grid(sheet or folder / "sheet.png", rows, [f"scale {s}" for s in scales])


def sample(cfg):
    """Patches at one scale, or all, without any image behind them."""
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model, pyramids = open_run(cfg, ranks)
    made, out = load(cfg.run, cfg.model, model), Path(cfg.out or Path(cfg.run) / cfg.model)
    if cfg.n < 1 or not -1 <= cfg.scale < pyramids.scales:
        raise UserError(f"--n={cfg.n} --scale={cfg.scale}: n is at least 1, the run knows scales 0 to "
                        f"{pyramids.scales - 1} (-1 = all)")
    scales = range(pyramids.scales) if cfg.scale < 0 else [cfg.scale]
    show(made, model, pyramids, cfg, ranks, scales, out)
    print(f"wrote {out}: {len(scales)} scales x {cfg.n} patches, and sheet.png")


def main(argv):
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if not command:
        return table()
    if command in ("--help", "-h"):
        return print(__doc__ + "\nsettings: python cdm.py train --help, python cdm.py sample --help")
    if command not in ("train", "sample"):
        raise UserError(f"got {command!r}: write python cdm.py train RUN, or python cdm.py sample RUN")
    cfg = (configure(Config, rest, PRESETS, ("run", "preset"), __doc__) if command == "train" else
           configure(SampleConfig, rest, words=("run",), doc=__doc__))
    if not cfg.run or cfg.model not in KINDS or command == "sample" and cfg.model == "grid":
        raise UserError(f"python cdm.py {command} {cfg.run} --model={cfg.model}: give a run folder, and a model of "
                        f"{', '.join(KINDS)} (grid is sampled by sample_joint.py)")
    for name, least, most in (("steps", 1, None), ("batch", 1, None), ("side", 1, None),
                              ("seed", 0, None), ("gap", 0, None), ("drop", 0, 1), ("shift", 0, None),
                              ("sheet", 0, None)):
        value = getattr(cfg, name, least)
        if value < least or most is not None and value > most:
            raise UserError(f"--{name}={value}: it must be at least {least}" + (f", at most {most}" if most else ""))
    if command == "train":
        check_loop(cfg)
    (train if command == "train" else sample)(cfg)


def table():
    """Sizes, and a tiny draw."""
    for kind, cfg in (("cdm", DiTConfig()), ("edm", DiTConfig(cond="tokens", variance=False)),
                      ("grid", DiTConfig(256, 1024, scales=0, vector=384, plane=True, variance=False))):
        with torch.device("meta"):
            count = sum(p.numel() for p in Conditioner(kind, cfg).parameters())
        print(f"{kind:<6}{cfg.tokens} tokens x {cfg.channels:<6}{count:>14,} parameters, {KINDS[kind][0]} schedule")
    tiny = Conditioner("grid", DiTConfig(16, 8, 32, 2, 4, 64, 0, plane=True)).eval()
    e = tiny.grid(6, 6, steps=4)
    print(f"\ntiny draw on the CPU: a grid of 6 x 6 tiles in windows of 4 x 4 -> e {tuple(e.shape)}")


if __name__ == "__main__":
    cli(main)
