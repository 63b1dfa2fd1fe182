"""Large images on two ranks: the pictures that one draws, windows shared."""
from dataclasses import replace

import torch
import torch.nn.functional as F
from rule import assert_close
from training import codes, start

from common import load_tensors, save_tensors, setup
from diffusion import Schedule
from large.ranks import open_canvas
from large.windows import MendedLevel
from sample_joint import GUIDES, Level, Resize, sample_levels

S, D = Schedule(), torch.float64
CASES = {"s1": {"fade": True}, "s2": {}, "x0": {"fade": True}, "x0+proxy": {}, "one window": {"side": 8},
         "mended": {"overlap": 0, "timesteps": [1, 200, 900]}}

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)

def place_aware(seen):
    """An eps that looks at neighbours and at its place, and remembers which windows it was asked about. One window at a
    time, for kernels may round otherwise in another batch."""
    weight = normal(3, 3, 3, 3, seed=1) / 4

    def eps(z, t, ij):
        seen.extend(ij)
        mixed = [torch.tanh(F.conv2d(x, weight, padding=1) + 0.02 * i - 0.04 * j) for x, (i, j) in zip(z.split(1), ij)]
        ab = S.at(t, z)
        return (z - ab.sqrt() * 0.3 * torch.cat(mixed)) * (1 - ab).sqrt() / (ab * 0.25 + 1 - ab)
    return eps

def shades(z):
    """A decoder whose windows differ in tone, as GroupNorm makes them."""
    return z + 0.5 * z.mean((1, 2, 3), keepdim=True)

def every_case():
    """out: {name: latents, and the corners this process was asked about}."""
    out = {}
    for name, options in CASES.items():
        side, seen = options.get("side", 20), []
        overlap = options.get("overlap", 4 if side > 8 else 0)
        canvas = open_canvas(side, side, 8, overlap, options.get("fade", False), batch=3)
        z, y = normal(1, 3, side, side), normal(1, 3, side // 4, side // 4, seed=1)
        level = Level(place_aware(seen), shades, torch.tanh, canvas, z, Resize(4), y)
        if name == "mended":
            wider = open_canvas(side + 8, side + 8, 8, 0, batch=3)
            level = MendedLevel(**vars(level), between=replace(level, canvas=wider))
        sample_levels([level], S, steps=2, timesteps=options.get("timesteps"), inner=2,
                      guide=name if name in GUIDES else "s2")
        out |= {name: level.z, f"{name}, corners": torch.tensor(seen)}
    return out

def on_rank(folder):
    ranks = setup("cpu", False, 1)
    save_tensors(f"{folder}/{ranks.rank}.safetensors", every_case())
    ranks.leave()

def test_two_ranks_equal_one(tmp_path):
    """Every rank gets the whole canvas, and asks about its own half of the windows alone; one window is drawn by both.
    Catches: sums that are exchanged twice or not at all, a maximum of one rank's windows."""
    want, processes = every_case(), start(tmp_path, on_rank, tmp_path, ranks=2)
    assert codes(processes) == [0, 0], (tmp_path / "text").read_text()[-2000:]
    found = [load_tensors(tmp_path / f"{r}.safetensors")[0] for r in range(2)]
    for name in CASES:
        for r, got in enumerate(found):
            assert_close(got[name], want[name], 1e-9, f"{name}, rank {r}")
        assert torch.equal(found[0][name], found[1][name])
        mine = [{tuple(p) for p in got[f"{name}, corners"].tolist()} for got in found]
        if name == "one window":
            assert mine == [{(0, 0)}, {(0, 0)}]
        elif name == "mended":                      # nine windows, and sixteen of which four share a corner with them
            assert len(mine[0] | mine[1]) == 21 and max(map(len, mine)) < 21
        else:
            assert not mine[0] & mine[1] and len(mine[0] | mine[1]) == 16 and len(mine[0]) == 8
