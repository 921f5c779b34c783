"""Conversations on the disk: what a kill, a full disk, damage and other processes do to them."""

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llama.errors import LockedError, ResourceError, UserError
from lit_llama.generate.chat import lines
from lit_llama.generate.chat.dialogue import Dialogue
from lit_llama.generate.chat.lines import default_folder
from lit_llama.generate.chat.store import Store


def said(id: int, parent: int, role: str, content: str = "x", **more: Any) -> dict[str, Any]:
    return {"type": "message", "id": id, "parent": parent, "role": role, "content": content, **more}


def filled(store: Store, turns: int = 2, name: str = "a") -> str:
    id = store.create(name)
    for turn in range(turns):
        first = 2 * turn + 1
        store.write(id, said(first, first - 1, "user", f"question {turn}"))
        store.write(id, said(first + 1, first, "assistant", f"answer {turn}"))
    return id


def texts(dialogue: Dialogue) -> list[str]:
    return [node.content for node in dialogue.nodes.values()]


def test_a_dialogue_is_there_the_next_time(tmp_path: Path) -> None:
    """Branches, settings, names or what is learned that live in memory only; files that others may read."""
    store = Store(tmp_path / "deep" / "store")
    id = filled(store)
    store.write(id, said(5, 2, "user", "another way"), {"type": "set", "name": "temperature", "value": 0.2})
    store.write(id, {"type": "train", "id": 2, "train": False}, {"type": "head", "id": 4})
    store.write(id, {"type": "text", "id": 4, "text": " and more"}, {"type": "end", "id": 4, "finish_reason": "stop"})
    store.rename(id, "b \u4eac")
    other = Store(tmp_path / "deep" / "store").get(id)
    assert vars(other) == vars(store.get(id))
    assert [node.content for node in other.path()] == ["question 0", "answer 0", "question 1", "answer 1 and more"]
    assert other.name == "b \u4eac" and other.settings == {"temperature": 0.2} and other.nodes[2].train is False
    (file,) = (tmp_path / "deep" / "store").glob("*.jsonl")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_the_fewest_records_make_the_same_dialogue(seed: int) -> None:
    """A conversation that a repair or /save changes: a branch, a head at the root, or a measure that is lost."""
    draw, dialogue = random.Random(seed), Dialogue("x", "n", 1.0)
    for _ in range(draw.randint(0, 30)):
        nodes = [0, *dialogue.nodes]
        at = draw.choice(nodes)
        end = {"type": "end", "id": at, "finish_reason": draw.choice(["stop", "abort"]), "tokens": 3, "seconds": 0.5}
        records = [
            said(len(nodes), at, draw.choice(["user", "assistant", "system"]), "t", time=2.0, side=draw.randint(0, 1)),
            {"type": "text", "id": at, "text": "more"},
            end,
            {"type": "head", "id": at, "side": draw.randint(0, 1)},
            {"type": "set", "name": "seed", "value": draw.choice([1, None])},
            {"type": "train", "id": at, "train": True},
        ]
        before = vars(dialogue.copy())
        try:
            dialogue.apply(draw.choice(records))
        except ValueError:
            assert vars(dialogue) == before, "a record that does not fit changes nothing"
    other = Dialogue("x")
    for record in dialogue.records():
        other.apply(json.loads(json.dumps(record)))
    assert vars(other) == vars(dialogue)


WRITER = """
import sys
from pathlib import Path
from lit_llama.generate.chat.store import Store
store = Store(Path(sys.argv[1]))
id = store.create("killed")
for number in range(1, 100000):
    role = "user" if number % 2 else "assistant"
    record = {"type": "message", "id": number, "parent": number - 1, "role": role, "content": str(number) * 500}
    store.write(id, record, wait=number % 50 == 0)
    print(number, flush=True)
"""


def test_kill_loses_nothing_that_was_said_to_be_kept(tmp_path: Path) -> None:
    """An answer that was shown and is gone after kill -9, or a lock that outlives its holder."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(120)]
    process.send_signal(signal.SIGKILL)
    told += process.stdout.read().splitlines()
    process.wait()
    last = int(told[-1]) if told[-1].strip() else int(told[-2])
    store = Store(tmp_path)
    (summary,) = store.list()
    dialogue = store.get(summary.id)
    assert len(dialogue.nodes) >= last and texts(dialogue)[:last] == [str(n) * 500 for n in range(1, last + 1)]
    store.write(summary.id, {"type": "name", "name": "goes on"})
    assert Store(tmp_path).get(summary.id).name == "goes on"


def test_a_line_cut_at_any_byte_is_set_aside(tmp_path: Path) -> None:
    """A torn last line that spoils the next one written behind it, or that takes the rest with it."""
    store = Store(tmp_path)
    id = filled(store, 1)
    path = tmp_path / f"{id}.jsonl"
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in (start + 1, start + 20, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        other = Store(tmp_path)
        unended = cut == len(whole) - 1  # only its end is missing
        assert texts(other.get(id)) == (["question 0", "answer 0"] if unended else ["question 0"])
        assert bool(other.remarks) is not unended
        other.write(id, said(9, 1, "assistant", "again"))
        assert texts(Store(tmp_path).get(id))[-1] == "again"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (0, ["question 0", "answer 0", "question 1", "answer 1"]),
        (1, ["answer 0", "question 1", "answer 1"]),
        (2, ["question 0", "question 1", "answer 1"]),
        (3, ["question 0", "answer 0", "answer 1"]),
    ],
)
@pytest.mark.parametrize(
    "damage", [b"\x00\xff" * 9, b"[1]", b'{"type": "new"}', b'{"type":"message","id":NaN}', b"[" * 10**5]
)
def test_a_damaged_store_keeps_what_can_be_read(tmp_path: Path, line: int, kept: list[str], damage: bytes) -> None:
    """One bad line that makes a conversation unreadable, or that vanishes without a word."""
    store = Store(tmp_path)
    id, other_id = filled(store), filled(store, name="untouched")
    path = tmp_path / f"{id}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = damage + b"\n"
    path.write_bytes(b"".join(lines))
    store = Store(tmp_path)
    found = [text for text in texts(store.get(id)) if text in ("question 0", "answer 0", "question 1", "answer 1")]
    if line == 1:  # an answer whose question is lost has no place of its own
        kept = ["question 1", "answer 1"]
    assert found == kept
    (remark,) = store.remarks
    damaged = path.with_suffix(".damaged")
    assert f"{path}: " in remark and f"(line {line + 1} " in remark and str(damaged) in remark
    assert damage in damaged.read_bytes()
    again = Store(tmp_path)
    assert [t for t in texts(again.get(id)) if t in kept] == kept and again.remarks == []
    assert len(texts(again.get(other_id))) == 4 and len(again.list()) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"type": "dialogue", "format": 2, "id": "other", "name": "n", "time": 0}\n{"type": "x"}\n', "has format 2"),
        ('{"type": "dialogue", "format": "2", "name": "n", "time": 0}\n', "has format '2'"),
        ('{"type": "dialogue", "format": 0, "name": "n", "time": 0}\n', "has format 0"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"instruction": "b"}\n', "holds no conversation (line 1 "),
        ("some words", "holds no conversation (line 1 "),
    ],
)
def test_files_of_others_are_left_alone_and_named(tmp_path: Path, text: str, told: str) -> None:
    """A file of a later version, or rows for training, that are taken for damage, and so emptied."""
    filled(Store(tmp_path))
    other = tmp_path / "other.jsonl"
    other.write_text(text)
    store = Store(tmp_path)
    for _ in range(2):
        assert [summary.name for summary in store.list()] == ["a"]
    (remark,) = store.remarks
    assert f"{other}: " in remark and told in remark and other.read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "other.jsonl", f"{store.list()[0].id}.jsonl"}
    other.unlink()
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / f"{store.list()[0].id}.jsonl").read_bytes())
    assert len(store.list()) == 2


@pytest.mark.parametrize("field", ["time", "id", "parent"])
def test_numbers_too_large_to_convert_are_damage_of_one_line(tmp_path: Path, field: str) -> None:
    """A number of 400 digits whose OverflowError hides all conversations."""
    store = Store(tmp_path)
    id = filled(store)
    with (tmp_path / f"{id}.jsonl").open("a") as file:
        file.write(json.dumps(said(5, 4, "user", "huge") | {field: 10**400}) + "\n")
    store = Store(tmp_path)
    assert [summary.messages for summary in store.list()] == [4]
    assert f"(line 6 {field} is 1000" in store.remarks[0] and len(store.remarks[0]) < 500


def test_many_rows_are_loaded_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the names of all conversations looked up for each row, and half of a file that stays on a full disk."""
    looked = 0
    scan = os.scandir

    def counted(path: Any) -> Any:
        nonlocal looked
        looked += 1
        return scan(path)

    monkeypatch.setattr(os, "scandir", counted)
    store = Store(tmp_path / "store")
    filled(store, name="rows 3")
    looked = 0
    ids = store.load([("rows", [said(1, 0, "user", f"question {number}")]) for number in range(40)])
    assert looked < 10
    assert len(set(ids)) == 40 and texts(store.get(ids[7])) == ["question 7"]
    names = [store.get(id).name for id in ids]
    assert names[:4] == ["rows", "rows 2", "rows 4", "rows 5"] and len(set(names)) == 40
    write, before = lines.write_new, sorted(tmp_path.rglob("*"))

    def full(path: Path, data: bytes) -> None:
        if b"question 3" in data:
            raise ResourceError("the disk is full")
        write(path, data)

    monkeypatch.setattr("lit_llama.generate.chat.store.write_new", full)
    with pytest.raises(ResourceError):
        store.load([("more", [said(1, 0, "user", f"question {number}")]) for number in range(5)])
    assert sorted(tmp_path.rglob("*")) == before and len(store.list()) == 41


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line in the file, or a message in memory that is not on the disk."""
    store = Store(tmp_path)
    id = filled(store)
    path, before = tmp_path / f"{id}.jsonl", (tmp_path / f"{id}.jsonl").read_bytes()
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 7:
            return write(descriptor, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ResourceError, match=r"cannot be written: No space left on device; .* free on the disk"):
            store.write(id, said(5, 4, "user", "lost"))
    assert path.read_bytes() == before and len(store.get(id).nodes) == 4
    store.write(id, said(5, 4, "user", "kept"))
    assert texts(Store(tmp_path).get(id))[-1] == "kept"


def test_two_stores_see_what_the_other_writes(tmp_path: Path) -> None:
    """Two processes that overwrite each other's lines, or go on from what they knew at their start."""
    one, two = Store(tmp_path), Store(tmp_path)
    id = filled(one, 1)
    assert len(two.get(id).nodes) == 2
    snapshot = two.get(id)
    two.write(id, said(3, 2, "user", "from two"))
    one.write(id, said(4, 3, "assistant", "from one"))
    assert texts(two.get(id))[2:] == ["from two", "from one"] and len(snapshot.nodes) == 2
    with pytest.raises(UserError, match="cannot go on so: id is 4, expected a new one"):
        two.write(id, said(4, 3, "assistant"))
    two.delete(id)
    assert one.list() == []
    with pytest.raises(UserError, match="there is no conversation"):
        one.write(id, said(5, 4, "user"))


def test_threads_and_stores_lose_no_record(tmp_path: Path) -> None:
    """Ids given twice, or lines that are torn apart by other writers."""
    stores = [Store(tmp_path), Store(tmp_path)]
    id = stores[0].create("shared")

    def work(store: Store) -> None:
        for _ in range(15):
            store.change(id, lambda dialogue: [said(dialogue.next_id, 0, "user")], wait=False)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh = Store(tmp_path)
    assert list(fresh.get(id).nodes) == list(range(1, 61)) and fresh.remarks == []


def test_a_lock_that_is_not_let_go_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat that hangs for ever behind another process."""
    monkeypatch.setattr(lines, "_WAIT", 0.0)
    store = Store(tmp_path)
    filled(store)
    with lines.locked(tmp_path / ".lock"), pytest.raises(LockedError, match="another process holds"):
        Store(tmp_path).list()
    assert len(store.list()) == 1


@pytest.mark.parametrize("name", ["", " ", "a\x1b[2J", "x" * 101, "taken"])
def test_names_are_new_and_printable(tmp_path: Path, name: str) -> None:
    """Two conversations of one name, or a name that acts on the terminal."""
    store = Store(tmp_path)
    store.create("taken")
    id = store.create("other")
    with pytest.raises(UserError, match=r"is none|already"):
        store.rename(id, name)
    store.rename(id, "other")
    assert store.free_name("taken") == "taken 2"


@pytest.mark.parametrize("id", ["../secret", "", ".hidden", "a/b", "a\0b", "nothing", "x" * 300])
def test_ids_stay_in_the_folder(tmp_path: Path, id: str) -> None:
    """An id of a request that names a file elsewhere."""
    (tmp_path / "secret.jsonl").write_text("")
    store = Store(tmp_path / "store")
    for act in (store.get, store.delete):
        with pytest.raises(UserError):
            act(id)
    assert (tmp_path / "secret.jsonl").exists()


def test_links_in_the_store_are_not_followed(tmp_path: Path) -> None:
    """A link at the name of a conversation that has a file elsewhere written to."""
    target = tmp_path / "target"
    target.write_text("precious\n")
    store = Store(tmp_path / "store")
    filled(store)
    (tmp_path / "store" / "link.jsonl").symlink_to(target)
    assert len(store.list()) == 1
    with pytest.raises(UserError):
        store.write("link", {"type": "name", "name": "x"})
    assert target.read_text() == "precious\n"


def test_the_place_of_the_user_is_by_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Conversations among the files of whatever folder a command was run in."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "lit_llama" / "conversations"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder().is_relative_to(tmp_path) and default_folder().parts[-2:] == ("lit_llama", "conversations")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder of conversations"):
        Store(tmp_path / "file")
