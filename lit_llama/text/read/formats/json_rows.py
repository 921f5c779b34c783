"""JSON of any size, row by row: an array of objects, one object a line, or objects one after another.

A row that is a list of messages is a conversation.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.text.read.formats.paths import Remark
from lit_llama.text.read.raw import LENIENT, LONGEST, STRICT, RawRow, explain, holds_messages
from lit_llama.text.read.schemas.recognition import FIELDS

Row = dict[str, Any]


def rows_of_table(value: Mapping[str, Any]) -> list[Row] | None:
    """Return the rows of an object that is a table, None of one that is a row.

    Known are a list for each column (`Dataset.to_dict`, `to_dict("list")`), and of `DataFrame.to_json` the forms
    "columns" (its default), "index", "split" and "table".
    """
    data: Any = value.get("data")
    if value.keys() == {"schema", "data"} and _all(data, dict):
        return list(data)
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"} and _all(data, list):
        names = value["columns"]
        if _all(names, str) and all(len(record) == len(names) for record in data):
            return [dict(zip(names, record, strict=True)) for record in data]
        return None
    columns = list(value.values())
    if _all(columns, list):
        return _of_lists(value)
    if _all(columns, dict) and all(columns):
        return _of_objects(value, columns)
    return None


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(entry, kind) for entry in values)


def _of_lists(columns: Mapping[str, list[Any]]) -> list[Row] | None:
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or lengths == {0}:
        return None
    if any(
        isinstance(entry, dict) and {"role", "from"} & entry.keys() for column in columns.values() for entry in column
    ):
        return None  # lists of messages: one conversation
    if not any(all(isinstance(entry, str | list | None) for entry in column) for column in columns.values()):
        return None
    return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]


def _of_objects(value: Mapping[str, Row], inner: Sequence[Row]) -> list[Row] | None:
    if any(isinstance(entry.get(name), list) for entry in inner for name in ("role", "from")):
        return None  # the messages of one conversation, as a struct of lists
    names = inner[0].keys()
    same, outer = all(entry.keys() == names for entry in inner), value.keys()
    if same and _numbers(names) and not _numbers(outer):
        by_column = True
    elif _numbers(outer) and not _numbers(names):
        by_column = False
    elif same and len(names) > 1 and not outer.isdisjoint(FIELDS) and names.isdisjoint(FIELDS):
        by_column = True
    elif outer.isdisjoint(FIELDS) and (not names.isdisjoint(FIELDS) or (same and len(names) > 1 and len(outer) > 1)):
        by_column = False
    else:
        return None
    return [{name: value[name][index] for name in outer} for index in names] if by_column else list(inner)


def _numbers(names: Any) -> bool:
    return all(name.isdecimal() for name in names)


_SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # a byte order mark stands within where files were joined
_PYTHON = re.compile(r"[{,]\s*'|:\s*(?:None|True|False)\b")
_ENDLESS = "Unterminated string"
_CUT = 16  # an error this near to the end of the window may come from the end: \\uD83D\\uDE00 and -Infinity are shorter


class _Window:
    """The part of a file that is looked at: rows leave it at the front, blocks of text are added at the back.

    Args:
        blocks: The text of the file.
        path: Of the file, for messages.
    """

    def __init__(self, blocks: Iterator[str], path: Path) -> None:
        self.path = path
        self.text = ""
        self.start = 0  # of what is not read yet
        self._blocks = blocks
        self._line, self._column, self._byte = 1, 1, 0  # where the window begins in the file

    def more(self) -> bool:
        """Let go what has been read, and at least double the rest; False at the end of the file."""
        kept = self.text[self.start :]
        parts, size = [kept], 0
        while size <= len(kept) and (block := next(self._blocks, "")):
            parts.append(block)
            size += len(block)
        if not size:
            return False
        self._line, self._column, self._byte = self.place(self.start)
        self.text, self.start = "".join(parts), 0
        return True

    def place(self, position: int) -> tuple[int, int, int]:
        """Line, column (both from 1) and byte (from 0) of a position of the window."""
        passed = self.text[:position]
        lines = passed.count("\n")
        column = len(passed) - passed.rfind("\n") if lines else self._column + len(passed)
        return self._line + lines, column, self._byte + len(passed.encode())

    def peek(self) -> str:
        """The next character that is no space, which the window then begins with; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.start)
            assert match
            self.start = match.end()
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.more():
                return ""

    def line(self) -> str | None:
        """The next line without its end, None at the end of the file."""
        while (end := self.text.find("\n", self.start)) < 0:
            if len(self.text) - self.start > LONGEST:
                raise self.too_long()
            if not self.more():
                end = len(self.text)
                if self.start >= end:
                    return None
                break
        line = self.text[self.start : end]
        self.start = end + 1
        return line

    def value(self, what: str) -> Any:
        """The next JSON value.

        Raises:
            RefusedError: It is one that is not accepted; the window stands behind it.
            DataError: There is no way to tell where it ends.
        """
        while True:
            try:
                value, end = self._value()
            except json.JSONDecodeError as error:
                endless = error.msg.startswith(_ENDLESS)
                cut = endless or error.pos >= len(self.text) - _CUT
                if cut and len(self.text) - self.start > LONGEST:
                    raise self.too_long() from error
                if cut and self.more():
                    continue
                raise self.fault(
                    what, error.msg, error.pos, cut=endless or error.pos >= len(self.text.rstrip())
                ) from error
            except RecursionError as error:
                line, column, byte = self.place(self.start)
                place = f"line {line}, column {column}, byte {byte}"
                raise DataError(f"{self.path}:{what}, which begins at {place}, is nested too deep") from error
            if end == len(self.text) and self.more():  # a number may go on
                continue
            self.start = end
            if isinstance(value, Exception):
                raise RefusedError(explain(value)) from value  # type: ignore[arg-type]
            return value

    def _value(self) -> tuple[Any, int]:
        try:
            return STRICT.raw_decode(self.text, self.start)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            return error, LENIENT.raw_decode(self.text, self.start)[1]

    def fault(self, what: str, problem: str, position: int, cut: bool = False) -> DataError:
        """The error for wrong syntax at a position of the window."""
        line, column, byte = self.place(position)
        near = self.text[max(0, position - 20) : position + 20].replace("\n", " ")
        hint = "; the file ends here: it is cut off, fetch it again" if cut else ""
        place = f"line {line}, column {column}, byte {byte}"
        problem = problem.removesuffix(" at")
        if _PYTHON.search(near):
            hint = "; this is how Python prints objects: write them with json.dumps"
        return DataError(f"{self.path}:{what} is not JSON: {problem} at {place}, near {near!r}{hint}")

    def too_long(self) -> DataError:
        line = self.place(self.start)[0]
        return DataError(
            f"{self.path}:line {line}: a row that begins here has more than {LONGEST:,} characters: a quote or a "
            "bracket is not closed, or all rows stand inside one object; expected an array of objects, or one a line"
        )


class RefusedError(ValueError):
    """A value that is JSON but not accepted; reading can go on behind it."""


def read_json(
    blocks: Iterator[str], path: Path, by_lines: bool = False, remark: Remark = lambda _: None
) -> Iterator[RawRow]:
    """Read the rows of a JSON file, whichever of the three forms it has; one object that holds a table comes to its
    rows.

    Args:
        blocks: Its text.
        path: Its name.
        by_lines: One row a line is expected, so that an error in one line leaves the others readable.
        remark: Takes what has to be said of it.

    Raises:
        DataError: From here on nothing can be read.
    """
    window = _Window(blocks, path)
    first = window.peek()
    if not first:
        raise DataError(f"{path} holds no rows")
    end = window.text.find("\n", window.start)
    line = window.text[window.start : end if end >= 0 else None].rstrip().removesuffix(",")
    if first == "[":
        return _lines(window, remark) if _is_conversation(line) else _array(window, remark)
    if _is_object(line) or (by_lines and line != "{"):
        return _rows(_lines(window, remark), path, remark)
    return _rows(_sequence(window, remark), path, remark)


def _rows(rows: Iterator[RawRow], path: Path, remark: Remark) -> Iterator[RawRow]:
    """The rows, or those of the table that a lone object is."""
    first = next(rows, None)
    if first is None:
        return
    try:
        second = next(rows, None)
    except DataError:
        yield first
        raise
    if second is None and first.value is not None and (found := rows_of_table(first.value)) is not None:
        remark(f"{path}: its one object is a table, and read as {len(found)} rows")
        for number, row in enumerate(found):
            yield RawRow.of(f"{path}:row {number}", row)
        return
    yield first
    if second is not None:
        yield second
        yield from rows


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and LENIENT.raw_decode(line)[1] == len(line)
    except (ValueError, RecursionError):
        return False


def _is_conversation(line: str) -> bool:
    """Whether a line is a whole list of messages."""
    try:
        value, end = LENIENT.raw_decode(line)
    except (ValueError, RecursionError):
        return False
    return end == len(line) and holds_messages(value)


def _row(window: _Window, number: int) -> RawRow:
    what = f"row {number}"
    where = f"{window.path}:{what}"
    try:
        return RawRow.of(where, window.value(what))
    except RefusedError as error:
        return RawRow.bad(where, str(error))


def _array(window: _Window, remark: Remark) -> Iterator[RawRow]:
    window.start += 1
    number = 0
    if window.peek() == "]":
        raise DataError(f"{window.path} holds no rows")
    while True:
        yield _row(window, number)
        mark = window.peek()
        window.start += 1
        if mark == "]":
            break
        if mark != ",":
            what = f"row {number}" if mark else f"the end of row {number}"
            raise window.fault(what, "expected , or ] behind it", window.start - 1, cut=not mark)
        if window.peek() == "]":
            remark(f"{window.path}: a comma stands behind the last row")
            window.start += 1
            break
        number += 1
    if window.peek():
        raise window.fault("the end", "more text behind the array", window.start)


def _sequence(window: _Window, remark: Remark) -> Iterator[RawRow]:
    number = 0
    while window.peek():
        yield _row(window, number)
        number += 1
        if window.peek() == ",":
            remark(f"{window.path}: commas stand between its rows, which are no array")
            window.start += 1


def _lines(window: _Window, remark: Remark) -> Iterator[RawRow]:
    number = window.place(window.start)[0]
    while (line := window.line()) is not None:
        if line.strip(" \t\r\ufeff"):
            yield from _line(window, line, number, remark)
        number += 1


def _line(window: _Window, line: str, number: int, remark: Remark) -> Iterator[RawRow]:
    """The row of a line, or several that follow each other there."""
    where, at = f"{window.path}:line {number}", _behind_space(line, 0)
    try:
        while at < len(line):
            value, end = STRICT.raw_decode(line, at)
            end = _behind_space(line, end)
            if line[end : end + 1] == ",":
                remark(f"{window.path}: commas stand behind its rows, which are no array")
                end = _behind_space(line, end + 1)
            if end < len(line) and line[end] != "{":
                raise json.JSONDecodeError("Extra data", line, end)
            yield RawRow.of(where, value)
            at = end
    except json.JSONDecodeError as error:
        position = window.start - 1 - len(line) + error.pos
        cut = window.start > len(window.text) and (error.msg.startswith(_ENDLESS) or error.pos >= len(line))
        yield RawRow(where, None, window.fault(f"line {number}", error.msg, position, cut), "not JSON")
    except (ValueError, RecursionError) as error:
        yield RawRow.bad(where, explain(error))


def _behind_space(line: str, at: int) -> int:
    match = _SPACE.match(line, at)
    assert match
    return match.end()
