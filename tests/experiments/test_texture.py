"""The table of autoencoders: what it measures on images whose answer is known, and what is refused."""
import pytest
import torch

from common import UserError
from experiments import texture

def test_measures():
    """catches: a ratio upside down; steps between cells taken for others; columns in another order."""
    x = torch.rand(8, 3, 64, 64) * 2 - 1
    assert texture.sharpness(x / 4, x) == pytest.approx(0.25)
    sharp, psnr, lattice, far = texture.row_of(x, x, torch.rand(32, 3, 64, 64))
    assert sharp == 1 and psnr == float("inf") and lattice == pytest.approx(1, abs=0.02) and far < 1e-6
    blocks = x[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    sharp, psnr, lattice, far = texture.row_of(blocks, x, torch.rand(32, 3, 64, 64))
    assert sharp == pytest.approx(0.25, rel=0.1) and psnr < 10 and lattice == float("inf") and far > 0.01

def test_table_and_sheet(run, toy, tmp_path, capsys):
    """Two folders, a run and its file. A scale of too few patches is left out."""
    names = [str(run), str(run / "vae.safetensors")]
    texture.main([*names, f"--data={toy},{toy}", "--n=4", f"--out={tmp_path / 'x.png'}"])
    lines = capsys.readouterr().out.splitlines()
    assert [sum(line.endswith(name) for line in lines) for name in names] == [4, 4]
    assert (tmp_path / "x.png").stat().st_size > 1000

@pytest.mark.parametrize("args, says", [
    ([], "say which VAEs"), (["/nowhere"], "no file /nowhere"), (["RUN", "--n=2"], "--n=2: it must be at least 3"),
    (["RUN", "--split=valid"], "--split=valid"), (["RUN", "--data=/nowhere"], "no index.json")])
def test_bad_input(args, says, run, toy):
    with pytest.raises(UserError, match=says):
        texture.main([f"--data={toy}", *(str(run) if a == "RUN" else a for a in args)])
