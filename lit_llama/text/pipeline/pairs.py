"""Preferences on their way into a data folder: each encoded as one sample, and written in three columns.

A preference is one sample, whose labels say which part a token belongs to: IGNORE_INDEX for
the prompt, CHOSEN and REJECTED for the answers. So all that divides samples into train and test does it with these.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError
from lit_llama.text.dataset.batches import Ids
from lit_llama.text.dataset.pairs import CHOSEN, COLUMNS, REJECTED
from lit_llama.text.dataset.writer import List, Samples, SplitWriter
from lit_llama.text.message import IGNORE_INDEX, Conversation, Dropped, Message, Preference
from lit_llama.text.pipeline.encoder import Encoded, Encoder
from lit_llama.text.pipeline.render import Note, Rendered

_PARTS = (IGNORE_INDEX, CHOSEN, REJECTED)
Verdict = tuple[Message | None, bool]
"""Of a row: the rejected answer beside its last one, and whether that one is wanted."""


class PairEncoder(Encoder):
    """Encoder of preferences: each answer behind its prompt as the last answer of a sample."""

    def render(self, conversations: Sequence[Conversation]) -> Rendered:
        """Cut conversations as Encoder does; each answer is a conversation of its own."""
        return super().render([side for conversation in conversations for side in _sides(conversation)])

    def encode(self, rendered: Rendered) -> Encoded:
        """Make one sample of the answers of each row; a row of which one answer is dropped is dropped.

        Raises:
            DataError: A row is too long and `overflow` is "error".
            CheckpointError: As Encoder.
        """
        found = super().encode(rendered)
        dropped = {row.row: row for row in reversed(found.dropped)}  # the first of both answers counts
        ends = np.cumsum(found.batch.lengths)
        rows: dict[int, list[tuple[Preference, Ids, Ids]]] = {}
        for index, conversation in enumerate(found.conversations):
            assert isinstance(conversation, Preference)
            inside = slice(int(ends[index] - found.batch.lengths[index]), int(ends[index]))
            prompt, answer = _cut(found.batch.input_ids[inside], found.batch.labels[inside])
            rows.setdefault(conversation.row, []).append((conversation, prompt, answer))
        kept: list[Preference] = []
        pieces: list[tuple[Ids, Ids]] = []
        for row, sides in rows.items():
            if row in dropped:
                continue
            conversation = sides[0][0]
            if why := _unusable(sides):
                dropped[row] = Dropped(row, conversation.where, why)
                continue
            kept.append(conversation)
            pieces.append(_laid(sides))
        notes: dict[Note, list[int]] = {what: list(dict.fromkeys(numbers)) for what, numbers in found.notes.items()}
        ordered = sorted(dropped.values(), key=lambda row: row.row)
        return Encoded(_batch(pieces), list[Conversation](kept), [], [], ordered, notes)


def _sides(conversation: Conversation) -> list[Preference]:
    """The conversation with each of its answers."""
    assert isinstance(conversation, Preference)
    if conversation.rejected is None:
        return [conversation]
    other = replace(conversation, messages=(*conversation.prompt, conversation.rejected), rejected=None, wanted=False)
    return [conversation, other]


def _cut(ids: Ids, labels: Ids) -> tuple[Ids, Ids]:
    """Prompt and answer of a sample; an empty answer where it is not all that is trained up to the end."""
    first = int(np.argmax(labels != IGNORE_INDEX))
    if first == 0 or (labels[first:] == IGNORE_INDEX).any():
        return ids, ids[:0]
    return ids[:first], ids[first:]


def _unusable(sides: Sequence[tuple[Preference, Ids, Ids]]) -> str:
    """Why the encoded answers of a row cannot be compared; "" if they can."""
    prompts, answers = [prompt for _, prompt, _ in sides], [answer for _, _, answer in sides]
    if not all(map(len, answers)):
        return "the prompt style does not write the answer in one piece behind its prompt"
    if len(sides) > 1 and not np.array_equal(prompts[0], prompts[1]):
        return "the prompt style writes different prompts before chosen and rejected"
    if len(sides) > 1 and np.array_equal(answers[0], answers[1]):
        return "chosen and rejected are the same"
    return ""


def _laid(sides: Sequence[tuple[Preference, Ids, Ids]]) -> tuple[Ids, Ids]:
    """Ids of the prompt and of each answer end to end, and the part of each."""
    prompt = sides[0][1]
    ids, parts = [prompt], [np.full(len(prompt), IGNORE_INDEX, np.int32)]
    for conversation, _, answer in sides:
        ids.append(answer)
        parts.append(np.full(len(answer), CHOSEN if conversation.wanted else REJECTED, np.int32))
    return np.concatenate(ids), np.concatenate(parts)


def _batch(pieces: Sequence[tuple[Ids, Ids]]) -> Samples:
    lengths = np.fromiter((len(ids) for ids, _ in pieces), np.int64, len(pieces))
    if not pieces:
        return Samples(np.zeros(0, np.int32), np.zeros(0, np.int32), lengths)
    ids, parts = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return Samples(ids, parts, lengths)


class PairWriter(SplitWriter):
    """One split of a folder of preferences."""

    columns: ClassVar[Sequence[str]] = COLUMNS

    @staticmethod
    def lists(batch: Samples) -> list[List]:
        """Return what is stored of samples, a column for each part."""
        return [(batch.input_ids[batch.labels == part], _counts(batch, part)) for part in _PARTS]

    @staticmethod
    def samples(lists: Sequence[List]) -> Samples:
        """Make samples of what is stored of them."""
        lengths = np.stack([sizes for _, sizes in lists])  # (3, samples)
        parts = np.repeat(np.tile(np.array(_PARTS, np.int32), lengths.shape[1]), lengths.T.ravel())
        ids = np.empty(len(parts), np.int32)
        for part, (values, _) in zip(_PARTS, lists, strict=True):
            ids[parts == part] = values
        return Samples(ids, parts, lengths.sum(0))

    @staticmethod
    def sequences(batch: Samples) -> npt.NDArray[np.int64]:
        """Count the tokens of the prompt with the longer of its answers, of each sample."""
        answers = np.maximum(_counts(batch, CHOSEN), _counts(batch, REJECTED))
        return _counts(batch, IGNORE_INDEX) + answers


def _counts(batch: Samples, part: int) -> npt.NDArray[np.int64]:
    """Tokens of a part in each sample: (samples,)."""
    if not len(batch.lengths):
        return np.zeros(0, np.int64)
    starts = np.cumsum(batch.lengths) - batch.lengths
    return np.add.reduceat((batch.labels == part).astype(np.int64), starts)


class Judgements:
    """Rows by what is known of them: a folder holds pairs, or single answers that are wanted or not."""

    def __init__(self) -> None:
        self.pairs = self.wanted = self.unwanted = 0

    def add(self, preference: Preference) -> Verdict:
        """Count a row, and give what there is to know of its answers."""
        if preference.rejected is not None:
            self.pairs += 1
        elif preference.wanted:
            self.wanted += 1
        else:
            self.unwanted += 1
        return preference.rejected, preference.wanted

    def check(self) -> None:
        """Raise DataError if there are rows of both kinds."""
        if self.pairs and self.wanted + self.unwanted:
            raise DataError(
                f"{self.pairs} rows have a chosen and a rejected answer, {self.wanted + self.unwanted} one answer with "
                "a label: prepare them apart, each into a folder of its own"
            )

    def meta(self) -> dict[str, Any]:
        """Return what meta.json says of them."""
        single = {} if self.pairs else {"wanted": self.wanted, "unwanted": self.unwanted}
        return {"kind": "preference", "pairs": bool(self.pairs), **single}


def raw_preference(messages: Sequence[Message], tools: Sequence[Any], verdict: Verdict) -> dict[str, Any]:
    """Write a row as it is read again as a preference."""
    rejected, wanted = verdict
    beside = {"tools": list(tools)} if tools else {}
    if rejected is None:
        return {"messages": list(messages), "label": wanted} | beside
    return {"prompt": list(messages[:-1]), "chosen": [messages[-1]], "rejected": [rejected]} | beside
