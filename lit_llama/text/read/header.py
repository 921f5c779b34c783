"""Tables with a header -> rows: what CSV and the sheets of workbooks share."""

from collections.abc import Iterator, Sequence
from typing import Any

from lit_llama.errors import DataError
from lit_llama.text.read.files import Remark
from lit_llama.text.read.raw import RawRow, listed, shown

_LONG_NAME = 100  # characters; a longer "name" is a text
_INDEX = ("", "Unnamed: 0")  # what the first column is called where pandas has written its index


def rows_under(records: Iterator[tuple[int, list[Any]]], name: str, unit: str, remark: Remark) -> Iterator[RawRow]:
    """The records below a header, each as an object; blank ones are none.

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
