"""The contest of fine-tuning programs with ours alone, on rows and from a start that are dumped for all."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here
from forked_groups import in_forks
from safetensors.torch import load_file

from benchmarks.training import contest, process
from benchmarks.training.contest import OURS, Contest, Settings
from benchmarks.training.rows import dump
from lit_llama.errors import DataError
from lit_llama.model.adapters.lora import adapters, apply_lora
from lit_llama.model.config import LoRAConfig
from lit_llama.model.files.checkpoint import load_model


def run(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] = {}) -> process.Done:
    """Training in a fork of a process that has imported everything; rows are prepared and dumped in this one."""
    _, *words = map(str, command)
    if words[0] == "prepare/records.py":
        assert (done := run_here(*words)).returncode == 0, done.stderr
    elif words[1] == "benchmarks.training.rows":
        (data, held_out, path), (steps, size, seed) = map(Path, words[2:5]), map(int, words[5:])
        dump(data, held_out, path, steps=steps, batch_size=size, seed=seed)
    else:
        assert words[:2] == ["-m", "benchmarks.training.ours"] and not environment
        started = time.monotonic()
        assert (done := in_forks("benchmarks/training/ours.py", *words[2:])).returncode == 0, done.stderr
        return process.Done("", started, time.monotonic() - started, 0, 0.0)
    return process.Done("", 0.0, 0.0, 0, 0.0)


@pytest.fixture
def tiny_contest(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contest:
    monkeypatch.setattr(contest, "run", run)
    monkeypatch.setattr(process, "busy_share", lambda: 0.0)
    rows = [{"instruction": f"add {n} and {n * n}", "input": "", "output": f"it is {n + n * n}"} for n in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = Settings(
        checkpoint_dir=tiny_folder,
        files=[tmp_path / "rows.json"],
        rows=40,
        held_out=6,
        max_seq_length=256,
        steps=3,
        batch_size=8,
        learning_rate=1e-3,
        seed=5,
    )
    return Contest(settings, tmp_path / "environments", tmp_path / "work")


def test_ours_trains_on_the_dumped_rows_from_the_dumped_start(tiny_contest: Contest) -> None:
    """What the peers are given is what ours does: rows, their order, and lora_A before the first step."""
    found = tiny_contest.train(OURS, 0, 1)  # it checks the trained tokens of each step by itself
    assert len(found["losses"]) == len(found["seconds"]) == 3
    assert 0 < found["first_step"] < found["wall"]
    rows = tiny_contest.rows
    assert len(rows.train) == 38 and len(rows.held_out) == 4  # two each are the test split that a folder needs
    model = load_model(Path(tiny_contest._settings.checkpoint_dir)).double()
    total = 0.0
    for row in rows.steps[0]:
        ids, labels = rows.train[row]
        logits = model(torch.from_numpy(ids).long())[:-1]
        total += torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[1:]).long(), reduction="sum").item()
    assert found["losses"][0] == pytest.approx(total / rows.trained_tokens(0), rel=0.01)  # bfloat16
    start = load_file(tiny_contest.start_file)
    torch.manual_seed(5)
    apply_lora(fresh := load_model(Path(tiny_contest._settings.checkpoint_dir)), LoRAConfig(r=8, alpha=16))
    for name, module in adapters(fresh):
        assert torch.equal(start[f"base_model.model.{name}.lora_A.weight"], module.lora_A)


def test_ours_moves_away_from_a_reference_that_stays(tiny_contest: Contest) -> None:
    """The loss of DPO begins at log 2 and leaves it, as the reference is computed once, of no more than what trains."""
    pairs = Contest(replace(tiny_contest._settings, preference=True), Path("unused"), tiny_contest.folder)
    found = pairs.train(OURS, 0, 1)
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert all(abs(loss - math.log(2)) > 1e-3 for loss in found["losses"][1:])
    assert found["reference"] > 0
    assert len(pairs.rows.train) == 3 * 8
    _, chosen, rejected = pairs.rows.train[0]
    assert not np.array_equal(chosen, rejected)


def test_too_few_rows_are_an_error(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 20))
    settings = Settings(
        checkpoint_dir=tiny_folder,
        files=[tmp_path / "rows.json"],
        rows=10,
        held_out=8,
        max_seq_length=64,
        steps=4,
        batch_size=4,
        learning_rate=1e-3,
        seed=0,
    )
    with pytest.raises(DataError, match="10 rows and 8 behind them, expected 4 steps of 4"):
        contest._write_sources(tmp_path, settings)
