"""Segments -> ids and labels, each text encoded once and exactly as generation will see it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_llama.errors import CheckpointError, DataError, UserError
from lit_llama.text.formats import Dropped, Example
from lit_llama.text.prompts import JinjaStyle
from lit_llama.text.styles import Message, PromptStyle, Segment
from lit_llama.text.tokenizer import Tokenizer

IGNORE_INDEX = -100
"""Label of a position without loss, as in torch and transformers."""

Overflow = Literal["drop", "truncate_response", "error"]


@dataclass(frozen=True)
class Sample:
    """One sequence to train on: ids and unshifted labels of the same length."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    cut: bool = False


@dataclass(frozen=True)
class _Run:
    """Neighbouring pieces that are encoded together: a text, or one control token."""

    text: str
    trained: bool
    control: int | None = None


def prompt_ids(tokenizer: Tokenizer, style: PromptStyle, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant has to begin.

    Raises:
        CheckpointError: The tokenizer has not the tokens of the style.
    """
    check_style(tokenizer, style)
    segments = style.render(messages, bos=tokenizer.bos, eos=tokenizer.eos, answer=True)
    runs = list(_runs(segments, tokenizer))
    texts = iter(tokenizer.encode_batch([run.text for run in runs if run.control is None]))
    return [i for run in runs for i in (next(texts) if run.control is None else [run.control])]


def end_id(tokenizer: Tokenizer, style: PromptStyle) -> int | None:
    """The token that ends an answer in this style, which need not be the model's own end; None if it does not say."""
    if isinstance(style, JinjaStyle):
        return None
    segments = style.render([{"role": "assistant", "content": "."}], bos=tokenizer.bos, eos=tokenizer.eos)
    ends = [segment.text for segment in segments if segment.trained and segment.template]
    return tokenizer.control.get(ends[-1]) if ends else None


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


def encode_examples(
    examples: Sequence[Example],
    style: PromptStyle,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    mask_inputs: bool,
    overflow: Overflow = "drop",
) -> tuple[list[Sample], list[Dropped]]:
    """Encode prompts and answers.

    Args:
        examples: What was read.
        style: How it is rendered.
        tokenizer: Of the model to be tuned.
        max_seq_length: Most tokens of a sample.
        mask_inputs: The prompt carries no loss.
        overflow: A longer row is dropped, its answer is cut in front of its end-of-text token, or it is an error.

    Returns:
        Samples in the order of the rows, and the rows dropped.

    Raises:
        CheckpointError: The tokenizer has not the tokens of the style.
        DataError: A row is too long and `overflow` is "error".
    """
    check_style(tokenizer, style)
    conversations = [_conversation(example, style, tokenizer) for example in examples]
    texts = iter(tokenizer.encode_batch([run.text for runs in conversations for run in runs if run.control is None]))
    samples: list[Sample] = []
    dropped: list[Dropped] = []
    for example, runs in zip(examples, conversations, strict=True):
        ids: list[int] = []
        labels: list[int] = []
        for run in runs:
            piece = next(texts) if run.control is None else [run.control]
            ids += piece
            labels += piece if run.trained or not mask_inputs else [IGNORE_INDEX] * len(piece)
            if not run.trained:
                prompt_length = len(ids)
        too_long = len(ids) - max_seq_length
        if too_long <= 0:
            samples.append(_checked(Sample(ids, labels, example.row), tokenizer))
        elif overflow == "error":
            raise DataError(f"row {example.row} has {len(ids)} tokens, more than --max_seq_length {max_seq_length}")
        elif overflow == "drop":
            dropped.append(Dropped(example.row, f"longer than {max_seq_length} tokens"))
        elif max_seq_length < prompt_length + 2:  # no room for one token of the answer and the end
            dropped.append(Dropped(example.row, f"prompt alone fills {max_seq_length} tokens"))
        else:
            keep = max_seq_length - 1
            sample = Sample(ids[:keep] + ids[-1:], labels[:keep] + labels[-1:], example.row, cut=True)
            samples.append(_checked(sample, tokenizer))
    return samples, dropped


def _conversation(example: Example, style: PromptStyle, tokenizer: Tokenizer) -> list[_Run]:
    """Runs up to the end of the answer: what a template puts after it is never generated."""
    messages = [
        {"role": "user", "content": style.user(example)},
        {"role": "assistant", "content": example.response},
    ]
    runs = list(_runs(style.render(messages, bos=tokenizer.bos, eos=tokenizer.eos), tokenizer))
    while runs and not runs[-1].trained:
        runs.pop()
    if not runs:
        raise UserError(f"the prompt style {style.name} does not say where an answer is, so it cannot be trained")
    return runs


def _runs(segments: Iterable[Segment], tokenizer: Tokenizer) -> list[_Run]:
    """Split template text at control tokens, and join what stands between them.

    A text that goes on after another begins with a space of its own where the tokenizer puts one anyway: so both
    together have the ids that they have as one text.
    """
    pattern = re.compile(
        "|".join(re.escape(token) for token in sorted(tokenizer.control, key=len, reverse=True)) or "$^"
    )
    runs: list[_Run] = []

    def add(text: str, trained: bool, template: bool) -> None:
        goes_on = bool(runs) and runs[-1].control is None
        if text and goes_on and runs[-1].trained == trained:
            runs[-1] = _Run(runs[-1].text + text, trained)
        elif text:
            doubled = goes_on and template and text[0] == " " and tokenizer.spaced
            runs.append(_Run(text[doubled:], trained))

    for segment in segments:
        position = 0
        for match in pattern.finditer(segment.text) if segment.template else ():
            add(segment.text[position : match.start()], segment.trained, segment.template)
            runs.append(_Run(match.group(), segment.trained, tokenizer.control[match.group()]))
            position = match.end()
        add(segment.text[position:], segment.trained, segment.template)
    return runs


def _checked(sample: Sample, tokenizer: Tokenizer) -> Sample:
    """Our own promises, held on every sample: something to learn, the end learned, and at most one beginning."""
    if sample.labels[-1] not in tokenizer.control.values():
        last = tokenizer.decode(sample.input_ids[-3:])
        raise CheckpointError(f"row {sample.row} does not end in a control token of this tokenizer but in {last!r}")
    assert len(sample.input_ids) == len(sample.labels) and sample.labels[-1] == sample.input_ids[-1]
    begins = [token_id == tokenizer.control.get(tokenizer.bos) for token_id in sample.input_ids[:2]]
    if tokenizer.bos and begins != [True, False]:
        raise CheckpointError(f"row {sample.row}: expected one {tokenizer.bos} at the beginning, found none or two")
    return sample
