"""Draw the log of a training.

run: python -m experiments.plot out/toy     (extra: plot)
out: RUN/log.png, error per scale and per quarter of t, layout fidelity of the patches drawn on the way
"""
from pathlib import Path

from common import UserError, atomic, cli
from train import read_lines


def plot(run):
    """Draw RUN/log.png: eps error per scale and per quarter of t, layout fidelity of the patches drawn on the way."""
    if not (run / "log.jsonl").exists():
        raise UserError(f"no log at {run / 'log.jsonl'}: give the run folder of a training, such as out/toy")
    try:
        import matplotlib
    except ImportError as err:
        raise UserError("the plot needs matplotlib: pip install -e '.[plot]'") from err
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    loss = [r for r in read_lines(run / "log.jsonl") if r["stage"] == "ldm"]
    drawn = read_lines(run / "samples/layout.jsonl")
    fig, axes = plt.subplots(1, 3, figsize=(15, 4))
    for ax, mine, key, name in ((axes[0], loss, "by_scale", "scale"), (axes[1], loss, "by_t", "quarter of t"),
                                (axes[2], drawn, "layout", "scale")):
        for i in range(len(mine[0][key]) if mine else 0):
            ax.plot([r["step"] for r in mine], [r[key][i] for r in mine], label=f"{name} {i}")
        ax.set(xlabel="step", ylabel="mean squared error of eps", yscale="log")
        ax.legend(fontsize="small")
    axes[2].set(ylabel="layout fidelity of drawn patches", yscale="linear")
    fig.tight_layout()
    with atomic(run / "log.png") as tmp:
        fig.savefig(tmp, format="png", dpi=80)
    print(f"wrote {run / 'log.png'}")


def main(argv):
    if len(argv) != 1:
        raise UserError("say which run: python -m experiments.plot out/toy")
    plot(Path(argv[0]))


if __name__ == "__main__":
    cli(main, __doc__)
