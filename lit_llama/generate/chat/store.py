"""Conversations on the disk: a file of JSON lines each, to which records are appended.

Threads and processes may share a store. Whoever reads or writes holds its lock meanwhile, and first takes in what
others have written. A record is written in one piece and is on the disk before anybody is told; where it cannot be, the
file is as it was before. What a killed process left half written is set aside by the next one that reads it.
"""

import contextlib
import errno
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_llama.errors import DataError, UserError
from lit_llama.folder.place import check_writable, open_own, sync
from lit_llama.generate.chat.dialogue import FORMAT, Dialogue, Record
from lit_llama.generate.chat.lines import (
    NoConversation,
    Reading,
    Summary,
    append,
    encode,
    locked,
    read,
    split,
    write_new,
)

SUFFIX = ".jsonl"
DAMAGED = ".damaged"
MAX_NAME = 100
_OPEN = 64


@dataclass
class _Known:
    """A dialogue in memory, and the part of its file that it is the sum of."""

    dialogue: Dialogue
    file: int = 0
    size: int = 0
    changed: float = 0.0

    def note(self, stat: os.stat_result) -> None:
        """Remember up to where the file was read."""
        self.file, self.size, self.changed = stat.st_ino, stat.st_size, stat.st_mtime

    def summary(self) -> Summary:
        """What a list shows of it."""
        dialogue = self.dialogue
        return Summary(
            id=dialogue.id,
            name=dialogue.name,
            changed=self.changed or dialogue.time,
            messages=len(dialogue.path()),
            model=str(dialogue.settings.get("model", "")),
        )


class Store:
    """Conversations in a folder.

    Args:
        folder: Where they are, made when the first one is; None keeps them in memory only.

    Attributes:
        remarks: What was found damaged and set aside, for people.

    Raises:
        UserError: Nothing can be written there.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.remarks: list[str] = []
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._summaries: dict[str, tuple[tuple[int, int, int], Summary | None]] = {}  # None where it holds none
        self._mutex = threading.RLock()
        self._depth = 0
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file, expected a folder of conversations or nothing there")
            check_writable(folder)

    # ---- reading

    def list(self) -> "list[Summary]":
        """Return all conversations, the one that changed last first."""
        with self._held():
            if self.folder is None:
                found = [known.summary() for known in self._known.values()]
            else:
                found = [summary for path in self._files() if (summary := self._summary(path)) is not None]
        return sorted(found, key=lambda summary: (summary.changed, summary.id), reverse=True)

    def get(self, id: str) -> Dialogue:
        """Return a conversation as it is now; what is written later is not seen in it.

        Raises:
            UserError: There is none of this id.
        """
        with self._held():
            return self._fresh(id).dialogue

    def find(self, name: str) -> Summary | None:
        """Return the conversation of a name, of a number in the list, or of the only name that begins so."""
        found = self.list()
        if exact := [summary for summary in found if summary.name == name or summary.id == name]:
            return exact[0]
        if name.isdecimal() and 1 <= int(name) <= len(found):
            return found[int(name) - 1]
        begins = [summary for summary in found if summary.name.startswith(name)] if name else []
        return begins[0] if len(begins) == 1 else None

    # ---- writing

    def create(self, name: str = "", records: Iterable[Record] = ()) -> str:
        """Begin a conversation; gives its id.

        Args:
            name: That no other one has; "" makes one of the time.
            records: That it begins with.

        Raises:
            UserError: The name is taken, or is none.
            ResourceError: The disk is full.
        """
        with self._held():
            name = self.new_name(name) if name else self.free_name(time.strftime("%Y-%m-%d %H:%M"))
            (id,) = self._create([(name, records)])
            return id

    def load(self, found: Iterable[tuple[str, Iterable[Record]]]) -> Sequence[str]:
        """Begin conversations, all or none; gives their ids.

        Args:
            found: Name and records of each; where a name is taken, it gets a number.

        Raises:
            ResourceError: The disk is full.
        """
        with self._held():
            taken = {summary.name for summary in self.list()}
            last: dict[str, int] = {}
            named = []
            for name, records in found:
                free = name = _shortened(name)
                while free in taken:
                    last[name] = last.get(name, 1) + 1
                    free = f"{name} {last[name]}"
                taken.add(free)
                named.append((free, records))
            return self._create(named)

    def _create(self, named: Iterable[tuple[str, Iterable[Record]]]) -> Sequence[str]:
        ids = []
        try:
            for name, records in named:
                now = time.time()
                id = time.strftime("%Y%m%d-%H%M%S-", time.localtime(now)) + secrets.token_hex(6)
                begin = {"type": "dialogue", "format": FORMAT, "id": id, "name": name, "time": now}
                all_records = [begin, *(record for record in records if record.get("type") != "dialogue")]
                known = _Known(Dialogue(id), changed=now)
                for record in all_records:
                    known.dialogue.apply(record)
                if self.folder is not None:
                    path = self._path(id)
                    write_new(path, b"".join(map(encode, all_records)))
                    known.note(path.stat())
                ids.append(id)
                self._remember(known)
            if self.folder is not None:
                sync(self.folder)
        except BaseException:
            for id in ids:
                self._known.pop(id, None)
                if self.folder is not None:
                    self._path(id).unlink(missing_ok=True)
            raise
        return ids

    def write(self, id: str, *records: Record, wait: bool = True) -> Dialogue:
        """Append records to a conversation, all or none; see `change`."""
        return self.change(id, lambda _: records, wait=wait)

    def change(self, id: str, make: Callable[[Dialogue], Iterable[Record]], *, wait: bool = True) -> Dialogue:
        """Append records that are made of the state of a conversation, all or none.

        Args:
            id: Of the conversation.
            make: Makes them; nobody else changes the conversation meanwhile.
            wait: Until they are on the disk, where they outlive a machine that stops. A process that dies takes
                nothing with it in any case.

        Raises:
            UserError: There is no such conversation, or a record does not fit.
            ResourceError: The disk is full; the conversation is as it was.
        """
        with self._held():
            known = self._fresh(id)
            records, dialogue = list(make(known.dialogue)), known.dialogue.copy()
            try:
                for record in records:
                    dialogue.apply(record)
            except ValueError as error:
                raise UserError(f"the conversation {dialogue.name!r} cannot go on so: {error}") from error
            if self.folder is not None and records:
                path = self._path(id)
                known.note(append(path, b"".join(map(encode, records)), wait=wait))
            known.dialogue, known.changed = dialogue, time.time()
            return dialogue

    def rename(self, id: str, name: str) -> None:
        """Give a conversation another name.

        Raises:
            UserError: The name is taken, or is none.
        """
        with self._held():
            self.write(id, {"type": "name", "name": self.new_name(name, id)})

    def delete(self, id: str) -> None:
        """Remove a conversation from the disk.

        Raises:
            UserError: There is none of this id.
        """
        with self._held():
            self._fresh(id)
            self._known.pop(id, None)
            self._summaries.pop(id, None)
            if self.folder is not None:
                self._path(id).unlink()
                sync(self.folder)

    def free_name(self, name: str) -> str:
        """Return a name that no conversation has: this one, or with a number behind it."""
        name = _shortened(name)
        taken = {summary.name for summary in self.list()}
        if name not in taken:
            return name
        return next(f"{name} {n}" for n in range(2, len(taken) + 3) if f"{name} {n}" not in taken)

    def new_name(self, name: str, id: str = "") -> str:
        """Return a name as it is kept, which no conversation but that of the id has.

        Raises:
            UserError: The name is taken, or is none.
        """
        name = " ".join(name.split())
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise UserError(f"the name {name[:MAX_NAME]!r} is none; expected 1 to {MAX_NAME} printable characters")
        if any(summary.name == name and summary.id != id for summary in self.list()):
            raise UserError(f"there is a conversation {name!r} already; name another")
        return name

    # ---- files

    def _files(self) -> Iterable[Path]:
        assert self.folder is not None
        with os.scandir(self.folder) as entries:
            return [
                self.folder / entry.name
                for entry in entries
                if entry.name.endswith(SUFFIX) and entry.name[0] != "." and entry.is_file(follow_symlinks=False)
            ]

    def _path(self, id: str) -> Path:
        assert self.folder is not None
        if not id or id != Path(id).name or id.startswith(".") or "\0" in id:
            raise NoConversation(f"{id!r} is the id of no conversation")
        return self.folder / f"{id}{SUFFIX}"

    def _summary(self, path: Path) -> Summary | None:
        try:
            stat = path.stat()
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            held = self._summaries.get(path.stem)
            if held is None or held[0] != state:
                try:
                    held = state, self._fresh(path.stem).summary()
                except DataError as error:  # nor will it, until it changes
                    held = state, None
                    self._remark(str(error))
                self._summaries[path.stem] = held
            return held[1]
        except (UserError, OSError) as error:
            self._remark(str(error))
            return None

    def _fresh(self, id: str) -> _Known:
        """A conversation with what others have written meanwhile."""
        known = self._known.get(id)
        if self.folder is None:
            if known is None:
                raise NoConversation(f"there is no conversation {id!r}")
            return known
        path = self._path(id)
        try:
            stat = path.lstat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG, errno.EILSEQ):
                raise
            self._known.pop(id, None)
            raise NoConversation(f"there is no conversation {id[:100]!r} in {self.folder}") from None
        if known is None or not self._follows(known, path, stat):
            known = self._read(path)
        known.changed = path.stat().st_mtime
        self._remember(known)
        return known

    def _follows(self, known: _Known, path: Path, stat: os.stat_result) -> bool:
        """Take in what was appended to a file; False where it has to be read anew."""
        if known.file != stat.st_ino or stat.st_size <= known.size:
            return known.file == stat.st_ino and stat.st_size == known.size
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            file.seek(known.size)
            data = file.read()
            if not data.endswith(b"\n"):
                return False
            reading = Reading(known.dialogue.copy())
            for line in split(data):
                reading.add(0, line)
            known.dialogue = reading.dialogue
            known.note(os.fstat(file.fileno()))
        return not reading.damaged

    def _read(self, path: Path) -> _Known:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            data, stat = file.read(), os.fstat(file.fileno())
        name = f"recovered {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(stat.st_mtime))}"
        try:
            reading = read(data, path.stem, name, stat.st_mtime)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        known = _Known(reading.dialogue)
        known.note(stat)
        if reading.damaged:
            self._mend(path, reading)
            known.note(path.stat())
        return known

    def _mend(self, path: Path, reading: Reading) -> None:
        """Write a file anew without what cannot be read, which is kept beside it."""
        if reading.lost:
            damaged = path.with_suffix(DAMAGED)
            lines = b"".join(line + b"\n" for _, line, _ in reading.lost)
            append(damaged, lines)
            first, why = reading.lost[0][0], reading.lost[0][2]
            moved = f"; {len(reading.moved)} messages that followed a lost one follow another" if reading.moved else ""
            self._remark(
                f"{path}: {len(reading.lost)} lines cannot be read (line {first} {why}) and are set aside in "
                f"{damaged}; all others are kept{moved}"
            )
        write_new(path, b"".join(map(encode, reading.dialogue.records())))
        sync(path.parent)

    def _remember(self, known: _Known) -> None:
        self._known[known.dialogue.id] = known
        self._known.move_to_end(known.dialogue.id)
        while self.folder is not None and len(self._known) > _OPEN:
            self._known.popitem(last=False)

    def _remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The lock of the store, against other threads and other processes."""
        with self._mutex, contextlib.ExitStack() as held:
            self._depth += 1
            try:
                if self._depth == 1 and self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                    held.enter_context(locked(self.folder / ".lock"))
                yield
            finally:
                self._depth -= 1


def _shortened(name: str) -> str:
    return " ".join(name.split())[:MAX_NAME] or "conversation"
