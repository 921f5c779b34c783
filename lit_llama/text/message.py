"""Messages and conversations: one type for a row of training data, a prompt to be answered and a chat."""

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


IGNORE_INDEX = -100
"""Label of a position without loss, as in torch and transformers."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a row: of one that is trained on, the last is the assistant's; a prompt may end in a question.

    Args:
        messages: The turns; no user message follows another.
        row: Running number over all sources, from 0, the same in every run.
        where: "chat.jsonl:line 3", "rows.json:row 17", "a.parquet:row 5".
        text: Plain text to continue: one assistant message, no prompt.
        split: "train", "test" or "validation" where the sources come divided into train and test already.
        tools: The functions that the assistant may call, as chat templates take them.
    """

    messages: tuple[Message, ...]
    row: int = 0
    where: str = ""
    text: bool = False
    split: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Turns before the last answer; all turns where none is known."""
        return self.messages[:-1] if self._answered else self.messages

    @property
    def response(self) -> str:
        """The last answer, "" where none is known."""
        return str(self.messages[-1]["content"]) if self._answered else ""

    @property
    def instruction(self) -> Message | None:
        """The one message of a prompt that is an instruction, perhaps with an input; None for a chat or with tools."""
        plain = len(self.prompt) == 1 and not self.tools
        first = self.prompt[0] if plain else None
        return first if first and first["role"] == "user" and first.keys() <= {"role", "content", "input"} else None

    @property
    def asked(self) -> str:
        """The prompt for people: an instruction above its input, or the turns with their roles."""
        if (alone := self.instruction) is not None:
            return "\n\n".join(text for text in (alone["content"], alone.get("input")) if text)
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.prompt)

    @property
    def _answered(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True, slots=True)
class Preference(Conversation):
    """A conversation whose last answer was judged, with another answer to the same prompt where one is known.

    Args:
        wanted: The last answer is the chosen one; False where it is one that people did not want, and no better one is
            known.
        rejected: The worse answer to the same prompt.
    """

    wanted: bool = True
    rejected: Message | None = None


def headed(turns: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """Return the turns, beginning with a system message: their own, or the given one, if it is not empty."""
    return turns if not system or turns[0]["role"] == "system" else ({"role": "system", "content": system}, *turns)


def instruct(instruction: str, input: str = "", response: str = "", row: int = 0) -> Conversation:
    """Build the conversation of one instruction; `input` and `response` may be empty."""
    asked = {"role": "user", "content": instruction} | ({"input": input} if input else {})
    answer = ({"role": "assistant", "content": response},) if response else ()
    return Conversation((asked, *answer), row, f"row {row}")


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
