"""Conversations as files: training rows out of them, and conversations out of files."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.folder.place import check_output
from lit_llama.folder.publish import write_json_lines
from lit_llama.generate.chat.dialogue import ROOT, Dialogue, Node, Record
from lit_llama.generate.chat.lines import encode, parse, read, split
from lit_llama.generate.chat.session import message


def row(path: Iterable[Node]) -> dict[str, Any] | None:
    """Return a branch as a training row, in which answers that are not to be learned say so; None if there is none to
    learn.

    It ends with the last answer that is learned, and before the first one without words, which no row can hold.
    """
    messages: list[dict[str, Any]] = []
    end = 0
    for node in path:
        if not node.content.strip() and node.role != "system":
            break
        messages.append(node.message() | ({"train": False} if node.role == "assistant" and not node.trained else {}))
        end = len(messages) if node.trained else end
    return {"messages": messages[:end]} if end else None


def export(path: Path, dialogues: Iterable[Dialogue]) -> int:
    """Add the branches in use to a file of training rows; gives how many rows that were.

    Raises:
        UserError: The file holds something else, or there is nothing to learn.
        ResourceError: The disk is full; the file is as it was.
    """
    check_output(path)
    rows = [found for dialogue in dialogues if (found := row(dialogue.path())) is not None]
    if not rows:
        raise UserError("no answer is to be learned: those that were stopped or cut off are not, unless marked so")
    write_json_lines(path, [*_rows_there(path), *rows])
    return len(rows)


def _rows_there(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    for number, line in enumerate(split(path.read_bytes()), 1):
        try:
            found = parse(line)
        except ValueError as error:
            raise UserError(f"{path}:line {number} {error}, so it holds no training rows; name another file") from error
        if "messages" not in found:
            raise UserError(f"{path}:line {number} has no messages, so it holds no training rows; name another file")
        yield found


def save(path: Path, dialogue: Dialogue) -> None:
    """Write a conversation with all its branches into a file.

    Raises:
        UserError: There is something already, or nothing can be written there.
        ResourceError: The disk is full.
    """
    check_output(path)
    if path.exists():
        raise UserError(f"{path} is there already; name another file")
    write_json_lines(path, dialogue.records())


def load(path: Path) -> list[tuple[str, list[Record]]]:
    """Load the conversations of a file that `save` wrote, or of rows of messages: their names and records.

    Raises:
        DataError: It holds something else; the message names the line and the field.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return loaded(data, str(path), path.stem)


def loaded(data: bytes, where: str, stem: str) -> list[tuple[str, list[Record]]]:
    """Load the conversations of the bytes of a file, as `load` does.

    Args:
        data: All of them.
        where: The file, for messages.
        stem: Name of conversations that have none.
    """
    try:
        first = parse(data.partition(b"\n")[0])
    except ValueError:
        return _of_json(data, where, stem)
    if first.get("type") == "dialogue":
        try:
            reading = read(data, "", stem, 0.0)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if reading.lost:
            number, _, why = reading.lost[0]
            raise DataError(f"{where}:line {number} {why}")
        return [(reading.dialogue.name, list(reading.dialogue.records()))]
    found = []
    for number, line in enumerate(split(data), 1):
        if line.strip():
            try:
                found.append((stem, _records(parse(line))))
            except ValueError as error:
                raise DataError(f"{where}:line {number} {error}") from error
    return found


def _of_json(data: bytes, where: str, stem: str) -> list[tuple[str, list[Record]]]:
    """Rows of a JSON file over several lines: one, or a list of them."""
    try:
        whole = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} holds neither a saved conversation nor rows with messages: {str(error)[:200]}"
        ) from error
    found = []
    for number, value in enumerate(whole if isinstance(whole, list) else [whole]):
        try:
            found.append((stem, _records(value)))
        except ValueError as error:
            raise DataError(f"{where}:row {number} {error}") from error
    return found


def _records(value: Any) -> list[Record]:
    """Records of a row of messages."""
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("has no messages, expected a list of objects with role and content")
    dialogue, records = Dialogue(""), list[Record]()
    for index, said in enumerate(messages):
        at = f"messages[{index}]"
        if not isinstance(said, dict):
            raise ValueError(f"{at} is no object")
        if unknown := sorted(set(said) - {"role", "content", "train"}):
            raise ValueError(f"{at}: field {unknown[0]!r} has no place in a conversation here")
        content = said.get("content")
        if not isinstance(content, str):
            raise ValueError(f"{at}: content is {content!r:.40}, expected text")
        parent = dialogue.heads[0]
        made: list[Record] = [message(index + 1, parent, str(said.get("role")), content, 0.0)]
        if said.get("role") == "assistant":
            made.append({"type": "end", "id": index + 1, "finish_reason": "stop"})
            if "train" in said:
                made.append({"type": "train", "id": index + 1, "train": said["train"]})
        for record in made:
            try:
                dialogue.apply(record)
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from error
        records += made
    return records


def text_of(dialogue: Dialogue) -> bytes:
    """Return a conversation with all its branches, as `save` writes it."""
    return b"".join(map(encode, dialogue.records()))


def branches(dialogue: Dialogue) -> list[int]:
    """Return the last messages of the branches, the newest last; none of a conversation without messages."""
    return [leaf for leaf in dialogue.leaves() if leaf != ROOT]
