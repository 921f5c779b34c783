"""Raw rows -> messages. Each row is recognised by its own fields, so one file may hold several kinds of rows.

A row that has the fields of several schemas is taken for the first of them in SCHEMAS.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lit_llama.text.message import Message
from lit_llama.text.read.raw import RowError, kind, listed, missing
from lit_llama.text.read.schemas.fields import (
    INPUTS,
    METADATA,
    SYSTEM,
    THOUGHTS,
    TOOLS,
    FieldLog,
    Row,
    says_nothing,
    suggest,
)
from lit_llama.text.read.schemas.messages import (
    OASST_FIELDS,
    Turns,
    as_list,
    check_calls,
    in_a_field,
    read_message,
    read_messages,
    read_role,
    read_tools,
    repeats,
)
from lit_llama.text.read.schemas.published import GLAIVE, Node, branches, glaive_turns
from lit_llama.wording import call, param

_AFTER: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),  # no second user message: nobody can tell whether the first one was ever answered
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
BESIDE_CHATS = (*SYSTEM, *TOOLS)
_BESIDE_PAIRS = (*BESIDE_CHATS, *INPUTS, *THOUGHTS, "history")


@dataclass(frozen=True)
class Schema:
    """A kind of row.

    Args:
        name: What the summary and the messages call it.
        keys: Fields that every row of this kind has.
        read: Makes lists of messages of a row.
        beside: Fields that a row of this kind may have, and that are used.
        words: What its messages are called when they are empty, by role.
        fits: A test besides the fields.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row, FieldLog], Iterable[Turns]]
    beside: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    fits: Callable[[Row], bool] = lambda row: True

    @property
    def is_text(self) -> bool:
        """Whether there is no prompt."""
        return self.keys == ("text",)

    def turns(self, row: Row, log: FieldLog) -> list[Turns]:
        """Read the conversations of a row, several for the branches of a tree. Every field is accounted for.

        Raises:
            RowError: A field is not what it has to be, or holds something for the model that has no place.
        """
        found = list(self.read(row, log))
        if rest := _rest(tuple(row), (*self.keys, *self.beside), self.is_text):
            messages = [message for turns in found for message in turns.messages]
            contents = [message[key] for message in messages for key in ("content", "input") if message.get(key)]
            log.unused_in_row(row, rest, self.name, contents, self.is_text)
        return found


@lru_cache(maxsize=64)  # nearly all rows of a file have the same fields
def _rest(names: tuple[str, ...], used: tuple[str, ...], text: bool) -> list[str]:
    """Fields of a row that its schema does not use, and that may say something."""
    return [name for name in names if name not in used and not says_nothing(name, METADATA if not text else set())]


def recognise(row: Row) -> Schema:
    """Find the schema of a row; fields that are all null count only where nothing else fits.

    Raises:
        RowError: None fits; the message says what would.
    """
    fitting = [schema for schema in _with_keys(tuple(row)) if schema.fits(row)]
    for schema in fitting:
        if any(not missing(row[key]) for key in schema.keys):
            return schema
    if fitting:
        return fitting[0]
    accepted = ", ".join(f"{' + '.join(schema.keys)} ({schema.name})" for schema in SCHEMAS)
    raise RowError(f"no schema fits the fields {listed(list(row))}", hint=f"accepted are {accepted}{_way_out(row)}")


def _way_out(row: Row) -> str:
    """What to do about a row that fits no schema, as an end of the message; "" if nobody knows."""
    if {"chosen", "rejected"} <= row.keys():
        return (
            f"; these are preferences, which {call('prepare')} reads with {param('data_kind', 'preference')} or "
            f"{param('data_kind', 'sft-chosen')}"
        )
    for name, value in row.items():
        if in_a_field(value):
            field = listed([name])
            return f"; the field {field} holds messages: try {param('fields', {'messages': field})}"
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return "; this is one message: a row has to hold all messages of a conversation, as a list"
    if way := _suggested(row):
        return way
    for name, value in row.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            return f"; the field {listed([name])} is a list of objects: if they are the rows, save that list alone"
    return ""


def suggest_prompt(row: Row) -> str:
    """Find the `fields` that give the answers of a row a prompt, as the end of a message; "" if nobody knows."""
    keys = ("instruction", "output")
    return suggest({**row, "output": "."}, [keys], {keys: _BESIDE_PAIRS})


def _suggested(row: Row) -> str:
    required = [schema.keys for schema in SCHEMAS if schema is not OASST and schema.name != "Glaive"]
    return suggest(row, required, {schema.keys: schema.beside for schema in SCHEMAS})


@lru_cache(maxsize=64)
def _with_keys(names: tuple[str, ...]) -> list[Schema]:
    return [schema for schema in SCHEMAS if set(schema.keys) <= set(names)]


def complete(messages: Sequence[Message], schema: Schema) -> tuple[tuple[Message, ...], int]:
    """Put a conversation in order, up to its last answer that carries loss.

    Returns:
        Its messages, and how many were left off behind the last answer of all.

    Raises:
        RowError: The order is none, or there is nothing to learn.
    """
    before = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in _AFTER[before] and not schema.is_text:
            if role == "assistant" and index and "tool_calls" in messages[index - 1]:
                break  # check_calls names it
            wanted = " or ".join(_AFTER[before])
            place = f"behind {before}" if before else "at the beginning"
            raise RowError(f"found role {role} {place}, expected {wanted}", f"message {index}")
        before = role
    check_calls(messages)
    answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answered:
        raise RowError("no answer" if messages else "no messages", unusable=True)
    learned = [index for index in answered if messages[index].get("train", True)]
    if not learned:
        raise RowError("no answer is marked to be trained on", unusable=True)
    end = learned[-1] + 1
    for index, message in enumerate(messages[:end]):
        role = message["role"]
        if role in ("user", "assistant") and not message["content"].strip() and "tool_calls" not in message:
            raise RowError(f"empty {schema.words.get(role, f'{role} message')}", f"message {index}", unusable=True)
    return tuple(messages[:end]), len(messages) - 1 - answered[-1]


def _pair(user: str, answer: str) -> Callable[[Row, FieldLog], Iterator[Turns]]:
    """Turns of a row with a field for each: the instruction, its input (which may be missing), the answer."""

    def read(row: Row, log: FieldLog) -> Iterator[Turns]:
        turns = beside(row, log)
        turns.messages += _history(row, log)
        given = _one_of(row, INPUTS, log)
        asked = {"role": "user", "content": "" if given and missing(row[user]) else log.text(row, user)}
        if given and asked["content"].strip():
            asked["input"] = given
        elif given:
            asked["content"] = given
        turns.messages += [asked, _answer(row, answer, log)]
        yield turns

    return read


def _answer(row: Row, name: str, log: FieldLog) -> dict[str, Any]:
    answer = {"role": "assistant", "content": log.text(row, name)}
    if thoughts := _one_of(row, THOUGHTS, log):
        answer["reasoning_content"] = thoughts
    return answer


def _chat(name: str) -> Callable[[Row, FieldLog], Iterator[Turns]]:
    """Turns of a row with a list of messages."""

    def read(row: Row, log: FieldLog) -> Iterator[Turns]:
        yield joined(beside(row, log), read_messages(row, name, log))

    return read


def _prompt_completion(row: Row, log: FieldLog) -> Iterator[Turns]:
    """Two texts, or two lists of messages, as TRL has them."""
    lists = [name for name in ("prompt", "completion") if not _is_text(row[name])]
    if not lists:
        yield from _pair("prompt", "completion")(row, log)
        return
    for name in (*INPUTS, *THOUGHTS, "history"):
        if not missing(row.get(name)) and row[name] not in ("", []):
            raise RowError(
                f"field {name} has no place beside a list of messages", hint=f"see {param('ignore_fields', [name])}"
            )
    turns = beside(row, log)
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if name in lists:
            turns = joined(turns, read_messages(row, name, log))
        else:
            turns.messages.append({"role": role, "content": log.text(row, name)})
    yield turns


def _is_text(value: Any) -> bool:
    return as_list(value) is None if not isinstance(value, str) else not in_a_field(value)


def _tree(row: Row, log: FieldLog) -> Iterator[Turns]:
    for branch in branches(row["prompt"], log.tree):
        yield Turns([_node(node, log) for node in branch])


def _node(node: Node, log: FieldLog) -> dict[str, Any]:
    """A message of a tree."""
    at = "prompt and replies"
    for name in ("role", "text"):
        if name not in node:
            raise RowError(f"a message has no {name}", at, f"found {listed(list(node))}; expected role and text")
    log.unused_in_message(node, OASST_FIELDS, at)
    return read_message(node, read_role(node["role"], "role", at), "text", at, log)


def _glaive(row: Row, log: FieldLog) -> Iterator[Turns]:
    """Turns of a chat that is written as one text."""
    system = "" if missing(row.get("system")) else log.text(row, "system")
    yield glaive_turns(system, log.text(row, "chat"))


def _text(row: Row, log: FieldLog) -> Iterator[Turns]:
    yield Turns([{"role": "assistant", "content": log.text(row, "text")}])


def beside(row: Row, log: FieldLog) -> Turns:
    """Read the system message and the tools that stand beside the messages of a row."""
    turns = Turns()
    if system := _one_of(row, SYSTEM, log):
        turns.messages.append({"role": "system", "content": system})
    if tools := [name for name in TOOLS if not missing(row.get(name)) and row[name]]:
        turns.tools += read_tools(row[tools[0]], tools[0])
    return turns


def joined(around: Turns, chat: Turns) -> Turns:
    """Join a chat to what stands beside it; a system message that stands in both comes once."""
    messages = around.messages
    if messages and chat.messages[:1] and messages[-1] == chat.messages[0]:
        messages = messages[:-1]
    if around.tools and chat.tools and around.tools != chat.tools:
        raise RowError("tools stand beside the messages and in one of them, and differ", "tools")
    messages = messages + chat.messages
    tools = around.tools or chat.tools
    told = tools and messages and messages[0]["role"] == "system" and repeats(tools, messages[0]["content"])
    if told and not any("tool_calls" in message for message in messages):
        tools = []  # a copy of what the system message says; the calls are text, too
    return Turns(messages, tools)


def _one_of(row: Row, names: Sequence[str], log: FieldLog) -> str:
    """The text of the one of some fields that has one, "" if none has."""
    if row.keys().isdisjoint(names):
        return ""
    there = [name for name in names if not missing(row.get(name)) and row[name] != ""]
    texts = [log.text(row, name) for name in there]
    if len(set(texts)) > 1:
        hint = f"join them, or leave one out with {param('ignore_fields', [there[-1]])}"
        raise RowError(f"the fields {listed(there)} are for one place, and differ", hint=hint)
    return texts[0] if texts else ""


def _history(row: Row, log: FieldLog) -> list[dict[str, Any]]:
    """Questions and answers before the instruction, as LLaMA-Factory has them."""
    value = row.get("history")
    if missing(value) or not value:
        return []
    if isinstance(value, str):
        value = as_list(value)
    messages = []
    for index, entry in enumerate(value if isinstance(value, list) else [None]):
        at = f"history[{index}]"
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise RowError(f"field history holds {kind(entry)}, expected pairs of a question and its answer", at)
        for role, text in zip(("user", "assistant"), entry, strict=True):
            messages.append({"role": role, "content": log.text({"history": text}, "history", at)})
    return messages


OASST = Schema("OASST", ("prompt",), _tree, fits=lambda row: isinstance(row["prompt"], dict))
SCHEMAS = (
    Schema("OpenAI messages", ("messages",), _chat("messages"), BESIDE_CHATS),
    Schema("ShareGPT", ("conversations",), _chat("conversations"), BESIDE_CHATS),
    OASST,
    Schema(
        "prompt and completion",
        ("prompt", "completion"),
        _prompt_completion,
        _BESIDE_PAIRS,
        {"user": "prompt", "assistant": "completion"},
    ),
    Schema(
        "Alpaca",
        ("instruction", "output"),
        _pair("instruction", "output"),
        _BESIDE_PAIRS,
        {"user": "instruction", "assistant": "output"},
    ),
    Schema(
        "Dolly",
        ("instruction", "response"),
        _pair("instruction", "response"),
        _BESIDE_PAIRS,
        {"user": "instruction", "assistant": "response"},
    ),
    Schema("Glaive", ("chat",), _glaive, ("system",), fits=lambda row: GLAIVE.match(str(row["chat"])) is not None),
    Schema("plain text", ("text",), _text, words={"assistant": "text"}),
)
JUDGED_FIELDS = ("chosen", "rejected", "label", "completions", "ratings")
"""Of rows of preferences; see preferences.py."""
FIELDS = (
    *dict.fromkeys(key for schema in SCHEMAS for key in schema.keys),
    *("input", "context", "system", "reasoning_content", "tools", "history"),
    *JUDGED_FIELDS,
)
"""What `fields` can give a name to."""
