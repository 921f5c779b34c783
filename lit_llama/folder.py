"""Folders that describe themselves: written aside and moved into place, the describing file last."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_llama.errors import ResourceError, UserError


@contextlib.contextmanager
def publish(destination: Path, marker: str, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder to write into; on success its contents become `destination`.

    A folder counts as whole only while `marker`, the file that describes it, is there: the marker of older contents
    goes first and the new one comes last, so that whatever interrupts us leaves nothing that looks whole. Other files
    in an existing destination (raw data, say) stay as they are.

    Args:
        destination: The folder to make or to fill.
        marker: Name of the file that is moved last; the body must have written it.
        replace: Allow a destination that already is whole.

    Raises:
        UserError: The destination is whole already and `replace` is false, or it is no folder.
    """
    check_destination(destination, marker, replace=replace)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _move_in(staging, destination, marker)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def publish_later(destination: Path, marker: str) -> Iterator[Path]:
    """As `publish`, but what the body wrote survives its failure, and the next call finds it there again.

    Raises:
        UserError: The destination is whole already, or it is no folder.
        ResourceError: Another process is at work on it.
    """
    check_destination(destination, marker)
    staging = destination.parent / f".{destination.name}.download"
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _alone(staging.with_name(f"{staging.name}.lock"), destination):
        check_destination(destination, marker)  # another run may have ended meanwhile
        staging.mkdir(exist_ok=True)
        try:
            yield staging
            _move_in(staging, destination, marker)
        finally:
            with contextlib.suppress(OSError):
                staging.rmdir()  # which it does only where nothing is kept


@contextlib.contextmanager
def _alone(lock: Path, destination: Path) -> Iterator[None]:
    """Hold `lock`; a process that dies lets it go."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(f"another run is at work on {destination}: wait until it has ended") from error
        if not os.fstat(file.fileno()).st_nlink:
            raise ResourceError(f"another run on {destination} has ended just now: run the same command again")
        try:
            yield
        finally:
            lock.unlink()


def _move_in(staging: Path, destination: Path, marker: str) -> None:
    _sync_tree(staging)
    if not destination.exists():
        staging.rename(destination)
    else:
        (destination / marker).unlink(missing_ok=True)
        _sync(destination)
        for entry in sorted(staging.iterdir(), key=lambda path: path.name == marker):
            _move(entry, destination / entry.name)
        _sync(destination)
    _sync(destination.parent)


def check_destination(destination: Path, marker: str, *, replace: bool = False) -> None:
    """Refuse a destination that is no folder or already whole, before hours are spent on its contents."""
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file, expected a folder or nothing there")
    if not replace and (destination / marker).exists():
        raise UserError(f"{destination} already holds {marker}; name another folder or remove this one")


def _move(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def encode_json(value: Any) -> bytes:
    """UTF-8, indented, keys in the order given."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """What `encode_json` gives, into a file."""
    path.write_bytes(encode_json(value))


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """One object a line, moved into place when all are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
