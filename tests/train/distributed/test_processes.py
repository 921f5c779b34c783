"""Several processes take the steps of one: the same losses and weights, states that any number of them continues, and
one end for all of them. They are two on the CPU, over gloo."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_groups import ALONE_IN_ENVIRONMENT, in_forks
from safetensors.torch import load_file
from small_runs import TWELVE, run
from small_runs import twenty_two_rows as twenty_two_rows  # a fixture
from torch import Tensor, nn

from lit_llama.device import numerics
from lit_llama.errors import Interrupted, ResourceError, UserError
from lit_llama.model.adapters.lora import apply_lora, parameter_groups
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model
from lit_llama.text.dataset.folder import SPLITS, Split
from lit_llama.train.distributed.launch import launch, layout
from lit_llama.train.distributed.processes import Processes, join
from lit_llama.train.logs.metrics import METRICS_FILE, read_metrics
from lit_llama.train.loop import Trainer
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.state import STATE_FILE, STATES_DIR, find_states

PLAIN = LoRAConfig(r=2, alpha=4)
# At a lower rate: AdamW divides gradients of almost nothing by their own size, rounding and all.
LONG = replace(TWELVE, save_interval=100, learning_rate=1e-3)


@pytest.fixture(scope="module")
def straight(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of one process. Do not change it."""
    return run(tiny_folder, data, tmp_path_factory.mktemp("processes") / "straight", PLAIN, LONG)


def flags_of(checkpoint: Path, data: Path, out: Path) -> list[object]:
    """The command line of the run that `straight` is."""
    flags: list[object] = ["--checkpoint_dir", checkpoint, "--data_dir", data, "--out_dir", out, "--seed", 0]
    flags += ["--precision", "32-true", "--lora.r", 2, "--lora.alpha", 4]
    for name, value in LONG.__dict__.items():
        flags += [] if value is None else [f"--train.{name}", value]
    return flags


def struck(rank: int, step: int, name: str, whom: str, flags: Sequence[object]) -> tuple[int, str]:
    """Run two processes of which one sends a signal; gives the status and what they wrote on stderr."""
    blow = (rank, step, name, whom)
    done = in_forks("tests/struck_processes.py", *blow, "finetune/lora.py", *flags, "--devices", 2)
    return done.returncode, done.stderr


def last_state(out: Path) -> Path:
    return find_states(out / STATES_DIR)[-1]


def assert_same_run(found: Path, expected: Path, atol: float = 1e-6) -> None:
    """The same metrics and weights, but for the order in which sums are formed."""
    ours, theirs = read_metrics(found), read_metrics(expected)
    for name in ("loss", "test_loss", "grad_norm", "trained_tokens", "tokens", "learning_rate"):
        assert [step for step, _ in ours[name]] == [step for step, _ in theirs[name]]
        rounded = pytest.approx([value for _, value in theirs[name]], rel=1e-5)  # to six digits
        assert [value for _, value in ours[name]] == rounded, name
    one, other = (json.loads((last_state(out) / STATE_FILE).read_text())["progress"] for out in (found, expected))
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-6)
    assert one | {"losses": []} == other | {"losses": []}
    weights, others = load_file(found / WEIGHTS_FILE), load_file(expected / WEIGHTS_FILE)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], atol=atol, rtol=0)


def test_two_processes_stop_together_and_one_continues(
    tiny_folder: Path, data: Path, straight: Path, tmp_path: Path
) -> None:
    """SIGTERM to the launcher, from the process that does not write; catches gradients that are averaged or summed
    twice, tokens counted by one process only, a share that is lost when a step cannot be divided evenly, a signal that
    reaches one process only, a state that is cut off or saved twice, and one that depends on the number of them."""
    out = tmp_path / "out"
    status, said = struck(1, 7, "SIGTERM", "launcher", flags_of(tiny_folder, data, out))
    assert status == 143, said
    assert said.splitlines()[-1].startswith("Stopped by SIGTERM after step "), said
    assert said.count("Stopped by") == said.count("finishing the step") == 1 and "Traceback" not in said
    first, last = find_states(out / STATES_DIR)
    assert first.name == "step-000000" and 8 <= int(last.name[-2:]) <= 11
    run(tiny_folder, data, out, PLAIN, LONG, resume="auto")
    assert_same_run(out, straight)


def test_torchrun_continues_what_one_process_began(
    tiny_folder: Path, data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the layers spread over both, and fused; catches passes that one process does alone and the other waits for,
    an adapter that is cut to pieces, moments that are lost, and numbers that only our own launcher knows."""
    out, step = tmp_path / "out", Trainer.step

    def stopped(self: Trainer) -> dict[str, object]:
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(Interrupted, match="the newest state is that of step 3"):
        run(tiny_folder, data, out, PLAIN, replace(LONG, save_interval=3))
    more = ["--strategy", "fsdp", "--resume", "auto"]
    done = in_forks("finetune/lora.py", *flags_of(tiny_folder, data, out), *more, torchrun=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert "2 processes" in said and "continuing from" in said and said.count("next: ") == 1
    assert said.count("layers: 2 fused\n") == 1 and "Warning" not in said
    assert_same_run(out, straight)
    ours, theirs = (load_file(last_state(path) / OPTIMIZER_FILE) for path in (out, straight))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=1e-4)


def test_layers_that_are_spread_carry_dora_and_a_whole_head(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """DoRA reads the weights themselves, which are there only while a layer computes, and the head is a copy that
    trains; against one process. Catches norms of a part of a weight, and a gradient of a weight that is gone."""
    lora = replace(PLAIN, use_dora=True, modules_to_save=["lm_head"])
    expected = run(tiny_folder, data, tmp_path / "one", lora, LONG)
    more = ["--lora.use_dora", "true", "--lora.modules_to_save", "lm_head", "--train.neftune_noise_alpha", 0]
    out = tmp_path / "out"
    common = [*flags_of(tiny_folder, data, out), "--devices", 2, "--strategy", "fsdp"]
    done = in_forks("finetune/lora.py", *common, *more)
    assert done.returncode == 0 and "the frozen layers spread over all" in done.stderr, done.stderr
    assert "layers: 2 fused\n" in done.stderr
    assert_same_run(out, expected, atol=1e-5)  # which holds a layer as one matrix


def test_a_process_that_dies_ends_the_other(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a run that waits forever for a process that is gone, and talk of sockets in place of what happened."""
    begun = time.time()
    status, said = struck(1, 3, "SIGKILL", "itself", flags_of(tiny_folder, data, tmp_path / "out"))
    died = (tmp_path / "out" / METRICS_FILE).stat().st_mtime
    assert status == 5 and begun < died
    last = said.splitlines()[-1]
    assert last.startswith("error: process 1 of 2 was killed by SIGKILL, by hand or for want of memory")
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert not (tmp_path / "out" / CONFIG_FILE).exists()


@pytest.mark.parametrize(("rank", "waited"), [(0, []), (1, [10.0])])
def test_what_all_find_wrong_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, waited: list[float]
) -> None:
    """Catches the same talk and the same error from every process: all but the first are silent, and give it the time
    to say what is wrong, in which the launcher ends them."""
    slept: list[float] = []
    monkeypatch.setenv("LIT_LLAMA_LAUNCHER", "1")
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr("lit_llama.train.distributed.processes._end_with_launcher", lambda: None)
    group = SimpleNamespace(global_rank=rank, world_size=2)
    monkeypatch.setattr("lit_llama.train.distributed.processes._connect", lambda here, machines: group)
    monkeypatch.setattr("lit_llama.train.distributed.processes.time", SimpleNamespace(sleep=slept.append))
    with pytest.raises(UserError, match="no such data"), join(2, 1) as processes:
        assert processes.is_first is (rank == 0)
        print("hello", file=sys.stderr)
        raise UserError("no such data")
    assert slept == waited and capsys.readouterr().err == ("" if rank else "hello\n")


@dataclass(frozen=True, kw_only=True)
class Part(Processes):
    """One of several processes that never meet: what it would send stays in `sent`."""

    sent: list[list[float]] = field(default_factory=list)

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        self.sent.append(list(values))
        return [value or 1.0 for value in values]  # nobody else adds to an empty share

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.sent.append(torch.cat([loss.reshape(1), *(part.flatten() for part in parts)]).tolist())
        return loss


def parts_of_a_step(checkpoint: Path, data: Path, size: int, steps: int = 1, **changes: Any) -> list[Trainer]:
    """The trainers of all processes after `steps`, each of which knows nothing of the others."""
    trainers = []
    for rank in range(size):
        torch.manual_seed(0)
        model = load_model(checkpoint, "cpu", torch.float32)
        apply_lora(model, PLAIN)
        part = Part(rank=rank, size=size, sharded=changes.get("sharded", False))
        splits, cpu = [Split(data, name) for name in SPLITS], numerics("32-true", torch.device("cpu"))
        config = replace(LONG, **{name: value for name, value in changes.items() if name != "sharded"})
        trainer = Trainer(model, parameter_groups(model), *splits, config, 0, lambda _: None, cpu, part)
        trainer.evaluate()
        for _ in range(steps):
            trainer.step()
        trainers.append(trainer)
    return trainers


def sent(trainers: Sequence[Trainer], number: int) -> Tensor:
    """The sum of what all of them sent."""
    return torch.tensor([trainer.processes.sent[number] for trainer in trainers], dtype=torch.float64).sum(0)


@pytest.mark.parametrize(("size", "sharded"), [(2, False), (5, True)])
def test_the_parts_of_a_step_sum_up_to_the_whole(tiny_folder: Path, data: Path, size: int, sharded: bool) -> None:
    """The loss and gradients of a step and the sums of an evaluation against those of one process, among five shares
    of four samples, too; catches a sample that is left out or taken twice, and a fill-up that is not without effect."""
    whole = parts_of_a_step(tiny_folder, data, 1)
    divided = parts_of_a_step(tiny_folder, data, size, sharded=sharded)
    for number in (0, 1):
        torch.testing.assert_close(sent(divided, number), sent(whole, number), atol=1e-6, rtol=1e-6)


def test_no_two_micro_batches_draw_the_same(tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches dropout that repeats itself in every process, or from one step of a process to the next of another."""
    seeds: list[tuple[int, int]] = []
    monkeypatch.setattr("lit_llama.train.loop.seed_micro_batch", lambda seed, step, index: seeds.append((step, index)))
    parts_of_a_step(tiny_folder, data, 3, steps=2, batch_size=12, micro_batch_tokens=1)
    assert len(seeds) == 22 == len(set(seeds))


def test_more_processes_than_cores_are_refused_before_any_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip of the finger that floods the machine."""
    monkeypatch.setattr("lit_llama.train.distributed.launch._Group", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(ResourceError, match=r"--devices is 3000, but this machine has \d+ cores?"):
        launch(3000, 1)


def test_numbers_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a count of zero, one that contradicts the launcher, a machine without an address, and a call from Python
    that would train on one device in silence."""
    for name in ALONE_IN_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert layout(1, 1) == (1, 1) and layout(2, 3) == (2, 3)
    with pytest.raises(UserError, match="--devices is 0 and --num_nodes 1, expected 1 or more"):
        layout(0, 1)
    with pytest.raises(UserError, match="is for commands"), join(2, 1):
        pass
    environment = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert layout(1, 1) == layout("auto", 1) == layout(4, 2) == (4, 2)
    with pytest.raises(UserError, match="torchrun has started 4 processes on each of 2 machines"):
        layout(2, 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    assert layout(1, 1) == (3, 2)
