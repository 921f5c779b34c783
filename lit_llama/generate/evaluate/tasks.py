"""Rows that models are asked, and the measures of them: a test split, a file of rows, or a list of tasks.

Nothing here knows a model, and no torch is imported.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from lit_llama.errors import DataError, UserError
from lit_llama.generate.metrics import compiled, is_json, json_keys
from lit_llama.objects import ObjectError, load_yaml
from lit_llama.text.dataset.folder import TEST_FILE, read_meta
from lit_llama.text.message import Conversation, instruct
from lit_llama.text.read.formats.sources import question_of, read_rows, read_text
from lit_llama.text.read.raw import RowError
from lit_llama.wording import param

Part = Literal["answer", "likelihood", "choices"]
"""What a model is asked for: an answer, the log-likelihood of a reference, or of each of several choices."""
Better = Literal["more", "less", "neither"]


@dataclass(frozen=True)
class Metric:
    """A measure of rows.

    Attributes:
        label: Its name for people.
        part: What it is computed from.
        better: Which way is up.
        share: Whether it is a share, shown in percent.
    """

    label: str
    part: Part
    better: Better
    share: bool = True


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric("exact match", "answer", "more"),
    "json_match": Metric("same JSON", "answer", "more"),
    "json_fields": Metric("fields of the JSON", "answer", "more"),
    "contains": Metric("holds the words wanted", "answer", "more"),
    "regex": Metric("matches the pattern", "answer", "more"),
    "rouge_l": Metric("ROUGE-L", "answer", "more", share=False),
    "stopped": Metric("answers that stop", "answer", "more"),
    "characters": Metric("characters of an answer", "answer", "neither", share=False),
    "accuracy": Metric("right choice", "choices", "more"),
    "accuracy_norm": Metric("right choice, per byte", "choices", "more"),
    "probability": Metric("probability of the right choice", "choices", "more"),
    "loss": Metric("loss of the reference", "likelihood", "less", share=False),
    "perplexity": Metric("perplexity of the reference", "likelihood", "less", share=False),
    "bits_per_byte": Metric("bits per byte of the reference", "likelihood", "less", share=False),
}
_OF_REFERENCES = ("exact_match", "json_match", "json_fields", "rouge_l")
Prompt = Literal["chat", "raw"]
REGRESSION = "regression"


@dataclass(frozen=True)
class Item:
    """A row to be answered or scored.

    Args:
        question: What is asked, with its reference ("" if there is none).
        choices: Texts of which one is right; none where an answer is wanted.
        right: Which of them.
        wanted: Texts that an answer has to hold.
        group: Part of its task that it is counted in, too.
    """

    question: Conversation
    choices: tuple[str, ...] = ()
    right: int = 0
    wanted: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows of one kind with the measures that are taken of them.

    Args:
        name: By which it is called in the report.
        items: The rows.
        metrics: Names of `METRICS`.
        prompt: Put in the prompt style of the model, or as raw text to be continued.
        system: System message of prompts that have none.
        max_new_tokens: Most tokens of an answer; None for what is asked of all tasks.
        stop: An answer ends before any of these texts.
        pattern: Of the metric regex.

    Raises:
        UserError: It has no rows, or a metric does not fit them.
    """

    name: str
    items: tuple[Item, ...]
    metrics: tuple[str, ...]
    prompt: Prompt = "chat"
    system: str = ""
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    pattern: str = ""

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"task {self.name} has no rows, so there is nothing to measure")
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(f"task {self.name}: {_unknown('metric', metric, METRICS)}")
            self._check_fits(metric)

    @property
    def parts(self) -> list[Part]:
        """Parts of a row that models are asked for, in the order of asking."""
        return [part for part in get_args(Part) if any(METRICS[metric].part == part for metric in self.metrics)]

    def fingerprint(self) -> str:
        """Return the identity of what is asked, whatever is measured of it."""
        told = asdict(self) | {"metrics": None, "name": None, "pattern": None}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def _check_fits(self, metric: str) -> None:
        about = f"task {self.name}: metric {metric}"
        chosen = [bool(item.choices) for item in self.items]
        of_choices = METRICS[metric].part == "choices"
        if any(found != of_choices for found in chosen):
            row = self.items[[found != of_choices for found in chosen].index(True)].question.row
            wanted = (
                f"needs choices, but row {row} has none" if of_choices else f"is of answers, but row {row} has choices"
            )
            raise UserError(f"{about} {wanted}; {_ways(self.items)}")
        if metric == "regex" and not self.pattern:
            raise UserError(f"{about} needs `pattern`, a regular expression, in the task")
        needs_reference = metric in _OF_REFERENCES or METRICS[metric].part == "likelihood"
        if metric == "regex":
            try:
                needs_reference = compiled(self.pattern).groups > 0
            except UserError as error:
                raise UserError(f"task {self.name}: {error}") from error
        for item in self.items:
            where = f"row {item.question.row}"
            if needs_reference and not item.question.response:
                raise DataError(f"{about} needs a reference, but {where} has none (output, response or completion)")
            if metric in ("json_match", "json_fields") and not is_json(item.question.response):
                raise DataError(
                    f"{about} needs JSON, but the reference of {where} is none: {item.question.response[:40]!r}"
                )
            if metric == "json_fields" and not json_keys(item.question.response):
                raise DataError(f"{about} needs an object with fields, but the reference of {where} is none")
            if metric == "contains" and not (item.wanted or item.question.response):
                raise DataError(f"{about} needs `contains` or a reference, but {where} has neither")


def _ways(items: Sequence[Item]) -> str:
    """The metrics that rows can have."""
    part = {"choices"} if all(item.choices for item in items) else {"answer", "likelihood"}
    names = ", ".join(name for name, metric in METRICS.items() if metric.part in part)
    return f"expected one of {names}"


def usual_metrics(items: Sequence[Item]) -> tuple[str, ...]:
    """Return the measures of rows for which nobody asked for others: all that fit."""
    if items and all(item.choices for item in items):
        return ("accuracy", "accuracy_norm", "probability")
    references = [item.question.response for item in items]
    metrics = ["contains"] if items and all(item.wanted for item in items) else []
    if references and all(references):
        metrics.append("exact_match")
        if all(map(is_json, references)):
            metrics.append("json_match")
            metrics += ["json_fields"] if all(map(json_keys, references)) else []
        else:
            metrics.append("rouge_l")
        return (*metrics, "stopped", "characters", "loss", "perplexity", "bits_per_byte")
    return (*metrics, "stopped", "characters")


def data_task(data_dir: Path, limit: int | None = None) -> Task:
    """Return the test split of a data folder.

    Raises:
        DataError: It has none.
    """
    if read_meta(data_dir).get("splits", {}).get("test", {}).get("rows") == 0:
        raise DataError(
            f"{data_dir} has no test split to evaluate on: it was prepared with {param('test_split_size', 0)}"
        )
    items = _items(data_dir / TEST_FILE)[:limit]
    return Task(name=data_dir.resolve().name, items=items, metrics=usual_metrics(items))


def file_task(path: Path, limit: int | None = None) -> Task:
    """Return all rows of a file, with the usual measures."""
    items = _items(path)[:limit]
    return Task(name=path.stem, items=items, metrics=usual_metrics(items))


def read_tasks(name: str, limit: int | None = None) -> list[Task]:
    """Read the tasks of a YAML file, or those that come with this program.

    Args:
        name: Path of the file, or `regression`.
        limit: Only so many rows of each task.

    Raises:
        UserError: The file is no list of tasks, or one of them has an unknown key.
        DataError: Rows cannot be read.
    """
    if name == REGRESSION:
        source = files("lit_llama.generate.evaluate") / "regression.yaml"
        where, text = REGRESSION, source.read_text("utf-8")
    else:
        if not Path(name).exists() and difflib.get_close_matches(name, (REGRESSION,)):
            raise DataError(f"{name} does not exist (working folder: {Path.cwd()}); did you mean {REGRESSION}?")
        where, text = name, read_text(Path(name))
    try:
        listed = load_yaml(text)
    except ObjectError as error:
        raise DataError(f"{where} {error}") from error
    listed = listed.get("tasks") if isinstance(listed, dict) and listed.keys() == {"tasks"} else listed
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(f"{where} is no list of tasks, expected `- name: ...` with rows, data_dir or items for each")
    tasks = [_task(entry, where, Path(name).parent, limit) for entry in listed]
    check_names(tasks)
    return tasks


def check_names(tasks: Sequence[Task]) -> None:
    """Raise UserError if two tasks have one name."""
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two tasks are named {twice!r}, expected a name of its own for each")


_SETTINGS = {field.name: field.type for field in fields(Task)}
_SOURCES = ("rows", "data_dir", "items")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "metrics": (list,),
    "prompt": (str,),
    "system": (str,),
    "max_new_tokens": (int,),
    "stop": (list, str),
    "pattern": (str,),
    "rows": (str,),
    "data_dir": (str,),
    "items": (list,),
    "limit": (int,),
}


def _task(entry: Mapping[str, Any], where: str, folder: Path, limit: int | None) -> Task:
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: a task has no name, expected `name: ...`; its keys are {', '.join(map(str, entry))}")
    about = f"{where}: task {name}"
    for key, value in entry.items():
        if key not in _KINDS:
            raise UserError(f"{about}: {_unknown('key', str(key), _KINDS)}")
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            raise UserError(f"{about}: {key} is {value!r}, expected {_WORDS[_KINDS[key][0]]}")
    for key in ("limit", "max_new_tokens"):
        if entry.get(key, 1) < 1:
            raise UserError(f"{about}: {key} is {entry[key]}, expected 1 or more")
    given = [key for key in _SOURCES if key in entry]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise UserError(f"{about} has {found}, expected one of {', '.join(_SOURCES)}")
    source = entry[given[0]]
    if given == ["items"]:
        items = tuple(_item(row, number, f"{about}: item {number}") for number, row in enumerate(source))
    else:
        items = _items(folder / source / TEST_FILE if given == ["data_dir"] else folder / source)
    items = items[: entry.get("limit")][:limit]
    prompt = entry.get("prompt", "raw" if items and items[0].choices else "chat")
    if prompt not in get_args(Prompt):
        raise UserError(f"{about}: prompt is {prompt!r}, expected chat (the model's prompt style) or raw")
    stop = entry.get("stop", ())
    settings = {key: entry[key] for key in ("system", "max_new_tokens", "pattern") if key in entry}
    metrics = tuple(map(str, entry["metrics"])) if "metrics" in entry else usual_metrics(items)
    stop = (stop,) if isinstance(stop, str) else tuple(map(str, stop))
    return Task(name=name, items=items, metrics=metrics, prompt=prompt, stop=stop, **settings)


_WORDS = {str: "text", list: "a list", int: "a whole number"}


def _unknown(what: str, found: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(found, known, 1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"{found!r} is no {what}, expected {', '.join(known)}{guess}"


def _items(path: Path) -> tuple[Item, ...]:
    return tuple(_read_items(path))


def _read_items(path: Path) -> Iterator[Item]:
    for number, raw in enumerate(read_rows(path)):
        if raw.value is None:
            assert raw.error
            raise raw.error
        yield _item(raw.value, number, raw.where)


def _item(row: Any, number: int, where: str) -> Item:
    """A row of a file or of a task, in which `choices` and `contains` mean something here."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is {row!r}, expected an object")
    if "choices" in row:
        return _choice(row, number, where)
    wanted = row.get("contains", ())
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    if not isinstance(wanted, list | tuple) or not all(isinstance(text, str) and text.strip() for text in wanted):
        raise DataError(f"{where}: contains is {wanted!r}, expected a text or a list of texts")
    plain = {key: value for key, value in row.items() if key not in ("contains", "group")}
    try:
        return Item(question_of(plain, number), wanted=tuple(wanted), group=_group(row, where))
    except RowError as error:
        raise DataError(f"{where}: {error}") from error


_CHOICE_KEYS = ("prompt", "question", "instruction", "input", "choices", "answer", "group")


def _choice(row: Mapping[str, Any], number: int, where: str) -> Item:
    """A question with several answers: {"prompt": text, "choices": [texts], "answer": number, letter or text}."""
    asked = [key for key in ("prompt", "question", "instruction") if isinstance(row.get(key), str) and row[key].strip()]
    if len(asked) != 1:
        raise DataError(f"{where}: expected one of prompt, question or instruction beside choices; it has {list(row)}")
    choices, answer = row["choices"], row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where}: choices is {choices!r}, expected two or more texts")
    if len({*choices}) < len(choices):
        raise DataError(f"{where}: two choices are equal: {choices!r}")
    right = answer
    if isinstance(answer, str):
        letter = ord(answer) - ord("A") if re.fullmatch("[A-Z]", answer) else -1
        right = choices.index(answer) if answer in choices else letter
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        last = len(choices) - 1
        raise DataError(
            f"{where}: answer is {answer!r}, expected 0 to {last}, A to {chr(65 + last)}, or one of choices"
        )
    question = instruct(row[asked[0]], row.get("input") or "", choices[right], number)
    return Item(question, tuple(choices), right, group=_group(row, where))


def _group(row: Mapping[str, Any], where: str) -> str:
    group = row.get("group", "")
    if not isinstance(group, str):
        raise DataError(f"{where}: group is {group!r}, expected text")
    return group
