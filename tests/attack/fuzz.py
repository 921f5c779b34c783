"""Files of every kind that is read, and values of flags, changed at random: each is used, or refused in one line.

A case is a function of (seed, number). Several cases run in a fork of this process, which has imported all; each has
its own seconds of the processor, and the fork a bound of memory. What ends otherwise than in success or an error of
ours is printed with its seed, and its files are kept.
"""

import gc
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forks import ended
from fuzz_targets import SECONDS, Target, targets, text_file
from mutations import BY_ENDING, any_bytes
from world import Result, World

from lit_llama.errors import UserError

_WAITED = 300
_MEMORY = 3 << 30
_TOGETHER = 20
"""Cases of one fork."""


@dataclass(frozen=True)
class _Case:
    """One change, drawn from (seed, number)."""

    number: int
    target: Target
    draw: random.Random

    def prepare(self, folder: Path) -> str:
        """Make the changed copy; gives what was done."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.target.home, folder, symlinks=True)
        if not self.target.files:
            (folder / "draw").write_text(str(self.draw.random()))
            return "draw"
        name = self.draw.choice(self.target.files)
        path = folder / name
        other = (self.target.home / self.draw.choice(self.target.files)).read_bytes()
        mutate = BY_ENDING.get(path.suffix, any_bytes)
        path.write_bytes(mutate(path.read_bytes(), self.draw, other))
        return name


def attack(world: World, trials: int, seed: int) -> Result:
    """Read changed files, and give commands changed values."""
    result = Result("fuzz")
    made = list(targets(world))
    kept = Path(tempfile.gettempdir()) / f"fuzz-{seed}"
    shutil.rmtree(kept, ignore_errors=True)
    weighed = [target for target in made for _ in range(target.share)]
    numbers = range(trials)
    by_target: dict[str, list[_Case]] = {}
    for number in numbers:
        draw = random.Random(f"{seed}-{number}")
        target = draw.choice(weighed)
        by_target.setdefault(target.name, []).append(_Case(number, target, draw))
    gc.collect()
    gc.freeze()
    for cases in by_target.values():
        left = cases
        while left:
            outcomes = _run(left[:_TOGETHER], world.home / "case")
            for case, (what, told) in zip(left, outcomes, strict=False):
                result.trials += 1
                result.count(what)
                if what not in ("used", "refused"):
                    kept.mkdir(exist_ok=True)
                    place = kept / str(case.number)
                    case.draw.seed(f"{seed}-{case.number}")
                    case.draw.choice(weighed)
                    name = case.prepare(place)
                    result.wrong.append(f"{case.target.name} {seed}-{case.number} {what}, {place / name}: {told}")
            left = left[len(outcomes) :]
    return result


def _run(cases: Sequence[_Case], folder: Path) -> list[tuple[str, str]]:
    """What came of these cases, up to one that ended the fork."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            _work(cases, folder, writing)
        except BaseException:
            os.write(writing, pickle.dumps(("no case", traceback.format_exc()[-600:])))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found: list[tuple[str, str]] = []
        try:
            while len(found) < len(cases):
                found.append(pickle.load(pipe))
        except EOFError:
            pass
    status = ended(pid)
    if len(found) < len(cases):
        what = {-signal.SIGXCPU: "hang", -signal.SIGALRM: "waits", -signal.SIGKILL: "killed"}.get(status, "crash")
        found.append((what, f"status {status}"))
    return found


def _work(cases: Sequence[_Case], folder: Path, pipe: int) -> None:
    os.setsid()
    sink = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(sink, number)
    sys.stdout, sys.stderr = text_file(1), text_file(2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.chdir(folder.parent)  # where a destination without a folder goes
    for case in cases:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + SECONDS, resource.RLIM_INFINITY))
        signal.alarm(_WAITED)
        case.prepare(folder)
        os.write(pipe, pickle.dumps(_outcome(case, folder)))
        signal.alarm(0)


def _outcome(case: _Case, folder: Path) -> tuple[str, str]:
    try:
        case.target.read(folder)
        return "used", ""
    except UserError as error:
        return judge(error)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "lit_llama" in frame.filename]
        return "traceback", f"{type(error).__name__}: {str(error)[:300]!r} at {' '.join(ours[-4:])}"


def judge(error: UserError) -> tuple[str, str]:
    """Whether a message of ours says something."""
    line = " ".join(str(error).split())
    if not line.encode("utf-8", "backslashreplace"):
        return "silence", repr(error)
    return "refused", line
