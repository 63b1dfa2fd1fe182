"""What training for one factor buys: the same U-Net as a plain super-resolution model, a row of sr_table.py.

It sees the image beside the latents, as latent diffusion's own super-resolution does; ZoomLDM was never trained for it.

in:  a run folder   out: RUN/sr_baseline.safetensors, images (1,3,factor H,factor W)
run: python sr_trained.py out/toy_long     read next: sr_table.py
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from tqdm import tqdm

from common import UserError, cli, configure, generator, load_tensors, save_tensors
from data import PatchDataset
from diffusion import diffusion_loss, to_eps
from experiments.quality import open_run
from large.proxy import fingerprint
from large.windows import decode_strips
from sample_joint import Canvas, Level, Resize, sample_levels
from unet import UNet


@dataclass
class Config:
    run: str = ""           # run folder
    data: str = ""          # data folder; default: the one the run was trained on
    factor: int = 4
    steps: int = 400
    device: str = "auto"
    threads: int = 2


class Trained:
    """The run's own U-Net, which now also sees the image beside the latents (three more channels, at first ignored),
    without conditions; trained for one factor on scale 0. Kept in RUN/sr_baseline.safetensors."""

    def __init__(self, run, model, pyramids, ranks, factor=4, steps=400):
        self.model, self.factor = model, factor
        self.unet = UNet(replace(model.unet.cfg, channels=6)).to(ranks.device)
        path = Path(run) / "sr_baseline.safetensors"
        want = {"factor": factor, "steps": steps, "model": fingerprint(model)}
        state, meta = load_tensors(path) if path.exists() else ({}, {})
        if meta == want:
            self.unet.load_state_dict(state)
        else:
            own, new = model.unet.state_dict(), self.unet.state_dict()
            for name, v in new.items():  # only the first and last convolution are wider: zeros there
                v.zero_()[tuple(slice(n) for n in own[name].shape)] = own[name]
            self.fit(PatchDataset(pyramids, "train", 7, ("x",), only_scale=0), steps, ranks)
            save_tensors(path, self.unet.state_dict(), want)
        self.unet.eval().requires_grad_(False)

    def predict(self, z_t, t, y):
        null = torch.zeros(len(z_t), 65, self.unet.cfg.context_dim, device=z_t.device)
        return self.unet(torch.cat([z_t, y], 1), t, null)[:, :3].float()

    def beside(self, y):
        """The image on the grid of the latents."""
        side = [n * self.factor // self.model.vae.factor for n in y.shape[2:]]
        return F.interpolate(y, side, mode="bicubic", antialias=True).to(self.unet.conv_out.weight.device)

    def fit(self, data, steps, ranks, batch=32, lr=5e-4):
        optimizer, A = torch.optim.AdamW(self.unet.parameters(), lr), Resize(self.factor, "box")
        for step in tqdm(range(steps), desc="trained baseline"):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            x = default_collate([data[step * batch + i] for i in range(batch)])["x"]
            rng, y = generator(7, step), self.beside(A.down(x))
            with ranks.autocast():
                with torch.no_grad():
                    z = self.model.encode(x.to(ranks.device)).float()
                t = torch.randint(self.model.schedule.T, (batch,), generator=rng).to(z.device)
                noise = torch.randn(z.shape, generator=rng).to(z)
                loss = diffusion_loss(lambda z_t, t, y=y: self.predict(z_t, t, y), z, t, noise, self.model.schedule,
                                      self.model.pred)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def draw(self, x, seed, steps):
        """x (1,3,H,W) -> (1,3,factor H,factor W), in windows that overlap and fade as everywhere."""
        y, model = self.beside(x), self.model
        window = model.info["patch"] // model.vae.factor
        canvas = Canvas(*y.shape[2:], window, window // 4, True)

        def eps(z, t, ij):
            return to_eps(self.predict(z, t, canvas.cut(y, ij)), z, model.schedule.at(t, z), model.pred)
        z = torch.randn(y.shape, generator=generator(seed, 0)).to(y)
        level = Level(eps, model.decode, model.encode, canvas, z)
        sample_levels([level], model.schedule, steps=steps, end="clean")
        return torch.cat(list(decode_strips(model.decode, level.z, window * 3 // 2, window // 2)), 2).cpu()


def main(argv):
    cfg = configure(Config, argv, words=("run",), doc=__doc__)
    if not cfg.run or cfg.steps < 1 or cfg.factor not in (2, 4, 8, 16):
        raise UserError("say which run: python sr_trained.py out/toy_long --factor=4 --steps=400; factors: 2, 4, 8, 16")
    model, pyramids, _, ranks = open_run(cfg)
    Trained(cfg.run, model, pyramids, ranks, cfg.factor, cfg.steps)
    print(f"{cfg.run}/sr_baseline.safetensors enlarges {cfg.factor} times, after {cfg.steps} steps")


if __name__ == "__main__":
    cli(main)
