"""Instructions to be answered, out of any file with rows, and text files. Every error names its place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.text.conversation import Message
from lit_llama.text.read.fields import FieldLog
from lit_llama.text.read.files import NOT_DATA
from lit_llama.text.read.raw import RowError
from lit_llama.text.read.rows import read_rows
from lit_llama.text.read.schemas import complete, recognise

_ASKED = ("role", "content", "input")
_ANSWERS = {"instruction": "output", "prompt": "completion"}  # fields that may be missing here


@dataclass(frozen=True)
class Example:
    """One instruction with the answer wanted.

    Args:
        instruction: What is asked.
        input: What it is asked of.
        response: May be unknown ("").
        row: Number in the raw file, from 0.
        turns: A whole chat up to where the answer belongs, in place of instruction and input.
        tools: The functions that the assistant may call.
    """

    instruction: str
    input: str = ""
    response: str = ""
    row: int = 0
    turns: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def read_prompts(path: Path) -> list[Example]:
    """Read instructions to be answered: any file that prepare/records.py reads; the answers may be missing.

    A chat is asked with all turns before its last answer, or with all turns if it ends in a question.

    Raises:
        DataError: The file is missing or unusable, or a row is of another form; the message names it.
    """
    examples = []
    for number, raw in enumerate(read_rows(path)):
        if raw.value is None:
            assert raw.error
            raise raw.error
        try:
            examples.append(example_of(raw.value, number))
        except RowError as error:
            raise DataError(f"{raw.where}: {error}") from error
    return examples


def example_of(row: Mapping[str, Any], number: int) -> Example:
    """What a row asks.

    Raises:
        RowError: Nothing.
    """
    for asked, answer in _ANSWERS.items():
        if isinstance(row.get(asked), str) and not {"output", "response", "completion"} & row.keys():
            row = {**row, answer: ""}
    schema = recognise(row)
    if schema.is_text:
        raise RowError("plain text asks nothing", hint="expected an instruction or a chat")
    found = schema.turns(row, FieldLog())[0]
    turns, tools = found.messages, tuple(found.tools)
    answered = bool(turns) and turns[-1]["role"] == "assistant"
    before = turns[:-1] if answered else turns
    complete([*before, {"role": "assistant", "content": "."}], schema)  # for its checks
    response = turns[-1]["content"] if answered else ""
    if not tools and [message["role"] for message in before] == ["user"] and before[0].keys() <= {*_ASKED}:
        return Example(before[0]["content"], before[0].get("input", ""), response, number)
    return Example("", "", response, number, tuple(before), tools)


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
