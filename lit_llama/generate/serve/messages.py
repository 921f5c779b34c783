"""Messages and tools of a request -> the words of prompt styles, and the form that its answer has to have."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lit_llama.generate.serve.fields import Fields, check_text, kind, refusal

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MOST = 10_000
_TOOLS = 128


def read_messages(value: list[Any] | None, param: str = "messages") -> list[dict[str, Any]]:
    """Read messages as prompt styles take them; the last one is not the assistant's, who is to answer.

    Raises:
        ApiError: A message is none, or has a role or a field that is unknown.
    """
    if not value:
        raise refusal(param, "is empty, expected at least one message")
    if len(value) > _MOST:
        raise refusal(param, f"holds {len(value)} messages, expected at most {_MOST}")
    messages = [_message(message, f"{param}[{index}]") for index, message in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise refusal(
            f"{param}[{len(value) - 1}]",
            "is of the assistant, expected a message that is to be answered; to continue a text use /v1/completions",
        )
    return messages


def _message(value: Any, at: str) -> dict[str, Any]:
    fields = Fields(value, at)
    given = fields.text("role")
    if given is None:
        raise refusal(fields.name("role"), "is missing")
    if given not in _ROLES:
        raise refusal(fields.name("role"), f"is {given[:40]!r}, expected one of {', '.join(_ROLES)}")
    role = _ROLES[given]
    message: dict[str, Any] = {"role": role}
    content = _content(fields.any("content"), fields.name("content"))
    if role == "assistant":
        if calls := fields.list("tool_calls"):
            message["tool_calls"] = [_call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(calls)]
        if thoughts := fields.text("reasoning_content"):
            message["reasoning_content"] = thoughts
        fields.only("refusal", "", why="answers are texts")
        fields.only("annotations", [], why="answers are texts")
        fields.only("audio", why="answers are texts")
        fields.only("function_call", why="use tool_calls")
    if role == "tool":
        if call := fields.text("tool_call_id"):
            message["tool_call_id"] = call
        if name := fields.text("name"):
            message["name"] = name
    if content is None and "tool_calls" not in message:
        raise refusal(fields.name("content"), "is missing, expected text or a list of text parts")
    fields.end()
    return message | {"content": content or ""}


def _content(value: Any, at: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return check_text(value, at)
    if not isinstance(value, list):
        raise refusal(at, f"is {kind(value)}, expected text or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        fields = Fields(part, f"{at}[{index}]")
        if (what := fields.text("type")) != "text":
            raise refusal(fields.name("type"), f"is {str(what)[:40]!r}, expected 'text': this model reads text only")
        texts.append(fields.text("text") or "")
        fields.end()
    return "".join(texts)


def _call(value: Any, at: str) -> dict[str, Any]:
    fields = Fields(value, at)
    fields.only("type", "function", why="calls are of functions")
    fields.whole("index", 0, _TOOLS)
    call: dict[str, Any] = {"type": "function"}
    if id := fields.text("id"):
        call["id"] = id
    function = fields.inner("function")
    if function is None:
        raise refusal(fields.name("function"), "is missing")
    name, arguments = _name(function), function.any("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise refusal(function.name("arguments"), f"is text that is not JSON: {str(error)[:100]}") from error
    if not isinstance(arguments, dict):
        raise refusal(function.name("arguments"), f"is {kind(arguments)}, expected the JSON text of an object")
    function.end()
    fields.end()
    return call | {"function": {"name": name, "arguments": arguments}}


def _name(fields: Fields) -> str:
    name = fields.text("name")
    if name is None or not _NAME.fullmatch(name):
        raise refusal(fields.name("name"), f"is {str(name)[:70]!r}, expected 1 to 64 letters, digits, _ or -")
    return name


def read_tools(value: list[Any] | None) -> list[dict[str, Any]]:
    """Read functions that may be called, as chat templates take them.

    Raises:
        ApiError: One is no function, or two have one name.
    """
    if value is not None and not 0 < len(value) <= _TOOLS:
        raise refusal("tools", f"holds {len(value)} functions, expected 1 to {_TOOLS}")
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(value or [])]
    names = [tool["function"]["name"] for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise refusal(f"tools[{index}].function.name", f"is {name!r}, as that of another function")
    return tools


def _tool(value: Any, at: str) -> dict[str, Any]:
    fields = Fields(value, at)
    if (what := fields.text("type")) != "function":
        raise refusal(fields.name("type"), f"is {str(what)[:40]!r}, expected 'function'")
    inner = fields.inner("function")
    if inner is None:
        raise refusal(fields.name("function"), "is missing")
    function: dict[str, Any] = {"name": _name(inner)}
    if description := inner.text("description"):
        function["description"] = description
    none = {"type": "object", "properties": {}, "additionalProperties": False}
    parameters = inner.object("parameters")
    function["parameters"] = none if parameters is None else parameters
    inner.flag("strict")  # calls keep to their schemas in any case
    inner.end()
    fields.end()
    return {"type": "function", "function": function}


def read_tool_choice(value: Any, tools: list[dict[str, Any]]) -> str | Mapping[str, Any]:
    """Read which function is called: "none", "auto", "required", or the one that is.

    Raises:
        ApiError: It is none of the tools.
    """
    if value is None:
        return "auto" if tools else "none"
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise refusal("tool_choice", f"is {value[:40]!r}, expected none, auto, required or a function")
        if value == "required" and not tools:
            raise refusal("tool_choice", "is 'required', but there are no tools")
        return value if tools else "none"
    fields = Fields(value, "tool_choice")
    if (what := fields.text("type")) != "function":
        raise refusal("tool_choice.type", f"is {str(what)[:40]!r}, expected 'function'")
    function = fields.inner("function")
    name = function.text("name") if function else None
    fields.end()
    if function:
        function.end()
    chosen = next((tool for tool in tools if tool["function"]["name"] == name), None)
    if chosen is None:
        raise refusal("tool_choice.function.name", f"is {str(name)[:70]!r}, which is none of the tools")
    return chosen


def response_schema(fields: Fields | None) -> Mapping[str, Any] | None:
    """Return the schema that an answer has to keep to; None for any text."""
    if fields is None:
        return None
    what = fields.choice("type", ("text", "json_object", "json_schema"), "text")
    inner = fields.inner("json_schema") if what == "json_schema" else None
    fields.end()
    if what != "json_schema":
        return {"type": "object"} if what == "json_object" else None
    if inner is None:
        raise refusal("response_format.json_schema", "is missing")
    inner.ignore("name", "description")
    inner.flag("strict")  # answers keep to their schemas in any case
    schema = inner.object("schema")
    if schema is None:
        raise refusal(inner.name("schema"), "is missing")
    inner.end()
    return schema
