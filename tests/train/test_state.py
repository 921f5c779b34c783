"""State folders on the disk: the order in which they are written, and which of them go."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lit_llama.errors import IntegrityError, ResourceError
from lit_llama.folder.manifest import MANIFEST, write_manifest
from lit_llama.train import state
from lit_llama.train.loop import Progress
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.state import STATE_FILE, find_states, read_record, read_state, save_state
from lit_llama.train.stopping import Best


def write(folder: Path) -> Mapping[str, Any]:
    (folder / OPTIMIZER_FILE).write_bytes(b"moments")
    (folder / "weights").write_bytes(b"weights")
    return {"step": 1}


def names(states: Path) -> list[str]:
    return sorted(path.name for path in states.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the names of open files are read from /proc")
def test_everything_is_on_the_disk_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a state that a loss of power leaves under its name with empty files: a kill cannot show that, so the
    calls are looked at. Every file and the folder are synced, then it is renamed, then the parent is synced."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def record_sync(descriptor: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        calls.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    folder = save_state(tmp_path / "states", 7, write, 100)
    (at,) = [index for index, call in enumerate(calls) if call == ("rename", "step-000007")]
    before = [name for kind, name in calls[:at] if kind == "sync"]
    staging = next(name for name in before if name.startswith(".step-000007"))
    assert {"weights", OPTIMIZER_FILE, STATE_FILE, MANIFEST, staging, tmp_path.name} == set(before)
    assert before[-1] == staging and calls[at + 1] == ("sync", "states")
    assert read_state(folder) == {"step": 1}


def test_two_states_stay(tmp_path: Path) -> None:
    """Catches a disk that fills up, and an only state that is the damaged one. 999999 comes before 1000000."""
    states = tmp_path / "states"
    for step in (5, 10, 999_999, 1_000_000):
        save_state(states, step, write, 100)
    assert [path.name for path in find_states(states)] == ["step-999999", "step-1000000"] and len(names(states)) == 2


def test_an_old_state_goes_only_when_the_new_one_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches good states that are removed in favour of one that the disk has spoiled."""
    states = tmp_path / "states"
    for step in (1, 2):
        save_state(states, step, write, 100)

    def spoil(folder: Path, known: Mapping[str, str]) -> None:
        write_manifest(folder, known)
        (folder / "weights").write_bytes(b"weighty")

    write_manifest = state.write_manifest
    monkeypatch.setattr(state, "write_manifest", spoil)
    with pytest.raises(IntegrityError, match="step-000003/weights is damaged"):
        save_state(states, 3, write, 100)
    assert names(states) == ["step-000001", "step-000002", "step-000003"]
    assert read_state(states / "step-000002")


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path: Path) -> None:
    """Catches minutes of writing that end in an error, and an error that does not say how much is missing."""
    save_state(tmp_path / "states", 1, write, 100)
    with pytest.raises(ResourceError, match=r"B free, 1020\.00 TB are needed.*step-000001 stays"):
        save_state(tmp_path / "states", 2, write, 10**15)
    assert names(tmp_path / "states") == ["step-000001"]


def test_a_file_that_is_not_in_the_manifest_is_no_part_of_a_state(tmp_path: Path) -> None:
    """Catches a manifest that lost a line, and with it the proof of a file; a desktop's hidden file does no harm."""
    folder = save_state(tmp_path / "states", 1, write, 100)
    (folder / ".DS_Store").write_bytes(b"x")
    read_state(folder)
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(line for line in lines if "weights" not in line))
    with pytest.raises(IntegrityError, match="does not name weights"):
        read_state(folder)


RECORD: dict[str, Any] = {
    "progress": asdict(Progress(step=3, losses=[1.0])),
    "best": Best().state(),
    "scaler": {},
    "identity": {"--seed": 1},
    "environment": {"torch": "2"},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"progress": []}, "progress is "),
        ({"progress": None}, "has no progress"),
        ({"progress": RECORD["progress"] | {"step": "3"}}, "progress: step is '3', expected a whole number"),
        ({"progress": RECORD["progress"] | {"step": 10**30}}, "progress: step is 1000"),
        ({"progress": RECORD["progress"] | {"begun": 1}}, "progress: begun is 1, expected true or false"),
        ({"progress": {"step": 3}}, "progress has step, expected step, trained_tokens"),
        ({"best": RECORD["best"] | {"step": None}}, "best has no step"),
        ({"best": RECORD["best"] | {"loss": float("nan")}}, "best: loss is nan"),
        ({"identity": "x"}, "identity is 'x', expected an object"),
    ],
)
def test_a_state_of_another_form_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """Catches a traceback in a run that goes on, over a state whose hashes are right."""

    def save(record: dict[str, Any]) -> None:
        (tmp_path / STATE_FILE).write_text(json.dumps(record))
        (tmp_path / OPTIMIZER_FILE).touch()
        write_manifest(tmp_path, {})

    save(RECORD)
    assert read_record(tmp_path) == RECORD
    (tmp_path / MANIFEST).unlink()
    save(RECORD | change)
    with pytest.raises(IntegrityError, match=rf"state\.json.*{said}"):
        read_record(tmp_path)
