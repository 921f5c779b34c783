"""Runs of twelve steps that end too early, and the one that was never stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import DROPOUT, TWELVE, Killed, run, stop_after


@pytest.fixture(scope="module")
def straight(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps without a stop. Do not change it."""
    return run(tiny_folder, data, tmp_path_factory.mktemp("resume") / "straight", DROPOUT, TWELVE)


def begin(checkpoint: Path, data: Path, out: Path, last: int, **changes: Any) -> Path:
    """A run of which `last` steps are done."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, last)
        with pytest.raises(Killed):
            run(checkpoint, data, out, DROPOUT, replace(TWELVE, **changes))
    return out


@pytest.fixture
def stopped(tiny_folder: Path, data: Path, tmp_path: Path) -> Path:
    """A run of which three steps are done; states of steps 2 and 3."""
    return begin(tiny_folder, data, tmp_path / "out", 3)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
