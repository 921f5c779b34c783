"""What a run writes down: its files, the loss curve, and lines on stderr."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lit_llama.errors import IntegrityError
from lit_llama.generate.answer import Answer
from lit_llama.train.logs import log as log_module
from lit_llama.train.logs.log import Log
from lit_llama.train.logs.metrics import CURVE_FILE, METRICS, METRICS_FILE, TIMING_FILE, draw_curve, read_metrics
from lit_llama.train.logs.report.run_report import REPORT_HTML, REPORT_JSON
from lit_llama.train.logs.sampler import SAMPLES_FILE


def metrics(step: int, **more: float) -> dict[str, Any]:
    values = {"step": step, "epoch": step / 10, "learning_rate": 3e-4, "loss": 2.0 / step, "grad_norm": 0.123456789}
    return values | {"trained_tokens": 120, "tokens": 300, "seconds": 0.5, "memory": 10**9} | more


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
    assert tuple(rows[0]) == METRICS
    assert (
        *("step", "epoch", "learning_rate", "loss", "test_loss", "perplexity", "stopped", "grad_norm"),
        *("trained_tokens", "tokens"),
    ) == METRICS
    assert [int(row["step"]) for row in rows] == list(range(21))
    assert {name for name, value in rows[0].items() if value} == {"step", "test_loss"}
    assert {name for name, value in rows[1].items() if not value} == {"test_loss", "perplexity", "stopped"}
    assert {name: float(rows[10][name]) for name in ("epoch", "learning_rate", "loss", "test_loss")} == {
        "epoch": 1.0,
        "learning_rate": 3e-4,
        "loss": 0.2,
        "test_loss": 0.25,
    }


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


def test_without_a_terminal_there_are_plain_lines_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bar's control sequences in a log file, a line for each of a thousand steps, and talk on stdout."""
    write_run(tmp_path, steps=40)
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    lines = [line for line in err.splitlines() if line.strip()]
    assert lines[0] == "step 0/40  test loss 3.0000"
    assert lines[1] == "step 1/40  loss 2.0000  rate 3.00e-04  240 trained tokens/s"
    assert [line.split()[1] for line in lines if "rate" in line] == [f"{n}/40" for n in (1, *range(4, 41, 4))]


def test_the_time_to_expect_is_said_once_a_few_steps_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a guess from the first step, which is slow, one after a resume that counts steps of another machine, and
    a line when all is done."""
    with Log(tmp_path, 65) as log:
        for step, seconds in enumerate([99.0, 2.0, 2.0, 2.0, 4.0, 9.0, 9.0], 1):
            log.step(metrics(step, seconds=seconds))
    assert capsys.readouterr().err.count("about 2 min 0 s for the 60 steps that are left") == 1
    with Log(tmp_path, 65) as log:
        log.resume(7)
        for step in range(8, 13):
            log.step(metrics(step, seconds=1.0))
    assert "about 53.0 s for the 53 steps that are left" in capsys.readouterr().err
    with Log(tmp_path / "short", 5) as log:
        (tmp_path / "short").mkdir()
        for step in range(1, 6):
            log.step(metrics(step))
    assert "left" not in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar_with_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bar that shows neither where the run is nor how it goes."""
    from rich.console import Console

    shown = io.StringIO()
    monkeypatch.setattr(log_module, "stderr", lambda: Console(file=shown, force_terminal=True, width=160))
    write_run(tmp_path)
    assert "20/20" in shown.getvalue() and "loss 0.1000" in shown.getvalue()


def test_what_the_machine_decides_stands_apart(tmp_path: Path) -> None:
    """Two runs that differ in time and memory alone have the same metrics.csv; catches a time among the metrics."""
    for name, seconds in (("a", 0.5), ("b", 7.25)):
        (tmp_path / name).mkdir()
        with Log(tmp_path / name, 1) as log:
            log.step(metrics(1, seconds=seconds, memory=int(seconds * 1e9)))
    files = [(tmp_path / name / METRICS_FILE).read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert (tmp_path / "b" / TIMING_FILE).read_text() == "step,seconds,memory\n1,7.25,7250000000\n"


class Sayings:
    """A sampler without a model: says the same, and stops every second time."""

    def answers(self) -> list[Answer]:
        return [Answer("yes", True, 2), Answer("no, no", False, 9)]

    def rows(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        return [
            {"row": row, "prompt": "Say!", "answer": answer.text, "reference": "yes", "stopped": answer.stopped}
            for row, answer in enumerate(answers)
        ]


def sampled_run(log: Log, first: int, last: int) -> None:
    if first == 0:
        log.step({"step": 0} | log.evaluated(0, 3.0))
    for step in range(max(first, 1), last + 1):
        log.step(metrics(step) | (log.evaluated(step, 2.5 / step) if step % 4 == 0 else {}))


def test_an_evaluation_gives_perplexity_and_the_share_of_answers_that_stop(tmp_path: Path) -> None:
    """Catches an average over the wrong count, answers that are not written down, and an overflow."""
    with Log(tmp_path, 8, sampler=Sayings()) as log:  # type: ignore[arg-type]
        assert log.evaluated(0, 2.0) == {"test_loss": 2.0, "perplexity": pytest.approx(math.e**2), "stopped": 0.5}
        assert log.evaluated(4, 1e4)["perplexity"] == math.inf
    rows = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert [(row["step"], row["answer"], row["stopped"]) for row in rows] == [
        *((0, "yes", True), (0, "no, no", False), (4, "yes", True), (4, "no, no", False))
    ]


@pytest.mark.parametrize("step", range(11))
def test_resumed_files_equal_those_of_a_run_that_was_never_stopped(tmp_path: Path, step: int) -> None:
    """At every step, with rows beyond it and a torn last line; catches rows that are lost, doubled or rewritten."""
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        with Log(tmp_path / name, 10, sampler=Sayings()) as log:  # type: ignore[arg-type]
            sampled_run(log, 0, 10)
    torn = {METRICS_FILE: "11,0.", TIMING_FILE: "1", SAMPLES_FILE: '{"step": 11, "pro'}
    for name, text in torn.items():
        with (tmp_path / "resumed" / name).open("a") as file:
            file.write(text)
    with Log(tmp_path / "resumed", 10, sampler=Sayings()) as log:  # type: ignore[arg-type]
        log.resume(step)
        kept = (tmp_path / "resumed" / METRICS_FILE).read_bytes()
        assert (tmp_path / "whole" / METRICS_FILE).read_bytes().startswith(kept)
        assert kept.count(b"\n") == step + 2
        sampled_run(log, step + 1, 10)
    for name in torn:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_rows_that_are_missing_at_a_resume_are_named(tmp_path: Path) -> None:
    """Catches a curve with a hole that nobody is told of."""
    write_run(tmp_path, steps=4)
    with Log(tmp_path, 10) as log, pytest.raises(IntegrityError, match=r"metrics\.csv .* lacks the steps 5 to 6"):
        log.resume(6)


def test_a_run_from_the_start_keeps_nothing_of_an_older_one(tmp_path: Path) -> None:
    """Catches answers and rows of a killed run that stand among those of the next."""
    with Log(tmp_path, 8, sampler=Sayings()) as log:  # type: ignore[arg-type]
        sampled_run(log, 0, 8)
    with Log(tmp_path, 2) as log:
        log.step({"step": 0} | log.evaluated(0, 3.0))
    assert not (tmp_path / SAMPLES_FILE).exists()
    assert read_metrics(tmp_path)["step"] == [(0, 0.0)] and read_metrics(tmp_path)["memory"] == []


def test_the_report_can_be_looked_at_during_the_run(tmp_path: Path) -> None:
    """Catches a report that is written at the end only, or not after each evaluation."""
    with Log(tmp_path, 8) as log:
        sampled_run(log, 0, 3)
        assert json.loads((tmp_path / REPORT_JSON).read_text())["verdict"]["after"]["step"] == 0
        sampled_run(log, 4, 5)
        assert json.loads((tmp_path / REPORT_JSON).read_text())["verdict"]["after"]["step"] == 4
        assert "0.6250" in (tmp_path / REPORT_HTML).read_text("utf-8")
    assert not list(tmp_path.glob(".*")), "no partial file is left"


def test_the_report_is_written_every_minute_and_when_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a page of step 0 beside eighteen rows of metrics.csv, and one that is written at every step."""
    now = 0.0
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now)

    def told() -> int:
        return int(json.loads((tmp_path / REPORT_JSON).read_text())["verdict"]["steps"])

    with pytest.raises(KeyboardInterrupt), Log(tmp_path, 1089) as log:
        log.step({"step": 0, "test_loss": 3.0})
        for step in range(1, 19):
            now += 10
            log.step(metrics(step))
            assert told() == step // 6 * 6
        now += 0.5
        log.report(older=log_module.SAVE_SECONDS)  # as after a save
        assert told() == 18
        log.step(metrics(19))
        log.report(older=log_module.SAVE_SECONDS)
        assert told() == 18
        raise KeyboardInterrupt
    assert told() == 19
