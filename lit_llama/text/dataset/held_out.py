"""The test rows of other data, found again by what they open with, whatever style, tokenizer or limit made them."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.text.dataset.folder import META_FILE, TEST_FILE, TEST_KEYS_FILE, read_meta
from lit_llama.text.dataset.split import normalised
from lit_llama.text.message import Conversation, Message
from lit_llama.text.read.reading import Reader
from lit_llama.wording import param

_NAMED = 3  # questions that are missing, spelled in an error


def opening(messages: Sequence[Message]) -> str:
    """Return the opening of a row: its first question and the input of that, or its text."""
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return first["content"] + first.get("input", "")


def opening_key(opened: str) -> str:
    """Return 16 hex digits, the same for openings that differ in case, white space or Unicode form only."""
    return hashlib.blake2b(normalised(opened).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class HeldOut:
    """Rows for testing, by what they open with.

    Args:
        path: The data folder or the file that says so.
        places: Key of each opening, and where it stands.

    Attributes:
        rows: Rows found so far that are for testing.
        lost: Those of them that came to no sample.
    """

    def __init__(self, path: str, places: dict[str, str]) -> None:
        self.path = path
        self.rows = self.lost = 0
        self._places = places
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(self._places)

    def identity(self) -> str:
        """Hash what is for testing."""
        return hashlib.sha256("".join(sorted(self._places)).encode()).hexdigest()

    def meta(self) -> dict[str, Any]:
        """Return the record in meta.json, when all rows have been seen."""
        return {"path": self.path, "questions": len(self), "rows": self.rows, "dropped": self.lost}

    def side(self, conversation: Conversation) -> str:
        """Train or test."""
        key = opening_key(opening(conversation.messages))
        if key not in self._places:
            return "train"
        self.rows += 1
        self._seen.add(key)
        return "test"

    def check(self) -> None:
        """Raise DataError if an opening was no row's: the test split would be another one than asked for."""
        missing = [place for key, place in self._places.items() if key not in self._seen]
        if missing:
            named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            raise DataError(
                f"{param('split_from', self.path)}: {len(missing)} of its {len(self)} test questions are in no row of "
                "the "
                f"sources ({named}); name the sources that they came from, or a file of those rows that are here"
            )


def read_held_out(path: Path, read: Callable[[str], Reader]) -> HeldOut:
    """Read the test rows of a data folder, or of files with rows for testing.

    Args:
        path: The folder, or what `read` reads.
        read: Gives the rows of files.

    Raises:
        DataError: There is no such folder or file, or it holds no rows.
    """
    places: dict[str, str] = {}
    if (path / META_FILE).is_file() or (path / TEST_KEYS_FILE).is_file():
        read_meta(path, kind=None)  # whole, and of this format
        if not (path / TEST_KEYS_FILE).is_file():
            raise DataError(
                f"lacks {TEST_KEYS_FILE}: prepare it again, or name its {TEST_FILE}", parameter="split_from", value=path
            )
        for number, key in enumerate((path / TEST_KEYS_FILE).read_text("ascii").split(), 1):
            places.setdefault(key, f"{path / TEST_FILE}:line {number}")
    else:
        for row in read(str(path)):
            if isinstance(row, Conversation):
                places.setdefault(opening_key(opening(row.messages)), row.where)
    if not places:
        raise DataError("holds no rows for testing", parameter="split_from", value=path)
    return HeldOut(str(path), places)
