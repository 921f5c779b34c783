"""The C++ of operators/cpu and of kernels/cpu, compiled once for this processor and kept, where there is a compiler.

Without one, or where it fails, everything still runs, by the plain functions, which are slower.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.device import capabilities
from lit_llama.folder.place import temporary_folder
from lit_llama.progress import stderr

HERE = Path(__file__).parent
SOURCES = (HERE / "cpu", HERE.parent / "kernels" / "cpu")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
E4M3 = 448.0
"""Largest number of eight bits, four of them for the exponent."""
TINY = 1e-30
"""Rows of 8-bit floats with nothing above it are zero."""
Argument = Tensor | int | float | ctypes.Structure | ctypes.c_int64


def call(name: str, dtype: torch.dtype, *arguments: Argument) -> None:
    """Call a kernel: tensors and structures as pointers, whole numbers as index_t, others as float.

    Raises:
        MemoryError: There was not enough.
    """
    if _function(name, dtype)(*map(_converted, arguments)):
        raise MemoryError(f"not enough memory for {name}")


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """That the library's pointer of this name points to, see exported.h."""
    library = compiled()
    assert library is not None
    address = ctypes.c_void_p.in_dll(library, f"{name}_{DTYPES[dtype]}").value
    assert address is not None
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)


def _converted(value: Argument) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Structure | ctypes.c_int64):
        return ctypes.byref(value)
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


def native(*tensors: Tensor) -> bool:
    """Whether a kernel computes with these."""
    first = tensors[0]
    alike = first.dtype in DTYPES and all(x.dtype == first.dtype for x in tensors)
    return alike and capabilities(first.device).on_cpu and compiled() is not None


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Load the library, or None where it cannot be had; said once."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if sys.platform != "linux" or compiler is None:
        stderr().print("no C++ compiler (g++): this CPU is slower than it could be")
        return None
    try:
        if not _share_threads():
            return None
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = said.strip().splitlines()[0] if said.strip() else "no message"
        stderr().print(f"{compiler}: {reason}: this CPU is slower than it could be")
        return None


def _built(compiler: str) -> Path:
    """Compile, unless it was done before: same source, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    files = [path for folder in SOURCES for path in sorted(folder.iterdir())]
    units = [path for path in files if path.suffix == ".cpp"]
    known = (
        *(path.read_text("utf-8") for path in files if path.suffix in (".cpp", ".h")),
        *FLAGS,
        version,
        _processor(),
    )
    key = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_llama"
    library = home / f"kernels-{key}.so"
    if library.exists():
        return library
    home.mkdir(parents=True, exist_ok=True)
    with temporary_folder(library) as folder:
        _run_all(folder, *([compiler, *FLAGS, "-c", str(path)] for path in units))
        # Without -fopenmp, which would link a second runtime, whose threads would fight with torch's.
        objects = [f"{path.stem}.o" for path in units]
        _run_all(folder, [compiler, "-shared", *objects, "-o", library.name])
        (folder / library.name).replace(library)  # whole, or not at all
    return library


def _run_all(folder: Path, *commands: list[str]) -> None:
    """Run them side by side in a folder.

    Raises:
        subprocess.CalledProcessError: One of them failed.
    """
    nowhere, heard = subprocess.DEVNULL, subprocess.PIPE
    started = [subprocess.Popen(words, cwd=folder, stdout=nowhere, stderr=heard, text=True) for words in commands]
    for process, (_, said) in [(process, process.communicate()) for process in started]:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, stderr=said)


def _share_threads() -> bool:
    """Let what is loaded next use the OpenMP runtime that torch has loaded; False if there is none."""
    maps = Path("/proc/self/maps").read_text("utf-8", "replace")
    runtime = next((line.split(None, 5)[5] for line in maps.split("\n") if "libgomp" in line), None)
    if runtime is not None:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    return runtime is not None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
