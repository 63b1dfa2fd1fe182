"""slides/bags.py: features as other tools write them, a slide at a time."""
import sys

import numpy as np
import pytest
import torch

from common import UserError, save_tensors
from slides.bags import Bags, placed, read_bag, views

def test_readers(tmp_path, monkeypatch):
    """What tools write, to the bit. Catches: coordinates of another length, (1,N,K) not squeezed."""
    x, ij = torch.randn(5, 3).half().float(), torch.arange(10).reshape(5, 2)
    meta = {"patch": 64, "scales": [0], "widths": [3]}
    save_tensors(tmp_path / "a.safetensors", {"features": x, "coords": ij.int()}, meta)
    torch.save(x, tmp_path / "b.pt")
    np.save(tmp_path / "c.npy", x.half().numpy())
    torch.save({"features": x[None], "coords": ij}, tmp_path / "d.pt")
    (tmp_path / "e.h5").write_bytes(b"")
    with monkeypatch.context() as m, pytest.raises(UserError, match=r"e.h5 needs the extra: pip install -e '.\[h5\]'"):
        m.setitem(sys.modules, "h5py", None)
        read_bag(tmp_path / "e.h5")
    for name, where in (("a.safetensors", ij), ("b.pt", None), ("c.npy", None), ("d.pt", ij), ("e.h5", ij)):
        if name == "e.h5":
            h5py = pytest.importorskip("h5py", reason="the extra h5 is not installed")
            with h5py.File(tmp_path / name, "w") as f:
                f["features"], f["coords"] = x[None].numpy(), ij.numpy()
        got, coords, meta = read_bag(tmp_path / name)
        assert torch.equal(got, x) and got.dtype == torch.float32
        assert coords is None if where is None else torch.equal(coords, where)
        assert meta["side"] == (64 if name[0] == "a" else 0)

X, AT = torch.randn(12, 5), torch.stack([torch.arange(12) % 4, torch.arange(12) // 4], 1) * 512

@pytest.mark.parametrize("found, coords, side", [
    ({"features": X.numpy(), "coords": AT.numpy()}, AT, 0), (X.numpy(), None, 0),          # arrays, as TRIDENT saves
    ({"features": X.numpy().astype(">f4"), "coords": AT.numpy().astype(">i8")}, AT, 0),
    (torch.nn.Parameter(X), None, 0), ({"features": X[None], "coords": AT[None]}, AT, 0),
    ({"embeddings": X, "coords": AT, "patch_size_level0": 512}, AT, 512),                  # HEST
    ({"feats": X, "coords": AT * 0.2525}, None, 0), ({"feats": X, "coords": AT.float()}, None, 0),  # STAMP
    ({"features": X, "coords": AT + 0.5}, None, 0), ({"whatever": X, "coords": AT.float()}, AT, 0),
    ({"features": X, "coords": AT, "patch_size": 256, "patch_level": 1, "downsample": 4.0001}, AT, 1024),  # CLAM
    ({"features": X, "coords": AT, "patch_size": 256, "patch_level": 0}, AT, 256),
    ({"features": X, "coords": AT, "patch_size": 256, "patch_level": 0, "custom_downsample": [1, 1]}, AT, 256),
    ({"features": X, "coords": AT * 1e300}, None, 0),
    ({"features": X, "coords": AT, "patch_size": 256, "patch_level": 1}, AT, 0),  # how coarse that is, is unsaid
    ({"features": X, "coords": AT, "patch_size_level0": "None"}, AT, 0),
    ({"features": X, "coords": AT, "patch_size_level0": 1e30}, AT, 0),
    ({"features": X, "coords": AT, "unit": "µm"}, None, 0),
    ({"feats": X, "coords": AT * 0.5, "unit": "um", "tile_size_um": 256.0}, None, 0)])
@pytest.mark.parametrize("kind", ["pt", "h5"])
def test_what_other_tools_write(tmp_path, kind, found, coords, side):
    """catches: coordinates taken for features, micrometres for pixels; a gradient kept; the side of another level."""
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch.save(found, path)
    elif isinstance(found, dict):
        h5py = pytest.importorskip("h5py", reason="the extra h5 is not installed")
        with h5py.File(path, "w") as f:
            for key, value in found.items():
                if hasattr(value, "shape"):
                    f[key] = np.asarray(value)
            f["coords"].attrs.update({key: v for key, v in found.items() if not hasattr(v, "shape")})
            f["barcodes"] = [b"x"] * 12
    else:
        return
    x, where, meta = read_bag(path)
    assert torch.equal(x, X) and x.dtype == torch.float32 and not x.requires_grad and meta["side"] == side
    assert where is None if coords is None else torch.equal(where, coords)

@pytest.mark.parametrize("said", [{"tile_size_um": 256.0}, {"tile_size": 256}])
def test_stamp_tells_micrometres(tmp_path, said):
    """Pixels of level 0, where the size of these is known. catches: floored corners; a side of another unit."""
    torch.save({"feats": X, "coords": AT * 0.5, "unit": "um", **said}, tmp_path / "a.pt")
    for mpp, first, side in ((0.5, (512, 0), 512), (0.2525, (1014, 0), 1014), (1, (256, 0), 256)):
        x, coords, got, _ = placed(tmp_path / "a.pt", mpp)
        assert torch.equal(x, X) and coords[1].tolist() == list(first) and got == side
    with pytest.raises(UserError, match="a.pt holds 12 features with places in micrometres: only mil.py map"):
        placed(tmp_path / "a.pt")

def test_owkin(tmp_path):
    """A level and a place before the features, in SLIDE/features.npy; metadata.json tells the side of that level.
    catches: these for features."""
    for name, told in (("a", '{"level": 16, "absolute_tile_size": 512}'), ("c", "[]"), ("d", None),
                       ("b", '{"level": 15, "absolute_tile_size": 512}')):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "features.npy", torch.cat([torch.full((12, 1), 16.0), AT / 512, X], 1).numpy())
        if told:
            (tmp_path / name / "metadata.json").write_text(told)
    assert torch.equal(Bags(tmp_path)["b"], X) and Bags(tmp_path).names == ["a", "b", "c", "d"]
    assert torch.equal(placed(tmp_path / "a/features.npy")[1], AT) and placed(tmp_path / "a/features.npy")[2] == 512
    for name in "bcd":
        with pytest.raises(UserError, match="12 features without coordinates"):
            placed(tmp_path / name / "features.npy")

def test_unusable_files_are_named(tmp_path):
    nan = torch.randn(4, 3)
    nan[1, 2] = float("nan")
    np.save(tmp_path / "nan.npy", nan.numpy())
    np.save(tmp_path / "flat.npy", np.zeros(7, np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, 3), np.float32))
    np.save(tmp_path / "thin.npy", np.zeros((3, 0), np.float32))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    torch.save({"a": nan, "b": nan}, tmp_path / "two.pt")
    torch.save(UserError, tmp_path / "code.pt")
    torch.save({"coords": AT.float()}, tmp_path / "places.pt")
    torch.save({"coords": AT.float(), "feats": X, "features": X}, tmp_path / "both.pt")
    torch.save(torch.ones(1, 1).expand(10**6, 10**6), tmp_path / "bomb.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "two.pt").read_bytes()[:200])
    (tmp_path / "x.txt").write_text("")
    for name, words in (("nan.npy", "NaN or infinity in 1 of 4 rows"), ("none.npy", "empty bag"),
                        ("thin.npy", r"holds \(3, 0\), expected features"),
                        ("flat.npy", r"holds \(7,\), expected features"), ("object.npy", "cannot be read"),
                        ("two.pt", "no tensor.*among a, b"), ("code.pt", "cannot be read .it holds common.UserError"),
                        ("places.pt", "no tensor of features.* among coords"),
                        ("both.pt", "or several"), ("bomb.pt", "would unpack to 4e.12 bytes"),
                        ("cut.pt", "cannot be read"), ("x.txt", "no file of features")):
        with pytest.raises(UserError, match=f"{name} .*{words}" if words[0] != "h" else words) as said:
            read_bag(tmp_path / name)
        assert "\x1b" not in str(said.value) and "\n" not in str(said.value)

def test_bags(tmp_path):
    """Deviations over all patches of the named slides alone; memory is given back beyond the budget."""
    (tmp_path / "pt").mkdir()
    for k in range(6):
        torch.save(torch.randn(20 + k, 8), tmp_path / "pt" / f"s{k}.pt")
    b = Bags(tmp_path / "pt")
    assert b.K == 8 and b.names == [f"s{k}" for k in range(6)] and views(tmp_path / "pt") == [""]
    for names, others in ((["s3", "s1"], ()), (["s3"], (b,))):
        mean, deviation = b.scaler(names, *others)
        x = torch.cat([bags[name] for bags in (b, *others) for name in names])
        torch.testing.assert_close(mean, x.mean(0))
        torch.testing.assert_close(deviation, x.std(0, correction=0))
    few = Bags(tmp_path / "pt", budget=1000)
    assert len(b.kept) == 6 and len(few.kept) == 1 and torch.equal(few["s4"], b["s4"])
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(UserError, match="b.npy is 4 wide, others 3"):
        Bags(tmp_path)
    np.save(tmp_path / "b.npy", np.zeros((0, 3), np.float32))
    np.save(tmp_path / "c.npy", np.full((2, 3), np.nan, np.float32))
    with pytest.raises(UserError, match="2 of 3 files .* are of no use: .*b.npy is an empty bag.*; .*c.npy holds NaN"):
        Bags(tmp_path)
    assert Bags(tmp_path, names=("a",)).names == ["a"]
    torch.save(torch.zeros(2, 3), tmp_path / "b.pt")
    with pytest.raises(UserError, match="b.npy and .*b.pt are features of one slide"):
        Bags(tmp_path)
    with pytest.raises(UserError, match="holds no features"):
        Bags(tmp_path / "none")

def test_views_of_several_scales(tmp_path):
    """A coarse view has one row per coarse patch, in the order they come. catches: the columns of the other scale."""
    coords = torch.tensor([[0, 0], [64, 0], [128, 0], [64, 64], [192, 64]])                # the parents: 0, 0, 1, 0, 1
    x = torch.arange(25).float().reshape(5, 5)
    meta = {"scales": [0, 1], "widths": [3, 2], "patch": 64}
    save_tensors(tmp_path / "a.safetensors", {"features": x, "coords": coords}, meta)
    assert views(tmp_path) == ["0", "1", "0+1"]
    assert torch.equal(Bags(tmp_path, "0")["a"], x[:, :3]) and torch.equal(Bags(tmp_path, "0+1")["a"], x)
    assert torch.equal(Bags(tmp_path, "1")["a"], x[[0, 2], 3:])
    for kind, other in (("pt", x), ("pt", {"features": x, "coords": coords})):                 # beside ours
        torch.save(other, tmp_path / f"b.{kind}")
        with pytest.raises(UserError, match="b.pt has no scale 1 with coordinates"):
            Bags(tmp_path, "1")
    for wrong in ({"patch": 0.5}, {"widths": [3, 3]}, {"widths": 5}, {"scales": [0, "1"]}):
        save_tensors(tmp_path / "a.safetensors", {"features": x, "coords": coords}, meta | wrong)
        with pytest.raises(UserError, match="tells of scales .* that it does not hold"):
            read_bag(tmp_path / "a.safetensors")
