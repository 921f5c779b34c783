"""metrics.csv and timing.csv: a row for each optimizer step, and one for the evaluation before the first.

metrics.csv holds what follows from data, base, settings and seed, so that the same run has the same bytes; timing.csv
holds what depends on the machine.
"""

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lit_llama.errors import IntegrityError
from lit_llama.folder.place import aside, full_disk_explained, open_own
from lit_llama.html import Series

CURVE_FILE = "loss.png"


def draw_curve(folder: Path) -> Path:
    """Draw training and test loss over the steps into loss.png."""
    from matplotlib.figure import Figure  # and not pyplot, whose backend is a notebook's own matter
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    series = read_metrics(folder)
    figure = Figure(figsize=(7, 4))
    # By hand, as a layout that is found sets every text twice, which takes as long as all the rest.
    axes = figure.subplots(gridspec_kw={"left": 0.13, "right": 0.98, "bottom": 0.12, "top": 0.92})
    axes.plot(*zip(*series["loss"], strict=True), color="#9db8d9", linewidth=1, label="train, each step")
    axes.plot(*zip(*smooth(series["loss"]), strict=True), color="#1f4e8c", linewidth=2, label="train, smoothed")
    if series["test_loss"]:  # not where the data has no test split
        axes.plot(*zip(*series["test_loss"], strict=True), "o:", color="#d1495b", linewidth=1, label="test split")
    axes.set(
        xlabel="optimizer step",
        ylabel="loss per pair" if series["margin"] else "loss per trained token",
    )
    axes.set_title(folder.resolve().name, y=1)  # where it would be found to be, which takes a third of the time
    if min(value for _, value in series["loss"]) > 0:
        axes.set_yscale("log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 0.5, and not a formula of powers of ten
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / CURVE_FILE
    with aside(path) as part:
        figure.savefig(part, dpi=150, format="png")
    return path


METRICS_FILE, TIMING_FILE = "metrics.csv", "timing.csv"
METRICS = (
    *("step", "epoch", "learning_rate", "loss", "test_loss", "perplexity", "stopped", "grad_norm", "trained_tokens"),
    "tokens",
)
_OF_PAIRS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "drift", "chosen_length", "rejected_length")
PAIR_METRICS = (*METRICS, *_OF_PAIRS, *(f"test_{name}" for name in _OF_PAIRS), "answer_length")
"""Columns of a run on preference rows: of each step, and of evaluations."""
TIMING = ("step", "seconds", "memory")
COLUMNS = {METRICS_FILE: METRICS, TIMING_FILE: TIMING}


class Lines:
    """A text file that grows with the steps of a run and can be cut back to one of them.

    Args:
        path: The file; it appears with its first line.
        header: A line before all others, or "".
    """

    def __init__(self, path: Path, header: str = "") -> None:
        self.path, self._header = path, header
        self._file: BinaryIO | None = None

    def start(self) -> None:
        """Begin anew."""
        self.close()
        self.path.unlink(missing_ok=True)

    def resume(self, step: int) -> int:
        """Keep the lines up to `step`, byte for byte, and go on behind them.

        A line that a killed run has not finished goes as well.

        Returns:
            The step of the last line that is kept, -1 if there is none.
        """
        self.close()
        if not self.path.exists():
            return -1
        self._file = os.fdopen(open_own(self.path, os.O_RDWR), "r+b")
        end, last = 0, -1
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            if not (self._header and number == 0):
                if (found := self._step(line)) > step:
                    break
                last = found
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)
        return last

    @staticmethod
    def _step(line: bytes) -> int:
        """The number of a line: both kinds of file name it first."""
        return int(line.partition(b",")[0].removeprefix(b'{"step": '))

    def append(self, text: str) -> None:
        """Write lines that are there for others at once."""
        if self._file is None:
            self._file = os.fdopen(open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb")
        with full_disk_explained(self.path, self.path):
            if self._file.tell() == 0:
                self._file.write(self._header.encode())
            self._file.write(text.encode())
            self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
        self._file = None


def csv_line(values: Sequence[Any]) -> str:
    """Format a row, numbers to six digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(
        [f"{value:.6g}" if isinstance(value, float) else value for value in values]
    )
    return text.getvalue()


def rows_of(metrics: Mapping[str, Any], columns_of: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Yield what each file with its columns says about a step: its name and the row."""
    for name, columns in columns_of.items():
        yield name, csv_line([metrics.get(column, "") for column in columns])


def read_metrics(folder: Path) -> dict[str, Series]:
    """Read each column of metrics.csv and timing.csv as pairs of step and value; those of preference rows, too.

    Raises:
        IntegrityError: A file has other columns, or what is no number in them.
    """
    series: dict[str, Series] = {name: [] for columns in (*COLUMNS.values(), PAIR_METRICS) for name in columns}
    for file_name, columns in COLUMNS.items():
        if not (folder / file_name).exists():
            continue
        try:
            with (folder / file_name).open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                if file_name == METRICS_FILE and tuple(reader.fieldnames or ()) == PAIR_METRICS:
                    columns = PAIR_METRICS
                for row in reader:
                    for name in columns if file_name == METRICS_FILE else columns[1:]:
                        if row[name]:
                            series[name].append((int(row["step"]), float(row[name])))
        except (ValueError, LookupError, TypeError, csv.Error) as error:
            raise IntegrityError(f"{folder / file_name} is not as the run wrote it: {error}; bring it back") from error
    return series


def perplexity(loss: float) -> float:
    """Compute exp(loss): among how many tokens, all equally likely, the model would be as unsure."""
    return math.exp(loss) if loss < 700 else math.inf


def smooth(points: Series, keep: float = 0.8) -> Series:
    """Smooth by an exponential mean, the bias of its start taken out; values that are not finite are passed over."""
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
            smoothed.append((step, mean / weight))
    return smoothed
