"""The data folder: a saved `datasets.DatasetDict` with splits train and test beside meta.json; batches out of it.

Columns `input_ids` and `labels`, lists of int32 of the same length; labels are unshifted, IGNORE_INDEX is no loss.
"""

import hashlib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError
from lit_llama.folder.manifest import check_folder, sha256_file
from lit_llama.objects import Form, check_form, read_object
from lit_llama.text.dataset.sharing import beginnings
from lit_llama.text.message import IGNORE_INDEX

META_FILE, TEST_FILE = "meta.json", "test.jsonl"
TEST_KEYS_FILE = "test_keys.txt"
"""In a data folder: for each line of test.jsonl, the key of what its row opened with before anything was cut."""
SPLITS = ("train", "test")
_WRITTEN = (META_FILE, TEST_FILE, "lost.jsonl", "report.json", "dataset_dict.json", "shard.json")
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
Ids = npt.NDArray[np.int32]


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
    if not path.is_file():
        if rows := raw_files(folder):
            raw = rows[0] if len(rows) == 1 else folder
            raise DataError(
                f"{folder} is no finished data folder: it has raw data and no meta.json; make one: {_made_of(raw)}"
            )
        what = "is no finished data folder: it has no meta.json" if folder.is_dir() else "does not exist"
        raise DataError(
            f"{folder} {what}; make it with prepare/records.py --destination_path {shlex.quote(str(folder))}, or with "
            "prepare/alpaca.py for the Alpaca data"
        )
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
    named = shlex.quote(str(folder))
    if found == "preference":
        return (
            f"{folder} holds preferences, expected data for supervised training: train on it with python "
            f"finetune/dpo.py --data_dir {named}, or prepare the chosen answers alone with --as sft-chosen"
        )
    if found == "supervised":
        return (
            f"{folder} holds data for supervised training, expected preferences: train on it with python "
            f"finetune/lora.py --data_dir {named}, or prepare chosen and rejected answers with --as preference"
        )
    return f"{folder / META_FILE}: kind is {found}, which this version does not know; prepare the data again"


def _made_of(raw: Path) -> str:
    """The command that makes a data folder of raw rows."""
    door = "text" if raw.suffix.lower() in _PROSE else "records"
    source, made = shlex.quote(str(raw)), shlex.quote(f"data/{raw.stem}")
    return f"python prepare/{door}.py --source {source} --destination_path {made} --tokenizer_path checkpoints/NAME"


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
        import datasets

        try:
            table = datasets.load_from_disk(str(folder / name)).data
            table.validate(full=True)  # Arrow believes the offsets of a file
            self._ids, self._labels = Column(table.column("input_ids")), Column(table.column("labels"))
        except Exception as error:  # whatever the library comes across in damaged files; IndexError: no rows at all
            raise DataError(f"{folder / name} cannot be read: {error}; prepare the data again") from error
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

    def batch(self, rows: Sequence[int], *, share: bool) -> "Batch":
        """Lay samples end to end; `share` as in `collate`."""
        return collate([self[row] for row in rows], share=share)

    def counted(self, share: bool) -> Self:
        """Return these samples, counted as batches are cut: before any beginning is shared."""
        return self


class Column:
    """A chunked list column as views into its buffers."""

    def __init__(self, column: Any) -> None:
        self._chunks: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        for chunk in column.chunks:
            offsets = chunk.offsets.to_numpy()
            self._chunks.append((chunk.values.to_numpy(zero_copy_only=False), offsets))
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


@dataclass(frozen=True)
class Batch:
    """Samples laid end to end without padding.

    The last token of a sample is nobody's input and its first nobody's target: n tokens take n - 1 places. What several
    samples begin with may be a sample of its own, from which they go on: their parent.
    """

    input_ids: npt.NDArray[np.int64]  # (T,)
    lengths: list[int]  # places of each sample; they sum to T
    select: npt.NDArray[np.int64]  # (N,) places whose next token carries loss
    targets: npt.NDArray[np.int64]  # (N,) that next token
    parents: list[int] = field(default_factory=list)  # of each sample, -1 for none; empty: none has one

    def padded(self, multiple: int) -> "Batch":
        """Add a sample at the end that fills up the places to a multiple, and that nobody sees."""
        missing = -len(self.input_ids) % multiple
        if not missing:
            return self
        ids = np.concatenate([self.input_ids, np.zeros(missing, np.int64)])
        parents = [*self.parents, -1] if self.parents else []
        return replace(self, input_ids=ids, lengths=[*self.lengths, missing], parents=parents)

    def emptied(self) -> Self:
        """Return a batch of the first place alone, without a loss."""
        nothing = np.zeros(0, np.int64)
        return replace(self, input_ids=self.input_ids[:1], lengths=[1], select=nothing, targets=nothing, parents=[])


def collate(samples: Sequence[tuple[Ids, Ids]], *, share: bool = False) -> Batch:
    """Lay samples end to end. The shift between input and target happens here and nowhere else.

    Args:
        samples: input_ids and labels of each.
        share: Have what samples begin with alike only once, as far as it carries no loss; see sharing.py.
    """
    inputs = [(ids[:-1], labels[1:]) for ids, labels in samples]
    parents: list[int] = []
    if share:
        inputs, parents = _shared(inputs)
    input_ids = np.concatenate([ids for ids, _ in inputs]).astype(np.int64)
    targets = np.concatenate([labels for _, labels in inputs]).astype(np.int64)
    select = np.flatnonzero(targets != IGNORE_INDEX)
    return Batch(input_ids, [len(ids) for ids, _ in inputs], select, targets[select], parents)


def _shared(inputs: Sequence[tuple[Ids, Ids]]) -> tuple[list[tuple[Ids, Ids]], list[int]]:
    """The samples with each common beginning before those that have it, and their parents."""
    most = []
    for ids, labels in inputs:
        trained = np.flatnonzero(labels != IGNORE_INDEX)
        most.append(min(int(trained[0]) if len(trained) else len(ids), len(ids) - 1))  # each keeps a place of its own
    found: list[tuple[Ids, Ids]] = []
    parents: list[int] = []
    rest = dict(enumerate(inputs))
    for length, members in beginnings([ids for ids, _ in inputs], most):
        parent = len(found)
        ids, labels = inputs[members[0]]
        found.append((ids[:length], labels[:length]))
        parents.append(-1)
        for member in members:
            ids, labels = rest.pop(member)
            found.append((ids[length:], labels[length:]))
            parents.append(parent)
    return [*found, *rest.values()], [*parents, *(-1 for _ in rest)]


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of the samples in an epoch, a function of (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


class Rows(Protocol):
    """Rows of one split that steps are made of: samples, or preference rows.

    Attributes:
        lengths: (rows,) tokens of each row, by which batches are cut.
    """

    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int], *, share: bool) -> Batch:
        """Lay rows end to end; `share` has what they begin with only once."""
        ...

    def trained_tokens(self, rows: Iterable[int] | None = None) -> int:
        """Count the tokens with a loss, of some rows or all."""
        ...

    def places(self, rows: Sequence[int] | None = None) -> int:
        """Count the tokens that go in for some rows, or all."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model sees."""
        ...

    def counted(self, share: bool) -> Self:
        """Return these rows with the lengths that they have in such batches."""
        ...

    def stranger(self, vocab_size: int) -> int | None:
        """Find an id that is none of so many tokens, if there is one."""
        ...


def micro_batches(split: Rows, rows: Sequence[int], micro_batch_tokens: int, *, share: bool = False) -> Iterator[Batch]:
    """Cut the samples of a step, longest first, into batches of at most `micro_batch_tokens` tokens.

    The gradient of a step does not depend on how its samples are cut. A longer sample is a batch of its own. Tokens are
    counted before any are shared.
    """
    for group in _groups(split.lengths, rows, micro_batch_tokens):
        yield split.batch(group, share=share)


def _groups(lengths: npt.NDArray[np.int64], rows: Sequence[int], micro_batch_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if group and tokens + lengths[row] > micro_batch_tokens:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += int(lengths[row])
    if group:
        yield group


def share_out(lengths: npt.NDArray[np.int64], rows: Sequence[int], shares: int) -> list[list[int]]:
    """Divide samples among processes: the longest first, each to the one with the fewest tokens so far."""
    divided: list[list[int]] = [[] for _ in range(shares)]
    tokens = [0] * shares
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        share = tokens.index(min(tokens))
        divided[share].append(row)
        tokens[share] += int(lengths[row])
    return divided


def shared_micro_batches(
    split: Rows,
    rows: Sequence[int],
    micro_batch_tokens: int,
    share: int,
    shares: int,
    *,
    even: bool,
    share_beginnings: bool = False,
) -> Iterator[Batch]:
    """Yield the micro-batches of one share of the samples of a step.

    Args:
        split: The samples.
        rows: Those of the step, in whatever order; at least one.
        micro_batch_tokens: See `micro_batches`.
        share: Whose, from 0.
        shares: How many there are.
        even: Fill up with batches of one token without a loss, until there are as many as in the share with the most.
        share_beginnings: See `collate`.
    """
    divided = share_out(split.lengths, rows, shares)
    yield from micro_batches(split, divided[share], micro_batch_tokens, share=share_beginnings)
    if even:
        counts = [sum(1 for _ in _groups(split.lengths, part, micro_batch_tokens)) for part in divided]
        for _ in range(max(counts) - counts[share]):
            yield split.batch(rows[:1], share=False).emptied()


_ORDERED = 1 << 16
"""Samples whose order is looked at together."""


def largest_group(
    lengths: npt.NDArray[np.int64],
    *,
    batch_size: int,
    micro_batch_tokens: int,
    seed: int,
    steps: int,
    shares: int = 1,
) -> list[int]:
    """Find the rows of the largest micro-batch, in tokens, that the first `steps` optimizer steps of a run will meet.

    The steps of an epoch, or of several short ones, are divided and cut at once, sample by sample, as `share_out` and
    `_groups` do with each. The search ends with a micro-batch that none can exceed, which few rows soon give.
    """
    largest, step_rows = -1, [0]
    longest = np.sort(lengths)[::-1][:batch_size]
    bound = min(int(longest.sum()), max(int(longest[0]), micro_batch_tokens))
    per_epoch = -(-len(lengths) // batch_size)
    epochs, together = -(-steps // per_epoch), max(1, _ORDERED // len(lengths))
    for first in range(0, epochs, together):
        count = min(together, epochs - first)
        orders = np.full((count, per_epoch * batch_size), -1)
        for epoch in range(count):
            orders[epoch, : len(lengths)] = epoch_order(len(lengths), seed, first + epoch)
        batches = orders.reshape(-1, batch_size)[: steps - first * per_epoch]  # (S, batch_size)
        sizes = -np.sort(-np.where(batches < 0, 0, lengths[batches]), 1)
        every = np.arange(len(batches))
        given, tokens = np.zeros((2, len(batches), shares), np.int64)  # (S, shares): in all, and in the group
        for size in sizes.T:
            share = given.argmin(1)  # (S,)
            open_group = tokens[every, share]
            open_group = np.where((open_group > 0) & (open_group + size > micro_batch_tokens), 0, open_group) + size
            given[every, share] += size
            tokens[every, share] = open_group
            step = int(open_group.argmax())
            if open_group[step] > largest:
                largest = int(open_group[step])
                step_rows = [int(row) for row in batches[step] if row >= 0]
        if largest >= bound:
            break
    groups = (g for share in share_out(lengths, step_rows, shares) for g in _groups(lengths, share, micro_batch_tokens))
    return max(groups, key=lambda group: int(lengths[group].sum()))


def step_plan(
    lengths: npt.NDArray[np.int64], *, batch_size: int, micro_batch_tokens: int, seed: int
) -> dict[str, int | float]:
    """Count what a pass over samples of these lengths will come to.

    Args:
        lengths: (rows,) tokens of each sample of the training split.
        batch_size: Samples per optimizer step.
        micro_batch_tokens: Most tokens per forward pass.
        seed: Of the order.

    Returns:
        The settings, `steps_per_epoch`, `micro_batches_per_step` and `fill`, the share of micro_batch_tokens in use;
        the last two from at most 500 steps.
    """
    order = epoch_order(len(lengths), seed, 0)
    starts = range(0, len(order), batch_size)[:500]
    cut = [list(_groups(lengths, order[at : at + batch_size].tolist(), micro_batch_tokens)) for at in starts]
    batches = sum(map(len, cut))
    tokens = sum(int(lengths[group].sum()) for groups in cut for group in groups)
    return {
        "batch_size": batch_size,
        "micro_batch_tokens": micro_batch_tokens,
        "steps_per_epoch": -(-len(lengths) // batch_size),
        "micro_batches_per_step": batches / max(len(cut), 1),
        "fill": tokens / max(batches * micro_batch_tokens, 1),
    }
