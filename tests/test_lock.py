"""Locks on folders: one holder, who is named, and nothing left behind."""

import os
import re
from pathlib import Path

import pytest

from lit_llama.errors import LockedError
from lit_llama.lock import claim, hold


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
