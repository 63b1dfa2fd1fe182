"""Plumbing that all files share: command lines, files, checkpoints, ranks and devices, pictures. Skip it at first.

Nothing here knows about diffusion. What belongs to one model stands in the file of that model.

read next: zoom_vae.py
"""
import ast
import difflib
import inspect
import json
import os
import sys
import typing
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class UserError(ValueError):
    """Something the user gave is unusable. The text names it and the remedy; `cli` prints it and exits with code 2."""


def cli(main, doc=""):
    """Run main(argv). doc: what --help prints for a file without settings; `configure` answers it for the others."""
    if doc and ("--help" in sys.argv or "-h" in sys.argv):
        print(doc.strip())
        sys.exit(0)
    try:
        main(sys.argv[1:])
    except UserError as err:
        text = str(err)
        if text.startswith("Caught "):        # in a process that loads data: its traceback, then the sentence
            text = text.splitlines()[-1].partition(": ")[2]
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                   # `python x.py | head`
        os._exit(0)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


# ----- 1. Command lines: a dataclass of settings, presets, strict --key=value -----

def configure(cls, argv, presets=None, words=(), doc=""):
    """Fill the dataclass `cls`: its defaults, then a preset, then the command line. --help prints its source.

    in:  words, the fields that plain words fill, in this order; presets {word: {field: value}} of the field "preset".
         Options: --key=value, --group.key=value, --flag; --key=value too where one group alone has the key, and
         --group=value for group.kind. raises: UserError for an unknown key or preset, or a value of the wrong type.
    """
    if "--help" in argv or "-h" in argv:
        print(doc.strip(), "settings (--key=value):", inspect.getsource(cls), sep="\n\n")
        for group in _types(cls).values():
            print(inspect.getsource(group) if is_dataclass(group) else "", end="")
        sys.exit(0)
    if presets is not None:
        argv = [a.removeprefix("--preset=") for a in argv]
    given = [a for a in argv if not a.startswith("--")]
    if len(given) > len(words):
        raise UserError(f"unexpected word {given[len(words)]!r}: options are written --key=value, see --help")
    cfg, settings = cls(), dict(zip(words, given))
    if presets is not None:
        name = settings.get("preset", cfg.preset)
        if name not in presets:
            raise UserError(f"unknown preset {name!r}: known are {', '.join(presets)}{_nearest(name, presets)}")
        settings = presets[name] | settings
    for key, value in settings.items():
        _set(cfg, key, value)
    for option in argv:
        if option.startswith("--"):
            key, equals, value = option[2:].partition("=")
            _set(cfg, key, value if equals else True)
    return cfg


def _types(cls):
    return {f.name: f.type for f in fields(cls)}


def _set(cfg, key, value):
    """Set the field `key` of cfg, or of a group of settings in it."""
    types, (head, _, rest) = _types(cfg), key.partition(".")
    groups = [name for name, kind in types.items() if is_dataclass(kind)]
    owners = [name for name in groups if key in _types(types[name])]
    if head in groups:
        _set(getattr(cfg, head), rest or "kind", value)     # --unet.width=64; --summarizer=cnn for its kind
    elif key in types:
        setattr(cfg, key, _convert(key, value, types[key]))
    elif len(owners) == 1:
        _set(getattr(cfg, owners[0]), key, value)           # --warmup=5 for --optim.warmup=5
    else:
        known = [name + ".*" if name in groups else name for name in types]
        raise UserError(f"unknown option --{key}{_nearest(key, known)}; known here: {', '.join(known)}")


def _convert(key, value, wanted):
    """A value as the type its field is annotated with. Text is read as a Python literal, unless that type is str."""
    kinds, name = typing.get_args(wanted) or (wanted,), getattr(wanted, "__name__", wanted)   # `int | None` gives both
    if isinstance(value, str) and (str not in kinds or value == "None" and type(None) in kinds):
        with suppress(ValueError, SyntaxError):             # what is no literal is refused below, as a str
            value = ast.literal_eval(value)
    if float in kinds and type(value) is int:
        value = float(value)
    good = type(value) in kinds
    if wanted is tuple:
        value = tuple(value) if type(value) in (tuple, list) else (value,)
        good, name = {type(v) for v in value} <= {int, float}, "numbers with commas"
    if not good:
        raise UserError(f"--{key}={value}: expected {name}, got {type(value).__name__}")
    return value


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def at_least(cfg, **least):
    """Hold settings against the smallest numbers that mean something. raises: UserError that names the first below."""
    for name, low in least.items():
        if not getattr(cfg, name) >= low:                   # so that nan is refused too
            raise UserError(f"--{name}={getattr(cfg, name)}: it must be at least {low}")


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
    """Yield a temporary path, and rename it to `path` on success: nobody ever reads half a file.

    earlier: where the file goes that stands there now, if it is kept. raises: UserError if the disk refuses."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())                            # on the disk before anything older is given up
        if earlier and path.exists():
            os.replace(path, earlier)
        os.replace(tmp, path)
    except (OSError, SafetensorError) as err:
        kept = "; the earlier file is untouched" if path.exists() else ""
        raise UserError(f"could not write {path}: {err}; check free space and permissions{kept}") from err
    finally:
        if tmp.exists():
            tmp.unlink()


def write_text(path, text):
    with atomic(path) as tmp:
        tmp.write_text(text)


def save_tensors(path, tensors, meta=None, earlier=None):
    """Write {name: tensor} to a safetensors file; `meta` (plain types) travels as JSON in its header."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    with atomic(path, earlier) as tmp:
        save_file(tensors, tmp, {"json": json.dumps(meta or {})})


def open_tensors(path, framework="pt"):
    """Memory-map a safetensors file. raises: UserError if it is missing, cut short, or something else."""
    if not Path(path).is_file():
        raise UserError(f"no file {path}: check the path, or run the command that makes it")
    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as err:
        raise UserError(f"{path} is not a complete safetensors file ({err}); copy or make it again") from err


def load_meta(path):
    """What `save_tensors` wrote beside the tensors, {} for a foreign file. raises: as open_tensors."""
    with open_tensors(path) as f:
        return json.loads((f.metadata() or {}).get("json", "{}"))


def load_tensors(path):
    """in: a safetensors file. out: ({name: tensor}, meta). raises: as open_tensors."""
    with open_tensors(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}, load_meta(path)


def crc32(tensors, start=0):
    """A checksum of named tensors. Disks and networks flip bits without an error."""
    for name, v in sorted(tensors.items()):
        start = zlib.crc32(f"{name} {tuple(v.shape)} {v.dtype}".encode(), start)
        start = zlib.crc32(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), start)
    return start


def fingerprint(module):
    """crc32 of all weights: tells whether latents or tokens on disk were made by this very network."""
    crc = 0
    for _, v in sorted(module.state_dict().items()):
        crc = zlib.crc32(v.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


# ----- 3. Published checkpoints -----

# old checkpoints name these classes beside their tensors; they are read as empty classes that do nothing
INERT = [type("Namespace", (), {"__module__": "argparse"}),
         type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})]


def load_state_dict(path):
    """Read a foreign checkpoint (.safetensors, or .ckpt/.pt/.pth/.bin of tensors alone) as a flat state dict.

    A wrapping "state_dict" (CompVis), "ema" (the published CDM's) or "teacher" (DINO) is taken off. raises: UserError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: check the path")
    try:
        with torch.serialization.safe_globals(INERT):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch meets damaged bytes with IndexError, TypeError, struct.error and many more
        raise UserError(f"{path} is damaged or holds more than tensors (which could run code, so it is refused): "
                        f"download it again, or save its state_dict as .safetensors") from err
    for wrap in ("state_dict", "ema", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(wrap), dict):
            state = state[wrap]
    if not isinstance(state, dict) or not any(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; give a checkpoint of the published layout")
    return state


def check_official(module, state, prefix, rename, ignore=()):
    """Hold a published state dict against `module`. in: rename maps our parameter names to published ones, after
    `prefix`; ignore, beginnings of keys that are bookkeeping. out: {our name: published key}. raises: ValueError that
    lists missing, unexpected and mis-shaped keys."""
    ours = module.state_dict()
    names = {name: prefix + rename(name) for name in ours}
    known = {*names.values()}
    ignored = tuple(prefix + i for i in ignore)
    extra = [k for k in state if k.startswith(prefix) and k not in known and not k.startswith(ignored)]
    missing = [key for key in names.values() if key not in state]
    shaped = [f"{key} is {tuple(state[key].shape)}, expected {tuple(ours[name].shape)}"
              for name, key in names.items() if key in state and state[key].shape != ours[name].shape]
    text = ""
    for what, keys in ("missing", missing), ("unexpected", sorted(extra)), ("of another shape", shaped):
        text += f"; {len(keys)} {what}: {shorten(', '.join(keys), 300)}" if keys else ""
    if text:
        raise UserError(f"this is not a published {type(module).__name__} checkpoint{text}")
    return names


def load_official(module, state, prefix, rename, ignore=()):
    """Copy a published state dict into `module`, which may be on the meta device. in, raises: as check_official."""
    names = check_official(module, state, prefix, rename, ignore)
    if next(module.parameters()).is_meta:
        module.to_empty(device=next(iter(state.values())).device)
    module.load_state_dict({name: state[key] for name, key in names.items()})


def common_size(state, dim, *names):
    """The size along `dim` that most of these tensors of a state dict have, so that one that is missing or damaged does
    not mislead; None if there is none."""
    sizes = [state[n].shape[dim] for n in names if n in state and state[n].ndim > dim]
    return max(sizes, key=sizes.count, default=None)


def common_count(state, start):
    """1 + the largest number that follows `start` in the keys; 0 if there is none."""
    numbers = [k[len(start):].split(".")[0] for k in state if k.startswith(start)]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=0)


# ----- 4. Our own checkpoints: a run goes on exactly where it stopped -----

# what may differ when a run goes on: it changes where, how long and how loud it runs, not what it computes
FREE = {"preset", "out", "device", "threads", "workers", "compile", "unet.checkpoint", "steps", "micro", "log_every",
        "sample_every", "save_every", "run", "sheet",
        "channels_last", "plot", "toy", "keep", "max_skips", "profile"}
GONE = {"disc_weight": 0.0, "lpips": "", "shares": []}  # settings of earlier versions that did change it


def previous(path):
    """The checkpoint before the one at `path`: state.safetensors -> state.1.safetensors."""
    return path.with_name(f"{path.stem}.1.safetensors")


def save_state(path, cfg, step, net, ema, opt):
    """Write weights, averages and the moments of the optimiser into one file; the checkpoint before it stays."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in (ema or {}).items()}
    for i, moments in opt.state_dict()["state"].items():
        tensors |= {f"opt.{i}.{k}": v for k, v in moments.items()}
    meta = {"step": step, "settings": asdict(cfg)}
    meta["crc"] = crc32(tensors, zlib.crc32(json.dumps(meta).encode()))
    save_tensors(path, tensors, meta, earlier=previous(path))


def newest_state(path, ranks=None):
    """The newest checkpoint that is whole: `path`, or the one before it.

    out: (file, tensors, meta), or None if there is no file. raises: UserError if all are damaged. ranks, if given: rank
    0 puts a damaged one out of the way.
    """
    faults = []
    for file in (path, previous(path)):
        try:
            tensors, meta = load_tensors(file)
            crc = meta.pop("crc", None)                     # the first versions wrote none
            if crc not in (None, crc32(tensors, zlib.crc32(json.dumps(meta).encode()))) or "step" not in meta:
                raise ValueError("its checksum does not fit")
            break
        except (ValueError, RuntimeError, SafetensorError) as err:
            faults.append(str(err) if isinstance(err, UserError) else f"{file} is damaged: {err}")
    if len(faults) == 2:
        if path.exists() or previous(path).exists():
            raise UserError(f"no checkpoint is whole: {'; '.join(faults)}; remove them to start afresh")
        return None
    if faults and ranks:
        ranks.barrier()                                     # all have looked
        if ranks.rank == 0:
            print(f"{faults[0]}: falling back to {file}, step {meta['step']}")
            if path.exists():
                os.replace(path, f"{path}.damaged")
    return file, tensors, meta


def resume(path, cfg, net, ema, opt, ranks):
    """Load the newest whole checkpoint into net, ema and opt. out: the step to go on from, 0 if there is none."""
    found = newest_state(path, ranks)
    if found is None:
        return 0
    file, tensors, meta = found
    check_settings(file, cfg)
    net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    moments = {}
    for key, value in tensors.items():
        if key.startswith("ema."):
            ema[key[4:]].copy_(value)
        elif key.startswith("opt."):
            i, name = key[4:].split(".")
            moments.setdefault(int(i), {})[name] = value.clone()  # a view would hold the space of a removed file
    opt.load_state_dict({"state": moments, "param_groups": opt.state_dict()["param_groups"]})
    return meta["step"]


def _flat(settings, start=""):
    """Nested settings as one dict of dotted names; those of the loop and its optimiser once stood in no group."""
    out = {}
    for key, value in settings.items():
        name = start + key
        inner = "" if name in ("optim", "loop") else name + "."
        out |= _flat(value, inner) if isinstance(value, dict) else {name: value}
    return out


def check_settings(path, cfg, only=""):
    """raises: UserError if the file at `path`, should it exist, was made with other settings (whose names start with
    `only`) than cfg. One that did not exist then counts as its default. All ranks read the file, so all stop."""
    if not path.exists():
        return
    meta = load_meta(path)
    if not meta.get("settings"):
        raise UserError(f"{path} does not say what settings it belongs to, so it is none of ours: move it away")
    now, default = (GONE | _flat(json.loads(json.dumps(asdict(c)))) for c in (cfg, type(cfg)()))
    then = default | _flat(meta["settings"])
    changed = [k for k in now if k not in FREE and k.startswith(only) and now[k] != then[k]]
    if changed:
        afresh = "another --out" if "out" in now else f"move {path.name.split('.')[0]}*.safetensors away"
        raise UserError(f"{path} belongs to a run with other settings ({', '.join(changed)}): give the same ones to "
                        f"resume, or {afresh} to start afresh")


# ----- 5. Devices and ranks -----

@dataclass
class Ranks:
    """Where this process stands: rank of world, its device, and the autocast dtype (None = plain float32)."""
    rank: int
    world: int
    device: torch.device
    amp: torch.dtype | None

    def autocast(self):
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def barrier(self):
        """Wait for the other ranks, if there are any."""
        if self.world > 1:
            dist.barrier()

    def sum(self, x):
        """Sum a tensor over all ranks, in place. out: the tensor."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


def setup(device="auto", amp=True, threads=0):
    """Read torchrun's environment, start the process group, choose device and dtype: bf16 autocast where the device has
    bf16 arithmetic, never fp16 (design §7). raises: UserError."""
    if threads < 0:
        raise UserError(f"--threads={threads}: it must be at least 0 (= PyTorch's choice)")
    if threads:
        torch.set_num_threads(threads)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise UserError(f"--device={device} cannot be used: {str(err).splitlines()[0]}") from err
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if world > 1 and not dist.is_initialized():
        backend, wait = "nccl" if device.type == "cuda" else "gloo", timedelta(hours=2)
        store = None
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun on one node: its store outlives a restart of the ranks, which must not find the dead ones' places
            store = next(dist.rendezvous("env://", timeout=wait))[0]
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world)
    return Ranks(rank, world, device, torch.bfloat16 if amp and fast else None)


def generator(*key):
    """A CPU torch.Generator seeded by integers such as (seed, rank, step): the same key, the same numbers."""
    if min(key) < 0:
        raise UserError(f"seed {', '.join(str(int(k)) for k in key)}: a seed is at least 0")
    seed = np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) & (2**63 - 1))


# ----- 6. Seeing: shape tables and contact sheets -----

def summary(module, *inputs, depth=2):
    """Print name, output shape and parameters of each submodule. On the meta device full size costs no time."""
    shapes = {}

    def look(child, _, out):
        shapes.setdefault(child, "x".join(map(str, (out[0] if isinstance(out, tuple | list) else out).shape)))
    for child in module.modules():
        child.register_forward_hook(look)
    module(*inputs)
    print(f"{type(module).__name__}\n{'module':<28}{'output':>20}{'parameters':>14}")
    for name, child in module.named_modules():
        count = sum(p.numel() for p in child.parameters())
        if name and count and name.count(".") < depth:
            label = "  " * name.count(".") + name.split(".")[-1]
            print(f"{label:<28}{shapes.get(child, '-'):>20}{count:>14,}")
    print(f"{'total':<48}{sum(p.numel() for p in module.parameters()):>14,}")


def to_uint8(x):
    """in: (...,3,H,W) in [-1,1]. out: (...,H,W,3) uint8, rounded (the published code truncates)."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1)


def save_png(path, pixels):
    """Write one picture. in: pixels (H,W,3) uint8, as `to_uint8` makes them."""
    with atomic(path) as tmp:
        Image.fromarray(np.asarray(pixels)).save(tmp, "PNG")


def save_grid(path, rows, labels=None):
    """Write a contact sheet. in: rows, a list of (n,3,H,W) in [-1,1]; labels, one text per row."""
    left = 8 + 6 * max(map(len, labels)) if labels else 0
    h, w = rows[0].shape[2] + 2, rows[0].shape[3] + 2       # with a gap of two pixels
    sheet = Image.new("RGB", (left + w * max(map(len, rows)) + 2, h * len(rows) + 2), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(to_uint8(row).numpy()):    # (H,W,3)
            sheet.paste(Image.fromarray(tile), (left + j * w + 2, i * h + 2))
        if labels:
            ImageDraw.Draw(sheet).text((4, i * h + h // 2 - 6), labels[i], fill="black")
    save_png(path, sheet)
