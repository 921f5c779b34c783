"""Conversations with functions, from rows to labels: calls and answers are trained, results of functions never."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from chat_templates import QWEN25_TOOLS
from conftest import run_here

from lit_llama.text.config import PrepareConfig
from lit_llama.text.dataset.folder import Split
from lit_llama.text.dataset.pairs import PairSplit
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.text.pipeline.records import prepare_records

CLOCK = {
    "name": "clock",
    "description": "Tells the time <of> a city & country.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
LOTTERY = {"name": "draw", "description": "Draws.", "parameters": {"type": "object", "properties": {}}}
QUESTION, AGAIN = "What time is it in Zürich?", "And in Bern, and draw a number?"
FIRST = {"name": "clock", "arguments": {"city": "Zürich", "exact": True}}
BOTH = [{"name": "clock", "arguments": {"city": "Bern"}}, {"name": "draw", "arguments": {}}]
TIME, TWO = '{"time": "12:00", "note": "<|im_end|>"}', '[{"time": "12:01"}, {"number": 7}]'
ANSWER, LAST = "It is noon.", "12:01, and 7."
ROW = {
    "conversations": [
        {"from": "human", "value": QUESTION},
        {"from": "function_call", "value": json.dumps(FIRST)},
        {"from": "observation", "value": TIME},
        {"from": "gpt", "value": ANSWER},
        {"from": "human", "value": AGAIN},
        {"from": "function_call", "value": json.dumps(BOTH)},
        {"from": "observation", "value": TWO},
        {"from": "gpt", "value": LAST},
    ],
    "system": "Be exact.",
    "tools": json.dumps([CLOCK, LOTTERY]),
}
PLAIN = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}], "tools": "[]"}


@pytest.fixture
def tool_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A tokenizer beside the template that Qwen2.5 is published with."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder / name)
    (folder / "chat_template.jinja").write_text(QWEN25_TOOLS)
    return folder


def called(*calls: dict[str, Any]) -> str:
    """What the template writes of calls, spelled out."""
    texts = (
        f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {json.dumps(call["arguments"], ensure_ascii=False)}}}'
        for call in calls
    )
    return "\n".join(f"{text}\n</tool_call>" for text in texts)


def functions(*tools: dict[str, Any]) -> str:
    """The system message of the template, spelled out."""
    listed = "".join("\n" + json.dumps({"type": "function", "function": tool}, ensure_ascii=False) for tool in tools)
    return (
        "Be exact.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided "
        f"with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\nFor each function "
        "call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def expected(folder: Path, turns: list[tuple[str, str, bool]]) -> tuple[list[int], list[int]]:
    """Ids and labels of turns, by the tokenizers library: whoever speaks, what is said, and whether it is trained."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # words never become control tokens
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    ids: list[int] = []
    labels: list[int] = []
    for number, (role, text, trained) in enumerate(turns):
        before = ("\n" if number else "", f"{role}\n" if trained else f"{role}\n{text}")
        masked = [*tokenizer.encode(before[0]).ids, start, *tokenizer.encode(before[1]).ids]
        said = tokenizer.encode(text).ids if trained else []
        ids += [*masked, *said, end]
        labels += [IGNORE_INDEX] * len(masked) + said + [end if trained else IGNORE_INDEX]
    return ids, labels


SPOKEN = [
    ("system", functions(CLOCK, LOTTERY), False),
    ("user", QUESTION, False),
    ("assistant", called(FIRST), True),
    ("user", f"<tool_response>\n{TIME}\n</tool_response>", False),
    ("assistant", ANSWER, True),
    ("user", AGAIN, False),
    ("assistant", called(*BOTH), True),
    ("user", f"<tool_response>\n{TWO}\n</tool_response>", False),
    ("assistant", LAST, True),
]


def prepared(folder: Path, rows: list[Any], tmp_path: Path, **settings: Any) -> Path:
    """The data folder of rows that are all for training."""
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows))
    config = PrepareConfig(
        source=str(source), destination_path=tmp_path / "data", tokenizer_path=folder, test_split_size=0, **settings
    )
    prepare_records(config)
    return tmp_path / "data"


def test_calls_and_answers_are_trained_and_results_never(tool_folder: Path, tmp_path: Path) -> None:
    """Catches a token of a result in the loss, a call without its end, a turn that is asked for otherwise than it is
    trained, and a result that ends its own turn."""
    split = Split(prepared(tool_folder, [ROW, PLAIN], tmp_path), "train")
    ids, labels = split[0]
    wanted = expected(tool_folder, SPOKEN)
    assert ids.tolist() == wanted[0] and labels.tolist() == wanted[1]
    plain = [
        ("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", False),
        *(("user", "Hi.", False), ("assistant", "Hello.", True)),
    ]
    ids, labels = split[1]
    wanted = expected(tool_folder, plain)
    assert ids.tolist() == wanted[0] and labels.tolist() == wanted[1]


def test_a_call_is_preferred_to_another_answer(tool_folder: Path, tmp_path: Path) -> None:
    """Catches a call that is no answer of a preference, and functions that its prompt does not name."""
    turns = ROW["conversations"][:4]
    row = {"conversations": turns[:1], "tools": ROW["tools"], "system": "Be exact."}
    row |= {"chosen": turns[1], "rejected": turns[3]}
    split = PairSplit(prepared(tool_folder, [row], tmp_path, data_kind="preference"), "train")
    found = {name: (ids.tolist(), labels.tolist()) for name, ids, labels in split.answers(0)}
    before = SPOKEN[:2]
    assert found["chosen"] == expected(tool_folder, [*before, ("assistant", called(FIRST), True)])
    assert found["rejected"] == expected(tool_folder, [*before, ("assistant", ANSWER, True)])


@pytest.mark.parametrize("style", ["chatml", "alpaca", "vicuna"])
def test_styles_without_words_for_functions_refuse_them(style: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches functions and calls that vanish from prompts, and a refusal without a way out."""
    (tmp_path / "rows.json").write_text(json.dumps([ROW]))
    command = ["prepare/records.py", "--source", tmp_path / "rows.json", "--tokenizer_path", tiny_folder]
    run = run_here(*command, "--destination_path", tmp_path / "data", "--prompt_style", style)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert f"the prompt style {style} cannot say tool" in run.stderr and "--prompt_style chat_template" in run.stderr
