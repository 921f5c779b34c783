"""Training and generating on a GPU, through the scripts; the same bodies run on the CPU wherever they can."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_the_cpu, run_here
from safetensors.torch import load_file
from small_runs import DROPOUT, ROWS, TWELVE, Killed, run, stop_after, through_the_door
from small_runs import twenty_two_rows as twenty_two_rows  # a fixture

from lit_llama.model.adapters.peft_folder import WEIGHTS_FILE
from lit_llama.train.config import TrainConfig
from lit_llama.train.logs.metrics import read_metrics
from lit_llama.train.loop import Trainer
from lit_llama.train.optim import OPTIMIZER_FILE, build_optimizer, set_learning_rate
from lit_llama.train.state import STATE_FILE, STATES_DIR, find_states

LEARN = ["--lora.r", 8, "--train.batch_size", 4, "--train.micro_batch_tokens", 256, "--train.sample_prompts", 0]
FAST = ["--train.epochs", 3, "--train.learning_rate", 0.02, "--train.sample_prompts", 2]
EIGHT = replace(TWELVE, max_steps=8, save_interval=5)
ON_RESUME = {"relative loss": 1e-3, "share of the weights' norm": 1e-2}
"""What a run that was stopped may differ by on a GPU, whose sums have no fixed order and whose Adam turns the noise of
a gradient near zero into a step of full size. What is restored has no tolerance."""


def losses(out: Path) -> list[float]:
    return [loss for _, loss in read_metrics(out)["loss"]]


def adapter(out: Path) -> torch.Tensor:
    """All weights of an adapter, in one row."""
    return torch.cat([value.flatten() for _, value in sorted(load_file(out / WEIGHTS_FILE).items())])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed", "32-true"])
def test_the_loss_falls_in_every_precision(
    precision: str, device: torch.device, tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Catches a precision that learns nothing, gradients lost in float16, an adapter that is not finite, and one that
    falls to the dtype of the base."""
    if (precision, device.type) == ("16-mixed", "cpu"):
        pytest.skip("16-mixed is for GPUs")
    said = through_the_door(tiny_folder, data, tmp_path / "out", "--precision", precision, *LEARN, *FAST)
    assert f" on {device.type}; " in said
    found = losses(tmp_path / "out")
    assert all(map(math.isfinite, found)) and len(found) >= 12, "float16 skips a few of 18 until its scale fits"
    assert sum(found[-6:]) / 6 < 0.6 * found[0]
    tests = [loss for _, loss in read_metrics(tmp_path / "out")["test_loss"]]
    assert tests[-1] < 0.75 * tests[0]
    weights = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in weights.values())
    state = find_states(tmp_path / "out" / STATES_DIR)[-1]
    scaler = json.loads((state / STATE_FILE).read_text())["scaler"]
    assert bool(scaler) is (precision == "16-mixed")


@pytest.fixture(scope="module")
def first_step(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on the CPU in float32. Do not change it."""
    out = tmp_path_factory.mktemp("cpu") / "out"
    with on_the_cpu():
        through_the_door(tiny_folder, data, out, "--precision", "32-true", *LEARN, "--train.max_steps", 1)
    return out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "close"), [("32-true", 1e-4), ("bf16-true", 0.02), ("16-mixed", 0.01)])
def test_a_gpu_begins_where_a_cpu_does(
    precision: str, close: float, tiny_folder: Path, data: Path, first_step: Path, tmp_path: Path
) -> None:
    """The loss before training and of the first step, in which the adapter adds nothing yet, against the CPU's in
    float32; catches kernels that compute something else."""
    flags = ["--precision", precision, *LEARN, "--train.max_steps", 1]
    through_the_door(tiny_folder, data, tmp_path / "out", *flags)
    ours, theirs = read_metrics(tmp_path / "out"), read_metrics(first_step)
    for name in ("loss", "test_loss") if precision != "16-mixed" else ("test_loss",):  # which may skip the first step
        assert ours[name][0][1] == pytest.approx(theirs[name][0][1], rel=close)
    for name in ("trained_tokens", "tokens"):
        assert ours[name] == theirs[name]


def test_a_run_goes_on_where_it_was_stopped(
    device: torch.device, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight steps with dropout and accumulation, stopped after the fifth; catches moments or weights that come back
    changed or on another device, and dropout that is drawn anew."""
    straight = run(tiny_folder, data, tmp_path / "straight", DROPOUT, EIGHT)
    out, step = tmp_path / "out", Trainer.step
    restored: dict[str, torch.Tensor] = {}

    def watched(self: Trainer) -> dict[str, Any]:
        if not restored:
            moments = [value for state in self.optimizer.state.values() for value in state.values()]
            restored["moments"] = torch.cat([value.flatten().float().cpu() for value in moments if value.ndim])
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 5)
        run(tiny_folder, data, out, DROPOUT, EIGHT)
    saved = load_file(find_states(out / STATES_DIR)[-1] / OPTIMIZER_FILE)
    monkeypatch.setattr(Trainer, "step", watched)
    run(tiny_folder, data, out, DROPOUT, EIGHT, resume="auto")
    wanted = torch.cat([value.flatten().float() for value in saved.values() if value.ndim])
    assert torch.equal(restored["moments"].sort().values, wanted.sort().values)
    exact = device.type == "cpu"
    assert losses(out)[:5] == pytest.approx(losses(straight)[:5], rel=0 if exact else ON_RESUME["relative loss"])
    assert losses(out) == pytest.approx(losses(straight), rel=0 if exact else ON_RESUME["relative loss"])
    apart = (adapter(out) - adapter(straight)).norm() / adapter(straight).norm()
    assert apart <= (0 if exact else ON_RESUME["share of the weights' norm"])


def test_the_fused_optimizer_computes_adamw(device: torch.device) -> None:
    """Against torch's plain one in float64; catches an optimizer that is not the fused one, or not on this device."""
    config = TrainConfig(beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(80, 64, generator=draw), torch.randn(5, 80, 64, generator=draw)
    ours = torch.nn.Parameter(start.to(device))
    theirs = torch.nn.Parameter(start.double())
    optimizer = build_optimizer([ours], config, device)
    assert optimizer.defaults["fused"]
    plain = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    set_learning_rate(optimizer, 1e-2)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.to(device), gradient.double()
        optimizer.step()
        plain.step()
    torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def learned(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned on the GPU in float32. Do not change it."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    flags = ["--precision", "32-true", *LEARN, "--train.epochs", 6, "--train.learning_rate", 0.01]
    through_the_door(tiny_folder, data, out, *flags)
    return out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_what_a_cpu_says(tiny_folder: Path, learned: Path, tmp_path: Path) -> None:
    """Greedy answers in float32 of the base and of an adapter that has learned on the GPU, one prompt and a whole file;
    catches a cache that lies on another device or is filled wrongly, and an adapter that only its maker can read."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    asked: list[list[object]] = [
        ["generate/base.py", "--checkpoint_dir", tiny_folder, "--prompt", "Order 3 red"],
        ["generate/instruct.py", "--checkpoint_dir", learned, "--prompt", ROWS[3]["instruction"]],
        ["generate/instruct.py", "--checkpoint_dir", learned, "--input_file", tmp_path / "rows.json"],
    ]
    for command in asked:
        command += ["--precision", "32-true", "--max_new_tokens", 40]
        ours = run_here(*command)
        with on_the_cpu():
            theirs = run_here(*command)
        assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
        assert ours.stdout == theirs.stdout and ours.stdout.strip()
        assert "on cuda" in ours.stderr and "on cpu" in theirs.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_adapter_is_merged_where_it_was_made(learned: Path, tmp_path: Path) -> None:
    """Catches a proof that compares on two devices, and a merged model that says something else."""
    pytest.importorskip("gguf")  # which the module of merging imports
    flags = ["--adapter_dir", learned, "--destination_path", tmp_path / "merged", "--precision", "32-true"]
    made = run_here("finetune/merge.py", *flags)
    assert made.returncode == 0 and "that the cuda has free" in made.stderr, made.stderr
    ask = ["--prompt", ROWS[3]["instruction"], "--precision", "32-true", "--max_new_tokens", 40]
    said = [run_here("generate/instruct.py", "--checkpoint_dir", path, *ask) for path in (learned, tmp_path / "merged")]
    assert said[0].stdout == said[1].stdout and said[0].stdout.strip(), said
