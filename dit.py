"""DiT: a transformer that denoises a set of tokens, told time, scale and, if there is one, a vector (Z §3.1, S8.1).

All conditioning models are this one network with a noise schedule around it: the CDM over 65 summarizer tokens, the
workshop's EDM over the same tokens with time and scale as two more, and the model of the k x k embeddings of a region.

in:  x (B,N,C) noised tokens, t (B,), s (B,) scale, v (B,V)   out: the estimate of the clean tokens (B,N,C)
run: python dit.py     read next: cdm.py
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import captions
from canvas import Canvas
from common import UserError, cli, common_count, common_size, generator, load_official, load_state_dict, load_tensors
from common import save_tensors, summary
from diffusion import Schedule, ddim_sample
from train import fingerprint
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


def main(argv):
    with torch.device("meta"):
        summary(DiT(DiTConfig()), torch.randn(2, 65, 512), torch.zeros(2, dtype=torch.long),
                torch.zeros(2, dtype=torch.long), depth=1)
    print("(the published file also counts the fixed places, 65 x 768)")
    tiny = DiT(DiTConfig(65, 64, 64, 2, 4, 128, 5, cond="tokens"))
    x0_hat = tiny(torch.randn(1, 65, 64), torch.tensor([9]), torch.tensor([2]))
    print(f"\ntiny forward on the CPU, time and scale as tokens: {tuple(x0_hat.shape)}")


if __name__ == "__main__":
    cli(main)
