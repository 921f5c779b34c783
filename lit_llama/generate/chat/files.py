"""Files of conversations: a lock on their folder, lines behind a file, and files that are there whole or not at all."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_llama.errors import LockedError, ResourceError, UserError
from lit_llama.folder.place import aside, full_disk_explained, is_full, open_own

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
