"""A model's own chat template as a prompt style: rendered in a sandbox, and made to say whose words are whose."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lit_llama.errors import CheckpointError
from lit_llama.text.conversation import Message
from lit_llama.text.jinja.sandbox import Sandbox
from lit_llama.text.styles import PromptStyle, Segment, refuse_unsaid

TEMPLATE_FILE = "chat_template.jinja"
_SANDBOX = Sandbox(TEMPLATE_FILE)
_MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters, which no template spells
_AROUND = "\ue002", "\ue003"
_BLOCK = re.compile(f"({'|'.join(_AROUND)})")
_BLANKS = re.compile(r"\s*")


@dataclass(frozen=True)
class _Piece:
    """Words of a message up to the next tag, and the blanks around them, which a template may trim."""

    message: int
    before: str
    words: str
    after: str


class JinjaStyle(PromptStyle):
    """A model's own chat template.

    Words are rendered as marks and put back afterwards, so that what a user typed can never become a control token or
    part of the template. Only the tags that a template looks for in answers, such as </think>, it may see and move. A
    second rendering, of the messages as they are, has to give the same text: it is what other programs render.

    Trained are the contents of assistant messages, and what the template writes between a prompt and its answer; where
    the template has {% generation %} blocks, their contents instead. Where an answer ends, only the tokenizer knows:
    see `trained_ends` in prompts.py.
    """

    name = "chat_template"

    def __init__(self, template: str) -> None:
        self._source = template
        self._headers: dict[tuple[str, str], str | None] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos: str = "",
        eos: str = "",
        answer: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Segment]:
        """See PromptStyle.

        Raises:
            CheckpointError: The template refuses the messages, leaves one out or changes its words, fails, takes longer
                than two seconds, or writes far more than it is given.
        """
        refuse_unsaid(self.name, messages, tools)
        names = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": answer, "tools": None, "documents": None}
        rendered = self._rendered(messages, names, range(len(messages)))
        if rendered is None:
            changed = (index for index in range(len(messages)) if self._rendered(messages, names, [index]) is None)
            roles = [messages[index]["role"] for index in changed] or ["first"]
            raise CheckpointError(
                f"{TEMPLATE_FILE} changes the words of the {roles[0]} message, or renders another text because of "
                "them; name a style that does not with --prompt_style"
            )
        answered = any(message["role"] == "assistant" for message in messages)
        header = self._header(bos, eos) if answered else None
        return _segments(rendered, messages, header)

    def jinja(self, bos: bool) -> str:
        """See PromptStyle."""
        return self._source

    def _rendered(
        self, messages: Sequence[Message], names: dict[str, Any], masked: Collection[int]
    ) -> list[str | tuple[int, str]] | None:
        """Template texts and, in turn with them, whose words follow and which; None if marks and words differ."""
        pieces: list[_Piece] = []
        contents = [
            _mask(index, message, self._source, pieces) if index in masked else message["content"]
            for index, message in enumerate(messages)
        ]
        plain = [{**message} for message in messages]
        chat = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        (text, marked), _ = _SANDBOX.render(
            self._source,
            names,
            [{"messages": plain, "around": ("", "")}, {"messages": chat, "around": _AROUND}],
        )
        parts = _MARK.split(marked)
        numbers = [int(number) for number in parts[1::2]]
        if any(number >= len(pieces) for number in numbers):
            return None
        for number, piece in enumerate(pieces):
            role, content = messages[piece.message]["role"], messages[piece.message]["content"]
            if number not in numbers and piece.words == content.strip():  # thoughts before a tag may go
                raise CheckpointError(
                    f"{TEMPLATE_FILE} leaves out the {role} message; do without, or name a style with --prompt_style"
                )
        words = _align(text, [_BLOCK.sub("", part) for part in parts[::2]], [pieces[number] for number in numbers])
        if words is None:
            return None
        found = [*zip((pieces[number].message for number in numbers), words, strict=True)]
        return [item for pair in zip(parts[::2], [*found, (0, "")], strict=True) for item in pair][:-1]

    def _header(self, bos: str, eos: str) -> str | None:
        """What stands between a question and the place where its answer begins; None if the template has no such."""
        if (bos, eos) not in self._headers:
            try:
                last = self.render([{"role": "user", "content": "."}], bos=bos, eos=eos, answer=True)[-1]
                self._headers[bos, eos] = last.text if last.template else ""
            except CheckpointError:  # it may want a system message first
                self._headers[bos, eos] = None
        return self._headers[bos, eos]


@cache
def _tags(source: str) -> re.Pattern[str]:
    """The tags that a template looks for in contents."""
    _, tags = _SANDBOX.render(source, {}, [])
    return re.compile(f"({'|'.join(map(re.escape, sorted(tags, key=len, reverse=True))) or '(?!)'})")


def _mask(index: int, message: Message, source: str, pieces: list[_Piece]) -> str:
    """The content with marks in place of its words, which are added to `pieces`.

    A content of blanks stays: a template may ask whether there is one.
    """
    parts = _tags(source).split(message["content"]) if message["role"] == "assistant" else [message["content"]]
    for position, part in enumerate(parts):
        if position % 2 == 0 and part.strip():
            before, after = part[: -len(part.lstrip())], part[len(part.rstrip()) :]
            parts[position] = f"\ue000{len(pieces)}\ue001"
            pieces.append(_Piece(index, before, part.strip(), after))
    return "".join(parts)


def _align(text: str, between: list[str], pieces: list[_Piece]) -> list[str] | None:
    """The words that stand for the pieces in a text, with those of their blanks that the template kept.

    None if the text is not `between` and `pieces` in turn.
    """
    found: list[str] = []
    position = len(between[0])
    if not text.startswith(between[0]):
        return None
    for index, (piece, follow) in enumerate(zip(pieces, between[1:], strict=True), 1):
        start = _end_of_blanks(text, position)
        end = start + len(piece.words)
        if not piece.before.endswith(text[position:start]) or not text.startswith(piece.words, start):
            return None
        # Blanks of the piece, of the template, and of the next piece may stand side by side.
        kept = _end_of_blanks(text, end) - end - _end_of_blanks(follow, 0)
        if not follow.strip() and index < len(pieces):
            kept = min(kept, len(piece.after))
        if kept < 0 or not piece.after.startswith(text[end : end + kept]) or not text.startswith(follow, end + kept):
            return None
        found.append(text[position : end + kept])
        position = end + kept + len(follow)
    return found if position == len(text) else None


def _end_of_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    assert match
    return match.end()


def _segments(rendered: list[str | tuple[int, str]], messages: Sequence[Message], header: str | None) -> list[Segment]:
    """Which of the texts are trained."""
    roles = [message["role"] for message in messages]
    trained = [message["role"] == "assistant" and message.get("train", True) for message in messages]
    blocks = any(isinstance(part, str) and _BLOCK.search(part) for part in rendered)
    segments: list[Segment] = []
    inside, last = False, -1
    for index, part in enumerate(rendered):
        if isinstance(part, tuple):
            last, words = part
            segments.append(Segment(words, inside if blocks else trained[last]))
            continue
        follower = rendered[index + 1] if index + 1 < len(rendered) else None
        if blocks:
            for piece in _BLOCK.split(part):
                if piece in _AROUND:  # a block belongs to the message whose words come next
                    wanted = not isinstance(follower, tuple) or messages[follower[0]].get("train", True)
                    inside = piece == _AROUND[0] and wanted
                else:
                    segments.append(Segment(piece, inside, template=True))
        else:
            prompt = len(part)  # as much of it as generation gives to the model
            if isinstance(follower, tuple) and trained[follower[0]]:
                if follower[0] == last:
                    prompt = 0
                elif header is not None and last >= 0 and roles[last] == "user" and part.startswith(header):
                    prompt = len(header)
            segments.append(Segment(part[:prompt], template=True))
            segments.append(Segment(part[prompt:], trained=True, template=True))
    return [segment for segment in segments if segment.text]
