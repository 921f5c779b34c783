"""Folders that appear whole or not at all."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_llama.errors import ResourceError, UserError
from lit_llama.folder.manifest import sha256_file
from lit_llama.folder.publish import (
    check_destination,
    publish,
    replace_file,
    resume,
    write_json,
    write_json_lines,
)

MARKER = "meta.json"


def fill(folder: Path, text: str = "new") -> None:
    (folder / "train").mkdir()
    (folder / "train" / "data.arrow").write_text(text)
    (folder / "a.txt").write_text(text)
    (folder / "z.txt").write_text(text)
    (folder / MARKER).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


WHOLE = ["SHA256SUMS", "a.txt", "meta.json", "train", "train/data.arrow", "z.txt"]


def test_a_new_folder_appears_with_all_its_contents(tmp_path: Path) -> None:
    """A parent that is not made, contents seen half-way, or a temporary folder left behind."""
    destination = tmp_path / "out" / "deep" / "name"
    with publish(destination, MARKER) as folder:
        assert not destination.exists() and folder.is_dir() and folder.parent == destination.parent
        fill(folder)
        assert not destination.exists()
    assert names(destination) == WHOLE
    assert [path.name for path in destination.parent.iterdir()] == ["name"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_no_folder(tmp_path: Path, error: BaseException) -> None:
    """Half a folder that looks like a whole one."""
    with pytest.raises(type(error)), publish(tmp_path / "name", MARKER) as folder:
        fill(folder)
        raise error
    assert names(tmp_path) == []


def test_a_failure_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    """The old contents removed before the new ones are there."""
    with publish(tmp_path / "name", MARKER) as folder:
        fill(folder, "old")
    with pytest.raises(ValueError), publish(tmp_path / "name", MARKER, replace=True) as folder:
        fill(folder)
        raise ValueError
    assert names(tmp_path / "name") == WHOLE and (tmp_path / "name" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_whole_destination_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    """Work of hours written over."""
    with publish(tmp_path / "name", MARKER) as folder:
        fill(folder, "old")
    with pytest.raises(UserError, match=r"name already holds meta\.json; name another folder"):
        check_destination(tmp_path / "name", MARKER)
    with pytest.raises(UserError, match="already holds"), publish(tmp_path / "name", MARKER):
        pytest.fail("the body was run")
    assert (tmp_path / "name" / MARKER).read_text() == "old"


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_in_the_way_is_refused(tmp_path: Path, replace: bool) -> None:
    """A file of the user's own replaced by a folder."""
    (tmp_path / "name").write_text("mine")
    with pytest.raises(UserError, match="is a file"), publish(tmp_path / "name", MARKER, replace=replace):
        pytest.fail("the body was run")
    assert (tmp_path / "name").read_text() == "mine"


KINDS = {"config.json": "a model", "adapter_config.json": "an adapter", "dataset_dict.json": "a data folder"}


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("made", ["config.json", "adapter_config.json", "meta.json"])
def test_a_folder_of_another_stage_is_left_alone(tmp_path: Path, made: str, there: str) -> None:
    """As `prepare --destination_path checkpoints/NAME` has it. Catches manifest, prompt style and meta.json of a model
    or adapter, its only proof of its base, replaced by those of the data."""
    for name in (there, "model.safetensors", "SHA256SUMS", MARKER):
        (tmp_path / name).write_text("old")
    if made == there or (made == MARKER and there == "dataset_dict.json"):
        check_destination(tmp_path, made, replace=True)
        return
    message = rf"is {KINDS[there]} \({there}\), whose files would be replaced"
    with pytest.raises(UserError, match=message), publish(tmp_path, made, replace=True):
        pytest.fail("it is made")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


def test_other_files_stay_and_ours_are_replaced_whole(tmp_path: Path) -> None:
    """Raw data lost, or old shards among the new ones in a folder of ours."""
    destination = tmp_path / "name"
    with publish(destination, MARKER) as folder:
        fill(folder, "old")
        (folder / "train" / "old-shard.arrow").write_text("old")
    (destination / "raw.json").write_text("mine")
    (destination / "notes").mkdir()
    (destination / "notes" / "n.txt").write_text("mine")
    with publish(destination, MARKER, replace=True) as folder:
        fill(folder)
    assert names(destination) == sorted([*WHOLE, "raw.json", "notes", "notes/n.txt"])
    assert {(destination / name).read_text() for name in ("a.txt", "z.txt", MARKER, "train/data.arrow")} == {"new"}
    assert (destination / "raw.json").read_text() == (destination / "notes" / "n.txt").read_text() == "mine"


def test_an_unfinished_destination_is_filled(tmp_path: Path) -> None:
    """A folder with raw data only, which is how prepare/alpaca.py finds it."""
    destination = tmp_path / "name"
    destination.mkdir()
    (destination / "raw.json").write_text("mine")
    with publish(destination, MARKER) as folder:
        fill(folder)
    assert names(destination) == sorted([*WHOLE, "raw.json"])


@pytest.mark.parametrize("failing", range(5))
def test_whatever_move_fails_no_marker_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """An old marker beside new files, or a new one beside old files: both look whole."""
    destination = tmp_path / "name"
    with publish(destination, MARKER) as folder:
        fill(folder, "old")
    move, moved = Path.replace, []

    def fail(self: Path, target: Path) -> Path:
        assert not (destination / MARKER).exists()
        if len(moved) == failing:
            raise OSError("disk full")
        moved.append(self.name)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"), publish(destination, MARKER, replace=True) as folder:
        fill(folder)
    assert not (destination / MARKER).exists() and MARKER not in moved
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    monkeypatch.undo()
    with publish(destination, MARKER) as folder:  # and the next run needs no help
        fill(folder)
    assert names(destination) == WHOLE


def test_contents_are_on_disk_before_they_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A marker that survives a power cut which its files do not."""
    events: list[str] = []
    sync, move = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def note_move(self: Path, target: Path) -> Path:
        events.append("move " + self.name)
        return move(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("file names of descriptors are read from /proc")
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "raw").write_text("an empty folder would be replaced in one step")
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_move)
    with publish(tmp_path / "name", MARKER) as folder:
        fill(folder)
    first = events.index("move a.txt")
    assert {"sync a.txt", "sync z.txt", "sync data.arrow", "sync train", f"sync {MARKER}"} <= set(events[:first])
    moves = [event for event in events if event.startswith("move")]
    assert moves[-1] == f"move {MARKER}" and len(moves) == 5
    assert events.index(f"move {MARKER}") < max(i for i, event in enumerate(events) if event == "sync name")


def test_leftovers_of_a_killed_process_do_not_disturb(tmp_path: Path) -> None:
    """A name that is taken, or old files that get into the new folder."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lit_llama.folder.publish import publish\n"
        "with publish(Path(sys.argv[1]), 'meta.json') as folder:\n"
        "    (folder / 'meta.json').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "name")], env=environment, timeout=60)
    assert killed.returncode == -9 and not (tmp_path / "name").exists()
    assert any(path.name.startswith(".name.partial-") for path in tmp_path.iterdir())
    (tmp_path / ".name.partial-notes").mkdir()  # of somebody else
    with publish(tmp_path / "name", MARKER) as folder:
        fill(folder)
    assert names(tmp_path) == [".name.partial-notes", "name", *(f"name/{name}" for name in WHOLE)]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_what_was_begun_is_found_again(tmp_path: Path, error: BaseException) -> None:
    """A transfer of hours thrown away by an interruption, or half of it taken for the whole."""
    destination = tmp_path / "deep" / "name"
    with pytest.raises(type(error)), publish(destination, MARKER, keep=True) as folder:
        (folder / "begun").write_text("half")
        raise error
    assert names(tmp_path / "deep") == [".name.unfinished", ".name.unfinished/.unfinished", ".name.unfinished/begun"]
    with publish(destination, MARKER, keep=True) as folder:
        assert (folder / "begun").read_text() == "half"
        fill(folder)
    assert names(tmp_path / "deep") == sorted(["name", "name/begun", *(f"name/{name}" for name in WHOLE)])
    with pytest.raises(UserError, match="already holds"), publish(destination, MARKER, keep=True):
        pytest.fail("the body was run")


def test_nothing_begun_leaves_nothing(tmp_path: Path) -> None:
    """Hidden folders and locks that pile up with each failure."""
    with pytest.raises(ValueError), publish(tmp_path / "name", MARKER, keep=True):
        raise ValueError
    assert names(tmp_path) == []


def test_an_existing_folder_is_filled_with_what_was_begun(tmp_path: Path) -> None:
    """Files of the user's own lost, or a hidden folder left behind."""
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "raw.json").write_text("mine")
    with publish(tmp_path / "name", MARKER, keep=True) as folder:
        fill(folder)
    assert names(tmp_path / "name") == sorted([*WHOLE, "raw.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Two processes in one folder, or a process that was killed and locks out every other."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom lit_llama.folder.publish import publish\n"
        "with publish(Path(sys.argv[1]), 'meta.json', keep=True) as folder:\n"
        "    (folder / 'begun').write_text('half')\n    print(flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, str(tmp_path / "name")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(ResourceError, match="another run is at work"),
            publish(tmp_path / "name", MARKER, keep=True),
        ):
            pytest.fail("the body was run")
        assert names(tmp_path / ".name.unfinished") == [".unfinished", "begun"]
        other.kill()
    with publish(tmp_path / "name", MARKER, keep=True) as folder:
        fill(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_parent_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """An error without a place, or a body run for nothing."""
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"cannot be made: \S+/file is a file"),
        publish(tmp_path / "file" / "name", MARKER),
    ):
        pytest.fail("the body was run")
    if os.geteuid() == 0:
        return  # root writes everywhere
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(UserError, match="no leave to write into"), publish(locked / "name", MARKER):
        pytest.fail("the body was run")


def test_json_is_utf8_in_the_order_given(tmp_path: Path) -> None:
    """Escapes that nobody can read, or sorted keys."""
    write_json(tmp_path / "x.json", {"b": "Zoë 北京", "a": [1]})
    assert (tmp_path / "x.json").read_bytes().decode() == '{\n  "b": "Zoë 北京",\n  "a": [\n    1\n  ]\n}\n'


def test_lines_appear_when_all_are_written(tmp_path: Path) -> None:
    """Half a file after a failure."""
    path = tmp_path / "new" / "rows.jsonl"

    def rows(last: Any) -> Iterator[Any]:
        yield {"a": "é\u2028"}
        assert path.exists() or re.fullmatch(r"\.rows\.jsonl\.partial-\w{8}", *names(tmp_path / "new"))
        yield last

    write_json_lines(path, rows(2))
    assert path.read_text("utf-8") == '{"a": "é\u2028"}\n2\n'
    with pytest.raises(TypeError):
        write_json_lines(path, rows(object()))
    assert path.read_text("utf-8") == '{"a": "é\u2028"}\n2\n' and names(tmp_path / "new") == ["rows.jsonl"]


@pytest.mark.parametrize("content", [b"", b"abc", b"x" * 3_000_000])
def test_hashes_are_sha256(tmp_path: Path, content: bytes) -> None:
    """A hash of the first block only."""
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that finds half of a file, and a half-written one that stays behind."""
    path = tmp_path / "page.html"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"

    def torn(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError("something else")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="something else"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_all_files_have_the_mode_of_a_new_one(tmp_path: Path, mask: int) -> None:
    """Catches weights that a colleague cannot read beside a config.json that he can."""
    before = os.umask(mask)
    try:
        with publish(tmp_path / "name", MARKER) as folder:
            fill(folder)
            (folder / "a.txt").chmod(0o600)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "name").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("damage", [b"\xff", b"{", b"[1]", b'{"file": "../precious", "sha256": "x"}', b'{"file": 3}'])
def test_a_damaged_journal_is_begun_anew(tmp_path: Path, damage: bytes) -> None:
    """Catches a traceback each time that the command is run, and a file outside that is taken for one of ours."""
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(KeyboardInterrupt), resume(tmp_path / "name", "plan") as staging:
        (staging.path / "whole").write_text("x")
        staging.finish("whole", {"sha256": sha256_file(staging.path / "whole")})
        raise KeyboardInterrupt
    journal = tmp_path / ".name.unfinished" / ".journal.jsonl"
    journal.write_bytes(journal.read_bytes() + damage + b"\n")
    with resume(tmp_path / "name", "plan") as staging:
        assert list(staging.done) == ["whole"]
        (staging.path / "SHA256SUMS").write_text("")
    assert (tmp_path / "precious").read_text() == "mine"
