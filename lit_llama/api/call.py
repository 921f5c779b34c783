"""Call of the face: what it says is kept, and the process is put back."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from lit_llama.api.results import Place
from lit_llama.console import Talk, talking
from lit_llama.device import process_kept


@contextmanager
def called(verbose: bool | None) -> Iterator[Talk]:
    """Begin a call: what it says is kept, the process is put back."""
    with warnings.catch_warnings():  # in a kernel without ipywidgets tqdm warns of that once, for bars nobody asked for
        warnings.filterwarnings("ignore", message="IProgress not found")
        import_module("tqdm.auto")
    with talking(verbose) as talk, process_kept():
        yield talk


def path_of(place: Place | None) -> Path | None:
    """Return a place as a path."""
    return None if place is None else Path(place)
