"""The ViT of slides/encoders.py against the published encoders: numbers, key names, full sizes, files of other models.
Goldens as in rule.py.

Each docstring ends with small changes of the code that the test is meant to fail on ("catches: ...").
"""
import argparse

import pytest
import rule
import torch
from rule import golden, manifest, state_dict

from slides.encoders import KINDS, ViT
from slides.weights import load_state_dict

each = pytest.mark.parametrize("name", KINDS)
SIZE = [(name, size) for name, sizes in rule.ENCODERS.items() for size in sizes]

def small(name, state=None, **how):
    """The cut-down encoder behind a golden file."""
    heads = golden(f"encoder_{name}")[1]["config"]["heads"]
    return ViT.from_official(state or state_dict(f"encoder_{name}"), name, heads).requires_grad_(False)

# ----- 1. Numbers -----

@pytest.mark.parametrize("name, size", SIZE)
def test_tokens(name, size):
    """1e-5 of the largest number. catches: eps; GELU by tanh; SwiGLU's halves swapped; q, k, v in another order; the
    registers ahead of the class token, or with positions; a LayerScale left out; the norm of the class token alone; one
    encoder's way of resizing positions for another's; height and width swapped."""
    tensors, meta = golden(f"encoder_{name}")
    found = dict(zip(("cls", "reg_tokens", "patch_tokens"),
                     small(name).tokens(rule.picture(tensors[f"in/image_{size}"], meta["config"]))))
    assert found["reg_tokens"].shape[1] == meta["config"]["registers"]
    for what, ours in found.items():
        key = f"{what}_{size}"
        if f"out/{key}" in tensors:
            reference, every = tensors["out/" + key], meta["every_kth"].get("out/" + key, 1)
            a, b = ours.flatten()[::every], reference.flatten()
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max(), (key, (a - b).abs().max())
    assert torch.equal(found["cls"], small(name)(rule.picture(tensors[f"in/image_{size}"], meta["config"])))

@pytest.mark.parametrize("name", ["dinov2", "dinov2_reg"])
def test_positions_of_full_size(name):
    """The published table of 37 x 37 for tiles of 224 and 252. catches: size= for DINOv2's factors, or the reverse."""
    tensors = golden(f"encoder_{name}")[0]
    model = ViT(name, 8, 1, 1, 14, 8, 1370, 4).requires_grad_(False)
    model.positions.copy_(tensors["in/pos37"])
    for side in (16, 18):
        reference = tensors[f"out/pos37_{side}x{side}"]
        assert (model.place(side, side) - reference).abs().max() <= 1e-5 * reference.abs().max()
    assert model.place(37, 37) is model.positions  # its own grid is left alone, whatever the offset

@each
def test_height_and_width_are_not_swapped(name):
    """A tall image and its transpose, through the transposed network. catches: w before h in `place`."""
    model, patch = small(name), KINDS[name].size[3]
    image = torch.randn(1, 3, 3 * patch, 5 * patch)
    cls, _, patches = model.tokens(image)
    side, first = model.grid, model.first
    model.patchify.weight.copy_(model.patchify.weight.mT.clone())
    table = model.positions[:, first:].unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2).clone()
    model.positions[:, first:] = table
    turned = model.tokens(image.mT)
    torch.testing.assert_close(turned[0], cls, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[2].unflatten(1, (5, 3)).transpose(1, 2).flatten(1, 2), patches, atol=1e-5,
                               rtol=1e-5)
    with pytest.raises(ValueError, match=f"multiples of {patch}"):
        model(torch.zeros(1, 3, patch, patch + 1))

# ----- 2. Key names and sizes -----

@each
def test_full_size(name):
    """The published key list, exactly and without memory, gives the published network. catches: a typing error in a key
    map; a bias left out; heads by another rule than width / 64; a wrong number in the table of sizes."""
    keys = manifest(f"full_{name}")
    model = ViT.from_official({k: torch.empty(shape, device="meta") for k, shape in keys.items()}, name)
    width, depth, heads, patch = KINDS[name].size[:4]
    assert (model.embed_dim, len(model.blocks), model.blocks[0].heads, model.patch) == (width, depth, heads, patch)
    with torch.device("meta"):
        expected = ViT(name, *KINDS[name].size)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    used = [s for k, s in keys.items() if not k.startswith(KINDS[name].unused or ("-",))]
    assert sorted(used) == sorted(tuple(v.shape) for v in model.state_dict().values())

def test_other_forms_of_the_same_weights(tmp_path):
    """HIPT's whole file, with a Namespace of settings; its teacher inside DDP, the bare backbone, half precision;
    Phikon inside a classifier; timm's copy of DINOv2 with registers, without a position for the class token."""
    state, image = state_dict("encoder_hipt"), torch.randn(1, 3, 96, 96)
    e = small("hipt")(image)
    bare = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    for other in (bare, {"module." + k: v for k, v in state.items()}, {"student": {}, "teacher": state}):
        assert torch.equal(small("hipt", other)(image), e)
    path = tmp_path / "vit256_small_dino.pth"
    torch.save({"student": {"a": torch.zeros(1)}, "teacher": {"module." + k: v for k, v in state.items()}, "epoch": 9,
                "args": argparse.Namespace(arch="vit_small", lr=0.1)}, path)
    assert torch.equal(small("hipt", load_state_dict(path))(image), e)
    model = small("hipt", {k: v.half() for k, v in state.items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(image), e, atol=1e-2, rtol=1e-2)
    state = state_dict("encoder_phikon")
    more = {"vit." + k: v for k, v in state.items()} | {"vit.pooler.dense.bias": torch.zeros(48)}
    assert torch.equal(small("phikon", more)(image), small("phikon")(image))
    state, image = state_dict("encoder_dinov2_reg"), torch.randn(1, 3, 70, 70)
    e = small("dinov2_reg")(image)
    state["reg_token"] = state.pop("register_tokens")
    place, _ = state.pop("pos_embed"), state.pop("mask_token")
    state |= {"cls_token": state["cls_token"] + place[:, :1], "pos_embed": place[:, 1:].clone()}
    torch.testing.assert_close(small("dinov2_reg", state)(image), e)

@pytest.mark.parametrize("form", ["training", "teacher", "visual", "lightning", "compiled"])
def test_checkpoints_of_trainings(form):
    """DINOv2's: the teacher among heads and student, its blocks in chunks that keep their numbers; inside CLIP,
    Lightning, DistributedDataParallel and torch.compile. catches: the student; blocks of one chunk taken for all."""
    state, image = state_dict("encoder_dinov2"), torch.randn(1, 3, 70, 70)
    chunks = {k.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): v for k, v in state.items()}
    teacher = {"backbone." + k: v for k, v in chunks.items()} | {"dino_head.mlp.0.weight": torch.zeros(2, 2)}
    held = {"training": {"model": {f"{who}.{k}": v * f for who, f in (("student", 0.5), ("teacher", 1.0))
                                   for k, v in teacher.items()}, "optimizer": {}, "iteration": 9},
            "teacher": {"teacher": teacher}, "visual": {"visual.trunk." + k: v for k, v in state.items()} | {
                "transformer.resblocks.0.ln_1.weight": torch.zeros(2), "logit_scale": torch.zeros(())},
            "lightning": {"state_dict": {"net." + k: v for k, v in state.items()} | {"loss.weight": torch.zeros(2)}},
            "compiled": {"_orig_mod.module." + k: v for k, v in state.items()} | {"head.bias": torch.zeros(2)}}[form]
    assert torch.equal(small("dinov2", held)(image), small("dinov2")(image))

# ----- 3. What does not fit is refused, by name -----

@each
@pytest.mark.parametrize("how", ["missing", "unexpected", "of another shape"])
def test_damaged_keys(name, how):
    """Every key (of one block) in turn is missing or of another shape, one is unknown: it is named. catches:
    strict=False."""
    state = state_dict(f"encoder_{name}")
    wanted = [k for k in state if not k.startswith(KINDS[name].unused or ("-",))]
    wanted = [k for k in wanted if ".0." not in k and ".1." not in k]
    for key in wanted if how != "unexpected" else ["blocks.0.extra.weight"]:
        bad = {k: v for k, v in state.items() if k != key}
        if how != "missing":
            bad[key] = torch.zeros(*state[key].shape, 2) if key in state else torch.zeros(1)
        with pytest.raises(ValueError) as err:
            small(name, bad)
        assert f"1 {how}: {key}" in str(err.value), (key, str(err.value))

@each
def test_weights_of_something_else(name):
    """All 30 pairs are refused, and what says nothing of how wide the network is. catches: UNI taken for DINOv2, whose
    keys are the same; a crash."""
    state = state_dict(f"encoder_{name}")
    for other in {*KINDS} - {name}:
        with pytest.raises(ValueError, match=f"do not fit the encoder '{other}': "):
            ViT.from_official(state, other, golden(f"encoder_{name}")[1]["config"]["heads"])
    for state in ({"fc.weight": torch.zeros(2)}, {"encoder.down.0.block.0.x": torch.zeros(2)}, {}):
        with pytest.raises(ValueError, match="and all the rest are missing"):
            ViT.from_official(state, name)

def test_wrong_names_and_heads():
    state = state_dict("encoder_uni")
    for change, name, heads, says in (({}, "unni", 4, "unknown ViT 'unni': known are uni"),
                                      ({}, "uni", 5, "say how many heads"), ({}, "uni", None, "say how many heads"),
                                      ({"norm.weight": torch.ones(48, dtype=torch.int8)}, "uni", 4, "torch.int8"),
                                      ({"pos_embed": torch.zeros(1, 200, 48)}, "uni", 4, "neither a square")):
        with pytest.raises(ValueError, match=says):
            ViT.from_official(state | change, name, heads)
