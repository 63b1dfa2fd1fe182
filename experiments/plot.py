"""Draw the log of a training: eps error by scale and by quarter of t, layout fidelity of the patches drawn on the way.

run: python -m experiments.plot RUN      writes RUN/log.png (extra: plot)
"""
from pathlib import Path

from common import UserError, atomic, cli, read_lines

def plot(run):
    """Draw RUN/log.png. raises: UserError if there is no log, or no matplotlib."""
    if not (run / "log.jsonl").exists():
        raise UserError(f"no log at {run / 'log.jsonl'}: give the run folder of a training, such as out/toy")
    try:
        import matplotlib
    except ImportError as err:
        raise UserError("drawing needs matplotlib: pip install -e '.[plot]'") from err
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    loss = [r for r in read_lines(run / "log.jsonl") if r["stage"] == "ldm"]
    drawn = read_lines(run / "samples/layout.jsonl")
    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    panels = ((loss, "by_scale", "scale"), (loss, "by_t", "quarter of t"), (drawn, "layout", "scale"))
    for ax, (rows, key, name) in zip(axes, panels):
        for i in range(len(rows[0][key]) if rows else 0):
            ax.plot([r["step"] for r in rows], [r[key][i] for r in rows], label=f"{name} {i}")
        ax.set(xlabel="step", ylabel="mean squared error of eps", yscale="log")
        ax.legend(fontsize="small")
    axes[2].set(ylabel="layout fidelity of drawn patches", yscale="linear")
    figure.tight_layout()
    with atomic(run / "log.png") as tmp:
        figure.savefig(tmp, format="png", dpi=80)
    print(f"wrote {run / 'log.png'}")

def main(argv):
    if len(argv) != 1:
        raise UserError(f"got {argv}: write python -m experiments.plot RUN")
    plot(Path(argv[0]))

if __name__ == "__main__":
    cli(main, __doc__)
