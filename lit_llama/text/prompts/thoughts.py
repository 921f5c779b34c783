"""Thoughts of an answer: beside its content as `reasoning_content`, or within it between tags such as <think>."""

import re
from dataclasses import dataclass
from typing import Literal

from lit_llama.text.message import Message

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
        """Return the part of them that stands behind a prompt, which may end in the tag that begins them."""
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


class ThoughtsReader:
    """Text of an answer as it comes -> thoughts and content, without the tags and the blanks around them.

    What may become a tag is held back. An answer that begins otherwise is content.

    Args:
        opened: The prompt ends in the tag that begins thoughts.
    """

    def __init__(self, opened: bool) -> None:
        self._held = ""
        self._state: Literal["begin", "thoughts", "gap", "content"] = "thoughts" if opened else "begin"
        self._closing, self._thought = _CLOSING, False

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return the thoughts and content that became certain."""
        self._held += text
        thoughts = ""
        if self._state == "begin":
            if (begun := _BEGUN.match(self._held)) is not None:
                tag = begun["tag"]
                self._closing = re.compile(f"</{tag}>" if tag else r"\[/THINK\]")
                self._held, self._state = self._held[begun.end() :], "thoughts"
            elif any(tag.startswith(self._held.lstrip()) for tag in _OPENINGS):
                return "", ""
            else:
                self._state = "content"
        if self._state == "thoughts":
            if (closed := self._closing.search(self._held)) is not None:
                thoughts, self._held, self._state = (
                    self._held[: closed.start()].rstrip(),
                    self._held[closed.end() :],
                    "gap",
                )
            else:
                keep = _KEPT.search(self._held)
                assert keep
                thoughts, self._held = self._held[: keep.start()], keep[0]
            thoughts = thoughts if self._thought else thoughts.lstrip()
            self._thought = self._thought or bool(thoughts)
        if self._state == "gap":
            self._held = self._held.lstrip()
            self._state = "content" if self._held else "gap"
        if self._state != "content":
            return thoughts, ""
        content, self._held = self._held, ""
        return thoughts, content

    def flush(self) -> tuple[str, str]:
        """Return the thoughts and content that are left at the end; thoughts that were not closed end here."""
        held, self._held = self._held, ""
        return (held.rstrip() if self._thought else held.strip(), "") if self._state == "thoughts" else ("", held)


_BEGUN = re.compile(rf"\s*(?:<(?P<tag>{_TAGS})>|\[THINK\])")
_OPENINGS = ("[THINK]", *(f"<{tag}>" for tag in _TAGS.split("|")))
_CLOSING = re.compile(rf"</(?:{_TAGS})>|\[/THINK\]")
_KEPT = re.compile(r"\s*(?:</?\w{0,9}|\[/?[A-Z]{0,5})?\Z")
"""Blanks, and what may become a tag, at the end of thoughts."""


def none_behind(prompt: str) -> Thoughts:
    """Return no thoughts at all, behind a prompt that ends in the tag that begins them."""
    opened = _OPENED.search(prompt)
    assert opened
    closing = f"</{opened['tag']}>" if opened["tag"] else "[/THINK]"
    return Thoughts("", opened["blanks"], closing, "\n\n", "")


def thoughts_of(message: Message) -> Thoughts | None:
    """Return the thoughts of an assistant's message; None if there are none."""
    content = message["content"]
    if own := message.get("reasoning_content"):
        return Thoughts("<think>", f"\n{own.strip()}\n", "</think>", "\n\n", content)
    found = _WITHIN.match(content) or _ENDED.match(content)
    if found is None:
        return None
    parts = {name: found[name] for name in ("inner", "closing", "gap")}
    return Thoughts(found.groupdict().get("opening", ""), **parts, rest=content[found.end() :])


def without_thoughts(message: Message) -> Message:
    """Return a message without its thoughts."""
    found = thoughts_of(message) if message["role"] == "assistant" else None
    if found is None:
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": found.rest}


def with_thoughts_inside(message: Message) -> Message:
    """Return a message whose thoughts stand within its content."""
    found = thoughts_of(message) if message.get("reasoning_content") else None
    if found is None:
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": f"{found.opening}{found.inner}{found.closing}{found.gap}{found.rest}"}
