"""Features of all slides of a data folder, one file a slide: what mil.py learns from (Z §4.5; L §7).

    python mil.py extract RUN --data=DIR --scales=0,2 --out=DIR

in:  a run, pyramids   out: OUT/SLIDE.safetensors: features (N,K), coords (N,2), x and y of corners at full size"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from common import UserError, at_least, configure, fingerprint, one_of, save_tensors, setup
from data import Pyramids, read_index
from diffusion import ZoomLDM, ddim_sample
from mil import Activations
from sample_joint import known_data
from slides.encoders import load_encoder
from toy.folder import finished
from unet import UNet

@dataclass
class Config:
    run: str = ""             # run folder
    data: str = ""            # pyramids; default: those the run was trained on
    out: str = ""             # folder to write; default RUN/features
    scales: tuple = (0,)      # of the features, finest first
    kind: str = "unet"        # unet; untrained, the same with a random U-Net; descriptor, the encoder on the patch
    #                           itself; drawn, the same on a patch drawn from the condition
    t: int = 100              # time index that patches are noised to (Z 100, L 50)
    block: str = ""           # middle (L), or an index into the published output_blocks; default 3 (Z), or the last
    weights: str | None = None  # of the encoder, for kinds descriptor and drawn
    seed: int = 0             # of the noise
    guidance: float = 2.0     # of kind drawn
    steps: int = 10           # of kind drawn
    batch: int = 64           # patches per network call
    device: str = "auto"
    threads: int = 0
    amp: bool = True          # bf16 where the device has it

FREE = ("run", "data", "out", "batch", "device", "threads")  # these change no number

class Descriptor:
    """The encoder's view of the patch itself."""
    block = None

    def __init__(self, pyramids, ranks, weights):
        self.pyramids, self.ranks = pyramids, ranks
        self.encoder = load_encoder(pyramids.encoder, pyramids.std, weights, ranks.device)

    def of(self, slide, batch):
        if "e" in batch and not self.encoder.scaled:           # of a large network: it saw base tiles long ago
            return batch["e"][..., 0, 0]                                   # (b,E)
        return self.encoder((batch["x"] + 1) / 2).float()                  # (b,E)

class Drawn(Activations):
    """The encoder's view of a patch drawn from the condition; the patch itself is not seen."""

    def __init__(self, cfg, model, pyramids, ranks):
        super().__init__(model, pyramids, ranks, seed=cfg.seed)
        self.cfg, self.block, self.descriptor = cfg, None, Descriptor(pyramids, ranks, cfg.weights)

    def of(self, slide, batch):
        model, z_T = self.model, self.noise(slide, batch)
        with self.ranks.autocast():
            c = model.summarizer(batch["tokens"], batch["mask"], batch["s"]).float()
            guided = model.guided(c, self.cfg.guidance)
            z = ddim_sample(guided, z_T, model.schedule, self.cfg.steps, end="clean")
            x = model.decode(z).float().clamp(-1, 1)                       # (b,3,P,P)
        return self.descriptor.of(slide, {"x": x})

def families(pyramids, k, scales):
    """Join every patch of the finest scale of slide k with the coarser patches it lies in.
    out: patch numbers (n,scales), -1 where there is none; places i, j (n,2) of the finest."""
    counts = pyramids.slides[k]["counts"]
    if min(counts[s] for s in scales) == 0:
        return torch.zeros(0, len(scales)), torch.zeros(0, 2)
    finest = scales[0]
    places = pyramids.tensor(k, f"ij{finest}")                 # (n,2)
    columns = []
    for s in scales:
        number = {tuple(ij): n for n, ij in enumerate(pyramids.tensor(k, f"ij{s}").tolist())}
        parents = places >> (s - finest)                       # each scale halves i and j
        columns.append([number.get(tuple(ij), -1) for ij in parents.tolist()])
    return torch.tensor(columns).T, places

@torch.no_grad()
def scale_features(source, k, s, batch_size):
    """in: source, with pyramids, ranks and `of`, as Activations. out: (n,K), all patches of scale s of slide k."""
    pyramids, device = source.pyramids, source.ranks.device
    slide, rows = pyramids.slides[k], []
    want = ("x", "e") if s == 0 else ("x",)                    # a patch of scale 0 is a base tile: one embedding
    parts = torch.arange(slide["counts"][s]).split(batch_size)
    for numbers in tqdm(parts, f"{slide['name']}, scale {s}", delay=3, leave=False):
        items = [pyramids.item(k, s, n, want) for n in numbers.tolist()]
        batch = {key: value.to(device) for key, value in default_collate(items).items()}
        rows.append(source.of(slide["name"], batch).cpu())
    return torch.cat(rows)

def slide_features(source, k, scales, batch_size):
    """Features of all patches of slide k that lie in a patch of every scale; scales: finest first.
    out: None if there is no such patch; or features (N,K), the scales side by side; coords (N,2), x and y of the
    corners at full size; widths, how many of the K belong to each scale."""
    numbers, places = families(source.pyramids, k, scales)
    whole = (numbers >= 0).all(1)                              # (n,)
    if not whole.any():
        return None
    parts = []
    for chosen, s in zip(numbers[whole].T, scales):            # (N,)
        found = scale_features(source, k, s, batch_size)       # (n of this scale,K)
        parts.append(found[chosen])                            # (N,K of this scale)
    size = source.pyramids.patch << scales[0]                  # of a finest patch at full size
    corners = places[whole].flip(1) * size                     # (N,2)
    return torch.cat(parts, 1), corners.int(), [part.shape[1] for part in parts]

def open_pyramids(cfg, model):
    """The pyramids to take features from. raises: UserError if the run was not trained on the like of them."""
    found = known_data(model, cfg.data or model.info.get("data", "")) if model else Pyramids(cfg.data)
    if not cfg.scales or list(cfg.scales) != sorted(set(cfg.scales) & set(range(found.scales))):
        raise UserError(f"--scales={cfg.scales}: give some of 0 to {found.scales - 1}, finest first")
    return found

def source_of(cfg, model, pyramids, ranks):
    """What makes the features: an object with pyramids, ranks, block and `of`."""
    if cfg.kind == "descriptor":
        return Descriptor(pyramids, ranks, cfg.weights)
    if cfg.kind == "drawn":
        return Drawn(cfg, model, pyramids, ranks)
    if cfg.kind == "untrained":
        torch.manual_seed(cfg.seed)
        model.unet = UNet(model.unet.cfg).to(ranks.device).eval().requires_grad_(False)
    return Activations(model, pyramids, ranks, cfg.t, cfg.block, cfg.seed)

def of_a_part(folder):
    """Whether the images of a data folder are but parts of the files they were made from."""
    source = read_index(folder)["source"]
    return bool(source.get("features") or source.get("cut"))

def described(cfg, source, model):
    """The settings that the numbers depend on, as plain types."""
    settings = {key: value for key, value in asdict(cfg).items() if key not in FREE}
    settings["block"] = source.block
    settings["model"] = None if cfg.kind == "descriptor" else fingerprint(model)
    if cfg.kind != "descriptor":
        settings["noise"] = "of whole keys"  # other versions drew others: once of a batch, then of 32 bits
    return settings

def extract(cfg):
    """Write the features of every slide, one slide in memory at a time. Slides that are done are passed over; ranks
    share the others. raises: UserError for bad settings, or files that were made with other ones."""
    one_of(cfg, kind=("unet", "untrained", "descriptor", "drawn"))
    at_least(cfg, batch=1, steps=1, seed=0)
    if not cfg.run and (cfg.kind != "descriptor" or not cfg.data):
        raise UserError("say which run: python mil.py extract RUN --data=DIR (--kind=descriptor --data=DIR needs none)")
    ranks = setup(cfg.device, cfg.amp, cfg.threads)
    model = ZoomLDM.from_run(cfg.run).to(ranks.device) if cfg.run else None
    pyramids = open_pyramids(cfg, model)
    source = source_of(cfg, model, pyramids, ranks)
    settings, out = described(cfg, source, model), Path(cfg.out or f"{cfg.run}/features")
    if ranks.rank == 0:
        how = "" if source.block is None else f", block {source.block}, t = {cfg.t}"
        print(f"{cfg.kind} features of {len(pyramids.slides)} slides at scales {cfg.scales}{how} -> {out}")
    lost, part = 0, of_a_part(pyramids.folder)
    for k in tqdm(range(ranks.rank, len(pyramids.slides), ranks.world), disable=ranks.rank > 0):
        slide = pyramids.slides[k]
        path, file = out / slide["file"], (pyramids.folder / slide["file"]).stat()
        meta = {"settings": settings, "source": [file.st_size, file.st_mtime_ns], "patch": pyramids.patch,
                "size": slide["size"], "scales": cfg.scales}
        if finished(path, 0, json.loads(json.dumps(meta))) is not None:
            continue
        found = slide_features(source, k, cfg.scales, cfg.batch)
        lost += slide["counts"][cfg.scales[0]] - (len(found[0]) if found else 0)
        if found is None:
            print(f"{slide['name']} has no patch and gets no file")
            continue
        features, coords, widths = found
        save_tensors(path, {"features": features, "coords": coords}, meta | {"widths": widths, "part": part})
    if lost:
        print(f"{lost} patches of scale {cfg.scales[0]} lie in no patch of {cfg.scales[1:]} and are left out")
    if ranks.rank == 0:
        print(f"done: {out}; next: python mil.py cv --features={out} --labels=FILE, a CSV of slide_id,label")
    ranks.barrier()

def main(argv):
    extract(configure(Config, argv, words=("run",), doc=__doc__))
