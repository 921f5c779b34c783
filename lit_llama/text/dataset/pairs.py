"""Preferences in a data folder: a prompt and the chosen and the rejected answer to it, each encoded as for training.

A folder of preferences is a saved `datasets.DatasetDict` with the columns `prompt_ids`, `chosen_ids` and
`rejected_ids`, lists of int32, beside a meta.json with "kind": "preference". The prompt with one of its answers has the
ids of the supervised sample. Where "pairs" is false, one answer of each row is known, and the other is empty.
"""

from pathlib import Path

import numpy as np

from lit_llama.errors import DataError
from lit_llama.text.dataset.batches import Ids
from lit_llama.text.dataset.folder import columns_of
from lit_llama.text.message import IGNORE_INDEX

CHOSEN, REJECTED = 1, 2
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
NAMES = {CHOSEN: "chosen", REJECTED: "rejected"}


def one_answer(ids: Ids, parts: Ids) -> tuple[Ids, Ids]:
    """Return the prompt with its chosen answer, or with the rejected one where no other is known, as ids and labels."""
    answer = CHOSEN if (parts == CHOSEN).any() else REJECTED
    inside = (parts == IGNORE_INDEX) | (parts == answer)
    return ids[inside], np.where(parts == answer, ids, np.int32(IGNORE_INDEX))[inside]


class PairSplit:
    """Preferences of one split, zero-copy from the mapped Arrow file.

    Args:
        folder: The data folder.
        name: Of the split.
        empty: It may be without rows.

    Attributes:
        prompt_lengths: (rows,) tokens of each prompt.
        chosen_lengths: (rows,) tokens of each chosen answer, 0 where none is known.
        rejected_lengths: (rows,) the same of the rejected ones.
    """

    def __init__(self, folder: Path, name: str, *, empty: bool = False) -> None:
        self._columns = columns_of(folder / name, COLUMNS)
        self.prompt_lengths, self.chosen_lengths, self.rejected_lengths = (each.lengths for each in self._columns)
        prompts, answers = self.prompt_lengths, self.chosen_lengths + self.rejected_lengths
        if not (len(self) or empty) or not (prompts > 0).all() or not (answers > 0).all():
            raise DataError(f"{folder / name}: expected rows with a prompt and an answer; prepare the data again")

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> tuple[Ids, Ids, Ids]:
        """Ids of the prompt, of the chosen and of the rejected answer."""
        prompt, chosen, rejected = (column[row] for column in self._columns)
        return prompt, chosen, rejected

    def answers(self, row: int) -> list[tuple[str, Ids, Ids]]:
        """Name, ids and labels of the supervised sample of each answer that is known."""
        prompt, *both = self[row]
        masked = np.full(len(prompt), IGNORE_INDEX, np.int32)
        return [
            (name, np.concatenate([prompt, answer]), np.concatenate([masked, answer]))
            for name, answer in zip(NAMES.values(), both, strict=True)
            if len(answer)
        ]

    def stranger(self, vocab_size: int) -> int | None:
        """Find an id that is none of so many tokens, if there is one."""
        for column in self._columns:
            for values in column.values():
                bad = (values >= vocab_size) | (values < 0)
                if bad.any():
                    return int(values[bad.argmax()])
        return None
