"""All weights of a model train while they are spread over two processes on the CPU, over gloo: the steps of one
process, the same states, and a part of everything in each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_config, write_tokenizer
from safetensors.torch import load_file, save_file
from small_runs import Killed, stop_after
from small_runs import twenty_two_rows as twenty_two_rows  # a fixture
from spread_processes import SPOILT, train

from lit_llama.folder.publish import write_json
from lit_llama.model.llama import LLaMA
from lit_llama.train.logs.metrics import METRICS_FILE, read_metrics
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.run import BEST_FILE
from lit_llama.train.state import STATE_FILE, STATES_DIR, find_states

ALONE_IN_ENVIRONMENT = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "NODE_RANK")
WEIGHTS = "model.safetensors"

MIXED: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "attention_bias": True,
    "attention_out_bias": True,
    "use_qk_norm": True,
    "vocab_size": 389,
    "num_hidden_layers": 3,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": (0, 1),
}
"""Untied; of 389 rows one process has more than the other, and of six experts most have no token in some batch."""
RUNS: list[dict[str, Any]] = [
    {"name": "tied", "base": "base tied", "spoilt": True},
    {"name": "stopped", "base": "base tied", "spoilt": True, "stopped": 9},
    {"name": "mixed", "base": "base mixed", "activation_checkpointing": "full", "optimizer": "sgd", "epochs": 1}
    | {"learning_rate": 0.03},
]


def write_base(folder: Path, **shape: Any) -> None:
    """A checkpoint folder with a random model."""
    folder.mkdir()
    config = tiny_config(**shape)
    torch.manual_seed(0)
    state = {name: value.normal_(0, 0.15).add_("norm" in name) for name, value in LLaMA(config).state_dict().items()}
    save_file(state, folder / WEIGHTS)
    write_json(folder / "config.json", config.to_dict("float32"))
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of two processes by name, and those of one as `one NAME`. Do not change them."""
    made = tmp_path_factory.mktemp("spread")
    (made / "base tied").symlink_to(tiny_folder)
    write_base(made / "base mixed", **MIXED)
    for setting in RUNS:
        alone = {name: value for name, value in setting.items() if name not in ("name", "base", "stopped")}
        if "stopped" not in setting:
            train(made / setting["base"], data, made / f"one {setting['name']}", **alone)
        if setting["name"] == "mixed":  # one process begins it, two go on
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                stop_after(patch, 5)
                train(made / setting["base"], data, made / setting["name"], **alone)
    environment = {name: value for name, value in os.environ.items() if name not in ALONE_IN_ENVIRONMENT}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/spread_processes.py", str(data), str(made), json.dumps(RUNS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert said.count("next: ") == len(RUNS) and said.count("gradients and optimizer spread over all") == len(RUNS) + 1
    assert said.count("layers: 2 fused\n") == 3
    assert said.count("layers: 2 fused, 1 plain (mixtures of experts)\n") == 1
    return {path.name: path for path in made.iterdir()}


def last_state(out: Path) -> Path:
    return find_states(out / STATES_DIR)[-1]


def assert_same_run(found: Path, expected: Path) -> None:
    """The same metrics, weights, moments and best weights, but for the order in which sums are formed."""
    ours, theirs = read_metrics(found), read_metrics(expected)
    for name in ("loss", "test_loss", "grad_norm", "trained_tokens", "tokens", "learning_rate"):
        assert [step for step, _ in ours[name]] == [step for step, _ in theirs[name]]
        close = pytest.approx([value for _, value in theirs[name]], rel=1e-5)  # to six digits
        assert [value for _, value in ours[name]] == close, name
    one, other = (json.loads((last_state(out) / STATE_FILE).read_text())["progress"] for out in (found, expected))
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-6)
    assert one | {"losses": []} == other | {"losses": []}
    files = [
        (out / WEIGHTS, *(last_state(out) / name for name in (WEIGHTS, OPTIMIZER_FILE, BEST_FILE)))
        for out in (found, expected)
    ]
    for ours_file, theirs_file in zip(*files, strict=True):
        tensors, others = load_file(ours_file), load_file(theirs_file)
        assert tensors.keys() == others.keys()
        for name, value in tensors.items():
            # AdamW divides gradients of almost nothing by their own size, rounding and all.
            torch.testing.assert_close(value, others[name], atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["tied", "mixed"])
def test_two_processes_with_a_part_each_do_the_steps_of_one(folders: dict[str, Path], name: str) -> None:
    """Losses, norms, weights, moments and best weights; catches gradients that are averaged, or those of one process,
    a norm of a part, an embedding that trains apart from the head that it is, biases of before the first step, experts
    that one process has used and the other has not, a step that only one process skips, moments of a file that are
    those of another part, and a test loss of one process."""
    assert_same_run(folders[name], folders[f"one {name}"])
    losses = [value for _, value in read_metrics(folders[name])["loss"]]
    assert losses[-1] < losses[0] - 0.1, "a run that stays where it began proves nothing"


def test_a_spoilt_step_is_skipped_by_both(folders: dict[str, Path]) -> None:
    """Catches a comparison of runs in which nothing was spoilt."""
    steps = [step for step, _ in read_metrics(folders["tied"])["loss"]]
    assert SPOILT not in steps and len(steps) == 11


def test_a_run_that_goes_on_ends_with_the_same_bytes(folders: dict[str, Path]) -> None:
    """Killed ahead of step 10, continued from the state of step 8; catches best weights, moments or weights that are
    rounded, forgotten or put in another place."""
    straight, stopped = folders["tied"], folders["stopped"]
    for name in (WEIGHTS, OPTIMIZER_FILE, BEST_FILE):
        assert (last_state(straight) / name).read_bytes() == (last_state(stopped) / name).read_bytes(), name
    for name in (WEIGHTS, METRICS_FILE):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes(), name


def test_one_process_continues_a_state_of_two(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Catches a state in parts, or one of another layout than that of one process."""
    out = folders["stopped copied"]
    assert last_state(out).name == "step-000008"
    train(folders["base tied"], data, out, spoilt=True)
    assert_same_run(out, folders["one tied"])


def test_each_process_has_half_of_everything(folders: dict[str, Path]) -> None:
    """Weights, gradients, moments and best weights; catches what is whole in every process, for which the plan has no
    memory."""
    held = [json.loads(folders[f"held by {rank}.json"].read_text()) for rank in (0, 1)]
    for name, moments in (("tied", 2), ("mixed", 1)):
        values = sum(value.numel() for value in load_file(folders[name] / WEIGHTS).values())
        for one, other, copies in zip(held[0][name], held[1][name], (1, 1, moments, 1), strict=True):
            assert one + other == copies * values and max(one, other) < 0.51 * copies * values
