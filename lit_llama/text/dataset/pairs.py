"""Preference data: for each prompt an answer that is chosen and one that is rejected, zero-copy out of a data folder.

Columns `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of int32; answers end with their end token. Where the data
has single answers that are good or bad (`"pairs": false` in meta.json), one of the two is empty.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError
from lit_llama.text.dataset.folder import Column, Ids

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairSplit:
    """Rows of one split of a preference data folder.

    Args:
        folder: The data folder.
        name: Of the split.
        empty: It may be without rows.

    Attributes:
        lengths: (rows, 3) tokens of the prompt, the chosen and the rejected answer of each row.
    """

    def __init__(self, folder: Path, name: str, *, empty: bool = False) -> None:
        import datasets

        try:
            table = datasets.load_from_disk(str(folder / name)).data
            table.validate(full=True)  # Arrow believes the offsets of a file
            self._columns = [Column(table.column(column)) for column in COLUMNS]
            self.lengths: npt.NDArray[np.int64] = np.stack([column.lengths for column in self._columns], 1)
        except Exception as error:  # whatever the library comes across in damaged files
            raise DataError(f"{folder / name} cannot be read: {error}; prepare the data again") from error
        if not (len(self) or empty):
            raise DataError(f"{folder / name}: expected rows with {', '.join(COLUMNS)}; prepare the data again")
        if len(bad := np.flatnonzero((self.lengths[:, 0] == 0) | (self.lengths[:, 1:].max(1, initial=0) == 0))):
            raise DataError(
                f"{folder / name}: row {bad[0]} has no prompt or no answer, expected at least a token of each; prepare "
                "the data again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[Ids, Ids, Ids]:
        prompt, chosen, rejected = (column[row] for column in self._columns)
        return prompt, chosen, rejected

    def stranger(self, vocab_size: int) -> int | None:
        """An id that is none of so many tokens, if there is one."""
        for column in self._columns:
            for values in column.values():
                bad = (values >= vocab_size) | (values < 0)
                if bad.any():
                    return int(values[bad.argmax()])
        return None
