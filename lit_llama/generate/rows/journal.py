"""The folder of a run: rows and rejections, a line each as they are decided, so that a killed run goes on."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from lit_llama.errors import IntegrityError, UserError
from lit_llama.folder.lock import claim
from lit_llama.folder.place import full_disk_explained
from lit_llama.folder.publish import check_kind, encode_json, replace_file
from lit_llama.generate.rows.attempt import Attempt
from lit_llama.generate.rows.recipe import Recipe
from lit_llama.generate.rows.teacher import Key, Reply
from lit_llama.objects import as_object, read_object
from lit_llama.progress import stderr

ROWS_FILE, REJECTED_FILE, STATE_FILE = "rows.jsonl", "rejected.jsonl", "state.json"
_ANSWERS_FILE = ".answers.jsonl"
_SYNC_SECONDS = 2.0
VERSION = 1
Line = dict[str, Any]


class Journal:
    """Journal of what becomes of attempts, in their order.

    A line is written at once, and reaches the disk within seconds. What a killed process left of a line is dropped
    when its folder is opened again, and what a power cut took is made again.

    Args:
        folder: Where the lines are.
        files: Open files of rows, rejections and answers.
        kept: Accepted rows that are there, with what of their metadata a run needs to go on.
        rejected: Rejections that are there, without what they came from.
        answers: Of the teacher, to attempts that are not decided.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, IO[bytes]],
        kept: list[dict[str, Any]],
        rejected: list[dict[str, Any]],
        answers: dict[Key, Reply],
    ) -> None:
        self.folder, self.kept, self.rejected, self.answers = folder, kept, rejected, answers
        self._files, self._synced = files, time.monotonic()

    def keep(self, line: dict[str, Any]) -> None:
        """Add an accepted row."""
        self._write(ROWS_FILE, line)

    def reject(self, line: dict[str, Any]) -> None:
        """Add a rejection."""
        self._write(REJECTED_FILE, line)

    def answer(self, key: Key, reply: Reply) -> None:
        """Add an answer of the teacher, so that it is not asked again."""
        self._write(_ANSWERS_FILE, {"attempt": key[0], "column": key[1], "reply": asdict(reply)})

    def _write(self, name: str, line: dict[str, Any]) -> None:
        path = self.folder / name
        with full_disk_explained(path, path):
            data = _line(line)
            while data:  # a file without a buffer may take a part
                data = data[self._files[name].write(data) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        """Wait until all is on the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Forget the answers to what no run needs any more."""
        self.sync()
        (self.folder / _ANSWERS_FILE).unlink(missing_ok=True)


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def open_journal(folder: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """Hold a folder and open its files, of which another run may have written a part.

    Args:
        folder: Made if it is not there.
        identity: What decides about rows; it has to be that of the run before.

    Raises:
        LockedError: Another process is at work there.
        UserError: It holds rows of something else.
        IntegrityError: Its state.json is damaged.
    """
    with claim(folder), contextlib.ExitStack() as stack:
        state = folder / STATE_FILE
        if state.exists():
            _check_same(folder, identity)
        else:
            check_kind(folder)
            if foreign := [name for name in (ROWS_FILE, REJECTED_FILE) if (folder / name).exists()]:
                raise UserError(
                    f"{folder} holds {foreign[0]} and no {STATE_FILE}: it is of something else, name another"
                )
            replace_file(state, encode_json(dict(identity)))
        kept, rejected = _whole(folder / ROWS_FILE, _of_kept), _whole(folder / REJECTED_FILE, _of_rejected)
        answers = _whole(folder / _ANSWERS_FILE, _of_answer, ordered=False)
        kept, rejected = _contiguous(folder, kept, rejected)
        decided = len(kept) + len(rejected)
        waiting = [line for line in answers if line["attempt"] >= decided]
        replace_file(folder / _ANSWERS_FILE, b"".join(map(_line, waiting)))
        files = {
            name: stack.enter_context((folder / name).open("ab", buffering=0))
            for name in (ROWS_FILE, REJECTED_FILE, _ANSWERS_FILE)
        }
        known = {(line["attempt"], line["column"]): Reply(**line["reply"]) for line in waiting}
        journal = Journal(folder, files, kept, rejected, known)
        try:
            yield journal
        finally:
            with contextlib.suppress(OSError):
                journal.sync()


def _check_same(folder: Path, identity: Mapping[str, Any]) -> None:
    before = read_object(folder / STATE_FILE, IntegrityError, "it is damaged: name another folder")
    for key, value in identity.items():
        if before.get(key) != value:
            what, there = key.replace("_", " "), f"{_short(before.get(key))}, now {_short(value)}"
            raise UserError(
                f"{folder} holds rows of another {what} ({there}): name another folder, or what they were begun with"
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _whole(
    path: Path, needed: Callable[[dict[str, Any]], dict[str, Any]], *, ordered: bool = True
) -> list[dict[str, Any]]:
    """What is needed of the lines of a file; the beginning of one at its end goes.

    A file with a damaged line is set aside, and goes on with the lines before it: what stood behind them is made again.
    """
    if not path.exists():
        return []
    found, number, whole = list[dict[str, Any]](), 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                found.append(needed(as_object(line)))
                if ordered and len(found) > 1 and _number(found[-2]) >= _number(found[-1]):
                    last = _number(found.pop())
                    raise ValueError(f"attempt {last} stands behind {_number(found[-1])}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                _set_aside(path, f"line {number} is none of a run: {error}", path.read_bytes()[: whole - len(line)])
                return found
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return found


def _set_aside(path: Path, problem: str, whole: bytes = b"") -> None:
    """Keep a damaged file under another name, with what of it is whole in its place, and say so."""
    damaged = path.with_name(f"{path.name}.damaged")
    replace_file(damaged, path.read_bytes())
    replace_file(path, whole)
    stderr().print(f"{path} is damaged ({problem}): set aside as {damaged.name}, what is missing is made again")


def _of_kept(line: dict[str, Any]) -> dict[str, Any]:
    meta = line["metadata"]
    _check_counts(meta)
    if not isinstance(meta["columns"], dict):
        raise ValueError("columns is no object")
    return {**line, "metadata": {name: meta[name] for name in ("attempt", "tokens", "prompt_tokens", "columns")}}


def _of_rejected(line: dict[str, Any]) -> dict[str, Any]:
    _check_counts(line)
    if not isinstance(line["filter"], str):
        raise ValueError("filter is no text")
    return {name: line[name] for name in ("attempt", "filter", "tokens", "prompt_tokens")}


def _of_answer(line: dict[str, Any]) -> dict[str, Any]:
    Reply(**line["reply"])
    if type(line["attempt"]) is not int or not isinstance(line["column"], str):
        raise ValueError("it does not say which attempt and column it is for")
    return line


def _check_counts(line: Mapping[str, Any]) -> None:
    for name in ("attempt", "tokens", "prompt_tokens"):
        if type(line[name]) is not int or not 0 <= line[name] < 2**63:
            raise ValueError(f"{name} is {line[name]!r:.40}, expected 0 or more")


def _number(line: dict[str, Any]) -> int:
    number: int = line.get("metadata", line)["attempt"]
    return number


def _contiguous(
    folder: Path, kept: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines up to the first attempt that neither file has, as after a power cut; the others go."""
    numbers = {_number(line) for line in (*kept, *rejected)}
    decided = next(number for number in range(len(numbers) + 1) if number not in numbers)
    found = []
    for name, lines in ((ROWS_FILE, kept), (REJECTED_FILE, rejected)):
        found.append([line for line in lines if _number(line) < decided])
        if len(found[-1]) < len(lines):
            whole = (folder / name).read_bytes().splitlines(keepends=True)
            replace_file(folder / name, b"".join(line for line in whole if _number(json.loads(line)) < decided))
    return found[0], found[1]


def kept_line(attempt: Attempt, recipe: Recipe, teacher: str, identity: str) -> dict[str, Any]:
    """Return an accepted row, with where it comes from."""
    assert attempt.row is not None
    return {**attempt.row, "metadata": _provenance(attempt, recipe, teacher, identity)}


def rejected_line(attempt: Attempt, recipe: Recipe, teacher: str, identity: str) -> dict[str, Any]:
    """Return a rejection: by which filter and why, and all that it came from."""
    assert attempt.rejected is not None
    name, why = attempt.rejected
    beside = {"prompts": attempt.prompts, "answers": attempt.texts}
    provenance = _provenance(attempt, recipe, teacher, identity)
    return {"attempt": attempt.number, "filter": name, "reason": why, "row": attempt.row, **beside, **provenance}


def _provenance(attempt: Attempt, recipe: Recipe, teacher: str, identity: str) -> dict[str, Any]:
    names = [column.name for column in recipe.columns if column.name in attempt.values]
    asked = {column.name: column.sampling for column in recipe.columns if column.name in attempt.seeds}
    return {
        "attempt": attempt.number,
        "recipe": recipe.name,
        "recipe_sha256": recipe.digest,
        "model": teacher,
        "model_fingerprint": identity,
        "sources": attempt.lineage,
        "columns": {name: attempt.values[name] for name in names},
        "sampling": {name: {"seed": attempt.seeds[name], **_drawn(sampling)} for name, sampling in asked.items()},
        "tokens": attempt.tokens,
        "prompt_tokens": attempt.prompt_tokens,
    }


def _drawn(sampling: Any) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "n")
    return {name: getattr(sampling, name) for name in names}
