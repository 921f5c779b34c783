"""report.html of an evaluation: the table, a plot of each metric, and the rows on which models differ."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from lit_llama.console import harmless
from lit_llama.generate.evaluate.run import Rows
from lit_llama.generate.evaluate.summary import Line, Outcome, lines, outcomes
from lit_llama.generate.evaluate.tasks import Item, Task
from lit_llama.html import render
from lit_llama.progress import stdout

_WIDTH, _SHORT = 112, 160


def print_results(results: Mapping[str, Any]) -> None:
    """Print each metric of each model with its interval, and the difference to the first model."""
    console = stdout(width=_WIDTH)
    names = [harmless(model["name"]) for model in results["models"]]
    for task in results["tasks"]:
        title = f"{harmless(task['name'])}: {task['rows']} rows, 95 % intervals"
        others = [f"{name} against {names[0]}" for name in names[1:]]
        table = Table("", *names, *others, title=title, box=box.SIMPLE_HEAD)
        for metric in task["metrics"]:
            label = ("  " if metric["part_of"] else "") + harmless(metric["label"])
            own = [estimated(entry, metric["share"]) for entry in metric["models"]]
            table.add_row(label, *own, *(compared(entry, metric["share"]) for entry in metric["differences"]))
        console.print(table, soft_wrap=False)
    for judged in results.get("judge", {}).get("comparisons", []):
        rate = estimated(judged["win_rate"], True)
        console.print(
            f"judged: {harmless(judged['model'])} wins {rate} against {names[0]} (won {judged['won']}, lost "
            f"{judged['lost']}, tied {judged['tied']})"
        )


def print_rows(tasks: Sequence[Task], models: Sequence[Rows], count: int) -> None:
    """Print the first rows on which the models differ by the first metric of a task, their answers side by side."""
    for task in tasks:
        if not count or "answer" not in task.parts:
            continue
        line = next(line for line in lines(task, models) if line.metric.part == "answer")
        differs = [
            row
            for row in range(len(task.items))
            if any(outcomes(line, line.columns[0], column)[row] not in ("same", None) for column in line.columns[1:])
        ]
        shown = (differs or list(range(len(task.items))))[:count]
        table = Table(
            "asked",
            "wanted",
            *(harmless(model.name) for model in models),
            title=f"{harmless(task.name)}: the same question",
            box=box.SIMPLE_HEAD,
            show_lines=True,
        )
        for row in shown:
            question = task.items[row].question
            asked = question.prompt[-1].get("input") or question.prompt[-1]["content"]
            answers = [(model.get(task.name, "answer", row) or {}).get("answer", "–") for model in models]
            texts = [textwrap.shorten(text, _SHORT) for text in (asked, question.response, *answers)]
            table.add_row(*map(harmless, texts))
        stdout(width=_WIDTH).print(table, soft_wrap=False)


def estimated(entry: Mapping[str, Any] | None, share: bool) -> str:
    """Format an estimate as 71.5% (65.0 to 77.5), or 0.812 (0.790 to 0.835)."""
    if entry is None:
        return "–"
    value = number(entry["value"], share)
    if entry["low"] is None:
        return value
    low, high = (number(entry[end], share).rstrip("%") for end in ("low", "high"))
    return f"{value} ({low} to {high})"


def compared(entry: Mapping[str, Any] | None, share: bool) -> str:
    """Format a comparison as +12.5 (+8.0 to +17.0); won 30, lost 5, same 165."""
    if entry is None:
        return "–"
    text = number(entry["value"], share, sign="+").rstrip("%")
    if entry["low"] is not None:
        low, high = (number(entry[end], share, sign="+").rstrip("%") for end in ("low", "high"))
        text += f" ({low} to {high})"
    counts = ", ".join(f"{name} {entry[name]}" for name in ("won", "lost", "same") if name in entry)
    return f"{text}; {counts}" if counts else text


def number(value: float, share: bool, sign: str = "") -> str:
    """Return a share in percent, or four digits that matter."""
    if share:
        return f"{100 * value:{sign}.1f}%"
    if abs(value) >= 100:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.1f}" if abs(value) >= 10 else f"{value:{sign}.3f}"


MOST_ROWS = 400
"""Rows of a task on the page; all are in rows/."""
_MOST_TEXT = 4000


@dataclass(frozen=True)
class Mark:
    """A model in a plot: its value and its interval, in percent from the left."""

    name: str
    place: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Plot:
    """A metric of all models on one scale, with the words of its ends."""

    label: str
    marks: list[Mark]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Filter:
    """A comparison by which rows can be picked: how many rows it has of each outcome."""

    key: str
    label: str
    counts: Mapping[Outcome, int]


@dataclass(frozen=True)
class ShownRow:
    """A row with all answers.

    Attributes:
        classes: Of each filter, its outcome.
        badges: Of each model the outcomes of its row, for people.
    """

    number: int
    group: str
    prompt: str
    reference: str
    answers: list[tuple[str, str, list[str]]]
    classes: list[str]


def render_page(
    results: Mapping[str, Any], models: Sequence[Rows], tasks: Sequence[Task], timing: Mapping[str, Any]
) -> str:
    """Render the HTML of an evaluation.

    Args:
        results: What stands in results.json.
        models: Their rows.
        tasks: What they were asked.
        timing: Tokens and seconds by model and part.
    """
    filters: list[list[Filter]] = []
    rows: list[list[ShownRow]] = []
    for index, task in enumerate(tasks):
        found = lines(task, models)
        picked = _filters(index, found, models)
        filters.append([entry for entry, _ in picked])
        rows.append(_rows(task, found, models, picked))
    return render(
        "lit_llama.generate.evaluate",
        "evaluation.html.jinja",
        results,
        styles=("evaluation.css",),
        formats={"estimated": estimated, "compared": compared},
        plots=[[plot for entry in task["metrics"] if (plot := _plot(entry, models))] for task in results["tasks"]],
        filters=filters,
        rows=rows,
        most=MOST_ROWS,
        speeds=[_speed(timing.get(model.name, {})) for model in models],
    )


def _speed(parts: Mapping[str, Any]) -> str:
    own = parts.get("answer", {})
    return f"{own['tokens'] / own['seconds']:,.0f}" if own.get("seconds") else "–"


def _plot(metric: Mapping[str, Any], models: Sequence[Rows]) -> Plot | None:
    """A metric on a scale that holds all intervals; shares from 0 to 100 %."""
    there = [(model.name, entry) for model, entry in zip(models, metric["models"], strict=True) if entry]
    if metric["part_of"] or not there or not all(math.isfinite(entry["value"]) for _, entry in there):
        return None
    ends = [value for _, entry in there for value in (entry["value"], entry["low"], entry["high"]) if value is not None]
    first, last = (0.0, 1.0) if metric["share"] else (min(ends), max(ends))
    if first == last:
        first, last = first - 0.5, last + 0.5
    elif not metric["share"]:
        edge = 0.05 * (last - first)
        first, last = first - edge, last + edge

    def place(value: float) -> float:
        return round(100 * (value - first) / (last - first), 2)

    marks = [
        Mark(
            name,
            place(entry["value"]),
            place(entry["value"] if entry["low"] is None else entry["low"]),
            place(entry["value"] if entry["high"] is None else entry["high"]),
            estimated(entry, metric["share"]),
        )
        for name, entry in there
    ]
    steps = [first + (last - first) * part / 4 for part in range(5)]
    ticks = [(place(step), f"{step:.0%}" if metric["share"] else number(step, False)) for step in steps]
    return Plot(metric["label"], marks, ticks)


def _filters(task: int, found: Sequence[Line], models: Sequence[Rows]) -> list[tuple[Filter, list[Outcome | None]]]:
    """Comparisons to the first model of all metrics that have a better and a worse."""
    picked: list[tuple[Filter, list[Outcome | None]]] = []
    for line in found:
        if line.metric.better == "neither" or line.name == "perplexity" or line.apart:
            continue
        for index, (model, column) in enumerate(zip(models[1:], line.columns[1:], strict=True), 1):
            who = outcomes(line, line.columns[0], column)
            if any(outcome is not None for outcome in who):
                counts: dict[Outcome, int] = {name: who.count(name) for name in ("won", "lost", "same")}
                key = f"t{task}m{len(picked)}c{index}"
                picked.append((Filter(key, f"{line.label}, {model.name}", counts), who))
    return picked


def _rows(
    task: Task,
    found: Sequence[Line],
    models: Sequence[Rows],
    picked: Sequence[tuple[Filter, list[Outcome | None]]],
) -> list[ShownRow]:
    """Rows for the page, those that differ before those that do not where there are too many."""
    numbers = list(range(len(task.items)))
    if len(numbers) > MOST_ROWS:
        numbers.sort(key=lambda row: all(who[row] in ("same", None) for _, who in picked))
        numbers = sorted(numbers[:MOST_ROWS])
    shown = []
    for row in numbers:
        item = task.items[row]
        classes = [f"{entry.key}-{who[row]}" for entry, who in picked if who[row] is not None]
        answers = [(model.name, *_answer(task, item, row, model, found, place)) for place, model in enumerate(models)]
        reference = "" if item.choices else item.question.response
        shown.append(ShownRow(row, item.group, _cut(item.question.asked), _cut(reference), answers, classes))
    return shown


def _answer(task: Task, item: Item, row: int, model: Rows, found: Sequence[Line], place: int) -> tuple[str, list[str]]:
    """The words of a model on a row, and its measures there."""
    values = [
        f"{line.label} {number(value, line.metric.share)}"
        for line in found
        if not line.apart and line.name != "perplexity" and (value := line.columns[place].of(row)) is not None
    ]
    if item.choices:
        chosen = model.get(task.name, "choices", row)
        if chosen is None:
            return "", values
        best = max(chosen["texts"])
        told = [
            f"{'→' if value == best else ' '} {choice} ({value:.2f}){' ✓' if index == item.right else ''}"
            for index, (choice, value) in enumerate(zip(item.choices, chosen["texts"], strict=True))
        ]
        return "\n".join(told), values
    answer = model.get(task.name, "answer", row)
    return ("" if answer is None else _cut(answer["answer"])), values


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} … {len(text) - _MOST_TEXT:,} more characters"
