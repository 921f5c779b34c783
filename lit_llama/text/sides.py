"""Samples on their way into train and test: written as they come, or dealt at the end where sides are drawn."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lit_llama.text.arrow import Samples, SplitWriter, finish
from lit_llama.text.dataset import SPLITS, Split
from lit_llama.text.encode import IGNORE_INDEX

SplitRule = Literal["hash", "shuffle", "given"]
_GATHERED = 5000  # samples brought into their order at a time


class Sides:
    """Writes the splits of a data folder.

    Args:
        folder: The folder of the splits.
        drawn: Rows get their side in the end, by `deal`; else `add` is told.
    """

    def __init__(self, folder: Path, *, drawn: bool) -> None:
        self._folder, self._drawn = folder, drawn
        names = ("all",) if drawn else SPLITS
        self._writers = {name: SplitWriter(folder / name) for name in names}
        self._rows: list[npt.NDArray[np.int64]] = []  # of each sample, where sides are drawn
        self.counts = {name: _Counts() for name in SPLITS}

    def add(self, batch: Samples, rows: Sequence[int], sides: Sequence[str]) -> None:
        """Append samples; `rows` are ascending."""
        if self._drawn:
            self._writers["all"].add(batch)
            self._rows.append(np.array(rows, np.int64))
            return
        chosen = np.array(sides)
        for name in SPLITS:
            if len(index := np.flatnonzero(chosen == name)):
                part = batch.take(index)
                self._writers[name].add(part)
                self.counts[name].add(part)

    def deal(self, orders: Mapping[str, Sequence[int]]) -> dict[str, npt.NDArray[np.int64]]:
        """Put the rows of each split into their order, and give the samples of each, by their number of arrival."""
        self._writers.pop("all").close()
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, np.int64)
        whole = Split(self._folder, "all") if len(rows) else None
        dealt = {}
        for name, order in orders.items():
            first = np.searchsorted(rows, order, "left")
            counts = np.searchsorted(rows, order, "right") - first
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            samples = np.repeat(first, counts) + within
            writer = SplitWriter(self._folder / name)
            for start in range(0, len(samples), _GATHERED):
                assert whole is not None
                part = _gather(whole, samples[start : start + _GATHERED])
                writer.add(part)
                self.counts[name].add(part)
            self._writers[name] = writer
            dealt[name] = samples
        for path in (self._folder / "all").iterdir():
            path.unlink()
        (self._folder / "all").rmdir()
        return dealt

    def close(self) -> None:
        """Make it one `datasets.DatasetDict`."""
        for name in SPLITS:
            self._writers[name].close()
        finish(self._folder, SPLITS)


class _Counts:
    """What a split holds."""

    def __init__(self) -> None:
        self.samples = self.tokens = self.trained = self.longest = 0

    def add(self, batch: Samples) -> None:
        self.samples += len(batch.lengths)
        self.tokens += int(batch.lengths.sum())
        self.trained += int(trained_tokens(batch).sum())
        self.longest = max(self.longest, int(batch.lengths.max(initial=0)))

    def __iter__(self) -> Iterator[tuple[str, int]]:
        names = ("rows", "tokens", "trained_tokens", "longest")
        return zip(names, (self.samples, self.tokens, self.trained, self.longest), strict=True)


def trained_tokens(batch: Samples) -> npt.NDArray[np.int64]:
    """Labels with a loss of each sample: (samples,). The first token of a sample is never predicted."""
    starts = np.cumsum(batch.lengths) - batch.lengths
    trained = (batch.labels != IGNORE_INDEX).astype(np.int64)
    trained[starts] = 0
    return np.add.reduceat(trained, starts) if len(starts) else np.zeros(0, np.int64)


def _gather(split: Split, samples: npt.NDArray[np.int64]) -> Samples:
    pairs: list[Any] = [split[int(sample)] for sample in samples]
    ids, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return Samples(ids, labels, np.array([len(pair[0]) for pair in pairs], np.int64))
