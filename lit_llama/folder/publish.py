"""Folders that describe themselves: written aside and moved into place, the describing file last."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from lit_llama.errors import UserError
from lit_llama.folder.lock import reserve
from lit_llama.folder.manifest import MANIFEST, remember, sha256_file, write_manifest
from lit_llama.folder.place import (
    aside,
    check_output,
    check_writable,
    full_disk_explained,
    kept_aside,
    open_own,
    real,
    refuse_foreign,
    remove_own,
    temporary_folder,
    unused,
    what_is,
)
from lit_llama.folder.place import check_space as check_space  # part of this file for those who write folders
from lit_llama.folder.place import sync as sync
from lit_llama.wording import param

_OWN = ".unfinished"  # in a folder that outlives a failure: it is ours


@contextlib.contextmanager
def publish(destination: Path, marker: str, *, replace: bool = False, keep: bool = False) -> Iterator[Path]:
    """Give a temporary folder to write into; on success its contents become `destination`.

    A folder counts as whole only while `marker`, the file that describes it, is there: the marker of older contents
    goes first and the new one comes last, so that whatever interrupts us leaves nothing that looks whole. Other files
    in an existing destination (raw data, say) stay as they are. The manifest of what the body wrote is added.

    The destination may be a link to a folder, a mount point, or lie on another disk: its links are followed once, at
    the beginning. The temporary folder lies in a destination that is there and beside one that is not, so that the move
    never crosses disks. Links at names of our own are not followed.

    Args:
        destination: The folder to make or to fill.
        marker: Name of the file that is moved last; the body must have written it.
        replace: Allow a destination that already is whole.
        keep: What the body wrote survives its failure, and the next call finds it there again.

    Raises:
        UserError: The destination is whole already and `replace` is false, is no folder, cannot be written, or
            something foreign has the name of what is unfinished.
        LockedError: Another process is at work on what both would write into.
        ResourceError: The disk is full.
    """
    check_destination(destination, marker, replace=replace)
    place = real(destination)
    with reserve(destination, required=keep or replace):
        check_destination(destination, marker, replace=replace)  # another run may have ended meanwhile
        room = place if place.is_dir() else place.parent
        begun = _unfinished(room, place) if keep else temporary_folder(room / place.name)
        with begun as staging, full_disk_explained(destination, staging):
            yield staging
            if not (staging / MANIFEST).exists():
                write_manifest(staging, {})
            _settle_modes(staging)
            _move_in(staging, place, marker)
            remember(place)


@contextlib.contextmanager
def _unfinished(room: Path, place: Path) -> Iterator[Path]:
    """Give the folder that outlives a failure, new or with what an earlier command wrote into it.

    Raises:
        UserError: Something foreign has its name.
    """
    name = f".{place.name}.unfinished"
    staging, beside = room / name, place.parent / name
    if staging != beside and os.path.lexists(beside) and not os.path.lexists(staging):
        _check_ours(beside)  # the destination was made meanwhile
        try:
            beside.rename(staging)
        except OSError as error:
            raise UserError(
                f"{beside} holds the unfinished work of an earlier command and cannot be moved to {staging} "
                f"({error.strerror}): move it there, or remove it to begin anew"
            ) from error
    if os.path.lexists(staging):
        _check_ours(staging)
    else:
        staging.mkdir()
    if not (staging / _OWN).exists():
        os.close(open_own(staging / _OWN, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        yield staging
    finally:
        if staging.is_dir() and {path.name for path in staging.iterdir()} <= {_OWN}:
            shutil.rmtree(staging, ignore_errors=True)


def _check_ours(staging: Path) -> None:
    """Refuse what an unfinished command did not leave: it would be followed, or removed with what is half made."""
    if staging.is_symlink() or not staging.is_dir():
        raise refuse_foreign(staging, what_is(staging))
    names = sorted(path.name for path in staging.iterdir())
    known = {_OWN, Staging.JOURNAL, MANIFEST, "meta.json"}
    if names and not known & set(names) and not any(name.endswith(".part") for name in names):
        raise refuse_foreign(staging, f"a folder with files of somebody else ({', '.join(names[:3])})")
    if links := [name for name in names if (staging / name).is_symlink()]:
        raise refuse_foreign(staging / links[0], what_is(staging / links[0]))


def _settle_modes(staging: Path) -> None:
    """Give every file the mode of a plain new one; some libraries write files that only their owner can read."""
    mode = (staging / MANIFEST).stat().st_mode & 0o777
    for path in staging.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _move_in(staging: Path, place: Path, marker: str) -> None:
    _sync_tree(staging)
    if not os.path.lexists(place):
        (staging / _OWN).unlink(missing_ok=True)
        staging.rename(place)  # in one step
    else:
        (place / marker).unlink(missing_ok=True)
        sync(place)
        for entry in sorted(staging.iterdir(), key=lambda path: path.name == marker):
            if entry.name != _OWN:
                _move(entry, place / entry.name)
        sync(place)
    sync(place.parent)


def _move(source: Path, target: Path) -> None:
    """Put a file or folder in the place of another, which goes only when the new one is there."""
    folder = target.is_dir() and not target.is_symlink()
    with kept_aside(target) if folder else contextlib.nullcontext():
        try:
            source.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy = unused(target)  # a disk was mounted there meanwhile: better late than never
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy)
            _sync_tree(copy)
            copy.rename(target)


class Staging:
    """A folder in the making that outlives an interruption: what is finished in it is not made again.

    Args:
        path: The folder to write into.
    """

    JOURNAL = ".journal.jsonl"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}

    def finish(self, file: str, record: dict[str, Any]) -> None:
        """Note that `file` is whole; `record` holds its sha256 and whatever else a later run wants to know."""
        sync(self.path / file)
        sync(self.path)
        with (self.path / self.JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(_line({"file": file, **record}))
        sync(self.path / self.JOURNAL)
        self.done[file] = record

    def recover(self, plan: str) -> None:
        """Take over what an interrupted run with the same plan finished; anything else goes."""
        journal, kept = self.path / self.JOURNAL, [{"plan": plan}]
        data = journal.read_bytes() if journal.is_file() else b""
        lines = [_parsed(line) for line in data.split(b"\n")[:-1]]
        for line in lines[1:] if lines[:1] == kept else []:
            name = line.get("file")
            if not isinstance(name, str) or Path(name).name != name:
                continue  # damaged: what it spoke of is made again
            file = self.path / name
            if file.is_file() and sha256_file(file) == line.get("sha256"):
                self.done[name] = line
                kept.append(line)
        for path in self.path.iterdir():
            if path.name not in {self.JOURNAL, _OWN, *self.done}:
                remove_own(path)
        part = journal.with_suffix(".part")
        part.write_text("".join(map(_line, kept)), "utf-8")
        sync(part)
        part.replace(journal)
        sync(self.path)


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of a journal; an empty one where it is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


@contextlib.contextmanager
def resume(destination: Path, plan: str) -> Iterator[Staging]:
    """Publish as `publish` does a folder that is not there yet, but let an interrupted command go on where it stopped.

    Args:
        destination: The folder to make.
        plan: What decides the contents; files finished under another plan are made again.

    Raises:
        UserError: The destination exists already.
        LockedError: Another process is making it.
    """
    check_absent(destination)
    with publish(destination, MANIFEST, keep=True) as folder:
        check_absent(destination)  # it may just have been finished
        staging = Staging(folder)
        staging.recover(plan)
        yield staging
        (folder / Staging.JOURNAL).unlink()


def check_absent(destination: Path) -> None:
    """Refuse a destination that holds anything: nothing is overwritten or deleted."""
    place = real(destination)
    own = {f".{place.name}.unfinished", ".lock", "lost+found"}  # the last is of the disk itself
    if place.exists() and not (place.is_dir() and {path.name for path in place.iterdir()} <= own):
        raise UserError(f"{destination} already exists; name another folder, nothing is ever overwritten")
    check_writable(destination)


def check_apart(destination: Path, *inputs: Path) -> None:
    """Refuse a destination that is an input, lies in one, or holds one."""
    made = real(destination)
    for folder in inputs:
        given = folder.resolve()
        if made == given or made.is_relative_to(given) or given.is_relative_to(made):
            raise UserError(
                f"{param('destination_path', destination)} and the input {folder} lie in each other; name another"
            )


def check_destination(destination: Path, marker: str, *, replace: bool = False) -> None:
    """Refuse a destination that is no folder, already whole, or not to be written, before hours are spent on it."""
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file, expected a folder or nothing there")
    if not replace and (destination / marker).exists():
        raise UserError(f"{destination} already holds {marker}; name another folder or remove this one")
    data = marker == _DATA_MARKER and replace  # else a download
    if marker in MARKERS.values() or data:
        check_kind(destination, MARKERS["data folder"] if data else marker)
    check_writable(destination)


FolderKind = Literal["model", "adapter", "data folder"]
"""Of a folder that a stage makes."""
MARKERS: dict[FolderKind, str] = {
    "model": "config.json",
    "adapter": "adapter_config.json",
    "data folder": "dataset_dict.json",
}
"""The file that tells a folder of each kind."""
_DATA_MARKER = "meta.json"
"""The file that makes a data folder whole, which may be made anew; models and adapters have one of this name, too."""


def articled(kind: FolderKind) -> str:
    """Return the kind of a folder with its article."""
    return f"an {kind}" if kind == "adapter" else f"a {kind}"


def check_no_file(destination: Path) -> None:
    """Refuse a folder that is called as a GGUF file, which was meant."""
    if destination.suffix == ".gguf" and not destination.is_dir():
        raise UserError(
            "ends in .gguf, but a folder is to be made",
            parameter="destination_path",
            value=destination,
            remedy=f"add {param('format', 'gguf')}, or name a folder",
        )


def check_kind(destination: Path, own: str = "") -> None:
    """Refuse a folder of another stage, whose files of the same names (meta.json, SHA256SUMS, chat_template.jinja,
    report.html) would be replaced.

    Args:
        destination: To be written into.
        own: The file that tells folders of this stage.
    """
    for kind, name in MARKERS.items():
        if own == name or not (destination / name).is_file():
            continue
        if kind == "model" and not any(any(destination.glob(each)) for each in ("*.safetensors", "*.bin")):
            continue  # raw data may lie beside a file of this name
        raise UserError(
            f"{destination} is {articled(kind)} ({name}), whose files would be replaced; name a folder that is empty "
            "or not there yet"
        )


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def encode_json(value: Any) -> bytes:
    """Encode as JSON in UTF-8, indented, keys in the order given. A byte of a file name that is none stands there as an
    escape.
    """
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a value into a file as `encode_json` gives it."""
    path.write_bytes(encode_json(value))


def replace_text(path: Path, text: str) -> None:
    """Write a file beside `path` and move it there: a reader sees the old one or the new one."""
    replace_file(path, text.encode("utf-8", "backslashreplace"))


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in place of another at once, so that whoever looks finds one of them whole."""
    with aside(path) as part:
        part.write_bytes(data)


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one object a line, moved into place when all are written; a link is followed, a pipe or device written to.

    Raises:
        UserError: See `check_output`.
        ResourceError: The disk is full.
    """
    check_output(path)
    if path.exists() and not path.is_file():
        _write_lines(path, rows)
    else:
        with aside(real(path)) as part:
            _write_lines(part, rows)


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
