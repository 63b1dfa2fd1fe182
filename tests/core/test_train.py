"""train.py: settings, what is refused, the stages' losses, a run folder. Whole trainings are in tests/whole."""
import json
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, log, quick

import common
import sample_joint
import train
from common import Ranks, UserError, load_tensors, save_tensors
from diffusion import ZoomLDM
from zoom_vae import VAEConfig, VAEStage

def configured(*args):
    return train.configure(train.Config, [*TINY, *args], train.PRESETS, ("preset",))

def test_run_folder(run):
    for name in ("ema.safetensors", "state.safetensors", "vae.safetensors", "config.json", "samples/step_000006.png"):
        assert (run / name).stat().st_size > 0, name
    rows = log(run)
    assert len(json.loads((run / "samples/layout.jsonl").read_text())["layout"]) == 3
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert all(len(r["by_scale"]) == 3 and len(r["by_t"]) == 4 for r in rows)
    for row in (*rows, *log(run, "vae")):
        assert row["img_s"] > 0 and row["grad"] > 0, row
    model = ZoomLDM.from_run(run)
    assert model.latent_scale == pytest.approx(load_tensors(run / "vae.safetensors")[1]["latent_scale"])
    assert model.info["encoder"] == "stats" and model.summarizer.cfg.scales == 3

def test_settings_of_a_run_that_goes_on(tmp_path):
    """Compared by name, wherever they stood. A setting that did not exist yet had its default. Catches: runs of an
    older version that do not resume, a new setting that changes them unnoticed."""
    cfg, path = configured(), tmp_path / "state.safetensors"
    stored = json.loads(json.dumps(asdict(cfg)))
    common.check_settings(path, cfg)                # no file: nothing to compare

    def refused(settings, cfg, says):
        save_tensors(path, {}, {"settings": settings})
        if not says:
            return common.check_settings(path, cfg)
        with pytest.raises(UserError, match=says):
            common.check_settings(path, cfg)
    before = {k: v for k, v in stored.items() if k not in ("optim", "loop")} | stored["optim"] | stored["loop"]
    for settings in (stored, before | {"keep": 5, "plot": "", "disc_weight": 0.0}):  # as old versions wrote them
        refused(settings, cfg, None)
        refused(settings, configured("--unet.checkpoint=True", "--micro=2", "--save_every=9"), None)
        for option, name in (("--summarizer=cnn", "summarizer.kind"), ("--clip=2", "clip"), ("--lr=2", "lr"),
                             ("--unet.width=8", "unet.width"), ("--init_from=x.ckpt", "init_from")):
            refused(settings, configured(option), rf"other settings \({name}\)")
    refused(before | {"disc_weight": 0.75}, cfg, r"other settings \(disc_weight\)")
    for inside, name in ((stored["summarizer"], "kind"), (stored["optim"], "clip"), (stored, "init_from")):
        del inside[name]
        refused(stored, cfg, None)
    del stored["unet"]["width"]                     # now 16, by default 192
    refused(stored, cfg, r"other settings \(unet.width\)")
    refused({}, cfg, "does not say what settings")  # of nobody knows what

def test_a_finished_run_is_left_alone(toy, run):
    """Other settings do not overwrite it, either."""
    before = [(run / name).read_bytes() for name in ("state.safetensors", "config.json")]
    quick([*TINY, f"--data={toy}", f"--out={run}"])
    for option, says in (("--lr=1e-5", "state.safetensors belongs to a run with other settings .lr"),
                         ("--vae_steps=9", "vae.safetensors belongs to a run with other settings .*vae_steps")):
        with pytest.raises(UserError, match=says):
            quick([*TINY, f"--data={toy}", f"--out={run}", option])
    assert before == [(run / name).read_bytes() for name in ("state.safetensors", "config.json")]

def test_each_stage_overfits_one_batch():
    """A broken gradient path would stop the loss from falling. One noise, too, so that it falls fast."""
    cfg = configured("--vae_steps=24", "--vae.width=8", "--batch=8", "--summarizer.side=16", "--vae_crop=0")
    cfg.summarizer.embed_dim, cfg.summarizer.scales, cfg.unet.context_dim = 12, 3, 32
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 3, 4, 4, generator=g).clamp(-1, 1)
    x = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    vae, ranks = VAEStage(cfg, x), Ranks(0, 1, torch.device("cpu"), None)
    ldm = train.LDMStage(cfg, 8)
    cfg.summarizer.kind = "cnn"
    cnn = train.LDMStage(cfg, 8)
    z, s = torch.randn(8, 3, 8, 8, generator=g), torch.zeros(8, dtype=torch.long)
    tokens, mask = torch.randn(8, 64, 12, generator=g), torch.ones(8, 64, dtype=torch.bool)
    conditions = {"z": z, "tokens": tokens, "mask": mask, "s": s}
    for net, item, steps, want in ((vae, {"x": x, "s": s[:4]}, 24, 0.8), (ldm, conditions, 12, 0.7),
                                   (cnn, conditions, 12, 0.7)):
        opt, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
        for step in range(steps):
            loss, values = net(item | net.noise(step if net is vae else 0))
            loss.backward()
            opt.step()
            opt.zero_grad()
            if net is vae:
                net.after_step(step + 1, ranks)
            losses.append(float(values["loss"].mean()))
        assert sum(losses[-5:]) / 5 < want * sum(losses[:3]) / 3, (type(net).__name__, losses)

@pytest.mark.parametrize("args, says", [
    (["toi"], "did you mean 'toy'"), (["gpu24", "--data=/nowhere"], "no index.json"),
    (["toy", "PHOTOS"], "no index.json"),  # no toys are drawn into a folder that the user named
    (["smoke", "--data=/a,/b"], "/a holds no index.json"), (["smoke", "MORE"], "/nowhere holds no index.json"),
    (["smoke", "LARGER"], "patches of several sizes"), (["smoke", "--texture=-1"], "--texture=-1.0: .* at least 0"),
    (["toy", "--vae_steps=9"], "toy takes a finished VAE: to train one, give --vae_weights= as well"),
    (["smoke", "--vae_crop=8"], "12 or more"), (["smoke", "--batch=0"], "at least 1"),
    (["smoke", "--seed=-1"], "at least 0"),
    (["smoke", "--pred=z"], "known are eps"), (["smoke", "--decay=linear"], "known are cosine"),
    (["smoke", "--betas=0.9"], "two numbers"), (["smoke", "--vae.mult=1,2"], "three levels"),
    (["smoke", "--unet.positions=8"], "the same number"),
    (["smoke", "--summarizer=cnm"], "--kind=cnm: known are transformer, cnn"),
    (["smoke", "--summarizer=cnn", "--summarizer.side=48", "DATA"], "side=48"),
    (["smoke", "--only_scale=9", "DATA"], "only_scale=9 does not fit"), (["smoke", "--device=tpu"], "--device=tpu"),
    (["smoke", "--unet.heads=3", "DATA"], "unet.heads"),
    (["smoke", "--unet.mult=1,1,1,1,1,1", "DATA"], "cannot be halved")])
def test_settings_that_cannot_work(args, says, toy, tmp_path, tmp_path_factory):
    larger = tmp_path_factory.mktemp("larger")
    (larger / "index.json").write_text((toy / "index.json").read_text().replace('"patch": 64', '"patch": 32'))
    named = {"DATA": f"--data={toy}", "PHOTOS": f"--data={tmp_path / 'photos'}", "MORE": f"--data={toy},/nowhere",
             "LARGER": f"--data={toy},{larger}"}
    with pytest.raises(UserError, match=says):
        train.main([named.get(a, a) for a in [*args, f"--out={tmp_path}"]])
    assert not list(tmp_path.iterdir())

def test_preset_without_a_vae_asks_for_one(toy, tmp_path):
    with pytest.raises(UserError, match="--vae_weights"):
        train.main(["brca", f"--data={toy}", f"--out={tmp_path}", "--device=cpu"])

def test_drawing_that_cannot_work(run, tmp_path):
    with pytest.raises(UserError, match="no trained model"):
        sample_joint.main(["/nowhere"])
    for option, says in (("--scale=7", "--scale=7"), ("--sampler=euler", "unknown sampler"), ("--steps=0", "--steps=0"),
                         ("--steps=251", "give 1 to 250 of dpm"), ("--steps=1.5", "expected int"),
                         ("--end=middle", "--end=middle"), ("--data=/nowhere", "no index.json"),
                         ("--split=valid", "--split=valid: there are scales")):
        with pytest.raises(UserError, match=says):
            sample_joint.main([str(run), option, "--n=2", f"--out={tmp_path}"])

def test_every_preset_builds():
    for name in train.PRESETS:
        cfg = train.configure(train.Config, [name], train.PRESETS, ("preset",))
        cfg.unet.context_dim = cfg.summarizer.width
        with torch.device("meta"):
            net = train.LDMStage(cfg, 64)
        n = sum(p.numel() for p in net.parameters())
        if name in ("brca", "naip"):
            assert n == 400_920_579 + (38_656_000 if name == "brca" else 38_653_952) and cfg.vae == VAEConfig()
        if name == "gpu24":
            assert 50e6 < n < 75e6, n

def test_crops_are_where_their_corners_say(toy):
    cfg = configured("--vae_crop=16", "--vae_batch=3")
    net, got = VAEStage(cfg, torch.zeros(1, 3, 32, 32)), []
    x, corners = torch.randn(3, 3, 32, 32), torch.tensor([[0, 16], [4, 8], [16, 0]])
    net.vae.encode = lambda x: got.append(x) or net.vae.to_latent(net.vae.encoder(x))
    net.noise(0)
    net({"x": x, "corner": corners, "s": torch.zeros(3, dtype=torch.long)})
    assert got[0].is_contiguous()
    assert torch.equal(got[0], torch.stack([x[k, :, i:i + 16, j:j + 16] for k, (i, j) in enumerate(corners.tolist())]))

def test_dead_codes_are_told(capsys):
    """One line where fewer than a tenth were used. Not at the first placing of codes, when none has been."""
    cfg = configured("--vae_steps=400")
    net, ranks = VAEStage(cfg, torch.randn(4, 3, 32, 32)), Ranks(0, 1, torch.device("cpu"), None)
    for step, used in ((100, 0), (150, 6), (200, 7)):
        net.used[:used] = 1
        net.after_step(step, ranks)
    said = capsys.readouterr().out
    assert "step 150: only 6 of 64 codes were used" in said and said.count("codes were used") == 1
