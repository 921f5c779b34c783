"""Files of answers that were made before, by generate/instruct.py or by any other program, in place of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.generate.evaluate.run import Rows
from lit_llama.generate.evaluate.store import Key, Row
from lit_llama.generate.evaluate.tasks import METRICS, Item, Task, usual_metrics
from lit_llama.text.message import Conversation, instruct
from lit_llama.text.read.raw import RowError
from lit_llama.text.read.sources import question_of, read_rows


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
        raise DataError(f"{where} is one of several answers to a question, expected one a row (without --num_samples)")
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
