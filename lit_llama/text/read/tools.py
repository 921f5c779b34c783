"""Functions that an assistant may call, and its calls, in the form that chat templates take.

That form is OpenAI's, with the arguments of a call as an object, as transformers documents it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lit_llama.text.message import Message
from lit_llama.text.read.raw import STRICTEST, RowError, explain, kind, listed, missing, shown

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


def check_calls(messages: Sequence[Message]) -> None:
    """Check that calls and their results belong together; the last call of all waits for its results.

    Several calls may have one result together where nothing says which it answers. In a conversation in which no
    message has calls of its own, they may stand in the text.

    Raises:
        RowError: A call has no result, or a result no call.
    """
    if not any("tool_calls" in message for message in messages):
        return
    called, results = -1, 0  # the last message with calls, and the results of these
    ids, named = dict[str, None](), True  # of the calls that are open, and whether all results say which they answer
    for index, message in enumerate(messages):
        at, name = f"message {index}", message.get("tool_call_id")
        if message["role"] == "tool":
            results += 1
            if called < 0 or results > len(messages[called]["tool_calls"]):
                raise RowError("a result has no call", at, "expected an answer with a call before it")
            if name is not None and ids and name not in ids:
                raise RowError(
                    "a result has no call", at, f"tool_call_id is {shown(name)}, open are {listed(list(ids))}"
                )
            named = named and name is not None
            if name is not None:
                ids.pop(name, None)
            continue
        if called >= 0 and (not results or (named and ids)):
            hint = f"{listed(list(ids))} is open" if results else "expected a message of the role tool behind it"
            raise RowError("a call has no result", f"message {called}", hint)
        calls = message.get("tool_calls")
        called, results, named = (index, 0, True) if calls else (-1, 0, True)
        ids = {str(call["id"]): None for call in calls or () if "id" in call}


def repeats(tools: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether a system message describes all of some tools itself, as those of Hermes do, between <tools> tags."""
    return "<tools>" in text and all(json.dumps(tool["function"]["name"]) in text for tool in tools)


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
