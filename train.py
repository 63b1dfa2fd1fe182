"""Train ZoomLDM: data (if missing), VAE, latents, then U-Net and Summarizer together (Z §3.1, §4.1.1).

    python train.py                                    # preset toy: everything, minutes on two CPU cores
    python train.py toy_long --lr=5e-4                 # any setting below; the same command resumes
    torchrun --standalone --nproc_per_node=6 train.py brca --data=DIR --vae_weights=FILE

A run folder holds ema.safetensors (averaged U-Net and Summarizer, and the VAE: what all commands load), vae
and *state*.safetensors (to go on from), latents/, samples/*.png, log.jsonl (`python -m experiments.plot`).
Settings and seed decide the result; ranks and interruptions (critics aside) its rounding.     read next: cdm.py
"""
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from common import Log, UserError, at_least, check_settings, cli, configure, fingerprint, generator
from common import newest_state, one_of, resume, save_grid, save_state, save_tensors, setup, write_line, write_text
from data import InTurn, PatchDataset, feed, fixed_batch, open_data, own_places, read_index
from diffusion import Schedule, ZoomLDM, diffusion_loss, layout_fidelity, null_condition
from summarizer import SummarizerConfig, build
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig, VAEStage, rebase

# ----- 1. Settings: --key=value, or --group.key=value, also without the group if no other has that key -----

@dataclass
class OptimConfig:
    lr: float = 1.5e-3
    warmup: int = 100           # steps of linear warm-up
    decay: str = "cosine"       # cosine to zero, or constant (published)
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.01  # official: AdamW's default
    clip: float = 1.0           # gradient norm; 0 = none (published)
    ema: float = 0.995          # decay of the averaged weights; published 0.9999
    muon: bool = False          # fewer steps, by toy/muon.py (not for the VAE); published: AdamW

@dataclass
class LoopConfig:               # nothing of this changes what is computed
    micro: int = 0              # samples per forward pass and rank, which add up; 0 = batch / ranks
    workers: int = 0            # data loading processes per rank
    log_every: int = 25
    sample_every: int = 500
    save_every: int = 250

@dataclass
class Config:
    preset: str = "toy"
    data: str = "data/toy"      # by data.py; toys make theirs if it is missing; more, with commas, for the VAE
    out: str = ""               # run folder; default out/PRESET
    seed: int = 0
    device: str = "auto"        # auto: cuda, mps or cpu
    threads: int = 0            # CPU threads of this process; 0 = PyTorch's choice
    amp: bool = True            # bf16 autocast where the device has bf16 arithmetic
    compile: bool = False       # torch.compile the U-Net
    vae: VAEConfig = field(default_factory=VAEConfig)
    vae_weights: str = ""       # of a run, or a file; "" = train one. With vae.texture its decoder learns on
    vae_steps: int = 1000
    vae_batch: int = 16
    vae_lr: float = 3e-3
    vae_crop: int = 0           # train on random crops of this side, which cost less; 0 = whole patches
    summarizer: SummarizerConfig = field(default_factory=SummarizerConfig)  # embed_dim, scales: from the data
    unet: UNetConfig = field(default_factory=UNetConfig)                    # context_dim is summarizer.width
    init_from: str = ""         # start from a run, the shipped weights or, as the papers, a published U-Net
    pred: str = "eps"           # what the U-Net predicts: eps as published, x0, or v (see diffusion.py)
    schedule: str = "scaled_linear"  # of the noise; as published (see diffusion.py)
    steps: int = 1500
    batch: int = 32             # global batch, divided over ranks
    drop: float = 0.1           # share of samples whose whole condition is zeroed (published)
    only_scale: int = -1        # train on one scale alone (the papers' single-scale baseline)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

# None: the default. brca, naip: as published. toys: small. smoke: small rates, or 40 steps blow up rounding
SHIPPED = "weights/vae.safetensors"  # comes with this repository; --vae_weights= trains one of the toy's own
TABLE = {
    "preset":               ("smoke",      "toy",      "toy_long", "gpu24",       "brca",       "naip"),
    "data":                 ("data/smoke", "data/toy", "data/toy", "data/slides", "data/brca",  "data/naip"),
    "amp":                  (False,        None,       None,       None,          None,         None),
    "vae.width":            (16,           32,         32,         64,            None,         None),
    "vae.res_blocks":       (1,            1,          1,          None,          None,         None),
    "vae.codes":            (64,           1024,       1024,       None,          None,         None),
    "vae.groups":           (8,            8,          8,          16,            None,         None),
    "vae_weights":          (None,         SHIPPED,    SHIPPED,    None,          None,         None),
    "vae_steps":            (40,           800,        2000,       40_000,        0,            0),
    "vae_batch":            (None,         8,          None,       32,            None,         None),
    "vae_lr":               (1e-4,         None,       None,       2e-4,          None,         None),
    "vae_crop":             (32,           32,         32,         None,          None,         None),
    "summarizer.width":     (128,          128,        128,        384,           None,         None),
    "summarizer.depth":     (2,            2,          3,          6,             None,         None),
    "summarizer.mlp":       (256,          256,        256,        1536,          None,         None),
    "summarizer.positions": (16,           16,         16,         16,            None,         None),
    "summarizer.scales":    (None,         None,       None,       None,          None,         4),
    "summarizer.side":      (None,         None,       None,       None,          128,          128),
    "unet.width":           (32,           64,         64,         96,            None,         None),
    "unet.mult":            ((1, 2),       (1, 2),     (1, 2, 2),  (1, 2, 3, 4),  None,         None),
    "unet.res_blocks":      (1,            1,          2,          1,             None,         None),
    "unet.attention":       ((2,),         (2,),       (2, 4),     None,          None,         None),
    "unet.groups":          (8,            8,          8,          None,          None,         None),
    "unet.positions":       (16,           16,         16,         16,            None,         None),
    "pred":                 ("v",          "v",        "v",        "v",           None,         None),
    "steps":                (40,           400,        4000,       100_000,       500_000,      500_000),
    "batch":                (16,           24,         None,       128,           420,          400),
    "micro":                (None,         None,       None,       64,            None,         None),
    "lr":                   (3e-4,         3e-3,       1e-3,       1e-4,          2e-5,         2e-5),
    "warmup":               (None,         None,       None,       1000,          1000,         1000),
    "decay":                (None,         None,       None,       None,          "constant",   "constant"),
    "betas":                (None,         None,       None,       None,          (0.9, 0.999), (0.9, 0.999)),
    "clip":                 (None,         None,       None,       None,          0.0,          0.0),
    "ema":                  (None,         None,       0.999,      0.9999,        0.9999,       0.9999),
    "muon":                 (None,         True,       None,       None,          None,         None),
    "workers":              (None,         None,       None,       4,             4,            4),
    "log_every":            (10,           None,       None,       100,           100,          100),
    "sample_every":         (40,           400,        1000,       5000,          10_000,       10_000),
    "save_every":           (10,           None,       None,       1000,          5000,         5000),
}
PRESETS = {name: {key: row[i] for key, row in TABLE.items() if row[i] is not None}
           for i, name in enumerate(TABLE["preset"])}
PRESETS["vae"] = PRESETS["toy"] | {  # a VAE to keep: half an hour
    "vae_weights": "", "vae.texture": 1.0, "vae.codes": 4096, "vae_steps": 7000, "vae_batch": 16, "vae_lr": 6e-4,
    "betas": (0.5, 0.9), "steps": 0, "log_every": 100, "save_every": 500}
TOYS = dict.fromkeys(("toy", "toy_long", "vae"), ()) | {"smoke": ("--slides=8", "--test=4", "--size=256")}

# ----- 2. What each stage minimises -----

class LDMStage(torch.nn.Module):
    """U-Net and Summarizer with their denoising loss (Z §4.1.1). side: of the latents."""
    def __init__(self, cfg, side):
        super().__init__()
        self.cfg, self.side, self.scales = cfg, side, cfg.summarizer.scales
        self.summarizer = build(cfg.summarizer)
        self.unet, self.schedule = UNet(cfg.unet), Schedule(cfg.schedule)
        if cfg.compile:
            self.unet.compile()                                         # in place: names of weights stay

    def noise(self, step):
        """Time indices, drop-out and noise of the whole global batch: the same for any number of ranks."""
        gen, n, T = generator(self.cfg.seed, 2, step), self.cfg.batch, self.schedule.T
        # one t in each of n equal strata: the same uniform law, with less variance between batches
        t = ((torch.randperm(n, generator=gen) + torch.rand(n, generator=gen)) * (T / n)).long()
        keep = torch.rand(n, generator=gen) >= self.cfg.drop
        eps = torch.randn(n, self.unet.cfg.channels, self.side, self.side, generator=gen)
        return {"t": t.clamp_max(T - 1), "keep": keep, "eps": eps}

    def forward(self, batch):
        t, s = batch["t"], batch["s"]
        c = self.summarizer(batch["tokens"], batch["mask"], s)          # (B,65,D)
        c = torch.where(batch["keep"][:, None, None], c, null_condition(c))
        loss, on_eps = diffusion_loss(lambda z_t, t: self.unet(z_t, t, c), batch["z"], t, batch["eps"],
                                      self.schedule, self.cfg.pred)     # (B,) each
        return loss.mean(), {"loss": loss.detach(), "eps": on_eps, "s": s, "t": t}

# ----- 3. The loop -----

def run_stage(name, cfg, ranks, net, dataset, steps, batch, lr, ema_decay=0.0, on_sample=None):
    """Train `net`, or go on from out/{name}state.safetensors. out: the steps done, the averaged weights (raw,
    if ema_decay is 0). SIGTERM saves, and exits with 0. raises: UserError if a loss is not finite."""
    optim, loop, state_file = cfg.optim, cfg.loop, Path(cfg.out, f"{name}state.safetensors")
    places, micro = own_places(name, cfg, batch, ranks)     # which part of each global batch this rank takes
    net = net.to(ranks.device).train()
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()} if ema_decay else None
    groups = getattr(net, "groups", lambda: [{"params": list(net.parameters())}])()     # the first has lr
    from toy.muon import Muon
    kind = Muon if optim.muon and name != "vae_" else torch.optim.AdamW
    opt = kind(groups, lr, optim.betas, weight_decay=optim.weight_decay, fused=True)
    start = resume(state_file, cfg, net, ema, opt, ranks)
    if start >= steps:
        return start, ema or net.state_dict()
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True) if ranks.world > 1 else net
    log = Log(Path(cfg.out, "log.jsonl"), name.strip("_") or "ldm", start, net, ranks)
    with feed(dataset, range(start, steps), batch, micro, ranks, loop.workers) as (batches, asked):
        bar = tqdm(range(start, steps), log.stage, steps, initial=start, disable=ranks.rank > 0)
        for step in bar:
            opt.param_groups[0]["lr"] = lr_at(step, steps, lr, min(optim.warmup, steps // 5), optim.decay)
            noise = net.noise(step)                                     # of the whole global batch
            for at in places:                                           # where a micro-batch begins in it
                item = next(batches) | {k: v[at:at + micro] for k, v in noise.items()}
                log.rows.append(backward(wrapped, item, ranks, len(places), at == places[-1]))
            grad = torch.nn.utils.clip_grad_norm_(groups[0]["params"], optim.clip or math.inf)
            stop = agree(log, step, batch, grad, asked)                 # before this step changes anything
            opt.step()
            opt.zero_grad()
            if ema:
                update_ema(ema, net, min(ema_decay, (step + 2) / (step + 11)))
            done = step + 1
            save, sample = (done == steps or done % n == 0 for n in (loop.save_every, loop.sample_every))
            if stop or save or sample or done % loop.log_every == 0:
                bar.set_postfix(loss=log.write(done, batch, grad, opt.param_groups[0]["lr"]))
            getattr(net, "after_step", lambda *_: None)(done, ranks)
            if (stop or save or sample) and ranks.rank == 0:
                save_state(state_file, cfg, done, net, ema, opt)
            if stop:
                del wrapped         # before its group: in PyTorch 2.13 gloo and a DDP that outlives it wait for ever
                ranks.leave(f"SIGTERM: saved step {done} of {steps}; the same command goes on from there")
            if sample and on_sample and ranks.rank == 0:
                ranks.show(on_sample, done, ema or net.state_dict())
                log.since = time.time()                                 # this is no time of training
    ranks.barrier()
    return steps, ema or net.state_dict()

def lr_at(step, steps, lr, warmup, decay):
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, or a cosine to zero at `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return lr if decay == "constant" else lr * 0.5 * (1 + math.cos(math.pi * done))

def backward(net, item, ranks, parts, last):
    """Add the gradient of one of `parts` micro-batches; with the last, ranks add theirs. out: for the log."""
    item = {k: v.to(ranks.device, non_blocking=True) for k, v in item.items()}
    with nullcontext() if last or ranks.world == 1 else net.no_sync():
        with ranks.attention():
            with ranks.autocast():
                loss, values = net(item)
            (loss / parts).backward()
    return values

@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) weights. official: decay min(0.9999, (1+n)/(10+n))."""
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)                                      # the counters of batch norm

def agree(log, step, batch, grad, asked):
    """Tell all ranks what happened on one. out: did a SIGTERM come? raises: UserError, naming bad samples."""
    ranks = log.ranks
    share = batch // ranks.world
    losses = torch.cat([r["loss"] for r in log.rows])[-share:]
    flags = torch.zeros(batch + 1, device=losses.device)                # one a sample, and the SIGTERM
    flags[ranks.rank * share:][:share] = ~losses.isfinite()             # this rank's part
    flags[-1] = len(asked)
    bad = ranks.sum(flags)[:-1].nonzero()[:, 0].tolist()
    if bad or not grad.isfinite():                                      # a gradient names no sample
        samples = ", ".join(str(step * batch + k) for k in bad or range(batch))
        raise UserError(f"the {log.stage} {'loss' if bad else 'gradient'} is no longer finite at step "
                        f"{step + 1}, on samples {samples} of the data set; the last checkpoint is intact. Look "
                        f"at these, or move *state*.safetensors of this training away and take a lower --lr")
    return bool(flags[-1])

# ----- 4. Samples on the way -----

SHEET = {"n": 16, "steps": 10}  # patches drawn per scale, of which 8 are shown, and steps of dpm

@torch.no_grad()
def export(model, pyramids, cfg, ranks, step, ema):
    """Save the averaged model as ema.safetensors, and draw patches with the conditions of held-out ones."""
    out, split = Path(cfg.out), "test" if pyramids.names("test") else "train"
    for name, part in (("summarizer.", model.summarizer), ("unet.", model.unet)):
        part.load_state_dict({k.removeprefix(name): v for k, v in ema.items() if k.startswith(name)})
    model.eval().save(out)
    rows, labels, layout = [], [], [None] * pyramids.scales
    images, side = pyramids.images, pyramids.patch // 4
    for s in tqdm(range(pyramids.scales), "contact sheet", leave=False):
        if pyramids.count(split, s):
            batch = fixed_batch(pyramids, split, s, SHEET["n"], ("x",) if images else ("z",))
            batch = {k: v.to(ranks.device) for k, v in batch.items()}
            with ranks.autocast():
                c = model.summarizer(batch["tokens"], batch["mask"], batch["s"]).float()    # (n,65,D)
                drawn = model.draw(c, side, guidance=1.5, steps=SHEET["steps"], seed=cfg.seed, sampler="dpm")
                real = (batch["x"] if images else model.decode(batch["z"])).float().cpu()
            rows += [real[:8], drawn[:8]]                               # (8,3,P,P)
            labels += [f"scale {s} {split}", f"scale {s} drawn"]
            layout[s] = round(layout_fidelity(drawn, real, min(2 ** s, 8)), 4)
    save_grid(out / f"samples/step_{step:06d}.png", rows, labels)
    write_line(out / "samples/layout.jsonl", {"step": step, "layout": layout}, lambda r: r["step"] < step)
    tqdm.write(f"step {step}: layout fidelity by scale {layout}")

# ----- 5. The stages in order -----

def make_vae(cfg, ranks, pyramids, base):
    """Load, take over from `base`, or train a VAE, or a decoder. out: (vae, its latents' 1 / deviation)."""
    start, scale = (base.vae, base.latent_scale) if base else (None, None)
    if cfg.vae_weights:
        from slides.start import finished_vae
        start, scale = finished_vae(Path(cfg.vae_weights))
    if not (cfg.vae.texture if cfg.vae_weights else cfg.vae_steps):     # nothing is to be trained
        if start:
            return start, scale
        raise UserError("this preset trains no VAE: give one by --vae_weights=FILE, or train it by --vae_steps=N")
    sources = [pyramids, *map(open_data, cfg.data.split(",")[1:])]

    def fixed(n):
        there = [(p, s) for p in sources for s in range(p.scales) if p.count("train", s)]
        return [fixed_batch(p, "train", s, n)["x"].to(ranks.device) for p, s in there]      # (n,3,P,P) each
    stage = VAEStage
    if cfg.vae.texture:
        from weights.critic import critic_stage as stage
    net = stage(cfg, torch.cat(fixed(16)), start)
    net.scales = max(p.scales for p in sources)
    images = InTurn([PatchDataset(p, "train", cfg.seed, ("x",)) for p in sources])
    run_stage("vae_", cfg, ranks, net, images, cfg.vae_steps, cfg.vae_batch, cfg.vae_lr)
    vae = net.vae.eval().requires_grad_(False)
    if cfg.vae_weights:
        return vae, scale                                               # its decoder alone has learned
    rebase(vae, torch.cat([vae.encode(x) for x in fixed(64)]))          # mean 0
    return vae, 1 / float(torch.cat([vae.encode(x) for x in fixed(64)]).std())

def get_vae(cfg, ranks, pyramids, base=None):
    """The VAE of a run in eval mode, and its latent scale; made if out/vae.safetensors is missing."""
    path = Path(cfg.out, "vae.safetensors")
    there = path.exists()
    ranks.barrier()                                                     # all ranks look before one writes
    if not there:
        vae, scale = make_vae(cfg, ranks, pyramids, base)
        if ranks.rank == 0:
            meta = {"config": asdict(vae.cfg), "latent_scale": scale, "settings": asdict(cfg)}
            save_tensors(path, vae.state_dict(), meta)
        ranks.barrier()
    vae, scale = VQVAE.from_run(path)
    if ranks.rank == 0:
        print(f"VAE: {path}, latent scale {scale:.4f} (1 / deviation; 1 for published weights)")
    return vae.to(ranks.device).eval().requires_grad_(False), scale

def train_ldm(cfg, ranks, vae, scale, dataset, start):
    """Train U-Net and Summarizer on latents, from the weights `start` on, or go on with them."""
    pyramids = dataset.pyramids
    if not pyramids.official:
        pyramids.latents = Path(cfg.out, "latents")
        from toy.folder import encode_latents
        encode_latents(pyramids.latents, vae, dataset, cfg.steps * cfg.batch, ranks)
    pyramids.latent_scale = scale
    torch.manual_seed(cfg.seed + 1)
    net = LDMStage(cfg, pyramids.patch // 4)
    net.vae_mark = fingerprint(vae)
    net.load_state_dict(net.state_dict() | start)
    info = {k: getattr(pyramids, k) for k in ("encoder", "std", "patch", "weights", "mpp")}
    info["data"] = cfg.data.split(",")[0]
    model = ZoomLDM(vae, build(cfg.summarizer), UNet(cfg.unet), scale, cfg.pred, cfg.schedule, info)
    draw = partial(export, model.to(ranks.device), pyramids, cfg, ranks)
    done, ema = run_stage("", cfg, ranks, net, dataset, cfg.steps, cfg.batch, cfg.optim.lr, cfg.optim.ema, draw)
    picture = Path(cfg.out, f"samples/step_{done:06d}.png")
    if ranks.rank == 0:
        if not picture.exists():                                        # killed after the last step
            draw(done, ema)
        print(f"done: {cfg.out}/ema.safetensors, {picture}; next: python sample_joint.py {cfg.out} --eval")

# ----- 6. python train.py -----

def check_loop(cfg):
    """Hold what the loop reads against limits. raises: UserError."""
    at_least(cfg, seed=0, batch=1, steps=0)
    at_least(cfg.loop, micro=0, workers=0, log_every=1, sample_every=1, save_every=1)
    at_least(cfg.optim, lr=0, warmup=0, weight_decay=0, clip=0, ema=0)
    one_of(cfg.optim, decay=("cosine", "constant"))
    betas, ema = cfg.optim.betas, cfg.optim.ema
    if len(betas) != 2 or not all(0 <= x < 1 for x in (*betas, ema)):
        raise UserError(f"--betas={betas} takes two numbers, --ema={ema} one, each from 0 on and less than 1")

def check(cfg):
    """What can be refused before anything is read. raises: UserError."""
    check_loop(cfg)
    at_least(cfg.vae, texture=0)
    at_least(cfg, vae_batch=1, vae_steps=0, vae_crop=0, drop=0)
    one_of(cfg, pred=("eps", "x0", "v"))
    one_of(cfg.summarizer, kind=("transformer", "cnn"))
    vae, unet = cfg.vae, cfg.unet
    if len(vae.mult) != 3 or vae.channels != unet.channels or cfg.vae_crop % 4 or 0 < cfg.vae_crop < 12:
        raise UserError(f"--vae.mult={vae.mult} --vae.channels={vae.channels} --vae_crop={cfg.vae_crop}: give "
                        f"three levels, as many channels as unet.channels, and a multiple of 4, 12 or more")
    if unet.positions != cfg.summarizer.positions:
        raise UserError(f"--unet.positions={unet.positions}: give --summarizer.positions the same number")

def open_training(cfg, ranks, std):
    """The data, made if a toy preset lacks its own, and the sizes that they decide. raises: UserError."""
    folder, *others = cfg.data.split(",")
    ours = cfg.preset in TOYS and folder == PRESETS[cfg.preset]["data"]      # no folder that the user named
    if ours and ranks.rank == 0:
        if not Path(folder, "index.json").exists() or not read_index(folder)["slides"]:
            data.main(["toy", f"--out={folder}", *TOYS[cfg.preset]])
    ranks.barrier()
    pyramids = open_data(folder, std=std)
    if {open_data(name).patch for name in others} - {pyramids.patch}:
        raise UserError(f"--data={cfg.data}: patches of several sizes; build them with one --patch")
    if pyramids.official and cfg.vae_weights in ("", SHIPPED):
        raise UserError(f"{cfg.data} holds latents of the published VAE: give it with --vae_weights=FILE")
    cfg.summarizer.embed_dim, cfg.summarizer.scales = pyramids.embed_dim, pyramids.scales
    cfg.unet.context_dim = cfg.summarizer.width
    side, halvings = pyramids.patch // 4, len(cfg.unet.mult) - 1
    if side % 2 ** halvings:
        raise UserError(f"latents of side {side} cannot be halved {halvings} times: change --patch or --unet.mult")
    dataset = PatchDataset(pyramids, "train", cfg.seed, ("z",), None if cfg.only_scale < 0 else cfg.only_scale)
    with torch.device("meta"):                                          # refused here if it cannot be,
        LDMStage(cfg, side)                                             # not after the VAE is trained
    return pyramids, dataset

def main(argv):
    cfg = configure(Config, argv, PRESETS, ("preset",), __doc__)
    check(cfg)
    told, taken = " ".join(argv), cfg.vae_weights == SHIPPED
    if taken and "--vae_weights=" not in told and ("--vae_" in told or "--vae." in told or cfg.vae.texture):
        raise UserError(f"{cfg.preset} takes a finished VAE: to train one, give --vae_weights= as well")
    cfg.out = cfg.out or f"out/{cfg.preset}"
    out, ranks = Path(cfg.out), setup(cfg.device, cfg.amp, cfg.threads)
    base = None                                                         # a model of ours to go on with
    if cfg.init_from:
        from slides.start import model_of, start_weights
        base = model_of(cfg.init_from)
    pyramids, dataset = open_training(cfg, ranks, base and base.info.get("std"))  # in the units of base
    check_settings(out / "vae.safetensors", cfg, ("vae", "data", "seed", *["init_from"] * bool(base)))
    found = newest_state(out / "state.safetensors")
    if found:
        check_settings(found[0], cfg)
    start = start_weights(cfg, ranks, pyramids, base, bool(found)) if cfg.init_from else {}
    ranks.barrier()                                                     # all have looked before one writes
    if ranks.rank == 0:
        for left in out.rglob(".*.tmp"):                                # of a save that was killed
            left.unlink()
        print(f"run folder {out}, {ranks.world} rank(s) on {ranks.device}, {torch.get_num_threads()} threads"
              + ", compiling: the first calls take a minute each" * cfg.compile)
        write_text(out / "config.json", json.dumps(asdict(cfg) | {"torch": torch.__version__}, indent=1))
    torch.manual_seed(cfg.seed)
    vae, scale = get_vae(cfg, ranks, pyramids, base)
    if found:
        check_settings(found[0], cfg, vae=fingerprint(vae))
    if cfg.steps:                                                       # --steps=0: the VAE alone
        train_ldm(cfg, ranks, vae, scale, dataset, start)
    ranks.leave()

if __name__ == "__main__":
    cli(main)
