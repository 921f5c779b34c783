"""Thoughts of an answer: beside its content as `reasoning_content`, or within it between tags such as <think>."""

import re
from dataclasses import dataclass
from typing import Literal

from lit_llama.text.conversation import Message

ThoughtsRule = Literal["template", "keep", "drop"]
"""What becomes of them: the style's template decides, every answer is trained with its own, or none is."""

_TAGS = "think|thinking|thought|thoughts|reasoning"
_WITHIN = re.compile(
    rf"\A(?P<opening>\s*(?:<(?P<tag>{_TAGS})>|(?P<mark>\[THINK\])))(?P<inner>.*?)"
    r"(?P<closing>(?(mark)\[/THINK\]|</(?P=tag)>))(?P<gap>\s*)",
    re.DOTALL,
)
_ENDED = re.compile(r"\A(?P<inner>.*?)(?P<closing></think>|\[/THINK\])(?P<gap>\s*)", re.DOTALL)  # a prompt opened them
_OPENED = re.compile(rf"(?:<(?P<tag>{_TAGS})>|\[THINK\])(?P<blanks>\s*)\Z")


@dataclass(frozen=True)
class Thoughts:
    """Thoughts before an answer, in their tags.

    Attributes:
        opening: The tag that begins them, "" if the prompt did.
        inner: What was thought, with the blanks around it.
        closing: The tag that ends them.
        gap: Blanks before the answer.
        rest: The answer.
    """

    opening: str
    inner: str
    closing: str
    gap: str
    rest: str

    def behind(self, prompt: str) -> "Thoughts":
        """The part of them that stands behind a prompt, which may end in the tag that begins them."""
        opened = _OPENED.search(prompt)
        if opened is None:
            opening = self.opening.lstrip() or self.closing.replace("/", "", 1)
            blanks = "" if self.opening or self.inner.startswith("\n") else "\n"
            return Thoughts(opening, blanks + self.inner, self.closing, self.gap, self.rest)
        blanks = opened["blanks"]
        inner = self.inner.removeprefix(blanks) if self.inner.strip() else self.inner[len(blanks) :] or blanks
        return Thoughts("", inner, self.closing, self.gap, self.rest)


def opens(text: str) -> bool:
    """Whether a text ends in a tag that begins thoughts."""
    return _OPENED.search(text) is not None


def none_behind(prompt: str) -> Thoughts:
    """No thoughts at all, behind a prompt that ends in the tag that begins them."""
    opened = _OPENED.search(prompt)
    assert opened
    closing = f"</{opened['tag']}>" if opened["tag"] else "[/THINK]"
    return Thoughts("", opened["blanks"], closing, "\n\n", "")


def thoughts_of(message: Message) -> Thoughts | None:
    """The thoughts of an assistant's message; None if there are none."""
    content = message["content"]
    if own := message.get("reasoning_content"):
        return Thoughts("<think>", f"\n{own.strip()}\n", "</think>", "\n\n", content)
    found = _WITHIN.match(content) or _ENDED.match(content)
    if found is None:
        return None
    parts = {name: found[name] for name in ("inner", "closing", "gap")}
    return Thoughts(found.groupdict().get("opening", ""), **parts, rest=content[found.end() :])


def without_thoughts(message: Message) -> Message:
    """A message without its thoughts."""
    found = thoughts_of(message) if message["role"] == "assistant" else None
    if found is None:
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": found.rest}


def with_thoughts_inside(message: Message) -> Message:
    """A message whose thoughts stand within its content."""
    found = thoughts_of(message) if message.get("reasoning_content") else None
    if found is None:
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": f"{found.opening}{found.inner}{found.closing}{found.gap}{found.rest}"}
