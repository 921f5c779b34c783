"""Samples on their way into the Arrow files of train and test."""

import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lit_llama.text.dataset.folder import SPLITS, STATE_FILE
from lit_llama.text.message import IGNORE_INDEX

COLUMNS = ("input_ids", "labels")
MAX_FILE_SIZE = 500_000_000
"""Bytes after which a split goes on in another file."""


@dataclass(frozen=True)
class Samples:
    """Samples laid end to end, as they are stored."""

    input_ids: npt.NDArray[np.int32]  # (N,)
    labels: npt.NDArray[np.int32]  # (N,)
    lengths: npt.NDArray[np.int64]  # (samples,); they sum to N

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> "Samples":
        """Take some of the samples, in another order."""
        ends = np.cumsum(self.lengths)
        index = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[index]
        # Place of every token: where its sample begins, and its number in it.
        begins = np.repeat(ends[index] - lengths, lengths)
        places = begins + np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Samples(self.input_ids[places], self.labels[places], lengths)

    def sample(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Copy the ids and the labels of one sample."""
        end = int(self.lengths[: row + 1].sum())
        inside = slice(end - int(self.lengths[row]), end)
        return self.input_ids[inside].copy(), self.labels[inside].copy()


List = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""A column of lists: their values end to end, and the length of each."""


class SplitWriter:
    """One split of a data folder.

    Args:
        folder: The folder of the split, such as data/alpaca/train.
    """

    columns: ClassVar[Sequence[str]] = COLUMNS

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._folder = folder
        folder.mkdir(parents=True)
        feature = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
        self._features = dict.fromkeys(self.columns, feature)
        metadata = {"huggingface": json.dumps({"info": {"features": self._features}})}
        self._schema = pa.schema([(name, pa.list_(pa.int32())) for name in self.columns], metadata)
        self._files: list[Path] = []
        self._writer: Any = None
        self._written = 0

    @staticmethod
    def lists(batch: Samples) -> list[List]:
        """Return what is stored of samples: values and lengths for each column."""
        return [(batch.input_ids, batch.lengths), (batch.labels, batch.lengths)]

    @staticmethod
    def samples(lists: Sequence[List]) -> Samples:
        """Make samples of what is stored of them."""
        (ids, lengths), (labels, _) = lists
        return Samples(ids, labels, lengths)

    @staticmethod
    def sequences(batch: Samples) -> npt.NDArray[np.int64]:
        """Count the tokens of the longest sequence that a model sees of each sample: (samples,)."""
        return batch.lengths

    def add(self, batch: Samples) -> None:
        """Append samples."""
        import pyarrow as pa

        if not len(batch.lengths):
            return
        if self._writer is None or self._written > MAX_FILE_SIZE:
            self._open()
        columns = [
            pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values)
            for values, lengths in self.lists(batch)
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._written += batch.input_ids.nbytes + batch.labels.nbytes

    def _open(self) -> None:
        import pyarrow as pa

        if self._writer is not None:
            self._writer.close()
        self._files.append(self._folder / f"data-{len(self._files):05d}.arrow")
        self._writer = pa.ipc.new_stream(str(self._files[-1]), self._schema)
        self._written = 0

    def close(self) -> None:
        """Finish the files, and write what `datasets` wants to know of them."""
        if self._writer is None:
            self._open()  # a split without rows still is one
        self._writer.close()
        names = [f"data-{i:05d}-of-{len(self._files):05d}.arrow" for i in range(len(self._files))]
        for path, name in zip(self._files, names, strict=True):
            path.rename(self._folder / name)
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": self._folder.name,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info = {"citation": "", "description": "", "features": self._features, "homepage": "", "license": ""}
        (self._folder / STATE_FILE).write_text(json.dumps(state, indent=2), "utf-8")
        (self._folder / "dataset_info.json").write_text(json.dumps(info, indent=2), "utf-8")


def read_samples(folder: Path, writer: type[SplitWriter]) -> Iterator[Samples]:
    """Read the samples of a split that a writer has closed, in its batches."""
    import pyarrow as pa

    for path in sorted(folder.glob("*.arrow")):
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                lists = (batch.column(name) for name in writer.columns)
                yield writer.samples(
                    [(each.values.to_numpy(), np.diff(each.offsets.to_numpy()).astype(np.int64)) for each in lists]
                )


def finish(folder: Path, splits: Sequence[str]) -> None:
    """Make the splits in a folder one `datasets.DatasetDict`."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}), "utf-8")


Pair = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
SHOWN = 6
"""Most of the first samples of a split that are remembered for the report."""
_GATHERED = 5000  # samples brought into their order at a time


class Sides:
    """Writer of the splits of a data folder.

    Args:
        folder: The folder of the splits.
        drawn: Rows get their side in the end, by `deal`; else `add` is told.
        writer: What writes a split.
    """

    def __init__(self, folder: Path, *, drawn: bool, writer: type[SplitWriter] = SplitWriter) -> None:
        self._folder, self._writer = folder, writer
        self._writers = {} if drawn else {name: writer(folder / name) for name in SPLITS}
        self._aside = _Aside(folder) if drawn else None
        self.counts = {name: _Counts(writer) for name in SPLITS}

    def add(self, batch: Samples, rows: Sequence[int], sides: Sequence[str]) -> None:
        """Append samples; `rows` are ascending."""
        if self._aside:
            self._aside.add(batch, rows)
            return
        chosen = np.array(sides)
        for name in SPLITS:
            if len(index := np.flatnonzero(chosen == name)):
                part = batch.take(index)
                self._writers[name].add(part)
                self.counts[name].add(part)

    def deal(self, orders: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[np.int64]]:
        """Put the rows of each split into their order, and give the samples of each, by their number of arrival."""
        assert self._aside
        dealt = {}
        for name, order in orders.items():
            samples = self._aside.samples_of(order)
            writer = self._writers[name] = self._writer(self._folder / name)
            for start in range(0, len(samples), _GATHERED):
                part = self._aside.gather(samples[start : start + _GATHERED])
                writer.add(part)
                self.counts[name].add(part)
            dealt[name] = samples
        self._aside = None
        return dealt

    def divide(self, test: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[np.int64]]:
        """Divide the samples of the only split that has any.

        Args:
            test: (samples,) which of them are for testing.

        Returns:
            The samples of each split, by their number of arrival.
        """
        (whole,) = (name for name in SPLITS if self.counts[name].samples)
        for name in SPLITS:
            self._writers[name].close()
        aside = self._folder / ".undivided"
        (self._folder / whole).rename(aside)
        for name in SPLITS:
            shutil.rmtree(self._folder / name, ignore_errors=True)
            self._writers[name], self.counts[name] = self._writer(self._folder / name), _Counts(self._writer)
        first = 0
        for batch in read_samples(aside, self._writer):
            chosen = test[first : first + len(batch.lengths)]
            self.add(batch, (), np.where(chosen, "test", "train").tolist())
            first += len(batch.lengths)
        shutil.rmtree(aside)
        return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}

    def close(self) -> None:
        """Make it one `datasets.DatasetDict`."""
        for name in SPLITS:
            self._writers[name].close()
        finish(self._folder, SPLITS)


class _Aside:
    """Samples on disk without a place yet, while memory keeps 16 bytes of each; gone with the object.

    Read and not mapped, as every page that was ever looked at would count as memory of this process.
    """

    def __init__(self, folder: Path) -> None:
        self._ids, self._labels = (tempfile.TemporaryFile(dir=folder) for _ in range(2))  # noqa: SIM115 (they live as long as this)
        self._rows, self._ends = array("q"), array("q", [0])  # _ends: tokens up to and with each sample

    def add(self, batch: Samples, rows: Sequence[int]) -> None:
        """Put samples aside; `rows` are ascending."""
        self._ids.write(batch.input_ids.tobytes())
        self._labels.write(batch.labels.tobytes())
        self._rows.extend(rows)
        self._ends.frombytes((self._ends[-1] + np.cumsum(batch.lengths)).tobytes())

    def samples_of(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """All samples of some rows, in the order of the rows."""
        rows = np.frombuffer(self._rows, np.int64) if self._rows else np.zeros(0, np.int64)
        first = np.searchsorted(rows, order, "left")
        counts = np.searchsorted(rows, order, "right") - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(first, counts) + within

    def gather(self, samples: npt.NDArray[np.int64]) -> Samples:
        """Samples by their number of arrival."""
        ends = np.frombuffer(self._ends, np.int64)
        starts, lengths = ends[samples], ends[samples + 1] - ends[samples]
        places = list(zip((4 * lengths).tolist(), (4 * starts).tolist(), strict=True))
        ids, labels = (b"".join([os.pread(file, size, at) for size, at in places]) for file in self._descriptors())
        return Samples(np.frombuffer(ids, np.int32), np.frombuffer(labels, np.int32), lengths)

    def _descriptors(self) -> Iterator[int]:
        for file in (self._ids, self._labels):
            file.flush()
            yield file.fileno()


class _Counts:
    """What a split holds, and a few of its samples, so that nobody has to read it again."""

    def __init__(self, writer: type[SplitWriter]) -> None:
        self._sequences = writer.sequences
        self.samples = self.tokens = self.trained = self.longest = 0
        self.first: list[Pair] = []
        self.longest_sample: tuple[int, Pair] | None = None

    def add(self, batch: Samples) -> None:
        self._remember(batch)
        self.samples += len(batch.lengths)
        self.tokens += int(batch.lengths.sum())
        self.trained += int(trained_tokens(batch).sum())
        self.longest = max(self.longest, int(self._sequences(batch).max(initial=0)))

    def _remember(self, batch: Samples) -> None:
        wanted = range(min(SHOWN - len(self.first), len(batch.lengths)))
        self.first += [batch.sample(index) for index in wanted]
        sequences = self._sequences(batch)
        if sequences.max(initial=0) > self.longest:
            index = int(sequences.argmax())
            self.longest_sample = self.samples + index, batch.sample(index)

    def shown(self, wanted: int) -> dict[int, Pair]:
        """The first samples, and the longest one, by their numbers in the split."""
        assert wanted <= SHOWN
        return dict(enumerate(self.first[:wanted])) | dict([self.longest_sample] if self.longest_sample else [])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        names = ("rows", "tokens", "trained_tokens", "longest")
        return zip(names, (self.samples, self.tokens, self.trained, self.longest), strict=True)


def trained_tokens(batch: Samples) -> npt.NDArray[np.int64]:
    """Count the labels with a loss of each sample: (samples,). The first token of a sample is never predicted."""
    starts = np.cumsum(batch.lengths) - batch.lengths
    trained = (batch.labels != IGNORE_INDEX).astype(np.int64)
    trained[starts] = 0
    return np.add.reduceat(trained, starts) if len(starts) else np.zeros(0, np.int64)
