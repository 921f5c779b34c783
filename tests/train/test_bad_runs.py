"""What finetune/lora.py refuses, as a user meets it: one line, its exit status, and no folder left behind."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Sample, run_here, write_splits
from small_runs import twenty_rows as twenty_rows  # a fixture

from lit_llama.text.message import IGNORE_INDEX


def no_data(data: Path) -> None:
    shutil.rmtree(data)


def other_tokenizer(data: Path) -> None:
    meta = json.loads((data / "meta.json").read_text())
    meta["tokenizer"] |= {"fingerprint": "0" * 64, "path": "checkpoints/other"}
    (data / "meta.json").write_text(json.dumps(meta))


def replace_train(data: Path, sample: Sample) -> None:
    for name in ("train", "test"):
        shutil.rmtree(data / name)
    write_splits(data, {"train": [sample] * 8, "test": [Sample([5, 6, 7], [5, 6, 7])] * 2})


def all_masked(data: Path) -> None:
    replace_train(data, Sample([5, 6, 7], [5, IGNORE_INDEX, IGNORE_INDEX]))  # the first is never predicted


def too_long(data: Path) -> None:
    replace_train(data, Sample([5] * 300, [5] * 300))


def no_token(data: Path) -> None:
    replace_train(data, Sample([5, 6, 7], [5, 6, 40_000]))  # only predicted, so that no embedding meets it


def no_mask(data: Path) -> None:
    replace_train(data, Sample([5, 6, 7], [5, -1, 7]))


def mask_that_is_read(data: Path) -> None:
    replace_train(data, Sample([IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 6, 7]))


def no_test_rows(data: Path) -> None:
    shutil.rmtree(data / "test")
    write_splits(data, {"test": []})


def as_it_is(data: Path) -> None:
    pass


CASES: dict[str, tuple[Callable[[Path], None], list[object], int, str]] = {
    "no data": (no_data, [], 3, "data does not exist; make it with prepare/"),
    "another tokenizer": (
        other_tokenizer,
        [],
        3,
        "was prepared with checkpoints/other, whose vocabulary is not that of",
    ),
    "all masked": (all_masked, [], 3, "no token of the train split carries a loss"),
    "no rows": (no_test_rows, [], 3, "data/test: expected rows with input_ids and labels"),
    "longer than the context": (too_long, [], 3, "the longest sample has 300 tokens"),
    "beyond the vocabulary": (no_token, [], 3, "the train split holds 40000, which is none of the"),
    "another mask": (no_mask, [], 3, "the train split holds -1, which is none of the"),
    "a mask among the input": (mask_that_is_read, [], 3, "the train split holds -100, which is none of the"),
    "no such target": (as_it_is, ["--lora.target_modules", "q_prj"], 2, "did you mean q_proj?"),
    "rank 0": (as_it_is, ["--lora.r", 0], 2, "--lora.r is 0, expected a whole number of 1 or more"),
    "learning rate 2e4": (as_it_is, ["--train.learning_rate", "2e4"], 2, "--train.learning_rate is 20000.0, expected"),
    "learning rate below 0": (as_it_is, ["--train.learning_rate=-0.1"], 2, "--train.learning_rate is -0.1"),
    "learning rate no number": (as_it_is, ["--train.learning_rate", ".nan"], 2, "--train.learning_rate is nan"),
    "no interval": (as_it_is, ["--train.save_interval", 0], 2, "--train.save_interval is 0, expected 1 or more"),
    "negative seed": (as_it_is, ["--seed", -1], 2, "--seed is -1, expected 0 to"),
    "large seed": (as_it_is, ["--seed", 2**64], 2, "--seed is 18446744073709551616, expected 0 to"),
    "no such state": (as_it_is, ["--resume", "out/states/step-000001"], 2, "is no state of made/here; there are: none"),
    "16-mixed without a GPU": (
        as_it_is,
        ["--precision", "16-mixed"],
        5,
        "--precision 16-mixed is for GPUs; on this cpu use --precision",
    ),
    "pages without a GPU": (
        as_it_is,
        ["--train.optimizer", "paged_adamw_8bit"],
        5,
        "paged_adamw_8bit moves memory between GPU and CPU",
    ),
    "spread over one": (as_it_is, ["--strategy", "fsdp"], 2, "there is one: raise --devices"),
    "a key of no group": (as_it_is, ["--train.learning_rte", 1], 2, "did you mean --train.learning_rate?"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_run_is_one_line_with_its_status(
    case: str, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, a status that says something else, training that begins, and a folder made for nothing."""
    damage, flags, status, named = CASES[case]
    damage(Path(shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("SHA256SUMS"))))
    monkeypatch.setattr("lit_llama.train.run.load_model", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = sorted(path.name for path in tmp_path.iterdir())
    given = ["--checkpoint_dir", tiny_folder, "--data_dir", "data", "--out_dir", "made/here", *flags]
    result = run_here("finetune/lora.py", *given, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and result.stdout == ""
    assert named in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", ["no data", "all masked", "longer than the context", "rank 0"])
def test_a_plan_refuses_what_its_run_would(case: str, tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a table that promises a run which ends in its first second."""
    damage, flags, status, named = CASES[case]
    damage(Path(shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("SHA256SUMS"))))
    given = ["--checkpoint_dir", tiny_folder, "--data_dir", "data", "--plan", *flags]
    result = run_here("finetune/lora.py", *given, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (status, "") and named in result.stderr, result.stderr


@pytest.mark.parametrize("given", ["mlflow", "[mlflow]"])
def test_a_logger_by_its_bare_name(
    given: str, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a name that is no list, as everybody types it, answered with types of Python."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    flags = ["--checkpoint_dir", tiny_folder, "--data_dir", data, "--out_dir", tmp_path / "out", "--loggers", given]
    for door in ("lora", "full"):
        result = run_here(f"finetune/{door}.py", *flags)
        assert result.returncode == 5
        assert result.stderr == "error: --loggers mlflow needs mlflow: pip install 'lit_llama[mlflow]'\n"


@pytest.mark.parametrize("finished", [True, False])
def test_the_folder_of_another_run_is_refused(finished: bool, tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches a run that is lost to another one, and a message without the way out."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.yaml").write_text("seed: 7\n")
    if finished:
        (out / "adapter_config.json").write_text("{}")
    given = ["--checkpoint_dir", tiny_folder, "--data_dir", data, "--out_dir", out]
    result = run_here("finetune/lora.py", *given)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert ("the end of a run; name another --out_dir" if finished else "--resume auto") in result.stderr
    assert (out / "run.yaml").read_text() == "seed: 7\n" and not (out / ".lock").exists()


@pytest.mark.parametrize("flag", ["--data_dir", "--checkpoint_dir"])
@pytest.mark.parametrize("door", ["lora", "full"])
def test_no_input_is_written_over(door: str, flag: str, tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches the meta.json of the data, or of the base, replaced by that of a run."""
    given = {"--data_dir": data, "--checkpoint_dir": tiny_folder}
    before = {path: path.read_bytes() for folder in given.values() for path in folder.iterdir() if path.is_file()}
    out = given[flag] / ".." / given[flag].name
    flags = [part for pair in given.items() for part in pair]
    result = run_here(f"finetune/{door}.py", *flags, "--out_dir", out)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"is {flag}; name another" in result.stderr
    after = {path: path.read_bytes() for folder in given.values() for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_a_file_in_place_of_the_folder_is_refused(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Catches an error of the system in place of our own."""
    (tmp_path / "out").write_text("x")
    given = ["--checkpoint_dir", tiny_folder, "--data_dir", data, "--out_dir", tmp_path / "out"]
    result = run_here("finetune/lora.py", *given)
    assert result.returncode == 2 and "is a file, expected a folder" in result.stderr
