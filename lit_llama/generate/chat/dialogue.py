"""Messages of a conversation as a tree: what is edited, answered again or taken back stays as a branch.

A dialogue is the sum of its records, which are JSON objects in the order in which they came:

    {"type": "dialogue", "format": 1, "id": "...", "name": "...", "time": 1.5}
    {"type": "message", "id": 1, "parent": 0, "role": "user", "content": "...", "time": 1.5}
    {"type": "text", "id": 2, "text": "..."}                      more of an answer
    {"type": "end", "id": 2, "finish_reason": "stop", ...}        an answer is complete, or was stopped
    {"type": "head", "id": 2, "side": 0}                          the message that the next one follows
    {"type": "name", "name": "..."}, {"type": "set", "name": "temperature", "value": 0.2}
    {"type": "train", "id": 2, "train": false}
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant"]
Record = Mapping[str, Any]
FORMAT = 1
ROOT = 0
"""Id of what the first messages follow."""
_PARENTS: Mapping[str, tuple[str, ...]] = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user",),
}
_SAID = ("id", "parent", "role", "content", "time", "model", "opened", "sampling")
_LARGEST = 1 << 53
"""Whole numbers below are exact in every program that reads JSON."""
_ENDS = ("stop", "length", "abort", "error")
_MEASURES = {"tokens": int, "prompt_tokens": int, "cached_tokens": int, "forgotten": int, "seconds": float}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A message of a dialogue.

    Attributes:
        id: Number of the message, from 1.
        parent: The message that it follows; 0 for none.
        role: Who says it.
        content: The text.
        time: When it began, in seconds since 1970.
        model: Name of the model that answered.
        opened: The prompt of an answer ends in the tag that begins thoughts.
        sampling: How the tokens of an answer were drawn.
        finish_reason: How an answer ended: "stop", "length" (cut off), "abort" (stopped by somebody), "error"; None
            while it goes on, or where its process died.
        tokens: Of an answer.
        prompt_tokens: Before it.
        cached_tokens: Of those, how many were not computed again.
        forgotten: Turns of the conversation that did not fit into its prompt.
        seconds: That the answer took.
        train: Whether somebody said that it is to be trained on, or not; None where nobody did.
    """

    id: int
    parent: int
    role: Role
    content: str
    time: float = 0.0
    model: str = ""
    opened: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    forgotten: int = 0
    seconds: float = 0.0
    train: bool | None = None

    @property
    def trained(self) -> bool:
        """Whether it carries loss as a training row: answers that came to an end do, if nobody said otherwise."""
        whole = self.role == "assistant" and self.finish_reason == "stop" and bool(self.content.strip())
        return whole if self.train is None else self.train and self.role == "assistant"

    def message(self) -> dict[str, str]:
        """Return the message as prompt styles take it."""
        return {"role": self.role, "content": self.content}


class Dialogue:
    """A conversation with all its branches.

    Attributes:
        id: Its name on the disk, which never changes.
        name: As people call it.
        time: When it was begun, in seconds since 1970.
        nodes: Messages by their ids, in the order in which they came.
        settings: Fields of `Sampling`, and `model`, where they were set for this conversation.
        heads: The message that the next one follows, on each of two sides; the second is that of a comparison.
    """

    def __init__(self, id: str, name: str = "", time: float = 0.0) -> None:
        self.id, self.name, self.time = id, name, time
        self.nodes: dict[int, Node] = {}
        self.settings: dict[str, Any] = {}
        self.heads = [ROOT, ROOT]
        self._children: dict[int, list[int]] = {ROOT: []}

    def copy(self) -> "Dialogue":
        """Return a copy with the same messages, which goes on apart."""
        other = Dialogue(self.id, self.name, self.time)
        other.nodes, other.settings, other.heads = dict(self.nodes), dict(self.settings), list(self.heads)
        other._children = {id: list(children) for id, children in self._children.items()}
        return other

    @property
    def next_id(self) -> int:
        """Id of the next message."""
        return max(self.nodes, default=ROOT) + 1

    def path(self, leaf: int | None = None, side: int = 0) -> list[Node]:
        """Return the messages from the first one to a message; without one, to the head."""
        at = self.heads[side] if leaf is None else leaf
        found = []
        while at != ROOT:
            found.append(self.nodes[at])
            at = self.nodes[at].parent
        return found[::-1]

    def children(self, id: int) -> list[Node]:
        """Return the messages that follow a message, one on each branch."""
        return [self.nodes[child] for child in self._children[id]]

    def siblings(self, id: int) -> list[Node]:
        """Return the messages in the place of a message, itself among them."""
        return self.children(self.nodes[id].parent)

    def leaf(self, id: int) -> int:
        """Return the last message of the newest branch through a message."""
        while self._children[id]:
            id = self._children[id][-1]
        return id

    def leaves(self) -> list[int]:
        """Return the last messages of all branches."""
        return [id for id in self.nodes if not self._children[id]]

    def apply(self, record: Record) -> None:
        """Go on by a record; nothing changes if it is wrong.

        Raises:
            ValueError: It is no record, or does not fit; the message says which field is wrong.
        """
        kind = record.get("type")
        if not isinstance(kind, str) or kind not in _APPLY:
            raise ValueError(f"type is {kind!r}, expected one of {', '.join(_APPLY)}")
        _APPLY[kind](self, record)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the fewest records that make this dialogue."""
        yield {"type": "dialogue", "format": FORMAT, "id": self.id, "name": self.name, "time": self.time}
        for name, value in self.settings.items():
            yield {"type": "set", "name": name, "value": value}
        for node in self.nodes.values():
            values = asdict(node)
            said = {key: values.pop(key) for key in _SAID}
            yield {"type": "message"} | {key: value for key, value in said.items() if value or key == "parent"}
            train = values.pop("train")
            if values["finish_reason"] is not None:
                yield {"type": "end", "id": node.id} | values
            if train is not None:
                yield {"type": "train", "id": node.id, "train": train}
        if self.nodes:
            yield from ({"type": "head", "id": head, "side": side} for side, head in enumerate(self.heads))

    # ---- records

    def _begin(self, record: Record) -> None:
        if _value(record, "format", int) != FORMAT:
            raise ValueError(f"format is {record['format']}, expected {FORMAT}")
        self.name, self.time = _value(record, "name", str), _value(record, "time", float)

    def _message(self, record: Record) -> None:
        id, parent = _value(record, "id", int), _value(record, "parent", int)
        role = _value(record, "role", str)
        if role not in get_args(Role):
            raise ValueError(f"role is {role!r:.80}, expected one of {', '.join(get_args(Role))}")
        if not 0 < id < _LARGEST or id in self.nodes:
            raise ValueError(f"id is {id!r:.80}, expected a new one from 1 on")
        if parent != ROOT and parent not in self.nodes:
            raise ValueError(f"parent is {parent!r:.80}, expected the id of a message before it, or 0")
        before = self.nodes[parent].role if parent else ""
        if before not in _PARENTS[role]:
            raise ValueError(f"role is {role!r} behind {before or 'nothing'!r}, where it cannot stand")
        node = Node(
            id=id,
            parent=parent,
            role=role,
            content=_value(record, "content", str, ""),
            time=_value(record, "time", float, 0.0),
            model=_value(record, "model", str, ""),
            opened=_value(record, "opened", bool, False),
            sampling=_value(record, "sampling", dict, {}),
        )
        self.nodes[id] = node
        self._children[id] = []
        self._children[parent].append(id)
        side = _side(record)
        self.heads[side] = id
        if self.heads[1 - side] == parent and role != "assistant":
            self.heads[1 - side] = id

    def _text(self, record: Record) -> None:
        node = self._node(record)
        self.nodes[node.id] = replace(node, content=node.content + _value(record, "text", str))

    def _end(self, record: Record) -> None:
        node = self._node(record)
        reason = _value(record, "finish_reason", str)
        if reason not in _ENDS:
            raise ValueError(f"finish_reason is {reason!r}, expected one of {', '.join(_ENDS)}")
        measures = {name: _value(record, name, kind, kind()) for name, kind in _MEASURES.items()}
        self.nodes[node.id] = replace(node, finish_reason=reason, **measures)

    def _head(self, record: Record) -> None:
        id = _value(record, "id", int)
        if id != ROOT:
            self._node(record)
        self.heads[_side(record)] = id

    def _rename(self, record: Record) -> None:
        self.name = _value(record, "name", str)

    def _set(self, record: Record) -> None:
        name, value = _value(record, "name", str), record.get("value")
        if value is None:
            self.settings.pop(name, None)
        else:
            self.settings[name] = value

    def _train(self, record: Record) -> None:
        node = self._node(record)
        self.nodes[node.id] = replace(node, train=_value(record, "train", bool))

    def _node(self, record: Record) -> Node:
        id = _value(record, "id", int)
        if id not in self.nodes:
            raise ValueError(f"id is {id!r:.80}, expected that of a message before it")
        return self.nodes[id]


def fitting_parent(dialogue: Dialogue, record: Record) -> int:
    """Return the latest message that a message can follow whose own parent is lost."""
    allowed = _PARENTS.get(str(record.get("role")), ())
    id = record.get("id")
    before = [n.id for n in dialogue.nodes.values() if n.role in allowed and isinstance(id, int) and n.id < id]
    return max(before, default=ROOT)


def _side(record: Record) -> int:
    side = _value(record, "side", int, 0)
    if side not in (0, 1):
        raise ValueError(f"side is {side}, expected 0 or 1")
    return side


def _value(record: Record, name: str, kind: type, default: Any = None) -> Any:
    value = record.get(name, default)
    if kind is float and type(value) is int and abs(value) < _LARGEST:  # Python refuses to convert larger ones
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} is {value!r:.80}, expected {_KINDS[kind]}")
    return value


_KINDS = {int: "an integer", float: "a number", str: "text", dict: "an object", bool: "true or false"}
_APPLY = {
    "dialogue": Dialogue._begin,
    "message": Dialogue._message,
    "text": Dialogue._text,
    "end": Dialogue._end,
    "head": Dialogue._head,
    "name": Dialogue._rename,
    "set": Dialogue._set,
    "train": Dialogue._train,
}
