"""Segments -> runs of text and control tokens, and the ids of a prompt: the same for training and for generation."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lit_llama.errors import CheckpointError
from lit_llama.text.conversation import Message
from lit_llama.text.prompts import JinjaStyle, answer_end
from lit_llama.text.styles import PromptStyle, Segment
from lit_llama.text.tokenizer import Tokenizer

IGNORE_INDEX = -100
"""Label of a position without loss, as in torch and transformers."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pieces that are encoded together: a text, or one control token."""

    text: str
    trained: bool
    control: int | None = None


def prompt_ids(
    tokenizer: Tokenizer, style: PromptStyle, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Ids of a conversation up to where the assistant has to begin; `tools` are those that it may call.

    Raises:
        CheckpointError: The tokenizer has not the tokens of the style.
    """
    check_style(tokenizer, style)
    segments = style.render(messages, bos=tokenizer.bos, eos=tokenizer.eos, answer=True, tools=tools)
    runs = Cutter(tokenizer).runs(segments)
    texts = iter(tokenizer.encode_batch([run.text for run in runs if run.control is None]))
    return [i for run in runs for i in (next(texts) if run.control is None else [run.control])]


def end_id(tokenizer: Tokenizer, style: PromptStyle) -> int | None:
    """The token that ends an answer in this style, which need not be the model's own end; None if it does not say."""
    end = answer_end(style, tokenizer.bos, tokenizer.eos, tokenizer.control)
    return None if end is None else tokenizer.control[end]


def answer_opening(tokenizer: Tokenizer, style: PromptStyle) -> str:
    """Text that a decoded answer begins with and that is of the style, not of the answer."""
    if isinstance(style, JinjaStyle) or tokenizer.spaced:
        return ""
    segments = style.render([{"role": "assistant", "content": "."}], eos=tokenizer.eos)
    first = next(segment for segment in segments if segment.trained)
    return first.text if first.template else ""


def check_style(tokenizer: Tokenizer, style: PromptStyle) -> None:
    """Raise CheckpointError if the tokenizer would cut a token of the style into pieces that no model has learned."""
    if missing := [token for token in style.tokens if token not in tokenizer.control]:
        raise CheckpointError(
            f"the prompt style {style.name} needs the tokens {', '.join(missing)}, which this tokenizer has not: name "
            "another with --prompt_style, or use the tokenizer of a model that was trained in it, with the "
            "added_tokens.json and tokenizer_config.json beside it"
        )


class Cutter:
    """Cuts segments into runs: what a tokenizer encodes as one text, and control tokens between them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._control, self._spaced = tokenizer.control, tokenizer.spaced
        spellings = sorted(tokenizer.control, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, spellings)) or '(?!)'})")
        self._pattern = pattern
        self._pieces = lru_cache(4096)(self._cut)  # templates come again and again

    def runs(self, segments: Iterable[Segment]) -> list[Run]:
        """Split template text at control tokens, and join what stands between them.

        A text that goes on after another begins with a space of its own where the tokenizer puts one anyway: so both
        together have the ids that they have as one text.
        """
        runs: list[Run] = []
        for segment in segments:
            if not segment.template:
                if segment.text:
                    self._add(runs, segment.text, segment)
                continue
            for piece, control in self._pieces(segment.text):
                if control is None:
                    self._add(runs, piece, segment)
                else:
                    runs.append(Run(piece, segment.trained, control))
        return runs

    def _cut(self, template: str) -> list[tuple[str, int | None]]:
        """Texts and control tokens of a template, in their order."""
        pieces = enumerate(self._pattern.split(template))
        return [(piece, self._control[piece] if index % 2 else None) for index, piece in pieces if piece]

    def _add(self, runs: list[Run], text: str, segment: Segment) -> None:
        goes_on = bool(runs) and runs[-1].control is None
        if goes_on and runs[-1].trained == segment.trained:
            runs[-1] = Run(runs[-1].text + text, segment.trained)
        else:
            doubled = goes_on and segment.template and text[0] == " " and self._spaced
            runs.append(Run(text[doubled:], segment.trained))
