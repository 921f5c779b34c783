"""Cores and devices that a test may use."""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

ALLOWED = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Leave this process those cores, and a thread for each."""
    if not cores:
        yield
        return
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """No GPU, whatever is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
