"""Talk and progress on stderr, tables on stdout. Texts are literal: brackets in a path are no markup.

Talk and progress are silent until a door or a caller asks for them, see `console.verbose`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

from rich.console import Console
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

from lit_llama.console import as_typed, harmless, is_heard, keep_line, unbroken

T = TypeVar("T")


class _Literal(Console):
    """A console on which no text is markup, and none acts on the terminal."""

    def __init__(self, *, stderr: bool, width: int | None = None) -> None:
        quiet = stderr and not is_heard()
        super().__init__(
            stderr=stderr,
            width=width,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
            quiet=quiet,
            force_terminal=False if quiet else None,  # so that nothing begins to draw a bar
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as Console does; into a pipe or a file a text goes byte for byte, on a terminal no word is broken."""
        if len(objects) == 1 and isinstance(text := objects[0], str):
            text = as_typed(text)
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
    """The console for talk; results go to stdout."""
    return _Literal(stderr=True)


def stdout(width: int | None = None) -> Console:
    """The console for tables, which are results; `width` in characters, None for the terminal's."""
    return _Literal(stderr=False, width=width)


def bar(console: Console, *columns: ProgressColumn, transient: bool = True) -> Progress:
    """Progress on a terminal, nothing elsewhere: a description that is no markup, then these columns."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        *columns,
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


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
