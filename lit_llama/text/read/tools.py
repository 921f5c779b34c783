"""Functions that an assistant may call, and its calls, in the form that chat templates take.

That form is OpenAI's, with the arguments of a call as an object, as transformers documents it.
"""

import json
from collections.abc import Mapping
from typing import Any

from lit_llama.text.read.raw import STRICTEST, RowError, explain, kind, listed, missing

Entry = dict[str, Any]
_ARGUMENTS = ("arguments", "parameters")  # the second as Llama 3.1 writes its calls


def read_tools(value: Any, name: str, at: str = "") -> list[Mapping[str, Any]]:
    """Read functions as {"type": "function", "function": {"name", "description", "parameters"}}.

    Args:
        value: A list of them, one alone, or JSON text of these; a function may stand without the object around it.
        name: Of the field that holds them.
        at: Where that stands in its row.

    Raises:
        RowError: It is something else.
    """
    return [_wrapped(entry, name, at) for entry in _entries(value, name, at)]


def read_calls(value: Any, name: str, at: str) -> list[Entry]:
    """Read calls as {"type": "function", "function": {"name", "arguments"}}; the parameters are those of read_tools."""
    calls = []
    for entry in _entries(value, name, at):
        call = _wrapped(entry, name, at)
        function = dict(call["function"])
        arguments: Any = next((function[key] for key in _ARGUMENTS if not missing(function.get(key))), {})
        if isinstance(arguments, str):
            arguments = _decoded(arguments, f"{name}: arguments", at) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise RowError(f"field {name}: arguments are {kind(arguments)}, expected an object or its JSON text", at)
        if "arguments" not in function:
            function.pop("parameters", None)
        calls.append(call | {"function": function | {"arguments": arguments}})
    if not calls:
        raise RowError(f"field {name} holds no call", at)
    return calls


def _entries(value: Any, name: str, at: str) -> list[Entry]:
    """The objects of a list, or of its JSON text, without fields that are null."""
    if isinstance(value, str):
        value = (_decoded(value, name, at) if value.strip() else None) or []
    found = []
    for entry in value if isinstance(value, list) else [value]:
        entry = _decoded(entry, name, at) if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise RowError(f"field {name} holds {kind(entry)}, expected an object for each function", at)
        found.append({key: inner for key, inner in entry.items() if not missing(inner)})
    return found


def _wrapped(entry: Entry, name: str, at: str) -> Entry:
    """A function within the object that says so, its fields in their order, as templates may print them."""
    function = entry.get("function")
    if function is None:  # it stands alone
        function = {key: value for key, value in entry.items() if key not in ("id", "type")}
        entry = {key: entry[key] for key in ("id", "type") if key in entry}
    elif isinstance(function, str):
        function = _decoded(function, name, at)
    if entry.get("type", "function") != "function" or not isinstance(function, dict):
        raise RowError(f"field {name} holds {listed(list(entry))}, expected a function", at)
    if not isinstance(function.get("name"), str):
        raise RowError(f"field {name} has {listed(list(function))}, expected a function with a name", at)
    kind_first = {} if "type" in entry else {"type": "function"}
    return kind_first | entry | {"function": function}


def _decoded(text: str, name: str, at: str) -> Any:
    try:
        return STRICTEST.decode(text)
    except json.JSONDecodeError as error:
        raise RowError(f"field {name} is text that is not JSON", at, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"field {name} is text that is not JSON", at, explain(error)) from error
