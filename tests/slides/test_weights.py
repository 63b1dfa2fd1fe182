"""slides/weights.py: checkpoints of others are read whole or refused, and nothing in them is run."""
import argparse
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from common import UserError, save_tensors
from slides.weights import bare, load_official, load_state_dict, place

class Trap:
    """Unpickling this runs code."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)

def test_state_dicts(tmp_path):
    state = {"a.weight": torch.randn(40, 50), "a.bias": torch.randn(4)}
    save_tensors(tmp_path / "x.safetensors", state)
    torch.save(state, tmp_path / "x.pt")
    torch.save({"state_dict": state, "epoch": 3, "lr": [0.1]}, tmp_path / "x.ckpt")
    for path in list(tmp_path.iterdir()):
        found = load_state_dict(path)
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_state_dict(tmp_path / "none.pt")
    for saved in ([torch.ones(2)], {}, {"a": 1}):
        torch.save(saved, tmp_path / "x.pt")
        with pytest.raises(UserError, match="no state dict of tensors"):
            load_state_dict(tmp_path / "x.pt")

@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_with_code_or_cut_short(tmp_path, legacy):
    """Code is refused and not run. At every length: always one clear sentence, never another exception."""
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Trap(str(tmp_path / "ran"))}, tmp_path / "bad.ckpt",
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="could run code, so it is refused.*safetensors"):
        load_state_dict(tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.randn(20, 20), "b": torch.arange(9)}, path := tmp_path / "x.pt",
               _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 97), 1, 2, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="x.pt is damaged or"):
            load_state_dict(path)

@pytest.mark.parametrize("begins, says", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "it is a Git LFS pointer.*`git lfs pull`"),
    (b"<!DOCTYPE html><html>404</html>", "it is a web page: log in"), (b"\xef\xbb\xbf\n<html>", "a web page"),
    (b'{"error": "gated"}', "it is JSON"), (b'{\n  "weight_map": {', "it is JSON"), (b"[[1, 2]]", "it is JSON"),
    (b"Access to this model is restricted.\n", "it is text"), ("Zugriff verweigert: ä".encode(), "it is text"),
    (b"\x1f\x8b\x08\0", "a packed archive"), (b"\x89HDF\r\n\x1a\n\0", "HDF5"), (b"\x93NUMPY\1\0", "a NumPy")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_weights_is_called_by_its_name(tmp_path, begins, says, suffix):
    (tmp_path / f"x{suffix}").write_bytes(begins)
    with pytest.raises(UserError, match=f"x{suffix} holds no weights, .*{says}"):
        load_state_dict(tmp_path / f"x{suffix}")

W = {"a.weight": torch.ones(2), "a.bias": torch.zeros(2)}
LESS = {k: v - 1 for k, v in W.items()}  # another network of the same kind: not the one that counts

@pytest.mark.parametrize("held", [
    {"model": W, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3}, {"state_dict": {"model": W}},
    {"student": LESS, "teacher": W}, {"model": LESS, "ema": W, "args": {}}, {"state_dict": LESS, "state_dict_ema": W},
    {"ema": {"decay": 0.9}, "model": W}, {"encoder": W, "step": 1}, {"module." + k: v for k, v in W.items()},
    {"_orig_mod.module." + k: v for k, v in W.items()}, {"module._orig_mod." + k: v for k, v in W.items()},
    W | {"n": 3}, {k.replace("a.", "a._orig_mod."): v for k, v in W.items()},
    {"_fsdp_wrapped_module." + k: v for k, v in W.items()}])
def test_what_stands_around_the_keys(held):
    found = bare(held)
    assert found.keys() == W.keys() and all(torch.equal(found[k], v) for k, v in W.items())

def test_which_network_counts():
    """The one below most of the keys, an average first. What is not clear is asked for."""
    anchors = "a.weight", "a.bias"
    two = {f"{p}.{k}": v for p in ("student.net", "teacher.net") for k, v in W.items()}
    two["teacher.head.a.bias"] = W["a.bias"]
    assert place(two, "", *anchors)[1] == "teacher.net." and place({"b": W["a.bias"]}, "", *anchors)[1] == ""
    for held, says in (({f"{p}.{k}": v for p in ("x", "y") for k, v in W.items()}, r"below x\., y\.: save one"),
                       ({"one": W, "two": W}, "several state dicts in it, one, two"),
                       (W | {"module." + k: v for k, v in W.items()}, "with and without the name of a wrapper"),
                       ({"x." + k: v for k, v in W.items()} | {"a.weight": W["a.bias"]}, r"unexpected: a.weight")):
        with pytest.raises(UserError, match=says):
            place(held, "", *anchors)
    loop = {}
    loop["state_dict"] = loop
    assert bare(loop) == {}

def test_official_keys_must_all_be_used():
    def rename(name):
        return "old." + name
    published = {"m.old." + k: torch.full_like(v, 2) for k, v in torch.nn.Linear(3, 2).state_dict().items()}
    net = torch.nn.Linear(3, 2)
    load_official(net, published | {"other.x": torch.ones(1), "m.count": torch.ones(1)}, "m.", rename, ("count",))
    assert (net.weight == 2).all() and (net.bias == 2).all()
    bad = {"m.old.weight": torch.ones(2, 4), "m.extra": torch.ones(1)}
    with pytest.raises(ValueError) as err:
        load_official(net, bad, "m.", rename)
    for part in ("not a published Linear", "1 missing: m.old.bias", "1 unexpected: m.extra",
                 "1 of another shape: m.old.weight is (2, 4), expected (2, 3)"):
        assert part in str(err.value)
    assert (net.weight == 2).all()  # nothing was loaded by halves
    with pytest.raises(ValueError, match=r"40 unexpected: m.number00, .*\[\.\.\.\]"):
        load_official(net, published | {f"m.number{i:02}": torch.ones(1) for i in range(40)}, "m.", rename)

def foreign(monkeypatch, module, name, state):
    """An object of a class that is not installed here, as it would be pickled where it is."""
    kind, made = type(name, (), {"__module__": module}), types.ModuleType(module)
    setattr(made, name, kind)
    monkeypatch.setitem(sys.modules, module.split(".")[0], types.ModuleType(module.split(".")[0]))
    monkeypatch.setitem(sys.modules, module, made)
    out = kind()
    out.__dict__.update(state)
    return out

@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_stands_beside_the_tensors(tmp_path, monkeypatch, legacy):
    """Settings and numbers of NumPy, OmegaConf, argparse, paths do not hinder; another class is named. None is made."""
    beside = {"np": [np.float64(1.5), np.int64(2), np.bool_(True), np.ones(3)], "args": argparse.Namespace(lr=1),
              "path": Path("a"), "type": int, "cfg": foreign(monkeypatch, "omegaconf.dictconfig", "DictConfig", {
                  "_content": {"a": foreign(monkeypatch, "omegaconf.nodes", "AnyNode", {"_val": 1})}, "_parent": None})}
    torch.save({"state_dict": W, "more": beside}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    assert load_state_dict(tmp_path / "a.ckpt").keys() == W.keys()
    for module, name in (("mmengine.logging", "HistoryBuffer"), ("omegaconf.dictconfig", "Other"), ("a.b", "Model")):
        torch.save({"state_dict": W, "hook": foreign(monkeypatch, module, name, {"x": 1})}, tmp_path / "b.ckpt",
                   _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match=f"b.ckpt .*: {module}.{name}, which could run code, so it is refused"):
            load_state_dict(tmp_path / "b.ckpt")
    torch.save({"state_dict": W, "x": defaultdict(list, a=[1])}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="b.ckpt .*: collections.defaultdict, which"):
        load_state_dict(tmp_path / "b.ckpt")

def test_lightning_checkpoint_is_read_and_other_classes_are_not(tmp_path, monkeypatch):
    """CompVis' files name Lightning's ModelCheckpoint, which need not be installed. catches: any class let through."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    for name in ("ModelCheckpoint", "Other"):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))
    with monkeypatch.context() as m:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            m.setitem(sys.modules, name, types.ModuleType(name))
        m.setitem(sys.modules, module.__name__, module)
        for name in ("ModelCheckpoint", "Other"):
            torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {getattr(module, name): {"best": None}}},
                       tmp_path / name)
    assert torch.equal(load_state_dict(tmp_path / "ModelCheckpoint")["a"], torch.ones(2))
    with pytest.raises(UserError, match="could run code"):
        load_state_dict(tmp_path / "Other")
