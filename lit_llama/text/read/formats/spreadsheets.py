"""CSV, TSV and workbooks: tables with a header, strictly.

A row that does not fit its header is an error with its line, never a guess. Of a workbook of Excel or LibreOffice, each
sheet is a table.
"""

import csv
import datetime
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.text.read.formats.files import UTF8, Dialect
from lit_llama.text.read.formats.paths import WORKBOOKS, Remark, check_file
from lit_llama.text.read.raw import LONGEST, RawRow, listed, shown
from lit_llama.wording import param

_LONG_NAME = 100  # characters; a longer "name" is a text
_INDEX = ("", "Unnamed: 0")  # what the first column is called where pandas has written its index


def rows_under(records: Iterator[tuple[int, list[Any]]], name: str, unit: str, remark: Remark) -> Iterator[RawRow]:
    """Yield the rows below a header, each as an object; blank ones are none.

    Last columns without a name are left out where they are empty, and so are the numbers of rows that pandas writes
    into the first column, and the header where it stands there again, as in files that were joined.

    Args:
        records: The header and all others, each with its number.
        name: Of the file.
        unit: What is numbered: line or row.
        remark: Takes what is left out.

    Raises:
        DataError: There is no usable header, or nothing below it.
    """
    first, header = next(records, (1, []))
    names = [word.strip() for word in _without_last(header)]
    _check(names, f"{name}:{unit} {first}")
    if len(names) < len(header):
        remark(f"{name}: the last column has no name and is left out where it is empty")
    begun = False
    for number, record in records:
        where, begun = f"{name}:{unit} {number}", True
        record[0] = record[0].lstrip("\ufeff") if isinstance(record[0], str) else record[0]
        if record == header:
            remark(f"{where}: the header stands here again and is left out")
            continue
        if len(record) > len(names) and not any(map(_holds, record[len(names) :])):
            if len(header) == len(names):
                remark(f"{name}: rows end in empty fields that the header does not name; they are left out")
            record = record[: len(names)]
        if len(record) == len(names):
            yield RawRow(where, _row(names, record, name, remark))
        elif len(record) == len(header):
            stray = next(filter(_holds, record[len(names) :]))
            yield RawRow.bad(where, "a field stands in a column without a name", f": {shown(stray)}; name the column")
        else:
            hint = f" ({listed(names)}); put fields that hold the delimiter into quotes"
            yield RawRow.bad(where, f"found {len(record)} fields, expected {len(names)}", hint)
    if not begun:
        raise DataError(f"{name} holds no rows, only a header")


def _row(names: Sequence[str], record: Sequence[Any], name: str, remark: Remark) -> dict[str, Any]:
    row = dict(zip(names, record, strict=True))
    if names[0] in _INDEX and len(names) > 1 and str(record[0]).isdecimal():
        remark(f"{name}: the first column holds the numbers of rows that pandas writes, and is left out")
        del row[names[0]]
    return row


def _holds(value: Any) -> bool:
    return value is not None and str(value).strip() != ""


def _without_last(header: Sequence[Any]) -> list[str]:
    """The names of a header, without empty ones at its end."""
    names = [str(name) for name in header]
    while names and not names[-1].strip():
        names.pop()
    return names


def _check(names: Sequence[str], where: str) -> None:
    if not names:
        raise DataError(f"{where}: found no header, expected a line with the name of each column")
    for number, name in enumerate(names):
        if not name and number:  # the first one is empty where pandas has written its index
            problem = f"column {number + 1} has no name"
        elif name and names.count(name) > 1:
            problem = f"the column {shown(name)} stands there twice"
        elif len(name) > _LONG_NAME or "\n" in name or name.isdecimal():
            problem = f"{shown(name)} is no name of a column"
        else:
            continue
        raise DataError(f"{where}: {problem}; expected a header, that is, a line with the name of each column")


_DELIMITERS = ",;\t|"
_UNCLOSED = "a quote that opens here is never closed"
_EXPLAINED = {
    "unexpected end of data": _UNCLOSED,
    "field larger": f"{_UNCLOSED}, or a field is far too long",
    "new-line character": "a carriage return stands alone; expected lines that end in LF or CRLF",
}


def read_csv(
    blocks: Iterator[str],
    path: Path,
    delimiter: str | None = None,
    dialect: Dialect = UTF8,
    remark: Remark = lambda _: None,
) -> Iterator[RawRow]:
    """Read the rows of a file with a header, each as an object of texts; blank lines are none.

    Args:
        blocks: Its text.
        path: Its name.
        delimiter: What separates the fields; without one, the header or a line `sep=;` decides.
        dialect: How quotes are written.
        remark: Takes what has to be said of it.

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
    records = _Records(_chained(first, lines), delimiter or _sniff(first), first, path, skipped, dialect, remark)
    yield from rows_under(iter(records), str(path), "line", remark)


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


class _Records:
    """Records that are not blank, with the line where each begins.

    Args:
        lines: Of the file.
        delimiter: Separates fields.
        header: The first line, which shows whether blanks follow the delimiters.
        path: Of the file.
        skipped: Lines before the first of `lines`.
        dialect: How quotes are written.
        remark: Takes what has to be said of them.
    """

    def __init__(
        self,
        lines: Iterator[str],
        delimiter: str,
        header: str,
        path: Path,
        skipped: int,
        dialect: Dialect,
        remark: Remark,
    ) -> None:
        self._path, self._skipped, self._dialect, self._remark = path, skipped, dialect, remark
        self._delimiter, self._line = delimiter, ""  # _line: the last one that was read
        self._lost = _escaping(dialect.escape, delimiter) if dialect.escape else None
        rest = header.rstrip("\r\n").split(delimiter)[1:]
        self._reader = csv.reader(
            self._watched(lines),
            delimiter=delimiter,
            strict=True,
            quoting=csv.QUOTE_NONE if dialect.quoting == "none" else csv.QUOTE_MINIMAL,
            escapechar=dialect.escape,
            skipinitialspace=delimiter != "\t" and bool(rest) and all(name.startswith(" ") for name in rest),
        )

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        while True:
            line = self._reader.line_num + self._skipped + 1
            try:
                record = _next(self._reader)
            except csv.Error as error:
                raise self._error(str(error), line) from error
            if record is None:
                return
            last = self._reader.line_num + self._skipped
            if self._delimiter == "\t" and last > line:
                self._remark(
                    f"{self._path}: quotes hold fields of several lines together, as in lines {line} to {last}; if "
                    f"they are part of the text, give {param('quoting', 'none')}"
                )
                self._delimiter = ""  # said once
            if record:
                yield line, record

    def _error(self, problem: str, line: int) -> DataError:
        known = next((text for words, text in _EXPLAINED.items() if problem.startswith(words)), "")
        if self._dialect.is_of_csv:
            hint = ""
        elif '\\"' in self._line:
            hint = (
                "; quotes inside a field are doubled: if a backslash stands before them, give "
                f"{param('escape', chr(92))}"
            )
        elif known and not known.startswith(_UNCLOSED):
            hint = ""
        else:
            hint = (
                f"; quotes inside a field are doubled: if quotes are part of the text, give {param('quoting', 'none')}"
            )
        return DataError(f"{self._path}:line {line}: {known or f'a quote ends inside of a field ({problem})'}{hint}")

    def _watched(self, lines: Iterator[str]) -> Iterator[str]:
        for number, line in enumerate(lines, 1 + self._skipped):
            if "\0" in line:
                raise DataError(f"{self._path}:line {number}: found a NUL character: the file is damaged or not CSV")
            if self._lost and (found := self._lost.search(line)):
                self._remark(
                    f"{self._path}:line {number}: {shown(found[1])} is read as {shown(found[1][1:])}, since "
                    f"{param('escape')} "
                    "holds before every character"
                )
                self._lost = None  # said once
            self._line = line
            yield line


def _escaping(escape: str, delimiter: str) -> re.Pattern[str]:
    """Finds an escape before a character that needs none."""
    mark = re.escape(escape)
    return re.compile(rf'(?<!{mark})(?:{mark}{mark})*({mark}[^"{re.escape(escape + delimiter)}\r\n])')


def _next(reader: Any) -> list[str] | None:
    """One record; the limit of a field's length belongs to the whole process, so it is put back."""
    before = csv.field_size_limit(LONGEST)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


MOST = 1 << 31
"""Bytes that a workbook may unpack to, as its reader holds all of them in memory."""


def split_sheet(source: str) -> tuple[str, str | None]:
    """Split book.xlsx#Sheet into its file and the sheet; any other source is a file."""
    file, mark, sheet = source.rpartition("#")
    if mark and file.lower().endswith(WORKBOOKS) and not os.path.lexists(source):
        return file, sheet
    return source, None


def sheet_names(path: Path, wanted: str | None = None) -> list[str]:
    """Return the sheets of a workbook that hold anything, or the one that is wanted.

    Raises:
        UserError: There is no such sheet, or the package that reads workbooks is not installed.
        DataError: The workbook cannot be read, or all its sheets are empty.
    """
    book = _open(path)
    try:
        if wanted is not None:
            if wanted not in book.sheet_names:
                raise UserError(f"{path} has no sheet {wanted}, but {listed(book.sheet_names)}")
            return [wanted]
        # A chart has no cells, and some readers no height for it.
        names = [name for name in book.sheet_names if book.get_sheet_by_name(name).total_height]
    finally:
        book.close()
    if not names:
        raise DataError(f"{path} holds no rows: its sheets are empty")
    return names


def read_sheet(path: Path, sheet: str, remark: Remark = lambda _: None) -> Iterator[RawRow]:
    """Read the rows of a sheet. Numbers without a fraction are whole, dates and times text in ISO 8601, empty cells "".

    Raises:
        DataError: The workbook cannot be read, or the sheet has no header.
    """
    book = _open(path)
    try:
        cells = book.get_sheet_by_name(sheet)
        start = cells.start[0] if cells.start else 0
        records = ((number, [_value(cell) for cell in row]) for number, row in enumerate(cells.to_python(), start + 1))
        filled = ((number, record) for number, record in records if any(value != "" for value in record))
        yield from rows_under(filled, f"{path}#{sheet}", "row", remark)
    finally:
        book.close()


def _value(cell: Any) -> Any:
    if isinstance(cell, float) and cell.is_integer():  # a workbook has no other numbers
        return int(cell)
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell) if isinstance(cell, datetime.timedelta) else cell


def _open(path: Path) -> Any:
    check_file(path)
    try:
        import python_calamine
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: workbooks are read by a package that is not installed: pip install 'lit_llama[excel]', or save "
            "the sheet as CSV"
        ) from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MOST:
                raise DataError(f"{path} unpacks to {size:,} bytes, more than {MOST:,}; save its sheets as CSV")
        return python_calamine.CalamineWorkbook.from_path(str(path))
    except python_calamine.PasswordError as error:
        raise DataError(f"{path} is protected by a password: save it without one, or as CSV") from error
    except (python_calamine.CalamineError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a workbook: {error}; save it again, or as CSV") from error
