"""Nothing of a run is lost: killed at any byte, on a full disk, or beside another run, the end has the same bytes."""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scripted_teacher import Make, ScriptedTeacher, echo, made
from scripted_teacher import recipe as recipe  # a fixture

from lit_llama.errors import LockedError, ResourceError
from lit_llama.generate.rows.make import make_rows
from lit_llama.generate.rows.run import Limits

LIMITS = Limits(rows=25)
KILLS = 60


def in_a_fork(act: Callable[[], object]) -> int:
    """Exit status of a fork of this process that does something; negative for a signal."""
    if not (pid := os.fork()):
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at_byte(size: int) -> None:
    """Have the kernel end this process where a file would get larger than this, after what still fits is written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_at_call(number: int, out: Path) -> None:
    """SIGKILL before the n-th call that opens for writing, renames, removes or cuts a file of a folder."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        reads = event == "open" and arguments[1] in (None, "r", "rb")
        if event in ("open", "os.rename", "os.remove", "os.truncate") and str(out) in str(arguments[0]) and not reads:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_in(seconds: float) -> None:
    """SIGKILL after a time."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def test_killed_at_any_moment_the_bytes_in_the_end_are_the_same(recipe: Make, tmp_path: Path) -> None:
    """Catches half a line taken for a whole one, a line written twice, and a file that a kill leaves in the way."""
    mine = recipe()
    start = time.monotonic()
    make_rows(mine, ScriptedTeacher(echo), tmp_path / "whole", limits=LIMITS)
    whole, seconds = made(tmp_path / "whole"), time.monotonic() - start
    draw, killed = random.Random(5), 0
    for folder in range(4):
        out = tmp_path / f"out{folder}"
        for attempt in range(KILLS // 4):
            size = max((path.stat().st_size for path in out.iterdir()), default=0) if out.exists() else 0
            how: list[Callable[[], object]] = [
                lambda size=size: die_at_byte(size + draw.randint(1, 4000)),
                lambda out=out: die_at_call(draw.randint(1, 12), out),
                lambda: die_in(draw.uniform(0.001, seconds)),
            ]
            kill, teacher = how[attempt % 3], ScriptedTeacher(echo, attempt)

            def run(kill: Callable[[], object] = kill, teacher: ScriptedTeacher = teacher, out: Path = out) -> None:
                kill()
                make_rows(mine, teacher, out, limits=LIMITS)

            draw.random()  # which the fork does with a copy
            status = in_a_fork(run)
            assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ)
            killed += status != 0
        make_rows(mine, ScriptedTeacher(echo, folder), out, limits=LIMITS)
        assert made(out) == whole
    assert killed > KILLS // 3


@contextmanager
def a_disk_with(size: int) -> Iterator[None]:
    """No file gets larger than this: EFBIG, which is a full disk for whoever writes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 300, 6000, 30_000])
def test_a_full_disk_is_told_and_the_same_command_goes_on(recipe: Make, tmp_path: Path, size: int) -> None:
    mine = recipe()
    make_rows(mine, ScriptedTeacher(echo), tmp_path / "whole", limits=LIMITS)
    with pytest.raises(ResourceError, match=r"out\S* cannot be written: .*make room"), a_disk_with(size):
        make_rows(mine, ScriptedTeacher(echo), tmp_path / "out", limits=LIMITS)
    make_rows(mine, ScriptedTeacher(echo, 1), tmp_path / "out", limits=LIMITS)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_two_runs_on_one_folder(recipe: Make, tmp_path: Path) -> None:
    """The second is refused, asks nobody anything, and the first ends as if it were alone."""
    mine, second, refused = recipe(), ScriptedTeacher(echo, 1), []

    def disturbed(key: tuple[int, str], ask: object) -> object:
        if key == (20, "task"):
            with pytest.raises(LockedError, match=rf"another run is at work on .*out: process {os.getpid()} on"):
                make_rows(mine, second, tmp_path / "out", limits=LIMITS)
            refused.append(key)
        return echo(key, ask)  # type: ignore[arg-type]

    make_rows(mine, ScriptedTeacher(echo), tmp_path / "whole", limits=LIMITS)
    make_rows(mine, ScriptedTeacher(disturbed), tmp_path / "out", limits=LIMITS)  # type: ignore[arg-type]
    assert refused and not second.asked and made(tmp_path / "out") == made(tmp_path / "whole")
