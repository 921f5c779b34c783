"""The results in the terminal: a table for each task, and rows on which the models differ."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lit_llama.console import harmless
from lit_llama.generate.evaluate.report.summary import lines, outcomes
from lit_llama.generate.evaluate.run import Rows
from lit_llama.generate.evaluate.tasks import Task
from lit_llama.progress import stdout

_WIDTH, _SHORT = 112, 160


def print_results(results: Mapping[str, Any]) -> None:
    """Each metric of each model with its interval, and the difference to the first model."""
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
    """The first rows on which the models differ by the first metric of a task, with their answers side by side."""
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
    """71.5% (65.0 to 77.5), or 0.812 (0.790 to 0.835)."""
    if entry is None:
        return "–"
    value = number(entry["value"], share)
    if entry["low"] is None:
        return value
    low, high = (number(entry[end], share).rstrip("%") for end in ("low", "high"))
    return f"{value} ({low} to {high})"


def compared(entry: Mapping[str, Any] | None, share: bool) -> str:
    """+12.5 (+8.0 to +17.0); won 30, lost 5, same 165."""
    if entry is None:
        return "–"
    text = number(entry["value"], share, sign="+").rstrip("%")
    if entry["low"] is not None:
        low, high = (number(entry[end], share, sign="+").rstrip("%") for end in ("low", "high"))
        text += f" ({low} to {high})"
    counts = ", ".join(f"{name} {entry[name]}" for name in ("won", "lost", "same") if name in entry)
    return f"{text}; {counts}" if counts else text


def number(value: float, share: bool, sign: str = "") -> str:
    """A share in percent, or four digits that matter."""
    if share:
        return f"{100 * value:{sign}.1f}%"
    if abs(value) >= 100:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.1f}" if abs(value) >= 10 else f"{value:{sign}.3f}"
