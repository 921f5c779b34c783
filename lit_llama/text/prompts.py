"""Which prompt style a folder carries: a built-in one, or its own chat template in a sandbox.

A folder carries its style as `chat_template.jinja`, which transformers, vLLM and llama.cpp read too. A template that is
equal to one of the built-in styles is rendered by it, any other by sandboxed Jinja.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from lit_llama.errors import CheckpointError
from lit_llama.text.special import SETTINGS_FILE, read_object
from lit_llama.text.styles import (
    Alpaca,
    ChatML,
    Llama2,
    Llama3,
    Message,
    Mistral,
    Plain,
    PromptStyle,
    Segment,
    Vicuna,
    Ziya,
)

TEMPLATE_FILE = "chat_template.jinja"
StyleName = Literal["alpaca", "chatml", "ziya", "vicuna", "llama-2", "llama-3", "mistral", "plain"]


class JinjaStyle(PromptStyle):
    """A model's own chat template, rendered in a sandbox.

    Contents are rendered as marks and put back afterwards, so that what a user typed can never become a control token
    or part of the template.
    """

    name = "chat_template"
    _MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters, which no template spells

    def __init__(self, template: str) -> None:
        self._source = template

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


_STYLES: dict[str, PromptStyle] = {
    style.name: style for style in (Alpaca(), ChatML(), Ziya(), Vicuna(), Llama2(), Llama3(), Mistral(), Plain())
}
assert set(_STYLES) == set(get_args(StyleName))


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
    path, settings = folder / TEMPLATE_FILE, folder / SETTINGS_FILE
    if not path.is_file():
        template = read_object(settings).get("chat_template")
        return style_of(template) if isinstance(template, str) else None
    try:
        return style_of(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from error
