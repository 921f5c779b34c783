"""Device, precision, seeds and memory."""

import platform
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_model

from lit_llama import device
from lit_llama.device import Capabilities
from lit_llama.errors import ResourceError
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LoRAConfig
from lit_llama.train.loss import TokenLoss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """Each test asks the hardware that it pretends to have, and the ones after it the real one."""
    device.capabilities.cache_clear()
    yield
    device.capabilities.cache_clear()


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [((7, 0), (False, False, False)), ((8, 6), (True, True, False)), ((9, 0), (True, True, True))],
)
def test_a_gpu_is_asked_once(
    capability: tuple[int, int], wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a V100 that is given kernels of Ampere, and a question for each operator."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which: asked.append(which) or capability)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    gpu = torch.device("cuda", 0)
    found = [device.capabilities(gpu) for _ in range(3)]
    assert asked == [gpu] and found[0].on_gpu and not found[0].on_cpu
    assert (found[2].flash_attention, found[2].triton, found[2].float8) == wanted
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    device.capabilities.cache_clear()
    assert not device.capabilities(gpu).triton, "what starts its kernels is compiled"


def test_auto_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bfloat16 on a processor that emulates it several times slower, and float32 on one that has it."""
    for flags, dtype in (({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16), ({"amx_bf16": 0}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        device.capabilities.cache_clear()
        assert device.pick_dtype("auto", CPU) == dtype
    assert device.pick_dtype("32-true", CPU) == torch.float32
    assert device.pick_dtype("bf16-true", CPU) == torch.bfloat16


def test_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that stays on the CPU in silence, and bfloat16 asked of a GPU that has none."""
    monkeypatch.setattr(device, "_check_build", lambda: None)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device.pick_device().type == ("cuda" if there else "cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert device.pick_dtype("auto", torch.device("cuda")) == torch.float32
    with pytest.raises(ResourceError, match="--precision 32-true"):
        device.pick_dtype("bf16-true", torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], True),
        ((8, 9), ["sm_80", "sm_90a"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_90"], False),
        ((7, 0), ["sm_50", "sm_70", "sm_90"], True),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((10, 0), ["sm_80", "sm_90", "sm_100f"], True),
        ((9, 0), ["gfx90a"], True),
    ],
)
def test_a_gpu_without_code_is_told(
    capability: tuple[int, int], built: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a V100 under torch for CUDA 13, which fails in its first kernel, and a GPU refused for nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    if runs:
        assert device.pick_device().type == "cuda"
    else:
        with pytest.raises(
            ResourceError, match=r"no code for Tesla V100 \(sm_\d\d\), only for sm_.*CUDA_VISIBLE_DEVICES="
        ):
            device.pick_device()


def test_training_precision_fits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bfloat16 emulated on a V100 and float16 on a processor, and an error that names what is as wrong."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(device, "capabilities", lambda where: Capabilities(kind=where.type, bfloat16=False))
    assert device.numerics("auto", CPU).linear == torch.float32
    mixed = device.numerics("auto", gpu)
    assert (mixed.linear, mixed.rest, mixed.product, mixed.scaled) == (
        torch.float16,
        torch.float32,
        torch.float16,
        True,
    )
    for precision in ("bf16-true", "bf16-mixed"):
        with pytest.raises(ResourceError, match=f"{precision}: this GPU has no bfloat16; use --precision 16-mixed"):
            device.numerics(precision, gpu)  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match="16-mixed is for GPUs; on this cpu use --precision 32-true"):
        device.numerics("16-mixed", CPU)
    monkeypatch.setattr(device, "capabilities", lambda where: Capabilities(kind=where.type, bfloat16=True))
    assert device.numerics("auto", gpu).linear == torch.bfloat16
    assert not device.numerics("bf16-mixed", gpu).scaled
    with pytest.raises(ResourceError, match="use --precision bf16-true, bf16-mixed or 32-true"):
        device.numerics("16-mixed", CPU)


def test_memory_of_this_machine_is_told() -> None:
    """Catches kilobytes taken for bytes, and a process that does not count its own."""
    held = torch.ones(50_000_000)
    assert held.nbytes < device.resident_memory() < device.total_memory(CPU) < 100e12


def test_seeds_repeat_python_and_torch() -> None:
    """Catches one of the generators left out."""
    draws = []
    for seed in (1, 1, 2):
        device.seed_everything(seed)
        draws.append((random.random(), torch.rand(1).item()))
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2])


def test_peak_memory_counts_what_was_held() -> None:
    """Catches kilobytes taken for bytes."""
    torch.ones(50_000_000)  # 200 MB, freed at once
    assert 200e6 < device.peak_memory(CPU) < 100e9
    assert device.cores() >= 1
    device.keep_freed_memory()


_FREED = """
import ctypes, re, threading
from lit_llama import device
from lit_llama.device import Capabilities
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
device.share_freed_memory()
found = []
for _ in range(4):
    thread = threading.Thread(target=lambda: found.append(libc.malloc(1000)))
    thread.start()
    thread.join()
start, end = (int(n, 16) for n in re.search(r"(\\w+)-(\\w+) .*\\[heap\\]", open("/proc/self/maps").read()).groups())
assert all(start <= address < end for address in found), (start, end, found)
blocks = [libc.malloc(1000) for _ in range(50_000)]
for block in blocks[:-1]:
    libc.free(block)
held = device.resident_memory()
device.trim_freed_memory()
assert held - device.resident_memory() > 40e6, (held, device.resident_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is not glibc")
def test_what_threads_have_freed_is_shared_and_given_back() -> None:
    """Catches an arena for each thread, and pages that one block behind them keeps from the kernel."""
    subprocess.run([sys.executable, "-c", _FREED], check=True)


def _step(dtype: torch.dtype, where: torch.device) -> tuple[float, torch.Tensor]:
    """Loss and the flat gradient of the adapters for three packed samples."""
    model = tiny_model().to(dtype=dtype, device=where)
    torch.manual_seed(1)
    apply_lora(model, LoRAConfig())
    for parameter in lora_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(where) * 0.05
    ids = torch.randint(0, 384, (40,), generator=torch.Generator().manual_seed(3)).to(where)
    select = torch.arange(5, 40, device=where)
    loss = TokenLoss(model)(ids, [20, 13, 7], select, ids[select]) / len(select)
    loss.backward()
    gradients = [parameter.grad for parameter in lora_parameters(model)]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    return loss.item(), torch.cat([gradient.flatten().cpu() for gradient in gradients if gradient is not None])


def test_bfloat16_base_trains_float32_adapters() -> None:
    """Catches adapters that fall to the dtype of the base, and a bfloat16 path that computes something else."""
    loss, gradient = _step(torch.float32, CPU)
    rough_loss, rough = _step(torch.bfloat16, CPU)
    assert abs(rough_loss - loss) < 0.02 * loss
    assert torch.nn.functional.cosine_similarity(gradient, rough, dim=0) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    """Catches indices or masks left on another device, and attention of another kernel that sees other tokens."""
    model, ids = tiny_model(), torch.randint(0, 384, (60,))
    wanted = model(ids, Packed([30, 20, 10]))
    found = model.cuda()(ids.cuda(), Packed([30, 20, 10], "cuda"))
    assert torch.allclose(found.cpu(), wanted, atol=1e-3)
    (loss, gradient), (gpu_loss, gpu_gradient) = (_step(torch.float32, torch.device(name)) for name in ("cpu", "cuda"))
    assert abs(gpu_loss - loss) < 1e-3
    assert torch.nn.functional.cosine_similarity(gradient, gpu_gradient, dim=0) > 0.999


def test_a_device_has_a_name_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches speeds that nobody can compare, as it is not said on what."""
    monkeypatch.setattr(device, "cores", lambda: 3)
    assert device.describe(torch.device("cpu")) == "cpu, 3 cores"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    assert device.describe(torch.device("cuda", 0)) == "NVIDIA H100"


def test_a_micro_batch_draws_what_its_place_says() -> None:
    """Catches numbers that depend on what was drawn before, and places that draw the same."""
    drawn = {}
    for place in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (7, 10**6, 3)]:
        torch.rand(3)
        device.seed_micro_batch(*place)
        drawn[place] = (*torch.rand(4).tolist(), random.random())
        device.seed_micro_batch(*place)
        assert (*torch.rand(4).tolist(), random.random()) == drawn[place]
    assert len(set(drawn.values())) == 5
