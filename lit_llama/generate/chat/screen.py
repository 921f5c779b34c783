"""Answers as they come: plain text into a pipe, Markdown on a terminal, on which no word of them acts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from lit_llama import progress
from lit_llama.console import Results, harmless
from lit_llama.text.prompts.teller import thoughts_of

_FENCE = re.compile(r"\s{0,3}(```+|~~~+)")
_OPENED = re.compile(r"\s*(<(think|thinking|thought|thoughts|reasoning)>|\[THINK\])")


@dataclass(frozen=True)
class Folded:
    """An answer and the thoughts before it.

    Attributes:
        thoughts: None where there are none.
        rest: The answer.
        thinking: The thoughts go on.
    """

    thoughts: str | None
    rest: str
    thinking: bool = False


def folded(text: str, opened: bool = False) -> Folded:
    """Tell thoughts from an answer.

    Args:
        text: As far as it has come.
        opened: Its prompt ends in the tag that begins thoughts.
    """
    found = thoughts_of({"role": "assistant", "content": text})
    if found is not None and (found.opening or opened):
        return Folded(found.inner.strip(), found.rest)
    begun = _OPENED.match(text)
    if begun or opened:
        return Folded(text[begun.end() :].strip() if begun else text.strip(), "", True)
    return Folded(None, text)


def summed(folded: Folded) -> str:
    """Return a line in place of thoughts."""
    words = len((folded.thoughts or "").split())
    return f"▸ thinking, {words} words so far" if folded.thinking else f"▸ thought in {words} words"


def finished(text: str) -> int:
    """Return the end of the text up to which nothing that comes later changes how Markdown is shown: where the last
    block begins that follows an empty line, outside of code, and is no part of an item of a list.
    """
    fence, position, end, empty = "", 0, 0, False
    for line in text.splitlines(keepends=True):
        if empty and not fence and line[0] not in " \t\n":
            end = position
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        empty = not line.strip()
        position += len(line)
    return end


class Harmless:
    """Renderable whose words cannot act on a terminal, whatever they were made of.

    Args:
        inner: What is shown.
        last: Most rows, of which the last ones are shown; 0 for all.
    """

    def __init__(self, inner: RenderableType, last: int = 0) -> None:
        self._inner, self._last = inner, last

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich."""
        rows = console.render_lines(self._inner, options, pad=False)
        for row in rows[-self._last :]:
            for text, style, control in row:
                if not control:
                    yield Segment(harmless(text), None if style is None else style.update_link(None))
            yield Segment.line()


def markdown(text: str) -> Harmless:
    """Return Markdown as it is shown."""
    return Harmless(Markdown(harmless(text), hyperlinks=False))


class Screen(Protocol):
    """Place where answers are shown."""

    def begin(self, opened: bool) -> None:
        """Begin an answer; `opened` if its prompt ends in the tag that begins thoughts."""
        ...

    def write(self, piece: str) -> None:
        """Write more of the answer that has come."""
        ...

    def end(self, stopped: bool) -> None:
        """End the answer; `stopped` by somebody."""
        ...

    def show(self, text: str, opened: bool = False) -> None:
        """Show a whole message."""
        ...


class Plain:
    """Text as it is."""

    def begin(self, opened: bool) -> None:
        """Begin an answer on stdout."""
        self._results = Results()

    def write(self, piece: str) -> None:
        """Write text as it is."""
        self._results.write(piece)

    def end(self, stopped: bool) -> None:
        """End the line of the answer; `stopped` by somebody."""
        self._results.end(" ...\n" if stopped else "\n")

    def show(self, text: str, opened: bool = False) -> None:
        """Show a message as it is."""
        results = Results()
        results.write(text)
        results.end()


class Terminal:
    """Markdown on a terminal: what is finished stays, the block that is being written is drawn anew.

    Args:
        console: Of the terminal; None for stdout.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or progress.Screen()
        self._live: Live | None = None

    def begin(self, opened: bool) -> None:
        """Begin an answer, drawn anew as it grows."""
        self._text, self._shown, self._opened, self._told = "", 0, opened, False
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def write(self, piece: str) -> None:
        """Write text, whose finished blocks stay."""
        self._text += piece
        found = folded(self._text, self._opened)
        if found.thinking:
            self._draw([summed(found)])
            return
        self._tell(found)
        open_ = found.rest[self._shown :]
        if end := finished(open_):
            self._live_console.print(markdown(open_[:end]))
            self._shown += end
        self._draw([found.rest[self._shown :]])

    def end(self, stopped: bool) -> None:
        """End the answer, all of which stays."""
        if self._live is None:
            return
        self._live.update("", refresh=True)
        self._live.stop()
        self._live = None
        found = folded(self._text, self._opened)
        self._tell(found)
        rest = found.rest[self._shown :]
        if rest.strip():
            self._console.print(markdown(rest))
        if stopped:
            self._console.print("...")

    def show(self, text: str, opened: bool = False) -> None:
        """Show a message as Markdown."""
        found = folded(text, opened)
        if found.thoughts is not None:
            self._console.print(summed(found), style="dim")
        self._console.print(markdown(found.rest))

    @property
    def _live_console(self) -> Console:
        assert self._live is not None
        return self._live.console

    def _tell(self, found: Folded) -> None:
        if found.thoughts is not None and not self._told:
            self._console.print(f"{summed(found)}; /show tells them", style="dim")
            self._told = True

    def _draw(self, parts: Iterable[str]) -> None:
        assert self._live is not None
        rows = max(1, self._console.height - 3)
        self._live.update(Harmless(Markdown(harmless("".join(parts)), hyperlinks=False), rows), refresh=True)
