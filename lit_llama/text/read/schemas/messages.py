"""Messages of raw rows, in OpenAI's words, in ShareGPT's and in those of their relatives.

Functions and calls get the form that chat templates take: OpenAI's, with the arguments of a call as an object.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_llama.text.message import Message
from lit_llama.text.read.raw import (
    STRICT,
    STRICTEST,
    RowError,
    check_text,
    explain,
    holds_messages,
    is_message,
    kind,
    listed,
    missing,
    shown,
)
from lit_llama.text.read.schemas.fields import NO, THOUGHTS, TOOLS, YES, FieldLog, names_of
from lit_llama.wording import param

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


Words = dict[str, Any]  # a message that is being put together

_CALL = "function_call"  # a role whose content is a call, and the field of a message that holds one
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
"""Role of a message -> our word for it. Case does not matter."""

_PLAIN_ROLES = {name: role for name, role in ROLES.items() if role != _CALL}
_CALLS = ("tool_calls", _CALL)
_SPEAKER, _SAID = ("role", "from"), ("content", "value", "text", "parts")
_FLAGS = (
    "train",
    "training",
    "trainable",
    "loss",
    "loss_mask",
    "loss_weight",
    "weight",
)  # whether a message carries loss
_WORDS = ("text", "value")  # what a part of the type text is called
_TEXTS = ("text", "input_text", "output_text", None)
_USED = frozenset((*_SPEAKER, *THOUGHTS, *TOOLS, *_FLAGS, "tool_calls", _CALL, "tool_call_id", "name", "input"))
_USED_WITH = {said: _USED | {said} for said in _SAID}
_PART = frozenset(("type", "text", "value", "thinking", "reasoning", "signature"))
OASST_FIELDS = names_of(
    "role text replies rank deleted parent_id labels emojis review_count review_result synthetic message_tree_id "
    "message_id tree_state model_name detoxify created_date user_id lang"
)
"""Of a message in a tree: what orders it, and what its reviewers said of it."""


@dataclass
class Turns:
    """Messages as they stand in a row, and the tools that they may call."""

    messages: list[Words] = field(default_factory=list)
    tools: list[Mapping[str, Any]] = field(default_factory=list)


def read_messages(row: Mapping[str, Any], name: str, log: FieldLog) -> Turns:
    """Read the messages of a field: a list of objects, an object of lists, a list of Arrow's maps, or the text of one.

    Raises:
        RowError: It is something else, or a message is none.
    """
    found = as_list(row[name])
    if found is None:
        hint = "text has to be the JSON of one" if isinstance(row[name], str) else ""
        raise RowError(f"field {name} is {kind(row[name])}, expected a list of messages", hint=hint)
    turns = Turns()
    calls = False  # whether the message before is a call alone, which another one may join
    for index, value in enumerate(found):
        at = f"{name}[{index}]"
        message, tools, alone = _message(value, at, log)
        turns.tools += tools
        if alone and calls:
            turns.messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            turns.messages.append(message)
        calls = alone
    return turns


def as_list(value: Any) -> list[Any] | None:
    """Read a list of messages in whichever form it is stored; None if a value is no such list."""
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, dict):
        if is_message(value):
            return [value]
        columns = {name: column for name, column in value.items() if not missing(column)}
        lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
        if len(lengths) != 1 or -1 in lengths or not {*_SPEAKER} & columns.keys():
            return None
        return [dict(zip(columns, entry, strict=True)) for entry in zip(*columns.values(), strict=True)]
    return value if isinstance(value, list) else None


def in_a_field(value: Any) -> bool:
    """Whether a field of any name holds messages, however they are stored."""
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return False
    found = as_list(value)
    return holds_messages([_unmapped(entry) for entry in found or []])


def _parsed(text: str) -> Any:
    """The value of a JSON text, or of one that Python printed; the text itself if it is neither."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return STRICT.decode(text)
    except json.JSONDecodeError:
        pass
    except (ValueError, RecursionError) as error:
        raise RowError(f"a list of messages is JSON text which {explain(error)}") from error
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _unmapped(value: Any) -> Any:
    """An object out of what Arrow has for a map: pairs of names and values."""
    pairs = isinstance(value, list) and bool(value) and all(isinstance(p, tuple) and len(p) == 2 for p in value)
    return dict(value) if pairs else value


def _message(value: Any, at: str, log: FieldLog) -> tuple[Words, list[Mapping[str, Any]], bool]:
    """A message, the tools that stand in it, and whether it is a call alone."""
    value = _unmapped(value)
    if not isinstance(value, dict):
        raise RowError(f"a message is {kind(value)}, expected an object", at)
    value = log.wanted(value)
    if (message := _plain(value, at)) is not None:
        return message, [], False
    speaker = _first(value, _SPEAKER)
    said = _first(value, _SAID if speaker == "role" else ("value", *_SAID))
    if said is None and any(not missing(value.get(name)) for name in _CALLS):
        value, said = {**value, "content": None}, "content"
    for name, names in ((speaker, _SPEAKER), (said, _SAID)):
        if name is None:
            hint = f"found {listed(list(value))}; expected role and content, or from and value"
            raise RowError(f"a message has no {names[speaker == 'from']}", at, hint)
    assert speaker and said
    role = read_role(value[speaker], speaker, at)
    message = read_message(value, role, said, at, log)
    tools = [tool for name in TOOLS if not missing(value.get(name)) for tool in read_tools(value[name], name, at)]
    if tools and message["role"] not in ("system", "user"):
        raise RowError(f"tools stand in a message of {message['role']}, expected them in a system message", at)
    log.unused_in_message(value, _USED_WITH[said], at)
    return message, tools, role == _CALL


def _plain(value: Mapping[str, Any], at: str) -> Words | None:
    """A message that has a role and a content and nothing else, as nearly all have; None if it is another."""
    if len(value) != 2:
        return None
    if "content" in value:
        name, spoken, content = "content", value.get("role"), value["content"]
    else:
        name, spoken, content = "value", value.get("from"), value.get("value")
    role = _PLAIN_ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None or not isinstance(content, str):
        return None
    check_text(content, name, at)
    return {"role": role, "content": content}


def _first(message: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the names that says something, else the first that is there."""
    there = [name for name in names if name in message]
    return next((name for name in there if not missing(message[name])), there[0] if there else None)


def read_message(value: Mapping[str, Any], role: str, said: str, at: str, log: FieldLog) -> Words:
    """Read a message in our words.

    Args:
        value: The raw one.
        role: As in ROLES.
        said: Its field that says what.
        at: Where it stands in its row.
        log: Reads the fields.
    """
    if role == _CALL:
        calls = read_calls(value[said], said, at)
        return {"role": "assistant", "content": "", "tool_calls": calls} | _unlearned(value, role, at, log)
    thoughts = [log.text(value, name, at) for name in THOUGHTS if not missing(value.get(name)) and value[name] != ""]
    calls = [
        call
        for name in _CALLS
        if not missing(value.get(name)) and value[name] != []
        for call in read_calls(value[name], name, at)
    ]
    content = value[said]
    if calls and missing(content):
        content = ""
    if isinstance(content, list):
        content, more = _joined(content, said, at, log)
        thoughts += more
    else:
        content = log.text({said: content}, said, at)
    message: Words = {"role": role, "content": content}
    if role == "user" and not missing(value.get("input")) and value["input"] != "":
        message["input"] = log.text(value, "input", at)
    if (thoughts or calls) and role != "assistant":
        raise RowError(f"a message of {role} has {'thoughts' if thoughts else 'tool calls'}", at, "expected assistant")
    if len(set(thoughts)) > 1:
        raise RowError(f"a message has thoughts in several fields ({', '.join(THOUGHTS)})", at, "expected one of them")
    if thoughts:
        message["reasoning_content"] = thoughts[0]
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if not missing(value.get(name)) and value[name] != "":
            message[name] = log.text(value, name, at)
            if role != "tool":
                log.count_unused(f"messages[].{name}")
    return message | _unlearned(value, role, at, log)


def read_role(value: Any, name: str, at: str) -> str:
    """Read a role of ROLES, in whatever case it is written.

    Raises:
        RowError: It is none.
    """
    if not isinstance(value, str):
        raise RowError(f"field {name} is {kind(value)}, expected text", at)
    check_text(value, name, at)
    role = ROLES.get(value) or ROLES.get(value.strip().lower())
    if role is None:
        raise RowError(f"unknown role {shown(value)}", at, f"expected one of {', '.join(ROLES)}")
    return role


def _unlearned(value: Mapping[str, Any], role: str, at: str, log: FieldLog) -> Words:
    """{"train": False} if a flag of an assistant's message says so; others carry no loss in any case."""
    masked = False
    for name in _FLAGS:
        flag = value.get(name)
        if missing(flag):
            continue
        flag = flag.strip().lower() if isinstance(flag, str) else flag
        if flag in NO:
            masked = True
        elif flag not in YES:
            hint = f"parts of a loss are not supported: see {param('ignore_fields', [name])}"
            raise RowError(f"a message has {name} {shown(flag)}, expected true or false", at, hint)
        elif role not in ("assistant", _CALL):
            log.count_unused(f"messages[].{name} of {role}")
    return {"train": False} if masked and role in ("assistant", _CALL) else {}


def _joined(parts: list[Any], name: str, at: str, log: FieldLog) -> tuple[str, list[str]]:
    """Content in parts, which stand behind one another as chat templates render them, and the thoughts among them."""
    texts, thoughts = list[str](), list[str]()
    for part in parts:
        if isinstance(part, str):
            texts.append(log.text({name: part}, name, at))
            continue
        what = part.get("type") if isinstance(part, dict) else None
        inside = what if what in ("thinking", "reasoning") else "text"
        if isinstance(part, dict) and inside == "text" and "text" not in part and "value" in part:
            inside = "value"
        if not isinstance(part, dict) or (inside in _WORDS and what not in _TEXTS) or inside not in part:
            found = shown(what) if isinstance(part, dict) else kind(part)
            raise RowError(f"a part of the content is {found}, expected an object of type text", at)
        (texts if inside in _WORDS else thoughts).append(log.text(part, inside, at))
        log.unused_in_message(part, _PART, at)
    return "".join(texts), ["".join(thoughts)] if thoughts else []
