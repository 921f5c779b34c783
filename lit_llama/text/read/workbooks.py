"""Workbooks of Excel and LibreOffice: each sheet a table with a header."""

import datetime
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.text.read.csv_rows import rows_under
from lit_llama.text.read.files import WORKBOOKS, Remark, check_file
from lit_llama.text.read.raw import RawRow, listed

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
