"""Places to write to: where a destination really lies, names of our own beside it, and room on its disk."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from lit_llama.errors import ResourceError, UserError
from lit_llama.memory import amount, amounts

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAID_FULL = re.compile("No space left|Disk quota exceeded|File too large|code: 28\\b")  # by libraries without an errno


def real(destination: Path) -> Path:
    """Follow the links in a destination to the place that they name.

    Raises:
        UserError: One of them leads to nothing, or a file is in the way. What a broken link names is not made: it may
            be a disk that is not mounted, and all would be written below its mount point.
    """
    for path in (destination, *destination.parents):
        if path.exists():
            if path != destination and not path.is_dir():
                raise UserError(f"{destination} cannot be made: {path} is a file, expected a folder")
            break
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which is not there: make that folder (or mount its disk), "
                "or name another place"
            )
    found = Path(os.path.realpath(destination))
    plain = found == Path(os.path.abspath(destination)) and destination.name not in ("", "..")
    return destination if plain else found  # as it was typed, for messages


def check_writable(destination: Path) -> None:
    """Raise UserError unless something can be made at `destination`, or in it where it is a folder."""
    if not all(map(_is_text, (str(destination), str(real(destination))))):
        raise UserError(f"{destination} is no text in UTF-8, which Arrow and safetensors need; name another place")
    folder = real(destination)
    while not folder.is_dir():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{destination} cannot be written: no leave to write into {folder}; name another place")


def _is_text(name: str) -> bool:
    """Whether a name is text: bytes that are none stand in it as lone surrogates."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def check_output(path: Path) -> None:
    """Check that a file can be written at `path`, before the work whose result it is to hold; makes its folder.

    Raises:
        UserError: It is a folder, a link to nothing, or in a folder that cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a file or nothing there")
    target = real(path)
    if path.exists() and not path.is_file():  # a pipe or device
        return
    check_writable(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)


def refuse_foreign(path: Path, what: str) -> UserError:
    """Return the error for something at a name of our own that we did not put there."""
    return UserError(f"{path} is {what}, and the name is one that this program uses: move it away; nothing was touched")


def what_is(path: Path) -> str:
    """Return a word for what lies at a path, its links not followed."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"a link to {os.readlink(path)}"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "no plain file"


def open_own(path: Path, flags: int) -> int:
    """Open a plain file at a name of our own; gives its descriptor.

    Raises:
        UserError: A link, folder, pipe, or a file with a second name is there.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO) and os.path.lexists(path):
            raise refuse_foreign(path, what_is(path)) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        plain = stat.S_ISREG(status.st_mode)
        raise refuse_foreign(path, "a file with another name elsewhere (a hard link)" if plain else "no plain file")
    return descriptor


def remove_own(path: Path) -> None:
    """Remove a folder or file at a name of our own; of a link the link alone goes, and nothing it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unused(path: Path) -> Path:
    """Return a name beside `path` that nobody can have foreseen, for what is on its way there."""
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path`; what is still there at the end goes.

    The kernel keeps a lock on the folder itself as long as this process lives, by which `sweep` knows it.
    """
    sweep(path.parent)
    while True:
        folder = unused(path)
        folder.mkdir()  # which fails at a link, too
        with _locked(folder):
            if not folder.is_dir():
                continue  # swept between the two
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give a new file beside `path` to write; at the end it takes the place of whatever is there, links included.

    Raises:
        ResourceError: The disk is full.
    """
    sweep(path.parent)
    part = unused(path)
    with full_disk_explained(path, part):
        while True:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
            with _locked(part):
                if not part.is_file():
                    continue  # swept between the two
                try:
                    yield part
                    sync(part)
                    part.replace(path)
                except BaseException:
                    with contextlib.suppress(OSError):
                        part.unlink()
                    raise
                return


@contextlib.contextmanager
def kept_aside(path: Path) -> Iterator[Path]:
    """Move a folder out of the way of what takes its name; it goes at the end, or comes back after an error."""
    with _locked(path):
        old = unused(path)
        path.rename(old)
        try:
            yield old
        except BaseException:
            if not os.path.lexists(path):
                old.rename(path)
            raise
        shutil.rmtree(old)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder at an unused name, where its disk has locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # swept
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


_PART = re.compile(r"\..+\.partial-[0-9a-f]{8}", re.DOTALL)


def sweep(folder: Path) -> None:
    """Remove what processes that are gone had on its way to a place in `folder`: nobody holds its lock any more.

    Left alone is what lies there by another user, behind a link, or on a disk without locks.
    """
    for part in [path for path in folder.iterdir() if _PART.fullmatch(path.name)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                plain = stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
                if plain and status.st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_own(part)
            finally:
                os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed: int) -> None:
    """Raise ResourceError unless the disk of `folder` has room for `needed` bytes and a little more."""
    free = free_space(folder)
    wanted = needed + needed // 50
    if free < wanted:
        there, asked = amounts(free, wanted)
        raise ResourceError(f"{folder}: its disk has {there} free, {asked} are needed; make room or name another disk")


def free_space(path: Path) -> int:
    """Free bytes of the disk that something at `path` lies on, or would lie on."""
    path = Path(os.path.realpath(path))
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def full_disk_explained(destination: Path, written: Path) -> Iterator[None]:
    """Say of a full disk where that is and how much there was, which its error does not.

    Args:
        destination: What is written.
        written: Where it is until then, file or folder; its size tells the least that is needed.

    Raises:
        ResourceError: The disk, or the user's share of it, is full.
    """
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:  # safetensors and pyarrow have errors of their own
        if not is_full(error):
            raise
        size = size_of(written)
        needed = f", more than {amount(size)} needed" if size else ""
        raise ResourceError(
            f"{destination} cannot be written: {_reason(error)}; {amount(free_space(written))} free on the disk of "
            f"{written.parent}{needed}: make room or name a place on another disk"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether a disk, or a user's share of one, being full is what an error tells."""
    return (isinstance(error, OSError) and error.errno in _FULL) or bool(_SAID_FULL.search(str(error)))


def _reason(error: BaseException) -> str:
    """In the words of the system, which a library may have lost."""
    number = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
    return os.strerror(number)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    with contextlib.suppress(OSError):
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        return sum(file.lstat().st_size for file in files if file.is_file())
    return 0
