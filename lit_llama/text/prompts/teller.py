"""Teller of which text of a rendered conversation is trained: what the template writes behind the prompt of each
answer.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from lit_llama.text.message import Message
from lit_llama.text.prompts.styles import Segment
from lit_llama.text.prompts.thoughts import Thoughts, none_behind, opens

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
