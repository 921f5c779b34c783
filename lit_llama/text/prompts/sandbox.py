"""The process that renders foreign templates: started when it is needed, ended when it takes too long."""

import json
import signal
from pathlib import Path
from typing import Any

from lit_llama.bounded import Bounded
from lit_llama.errors import CheckpointError

SECONDS = 2.0
_LONGEST = _ROOM = 1 << 16  # characters of a template, and of what it may write beside the contents


class Sandbox:
    """One process for all templates of this process.

    Args:
        name: What the template is called in messages.
        strict: A name that has no value is an error, and not an empty text.
    """

    def __init__(self, name: str, *, strict: bool = False) -> None:
        self._name, self._strict = name, strict
        self._bounded = Bounded(Path(__file__).with_name("renderer.py"))

    def start(self) -> None:
        """Start the process, where it is not there: it takes a tenth of a second, in which the caller may go on."""
        self._bounded.start()

    def render(self, source: str, names: dict[str, Any], chats: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
        """Render a template.

        Args:
            source: The template.
            names: What it finds beside the messages.
            chats: Each with its "messages"; what to write "around" the {% generation %} blocks, if anything; and
                "names" in place of the common ones.

        Returns:
            The text of every chat, and the tags that the template looks for in contents.

        Raises:
            CheckpointError: It fails, takes too long, or writes too much.
        """
        if len(source) > _LONGEST:
            raise CheckpointError(f"{self._name} has {len(source):,} characters, more than {_LONGEST:,}")
        words = sum(_letters(chat["messages"]) for chat in chats) + _letters([*names.values()])
        request = {"source": source, "names": names, "chats": chats, "room": _ROOM + 4 * words, "seconds": SECONDS}
        request["strict"] = self._strict
        reply = self._ask(json.dumps(request))
        if "error" in reply:
            raise CheckpointError(f"{self._name} cannot be rendered: {reply['error']}")
        return reply["texts"], reply["tags"]

    def _ask(self, request: str) -> dict[str, Any]:
        answer = self._bounded.ask(request)
        if isinstance(answer, str):
            reply: dict[str, Any] = json.loads(answer)
            return reply
        slow = answer == -signal.SIGALRM
        return {"error": f"it takes longer than {SECONDS:g} s" if slow else f"its process ended with status {answer}"}


def _letters(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, dict):
        return sum(_letters(key) + _letters(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_letters, value))
    return len(value) if isinstance(value, str) else 0
