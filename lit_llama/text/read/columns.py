"""One JSON object that holds a whole table -> its rows: the forms in which pandas and the datasets library save one."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_llama.text.read.schemas import FIELDS

Row = dict[str, Any]


def rows_of_table(value: Mapping[str, Any]) -> list[Row] | None:
    """The rows of an object that is a table, None of one that is a row.

    Known are a list for each column (`Dataset.to_dict`, `to_dict("list")`), and of `DataFrame.to_json` the forms
    "columns" (its default), "index", "split" and "table".
    """
    data: Any = value.get("data")
    if value.keys() == {"schema", "data"} and _all(data, dict):
        return list(data)
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"} and _all(data, list):
        names = value["columns"]
        if _all(names, str) and all(len(record) == len(names) for record in data):
            return [dict(zip(names, record, strict=True)) for record in data]
        return None
    columns = list(value.values())
    if _all(columns, list):
        return _of_lists(value)
    if _all(columns, dict) and all(columns):
        return _of_objects(value, columns)
    return None


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(entry, kind) for entry in values)


def _of_lists(columns: Mapping[str, list[Any]]) -> list[Row] | None:
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or lengths == {0}:
        return None
    if any(
        isinstance(entry, dict) and {"role", "from"} & entry.keys() for column in columns.values() for entry in column
    ):
        return None  # lists of messages: one conversation
    if not any(all(isinstance(entry, str | list | None) for entry in column) for column in columns.values()):
        return None
    return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]


def _of_objects(value: Mapping[str, Row], inner: Sequence[Row]) -> list[Row] | None:
    if any(isinstance(entry.get(name), list) for entry in inner for name in ("role", "from")):
        return None  # the messages of one conversation, as a struct of lists
    names = inner[0].keys()
    same, outer = all(entry.keys() == names for entry in inner), value.keys()
    if same and _numbers(names) and not _numbers(outer):
        by_column = True
    elif _numbers(outer) and not _numbers(names):
        by_column = False
    elif same and len(names) > 1 and not outer.isdisjoint(FIELDS) and names.isdisjoint(FIELDS):
        by_column = True
    elif outer.isdisjoint(FIELDS) and (not names.isdisjoint(FIELDS) or (same and len(names) > 1 and len(outer) > 1)):
        by_column = False
    else:
        return None
    return [{name: value[name][index] for name in outer} for index in names] if by_column else list(inner)


def _numbers(names: Any) -> bool:
    return all(name.isdecimal() for name in names)
