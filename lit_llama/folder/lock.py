"""One process at a time: a lock file names its holder, and a process that dies lets it go."""

import contextlib
import errno
import fcntl
import functools
import inspect
import os
import socket
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from lit_llama.errors import LockedError
from lit_llama.folder.place import check_writable, full_disk_explained, open_own, real, refuse_foreign, sweep

_BEGINNING = "process "
P = ParamSpec("P")
T = TypeVar("T")


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


_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())
"""Real paths of the destinations that are ours: what makes a part of one does not wait for the whole."""


@contextlib.contextmanager
def reserve(destination: Path, *, required: bool = True, nested: bool = True) -> Iterator[None]:
    """Hold the locks of a destination, a file or folder to be made or filled, from before the work to its end.

    One lies beside it, where that can be written, and one in it where it is a folder: another machine or container may
    have it mounted at another place. What is made for that, and is still empty at the end, goes again.

    Args:
        destination: What is worked on; a part of the work finds it reserved.
        required: False to go on where its disk has no locks.
        nested: Part of the work on a destination may be what this thread has reserved it for.

    Raises:
        LockedError: Another process works on it.
        UserError: It cannot be made or written, or something foreign has the name of a lock.
    """
    check_writable(destination)
    place = real(destination)
    name = os.path.realpath(place)
    if nested and name in _held.get():
        yield
        return
    made = [path for path in place.parents if not path.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    locks = [place.parent / f".{place.name}.lock"] if os.access(place.parent, os.W_OK | os.X_OK) else []
    locks += [place / ".lock"] if place.is_dir() else []
    with contextlib.ExitStack() as stack:
        try:
            for lock in locks:
                stack.enter_context(hold(lock, destination))
        except OSError as error:
            if required or error.errno not in (errno.ENOSYS, errno.ENOTSUP):
                raise
            locks = []
        for folder in (place.parent, *([place] if place.is_dir() else [])):
            sweep(folder)
        before = _held.set(_held.get() | {name} if locks else _held.get())
        try:
            yield
        finally:
            _held.reset(before)
            stack.close()
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()  # which it does only where nothing is inside


def reserving(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function hold the locks of its parameter `destination` from its beginning to its end."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> T:
        with reserve(signature.bind(*args, **kwargs).arguments["destination"], required=False):
            return function(*args, **kwargs)

    return held


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make `folder` if need be and reserve it; what is still empty at the end goes again.

    Raises:
        LockedError: Another process works in it.
        UserError: It cannot be made or written.
    """
    check_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with reserve(folder, nested=False):
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
