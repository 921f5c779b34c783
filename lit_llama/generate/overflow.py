"""Prompts that are longer than the model reads: refused, or without their oldest turns or tokens, which are counted.

An answer that becomes too long while it is made is the engine's matter, see `Request.overflow`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.llm import LLM
from lit_llama.text.prompts.encode import prompt_ids

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fitted:
    """A prompt that the model reads.

    Attributes:
        ids: Of the prompt.
        dropped: Turns, or tokens of a plain text, that were left out.
        keep: First ids that stay if the answer slides: the system message, or the token that begins a text.
        messages: That are left of a conversation.
    """

    ids: list[int]
    dropped: int = 0
    keep: int = 0
    messages: Messages = ()


def room(llm: LLM, sampling: Sampling) -> int:
    """Return the tokens of a prompt that leave an answer its room; half of what the model reads where the answer has no
    limit.
    """
    context = llm.config.context_length
    return max(context - sampling.max_new_tokens, context // 2)


def fitted_text(llm: LLM, ids: Sequence[int], limit: int, overflow: Overflow) -> Fitted:
    """Return the ids of a plain text, with `drop_oldest` without those at its beginning for which there is no room.

    Args:
        llm: Who continues it.
        ids: Of the text; a token that begins texts stays.
        limit: Tokens of the prompt, at most.
        overflow: With `error`, nothing is left out, and the engine refuses what is too long.
    """
    begin = llm.tokenizer.control.get(llm.tokenizer.bos or "")
    keep = int(begin is not None and list(ids[:1]) == [begin])
    dropped = max(0, len(ids) - limit) if overflow == "drop_oldest" else 0
    return Fitted([*ids[:keep], *ids[keep + dropped :]], dropped, keep)


def fitted_messages(
    llm: LLM,
    messages: Messages,
    limit: int,
    overflow: Overflow,
    tools: Sequence[Mapping[str, Any]] = (),
    more: Mapping[str, Any] | None = None,
) -> Fitted:
    """Return a conversation, with `drop_oldest` without the oldest turns for which there is no room.

    A turn is a message of the user with all that answers it. The system message and the last turn stay.

    Args:
        llm: Who answers.
        messages: So far; the last one is to be answered.
        limit: Tokens of the prompt, at most; where the last turn alone has more, it is left at that.
        overflow: With `error`, nothing is left out.
        tools: That may be called.
        more: What the chat template is told besides.
    """
    style, more = llm.require_style(), more or {}
    left, dropped = list(messages), 0
    head = int(bool(left) and left[0]["role"] == "system")
    ids = prompt_ids(llm.tokenizer, style, left, tools, more)
    while overflow == "drop_oldest" and len(ids) > limit and (end := _next_turn(left, head)) is not None:
        del left[head:end]
        dropped += 1
        ids = prompt_ids(llm.tokenizer, style, left, tools, more)
    return Fitted(ids, dropped, _opening(llm, left[:head], ids, tools, more), left)


def _next_turn(messages: Messages, first: int) -> int | None:
    """Where the turn after the one at `first` begins."""
    starts = (place for place in range(first + 1, len(messages)) if messages[place]["role"] == "user")
    return next(starts, None)


def _opening(
    llm: LLM, head: Messages, ids: Sequence[int], tools: Sequence[Mapping[str, Any]], more: Mapping[str, Any]
) -> int:
    """How many ids come before the first turn: those that prompts with this system message have in common."""
    try:
        other = prompt_ids(llm.tokenizer, llm.require_style(), [*head, {"role": "user", "content": "\n"}], tools, more)
    except UserError:  # a style that reads nothing but whole conversations
        return 0
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
