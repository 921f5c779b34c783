"""Regular expressions of foreign files, such as those in an adapter's settings: matched within bounds of time.

Python's engine may try more ways to match a name of forty letters than there is time for. What is no plain choice of
names is therefore matched in a process of its own, which ends with a match that takes too long. The file imports
nothing of the library at its head, as that process runs it.
"""

import json
import re
import resource
import signal
import sys
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lit_llama.bounded import Bounded

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
    found = _process().ask(json.dumps([how, pattern, text, SECONDS]))
    if not isinstance(found, str):
        shown = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
        raise CheckpointError(
            f"the regular expression {shown!r} does not find out within {SECONDS:g} s whether it means {text[:80]!r}: "
            "name the modules instead"
        )
    return bool(json.loads(found))


@cache
def _process() -> "Bounded":
    from lit_llama.bounded import Bounded

    return Bounded(Path(__file__))


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
