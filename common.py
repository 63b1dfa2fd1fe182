"""Plumbing that all files share. A reader may skip it: nothing is diffusion. read next: zoom_vae.py"""
import ast
import difflib
import inspect
import json
import os
import random
import signal
import sys
import time
import typing
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

class UserError(ValueError):
    """Something the user gave is unusable. The text names it and the remedy; `cli` prints it, exit code 2."""

def cli(main, doc="", stopped="the same command goes on from the last checkpoint"):
    """Run main(argv). doc: what --help prints for a file without settings; stopped: what is true after Ctrl-C."""
    if "RANK" not in os.environ:              # torchrun ends its processes itself
        signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C
    try:
        if doc and {"--help", "-h"} & {*sys.argv}:
            sys.exit(print(doc.strip(), flush=True))
        main(sys.argv[1:])
        sys.stdout.flush()                    # while a closed pipe is still caught
    except UserError as err:
        text = str(err)
        if text.startswith("Caught "):        # in a process that loads data: its traceback, then the sentence
            text = text.splitlines()[-1].partition(": ")[2]
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os._exit(0)                           # `python x.py | head`
    except KeyboardInterrupt:
        print(f"\ninterrupted; {stopped}", file=sys.stderr)
        sys.exit(130)

# ----- 1. Command lines: a dataclass of settings, presets, strict --key=value -----

def configure(cls, argv, presets=None, words=(), doc=""):
    """Fill the dataclass `cls`: its defaults, then a preset, then the command line. --help prints its source.
    in:  words, the fields that plain words fill, in this order; presets {word: {field: value}} of "preset".
    Options: --key=value, --group.key=value, --flag; --key=value too where one group alone has the key; and
    --group=value for group.kind. raises: UserError for an unknown key or preset, or a value of the wrong type."""
    if {"--help", "-h"} & {*argv}:
        print(doc.strip(), "settings (--key=value):", inspect.getsource(cls), sep="\n\n")
        print(*(inspect.getsource(group) for group in _types(cls).values() if is_dataclass(group)), flush=True)
        sys.exit(0)
    argv = [a.removeprefix("--preset=") for a in argv]      # --preset=toy means the word toy
    given = [a for a in argv if not a.startswith("--")]
    if len(given) > len(words):
        raise UserError(f"unexpected word {given[len(words)]!r}: options are written --key=value, see --help")
    cfg, settings = cls(), dict(zip(words, given))          # settings: what preset and words say
    if presets is not None:
        name = settings.get("preset", cfg.preset)
        if name not in presets:
            raise UserError(f"unknown preset {name!r}: known are {', '.join(presets)}{_nearest(name, presets)}")
        settings = presets[name] | settings
    for key, value in settings.items():                     # then options: the last word is the user's
        _set(cfg, key, value)
    for option in (a for a in argv if a.startswith("--")):
        key, equals, value = option[2:].partition("=")
        _set(cfg, key, value if equals else True)           # --amp means --amp=True
    return cfg

def _types(cls):
    return {f.name: f.type for f in fields(cls)}

def _set(cfg, key, value):
    """Set the field `key` of cfg, or of a group of settings in it."""
    types = _types(cfg)
    head, _, rest = key.partition(".")
    groups = [name for name, kind in types.items() if is_dataclass(kind)]
    owners = [name for name in groups if key in _types(types[name])]    # groups that have such a field
    if head in groups:
        _set(getattr(cfg, head), rest or "kind", value)     # --unet.width=64; --summarizer=cnn for its kind
    elif key in types:
        setattr(cfg, key, _convert(key, value, types[key]))  # --steps=40
    elif len(owners) == 1:
        _set(getattr(cfg, owners[0]), key, value)           # --warmup=5 for --optim.warmup=5
    else:
        known = [name + ".*" if name in groups else name for name in types]
        near = _nearest(key, known + [inner for name in groups for inner in _types(types[name])])
        raise UserError(f"unknown option --{key}{near}; known here: {', '.join(known)}")

def _convert(key, value, wanted):
    """A value as the type its field is annotated with. Text is a Python literal, unless that is str."""
    kinds = typing.get_args(wanted) or (wanted,)            # `int | None` gives both
    if isinstance(value, str) and (str not in kinds or value == "None" and type(None) in kinds):
        with suppress(ValueError, SyntaxError):             # what is no literal is refused below, as a str
            value = ast.literal_eval(value)
    if float in kinds and type(value) is int:
        value = float(value)                                # --lr=1
    good, name = type(value) in kinds, getattr(wanted, "__name__", wanted)
    if wanted is tuple:                                     # --unet.mult=1,2,4, or =3
        value = tuple(value) if type(value) in (tuple, list) else (value,)
        good, name = {type(v) for v in value} <= {int, float}, "numbers with commas"
    if not good or str not in kinds and "inf" in repr(value):           # 1e999 is infinite
        raise UserError(f"--{key}={value}: expected {name}, got {'infinity' if good else type(value).__name__}")
    return value

def _nearest(name, known):
    return "".join(f"; did you mean {near!r}?" for near in difflib.get_close_matches(name, known, 1, 0.5))

def at_least(cfg, **least):
    """Hold settings against the smallest numbers that mean something. raises: UserError, naming one below."""
    for name, low in least.items():
        value = getattr(cfg, name)
        if not value >= low:                                # so that nan is refused too
            raise UserError(f"--{name}={value}: it must be at least {low}")

def one_of(cfg, **known):
    """Hold settings against the words they may be. raises: UserError that names the first unknown one."""
    for name, words in known.items():
        value = getattr(cfg, name)
        if value not in words:
            raise UserError(f"--{name}={value}: known are {', '.join(words)}{_nearest(str(value), words)}")

def restore(cls, settings):
    """A configuration from plain types, as files hold them: lists become tuples."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})

# ----- 2. Files: written under a temporary name, then renamed; never unpickled -----

@contextmanager
def atomic(path, earlier=None):
    """Yield a temporary path, and rename it to `path` on success, so that nobody ever reads half a file.
    earlier: where the file goes that stands there now. raises: UserError if the disk refuses."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # on the same disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())                            # on the disk before anything older is given up
        if earlier and path.exists():
            os.replace(path, earlier)
        os.replace(tmp, path)                               # all or nothing
    except (OSError, SafetensorError) as err:
        kept = "; the earlier file is untouched" if path.exists() else ""
        raise UserError(f"could not write {path}: {err}; check free space and permissions{kept}") from err
    finally:
        if tmp.exists():
            tmp.unlink()

def home_of(run):
    """Where results of a run go: its folder, or out/shipped for the weights that come with the repository."""
    folder = Path(run).parent if Path(run).is_file() else Path(run)
    shipped = Path(__file__).resolve().parent / "weights"
    return Path("out/shipped") if folder.resolve() == shipped else folder

def write_text(path, text):
    with atomic(path) as tmp:
        tmp.write_text(text)

def save_tensors(path, tensors, meta=None, earlier=None):
    """Write {name: tensor} to a safetensors file; `meta` (plain types) travels as JSON in its header."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    with atomic(path, earlier) as tmp:
        save_file(tensors, tmp, {"json": json.dumps(meta or {})})

def open_tensors(path, framework="np"):
    """Map a safetensors file; "pt": one that fits into memory. raises: UserError if it is missing or damaged."""
    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as err:
        from slides.weights import explain                  # what it is instead, what to do
        raise UserError(explain(path, err)) from err

def load_meta(path):
    """What `save_tensors` wrote beside the tensors, {} for a foreign file. raises: as open_tensors."""
    with open_tensors(path) as f, suppress(ValueError, TypeError, RecursionError):  # refused below
        return dict(json.loads((f.metadata() or {}).get("json", "{}")))
    raise UserError(f"{path} is damaged: what its header says is no JSON object; copy or make it again")

def load_tensors(path):
    """in: a safetensors file. out: ({name: tensor}, meta). raises: as open_tensors."""
    with open_tensors(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, load_meta(path)

def crc32(x, before=0):
    """Checksum of a tensor's bytes, going on from the one `before`."""
    return zlib.crc32(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), before)

def fingerprint(module):
    """Checksum of all weights: tells whether latents or tokens on disk were made by this very network."""
    crc = 0
    for _, value in sorted(module.state_dict().items()):
        crc = crc32(value, crc)
    return f"{crc:08x}"

# ----- 3. Checkpoints: a run goes on exactly where it stopped -----

def checksum(tensors, meta):
    """Of all that a checkpoint holds. Disks and networks flip bits without an error."""
    crc = zlib.crc32(json.dumps(meta).encode())
    for name, x in sorted(tensors.items()):
        crc = crc32(x, zlib.crc32(f"{name} {tuple(x.shape)} {x.dtype}".encode(), crc))
    return crc

def previous(path):
    """The checkpoint before the one at `path`: state.safetensors -> state.1.safetensors."""
    return path.with_name(f"{path.stem}.1.safetensors")

def save_state(path, cfg, step, net, ema, opt):
    """Write weights, averages and the optimiser's moments into one file; the checkpoint before it stays."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in (ema or {}).items()}
    for i, moments in opt.state_dict()["state"].items():
        tensors |= {f"opt.{i}.{k}": v for k, v in moments.items()}
    made_on = getattr(net, "vae_mark", "")                  # the VAE whose latents it learns
    meta = {"step": step, "settings": asdict(cfg), "vae": made_on, "streams": "of whole keys"}
    save_tensors(path, tensors, meta | {"crc": checksum(tensors, meta)}, earlier=previous(path))

def newest_state(path, ranks=None):
    """The newest checkpoint that is whole: `path`, or the one before it. out: (file, tensors, meta), or None.
    raises: UserError if there are some, and none is whole. ranks: rank 0 puts a damaged one out of the way."""
    if not path.exists() and not previous(path).exists():
        return None                                         # a run that begins
    from large.resume import fall_back
    return fall_back(path, ranks)

def resume(path, cfg, net, ema, opt, ranks):
    """Load the newest whole checkpoint into net, ema and opt. out: the step to go on from, 0 without any."""
    found = newest_state(path, ranks)
    if found is None:
        return 0
    file, tensors, meta = found
    check_settings(file, cfg)
    if "streams" not in meta and ranks.rank == 0:           # before generators had them
        print(f"{file} is of an earlier version: it goes on, with other random numbers than it began with")
    net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    moments = {}                                            # {number of a parameter: {name: tensor}}
    for key, value in tensors.items():
        if key.startswith("ema."):
            ema[key[4:]].copy_(value)
        elif key.startswith("opt."):
            i, name = key[4:].split(".")
            moments.setdefault(int(i), {})[name] = value.clone()  # a view would hold a removed file's space
    opt.load_state_dict({"state": moments, "param_groups": opt.state_dict()["param_groups"]})
    return meta["step"]

def check_settings(path, cfg, only="", vae=""):
    """raises: UserError if the file at `path`, should it exist, was made with other settings than cfg (of those
    that start with `only`; a new one counts as its default), or on another VAE than one of this fingerprint."""
    if path.exists():                                       # all ranks look, so all stop
        from large.resume import compare_settings
        compare_settings(path, cfg, only, vae)

# ----- 4. Devices and ranks -----

@dataclass
class Ranks:
    """Where this process stands: rank of world, its device, and the autocast dtype (None = plain float32)."""
    rank: int
    world: int
    device: torch.device
    amp: torch.dtype | None

    def autocast(self):
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def attention(self):
        """For training: without the fused kernel on a CPU with bf16, where it is slower than in float32."""
        slow = self.device.type == "cpu" and self.amp is not None
        return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()

    def barrier(self):
        if self.world > 1:
            dist.barrier()                                  # wait for the others

    def sum(self, x):
        """Sum a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def show(self, draw, step, weights):
        """draw(step, weights) of a step that is saved: a SIGTERM ends it at once, unless other ranks wait."""
        before = signal.getsignal(signal.SIGTERM)
        if self.world == 1:
            why = f"SIGTERM: saved step {step}, whose samples are not drawn; the same command goes on from there"
            signal.signal(signal.SIGTERM, lambda *_: self.leave(why))
        draw(step, weights)
        signal.signal(signal.SIGTERM, before)

    def leave(self, why=""):
        """End together; with a reason, the process, too, with exit code 0."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
        if why:
            sys.exit(print(f"\n{why}" if self.rank == 0 else ""))

def setup(device="auto", amp=True, threads=0):
    """Read torchrun's environment, start the process group, choose device and dtype: bf16 autocast where the
    device has bf16 arithmetic, never fp16. raises: UserError."""
    if threads < 0:
        raise UserError(f"--threads={threads}: it must be at least 0 (= PyTorch's choice)")
    torch.set_num_threads(threads or torch.get_num_threads())
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one GPU a rank
    try:
        device = torch.device(device)
        torch.empty(1, device=device)                       # does it take anything?
    except (RuntimeError, AssertionError) as err:
        raise UserError(f"--device={device} cannot be used: {str(err).splitlines()[0]}") from err
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        fast = torch.cuda.is_bf16_supported(including_emulation=False)  # not where bf16 is slower
    if world > 1 and not dist.is_initialized():
        from large.ranks import join
        join(rank, world, device)
    return Ranks(rank, world, device, torch.bfloat16 if amp and fast else None)

def generator(*key):
    """A CPU torch.Generator for numbers and names such as (seed, stage, step): the same key, the same stream, another
    key, another. Python seeds MT19937 with SHA-512 of the key; torch's own seeding reads only 32 bits of a seed."""
    words = random.Random(" ".join(map(str, key))).getstate()[1][:624]  # the whole state
    twister = torch.Generator()
    state = twister.get_state()                             # at byte 24 the words, of 8 bytes each
    state[24:24 + 8 * 624] = torch.tensor(words).view(torch.uint8)
    return twister.set_state(state)

# ----- 5. Seeing: shape tables and contact sheets -----

def summary(module, *inputs, depth=2):
    """Print name, output shape and parameters of each submodule. Full size is free on the meta device."""
    shapes = {}
    def look(child, _, out):                                # called when a submodule has run
        shapes[child] = "x".join(map(str, (out[0] if isinstance(out, tuple) else out).shape))
    for child in module.modules():
        child.register_forward_hook(look)
    module(*inputs)
    print(f"{type(module).__name__}\n{'module':<28}{'output':>20}{'parameters':>14}")
    for name, child in [*module.named_modules()][1:] + [("total", module)]:
        count = sum(p.numel() for p in child.parameters())
        if count and name.count(".") < depth:               # the first levels, of what learns
            print(f"{name:<28}{shapes.get(child, '-'):>20}{count:>14,}")

def to_uint8(x):
    """in: (...,3,H,W) in [-1,1]. out: (...,H,W,3) uint8, rounded (the published code truncates)."""
    x = x.detach().float().cpu().clamp(-1, 1)
    levels = (x + 1) * 127.5                                # 0 to 255
    return levels.round().byte().movedim(-3, -1)

def save_png(path, pixels):
    """Write one picture. in: pixels (H,W,3) uint8, as `to_uint8` makes them."""
    with atomic(path) as tmp:
        Image.fromarray(np.asarray(pixels)).save(tmp, "PNG")

def save_grid(path, rows, labels=None):
    """Write a contact sheet. in: rows, a list of (n,3,H,W) in [-1,1]; labels, one text per row."""
    left = 8 + 6 * max(map(len, labels)) if labels else 0   # where labels stand, 6 pixels a letter
    h, w = rows[0].shape[2] + 2, rows[0].shape[3] + 2       # with a gap of two pixels
    sheet = Image.new("RGB", (left + w * max(map(len, rows)) + 2, h * len(rows) + 2), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(to_uint8(row).numpy()):    # (H,W,3)
            sheet.paste(Image.fromarray(tile), (left + j * w + 2, i * h + 2))
        if labels:
            ImageDraw.Draw(sheet).text((4, i * h + h // 2 - 6), labels[i], fill="black")
    save_png(path, sheet)

# ----- 6. The log of a training -----

def read_lines(path):
    """The records of a log; none if there is no such file. A line cut short by a kill is passed over."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]

def write_line(path, record, keep):
    """Add a record to a log, after those that are to be kept: a killed run may have written too many."""
    records = [r for r in read_lines(path) if keep(r)] + [record]
    write_text(path, "".join(json.dumps(r) + "\n" for r in records))

class Log:
    """Averages over all ranks between two lines of log.jsonl: losses, by scale and quarter of t; speed."""
    def __init__(self, path, stage, start, net, ranks):
        self.path, self.stage, self.net, self.ranks = path, stage, net, ranks
        self.rows, self.last, self.since = [], start, time.time()

    def mean(self, value, bins, n):
        """Means of value (N,) in n bins, over all ranks; None for an empty one."""
        sums = torch.zeros(2, n, device=value.device)
        sums.index_add_(1, bins, torch.stack([value, torch.ones_like(value)]))  # totals and counts
        totals, counts = self.ranks.sum(sums).tolist()
        return [round(total / n, 6) if n else None for total, n in zip(totals, counts)]

    def write(self, step, batch, grad, lr):
        """Add a line of the averages since the last one. out: the loss."""
        stage, net, start = self.stage, self.net, self.last
        rows = {k: torch.cat([r[k] for r in self.rows]).float() for k in self.rows[0]}      # (N,) each
        s, t = rows.pop("s").long(), rows.pop("t", None)    # there is no t in the VAE's
        record = {"stage": stage, "step": step}
        for name, value in rows.items():
            record[name] = self.mean(value, torch.zeros_like(s), 1)[0]
        error = next(rows[k] for k in ("eps", "psnr", "x0") if k in rows)   # comparable between samples
        record["by_scale"] = self.mean(error, s, net.scales)
        if t is not None:
            quarter = (t * 4 / net.schedule.T).long()
            record["by_t"] = self.mean(error, quarter, 4)
        seconds = time.time() - self.since
        speed = (step - start) * batch / seconds            # of all ranks
        record |= {"grad": round(float(grad), 4), "lr": lr, "img_s": round(speed, 1)}
        record |= getattr(net, "report", dict)()            # what else a stage has to say
        if self.ranks.rank == 0:
            write_line(self.path, record, lambda r: r["stage"] != stage or r["step"] <= start)
        self.rows, self.last, self.since = [], step, time.time()
        return record["loss"]
