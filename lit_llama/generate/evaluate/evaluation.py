"""An evaluation from its folders to its report.

In place of a model, a file of answers may be named that were made before, by this program or by any other
program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.folder.lock import claim
from lit_llama.folder.place import full_disk_explained
from lit_llama.folder.publish import encode_json, replace_file
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.evaluate.page import render_page
from lit_llama.generate.evaluate.run import Rows, evaluate_models, read_timing
from lit_llama.generate.evaluate.summary import summarise
from lit_llama.generate.evaluate.tasks import METRICS, Item, Task, check_names, data_task, read_tasks, usual_metrics
from lit_llama.generate.models import Model, short_names
from lit_llama.generate.store import Key, Row, described
from lit_llama.progress import stderr
from lit_llama.text.message import Conversation, instruct
from lit_llama.text.read.formats.sources import question_of, read_rows
from lit_llama.text.read.raw import RowError
from lit_llama.wording import param


def read_answers(path: Path) -> list[tuple[Conversation, Row]]:
    """Read the questions and answers of a file.

    Raises:
        DataError: A row has no answer, or is one of several answers to a question.
    """
    found = []
    for number, raw in enumerate(read_rows(path)):
        if raw.value is None:
            assert raw.error
            raise raw.error
        found.append(_answer(raw.value, number, raw.where))
    if not found:
        raise DataError(f"{path} holds no answers")
    return found


def _answer(row: Mapping[str, Any], number: int, where: str) -> tuple[Conversation, Row]:
    for key, kind, expected in (("answer", str, "text"), ("stopped", bool | None, "true or false")):
        if not isinstance(row.get(key), kind):
            raise DataError(f"{where}: {key} is {row.get(key)!r}, expected {expected}")
    if row.get("sample"):
        raise DataError(f"{where} is one of several answers to a question, expected one a row (without {param('n')})")
    texts = [row.get(key) or "" for key in ("instruction", "input", "output")]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: expected instruction, input and output as text, or messages and output")
    instruction, given, output = texts
    question = instruct(instruction, given, output, number)
    if row.get("messages"):
        try:
            question = question_of({key: row[key] for key in ("messages", "tools") if row.get(key)}, number)
        except RowError as error:
            raise DataError(f"{where}: {error}") from error
        answer = ({"role": "assistant", "content": output},) if output else ()
        question = replace(question, messages=(*question.prompt, *answer))
    return question, {"answer": row["answer"], "stopped": row.get("stopped")}


def answered_task(name: str, answers: Sequence[tuple[Conversation, Row]]) -> Task:
    """Return the questions of a file of answers, with all measures of answers that fit."""
    items = tuple(Item(question) for question, _ in answers)
    metrics = [metric for metric in usual_metrics(items) if METRICS[metric].part == "answer"]
    if any(row["stopped"] is None for _, row in answers):
        metrics.remove("stopped")
    return Task(name=name, items=items, metrics=tuple(metrics))


def answered_rows(name: str, path: Path, answers: Sequence[tuple[Conversation, Row]], task: Task) -> Rows:
    """Return the answers of a file as the rows of a model.

    Raises:
        DataError: They are to other questions than those of the task.
    """
    if len(answers) < len(task.items):
        raise DataError(f"{path} holds {len(answers)} answers, but {task.name} has {len(task.items)} rows")
    rows: dict[Key, Row] = {}
    for number, (item, (question, row)) in enumerate(zip(task.items, answers, strict=False)):
        if _asked(question) != _asked(item.question):
            raise DataError(
                f"{path}: answer {number} is to {_asked(question)[0][:60]!r}, but row {number} of {task.name} asks "
                f"{_asked(item.question)[0][:60]!r}: expected answers to the same rows in the same order"
            )
        rows[task.name, "answer", number] = row
    return Rows(name, path, rows, frozenset({"answer"}))


def _asked(question: Conversation) -> tuple[str, str, str]:
    if (alone := question.instruction) is not None:
        return alone["content"], alone.get("input", ""), question.response
    users = [turn for turn in question.prompt if turn["role"] != "system"]
    return "\n".join(str(turn["content"]) for turn in users), "", question.response


def check_one_task(paths: Sequence[Path], tasks: Sequence[Task]) -> None:
    """Raise UserError if nobody can say which task answers belong to."""
    if paths and len(tasks) > 1:
        raise UserError(f"{paths[0]} holds answers, but there are {len(tasks)} tasks; expected one task beside answers")


RESULTS_JSON, REPORT_HTML = "results.json", "report.html"


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        results: All that stands in results.json.
        models: Their rows.
        tasks: What they were asked.
    """

    results: dict[str, Any]
    models: list[Rows]
    tasks: list[Task]


def gather_tasks(
    data_dir: Path | None, tasks: Sequence[str], answers: Sequence[Path], limit: int | None = None
) -> list[Task]:
    """Gather the tasks that are to be asked, before anything is loaded.

    Args:
        data_dir: A data folder, of which the test split is a task.
        tasks: Files of tasks, or `regression`.
        answers: Files of answers, whose questions are the task where there is no other.
        limit: Only so many rows of each task.

    Raises:
        UserError: There are none, or two of one name.
        DataError: Rows cannot be read.
    """
    if limit is not None and limit < 1:
        raise UserError(parameter="limit", value=limit, expected="1 or more")
    found = [data_task(data_dir, limit)] if data_dir is not None else []
    for name in tasks:
        found += read_tasks(name, limit)
    if not found and answers:
        found = [answered_task("answers", read_answers(answers[0])[:limit])]
    if not found:
        raise UserError(f"there is nothing to evaluate on: give {param('data_dir')}, {param('tasks')} or both")
    check_names(found)
    check_one_task(answers, found)
    return found


def place_of_report(data_dir: Path | None, tasks: Sequence[str], answers: Sequence[Path]) -> Path:
    """Return the place of a report that nobody named a folder for."""
    names = [data_dir.resolve().name] if data_dir is not None else []
    names += [Path(name).stem for name in tasks]
    return Path("out/evaluate") / ("-".join(names) or answers[0].stem)


def evaluate(
    models: Sequence[Model],
    tasks: Sequence[Task],
    sampling: Sampling,
    out_dir: Path,
    *,
    answers: Sequence[Path] = (),
    judge: Any = None,
    system: str = "",
    anew: bool = False,
) -> Evaluation:
    """Ask models for what is not there yet, and write results.json and report.html into `out_dir`.

    Args:
        models: Whom; the first of them, or the first file of answers, is what others are compared to.
        tasks: What.
        sampling: How answers are drawn.
        out_dir: Where rows and the report go.
        answers: Files of answers that count as models, too, before those that are asked.
        judge: Who says which of two answers is better, see judge.py; None for nobody.
        system: System message of prompts that have none.
        anew: Begin again where rows were made otherwise.

    Raises:
        UserError: A row cannot be asked, rows that are there were made otherwise, or the folder holds something else.
        LockedError: Another process evaluates into the same folder.
        ResourceError: The disk is full.
    """
    if not models and not answers:
        raise UserError(f"there is nobody to evaluate: give {param('checkpoint_dir')}, {param('answers')} or both")
    _check_own(out_dir)
    for model in models:
        if any(task.prompt == "chat" for task in tasks):
            model.opened.check_style(system)
    files = [path.with_suffix("") for path in answers]
    files = files if len({*files}) == len(files) else list(answers)
    names = short_names([*files, *(model.folder for model in models)])
    given = [
        answered_rows(name, path, read_answers(path), tasks[0]) for name, path in zip(names, answers, strict=False)
    ]
    models = [Model(name, model.opened) for name, model in zip(names[len(answers) :], models, strict=True)]
    with claim(out_dir), full_disk_explained(out_dir, out_dir):
        made = evaluate_models(models, tasks, sampling, out_dir, system=system, anew=anew) if models else []
        rows = [*given, *made]
        details: dict[str, Any] = {"sampling": described(sampling)} if models else {}
        if judge is not None:
            details["judge"] = judge.compare(rows, tasks, out_dir)
        results = summarise(out_dir.resolve().name, rows, tasks, details)
        replace_file(out_dir / RESULTS_JSON, encode_json(results))
        replace_file(out_dir / REPORT_HTML, render_page(results, rows, tasks, read_timing(out_dir)).encode())
    for note in results["notes"]:
        stderr().print(note)
    stderr().print(f"{out_dir / REPORT_HTML} shows all of it, row by row")
    return Evaluation(results, rows, list(tasks))


def _check_own(folder: Path) -> None:
    """Raise UserError if a folder holds anything, but no evaluation."""
    if folder.exists() and not folder.is_dir():
        raise UserError(
            "is a file, expected a folder of an evaluation or nothing there", parameter="out_dir", value=folder
        )
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    if names and "rows" not in names and not {RESULTS_JSON, REPORT_HTML} <= names:
        raise UserError(
            f"holds {min(names)}, but no evaluation: name a folder that is empty or not there yet",
            parameter="out_dir",
            value=folder,
        )
