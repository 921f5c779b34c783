"""Rows to be answered: out of every format, with or without answers; chats are asked with all their turns."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_llama.errors import DataError
from lit_llama.text.message import Conversation, instruct
from lit_llama.text.pipeline.prepare import raw_row
from lit_llama.text.read.formats.sources import read_questions, read_text
from lit_llama.text.read.reading import read_conversations

Put = Callable[[str, bytes | str], Path]
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parts(row: Conversation) -> tuple[str, str, str]:
    """Instruction, input and response."""
    assert row.instruction is not None
    return row.instruction["content"], row.instruction.get("input", ""), row.response


WANTED = [instruct("a"), instruct("b", "c", "d", 1)]


def turns(*words: str, start: str = "user") -> list[dict[str, str]]:
    """Messages of user and assistant in turn, behind a system message if `start` is system."""
    roles = ["system"] if start == "system" else []
    roles += ["user", "assistant"] * len(words)
    return [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]


def refused(path: Path, read: Callable[[Path], Any] = read_questions) -> str:
    """The message of the error, which always names the file."""
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"instruction": "a"}, {"instruction": "b", "input": "c", "output": "d"}]'),
        ("a.jsonl", '{"instruction": "a"}\r\n\n  \n{"instruction": "b", "input": "c", "output": "d"}'),
        ("a.jsonl", '{"instruction": "a", "input": null}\n{"instruction": "b", "context": "c", "response": "d"}'),
        ("a.csv", "instruction,input,output\na,,\nb,c,d\n"),
        ("a.jsonl", '{"prompt": "a"}\n{"instruction": "b", "input": "c", "output": "d"}'),
    ],
)
def test_prompts_need_no_answer_and_come_in_any_format(name: str, content: str, put: Put) -> None:
    """Catches asking for the answer that is to be generated, and a blank line counted as a row."""
    assert read_questions(put(name, content)) == WANTED


def test_a_chat_is_asked_with_all_turns_before_its_last_answer(put: Put) -> None:
    """Catches a question without what it refers to, and the answer wanted within the prompt."""
    chats = [
        turns("a", "b", "c", "d"),
        turns("s", "a", "b", start="system"),
        turns("a", "b", "c"),
        turns("a", "b"),
        turns("a"),
    ]
    path = put("chats.jsonl", "\n".join(json.dumps({"messages": chat}) for chat in chats))
    assert read_questions(path) == [
        *(Conversation(tuple(chat), row, f"row {row}") for row, chat in enumerate(chats[:3])),
        instruct("a", "", "b", 3),
        instruct("a", "", "", 4),
    ]


def test_held_out_rows_are_asked_as_they_were_trained(put: Put) -> None:
    """Catches test.jsonl in a form that generate/instruct.py does not read, or reads as another question."""
    texts = ["a\u2028b", "a\u0085b\x0bc\x0cd\x1ee", 'quote " and \\ and \n', "北京 😀 \ufffd", "\0"]
    rows = [[{"role": "user", "content": t, "input": t}, {"role": "assistant", "content": t + "!"}] for t in texts]
    rows += [turns(*texts[:4]), turns(*texts[:3], start="system")]
    path = put("test.jsonl", "".join(json.dumps(raw_row(row), ensure_ascii=False) + "\n" for row in rows))
    found = read_questions(path)
    assert [list(entry.messages) for entry in found] == rows
    assert [entry.instruction is not None for entry in found] == [True] * 5 + [False] * 2


def test_held_out_rows_keep_all_that_was_trained(put: Put) -> None:
    """Catches an input beside a system message, thoughts, calls, tools or a mark of no loss lost on the way back."""
    call = {"type": "function", "function": {"name": "a", "arguments": {"b": 1}}}
    asked = {"role": "user", "content": "Sum up.", "input": "A tale."}
    answer = {"role": "assistant", "content": "Short."}
    wrong = {"role": "assistant", "content": "Long.", "reasoning_content": "Let me see.", "train": False}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    told = {"role": "tool", "content": "4", "name": "a", "tool_call_id": "x"}
    rows = [
        ([{"role": "system", "content": "Be brief."}, asked, answer], ()),
        ([asked, wrong, asked, called, told, answer], (call,)),
        ([asked, answer], (call,)),
        ([asked, {**answer, "reasoning_content": "Let me see."}], ()),
    ]
    path = put("test.jsonl", "".join(json.dumps(raw_row(row, tools)) + "\n" for row, tools in rows))
    for (row, tools), found in zip(rows, read_questions(path), strict=True):
        assert (list(found.prompt), found.response, found.tools) == (row[:-1], row[-1]["content"], tools)
    found = [entry for entry in read_conversations([str(path)]) if isinstance(entry, Conversation)]
    assert [(list(entry.messages), entry.tools) for entry in found] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "a"}\n\n{"instruction": ', "line 3 is not JSON"),
        ('{"instruction": "a"}\n{"instruction": " "}', "line 2: message 0: empty instruction"),
        ('{"text": "once"}', "line 1: plain text asks nothing"),
        ('{"messages": []}', "line 1: "),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "found role user"),
        ('{"instruction": 3}', "no schema fits"),
        ('{"instruction": "a", "input": 3}', "field input is a number, expected text"),
        ('{"questoin": "a"}', "no schema fits the fields questoin"),
        ("[3]", "row 0: found a number, expected an object"),
        (b"\xef\xbb\xbf\n", "holds no rows"),
        (b"", "empty"),
        ('{"instruction": "caf\u00e9"}'.encode("cp1252"), "not UTF-8"),
    ],
)
def test_a_row_that_asks_nothing_is_an_error_with_its_place(content: bytes | str, message: str, put: Put) -> None:
    """Catches a traceback, answers to nothing, and an error that nobody can find in 50,000 rows."""
    assert message in refused(put("a.jsonl", content))


def test_the_shared_alpaca_file_is_read_whole(alpaca_file: Path, tmp_path: Path) -> None:
    """Catches a changed character or a lost row in real data: compared with plain json, and with csv of the same."""
    raw = json.loads(alpaca_file.read_bytes())
    wanted = [(row["instruction"], row["input"], row["output"]) for row in raw]
    assert [parts(row) for row in read_questions(alpaca_file)] == wanted
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("instruction", "input", "output"), *wanted])
    assert [parts(row) for row in read_questions(tmp_path / "a.csv")] == wanted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
fields = ("instruction", "input", "output", "messages", "prompt", "completion", "conversations")
rows = st.fixed_dictionaries({}, optional={name: json_values | st.text() for name in fields})


@FUZZ
@example(b"[\xff")
@given(st.binary(max_size=60) | st.text('[]{}",:\\u0d123456789e+-. \n\ufeff', max_size=60).map(str.encode))
def test_arbitrary_bytes_raise_nothing_but_a_data_error(put: Put, content: bytes) -> None:
    """Catches any traceback: of decoding, of the JSON module, of our own code."""
    for name in ("a.json", "a.jsonl"):
        refused(put(name, content))


@FUZZ
@given(st.lists(rows | json_values, max_size=4))
def test_arbitrary_json_is_read_whole_or_raises_a_data_error(put: Put, value: Any) -> None:
    """Catches a traceback for an odd type in an odd place, and a row that is left out."""
    path = put("a.json", json.dumps(value))
    try:
        found = read_questions(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert [entry.row for entry in found] == list(range(len(value)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("caf\u00e9".encode("cp1252"), "not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_a_text_file_that_is_none_is_refused(content: bytes, message: str, put: Put, tmp_path: Path) -> None:
    """Catches a chat template that is an error page, and a bare UnicodeDecodeError."""
    assert message in refused(put("a.txt", content), read_text)
    assert "does not exist (working folder" in refused(tmp_path / "no.txt", read_text)
    assert "is a folder" in refused(tmp_path, read_text)
    assert read_text(put("b.txt", "\ufeffZoë")) == "Zoë"
