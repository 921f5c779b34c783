"""When a data folder is made anew and when it is not, what is said of it, and what is refused before any work."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import run_here
from test_prepare import Prepare, bytes_of, contents
from test_prepare import prepare as prepare  # a fixture
from test_prepare import rows as rows  # a fixture

from lit_llama.errors import CheckpointError, DataError, UserError
from lit_llama.text.config import NEAR_DUPLICATES
from lit_llama.text.dataset.folder import read_meta
from lit_llama.text.pipeline import records
from lit_llama.text.pipeline.executors import recipe
from lit_llama.text.prompts.encode import named_style


@pytest.fixture
def tokenizer_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the tiny model, to be changed."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_folder / name, folder / name)
    return folder


def test_an_unchanged_second_run_does_nothing_in_no_time(
    prepare: Prepare, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches work done again, and files written again, which would make everything after them out of date."""
    start = time.process_time()
    meta = prepare(rows)
    whole, before = time.process_time() - start, contents(tmp_path)
    monkeypatch.setattr(records, "prepare", None)
    monkeypatch.setattr(records.Tokenizer, "from_path", None)
    capsys.readouterr()
    start = time.process_time()
    assert prepare(rows) == meta
    assert time.process_time() - start < 0.5 * whole, "of the processor"
    assert contents(tmp_path) == before
    assert "data: unchanged, made of the same data by the same rules" in capsys.readouterr().err


def change_row(rows: Path, tokenizer: Path, folder: Path) -> None:
    rows.write_text(rows.read_text().replace("Question 11", "Question eleven"))


def add_row(rows: Path, tokenizer: Path, folder: Path) -> None:
    rows.write_text(rows.read_text() + '{"instruction": "one more", "output": "x"}\n')


def change_tokenizer(rows: Path, tokenizer: Path, folder: Path) -> None:
    path = tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))


def change_template(rows: Path, tokenizer: Path, folder: Path) -> None:
    path = tokenizer / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "model"))


def rename(rows: Path, tokenizer: Path, folder: Path) -> None:
    rows.rename(rows.with_name("others.jsonl"))


def lose_split(rows: Path, tokenizer: Path, folder: Path) -> None:
    shutil.rmtree(folder / "train")


def cut_file(rows: Path, tokenizer: Path, folder: Path) -> None:
    [path] = (folder / "test").glob("*.arrow")
    os.truncate(path, 100)


def lose_meta(rows: Path, tokenizer: Path, folder: Path) -> None:
    (folder / "meta.json").unlink()


def spoil_meta(rows: Path, tokenizer: Path, folder: Path) -> None:
    (folder / "meta.json").write_text("{}")


@pytest.mark.parametrize(
    "change",
    [change_row, add_row, change_tokenizer, change_template, rename, lose_split, cut_file, lose_meta, spoil_meta],
)
def test_whatever_changed_is_made_anew(
    change: Callable[..., None], prepare: Prepare, rows: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Catches training on yesterday's rows, tokenizer or template, or on a folder of which a part was deleted."""
    options: dict[str, Any] = {"tokenizer_path": tokenizer_folder, "prompt_style": "chat_template"}
    prepare(rows, **options)
    change(rows, tokenizer_folder, tmp_path / "data")
    renamed = rows if rows.exists() else rows.with_name("others.jsonl")
    made = prepare(renamed, **options)
    fresh = prepare(renamed, folder=tmp_path / "fresh" / "data", **options)
    told = {"report.json", "report.html", "meta.json", "SHA256SUMS"}  # of where the folder is
    found, wanted = bytes_of(tmp_path / "data"), bytes_of(tmp_path / "fresh" / "data")
    assert {n: b for n, b in found.items() if n not in told} == {n: b for n, b in wanted.items() if n not in told}
    assert {**made, "files": 0} == {**fresh, "files": 0} and made == read_meta(tmp_path / "data")


@pytest.mark.parametrize(
    "option",
    [
        {"seed": 2},
        {"max_seq_length": 180},
        {"mask_inputs": False},
        {"train_on": "last"},
        {"overflow": "truncate_prompt"},
        {"split": "shuffle"},
        {"test_split_size": 0.3},
        {"prompt_style": "vicuna"},
        {"on_error": "skip"},
        {"fields": {"instruction": "instruction"}},
        {"tree": "all"},
        {"weights": [1.0]},
        {"near_duplicates": 7},
    ],
)
def test_every_option_counts(option: dict[str, Any], prepare: Prepare, rows: Path, tmp_path: Path) -> None:
    """Catches an option left out of the key: the folder would stay what it was in silence."""
    key = prepare(rows)["key"]
    assert prepare(rows, folder=tmp_path / "other", **option)["key"] != key
    assert prepare(rows, folder=tmp_path / "same")["key"] == key


def test_another_version_of_the_encoding_counts(prepare: Prepare, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder that outlives a repaired defect."""
    key = prepare(rows)["key"]
    monkeypatch.setattr(records, "ENCODING", records.ENCODING + 1)
    assert prepare(rows)["key"] != key


def test_another_version_of_a_tokenizers_package_counts(
    prepare: Prepare, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches tokens that another version would not give."""
    key = prepare(rows)["key"]
    monkeypatch.setattr(recipe, "version", lambda name: "99")
    assert prepare(rows)["key"] != key


def test_what_is_made_anew_says_why(
    prepare: Prepare, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a folder that becomes another one without a word, and a reason where there is none."""
    prepare(rows)
    assert "made anew" not in capsys.readouterr().err
    prepare(rows, seed=7, max_seq_length=180)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'data'}: made anew, since --max_seq_length is 180, not 200, --seed is 7, not 1" in said
    add_row(rows, rows, rows)
    prepare(rows, seed=7, max_seq_length=180)
    assert "made anew, since the sources changed" in " ".join(capsys.readouterr().err.split())


def test_rows_that_nobody_asked_for_are_no_loss(
    prepare: Prepare, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a warning about the length of rows that the weights of a mixture leave out."""
    other = rows.with_name("other.jsonl")
    other.write_text("".join(f'{{"instruction": "Q {n}", "output": "A"}}\n' for n in range(100)))
    options: dict[str, Any] = {"weights": [1, 0.5], "max_seq_length": 2000, "on_error": "skip"}
    meta = prepare(rows, other, **options)
    assert meta["dropped_by_choice"] == meta["dropped"]["not drawn, by the weight of its source"]["rows"] > 30
    assert "more than a tenth" not in capsys.readouterr().err


def test_the_models_own_template_is_taken_or_asked_for(
    prepare: Prepare, rows: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Catches another style than the model's in silence, and a template that is lost on the way."""
    options: dict[str, Any] = {"tokenizer_path": tokenizer_folder, "prompt_style": "chat_template"}
    prepare(rows, **options)
    template = (tokenizer_folder / "chat_template.jinja").read_text()
    assert (tmp_path / "data" / "chat_template.jinja").read_text() == template
    (tokenizer_folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"--prompt_style chat_template: .* has no chat_template\.jinja; name"):
        prepare(rows, **options)


def test_without_a_style_the_models_own_is_taken_and_said(
    prepare: Prepare, rows: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches Alpaca's prompt for a model that has a chat template, which then refuses a system message."""
    options: dict[str, Any] = {"tokenizer_path": tokenizer_folder, "prompt_style": None}
    assert prepare(rows, **options)["prompt_style"] == "chat_template"
    assert f"prompt style: the chat template of {tokenizer_folder}; --prompt_style" in as_one(capsys)
    (tokenizer_folder / "chat_template.jinja").write_text(named_style("chatml").jinja(bos=False))
    assert prepare(rows, **options)["prompt_style"] == "chatml"
    assert ", which is chatml; --prompt_style" in as_one(capsys)
    (tokenizer_folder / "chat_template.jinja").unlink()
    assert prepare(rows, **options)["prompt_style"] == "alpaca"
    assert f"prompt style alpaca, as {tokenizer_folder} has no chat template" in as_one(capsys)


def as_one(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said, without the ends of lines."""
    return capsys.readouterr().err.replace("\n", " ")


def test_what_becomes_of_thoughts_and_typed_ends_is_said(
    prepare: Prepare, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches thoughts that go in silence, rules that do not reach the rows, and a report that does not tell."""
    (tokenizer_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    source = tmp_path / "thoughts.jsonl"
    asked = [
        {"instruction": f"Question {n}?", "output": f"<think>Hm {n}.</think>It is {n}.<|im_end|>"} for n in range(9)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in asked))
    options: dict[str, Any] = {"tokenizer_path": tokenizer_folder, "prompt_style": None, "split": "shuffle"}
    tokens = {}
    for rule, how in (("template", "--thoughts keep trains them"), ("keep", ""), ("drop", "thoughts, as asked")):
        meta = prepare(source, test_split_size=2, thoughts=rule, typed_ends="strip", **options)
        tokens[rule], said = meta["splits"]["train"]["trained_tokens"], as_one(capsys)
        assert meta["thoughts"] == rule and how in said and "which was taken away, as asked (line 1, line 2" in said
        assert meta["notes"].get("thoughts_left_out", {"rows": 0})["rows"] == (9 if how else 0)
        assert meta["notes"]["typed_ends"]["rows"] == 9
    assert tokens["template"] == tokens["drop"] < tokens["keep"]
    meta = prepare(source, test_split_size=2, **options)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    told = {warning["what"]: warning["severity"] for warning in report["warnings"]}
    assert told["9 rows are trained without their thoughts, which the chat template leaves out."] == "check"
    assert any(what.startswith("9 rows have an answer that ends in a spelled control token") for what in told)


def test_what_is_refused_is_refused_before_any_work(prepare: Prepare, rows: Path, tmp_path: Path) -> None:
    """Catches an hour of encoding before a mistyped path is found, and a folder made for nothing."""
    for options, error, message in (
        ({"max_seq_length": 2}, DataError, "--max_seq_length is 2, expected 3 or more"),
        ({"tokenizer_path": tmp_path / "none"}, CheckpointError, "none does not exist"),
        ({"prompt_style": "ziya"}, CheckpointError, "ziya needs the tokens <human>"),
        ({"train_on": "last", "overflow": "split"}, UserError, "--overflow split with --train_on last"),
        ({"fields": {"answer": "x"}}, UserError, "--fields: answer is none of"),
    ):
        with pytest.raises(error, match=message):
            prepare(rows, **options)
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_all_rows_and_reasons_are_said(
    prepare: Prepare, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a loss that stands only in a file nobody opens, talk on stdout, and a summary without the way on."""
    prepare(rows)
    out, err = capsys.readouterr()
    assert out == "" and f"{rows}: 120 rows = 96 kept (of them 0 cut) + 24 dropped" in err
    assert "dropped, empty output: 12 (line 4, line 14," in err and "line 74, ...; all of them in lost.jsonl)" in err
    way_out = "raise --max_seq_length (200) or see --overflow: 12 rows are too long, half of them with 558 tokens"
    assert f"more than a tenth is dropped: {way_out}" in err
    assert "recognised: 96 OpenAI messages, 24 Alpaca; prompt style chatml" in err
    assert f"look at report.html; ready for finetune/lora.py --data_dir {tmp_path / 'data'}" in err


@pytest.mark.parametrize(("limit", "why"), [(0, "--near_duplicates is 0"), (95, "96 rows, more than --near_d")])
def test_near_duplicates_that_are_not_looked_for_are_said(
    limit: int, why: str, prepare: Prepare, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a check that is left out in silence, on stderr or in the report, and a flag that goes nowhere."""
    assert prepare(rows)["near_duplicates_checked"] is True
    assert "near-duplicates" not in capsys.readouterr().err
    meta = prepare(rows, near_duplicates=limit)
    assert (meta["near_duplicates"], meta["near_duplicates_checked"]) == (limit, False)
    said = capsys.readouterr().err
    assert why in said and "--near_duplicates 96 would take about 1 MB of memory" in said
    report = json.loads((tmp_path / "data" / "report.json").read_text("utf-8"))
    [note] = [warning for warning in report["warnings"] if warning["what"].startswith("Near-duplicates were not")]
    assert "--near_duplicates 96 would" in note["why"]


def test_the_grave_warnings_of_the_report_are_said(
    prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches test rows that stand in train nearly as they are, and a terminal that sounds as if all were well."""
    text = "Tell the baker in the old street beside the river to bring {} fresh loaves of rye bread to number {} today"
    rows = [{"instruction": text.format(i % 7 + 2, i), "output": f"The baker brings them to {i}."} for i in range(60)]
    (tmp_path / "alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(tmp_path / "alike.jsonl")
    said = capsys.readouterr().err.splitlines()
    warnings = json.loads((tmp_path / "data" / "report.json").read_text("utf-8"))["warnings"]
    grave = [f"  {w['severity'].upper()} {w['what']} {w['why']}" for w in warnings if w["severity"] != "note"]
    assert any("nearly the same" in line for line in grave) and set(grave) <= set(said)


def test_the_doors_have_the_default_of_the_library(tmp_path: Path, rows: Path, tiny_folder: Path) -> None:
    """Catches three defaults in place of one, and a negative number taken for something."""
    flags = ["--source", rows, "--destination_path", tmp_path / "data", "--tokenizer_path", tiny_folder]
    for door in ("records", "text", "alpaca"):
        given = flags if door != "alpaca" else flags[2:]
        printed = run_here(f"prepare/{door}.py", *given, "--print_config")
        assert f"near_duplicates: {NEAR_DUPLICATES}\n" in printed.stdout, printed.stderr
    refused = run_here("prepare/records.py", *flags, "--near_duplicates", -1)
    assert refused.returncode == UserError.exit_status and "--near_duplicates is -1, expected" in refused.stderr


def test_the_script_has_the_same_options_and_tells_the_report_of_training(
    rows: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Catches a flag that goes nowhere, and a report without the steps that training will take."""
    flags = ["--source", rows, "--destination_path", tmp_path / "data", "--tokenizer_path", tiny_folder]
    flags += ["--prompt_style", "chat_template", "--max_seq_length", 150, "--split", "shuffle", "--mask_inputs", False]
    flags += ["--test_split_size", 10, "--seed", 5, "--train_on", "last", "--overflow", "truncate_response"]
    flags += ["--on_error", "skip", "--tree", "all"]
    done = run_here("prepare/records.py", *flags)
    assert done.returncode == 0, done.stderr
    meta = read_meta(tmp_path / "data")
    wanted = {"max_seq_length": 150, "mask_inputs": False, "train_on": "last", "overflow": "truncate_response"}
    assert wanted.items() <= meta.items() and (meta["split"], meta["seed"], meta["test_split_size"]) == (
        "shuffle",
        5,
        10,
    )
    report = json.loads((tmp_path / "data" / "report.json").read_text("utf-8"))
    assert report["plan"]["steps_per_epoch"] == -(-meta["splits"]["train"]["rows"] // 16)
    assert report["commands"][0] == f"python prepare/show.py --data_dir {tmp_path / 'data'}"


def test_what_became_of_fields_is_said_everywhere(
    prepare: Prepare, put: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a label that no one hears of, and a count that stands in the terminal only."""
    rows = [{"instruction": f"q{n}", "output": n, "label": n % 3, "context": "c"} for n in range(1, 40)]
    path = put("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    meta = prepare(path, as_text=True, ignore_fields=["context,[/b]"])
    assert meta["fields"] == {
        "unused": {"label": 39},
        "written_as_text": {"output": 39},
        "left_out": {"context": 39, "[/b]": 0},
    }
    said = capsys.readouterr().err
    assert "fields that nothing uses (--fields gives them a place): label (39 rows)" in said
    assert "fields that were no text, written as JSON text: output (39 rows)" in said
    assert "fields left out, as asked: context (39 rows), [/b] (0 rows)" in said
    report = json.loads((tmp_path / "data" / "report.json").read_text("utf-8"))
    assert report["accounting"]["fields"] == meta["fields"]
    assert "check: Fields that nothing uses: label (39 rows)." in [
        f"{warning['severity']}: {warning['what']}" for warning in report["warnings"]
    ]
    assert "context (39 rows)" in (tmp_path / "data" / "report.html").read_text("utf-8")
    assert "made anew, since --ignore_fields is ['context']" in _again(prepare, path, capsys)


def _again(prepare: Prepare, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    prepare(path, as_text=True, ignore_fields=["context"])
    return capsys.readouterr().err


def test_the_end_that_is_said_is_the_one_that_is_trained(
    prepare: Prepare, rows: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the tokenizer's own end, named where a template ends answers in another token."""
    change_tokenizer(rows, tokenizer_folder, tmp_path)
    prepare(rows, tokenizer_path=tokenizer_folder, prompt_style=None)
    assert "prompt style chat_template; trained: answers only; ends in <|im_end|>" in capsys.readouterr().err
    ids = json.loads((tokenizer_folder / "tokenizer.json").read_text())["added_tokens"]
    (end,) = (token["id"] for token in ids if token["content"] == "<|im_end|>")
    labels = datasets.load_from_disk(tmp_path / "data")["train"]["labels"]
    assert {next(label for label in reversed(row) if label != -100) for row in labels} == {end}
