"""Terminals that are closed, Ctrl-C twice, readers that go away, and signals from the very start of a process: no
traceback, and the work goes on or is kept."""

import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from forks import ROOT, all_of_terminal, ended
from world import Command, Result, World, straight


def attack(world: World, trials: int, seed: int) -> Result:
    """Disturb each command in turn, and run it again."""
    draw, result, log = random.Random(seed), Result("terminals"), world.home / "log"
    known = {command.name: straight(command, log) for command in world.commands}
    ways: list[tuple[str, Callable[[Command, int, random.Random], tuple[int, str]], set[int]]] = [
        ("closed terminal", _close, {129}),
        ("Ctrl-C twice", _interrupt, {130}),
        ("closed pipe", _pipe, {0}),
        ("signal at any moment", _early, {129, 130, 143}),
    ]
    while result.trials < trials:
        command = world.commands[result.trials % len(world.commands)]
        name, disturb, expected = ways[result.trials % len(ways)]
        wanted, calls = known[command.name]
        status, said = disturb(command, draw.randint(1, calls), draw)
        result.trials += 1
        result.count(f"{name}: status {status}")
        if "Traceback" in said or status not in {0, *expected, *command.again}:
            result.wrong.append(f"{command.name}, {name}: status {status}: {said[-400:]}")
        if name == "closed pipe" and (status or command.faults(wanted, last=True)):
            result.wrong.append(f"{command.name}, {name}: {status} {command.faults(wanted, last=True)}")
        result.wrong += [f"{command.name}, {name}: {fault}" for fault in command.faults(wanted, last=False)]
        if (status := command.run(log)) not in (0, *command.again):
            result.wrong.append(f"{command.name} again after {name}: status {status}: {log.read_text()[-300:]}")
        else:
            faults = command.faults(wanted, last=True)
            result.wrong += [f"{command.name} again after {name}: {fault}" for fault in faults]
        command.remove()
    return result


def _close(command: Command, at: int, draw: random.Random) -> tuple[int, str]:
    """Close the terminal at a call that changes a file; the command hears of it by SIGHUP and by its writes."""
    pid, terminal, reached = _on_terminal(command, at)
    os.read(reached, 1)
    os.close(reached)
    os.close(terminal)
    return ended(pid), ""


def _interrupt(command: Command, at: int, draw: random.Random) -> tuple[int, str]:
    """Type Ctrl-C twice, the second a moment after the first."""
    pid, terminal, reached = _on_terminal(command, at)
    os.read(reached, 1)
    os.close(reached)
    for pause in (draw.choice((0.0, 0.001, 0.02, 0.1)), 0.0):
        os.write(terminal, b"\x03")
        time.sleep(pause)
    said = all_of_terminal(terminal)
    return ended(pid), said


def _pipe(command: Command, at: int, draw: random.Random) -> tuple[int, str]:
    """Read a little of stdout and stderr together, then go away, as `2>&1 | head` does."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(reading)
        os.close(writing)
        command.become(lambda number: None)
    os.close(writing)
    said = os.read(reading, draw.randint(1, 200)).decode(errors="replace")
    os.close(reading)
    return ended(pid), said


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS = 3.0
"""In which the first signal of `_early` comes; a command takes about as long on an idle machine."""


def _early(command: Command, at: int, draw: random.Random) -> tuple[int, str]:
    """Begin a process as a user does, and send it one or two signals at random moments, most of them among its imports.

    Before the first line of a script runs, Python itself answers to signals: what it says of its own files then, and
    that it dies of the signal, is not the doing of the command.
    """
    script, *flags = map(str, command.words)
    words = [sys.executable, str(ROOT / script), *flags]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    for pause in (_SECONDS * draw.random() ** 2, draw.choice((0.0, 0.01, 0.3)))[: draw.randint(1, 2)]:
        time.sleep(pause)
        process.send_signal(draw.choice(_SIGNALS))
    said = process.communicate()[0].decode(errors="replace")
    if str(ROOT) not in said.replace(str(ROOT / ".venv"), ""):
        said = said.replace("Traceback", "")
    if process.returncode == 1 and "KeyboardInterrupt" in said and "Traceback" not in said:
        return 128 + signal.SIGINT, said
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, said


def _on_terminal(command: Command, at: int) -> tuple[int, int, int]:
    """Begin a command in the foreground of a terminal of its own; gives its process id, the other end of the terminal,
    and a pipe that tells when it has come to call `at`, or has ended."""
    reached, telling = os.pipe()
    pid, terminal = pty.fork()
    if pid:
        os.close(telling)
        return pid, terminal, reached
    os.close(reached)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def tell(number: int) -> None:
        if number == at:
            os.write(telling, b"x")
            time.sleep(0.05)  # the signal comes here, or soon

    command.become(tell)
