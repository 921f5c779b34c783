"""Locks on folders: one holder, who is named, and nothing left behind."""

import errno
import fcntl
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lit_llama.errors import LockedError
from lit_llama.folder.lock import claim, hold, reserve


def test_the_second_is_turned_away_and_told_who_is_first(tmp_path: Path) -> None:
    """Catches a lock that locks nobody out, and one that is never given back."""
    lock = tmp_path / ".lock"
    holder = rf"another run is at work on out: process {os.getpid()} on \S+ since [-\d]+ [:\d]+[-+Z]"
    with hold(lock, Path("out")):
        with pytest.raises(LockedError) as caught, hold(lock, Path("out")):
            pytest.fail("the body was run")
        assert re.match(holder, str(caught.value))
        assert lock.exists(), "the first one still holds it"
    assert not lock.exists()
    with hold(lock, Path("out")):
        pass


def test_a_lock_that_somebody_left_is_taken_over(tmp_path: Path) -> None:
    """Catches a file that locks out everybody because a process was killed, and an old holder that is named."""
    lock = tmp_path / ".lock"
    lock.write_text("process 1 on elsewhere since long ago, which wrote a good deal more than the next one will")
    with hold(lock, Path("out")):
        assert lock.read_text().startswith(f"process {os.getpid()} on ") and "long ago" not in lock.read_text()


def test_a_lock_given_back_while_we_opened_it_is_not_mistaken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two holders: one of a file that is no longer there, and one of the file that took its name."""
    import fcntl

    lock, flock, calls = tmp_path / ".lock", fcntl.flock, []

    def late(*arguments: int) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            lock.unlink()  # as the holder before us does
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold(lock, Path("out")):
        assert lock.read_text().startswith("process")
    assert len(calls) == 2


def test_a_claim_makes_the_folder_and_takes_it_away_if_it_stays_empty(tmp_path: Path) -> None:
    """Catches folders made for nothing by a run that is refused, and a folder with contents that is removed."""
    with pytest.raises(ValueError), claim(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def enter(context: AbstractContextManager[None]) -> None:
    with context:
        pass


def test_a_destination_is_reserved_once_and_its_parts_with_it(tmp_path: Path) -> None:
    """Catches a command that waits for itself, two commands on one place, and locks or folders that stay."""
    place = tmp_path / "deep" / "name"
    with reserve(place), ThreadPoolExecutor(1) as others:
        with reserve(tmp_path / "deep" / ".." / "deep" / "name"):
            pass
        for again in (reserve, claim):
            with pytest.raises(LockedError, match="another run is at work on"):
                others.submit(enter, again(place)).result()
        others.submit(enter, reserve(tmp_path / "deep" / "other")).result()
    assert not (tmp_path / "deep" / ".name.lock").exists()
    place.mkdir(parents=True)
    with reserve(place):
        assert sorted(path.name for path in tmp_path.rglob("*.lock")) == [".lock", ".name.lock"]
    assert os.listdir(tmp_path / "deep") == ["name"] and not any(place.iterdir())


@pytest.mark.parametrize("name", [".lock", "../.name.lock"])
def test_a_folder_is_locked_by_either_of_its_locks(tmp_path: Path, name: str) -> None:
    """Catches two containers that have one folder at two places, and a folder that was made after the first began."""
    place = tmp_path / "name"
    place.mkdir(parents=True)
    with hold(place / name, place), pytest.raises(LockedError), reserve(place):
        pytest.fail("the body was run")


def test_a_disk_without_locks_is_gone_on_with_only_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a network disk on which nothing can be made, and a run on it that another one may spoil."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with reserve(tmp_path / "name", required=False), pytest.raises(OSError, match="not supported"):
        enter(reserve(tmp_path / "name"))
