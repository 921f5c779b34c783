"""Chats in the forms of data sets of their own: Glaive's function calling, and OpenAssistant's trees.

Glaive's is one text with USER and ASSISTANT, and functions in the system text. A system text that introduces functions
becomes the functions and what it says before them; calls, which have their arguments as JSON text between single
quotes, become calls as every other form has them. In a tree of messages, every message may have several replies.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lit_llama.text.config import Tree
from lit_llama.text.read.raw import STRICTEST, RawRow, RowError, kind, shown
from lit_llama.text.read.schemas.messages import Turns, Words, read_calls, read_tools

GLAIVE = re.compile(r"\s*USER: ")
"""Begins such a chat."""
_TURN = re.compile(r"(?:\A|\n\s*\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ?")
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_END, _CALL = "<|endoftext|>", "<functioncall>"
_SYSTEM = re.compile(r"\A\s*SYSTEM: ?")
_OFFER = re.compile(r"(?P<who>.*?),? with access to the following functions\b[^{]*(?=\{)", re.DOTALL)
_CALLED = re.compile(
    r'\{\s*"name"\s*:\s*"(?P<name>[^"]*)"\s*(?:,\s*"arguments"\s*:\s*(?P<arguments>.*?)\s*)?\}\Z', re.DOTALL
)


def glaive_turns(system: str, chat: str) -> Turns:
    """Read the messages and tools of a row.

    Raises:
        RowError: A function or a call is none.
    """
    turns = _system(_SYSTEM.sub("", system).strip())
    parts = _TURN.split(chat)
    for index, (who, said) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        text = said.strip().removesuffix(_END).strip()
        turns.messages.append(_message(_ROLES[who], text, f"chat[{index}]"))
    return turns


def _system(text: str) -> Turns:
    """The system message, and the functions behind it."""
    if not (offer := _OFFER.match(text)):
        return Turns([{"role": "system", "content": text}] if text else [])
    tools: list[Any] = []
    position = offer.end()
    while position < len(text):
        try:
            found, position = STRICTEST.raw_decode(text, position)
        except ValueError as error:
            raise RowError("field system holds a function that is not JSON", hint=str(error)) from error
        tools += read_tools(found, "system")
        position += len(text[position:]) - len(text[position:].lstrip(" \n\r\t,"))
    return Turns([{"role": "system", "content": offer["who"].strip() + "."}], tools)


def _message(role: str, text: str, at: str) -> Words:
    """A message; an answer with a call in it has what stands before that as its content."""
    before, mark, behind = text.partition(_CALL)
    if role != "assistant" or not mark:
        return {"role": role, "content": text}
    behind = behind.strip().removesuffix(_END).strip()
    if not (called := _CALLED.match(behind)):
        raise RowError("a call is no object with a name and arguments", at, f"found {behind[:60]!r}")
    arguments = called["arguments"] or "{}"
    if len(arguments) > 1 and arguments[0] == arguments[-1] == "'":
        arguments = arguments[1:-1].replace("\\'", "'")
    call = {"name": called["name"], "arguments": arguments}
    return {"role": role, "content": before.strip(), "tool_calls": read_calls(call, "chat", at)}


Node = dict[str, Any]
_FLAT = ("message_id", "role", "text")  # and parent_id, which the first message of a tree may lack


def branches(root: Node, tree: Tree) -> Iterator[list[Node]]:
    """Yield the conversations of a tree: of the best replies (rank 0, else the first), or one for each last answer.

    Replies marked as deleted are left out, and so are users' replies without an answer, except where a branch ends in
    one.

    Raises:
        RowError: A message is none.
    """
    if root.get("deleted"):
        raise RowError("the first message is marked as deleted", unusable=True)
    branch: list[Node] = []
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        del branch[depth:]
        branch.append(node)
        replies = _replies(node)
        if not replies:
            yield list(branch)
        elif tree == "best":
            waiting.append((min(replies, key=_rank), depth + 1))
        else:
            waiting.extend((reply, depth + 1) for reply in reversed(replies))


def _rank(node: Node) -> float:
    rank = node.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")


def _replies(node: Node) -> list[Node]:
    found, replies = [], node.get("replies") or []
    if not isinstance(replies, list):
        raise RowError(f"replies are {kind(replies)}, expected a list", "prompt")
    for reply in replies:
        if not isinstance(reply, dict):
            raise RowError(f"a reply is {kind(reply)}, expected an object", "prompt")
        if not reply.get("deleted"):
            found.append(reply)
    return [reply for reply in found if reply.get("role") != "prompter" or reply.get("replies")] or found[:1]


def join_messages(rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """Put messages that stand in a row each into one row a tree; other rows pass as they are.

    The messages of a tree follow one another, each behind the one that it answers, as OpenAssistant published them.
    """
    root: RawRow | None = None
    known: dict[str, Node] = {}
    for raw in rows:
        row = raw.value
        if row is None or not all(key in row for key in _FLAT):
            if root:
                yield root
            root, known = None, {}
            yield raw
            continue
        node, identity, parent = {**row, "replies": []}, str(row["message_id"]), row.get("parent_id")
        if parent is None:
            if root:
                yield root
            root, known = RawRow(raw.where, {"prompt": node}), {}
        elif str(parent) not in known:
            yield RawRow.bad(
                raw.where, "its parent_id names no message before it in the same tree", f": {shown(parent)}"
            )
            continue
        elif identity in known:
            yield RawRow.bad(raw.where, "its message_id stands twice in the same tree", f": {shown(identity)}")
            continue
        else:
            known[str(parent)]["replies"].append(node)
        known[identity] = node
    if root:
        yield root
