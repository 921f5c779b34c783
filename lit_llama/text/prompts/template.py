"""A model's own chat template as a prompt style: rendered in a sandbox, and made to say whose words are whose.

The process of the sandbox, which runs renderer.py, is started when it is needed, and ended when it takes too long.
"""

import json
import re
import signal
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lit_llama.bounded import Bounded
from lit_llama.errors import CheckpointError, UserError
from lit_llama.text.message import Message
from lit_llama.text.prompts.masks import MARK, Piece, align, mask
from lit_llama.text.prompts.styles import PromptStyle, Segment
from lit_llama.text.prompts.teller import AROUND, BLOCK, Rendered, Teller, Told, thoughts_of
from lit_llama.wording import param

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


TEMPLATE_FILE = "chat_template.jinja"
_SANDBOX = Sandbox(TEMPLATE_FILE)
_THOUGHTS = ("thinking", "reasoning")  # other names that templates have for reasoning_content
_ASKED = 64  # first answers of a conversation whose prompts are rendered, one by one, and that of the last


class JinjaStyle(PromptStyle):
    """A model's own chat template.

    Words are rendered as marks and put back afterwards, so that what a user typed can never become a control token or
    part of the template. Only the tags that a template looks for in answers, such as </think>, it may see and move. A
    second rendering, of the messages as they are, has to give the same text: it is what other programs render.

    Trained are the contents of assistant messages, and what the template writes between the prompt that generation is
    given and the answer; where the template has {% generation %} blocks, their contents instead. Where an answer ends,
    only the tokenizer knows: see `trained_ends` in prompts.py.
    """

    name = "chat_template"

    def __init__(self, template: str) -> None:
        self._source = template
        self._marks: dict[tuple[frozenset[str], str, str], set[str]] = {}
        _SANDBOX.start()

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos: str = "",
        eos: str = "",
        answer: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Segment]:
        """Render a conversation by the template.

        Raises:
            CheckpointError: The template refuses the messages, leaves one out or changes its words, fails, takes longer
                than two seconds, or writes far more than it is given.
        """
        told = self.tell(messages, bos=bos, eos=eos, answer=answer, tools=tools, asking=False)
        return [segment for segment in told.segments if segment.text]

    def tell(
        self,
        messages: Sequence[Message],
        *,
        bos: str = "",
        eos: str = "",
        answer: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        asking: bool = True,
        keep: bool = False,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> Told:
        """Return a conversation, and how it differs from what generation is asked.

        Args:
            messages: As for `render`.
            bos: As for `render`.
            eos: As for `render`.
            answer: As for `render`.
            tools: As for `render`.
            asking: The last answer is told as it is asked for, whatever the template writes before it.
            keep: The last answer has its thoughts, also where the template leaves them out.
            more: What else the template may ask for, such as `enable_thinking`.

        Raises:
            UserError: The template does not write the tools or the calls of them.
            CheckpointError: As for `render`.
        """
        names = {**more, "bos_token": bos, "eos_token": eos, "add_generation_prompt": answer, "documents": None}
        names["tools"] = [*tools] or None
        messages = [self._named(message) for message in messages]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        asked = answers if len(answers) <= _ASKED else [*answers[:_ASKED], answers[-1]]
        prompts = [{"messages": messages[:index], "names": {"add_generation_prompt": True}} for index in asked]
        rendered, texts = self._rendered(messages, names, range(len(messages)), prompts)
        if rendered is None:
            raise self._changed(messages, names)
        last = messages[-1] if messages else None
        told = Teller(messages, rendered, dict(zip(asked, texts, strict=True)), open=answer, asking=asking)
        if keep and not answer and last and len(messages) - 1 in rendered.left_out:
            thoughts = thoughts_of(last)
            assert thoughts
            bare = {key: value for key, value in last.items() if key not in ("reasoning_content", *_THOUGHTS)}
            shorter = [*messages[:-1], bare | {"content": thoughts.rest}]
            again, texts = self._rendered(shorter, names, range(len(messages)), prompts)
            if again is None:
                raise self._changed(shorter, names)
            again = Rendered(again.parts, again.text, [i for i in rendered.left_out if i < len(messages) - 1])
            told = Teller(
                shorter, again, dict(zip(asked, texts, strict=True)), open=answer, asking=asking, thoughts=thoughts
            )
        return told.told()

    def jinja(self, bos: bool) -> str:
        """Return the template itself."""
        return self._source

    def asks_for(self, name: str) -> bool:
        """Whether the template may read a value of this name."""
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    def marks(self, words: Collection[str], bos: str, eos: str) -> set[str]:
        """Return those of a tokenizer's added words with which the template opens turns: nobody else may spell them.

        Words that come in pairs, such as <think> and </think>, are no such marks.
        """
        key = frozenset(words), bos, eos
        if key not in self._marks:
            self._marks[key] = self._find_marks(words, bos, eos)
        return self._marks[key]

    def _find_marks(self, words: Collection[str], bos: str, eos: str) -> set[str]:
        if not any(word in self._source for word in words):
            return set()
        question, reply = ({"role": role, "content": "."} for role in ("user", "assistant"))
        try:
            segments = self.render([question, reply, question], bos=bos, eos=eos)
        except UserError:
            return set()
        text = "".join(segment.text for segment in segments if segment.template)
        paired = {word for word in words if f"{word[:1]}/{word[1:]}" in words}
        return {word for word in words if word in text} - paired - {f"{word[:1]}/{word[1:]}" for word in paired}

    def _named(self, message: Message) -> Message:
        """A message that has its thoughts also under the name that the template knows."""
        if not (thoughts := message.get("reasoning_content")):
            return message
        return {**message, **{name: thoughts for name in _THOUGHTS if re.search(rf"\b{name}\b", self._source)}}

    def _rendered(
        self,
        messages: Sequence[Message],
        names: dict[str, Any],
        masked: Collection[int],
        others: Sequence[dict[str, Any]] = (),
    ) -> tuple[Rendered | None, list[str]]:
        """The messages, None if marks and words differ, and the texts of other chats.

        Raises:
            UserError: The template does not write the tools or the calls of them.
            CheckpointError: It leaves a message out, or cannot be rendered.
        """
        pieces: list[Piece] = []
        tags = _tags(self._source)
        chat = [
            self._named(mask(index, message, tags, pieces)) if index in masked else message
            for index, message in enumerate(messages)
        ]
        without = [{"messages": messages, "names": {"tools": None}}] if names["tools"] else []
        [text, marked, *rest], _ = _SANDBOX.render(
            self._source, names, [{"messages": messages}, {"messages": chat, "around": AROUND}, *without, *others]
        )
        if without and rest.pop(0) == text:
            raise UserError(
                f"{TEMPLATE_FILE} does not write tools, so the model would not know of them; use a model whose "
                f"template does, or leave such rows out with {param('on_error', 'skip')}, or their tools with "
                f"{param('ignore_fields', ['tools'])}"
            )
        parts = MARK.split(marked)
        numbers = [int(number) for number in parts[1::2]]
        if any(number >= len(pieces) for number in numbers):
            return None, rest
        left_out = _left_out(messages, pieces, set(numbers))
        words = align(text, [BLOCK.sub("", part) for part in parts[::2]], [pieces[number] for number in numbers])
        if words is None:
            return None, rest
        found = [*zip((pieces[number].message for number in numbers), words, strict=True)]
        turns = [item for pair in zip(parts[::2], [*found, (0, "")], strict=True) for item in pair][:-1]
        return Rendered(turns, text, left_out), rest

    def _changed(self, messages: Sequence[Message], names: dict[str, Any]) -> CheckpointError:
        """What to say of a template that does more with words than to write them."""
        changed = (index for index in range(len(messages)) if self._rendered(messages, names, [index])[0] is None)
        roles = [messages[index]["role"] for index in changed] or ["first"]
        return CheckpointError(
            f"{TEMPLATE_FILE} changes the words of the {roles[0]} message, or renders another text because of "
            f"them; name a style that does not with {param('prompt_style')}"
        )


@cache
def _tags(source: str) -> re.Pattern[str]:
    """The tags that a template looks for in contents."""
    _, tags = _SANDBOX.render(source, {}, [])
    return re.compile(f"({'|'.join(map(re.escape, sorted(tags, key=len, reverse=True))) or '(?!)'})")


def _left_out(messages: Sequence[Message], pieces: Sequence[Piece], written: Collection[int]) -> list[int]:
    """The messages whose thoughts a template does not write.

    Raises:
        UserError: It does not write a call.
        CheckpointError: It does not write a message.
    """
    found: list[int] = []
    for number, piece in enumerate(pieces):
        if number in written:
            continue
        message = messages[piece.message]
        thoughts = thoughts_of(message) if message["role"] == "assistant" else None
        inside = thoughts is not None and piece.words in thoughts.opening + thoughts.inner
        if piece.kind == "thoughts" or (piece.words != message["content"].strip() and inside):
            found.append(piece.message)
        elif piece.kind == "call":
            raise UserError(
                f"{TEMPLATE_FILE} leaves out tool_calls of the assistant; use a model whose template writes them, or "
                f"leave such rows out with {param('on_error', 'skip')}"
            )
        else:
            raise CheckpointError(
                f"{TEMPLATE_FILE} leaves out the {message['role']} message; do without, or name a style with "
                f"{param('prompt_style')}"
            )
    return sorted(set(found))
