"""Rows that are hard to read, JSON in all its forms, and what is read of a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.text.read.formats.sources import read_rows
from lit_llama.text.read.raw import RawRow

ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}
TEXTS = ["a\u2028b", "a\u0085b\x0bc\x0cd\x1ee", 'quote " and \\ and \n', "北京 😀 \ufffd", "\r\n", "", " ", "a,b;c\td"]
ROWS = [{"instruction": text, "output": text + "!"} for text in TEXTS]
CHAT = {"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]}
Put = Callable[[str, bytes | str], Path]

FORMS: dict[str, Callable[[list[Any]], str]] = {
    "array": lambda rows: json.dumps(rows),
    "array of UTF-8": lambda rows: json.dumps(rows, ensure_ascii=False),
    "indented array": lambda rows: json.dumps(rows, indent=2),
    "CRLF": lambda rows: json.dumps(rows, indent=2).replace("\n", "\r\n"),
    "lines": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    "lines without a last end": lambda rows: "\n".join(map(json.dumps, rows)),
    "CRLF lines": lambda rows: "\r\n".join(map(json.dumps, rows)),
    "blank lines between": lambda rows: "\n \n" + "\n\n\t\r\n".join(map(json.dumps, rows)) + "\n\n",
    "one behind another": lambda rows: "".join(map(json.dumps, rows)),
    "indented objects": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "with a mark": lambda rows: "\ufeff" + json.dumps(rows),
    "lines with a mark": lambda rows: "\ufeff" + "\n".join(map(json.dumps, rows)),
}


def read(path: Path) -> tuple[list[RawRow], str]:
    """Rows, and the error that ended them."""
    found: list[RawRow] = []
    try:
        for row in read_rows(path):
            assert row.where.startswith(f"{path}") and (row.value is None) == bool(row.error) == bool(row.reason)
            found.append(row)
    except DataError as error:
        assert str(path) in str(error) and str(error).encode()
        return found, str(error)
    return found, ""


def values(path: Path) -> list[Any]:
    """Rows of a file in which nothing is wrong."""
    rows, error = read(path)
    assert not error and not any(row.error for row in rows)
    return [row.value for row in rows]


def errors(path: Path) -> list[str]:
    """What is wrong, without the name of the file."""
    rows, error = read(path)
    return [str(found).replace(f"{path}:", "") for found in [*(row.error for row in rows), error] if found]
