"""slides/official.py: official folders give the items that pyramids give, train.py takes them; embeddings by others."""
import io

import numpy as np
import pytest
import torch
from conftest import quick
from PIL import Image

import cdm
import data
import sample_joint
import train
from common import UserError
from data import PatchDataset, fixed_batch
from diffusion import ZoomLDM
from slides import official as published
from slides.official import Samples, layout_of, read_features
from slides.strips import Job, with_features
from summarizer import pack_grid, standardize

E, SIDE = 16, 8  # embedding width and latent side of the small sets here; published: 1024 and 64

def official(folder, layout, pictures=False, numbers=(0, 3, 2_000_001)):
    """A small folder of the official layout. out: {(scale, number): (z, e)}; at 20x BRCA's embeddings have one axis."""
    rng, made = np.random.default_rng(0), {}
    for s, name in enumerate(published.LAYOUTS[layout][0][:4]):
        for number in numbers:
            sub = folder / name / str(number // 1_000_000) if layout == "brca" else folder / name
            sub.mkdir(parents=True, exist_ok=True)
            z, e = rng.normal(size=(3, SIDE, SIDE)).astype(np.float16), rng.normal(size=(E, 4**s)).astype(np.float16)
            made[s, number] = torch.from_numpy(z).float(), torch.from_numpy(e).float().unflatten(1, (2**s, 2**s))
            np.save(sub / f"{number}_vae.npy", z)
            if layout == "brca":
                np.save(sub / f"{number}_uni_grid.npy", e[:, 0] if s == 0 else e)
            else:
                np.save(sub / f"{number}_dino_grid.npy", e.T)
            if pictures:
                Image.new("RGB", (4 * SIDE, 4 * SIDE), (255, 0, s)).save(buffer := io.BytesIO(), "PNG")
                if layout == "brca":
                    np.save(sub / f"{number}_img.npy", np.frombuffer(buffer.getvalue(), np.uint8))
                else:
                    (sub / f"{number}.jpg").write_bytes(buffer.getvalue())
    return made

@pytest.mark.parametrize("layout, pictures", [("brca", False), ("brca", True), ("naip", True)])
def test_items(tmp_path, layout, pictures):
    """Each sample, as the pyramids would give it. catches: channels for tokens; 4x taken for scale 2; a million per
    folder; an order that follows the file system."""
    made = official(tmp_path, layout, pictures)
    samples = Samples(tmp_path)
    assert layout_of(tmp_path) == layout and samples.encoder == {"brca": "uni", "naip": "dinov2_reg"}[layout]
    assert (samples.patch, samples.embed_dim, samples.scales) == (32, E, {"brca": 8, "naip": 4}[layout])
    assert [samples.count("train", s) for s in range(4)] == [3] * 4 and samples.names("test") == []
    assert samples.images == pictures
    for (s, number), (z, e) in made.items():
        item = samples.item(0, s, [0, 3, 2_000_001].index(number), ("z", "e", "x")[:3 if pictures else 2])
        tokens, mask = pack_grid(standardize(e))
        assert torch.equal(item["z"], z) and torch.equal(item["e"], e) and item["s"] == s
        assert torch.equal(item["tokens"], tokens) and torch.equal(item["mask"], mask)
        if pictures:
            wanted = torch.tensor([1.0, -1.0, s / 127.5 - 1])[:, None, None].expand(3, 32, 32)
            torch.testing.assert_close(item["x"], wanted)
    if not pictures:
        with pytest.raises(UserError, match="sample 0 of .* has no picture"):
            samples.item(0, 0, 0, ("x",))

def test_the_dataset_is_that_of_pyramids(tmp_path, toy):
    """Same fields, kinds and shapes per sample (its own sizes apart); scales in equal shares, if not empty."""
    official(tmp_path, "brca")
    dataset, theirs = PatchDataset(Samples(tmp_path), seed=3), data.Pyramids(toy).item(0, 1, 0, ())
    item = dataset[7]
    assert item.keys() - {"z"} == theirs.keys() - {"ij"} and item["tokens"].shape == (64, E)
    assert item["tokens"].dtype == theirs["tokens"].dtype == torch.float32
    assert item["mask"].shape == theirs["mask"].shape and item["mask"].dtype == theirs["mask"].dtype
    scales = [dataset[k]["s"] for k in range(200)]
    assert all(30 < scales.count(s) < 75 for s in range(4))
    batch = fixed_batch(Samples(tmp_path), "train", 2, 8, ("z",))
    assert batch["z"].shape == (3, 3, SIDE, SIDE) and batch["mask"].sum(1).tolist() == [16] * 3

def test_grids_that_were_not_pooled(tmp_path):
    """At 1.25x a folder may hold 8 x 8 or 16 x 16; both give 64 tokens."""
    official(tmp_path, "brca")
    (sub := tmp_path / "1_25x" / "0").mkdir(parents=True)
    e = np.random.default_rng(0).normal(size=(E, 256)).astype(np.float32)
    for number, grid in ((5, e), (6, e.reshape(E, 8, 2, 8, 2).mean((2, 4)).reshape(E, 64))):
        np.save(sub / f"{number}_vae.npy", np.zeros((3, SIDE, SIDE), np.float16))
        np.save(sub / f"{number}_uni_grid.npy", grid)
    a, b = (Samples(tmp_path).item(0, 4, n, ("z",))["tokens"] for n in (0, 1))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("name, content, says", [
    ("3_vae.npy", b"\x93NUMPY", "3_vae.npy cannot be read"),
    ("3_vae.npy", np.zeros((3, SIDE, 4)), "expected latents"),
    ("3_vae.npy", np.array([{}]), "cannot be read"),  # a pickle is not opened
    ("3_uni_grid.npy", b"", "3_uni_grid.npy cannot be read"),
    ("3_uni_grid.npy", np.zeros((E, 3)), r"expected \(16, 16\) at scale 2"),
    ("3_uni_grid.npy", np.zeros((16, E, 1)), "expected")])
def test_damaged_samples_are_named(tmp_path, name, content, says):
    for there in ("none of the folders 20x", "holds no file like .*20x/.*17_vae.npy"):
        with pytest.raises(UserError, match=there):
            Samples(tmp_path)
        (tmp_path / "20x").mkdir(exist_ok=True)
    official(tmp_path, "brca")
    samples, path = Samples(tmp_path), tmp_path / "5x" / "0" / name
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=says):
        samples.item(0, 2, 1, ("z",))

SMALL = ["--unet.width=32", "--unet.mult=1,2", "--unet.res_blocks=1", "--unet.attention=2", "--summarizer.width=32",
         "--summarizer.depth=1", "--summarizer.mlp=32", "--steps=1", "--batch=4", "--workers=0", "--amp=False",
         "--device=cpu", "--log_every=1"]

@pytest.mark.parametrize("layout", ["brca", "naip"])
def test_train_takes_the_official_folder(tmp_path, run, layout, capsys):
    official(tmp_path / "set", layout, pictures=layout == "naip")
    out = tmp_path / "run"
    quick([layout, *SMALL, f"--data={tmp_path / 'set'}", f"--vae_weights={run}", f"--out={out}"])
    model = ZoomLDM.from_run(out)
    assert model.summarizer.cfg.scales == {"brca": 8, "naip": 4}[layout] and model.summarizer.cfg.embed_dim == E
    assert model.info["encoder"] == {"brca": "uni", "naip": "dinov2_reg"}[layout] and not (out / "latents").exists()
    assert (out / "samples" / "step_000001.png").stat().st_size > 0
    if layout == "naip":
        return
    cdm.main(["train", str(out), "smoke", "--steps=1", "--sheet=1", "--device=cpu"])
    assert (out / "cdm.safetensors").exists()
    for command, says in ((lambda: sample_joint.main([str(out), "--device=cpu"]), "are for training alone"),
                          (lambda: cdm.main(["train", str(out), "smoke", "--model=grid", "--device=cpu"]), "whole")):
        with pytest.raises(UserError, match=says):
            command()
    with pytest.raises(UserError, match="latents of the published VAE: give it with --vae_weights"):
        train.main(["toy", *SMALL, f"--data={tmp_path / 'set'}", f"--out={tmp_path / 'b'}"])

# ----- embeddings with coordinates -----

def tiles(h=3, w=4, side=32, origin=(64, 96)):
    """Embeddings (N,E) and coordinates (N,2) of all tiles but the last, in a mixed order; and the grid (h,w,E)."""
    grid = torch.randn(h, w, E)
    order = torch.randperm(h * w - 1)
    coords = torch.stack([origin[0] + side * (order % w), origin[1] + side * (order // w)], 1)
    return grid.flatten(0, 1)[order], coords, grid

def write_h5(path, x, coords, **attrs):
    h5py = pytest.importorskip("h5py", reason="pip install -e '.[h5]'")
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as f:
        f["features"], f["coords"] = x.numpy(), coords.numpy()
        f["coords"].attrs.update(attrs)

@pytest.mark.parametrize("name", ["a", "h5_files/a", "trident/a", "pt_files/a"])
def test_features_of_clam_and_trident(tmp_path, name):
    """catches: x and y swapped; the origin forgotten; a side that coordinates do not tell."""
    x, coords, grid = tiles()
    torch.save({"features": x, "coords": coords}, tmp_path / "a.pt")
    if name != "a":
        write_h5(tmp_path / "h5_files" / "a.h5", x, coords)
        write_h5(tmp_path / "trident" / "a.h5", x[None], coords[None], patch_size_level0=32, patch_size=16)
        (tmp_path / "pt_files").mkdir()
        torch.save(x, tmp_path / "pt_files" / "a.pt")
    e, there, origin, side = read_features(tmp_path / name)
    assert origin == (64, 96) and side == 32 and e.dtype == torch.float16
    assert there.sum() == 11 and not there[2, 3] and (e[2, 3] == 0).all()
    torch.testing.assert_close(e[there], grid[there].half())

def test_features_that_fit_no_grid(tmp_path):
    x, coords, _ = tiles()
    torch.save({"features": x, "coords": coords}, tmp_path / "a.pt")
    assert read_features(tmp_path / "a.pt", 48)[3] == 32               # the file is believed, not the command line
    for broken, says in (({"features": x}, "11 features without coordinates"),
                         ({"features": x, "coords": coords[1:]}, "11 features without coordinates"),
                         ({"features": x * torch.nan, "coords": coords}, "NaN"),
                         ({"features": x, "coords": coords * 0}, "no common grid"), (x, "patches there are none")):
        torch.save(broken, tmp_path / "a.pt")
        with pytest.raises(UserError, match=says):
            read_features(tmp_path / "a")
    with pytest.raises(UserError, match="no file"):
        read_features(tmp_path / "b")

@pytest.mark.parametrize("said, apart, result", [
    ({"patch_size": 256, "patch_level": 1, "downsample": 4.0}, 1024, 1024), ({"patch_size_level0": 682}, 683, 683),
    ({}, 1024, 1024), ({"patch_size_level0": 512}, 1024, "of side 512 lie 1024 pixels apart"),
    ({"patch_size_level0": 512}, 448, "no common grid"),                       # 64 pixels of overlap
    ({"patch_size": 256, "patch_level": 0}, 1024, "of side 256 lie 1024 pixels apart")])
def test_the_side_of_a_tile(tmp_path, said, apart, result):
    """What the file says, TRIDENT's rounding aside, or else how far apart tiles lie; never what the command implies."""
    x, coords, grid = tiles(side=apart, origin=(7, 9))
    torch.save({"features": x, "coords": coords} | said, tmp_path / "a.pt")
    if isinstance(result, str):
        with pytest.raises(UserError, match=result):
            read_features(tmp_path / "a.pt", 512)
    else:
        e, there, origin, side = read_features(tmp_path / "a.pt", 512)
        assert side == result and e.shape == grid.shape and origin == (7, 9) and there.sum() == 11

def test_coordinates_beside_the_file(tmp_path):
    """TRIDENT's patches/a_patches.h5 beside a .pt of features alone; CLAM's patches/a.h5 tells the side of a level."""
    x, coords, _ = tiles(side=48)
    (tmp_path / "f").mkdir()
    torch.save(x.numpy(), tmp_path / "f" / "a.pt")
    write_h5(tmp_path / "patches" / "a_patches.h5", x[:0], coords, patch_size_level0=48)
    assert read_features(tmp_path / "f" / "a.pt")[2:] == ((64, 96), 48)
    write_h5(tmp_path / "patches" / "a.h5", x[:0], coords, patch_size=12, patch_level=1, downsample=(2.0, 2.0))
    with pytest.raises(UserError, match="of side 24 or 48 lie 48 pixels apart"):
        read_features(tmp_path / "f" / "a.pt")

def test_one_grid_for_each_piece_of_tissue(tmp_path):
    """catches: CLAM's second contour laid on the grid of the first."""
    x, coords, _ = tiles()
    coords[6:] += torch.tensor([517, 3])
    torch.save({"features": x, "coords": coords, "patch_size_level0": 32}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="on one grid for all pieces of tissue, as TRIDENT does"):
        read_features(tmp_path / "a.pt")

def test_base_tiles_are_the_tiles_that_were_embedded(tmp_path, capsys):
    """Tiles of 33 pixels at 0.2325 for 16 at 0.5: drawn each in one colour, they come out so. catches: a base
    resolution of 0.465 or 0.5, whose tiles drift from those that were embedded; a remedy that is refused."""
    x, coords, grid = tiles(5, 6, 33, (66, 99))
    colours = np.random.default_rng(0).integers(4, 256, (9, 10, 3), np.uint8)
    Image.fromarray(colours.repeat(33, 0).repeat(33, 1)).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,mpp\na.png,0.2325\n")
    torch.save({"features": x, "coords": coords, "patch_size_level0": 33}, tmp_path / "a.pt")
    args = ["build", f"--images={tmp_path / 'list.csv'}", f"--features={tmp_path / 'a.pt'}", "--encoder=uni",
            "--patch=16", "--scales=1"]
    with pytest.raises(UserError, match="does not fit --patch=16: give --mpp=0.4795$"):
        data.main([*args, "--mpp=0.6", f"--out={tmp_path / 'none'}"])
    for mpp in (0.5, 0.4795):
        data.main([*args, f"--mpp={mpp}", f"--out={tmp_path / str(mpp)}"])
        assert "pixels 0.4795 micrometres each, kept [29] patches" in capsys.readouterr().out
        pyramids = data.Pyramids(tmp_path / str(mpp))
        for n in range(29):
            item = pyramids.read(0, 0, n, ("x", "e"))
            i, j = item["ij"].tolist()
            torch.testing.assert_close(item["e"][:, 0, 0], grid[i, j].half().float())
            want = torch.from_numpy(colours[i + 3, j + 2].copy())[:, None, None].expand(3, 16, 16)
            assert torch.equal(((item["x"] + 1) * 127.5).round().byte(), want)

def test_features_belong_to_images_by_name(tmp_path):
    """catches: one file of features for every image; one name in two folders."""
    jobs = [Job(name, tmp_path / name) for name in ("u/a.svs", "v/b.svs")]
    for name in ("a", "v__b.svs"):
        torch.save(torch.zeros(1, 2), tmp_path / f"{name}.pt")
    assert [job.features.name for job in with_features(jobs, tmp_path)] == ["a.pt", "v__b.svs.pt"]
    for more, features, says in (([], tmp_path / "a.pt", "has none of u/a.svs, v/b.svs"),
                                 ([Job("w/a.svs", tmp_path)], tmp_path, "u/a.svs and w/a.svs can both be a")):
        with pytest.raises(UserError, match=says):
            with_features([*jobs, *more], features)
    assert with_features(jobs[1:], tmp_path / "a.pt")[0].features == tmp_path / "a.pt"

def test_build_takes_the_features(tmp_path):
    """Pixels of the image, embeddings of the file, and patches only where every tile was embedded."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 220, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x, coords, grid = tiles()
    (tmp_path / "f").mkdir()
    torch.save({"features": x, "coords": coords, "patch_size_level0": 32}, tmp_path / "f" / "a.pt")
    args = ["build", f"--images={tmp_path / 'a.png'}", f"--features={tmp_path / 'f'}", "--patch=32", "--scales=2"]
    data.main([*args, f"--out={tmp_path / 'out'}", "--encoder=uni"])
    pyramids = data.Pyramids(tmp_path / "out")
    assert (pyramids.embed_dim, pyramids.encoder, pyramids.std) == (E, "uni", [1.0] * E)
    # 3 rows of 4 tiles from (64, 96): the image of 200 rows holds all 3, but the last tile was not embedded
    assert pyramids.slides[0]["counts"] == [11, 2]
    for n in range(11):
        item = pyramids.read(0, 0, n, ("x", "e"))
        i, j = item["ij"].tolist()
        torch.testing.assert_close(item["e"][:, 0, 0], grid[i, j].half().float())
        tile = pixels[96 + 32 * i:128 + 32 * i, 64 + 32 * j:96 + 32 * j]
        assert torch.equal(((item["x"] + 1) * 127.5).round().byte(), torch.from_numpy(tile.copy()).movedim(-1, 0))
    for more, says in (((), "say which encoder made them"), (("--encoder=uni", "--weights=x"), "give no --weights"),
                       (("--encoder=uni", "--patch=16"), "does not fit --patch=16")):
        with pytest.raises(UserError, match=says):
            data.main([*args, f"--out={tmp_path / 'other'}", *more])
    data.main([*args, f"--out={tmp_path / 'out'}", "--encoder=uni"])                       # goes on
    torch.save({"features": x + 1, "coords": coords, "patch_size_level0": 32}, tmp_path / "f" / "a.pt")
    with pytest.raises(UserError, match="a.png.safetensors was made from another image, other features or"):
        data.main([*args, f"--out={tmp_path / 'out'}", "--encoder=uni"])
