"""report.html of a run: its curves, and how its numbers are written."""

from collections.abc import Mapping
from typing import Any

from lit_llama.html.chart import Chart, Line, Series, chart, figure
from lit_llama.html.render import render
from lit_llama.memory import amount
from lit_llama.train.metrics import smooth


def render_page(report: Mapping[str, Any], series: Mapping[str, Series]) -> str:
    """Render the HTML of a report (see `run_report`) and the curves of metrics.csv and timing.csv."""
    formats = {"loss": loss, "figure": figure, "duration": duration, "size": size, "short_percent": short_percent}
    return render(
        "lit_llama.train.report",
        "run.html.jinja",
        report,
        styles=("run.css",),
        formats=formats,
        charts=charts(series, report["verdict"]["of_steps"]),
    )


def charts(series: Mapping[str, Series], steps: int) -> list[Chart]:
    """Build charts of loss, learning rate, gradient norm, tokens per second and memory, as far as they are known."""
    seconds = {step: value for step, value in series["seconds"] if value > 0}
    speed = {
        name: [(step, count / seconds[step]) for step, count in series[name] if step in seconds]
        for name in ("trained_tokens", "tokens")
    }
    drawn = [
        chart(
            "Loss per trained token",
            [
                Line("train, each step", "raw", series["loss"]),
                Line("train, smoothed", "main", smooth(series["loss"])),
                Line("test split", "second", series["test_loss"], dots=True),
            ],
            steps,
        ),
        chart("Learning rate", [Line("learning rate", "main", series["learning_rate"])], steps, from_zero=True),
        chart(
            "Norm of the gradient, before clipping",
            [
                Line("each step", "raw", series["grad_norm"]),
                Line("smoothed", "main", smooth(series["grad_norm"])),
            ],
            steps,
        ),
        chart(
            "Tokens per second, smoothed",
            [
                Line("all tokens", "third", smooth(speed["tokens"])),
                Line("trained tokens", "main", smooth(speed["trained_tokens"])),
            ],
            steps,
            from_zero=True,
        ),
        chart(
            "Peak memory so far, GB",
            [Line("peak memory", "main", [(step, value / 1e9) for step, value in series["memory"]])],
            steps,
            from_zero=True,
        ),
    ]
    return [entry for entry in drawn if entry is not None]


def loss(value: float) -> str:
    """Format a loss with four places behind the point, as in the run's lines."""
    return f"{value:,.4f}"


def duration(seconds: float) -> str:
    """Format a duration as 1.5 s, 4 min 30 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def size(count: float) -> str:
    """Format bytes for people."""
    return amount(int(count))


def short_percent(share: float) -> str:
    """Format a share as 25 %, of so few that a place behind the point says nothing."""
    return f"{share:.0%}"
