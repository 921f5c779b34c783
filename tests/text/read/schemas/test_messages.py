"""Messages in every form that people store them in, flags of their loss, thoughts and tools."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_llama.errors import DataError
from lit_llama.text.message import Conversation
from lit_llama.text.read.reading import read_conversations
from lit_llama.text.read.schemas.messages import ROLES

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
PAIR = (USER, ASSISTANT)
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TOOLS = [
    *ASKED,
    {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Sunny."},
]


def conversation(put: Any, row: Any) -> Conversation:
    """What a row of a JSONL file comes to."""
    [found] = read_conversations([str(put("rows.jsonl", json.dumps(row)))])
    assert isinstance(found, Conversation)
    return found


def messages(put: Any, row: Any) -> tuple[Any, ...]:
    """The messages of that."""
    return conversation(put, row).messages


def refused(put: Any, *turns: Any, **beside: Any) -> str:
    """Why a row of messages cannot be read."""
    with pytest.raises(DataError) as caught:
        conversation(put, {"messages": list(turns), **beside})
    return str(caught.value)


FORMS: dict[str, Any] = {
    "a list alone": list(PAIR),
    "JSON text": {"messages": json.dumps(PAIR)},
    "text that Python printed": {"messages": str([dict(turn, name=None) for turn in PAIR])},
    "a struct of lists": {"messages": {"role": ["user", "assistant"], "content": ["Why?", "Because."], "name": None}},
    "role and value": {"conversations": [{"role": t["role"], "value": t["content"]} for t in PAIR]},
    "from and content": {"messages": [{"from": t["role"], "content": t["content"]} for t in PAIR]},
    "Gemini's parts": {"messages": [{"role": t["role"], "parts": [{"text": t["content"]}]} for t in PAIR]},
    "texts as parts": {"messages": [{"role": "user", "content": ["Wh", "y?"]}, ASSISTANT]},
    "OpenAI's newer parts": {
        "messages": [
            {"role": "user", "content": [{"type": "input_text", "text": "Why?"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Because.", "annotations": []}]},
        ]
    },
    "a message alone as completion": {"prompt": "Why?", "completion": ASSISTANT},
    "lists as JSON texts": {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])},
    "a system message that stands twice": {
        "system": "Be brief.",
        "messages": [{"role": "system", "content": "Be brief."}, *PAIR],
    },
    "a history": {"instruction": "Why?", "output": "Because.", "history": [["Hi.", "Hello."]]},
}
BEFORE = {
    "a system message that stands twice": [{"role": "system", "content": "Be brief."}],
    "a history": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}],
}


@pytest.mark.parametrize("name", FORMS)
def test_messages_are_read_in_every_form_they_are_stored_in(name: str, put: Any) -> None:
    """Catches a form that is refused, and parts or turns that get lost in it."""
    assert messages(put, FORMS[name]) == (*BEFORE.get(name, []), *PAIR)


def test_a_prompt_that_is_text_about_messages_stays_text(put: Any) -> None:
    """Catches JSON that a model is to read taken for the conversation."""
    text = '[{"name": "role", "text": "content"}]'
    assert messages(put, {"prompt": text, "completion": "b"})[0]["content"] == text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n"),
        ("a.jsonl", json.dumps(PAIR)),
        ("a.json", f"\ufeff\n{json.dumps(PAIR)}\n\n{json.dumps(PAIR)}"),
        ("a.json", json.dumps([PAIR, PAIR])),
        ("a.json", json.dumps([PAIR, {"messages": PAIR}], indent=1)),
        ("a.json", json.dumps([{"instruction": "Why?", "output": "Because."}] * 2)),
        ("a.csv", 'id,messages\n0,"{0}"\n1,"{0}"\n'.replace("{0}", json.dumps(PAIR).replace('"', '""'))),
    ],
)
def test_lists_of_messages_are_rows(name: str, content: str, put: Any) -> None:
    """Catches a conversation taken for an array of rows, in lines, in an array, and in a cell of CSV."""
    found = list(read_conversations([str(put(name, content))]))
    assert [row.messages for row in found if isinstance(row, Conversation)] == [PAIR] * len(found)
    assert len(found) == (1 if content == json.dumps(PAIR) else 2)


def test_arrow_has_maps_structs_of_lists_and_padding(tmp_path: Path) -> None:
    """Catches the forms of Parquet that are refused, and null arguments that no row ever had."""
    pairs = [[(key, turn[key]) for key in ("role", "content")] for turn in PAIR]
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    maps = pa.table({"messages": pa.array([pairs], kind)})
    columns = pa.Table.from_pylist([{"conversations": {"from": ["human", "gpt"], "value": ["Why?", "Because."]}}])
    for table in (maps, columns):
        pq.write_table(table, tmp_path / "a.parquet")
        [found] = read_conversations([str(tmp_path / "a.parquet")])
        assert isinstance(found, Conversation) and found.messages == PAIR
    other = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    rows = [[USER, {"role": "assistant", "tool_calls": [call]}] for call in (CALL, other)]
    table = pa.Table.from_pylist([{"messages": row, "tools": [TOOL]} for row in rows])
    assert table.column("messages")[1].as_py()[1]["tool_calls"][0]["function"]["arguments"]["city"] is None
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(read_conversations([str(tmp_path / "a.parquet")]))
    calls = [row.messages[-1]["tool_calls"] for row in found if isinstance(row, Conversation)]
    assert calls == [[CALL], [other]]


def test_roles_are_known_in_any_case_and_by_their_synonyms(put: Any) -> None:
    """Catches a file refused for a capital letter."""
    for one, other in (("Human", "Assistant"), ("USER", "AI"), (" prompter", "Bot"), ("user", "gpt")):
        assert messages(put, [{"from": one, "value": "Why?"}, {"from": other, "value": "Because."}]) == PAIR
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool", "function_call"}
    assert "unknown role 'narrator'; expected one of system, developer, user" in refused(
        put, USER, {"role": "narrator", "content": "a"}
    )


FLAGS = [("train", False), ("loss", 0), ("loss_mask", 0.0), ("weight", 0), ("train", "false"), ("trainable", "0")]


@pytest.mark.parametrize(("name", "value"), FLAGS)
def test_an_answer_that_is_not_to_be_learned_says_so(name: str, value: Any, put: Any) -> None:
    """Catches a wrong answer that somebody marked, and that is trained on all the same."""
    wrong = {"role": "assistant", "content": "No idea."}
    marked = [USER | {name: value}, wrong | {name: value}, USER, ASSISTANT | {name: True}]
    assert messages(put, marked) == (USER, wrong | {"train": False}, USER, ASSISTANT)
    assert messages(put, [*PAIR, USER, wrong | {name: value}]) == PAIR  # nothing is learned behind the last one
    path = put("none.jsonl", json.dumps({"messages": [USER, wrong | {name: value}]}))
    [dropped] = read_conversations([str(path)])
    assert getattr(dropped, "reason", "") == "no answer is marked to be trained on"
    for part in (0.5, 2, "half", [0, 1], {}):
        assert f"messages[1]: a message has {name} " in refused(put, USER, ASSISTANT | {name: part})
    assert messages(put, [USER, ASSISTANT | {name: None}]) == PAIR


def test_a_flag_that_wants_a_question_trained_is_counted(put: Any) -> None:
    """Catches a user's turn that should carry loss, and carries none in silence."""
    reader = read_conversations([str(put("a.jsonl", json.dumps([USER | {"train": True}, ASSISTANT])))])
    assert len(list(reader)) == 1 and reader.log.unused == {"messages[].train of user": 1}


def test_thoughts_come_under_one_name(put: Any) -> None:
    """Catches thoughts beside the answer that vanish, in a field of their own or in a part of the content."""
    wanted = (USER, ASSISTANT | {"reasoning_content": "Let me see."})
    parts = [{"type": "thinking", "thinking": "Let me see.", "signature": "x"}, {"type": "text", "text": "Because."}]
    for thoughts in (
        {"reasoning_content": "Let me see."},
        {"reasoning": "Let me see.", "thinking": "Let me see."},
        {"thinking": "Let me see.", "reasoning": None, "reasoning_content": ""},
        {"content": parts},
    ):
        assert messages(put, [USER, ASSISTANT | thoughts]) == wanted
    assert messages(put, {"prompt": "Why?", "completion": "Because.", "reasoning": "Let me see."}) == wanted
    assert messages(put, [USER, ASSISTANT | {"thinking": ""}]) == PAIR


CALLS: dict[str, list[Any]] = {
    "as they are": TOOLS,
    "arguments as text": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"function": {
            "name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}}]},  # type: ignore[index]
        *TOOLS[2:],
    ],
    "without a content": [USER, {"role": "assistant", "tool_calls": [CALL]}, *TOOLS[2:]],
    "all as text": [USER, {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}, *TOOLS[2:]],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_come_in_the_form_that_templates_take(name: str, put: Any) -> None:
    """Catches arguments handed on as text, which a template would quote once more."""
    found = conversation(put, {"messages": CALLS[name], "tools": [TOOL]})
    assert found.messages == tuple(TOOLS) and found.tools == (TOOL,)


def test_calls_of_other_dialects_are_those_calls(put: Any) -> None:
    """Catches ShareGPT's function_call and observation, and OpenAI's older function_call, refused or misread."""
    bare = {"type": "function", "function": CALL["function"]}
    wanted = (USER, {"role": "assistant", "content": "", "tool_calls": [bare]}, {"role": "tool", "content": "sunny"})
    wanted += ({"role": "assistant", "content": "Sunny."},)
    function = TOOL["function"]
    share = [
        {"from": "human", "value": "Why?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny."},
    ]
    for row in (
        {"conversations": share, "tools": json.dumps([function])},
        {"conversations": share, "functions": [function]},
        {
            "messages": [
                {"role": "system", "content": "Be brief.", "tools": [TOOL]},
                USER,
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "content": "sunny"},
                {"role": "assistant", "content": "Sunny."},
            ]
        },
    ):
        found = conversation(put, row)
        assert [m for m in found.messages if m["role"] != "system"] == list(wanted) and found.tools == (TOOL,)
    several = [share[0], share[1], share[1], *share[2:]]
    assert len(messages(put, {"conversations": several})[1]["tool_calls"]) == 2
    listed = [share[0], {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)}, *share[2:]]
    assert messages(put, {"conversations": listed}) == messages(put, {"conversations": several})
    nameless = {"from": "function_call", "value": '{"name": "weather"}'}
    assert messages(put, {"conversations": [share[0], nameless]})[1]["tool_calls"][0]["function"]["arguments"] == {}


BAD: dict[str, tuple[Any, str]] = {
    "text": ("weather(Bern)", "field tool_calls is text that is not JSON"),
    "number": ([3], "field tool_calls holds a number, expected an object for each function"),
    "no name": ([{"arguments": {}}], "field tool_calls has arguments, expected a function with a name"),
    "another kind": (
        [{"type": "code", "function": {"name": "a"}}],
        "field tool_calls holds type, function, expected a",
    ),
    "list of arguments": (
        [{"name": "a", "arguments": [1]}],
        "arguments are a list, expected an object or its JSON",
    ),
    "cut arguments": ([{"name": "a", "arguments": '{"b": '}], "arguments is text that is not JSON; Expecting value"),
    "NaN": ([{"name": "a", "arguments": '{"b": NaN}'}], "arguments is text that is not JSON; NaN is not JSON"),
    "twice": ([{"name": "a", "arguments": '{"b": 1, "b": 2}'}], "an object has the field 'b' twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_calls_that_are_none_are_refused_with_their_place(name: str, put: Any) -> None:
    """Catches a call handed to a template as something that no program would run."""
    calls, problem = BAD[name]
    message = refused(put, USER, {"role": "assistant", "content": "", "tool_calls": calls})
    assert "messages[1]: " in message and problem in message


def test_tools_in_two_places_or_of_the_wrong_side_are_refused(put: Any) -> None:
    """Catches one of two lists of tools that wins in silence."""
    system = {"role": "system", "content": "a", "tools": [TOOL]}
    other = {"type": "function", "function": {"name": "clock"}}
    assert "tools stand beside the messages and in one of them" in refused(put, system, *PAIR, tools=[other])
    assert conversation(put, {"messages": [system, *PAIR], "tools": [TOOL]}).tools == (TOOL,)
    assert "tools stand in a message of assistant" in refused(put, USER, ASSISTANT | {"tools": [TOOL]})
    assert "a message of user has tool calls" in refused(put, USER | {"tool_calls": [CALL]}, ASSISTANT)


def test_a_template_gets_what_transformers_would_hand_it(put: Any) -> None:
    """Catches a changed order of fields or letters in what a template prints of calls and tools."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = (
        "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.name }}{{ m.tool_call_id }}"
        "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ m.reasoning_content }}{% endfor %}"
    )
    turns = [*TOOLS[:3], {"role": "assistant", "content": "Sunny, é.", "reasoning_content": "It said so."}]
    row = {"messages": turns, "tools": [TOOL, {"type": "function", "function": {"description": "é", "name": "b"}}]}
    found = conversation(put, row)
    wanted, got = (
        utils.render_jinja_template(conversations=[list(said)], tools=list(tools), chat_template=template)[0]
        for said, tools in ((turns, row["tools"]), (found.messages, found.tools))
    )
    assert got == wanted and '"days": 2' in got[0]
