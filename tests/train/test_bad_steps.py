"""Steps whose loss is not finite or stands far out: skipped, remarked, and at last the end of the run."""

import itertools
import json
import re
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import SHORT, run
from small_runs import twenty_rows as twenty_rows  # a fixture

from lit_llama.errors import NumericalError
from lit_llama.model.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE, base_of
from lit_llama.text.dataset.batches import epoch_order
from lit_llama.train.logs.metrics import read_metrics
from lit_llama.train.logs.report.run_report import REPORT_JSON
from lit_llama.train.loss import TokenLoss
from lit_llama.train.optim import OPTIMIZER_FILE
from lit_llama.train.state import STATES_DIR, find_states

WHOLE = replace(SHORT, epochs=2, micro_batch_tokens=10_000)  # ten steps of one micro-batch


def poison(monkeypatch: pytest.MonkeyPatch, good: Container[int], value: float = torch.nan) -> None:
    """The losses of all training batches are `value`, but for those with numbers in `good`, and the two that try out
    the largest batch."""
    forward, calls = TokenLoss.forward, itertools.count(-2)

    def poisoned(self: TokenLoss, *batch: Any) -> Any:
        bad = self.training and (number := next(calls)) >= 0 and number not in good
        return forward(self, *batch) * (value if bad else 1.0)

    monkeypatch.setattr(TokenLoss, "forward", poisoned)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_steps_that_are_not_finite_are_skipped_and_at_last_end_the_run(
    tiny_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: float,
) -> None:
    """Catches a run that goes on with NaN for hours, an adapter of NaN that looks whole, and rows that are not named.
    What is known of the run up to there stays: the state of the last good step can still be read, and is finite."""
    poison(monkeypatch, range(3), value)
    out = tmp_path / "out"
    with pytest.raises(NumericalError, match=r"step 8: loss (nan|inf), .*rows \d.* 5 steps in a row were not finite"):
        run(tiny_folder, data, out, train=replace(WHOLE, save_interval=3))
    said = capsys.readouterr().err
    named = re.findall(r"step (\d+): loss \S+, gradient norm \S+; rows ([\d, ]+) of the train split\. The step", said)
    order = epoch_order(20, 0, 0).tolist() + epoch_order(20, 0, 1).tolist()
    expected = [(str(n + 1), ", ".join(map(str, sorted(order[4 * n : 4 * n + 4])))) for n in range(3, 7)]
    assert named == expected
    assert not (out / CONFIG_FILE).exists() and not list(tmp_path.glob(".*"))
    assert [step for step, _ in read_metrics(out)["loss"]] == [1, 2, 3]
    states = find_states(out / STATES_DIR)
    assert [state.name for state in states] == ["step-000003", "step-000006"]
    weights = [load_file(state / WEIGHTS_FILE) for state in states]
    assert all(tensor.isfinite().all() for part in weights for tensor in part.values())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "a skipped step changes nothing"
    assert (states[0] / OPTIMIZER_FILE).read_bytes() == (states[1] / OPTIMIZER_FILE).read_bytes()


def test_a_run_survives_steps_that_are_not_finite_here_and_there(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a count that is not set back by a good step, and a NaN that stays in the gradients for the next one."""
    good = [0, 1, 5, 6]  # not 2, 3, 4, nor 7, 8, 9: six in all
    poison(monkeypatch, good)
    out = run(tiny_folder, data, tmp_path / "out", train=WHOLE)
    assert [step for step, _ in read_metrics(out)["loss"]] == [n + 1 for n in good]
    report = json.loads((out / REPORT_JSON).read_text("utf-8"))
    assert any("6 steps skipped" in warning["what"] for warning in report["warnings"]), "the page says so, too"
    assert base_of(out) == tiny_folder
    assert all(tensor.isfinite().all() for tensor in load_file(out / WEIGHTS_FILE).values())


def test_weights_that_are_not_finite_are_never_written(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a state, or a result, of values that overflowed in the optimizer although every gradient was finite."""
    out = tmp_path / "out"

    def overflow(self: Any, *rest: Any) -> None:
        for group in self.param_groups:
            group["params"][0].data.fill_(torch.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        with pytest.raises(NumericalError, match="is not finite after step 1: no state of it is written"):
            run(tiny_folder, data, out, train=replace(SHORT, max_steps=1))
    assert [state.name for state in find_states(out / STATES_DIR)] == ["step-000000"] and not (
        out / CONFIG_FILE
    ).exists()


def test_a_loss_that_jumps_is_remarked(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a warning at every step, none at all, and one that does not say which rows it is about."""
    forward, calls = TokenLoss.forward, itertools.count(-1)  # the largest batch is tried out twice before

    def jumping(self: TokenLoss, *batch: Any) -> Any:
        return forward(self, *batch) * (10 if self.training and next(calls) == 30 else 1)

    monkeypatch.setattr(TokenLoss, "forward", jumping)
    run(tiny_folder, data, tmp_path / "out", train=replace(WHOLE, epochs=7, learning_rate=1e-5, eval_interval=1000))
    said = capsys.readouterr().err
    losses = np.array([loss for _, loss in read_metrics(tmp_path / "out")["loss"]])
    far = []
    for step in range(21, 36):
        before = losses[: step - 1]
        if losses[step - 1] > np.median(before) + 6 * np.median(abs(before - np.median(before))):
            far.append(step)
    assert [int(step) for step in re.findall(r"step (\d+): loss \S+ stands far above", said)] == far
    rows = epoch_order(20, 0, 5)[16:].tolist()
    assert 30 in far and len(far) < 8, "the jump, and little else"
    assert re.search(
        rf"step 30: loss 6\S+ stands far above the last 29 steps \(median 6\..*rows "
        rf"{', '.join(map(str, sorted(rows)))} of the train split",
        said,
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_of_which_every_step_is_skipped_has_no_result(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Catches an adapter that is published although nothing was learned, and a status of 0; also where the run is gone
    on with."""
    poison(monkeypatch, ())
    out = tmp_path / "out"
    for resume in ("never", "auto"):
        with pytest.raises(NumericalError, match=rf"none of the {steps} steps changed a weight: .*--verify") as caught:
            run(tiny_folder, data, out, train=replace(WHOLE, max_steps=steps), resume=resume)
        assert caught.value.exit_status == 70
        assert not (out / CONFIG_FILE).exists()


def test_an_epoch_of_which_every_step_is_skipped_ends_the_run(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a patience longer than an epoch, after which no row is left that could be finite."""
    poison(monkeypatch, ())
    with pytest.raises(NumericalError, match=r"step 2: .* 2 steps in a row were not finite"):
        run(tiny_folder, data, tmp_path / "out", train=replace(WHOLE, batch_size=10, epochs=4, micro_batch_tokens=4096))
