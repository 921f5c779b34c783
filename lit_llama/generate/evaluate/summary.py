"""Rows of models -> estimates of each metric, differences between models on the same rows, and who won which row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_llama.generate.evaluate.run import Rows
from lit_llama.generate.evaluate.tasks import METRICS, Item, Metric, Task
from lit_llama.generate.metrics import (
    Estimate,
    contains,
    difference,
    exact_match,
    json_fields,
    json_keys,
    json_match,
    mean,
    regex_match,
    rouge_l,
)
from lit_llama.generate.store import Row

Outcome = Literal["won", "lost", "same"]
_EQUAL = 1e-9
_MOST_FIELDS = 20  # of JSON objects, that are told one by one
_PER_TOKEN = ("loss", "perplexity")


@dataclass(frozen=True)
class Column:
    """A metric of one model: of each row its value and its weight; weight 0 where there is none."""

    values: list[float]
    weights: list[float]

    @property
    def there(self) -> bool:
        """Whether any row has a value."""
        return any(self.weights)

    def of(self, row: int) -> float | None:
        """Return the mean of one row."""
        return self.values[row] / self.weights[row] if self.weights[row] else None


@dataclass(frozen=True)
class Line:
    """A metric of all models.

    Attributes:
        name: Of the metric, or of a part of it: json_fields.item, accuracy.arithmetic.
        label: For people.
        metric: What it is.
        columns: Of each model.
        apart: What it is a part of; None if it stands alone.
    """

    name: str
    label: str
    metric: Metric
    columns: list[Column]
    apart: str | None = None


def lines(task: Task, models: Sequence[Rows]) -> list[Line]:
    """Return every metric of a task, and the parts of those that have some."""
    found = []
    for name in task.metrics:
        metric = METRICS[name]
        columns = [_column(name, task, model) for model in models]
        found.append(Line(name, metric.label, metric, columns))
        if name == "json_fields":
            found += _fields(task, models)
        if METRICS[name].part == "choices" and name == task.metrics[0]:
            found += _groups(task, name, columns)
    return found


def _column(name: str, task: Task, model: Rows) -> Column:
    values, weights = [], []
    for number, item in enumerate(task.items):
        row = model.get(task.name, METRICS[name].part, number)
        value, weight = (0.0, 0.0) if row is None else measured(name, task, item, row)
        values.append(value)
        weights.append(weight)
    return Column(values, weights)


def measured(name: str, task: Task, item: Item, row: Row) -> tuple[float, float]:
    """Return the value and weight of a metric on a row."""
    part = METRICS[name].part
    if part == "choices":
        return _chosen(name, item, row), 1.0
    if part == "likelihood":
        if name == "bits_per_byte":
            return -row["text"] / math.log(2), float(row["bytes"])
        return -(row["text"] + row["ends"]), float(row["tokens"])
    reference, answer = item.question.response, row["answer"]
    if name == "stopped":
        return (float(row["stopped"]), 1.0) if row.get("stopped") is not None else (0.0, 0.0)
    if name == "characters":
        return float(len(answer)), 1.0
    if name == "json_fields":
        fields = json_fields(reference, answer)
        return sum(fields.values()) / len(fields), 1.0
    if name == "contains":
        return float(contains(item.wanted or [reference], answer)), 1.0
    if name == "regex":
        return float(regex_match(task.pattern, reference, answer)), 1.0
    by_text = {"exact_match": exact_match, "json_match": json_match, "rouge_l": rouge_l}
    return float(by_text[name](reference, answer)), 1.0


def _chosen(name: str, item: Item, row: Row) -> float:
    texts = row["texts"]
    if name == "probability":
        most = max(texts)
        return math.exp(texts[item.right] - most) / sum(math.exp(value - most) for value in texts)
    if name == "accuracy_norm":
        texts = [value / size for value, size in zip(texts, row["bytes"], strict=True)]
    return float(texts.index(max(texts)) == item.right)


def _fields(task: Task, models: Sequence[Rows]) -> list[Line]:
    """Each field of the references by itself."""
    keys = list(dict.fromkeys(key for item in task.items for key in json_keys(item.question.response)))
    if len(keys) > _MOST_FIELDS:
        return []
    found = []
    for key in keys:
        columns = []
        for model in models:
            column = Column([], [])
            for number, item in enumerate(task.items):
                row = model.get(task.name, "answer", number)
                fields = {} if row is None else json_fields(item.question.response, row["answer"])
                column.values.append(float(fields.get(key, False)))
                column.weights.append(float(key in fields))
            columns.append(column)
        found.append(Line(f"json_fields.{key}", key, METRICS["json_fields"], columns, "json_fields"))
    return found


def _groups(task: Task, name: str, columns: Sequence[Column]) -> list[Line]:
    """A metric of the groups of a task."""
    groups = list(dict.fromkeys(item.group for item in task.items if item.group))
    return [
        Line(
            f"{name}.{group}",
            group,
            METRICS[name],
            [
                Column(
                    column.values,
                    [w if item.group == group else 0.0 for w, item in zip(column.weights, task.items, strict=True)],
                )
                for column in columns
            ],
            name,
        )
        for group in groups
    ]


def estimate(line: Line, column: Column) -> Estimate | None:
    """Return the mean of a metric over the rows of a model, None if it has none."""
    if not column.there:
        return None
    plain = _counts_rows(column)
    values = [v for v, w in zip(column.values, column.weights, strict=True) if w] if plain else column.values
    found = mean(values) if plain else mean(column.values, column.weights)
    if line.name == "perplexity":
        low, high = (None if end is None else _perplexity(end) for end in (found.low, found.high))
        found = Estimate(_perplexity(found.value), low, high, found.rows)
    return found


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond which there is no number of this size


def _counts_rows(column: Column) -> bool:
    return set(column.weights) <= {0.0, 1.0}


def outcomes(line: Line, first: Column, other: Column) -> list[Outcome | None]:
    """Compare the other model with the first on each row; None where one of them has no value."""
    found: list[Outcome | None] = []
    for row in range(len(first.values)):
        one, two = first.of(row), other.of(row)
        if one is None or two is None:
            found.append(None)
            continue
        gain = (two - one) if line.metric.better != "less" else one - two
        found.append("same" if abs(gain) <= _EQUAL else "won" if gain > 0 else "lost")
    return found


def compare(line: Line, first: Column, other: Column, tokenizers: bool) -> dict[str, Any] | None:
    """Compare a model to the first by their difference, None where it would mean nothing.

    Args:
        line: The metric.
        first: Of the first model.
        other: Of the other one.
        tokenizers: Whether both have the same tokenizer, without which what is counted by token cannot be compared.
    """
    if not (first.there and other.there) or line.name == "perplexity" or (line.name in _PER_TOKEN and not tokenizers):
        return None
    plain = _counts_rows(first) and _counts_rows(other)
    both = [bool(a and b) for a, b in zip(first.weights, other.weights, strict=True)]
    if not any(both):
        return None
    picked = [
        [value for value, there in zip(column, both, strict=True) if there]
        for column in (first.values, other.values, first.weights, other.weights)
    ]
    found = difference((picked[0], picked[1]), None if plain else (picked[2], picked[3]))
    who = outcomes(line, first, other)
    counts = {outcome: who.count(outcome) for outcome in ("won", "lost", "same")} if _directed(line) else {}
    return asdict(found) | counts


def _directed(line: Line) -> bool:
    return line.metric.better != "neither"


def summarise(name: str, models: Sequence[Rows], tasks: Sequence[Task], details: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that stands in results.json.

    Args:
        name: Of the evaluation.
        models: Their rows; the first is what others are compared to.
        tasks: What they were asked.
        details: Further entries.
    """
    told = [{"name": model.name, "path": str(model.path), "tokenizer": model.tokenizer} for model in models]
    found = [_summary(task, models) for task in tasks]
    return {"format": 1, "name": name, "models": told, "tasks": found, "notes": _notes(models, tasks)} | dict(details)


def _summary(task: Task, models: Sequence[Rows]) -> dict[str, Any]:
    metrics = []
    first = models[0]
    for line in lines(task, models):
        found = [estimate(line, column) for column in line.columns]
        differences = [
            compare(line, line.columns[0], column, first.tokenizer == model.tokenizer)
            for model, column in zip(models[1:], line.columns[1:], strict=True)
        ]
        metrics.append(
            {
                "name": line.name,
                "label": line.label,
                "part_of": line.apart,
                "better": line.metric.better,
                "share": line.metric.share,
                "models": [None if entry is None else asdict(entry) for entry in found],
                "differences": differences,
            }
        )
    return {"name": task.name, "rows": len(task.items), "prompt": task.prompt, "metrics": metrics}


def _notes(models: Sequence[Rows], tasks: Sequence[Task]) -> list[str]:
    """What people should know before they compare."""
    notes = []
    scored = any("likelihood" in task.parts for task in tasks)
    if scored and len({model.tokenizer for model in models if "likelihood" in model.parts}) > 1:
        notes.append(
            "the models have different tokenizers: loss and perplexity are per token and cannot be compared between "
            "them; bits per byte can"
        )
    if few := [task.name for task in tasks if len(task.items) < 30]:
        notes.append(f"{', '.join(few)}: fewer than 30 rows, so that intervals are rough")
    for task in tasks:
        rows = [model.get(task.name, "answer", row) for model in models for row in range(len(task.items))]
        cut = sum(row is not None and row.get("stopped") is False for row in rows)
        if cut:
            asked = sum(row is not None for row in rows)
            notes.append(f"{task.name}: {cut} of {asked} answers were cut off at the most tokens of an answer")
    return notes
