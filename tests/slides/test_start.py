"""start.py: a training that begins from another run, or from a published U-Net; what does not fit is refused."""
import json
import shutil

import pytest
import torch
from conftest import ROOT, TINY, quick, vae_of

import train
from common import UserError, save_tensors
from data import Pyramids, fixed_batch
from diffusion import ZoomLDM
from slides.keys import start_unet, unet_name
from slides.start import model_of

PLAIN = ["--pred=eps", "--unet.positions=0", "--summarizer.positions=0", "--unet.groups=32", "--unet.width=32"]

def cin256():
    """A network, and a checkpoint of it like cin256-v2: a class embedder, a VAE, averages that differ."""
    cfg = train.configure(train.Config, [*TINY, *PLAIN], train.PRESETS, ("preset",))
    cfg.unet.context_dim = cfg.summarizer.width
    unet, raw = train.UNet(cfg.unet), "model.diffusion_model."
    state = {raw + unet_name(unet, k): torch.randn_like(v) for k, v in unet.state_dict().items()}
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in state.items()}
    rest = {"cond_stage_model.embedding.weight": torch.zeros(1001, 32), "betas": torch.zeros(9),
            "first_stage_model.quant_conv.bias": torch.zeros(3)}
    return unet, state, state | ema | rest

def test_start_from_a_published_unet(toy, run, tmp_path, capsys):
    """With a learning rate of zero, the trained U-Net is the one it started from: the raw one. catches: the averages;
    weights that the seed then overwrites."""
    unet, raw, whole = cin256()
    torch.save({"state_dict": whole, "global_step": 178000}, tmp_path / "cin256-v2.ckpt")
    args = [*TINY, *PLAIN, f"--data={toy}", f"--out={tmp_path / 'a'}", vae_of(run, tmp_path / "a"), "--lr=0",
            "--steps=1", f"--init_from={tmp_path / 'cin256-v2.ckpt'}"]
    quick(args)
    assert f"U-Net: {len(raw)} tensors" in (text := capsys.readouterr().out)
    assert "class embedder: cond_stage_model.embedding.weight" in text
    for k, v in ZoomLDM.from_run(tmp_path / "a").unet.state_dict().items():
        assert torch.allclose(v, raw["model.diffusion_model." + unet_name(unet, k)], atol=1e-6), k
    (tmp_path / "cin256-v2.ckpt").unlink()
    quick(args)  # a run that goes on does not need the file any more
    with pytest.raises(UserError, match="other settings .*init_from"):
        quick([a for a in args if "init_from" not in a])

def test_start_from_a_unet_alone():
    """As the papers' own file is: U-Net-level keys. The class embedder is named, anything else unknown refused."""
    unet, raw, _ = cin256()
    state = {k.removeprefix("model.diffusion_model."): v for k, v in raw.items()}
    start, dropped = start_unet(unet, state | {"label_emb.0.weight": torch.zeros(2)})
    assert dropped == ["label_emb.0.weight"] and start.keys() == unet.state_dict().keys()
    assert torch.equal(start["conv_out.bias"], state["out.2.bias"])
    with pytest.raises(UserError, match="1 unexpected: more"):
        start_unet(unet, state | {"more": torch.zeros(2)})

def test_a_start_that_does_not_fit(toy, run, tmp_path):
    """Refused before anything is trained, with the keys. catches: a non-strict load. Where a VAE is there already, a
    published U-Net is still looked at; and that VAE, trained from nothing, is not the one that goes on from a run."""
    whole = cin256()[2]
    save_tensors(good := tmp_path / "good.safetensors", whole)
    del whole["model.diffusion_model.out.2.bias"]
    save_tensors(bad := tmp_path / "bad.safetensors", whole)
    args = [*TINY, *PLAIN, f"--data={toy}", f"--out={tmp_path / 'a'}", f"--vae_weights={run}"]
    for more, says in (([f"--init_from={bad}"], "1 missing: model.diffusion_model.out.2.bias"),
                       ([f"--init_from={good}", "--unet.width=64"], "of another shape"),
                       ([f"--init_from={good}", "--unet.groups=16"], "with --unet.heads=1 and --unet.groups=32")):
        with pytest.raises(UserError, match=says):
            quick([*args, *more])
    assert not (tmp_path / "a").exists()
    shutil.copy(run / "vae.safetensors", tmp_path / "vae.safetensors")
    for source, says in ((bad, "1 missing"), (run, "vae.safetensors belongs to a run with other settings .init_from")):
        with pytest.raises(UserError, match=says):
            quick([*TINY, *PLAIN, f"--data={toy}", f"--out={tmp_path}", f"--init_from={source}"])

def test_whole_models():
    """Of the shipped weights too, whose VAE is a file of its own. catches: a VAE alone taken for a model."""
    assert type(model_of(ROOT / "weights/toy.safetensors")) is ZoomLDM
    assert model_of(ROOT / "weights/vae.safetensors") is None and model_of("no.ckpt") is None

@pytest.mark.parametrize("file", ["", "ema.safetensors"])
def test_start_from_a_run(toy, run, tmp_path, capsys, file):
    """With learning rates of zero all networks stay those of the run, and new data are read in its units. Its file of
    weights does as well. catches: one network left out; a VAE that is whitened anew; raw weights instead of averages;
    a file of ours taken for a published one."""
    run = run / file
    folder = shutil.copytree(toy, tmp_path / "data")
    index = json.loads((folder / "index.json").read_text())
    index |= {"std": [2 * v for v in index["std"]], "slides": index["slides"][-3:]}  # one to train on, for speed
    (folder / "index.json").write_text(json.dumps(index))
    args = [*TINY, f"--data={folder}", f"--out={tmp_path / 'a'}", f"--init_from={run}", "--lr=0", "--steps=1",
            "--vae_steps=1", "--vae_lr=0"]
    quick(args)
    assert f"start: all networks of {run}" in capsys.readouterr().out
    old, new = ZoomLDM.from_run(run), ZoomLDM.from_run(tmp_path / "a")
    assert new.info["std"] == old.info["std"]
    was = old.state_dict()
    moved = [k for k, v in new.state_dict().items() if not torch.allclose(v, was[k], atol=1e-6)]
    assert set(moved) <= {f"vae.{k}" for k in ("codebook.weight", "to_latent.bias", "from_latent.bias")}, moved
    batch, raw = (fixed_batch(Pyramids(folder, std=std), "train", 0, 2, ("e",))["e"] for std in (old.info["std"], None))
    assert torch.allclose(batch, 2 * raw)

@pytest.mark.parametrize("more, says", [
    (["--unet.width=32"], "has other networks: give its preset, or --unet.width=16$"),
    (["--pred=eps"], "has other networks: give its preset, or --pred=v$"),
    (["--vae.codes=32"], "has other networks: give its preset, or --vae.codes=64$"),
    ("uni", "does not suit .*embeddings by uni, 96 wide, at 3 scales, not by stats")])
def test_a_run_that_does_not_fit(toy, run, tmp_path, more, says):
    """Refused before anything is trained, with the options that would fit."""
    folder = toy
    if more == "uni":
        folder, more = tmp_path / "data", []
        folder.mkdir()
        index = json.loads((toy / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | {"encoder": "uni"}))
    with pytest.raises(UserError, match=says):
        quick([*TINY, f"--data={folder}", f"--out={tmp_path / 'a'}", f"--init_from={run}", *more])
    assert not (tmp_path / "a").exists()
