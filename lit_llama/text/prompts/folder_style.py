"""Prompt style that a folder carries: a built-in one, or its own chat template in a sandbox.

A folder carries its style as `chat_template.jinja`, which transformers, vLLM and llama.cpp read too. A template that is
equal to one of the built-in styles is rendered by it, any other by sandboxed Jinja.
"""

from collections.abc import Collection, Iterable
from copy import copy
from pathlib import Path
from typing import get_args

from lit_llama.errors import CheckpointError
from lit_llama.text.dataset.config import StyleName
from lit_llama.text.prompts.styles import (
    Alpaca,
    ChatML,
    Llama2,
    Llama3,
    Mistral,
    Plain,
    PromptStyle,
    Segment,
    Vicuna,
    Ziya,
)
from lit_llama.text.prompts.template import TEMPLATE_FILE as TEMPLATE_FILE
from lit_llama.text.prompts.template import JinjaStyle as JinjaStyle
from lit_llama.text.tokenizer.places import any_of
from lit_llama.text.tokenizer.special import SETTINGS_FILE, read_object

_STYLES: dict[str, PromptStyle] = {
    style.name: style for style in (Alpaca(), ChatML(), Ziya(), Vicuna(), Llama2(), Llama3(), Mistral(), Plain())
}
assert set(_STYLES) == set(get_args(StyleName))


def named_style(name: str) -> PromptStyle:
    """Return a built-in style."""
    return _STYLES[name]


def style_of(template: str) -> PromptStyle:
    """Return the style that a chat template stands for."""
    for style in _STYLES.values():
        for begins in (True, False):
            if template == style.jinja(bos=begins):
                found = copy(style)
                found.begins = begins
                return found
    return JinjaStyle(template)


def trained_ends(segments: Iterable[Segment], control: Collection[str], usual: str | None = None) -> list[Segment]:
    """Return the segments in which the end of every answer is trained: the template's text up to its first control
    token.

    What ends an answer already, or is followed by somebody's words before a control token, stays as it is.

    Args:
        segments: As a style rendered them.
        control: Spellings of the tokenizer's control tokens.
        usual: The control token that ends most answers, which counts before others that stand in front of it.
    """
    pattern = any_of(control)
    result: list[Segment] = []
    end: int | None = None  # where the text behind an open answer begins
    muted = False
    for segment in segments:
        if not segment.template:
            end, muted = len(result) + 1 if segment.trained else None, segment.muted
            result.append(segment)
            continue
        found = pattern.search(segment.text) if end is not None else None
        if end is None or found is None:
            result.append(segment)
            continue
        stop = segment.text.find(usual) + len(usual) if usual and usual in segment.text else found.end()
        result[end:] = [Segment(held.text, trained=True, template=True, muted=muted) for held in result[end:]]
        cut = len(segment.text) if segment.trained else stop
        rest = Segment(segment.text[cut:], template=True)
        own = Segment(segment.text[:cut], trained=True, template=True, muted=muted)
        result += [own, *([rest] if rest.text else [])]
        end = None
    return result


def answer_end(style: PromptStyle, bos: str, eos: str, control: Collection[str]) -> str | None:
    """Return the spelling of the token that ends an answer in a style, which need not be the model's own end.

    None if the style does not say, or refuses to render one question and its answer.
    """
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    try:
        segments = trained_ends(style.render(messages, bos=bos, eos=eos), control)
    except CheckpointError:
        return None
    answers = [index for index, segment in enumerate(segments) if segment.trained and not segment.template]
    if not answers:
        return None
    ends = (any_of(control).search(segment.text) for segment in segments[answers[-1] :] if segment.trained)
    return next((match.group() for match in ends if match), None)


def folder_style(folder: Path) -> PromptStyle | None:
    """Return the style a folder carries, as chat_template.jinja or inside tokenizer_config.json; None if it has none.

    Of several templates it is the one named "default".

    Raises:
        CheckpointError: The file is not UTF-8, or not a JSON object.
    """
    path, settings = folder / TEMPLATE_FILE, folder / SETTINGS_FILE
    if not path.is_file():
        template = read_object(settings).get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        return style_of(template) if isinstance(template, str) else None
    try:
        return style_of(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from error
