"""The rows that all contenders train on: token ids, labels, and which rows each optimizer step takes.

Rows of preferences have a prompt, a chosen and a rejected answer instead of ids and labels. Reading needs numpy alone,
so that it works in every environment. Run as a program, it dumps prepared folders:

python -m benchmarks.training.rows DATA_DIR HELD_OUT_DIR FILE.npz STEPS BATCH_SIZE SEED
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100
Ids = npt.NDArray[np.int32]
Sample = tuple[Ids, ...]
COLUMNS = {2: ("ids", "labels"), 3: ("prompt", "chosen", "rejected")}


@dataclass(frozen=True)
class Rows:
    """Samples and their order.

    Attributes:
        train: Pairs of input_ids and labels, which are unshifted; or prompt, chosen and rejected ids.
        held_out: More of them, never trained on.
        steps: Rows of `train` for each optimizer step.
    """

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    steps: Sequence[Sequence[int]]

    def trained_tokens(self, step: int) -> int:
        """Labels with a loss, the first token of a sample never being predicted; or tokens of both answers."""
        return sum(_trained_tokens(self.train[row]) for row in self.steps[step])

    def tokens(self, step: int) -> int:
        """All tokens of the samples of a step, no padding; a prompt counts with each of its answers."""
        return sum(_tokens(self.train[row]) for row in self.steps[step])

    def ordered(self, steps: int, *, by_length: bool) -> list[Sample]:
        """The samples of the first steps, one step after the other.

        Args:
            steps: How many.
            by_length: Longest first inside each step, which leaves the gradient as it is and saves padding.
        """
        order = [
            sorted(rows, key=lambda row: -_longest(self.train[row])) if by_length else rows
            for rows in self.steps[:steps]
        ]
        return [self.train[row] for rows in order for row in rows]


def _trained_tokens(sample: Sample) -> int:
    if len(sample) == 2:
        return int((sample[1][1:] != IGNORE_INDEX).sum())
    return len(sample[1]) + len(sample[2])


def _tokens(sample: Sample) -> int:
    return len(sample[0]) if len(sample) == 2 else 2 * len(sample[0]) + len(sample[1]) + len(sample[2])


def _longest(sample: Sample) -> int:
    """Tokens to which a sample alone would be padded."""
    return len(sample[0]) if len(sample) == 2 else len(sample[0]) + max(len(sample[1]), len(sample[2]))


def save_rows(rows: Rows, path: Path) -> None:
    """Write a .npz file."""
    arrays: dict[str, Any] = {"steps": np.array(rows.steps, np.int64)}
    for name, samples in (("train", rows.train), ("held_out", rows.held_out)):
        for column, parts in zip(COLUMNS[len(samples[0])], zip(*samples, strict=True), strict=True):
            arrays[f"{name}_{column}_lengths"] = np.array([len(part) for part in parts], np.int64)
            arrays[f"{name}_{column}"] = np.concatenate(parts)
    np.savez(path, **arrays)


def load_rows(path: str | Path) -> Rows:
    """Read what `save_rows` wrote."""
    with np.load(path) as arrays:

        def parts(name: str) -> list[Ids]:
            return np.split(arrays[name], np.cumsum(arrays[f"{name}_lengths"])[:-1])

        def samples(name: str) -> list[Sample]:
            columns = next(names for names in COLUMNS.values() if f"{name}_{names[0]}" in arrays)
            return list(zip(*(parts(f"{name}_{column}") for column in columns), strict=True))

        return Rows(samples("train"), samples("held_out"), arrays["steps"].tolist())


def dump(data_dir: Path, held_out_dir: Path, path: Path, *, steps: int, batch_size: int, seed: int) -> None:
    """Take the training splits of two data folders, and the order in which finetune/ takes the first's rows."""
    from lit_llama.text.dataset.batches import epoch_order
    from lit_llama.text.dataset.folder import Split
    from lit_llama.text.dataset.pairs import PairSplit

    meta = json.loads((data_dir / "meta.json").read_text("utf-8"))
    kind = PairSplit if meta.get("kind") == "preference" else Split
    train, held_out = (kind(folder, "train") for folder in (data_dir, held_out_dir))
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
