"""Raw files -> examples. Every error and every dropped row is named as file:row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.text.files import NOT_DATA
from lit_llama.text.raw import kind, parse_json


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
        raise DataError(f"{where}: found {kind(row)}, expected an object with instruction, input and output")
    for name in ("instruction", "output"):
        if name not in row:
            keys = ", ".join(map(str, row)) or "nothing"
            raise DataError(f"{where}: field {name} is missing (found {keys}); expected instruction, input and output")
    given = row.get("input")
    values = (row["instruction"], "" if given is None else given, row["output"])
    for name, value in zip(("instruction", "input", "output"), values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{where}: field {name} is {kind(value)}, expected text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: field {name} holds a lone surrogate at character {error.start}") from error
    return values


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
    for start, what in NOT_DATA.items():
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
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: found {kind(value)} at the top, expected an array of rows")
    if not value:
        raise DataError(f"{path} holds no rows")
    return value


def _read_json_lines(path: Path) -> list[Any]:
    lines = read_text(path).split("\n")  # splitlines would also cut at U+2028 and others inside a string
    rows = [parse_json(line, f"{path}:line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows
