"""Lines of a file -> a dialogue, as far as they can be read; what cannot be read is named."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lit_llama.errors import DataError
from lit_llama.generate.chat.dialogue import FORMAT, Dialogue, Record, fitting_parent

_TOO_DEEP = "is nested too deeply"


@dataclass
class Reading:
    """Records and faults that were found in a file.

    Attributes:
        dialogue: The sum of the records that fit.
        lost: Number of each line that cannot be read, its bytes, and why.
        moved: Messages whose own parent was lost.
        unended: The last line has no end, so that nothing may be written behind it.
    """

    dialogue: Dialogue
    lost: list[tuple[int, bytes, str]] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    unended: bool = False

    @property
    def damaged(self) -> bool:
        """Whether the file has to be written anew."""
        return bool(self.lost or self.moved or self.unended)

    def add(self, number: int, line: bytes) -> None:
        """Go on by a line."""
        try:
            record = parse(line)
            try:
                self.dialogue.apply(record)
            except ValueError:
                if not self._moves(record):
                    raise
        except ValueError as error:
            self.lost.append((number, line, str(error)))

    def _moves(self, record: Record) -> bool:
        """Whether a message fits behind another one, as its parent is lost."""
        parent = record.get("parent")
        if record.get("type") != "message" or parent in self.dialogue.nodes or not self.lost:
            return False
        self.dialogue.apply({**record, "parent": fitting_parent(self.dialogue, record)})
        self.moved.append(record["id"])
        return True


def parse(line: bytes) -> Record:
    """Parse a line into a record.

    Raises:
        ValueError: It is none.
    """
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    return record


def _no_number(name: str) -> Any:
    raise ValueError(f"holds {name}, which is no number of JSON")


def encode(record: Record) -> bytes:
    """Encode a record as a line; lone surrogates are written as escapes, which UTF-8 has no bytes for."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record, allow_nan=False) + "\n").encode()


def split(data: bytes) -> Iterator[bytes]:
    """Yield the lines without their ends; the last one may lack it."""
    lines = data.split(b"\n")
    yield from lines if lines[-1] else lines[:-1]


def read(data: bytes, id: str, name: str, time: float) -> Reading:
    """Read a dialogue out of the bytes of its file.

    Args:
        data: All of them.
        id: Of the dialogue.
        name: Where its first line is lost.
        time: Where its first line is lost.

    Raises:
        DataError: Another version of this program wrote it, or another program: nothing of it is to be touched.
    """
    reading = Reading(Dialogue(id, name, time))
    for number, line in enumerate(split(data), 1):
        if number == 1:
            _refuse_other_format(line)
        reading.add(number, line)
    if reading.lost and reading.lost[0][0] == 1 and not reading.dialogue.nodes:
        raise DataError(f"holds no conversation (line 1 {reading.lost[0][2]}) and is left alone; move it elsewhere")
    reading.unended = bool(data) and not data.endswith(b"\n")
    return reading


def _refuse_other_format(line: bytes) -> None:
    try:
        record = parse(line)
    except ValueError:
        return
    number = record.get("format")
    if record.get("type") == "dialogue" and number is not None and (type(number) is not int or number != FORMAT):
        raise DataError(
            f"it has format {number!r:.40}, and this program reads {FORMAT}: another version of it wrote the file"
        )
