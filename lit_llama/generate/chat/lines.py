"""Files of conversations: lines -> a dialogue, as far as they can be read; what cannot be read is named.

Their folder has a lock; lines are added behind a file, and files are there whole or not at all.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, LockedError, ResourceError, UserError
from lit_llama.folder.place import aside, full_disk_explained, is_full, open_own
from lit_llama.generate.chat.dialogue import FORMAT, Dialogue, Record, fitting_parent

_WAIT = 10.0
"""Seconds to wait for another process, which holds the lock for milliseconds."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel takes back from a process that dies.

    Raises:
        LockedError: Another process does not let it go.
    """
    descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        end = time.monotonic() + _WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise LockedError(f"another process holds {path}; wait until it has ended") from None
                time.sleep(0.005)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP):  # a disk without locks
                    raise
                break
        yield
    finally:
        os.close(descriptor)


def append(path: Path, data: bytes, *, wait: bool = True) -> os.stat_result:
    """Write behind a file in one piece, or leave it as it was."""
    descriptor = open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(descriptor).st_size
        try:
            with full_disk_explained(path, path):
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                if wait:
                    os.fsync(descriptor)
        except (OSError, ResourceError) as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            if isinstance(error, OSError) and not is_full(error):
                raise ResourceError(
                    f"{path} cannot be written: {error.strerror}; what was kept before is there"
                ) from error
            raise
        if not size:
            os.fchmod(descriptor, 0o600)
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, and that nobody else reads.

    It outlives a machine that stops once its folder is on the disk, too, see `place.sync`.
    """
    with aside(path) as part:
        part.write_bytes(data)
        part.chmod(0o600)


def default_folder() -> Path:
    """Return the place of a user's data, by the XDG base directory specification or as macOS has it."""
    if home := os.environ.get("XDG_DATA_HOME"):
        return Path(home) / "lit_llama" / "conversations"
    import sys

    share = "Library/Application Support" if sys.platform == "darwin" else ".local/share"
    return Path.home() / share / "lit_llama" / "conversations"


class NoConversation(UserError):
    """Absence of a conversation of this id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A conversation in a list.

    Attributes:
        id: Its name on the disk.
        name: As people call it.
        changed: When it changed last, in seconds since 1970.
        messages: How many the branch in use has.
        model: Name of the model that was set, "" for none.
    """

    id: str
    name: str
    changed: float
    messages: int
    model: str


_TOO_DEEP = "is nested too deeply"


@dataclass
class Reading:
    """Records and faults that were found in a file.

    Attributes:
        dialogue: The sum of the records that fit.
        lost: Number of each line that cannot be read, its bytes, and why.
        moved: Messages whose own parent was lost.
        unended: The last line has no end, so that nothing may be written behind it.
    """

    dialogue: Dialogue
    lost: list[tuple[int, bytes, str]] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    unended: bool = False

    @property
    def damaged(self) -> bool:
        """Whether the file has to be written anew."""
        return bool(self.lost or self.moved or self.unended)

    def add(self, number: int, line: bytes) -> None:
        """Go on by a line."""
        try:
            record = parse(line)
            try:
                self.dialogue.apply(record)
            except ValueError:
                if not self._moves(record):
                    raise
        except ValueError as error:
            self.lost.append((number, line, str(error)))

    def _moves(self, record: Record) -> bool:
        """Whether a message fits behind another one, as its parent is lost."""
        parent = record.get("parent")
        if record.get("type") != "message" or parent in self.dialogue.nodes or not self.lost:
            return False
        self.dialogue.apply({**record, "parent": fitting_parent(self.dialogue, record)})
        self.moved.append(record["id"])
        return True


def parse(line: bytes) -> Record:
    """Parse a line into a record.

    Raises:
        ValueError: It is none.
    """
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    return record


def _no_number(name: str) -> Any:
    raise ValueError(f"holds {name}, which is no number of JSON")


def encode(record: Record) -> bytes:
    """Encode a record as a line; lone surrogates are written as escapes, which UTF-8 has no bytes for."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record, allow_nan=False) + "\n").encode()


def split(data: bytes) -> Iterator[bytes]:
    """Yield the lines without their ends; the last one may lack it."""
    lines = data.split(b"\n")
    yield from lines if lines[-1] else lines[:-1]


def read(data: bytes, id: str, name: str, time: float) -> Reading:
    """Read a dialogue out of the bytes of its file.

    Args:
        data: All of them.
        id: Of the dialogue.
        name: Where its first line is lost.
        time: Where its first line is lost.

    Raises:
        DataError: Another version of this program wrote it, or another program: nothing of it is to be touched.
    """
    reading = Reading(Dialogue(id, name, time))
    for number, line in enumerate(split(data), 1):
        if number == 1:
            _refuse_other_format(line)
        reading.add(number, line)
    if reading.lost and reading.lost[0][0] == 1 and not reading.dialogue.nodes:
        raise DataError(f"holds no conversation (line 1 {reading.lost[0][2]}) and is left alone; move it elsewhere")
    reading.unended = bool(data) and not data.endswith(b"\n")
    return reading


def _refuse_other_format(line: bytes) -> None:
    try:
        record = parse(line)
    except ValueError:
        return
    number = record.get("format")
    if record.get("type") == "dialogue" and number is not None and (type(number) is not int or number != FORMAT):
        raise DataError(
            f"it has format {number!r:.40}, and this program reads {FORMAT}: another version of it wrote the file"
        )
