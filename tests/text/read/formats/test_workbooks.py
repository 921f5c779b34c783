"""Workbooks: read as openpyxl has written them, with the place of every row."""

import datetime
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from lit_llama.errors import DataError, UserError
from lit_llama.text.read.formats import spreadsheets
from lit_llama.text.read.formats.sources import read_rows
from lit_llama.text.read.formats.spreadsheets import sheet_names
from lit_llama.text.read.reading import read_conversations


def book(path: Path, **sheets: list[list[Any]]) -> Path:
    made = openpyxl.Workbook()
    made.remove(made.active)
    for name, rows in sheets.items():
        sheet = made.create_sheet(name)
        for row in rows:
            sheet.append(row)
    made.save(path)
    return path


def test_cells_become_values_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    """Catches 5 read as 5.0, a number of a row that blank rows shift, and a blank row that becomes one."""
    day, noon = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12, 30)
    rows = [
        [None] * 3,
        ["a", "b", "c"],
        ["x", 5, 5.5],
        [None, None, None],
        [True, day, noon],
        [None, "", 10**12],
        [datetime.time(7, 5), "Grüße 😀\nzwei", -0.1],
    ]
    path = book(tmp_path / "a.xlsx", One=rows, Empty=[])
    found = list(read_rows(path))
    assert [row.value for row in found] == [
        {"a": "x", "b": 5, "c": 5.5},
        {"a": True, "b": "2024-02-29", "c": "2024-02-29T12:30:00"},
        {"a": "", "b": "", "c": 10**12},
        {"a": "07:05:00", "b": "Grüße 😀\nzwei", "c": -0.1},
    ]
    assert [row.where for row in found] == [f"{path}#One:row {number}" for number in (3, 5, 6, 7)]
    assert all(type(found[0].value[name]) is kind for name, kind in (("b", int), ("c", float)) if found[0].value)


def test_sheets_are_sources_and_may_be_a_given_split(tmp_path: Path) -> None:
    """Catches a second sheet that is lost, and a test sheet that trains."""
    rows = [["instruction", "output"], ["q", "a"], ["r", "b"]]
    path = book(tmp_path / "a.xlsx", train=rows, test=[rows[0], ["s", "c"]])
    splits = [found.split for found in read_conversations([str(path)])]  # type: ignore[union-attr]
    assert splits == ["train", "train", "test"]
    reader = read_conversations([f"{path}#test", f"{path}#test", str(path)])
    assert [found.where for found in reader] == [f"{path}#test:row 2", f"{path}#train:row 2", f"{path}#train:row 3"]
    with pytest.raises(UserError, match=r"has no sheet dev, but train, test"):
        read_conversations([f"{path}#dev"])


def test_what_is_no_workbook_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of the reader, and one of Python where it is not installed."""
    path = tmp_path / "a.xlsx"
    for content in (b"PK\x03\x04junk", b"a,b\n1,2\n", b"\xd0\xcf\x11\xe0" + b"\0" * 600):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as a workbook"):
            list(read_rows(path))
    with pytest.raises(DataError, match="holds no rows: its sheets are empty"):
        sheet_names(book(path, One=[]))
    book(path, One=[["a"], ["x" * 5000]])
    monkeypatch.setattr(spreadsheets, "MOST", 1000)
    with pytest.raises(DataError, match=r"unpacks to [\d,]+ bytes, more than 1,000"):
        list(read_rows(path))
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(UserError, match=r"pip install 'lit_llama\[excel\]', or save the sheet as CSV"):
        list(read_rows(path))
