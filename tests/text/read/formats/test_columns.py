"""One JSON object that holds a table: read as pandas and the datasets library wrote it, and no row taken for one."""

import json
from typing import Any

import datasets
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_rows import CHAT, Put, values

from lit_llama.text.read.formats.json_rows import rows_of_table
from lit_llama.text.read.formats.sources import read_rows

ROWS = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(3)]


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "records"])
@pytest.mark.parametrize("index", ["numbers", "names"])
def test_tables_of_pandas_are_read(orient: Any, index: str, put: Put) -> None:
    """Catches a table taken for one row, columns taken for rows and rows for columns."""
    frame = pd.DataFrame(ROWS, index=None if index == "numbers" else ["x1", "x2", "x3"])
    found = values(put("a.json", frame.to_json(orient=orient)))
    assert [{name: row[name] for name in ROWS[0]} for row in found] == ROWS


def test_tables_of_the_datasets_library_are_read_and_said(put: Put) -> None:
    """Catches one row whose fields are lists, and lists of messages that come apart."""
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [row | chat for row in ROWS]
    said: list[str] = []
    path = put("a.json", json.dumps(datasets.Dataset.from_list(rows).to_dict()))
    assert [row.value for row in read_rows(path, remark=said.append)] == rows
    assert said == [f"{path}: its one object is a table, and read as 3 rows"]


ONE_ROW: dict[str, dict[str, Any]] = {
    "a chat": CHAT,
    "prompt and completion in messages": {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
    "a chat with tags": {"messages": CHAT["messages"][:1], "tags": ["a"]},
    "a tree": {"prompt": {"text": "q", "role": "prompter", "replies": []}},
    "texts": ROWS[0],
    "lists of other lengths": {"a": ["x"], "b": ["y", "z"]},
    "a description": {"default": {"description": "x", "features": {}}},
    "nothing": {"a": [], "b": []},
    "objects of nothing": {"a": {}},
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_a_file_with_one_row_is_no_table(name: str, put: Put) -> None:
    """Catches the messages of a chat taken for rows."""
    for ending in ("json", "jsonl"):
        assert values(put(f"a.{ending}", json.dumps(ONE_ROW[name]))) == [ONE_ROW[name]]


def test_several_objects_are_rows_and_no_tables(put: Put) -> None:
    """Catches the first line taken for the whole file."""
    lines = [{"a": ["x", "y"], "b": ["z", "w"]}] * 2
    assert values(put("a.jsonl", "\n".join(map(json.dumps, lines)))) == lines


@given(st.dictionaries(st.text(max_size=3), st.recursive(st.none() | st.text(max_size=2) | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=9), max_size=3))  # fmt: skip # noqa: E501
def test_any_object_is_a_row_or_a_table_of_objects(value: dict[str, Any]) -> None:
    """Catches a traceback for an odd shape."""
    rows = rows_of_table(value)
    assert rows is None or (rows and all(isinstance(row, dict) for row in rows))
