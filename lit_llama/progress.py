"""Talk and progress on stderr, tables on stdout. Texts are literal: brackets in a path are no markup.

Talk and progress are silent until a door or a caller asks for them, see `console.verbose`.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TextIO, TypeVar, cast

from rich.console import Console, ConsoleOptions, JustifyMethod, OverflowMethod, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from lit_llama.console import guarded, harmless, is_heard, keep_line, own, unbroken

T = TypeVar("T")


class Screen(Console):
    """A console on which no text is markup, and none acts on the terminal, whatever it is part of."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        # The guard there would spell what rich moves the cursor with.
        behind = own(sys.stderr if stderr else sys.stdout)
        super().__init__(file=behind, stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Render as Console does; each of its texts is made harmless, and has no link."""
        for text, style, control in super().render(renderable, options):
            if control or not self.is_terminal:
                yield Segment(text, style, control)
            else:
                yield Segment(harmless(text), style.update_link(None) if style and style.link else style)

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        **options: Any,
    ) -> Text:
        """Render as Console does: rich takes some control characters away, which are to be seen, and does not measure
        others.
        """
        text = harmless(text) if self.is_terminal else text
        return super().render_str(text, style=style, justify=justify, overflow=overflow, **options)


class _Literal(Screen):
    """A console for lines, which wrap as the terminal does."""

    def __init__(self, *, stderr: bool, width: int | None = None) -> None:
        quiet = stderr and not is_heard()
        # Without a terminal nothing begins to draw a bar.
        super().__init__(
            stderr=stderr, width=width, soft_wrap=True, quiet=quiet, force_terminal=False if quiet else None
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as Console does; into a pipe or a file a text goes byte for byte, on a terminal no word is broken."""
        if len(objects) == 1 and isinstance(text := objects[0], str):
            if self.stderr:
                keep_line(text)
            if self.quiet:
                return
            if not self.is_terminal:
                self.file.write(f"{text}\n")
                self.file.flush()
                return
            objects = (unbroken(harmless(text), self.width),)
        super().print(*objects, **{"markup": False, "emoji": False, **options})


def stderr() -> Console:
    """Return the console for talk; results go to stdout."""
    return _Literal(stderr=True)


def stdout(width: int | None = None) -> Console:
    """Return the console for tables, which are results; `width` in characters, None for the terminal's."""
    return _Literal(stderr=False, width=width)


def bar(console: Console, *columns: ProgressColumn, transient: bool = True) -> Progress:
    """Build a progress bar on a terminal, nothing elsewhere: a description that is no markup, then these columns."""
    return _Bar(
        TextColumn("{task.description}", markup=False),
        *columns,
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


class _Bar(Progress):
    """Progress that leaves what others print meanwhile harmless: rich takes their streams, and would obey colours."""

    def start(self) -> None:
        """See Progress."""
        super().start()
        if isinstance(sys.stdout, FileProxy):
            sys.stdout = guarded(cast(TextIO, sys.stdout))
        if isinstance(sys.stderr, FileProxy):
            sys.stderr = guarded(cast(TextIO, sys.stderr))


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """Iterate with a bar on a terminal, silently elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield from items
        return
    with bar(console, BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) as progress:
        yield from progress.track(items, description=harmless(description))


def count(items: Iterable[T], description: str) -> Iterator[T]:
    """Iterate over what has no known length, with a running number on a terminal, silently elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield from items
        return
    with bar(console, SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task(harmless(description), total=None)
        for item in items:
            yield item
            progress.advance(task)


@contextlib.contextmanager
def reading(source: BinaryIO, size: int, description: str) -> Iterator[BinaryIO]:
    """Give a file or a network answer of so many bytes to read, with a bar on a terminal."""
    with bar(stderr(), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as progress:
        yield progress.wrap_file(source, size, description=harmless(description))
