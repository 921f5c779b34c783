"""Questions to be answered, out of any file with rows, and text files; every error names its place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.text.message import Conversation
from lit_llama.text.read.fields import FieldLog
from lit_llama.text.read.files import NOT_DATA
from lit_llama.text.read.raw import RowError
from lit_llama.text.read.rows import read_rows
from lit_llama.text.read.schemas import complete, recognise

_ANSWERS = {"instruction": "output", "prompt": "completion"}  # fields that may be missing here


def read_questions(path: Path) -> list[Conversation]:
    """Read instructions to be answered: any file that prepare/records.py reads; the answers may be missing.

    A chat is asked with all turns before its last answer, or with all turns if it ends in a question.

    Raises:
        DataError: The file is missing or unusable, or a row is of another form; the message names it.
    """
    questions = []
    for number, raw in enumerate(read_rows(path)):
        if raw.value is None:
            assert raw.error
            raise raw.error
        try:
            questions.append(question_of(raw.value, number))
        except RowError as error:
            raise DataError(f"{raw.where}: {error}") from error
    return questions


def question_of(row: Mapping[str, Any], number: int) -> Conversation:
    """Build the conversation of a row, of which the last answer may be missing.

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
    turns = tuple(found.messages)
    answered = bool(turns) and turns[-1]["role"] == "assistant"
    before = turns[:-1] if answered else turns
    complete([*before, {"role": "assistant", "content": "."}], schema)  # for its checks
    return Conversation(
        turns if answered and turns[-1]["content"] else before, number, f"row {number}", tools=tuple(found.tools)
    )


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

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
