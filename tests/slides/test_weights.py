"""slides/weights.py: checkpoints of others are read whole or refused, and nothing in them is run."""
import sys
import types
from pathlib import Path

import pytest
import torch

from common import UserError, save_tensors
from slides.weights import load_official, load_state_dict

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
    path.write_bytes(b"<html>404</html>")  # what a failed download often is
    with pytest.raises(UserError, match="x.pt"):
        load_state_dict(path)

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
