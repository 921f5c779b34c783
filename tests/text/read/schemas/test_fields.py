"""Fields of rows and messages: none vanishes, and the way out that an error names is one."""

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from lit_llama.errors import DataError
from lit_llama.text.message import Conversation
from lit_llama.text.read.raw import RowError
from lit_llama.text.read.reading import Reader, read_conversations
from lit_llama.text.read.schemas.fields import FieldLog
from lit_llama.text.read.schemas.recognition import FIELDS, JUDGED_FIELDS, SCHEMAS, recognise

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
BASES: dict[str, dict[str, Any]] = {
    "OpenAI messages": {"messages": TURNS},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    "OASST": {
        "prompt": {"role": "prompter", "text": "Why?", "replies": [{"role": "assistant", "text": "Because."}]},
    },
    "prompt and completion": {"prompt": "Why?", "completion": "Because."},
    "Alpaca": {"instruction": "Why?", "output": "Because."},
    "Dolly": {"instruction": "Why?", "response": "Because."},
    "Glaive": {"chat": "USER: Why?\n\n\nASSISTANT: Because. <|endoftext|>"},
    "plain text": {"text": "Because."},
}
SAID = "something that stands nowhere else"
TOOL = [{"name": SAID}]
CONTENT = {
    **dict.fromkeys(("input", "context", "system", "system_prompt", "system_message", "systemInstruction"), SAID),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thoughts"), SAID),
    **dict.fromkeys(("image", "images", "videos", "audio", "documents", "chosen", "rejected", "Images"), SAID),
    **{"loss_mask": [0, 1], "train": False, "weight": 0.5},
    **dict.fromkeys(("tools", "functions"), TOOL),
    "history": [[SAID, "An answer."]],
}


def read(row: Mapping[str, Any], **options: Any) -> tuple[str, FieldLog]:
    """Everything that a row's conversation says, as JSON, and what became of the other fields."""
    log = FieldLog(**options)
    wanted = log.wanted(row)
    [turns] = recognise(wanted).turns(wanted, log)
    return json.dumps([turns.messages, turns.tools]), log


def refused(row: Mapping[str, Any]) -> str:
    """Why a row cannot be read."""
    with pytest.raises(RowError) as caught:
        read(row)
    return str(caught.value)


def from_file(put: Any, row: Mapping[str, Any], **options: Any) -> tuple[Reader, list[Any]]:
    """A file with one row, read."""
    reader = read_conversations([str(put("rows.jsonl", json.dumps(row)))], **options)
    return reader, list(reader)


@pytest.mark.parametrize("name", BASES)
def test_what_is_for_the_model_is_used_or_an_error_with_a_way_out(name: str) -> None:
    """Catches a system prompt, a context, tools, thoughts or pictures that a kind of row drops in silence."""
    assert {*BASES} == {schema.name for schema in SCHEMAS}
    for field, value in CONTENT.items():
        row = BASES[name] | {field: value}
        assert recognise(row).name == name
        try:
            said, log = read(row)
        except RowError as error:
            assert f"field {field} has no place" in str(error) and f"--ignore_fields {field}" in str(error)
            said, log = read(row, ignored=[field])
            assert SAID not in said and log.left_out == {field: 1} and not log.unused
        else:
            assert SAID in said and not log.unused and not log.left_out
    used = [field for field, value in CONTENT.items() if _reads(BASES[name] | {field: value})]
    chats = ["system", "system_prompt", "system_message", "systemInstruction", "tools", "functions"]
    pairs = ["input", "context", "reasoning_content", "reasoning", "thinking", "thoughts", "history"]
    places = {"OASST": [], "plain text": [], "Glaive": ["system"], "OpenAI messages": chats, "ShareGPT": chats}.get(
        name, chats + pairs
    )
    assert sorted(used) == sorted(places)


def _reads(row: Mapping[str, Any]) -> bool:
    try:
        return bool(read(row))
    except RowError:
        return False


@pytest.mark.parametrize("name", BASES)
def test_fields_of_unknown_names_are_counted_whatever_they_hold(name: str) -> None:
    """Catches a label, a list of choices or a title that nothing uses and nobody hears of."""
    values = [SAID, 0, 1.5, False, True, ["a"], {"a": 1}]
    for field, value in itertools.product(("choices", "title", "Label 2", "北京"), values):
        assert read(BASES[name] | {field: value})[1].unused == {field: 1}
    for nothing in (None, "", [], {}, float("nan")):
        assert not read(BASES[name] | {"choices": nothing})[1].unused
    harmless = {
        "train": True,
        "weight": 1,
        "id": "x",
        "source": SAID,
        "prompt_id": "1",
        "url": "u",
        "": 7,
        "Unnamed: 0": 7,
        "timestamp": 3,
    }
    assert not read(BASES[name] | harmless)[1].unused


def test_a_label_beside_a_text_is_counted_and_so_is_its_category() -> None:
    """Catches a file for classification that trains a language model on its texts alone, without a word."""
    row = {"text": "I like it.", "label": 1, "category": "praise"}
    assert read(row)[1].unused == {"label": 1, "category": 1}
    assert not read({"instruction": "a", "output": "b", "category": "closed_qa"})[1].unused


def test_copies_of_what_the_messages_say_are_no_loss() -> None:
    """Catches a warning for Alpaca's rendered text and UltraChat's prompt, and another text that passes for one."""
    prompt = "Below is an instruction.\n\n### Instruction:\nSum up.\n\n### Input:\nA tale.\n\n### Response:\nShort."
    alpaca = {"instruction": "Sum up.", "input": "A tale.", "output": "Short."}
    assert not read(alpaca | {"text": prompt})[1].unused
    assert read(alpaca | {"text": prompt.replace("A tale.", "")})[1].unused == {"text": 1}
    assert not read({"prompt": " Why?\n", "messages": TURNS})[1].unused
    assert read({"prompt": "How?", "messages": TURNS})[1].unused == {"prompt": 1}
    assert read({"text": "a cat", "label": "cat"})[1].unused == {"label": 1}


def test_what_nothing_uses_in_a_message_is_counted_or_an_error() -> None:
    """Catches a field of a message that vanishes, and one count for every message of a row."""
    extra = {"emotion": SAID, "id": "m1", "timestamp": 5, "refusal": None}
    row = {"messages": [turn | extra for turn in TURNS]}
    assert read(row)[1].unused == {"messages[].emotion": 1}
    named = {"messages": [TURNS[0] | {"name": "Ann"}, TURNS[1]]}
    said, log = read(named)
    assert "Ann" in said and log.unused == {"messages[].name": 1}
    for field in ("context", "images", "system_prompt", "documents"):
        row = {"messages": [TURNS[0] | {field: SAID}, TURNS[1]]}
        assert f"messages[0]: a message has {field}, for which there is no place" in refused(row)
        said, log = read(row, ignored=[field])
        assert SAID not in said and log.left_out == {field: 1}


def test_fields_for_one_place_are_not_chosen_between() -> None:
    """Catches the context that wins over the input, or the other way round."""
    row = {"instruction": "Why?", "output": "b"}
    assert "the fields input, context are for one place, and differ" in refused(row | {"input": "c", "context": "d"})
    assert read(row | {"input": "c", "context": "c"})[0] == read(row | {"input": "c", "context": ""})[0]
    assert "system, system_prompt are for one place" in refused(row | {"system": "s", "system_prompt": "t"})


def advised(message: str) -> dict[str, Any]:
    """The options that an error advises."""
    options: dict[str, Any] = {"as_text": "--as_text" in message}
    if fields := re.search(r"--fields (.*?)(?= --|$)", message):
        options["fields"] = dict(pair.split("=", 1) for pair in fields[1].split(","))
    if ignored := re.search(r"--ignore_fields (\S+)", message):
        options["ignore_fields"] = [ignored[1]]
    return options


ADVISED: list[dict[str, Any]] = [
    {"question": "q1", "context": "c1", "answer": "a1"},
    {"id": "x.0", "system_prompt": "s1", "question": "q1", "response": "a1"},
    {"question": "q1", "choices": ["c1", "c2"], "answer": 0},
    {"query": "q1", "passage": "c1", "system_message": "s1", "reply": "a1"},
    {"Question": "q1", "Complex_CoT": "t1", "Response": "a1"},
    {"prompt": "q1", "thinking": "t1", "response": "a1"},
    {"problem": "q1", "solution": "a1", "functions": [{"name": "f1"}]},
    {"items": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]},
    {"conversation": TURNS},
    {"id": 3, "dialog": json.dumps(TURNS)},
]


@pytest.mark.parametrize("row", ADVISED, ids=lambda row: "+".join(row))
def test_following_the_advice_uses_every_field_that_it_can_place(row: dict[str, Any], put: Any) -> None:
    """Catches advice that makes the row fit and loses its context on the way."""
    reader, [found] = from_file(put, row, **advised(refused(row)))
    assert isinstance(found, Conversation)
    said = json.dumps([found.messages, found.tools], ensure_ascii=False)
    for value in (value for name, value in row.items() if name != "id"):
        for text in re.findall(r"[a-z]\d|Why|Because", json.dumps(value)):
            assert text in said
    assert not reader.log.unused


def test_numbers_lists_and_objects_become_text_on_request_only(put: Any) -> None:
    """Catches a number taken for a text unasked, and JSON that is no JSON or has lost an order or a letter."""
    answers: list[Any] = [0, 1.5, True, {"b": "é", "a": [1, None]}, ["x"], 10**20]
    for answer in answers:
        row = {"instruction": "Why?", "output": answer}
        assert "expected text; --as_text makes it JSON text" in refused(row)
        reader, [found] = from_file(put, row, as_text=True)
        text = found.messages[-1]["content"]
        assert json.loads(text) == answer and "\\u" not in text and reader.log.written == {"output": 1}
        if isinstance(answer, dict):
            assert text == '{"b": "é", "a": [1, null]}'
    for nothing in (None, float("nan")):
        assert "field output is null, expected text" in refused({"instruction": "a", "output": nothing})
        with pytest.raises(DataError, match="field output is null"):
            from_file(put, {"instruction": "a", "output": nothing}, as_text=True)
    chat = {"messages": [TURNS[0], {"role": "assistant", "content": {"item": 1}}]}
    reader, [found] = from_file(put, chat, as_text=True)
    assert found.messages[-1]["content"] == '{"item": 1}' and reader.log.written == {"messages[].content": 1}


def test_what_pandas_writes_for_nothing_is_nothing(put: Any) -> None:
    """Catches NaN as an error that drops every row, as a text, or as a number."""
    row = {"instruction": "a", "input": float("nan"), "output": "b", "system": float("nan"), "label": float("nan")}
    reader, [found] = from_file(put, row)
    assert found.messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert not reader.log.unused
    with pytest.raises(DataError, match="-Infinity is not JSON"):
        from_file(put, row | {"input": float("-inf")})


def test_an_input_without_an_instruction_is_the_prompt() -> None:
    """Catches rows dropped for an instruction that stands in the other field."""
    for empty in ("", " \n", None):
        said, log = read({"instruction": empty, "input": "What follows 1?", "output": "2"})
        assert json.loads(said)[0][0] == {"role": "user", "content": "What follows 1?"} and not log.unused


def test_a_field_that_another_one_takes_the_name_of_is_counted(put: Any) -> None:
    """Catches --fields output=answer in a file that has an output already."""
    reader, _ = from_file(put, {"instruction": "a", "output": "b", "answer": "c"}, fields={"output": "answer"})
    assert reader.log.unused == {"output (not the renamed one)": 1}


def test_counts_are_rows_and_each_loop_counts_anew(put: Any) -> None:
    """Catches counts of messages, and counts that add up over two loops."""
    rows = [{"messages": [turn | {"mood": "x"} for turn in TURNS * 3], "label": n} for n in (0, 1, None)]
    reader = read_conversations([str(put("a.jsonl", "\n".join(map(json.dumps, rows))))], ignore_fields=["nowhere"])
    for _ in range(2):
        assert len(list(reader)) == 3
        assert reader.log.meta() == {
            "unused": {"messages[].mood": 3, "label": 2},
            "written_as_text": {},
            "left_out": {"nowhere": 0},
        }


def test_every_field_that_can_be_named_has_a_place_in_some_row() -> None:
    """Catches a name that --fields takes and that no kind of row uses."""
    assert set(FIELDS) - {*JUDGED_FIELDS} <= {name for schema in SCHEMAS for name in (*schema.keys, *schema.beside)}
