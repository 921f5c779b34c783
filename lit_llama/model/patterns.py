"""Regular expressions of foreign files, such as those in an adapter's settings: matched within bounds of time.

Python's engine may try more ways to match a name of forty letters than there is time for. What is no plain choice of
names is therefore matched in a process of its own, which ends with a match that takes too long. The file imports
nothing of the library at its head, as that process runs it.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from functools import lru_cache
from threading import Lock
from typing import Literal

SECONDS = 2.0
_LONGEST = 10_000
_MEMORY = 512 << 20
_NAMES = r"(?:[\w.|-]|\\[.dw])*"
_PLAIN = re.compile(rf"(?:\((?:\?:)?\.\*\\\.\)\?)?(?:\((?:\?:)?)?{_NAMES}(?:\((?:\?:)?{_NAMES}\))?{_NAMES}\)?")
"""Names, or one choice of them, behind any beginning: there are few ways to match that."""


def check_pattern(pattern: str) -> None:
    """Raise ValueError unless `pattern` is a regular expression."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"a regular expression has {len(pattern):,} characters, expected at most {_LONGEST:,}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def matches_whole(pattern: str, text: str) -> bool:
    """Whether a regular expression describes all of `text`.

    Raises:
        CheckpointError: It is none, or finding that out takes too long.
    """
    return _matches("fullmatch", pattern, text)


def matches_start(pattern: str, text: str) -> bool:
    """Whether `text` begins with what a regular expression describes; raises what `matches_whole` does."""
    return _matches("match", pattern, text)


@lru_cache(100_000)
def _matches(how: Literal["fullmatch", "match"], pattern: str, text: str) -> bool:
    from lit_llama.errors import CheckpointError

    try:
        check_pattern(pattern)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if _PLAIN.fullmatch(pattern) and len(text) <= _LONGEST:
        return getattr(re, how)(pattern, text) is not None
    found = _PROCESS.ask(json.dumps([how, pattern, text, SECONDS]))
    if found is None:
        shown = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
        raise CheckpointError(
            f"the regular expression {shown!r} does not find out within {SECONDS:g} s whether it means {text[:80]!r}: "
            "name the modules instead"
        )
    return found


class _Process:
    """Started when it is needed; a new one where the last has ended, or belongs to a process that this came from."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: str) -> bool | None:
        """The answer to a request; None if there is none."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(f"{request}\n")
                process.stdin.flush()
                if (line := process.stdout.readline()).endswith("\n"):
                    return bool(json.loads(line))
            except BrokenPipeError:
                pass
            except BaseException:  # Ctrl-C: the reply would be taken for that of the next request
                process.kill()
                process.wait()
                raise
            process.wait()
            return None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C is meant for the caller
            )
            self._owner = os.getpid()
        return self._process


_PROCESS = _Process()


def _main() -> None:
    """Answer until the input ends. A match that takes too long ends the process."""
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        how, pattern, text, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # of this process alone: other work does not count
        found = getattr(re, how)(pattern, text) is not None
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _main()
