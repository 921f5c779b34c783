"""bitsandbytes on a GPU: quantised bases, 8-bit and paged optimizers; the same bodies on the CPU wherever they can."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file
from small_runs import ROWS, Killed, through_the_door
from small_runs import twenty_two_rows as twenty_two_rows  # a fixture

from lit_llama.model.adapters.peft_folder import WEIGHTS_FILE
from lit_llama.model.config import Quantization
from lit_llama.model.quantize import through
from lit_llama.train.logs.metrics import read_metrics
from lit_llama.train.loop import Trainer
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.state import STATES_DIR, find_states

pytest.importorskip("bitsandbytes")  # now, as it looks for a GPU once only
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LEARN = ["--precision", "32-true", "--train.epochs", 3, "--train.batch_size", 4, "--train.learning_rate", 0.01]
LEARN += ["--train.micro_batch_tokens", 256, "--train.sample_prompts", 0]
WIDE = ["--lora.target_modules", "down_proj", "--lora.r", 1024, "--lora.alpha", 1024]
"""A has 1024 x 112 values: from 100,000 on bitsandbytes keeps moments in pages."""


def assert_learned(out: Path) -> None:
    found = [loss for _, loss in read_metrics(out)["loss"]]
    assert len(found) == 18 and sum(found[-6:]) / 6 < 0.6 * found[0]
    assert all(value.isfinite().all() for value in load_file(out / WEIGHTS_FILE).values())


@pytest.mark.parametrize(
    ("precision", "method"),
    [
        *(("32-true", method) for method in get_args(Quantization)),
        *(pytest.param("bf16-true", method, marks=needs_gpu) for method in ("nf4", "int8")),
    ],
)
def test_a_quantised_base_is_trained_on(
    method: str, precision: str, device: torch.device, tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Catches kernels that do not take our blocks or dtypes, and an adapter that cannot be merged where it was made."""
    if precision == "bf16-true" and device.type == "cpu":
        pytest.skip("a GPU's")
    flags = ["--quantize", method, "--lora.r", 8, *LEARN, "--precision", precision]
    said = through_the_door(tiny_folder, data, tmp_path / "out", *flags)
    assert f"base in {method} on {device.type}" in said
    assert_learned(tmp_path / "out")
    ask = ["--checkpoint_dir", tmp_path / "out", "--prompt", ROWS[3]["instruction"], "--max_new_tokens", 8]
    answer = run_here("generate/instruct.py", *ask, "--precision", precision)
    assert answer.returncode == 0 and f"{method} and " in answer.stderr, answer.stderr


@pytest.mark.parametrize("method", get_args(Quantization))
@pytest.mark.parametrize("shape", [(64, 112), (112, 64), (48, 100), (256, 512)])
def test_a_gpu_leaves_of_a_weight_what_a_cpu_does(
    method: Quantization, shape: tuple[int, int], device: torch.device
) -> None:
    """Catches blocks that are cut otherwise there: an adapter trained on the one is then merged onto another base."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found, wanted = through(weight.to(device), method).cpu(), through(weight, method)
    # A value half way between two levels may go either way, and for int8 a CPU forms the levels in float16.
    assert ((found - wanted).abs() > 1e-3 * weight.abs().max()).float().mean() < 0.03
    assert (found - wanted).norm() < 5e-3 * weight.norm()


@pytest.mark.parametrize(
    "optimizer",
    ["adamw_8bit", pytest.param("paged_adamw_8bit", marks=needs_gpu)],
)
def test_an_optimizer_learns_and_goes_on(
    optimizer: str, device: torch.device, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after half of the steps; catches moments that do not come back, and pages that come back as plain memory
    of the GPU, which then is full."""
    if optimizer != "adamw_8bit" and device.type == "cpu":
        pytest.skip("a GPU's")
    out, step, rate = tmp_path / "out", Trainer.step, ["--train.learning_rate", 0.002]
    flags = [*WIDE, *LEARN, *rate, "--train.optimizer", optimizer, "--train.save_interval", 6]
    seen: list[tuple[int, set[str]]] = []

    def watched(self: Trainer) -> dict[str, Any]:
        done = step(self)
        states = self.optimizer.state.values()
        paged = {name for state in states for name, value in state.items() if getattr(value, "is_paged", False)}
        seen.append((done["step"], paged))
        if done["step"] == 10 and len(seen) == 10:
            raise Killed
        return done

    monkeypatch.setattr(Trainer, "step", watched)
    with pytest.raises(Killed):
        through_the_door(tiny_folder, data, out, *flags)
    through_the_door(tiny_folder, data, out, *flags, "--resume", "auto")
    assert [number for number, _ in seen] == [*range(1, 11), *range(7, 19)]
    assert_learned(out)
    pages = {"state1", "state2"} if optimizer.startswith("paged") else set()
    assert all(paged == pages for _, paged in seen)
    names = {name.rpartition(".")[2] for name in load_file(find_states(out / STATES_DIR)[-1] / OPTIMIZER_FILE)}
    assert {"state1", "state2", "absmax1"} <= names
