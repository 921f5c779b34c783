"""The data folder: a saved `datasets.DatasetDict` with splits train and test beside meta.json.

Columns `input_ids` and `labels`, lists of int32 of the same length; labels are unshifted, IGNORE_INDEX is no loss.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError
from lit_llama.folder.manifest import check_folder, sha256_file
from lit_llama.objects import Form, check_form, read_object
from lit_llama.text.dataset.batches import Batch, Ids, collate
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.wording import call, param

META_FILE, TEST_FILE = "meta.json", "test.jsonl"
TEST_KEYS_FILE = "test_keys.txt"
"""In a data folder: for each line of test.jsonl, the key of what its row opened with before anything was cut."""
SPLITS = ("train", "test")
STATE_FILE = "state.json"
"""In the folder of a split: the names of its Arrow files."""
_WRITTEN = (META_FILE, TEST_FILE, "lost.jsonl", "report.json", "dataset_dict.json")
"""Files of a data folder that look like raw data."""
_PROSE = (".txt", ".text", ".md")
_RAW = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xlsx")
FORMAT = 1
_COUNTS = {"rows": int, "tokens": int, "trained_tokens": int}
META_FORM: Form = {
    "splits": {"*": _COUNTS},
    "tokenizer": {"path": str, "fingerprint": str, "size": int},
    "source": {"files": list, "file": str},
    "key": str,
    "kind": str,
    "pairs": bool,
    "prompt_style": str,
    "test_rows_also_in_train": int,
}
"""Of meta.json, as far as it is read again."""
PART = 1 << 20
"""Values of a column that are looked at at once."""


FolderKind = Literal["supervised", "preference"]
"""Of a data folder: samples to be learned, or answers to be compared (pairs.py)."""


def read_meta(folder: Path, *, kind: FolderKind | None = "supervised") -> dict[str, Any]:
    """Read meta.json of a data folder.

    Args:
        folder: The data folder.
        kind: The one that is wanted; None for any.

    Raises:
        DataError: The folder is missing, unfinished, of another format or of another kind.
        IntegrityError: A file in it is not as it was written.
    """
    path = folder / META_FILE
    if folder.is_file():
        raise DataError(f"{folder} is a file, expected the data folder that is made of it: {_made_of(folder)}")
    if (folder / "config.json").is_file() and not (folder / "dataset_dict.json").is_file():
        raise DataError(f"{folder} is a model, expected a data folder, such as {call('prepare')} makes")
    if not path.is_file():
        if rows := raw_files(folder):
            raw = rows[0] if len(rows) == 1 else folder
            raise DataError(
                f"{folder} is no finished data folder: it has raw data and no meta.json; make one: {_made_of(raw)}"
            )
        what = "is no finished data folder: it has no meta.json" if folder.is_dir() else "does not exist"
        made = call("prepare", destination_path=folder, inline=True)
        alpaca = call("text.pipeline.alpaca.prepare_alpaca")
        raise DataError(f"{folder} {what}; make it with {made}, or with {alpaca} for the Alpaca data")
    check_folder(folder)
    meta = read_object(path, DataError, "prepare the data again")
    check_form(meta, META_FORM, str(path), DataError)
    if meta.get("format") != FORMAT:
        raise DataError(f"{path}: format is {meta.get('format')}, expected {FORMAT}; prepare the data again")
    if kind and (found := meta.get("kind", "supervised")) != kind:
        raise DataError(_another_kind(folder, str(found)))
    return meta


def _another_kind(folder: Path, found: str) -> str:
    """What to say of a data folder of another kind than the wanted one."""
    if found == "preference":
        return (
            f"{folder} holds preferences, expected data for supervised training: train on it with "
            f"{call('finetune', data_dir=folder, method='dpo')}, or prepare the chosen answers alone with "
            f"{param('data_kind', 'sft-chosen')}"
        )
    if found == "supervised":
        return (
            f"{folder} holds data for supervised training, expected preferences: train on it with "
            f"{call('finetune', data_dir=folder)}, or prepare chosen and rejected answers with "
            f"{param('data_kind', 'preference')}"
        )
    return f"{folder / META_FILE}: kind is {found}, which this version does not know; prepare the data again"


def _made_of(raw: Path) -> str:
    """The command that makes a data folder of raw rows."""
    given = {"source": raw, "destination_path": f"data/{raw.stem}", "tokenizer_path": "checkpoints/NAME"}
    return call("prepare", **given, **({"documents": "file"} if raw.suffix.lower() in _PROSE else {}))


def raw_files(folder: Path) -> list[Path]:
    """Find the files in a folder that may hold raw rows; those of a data folder are none of them."""
    found = []
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
        if name.endswith(_RAW) and not name.startswith(".") and name not in _WRITTEN and file.is_file():
            found.append(file)
    return found


def data_fingerprint(folder: Path) -> str:
    """Hash the samples of a data folder: the bytes of both splits."""
    files = [path for name in SPLITS for path in sorted((folder / name).glob("*.arrow"))]
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()


def columns_of(folder: Path, names: Sequence[str]) -> list["Column"]:
    """Open columns of a split as `datasets` saves it, whose import, with pandas, would take 75 MB.

    Raises:
        DataError: A file is missing or damaged, or has other columns.
    """
    import pyarrow as pa

    try:
        files = [folder / file["filename"] for file in read_object(folder / STATE_FILE, DataError)["_data_files"]]
        table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files)
        table.validate(full=True)  # Arrow believes the offsets of a file
        return [Column(table.column(name)) for name in names]
    except Exception as error:  # whatever the library comes across in damaged files
        raise DataError(f"{folder} cannot be read: {error}; prepare the data again") from error


class Split:
    """Samples of one split, zero-copy from the mapped Arrow file.

    Args:
        folder: The data folder.
        name: Of the split.
        empty: It may be without samples.

    Attributes:
        lengths: (rows,) tokens of each sample.
    """

    def __init__(self, folder: Path, name: str, *, empty: bool = False) -> None:
        self._ids, self._labels = columns_of(folder / name, ("input_ids", "labels"))
        self.lengths = self._ids.lengths
        if not (len(self) or empty) or not np.array_equal(self.lengths, self._labels.lengths):
            raise DataError(
                f"{folder / name}: expected rows with input_ids and labels of the same length; prepare the data again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[Ids, Ids]:
        return self._ids[row], self._labels[row]

    def stranger(self, vocab_size: int) -> int | None:
        """Find an id or label that is none of so many tokens, if there is one."""
        for column, masked in ((self._ids, False), (self._labels, True)):
            for values in column.values():
                bad = (values >= vocab_size) | (values < 0) & ~(masked & (values == IGNORE_INDEX))
                if bad.any():
                    return int(values[bad.argmax()])
        return None

    def trained_tokens(self, rows: Iterable[int] | None = None) -> int:
        """Count the labels with a loss, of some samples or all; the first token of a sample is never predicted."""
        rows = range(len(self)) if rows is None else rows
        return sum(int((self._labels[row][1:] != IGNORE_INDEX).sum()) for row in rows)

    def places(self, rows: Sequence[int] | None = None) -> int:
        """Count the tokens that go in for some samples, or all: all but the last of each."""
        return int((self.lengths[slice(None) if rows is None else rows] - 1).sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(self.lengths.max(initial=0))

    def batch(self, rows: Sequence[int], *, share: bool) -> Batch:
        """Lay samples end to end; `share` as in `collate`."""
        return collate([self[row] for row in rows], share=share)

    def counted(self, share: bool) -> Self:
        """Return these samples, counted as batches are cut: before any beginning is shared."""
        return self

    def head(self, rows: int) -> Self:
        """Return the first samples, at most so many."""
        found = copy(self)
        found.lengths = self.lengths[:rows]
        return found


class Column:
    """A chunked list column as views into its buffers."""

    def __init__(self, column: Any) -> None:
        self._chunks: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        for chunk in column.chunks:
            # Their method to_numpy would import pandas.
            self._chunks.append((np.from_dlpack(chunk.values), np.from_dlpack(chunk.offsets)))
        counts = [len(offsets) - 1 for _, offsets in self._chunks]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.lengths: npt.NDArray[np.int64] = np.concatenate(
            [np.diff(offsets) for _, offsets in self._chunks] or [np.zeros(0, np.int64)]
        )

    def values(self) -> Iterator[npt.NDArray[Any]]:
        """Yield all values, a part at a time."""
        for values, offsets in self._chunks:
            for start in range(int(offsets[0]), int(offsets[-1]), PART):
                yield values[start : min(start + PART, int(offsets[-1]))]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        values, offsets = self._chunks[chunk]
        local = row - self._starts[chunk]
        return values[offsets[local] : offsets[local + 1]]
