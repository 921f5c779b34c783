"""Signals that end a run: the step is finished first."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; what schedulers and `kill` send; a terminal that is closed; what SLURM sends ahead of the end of the time,
when asked to."""


class Interrupt:
    """Inside this context the signals are noted and not acted upon; outside they do what they did before.

    A SIGINT after any of them raises KeyboardInterrupt: stop now. A signal that is ignored stays ignored, as SIGINT is
    for a job in the background.

    Args:
        quiet: Say nothing when a signal comes; one of several processes is enough to say it.

    Attributes:
        received: The first signal, once there is one.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets no other thread set handlers
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        if self._quiet:
            return
        # Not by print: the signal may have come in the middle of one. The terminal may be gone.
        said = f"\n{signal.Signals(number).name}: finishing the step, then saving; Ctrl-C stops now\n"
        with contextlib.suppress(OSError):
            os.write(2, said.encode())
