"""Writing the splits of a data folder as `datasets.DatasetDict.save_to_disk` does, batch after batch.

Memory holds one batch, however many rows there are, and the same rows give the same bytes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
        """Some of the samples, in another order."""
        ends = np.cumsum(self.lengths)
        index = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[index]
        # Place of every token: where its sample begins, and its number in it.
        begins = np.repeat(ends[index] - lengths, lengths)
        places = begins + np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Samples(self.input_ids[places], self.labels[places], lengths)

    def sample(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """A copy of the ids and the labels of one sample."""
        end = int(self.lengths[: row + 1].sum())
        inside = slice(end - int(self.lengths[row]), end)
        return self.input_ids[inside].copy(), self.labels[inside].copy()


class SplitWriter:
    """One split of a data folder.

    Args:
        folder: The folder of the split, such as data/alpaca/train.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._folder = folder
        folder.mkdir(parents=True)
        feature = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
        self._features = dict.fromkeys(COLUMNS, feature)
        metadata = {"huggingface": json.dumps({"info": {"features": self._features}})}
        self._schema = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS], metadata)
        self._files: list[Path] = []
        self._writer: Any = None
        self._written = 0

    def add(self, batch: Samples) -> None:
        """Append samples."""
        import pyarrow as pa

        if not len(batch.lengths):
            return
        if self._writer is None or self._written > MAX_FILE_SIZE:
            self._open()
        offsets = np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32)
        columns = [pa.ListArray.from_arrays(offsets, values) for values in (batch.input_ids, batch.labels)]
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
        (self._folder / "state.json").write_text(json.dumps(state, indent=2), "utf-8")
        (self._folder / "dataset_info.json").write_text(json.dumps(info, indent=2), "utf-8")


def read_samples(folder: Path) -> Iterator[Samples]:
    """The samples of a split that a SplitWriter has closed, in its batches."""
    import pyarrow as pa

    for path in sorted(folder.glob("*.arrow")):
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                ids, labels = (batch.column(name) for name in COLUMNS)
                lengths = np.diff(ids.offsets.to_numpy()).astype(np.int64)
                yield Samples(ids.values.to_numpy(), labels.values.to_numpy(), lengths)


def finish(folder: Path, splits: Sequence[str]) -> None:
    """Make the splits in a folder one `datasets.DatasetDict`."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}), "utf-8")
