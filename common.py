"""Plumbing shared by every file: command lines, files on disk, devices, shape tables, contact sheets.

Nothing here knows about diffusion. The list is closed: whatever is specific to one model lives in that model's file.

read next: zoom_vae.py
"""
import ast
import difflib
import inspect
import json
import os
import pickle
import sys
import typing
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ----- 1. Settings: a run goes on with those it began with -----

# settings that may differ when a run is resumed: they do not change what is computed, only where, how long and how loud
# (micro: unless there is batch norm, in PatchGAN or the CNN Summarizer; max_skips: unless there is something to skip)
FREE = {"preset", "out", "device", "threads", "workers", "compile", "channels_last", "unet.checkpoint", "plot", "steps",
        "micro", "toy", "log_every", "sample_every", "save_every", "keep", "max_skips", "profile", "run", "sheet",
        "made_for"}  # made_for: cdm.py compares it, for files that lack it too


def flat(settings, start=""):
    """Nested settings as one dict, under dotted names."""
    inner = [flat(v, f"{start}{k}.") if isinstance(v, dict) else {start + k: v} for k, v in settings.items()]
    return {k: v for part in inner for k, v in part.items()}


def check_settings(path, cfg, only=""):
    """raises: UserError if the file at `path`, should it exist, was made with other settings (whose names start with
    `only`) than cfg; a setting that did not exist then counts as its default. Every rank of a run reads the same file,
    so all stop together."""
    if not path.exists():
        return
    with open_tensors(path) as f:
        then = json.loads((f.metadata() or {}).get("json", "{}")).get("settings", {})
    now, default = (flat(json.loads(json.dumps(asdict(c)))) for c in (cfg, type(cfg)()))
    if not then:
        raise UserError(f"{path} does not say what settings it belongs to, so it is none of ours: move it away")
    then = default | flat(then)
    changed = [k for k in now if k not in FREE and k.startswith(only) and now[k] != then.get(k)]
    if changed:
        afresh = "another --out" if "out" in now else f"move {path.name.split('.')[0]}*.safetensors away"
        raise UserError(f"{path} belongs to a run with other settings ({', '.join(changed)}): give the same ones to "
                        f"resume, or {afresh} to start afresh")


# ----- 2. Files -----

def fingerprint(module):
    """crc32 over all weights: tells whether latents or tokens on disk were made by this very network."""
    crc = 0
    for _, v in sorted(module.state_dict().items()):
        crc = zlib.crc32(v.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def checksum(tensors, meta):
    """crc32 over all that a state file holds. Disks and networks flip bits without an error."""
    crc = zlib.crc32(json.dumps(meta).encode())
    for k, v in sorted(tensors.items()):
        crc = zlib.crc32(f"{k} {tuple(v.shape)} {v.dtype}".encode(), crc)
        crc = zlib.crc32(v.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def older(path, k):
    """The name of the checkpoint k saves before the newest, which is `path`."""
    return path.with_name(f"{path.stem}.{k}.safetensors") if k else path


def before(path):
    """The checkpoints there are from before `path`, latest first. out: [(k of `older`, file)]."""
    return sorted((int(p.suffixes[-2][1:]), p) for p in path.parent.glob(f"{path.stem}.[0-9]*.safetensors"))


def save_state(path, cfg, step, net, ema, opt):
    """Raw weights, averaged weights, optimiser moments: tensors only, in one atomic file. cfg.keep files stay."""
    moments = {f"opt.{i}.{k}": v for i, s in opt.state_dict()["state"].items() for k, v in s.items()}
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in (ema or {}).items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in (tensors | moments).items()}
    meta = {"step": step, "settings": asdict(cfg)}
    with atomic(path) as tmp:
        save_file(tensors, tmp, {"json": json.dumps(meta | {"crc": checksum(tensors, meta)})})
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())  # before the older files move: a full disk leaves them where they are
        for k in range(cfg.keep - 1, 0, -1):
            if older(path, k - 1).exists():
                os.replace(older(path, k - 1), older(path, k))
    for k, file in before(path):
        if k >= cfg.keep:  # from when more were kept
            file.unlink()


def read_state(path):
    """in: a state file. out: (tensors, meta). raises: UserError if it is not as it was written."""
    try:
        tensors, meta = load_tensors(path)
        crc, step = meta.pop("crc", None), meta["step"]  # the first versions wrote no crc
        if crc not in (None, checksum(tensors, meta)):
            raise UserError(f"{path} is damaged: its checksum does not fit, step {step}")
    except (KeyError, ValueError, RuntimeError, SafetensorError) as err:
        raise err if isinstance(err, UserError) else UserError(f"{path} is damaged ({err})") from err
    return tensors, meta


def newest_state(path, ranks=None):
    """The newest checkpoint that is whole: `path`, else one from before it. out: (file, tensors, meta), None if there
    is no file at all. ranks, if given: rank 0 says what is wrong with newer files and puts them out of the way.
    raises: UserError if all are damaged."""
    earlier, faults = [file for _, file in before(path)], {}
    for file in (path, *earlier) if path.exists() or earlier else ():
        try:
            found = (file, *read_state(file))
            break
        except UserError as err:
            faults[file] = str(err)
    else:
        if faults:
            raise UserError(f"no checkpoint is whole: {'; '.join(faults.values())}; remove them to start afresh")
        return None
    if ranks and faults:
        ranks.barrier()  # all have looked
        for bad, why in faults.items() if ranks.rank == 0 else ():
            print(f"{why}: falling back to {file}, step {found[2]['step']}")
            if bad.exists():
                os.replace(bad, bad.with_name(bad.name + ".damaged"))
    return found


def goes_on(path, cfg):
    """Whether there is a checkpoint to go on from. raises: UserError if it was made with other settings than cfg, or
    none is whole."""
    if found := newest_state(path):
        check_settings(found[0], cfg)
    return found is not None


def resume(path, cfg, net, ema, opt, ranks):
    """Load the newest whole checkpoint into net, ema and opt. out: the step to go on from, 0 if there is none."""
    if (found := newest_state(path, ranks)) is None:
        return 0
    file, tensors, meta = found
    check_settings(file, cfg)
    groups = {"net.": {}, "ema.": {}, "opt.": {}}
    for k, v in tensors.items():
        groups[k[:4]][k[4:]] = v
    net.load_state_dict(groups["net."])
    for k, v in groups["ema."].items():
        ema[k].copy_(v)
    moments = {}
    for k, v in groups["opt."].items():
        i, _, key = k.partition(".")
        moments.setdefault(int(i), {})[key] = v.clone()  # kept: a mapped file would hold its disk space
    opt.load_state_dict({"state": moments, "param_groups": opt.state_dict()["param_groups"]})
    return meta["step"]


class UserError(ValueError):
    """Something the user gave is unusable. The text names it and the remedy; `cli` prints it and exits with code 2."""


def cli(main, doc=""):
    """Run main(argv): a UserError becomes one sentence and exit code 2, Ctrl-C a quiet exit code 130.

    doc: what --help prints for a file that takes no settings; one that does answers --help itself, by `configure`.
    """
    if doc and {"--help", "-h"} & {*sys.argv[1:]}:
        print(doc.strip())
        sys.exit(0)
    try:
        main(sys.argv[1:])
    except UserError as err:
        text = str(err)
        if text.startswith("Caught "):  # in a data loading process, which sends its whole traceback
            text = text.splitlines()[-1].partition(": ")[2]
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `python x.py | head`
        os._exit(0)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


# ----- 1. Command lines: a dataclass, presets, strict --key=value -----

def configure(cls, argv, presets=None, words=(), doc=""):
    """Build the dataclass `cls` from defaults < preset < command line.

    in:  words, the names of the fields that positional words fill, in order; a word for the field "preset" also
         applies presets[word], a dict of (dotted) field names. Options are --key=value, --nested.key=value, or --flag;
         --nested=value sets nested.kind, where there is such a field.
    out: an instance of cls. `--help` prints doc and the source of cls, which documents every field, and exits.
    raises: UserError for an unknown key or preset (with the nearest known one) or a value of the wrong type.
    """
    if "--help" in argv or "-h" in argv:
        print((doc or "").strip() + "\n\nsettings (--key=value):\n\n" + inspect.getsource(cls))
        for f in fields(cls):
            if is_dataclass(f.type):
                print(inspect.getsource(f.type))
        sys.exit(0)
    if presets is not None:  # --preset=x means x, or its settings would be left out in silence
        argv = [a.removeprefix("--preset=") for a in argv]
    cfg, given = cls(), [a for a in argv if not a.startswith("--")]
    if len(given) > len(words):
        raise UserError(f"unexpected word {given[len(words)]!r}: options are written --key=value, see --help")
    if presets is not None:
        name = given[words.index("preset")] if len(given) > words.index("preset") else cfg.preset
        if name not in presets:
            raise UserError(f"unknown preset {name!r}: known are {', '.join(presets)}{_nearest(name, presets)}")
        for key, value in presets[name].items():
            _set(cfg, key, value)
    for key, value in zip(words, given, strict=False):
        _set(cfg, key, value)
    for arg in (a for a in argv if a.startswith("--")):
        key, eq, value = arg[2:].partition("=")
        _set(cfg, key, value if eq else True)
    return cfg


def at_least(cfg, **least):
    """Hold settings against the smallest numbers that mean something. raises: UserError that names the first below."""
    for name, low in least.items():
        value = getattr(cfg, name)
        if not value >= low:  # so that nan is refused too
            raise UserError(f"--{name}={value}: it must be at least {low}")


def one_of(cfg, **known):
    """Hold settings against the words they may be. raises: UserError that names the first unknown one."""
    for name, words in known.items():
        value = getattr(cfg, name)
        if value not in words:
            raise UserError(f"--{name}={value}: known are {', '.join(words)}{_nearest(str(value), words)}")


def _nearest(name, known):
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _set(cfg, key, value):
    """Set one (dotted) field, converting a command-line string to the annotated type."""
    head, _, rest = key.partition(".")
    types = typing.get_type_hints(type(cfg))
    if not rest and is_dataclass(types.get(head)) and hasattr(types[head], "kind"):
        rest = "kind"  # --summarizer=cnn
    if head not in types or bool(rest) != is_dataclass(types[head]):
        known = [n + ".*" if is_dataclass(t) else n for n, t in types.items()]
        raise UserError(f"unknown option --{key}{_nearest(key, known)}; known here: {', '.join(known)}")
    if rest:
        return _set(getattr(cfg, head), rest, value)
    accepted = typing.get_args(types[head]) if type(None) in typing.get_args(types[head]) else (types[head],)
    kinds = [typing.get_origin(t) or t for t in accepted]
    if isinstance(value, str) and str not in kinds or value == "None" and type(None) in kinds:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    if float in kinds and type(value) is int:
        value = float(value)
    if tuple in kinds and type(value) is not tuple and value is not None:
        value = (value,) if type(value) is not list else tuple(value)
    if type(value) not in kinds or type(value) is tuple and not {type(v) for v in value} <= {int, float}:
        wanted = "numbers with commas" if tuple in kinds else getattr(types[head], "__name__", types[head])
        raise UserError(f"--{key}={value}: expected {wanted}, got {type(value).__name__}")
    setattr(cfg, head, value)


# ----- 2. Files: written under a temporary name, then renamed; never unpickled -----

@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; rename it there on success, so that a reader never sees half a file."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
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


def save_tensors(path, tensors, meta=None):
    """Write {name: tensor} to a safetensors file; `meta` (plain types) travels as JSON in its header."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    with atomic(path) as tmp:
        save_file(tensors, tmp, {"json": json.dumps(meta or {})})


def open_tensors(path, framework="pt"):
    """Memory-map a safetensors file. raises: UserError if it is missing, cut short, or something else."""
    if not Path(path).is_file():
        raise UserError(f"no file {path}: check the path, or run the command that makes it")
    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as err:
        raise UserError(f"{path} is not a complete safetensors file ({err}); copy or make it again") from err


def load_tensors(path):
    """in: a safetensors file. out: ({name: tensor}, meta). raises: as open_tensors."""
    with open_tensors(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get("json", "{}"))


# old checkpoints name these classes beside their tensors: read as empty ones that do nothing
INERT = [type(name, (), {"__module__": module}) for module, name in (
    ("argparse", "Namespace"), ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"))]


def load_state_dict(path):
    """Read a foreign checkpoint (.safetensors, or .ckpt/.pt/.pth/.bin holding tensors only) as a flat state dict.

    A wrapping "state_dict" (CompVis), "ema" (which the published CDM is sampled with) or "teacher" (DINO) entry is
    taken off. raises: UserError if missing, cut short, or if unpickling it would run code (weights_only=True refuses).
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: check the path")
    try:
        with torch.serialization.safe_globals(INERT):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise UserError(f"{path} is damaged or no plain tensor checkpoint (unpickling it could run code, so it is "
                        f"refused); download it again, or save its state_dict as .safetensors first") from err
    except Exception as err:  # torch meets damaged bytes with IndexError, TypeError, struct.error and many more
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise UserError(f"{path} is damaged or cut short ({reason}); download it again") from err
    for wrap in ("state_dict", "ema", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(wrap), dict):
            state = state[wrap]
            break
    if not isinstance(state, dict) or not any(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; give a checkpoint of the published layout")
    return state


def check_official(module, state, prefix, rename, ignore=()):
    """Hold a published state dict against `module`; every key under `prefix` must be accounted for.

    in:  rename maps our parameter name to the published one (without prefix); ignore lists key beginnings, after the
         prefix, that are documented bookkeeping.
    out: {our name: published key}. raises: ValueError listing missing, unexpected and mis-shaped keys.
    """
    ours = module.state_dict()
    want = {prefix + rename(name): name for name in ours}
    assert len(want) == len(ours), "two parameters share a published name"
    unexpected = sorted(k for k in state if k.startswith(prefix) and k not in want
                        and not k.startswith(tuple(prefix + i for i in ignore)))
    missing = [k for k in want if k not in state]
    shaped = [f"{k} is {tuple(state[k].shape)}, expected {tuple(ours[n].shape)}"
              for k, n in want.items() if k in state and state[k].shape != ours[n].shape]
    if missing or unexpected or shaped:
        def show(keys):
            return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        raise UserError(f"this is not a published {type(module).__name__} checkpoint" + "".join(
            f"; {len(keys)} {what}: {show(keys)}" for what, keys in
            (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped)) if keys))
    return {n: k for k, n in want.items()}


def load_official(module, state, prefix, rename, ignore=()):
    """Copy a published state dict into `module`; in, raises: as check_official. A module built on the meta device (no
    time lost on random weights) gets its memory here, once the keys fit."""
    want = check_official(module, state, prefix, rename, ignore)
    if next(module.parameters()).is_meta:
        module.to_empty(device=next(iter(state.values())).device)
    module.load_state_dict({n: state[k] for n, k in want.items()})


def common_size(state, dim, *names):
    """The size along `dim` that most of these tensors of a state dict have, so that one that is missing or damaged does
    not mislead; None if there is none."""
    sizes = [state[n].shape[dim] for n in names if n in state and state[n].ndim > dim]
    return max(sizes, key=sizes.count, default=None)


def common_count(state, start):
    """1 + the largest number that follows `start` in the keys; 0 if there is none."""
    numbers = [k[len(start):].split(".")[0] for k in state if k.startswith(start)]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=0)


# ----- 3. Devices and ranks -----

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
            torch.distributed.barrier()


def setup(device="auto", amp=True, threads=0):
    """Read torchrun's environment, start the process group (gloo on CPU, nccl on CUDA), choose device and dtype: bf16
    autocast where the device has bf16 arithmetic, never fp16 (design §7). raises: UserError."""
    if threads < 0:
        raise UserError(f"--threads={threads}: it must be at least 0 (= PyTorch's choice)")
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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if threads:
        torch.set_num_threads(threads)
    if world > 1 and not torch.distributed.is_initialized():
        more = {"timeout": timedelta(hours=2)}
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # torchrun on one node, whose store outlives a restart of
            # the ranks (PyTorch 2.13): they must not find the addresses of those that are dead
            store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(
                torch.distributed.rendezvous("env://", **more))[0])
            more |= {"store": store, "rank": rank, "world_size": world}
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", **more)
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return Ranks(rank, world, device, torch.bfloat16 if amp and fast else None)


def generator(*key):
    """A CPU torch.Generator seeded by integers such as (seed, rank, step): the same key, the same numbers."""
    if min(key) < 0:
        raise UserError(f"seed {', '.join(str(int(k)) for k in key)}: a seed is at least 0")
    seed = np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) & (2**63 - 1))


# ----- 4. Seeing: shape tables and contact sheets -----

def summary(module, *inputs, depth=2):
    """Print one row per submodule down to `depth`: name, output shape, parameters, share of the total. Meant for
    the meta device, where the full-size model costs neither memory nor time."""
    shapes, hooks = {}, []
    total = sum(p.numel() for p in module.parameters())

    def watch(name):
        def hook(_, __, out):
            first = out[0] if isinstance(out, tuple | list) else out
            shapes.setdefault(name, "x".join(map(str, first.shape)))
        return hook
    rows = [(n, m) for n, m in module.named_modules() if n and n.count(".") < depth and sum(1 for _ in m.parameters())]
    for name, child in rows:
        hooks.append(child.register_forward_hook(watch(name)))
    module(*inputs)
    for h in hooks:
        h.remove()
    print(f"{type(module).__name__}\n{'module':<28}{'output':>20}{'parameters':>14}{'share':>8}")
    for name, child in rows:
        n = sum(p.numel() for p in child.parameters())
        print(f"{'  ' * name.count('.') + name.split('.')[-1]:<28}{shapes.get(name, '-'):>20}{n:>14,}{n / total:>8.1%}")
    print(f"{'total':<28}{'':>20}{total:>14,}")


def to_uint8(x):
    """in: (...,3,H,W) in [-1,1]. out: (...,H,W,3) uint8, rounded (the published code truncates)."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1)


def save_png(path, pixels):
    """Write one picture. in: pixels (H,W,3) uint8, as `to_uint8` makes them."""
    with atomic(path) as tmp:
        Image.fromarray(pixels).save(tmp, "PNG")


def save_grid(path, rows, labels=None, zoom=1, pad=2):
    """Write a contact sheet. in: rows, a list of (n,3,H,W) in [-1,1]; labels, one text per row."""
    rows = [to_uint8(r).numpy() for r in rows]  # (n,H,W,3)
    side = max(len(x) for x in labels) * 6 + 8 if labels else 0
    h, w = rows[0].shape[1] * zoom + pad, rows[0].shape[2] * zoom + pad
    sheet = Image.new("RGB", (side + w * max(len(r) for r in rows) + pad, h * len(rows) + pad), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            tile = Image.fromarray(tile).resize((w - pad, h - pad), Image.Resampling.NEAREST)
            sheet.paste(tile, (side + j * w + pad, i * h + pad))
        if labels:
            ImageDraw.Draw(sheet).text((4, i * h + h // 2 - 6), labels[i], fill="black")
    with atomic(path) as tmp:
        sheet.save(tmp, "PNG")
