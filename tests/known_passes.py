"""Peaks of passes that any process of the tests has found out, known to all of them.

Most runs of the tests are of the same few shapes, and what a pass of one takes, which every run finds out for its plan,
takes longer than the run.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from lit_llama.train.memory import footprint
from lit_llama.train.memory.footprint import Build

FOLDER = "LIT_LLAMA_TESTS_PASSES"
"""Name of the environment variable with the folder, which the first process makes and the others inherit."""


def begin() -> Callable[[], None]:
    """Make the folder for this process and those that it starts; gives what removes it, where this is the first one."""
    if FOLDER in os.environ:
        return lambda: None
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="passes-")

    def end() -> None:
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)

    return end


def keep(patch: pytest.MonkeyPatch) -> None:
    """Have `Build` look up what is known before it runs anything; nothing is patched without a folder."""
    if FOLDER not in os.environ:
        return
    folder, run, shares = Path(os.environ[FOLDER]), Build._run, Build.__dict__["_shares"].func

    def once(found: Callable[[], int], *asked: object) -> int:
        key = hashlib.sha256(repr((asked, footprint.compiled() is None)).encode()).hexdigest()
        path = folder / key
        try:
            return int(path.read_text())
        except FileNotFoundError:
            part = folder / f"{key}.{os.getpid()}"
            part.write_text(str(found()))
            part.replace(path)
            return int(path.read_text())

    def known_run(self: Build, shape: Any, *, train: bool) -> int:
        return once(lambda: run(self, shape, train=train), self, shape, train, self._on_meta)

    def known_shares(self: Build) -> dict[bool, bool]:
        both = once(lambda: 2 * (of := shares(self))[True] + of[False], self)
        return {True: both > 1, False: bool(both % 2)}

    known = cached_property(known_shares)
    known.__set_name__(Build, "_shares")
    patch.setattr(Build, "_run", known_run)
    patch.setattr(Build, "_shares", known)
