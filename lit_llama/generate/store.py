"""Rows that are made one after another and kept as they come, so that a killed process goes on where it stopped."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.folder.lock import reserve
from lit_llama.folder.place import full_disk_explained, open_own, real
from lit_llama.generate.engine.request import Sampling
from lit_llama.progress import stderr

Key = tuple[Any, ...]
Row = dict[str, Any]
_BEGINNING = b'{"header": '


class RowStore:
    """A file of JSON lines: a header that says what the rows are made of, and the rows, appended as they come.

    A line that was torn by a kill is taken away when the file is opened again. Whoever opens it holds a lock on its
    folder.

    Args:
        path: The file; made if it is not there.
        header: What decides the rows.
        key: Fields that tell one row from all others.
        anew: Begin again if the file holds rows of another header.

    Attributes:
        rows: All that are there, by key.
        begun_anew: Whether rows of another header were there.

    Raises:
        UserError: The file is of another header, and names the differences; or it is no such file.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], key: tuple[str, ...], *, anew: bool = False) -> None:
        self.path, self._key = path, key
        self._header = json.loads(json.dumps(header))  # as it is read
        self.rows: dict[Key, Row] = {}
        self.begun_anew = False
        self._file = os.fdopen(open_own(path, os.O_RDWR | os.O_CREAT), "r+b")
        try:
            self._read(anew)
        except BaseException:
            self._file.close()
            raise

    def _read(self, anew: bool) -> None:
        content = self._file.read()
        lines = content.split(b"\n")[:-1]
        found = _value(lines[0]) if lines else None
        if not content.startswith(_BEGINNING[: len(content)]) or (lines and not isinstance(found, dict)):
            raise UserError(f"{self.path} is no file of an evaluation: move it away; nothing was touched")
        if found and found["header"] != self._header and not anew:
            told = "; ".join(_differences(found["header"], self._header))
            raise UserError(
                f"{self.path} holds rows that were made otherwise: {told}; name another folder, or begin anew"
            )
        if not found or found["header"] != self._header:
            self.begun_anew = found is not None
            lines = [_line({"header": self._header})]
            self._write(0, lines[0] + b"\n")
        whole = len(lines[0]) + 1
        for line in lines[1:]:
            row = _value(line)
            if not isinstance(row, dict) or not set(self._key) <= row.keys():
                break  # what a disk that failed left behind it
            try:
                self.rows[self._key_of(row)] = row
            except TypeError:  # a list or an object in place of a number
                break
            whole += len(line) + 1
        if whole < len(content) - len(content.rpartition(b"\n")[2]):
            self._set_aside(content)
        self._file.truncate(whole)
        self._file.seek(whole)

    def _set_aside(self, content: bytes) -> None:
        """Keep what stood there under another name, and say so: the rows from the damaged one on are made again."""
        from lit_llama.folder.publish import replace_file

        damaged = self.path.with_name(f"{self.path.name}.damaged")
        replace_file(damaged, content)
        stderr().print(f"{self.path} is damaged: set aside as {damaged.name}, what is missing is made again")

    def add(self, row: Row) -> None:
        """Append a row; a kill after it does not lose it.

        Raises:
            ResourceError: The disk is full.
        """
        with full_disk_explained(self.path, self.path):
            self._file.write(_line(row) + b"\n")
            self._file.flush()
        self.rows[self._key_of(row)] = row

    def sort(self, order: Iterable[Key]) -> None:
        """Write the rows in an order that does not depend on how they came, each key once."""
        rows = [self.rows[key] for key in order if key in self.rows]
        wanted = b"".join(_line(row) + b"\n" for row in [{"header": self._header}, *rows])
        self._file.seek(0)
        if self._file.read() != wanted:
            self._replace(wanted)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def _replace(self, content: bytes) -> None:
        """Put the same rows in place of the file at once, as a kill may come here, too."""
        from lit_llama.folder.publish import replace_file

        replace_file(self.path, content)
        self._file.close()
        self._file = os.fdopen(open_own(self.path, os.O_RDWR), "r+b")
        self._file.seek(0, os.SEEK_END)

    def _write(self, place: int, content: bytes) -> None:
        with full_disk_explained(self.path, self.path):
            self._file.seek(place)
            self._file.truncate()
            self._file.write(content)
            self._file.flush()

    def _key_of(self, row: Row) -> Key:
        return tuple(row[name] for name in self._key)


def described(sampling: Sampling) -> dict[str, Any]:
    """Return a sampling as a header has it."""
    found = asdict(sampling) | {"logit_bias": dict(sampling.logit_bias), "stop": list(sampling.stop)}
    return found | {name: sorted(found[name]) for name in ("banned_ids", "stop_ids")}


@contextlib.contextmanager
def open_rows(path: Path, header: Mapping[str, Any], key: tuple[str, ...], *, anew: bool = False) -> Iterator[RowStore]:
    """Open a `RowStore` that is closed at the end."""
    store = RowStore(path, header, key, anew=anew)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def unfinished(output: Path, header: Mapping[str, Any], key: tuple[str, ...]) -> Iterator[RowStore]:
    """Yield rows on their way to a file: those that a killed process left there, and new ones. They go when the body
    ends.

    Args:
        output: The file that the body writes.
        header: What decides the rows; of another header, they are begun anew.
        key: As of `RowStore`.

    Raises:
        LockedError: Another process is at work on the same file.
        UserError: Something foreign has the name of what is unfinished.
    """
    place = real(output)
    path = place.with_name(f".{place.name}.unfinished")
    with reserve(output):
        with open_rows(path, header, key, anew=True) as store:
            yield store
        path.unlink()


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None


def _differences(there: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """What differs between two headers, by its path."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*wanted, *there]):
            yield from _differences(there.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif there != wanted:
        yield f"{name} was {_short(there)}, is {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
