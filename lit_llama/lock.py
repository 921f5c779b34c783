"""One process at a time: a lock file names its holder, and a process that dies lets it go."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from lit_llama.errors import LockedError
from lit_llama.place import check_writable, full_disk_explained, open_own, refuse_foreign

_BEGINNING = "process "


@contextlib.contextmanager
def hold(lock: Path, destination: Path) -> Iterator[None]:
    """Hold `lock`, a file that says who holds it and is removed at the end.

    The kernel keeps the lock itself (flock): the file that a killed process leaves behind locks nobody out.

    Args:
        lock: The file; its folder must be there.
        destination: What is worked on, for the message.

    Raises:
        LockedError: Another process holds it; the message names the process, its machine and since when.
        UserError: Something that is no lock has its name; it is neither followed nor written to.
        ResourceError: The disk is full.
    """
    while True:
        with os.fdopen(open_own(lock, os.O_RDWR | os.O_CREAT), "r+", encoding="utf-8", errors="replace") as file:
            beginning = file.read(200)
            if beginning and not beginning.startswith(_BEGINNING):
                raise refuse_foreign(lock, "a file with something else than who is at work")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = beginning.strip() or "a process that has just begun"
                raise LockedError(
                    f"another run is at work on {destination}: {holder}; wait until it has ended"
                ) from error
            if not os.fstat(file.fileno()).st_nlink:
                continue  # its holder ended between our opening and locking it: this file is no longer there
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            holder = f"{_BEGINNING}{os.getpid()} on {socket.gethostname()} since {now}\n"
            try:
                with full_disk_explained(destination, lock):
                    # not through the buffer, which would fail again when the file is closed
                    os.ftruncate(file.fileno(), 0)
                    os.pwrite(file.fileno(), holder.encode(), 0)
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make `folder` if need be and hold the lock in it; what is still empty at the end goes again.

    Raises:
        LockedError: Another process works in it.
        UserError: It cannot be made or written.
    """
    check_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold(folder / ".lock", folder):
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()  # which it does only where nothing is inside
