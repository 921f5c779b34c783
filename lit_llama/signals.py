"""Signals that end a command: quietly, from its first statement to its last. Importing this installs nothing.

Only light modules are imported here: until `begin` has run, Ctrl-C prints a traceback.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def begin(name: str) -> None:
    """Let signals end a script at once, with no words; it is its first statement, before what takes long to import.

    Args:
        name: `__name__` of the script; nothing is installed where somebody imports it.
    """
    if name == "__main__":
        _install(_leave)


def unwind() -> None:
    """Let signals unwind the command, which clears away what is half made; their default action would not."""
    _install(_unwind)


def leave() -> None:
    """Let signals end the process at once again: all is done, though threads may still be ending."""
    _install(_leave)


def _install(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _ENDING:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # SIGHUP is ignored under nohup
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _unwind(number: int, frame: FrameType | None) -> None:
    """Raise what unwinds, but while torch is imported, end: nothing is half made then, and its C++ code drops
    exceptions that come while it imports NumPy."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch" and frame.f_code.co_name == "<module>":
            _leave(number, frame)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
