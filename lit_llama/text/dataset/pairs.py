"""Preference data: for each prompt an answer that is chosen and one that is rejected, zero-copy out of a data folder.

Columns `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of int32; answers end with their end token. Where the data
has single answers that are good or bad (`"pairs": false` in meta.json), one of the two is empty.
"""

from pathlib import Path

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
        prompt_lengths: (rows,) tokens of each prompt.
        chosen_lengths: (rows,) tokens of each chosen answer, 0 where none is known.
        rejected_lengths: (rows,) the same of the rejected ones.
    """

    def __init__(self, folder: Path, name: str, *, empty: bool = False) -> None:
        import datasets

        try:
            table = datasets.load_from_disk(str(folder / name)).data
            table.validate(full=True)  # Arrow believes the offsets of a file
            self._columns = [Column(table.column(column)) for column in COLUMNS]
        except Exception as error:  # whatever the library comes across in damaged files
            raise DataError(f"{folder / name} cannot be read: {error}; prepare the data again") from error
        self.prompt_lengths, self.chosen_lengths, self.rejected_lengths = (each.lengths for each in self._columns)
        prompts, answers = self.prompt_lengths, self.chosen_lengths + self.rejected_lengths
        if not (len(self) or empty) or not (prompts > 0).all() or not (answers > 0).all():
            raise DataError(f"{folder / name}: expected rows with a prompt and an answer; prepare the data again")

    def __len__(self) -> int:
        return len(self.prompt_lengths)

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
