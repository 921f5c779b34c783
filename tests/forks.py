"""Commands in forks of a process that has imported what they need, and the other ends of their terminals.

A process that has computed with OpenMP must not be forked: its forks hang.
"""

import contextlib
import errno
import gc
import importlib
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from known_passes import keep

ROOT = Path(__file__).parent.parent


def import_all() -> None:
    """Import what commands import before they end, once for all forks: half of what a run of seconds takes."""
    for name in ("datasets", "jsonargparse", "matplotlib.backends.backend_agg", "gguf", "tokenizers", "jinja2"):
        importlib.import_module(name)
    for name in (
        "lit_llama.conversion.delta",
        "lit_llama.conversion.gguf.writer",
        "lit_llama.conversion.merge",
        "lit_llama.generate.answer",
        "lit_llama.text.pipeline.records",
        "lit_llama.train.run",
        "lit_llama.train.start",
    ):
        importlib.import_module(name)
    importlib.import_module("torch._dynamo")  # as tensors without numbers do at their first operation
    gc.freeze()  # else each fork copies what its first collection looks at


def become(script: str, words: Sequence[object]) -> NoReturn:
    """Be a command from now on, and end with its status; 1 and a traceback where it raises anything.

    Args:
        script: Such as finetune/lora.py.
        words: Its command line.
    """
    status = 1
    try:
        keep(pytest.MonkeyPatch())
        sys.argv = [script, *map(str, words)]
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
                stream.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a fork; gives its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def all_of_terminal(terminal: int, errors: str = "replace") -> str:
    """Read a terminal until every process on it has ended, and close it."""
    said = b""
    try:
        while part := os.read(terminal, 1 << 16):
            said += part
    except OSError as error:
        if error.errno != errno.EIO:  # all have closed it
            raise
    os.close(terminal)
    return said.decode("utf-8", errors)
