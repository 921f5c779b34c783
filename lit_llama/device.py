"""Device, precision, seeds, memory: the only file that asks what hardware there is.

torch is imported where it is used, because scripts name the precisions and their `--help` has to be quick.
"""

import os
import random
import sys
from typing import TYPE_CHECKING, Literal

from lit_llama.errors import ResourceError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16-true", "32-true"]


def pick_device() -> "torch.device":
    """A GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision: Precision, device: "torch.device") -> "torch.dtype":
    """The dtype of weights and activations. "auto" is bfloat16 where the hardware multiplies it fast, else float32."""
    import torch

    fast = _fast_bf16(device)
    if precision == "bf16-true" and device.type == "cuda" and not fast:
        raise ResourceError("--precision bf16-true: this GPU has no bfloat16; use --precision 32-true")
    return torch.bfloat16 if precision == "bf16-true" or (precision == "auto" and fast) else torch.float32


def _fast_bf16(device: "torch.device") -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("amx_bf16") or flags.get("amx_tile") or flags.get("avx512_bf16"))


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators. Nothing here draws from numpy's global one."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Seed the same generators as a function of the place in a run, on every kind of device.

    What is drawn in a micro-batch (dropout, say) then depends on nothing that was drawn before it, so that a run can
    be continued without the state of any generator.
    """
    import numpy as np

    seed_everything(int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0]))


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks of a step for the next one.

    By default it returns large blocks to the kernel at once and every new one costs page faults, a third of the time
    of a training step on a CPU. Elsewhere than on glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 1 << 30)


def peak_memory(device: "torch.device") -> int:
    """Most bytes held so far: allocated on the GPU, or resident in this process on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: "torch.device") -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{device.type}, {cores()} {'core' if cores() == 1 else 'cores'}"
