"""Conditions from nothing: DiT, and the CDM, which invents the tokens that a Summarizer makes of an image.

    python cdm.py train out/toy                    # the CDM of a run (Z §3.1, S8.1)
    python cdm.py sample out/toy --scale=3         # patches at one scale, or all, with no image behind them
    torchrun --standalone --nproc_per_node=2 cdm.py train RUN published        # DiT-B, as published
    python cdm.py train out/toy --model=grid       # embeddings for large images, or --model=edm, W's kind

in:  scales s (n,) and noise (n,65,D)   out: tokens c (n,65,D); RUN/cdm.safetensors, RUN/cdm/*.png
read next: sample_joint.py
"""
import copy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch.nn import Embedding, LayerNorm, Linear, Module, ModuleList
from torch.nn.functional import gelu, scaled_dot_product_attention, silu
from torch.nn.init import normal_, xavier_uniform_, zeros_

from common import UserError, at_least, cli, configure, fingerprint, generator, load_tensors, save_tensors
from common import setup, summary
from data import PatchDataset, open_data
from diffusion import Schedule, ZoomLDM, ddim_sample, diffusion_loss
from train import LoopConfig, OptimConfig, check_loop, run_stage
from unet import time_embedding

@dataclass
class DiTConfig:
    tokens: int = 65       # N
    channels: int = 512    # D, width of one token
    width: int = 768       # W
    depth: int = 12        # blocks
    heads: int = 12
    mlp: int = 3072        # hidden width of the MLPs
    scales: int = 8        # labels
    variance: bool = True  # D more output channels, which the published file has and sampling does not use

@dataclass
class Config:
    run: str = ""              # run folder whose Summarizer, and data, this is for
    preset: str = "toy"        # sizes and rates: toy, smoke, published
    model: str = "cdm"         # cdm (Z), edm (W), grid (L), which has more settings: --model=grid --help
    data: str = ""             # data folder; default: the one the run was trained on
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    amp: bool = True           # bf16 autocast where the device has bf16 arithmetic
    dit: DiTConfig = field(default_factory=DiTConfig)  # tokens, channels and scales come from the run
    shift: float = 0.0         # of times toward noise: 1 = none (published), 0 = as usual for this model
    steps: int = 1500
    batch: int = 32            # global batch, divided over ranks
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, weight_decay=0.0))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=50))
    sheet: int = 8             # patches per scale on the contact sheets drawn on the way; 0 = no sheets
    source: str = ""           # set by training: the Summarizer, or encoder, whose tokens it learns

SMALL = {"dit.width": 192, "dit.depth": 4, "dit.heads": 4, "dit.mlp": 768, "dit.variance": False}
PRESETS = {
    "toy": SMALL,
    "smoke": SMALL | {"dit.width": 32, "dit.mlp": 64, "dit.depth": 2, "steps": 20, "batch": 8, "log_every": 5,
                      "sample_every": 20, "save_every": 10, "amp": False},
    "published": {"steps": 500_000, "batch": 256, "lr": 1e-4, "warmup": 0, "decay": "constant", "clip": 0.0,
                  "shift": 1.0, "ema": 0.9999, "betas": (0.9, 0.999), "workers": 4, "log_every": 100,
                  "sample_every": 10_000, "save_every": 5000}}

# ----- 1. The network (Z S8.1; DiT, Peebles & Xie 2023) -----

def place_table(n, width):
    """Fixed sines and cosines of n places: (1,n,width), [sin | cos] at frequencies 10000^(-j / (width/2))."""
    freq = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(n, dtype=torch.float64)[:, None] * freq                         # (n,width/2)
    return torch.cat([angle.sin(), angle.cos()], 1).float()[None]

class DiTBlock(Module):
    """Transformer block; a condition c (B,W) shifts, scales and gates it. source: DiT §3.2, adaLN-zero."""
    def __init__(self, width, heads, mlp):
        super().__init__()
        self.heads = heads
        self.norm1 = LayerNorm(width, eps=1e-6, elementwise_affine=False)                # c has their weights
        self.norm2 = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.fc1 = Linear(width, mlp)
        self.fc2 = Linear(mlp, width)
        self.modulation = Linear(width, 6 * width)

    def attend(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                             # (B,N,3,heads,d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                             # (B,heads,N,d) each
        x = scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))                                    # (B,N,W)

    def mlp(self, x):
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))                           # official: tanh GELU

    def forward(self, x, c):
        six = self.modulation(silu(c))[:, None]                                          # (B,1,6W)
        shift1, scale1, gate1, shift2, scale2, gate2 = six.chunk(6, 2)                   # (B,1,W) each
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

class DiT(Module):
    """The network of the CDM. source: Z S8.1; reference: official DiT.
    in:  x (B,N,D) noised tokens; t (B,) time indices; s (B,) scales. out: x0_hat (B,N,D)."""
    def __init__(self, cfg: DiTConfig):
        super().__init__()
        at_least(cfg, tokens=1, channels=1, width=1, depth=1, heads=1, mlp=1)
        if cfg.width % cfg.heads or cfg.width % 4:
            raise UserError(f"--dit.width={cfg.width}: give a multiple of 4 and of the {cfg.heads} heads")
        self.cfg = cfg
        self.embed = Linear(cfg.channels, cfg.width)
        self.register_buffer("pos", place_table(cfg.tokens, cfg.width))
        self.time1 = Linear(256, cfg.width)
        self.time2 = Linear(cfg.width, cfg.width)
        self.scale = Embedding(cfg.scales, cfg.width)
        self.blocks = ModuleList(DiTBlock(cfg.width, cfg.heads, cfg.mlp) for _ in range(cfg.depth))
        self.norm = LayerNorm(cfg.width, eps=1e-6, elementwise_affine=False)
        self.modulation = Linear(cfg.width, 2 * cfg.width)
        self.head = Linear(cfg.width, cfg.channels * (2 if cfg.variance else 1))
        self.start()

    @torch.no_grad()
    def start(self):
        """Initial weights. source: DiT §3.2: every block starts as the identity, the network as zero."""
        for layer in self.modules():
            if isinstance(layer, Linear):
                xavier_uniform_(layer.weight)
                zeros_(layer.bias)
            elif isinstance(layer, Embedding):
                normal_(layer.weight, std=0.02)
        for layer in (self.time1, self.time2):
            normal_(layer.weight, std=0.02)
        for layer in (self.head, self.modulation, *(block.modulation for block in self.blocks)):
            zeros_(layer.weight)

    def label(self, s):
        return self.scale(s)                                                             # (B,W)

    def forward(self, x, t, s):
        e = time_embedding(t, 256).to(x.dtype)
        c = self.time2(silu(self.time1(e))) + self.label(s)                              # (B,W)
        h = self.embed(x) + self.pos                                                     # (B,N,W)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(silu(c))[:, None].chunk(2, 2)                     # (B,1,W) each
        out = self.head(self.norm(h) * (1 + scale) + shift)                              # (B,N,D or 2D)
        return out[..., :self.cfg.channels]                                              # not the variance

    @classmethod
    def from_official(cls, state_dict, prefix="", heads=None):
        """Build from a published state dict, or the "ema" of a whole checkpoint; in eval mode. heads: None =
        width / 64. raises: ValueError listing missing, unexpected and mis-shaped keys."""
        from slides import keys  # the published names
        return keys.load_dit(state_dict, prefix, heads)

# ----- 2. The CDM (Z §3.1, S8.1) -----

def toward_noise(u, shift):
    """A share u in [0,1] of the way from data to noise -> one nearer to noise; shift 1 leaves it.
    Tokens that agree decide what they show early, where each alone drowns in noise. source: SD 3 §5.3.2."""
    return shift * u / (1 + (shift - 1) * u)

def respaced(T, steps, shift=1.0):
    """At most `steps` indices from 0 to T-1, ascending; evenly spaced with shift 1, as published."""
    if not 2 <= steps <= T:
        raise UserError(f"steps={steps} of a schedule of {T}: give 2 to {T}")
    shares = [toward_noise(i / (steps - 1), shift) for i in range(steps)]
    return sorted({round(share * (T - 1)) for share in shares})

class Conditioner(Module):
    """The CDM: a DiT that predicts x0, and its schedule. As a module it computes its loss, for `run_stage`.
    info: plain types: the fingerprint of the Summarizer whose tokens it learnt; shift, see `toward_noise`.
    cfg, clean: for training, the settings, and a function: batch -> clean tokens (B,65,D), labels s (B,)."""
    kind = "cdm"
    network, sizes = DiT, DiTConfig
    settings, presets = Config, PRESETS
    schedule_kind = "cosine"
    usual_shift = 4.0
    next = "cdm.py sample {}"  # what draws with it

    def __init__(self, net, info=None, cfg=None, clean=None):
        super().__init__()
        self.net, self.info = net, info or {}
        self.cfg, self.clean = cfg, clean
        self.schedule = Schedule(self.schedule_kind)
        self.shift = self.info.get("shift", 1.0)
        self.scales = max(net.cfg.scales, 1)

    @torch.no_grad()
    def tokens(self, s, seed=0, steps=50, first=0):
        """Draw tokens for scales s (n,): c (n,65,D). Row i starts from noise of (seed, first + i) alone.
        raises: ValueError for a scale it does not know. source: Z §3.1, S8.1: DDIM, no guidance."""
        cfg, device = self.net.cfg, self.net.pos.device
        if not len(s) or not 0 <= min(s) <= max(s) < cfg.scales:
            raise UserError(f"got scales {list(s)}: this {self.kind} knows 0 to {cfg.scales - 1}")
        shape = cfg.tokens, cfg.channels
        noise = [torch.randn(shape, generator=generator(seed, 11, first + i)) for i in range(len(s))]
        s = torch.as_tensor(s, device=device)
        times = respaced(self.schedule.T, steps, self.shift)
        return ddim_sample(lambda z_t, t: self.net(z_t, t, s).float(), torch.stack(noise).to(device),
                           self.schedule, pred="x0", end="clean", timesteps=times)

    def noise(self, step):
        """Time indices and noise of the whole global batch: the same for any number of ranks."""
        g = generator(self.cfg.seed, 4, step)
        n, T, sizes = self.cfg.batch, self.schedule.T, self.net.cfg
        u = (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n        # one in each n-th of [0,1]
        t = (toward_noise(u, self.shift) * T).long()
        eps = torch.randn(n, sizes.tokens, sizes.channels, generator=g)
        return {"t": t.clamp_max(T - 1), "eps": eps}

    def forward(self, batch):
        """Squared error of x0_hat. deviates: no variance term; it never reaches the samples."""
        x, s = self.clean(batch)
        t = batch["t"]
        loss, _ = diffusion_loss(lambda z_t, t: self.net(z_t, t, s), x, t, batch["eps"], self.schedule, "x0")
        error = loss.detach()                                                            # (B,)
        return loss.mean(), {"loss": error, "x0": error, "s": batch["s"], "t": t}

    def check_fit(self, model, path):
        """raises: UserError if this makes the tokens of another Summarizer. The published file tells none."""
        made_for, width = self.info.get("summarizer"), model.summarizer.cfg.width
        if made_for not in (None, fingerprint(model.summarizer)) or self.net.cfg.channels != width:
            raise UserError(f"{path} makes tokens of another Summarizer than that of this run ({width} wide): move "
                            f"it and {self.kind}_state*.safetensors away, and train with cdm.py train RUN")

    @classmethod
    def prepare(cls, cfg, model, pyramids):
        """out: an untrained one of the sizes that run and data ask for, and its data set."""
        summarizer, sizes = model.summarizer, cfg.dit
        sizes.tokens, sizes.channels = summarizer.pos.shape[1:]
        sizes.scales = summarizer.cfg.scales

        @torch.no_grad()
        def summarize(batch):
            return summarizer(batch["tokens"], batch["mask"], batch["s"]).float(), batch["s"]
        info = {"summarizer": fingerprint(summarizer), "shift": cfg.shift}
        return cls(cls.network(sizes), info, cfg, summarize), PatchDataset(pyramids, "train", cfg.seed, ())

def kind_of(name):
    """The class behind --model=NAME."""
    if name == "grid":
        from text.grid import GridModel
        return GridModel
    if name == "edm":
        from experiments.edm import EDM
        return EDM
    if name != "cdm":
        raise UserError(f"--model={name}: known are cdm, edm, grid")
    return Conditioner

def load_conditioner(run, kind, model):
    """The conditioning model of a run, in eval mode. raises: UserError if it is missing, foreign, or made for
    another Summarizer or encoder than the ZoomLDM `model` has."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / f"{kind}.safetensors"
    if not path.exists():
        raise UserError(f"no {kind} at {path}: train one with python cdm.py train {run} --model={kind}")
    state, meta = load_tensors(path)
    cls = kind_of(kind)
    try:
        sizes = cls.sizes(**{f.name: meta["dit"][f.name] for f in fields(cls.sizes)})
        made = cls(cls.network(sizes), meta["info"])
        for name in {"mean", "std", "v_mean", "v_std"} - made.state_dict().keys():
            state.pop(name, None)  # in files of earlier versions, of no effect: 0 and 1
        made.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as err:
        raise UserError(f"{path} holds no {kind} of ours ({str(err)[:99]!r}): train one again") from err
    made.check_fit(model, path)
    return made.to(next(model.parameters()).device).eval().requires_grad_(False)

# ----- 3. The command -----

def train_conditioner(cfg):
    """Train one conditioning model, or go on with it."""
    kind = kind_of(cfg.model)
    cfg.out, cfg.shift = cfg.run, cfg.shift or kind.usual_shift
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device)
    pyramids = open_data(cfg.data or model.info.get("data", ""), std=model.info.get("std"))
    torch.manual_seed(cfg.seed + 2)
    made, dataset = kind.prepare(cfg, model, pyramids)
    cfg.source = str(made.info)  # run_stage does not go on with a state of another
    path = Path(cfg.run) / f"{cfg.model}.safetensors"
    if ranks.rank == 0:
        print(f"{cfg.model}: {ranks.world} rank(s) on {ranks.device}, writing {path}")
    averaged = copy.deepcopy(made).to(ranks.device).eval()

    def save(ema):
        averaged.load_state_dict(ema)
        save_tensors(path, ema, {"kind": kind.kind, "dit": asdict(cfg.dit), "info": made.info})

    def export(step, ema):
        save(ema)
        if cfg.sheet:
            from experiments.invented import draw_sheet, scales_of
            png = Path(cfg.run) / "samples" / f"{cfg.model}_{step:06d}.png"
            draw_sheet(averaged, model, ranks, png, scales_of(averaged, model), cfg.sheet, real=pyramids)
    optim, stage = cfg.optim, f"{cfg.model}_"
    _, ema = run_stage(stage, cfg, ranks, made, dataset, cfg.steps, cfg.batch, optim.lr, optim.ema, export)
    if ranks.rank == 0:
        save(ema)  # a training killed after its last step has exported an earlier one
        print(f"done: {path}; next: python {kind.next.format(cfg.run)}")

def main(argv):
    if not argv:  # the sizes as published
        with torch.device("meta"):
            return summary(DiT(DiTConfig()), torch.randn(1, 65, 512), torch.zeros(1), torch.zeros(1).long())
    command, rest = argv[0], argv[1:]
    if command in ("--help", "-h"):
        return print(__doc__ + "\nsettings: python cdm.py train --help, python cdm.py sample --help")
    if command == "sample":
        from experiments.invented import main as sample
        return sample(rest)
    if command != "train":
        raise UserError(f"got {command!r}: write python cdm.py train RUN, or python cdm.py sample RUN")
    models = [a.partition("=")[2] for a in rest if a.startswith("--model=")]
    kind = kind_of(models[-1] if models else "cdm")
    cfg = configure(kind.settings, rest, kind.presets, ("run", "preset"), __doc__)
    at_least(cfg, steps=1, batch=1, seed=0, shift=0, sheet=0)
    check_loop(cfg)
    if not cfg.run:
        raise UserError("give a run folder: python cdm.py train out/toy")
    train_conditioner(cfg)

if __name__ == "__main__":
    cli(main, stopped="the same command goes on with a training, and draws patches anew")
