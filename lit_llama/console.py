"""Text on its way to a terminal: nothing in it acts there, and no word is broken at the edge.

Paths, rows and answers are words of others. On a terminal their control characters are spelled; into a pipe or a file
every text goes as it is.
"""

import contextlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TextIO

_ACTING = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # categories of Unicode: control, invisible, private, line ends
_JOINERS = "\u200c\u200d"  # which Persian words and family emoji are spelled with


def visible(text: str, *, lines: bool = False) -> str:
    """A text whose invisible and control characters are spelled, so that none acts on the terminal.

    Args:
        text: What is to be shown.
        lines: Spell ends of lines and tabs as well, as of a text that is part of a line.
    """
    return "".join(_spelled(c) if _acts(c) or (lines and c in "\n\t") else c for c in text)


def harmless(text: str, before: str = "") -> str:
    """The same for reading: joiners stay where they join.

    Args:
        text: What is to be shown.
        before: What was shown before it on the line, where a text comes in pieces.
    """
    if text.isascii() and text.isprintable():
        return text
    parts = []
    for c in text:
        joins = c in _JOINERS and not before.isascii() and not before.isspace()
        keeps = joins or not _acts(c)
        parts.append(c if keeps else _spelled(c))
        before = c if keeps else ""
    return "".join(parts)


def _acts(c: str) -> bool:
    return c not in "\n\t" and unicodedata.category(c) in _ACTING


def _spelled(c: str) -> str:
    return f"⟨U+{ord(c):04X}⟩"


def unbroken(text: str, width: int) -> str:
    """Fill up with blanks every row of a terminal whose last word would not end in it.

    The terminal then goes on with that word in the next row. No line end is put in, so that what is copied from there,
    a command perhaps, still is one line.
    """
    rows = []
    for line in text.split("\n"):
        shown, column = [], 0
        for index, word in enumerate(line.split(" ")):
            size = _cells(word)
            if index and column + 1 + size > width and size < width:
                shown.append(" " * max(1, width - column))
                column = 0 if column < width else 1
            elif index:
                shown.append(" ")
                column = (column + 1) % width
            shown.append(word)
            column = column + size if column + size <= width else (column + size) % width
        rows.append("".join(shown))
    return "\n".join(rows)


def _cells(word: str) -> int:
    """Columns that a word takes."""
    if word.isascii():
        return len(word)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in word)


def shown(text: str, stream: TextIO) -> str:
    """A text as it is to be written to a stream."""
    if not stream.isatty():
        return text
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal of its own, or none that knows
        width = 0
    text = harmless(text)
    return unbroken(text, width) if width else text


class Results:
    """Stdout for a text that comes in pieces, such as an answer."""

    def __init__(self) -> None:
        self._terminal, self._before = sys.stdout.isatty(), ""

    def write(self, text: str) -> None:
        """Show the next piece at once."""
        if self._terminal and text:
            last, text = text[-1], harmless(text, self._before)
            self._before = last if text.endswith(last) else ""
        print(text, end="", flush=True)


# ---- whether anything is said, and how commands are called


@dataclass
class Talk:
    """What one call says on its way.

    Attributes:
        aloud: Whether it goes to stderr as well; None where `verbose` decides.
        lines: Lines so far.
    """

    aloud: bool | None = None
    lines: list[str] = field(default_factory=list)


_talk: ContextVar[Talk | None] = ContextVar("talk", default=None)
_process = {"verbose": False, "command": False}


def verbose(on: bool = True) -> bool:
    """Have everything in this process say on stderr what it does; a library is silent until then.

    Args:
        on: False for silence again.

    Returns:
        Whether it was so before.
    """
    before, _process["verbose"] = _process["verbose"], on
    return before


def is_heard() -> bool:
    """Whether what is said, and progress, goes to stderr."""
    talk = _talk.get()
    return _process["verbose"] if talk is None or talk.aloud is None else talk.aloud


def keep_line(text: str) -> None:
    """Note a line for whoever has begun `talking`, heard or not."""
    if (talk := _talk.get()) is not None:
        talk.lines.append(text)


@contextlib.contextmanager
def talking(aloud: bool | None = None) -> Iterator[Talk]:
    """Gather what is said inside, in this thread.

    Args:
        aloud: Whether it goes to stderr as well; None leaves that to `verbose`, and to a call around this one.
    """
    outer = _talk.get()
    talk = Talk(outer.aloud if aloud is None and outer else aloud)
    token = _talk.set(talk)
    try:
        yield talk
    finally:
        _talk.reset(token)
        if outer is not None:
            outer.lines += talk.lines


def call_as_command() -> None:
    """Name other commands as `lit-llama prepare records` from here on, in place of scripts."""
    _process["command"] = True


def as_typed(text: str) -> str:
    """A text in which scripts of this project are named as the user has called this one."""
    return _SCRIPT.sub(r"lit-llama \1 \2", text) if _process["command"] else text


_SCRIPT = re.compile(r"(?<![\w./-])(?:python )?(prepare|finetune|generate)/([a-z]+)\.py\b")
