"""The grid model: invents the embeddings of a region, k x k tiles at a time, from a caption or from nothing (L §3.3).

    python cdm.py train out/toy --model=grid                       # from nothing; more settings: --help
    python cdm.py train out/toy --model=grid --captions=data/toy/captions.tsv --vectors=data/toy/captions.safetensors
    python sample_joint.py out/toy --condition=grid --size=512 --context=3 --caption="mostly fat"

in:  noise, and vectors of a caption and of its clauses, or None   out: e (E,rows,columns); RUN/grid.safetensors"""
import random
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from cdm import PRESETS, Conditioner, Config, DiT, DiTConfig, place_table, respaced
from common import UserError, at_least, cli, generator, load_meta, load_tensors, summary
from diffusion import ddim_sample, with_guidance
from sample_joint import Canvas
from text.clauses import Listener, over, quarters

DROP = 0.15  # share of regions trained without their caption, for guidance

@dataclass
class GridSizes(DiTConfig):
    vector: int = 0        # V, width of a caption's vector; 0 = the model knows no captions

@dataclass
class GridConfig(Config):
    """What the grid model takes beside the settings of cdm.py (python cdm.py train --help)."""
    dit: GridSizes = field(default_factory=GridSizes)  # tokens, channels and vector come from run and data
    side: int = 8              # k, tiles a side of the regions it learns
    captions: str = ""         # a captions.tsv (image, caption); empty = it learns no captions
    vectors: str = ""          # the captions' vectors (python -m text.captions embed)
    gap: float = 0.0           # variance of noise on (standardised) vectors; 0.1 bridges modalities (L §3.3)

# ----- 1. Regions -----

def embeddings(pyramids, slide, block):
    """The embeddings (rows,columns,E) float32 of a block (row, column, rows, columns) of base tiles of a slide."""
    row, column, rows, columns = block
    e = pyramids.tensor(slide, "e")[row:row + rows, column:column + columns].float()
    return e * pyramids.rescale

class Regions(Dataset):
    """k x k blocks of embeddings at random places of the slides, or of the regions that captions describe.
    Item n is a pure function of (seed, n). in: described, [Caption] with slide and block, and their vectors (n,V);
    drop, the share of items whose caption is left out. out: tokens (k*k,E), v (V,) and known: False without a caption.
    raises: UserError if no slide holds such a block, or a caption describes less than one."""

    def __init__(self, pyramids, k, seed, split="train", described=(), vectors=None, drop=0.0):
        self.pyramids, self.k, self.seed, self.drop = pyramids, k, seed, drop
        self.described, self.vectors = described, vectors
        self.slides = []                                                                 # (slide, block: all of it)
        for i, slide in enumerate(pyramids.slides):
            rows, columns = (side // pyramids.patch for side in slide["size"])
            if slide["split"] == split and min(rows, columns) >= k:
                self.slides.append((i, (0, 0, rows, columns)))
        small = [c.image for c in described if min(c.block[2:]) < k]
        if small or not self.slides:
            what = small[0] if small else f"every {split!r} image of {pyramids.folder}"
            raise UserError(f"{what} has fewer than {k} x {k} tiles: lower --side")

    def __len__(self):
        return 1 << 40

    def __getitem__(self, n):
        rng = random.Random(f"{self.seed} {n}")
        known = self.vectors is not None and rng.random() >= self.drop
        if known:
            at = rng.randrange(len(self.described))
            c, v = self.described[at], self.vectors[at]
            i, block = c.slide, c.block
        else:
            i, block = rng.choice(self.slides)
            v = torch.zeros(0 if self.vectors is None else self.vectors.shape[1])
        row, column, rows, columns = block
        row += rng.randint(0, rows - self.k)
        column += rng.randint(0, columns - self.k)
        e = embeddings(self.pyramids, i, (row, column, self.k, self.k))                  # (k,k,E)
        return {"tokens": e.flatten(0, 1), "v": v, "known": torch.tensor(known), "s": 0}

# ----- 2. The network -----

def plane_table(side, width):
    """`place_table` of a square: half the channels for the row and half for the column. out: (1,side*side,width)."""
    line = place_table(side, width // 2)[0]                                              # (side,width/2)
    rows, columns = line[:, None].expand(-1, side, -1), line.expand(side, -1, -1)        # (side,side,width/2) each
    return torch.cat([rows, columns], 2).flatten(0, 1)[None]

class GridDiT(DiT):
    """DiT over the cells of a square, told a caption's vector instead of a scale. Called (x, t, told): told is
    (v (B,V), known (B,) bool), where a learnt null stands in for what is not known; ignored if it knows no captions."""

    def __init__(self, cfg: GridSizes):
        super().__init__(cfg)
        side = round(cfg.tokens ** 0.5)
        self.register_buffer("pos", plane_table(side, cfg.width))
        self.scale = None
        if cfg.vector:
            self.vector1 = nn.Linear(cfg.vector, cfg.width)
            self.vector2 = nn.Linear(cfg.width, cfg.width)
            self.null = nn.Parameter(torch.randn(cfg.width) * 0.02)
            self.start()                                                                 # again, with these

    def label(self, told):
        if not self.cfg.vector:
            return 0
        v, known = told
        given = self.vector2(F.silu(self.vector1(v)))                                    # (B,W)
        return torch.where(known[:, None], given, self.null)

# ----- 3. The model -----

def quarters_of(described, pyramids):
    """Mean embeddings of the quarters of the region that each caption describes, (n,E,2,2)."""
    places = [(c.slide, c.block) for c in described]
    found = {place: quarters(embeddings(pyramids, *place).movedim(-1, 0)[None]) for place in set(places)}
    return torch.cat([found[place] for place in places])

def padded(said):
    """Clauses of several captions, [(n,V)], as one tensor: v (B,most,V), and which of them there are (B,most) bool."""
    there = [torch.ones(len(v), dtype=torch.bool, device=v.device) for v in said]
    return pad_sequence(said, batch_first=True), pad_sequence(there, batch_first=True)

def clauses_in(told):
    """in: (1+n,V), see `tell`; out: the vectors of the clauses, or that of a caption that came without any, (n,V)."""
    return told[1:] if len(told) > 1 else told

class GridModel(Conditioner):
    """The grid model. mean, std (E,): embeddings are modelled as (e - mean) / std. v_mean, v_std (V,): the same for
    vectors, whose numbers may be as small as text encoders make them. says: from clauses to quarters of a region, by
    regression, for a denoiser learns that late: it sees most of what it needs in the noisy grid.
    info: encoder and std of the embeddings, the encoder of the captions (text), and shift."""
    kind, network, sizes, settings = "grid", GridDiT, GridSizes, GridConfig
    presets = PRESETS | {"smoke": PRESETS["smoke"] | {"side": 4}, "published": PRESETS["published"] | {"side": 16}}
    next = "sample_joint.py {} --condition=grid --size=512"
    usual_shift = 16.0     # 64 cells agree on what a region shows: nearly all of it is decided early

    def __init__(self, net, info=None, cfg=None, clean=None):
        super().__init__(net, info, cfg, clean or self.cells)
        channels, vector = net.cfg.channels, net.cfg.vector
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("v_mean", torch.zeros(vector))
        self.register_buffer("v_std", torch.ones(vector))
        if vector:
            self.says = Listener(vector, channels)

    def load_state_dict(self, state, *args, **options):
        """Files from before `says` was kept lack it. raises: UserError if it is of another kind."""
        if "says" in state:
            raise UserError("this grid model was told sentences, not clauses: move grid.safetensors and "
                            "grid_state*.safetensors away, and train it again")
        lacking = {k: v for k, v in self.state_dict().items() if k.startswith("says.")}
        return super().load_state_dict(lacking | state, *args, **options)

    def check_fit(self, model, path):
        """raises: UserError if this was made for another encoder."""
        here, there = model.info.get("encoder"), self.info["encoder"]
        if (here, model.info.get("std")) != (there, self.info["std"]):
            raise UserError(f"{path} makes embeddings of {there!r}, the run takes {here!r} with its own deviations: "
                            f"move it and grid_state*.safetensors away, and train it again")

    @classmethod
    def prepare(cls, cfg, model, pyramids):
        """out: an untrained one of the sizes that settings and data ask for, and its data set."""
        at_least(cfg, side=1, gap=0)
        if getattr(pyramids, "official", False):
            raise UserError(f"--model=grid learns from whole images, {pyramids.folder} has none: give --data=")
        if bool(cfg.captions) != bool(cfg.vectors):
            raise UserError("--captions and --vectors: give both (python -m text.captions embed FILE), or neither")
        info = {"encoder": pyramids.encoder, "std": pyramids.std, "shift": cfg.shift}
        described, told, vectors = [], [], None
        if cfg.captions:
            from text.captions import read_captions, tell
            described = read_captions(cfg.captions, pyramids)
            told, info["text"] = tell([c.text for c in described], cfg.vectors), load_meta(cfg.vectors).get("encoder")
            vectors = torch.stack([v[0] for v in told])                                  # (n,V), of whole captions
            cfg.dit.vector = vectors.shape[1]
        cfg.dit.tokens, cfg.dit.channels, cfg.dit.scales = cfg.side ** 2, pyramids.embed_dim, 0
        dataset = Regions(pyramids, cfg.side, cfg.seed, "train", described, vectors, DROP)
        made = cls(cls.network(cfg.dit), info, cfg)
        made.measure(Regions(pyramids, cfg.side, cfg.seed + 1), told, described)
        return made, dataset

    def measure(self, regions, told, described):
        """Set mean, std and, from what is told of captions (see `tell`), v_mean, v_std and says."""
        e = torch.cat([regions[n]["tokens"] for n in range(256)])                        # (N,E)
        self.mean.copy_(e.mean(0))
        self.std.copy_(e.std(0).clamp_min(1e-6))
        if told:
            vectors = torch.stack([v[0] for v in told])
            self.v_mean.copy_(vectors.mean(0))
            self.v_std.copy_(vectors.std(0).clamp_min(1e-6))
            aim = quarters_of(described, regions.pyramids)
            aim = (aim - self.mean[:, None, None]) / self.std[:, None, None]
            told = [self.standard(v) for v in told]
            said = [*map(clauses_in, told), *(v[:1] for v in told)]     # whole captions too, for vectors of files
            self.says.learn(*padded(said), aim.repeat(2, 1, 1, 1))

    def standard(self, v):
        return (v - self.v_mean) / self.v_std

    def noise(self, step):
        """Also, for the vectors, the noise that lets vectors of images stand in for those of texts."""
        shift = torch.randn(self.cfg.batch, self.net.cfg.vector, generator=generator(self.cfg.seed, 14, step))
        return super().noise(step) | {"shift": shift * self.cfg.gap ** 0.5}

    def cells(self, batch):
        """Standardised embeddings (B,k*k,E), and what the network is told."""
        v = self.standard(batch["v"]) + batch["shift"]
        return (batch["tokens"] - self.mean) / self.std, (v, batch["known"])

    @torch.no_grad()
    def grid(self, rows, columns, v=None, guidance=2.0, seed=0, steps=50, spread=0.0):
        """Draw the embeddings of rows x columns tiles: e (E,rows,columns), as data.py stores them, on the CPU.
        Grids larger than those it learnt are drawn in overlapping windows. v (V,): what the region shows, None =
        anything; or (1+n,V), and each of its clauses. guidance: of x0 towards v. spread: how far chance decides how
        much there is of what and where, over the head of v. At 0 no noise common to a quarter stays, and the mean of
        its estimates is what v says; chance only arranges.
        source: L §3.3; spread is ours. raises: ValueError for a vector of another width."""
        cfg, aim = self.net.cfg, None
        if v is not None:
            v = torch.atleast_2d(v)
            if not cfg.vector or v.shape[1] != cfg.vector:
                takes = f"({cfg.vector},)" if cfg.vector else "none: it was trained without --captions"
                raise UserError(f"got a vector of shape {tuple(v.shape)}, this grid model takes {takes}")
            told = self.standard(v.to(self.mean))                                        # (1 or 1+n,V)
            aim = self.says(*padded([clauses_in(told)])) if self.says.heard else None    # (1,E,2,2)
            v = told[0]
        k = round(cfg.tokens ** 0.5)
        canvas = Canvas(max(rows, k), max(columns, k), k, overlap=k // 2, fade=True)
        z = torch.randn(1, cfg.channels, canvas.h, canvas.w, generator=generator(seed, 12)).to(self.mean.device)
        if v is not None:
            z = z - (1 - spread) * over(quarters(z), z)

        def x0_hat(z, t):
            x = canvas.average(partial(self.windows, canvas, z, t, v, guidance))         # (1,E,rows,columns)
            return x if aim is None else x + (1 - spread) * over(aim - quarters(x), x)
        z = ddim_sample(x0_hat, z, self.schedule, pred="x0", end="clean",
                        timesteps=respaced(self.schedule.T, steps, self.shift))
        e = z * self.std[:, None, None] + self.mean[:, None, None]
        return e[0, :, :rows, :columns].cpu()

    def windows(self, canvas, z, t, v, guidance, ij):
        """Estimates (n,E,k,k) of the windows of z at corners ij, guided towards v."""
        x = canvas.cut(z, ij).flatten(2).mT                                              # (n,k*k,E)
        n = len(x)
        unknown = torch.zeros(n, dtype=torch.bool, device=x.device)
        if v is None:
            out = self.net(x, t.expand(n), (x.new_zeros(n, self.net.cfg.vector), unknown))
        else:
            told = v.expand(2 * n, -1), torch.cat([unknown, ~unknown])
            null, cond = self.net(torch.cat([x, x]), t.expand(2 * n), told).chunk(2)
            out = with_guidance(null, cond, guidance)
        return out.float().mT.unflatten(2, canvas.window)

def vector_of(made, caption="", file=""):
    """What a grid model is told: of a caption, see `tell`; or the v (V,) of a file; None without either."""
    if not caption and not file:
        return None
    text = made.info.get("text")
    if text is None:
        raise UserError("this grid model was trained without captions: leave --caption and --vector out")
    if caption:
        from text.captions import ENCODER, tell
        if text != ENCODER:
            raise UserError(f"--caption is encoded by {ENCODER!r}, this model knows {text!r}: give a --vector of that")
        return tell([caption])[0]
    v, width = load_tensors(file)[0].get("v"), made.net.cfg.vector
    if v is None or v.shape not in ((width,), (1, width)) or not v.isfinite().all():
        raise UserError(f"--vector={file} holds no finite v of ({width},), as this grid model takes")
    return v.flatten().float()

def main(argv):
    with torch.device("meta"):
        net = GridDiT(GridSizes(256, 1024, scales=0, vector=384, variance=False))
        summary(net, torch.randn(2, 256, 1024), torch.zeros(2), (torch.randn(2, 384), torch.zeros(2).bool()))

if __name__ == "__main__":
    cli(main, __doc__)
