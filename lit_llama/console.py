"""Text on its way to a terminal: nothing in it acts there, and no word is broken at the edge.

Paths, rows and answers are words of others, and so are the errors and warnings that quote them. A door puts a `Guarded`
stream in the place of stdout and of stderr where they are terminals, which everything passes that is written there by
anybody: control, invisible and direction characters are spelled. Into a pipe or a file every text goes as it is. What
we write ourselves to move the cursor goes to the stream behind the guard (`own`), text by text cleaned before.

Joiners stay where they join: between pictographs (a family is several people with U+200D between them), behind a virama
and between Arabic letters, as RFC 5892 allows them in names. There they change what is seen. Anywhere else they are
text that nobody sees, and are spelled, as is a second variation selector.
"""

import contextlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TextIO, cast

_PLAIN = re.compile(r"[\t\n\x20-\x7e]*")
_ACTING = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # categories of Unicode: control, invisible, private, line ends
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180e\u2065\u3164\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]")
"""Letters, marks and unassigned characters that are never seen."""
_NONJOINER, _JOINER = "\u200c\u200d"
_SELECTORS = re.compile("[\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_MODIFIERS = "\ufe0f\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"  # of a pictograph: in colour, of a skin
_VIRAMA = 9  # class of combining characters
_CONTEXT = 16
"""Characters before a joiner that may decide over it."""


def visible(text: str, *, lines: bool = False) -> str:
    """Return a text whose invisible and control characters are spelled, so that none acts on the terminal.

    Args:
        text: What is to be shown.
        lines: Spell ends of lines and tabs as well, as of a text that is part of a line.
    """
    return "".join(_spelled(c) if _acts(c) or (lines and c in "\n\t") else c for c in text)


def harmless(text: str) -> str:
    """Return a whole text for reading: as `visible`, but joiners stay where they join."""
    pieces = Pieces()
    return pieces.take(text) + pieces.end()


class Pieces:
    """A text for reading that comes in pieces. A joiner at the end of one waits for what it would join."""

    def __init__(self) -> None:
        self._before, self._held = "", ""

    def take(self, text: str) -> str:
        """Return as much of all that has come as can be shown now."""
        if not self._held and _PLAIN.fullmatch(text):
            self._before = text[-1:] or self._before
            return text
        parts = []
        for c in text:
            if self._held:
                parts.append(self._decided(c))
            if c in (_NONJOINER, _JOINER) and unicodedata.combining(self._before[-1:] or " ") != _VIRAMA:
                self._held = c
                continue
            keeps = c in (_NONJOINER, _JOINER) or (self._selects() if _SELECTORS.match(c) else not _acts(c))
            parts.append(c if keeps else _spelled(c))
            self._before = (self._before + c)[-_CONTEXT:] if keeps else ""
        return "".join(parts)

    def end(self) -> str:
        """Return the rest, as nothing comes any more."""
        return self._decided(" ") if self._held else ""

    def _decided(self, after: str) -> str:
        """The joiner that waits, between what was before it and `after`."""
        held, self._held = self._held, ""
        if held == _JOINER:
            joins = _pictograph(self._before.rstrip(_MODIFIERS)[-1:]) and _pictograph(after)
        else:
            letters = [c for c in self._before if not unicodedata.combining(c)]
            joins = _arabic("".join(letters[-1:])) and _arabic(after)
        self._before = self._before + held if joins else ""
        return held if joins else _spelled(held)

    def _selects(self) -> bool:
        """Whether a variation selector has something to vary: a symbol, an ideograph, or the digit of a keycap."""
        last = self._before[-1:]
        return last in tuple("0123456789#*ℹ") or (
            last > "\x7f" and unicodedata.category(last) in ("So", "Sm", "Po", "Pd", "Lo", "Nl", "No", "Cn")
        )


def _pictograph(c: str) -> bool:
    return c > "\x7f" and (unicodedata.category(c) == "So" or "\U0001f000" <= c <= "\U0001faff")


def _arabic(c: str) -> bool:
    return c != "" and unicodedata.bidirectional(c) == "AL"


def _acts(c: str) -> bool:
    if c in "\n\t":
        return False
    return unicodedata.category(c) in _ACTING or bool(_UNSEEN.match(c) or _SELECTORS.match(c))


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
    """Return a text as it is to be written to a stream."""
    if not stream.isatty():
        return text
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal of its own, or none that knows
        width = 0
    text = harmless(text)
    return unbroken(text, width) if width else text


class Guarded:
    """A stream to a terminal on which no text acts, whoever writes it.

    Args:
        own: The stream itself, for those whose escape sequences are their own.
    """

    def __init__(self, own: TextIO) -> None:
        self.own = own
        self._pieces = Pieces()

    def write(self, text: str) -> int:
        """Write a text, or the next piece of one."""
        self.own.write(self._pieces.take(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def finish(self) -> None:
        """Write what waited for a next piece."""
        if waiting := self._pieces.end():
            self.own.write(waiting)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def guarded(stream: TextIO) -> TextIO:
    """Return a stream that may be given any text: itself, where it is no terminal."""
    if isinstance(stream, Guarded) or not stream.isatty():
        return stream
    return cast(TextIO, Guarded(stream))


def own(stream: TextIO) -> TextIO:
    """Return the stream behind the guard, and behind the one that rich puts there while it draws a bar."""
    while (inner := getattr(stream, "own", None) or getattr(stream, "rich_proxied_file", None)) is not None:
        stream = inner
    return stream


class Results:
    """Stdout for a text that comes in pieces, such as an answer; as a context manager, up to its end."""

    def __init__(self) -> None:
        self._stream = guarded(sys.stdout)

    def write(self, text: str) -> None:
        """Show the next piece at once."""
        print(text, end="", file=self._stream, flush=True)

    def end(self, last: str = "\n") -> None:
        """Show what waited for another piece, and a last text."""
        print(last, end="", file=self._stream, flush=True)
        if isinstance(self._stream, Guarded):
            self._stream.finish()
            self._stream.flush()


# ---- whether anything is said


@dataclass
class Talk:
    """Messages of one call on its way.

    Attributes:
        aloud: Whether it goes to stderr as well; None where `verbose` decides.
        lines: Lines so far.
    """

    aloud: bool | None = None
    lines: list[str] = field(default_factory=list)


_talk: ContextVar[Talk | None] = ContextVar("talk", default=None)
_process = {"verbose": False}


def verbose(on: bool = True) -> bool:
    """Make everything in this process say on stderr what it does; a library is silent until then.

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
