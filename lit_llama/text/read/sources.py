"""Sources -> parts: files, sheets of workbooks and splits of data sets, and which side of a given split each is."""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.folder.manifest import sha256_file
from lit_llama.text.dataset.config import Documents
from lit_llama.text.read.documents import TEXT_ENDINGS, read_documents
from lit_llama.text.read.files import ENDINGS, UTF8, WORKBOOKS, Dialect, Remark, expand, is_saved, unchanged
from lit_llama.text.read.raw import RawRow, listed
from lit_llama.text.read.rows import read_rows
from lit_llama.text.read.tables import hash_dataset, is_hub_id, open_hub, open_saved, read_dataset
from lit_llama.text.read.workbooks import read_sheet, sheet_names, split_sheet

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
        sources: Files, folders, patterns, workbooks with #SHEET, or data sets of the Hub.
        documents: They are plain text, and this says what a document is.
        dialect: How their text is written.
        remark: Takes what has to be said of them.

    Raises:
        DataError: A source is missing.
    """
    seen: set[object] = set()
    resolved = []
    for source in sources:
        if documents is None and is_hub_id(source):
            resolved.append(_splits(source.partition("#")[0], open_hub(source)))
            continue
        file, sheet = (source, None) if documents else split_sheet(source)
        found: list[Part] = []
        for path in expand([file], TEXT_ENDINGS if documents else ENDINGS, remark):
            for part in _parts(path, sheet, documents, dialect, remark):
                if (key := (path.resolve(), part.name.removeprefix(str(path)))) not in seen:
                    seen.add(key)
                    found.append(part)
        resolved.append(found)
    return _divided(resolved)


def _parts(
    path: Path, sheet: str | None, documents: Documents | None, dialect: Dialect, remark: Remark
) -> Iterator[Part]:
    if is_saved(path):
        saved = open_saved(path)
        if any({"input_ids", "labels"} <= {*dataset.column_names} for dataset in saved.values()):
            raise DataError(
                f"{path} holds token ids, as the data folders that prepare/ makes: train on it with finetune/lora.py "
                f"--data_dir {shlex.quote(str(path))}"
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
