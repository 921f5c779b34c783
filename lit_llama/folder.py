"""Folders that describe themselves: written aside and moved into place, the describing file last."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_llama.errors import IntegrityError, ResourceError, UserError
from lit_llama.lock import hold

MANIFEST = "SHA256SUMS"


@contextlib.contextmanager
def publish(destination: Path, marker: str, *, replace: bool = False, keep: bool = False) -> Iterator[Path]:
    """Give a temporary folder to write into; on success its contents become `destination`.

    A folder counts as whole only while `marker`, the file that describes it, is there: the marker of older contents
    goes first and the new one comes last, so that whatever interrupts us leaves nothing that looks whole. Other files
    in an existing destination (raw data, say) stay as they are.

    Args:
        destination: The folder to make or to fill.
        marker: Name of the file that is moved last; the body must have written it.
        replace: Allow a destination that already is whole.
        keep: What the body wrote survives its failure, and the next call finds it there again.

    Raises:
        UserError: The destination is whole already and `replace` is false, or it is no folder.
        LockedError: Another process is at work on what both would write into.
    """
    check_destination(destination, marker, replace=replace)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = destination.parent / f".{destination.name}.{'unfinished' if keep else 'partial'}"
    with contextlib.ExitStack() as held:
        if keep or replace:  # two runs would mix their files; alone, we may clear away what a killed one left
            held.enter_context(hold(staging.with_suffix(".lock"), destination))
            check_destination(destination, marker, replace=replace)  # another run may have ended meanwhile
        else:
            staging = staging.with_name(f"{staging.name}-{os.getpid()}")
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(exist_ok=keep)
        try:
            yield staging
            _move_in(staging, destination, marker)
        finally:
            if keep:
                with contextlib.suppress(OSError):
                    staging.rmdir()  # which it does only where nothing is kept
            else:
                shutil.rmtree(staging, ignore_errors=True)


def _move_in(staging: Path, destination: Path, marker: str) -> None:
    _sync_tree(staging)
    if not destination.exists() or not any(destination.iterdir()):
        staging.rename(destination)  # in one step
    else:
        (destination / marker).unlink(missing_ok=True)
        sync(destination)
        for entry in sorted(staging.iterdir(), key=lambda path: path.name == marker):
            _move(entry, destination / entry.name)
        sync(destination)
    sync(destination.parent)


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
        text = journal.read_text("utf-8") if journal.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        for line in lines[1:] if lines[:1] == kept else []:
            file = self.path / line["file"]
            if file.is_file() and sha256_file(file) == line["sha256"]:
                self.done[line["file"]] = line
                kept.append(line)
        for path in self.path.iterdir():
            if path.name not in {self.JOURNAL, *self.done}:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        part = journal.with_suffix(".part")
        part.write_text("".join(map(_line, kept)), "utf-8")
        sync(part)
        part.replace(journal)
        sync(self.path)


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


@contextlib.contextmanager
def resume(destination: Path, plan: str) -> Iterator[Staging]:
    """Like `publish` for a folder that is not there yet, but an interrupted command goes on where it stopped.

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
    if destination.is_symlink() or destination.exists():
        if destination.is_dir() and not any(destination.iterdir()):
            return
        raise UserError(f"{destination} already exists; name another folder, nothing is ever overwritten")


def check_apart(destination: Path, *inputs: Path) -> None:
    """Refuse a destination that is an input, lies in one, or holds one."""
    made = destination.resolve()
    for folder in inputs:
        real = folder.resolve()
        if made == real or made.is_relative_to(real) or real.is_relative_to(made):
            raise UserError(f"--destination_path {destination} and the input {folder} lie in each other; name another")


def check_space(folder: Path, needed: int) -> None:
    """Raise ResourceError unless the disk of `folder` has room for `needed` bytes and a little more."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise ResourceError(
            f"{folder} has {free / 1e9:.1f} GB free, {needed * 1.02 / 1e9:.1f} GB are needed; make room or name "
            "another disk"
        )


def write_manifest(folder: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS, which `sha256sum --check` reads too; hashes that are `known` already are not computed again."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST and not path.name.startswith("."))
    lines = [f"{known.get(name) or sha256_file(folder / name)}  {name}\n" for name in names]
    (folder / MANIFEST).write_text("".join(lines), "utf-8")


def read_manifest(folder: Path) -> dict[str, str]:
    """File names and their sha256.

    Raises:
        IntegrityError: The folder has no manifest, or one that is none.
    """
    try:
        lines = (folder / MANIFEST).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{folder / MANIFEST} cannot be read, so nothing says what the folder held: {error}"
        ) from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name, digest in sums.items():
        if Path(name).name != name or not re.fullmatch("[0-9a-f]{64}", digest):
            raise IntegrityError(f"{folder / MANIFEST} is damaged: {name!r} is no line of a manifest")
    return sums


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


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


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


def replace_text(path: Path, text: str) -> None:
    """Write a file beside `path` and move it there: a reader sees the old one or the new one."""
    part = path.with_name(f".{path.name}.partial")
    try:
        part.write_text(text, "utf-8")
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in place of another at once, so that whoever looks finds one of them whole."""
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
