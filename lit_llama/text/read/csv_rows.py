"""CSV and TSV, strictly: a row that does not fit its header is an error with its line, never a guess."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.text.read.raw import LONGEST, RawRow, listed, shown

_DELIMITERS = ",;\t|"
_LONG_NAME = 100  # characters; a longer "name" is a text
_EXPLAINED = {
    "unexpected end of data": "a quote that opens here is never closed",
    "field larger": "a quote that opens here is never closed, or a field is far too long",
    "new-line character": "a carriage return stands alone; expected lines that end in LF or CRLF",
}


def read_csv(blocks: Iterator[str], path: Path, delimiter: str | None = None) -> Iterator[RawRow]:
    """Rows of a file with a header, each as an object of texts; blank lines are none.

    Args:
        blocks: Its text.
        path: Its name.
        delimiter: What separates the fields; without one, the header or a line `sep=;` decides.

    Raises:
        DataError: There is no usable header, or quotes are wrong: nothing behind them can be read.
    """
    lines = _split(blocks, path)
    first, skipped = next(lines, ""), 0
    if first.lower().startswith("sep="):
        delimiter = first.strip()[4:] or "\t"
        first, skipped = next(lines, ""), 1
        if len(delimiter) != 1 or delimiter.isalnum() or delimiter in "\"'":
            raise DataError(f"{path}:line 1: sep={shown(delimiter)}, expected one character that separates fields")
    records = _records(_chained(first, lines), delimiter or _sniff(first), path, skipped)
    line, header = next(records, (1 + skipped, []))
    _check_header(header, f"{path}:line {line}")
    rows = 0
    for line, record in records:
        where = f"{path}:line {line}"
        rows += 1
        if len(record) == len(header):
            yield RawRow(where, dict(zip(header, record, strict=True)))
        else:
            hint = f" ({listed(header)}); put fields that hold the delimiter into quotes"
            yield RawRow.bad(where, f"found {len(record)} fields, expected {len(header)}", hint)
    if not rows:
        raise DataError(f"{path} holds no rows, only a header")


def _split(blocks: Iterator[str], path: Path) -> Iterator[str]:
    """Lines with their ends, cut at LF only."""
    rest: list[str] = []
    size = number = 0
    for block in blocks:
        first, *others = block.split("\n")
        rest.append(first)
        size += len(first)
        if size > LONGEST:
            raise DataError(f"{path}:line {number + 1} has more than {LONGEST:,} characters")
        if others:
            whole = ["".join(rest), *others[:-1]]
            rest, size = [others[-1]], len(others[-1])
            for line in whole:
                number += 1
                yield line + "\n"
    if last := "".join(rest):
        yield last


def _chained(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _sniff(header: str) -> str:
    """The delimiter that cuts the first line into most names."""

    def names(delimiter: str) -> int:
        try:
            return len(next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(_DELIMITERS, key=names)


def _records(lines: Iterator[str], delimiter: str, path: Path, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, with the line where each begins."""
    reader = csv.reader(_without_zeros(lines, path, skipped), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + skipped + 1
        try:
            record = _next(reader)
        except csv.Error as error:
            problem = next((text for words, text in _EXPLAINED.items() if str(error).startswith(words)), str(error))
            raise DataError(f"{path}:line {line}: {problem} (quotes inside a field are doubled)") from error
        if record is None:
            return
        if record:
            yield line, record


def _next(reader: Any) -> list[str] | None:
    """One record; the limit of a field's length belongs to the whole process, so it is put back."""
    before = csv.field_size_limit(LONGEST)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _without_zeros(lines: Iterator[str], path: Path, skipped: int) -> Iterator[str]:
    for number, line in enumerate(lines, 1 + skipped):
        if "\0" in line:
            raise DataError(f"{path}:line {number}: found a NUL character: the file is damaged or not CSV")
        yield line


def _check_header(header: list[str], where: str) -> None:
    for number, name in enumerate(header):
        if not name.strip() and number:  # the first one is empty where pandas has written its index
            problem = f"column {number + 1} has no name"
        elif name and header.count(name) > 1:
            problem = f"the column {shown(name)} stands there twice"
        elif len(name) > _LONG_NAME or "\n" in name or name.strip().isdecimal():
            problem = f"{shown(name)} is no name of a column"
        else:
            continue
        raise DataError(f"{where}: {problem}; expected a header, that is, a line with the name of each column")
    if not any(name.strip() for name in header):
        raise DataError(f"{where}: found no header, expected a line with the name of each column")
