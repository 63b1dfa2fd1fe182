"""Every claim of the papers on one page, and what a run says of it.

    python -m experiments.claims out/toy                # fifteen lines, of what was measured before
    python -m experiments.claims out/toy --run          # measure what is missing or stale: under three hours, two cores
    python -m experiments.claims out/toy --run=C5,C8    # only of these

A line: claim · the paper's figure · here ± standard error · holds, fails or open · the page that explains it. A claim
holds if every quantity is above its bound (0, or what stands behind ">") by two standard errors, fails if one is below
by as much, and is open else. It is stale once weights, data or code are others than those it was measured with.

in:  a run folder, or the shipped weights   out: lines; RUN/claims/C*.json, one a claim     read next: docs/results.md
"""
import ast
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import torch

from common import UserError, cli, configure, home_of, load_meta, one_of, write_text
from data import read_index
from diffusion import ZoomLDM
from experiments import measures as M
from weights.shipped import shipped_run

ROOT = Path(__file__).resolve().parent.parent

@dataclass
class Config:
    model: str = ""           # run folder; default: the weights that come with the repository, results in out/shipped
    run: bool | str = False   # measure what is missing or stale: all, or some, as C5,C8
    data: str = ""            # toy slides; default: those the run was trained on
    task: str = "data/task"   # C9: slides with labels; drawn if they are missing
    second: str = "data/photos"  # C4: pyramids of photographs, see docs/weights.md
    device: str = "auto"
    threads: int = 2

def verdict(found):
    """in: {name: (value, error, bound)}. out: holds, fails or open."""
    room = [(value - bound, 2 * error) for value, error, bound in found.values() if bound is not None]
    if any(gap < -wide for gap, wide in room):
        return "fails"
    return "holds" if all(gap > wide for gap, wide in room) else "open"

# ----- 1. The claims -----

@dataclass
class Claim:
    says: str
    paper: str                    # its figure, "-" where we know none, and where it stands
    page: str
    minutes: int                  # on two cores
    measure: Callable | str       # or why nothing is measured
    code: str = ""                # the modules behind it; with all that they import
    made: tuple = ()              # files of the run that it hangs on, besides the weights
    folders: tuple = ()           # settings that name data it hangs on, besides the run's

CDM, GRID = ("cdm.safetensors",), ("grid.safetensors",)
CLAIMS = {
    "C1": Claim("one model for all scales beats one each where images are few", "- (Z Tables 1, 2)", "quality", 14,
                M.shared_or_single, "experiments.conditions train"),
    "C2": Claim("patches of invented conditions lie between those of true ones and of none",
                "FID at 20x 9.29 true, 14.96 invented (W); - (Z Table 1)", "conditions", 10,
                M.between, "experiments.conditions", CDM),
    "C3": Claim("samples are no copies of training images", "- (Z S9.1)", "conditions", 2,
                M.no_copies, "experiments.conditions", CDM),
    "C4": Claim("a second domain works alike: real slides, photographs from above", "- (Z, NAIP)", "data", 7,
                M.second_domain, "experiments.metrics sample_joint train", folders=("second",)),
    "C5": Claim("joint sampling beats patches alone in coherence, in a fraction of the time",
                "28 s at 1024, 8 min at 4096 pixels (Z Table 3)", "large", 6,
                M.coherence, "experiments.against large.command"),
    "C6": Claim("differences of the encoder point where the gradient does", "- (Z Eq. 6, S12)", "speed", 2,
                M.directions, "experiments.speed"),
    "C7": Claim("super-resolution: inferred conditions no worse than none, perceptually above bicubic",
                "- (Z Table 4)", "superres", 15, M.super_resolution, "experiments.sr"),
    "C8": Claim("inversion works from 5x up, and worse below", "- (Z S9)", "superres", 8,
                M.inversion, "experiments.sr"),
    "C9": Claim("two scales beat one for slide labels", "- (Z Table 5)", "mil", 12,
                M.two_scales, "experiments.labels", folders=("task",)),
    "C10": Claim("the transformer Summarizer beats the CNN", "- (W)", "quality", 13,
                 M.summarizers, "experiments.workshop sample_joint train"),
    "C11": Claim("large images resemble their reference", "above 0.9 (L Table 1)", "large", 5,
                 M.likeness, "experiments.quality large.command"),
    "C12": Claim("samples help as training data", "- (L Tables 2, 3)", "mil", 10,
                 M.samples_as_data, "experiments.labels"),
    "C13": Claim("text controls content", "- (L Fig. 4)", "text", 30,
                 M.text_controls, "experiments.conditions", GRID),
    "C14": Claim("diffusion features beat the embeddings they were conditioned on", "- (Z Table 5; L Table 4)", "mil",
                 25, M.learned_features, "experiments.labels train"),
    "C15": Claim("50 steps and guidance 2 suffice", "50, 2 (Z)", "quality", 8,
                 M.enough, "experiments.conditions"),
}

# ----- 2. What a result came from -----

def bytes_of(paths):
    """A checksum of files; one that is missing counts as empty."""
    crc = 0
    for path in map(Path, paths):
        crc = crc32(path.read_bytes() if path.is_file() else b"", crc)
    return f"{crc:08x}"

def imports(name):
    """The modules of ours that a module imports, anywhere in it."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)

@cache
def tree_of(name):
    """The source of a module of ours, parsed; of any other, nothing."""
    path = ROOT / f"{name.replace('.', '/')}.py"
    return ast.parse(path.read_text() if path.is_file() else "")

@cache
def code_of(measure, names):
    """A checksum of a measurement, what measures.py holds for all of them, and the modules behind it. Comments and
    layout do not count."""
    others = {getattr(claim.measure, "__name__", "") for claim in CLAIMS.values()} - {measure.__name__}
    own = [node for node in tree_of("experiments.measures").body if getattr(node, "name", None) not in others]
    found, todo = set(), names.split()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += imports(name)
    crc = 0
    for tree in [*own, *map(tree_of, sorted(found))]:
        crc = crc32(ast.dump(tree).encode(), crc)
    return f"{crc:08x}"

@dataclass
class Book:
    """Where the results of a run lie, and what they would be of now."""
    cfg: Config
    weights: Path                 # file of the model
    home: Path                    # folder for all that is made

    def path(self, name):
        return self.home / "claims" / f"{name}.json"

    def marks(self, claim):
        folders = [self.cfg.data, *(getattr(self.cfg, name) for name in claim.folders)]
        return {"weights": bytes_of([self.weights, *(self.home / file for file in claim.made)]),
                "data": bytes_of([Path(folder) / "index.json" for folder in folders]),
                "code": code_of(claim.measure, claim.code)}

    def result(self, name):
        """What was found, {} if nothing yet. raises: UserError for a damaged file."""
        path = self.path(name)
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as err:
            raise UserError(f"{path} is damaged: remove it, and measure again with --run={name}") from err

    def status(self, name):
        """out: why a claim is open or stale; nothing if its result counts."""
        claim, result = CLAIMS[name], self.result(name)
        if isinstance(claim.measure, str):
            return f"open: {claim.measure}"
        if not result:
            return "open: not run"
        now = self.marks(claim)
        other = [part for part, mark in result["marks"].items() if mark != now[part]]
        if other:
            return f"stale: other {', '.join(other)}"
        return f"open: {result['open']}" if "open" in result else ""

    def line(self, name):
        claim, found = CLAIMS[name], self.result(name).get("found", {})
        here = "; ".join(map(quantity, found, found.values())) or "-"
        status = self.status(name) or verdict(found)
        return f"{name} {claim.says} · {claim.paper} · {here} · {status} · docs/{claim.page}.md"

def quantity(name, numbers):
    value, error, bound = numbers
    wanted = f" (> {bound:g})" if bound else ""
    return f"{name} {value:.3f}±{error:.3f}{wanted}"

# ----- 3. The command -----

def opened(cfg):
    """out: the Book of a run. raises: UserError if there is none."""
    weights = Path(cfg.model, "ema.safetensors") if cfg.model else Path(shipped_run())
    if not weights.is_file():
        raise UserError(f"no trained model at {weights}: give a run folder, or train one with python train.py toy")
    cfg.data = cfg.data or load_meta(weights).get("info", {}).get("data", "")
    return Book(cfg, weights, home_of(weights))

def chosen(cfg):
    """The claims that --run names. raises: UserError for one that is none."""
    names = list(CLAIMS) if cfg.run is True else [name.strip() for name in str(cfg.run or "").split(",") if name]
    for name in names:
        one_of(SimpleNamespace(run=name), run=CLAIMS)
    return names

def measure(book, names):
    """Measure claims one by one, and write each whole when it is done, so that the same command goes on."""
    minutes = sum(CLAIMS[name].minutes for name in names)
    print(f"measuring {', '.join(names)}: about {minutes} minutes on two cores, writing {book.home}/claims", flush=True)
    if read_index(book.cfg.data)["source"].get("command") != "toy":
        raise UserError(f"{book.cfg.data} holds no toy slides, of which claims are measured: python data.py toy")
    if book.weights.parent != book.home:
        ZoomLDM.from_run(book.weights).save(book.home)
    lab = M.Lab(book.cfg, book.home)
    for name in names:
        claim, began = CLAIMS[name], time.perf_counter()
        print(f"\n{name}: {claim.says}, about {claim.minutes} minutes", flush=True)
        torch.manual_seed(0)
        before = book.marks(replace(claim, made=()))        # those may be made only now
        lab.mark = f"{crc32(json.dumps(before).encode()):08x}"
        try:
            result = {"found": claim.measure(lab)}
        except UserError as err:                            # what it needs is not there: the others go on
            result = {"open": str(err)}
        result |= {"marks": book.marks(claim), "minutes": round((time.perf_counter() - began) / 60, 1)}
        write_text(book.path(name), json.dumps(result, indent=1))
        print(book.line(name), flush=True)

def main(argv):
    cfg = configure(Config, argv, words=("model",), doc=__doc__)
    names = chosen(cfg)
    book = opened(cfg)
    due = [name for name in names if book.status(name) and callable(CLAIMS[name].measure)]
    if due:
        measure(book, due)
        print()
    for name in CLAIMS:
        print(book.line(name))

if __name__ == "__main__":
    cli(main, stopped="the same command goes on with the claims that are not done")
