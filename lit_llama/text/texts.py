"""The words of rows, put aside on disk while memory keeps 8 bytes of each."""

import marshal
import tempfile
from array import array
from pathlib import Path
from typing import Any


class Texts:
    """Values by number, in the order in which they were added; gone with the object.

    Args:
        folder: Whose disk holds them.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        self._starts = array("q")
        self._end = 0
        self._at_end = True

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, value: Any) -> None:
        """Put something aside: texts, numbers, lists and objects."""
        if not self._at_end:
            self._file.seek(self._end)
            self._at_end = True
        self._starts.append(self._end)
        self._end += self._file.write(marshal.dumps(value))  # quick, and nobody else ever reads the file

    def __getitem__(self, number: int) -> Any:
        self._at_end = False
        self._file.seek(self._starts[number])
        return marshal.load(self._file)
