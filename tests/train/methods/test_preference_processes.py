"""Preference runs of two processes on the CPU, over gloo, against runs of one process on the same batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_groups import in_forks
from pair_data import PAIRED, pair_rows, prefer, single_answers, write_pairs
from safetensors.torch import load_file
from small_runs import outcome

from lit_llama.model.adapters.peft_folder import WEIGHTS_FILE
from lit_llama.train.logs.metrics import PAIR_METRICS, read_metrics
from lit_llama.train.methods.preference import REFERENCE_FILE
from lit_llama.train.state import STATES_DIR, find_states

RUNS: list[dict[str, Any]] = [
    {"name": "dpo", "stopped": 0, "strategy": "ddp"},
    {"name": "stopped", "stopped": 5, "strategy": "ddp"},
    {"name": "kto spread", "stopped": 0, "strategy": "fsdp", "loss": "kto", "data": "single"},
]


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of two processes by name, and those of one as `one pairs` and `one single`. Do not change them.

    Nine rows in steps of four: the last step of an epoch has one, so that one process has nothing to do there. Three
    rows for testing are cut unevenly, too.
    """
    made = tmp_path_factory.mktemp("paired")
    train, test = pair_rows(9), pair_rows(3, seed=1)
    write_pairs(made / "pairs", tiny_folder, train, test)
    write_pairs(made / "single", tiny_folder, single_answers(train), single_answers(test))
    settings = [{"data": "pairs"} | run for run in RUNS]
    settings = [run | {"data": str(made / run["data"])} for run in settings]
    done = in_forks("tests/paired_processes.py", tiny_folder, made, json.dumps(settings))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("next: ") == len(RUNS), done.stderr
    prefer(tiny_folder, made / "pairs", made / "one pairs", PAIRED)
    prefer(tiny_folder, made / "single", made / "one single", PAIRED, loss="kto")
    return {path.name: path for path in made.iterdir()}


def reference_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(find_states(out / STATES_DIR)[-1] / REFERENCE_FILE)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run["name"]))
def test_two_processes_do_the_steps_of_one(folders: dict[str, Path], run: dict[str, Any]) -> None:
    """Losses, measures and weights of every step, and the reference of every row, up to rounding. Catches a reference
    of a share of the rows, a baseline and measures that each process finds for itself, gradients that are averaged, a
    process without rows that the other waits for, and a step of rows that are counted twice."""
    found, expected = folders[run["name"]], folders[f"one {run.get('data', 'pairs')}"]
    ours, theirs = read_metrics(found), read_metrics(expected)
    for name in PAIR_METRICS:
        # At first the model is its reference, and which reward is higher is a matter of rounding.
        first = 1 if name.endswith("accuracy") else 0
        assert [step for step, _ in ours[name]] == [step for step, _ in theirs[name]], name
        close = pytest.approx([value for _, value in theirs[name][first:]], rel=1e-4, abs=2e-5)
        assert [value for _, value in ours[name][first:]] == close, name
    references, others = reference_of(found), reference_of(expected)
    assert references.keys() == others.keys()
    for name, value in references.items():
        torch.testing.assert_close(value, others[name], atol=1e-4, rtol=1e-6)
    weights, those = load_file(found / WEIGHTS_FILE), load_file(expected / WEIGHTS_FILE)
    for name, value in weights.items():
        torch.testing.assert_close(value, those[name], atol=1e-4, rtol=0)


def test_a_run_of_two_that_goes_on_ends_with_the_same_bytes(folders: dict[str, Path]) -> None:
    """Catches a reference that is found anew, or kept by the first process alone."""
    assert outcome(folders["stopped"]) == outcome(folders["dpo"])


def test_the_runs_that_are_compared_have_moved(folders: dict[str, Path]) -> None:
    """Catches a comparison of runs that stay where they began."""
    losses = [value for _, value in read_metrics(folders["dpo"])["loss"]]
    assert len(losses) == 6 and abs(losses[-1] - losses[0]) > 0.01
