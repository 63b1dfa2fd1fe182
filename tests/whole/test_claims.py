"""The experiments with slide labels, at the smallest size."""
import pytest

from common import UserError
from experiments import labels as claims

@pytest.mark.slow
def test_claims(task, tmp_path, capsys):
    """The experiments run and say what holds, at the smallest size."""
    labels = tmp_path / "l.csv"
    labels.write_text("slide_id,label\n" + "".join(f"train_{k:04d},{k % 2}\n" for k in range(8)))
    small = [str(task / "run"), f"--data={task / 'task'}", f"--labels={labels}", f"--out={tmp_path / 'o'}",
             "--cv.folds=2", "--cv.val=0.5", "--cv.epochs=1", "--cv.seeds=1", "--cv.workers=1", "--cv.width=8",
             "--cv.heads=dsmil", "--cv.fraction=1", "--cv.bootstrap=20", "--extract.scales=1,2",
             "--extract.device=cpu"]
    claims.main(small)
    said = capsys.readouterr().out
    assert "unet 1+2 " in said and "untrained 2 " in said and said.count("diffusion features beat") == 4
    assert said.count("two scales beat one") == 4
    claims.main([*small, "--part=sweep", "--ts=50", "--blocks=middle", "--extract.scales=2"])
    said = capsys.readouterr().out
    assert "t50_default" in said and "t100_middle" in said
    assert "t and block chosen in every fold by its validation loss: " in said
    claims.main([*small, "--part=probe"])
    rows = {tuple(r.split()[:2]): r.split()[2:] for r in capsys.readouterr().out.splitlines()[1:]}
    assert rows.keys() >= {("descriptor", "1"), ("unet", "2"), ("t50_default", "2")} and all(
        0 <= float(v) <= 1 for r in rows.values() for v in r[1:])
    assert float(rows["descriptor", "2"][1]) > 0.9  # ducts are seen from afar
    for more, words in (("--part=slides", "by more slides, a larger --fraction"),    # 10 % of eight slides
                        ("--part=x", "known are table, sweep"), ("--labels=nowhere", "no labels at nowhere")):
        with pytest.raises(UserError, match=words):
            claims.main([*small, more])
