"""report.html of a run: its curves, and how its numbers are written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any, NamedTuple

from lit_llama.html import Chart, Line, Series, chart, figure, render
from lit_llama.memory import amount
from lit_llama.train.logs.metrics import smooth


class _Measured(NamedTuple):
    """A measure of evaluations beside the loss.

    Args:
        column: Its name in report.json, how it is written, and the class of its cells.
        head: Of the column.
        tile: What it is at the top of the page; "" for none.
    """

    column: tuple[str, str, str]
    head: str
    tile: str


_OF_TOKENS = [_Measured(("perplexity", "figure", ""), "perplexity", "perplexity on the test split")]
_OF_PAIRS = [
    _Measured(("test_accuracy", "short_percent", ""), "accuracy", "of the test pairs have the higher reward on chosen"),
    _Measured(("test_margin", "loss", ""), "margin", "reward of chosen over rejected"),
    _Measured(("test_chosen_reward", "loss", " extra"), "chosen", ""),
    _Measured(("test_rejected_reward", "loss", " extra"), "rejected", ""),
    _Measured(("answer_length", "number", " extra"), "tokens", "tokens of a sample answer"),
    _Measured(("test_drift", "figure", ""), "drift", "drift: mean |log p - that of the reference| of an answer"),
]
_ABOUT_TOKENS = (
    "Losses are means per trained token; the training loss is smoothed over the last steps. Perplexity is exp(test "
    "loss)."
)
_ABOUT_PAIRS = (
    "Losses are means per pair, of kto per answer; the training loss is smoothed over the last steps. Margin is the "
    "reward of chosen less that of rejected answers."
)


def render_page(report: Mapping[str, Any], series: Mapping[str, Series]) -> str:
    """Render the HTML of a report (see `run_report`) and the curves of metrics.csv and timing.csv."""
    formats = {"loss": loss, "figure": figure, "duration": duration, "size": size, "short_percent": short_percent}
    pairs = "dpo.loss" in report["settings"]
    return render(
        "lit_llama.train.logs.report",
        "run.html.jinja",
        report,
        styles=("run.css",),
        formats=formats,
        measured=_OF_PAIRS if pairs else _OF_TOKENS,
        about_losses=_ABOUT_PAIRS if pairs else _ABOUT_TOKENS,
        charts=charts(series, report["verdict"]["of_steps"]),
        rates_chart=rates_chart(report["rates"]),
    )


def rates_chart(rates: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Build the chart of a search for a learning rate, each a factor above the one before; None without one."""
    tried = [rate for rate in rates if rate["steps"]]
    found = [(place, rate["test_loss"]) for place, rate in enumerate(tried) if "test_loss" in rate]
    before = next((rate["test_loss"] for rate in rates if not rate["steps"] and "test_loss" in rate), nan)
    last = max(1, len(tried) - 1)
    lines = [
        Line("test loss", "main", found, dots=True),
        Line("chosen", "second", [point for point in found if tried[point[0]]["chosen"]], dots=True),
        Line("before training", "raw", [(0, before), (last, before)]),
    ]
    drawn = chart("Test loss of short runs by learning rate", lines, last) if found else None
    ticks = [(100 * place / last, f"{rate['learning_rate']:.1e}") for place, rate in enumerate(tried)]
    words = dict(zip((place for place, _ in ticks), (word for _, word in ticks), strict=True))
    if drawn is None:
        return None
    dotted = [
        replace(line, dots=[(x, y, f"{words[x]}: {said.partition(': ')[2]}") for x, y, said in line.dots])
        for line in drawn.lines
    ]
    return replace(drawn, lines=dotted, x_ticks=ticks)


def charts(series: Mapping[str, Series], steps: int) -> list[Chart]:
    """Build charts of loss, learning rate, gradient norm, tokens per second and memory, as far as they are known."""
    seconds = {step: value for step, value in series["seconds"] if value > 0}
    speed = {
        name: [(step, count / seconds[step]) for step, count in series[name] if step in seconds]
        for name in ("trained_tokens", "tokens")
    }
    drawn = [
        chart(
            "Loss per pair" if series["margin"] else "Loss per trained token",
            [
                Line("train, each step", "raw", series["loss"]),
                Line("train, smoothed", "main", smooth(series["loss"])),
                Line("test split", "second", series["test_loss"], dots=True),
            ],
            steps,
        ),
        chart(
            "Rewards on the test split",
            [
                Line("chosen", "main", series["test_chosen_reward"], dots=True),
                Line("rejected", "second", series["test_rejected_reward"], dots=True),
            ],
            steps,
        ),
        chart("Pairs with the higher reward on chosen", _accuracy(series), steps, from_zero=True),
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


def _accuracy(series: Mapping[str, Series]) -> list[Line]:
    return [
        Line("train, smoothed", "main", smooth(series["accuracy"])),
        Line("test split", "second", series["test_accuracy"], dots=True),
    ]


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
