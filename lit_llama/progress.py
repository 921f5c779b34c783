"""Progress on stderr for anything that takes more than a moment."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import track as _track

T = TypeVar("T")


def stderr() -> Console:
    """The console for talk; results go to stdout."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """Iterate with a bar on a terminal, silently elsewhere."""
    console = stderr()
    return _track(items, description, console=console, transient=True, disable=not console.is_terminal)


def count(items: Iterable[T], description: str) -> Iterator[T]:
    """Iterate over what has no known length, with a running number on a terminal, silently elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield from items
        return
    columns = (SpinnerColumn(), TextColumn(description), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        for item in items:
            yield item
            progress.advance(task)
