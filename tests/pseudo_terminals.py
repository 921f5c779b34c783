"""Scripts on a terminal of their own, and which bytes that arrive there act."""

import functools
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Sequence

from forks import ROOT, all_of_terminal, become, ended, import_all

EVIL = "\x1b]0;owned\x07 \x1b[5;7m \x9b2J \r \x08 \x7f \u202e \u2066 \u061c \u200e a\u200bb a\u200db \ufeff"
"""Sets a title, blinks, clears, goes back, turns the direction, and hides letters."""
OWN = re.compile(r"\x1b\[[0-9;]*[mAKJ]|\x1b\[\?25[lh]|\r")
"""Colours, cursor up, erase, hide and show the cursor: what rich writes on its own account, which never blinks."""
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u061c\ufeff]")


def on_terminal(script: str, flags: Sequence[object], typed: str = "") -> tuple[int, str]:
    """Run a script on a terminal; gives its status and all that arrives there.

    Args:
        script: Such as finetune/lora.py.
        flags: Its command line.
        typed: On the keyboard.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    request = {"script": script, "flags": [*map(str, flags)], "typed": typed, "cwd": os.getcwd(), "env": {**os.environ}}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    reply = json.loads(server.stdout.readline())
    return reply["status"], reply["said"]


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported torch and computed nothing: forks of one that has computed hang in OpenMP."""
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def _serve() -> None:
    """Answer requests until the input ends: a fork on a terminal for each."""
    import_all()
    for line in sys.stdin:
        request = json.loads(line)
        pid, terminal = pty.fork()
        if not pid:
            os.environ.clear()
            os.environ.update(request["env"])
            os.chdir(request["cwd"])
            _own_streams()
            become(request["script"], request["flags"])
        if request["typed"]:
            os.write(terminal, request["typed"].encode())
        said = all_of_terminal(terminal, "surrogateescape")
        print(json.dumps({"status": ended(pid), "said": said}), flush=True)


def _own_streams() -> None:
    """Have Python's streams on the terminal in place of the pipes of the server."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", errors="backslashreplace")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.update({"TERM": "xterm", "COLUMNS": "400"})


def acts(said: str) -> list[str]:
    """What arrived on a terminal and acts there, but for what rich writes and the ends of lines."""
    found = said.replace("\r\n", "\n")
    return ACTING.findall(OWN.sub("", found)) + re.findall(r"\x1b\[5;7m", found)


if __name__ == "__main__":
    _serve()
