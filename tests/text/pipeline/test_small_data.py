"""Runs on few rows and on data without a test split: they train, and say what they do without."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here
from small_runs import ROWS, SHORT, run

from lit_llama.errors import DataError, IntegrityError, UserError
from lit_llama.text.config import PrepareConfig
from lit_llama.text.pipeline.records import prepare_records
from lit_llama.train.config import TrainConfig

USUAL = TrainConfig(learning_rate=1e-3)


def prepared(folder: Path, tokenizer: Path, rows: int, **changes: Any) -> Path:
    """A data folder of so many rows, by the defaults of prepare/records.py."""
    (folder / "rows.json").write_text(json.dumps(ROWS[:rows]))
    source, made = str(folder / "rows.json"), folder / "data"
    config = PrepareConfig(
        source=source, destination_path=made, tokenizer_path=tokenizer, prompt_style="alpaca", **changes
    )
    prepare_records(config)
    return folder / "data"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_three_rows_train_by_default(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches data that prepares and then does not train, and a step that is said to take rows that are not there."""
    out = run(tiny_folder, prepared(tmp_path, tiny_folder, 3), tmp_path / "out", train=USUAL)
    steps = table(out)
    assert [row["step"] for row in steps] == ["0", "1", "2", "3"] and all(row["loss"] for row in steps[1:])
    assert steps[0]["test_loss"] and steps[3]["test_loss"]
    said = capsys.readouterr().err
    assert "has 2 rows for training: --train.batch_size is 2, not 16" in said and "3 steps of 2 samples" in said
    report = json.loads((out / "report.json").read_text())
    assert any("has 2 rows for training" in warning["what"] for warning in report["warnings"])


def test_without_a_test_split_a_run_has_no_evaluation_and_says_so(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that ends for want of a test loss, a loss of nothing in its files, and a silent gap."""
    data = prepared(tmp_path, tiny_folder, 8, test_split_size=0)
    out = run(tiny_folder, data, tmp_path / "out", train=SHORT)
    steps = table(out)
    assert [row["step"] for row in steps] == ["0", "1", "2"]
    assert not any(row["test_loss"] or row["perplexity"] for row in steps) and steps[2]["loss"]
    assert "has no test split: no evaluation, no sample answers" in capsys.readouterr().err
    assert (out / "loss.png").exists() and (out / "report.html").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["evaluations"] == [] and report["verdict"]["after"] is None
    assert any("has no test split" in warning["what"] for warning in report["warnings"])
    assert not any("test split" in entry["what"] for entry in report["commands"])
    for changes, flag in (({"keep": "best"}, "--train.keep best"), ({"patience": 2}, "--train.patience")):
        with pytest.raises(UserError, match=f"{flag} goes by the test loss, but .* has no test split"):
            run(tiny_folder, data, tmp_path / "other", train=TrainConfig(**changes))


def test_the_plan_of_data_without_a_test_split(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a plan that fails, or counts memory for an evaluation that never comes."""
    data = prepared(tmp_path, tiny_folder, 8, test_split_size=0)
    done = run_here("finetune/lora.py", "--checkpoint_dir", tiny_folder, "--data_dir", data, "--plan")
    assert done.returncode == 0, done.stderr
    assert "none: no test split" in done.stdout and "3 steps of 8 samples" in done.stdout
    assert "no test split" in done.stderr and "--train.batch_size is 8, not 16" in done.stderr
    seed = run_here("finetune/lora.py", "--checkpoint_dir", tiny_folder, "--data_dir", data, "--plan", "--seed", 2**64)
    assert seed.returncode == 2 and "--seed is 18446744073709551616, expected 0 to" in seed.stderr


def test_a_split_that_lost_its_rows_is_no_data_without_one(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a damaged data folder that trains without evaluation."""
    empty, full = tmp_path / "a", tmp_path / "b"
    empty.mkdir()
    full.mkdir()
    without, data = prepared(empty, tiny_folder, 8, test_split_size=0), prepared(full, tiny_folder, 8)
    for file in (data / "test").iterdir():
        file.unlink()
    for file in (without / "test").iterdir():
        file.rename(data / "test" / file.name)
    with pytest.raises(IntegrityError, match=r"test/data-00000-of-00001\.arrow is damaged"):
        run(tiny_folder, data, tmp_path / "out", train=SHORT)
    (data / "SHA256SUMS").unlink()
    with pytest.raises(DataError, match="expected rows with input_ids and labels"):
        run(tiny_folder, data, tmp_path / "out", train=SHORT)
