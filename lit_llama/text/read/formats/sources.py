"""Sources -> parts -> rows: files in any known format, sheets of workbooks and splits of data sets.

Rows come one after another, in little memory; each part knows which side of a given split it is. Questions to be
answered are rows whose answers may be missing.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.folder.manifest import sha256_file
from lit_llama.text.config import Documents
from lit_llama.text.message import Conversation
from lit_llama.text.read.formats.documents import TEXT_ENDINGS, read_documents
from lit_llama.text.read.formats.files import NOT_DATA, UTF8, Dialect, beginning, decoded, open_bytes
from lit_llama.text.read.formats.json_rows import read_json
from lit_llama.text.read.formats.paths import (
    ENDINGS,
    FORMATS,
    WORKBOOKS,
    Remark,
    check_file,
    expand,
    is_saved,
    plain_suffix,
    unchanged,
)
from lit_llama.text.read.formats.remote import Copy, fetch, is_url
from lit_llama.text.read.formats.spreadsheets import read_csv, read_sheet, sheet_names, split_sheet
from lit_llama.text.read.formats.tables import (
    MAGIC,
    hash_dataset,
    is_hub_id,
    open_hub,
    open_saved,
    read_dataset,
    read_parquet,
)
from lit_llama.text.read.raw import RawRow, RowError, listed, shown
from lit_llama.text.read.schemas.fields import FieldLog
from lit_llama.text.read.schemas.recognition import complete, recognise
from lit_llama.wording import call


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
            prose = f"; plain text is for {call('prepare', documents='file')}" if ending in TEXT_ENDINGS else ""
            begins = f"it begins with {shown(start[:20])}"
            raise DataError(f"{path}: its format is not known ({begins}); expected {FORMATS}{prose}")


_ANSWERS = {"instruction": "output", "prompt": "completion"}  # fields that may be missing here


def read_questions(path: Path) -> list[Conversation]:
    """Read instructions to be answered: any file that is prepared; the answers may be missing.

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


_SPLIT = r"(train|test|valid(?:ation)?|val|dev|eval)"
_BEGINS = re.compile(rf"{_SPLIT}(?=[._-]|$)", re.IGNORECASE)  # train-00000-of-00001.parquet, test_sft
_ENDS = re.compile(rf"(?:^|[._-]){_SPLIT}(?=\.|$)", re.IGNORECASE)  # gsm8k_test.jsonl


@dataclass(frozen=True)
class Part:
    """One file, one sheet of a workbook, or one split of a data set.

    Args:
        name: What messages call it.
        split: train, test or validation, where the sources are divided.
        rows: Reads it.
        sha256: Hash of its bytes.
        guard: Raises if it changes while it is read.
    """

    name: str
    split: str | None
    rows: Callable[[], Iterator[RawRow]]
    sha256: Callable[[], str]
    guard: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Division:
    """Division of the sources into train and test by themselves.

    Args:
        sides: Names of parts for training and for testing; both empty where the sources are not divided.
        unknown: Names of parts that are neither.
    """

    sides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unknown: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.sides)

    def __str__(self) -> str:
        return ", ".join(f"{listed(names, 3)} for {side}ing" for side, names in self.sides.items())

    @classmethod
    def of(cls, sources: Sequence[Sequence[Part]]) -> "Division":
        """Find the division that the names of some parts tell."""
        found: dict[str, list[str]] = {"train": [], "test": [], "": []}
        for part in (part for parts in sources for part in parts):
            found["train" if part.split == "train" else "test" if part.split else ""].append(part.name)
        unknown = found.pop("")
        return cls(found, unknown) if found["train"] else cls()


def resolve(
    sources: Sequence[str], documents: Documents | None, dialect: Dialect = UTF8, remark: Remark = lambda _: None
) -> list[list[Part]]:
    """Resolve the parts of each source; what two sources name is a part of the first one.

    Args:
        sources: Files, folders, patterns, workbooks with #SHEET, URLs of such, or data sets of the Hub.
        documents: They are plain text, and this says what a document is.
        dialect: How their text is written.
        remark: Takes what has to be said of them.

    Raises:
        DataError: A source is missing.
        ResourceError: A source cannot be fetched.
    """
    seen: set[object] = set()
    resolved = []
    for source in sources:
        if documents is None and is_hub_id(source):
            resolved.append(_splits(source.partition("#")[0], open_hub(source)))
            continue
        file, sheet = (source, None) if documents else split_sheet(source)
        found: list[Part] = []
        endings = TEXT_ENDINGS if documents else ENDINGS
        if is_url(file):
            for copy in fetch(file, endings, remark):
                found += [part for part in _copied(copy, sheet, documents, dialect, remark) if part.name not in seen]
            seen |= {part.name for part in found}
            resolved.append(found)
            continue
        for path in expand([file], endings, remark):
            for part in _parts(path, sheet, documents, dialect, remark):
                if (key := (path.resolve(), part.name.removeprefix(str(path)))) not in seen:
                    seen.add(key)
                    found.append(part)
        resolved.append(found)
    return _divided(resolved)


def _copied(copy: Copy, sheet: str | None, documents: Documents | None, dialect: Dialect, remark: Remark) -> list[Part]:
    """The parts of a copy, by the names of what it is a copy of."""
    with copy.naming():
        parts = list(_parts(copy.path, sheet, documents, dialect, lambda text: remark(copy.named(text))))
    return [replace(part, name=copy.named(part.name), rows=partial(copy.rows, part.rows)) for part in parts]


def _parts(
    path: Path, sheet: str | None, documents: Documents | None, dialect: Dialect, remark: Remark
) -> Iterator[Part]:
    if is_saved(path):
        saved = open_saved(path)
        if any({"input_ids", "labels"} <= {*dataset.column_names} for dataset in saved.values()):
            raise DataError(
                f"{path} holds token ids, as prepared data folders do: train on it with "
                f"{call('finetune', data_dir=path, inline=True)}"
            )
        yield from _splits(str(path), saved)
        return
    hashed, guard = partial(sha256_file, path), partial(unchanged, path)
    if not documents and path.suffix.lower() in WORKBOOKS:
        for name in sheet_names(path, sheet):
            split = _split_of(name) or _split_of(path.stem, path.parent.name)
            yield Part(f"{path}#{name}", split, partial(read_sheet, path, name, remark), hashed, guard)
        return
    rows = (
        partial(read_documents, path, documents, dialect, remark)
        if documents
        else partial(read_rows, path, dialect, remark)
    )
    yield Part(str(path), _split_of(path.name, path.parent.name), rows, hashed, guard)


def _splits(name: str, splits: Mapping[str | None, Any]) -> list[Part]:
    return [
        Part(
            f"{name}/{split}" if split else name,
            _split_of(split or ""),
            partial(read_dataset, dataset, name, split),
            partial(hash_dataset, dataset),
        )
        for split, dataset in splits.items()
    ]


def _split_of(name: str, folder: str = "") -> str | None:
    """The split that the beginning or the end of a name tells, or else the whole name of its folder.

    valid, val, dev and eval are called validation.
    """
    match = _BEGINS.match(name) or _ENDS.search(name) or re.fullmatch(_SPLIT, folder, re.IGNORECASE)
    found = match[1].lower() if match else None
    return found if found in ("train", "test", None) else "validation"


def _divided(sources: list[list[Part]]) -> list[list[Part]]:
    """Splits count only where there is something to train and something to test on."""
    names = {part.split for parts in sources for part in parts}
    if "train" in names and names & {"test", "validation"}:
        return sources
    return [[replace(part, split=None) for part in parts] for parts in sources]
