"""Damaged files by the thousand: every one must end as data or a UserError, soon, in little memory (make torture).

Also makes the small TIFFs of all kinds that test_reader.py reads: no library at hand writes tiled ones.
"""
import io
import json
import resource
import struct
import sys
import tempfile
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError, save_tensors  # noqa: E402
from data import PatchDataset, Pyramids, fixed_batch  # noqa: E402
from slides.bags import read_bag  # noqa: E402
from slides.reader import open_slide  # noqa: E402
from slides.tiff import pack_directory  # noqa: E402
from slides.weights import load_state_dict  # noqa: E402

SECONDS, MEGABYTES = 2.0, 500

# ----- 1. Tiled TIFFs of every kind -----

def picture(h, w, bands=3):
    """Smooth, so that JPEG errs little; every band its own pattern, so that a swap of bands or axes shows."""
    y, x = np.mgrid[:h, :w]
    waves = np.sin(x / 19), np.sin(y / 13), np.sin((x + 2 * y) / 40), np.cos((y - x) / 9)
    return np.stack([127 + 100 * f for f in waves[:bands]], -1).astype(np.uint8)  # (h,w,bands)

def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)

def packed(tile, how, **options):
    """The bytes of one tile (h,w,bands), as compression `how` stores them."""
    image, out = Image.fromarray(tile.squeeze()) if how not in (1, 8) else None, io.BytesIO()
    if how == 7:  # the colours as they are, or turned to YCbCr; tables apart; no marker says which
        rgb = image.convert("YCbCr") if options.get("colours", 6) == 6 else image
        rgb = Image.frombytes("RGB", rgb.size, rgb.tobytes()) if image.mode == "RGB" else image
        if tile.shape[2] == 4:  # Pillow takes four bands for inks, which it turns round
            rgb, options = Image.frombytes("CMYK", image.size, (255 - tile).tobytes()), {"whole": True}
        rgb.save(out, "JPEG", quality=95, subsampling=0, keep_rgb=True, streamtype=2 * ("whole" not in options))
    elif how in (33003, 33005):
        ycc = image.convert("YCbCr") if how == 33003 else image
        rgb = Image.frombytes("RGB", image.size, ycc.tobytes()) if image.mode == "RGB" else image
        rgb.save(out, "JPEG2000", no_jp2=True, mct=int(how == 33005 and image.mode == "RGB"))
    elif how == 50001:
        image.save(out, "WEBP", lossless=True, exact=True)
    elif how == 8:
        if options.get("predictor") == 2:
            tile = np.concatenate([tile[:, :1], np.diff(tile, axis=1)], 1)
        out.write(zlib.compress(np.ascontiguousarray(tile)))
    elif how == 1:
        out.write(np.ascontiguousarray(tile))
    else:  # Pillow packs it as a strip
        compression = {5: "tiff_lzw", 32773: "packbits"}[how]
        image.save(out, "TIFF", compression=compression, strip_size=2**20, tiffinfo={317: 1})
        tags = Image.open(out).tag_v2
        return out.getvalue()[tags[273][0]:tags[273][0] + tags[279][0]]
    return out.getvalue()

def tables():
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG", quality=95, subsampling=0, keep_rgb=True, streamtype=1)
    return out.getvalue()

def page(image, tile, how, colours=None, kind=0, **options):
    """One directory: its tags {name: (type, values)} and its tiles. in: image (h,w,bands) uint8 or uint16; tile (w,h);
    in options, planar=2 for tiles of one band each, strips for strips of h rows."""
    (h, w, bands), planar, strips = image.shape, options.get("planar", 1), options.get("strips")
    colours = (1 if bands == 1 else 6 if how == 7 else 2) if colours is None else colours
    tile = (w, tile[1]) if strips else tile
    cut = [image[y:y + tile[1], x:x + tile[0]] for y in range(0, h, tile[1]) for x in range(0, w, tile[0])]
    if not strips:
        cut = [np.pad(t, ((0, tile[1] - t.shape[0]), (0, tile[0] - t.shape[1]), (0, 0)), "edge") for t in cut]
    cut = [t[..., c:c + 1] for c in range(bands) for t in cut] if planar == 2 else cut
    tags = dict(subfile=(4, [kind]), width=(4, [w]), height=(4, [h]), bits=(3, [8 * image.itemsize] * bands),
                compression=(3, [how]), bands=(3, [bands]), colours=(3, [colours]), planar=(3, [planar]),
                predictor=(3, [options.get("predictor", 1)]))
    tags |= {"strip_rows": (4, [tile[1]])} if strips else {"tile_width": (4, [tile[0]]), "tile_height": (4, [tile[1]])}
    if bands > 3:
        tags["extra_bands"] = 3, [0] * (bands - 3)
    if how == 7:
        tags["jpeg_tables"] = 1, list(tables())
    return tags, [packed(t, how, colours=colours, **options) for t in cut]

def write(path, pages, order="<", big=False, sub=()):
    """Write directories first, tiles behind; `sub` are sub-directories of the first."""
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    out += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    main, pages = len(pages), [(dict(tags), tiles) for tags, tiles in [*pages, *sub]]
    for tags, tiles in pages:
        if tiles:                                              # room for what is known later
            strip = "strip_" * ("strip_rows" in tags)
            tags |= {f"{strip}offsets": (16 if big else 4, [0] * len(tiles)),
                     f"{strip}lengths": (4, [len(t) for t in tiles])}
    if sub:
        pages[0][0]["sub_directories"] = 4, [0] * len(sub)
    starts = [len(out)]
    for tags, _ in pages:
        starts.append(starts[-1] + len(pack_directory(tags, 0, 0, big, order)))
    if sub:
        pages[0][0]["sub_directories"] = 4, starts[main:-1]
    end = starts[-1]
    for k, (tags, tiles) in enumerate(pages):
        for i, tile in enumerate(tiles):
            tags["strip_offsets" if "strip_rows" in tags else "offsets"][1][i] = end if tile else 0
            end += len(tile)
        out += pack_directory(tags, starts[k], 0 if k + 1 >= main else starts[k + 1], big, order)
    Path(path).write_bytes(out + b"".join(tile for _, tiles in pages for tile in tiles))

def text(words):
    return 2, [*words.encode(), 0]

def specimens(folder):
    """A file of every kind, small. out: their paths."""
    image, made = picture(90, 120), []
    small = image[::2, ::2]
    for name, how, options in (("jpeg", 7, {}), ("rgb", 7, {"colours": 2}), ("j2k", 33005, {}), ("ycc", 33003, {}),
                               ("deflate", 8, {"predictor": 2}), ("lzw", 5, {}), ("plain", 1, {}), ("pack", 32773, {}),
                               ("apart", 8, {"planar": 2}), ("webp", 50001, {}), ("rgbless", 8, {"colours": 1})):
        pages = [page(image, (32, 48), how, **options), page(small, (32, 48), how, kind=1, **options)]
        pages[0][0]["description"] = text("Aperio Image Library|AppMag = 20|MPP = 0.5")
        made.append(folder / f"{name}.svs")
        write(made[-1], pages, order=">" if name in ("lzw", "rgb") else "<", big=name in ("deflate", "jpeg"))
    for name, options in (("strips.tif", {"compression": "jpeg"}), ("raw.tif", {}), ("photo.jpg", {}), ("x.png", {})):
        made.append(folder / name)
        Image.fromarray(image).save(made[-1], **options)
    return made

# ----- 2. Damage -----

def mutate(data, rng):
    """A damaged copy: bytes flipped, numbers made extreme, a piece lost, moved or repeated; mostly near the start."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        n = len(data)
        at = int(rng.integers(0, min(n, 600) if rng.random() < 0.7 else n))
        kind = rng.integers(0, 7)
        if kind <= 1:
            data[at] = rng.integers(0, 256)
        elif kind <= 3:
            value = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**16, 2**24, n, n - 1, 60000, int(rng.integers(0, 2**32))])
            data[at // 2 * 2:at // 2 * 2 + 4] = struct.pack(rng.choice(["<I", ">I"]), value)
        elif kind == 4:
            del data[at + 20:at + 20 + int(rng.integers(1, 200))]
        elif kind == 5 and rng.random() < 0.3:
            del data[max(40, int(rng.integers(0, n))):]
        else:
            source = int(rng.integers(0, n))
            data[at:at + 12] = data[source:source + 12]
    return bytes(data)

def examine(path):
    """Open a file and read what anybody would: corners, the coarsest level, another resolution."""
    slide = open_slide(path)
    w, h = slide.size
    for level in slide.levels:
        n, m = min(64, level.size[0]), min(64, level.size[1])
        for x, y in ((0, 0), (level.size[0] - n, level.size[1] - m), ((level.size[0] - n) // 2, 0)):
            assert level.region(x, y, n, m).shape == (m, n, 3)
    assert slide.read(w - 20, h - 20, 40, 40).shape == (40, 40, 3)
    if slide.mpp and w * h < 2**22:
        mpp = slide.mpp * min(3, w, h)
        assert slide.read(0, 0, 8, 8, mpp).dtype == np.uint8

# ----- 3. The same for features, checkpoints and the index of data -----

def h5_files(folder):
    """Features as CLAM, TRIDENT and STAMP write them. out: their paths."""
    import h5py
    made, x, at = [], np.random.default_rng(0).random((20, 8), np.float32), 256 * np.arange(40).reshape(20, 2)
    for name, key, values, how in (("clam", "features", x, {}), ("stamp", "feats", x.astype("f2"), {"chunks": (5, 8)}),
                                   ("trident", "features", x[None], {"compression": "gzip"})):
        made.append(folder / f"{name}.h5")
        with h5py.File(made[-1], "w") as f:
            f.create_dataset(key, data=values, **how)
            f.create_dataset("coords", data=at).attrs["patch_size_level0"] = 256
    return made

def tensor_files(folder):
    x = torch.rand(20, 8)
    save_tensors(folder / "bag.safetensors", {"features": x, "coords": torch.zeros(20, 2, dtype=torch.int64)},
                 {"scales": [0], "widths": [8], "patch": 16})
    save_tensors(folder / "weights.safetensors", {f"blocks.{i}.weight": x + i for i in range(4)})
    data_files(folder)
    return [folder / name for name in ("bag.safetensors", "weights.safetensors", "data/a.safetensors")]

def data_files(folder):
    """A folder of data with one image, at two scales. out: its index.json."""
    slide = {"name": "a", "file": "a.safetensors", "split": "train", "size": [64, 64], "counts": [16, 4]}
    tensors = {"e": torch.rand(4, 4, 3).half()}
    for s, n in enumerate(slide["counts"]):
        tensors[f"x{s}"] = torch.zeros(n, 16, 16, 3, dtype=torch.uint8)
        tensors[f"ij{s}"] = torch.cartesian_prod(*[torch.arange(4 >> s)] * 2).int()
    folder = folder / "data"
    save_tensors(folder / "a.safetensors", tensors, {"source": {}})
    index = dict(format=1, patch=16, scales=2, embed_dim=3, encoder="stats", std=[1.0] * 3, source={}, slides=[slide])
    (folder / "index.json").write_text(json.dumps(index))
    return [folder / "index.json"]

ODD = (None, True, -1, 0, 2**31, 10**30, 1e308, float("nan"), "", "x", "../../x", "/x", "a\0", [], [1], {}, {"a": 1})

def mutate_json(data, rng):
    """Now and then as bytes; else with a value in it that is another, or gone."""
    if rng.random() < 0.2:
        return mutate(data, rng)
    tree = json.loads(data)
    for _ in range(rng.integers(1, 3)):
        at = tree
        while True:
            key = list(at)[rng.integers(len(at))] if isinstance(at, dict) else int(rng.integers(len(at)))
            if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.3:
                break
            at = at[key]
        kind, other = rng.random(), list(at)[rng.integers(len(at))] if isinstance(at, dict) else 0
        if kind < 0.1:
            del at[key]
        elif kind < 0.5:
            at[key], at[other] = at[other], at[key]            # a header stays whole when two tensors change names
        else:
            at[key] = ODD[rng.integers(len(ODD))]
        if not tree:
            break
    return json.dumps(tree).encode()

def mutate_header(data, rng):
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return mutate(data[:end], rng) + data[end:]
    head = mutate_json(data[8:end], rng)
    return len(head).to_bytes(8, "little") + head + data[end:]

def examine_data(path):
    """Read what trainings and pictures would."""
    pyramids = Pyramids(path.parent)
    for s in range(min(pyramids.scales, 4)):
        batch = fixed_batch(pyramids, "train", s, 2, ("x", "e"))
        assert batch["tokens"].shape[1] == 64 and batch["x"].shape[1] == 3
    PatchDataset(pyramids, want=("x",))[3]

def examine_tensors(path):
    return {"bag": read_bag, "weights": load_state_dict}.get(path.stem, examine_data)(path)

KINDS = {  # what is damaged: the files that are, how they are read, how they are damaged, and how many of them
    "TIFF and photographs": (specimens, examine, mutate, 2000), "h5": (h5_files, read_bag, mutate, 500),
    "index.json": (data_files, examine_data, mutate_json, 500),
    "safetensors headers": (tensor_files, examine_tensors, mutate_header, 500)}

def torture(count, folder, seed=0, kind="TIFF and photographs"):
    """out: {outcome: count} and a list of faults, over `count` mutants: seconds of this process (others may keep the
    machine busy), and how far its peak of memory rose."""
    make, look, damage, _ = KINDS[kind]
    made = [(path, path.read_bytes()) for path in make(folder)]
    outcomes, faults = {"image": 0, "refused": 0}, []
    for k in range(count):
        path, data = made[k % len(made)]
        path.write_bytes(damage(data, np.random.default_rng([seed, k])))
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            outcome = "image"
            look(path)
        except UserError as err:
            outcome = "refused" if path.name in str(err) or str(path.parent) in str(err) else f"unnamed: {err}"
        except Exception as err:
            outcome = f"{type(err).__name__}: {err}"
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024  # kB on Linux
        if outcome in outcomes and seconds <= SECONDS and grown <= MEGABYTES:
            outcomes[outcome] += 1
        else:
            faults.append(f"{path.name}, seed {seed}, {k}: {outcome}, {seconds:.1f} s, {grown:.0f} MB")
        path.write_bytes(data)
    return outcomes, faults

if __name__ == "__main__":
    bad = 0
    for kind, (*_, count) in KINDS.items():
        if kind == "h5" and not find_spec("h5py"):
            print("h5: left out, it needs the extra: pip install -e '.[h5]'")
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcomes, faults = torture(count, Path(folder), kind=kind)
        print(f"{kind}: {count} damaged, {outcomes}, {len(faults)} faults", *faults, sep="\n  ", flush=True)
        bad += len(faults)
    sys.exit(bool(bad))
