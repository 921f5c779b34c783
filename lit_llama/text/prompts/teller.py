"""Teller of what is trained in a rendered conversation: what the template writes behind the prompt of each answer.

Thoughts of an answer stand beside its content as `reasoning_content`, or within it between tags such as <think>.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal

from lit_llama.text.message import Message
from lit_llama.text.prompts.styles import Segment

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


AROUND = "\ue002", "\ue003"
"""What a template is made to write around its {% generation %} blocks."""
BLOCK = re.compile(f"({'|'.join(AROUND)})")


@dataclass(frozen=True)
class Told:
    """A conversation as a template tells it.

    Attributes:
        segments: Its text.
        left_out: Numbers of the messages whose thoughts are not in it.
        apart: An answer before the last one is not told as it is asked for, so that it cannot be trained here.
        opened: What a prompt ends in that the template does not write before an answer, "" mostly.
    """

    segments: list[Segment]
    left_out: list[int] = field(default_factory=list)
    apart: bool = False
    opened: str = ""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation: template texts and, in turn with them, words and the numbers of their messages."""

    parts: list[str | tuple[int, str]]
    text: str
    left_out: list[int]


class Teller:
    """Finder of the trained parts of a rendered text.

    Args:
        messages: The conversation.
        rendered: It, rendered.
        prompts: What generation is given for an answer, by the number of its message.
        open: The text ends where the next answer begins.
        asking: The last answer is told as it is asked for, whatever the template writes before it.
        thoughts: Those of the last answer, which the template has left out.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        rendered: Rendered,
        prompts: dict[int, str],
        *,
        open: bool,
        asking: bool,
        thoughts: Thoughts | None = None,
    ) -> None:
        self._messages, self._rendered, self._prompts = messages, rendered, prompts
        self._open, self._asking, self._thoughts = open, asking, thoughts
        self._spans = self._find_spans()
        ends = (self._spans[index][1] if index in self._spans else 0 for index in range(len(messages)))
        self._ends = [0, *accumulate(ends, max)]  # where the words of all messages before each have ended

    def _find_spans(self) -> dict[int, tuple[int, int]]:
        """Where the words of each message begin and end in the text."""
        spans: dict[int, tuple[int, int]] = {}
        position = 0
        for part in self._rendered.parts:
            size = len(part[1]) if isinstance(part, tuple) else len(BLOCK.sub("", part))
            if isinstance(part, tuple):
                spans[part[0]] = spans.get(part[0], (position, 0))[0], position + size
            position += size
        return spans

    def told(self) -> Told:
        """Return the conversation, in segments."""
        if any(isinstance(part, str) and BLOCK.search(part) for part in self._rendered.parts):
            return Told(self._blocks(), self._rendered.left_out)
        text, left_out = self._rendered.text, self._rendered.left_out
        borders, apart, final = dict[int, tuple[int, int]](), False, len(self._messages) - 1
        for index, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            start, end = self._spans.get(index, (len(text), len(text)))
            if (begin := self._begin(index, start, end)) is not None:
                borders[index] = begin, max(end, begin) if index in self._spans else begin
                continue
            prompt = self._prompts.get(index)
            if index in self._spans:
                borders[index] = start, end
            if index < final or self._open:
                apart = apart or (message.get("train", True) and prompt is not None)
            elif self._asking and prompt is not None:
                shared = min(_common(text, prompt), start)
                opened = prompt[shared:]
                if index in self._spans or opens(opened):  # else nothing is said, and it is not clear where
                    borders.setdefault(index, (shared, shared))
                    return Told(self._asked(shared, opened, borders), left_out, apart, opened)
        if self._thoughts and final in borders:
            return Told(self._asked(borders[final][0], "", borders), left_out, apart)
        return Told(self._segments(borders), left_out, apart)

    def _begin(self, index: int, start: int, end: int) -> int | None:
        """Where the answer of a message begins: behind its prompt, if the text begins with that.

        In the middle of a very long conversation, behind what the last answer to such a message was asked with.
        """
        before, prompt = self._ends[index], self._prompts.get(index)
        if prompt is not None:
            fits = self._rendered.text.startswith(prompt) and before <= len(prompt) <= max(end, before)
            return len(prompt) if fits else None
        role = self._messages[index - 1]["role"] if index else ""
        known = (other for other in reversed(self._prompts) if other < index)
        for other in known:
            if self._messages[other - 1]["role"] == role:
                header = self._prompts[other][self._ends[other] :]
                begin = before + len(header)
                return begin if self._rendered.text.startswith(header, before) and begin <= start else None
        return None

    def _segments(self, borders: Mapping[int, tuple[int, int]]) -> list[Segment]:
        """The text, cut where answers begin and end."""
        cuts = sorted({place for border in borders.values() for place in border})
        numbers, begins = list(borders), [begin for begin, _ in borders.values()]  # in the order of the text
        segments: list[Segment] = []
        position, empty = 0, {begin: index for index, (begin, end) in borders.items() if begin == end}
        for part in self._rendered.parts:
            words = part[1] if isinstance(part, tuple) else part
            first, last = bisect_right(cuts, position), bisect_left(cuts, position + len(words))
            inside = [cut - position for cut in cuts[first:last]]
            for begin, end in pairwise([0, *inside, len(words)]):
                if (index := empty.pop(position + begin, None)) is not None:
                    segments.append(self._segment("", index))  # nothing is said, and still it ends
                place = bisect_right(begins, position + begin) - 1
                answer = numbers[place] if place >= 0 and position + begin < borders[numbers[place]][1] else None
                own = isinstance(part, tuple) and (part[0] not in borders or answer is not None)
                segments.append(self._segment(words[begin:end], answer, template=not own))
            position += len(words)
        if (index := empty.pop(position, None)) is not None:
            segments.append(self._segment("", index))
        return segments

    def _segment(self, text: str, answer: int | None, template: bool = False) -> Segment:
        muted = answer is not None and not self._messages[answer].get("train", True)
        return Segment(text, trained=answer is not None, template=template, muted=muted)

    def _asked(self, shared: int, opened: str, borders: Mapping[int, tuple[int, int]]) -> list[Segment]:
        """The text with the last answer as it is asked for: behind what its prompt ends in, with its thoughts.

        Args:
            shared: Length of the text that is that of the prompt.
            opened: What the prompt ends in beyond that.
            borders: Where answers begin and end.
        """
        final, prompt = len(self._messages) - 1, self._prompts.get(len(self._messages) - 1, "")
        thoughts = self._thoughts.behind(prompt) if self._thoughts else None
        if thoughts is None and opens(opened):
            thoughts = none_behind(opened)
        said: list[Segment] = []
        if thoughts:
            tagged = ((thoughts.opening, True), (thoughts.inner, False), (thoughts.closing, True), (thoughts.gap, True))
            said = [self._segment(text, final, template) for text, template in tagged]
        whole, begin = self._segments(borders), borders[final][0]
        rest = _slice(whole, begin, None)
        if said and rest[0].text.startswith("\n"):
            said.pop()  # what cut the thoughts off left the blanks behind them
        return [*_slice(whole, 0, shared), Segment(opened, template=True), *said, *rest]

    def _blocks(self) -> list[Segment]:
        """The text, of which the contents of {% generation %} blocks are trained."""
        segments: list[Segment] = []
        inside, muted, parts = False, False, self._rendered.parts
        for index, part in enumerate(parts):
            if isinstance(part, tuple):
                muted = not self._messages[part[0]].get("train", True)
                segments.append(Segment(part[1], inside, muted=inside and muted))
                continue
            follower = parts[index + 1] if index + 1 < len(parts) else None
            for piece in BLOCK.split(part):
                if piece == AROUND[0]:  # a block belongs to the message whose words come next
                    inside = True
                    muted = isinstance(follower, tuple) and not self._messages[follower[0]].get("train", True)
                elif piece == AROUND[1]:
                    inside = False
                else:
                    segments.append(Segment(piece, inside, template=True, muted=inside and muted))
        return segments


def _slice(segments: Sequence[Segment], begin: int, end: int | None) -> list[Segment]:
    """The segments from one place of their text to another."""
    found: list[Segment] = []
    position = 0
    for segment in segments:
        size = len(segment.text)
        last = position + size if end is None else min(end, position + size)
        if max(begin, position) < last or (not size and begin <= position and (end is None or position < end)):
            text = segment.text[max(0, begin - position) : last - position]
            found.append(replace(segment, text=text))
        position += size
    return found


def _common(left: str, right: str) -> int:
    """Length of the common beginning."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
