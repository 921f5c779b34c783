"""Progress on stderr for anything that takes more than a moment."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as _track

T = TypeVar("T")


def stderr() -> Console:
    """The console for talk; results go to stdout."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """Iterate with a bar on a terminal, silently elsewhere."""
    console = stderr()
    return _track(items, description, console=console, transient=True, disable=not console.is_terminal)
