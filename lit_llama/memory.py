"""Amounts of memory and of disk in words, and which errors say that memory ran out."""

import errno
import os
import re
import resource
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lit_llama.errors import ResourceError

_BESIDE_TORCH = 512 << 20
"""Addresses that a process takes which has torch's libraries in it, and does little."""
_OF_A_THREAD = 72 << 20
"""Addresses of a thread: its stack, and the arena that glibc reserves for it."""

_SAID = re.compile(
    r"can(?:'|no)t allocate memory|out.of.memory|not enough memory|ALLOC_FAILED|bad_?alloc\b|failed to map segment"
    r"|unable to allocate|can't start new thread|ThreadPoolBuildError|memory allocation .*failed"
    r"|could not create a (?:primitive|memory)",
    re.IGNORECASE,
)
"""Words of allocators, of the libraries of a GPU, of the loader of shared libraries, and of what maps files."""
_TALKERS = ("safetensors", "pyarrow", "datasets", "tokenizers", "pyo3_runtime", "_sentencepiece")
"""Packages whose own errors are of no class that tells."""


def amount(size: int) -> str:
    """Format bytes for people, such as "812 bytes" and "1.25 GB"."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} byte" + ("" if size == 1 else "s")


def amounts(*sizes: int) -> tuple[str, ...]:
    """Format sizes that are compared: in bytes where different ones would look the same."""
    found = tuple(map(amount, sizes))
    return found if len(set(found)) == len(set(sizes)) else tuple(f"{size:,} bytes" for size in sizes)


def check_addresses() -> None:
    """Check that the libraries of torch fit into the addresses that a process may have here (`ulimit -v`).

    Where they do not, C++ ends the process in the middle of an import, and no error tells why.

    Raises:
        ResourceError: There are fewer.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    spec = find_spec("torch") if limit != resource.RLIM_INFINITY else None
    if spec is None or not spec.submodule_search_locations:
        return
    package = Path(spec.submodule_search_locations[0])
    libraries = [*package.glob("lib/*.so*"), *package.parent.glob("nvidia/*/lib/*.so*")]
    least = sum(path.stat().st_size for path in libraries) + _BESIDE_TORCH
    if limit < least:
        there, needed = amounts(limit, least)
        raise ResourceError(
            f"a process may have {there} of addresses here, expected {needed} or more, which Python and torch take: "
            "raise the limit (ulimit -v unlimited)"
        )


def check_room(needed: int) -> None:
    """Check that there are addresses for what a library takes that ends the process where it gets none, as Rust does.

    Args:
        needed: Bytes, beside those for a thread on each core.

    Raises:
        MemoryError: There are fewer.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    held = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    if limit - held < needed + (os.cpu_count() or 1) * _OF_A_THREAD:
        raise MemoryError


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, which may be the cause of an error that says something else."""
    return any(map(_says_so, _causes(error)))


def wanted(error: BaseException) -> str:
    """Return how much was asked for when memory ran out, behind a comma, where an error says it."""
    for cause in filter(_says_so, _causes(error)):
        if found := re.search(r"allocate ([\d.,]+ ?[KMGT]?i?B(?:ytes)?)\b", str(cause), re.IGNORECASE):
            return f", asking for {found[1]} more"
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and what was being handled meanwhile."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    # Words count only of those who speak for themselves: the errors of our own quote texts of others.
    known = isinstance(error, RuntimeError | ImportError | OSError | SystemError) or type(error) is Exception
    return (known or type(error).__module__.startswith(_TALKERS)) and bool(_SAID.search(str(error)))
