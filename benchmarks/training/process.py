"""Runs a program, and says how long it took, how much memory it held, and how busy the machine was before.

This process itself imports no torch: Linux counts what a parent held towards the peak of the child it starts.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_llama.errors import ResourceError

ROOT = Path(__file__).parent.parent.parent
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc keeps large freed blocks for the next use, as lit_llama asks it to: the tuned peers are given the same."""


@dataclass(frozen=True)
class Done:
    """A program that ended well.

    Attributes:
        stdout: All that it printed.
        started: In seconds of `time.monotonic`.
        seconds: From its start to its end.
        peak_rss: Most bytes resident, by the kernel's count.
        busy_before: Share of all processor time that others used in the second before.
    """

    stdout: str
    started: float
    seconds: float
    peak_rss: int
    busy_before: float


def run(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] = {}) -> Done:
    """Run a program from the root of the repository, on the processor.

    Args:
        command: Its words.
        log: File for its stderr; stdout goes beside it.
        environment: More variables.

    Raises:
        ResourceError: It failed; the message ends with its last line.
    """
    busy = busy_share()
    given = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **environment}
    given |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "TOKENIZERS_PARALLELISM": "true"}
    printed = log.with_suffix(".out")
    with log.open("w") as errors, printed.open("w") as out:
        started = time.monotonic()
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=given, stdout=out, stderr=errors)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (log.read_text("utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
        words = " ".join(str(word) for word in command[-3:])
        raise ResourceError(f"... {words} ended with status {process.returncode}, see {log}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Done(printed.read_text("utf-8"), started, seconds, usage.ru_maxrss * unit, busy)


def busy_share(seconds: float = 1.0) -> float:
    """Share of the time of all processors that is used just now, from /proc/stat; 0 where there is none."""
    before = _processor_times()
    time.sleep(seconds)
    used, total = (after - first for after, first in zip(_processor_times(), before, strict=True))
    return used / total if total else 0.0


def _processor_times() -> tuple[int, int]:
    """Ticks used and ticks in all since the machine started."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0, 0
    times = [int(word) for word in words]
    return sum(times) - times[3] - times[4], sum(times)  # but for idle and waiting for a disk


def check_idle(limit: float = 0.5, *, warn: bool) -> float:
    """The load average, if it is small enough: one other program changes results many times over.

    Raises:
        ResourceError: The machine is busy, and `warn` is false.
    """
    load = os.getloadavg()[0]
    if load > limit:
        message = f"the load average is {load:.2f}, expected {limit} or less: others use this machine"
        if not warn:
            raise ResourceError(f"{message}; wait, or take --when_busy warn for numbers that mean little")
        print(f"WARNING: {message}; the times below mean little", file=sys.stderr)
    return load
