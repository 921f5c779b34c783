"""Trees of messages, as OpenAssistant collected them: every message may have several replies."""

from collections.abc import Iterable, Iterator
from typing import Any

from lit_llama.text.dataset.config import Tree
from lit_llama.text.read.raw import RawRow, RowError, kind, shown

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
