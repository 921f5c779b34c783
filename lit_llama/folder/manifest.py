"""The manifest of a folder: the sha256 of every file in it, written with the folder and checked by whoever reads it.

SHA256SUMS has the form of sha256sum and holds no times, so that the same files have the same manifest. The smallest
files, up to `ALWAYS` bytes together, are hashed whenever their folder is read. Of the others the size, both times and
the inode are kept among the user's caches with the hash that they had then; one of them is hashed again when any of
these differs.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lit_llama.errors import IntegrityError, ResourceError
from lit_llama.folder.place import aside
from lit_llama.progress import track

MANIFEST = "SHA256SUMS"
ALWAYS = 256 << 20
"""Bytes of a folder that are hashed each time; about a sixth of a second."""
_TICK = 100_000_000
"""Nanoseconds in which a file may change twice and keep its times."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\0\\]+)")
_THREADS = 4


class _Status(NamedTuple):
    """What differs when a file has changed. Of the two times nobody sets back that of the last change (ctime)."""

    size: int
    written: int
    changed: int
    inode: int


_checked: dict[str, tuple[_Status, str]] = {}
"""Hashes of the files that this process has read, by their real paths."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as a hex digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS, which `sha256sum --check` reads too; hidden files are left out.

    Args:
        folder: All files in it and below are named.
        known: Hashes that are not computed again, by the paths of their files in the folder.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = sorted(name for name in paths if name != MANIFEST and not re.search(r"(^|/)\.", name))
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = dict(zip(names, pool.map(lambda name: known.get(name) or sha256_file(paths[name]), names), strict=True))
    (folder / MANIFEST).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), "utf-8")


def read_manifest(folder: Path) -> dict[str, str]:
    """Read the paths of files in the folder and their sha256.

    Raises:
        IntegrityError: The folder has no manifest, or one that is none.
    """
    path = folder / MANIFEST
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read, so nothing says what the folder held: {error}") from error
    sums = {}
    for line in filter(None, lines):
        found = _LINE.fullmatch(line)
        if not found or not _inside(found[2]):
            raise IntegrityError(f"{path} is damaged: {line[:100]!r} is no line of a manifest; {_WAY_OUT}")
        sums[found[2]] = found[1]
    return sums


_WAY_OUT = f"bring the folder back, or, if that was on purpose, remove the line from {MANIFEST}"


def _inside(name: str) -> bool:
    """Whether a path stays in the folder that it is seen from."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name


def check_folder(folder: Path, *, whole: bool = False, weights: bool = True) -> bool:
    """Compare the files of a folder with its manifest; one without a manifest is taken as it is.

    Args:
        folder: What a stage is going to read.
        whole: Hash the large files, too, whatever is known of them.
        weights: False where only the small files will be read.

    Returns:
        Whether there is a manifest.

    Raises:
        IntegrityError: A file is missing or is not as it was written, or the manifest is none; names it.
    """
    if not os.path.lexists(folder / MANIFEST):
        return False
    sums = read_manifest(folder)
    for name in sums:
        if not (folder / name).is_file():
            raise IntegrityError(f"{folder / name} is missing, but {MANIFEST} names it: {_WAY_OUT}")
    if not weights:
        large = _large({path: _status(path) for path in map(folder.joinpath, sums)})
        sums = {name: digest for name, digest in sums.items() if folder / name not in large}
    found = hashes({folder / name: digest for name, digest in sums.items()}, whole=whole)
    for name, digest in sums.items():
        if found[folder / name] != digest:
            raise IntegrityError(
                f"{folder / name} is damaged: its sha256 is {found[folder / name][:16]}..., {MANIFEST} says "
                f"{digest[:16]}...; {_WAY_OUT}"
            )
    return True


def forget(folder: Path, name: str) -> None:
    """Take a file that is going to change out of the manifest, if there is one."""
    path = folder / MANIFEST
    if path.is_file():
        lines = path.read_text("utf-8").splitlines(keepends=True)
        with aside(path) as part:
            part.write_text("".join(line for line in lines if line.rstrip("\n")[66:] != name), "utf-8")


def is_intact(folder: Path) -> bool:
    """Whether a folder is as its manifest says, if it has one."""
    try:
        check_folder(folder)
    except IntegrityError:
        return False
    return True


def hashes(expected: Mapping[Path, str | None], *, whole: bool = False) -> dict[Path, str]:
    """Return the sha256 of files of a folder; of a large one that nothing has changed since, as it was then.

    Args:
        expected: The files, and what their hash should be: a record that says otherwise is not relied on.
        whole: Read all of them.
    """
    status = {path: _status(path) for path in expected}
    large = _large(status)
    found = {}
    for path, digest in {} if whole else expected.items():
        known = _checked.get(os.path.realpath(path)) or (_recorded(path) if path in large else None)
        if known and known[0] == status[path] and digest in (None, known[1]):
            found[path] = known[1]
    unread = [path for path in expected if path not in found]
    many = sum(status[path].size for path in unread) > ALWAYS
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(sha256_file, unread)
        listed: Iterable[Path] = track(unread, f"checking {unread[0].parent}") if many else unread
        for path, digest in zip(listed, read, strict=True):
            found[path] = digest
            _keep(path, status[path], digest, path in large)
    return found


def remember(folder: Path) -> None:
    """Note that the files of a folder are as its manifest says, which was just written."""
    with contextlib.suppress(OSError):
        sums = read_manifest(folder)
        status = {folder / name: _status(folder / name) for name in sums}
        for path in _large(status):
            _record(path, status[path], sums[path.relative_to(folder).as_posix()])


def _large(status: Mapping[Path, _Status]) -> set[Path]:
    """The files of a folder that are not hashed each time."""
    total, large = 0, set()
    for path in sorted(status, key=lambda path: (status[path].size, path)):
        total += status[path].size
        if total > ALWAYS:
            large.add(path)
    return large


def _status(path: Path) -> _Status:
    found = path.stat()
    return _Status(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _keep(path: Path, status: _Status, digest: str, large: bool) -> None:
    if time.time_ns() - max(status.written, status.changed) < _TICK:
        return  # it may change yet without another time
    _checked[os.path.realpath(path)] = status, digest
    if large:
        _record(path, status, digest)


def _recorded(path: Path) -> tuple[_Status, str] | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RuntimeError):
        record = json.loads(_place(path).read_text("utf-8"))
        return _Status(*record["status"]), str(record["sha256"])
    return None


def _record(path: Path, status: _Status, digest: str) -> None:
    with contextlib.suppress(OSError, RuntimeError, ResourceError):  # no home to write to: it is hashed each time
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with aside(place) as part:
            part.write_text(json.dumps({"file": os.path.realpath(path), "status": status, "sha256": digest}), "utf-8")


def _place(path: Path) -> Path:
    """Where the record of a file lies."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return caches / "lit_llama" / "hashes" / f"{name}.json"
