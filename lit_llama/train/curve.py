"""The loss curve as a picture."""

from pathlib import Path

from lit_llama.place import aside
from lit_llama.train.metrics import read_metrics, smooth

CURVE_FILE = "loss.png"


def draw_curve(folder: Path) -> Path:
    """Draw training and test loss over the steps into loss.png."""
    from matplotlib.figure import Figure  # and not pyplot, whose backend is a notebook's own matter

    series = read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*series["loss"], strict=True), color="#9db8d9", linewidth=1, label="train, each step")
    axes.plot(*zip(*smooth(series["loss"]), strict=True), color="#1f4e8c", linewidth=2, label="train, smoothed")
    if series["test_loss"]:  # not where the data has no test split
        axes.plot(*zip(*series["test_loss"], strict=True), "o:", color="#d1495b", linewidth=1, label="test split")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token", title=folder.resolve().name)
    if min(value for _, value in series["loss"]) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / CURVE_FILE
    with aside(path) as part:
        figure.savefig(part, dpi=150, format="png")
    return path
