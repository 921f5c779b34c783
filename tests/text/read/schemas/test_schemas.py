"""Schemas: each row becomes the messages it means, or is refused with the field, what was found, and the way out."""

from decimal import Decimal
from typing import Any

import pytest

from lit_llama.text.read.raw import RowError
from lit_llama.text.read.schemas.fields import FieldLog
from lit_llama.text.read.schemas.recognition import FIELDS, SCHEMAS, complete, recognise


def convert(row: dict[str, Any]) -> tuple[str, list[tuple[str, ...]], int]:
    """Schema, messages as (role, content[, input]), and how many were cut."""
    schema = recognise(row)
    (turns,) = schema.turns(row, FieldLog())
    messages, cut = complete(turns.messages, schema)
    return schema.name, [tuple(message.values()) for message in messages], cut


def refused(row: dict[str, Any]) -> RowError:
    """Why there is no conversation."""
    with pytest.raises(RowError) as caught:
        convert(row)
    assert str(caught.value).encode() and len(str(caught.value)) < 900 and caught.value.reason in str(caught.value)
    return caught.value


def chat(*turns: str) -> list[dict[str, str]]:
    """Messages of these roles."""
    return [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(turns)]


def said(*turns: str) -> list[tuple[str, ...]]:
    """The same as they come out."""
    return [tuple(message.values()) for message in chat(*turns)]


ASKED, ANSWERED = ("user", "Why is the sky blue?"), ("assistant", "Rayleigh scattering.")
PAIR = [ASKED, ANSWERED]
ALPACA = {"instruction": ASKED[1], "output": ANSWERED[1]}
GOOD: dict[str, tuple[dict[str, Any], str, list[tuple[str, ...]]]] = {
    "Alpaca": (
        {"instruction": "Translate.", "input": "Guten Tag", "output": "Hello", "text": "Below is an instruction"},
        "Alpaca",
        [("user", "Translate.", "Guten Tag"), ("assistant", "Hello")],
    ),
    "Alpaca without an input": (ALPACA, "Alpaca", PAIR),
    "Alpaca with an empty input": (ALPACA | {"input": ""}, "Alpaca", PAIR),
    "Alpaca with a null input": (ALPACA | {"input": None}, "Alpaca", PAIR),
    "Alpaca with spaces that belong to it": (
        {"instruction": " a\n", "input": " ", "output": "\tb \n"},
        "Alpaca",
        [("user", " a\n", " "), ("assistant", "\tb \n")],
    ),
    "Alpaca with a system prompt": (
        ALPACA | {"system": "Be brief.", "history": []},
        "Alpaca",
        [("system", "Be brief."), *PAIR],
    ),
    "columns of other kinds that are null": (
        ALPACA | {"messages": None, "conversations": None, "text": None, "system": None},
        "Alpaca",
        PAIR,
    ),
    "Dolly": (
        {"instruction": "When?", "context": "It began in 1990.", "response": "In 1990.", "category": "closed_qa"},
        "Dolly",
        [("user", "When?", "It began in 1990."), ("assistant", "In 1990.")],
    ),
    "two texts": ({"prompt": ASKED[1], "completion": ANSWERED[1]}, "prompt and completion", PAIR),
    "TRL's lists of messages": (
        {"prompt": chat("system", "user"), "completion": [{"role": "assistant", "content": "b"}]},
        "prompt and completion",
        [*said("system", "user"), ("assistant", "b")],
    ),
    "OpenAI": (
        {"messages": chat("system", "user", "assistant", "user", "assistant")},
        "OpenAI messages",
        said("system", "user", "assistant", "user", "assistant"),
    ),
    "OpenAI with parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}], "weight": 1},
            ]
        },
        "OpenAI messages",
        [("user", "a b"), ("assistant", "c")],
    ),
    "OpenAI with results of tools and null extras": (
        {"messages": [m | {"tool_calls": None} for m in chat("user", "assistant", "tool", "tool", "assistant")]},
        "OpenAI messages",
        said("user", "assistant", "tool", "tool", "assistant"),
    ),
    "OpenAI's newer name of the system": (
        {"messages": [{"role": "developer", "content": "s"}, *chat("user", "assistant")]},
        "OpenAI messages",
        [("system", "s"), *said("user", "assistant")],
    ),
    "UltraChat, which has a prompt besides": (
        {"prompt": "x", "prompt_id": "1", "messages": chat("user", "assistant")},
        "OpenAI messages",
        said("user", "assistant"),
    ),
    "ShareGPT": (
        {
            "id": "x_0",
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "user", "value": "c"},
                {"from": "chatgpt", "value": "d", "markdown": None},
            ],
        },
        "ShareGPT",
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ),
    "ShareGPT with a system prompt beside": (
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]},
        "ShareGPT",
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "ShareGPT in OpenAI's words": ({"conversations": chat("user", "assistant")}, "ShareGPT", said("user", "assistant")),
    "Glaive": (
        {
            "system": "SYSTEM: You are a helpful assistant, with no access to external functions.\n\n",
            "chat": "USER: a\nUSER b\n\n\nASSISTANT: b <|endoftext|>\n\n\nUSER: c\n\n\n"
            "ASSISTANT: d\n\ne <|endoftext|>\n",
        },
        "Glaive",
        [
            ("system", "You are a helpful assistant, with no access to external functions."),
            *(("user", "a\nUSER b"), ("assistant", "b"), ("user", "c"), ("assistant", "d\n\ne")),
        ],
    ),
    "OASST": (
        {
            "message_tree_id": "1",
            "prompt": {
                "text": "a",
                "role": "prompter",
                "replies": [
                    {"text": "worse", "role": "assistant", "rank": 1},
                    {"text": "best", "role": "assistant", "rank": 0, "replies": []},
                ],
            },
        },
        "OASST",
        [("user", "a"), ("assistant", "best")],
    ),
    "plain text": ({"text": "Once upon a time.\n", "meta": {}}, "plain text", [("assistant", "Once upon a time.\n")]),
}


@pytest.mark.parametrize("name", GOOD)
def test_each_kind_of_row_becomes_the_messages_it_means(name: str) -> None:
    """Catches a turn lost or given to the other side, stripped text, and a schema taken for another."""
    row, schema, messages = GOOD[name]
    assert convert(row) == (schema, messages, 0)


def test_each_schema_has_an_example() -> None:
    """Catches a schema added without a test."""
    assert {schema for _, schema, _ in GOOD.values()} == {schema.name for schema in SCHEMAS}


A = {"instruction": "a", "output": "b"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "null output": (A | {"output": None}, "field output is null, expected text"),
    "null output beside a text": (A | {"output": None, "text": "x"}, "field output is null, expected text"),
    "all null": ({"instruction": None, "output": None}, "field instruction is null, expected text"),
    "number": (A | {"output": 3}, "field output is a number, expected text"),
    "fraction": (A | {"output": 3.5}, "field output is a number, expected text"),
    "true": (A | {"instruction": True}, "field instruction is true/false, expected text"),
    "list": (A | {"input": []}, "field input is a list, expected text"),
    "zero input": (A | {"input": 0}, "field input is a number, expected text"),
    "object": (A | {"input": {}}, "field input is an object, expected text"),
    "binary": (A | {"output": b"x"}, "field output is binary, expected text; write the column as text"),
    "decimal": (A | {"output": Decimal(3)}, "field output is of type Decimal, expected text"),
    "lone surrogate": (A | {"output": "ab\ud83d"}, "field output holds a lone surrogate; it is character 2"),
    "system number": (A | {"system": 3}, "field system is a number, expected text"),
    "history of texts": (A | {"history": ["a", "b"]}, "history[0]: field history holds text, expected pairs"),
    "images": (A | {"images": ["x.png"]}, "field images has no place in a row of the kind Alpaca; leave such rows out"),
    "tools": ({"messages": chat("user", "assistant"), "tools": [{}]}, "field tools has nothing, expected a function"),
    "messages as text": ({"messages": "hi"}, "field messages is text, expected a list of messages"),
    "messages null": ({"messages": None}, "field messages is null, expected a list of messages"),
    "prompt null": ({"prompt": None, "completion": "a"}, "field prompt is null, expected text"),
    "OASST with odd replies": ({"prompt": {"text": "a", "replies": "b"}}, "prompt: replies are text, expected a list"),
    "OASST with a text as reply": ({"prompt": {"text": "a", "replies": ["b"]}}, "prompt: a reply is text, expected an"),
    "OASST without a text": ({"prompt": {"role": "prompter"}}, "a message has no text; found role"),
    "text as a list": ({"text": ["a"]}, "field text is a list, expected text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_refused_with_its_field(name: str) -> None:
    """Catches a wrong type taken for empty, a message left out of a chat, and an order no model was trained on."""
    row, message = BAD[name]
    error = refused(row)
    assert message in str(error) and not error.unusable


SAID: dict[str, tuple[Any, str]] = {
    "text": ("hello", "a message is text, expected an object"),
    "no role": ({"content": "a"}, "a message has no role; found content; expected role and content, or from and value"),
    "no content": ({"role": "assistant"}, "a message has no content; found role"),
    "look-alike": ({"role": "assistant", "c\u043entent": "a"}, "a message has no content"),
    "ShareGPT without a value": ({"from": "gpt", "words": "a"}, "a message has no value; found from, words"),
    "null content": ({"role": "assistant", "content": None}, "field content is null, expected text"),
    "number content": ({"role": "assistant", "content": 3}, "field content is a number, expected text"),
    "surrogate": (
        {"role": "assistant", "content": "\ud83d"},
        "field content holds a lone surrogate",
    ),
    "null role": ({"role": None, "content": "a"}, "field role is null, expected text"),
    "unknown role": (
        {"role": "narrator", "content": "a"},
        "unknown role 'narrator'; expected one of system,",
    ),
    "role with a surrogate": ({"role": "\ud83d", "content": "a"}, "field role holds a lone surrogate"),
    "part of a loss": (
        {"role": "assistant", "content": "a", "weight": 0.5},
        "a message has weight 0.5, expected true or false; parts of a loss are not supported: see --ignore_fields",
    ),
    "loss by token": ({"role": "assistant", "content": "a", "loss_mask": [0, 1]}, "a message has loss_mask [0, 1]"),
    "question with thoughts": ({"role": "user", "content": "a", "thinking": "b"}, "a message of user has thoughts"),
    "two thoughts": (
        {"role": "assistant", "content": "a", "thinking": "b", "reasoning_content": "c"},
        "a message has thoughts in several fields",
    ),
    "images of a message": ({"role": "user", "content": "a", "images": ["b.png"]}, "a message has images, for which"),
    "image": (
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        "a part of the content is 'image_url', expected an object of type text",
    ),
    "part without a form": (
        {"role": "user", "content": [["a"]]},
        "a part of the content is a list, expected an object",
    ),
    "part with an answer of a tool": (
        {"role": "user", "content": [{"type": "tool_result", "content": "a"}]},
        "a part of the content is 'tool_result', expected an object of type text",
    ),
    "null part": ({"role": "user", "content": [{"type": "text", "text": None}]}, "field text is null, expected text"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_malformed_message_is_refused_with_its_number(name: str) -> None:
    """Catches a turn left out or misread, and a mistake that is hard to find in a long chat."""
    message, problem = SAID[name]
    for field in ("messages", "conversations"):
        error = refused({field: [*chat("user"), message]})
        assert str(error).startswith(f"{field}[1]: {problem}") and not error.unusable


ORDER = {
    "assistant user assistant": "message 0: found role assistant at the beginning, expected system or user",
    "tool assistant": "message 0: found role tool at the beginning, expected system or user",
    "system assistant": "message 1: found role assistant behind system, expected user",
    "user user assistant": "message 1: found role user behind user, expected assistant",
    "user assistant assistant": "message 2: found role assistant behind assistant, expected user or tool",
    "user assistant system user": "message 2: found role system behind assistant, expected user or tool",
    "system system user": "message 1: found role system behind system, expected user",
    "user tool": "message 1: found role tool behind user, expected assistant",
    "user assistant tool user": "message 3: found role user behind tool, expected assistant or tool",
}


@pytest.mark.parametrize("roles", ORDER)
def test_an_order_that_is_no_conversation_is_refused(roles: str) -> None:
    """Catches answers without a question, and questions joined by guess."""
    for row in ({"messages": chat(*roles.split())}, {"conversations": chat(*roles.split())}):
        assert str(refused(row)) == ORDER[roles] and not refused(row).unusable
    completion = {"prompt": "a", "completion": chat("user")}
    assert str(refused(completion)) == "message 1: found role user behind user, expected assistant"
    assert "system behind system" in str(refused({"system": "s", "messages": chat("system", "user")}))


EMPTY: dict[str, tuple[dict[str, Any], str]] = {
    "empty instruction": (A | {"instruction": " \n"}, "empty instruction"),
    "empty output": (A | {"output": ""}, "empty output"),
    "blank output": (A | {"output": "\u3000\t"}, "empty output"),
    "empty response": ({"instruction": "a", "response": ""}, "empty response"),
    "empty prompt": ({"prompt": "", "completion": "a"}, "empty prompt"),
    "empty completion": ({"prompt": "a", "completion": " "}, "empty completion"),
    "empty answer": ({"messages": [*chat("user"), {"role": "assistant", "content": "\n"}]}, "empty assistant message"),
    "empty question": (
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a"}]},
        "empty user message",
    ),
    "no answer": ({"messages": chat("system", "user")}, "no answer"),
    "only a system prompt": ({"messages": chat("system")}, "no answer"),
    "empty list": ({"messages": []}, "no messages"),
    "empty lists": ({"prompt": [], "completion": []}, "no messages"),
    "tree without a reply": ({"prompt": {"text": "a", "role": "prompter", "replies": []}}, "no answer"),
    "deleted tree": ({"prompt": {"text": "a", "deleted": True}}, "the first message is marked as deleted"),
    "empty text": ({"text": "\n"}, "empty text"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_row_without_anything_to_learn_says_what_is_empty(name: str) -> None:
    """Catches an empty answer that teaches the model to stop at once, and stopping for what is no mistake."""
    row, reason = EMPTY[name]
    error = refused(row)
    assert error.reason == reason and error.unusable


def test_turns_behind_the_last_answer_are_cut_and_counted() -> None:
    """Catches a conversation that is dropped, or trained on, for a last question without an answer."""
    row = {"messages": chat("user", "assistant", "tool", "assistant", "user")}
    assert convert(row)[2] == 1 and [message[0] for message in convert(row)[1]][-1] == "assistant"
    assert convert({"messages": chat("user", "assistant", "tool")})[2] == 1


def test_a_chat_of_many_turns_is_read_whole() -> None:
    """Catches recursion, and time that grows with the square of the turns."""
    assert len(convert({"messages": chat("user", "assistant") * 50_000})[1]) == 100_000


UNKNOWN: dict[str, tuple[list[str], str]] = {
    "other words": (["question", "answer"], "no schema fits the fields question, answer; accepted are"),
    "named fix": (["question", "answer"], "; try --fields instruction=question,output=answer"),
    "half known": (["instruction", "answer"], "; try --fields output=answer"),
    "typo": (["instruction", "input", "ouput"], "; try --fields output=ouput"),
    "capital letters": (["Instruction", "Output"], "; try --fields instruction=Instruction,output=Output"),
    "space": (["instruction", "output "], "; try --fields 'output=output '"),
    "look-alike": (
        ["instruction", "\u043eutput"],
        "a field only looks like output: it holds U+043E CYRILLIC SMALL LETTER O; try --fields 'output=\u043eutput'",
    ),
    "preferences": (
        ["prompt", "chosen", "rejected"],
        "; these are preferences, which prepare/records.py reads with --as preference or --as sft-chosen",
    ),
    "context": (["question", "context", "answer"], "; try --fields instruction=question,output=answer,input=context"),
    "system prompt": (
        ["id", "system_prompt", "question", "response"],
        "; try --fields instruction=question,output=response,system=system_prompt",
    ),
    "thoughts": (
        ["Question", "Complex_CoT", "Response"],
        "; try --fields instruction=Question,output=Response,reasoning_content=Complex_CoT",
    ),
    "one message": (["role", "content"], "; this is one message: a row has to hold all messages"),
    "chat": (["dialogue"], "; try --fields messages=dialogue"),
    "text": (["Text"], "; try --fields text=Text"),
    "no field": ([], "no schema fits the fields nothing"),
    "only a prompt": (["prompt"], "no schema fits the fields prompt"),
    "surrogate": (["a\ud83d"], "no schema fits the fields 'a\\ud83d'"),
    "many": ([f"field{n}" for n in range(99)], "field11 and 87 more; accepted are"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_row_that_fits_no_schema_says_what_would(name: str) -> None:
    """Catches an error that leaves the user to guess the names of fields, and one nobody can see on the screen."""
    names, message = UNKNOWN[name]
    error = refused(dict.fromkeys(names, "x"))
    assert message in str(error)
    for schema in SCHEMAS:
        assert f"{' + '.join(schema.keys)} ({schema.name})" in str(error)


def test_rows_inside_of_a_row_are_seen() -> None:
    """Catches a file wrapped in one object, whose only error is that it is no row."""
    assert "; the field data is a list of objects: if they" in str(refused({"version": 1, "data": [{"a": "b"}]}))
    assert "list of objects" not in str(refused({"data": [], "tags": ["a"], "more": [{}, "a"]}))


def test_nothing_is_suggested_that_is_not_close() -> None:
    """Catches advice to train on an identifier."""
    assert "--fields" not in str(refused({"id": "x", "meta": "y"}))


def test_the_fields_that_can_be_named_are_those_of_the_schemas() -> None:
    """Catches a schema whose fields --fields refuses."""
    assert set(FIELDS) >= {key for schema in SCHEMAS for key in schema.keys} | {
        "input",
        "context",
        "system",
        "tools",
        "reasoning_content",
        "history",
    }
