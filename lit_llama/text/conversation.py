"""What every kind of data becomes before it is encoded: a conversation, or a row that is left out and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text} and, only where there is something in them:

* input: of a user's instruction, text that the prompt style puts with it;
* reasoning_content: an assistant's thoughts;
* tool_calls: an assistant's, as a list of {"type": "function", "function": {"name": text, "arguments": object}}, with
  an "id" where there is one; "content" may be empty beside them;
* tool_call_id, name: which call a tool's message answers, and who speaks;
* train: False where an assistant's message carries no loss.
"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one sample is made of.

    Args:
        messages: The turns. The last one is the assistant's; no user message follows another.
        row: Running number over all sources, from 0, the same in every run.
        where: "chat.jsonl:line 3", "rows.json:row 17", "a.parquet:row 5".
        text: Plain text to continue: one assistant message, no prompt.
        split: "train", "test" or "validation" where the sources come divided into train and test already.
        tools: The functions that the assistant may call, as chat templates take them.
    """

    messages: tuple[Message, ...]
    row: int
    where: str
    text: bool = False
    split: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is left out, and why; `row` and `where` as in Conversation.

    Args:
        reason: The same for the same mistake in another row.
        tokens: Its length, where that is why.
        by_choice: Nothing is wrong with it: it was not asked for.
    """

    row: int
    where: str
    reason: str
    tokens: int = 0
    by_choice: bool = False
