"""What a run tells: a bar with loss, rate, speed and time left, metrics.csv, times.csv, and the loss curve."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_llama.errors import IntegrityError
from lit_llama.folder import replace_text, sync
from lit_llama.progress import stderr

METRICS_FILE, TIMES_FILE, CURVE_FILE = "metrics.csv", "times.csv", "loss.png"
COLUMNS = ("step", "epoch", "learning_rate", "loss", "test_loss", "grad_norm", "trained_tokens", "tokens")
TIMES = ("step", "seconds")
"""Columns of times.csv. What no second run can repeat stands there, so that metrics.csv repeats to the byte."""


class Log:
    """Rows of metrics.csv and times.csv as they come, and progress on stderr: a bar on a terminal, else plain lines.

    Args:
        folder: Where the files go.
        steps: Optimizer steps of the whole run.
        done: Steps that a run has behind it when it goes on.
        kept: Bytes of metrics.csv by then; the rows behind them are of steps that are done again.

    Raises:
        IntegrityError: metrics.csv does not hold those rows.
    """

    def __init__(self, folder: Path, steps: int, done: int = 0, kept: int = 0) -> None:
        self._console = stderr()
        self._steps = steps
        if kept:
            _cut_back(folder, done, kept)
        mode = "a" if kept else "w"
        self._metrics = (folder / METRICS_FILE).open(mode, encoding="utf-8", newline="")
        self._times = (folder / TIMES_FILE).open(mode, encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._metrics, COLUMNS)
        self._timer = csv.DictWriter(self._times, TIMES)
        if not kept:
            self._writer.writeheader()
            self._timer.writeheader()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("training", total=steps, completed=done)

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._metrics.close()
        self._times.close()

    def sync(self) -> int:
        """Have metrics.csv on the disk as it is; gives its bytes."""
        sync(Path(self._metrics.name))
        return self._metrics.tell()

    def status(self, text: str) -> None:
        """What is going on, beside the bar."""
        self._progress.update(self._task, description=text)

    def say(self, text: str) -> None:
        """A line on stderr."""
        self._progress.console.print(text)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One optimizer step, or an evaluation, is over."""
        done = metrics["step"]
        self._writer.writerow({name: _short(value) for name, value in metrics.items() if name != "seconds"})
        self._metrics.flush()
        if "seconds" in metrics:
            self._timer.writerow({"step": done, "seconds": _short(metrics["seconds"])})
            self._times.flush()
        if "test_loss" in metrics:
            self.say(f"step {done}/{self._steps}  test loss {metrics['test_loss']:.4f}")
        self._progress.update(self._task, completed=done)
        if "loss" not in metrics:  # the evaluation before the first step, or a step that was skipped
            return
        speed = metrics["trained_tokens"] / metrics["seconds"]
        state = f"loss {metrics['loss']:.4f}  rate {metrics['learning_rate']:.2e}  {speed:,.0f} trained tokens/s"
        self.status(state)
        if not self._console.is_terminal and (done == 1 or done % max(1, self._steps // 10) == 0):
            self.say(f"step {done}/{self._steps}  {state}")


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _cut_back(folder: Path, done: int, kept: int) -> None:
    """Leave the first `kept` bytes of metrics.csv and the rows of times.csv up to step `done`."""
    path = folder / METRICS_FILE
    rows = path.read_bytes()[:kept] if path.is_file() else b""
    if len(rows) < kept or not rows.splitlines()[-1].startswith(b"%d," % done):
        raise IntegrityError(
            f"{path} is not as the run left it: expected {kept} bytes that end with step {done}. Bring it back, or "
            "begin anew in another --out_dir"
        )
    os.truncate(path, kept)
    times = folder / TIMES_FILE
    lines = times.read_text("utf-8").splitlines(keepends=True) if times.is_file() else []
    whole = [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) <= done]
    replace_text(times, ",".join(TIMES) + "\r\n" + "".join(whole))


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each column of metrics.csv and times.csv as pairs of step and value."""
    series: dict[str, list[tuple[int, float]]] = {name: [] for name in (*COLUMNS, *TIMES[1:])}
    for file_name, columns in ((METRICS_FILE, COLUMNS), (TIMES_FILE, TIMES[1:])):
        with (folder / file_name).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name in columns:
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
