"""Processes for what others have made and no exception stops: programs, regular expressions, parsers in C++.

A script reads requests, one a line, and answers each in a line. It bounds its own memory and time: what is out of
bounds ends that process, and not the one that asks.
"""

import os
import subprocess
import sys
from pathlib import Path
from threading import Lock


class Bounded:
    """A process of a script: started when it is needed, and again where the last has ended or belongs to the process
    that this one was forked from.

    Args:
        script: The file. It imports nothing of the library, so that the process starts quickly.
    """

    def __init__(self, script: Path) -> None:
        self._script = script
        self._lock = Lock()
        self.process: subprocess.Popen[str] | None = None
        self._owner = 0

    def start(self) -> None:
        """Start the process, where it is not there: it takes a tenth of a second, in which the caller may go on."""
        with self._lock:
            self._started()

    def ask(self, request: str) -> str | int:
        """Ask with a line of ASCII; return the line that answers, or the status with which the process ended."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if line.endswith("\n"):
                    return line
            except BrokenPipeError:
                pass
            except BaseException:  # Ctrl-C: the reply would be taken for that of the next request
                process.kill()
                process.wait()
                raise
            return process.wait()

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self._owner != os.getpid() or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(self._script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C is meant for the caller
            )
            self._owner = os.getpid()
        return self.process
