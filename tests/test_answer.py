"""Answers to a file of instructions, and how they are measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llama.errors import DataError, UserError
from lit_llama.generate import answer as module
from lit_llama.generate.answer import (
    Answer,
    answer_all,
    answer_file,
    answer_one,
    continue_text,
    instruction_ids,
    measure,
)
from lit_llama.generate.load import Speaker, load
from lit_llama.generate.sampling import Sampling
from lit_llama.text.encode import prompt_ids
from lit_llama.text.formats import Example

EXAMPLES = [
    Example("Say hi"),
    Example("Extract the order as JSON: item, quantity.", "two blue lamps", '{"item": "blue lamp", "quantity": 2}', 1),
    Example("Zoë's naïve café", "北京 😀", "", 2),
    Example("a", "", "", 3),
    Example("Write a response that appropriately completes the request. " * 3, "", "", 4),
]
Rows = Callable[[list[dict[str, str]]], Path]


@pytest.fixture(scope="module")
def speaker(tiny_folder: Path) -> Speaker:
    """Stops at a third of all ids, so that answers end at different steps."""
    return replace(load(tiny_folder, precision="32-true"), stop_ids=frozenset(range(0, 384, 12)))


def measured(reference: str, text: str) -> dict[str, Any]:
    return measure([Example("x", "", reference)], [Answer(text, True, 3)])


def run_file(speaker: Speaker, path: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"data_dir": None, "input_file": path, "output_file": None, "limit": None}
    settings |= {"max_new_tokens": 12, "sampling": Sampling(), "batch_size": 3}
    return answer_file(speaker, **(settings | changes))


@pytest.mark.parametrize(
    ("reference", "text", "exact", "same_json"),
    [
        ('{"a": 1, "b": [2]}', '{"a": 1, "b": [2]}', 1.0, 1.0),
        ('{"a": 1, "b": [2]}', ' {"a": 1, "b": [2]}\n', 1.0, 1.0),
        ('{"a": 1, "b": [2]}', '{"b":[2],\n"a":1}', 0.0, 1.0),
        ('{"a": {"x": 1, "y": 2}}', '{"a": {"y": 2, "x": 1}}', 0.0, 1.0),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', 0.0, 0.0),
        ('{"a": "é"}', '{"a": "\\u00e9"}', 0.0, 1.0),
        ('{"a": 1}', '{"a": true}', 0.0, 0.0),
        ('{"a": 0}', '{"a": false}', 0.0, 0.0),
        ('{"a": 1}', '{"a": "1"}', 0.0, 0.0),
        ('{"a": 1}', '{"a": 1.0}', 0.0, 0.0),  # how a number is written is part of what was asked for
        ('{"a": 1.5}', '{"a": 1.50}', 0.0, 1.0),
        ('{"a": null}', "{}", 0.0, 0.0),
        ("null", "", 0.0, 0.0),
        ("null", "null", 1.0, 1.0),
        ('{"a": 1}', '{"a": 1', 0.0, 0.0),
        ('{"a": 1}', 'Here it is: {"a": 1}', 0.0, 0.0),
        ('{"a": 1}', "[" * 100_000, 0.0, 0.0),
    ],
)
def test_json_is_compared_by_value(reference: str, text: str, exact: float, same_json: float) -> None:
    """Comparing texts, Python's 1 == True, or a crash on what is no JSON."""
    assert measured(reference, text) == {"rows": 1, "stopped": 1.0, "exact_match": exact, "json_match": same_json}


def test_plain_text_references_have_no_json_measure() -> None:
    """A share of 0 % where there is nothing to compare."""
    assert measured("two lamps", "two lamps ") == {"rows": 1, "stopped": 1.0, "exact_match": 1.0}
    mixed = measure([Example("x", "", "{}"), Example("x", "", "no")], [Answer("{}", True, 1), Answer("no", True, 1)])
    assert "json_match" not in mixed and mixed["exact_match"] == 1.0


def test_rows_without_reference_count_only_as_answered() -> None:
    """Rows without reference counted as wrong, or a division by zero where no row has one."""
    answers = [Answer("a", True, 1), Answer("b", False, 1), Answer("", True, 1), Answer("d", False, 1)]
    examples = [Example("x", "", "a"), Example("x", "", "B"), Example("x"), Example("x")]
    assert measure(examples, answers) == {"rows": 4, "stopped": 0.5, "exact_match": 0.5}
    assert measure(examples[2:], answers[2:]) == {"rows": 2, "stopped": 0.5}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_answers_are_in_order_and_the_same_in_any_batch(speaker: Speaker, temperature: float, batch_size: int) -> None:
    """Answers in the order of their lengths, or random draws that depend on the batch."""
    sampling = Sampling(temperature=temperature, seed=5)
    found = answer_all(speaker, EXAMPLES, 20, sampling, batch_size)
    for number, (example, answer) in enumerate(zip(EXAMPLES, found, strict=True)):
        alone = replace(sampling, seed=5 + number)
        assert answer_all(speaker, [example], 20, alone, 1) == [answer]
    assert len({answer.text for answer in found}) == len(EXAMPLES)
    assert {answer.stopped for answer in found} == {True, False}


def test_an_answer_holds_neither_prompt_nor_stop_token(speaker: Speaker, tiny_folder: Path) -> None:
    """A text that repeats the prompt, spells the stop token, or lost its last word."""
    from tokenizers import Tokenizer

    prompt = instruction_ids(speaker, EXAMPLES[0])
    steps = list(speaker.stream(prompt, 20, Sampling()))
    ids = [token for step, _ in steps for token in step]
    answer = answer_all(speaker, EXAMPLES[:1], 20, Sampling(), 1)[0]
    assert answer.tokens == len(ids) and answer.stopped == (ids[-1] in speaker.stop_ids)
    backend = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    assert answer.text == backend.decode([i for i in ids if i not in speaker.stop_ids])


@pytest.mark.parametrize("seed", range(6))
def test_streamed_text_equals_batch_text(speaker: Speaker, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A character of several bytes torn between tokens: a model this random says little else."""
    sampling = Sampling(temperature=3.0, seed=seed)
    answer = answer_all(speaker, [EXAMPLES[2]], 150, sampling, 1)[0]
    answer_one(speaker, EXAMPLES[2], 150, sampling)
    streamed = capsys.readouterr()
    assert streamed.out == answer.text + "\n"
    assert f"{answer.tokens} tokens in" in streamed.err and "tokens/s" in streamed.err


def test_streamed_characters_arrive_whole(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces with a replacement character where the text has an emoji."""
    text = "Zoë: 北京 😀!"
    ids = speaker.tokenizer.encode(text)
    monkeypatch.setattr("lit_llama.generate.load.generate", lambda *_, **__: iter([[(0, i)] for i in ids]))
    pieces = [piece for _, piece in replace(speaker, stop_ids=frozenset({2})).stream([1], 50, Sampling())]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5, "the text was to come in pieces"


def test_raw_text_is_continued_as_it_is(speaker: Speaker, capsys: pytest.CaptureFixture[str]) -> None:
    """A template around raw text, or the prompt echoed."""
    ids = [i for step, _ in speaker.stream(speaker.tokenizer.encode("def add"), 20, Sampling()) for i in step]
    continue_text(speaker, "def add", 20, Sampling())
    text = speaker.tokenizer.decode([i for i in ids if i not in speaker.stop_ids])
    assert capsys.readouterr().out == text + "\n"
    with pytest.raises(UserError, match="prompt is empty"):
        continue_text(speaker, "", 5, Sampling())


def test_raw_text_begins_with_the_token_the_model_wants(tiny_folder: Path, speaker: Speaker) -> None:
    """A LLaMA asked without its beginning of text."""
    seen: list[list[int]] = []

    class Spy(Speaker):
        def stream(self, prompt: Any, *rest: Any, **more: Any) -> Any:
            seen.append(list(prompt))
            return super().stream(prompt, *rest, **more)

    spy = Spy(speaker.model, load(tiny_folder).tokenizer, None, speaker.stop_ids)
    continue_text(spy, "def", 1, Sampling())
    spy.tokenizer.bos = "<|im_start|>"
    continue_text(spy, "def", 1, Sampling())
    assert seen[1] == [1, *seen[0]]


def test_a_blank_instruction_is_refused(speaker: Speaker) -> None:
    """An answer to an unset shell variable."""
    with pytest.raises(UserError, match="--prompt is empty"):
        answer_one(speaker, Example(" \n"), 5, Sampling())


def test_a_chat_is_answered_where_it_stands(speaker: Speaker, tmp_path: Path) -> None:
    """Catches a last question that is asked without the turns before it, or with its answer."""
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    path, output = tmp_path / "chats.jsonl", tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1]}) + "\n")
    run_file(speaker, path, output_file=output)
    [chat, single] = [json.loads(line) for line in output.read_text().splitlines()]
    style = speaker.require_style()
    prompts = [prompt_ids(speaker.tokenizer, style, asked) for asked in (turns[:3], turns[:1])]
    for row, prompt in zip((chat, single), prompts, strict=True):
        ids = [i for step, _ in speaker.stream(prompt, 12, Sampling()) for i in step]
        assert row["answer"] == speaker.tokenizer.decode([i for i in ids if i not in speaker.stop_ids])
    assert chat["messages"] == turns[:3] and chat["output"] == "assistant 1"
    assert (single["instruction"], single["input"], single["output"]) == ("user 0", "", "")


def test_without_an_output_file_each_row_is_a_line_on_stdout(
    speaker: Speaker, alpaca_rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    """Talk among the results, or text in escapes."""
    given = [{"instruction": "Say é", "input": "北京", "output": "hi"}, {"instruction": "x"}]
    measures = run_file(speaker, alpaca_rows(given) / "rows.json")
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [list(row) for row in found] == [["instruction", "input", "output", "answer", "stopped"]] * 2
    assert [row["instruction"] for row in found] == ["Say é", "x"] and "北京" in captured.out
    assert [row["output"] for row in found] == ["hi", ""]
    assert [row["answer"] for row in found] == [
        a.text for a in answer_all(speaker, [Example("Say é", "北京"), Example("x")], 12, Sampling(), 1)
    ]
    assert measures["rows"] == 2 and "rows 2, stopped" in captured.err and "exact_match 0.0%" in captured.err


def test_rows_may_come_as_lines_and_without_output(
    speaker: Speaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A JSONL file read as JSON, or rows without reference refused."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a"}\n\n{"instruction": "b", "input": null}\n')
    assert run_file(speaker, path) == {"rows": 2, "stopped": pytest.approx(0.5, abs=0.5)}
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_limit_takes_the_first_rows(speaker: Speaker, alpaca_rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """Another row count, or rows drawn after sorting by length."""
    path = alpaca_rows([{"instruction": "long " * 9}, {"instruction": "b"}, {"instruction": "c"}]) / "rows.json"
    run_file(speaker, path, limit=2)
    found = [json.loads(line)["instruction"] for line in capsys.readouterr().out.splitlines()]
    assert found == ["long " * 9, "b"]
    assert run_file(speaker, path, limit=99)["rows"] == 3


@pytest.mark.parametrize("flag", ["limit", "batch_size", "max_new_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_1_are_refused(speaker: Speaker, tmp_path: Path, flag: str, value: int) -> None:
    """A limit of -1 that leaves out the last row in silence, or a batch of 0 that ends in a traceback."""
    with pytest.raises(UserError, match=f"--{flag} is {value}, expected 1 or more"):
        run_file(speaker, tmp_path / "rows.json", **{flag: value})


def test_an_output_file_is_written_whole(
    speaker: Speaker, alpaca_rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows missing from the file, or repeated on stdout."""
    folder = alpaca_rows([{"instruction": "Say é"}, {"instruction": "b"}])
    output = folder / "new" / "answers.jsonl"
    run_file(speaker, folder / "rows.json", output_file=output)
    assert capsys.readouterr().out == ""
    assert [json.loads(line)["instruction"] for line in output.read_text("utf-8").splitlines()] == ["Say é", "b"]
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]


def test_a_failure_leaves_the_old_output_file(
    speaker: Speaker, alpaca_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old answers lost to a run that fails, or half a file in their place."""
    folder = alpaca_rows([{"instruction": "a"}, {"instruction": "b"}])
    output = folder / "answers.jsonl"
    output.write_text("old\n")

    class Unwritable:
        text, stopped, tokens = object(), True, 1

    answers = [Answer("fine", True, 1), Unwritable()]
    monkeypatch.setattr(module, "answer_all", lambda *_: answers)
    with pytest.raises(TypeError, match="not JSON serializable"):
        run_file(speaker, folder / "rows.json", output_file=output)
    assert output.read_text() == "old\n"
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "rows.json"]


def test_an_unusable_output_is_found_before_the_answers(
    speaker: Speaker, alpaca_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of answers that cannot be written."""
    folder = alpaca_rows([{"instruction": "a"}])
    monkeypatch.setattr(module, "answer_all", lambda *_: pytest.fail("answered first"))
    with pytest.raises(UserError, match="is a folder"):
        run_file(speaker, folder / "rows.json", output_file=folder)
    with pytest.raises(UserError, match=r"rows\.json is a file, expected a folder"):
        run_file(speaker, folder / "rows.json", output_file=folder / "rows.json" / "x.jsonl")


def test_a_row_too_long_for_the_model_is_named_before_the_answers(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest row, which is answered last, ending a run of hours."""
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("answered first"))
    rows = [Example("a", row=0), Example("word " * 300, row=1)]
    with pytest.raises(DataError, match=r"row 1: the prompt has \d+ tokens.*--max_new_tokens 5.*256"):
        answer_all(speaker, rows, 5, Sampling(), 2)


def test_no_rows_and_no_data_are_errors(speaker: Speaker, tmp_path: Path) -> None:
    """A measure over nothing."""
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.json", "empty.jsonl", "absent.json"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            run_file(speaker, tmp_path / name)
    with pytest.raises(DataError, match=r"prepare/alpaca\.py"):
        run_file(speaker, tmp_path, data_dir=tmp_path / "data", input_file=None)


def test_memory_and_speed_are_of_this_run(speaker: Speaker, capsys: pytest.CaptureFixture[str]) -> None:
    """A speed per row, or of prompt tokens."""
    module.report(100, 4.0, torch.device("cpu"))
    assert "100 tokens in 4.00 s, 25.0 tokens/s; peak memory" in capsys.readouterr().err
