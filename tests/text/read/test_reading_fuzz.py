"""Rows of any form: conversations, dropped rows, or a DataError."""

import json
from typing import Any, get_args

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_rows import Put

from lit_llama.errors import DataError
from lit_llama.text.config import DataKind
from lit_llama.text.message import Conversation
from lit_llama.text.read.reading import read_conversations

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
names = [
    "instruction",
    "input",
    "output",
    "response",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "text",
    "system",
    "input",
    "tools",
    "history",
    "thinking",
    "chosen",
    "label",
    "rejected",
    "completions",
    "ratings",
]
roles = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human"]) | values
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            **{"role": roles, "from": roles, "content": values, "value": values, "text": values},
            **{"tool_calls": values, "thinking": values, "train": values, "name": values, "tools": values},
        },
    )
    | values,
    max_size=4,
)
trees = st.recursive(
    st.fixed_dictionaries({"text": values, "role": st.sampled_from(["prompter", "assistant"])}),
    lambda inner: st.fixed_dictionaries(
        {"text": values, "role": st.just("prompter"), "replies": st.lists(inner, max_size=3) | values}
    ),
    max_leaves=6,
)
rows = st.dictionaries(
    st.sampled_from([*names, "message_id", "parent_id", "role"]), values | messages | trees, max_size=5
)


@FUZZ
@given(st.lists(rows | values, max_size=4), st.sampled_from(["best", "all"]), st.sampled_from(get_args(DataKind)))
def test_arbitrary_rows_are_kept_or_dropped_or_a_data_error(
    put: Put, given: list[Any], tree: Any, data_kind: Any
) -> None:
    """Catches a traceback for an odd type in an odd place, and a row that is neither kept nor dropped."""
    path = put("a.json", json.dumps(given))
    for on_error, as_text in (("stop", False), ("skip", False), ("skip", True)):
        reader = read_conversations([str(path)], on_error=on_error, tree=tree, as_text=as_text, data_kind=data_kind)  # type: ignore[arg-type]
        try:
            found = list(reader)
        except DataError as error:
            assert str(path) in str(error) and str(error).encode()
            assert on_error == "stop" or not given or "NaN" in path.read_text() or "Infinity" in path.read_text()
            continue
        assert [entry.row for entry in found] == list(range(reader.rows))
        for entry in found:
            if isinstance(entry, Conversation):
                assert entry.messages[-1]["role"] == "assistant"
                json.dumps([dict(message) for message in entry.messages], ensure_ascii=False).encode()
            else:
                assert entry.reason.encode()
