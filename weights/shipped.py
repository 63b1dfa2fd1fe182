"""The weights that come with the repository: how they are read, and what commands do that are given no run.

    python sample_joint.py                               # patches, and one image of 512 x 512 pixels
    python invert.py --image=FILE --scale=2
    python cdm.py sample

in:  weights/toy.safetensors, and the files beside it   out: a whole ZoomLDM; pictures in out/shipped
read next: weights/ship.py"""
import os
from pathlib import Path

from common import UserError, checksum, fingerprint, home_of
from data import main as make_data
from data import read_index
from slides.weights import SHIPPED, explain, way_back
from toy.make import ToyConfig
from zoom_vae import VQVAE

FORMAT = 1                                                  # of what the headers say
NAMES = ("vae", "toy", "cdm", "proxy")                      # weights/NAME.safetensors
HELD_OUT = ("--slides=1", "--test=8", "--workers=1")        # enough to show, in seconds
# settings with which a command that is given no run still draws the large image after the patches
OF_BOTH = {"data", "split", "seed", "guidance", "batch", "device", "threads", "amp", "compile"}

# ----- 1. Reading -----

def sealed(state, config):
    """The header of a shipped file: `config`, and a checksum of it and all tensors."""
    told = config | {"format": FORMAT}
    return told | {"crc": checksum(state, told)}

def check_seal(path, state, config):
    """raises: UserError if a shipped file is of another version of the program, or not as it was written."""
    told = dict(config)
    crc, version = told.pop("crc", None), told.get("format")
    if version != FORMAT:
        raise UserError(f"{path} is of another version of this program (format {version}, not {FORMAT}): "
                        f"{way_back(path)}")
    if crc != checksum(state, told):
        raise UserError(f"{path} is damaged, its checksum does not fit: {way_back(path)}")

def with_vae(path, state, config):
    """The weights of a whole ZoomLDM: those of a shipped file, and of the VAE in a file of its own beside it.
    in: what load_tensors gave of the file at `path`. raises: UserError if one of both is damaged, missing, of another
    version, or if it is not the VAE that U-Net and Summarizer were trained on."""
    check_seal(path, state, config)
    file = path.with_name(Path(config["vae_file"]).name)    # whatever the header says: in the same folder
    vae, _ = VQVAE.from_run(file)
    mark = fingerprint(vae)
    if mark != config["vae_fingerprint"]:
        raise UserError(f"{path} was trained on another VAE (fingerprint {config['vae_fingerprint']}) than {file} "
                        f"({mark}): {way_back(path)}")
    own = {k: v for k, v in state.items() if k.startswith(("summarizer.", "unet."))}
    return own | {f"vae.{k}": v for k, v in vae.state_dict().items()}

# ----- 2. Without a run -----

def shipped_run(kind="toy"):
    """The path of the shipped model, in short. in: kind, one more file that is needed. raises: UserError if one of
    them is missing."""
    for name in ("toy", "vae", kind):
        file = SHIPPED / f"{name}.safetensors"
        if not file.is_file():
            short = Path(os.path.relpath(file))
            raise UserError(explain(short, None) + ", or give a RUN of your own, such as out/toy")
    return os.path.relpath(SHIPPED / "toy.safetensors")

def typed(run, data=""):
    """A run, and its data if they were named, as one types them in a command: nothing for the shipped weights."""
    return "" if home_of(run) == home_of(SHIPPED) else f"{run} " + f"--data={data} " * bool(data)

def holds_slides(folder):
    """Whether a folder has held-out toy slides as the shipped model knows them."""
    if not Path(folder, "index.json").is_file():
        return False
    index = read_index(folder)
    ours = index["patch"] == ToyConfig.patch and index["encoder"] == ToyConfig.encoder
    return ours and any(slide["split"] == "test" for slide in index["slides"])

def held_out_slides():
    """A folder with held-out toy slides: data/toy, if it is there; else a few that are drawn now."""
    if holds_slides(ToyConfig.out):
        return ToyConfig.out
    folder = str(home_of(SHIPPED) / "slides")
    if not holds_slides(folder):
        print(f"there is no {ToyConfig.out} yet: a few toy slides lend their conditions")
        make_data(["toy", f"--out={folder}", *HELD_OUT])
    return folder

def arguments(argv):
    """What a command that is given no run stands for: the shipped model, and held-out toy slides."""
    run = shipped_run()
    named = any(a.startswith(("--data=", "--reference=")) for a in argv)
    return [run, *argv] if named else [run, f"--data={held_out_slides()}", *argv]

def draw(argv):
    """What `python sample_joint.py` does without a run: patches, and, unless a setting asks for something about patches
    alone, one large image."""
    import sample_joint
    from large.command import main as draw_large_image
    given = arguments(argv)
    sample_joint.main(given)
    if {a[2:].partition("=")[0] for a in argv} <= OF_BOTH:
        draw_large_image([*given, "--size=512"])
