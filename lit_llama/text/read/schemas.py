"""Raw rows -> messages. Each row is recognised by its own fields, so one file may hold several kinds of rows.

A row that has the fields of several schemas is taken for the first of them in SCHEMAS.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lit_llama.text.conversation import Message
from lit_llama.text.read.oasst import Tree, branches
from lit_llama.text.read.raw import RowError, kind, listed, shown, text_of
from lit_llama.text.read.suggest import suggest

Row = Mapping[str, Any]

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
}
_AFTER: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),  # no second user message: nobody can tell whether the first one was ever answered
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# What prompt styles do not render. Without it we would train on something else than the row says.
_REFUSED_IN_MESSAGES = ("tool_calls", "function_call")
_REFUSED_IN_ROWS = {"tools", "functions", "history", "image", "images", "videos", "audios"}


@dataclass(frozen=True)
class Schema:
    """A kind of row.

    Args:
        name: What the summary and the messages call it.
        keys: Fields that every row of this kind has.
        turns: Makes lists of messages of a row.
        words: What its messages are called when they are empty, by role.
        fits: A test besides the fields.
    """

    name: str
    keys: tuple[str, ...]
    turns: Callable[[Row, Tree], Iterable[list[Message]]]
    words: Mapping[str, str] = field(default_factory=dict)
    fits: Callable[[Row], bool] = lambda row: True

    @property
    def is_text(self) -> bool:
        """Whether there is no prompt."""
        return self.keys == ("text",)


def recognise(row: Row) -> Schema:
    """The schema of a row; fields that are all null count only where nothing else fits.

    Raises:
        RowError: None fits; the message says what would.
    """
    fitting = [schema for schema in _with_keys(tuple(row)) if schema.fits(row)]
    for schema in fitting:
        if any(row[key] is not None for key in schema.keys):
            return schema
    if fitting:
        return fitting[0]
    accepted = ", ".join(f"{' + '.join(schema.keys)} ({schema.name})" for schema in SCHEMAS)
    way_out = suggest(list(row), [schema.keys for schema in SCHEMAS if schema is not OASST])
    inside = next((name for name, value in row.items() if _holds_rows(value)), None)
    if inside is not None:
        way_out = f"; the field {listed([inside])} is a list of objects: if they are the rows, save that list alone"
    raise RowError(f"no schema fits the fields {listed(list(row))}", hint=f"accepted are {accepted}{way_out}")


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


@lru_cache(maxsize=64)  # nearly all rows of a file have the same fields
def _with_keys(names: tuple[str, ...]) -> list[Schema]:
    return [schema for schema in SCHEMAS if set(schema.keys) <= set(names)]


def complete(messages: Sequence[Message], schema: Schema) -> tuple[tuple[Message, ...], int]:
    """A conversation in order, up to its last answer, and how many messages behind that were left off.

    Raises:
        RowError: The order is none, or there is nothing to learn.
    """
    before = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in _AFTER[before] and not schema.is_text:
            wanted = " or ".join(_AFTER[before])
            place = f"behind {before}" if before else "at the beginning"
            raise RowError(f"found role {role} {place}, expected {wanted}", f"message {index}")
        before = role
    end = len(messages)
    while end and messages[end - 1]["role"] != "assistant":
        end -= 1
    if not end:
        raise RowError("no answer" if messages else "no messages", unusable=True)
    for index, message in enumerate(messages[:end]):
        role = message["role"]
        if role in ("user", "assistant") and not message["content"].strip():
            raise RowError(f"empty {schema.words.get(role, f'{role} message')}", f"message {index}", unusable=True)
    return tuple(messages[:end]), len(messages) - end


def _pair(user: str, given: str, answer: str) -> Callable[[Row, Tree], Iterator[list[Message]]]:
    """Turns of a row with a field for each: the instruction, its input (which may be missing or null), the answer."""

    def turns(row: Row, _: Tree) -> Iterator[list[Message]]:
        asked = {"role": "user", "content": text_of(row, user)}
        if row.get(given) is not None and (extra := text_of(row, given)):
            asked["input"] = extra
        yield [*_system(row), asked, {"role": "assistant", "content": text_of(row, answer)}]

    return turns


def _chat(name: str) -> Callable[[Row, Tree], Iterator[list[Message]]]:
    """Turns of a row with a list of messages."""

    def turns(row: Row, _: Tree) -> Iterator[list[Message]]:
        yield [*_system(row), *_messages(row, name)]

    return turns


def _prompt_completion(row: Row, _: Tree) -> Iterator[list[Message]]:
    """Two texts, or two lists of messages, as TRL has them."""
    turns = _system(row)
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[name], list):
            turns += _messages(row, name)
        else:
            turns.append({"role": role, "content": text_of(row, name)})
    yield turns


def _tree(row: Row, tree: Tree) -> Iterator[list[Message]]:
    for branch in branches(row["prompt"], tree):
        yield [_message(message, "prompt and replies", "text") for message in branch]


def _text(row: Row, _: Tree) -> Iterator[list[Message]]:
    yield [{"role": "assistant", "content": text_of(row, "text")}]


def _system(row: Row) -> list[Message]:
    """The message of a field `system`, if there is one."""
    for name in sorted(_REFUSED_IN_ROWS & row.keys()):
        if row[name] and row[name] != "[]":
            raise RowError(f"field {name} cannot be rendered", hint="leave such rows out")
    return [{"role": "system", "content": text_of(row, "system")}] if row.get("system") else []


def _messages(row: Row, name: str) -> list[Message]:
    if not isinstance(row[name], list):
        raise RowError(f"field {name} is {kind(row[name])}, expected a list of messages")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(row[name])]


def _message(message: Any, at: str, content: str = "content") -> Message:
    """A message in OpenAI's words (role, content) or in ShareGPT's (from, value)."""
    if not isinstance(message, dict):
        raise RowError(f"a message is {kind(message)}, expected an object", at)
    for name in _REFUSED_IN_MESSAGES:
        if message.get(name):
            raise RowError(f"a message has {name}, which cannot be rendered", at, "leave such rows out")
    if message.get("weight") not in (None, 1):  # OpenAI's way to say: do not train on this answer
        raise RowError(f"a message has the weight {shown(message['weight'])}, expected 1", at)
    names = ("from", "value") if message.get("role") is None and message.get("from") is not None else ("role", content)
    for name in names:
        if name not in message:
            hint = f"found {listed(list(message))}; expected role and {content}, or from and value"
            raise RowError(f"a message has no {name}", at, hint)
    role = _ROLES.get(text_of(message, names[0], at))
    if role is None:
        raise RowError(f"unknown role {shown(message[names[0]])}", at, f"expected one of {', '.join(_ROLES)}")
    value = message[names[1]]
    return {"role": role, "content": _joined(value, at) if isinstance(value, list) else text_of(message, names[1], at)}


def _joined(parts: list[Any], at: str) -> str:
    """Content in parts, which stand behind one another as chat templates render them."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
            what = shown(part.get("type")) if isinstance(part, dict) else kind(part)
            raise RowError(f"a part of the content is {what}, expected an object of type text", at)
    return "".join(text_of(part, "text", at) for part in parts)


OASST = Schema("OASST", ("prompt",), _tree, fits=lambda row: isinstance(row["prompt"], dict))
SCHEMAS = (
    Schema("OpenAI messages", ("messages",), _chat("messages")),
    Schema("ShareGPT", ("conversations",), _chat("conversations")),
    OASST,
    Schema(
        "prompt and completion",
        ("prompt", "completion"),
        _prompt_completion,
        {"user": "prompt", "assistant": "completion"},
    ),
    Schema(
        "Alpaca",
        ("instruction", "output"),
        _pair("instruction", "input", "output"),
        {"user": "instruction", "assistant": "output"},
    ),
    Schema(
        "Dolly",
        ("instruction", "response"),
        _pair("instruction", "context", "response"),
        {"user": "instruction", "assistant": "response"},
    ),
    Schema("plain text", ("text",), _text, {"assistant": "text"}),
)
FIELDS = (*dict.fromkeys(key for schema in SCHEMAS for key in schema.keys), "input", "context", "system")
"""What --fields can give a name to."""
