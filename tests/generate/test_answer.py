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
    answer_all,
    answer_one,
    answer_requests,
    answer_rows,
    continue_text,
    question_ids,
    raw_ids,
)
from lit_llama.generate.engine.engine import Engine
from lit_llama.generate.engine.request import Sampling, Step
from lit_llama.generate.flags import EXAMPLE_PROMPT, Loading
from lit_llama.generate.llm import LLM, load, open_folder
from lit_llama.generate.questions import choose_questions
from lit_llama.text.message import instruct
from lit_llama.text.prompts.encode import prompt_ids

EXAMPLES = [
    instruct("Say hi"),
    instruct("Extract the order as JSON: item, quantity.", "two blue lamps", '{"item": "blue lamp", "quantity": 2}', 1),
    instruct("Zoë's naïve café", "北京 😀", "", 2),
    instruct("a", "", "", 3),
    instruct("Write a response that appropriately completes the request. " * 3, "", "", 4),
]
Rows = Callable[[list[dict[str, str]]], Path]
Put = Callable[[str, bytes | str], Path]
LIMITED = Sampling(max_new_tokens=20)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    """Stops at a third of all ids, so that answers end at different steps."""
    return replace(load(tiny_folder, precision="32-true"), stop_ids=frozenset(range(0, 384, 12)))


def questions(**changes: Any) -> Any:
    """What instruct.py is asked with these flags."""
    given: dict[str, Any] = {"data_dir": None, "input_file": None, "output_file": None, "limit": None}
    given["checkpoint_dir"] = Path("checkpoints/NAME")
    given |= changes
    return choose_questions(given.pop("prompt", EXAMPLE_PROMPT), given.pop("input", ""), **given)


def run_file(llm: LLM, path: Path, *, limit: int | None = None, **changes: Any) -> dict[str, Any]:
    asked = questions(input_file=path, limit=limit, output_file=changes.get("output_file"))
    assert isinstance(asked, list)
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=12)}
    return answer_rows(llm, asked, **(settings | changes))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_are_in_order_and_the_same_in_any_batch(
    llm: LLM, tiny_folder: Path, temperature: float, batch_size: int
) -> None:
    """Answers in the order of their lengths, or random draws that depend on the batch."""
    sampling = Sampling(temperature=temperature, seed=5, max_new_tokens=20)
    together = open_folder(tiny_folder, Loading(precision="32-true", batch_size=batch_size)).load()
    found = answer_all(replace(together, stop_ids=llm.stop_ids), EXAMPLES, sampling)
    for number, (example, answer) in enumerate(zip(EXAMPLES, found, strict=True)):
        prompt = question_ids(llm, example)
        assert answer_requests(llm, [llm.request(prompt, sampling, number=number)]) == [[answer]]
    assert len({answer.text for answer in found}) == len(EXAMPLES)
    assert {answer.stopped for answer in found} == {True, False}


def test_an_answer_holds_neither_prompt_nor_stop_token(llm: LLM, tiny_folder: Path) -> None:
    """A text that repeats the prompt, spells the stop token, or lost its last word."""
    from tokenizers import Tokenizer

    prompt = question_ids(llm, EXAMPLES[0])
    steps = list(llm.stream(prompt, Sampling(max_new_tokens=20)))
    ids = [token for step, _ in steps for token in step]
    answer = answer_all(llm, EXAMPLES[:1], Sampling(max_new_tokens=20))[0]
    assert answer.tokens == len(ids) and answer.stopped == (ids[-1] in llm.stop_ids)
    backend = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    assert answer.text == backend.decode([i for i in ids if i not in llm.stop_ids])


@pytest.mark.parametrize("seed", range(6))
def test_streamed_text_equals_batch_text(llm: LLM, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A character of several bytes torn between tokens: a model this random says little else."""
    sampling = Sampling(temperature=3.0, seed=seed, max_new_tokens=150)
    answer = answer_all(llm, [EXAMPLES[2]], sampling)[0]
    answer_one(llm, EXAMPLES[2], sampling)
    streamed = capsys.readouterr()
    assert streamed.out == answer.text + "\n"
    assert f"{answer.tokens} tokens in" in streamed.err and "tokens/s" in streamed.err


def test_streamed_characters_arrive_whole(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces with a replacement character where the text has an emoji."""
    text = "Zoë: 北京 😀!"
    ids = llm.tokenizer.encode(text)
    monkeypatch.setattr(Engine, "stream", lambda *_: iter([Step((i,)) for i in ids]))
    pieces = [piece for _, piece in replace(llm, stop_ids=frozenset({2})).stream([1], Sampling())]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5, "the text was to come in pieces"


def test_raw_text_is_continued_as_it_is(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """A template around raw text, or the prompt echoed."""
    ids = [i for step, _ in llm.stream(llm.tokenizer.encode("def add"), LIMITED) for i in step]
    continue_text(llm, "def add", LIMITED)
    text = llm.tokenizer.decode([i for i in ids if i not in llm.stop_ids])
    assert capsys.readouterr().out == text + "\n"
    with pytest.raises(UserError, match="prompt is empty"):
        continue_text(llm, "", Sampling())


def test_raw_text_begins_with_the_token_the_model_wants(tiny_folder: Path, llm: LLM) -> None:
    """A LLaMA asked without its beginning of text."""
    seen: list[list[int]] = []

    class Spy(LLM):
        def request(self, prompt: Any, *rest: Any, **more: Any) -> Any:
            seen.append(list(prompt))
            return super().request(prompt, *rest, **more)

    given: dict[str, Any] = vars(llm) | {"tokenizer": load(tiny_folder).tokenizer, "style": None}
    spy = Spy(**given)
    continue_text(spy, "def", Sampling(max_new_tokens=1))
    spy.tokenizer.bos = "<|im_start|>"
    continue_text(spy, "def", Sampling(max_new_tokens=1))
    assert seen[1] == [1, *seen[0]]


def test_a_blank_instruction_is_refused() -> None:
    """An answer to an unset shell variable."""
    with pytest.raises(UserError, match="--prompt is empty"):
        questions(prompt=" \n")


def test_a_chat_is_answered_where_it_stands(llm: LLM, tmp_path: Path) -> None:
    """Catches a last question that is asked without the turns before it, or with its answer."""
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    path, output = tmp_path / "chats.jsonl", tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1]}) + "\n")
    run_file(llm, path, output_file=output)
    [chat, single] = [json.loads(line) for line in output.read_text().splitlines()]
    style = llm.require_style()
    prompts = [prompt_ids(llm.tokenizer, style, asked) for asked in (turns[:3], turns[:1])]
    for row, prompt in zip((chat, single), prompts, strict=True):
        ids = [i for step, _ in llm.stream(prompt, Sampling(max_new_tokens=12)) for i in step]
        assert row["answer"] == llm.tokenizer.decode([i for i in ids if i not in llm.stop_ids])
    assert chat["messages"] == turns[:3] and chat["output"] == "assistant 1"
    assert (single["instruction"], single["input"], single["output"]) == ("user 0", "", "")


def test_without_an_output_file_each_row_is_a_line_on_stdout(
    llm: LLM, alpaca_rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    """Talk among the results, or text in escapes."""
    given = [{"instruction": "Say é", "input": "北京", "output": "hi"}, {"instruction": "x"}]
    measures = run_file(llm, alpaca_rows(given) / "rows.json")
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [list(row) for row in found] == [
        ["instruction", "input", "output", "answer", "stopped", "finish_reason"]
    ] * 2
    assert [row["instruction"] for row in found] == ["Say é", "x"] and "北京" in captured.out
    assert [row["output"] for row in found] == ["hi", ""]
    assert [row["answer"] for row in found] == [
        a.text for a in answer_all(llm, [instruct("Say é", "北京"), instruct("x")], Sampling(max_new_tokens=12))
    ]
    assert measures["rows"] == 2 and "rows 2, stopped" in captured.err and "exact_match 0.0%" in captured.err


def test_rows_may_come_as_lines_and_without_output(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A JSONL file read as JSON, or rows without reference refused."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a"}\n\n{"instruction": "b", "input": null}\n')
    assert run_file(llm, path) == {"rows": 2, "stopped": pytest.approx(0.5, abs=0.5)}
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_limit_takes_the_first_rows(llm: LLM, alpaca_rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """Another row count, or rows drawn after sorting by length."""
    path = alpaca_rows([{"instruction": "long " * 9}, {"instruction": "b"}, {"instruction": "c"}]) / "rows.json"
    run_file(llm, path, limit=2)
    found = [json.loads(line)["instruction"] for line in capsys.readouterr().out.splitlines()]
    assert found == ["long " * 9, "b"]
    assert run_file(llm, path, limit=99)["rows"] == 3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"limit": 0}, "--limit is 0, expected 1 or more"),
        ({"limit": -1}, "--limit is -1, expected 1 or more"),
        ({"prompt": "hi"}, "--prompt and --input_file are both given"),
        ({"input": "x"}, "--input and --input_file are both given"),
        ({"data_dir": Path("data")}, "--data_dir and --input_file are both given"),
        ({"input_file": None, "limit": 3}, "--limit is of answers to rows"),
        ({"input_file": None, "output_file": Path("x.jsonl")}, "--output_file is of answers to rows"),
    ],
)
def test_flags_that_would_be_dropped_are_refused(put: Put, flags: dict[str, Any], named: str) -> None:
    """A question that nobody answers because there is a file, too; a limit of -1 that leaves out the last row in
    silence, or a batch of 0 that ends in a traceback."""
    path = put("rows.jsonl", '{"instruction": "a"}')
    assert len(questions(input_file=path)) == 1
    with pytest.raises(UserError, match=named):
        questions(**({"input_file": path} | flags))


def test_several_answers_to_a_row_are_lines_of_their_own(
    llm: LLM, alpaca_rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers that are all alike, that go to another row, or of which the first is not the one that is made alone."""
    path = alpaca_rows([{"instruction": "Say é", "output": "a"}, {"instruction": "x y " * 9}]) / "rows.json"
    drawn = Sampling(temperature=1, max_new_tokens=12)
    measures = run_file(llm, path, sampling=replace(drawn, n=3))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["instruction"][:3], row["sample"]) for row in rows] == [
        (text, sample) for text in ("Say", "x y") for sample in range(3)
    ]
    assert len({row["answer"] for row in rows}) == 6 and measures["rows"] == 2 and measures["answers"] == 6
    run_file(llm, path, sampling=drawn)
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in alone] == [rows[0]["answer"], rows[3]["answer"]]
    assert all("sample" not in row for row in alone)


def test_several_answers_to_a_question_are_printed_one_after_another(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    """One answer only, or talk between them on stdout."""
    drawn = Sampling(temperature=1, max_new_tokens=12, n=3)
    answer_one(llm, EXAMPLES[0], drawn)
    captured = capsys.readouterr()
    made = answer_all(llm, EXAMPLES[:1], drawn)
    assert captured.out == "".join(f"{answer.text}\n" for answer in made) and len({a.text for a in made}) == 3
    assert [f"answer {n} of 3:" in captured.err for n in (1, 2, 3)] == [True] * 3


def test_a_system_message_heads_prompts_that_have_none(llm: LLM, put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    """A system message that is left out, put before another, or that nobody finds again in the answers' file."""
    own = [{"role": "system", "content": "Be rude"}, {"role": "user", "content": "hi"}]
    rows = [
        {"instruction": "hi"},
        {"messages": own},
        {"messages": [own[1], {"role": "assistant", "content": "a"}, own[1]]},
    ]
    asked = questions(input_file=put("rows.jsonl", "\n".join(map(json.dumps, rows))))
    texts = [llm.tokenizer.decode(question_ids(llm, row, "Be brief")) for row in asked]
    assert [text.count("Be brief") for text in texts] == [1, 0, 1] and "Be rude" in texts[1]
    brief = {"role": "system", "content": "Be brief"}
    turns = ([brief, own[1]], own, [brief, *rows[2]["messages"]])
    for row, messages in zip(asked, turns, strict=True):
        wanted = prompt_ids(llm.tokenizer, llm.require_style(), messages)  # type: ignore[arg-type]
        assert question_ids(llm, row, "Be brief") == wanted
    answer_rows(llm, asked, LIMITED, system="Be brief")
    captured = capsys.readouterr()
    told = [json.loads(line) for line in captured.out.splitlines()]
    assert told[0]["system"] == "Be brief" and told[1]["messages"] == own and told[2]["messages"][0] == brief
    assert "1 of 3 rows have a system message of their own" in captured.err


def stops_of(text: str) -> list[str]:
    """Parts of an answer that begin and end amid its tokens."""
    return [text[start : start + length] for start in range(2, len(text) - 4, 3) for length in (1, 2, 4)]


def test_an_answer_ends_before_a_stop_text(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """A stop text that is shown in part or whole, that is missed where it is spread over tokens, or that ends the other
    answers of a batch."""
    silent = replace(llm, stop_ids=frozenset({383}))
    limited = Sampling(temperature=1, seed=4, max_new_tokens=30)
    whole = answer_all(silent, EXAMPLES[:2], limited)
    ends = {answer.finish_reason for answer in whole}
    assert ends == {"length"}
    for stop in stops_of(whole[0].text)[:12]:
        own = replace(limited, stop=["never there", stop])
        made = answer_all(silent, EXAMPLES[:2], own)
        for answer, free in zip(made, whole, strict=True):
            assert answer.text == free.text.partition(stop)[0]
            assert answer.finish_reason == ("stop" if stop in free.text else "length")
            assert answer.tokens <= free.tokens
    answer_one(silent, EXAMPLES[0], own)
    captured = capsys.readouterr()
    assert captured.out == made[0].text + "\n" and "cut off" not in captured.err
    answer_one(silent, EXAMPLES[0], limited)
    assert "; cut off at --max_new_tokens 30" in capsys.readouterr().err


def test_a_stop_text_may_spell_a_control_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that never comes, as control tokens are none."""
    plain = replace(llm, stop_ids=frozenset({383}))
    assert plain.text(Sampling(stop=["<|im_start|>"])).stop_ids == {383, plain.tokenizer.control["<|im_start|>"]}


def test_control_tokens_of_a_raw_prompt_are_made_on_request(
    llm: LLM, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against transformers, which always makes them: catches one that is encoded as words on request, or made of a
    user's words unasked, and a beginning that is doubled."""
    from transformers import AutoTokenizer

    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    theirs = AutoTokenizer.from_pretrained(tiny_folder)
    assert raw_ids(llm, text, True) == theirs(text)["input_ids"]
    assert capsys.readouterr().err == ""
    words = raw_ids(llm, text, False)
    assert not {0, 1, 2} & {*words} and llm.tokenizer.decode(words) == text
    assert (
        "<|im_start|>, <|im_end|> in the prompt: words as any others, without --control_tokens"
        in capsys.readouterr().err
    )
    beginning = replace(llm, tokenizer=load(tiny_folder).tokenizer)
    beginning.tokenizer.bos = "<|im_start|>"
    assert raw_ids(beginning, text, True) == theirs(text)["input_ids"]
    assert raw_ids(beginning, text, False) == [1, *words]


def test_a_row_too_long_for_the_model_is_named_before_the_answers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest row, which is answered last, ending a run of hours."""
    monkeypatch.setattr(Engine, "step", lambda _: pytest.fail("answered first"))
    rows = [instruct("a", row=0), instruct("word " * 300, row=1)]
    with pytest.raises(DataError, match=r"row 1: the prompt has \d+ tokens.*--max_new_tokens 5.*256"):
        answer_all(llm, rows, Sampling(max_new_tokens=5))


def test_no_rows_and_no_data_are_errors(tmp_path: Path) -> None:
    """A measure over nothing."""
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.json", "empty.jsonl", "absent.json"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            questions(input_file=tmp_path / name)
    with pytest.raises(DataError, match=r"prepare/alpaca\.py"):
        questions(data_dir=tmp_path / "data")


def test_memory_and_speed_are_of_this_run(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """A speed per row, or of prompt tokens."""
    module.report(100, 4.0, torch.device("cpu"))
    assert "100 tokens in 4.00 s, 25.0 tokens/s; peak memory" in capsys.readouterr().err
