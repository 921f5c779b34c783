"""Run of an evaluation: every row answered and scored once, kept as it comes, and a report of all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from lit_llama.errors import DataError, NumericalError, UserError
from lit_llama.folder.publish import encode_json, replace_file
from lit_llama.generate.answer import answer_requests, question_ids, raw_ids
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.evaluate.likelihood import Likelihood, Text, chat_texts, likelihoods, raw_texts
from lit_llama.generate.evaluate.tasks import Part, Task
from lit_llama.generate.llm import LLM
from lit_llama.generate.metrics import Answer
from lit_llama.generate.models import Model, identity, loaded
from lit_llama.generate.store import Key, Row, RowStore, described, open_rows
from lit_llama.objects import as_object, read_text
from lit_llama.progress import bar, stderr
from lit_llama.text.message import Conversation

ROWS, TIMING_FILE = "rows", "timing.json"
FORMAT = 1
_KEY = ("task", "part", "row")
_DIGITS = 6  # of log-likelihoods


@dataclass(frozen=True)
class Rows:
    """Answers and scores of a model to all tasks.

    Attributes:
        name: Of the model.
        path: Where it came from.
        rows: By (task, part, row).
        parts: What it can be asked for; answers that lie in a file have no likelihoods.
        tokenizer: Fingerprint of its tokenizer, "" where it is not known.
    """

    name: str
    path: Path
    rows: Mapping[Key, Row]
    parts: frozenset[Part] = frozenset({"answer", "likelihood", "choices"})
    tokenizer: str = ""

    def get(self, task: str, part: Part, row: int) -> Row | None:
        """Return a row, if the model made it."""
        return self.rows.get((task, part, row))


def evaluate_models(
    models: Sequence[Model],
    tasks: Sequence[Task],
    sampling: Sampling,
    out_dir: Path,
    *,
    system: str = "",
    anew: bool = False,
) -> list[Rows]:
    """Ask every model for every row that is not there yet.

    Rows are kept in `out_dir`, which the caller has locked; they are the same whenever a process was killed between,
    as far as the engine is exact.

    Args:
        models: Whom.
        tasks: What.
        sampling: How answers are drawn.
        out_dir: Where rows are kept.
        system: System message of prompts that have none.
        anew: Begin again where rows were made otherwise.

    Raises:
        UserError: Rows that are there were made otherwise; or a row cannot be asked.
        NumericalError: The weights of a model are damaged.
    """
    order = [(task.name, part, row) for task in tasks for part in task.parts for row in range(len(task.items))]
    (out_dir / ROWS).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stores: dict[str, RowStore] = {}
        for number, model in enumerate(models):
            path = out_dir / ROWS / f"{_file_name(model.name, number)}.jsonl"
            header = _header(model, tasks, sampling, system)
            stores[model.name] = stack.enter_context(open_rows(path, header, _KEY, anew=anew))
        pending = [model for model in models if any(key not in stores[model.name].rows for key in order)]
        for model in models:
            if there := sum(key in stores[model.name].rows for key in order):
                stderr().print(f"{model.name}: {there} of {len(order)} rows are there already")
        for model, llm in loaded(pending):
            for task in tasks:
                _ask(model, llm, task, sampling, stores[model.name], system, out_dir)
        for store in stores.values():
            store.sort(order)
        return [
            Rows(
                model.name, model.folder, dict(stores[model.name].rows), tokenizer=model.opened.tokenizer.fingerprint()
            )
            for model in models
        ]


def _file_name(name: str, number: int) -> str:
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")
    return f"{number:02}-{kept[-80:]}"


def _header(model: Model, tasks: Sequence[Task], sampling: Sampling, system: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": identity(model.opened),
        "sampling": described(sampling),
        "system": system,
        "tasks": {task.name: task.fingerprint() for task in tasks},
    }


def _ask(model: Model, llm: LLM, task: Task, sampling: Sampling, store: RowStore, system: str, out_dir: Path) -> None:
    """Ask a model for what is missing of a task."""
    own = replace(sampling, max_new_tokens=task.max_new_tokens or sampling.max_new_tokens)
    own = replace(own, stop=(*sampling.stop, *task.stop), min_new_tokens=min(own.min_new_tokens, own.max_new_tokens))
    for part in task.parts:
        if not (missing := [row for row in range(len(task.items)) if (task.name, part, row) not in store.rows]):
            continue
        start, told = time.perf_counter(), f"{part} of {task.name}"
        with bar(stderr(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            keep = _keeper(
                store, task.name, part, progress, progress.add_task(f"{model.name}: {told}", total=len(missing))
            )
            try:
                made = _PARTS[part](llm, task, missing, own, task.system or system, keep)
            except NumericalError as error:
                raise NumericalError(f"{model.folder}: {error}") from error
            except DataError as error:
                raise DataError(f"task {task.name} with {model.folder}: {error}") from error
        seconds = time.perf_counter() - start
        note_time(out_dir, model.name, part, made, seconds)
        speed = f"{made} tokens in {seconds:.1f} s, {made / max(seconds, 1e-9):.1f} tokens/s"
        stderr().print(f"{model.name}: {told}, {len(missing)} rows; {speed}")


def _keeper(store: RowStore, task: str, part: Part, progress: Progress, watched: TaskID) -> "Keep":
    def keep(row: int, found: Row) -> None:
        store.add({"task": task, "part": part, "row": row, **found})
        progress.advance(watched)

    return keep


Keep = Callable[[int, Row], object]


def _answers(llm: LLM, task: Task, missing: Sequence[int], sampling: Sampling, system: str, keep: Keep) -> int:
    """Answer rows; gives the number of tokens made."""
    asked = llm if task.prompt == "chat" else replace(llm, opening="")
    requests = [_request(asked, task, row, sampling, system) for row in missing]
    # Prompts of similar length next to each other: those that begin alike are found, and fewer wait for others.
    requests.sort(key=lambda request: (len(request.ids), request.number))

    def take(number: int, answers: list[Answer]) -> None:
        answer = answers[0]
        if answer.error is not None:
            raise answer.error
        row = {"answer": answer.text, "stopped": answer.stopped, "tokens": answer.tokens}
        keep(requests[number].number, row)

    made = answer_requests(asked, requests, take)
    return sum(answers[0].tokens for answers in made)


def _request(llm: LLM, task: Task, row: int, sampling: Sampling, system: str) -> Request:
    example = task.items[row].question
    try:
        if task.prompt == "chat":
            ids = question_ids(llm, example, system)
        else:
            ids = raw_ids(llm, raw_prompt(example), False)
        request = llm.request(ids, sampling, number=row)
        llm.engine.check_request(request)
    except UserError as error:
        raise _of_row(error, example) from error
    return request


def raw_prompt(question: Conversation) -> str:
    """Return the text of a row that no style is put around.

    Raises:
        DataError: It is a chat.
    """
    if question.instruction is None:
        raise DataError("it is a chat, which `prompt: raw` has no words for; expected prompt: chat")
    return question.asked


def _of_row(error: UserError, question: Conversation) -> UserError:
    kind = DataError if type(error) is UserError else type(error)
    text = str(error)
    return kind(text if text.startswith(f"row {question.row}:") else f"row {question.row}: {text}")


def _references(llm: LLM, task: Task, missing: Sequence[int], sampling: Sampling, system: str, keep: Keep) -> int:
    texts = [_texts(llm, task, row, [task.items[row].question.response], system)[0] for row in missing]

    def take(number: int, found: Likelihood) -> None:
        row = {"text": round(found.text, _DIGITS), "ends": round(found.ends, _DIGITS)}
        keep(missing[number], row | {"tokens": found.tokens, "bytes": found.bytes, "greedy": found.greedy})

    likelihoods(llm, texts, take)
    return sum(len(text.ids) for text in texts)


def _choices(llm: LLM, task: Task, missing: Sequence[int], sampling: Sampling, system: str, keep: Keep) -> int:
    texts = [_texts(llm, task, row, task.items[row].choices, system) for row in missing]
    places = [(number, index) for number, own in enumerate(texts) for index in range(len(own))]
    sums: dict[int, dict[int, float]] = {}

    def take(place: int, found: Likelihood) -> None:
        number, index = places[place]
        own = sums.setdefault(number, {})
        own[index] = round(found.text, _DIGITS)
        if len(own) == len(texts[number]):
            row = [own[index] for index in range(len(own))]
            keep(missing[number], {"texts": row, "bytes": [text.bytes for text in texts[number]]})

    likelihoods(llm, [text for own in texts for text in own], take)
    return sum(len(text.ids) for own in texts for text in own)


def _texts(llm: LLM, task: Task, row: int, answers: Sequence[str], system: str) -> list[Text]:
    """Answers to a row behind its prompt."""
    example = task.items[row].question
    try:
        if task.prompt == "chat":
            texts = chat_texts(llm, example, answers, system)
        else:
            texts = raw_texts(llm, raw_prompt(example), answers)
        for text in texts:
            llm.engine.check_request(text.request())
    except UserError as error:
        raise _of_row(error, example) from error
    return texts


_PARTS: Mapping[Part, Callable[[LLM, Task, Sequence[int], Sampling, str, Keep], int]] = {
    "answer": _answers,
    "likelihood": _references,
    "choices": _choices,
}


def note_time(out_dir: Path, name: str, part: Part, tokens: int, seconds: float) -> None:
    """Add to what is known of a model's speed, which is apart from the rows as it never is the same twice."""
    known = read_timing(out_dir)
    own = known.setdefault(name, {}).setdefault(part, {"tokens": 0, "seconds": 0.0})
    own["tokens"] += tokens
    own["seconds"] = round(own["seconds"] + seconds, 3)
    replace_file(out_dir / TIMING_FILE, encode_json(known))


def read_timing(out_dir: Path) -> dict[str, Any]:
    """Read the tokens and seconds by model and part; nothing where nothing usable is noted."""
    try:
        return as_object(read_text(out_dir / TIMING_FILE))
    except (OSError, ValueError):
        return {}
