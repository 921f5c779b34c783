"""Functions, calls and their results in every form that people store them in, and what is wrong with some."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from raw_rows import Put

from lit_llama.errors import DataError
from lit_llama.text.message import Conversation, Dropped
from lit_llama.text.read.reading import read_conversations

CLOCK: dict[str, Any] = {
    "name": "clock",
    "description": "Tells the time of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASKED = {"city": "Bern", "note": "it's {late}"}
USER, DONE = {"role": "user", "content": "What time is it?"}, {"role": "assistant", "content": "It is noon."}
RESULT = {"role": "tool", "content": '{"time": "12:00"}'}


def call(*, id: str | None = None, text: bool = False) -> dict[str, Any]:
    """A call in OpenAI's form."""
    arguments = json.dumps(ASKED) if text else ASKED
    named = {} if id is None else {"id": id}
    return named | {"type": "function", "function": {"name": "clock", "arguments": arguments}}


def asks(*calls: dict[str, Any], content: Any = None) -> dict[str, Any]:
    """A message with calls."""
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


GLAIVE_CALL = f"""<functioncall> {{"name": "clock", "arguments": '{json.dumps(ASKED).replace("'", chr(92) + "'")}'}}"""
FORMS: dict[str, dict[str, Any]] = {
    "OpenAI": {
        "tools": [{"type": "function", "function": CLOCK}],
        "messages": [USER, asks(call()), RESULT, DONE],
    },
    "OpenAI, all as text": {
        "tools": json.dumps([{"type": "function", "function": CLOCK}]),
        "messages": [USER, asks(call(text=True), content=""), RESULT, DONE],
    },
    "OpenAI, parts": {
        "tools": [CLOCK],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What time "}, {"type": "text", "value": "is it?"}]},
            asks(call(), content=[]),
            {"role": "tool", "content": [{"type": "text", "value": RESULT["content"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": DONE["content"]}]},
        ],
    },
    "ShareGPT, as LLaMA-Factory has it": {
        "conversations": [
            {"from": "human", "value": USER["content"]},
            {"from": "function_call", "value": json.dumps({"name": "clock", "arguments": ASKED})},
            {"from": "observation", "value": RESULT["content"]},
            {"from": "gpt", "value": DONE["content"]},
        ],
        "tools": json.dumps([CLOCK]),
    },
    "ShareGPT, a list of calls": {
        "conversations": [
            {"from": "human", "value": USER["content"]},
            {"from": "function_call", "value": json.dumps([{"name": "clock", "arguments": json.dumps(ASKED)}])},
            {"from": "observation", "value": RESULT["content"]},
            {"from": "gpt", "value": DONE["content"]},
        ],
        "tools": [CLOCK],
    },
    "Glaive": {
        "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
        + json.dumps(CLOCK, indent=4),
        "chat": f"USER: {USER['content']}\n\n\nASSISTANT: {GLAIVE_CALL} <|endoftext|>\n\n\n"
        f"FUNCTION RESPONSE: {RESULT['content']}\n\n\nASSISTANT: {DONE['content']} <|endoftext|>\n\n\n",
    },
}


def conversations(put: Put, *rows: Any, **options: Any) -> list[Any]:
    """What rows come to."""
    path = put("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return list(read_conversations([str(path)], **options))


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_come_to_one(name: str, put: Put) -> None:
    """Catches arguments that stay text, a result that loses its place, and functions in two forms."""
    [found] = conversations(put, FORMS[name])
    assert isinstance(found, Conversation)
    assert found.tools == ({"type": "function", "function": CLOCK},)
    turns = [message for message in found.messages if message["role"] != "system"]
    assert turns == [USER, asks(call(), content=""), RESULT, DONE]


def test_glaives_functions_are_taken_out_of_the_system_text(put: Put) -> None:
    """Catches functions that stand in the prompt twice, or of which only the first is read."""
    other = CLOCK | {"name": "alarm"}
    row = FORMS["Glaive"]
    [found] = conversations(put, row | {"system": row["system"] + "\n\n" + json.dumps(other)})
    assert [tool["function"]["name"] for tool in found.tools] == ["clock", "alarm"]
    assert found.messages[0] == {"role": "system", "content": "You are a helpful assistant."}
    before = row["chat"].replace("ASSISTANT: <func", "ASSISTANT: Let me look. <func")
    [found] = conversations(put, row | {"chat": before})
    assert found.messages[2]["content"] == "Let me look." and len(found.messages[2]["tool_calls"]) == 1


HERMES = {
    "conversations": [
        {
            "from": "system",
            "value": "You may call functions. <tools>\n"
            + json.dumps({"type": "function", "function": CLOCK})
            + "\n</tools>",
        },
        {"from": "human", "value": "What time is it?"},
        {"from": "gpt", "value": '<tool_call>\n{"name": "clock", "arguments": {"city": "Bern"}}\n</tool_call>'},
        {"from": "tool", "value": "<tool_response>\n12:00\n</tool_response>"},
        {"from": "gpt", "value": "It is noon."},
    ],
    "tools": json.dumps([{"type": "function", "function": CLOCK}]),
}


def test_hermes_stays_text(put: Put) -> None:
    """Catches functions that a template writes once more beside those in the system message."""
    [found] = conversations(put, HERMES)
    assert found.tools == ()
    assert [(m["role"], m["content"]) for m in found.messages] == [
        (role, turn["value"])
        for role, turn in zip(
            ("system", "user", "assistant", "tool", "assistant"), HERMES["conversations"], strict=True
        )
    ]
    other = json.dumps([{"type": "function", "function": CLOCK | {"name": "alarm"}}])
    [found] = conversations(put, HERMES | {"tools": other})
    assert [tool["function"]["name"] for tool in found.tools] == ["alarm"]


TWO = asks(call(id="a"), call(id="b"))


def result(id: str) -> dict[str, Any]:
    return RESULT | {"tool_call_id": id}


RIGHT: dict[str, list[Any]] = {
    "the last call waits": [USER, asks(call())],
    "two results": [USER, TWO, result("b"), result("a"), DONE],
    "one result for two calls that have no names": [USER, asks(call(), call()), RESULT, DONE],
    "call behind a result": [USER, asks(call()), RESULT, asks(call()), RESULT, DONE],
    "calls in the text": [USER, {"role": "assistant", "content": "clock()"}, RESULT, DONE],
}


@pytest.mark.parametrize("name", RIGHT)
def test_calls_and_results_that_belong_together_are_read(name: str, put: Put) -> None:
    """Catches a check that refuses what people have."""
    [found] = conversations(put, {"messages": RIGHT[name]})
    assert isinstance(found, Conversation) and len(found.messages) == len(RIGHT[name])


def spoilt(change: Callable[[dict[str, Any]], None]) -> list[Any]:
    """A conversation whose call is changed."""
    wrong = json.loads(json.dumps(call()))
    change(wrong["function"])
    return [USER, asks(wrong), RESULT, DONE]


WRONG: dict[str, tuple[list[Any], str]] = {
    "no result": (
        [USER, asks(call()), USER, DONE],
        "message 1: a call has no result; expected a message of the role tool",
    ),
    "an answer in place of the result": ([USER, asks(call()), DONE], "message 1: a call has no result"),
    "one of two": ([USER, TWO, result("a"), DONE], "message 1: a call has no result; b is open"),
    "no call": ([USER, DONE, RESULT, DONE, USER, asks(call())], "message 2: a result has no call"),
    "more results than calls": ([USER, asks(call()), RESULT, RESULT, DONE], "message 3: a result has no call"),
    "result of another call": (
        [USER, TWO, result("c"), result("a"), DONE],
        "message 2: a result has no call; tool_call_id is 'c', open are a, b",
    ),
    "a result twice": ([USER, TWO, result("a"), result("a"), DONE], "message 3: a result has no call"),
    "arguments that are no JSON": (
        spoilt(lambda function: function.update(arguments="{city: Bern}")),
        "messages[1]: field tool_calls: arguments is text that is not JSON",
    ),
    "arguments that are a list": (
        spoilt(lambda function: function.update(arguments=["Bern"])),
        "messages[1]: field tool_calls: arguments are a list, expected an object or its JSON text",
    ),
    "no name": (spoilt(lambda function: function.pop("name")), "expected a function with a name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_calls_is_one_line_and_counted_on_request(name: str, put: Put) -> None:
    """Catches a call without a result in training, and a reason that differs from row to row."""
    messages, words = WRONG[name]
    with pytest.raises(DataError) as caught:
        conversations(put, {"messages": messages})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    dropped = conversations(put, *[{"messages": messages}] * 2, on_error="skip")
    assert all(isinstance(one, Dropped) and not one.by_choice for one in dropped)
    assert len({one.reason for one in dropped}) == 1


GLAIVE_WRONG = {
    "a call that is none": ("chat", GLAIVE_CALL, "<functioncall> clock", "chat[1]: a call is no object"),
    "arguments": ("chat", '"city"', "city", "arguments is text that is not JSON"),
    "a function that is none": ("system", '"name"', "name", "field system holds a function that is not JSON"),
}


@pytest.mark.parametrize("name", GLAIVE_WRONG)
def test_what_is_wrong_in_glaives_text_is_named(name: str, put: Put) -> None:
    """Catches a function or a call that is trained as words."""
    field, before, after, words = GLAIVE_WRONG[name]
    row = FORMS["Glaive"]
    with pytest.raises(DataError) as caught:
        conversations(put, row | {field: row[field].replace(before, after, 1)})
    assert words in str(caught.value) and "\n" not in str(caught.value)
