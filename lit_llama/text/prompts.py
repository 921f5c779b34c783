"""Prompt styles: messages -> segments of text, each trained or not, and the equal Jinja chat template.

A folder carries its style as `chat_template.jinja`, which transformers, vLLM and llama.cpp read too. A template that is
equal to one of the built-in styles is rendered by it, any other by sandboxed Jinja.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from lit_llama.errors import CheckpointError, UserError
from lit_llama.text.formats import Example
from lit_llama.text.tokenizer import read_object

TEMPLATE_FILE = "chat_template.jinja"
StyleName = Literal["alpaca", "chatml"]
Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt or an answer.

    `template` text was written by us or by the model's publisher and may spell control tokens; everything else is
    somebody's words, which never become one.
    """

    text: str
    trained: bool = False
    template: bool = False


class PromptStyle(Protocol):
    """How messages become the text that a model was trained on."""

    name: str

    def user(self, example: Example) -> str:
        """Content of the user message for an instruction and its input."""
        ...

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """Segments of a conversation.

        Args:
            messages: The turns so far.
            bos: Spelling of the token that begins a text, empty where the model wants none.
            eos: Spelling of the token that ends one.
            answer: End where the assistant has to begin.
        """
        ...

    def jinja(self, bos: bool) -> str:
        """The chat template that renders the same text; `bos` if the model wants a beginning-of-text token."""
        ...


class Alpaca:
    """The prompt of Stanford Alpaca as lit-llama wrote it: it ends in `### Response:` without a newline."""

    name = "alpaca"
    _WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    _WITHOUT = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    _INPUT = "\n\n### Input:\n"

    def user(self, example: Example) -> str:
        """The instruction, and its input under a heading."""
        return example.instruction + (self._INPUT + example.input if example.input else "")

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """See PromptStyle. The answer mark is part of the user's turn, as every user turn expects an answer."""
        segments = [Segment(bos, template=True)]
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "user":
                preamble = self._WITH_INPUT if self._INPUT in content else self._WITHOUT
                opening = "\n\n" if index else preamble
                segments.append(Segment(f"{opening}### Instruction:\n", template=True))
                segments.append(Segment(content))
                segments.append(Segment("\n\n### Response:", template=True))
            elif role == "assistant":
                segments.append(Segment(content, trained=True))
                segments.append(Segment(eos, trained=True, template=True))
            else:
                raise UserError(f"the prompt style alpaca has no {role} message")
        return [segment for segment in segments if segment.text]

    def jinja(self, bos: bool) -> str:
        """See PromptStyle."""
        return (
            ("{{ bos_token }}" if bos else "")
            + "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            + "{%- if not loop.first -%}{{ '\\n\\n' }}"
            + "{%- elif " + _quote(self._INPUT) + " in message['content'] -%}{{ " + _quote(self._WITH_INPUT) + " }}"
            + "{%- else -%}{{ " + _quote(self._WITHOUT) + " }}{%- endif -%}"
            + "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:' }}"
            + "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}"
            + "{%- else -%}{{ raise_exception('the prompt style alpaca has no ' + message['role'] + ' message') }}"
            + "{%- endif -%}{%- endfor -%}"
        )  # fmt: skip


class ChatML:
    """`<|im_start|>role`, content, `<|im_end|>` (OpenAI's chat markup; SmolLM2, Qwen)."""

    name = "chatml"

    def user(self, example: Example) -> str:
        """The instruction, and its input below it."""
        return f"{example.instruction}\n\n{example.input}" if example.input else example.instruction

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """See PromptStyle."""
        segments = [Segment(bos, template=True)]
        for message in messages:
            trained = message["role"] == "assistant"
            segments.append(Segment(f"<|im_start|>{message['role']}\n", template=True))
            segments.append(Segment(message["content"], trained))
            segments.append(Segment("<|im_end|>", trained, template=True))
            segments.append(Segment("\n", template=True))
        if answer:
            segments.append(Segment("<|im_start|>assistant\n", template=True))
        return [segment for segment in segments if segment.text]

    def jinja(self, bos: bool) -> str:
        """See PromptStyle."""
        return (
            ("{{ bos_token }}" if bos else "")
            + "{%- for message in messages -%}"
            + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
            + "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
        )


class JinjaStyle:
    """A model's own chat template, rendered in a sandbox.

    Contents are rendered as marks and put back afterwards, so that what a user typed can never become a control token
    or part of the template.
    """

    name = "chat_template"
    _MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters, which no template spells

    def __init__(self, template: str) -> None:
        self._source = template

    def user(self, example: Example) -> str:
        """The instruction, and its input below it."""
        return f"{example.instruction}\n\n{example.input}" if example.input else example.instruction

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "", answer: bool = False
    ) -> list[Segment]:
        """See PromptStyle; nothing is trained, as a template does not say where an answer ends."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        # Blanks stay around a mark, so that a template may trim a content or ask whether there is one.
        words = [message["content"].strip() for message in messages]
        marked = [
            {**message, "content": message["content"].replace(word, f"\ue000{index}\ue001", 1)} if word else message
            for index, (message, word) in enumerate(zip(messages, words, strict=True))
        ]
        try:
            template = environment.from_string(self._source)
            text = template.render(
                messages=marked, tools=None, documents=None, add_generation_prompt=answer, bos_token=bos, eos_token=eos
            )
        except Exception as error:  # a template may fail in any way
            raise CheckpointError(f"{TEMPLATE_FILE} cannot be rendered: {error}") from error
        segments = []
        for index, part in enumerate(self._MARK.split(text)):  # text and marks in turn
            segments.append(Segment(words[int(part)]) if index % 2 else Segment(part, template=True))
        return [segment for segment in segments if segment.text]

    def jinja(self, bos: bool) -> str:
        """See PromptStyle."""
        return self._source


_STYLES: dict[str, PromptStyle] = {style.name: style for style in (Alpaca(), ChatML())}
assert set(_STYLES) == set(get_args(StyleName))


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def named_style(name: str) -> PromptStyle:
    """A built-in style."""
    return _STYLES[name]


def style_of(template: str) -> PromptStyle:
    """The style that a chat template stands for."""
    for style in _STYLES.values():
        if template in (style.jinja(bos=True), style.jinja(bos=False)):
            return style
    return JinjaStyle(template)


def folder_style(folder: Path) -> PromptStyle | None:
    """The style a folder carries, as chat_template.jinja or inside tokenizer_config.json; None if it has none.

    Raises:
        CheckpointError: The file is not UTF-8, or not a JSON object.
    """
    path, settings = folder / TEMPLATE_FILE, folder / "tokenizer_config.json"
    if not path.is_file():
        template = read_object(settings).get("chat_template")
        return style_of(template) if isinstance(template, str) else None
    try:
        return style_of(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from error
