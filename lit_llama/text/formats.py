"""Raw files -> examples. Every error and every dropped row is named as file:row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lit_llama.errors import DataError

_NOT_DATA = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch the file itself (git lfs pull)",
    b"<!doctype html": "an HTML page, not the data; download the raw file",
    b"<html": "an HTML page, not the data; download the raw file",
    b"404: not found": "the text of a failed download; download the file again",
}


@dataclass(frozen=True)
class Example:
    """One instruction with the answer wanted. `row` counts from 0 in the raw file; `response` may be unknown ("")."""

    instruction: str
    input: str = ""
    response: str = ""
    row: int = 0


@dataclass(frozen=True)
class Dropped:
    """A raw row that is left out, and why."""

    row: int
    reason: str


def read_alpaca(path: Path) -> tuple[list[Example], list[Dropped]]:
    """Read a JSON array of objects with `instruction`, `output` and, if there is one, `input`.

    Rows without an instruction or an answer are dropped by name; whatever is not of this form is an error.

    Raises:
        DataError: The file is missing, not UTF-8, not JSON, or a row is of another form.
    """
    examples, dropped = [], []
    for number, row in enumerate(_read_json_array(path)):
        instruction, given, response = _fields(row, f"{path}:row {number}")
        if not instruction.strip():
            dropped.append(Dropped(number, "empty instruction"))
        elif not response.strip():
            dropped.append(Dropped(number, "empty output"))
        else:
            examples.append(Example(instruction, given, response, number))
    return examples, dropped


def write_alpaca(path: Path, examples: Sequence[Example]) -> None:
    """Write examples in the same form, one object a line."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            row = {"instruction": example.instruction, "input": example.input, "output": example.response}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_prompts(path: Path) -> list[Example]:
    """Read instructions to be answered: a JSON array, or one object a line; `output` may be missing.

    Raises:
        DataError: As `read_alpaca`.
    """
    rows = _read_json_lines(path) if path.suffix == ".jsonl" else _read_json_array(path)
    examples = []
    for number, row in enumerate(rows):
        row = {"output": ""} | row if isinstance(row, dict) else row
        instruction, given, response = _fields(row, f"{path}:row {number}")
        examples.append(Example(instruction, given, response, number))
    return examples


def _fields(row: Any, where: str) -> tuple[str, str, str]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {_kind(row)}, expected an object with instruction, input and output")
    for name in ("instruction", "output"):
        if name not in row:
            keys = ", ".join(map(str, row)) or "nothing"
            raise DataError(f"{where}: field {name} is missing (found {keys}); expected instruction, input and output")
    given = row.get("input")
    values = (row["instruction"], "" if given is None else given, row["output"])
    for name, value in zip(("instruction", "input", "output"), values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{where}: field {name} is {_kind(value)}, expected text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: field {name} holds a lone surrogate at character {error.start}") from error
    return values


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark.

    Raises:
        DataError: It is missing, of another encoding, or something else saved under its name.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist (working folder: {Path.cwd()})") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, expected a file") from error
    if not raw.strip():
        raise DataError(f"{path} is empty")
    for start, what in _NOT_DATA.items():
        if raw[:64].lstrip().lower().startswith(start):
            raise DataError(f"{path} is {what}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; convert it first, "
            f"for example: iconv -f CP1252 -t UTF-8 {path.name}"
        ) from error


def _read_json_array(path: Path) -> list[Any]:
    value = _parse(read_text(path), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: found {_kind(value)} at the top, expected an array of rows")
    if not value:
        raise DataError(f"{path} holds no rows")
    return value


def _read_json_lines(path: Path) -> list[Any]:
    lines = read_text(path).split("\n")  # splitlines would also cut at U+2028 and others inside a string
    rows = [_parse(line, f"{path}:line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _parse(text: str, where: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise DataError(f"{where}: {constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{where}: an object has the field {twice!r} twice")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        snippet = text[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ")
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where} is not JSON: {error.msg} at {place}, near {snippet!r}") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deep") from error
    except DataError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise DataError(f"{where}: {error}") from error
