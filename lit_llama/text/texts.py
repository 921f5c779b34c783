"""The words of rows, put aside on disk while memory keeps 8 bytes of each."""

import json
import tempfile
from array import array
from collections.abc import Iterator
from typing import Any


class Texts:
    """Values by number, in the order in which they were added; gone with the object."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this)
        self._starts = array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, value: Any) -> None:
        """Put something aside that JSON can hold."""
        self._starts.append(self._file.seek(0, 2))
        self._file.write(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def __getitem__(self, number: int) -> Any:
        self._file.seek(self._starts[number])
        return json.loads(self._file.readline().decode("utf-8", "surrogatepass"))

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            yield self[number]
