"""A finished run that is made longer: the same steps as of one that was that long from the start."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_here
from small_runs import DROPOUT, TWELVE, Killed, run, stop_after
from small_runs import twenty_rows as twenty_rows  # a fixture

from lit_llama.errors import UserError
from lit_llama.model.adapters.peft_folder import META_FILE, WEIGHTS_FILE
from lit_llama.train.config import TrainConfig
from lit_llama.train.logs.metrics import METRICS_FILE, read_metrics
from lit_llama.train.logs.report.run_report import REPORT_JSON
from lit_llama.train.optim import learning_rate
from lit_llama.train.run import RUN_FILE
from lit_llama.train.state import STATES_DIR

SIX = replace(TWELVE, epochs=1.2, schedule="constant", warmup_steps=2, eval_interval=3)  # 20 rows: five steps an epoch
NINE = replace(SIX, epochs=1.8)


@pytest.fixture(scope="module")
def six(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps. Do not change it."""
    return run(tiny_folder, data, tmp_path_factory.mktemp("six") / "out", DROPOUT, SIX)


@pytest.fixture
def out(six: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(six, tmp_path / "out"))


def report(out: Path) -> dict[str, object]:
    return dict(json.loads((out / REPORT_JSON).read_text())["verdict"])


def test_the_same_bytes_as_of_a_run_that_was_that_long(
    tiny_folder: Path, data: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches steps that are done again, moments that begin anew, and the order of another epoch; the schedule is the
    one that does not depend on the length."""
    assert len(read_metrics(out)["loss"]) == 6
    run(tiny_folder, data, out, DROPOUT, NINE, resume="auto")
    said = capsys.readouterr().err
    assert "the run of 6 steps goes on to 9: --train.schedule constant is that of 9 steps from here on" in said
    whole = run(tiny_folder, data, tmp_path / "whole", DROPOUT, NINE)
    for name in (WEIGHTS_FILE, METRICS_FILE):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert report(out)["finished"] and json.loads((out / META_FILE).read_text())["steps"] == 9
    run(tiny_folder, data, out, DROPOUT, NINE, resume="auto")
    assert "the run is finished, there is nothing to do; more --train.epochs or" in capsys.readouterr().err


def test_a_lengthened_run_that_is_stopped_goes_on(tiny_folder: Path, data: Path, out: Path, tmp_path: Path) -> None:
    """Catches a result of the shorter run that is taken for the end of the longer one, by the run or by its report."""
    before = (out / WEIGHTS_FILE).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Killed):
            run(tiny_folder, data, out, DROPOUT, NINE, resume="auto")
    assert (out / WEIGHTS_FILE).read_bytes() == before
    assert (report(out)["finished"], report(out)["steps"], report(out)["of_steps"]) == (False, 7, 9)
    run(tiny_folder, data, out, DROPOUT, NINE, resume="auto")
    whole = run(tiny_folder, data, tmp_path / "whole", DROPOUT, NINE)
    assert (out / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()


def test_the_learning_rate_is_that_of_the_longer_run_and_is_said(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a rate that stays at the end of the short schedule, and a jump that nobody is told of. Through the door,
    as people do it: the run's own file and more steps."""
    train = replace(TWELVE, max_steps=4, warmup_steps=1, eval_interval=100)
    out = run(tiny_folder, data, tmp_path / "o u t", DROPOUT, train)
    done = run_here("finetune/lora.py", "--config", out / RUN_FILE, "--resume", "auto", "--train.max_steps", 7)
    assert done.returncode == 0, done.stderr
    now = replace(train, max_steps=7)
    rates = [learning_rate(step, 4, train) for step in range(4)] + [learning_rate(step, 7, now) for step in range(4, 7)]
    assert [rate for _, rate in read_metrics(out)["learning_rate"]] == pytest.approx(rates, rel=1e-5)
    assert f"a learning rate of {rates[4]:.2e} in step 5 after {rates[3]:.2e}" in done.stderr.replace("\n", " ")
    assert "next: python finetune/merge.py --adapter_dir '" in done.stderr


def test_a_run_that_ended_early_goes_on_with_more_patience(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that can never go on, because what ended it is remembered."""
    train = replace(TWELVE, patience=1, min_delta=1000, eval_interval=1, max_steps=6)
    out = run(tiny_folder, data, tmp_path / "out", DROPOUT, train)
    assert len(read_metrics(out)["loss"]) == 2
    run(tiny_folder, data, out, DROPOUT, replace(train, max_steps=8), resume="auto")
    assert "nothing to do; a higher --train.patience goes on from here" in capsys.readouterr().err
    run(tiny_folder, data, out, DROPOUT, replace(train, patience=3), resume="auto")
    assert len(read_metrics(out)["loss"]) == 4 and report(out)["finished"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 5}, r"step-000006 has 6 steps behind it, but .* end after 5; go on with more"),
        ({"epochs": 9, "learning_rate": 1.0}, r"--train\.learning_rate was 0\.01, is 1\.0\. Continue"),
    ],
)
def test_what_cannot_go_on(tiny_folder: Path, data: Path, six: Path, changes: dict[str, float], message: str) -> None:
    """Catches a finished run that is cut short, or that goes on as another one."""
    train: TrainConfig = replace(SIX, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        run(tiny_folder, data, six, DROPOUT, train, resume="auto")


def test_a_finished_run_without_states_says_how_to_go_on(tiny_folder: Path, data: Path, out: Path) -> None:
    """Catches `nothing to do` where more was asked for."""
    shutil.rmtree(out / STATES_DIR)
    run(tiny_folder, data, out, DROPOUT, SIX, resume="auto")
    with pytest.raises(UserError, match=rf"no state .*finetune/lora.py --adapter_dir {out} --out_dir ANOTHER"):
        run(tiny_folder, data, out, DROPOUT, NINE, resume="auto")
