"""Words of messages as marks, which a template renders in their place, and the words found again in what it renders."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lit_llama.text.message import Message

MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters, which no template spells
_BLANKS = re.compile(r"\s*")
Kind = Literal["content", "thoughts", "call", "result"]


@dataclass(frozen=True)
class Piece:
    """Words of a message up to the next tag, and the blanks around them, which a template may trim.

    Attributes:
        message: The number of the message.
        kind: Where in the message they stand.
        before: Blanks before them.
        words: They themselves.
        after: Blanks behind them.
    """

    message: int
    kind: Kind
    before: str
    words: str
    after: str

    @property
    def escaped(self) -> list[str]:
        """Spellings of the words within JSON."""
        if self.kind not in ("call", "result"):
            return []
        whole = self.before + self.words + self.after
        return [json.dumps(whole, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]


def mask(number: int, message: Message, tags: re.Pattern[str], pieces: list[Piece]) -> Message:
    """Return the message with marks in place of its words, which are added to `pieces`.

    Words of blanks stay: a template may ask whether there is one.

    Args:
        number: Of the message.
        message: It.
        tags: What the template looks for in contents; in an answer it may see and move it.
        pieces: The words so far.
    """
    kind: Kind = "result" if message["role"] == "tool" else "content"

    def marked(text: str, kind: Kind) -> str:
        if not text.strip():
            return text
        before, after = text[: -len(text.lstrip())], text[len(text.rstrip()) :]
        pieces.append(Piece(number, kind, before, text.strip(), after))
        return f"\ue000{len(pieces) - 1}\ue001"

    def leaves(value: Any) -> Any:
        if isinstance(value, str):
            return marked(value, "call")
        if isinstance(value, list):
            return [leaves(each) for each in value]
        return {key: leaves(each) for key, each in value.items()} if isinstance(value, Mapping) else value

    changed: dict[str, Any] = {}
    if thoughts := message.get("reasoning_content"):
        changed["reasoning_content"] = marked(thoughts, "thoughts")
    parts = tags.split(message["content"]) if message["role"] == "assistant" else [message["content"]]
    changed["content"] = "".join(part if place % 2 else marked(part, kind) for place, part in enumerate(parts))
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "name": marked(call["function"]["name"], "call"),
                    "arguments": leaves(call["function"].get("arguments", {})),
                },
            }
            for call in calls
        ]
    return {**message, **changed}


def align(text: str, between: list[str], pieces: list[Piece]) -> list[str] | None:
    """Return the words that stand for the pieces in a text, with those of their blanks that the template kept.

    None if the text is not `between` and `pieces` in turn.
    """
    found: list[str] = []
    position = len(between[0])
    if not text.startswith(between[0]):
        return None
    for index, (piece, follow) in enumerate(zip(pieces, between[1:], strict=True), 1):
        end = _plain_end(text, position, piece, follow, last=index == len(pieces))
        if end is None:
            spellings = (position + len(spelled) for spelled in piece.escaped if text.startswith(spelled, position))
            end = next((place for place in spellings if text.startswith(follow, place)), None)
        if end is None:
            return None
        found.append(text[position:end])
        position = end + len(follow)
    return found if position == len(text) else None


def _plain_end(text: str, position: int, piece: Piece, follow: str, *, last: bool) -> int | None:
    """Where the words of a piece end that begin at a position, as they are; None if they do not stand there."""
    start = _end_of_blanks(text, position)
    end = start + len(piece.words)
    if not piece.before.endswith(text[position:start]) or not text.startswith(piece.words, start):
        return None
    # Blanks of the piece, of the template, and of the next piece may stand side by side.
    kept = _end_of_blanks(text, end) - end - _end_of_blanks(follow, 0)
    if not follow.strip() and not last:
        kept = min(kept, len(piece.after))
    if kept < 0 or not piece.after.startswith(text[end : end + kept]) or not text.startswith(follow, end + kept):
        return None
    return end + kept


def _end_of_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    assert match
    return match.end()
