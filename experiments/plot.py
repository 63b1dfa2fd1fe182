"""Draw the log of a training, and what quality costs in large images.

run: python -m experiments.plot RUN            RUN/log.png: eps error by scale and by quarter of t, layout fidelity
     python -m experiments.quality RUN --plot  RUN/bench/quality.png      (both: extra plot)
"""
import json
from pathlib import Path

from common import UserError, atomic, cli, read_lines

def panels(n, size):
    """A figure with n panels side by side. raises: UserError if there is no matplotlib."""
    try:
        import matplotlib
    except ImportError as err:
        raise UserError("drawing needs matplotlib: pip install -e '.[plot]'") from err
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(1, n, figsize=size, layout="tight")

def save(figure, path):
    with atomic(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100)
    print(f"wrote {path}")

def draw_log(run):
    """Draw RUN/log.png. raises: UserError if there is no log."""
    if not (run / "log.jsonl").exists():
        raise UserError(f"no log at {run / 'log.jsonl'}: give the run folder of a training, such as out/toy")
    loss = [r for r in read_lines(run / "log.jsonl") if r["stage"] == "ldm"]
    drawn = read_lines(run / "samples/layout.jsonl")
    figure, axes = panels(3, (15, 4))
    shown = ((loss, "by_scale", "scale"), (loss, "by_t", "quarter of t"), (drawn, "layout", "scale"))
    for ax, (rows, key, name) in zip(axes, shown):
        steps = [r["step"] for r in rows]
        for i, values in enumerate(zip(*(r[key] for r in rows))):
            ax.plot(steps, values, marker=".", label=f"{name} {i}")         # a single sample shows, too
        ax.set(xlabel="step", ylabel="mean squared error of eps", yscale="log")
        ax.legend(fontsize="small")
    axes[2].set(ylabel="layout fidelity of drawn patches", yscale="linear")
    save(figure, run / "log.png")

def draw_trade(folder):
    """Agreement and distance of crops of every method over its cost, from FOLDER/quality_*.json."""
    files = sorted(folder.glob("quality_*.json"))
    if not files:
        raise UserError(f"{folder} holds no quality_*.json: measure first, without --plot")
    figure, axes = panels(2, (12, 5.8))
    ticks = (300, 1000, 2000, 5000, 10000, 20000, 50000)
    shown = {"psnr": "A(image) against the context, dB", "crops_desc": "distance of crops to real ones (descriptor)"}
    for ax, (key, label) in zip(axes, shown.items()):
        for marker, file in zip("os^D", files):
            rows = [row for row in json.loads(file.read_text())["rows"] if row["TFLOP"]]
            dots = sorted((row[key], row["TFLOP"], row["method"]) for row in rows)
            ax.scatter([x for _, x, _ in dots], [y for y, _, _ in dots], marker=marker, label=file.stem[8:] + " px")
            for k, (y, x, name) in enumerate(dots):  # labels in turn above and below: some dots lie near
                ax.annotate(name, (x, y), fontsize=7, xytext=(4, 3 - 9 * (k % 2)), textcoords="offset points")
        ax.set(xscale="log", xlabel="TFLOP per image, at full size", ylabel=label, xmargin=0.15)
        ax.set_xticks(ticks, ticks)
        ax.xaxis.set_minor_formatter("")
    axes[0].legend()
    save(figure, folder / "quality.png")

def main(argv):
    if len(argv) != 1:
        raise UserError(f"got {argv}: write python -m experiments.plot RUN")
    draw_log(Path(argv[0]))

if __name__ == "__main__":
    cli(main, __doc__)
