"""What a run tells: a bar with loss, rate, speed and time left, metrics.csv, and the loss curve as a picture."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_llama.progress import stderr

METRICS_FILE, CURVE_FILE = "metrics.csv", "loss.png"
COLUMNS = ("step", "epoch", "learning_rate", "loss", "test_loss", "grad_norm", "trained_tokens", "tokens", "seconds")


class Log:
    """Rows of metrics.csv as they come, and progress on stderr: a bar on a terminal, plain lines elsewhere.

    Args:
        folder: Where metrics.csv goes.
        steps: Optimizer steps of the whole run.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._console = stderr()
        self._steps = steps
        self._file = (folder / METRICS_FILE).open("w", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("training", total=steps)

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._file.close()

    def status(self, text: str) -> None:
        """What is going on, beside the bar."""
        self._progress.update(self._task, description=text)

    def say(self, text: str) -> None:
        """A line on stderr."""
        self._progress.console.print(text)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One optimizer step, or an evaluation, is over."""
        self._writer.writerow({name: _short(value) for name, value in metrics.items()})
        self._file.flush()
        done = metrics["step"]
        if "test_loss" in metrics:
            self.say(f"step {done}/{self._steps}  test loss {metrics['test_loss']:.4f}")
        if "loss" not in metrics:
            return
        speed = metrics["trained_tokens"] / metrics["seconds"]
        state = f"loss {metrics['loss']:.4f}  rate {metrics['learning_rate']:.2e}  {speed:,.0f} trained tokens/s"
        self.status(state)
        self._progress.update(self._task, completed=done)
        if not self._console.is_terminal and (done == 1 or done % max(1, self._steps // 10) == 0):
            self.say(f"step {done}/{self._steps}  {state}")


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each column of metrics.csv as pairs of step and value."""
    series: dict[str, list[tuple[int, float]]] = {name: [] for name in COLUMNS}
    with (folder / METRICS_FILE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name in COLUMNS:
                if row[name]:
                    series[name].append((int(row["step"]), float(row[name])))
    return series


def draw_curve(folder: Path) -> Path:
    """Draw training and test loss over the steps into loss.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    series = read_metrics(folder)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*series["loss"], strict=True), color="#9db8d9", linewidth=1, label="train, each step")
    axes.plot(*zip(*_smooth(series["loss"]), strict=True), color="#1f4e8c", linewidth=2, label="train, smoothed")
    axes.plot(*zip(*series["test_loss"], strict=True), "o:", color="#d1495b", linewidth=1, label="test split")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token", title=folder.resolve().name)
    if min(value for _, value in series["loss"]) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / CURVE_FILE
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _smooth(points: list[tuple[int, float]], keep: float = 0.8) -> list[tuple[int, float]]:
    """Exponential mean with the bias of its start taken out."""
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append((step, mean / weight))
    return smoothed
