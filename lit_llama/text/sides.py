"""Samples on their way into train and test: written as they come, or dealt at the end where sides are drawn."""

import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lit_llama.text.arrow import Samples, SplitWriter, finish, read_samples
from lit_llama.text.dataset import SPLITS
from lit_llama.text.message import IGNORE_INDEX

Pair = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
SHOWN = 6
"""Most of the first samples of a split that are remembered for the report."""
_GATHERED = 5000  # samples brought into their order at a time


class Sides:
    """Writes the splits of a data folder.

    Args:
        folder: The folder of the splits.
        drawn: Rows get their side in the end, by `deal`; else `add` is told.
    """

    def __init__(self, folder: Path, *, drawn: bool) -> None:
        self._folder = folder
        self._writers = {} if drawn else {name: SplitWriter(folder / name) for name in SPLITS}
        self._aside = _Aside(folder) if drawn else None
        self.counts = {name: _Counts() for name in SPLITS}

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
            writer = self._writers[name] = SplitWriter(self._folder / name)
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
            self._writers[name], self.counts[name] = SplitWriter(self._folder / name), _Counts()
        first = 0
        for batch in read_samples(aside):
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

    def __init__(self) -> None:
        self.samples = self.tokens = self.trained = self.longest = 0
        self.first: list[Pair] = []
        self.longest_sample: tuple[int, Pair] | None = None

    def add(self, batch: Samples) -> None:
        self._remember(batch)
        self.samples += len(batch.lengths)
        self.tokens += int(batch.lengths.sum())
        self.trained += int(trained_tokens(batch).sum())
        self.longest = max(self.longest, int(batch.lengths.max(initial=0)))

    def _remember(self, batch: Samples) -> None:
        wanted = range(min(SHOWN - len(self.first), len(batch.lengths)))
        self.first += [batch.sample(index) for index in wanted]
        if batch.lengths.max(initial=0) > self.longest:
            index = int(batch.lengths.argmax())
            self.longest_sample = self.samples + index, batch.sample(index)

    def shown(self, wanted: int) -> dict[int, Pair]:
        """The first samples, and the longest one, by their numbers in the split."""
        assert wanted <= SHOWN
        return dict(enumerate(self.first[:wanted])) | dict([self.longest_sample] if self.longest_sample else [])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        names = ("rows", "tokens", "trained_tokens", "longest")
        return zip(names, (self.samples, self.tokens, self.trained, self.longest), strict=True)


def trained_tokens(batch: Samples) -> npt.NDArray[np.int64]:
    """Labels with a loss of each sample: (samples,). The first token of a sample is never predicted."""
    starts = np.cumsum(batch.lengths) - batch.lengths
    trained = (batch.labels != IGNORE_INDEX).astype(np.int64)
    trained[starts] = 0
    return np.add.reduceat(trained, starts) if len(starts) else np.zeros(0, np.int64)
