"""Trees of messages: the best branch, every branch, and trees whose messages stand in a row each."""

from typing import Any

import pytest

from lit_llama.text.read.raw import RawRow, RowError
from lit_llama.text.read.schemas.published import branches, join_messages


def node(text: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A message and its replies."""
    return {"text": text, "role": role, "replies": list(replies), **more}


TREE = node(
    "q", "prompter",
    node("worse", "assistant", node("q2", "prompter", node("a2", "assistant")), rank=1),
    node("best", "assistant",
         node("unanswered", "prompter"),
         node("q3", "prompter", node("a3", "assistant", rank=None), node("a4", "assistant", rank=None)),
         node("unanswered too", "prompter"),
         rank=0),
    node("spam", "assistant", rank=2, deleted=True),
    node("last", "assistant", node("open", "prompter"), node("open too", "prompter"), rank=3),
)  # fmt: skip


def texts(tree: Any, which: Any) -> list[str]:
    """Branches, each as a line."""
    return ["-".join(message["text"] for message in branch) for branch in branches(tree, which)]


def test_the_best_branch_follows_ranks_and_answers() -> None:
    """Catches the first reply taken for the best, and a branch into a question that nobody answered."""
    assert texts(TREE, "best") == ["q-best-q3-a3"]


def test_all_branches_are_one_for_each_last_answer() -> None:
    """Catches an answer lost or repeated by itself, deleted messages, and branches that differ in an open question."""
    assert texts(TREE, "all") == ["q-worse-q2-a2", "q-best-q3-a3", "q-best-q3-a4", "q-last-open"]


def test_a_long_tree_needs_no_recursion() -> None:
    """Catches a RecursionError."""
    tree = node("end", "assistant")
    for turn in range(50_000):
        tree = node("x", "assistant" if turn % 2 else "prompter", tree)
    assert len(next(iter(branches(tree, "best")))) == len(next(iter(branches(tree, "all")))) == 50_001


@pytest.mark.parametrize("replies", [3, True, {"a": 1}, ["x"], [None]])
def test_replies_of_another_form_are_refused(replies: Any) -> None:
    """Catches a TypeError, and replies that vanish."""
    with pytest.raises(RowError, match="expected"):
        list(branches({"text": "q", "role": "prompter", "replies": replies}, "best"))


def flat(identity: Any, parent: Any, text: str = "x", role: str = "assistant") -> RawRow:
    """A message in a row of its own."""
    row = {"message_id": identity, "parent_id": parent, "text": text, "role": role}
    return RawRow(f"f:row {identity}", row)


def test_messages_in_a_row_each_are_joined_to_their_trees() -> None:
    """Catches replies under the wrong message, a tree that ends too early, and other rows that are lost between."""
    other = RawRow("f:row 8", {"instruction": "a", "output": "b"})
    rows = [flat("1", None, "q", "prompter"), flat("2", "1", "a"), flat("3", "2", "q2", "prompter")]
    rows += [flat("4", "1", "b"), flat("5", None, "r", "prompter"), flat("6", "5", "c"), other]
    rows += [flat("7", None, "s", "prompter")]
    first, second, between, last = join_messages(rows)
    assert texts(first.value["prompt"], "all") == ["q-a-q2", "q-b"] and first.where == "f:row 1"
    assert texts(second.value["prompt"], "all") == ["r-c"] and between is other
    assert texts(last.value["prompt"], "all") == ["s"]


def test_a_message_without_its_parent_is_an_error() -> None:
    """Catches an answer that is put under another tree's question, or dropped in silence."""
    lone, twice = flat("9", "1"), flat("2", "1")
    rows = [
        flat("1", None),
        flat("2", "1"),
        flat("x", "nowhere"),
        twice,
        flat("5", None),
        lone,
        RawRow.bad("f:row 0", "bad"),
    ]
    found = list(join_messages(rows))
    messages = [str(row.error) for row in found if row.error]
    assert messages == [
        "f:row x: its parent_id names no message before it in the same tree: 'nowhere'",
        "f:row 2: its message_id stands twice in the same tree: '2'",
        "f:row 9: its parent_id names no message before it in the same tree: '1'",
        "f:row 0: bad",
    ]
    assert sum(row.value is not None for row in found) == 2
