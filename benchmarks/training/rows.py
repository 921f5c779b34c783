"""The rows that all contenders train on: token ids, labels, and which rows each optimizer step takes.

Reading needs numpy alone, so that it works in every environment. Run as a program, it dumps prepared folders:

python -m benchmarks.training.rows DATA_DIR HELD_OUT_DIR FILE.npz STEPS BATCH_SIZE SEED
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """Samples and their order.

    Attributes:
        train: Pairs of input_ids and labels; labels are unshifted.
        held_out: The same, never trained on.
        steps: Rows of `train` for each optimizer step.
    """

    train: Sequence[tuple[Ids, Ids]]
    held_out: Sequence[tuple[Ids, Ids]]
    steps: Sequence[Sequence[int]]

    def trained_tokens(self, step: int) -> int:
        """Labels with a loss; the first token of a sample is never predicted."""
        return sum(int((self.train[row][1][1:] != IGNORE_INDEX).sum()) for row in self.steps[step])

    def tokens(self, step: int) -> int:
        """All tokens of the samples of a step, no padding."""
        return sum(len(self.train[row][0]) for row in self.steps[step])

    def ordered(self, steps: int, *, by_length: bool) -> list[tuple[Ids, Ids]]:
        """The samples of the first steps, one step after the other.

        Args:
            steps: How many.
            by_length: Longest first inside each step, which leaves the gradient as it is and saves padding.
        """
        order = [
            sorted(rows, key=lambda row: -len(self.train[row][0])) if by_length else rows for rows in self.steps[:steps]
        ]
        return [self.train[row] for rows in order for row in rows]


def save_rows(rows: Rows, path: Path) -> None:
    """Write a .npz file."""
    arrays: dict[str, Any] = {"steps": np.array(rows.steps, np.int64)}
    for name, samples in (("train", rows.train), ("held_out", rows.held_out)):
        arrays[f"{name}_lengths"] = np.array([len(ids) for ids, _ in samples], np.int64)
        arrays[f"{name}_ids"] = np.concatenate([ids for ids, _ in samples])
        arrays[f"{name}_labels"] = np.concatenate([labels for _, labels in samples])
    np.savez(path, **arrays)


def load_rows(path: str | Path) -> Rows:
    """Read what `save_rows` wrote."""
    with np.load(path) as arrays:

        def samples(name: str) -> list[tuple[Ids, Ids]]:
            ends = np.cumsum(arrays[f"{name}_lengths"])[:-1]
            columns = (np.split(arrays[f"{name}_{column}"], ends) for column in ("ids", "labels"))
            return list(zip(*columns, strict=True))

        return Rows(samples("train"), samples("held_out"), arrays["steps"].tolist())


def dump(data_dir: Path, held_out_dir: Path, path: Path, *, steps: int, batch_size: int, seed: int) -> None:
    """Take the training splits of two data folders, and the order in which finetune/lora.py takes the first's rows."""
    from lit_llama.text.dataset.folder import Split, epoch_order

    train, held_out = (Split(folder, "train") for folder in (data_dir, held_out_dir))
    order: list[list[int]] = []
    epoch = 0
    while len(order) < steps:
        rows = epoch_order(len(train), seed, epoch).tolist()
        whole = len(rows) // batch_size * batch_size
        if whole < len(rows) and len(order) + whole // batch_size < steps:
            raise ValueError(f"{data_dir}: {len(rows)} rows are no multiple of the batch size {batch_size}")
        order += [rows[at : at + batch_size] for at in range(0, whole, batch_size)]
        epoch += 1
    save_rows(
        Rows([train[row] for row in range(len(train))], [held_out[row] for row in range(len(held_out))], order[:steps]),
        path,
    )


if __name__ == "__main__":
    data, held, file = map(Path, sys.argv[1:4])
    count, size, start = map(int, sys.argv[4:])
    dump(data, held, file, steps=count, batch_size=size, seed=start)
