"""A file in any known format -> its rows one after another, in little memory."""

from collections.abc import Iterator
from pathlib import Path

from lit_llama.errors import DataError
from lit_llama.text.read.csv_rows import read_csv
from lit_llama.text.read.documents import TEXT_ENDINGS
from lit_llama.text.read.files import (
    FORMATS,
    UTF8,
    WORKBOOKS,
    Dialect,
    Remark,
    beginning,
    check_file,
    decoded,
    is_saved,
    open_bytes,
    plain_suffix,
    unchanged,
)
from lit_llama.text.read.json_rows import read_json
from lit_llama.text.read.raw import RawRow, shown
from lit_llama.text.read.tables import MAGIC, open_saved, read_dataset, read_parquet
from lit_llama.text.read.workbooks import read_sheet, sheet_names

__all__ = ["RawRow", "read_rows"]


def read_rows(path: Path, dialect: Dialect = UTF8, remark: Remark = lambda _: None) -> Iterator[RawRow]:
    """Read the rows of a file, or of a folder saved by the datasets library, in their order.

    A row is an object, or carries the error that concerns it alone. JSON is an array of objects, one object a line, or
    objects one after another, whatever the name says.

    Args:
        path: The file or folder.
        dialect: How its text is written.
        remark: Takes what has to be said of it.

    Raises:
        DataError: The file cannot be read, or not from some place on; the message names it.
    """
    if is_saved(path):
        for split, dataset in open_saved(path).items():
            yield from read_dataset(dataset, str(path), split)
        return
    with unchanged(path):
        if path.suffix.lower() in WORKBOOKS:
            check_file(path)
            for sheet in sheet_names(path):
                yield from read_sheet(path, sheet, remark)
        else:
            yield from _read_file(path, dialect, remark)


def _read_file(path: Path, dialect: Dialect, remark: Remark) -> Iterator[RawRow]:
    ending = plain_suffix(path)
    with open_bytes(path) as stream:
        start = stream.peek(64)[:64]
        if start.startswith(MAGIC) or ending == ".parquet":
            yield from read_parquet(path)
            return
        looks_like_json = beginning(start).startswith(("{", "["))
        text = decoded(stream, path, dialect, remark)
        if ending in (".csv", ".tsv"):
            if looks_like_json:
                raise DataError(f"{path} is named {ending} but holds JSON: rename it to .json or .jsonl")
            yield from read_csv(text, path, "\t" if ending == ".tsv" else None, dialect, remark)
        elif ending in (".json", ".jsonl", ".ndjson") or looks_like_json:
            yield from read_json(text, path, by_lines=ending in (".jsonl", ".ndjson"), remark=remark)
        else:
            prose = "; plain text is for prepare/text.py" if ending in TEXT_ENDINGS else ""
            begins = f"it begins with {shown(start[:20])}"
            raise DataError(f"{path}: its format is not known ({begins}); expected {FORMATS}{prose}")
