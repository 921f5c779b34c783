"""Device, precision, seeds, memory: the only file that asks what hardware there is.

torch is imported where it is used, because doors name the precisions, and their help has to be quick.
"""

import functools
import importlib.util
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_llama.errors import ResourceError, UserError
from lit_llama.wording import param

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16-true", "32-true"]
_UNITS = {"": 1, "M": 10**6, "MB": 10**6, "MiB": 2**20, "G": 10**9, "GB": 10**9, "GiB": 2**30}

PRODUCTS = 32
"""Matrix products whose code is kept: those of about two shapes of a micro-batch."""
PRODUCT_BYTES = 650_000
"""Memory of the code of one, in both places that keep it; as measured."""

TrainingPrecision = Literal["auto", "bf16-true", "bf16-mixed", "16-mixed", "32-true"]


def pick_device() -> "torch.device":
    """Return a GPU if there is one, else the CPU.

    Raises:
        ResourceError: The installed torch has no code for this GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    _check_build()
    return torch.device("cuda")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Properties of a device that decide what computes on it, asked of the hardware once.

    Attributes:
        kind: Type of the device, such as cpu or cuda.
        bfloat16: It multiplies bfloat16 fast.
        flash_attention: torch's kernels of FlashAttention run there: GPUs from compute capability 8.0 on.
        triton: Triton compiles for it: the same GPUs, with the package and a C compiler for what starts its kernels.
        float8: It multiplies 8-bit floats: GPUs from compute capability 8.9 on, and any CPU, slowly.
    """

    kind: str
    bfloat16: bool
    flash_attention: bool = False
    triton: bool = False
    float8: bool = True

    @property
    def on_cpu(self) -> bool:
        """Whether it is the processor itself."""
        return self.kind == "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU of CUDA or ROCm."""
        return self.kind == "cuda"


@functools.cache
def capabilities(device: "torch.device") -> Capabilities:
    """Find out what a device can do, once; meta, whose tensors have no numbers, stands for a CPU, as in a plan."""
    import torch

    fast = _fast_bf16(device)
    if device.type != "cuda":
        return Capabilities(kind="cpu" if device.type == "meta" else device.type, bfloat16=fast)
    capability = torch.cuda.get_device_capability(device)
    compiles = importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
    recent = capability >= (8, 0)
    return Capabilities(
        kind="cuda",
        bfloat16=fast,
        flash_attention=recent,
        triton=recent and compiles,
        float8=capability >= (8, 9),
    )


def _check_build() -> None:
    """A build of torch has code for some GPUs only: on another one the first kernel fails, in words about an image."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    built = torch.cuda.get_arch_list()
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in built]
    # Code runs on later GPUs of its generation; what is only compiled half way (compute) on all later ones.
    runs = [
        (int(kind[2]) == major and int(kind[3]) <= minor) or (kind[1] == "compute" and int(kind[2]) < major)
        for kind in kinds
        if kind
    ]
    if runs and not any(runs):
        raise ResourceError(
            f"the installed torch {torch.__version__} has no code for {torch.cuda.get_device_name()} "
            f"(sm_{major}{minor}), only for {', '.join(built)}; install a build that has, such as the one for CUDA "
            "12.6 where the GPU is a V100, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )


def pick_dtype(precision: Precision, device: "torch.device") -> "torch.dtype":
    """Return the dtype of weights and activations. "auto" is bfloat16 where the hardware multiplies it fast, else
    float32.
    """
    import torch

    fast = capabilities(device).bfloat16
    if precision == "bf16-true" and device.type == "cuda" and not fast:
        raise ResourceError(
            f"{param('precision', 'bf16-true')}: this GPU has no bfloat16; use {param('precision', '32-true')}"
        )
    return torch.bfloat16 if precision == "bf16-true" or (precision == "auto" and fast) else torch.float32


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Numbers in which a run keeps the weights of its base and computes; adapters are always float32.

    In the mixed precisions, matrix products are computed in half of the bits and all else, the residual stream and the
    norms above all, in float32 (Micikevicius et al. 2018, arXiv:1710.03740). A product would round a float32 weight to
    its own dtype at each use, so a frozen weight is stored rounded once: the same bits come out of half the memory, and
    13 billion of them fit where float32 would not. A weight that is trained is not: what a step adds to it is often
    less than half of the bits can tell.

    Args:
        device: Where the run computes.
        linear: Dtype in which the weights of linear layers are stored.
        rest: That of embeddings and norms.
        product: Dtype of matrix products if it is not that of the weights and activations (autocast), else None.
        scaled: The loss is scaled up before the backward pass, because small gradients are zero in float16.
    """

    device: "torch.device"
    linear: "torch.dtype"
    rest: "torch.dtype"
    product: "torch.dtype | None" = None
    scaled: bool = False

    def __str__(self) -> str:
        """bfloat16, or bfloat16 and float32 for a mixed one."""
        kinds = (self.linear, self.rest, self.product or self.rest)
        return " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in kinds))

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass."""
        import torch

        return torch.autocast(self.device.type, self.product or torch.bfloat16, enabled=self.product is not None)

    def scaler(self) -> "torch.amp.GradScaler":
        """Build the scaler of the loss, which leaves the loss as it is where that is not needed."""
        import torch

        return torch.amp.GradScaler(self.device.type, enabled=self.scaled)


def numerics(precision: TrainingPrecision, device: "torch.device", *, whole: bool = False) -> Numerics:
    """Return the numbers of a training run. "auto" is what the device multiplies fast: bf16-true, or bf16-mixed where
    the weights themselves train; 16-mixed on a GPU that knows no bfloat16, such as a V100; 32-true on a processor that
    does not.

    Args:
        precision: By its name.
        device: Where the run computes.
        whole: The weights of the base train: the mixed precisions store them in float32.

    Raises:
        ResourceError: The device does not compute so; the message names what it does.
    """
    fast = capabilities(device).bfloat16
    if precision == "auto" and not fast:
        precision = "16-mixed" if device.type == "cuda" else "32-true"
    if precision.startswith("bf16") and device.type == "cuda" and not fast:
        raise ResourceError(
            f"{param('precision', precision)}: this GPU has no bfloat16; use {param('precision', '16-mixed')} or "
            "32-true"
        )
    if precision == "16-mixed" and device.type != "cuda":
        known = "bf16-true, bf16-mixed or 32-true" if fast else "32-true"
        raise ResourceError(
            "is for GPUs",
            parameter="precision",
            value="16-mixed",
            remedy=f"on this {device.type} use {param('precision')} {known}",
        )
    return _numerics(precision, device, whole)


def gpu_numerics(precision: TrainingPrecision, *, whole: bool = False) -> Numerics:
    """Return the numbers of a run on a GPU that is not here, whatever it can do; "auto" is one with bfloat16."""
    import torch

    return _numerics(precision, torch.device("cuda"), whole)


def _numerics(precision: TrainingPrecision, device: "torch.device", whole: bool) -> Numerics:
    """As `numerics`, where the device does what is asked for, and bfloat16 fast."""
    import torch

    if precision == "auto":
        precision = "bf16-mixed" if whole else "bf16-true"
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    if precision.endswith("mixed"):
        linear = torch.float32 if whole else half
        return Numerics(device=device, linear=linear, rest=torch.float32, product=half, scaled=half == torch.float16)
    dtype = half if precision == "bf16-true" else torch.float32
    return Numerics(device=device, linear=dtype, rest=dtype)


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


@contextmanager
def process_kept() -> Iterator[None]:
    """Put back, at the end, the generators of random numbers and the number of threads, which belong to the caller."""
    import torch

    python, threads = random.getstate(), torch.get_num_threads()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python)
        torch.set_num_threads(threads)


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Seed the same generators as a function of the place in a run, on every kind of device.

    What is drawn in a micro-batch (dropout, say) then depends on nothing that was drawn before it, so that a run can
    be continued without the state of any generator.
    """
    import numpy as np

    seed_everything(int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0]))


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks of a step for the next one, all but the largest.

    Those it would return to the kernel cost page faults each time, a third of the time of a training step on a CPU. The
    price are holes: up to about as much memory as comes and goes. One arena serves all threads, as what the forward
    pass has freed is what the backward pass needs. Elsewhere than on glibc this does nothing.
    """
    _tune_malloc(threshold=1 << 25, trim=1 << 29)


def return_freed_memory() -> None:
    """Ask glibc to give freed blocks back at once, so that what a process takes is what is in use."""
    _tune_malloc(threshold=1 << 17, trim=1 << 17)


def share_freed_memory() -> None:
    """Make one arena of glibc serve all threads that begin from now on.

    Otherwise each keeps what it has freed for itself: as many times what a long prompt takes as there are threads that
    have ever encoded one.
    """
    _tune_malloc(threshold=None, trim=None)


def trim_freed_memory() -> None:
    """Give the kernel all whole pages of glibc that hold nothing, not only those at the end."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _tune_malloc(threshold: int | None, trim: int | None) -> None:
    """Blocks from `threshold` on come from the kernel and go back to it; so does what is free at the end from `trim`
    on. None leaves that as it is. There is one arena."""
    if (libc := _glibc()) is None:
        return
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # of malloc.h
    for option, value in ((m_mmap_threshold, threshold), (m_trim_threshold, trim), (m_arena_max, 1)):
        if value is not None:
            libc.mallopt(option, value)


def _glibc() -> Any:
    """The C library, where it is glibc."""
    if sys.platform != "linux":
        return None
    import ctypes

    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def keep_few_products() -> None:
    """Ask oneDNN and torch's layer above it to keep the code of few matrix products; call it before the first one.

    They make code for each shape of a product, about 0.3 MB each, and both keep that of 1024: several hundred MB after
    as many micro-batches of different lengths, or steps of generation. Making it anew takes less time than can be
    measured. A setting of the user stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(PRODUCTS))


def total_memory(device: "torch.device") -> int:
    """Return the bytes that this process may hold at once, with those it holds already: what is free, and its own.

    On the CPU a limit of the container counts where it is lower than what the machine has.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text("ascii") for name in ("memory.max", "memory.current"))
        free = min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no cgroup of version 2, or "max"
        pass
    return free + resident_memory()


def parse_memory(text: str) -> int:
    """Parse an amount such as 16GB, 16GiB or 500M into bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise UserError(parameter="plan_memory", value=text, expected="an amount such as 16GB or 15.5GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def resident_memory() -> int:
    """Return the bytes of this process that are in memory now; 0 where that is not known."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def peak_memory(device: "torch.device") -> int:
    """Return the most bytes held so far: allocated on the GPU, or resident in this process on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # VmHWM is of this program alone, while getrusage counts what the one held that has started it
        status = Path("/proc/self/status").read_text("ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # no Linux
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: "torch.device") -> str:
    """Describe the device as a person calls it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{device.type}, {cores()} {'core' if cores() == 1 else 'cores'}"
