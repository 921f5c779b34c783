"""What a run writes down: metrics.csv, the loss curve, and lines on stderr."""

import csv
import functools
import io
from pathlib import Path
from typing import Any

import pytest

from lit_llama.errors import IntegrityError
from lit_llama.train import log as log_module
from lit_llama.train.log import COLUMNS, CURVE_FILE, METRICS_FILE, TIMES_FILE, Log, draw_curve, read_metrics


def metrics(step: int, **more: float) -> dict[str, Any]:
    values = {"step": step, "epoch": step / 10, "learning_rate": 3e-4, "loss": 2.0 / step, "grad_norm": 0.123456789}
    return values | {"trained_tokens": 120, "tokens": 300, "seconds": 0.5} | more


def write_run(folder: Path, steps: int = 20) -> None:
    with Log(folder, steps) as log:
        log.step({"step": 0, "test_loss": 3.0})
        for step in range(1, steps + 1):
            log.step(metrics(step, **({"test_loss": 2.5 / step} if step % 10 == 0 else {})))


def test_metrics_have_one_row_a_step_and_known_columns(tmp_path: Path) -> None:
    """Catches columns that are exchanged, a step that is missing, a value written where there is none."""
    write_run(tmp_path)
    with (tmp_path / METRICS_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert COLUMNS == (
        "step",
        "epoch",
        "learning_rate",
        "loss",
        "test_loss",
        "grad_norm",
        "trained_tokens",
        "tokens",
    )
    assert [int(row["step"]) for row in rows] == list(range(21))
    assert {name for name, value in rows[0].items() if value} == {"step", "test_loss"}
    assert {name for name, value in rows[1].items() if not value} == {"test_loss"}
    assert {name: float(rows[10][name]) for name in ("epoch", "learning_rate", "loss", "test_loss")} == {
        "epoch": 1.0,
        "learning_rate": 3e-4,
        "loss": 0.2,
        "test_loss": 0.25,
    }


def test_what_no_run_can_repeat_stands_apart(tmp_path: Path) -> None:
    """Catches times in metrics.csv, which keep two equal runs from having equal files."""
    write_run(tmp_path)
    assert "0.5" not in (tmp_path / METRICS_FILE).read_text().splitlines()[3].split(",")
    lines = (tmp_path / TIMES_FILE).read_text().splitlines()
    assert lines[:2] == ["step,seconds", "1,0.5"] and len(lines) == 21
    assert read_metrics(tmp_path)["seconds"] == [(step, 0.5) for step in range(1, 21)]


def test_a_log_that_goes_on_forgets_what_came_after(tmp_path: Path) -> None:
    """Catches rows of steps that are done again, which would stand there twice, and a torn last row."""
    with Log(tmp_path, 4) as log:
        log.step(metrics(1))
        log.step(metrics(2))
        kept = log.sync()
        log.step(metrics(3))
    whole = (tmp_path / METRICS_FILE).read_bytes()
    assert kept == whole.index(b"3,0.3")
    (tmp_path / TIMES_FILE).write_text("step,seconds\r\n1,0.5\r\n2,0.5\r\n3,0.5\r\n1", newline="")
    with Log(tmp_path, 4, 2, kept) as log:
        log.step(metrics(3))
    assert (tmp_path / METRICS_FILE).read_bytes() == whole
    assert (tmp_path / TIMES_FILE).read_text().split() == ["step,seconds", "1,0.5", "2,0.5", "3,0.5"]
    with pytest.raises(IntegrityError, match=f"expected {kept} bytes that end with step 1"):
        Log(tmp_path, 4, 1, kept)


def test_a_step_that_was_skipped_has_no_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a row or a line that needs a loss."""
    skipped = {name: value for name, value in metrics(1).items() if name not in ("loss", "grad_norm")}
    with Log(tmp_path, 2) as log:
        log.step(skipped | {"test_loss": 2.0})
    assert read_metrics(tmp_path)["loss"] == [] and "test loss 2.0000" in capsys.readouterr().err


def test_what_is_written_is_there_at_once(tmp_path: Path) -> None:
    """Catches a file that stays empty until a long run ends."""
    with Log(tmp_path, 2) as log:
        log.step(metrics(1))
        assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 2


def test_metrics_read_back(tmp_path: Path) -> None:
    """Catches values that lose their step."""
    write_run(tmp_path)
    series = read_metrics(tmp_path)
    assert series["test_loss"] == [(0, 3.0), (10, 0.25), (20, 0.125)]
    assert series["loss"] == [(step, pytest.approx(2.0 / step, rel=1e-5)) for step in range(1, 21)]


def test_the_curve_is_a_picture_with_all_three_lines(tmp_path: Path) -> None:
    """Catches an empty or blank picture, and lines or labels that are missing."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import image, pyplot

    write_run(tmp_path)
    path = draw_curve(tmp_path)
    assert path == tmp_path / CURVE_FILE and path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 700
    for color in ("#9db8d9", "#1f4e8c", "#d1495b"):  # train, smoothed, test
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels[..., :3] - wanted).max(-1) < 0.02).sum() > 50, color
    assert not pyplot.get_fignums(), "the figure must be closed"


def test_the_curve_of_a_single_step_and_of_a_loss_of_zero_is_drawn(tmp_path: Path) -> None:
    """Catches a logarithm of zero, and a smoothing that needs more than one point."""
    with Log(tmp_path, 1) as log:
        log.step({"step": 0, "test_loss": 3.0})
        log.step(metrics(1, loss=0.0, test_loss=0.0))
    assert draw_curve(tmp_path).stat().st_size > 5000


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    """Catches a mean that starts at zero and makes the first steps look good."""
    smooth = functools.partial(log_module._smooth, keep=0.9)
    assert smooth([(1, 4.0), (2, 4.0), (3, 4.0)]) == [
        (1, pytest.approx(4)),
        (2, pytest.approx(4)),
        (3, pytest.approx(4)),
    ]
    (_, first), (_, second) = smooth([(1, 1.0), (2, 2.0)])
    assert first == pytest.approx(1.0) and second == pytest.approx((0.9 * 0.1 * 1 + 0.1 * 2) / 0.19)


def test_without_a_terminal_there_are_plain_lines_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bar's control sequences in a log file, a line for each of a thousand steps, and talk on stdout."""
    write_run(tmp_path, steps=40)
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    lines = [line for line in err.splitlines() if line.strip()]
    assert lines[0] == "step 0/40  test loss 3.0000"
    assert lines[1] == "step 1/40  loss 2.0000  rate 3.00e-04  240 trained tokens/s"
    assert [line.split()[1] for line in lines if "rate" in line] == [f"{n}/40" for n in (1, *range(4, 41, 4))]


def test_on_a_terminal_there_is_a_bar_with_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bar that shows neither where the run is nor how it goes."""
    from rich.console import Console

    shown = io.StringIO()
    monkeypatch.setattr(log_module, "stderr", lambda: Console(file=shown, force_terminal=True, width=160))
    write_run(tmp_path)
    assert "20/20" in shown.getvalue() and "loss 0.1000" in shown.getvalue()
