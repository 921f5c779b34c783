"""Conversations -> samples: ids and labels of many rows at once, each text encoded once.

What is promised of every sample is checked on every sample: one beginning, each trained turn with its end, and no
control token out of somebody's words.

Shapes: N tokens of all samples.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from lit_llama.errors import CheckpointError, DataError, UserError
from lit_llama.text.config import OnError, Overflow, ThoughtsRule, TrainOn, TypedEnds
from lit_llama.text.dataset.writer import Samples
from lit_llama.text.message import IGNORE_INDEX, Conversation, Dropped, Message
from lit_llama.text.pipeline.render import Note, Rendered, Renderer
from lit_llama.text.prompts.encode import JinjaStyle, Run, begins, for_style
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.wording import param

Pieces = list[tuple[Conversation, Samples]]


@dataclass(frozen=True)
class Encoded:
    """Samples of some conversations.

    Args:
        batch: Their ids and labels.
        conversations: What each sample was made of; several may come from one row.
        cut: Rows that lost a part of their prompt or answer.
        parts: Rows that became several samples.
        dropped: Rows that are left out.
        notes: What there is to say of some rows, and which.
    """

    batch: Samples
    conversations: list[Conversation]
    cut: list[int]
    parts: list[int]
    dropped: list[Dropped]
    notes: dict[Note, list[int]] = field(default_factory=dict)


class Encoder:
    """Encoder of conversations in one style.

    Args:
        tokenizer: Of the model to be tuned.
        style: How a conversation is rendered.
        max_seq_length: Most tokens of a sample.
        mask_inputs: Only answers carry loss.
        train_on: Every answer carries loss, or the last one of a conversation only.
        overflow: What becomes of longer rows: they are dropped; lose their oldest turns and the beginning of a
            question; lose the end of the last answer, but not its end-of-text token; are cut into several samples
            between turns; or are an error.
        on_error: A row that the style cannot render stops the encoding, or is dropped with its reason.
        thoughts: What becomes of the thoughts of answers.
        spelled: Texts hold control tokens, spelled: they were rendered before.
        typed_ends: Whether an answer keeps a spelled control token that it ends in, as text.

    Raises:
        CheckpointError: The tokenizer has not the tokens of the style.
        UserError: Rows were to be split, but only the last answer carries loss: the other parts would teach nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        style: PromptStyle,
        *,
        max_seq_length: int,
        mask_inputs: bool = True,
        train_on: TrainOn = "all",
        overflow: Overflow = "drop",
        on_error: OnError = "stop",
        thoughts: ThoughtsRule = "template",
        spelled: bool = False,
        typed_ends: TypedEnds = "keep",
    ) -> None:
        tokenizer = for_style(tokenizer, style)
        if overflow == "split" and train_on == "last":
            raise UserError(
                f"{param('overflow', 'split')} with {param('train_on', 'last')}: parts without the last answer would "
                "teach nothing; use "
                f"{param('overflow', 'truncate_prompt')}, which keeps as many turns before it as fit"
            )
        self._tokenizer, self._style = tokenizer, style
        self._renderer = Renderer(
            tokenizer,
            style,
            train_on=train_on,
            on_error=on_error,
            thoughts=thoughts,
            mask_inputs=mask_inputs,
            spelled=spelled,
            typed_ends=typed_ends,
        )
        self._limit, self._mask_inputs, self._overflow = max_seq_length, mask_inputs, overflow
        self._is_control = np.zeros(tokenizer.size, dtype=bool)
        self._is_control[list(tokenizer.control.values())] = True
        if tokenizer.unknown is not None:
            self._is_control[tokenizer.unknown] = False  # what a text may well come to

    def render(self, conversations: Sequence[Conversation]) -> Rendered:
        """Cut conversations into what is encoded apart: all that is to do before the tokenizer has its turn.

        Raises:
            UserError: The style cannot render a row, or does not say where an answer is.
            CheckpointError: The style ends answers in no control token of this tokenizer.
        """
        return self._renderer.render(conversations)

    def encode(self, rendered: Rendered) -> Encoded:
        """Make samples of what was rendered.

        Raises:
            DataError: A row is too long and `overflow` is "error".
            CheckpointError: The style begins a text with no beginning or two, or the tokenizer makes control tokens of
                somebody's words.
        """
        conversations, dropped = rendered.conversations, list(rendered.dropped)
        batch, trained = self._encode(conversations, rendered.runs)
        if (batch.lengths <= self._limit).all():
            return Encoded(batch, conversations, [], rendered.apart, dropped, rendered.notes)
        fits = np.flatnonzero(batch.lengths <= self._limit).tolist()
        pieces, kept = [batch.take(fits)], [conversations[i] for i in fits]
        cut: list[int] = []
        parts = list(rendered.apart)
        ends = np.cumsum(batch.lengths)
        for index in np.flatnonzero(batch.lengths > self._limit).tolist():
            long = conversations[index]
            inside = slice(ends[index] - batch.lengths[index], ends[index])
            made = self._shorten(long, batch.take([index]), trained[inside])
            if isinstance(made, Dropped):
                dropped.append(replace(made, tokens=int(batch.lengths[index])))
                continue
            pieces += [piece for _, piece in made]
            kept += [conversation for conversation, _ in made]
            (cut if self._overflow != "split" else parts).append(long.row)
        order = sorted(range(len(kept)), key=lambda i: kept[i].row)  # stable: the parts of a row stay in order
        parts = list(dict.fromkeys(parts))
        return Encoded(_join(pieces).take(order), [kept[i] for i in order], cut, parts, dropped, rendered.notes)

    def _one(self, conversation: Conversation) -> tuple[Samples, npt.NDArray[np.bool_]]:
        return self._encode([conversation], [self._renderer.runs(conversation)])

    def _encode(
        self, conversations: Sequence[Conversation], rows: Sequence[Sequence[Run]]
    ) -> tuple[Samples, npt.NDArray[np.bool_]]:
        """Ids and labels, however long, and which of the tokens are of answers: (N,)."""
        runs = list(chain.from_iterable(rows))
        ours = np.fromiter((run.control is not None for run in runs), bool, len(runs))
        texts = [run for run in runs if run.control is None]
        ids, lengths_of_texts = self._tokenizer.encode_flat([run.text for run in texts], [run.place for run in texts])
        sizes = np.ones(len(runs), np.int64)
        sizes[~ours] = lengths_of_texts
        controls = np.fromiter((run.control for run in runs if run.control is not None), np.int32)
        ids = _interleaved(ids, controls, np.repeat(ours, sizes))
        trained = np.repeat(np.fromiter((run.trained and not run.muted for run in runs), bool, len(runs)), sizes)
        labels = np.where(trained, ids, np.int32(IGNORE_INDEX)) if self._mask_inputs else ids
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        lengths = np.add.reduceat(sizes, np.cumsum(counts) - counts) if len(rows) else np.zeros(0, np.int64)
        wrong = np.flatnonzero(self._is_control[ids] & ~np.repeat(ours, sizes))
        if len(wrong):
            at = int(np.searchsorted(np.cumsum(lengths), wrong[0], "right"))
            raise CheckpointError(
                f"{conversations[at].where}: this tokenizer makes a control token (id {ids[wrong[0]]}) of what stands "
                "in the row; it cannot be trusted with other people's words"
            )
        self._check_beginnings(ids, lengths, conversations)
        return Samples(ids, labels, lengths), trained

    def _check_beginnings(
        self, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], conversations: Sequence[Conversation]
    ) -> None:
        style, tokenizer = self._style, self._tokenizer
        texts = np.fromiter((conversation.text for conversation in conversations), bool, len(conversations))
        bos = tokenizer.control.get(tokenizer.bos_token)
        if bos is None or not len(lengths):
            return  # no token begins a text
        begun = texts & bool(tokenizer.bos)
        if not isinstance(style, JinjaStyle):  # which may have none, as other programs render it
            begun |= ~texts & begins(tokenizer, style)
        starts = np.cumsum(lengths) - lengths
        second = ids[np.minimum(starts + 1, len(ids) - 1)]
        wrong = np.flatnonzero(begun & ((ids[starts] != bos) | ((second == bos) & (lengths > 1))))
        if len(wrong):
            raise CheckpointError(
                f"{conversations[wrong[0]].where}: expected one {tokenizer.bos_token} at the beginning, found none or "
                "two"
            )

    def _shorten(self, long: Conversation, whole: Samples, trained: npt.NDArray[np.bool_]) -> Pieces | Dropped:
        """What becomes of a row that is too long."""
        if self._overflow == "error":
            raise DataError(f"{long.where} has {len(trained)} tokens, more than {param('max_seq_length', self._limit)}")
        if self._overflow == "truncate_response":
            return self._cut_answer(long, whole, trained)
        if self._overflow == "truncate_prompt":
            return self._cut_prompt(long)
        if self._overflow == "split":
            return self._split_text(long, whole) if long.text else self._split_turns(long)
        return Dropped(long.row, long.where, f"longer than {self._limit} tokens")

    def _cut_answer(self, long: Conversation, whole: Samples, trained: npt.NDArray[np.bool_]) -> Pieces | Dropped:
        masked = np.flatnonzero(~trained)
        if self._limit < (masked[-1] + 1 if len(masked) else 0) + 2:  # no room for one token of the answer and the end
            return Dropped(long.row, long.where, f"prompt alone fills {self._limit} tokens")
        keep = np.r_[: self._limit - 1, len(trained) - 1]
        return [(long, Samples(whole.input_ids[keep], whole.labels[keep], np.array([self._limit])))]

    def _cut_prompt(self, long: Conversation) -> Pieces | Dropped:
        """Leave out the oldest turns, as few as it takes, then the beginning of the last question."""
        turns = [i for i, message in enumerate(long.messages) if message["role"] == "user"]
        if not turns:
            return self._filled(long)

        def later(count: int) -> Conversation:
            return replace(long, messages=long.messages[: turns[0]] + long.messages[turns[count] :])

        def fits(count: int) -> bool:
            return int(self._one(later(count))[0].lengths[0]) <= self._limit

        # Searched, not tried one by one: a row may have a hundred thousand turns.
        count = bisect_left(range(len(turns)), True, key=fits)
        if count < len(turns):
            return [(later(count), self._one(later(count))[0])]
        return self._cut_question(later(len(turns) - 1))

    def _cut_question(self, long: Conversation) -> Pieces | Dropped:
        """Leave out the beginning of the only question, of its input first; something of it has to stay."""
        at = next(i for i, message in enumerate(long.messages) if message["role"] == "user")
        messages = list(long.messages)
        while True:
            shorter = replace(long, messages=tuple(messages))
            batch, trained = self._one(shorter)
            excess = int(batch.lengths[0]) - self._limit
            if excess <= 0:
                return [(shorter, batch)]
            field = "input" if messages[at].get("input") else "content"
            text = messages[at][field]
            cut = max(1, int(len(text) * excess / max(1, int((~trained).sum()))))
            messages[at] = {**messages[at], field: text[cut:]}
            if not messages[at]["content"].strip():
                return self._filled(long)

    def _filled(self, long: Conversation) -> Dropped:
        return Dropped(long.row, long.where, f"what cannot be cut fills {self._limit} tokens")

    def _split_turns(self, long: Conversation) -> Pieces | Dropped:
        """As many turns in a sample as fit, each with the system message."""
        first = next(i for i, message in enumerate(long.messages) if message["role"] != "system")
        system, rest = long.messages[:first], long.messages[first:]
        starts = [i for i, message in enumerate(rest) if message["role"] == "user" or i == 0]
        turns = [rest[i:j] for i, j in zip(starts, [*starts[1:], len(rest)], strict=True)]
        made: Pieces = []
        begun: tuple[Message, ...] = ()
        passed: tuple[Message, ...] = ()  # turns without anything to learn, for the one behind them to refer to
        for turn in turns:
            if not any(message["role"] == "assistant" and message.get("train", True) for message in turn):
                passed += turn
                continue
            together = begun + passed + turn
            for held in (together, passed + turn, turn):
                part = replace(long, messages=system + held)
                batch, _ = self._one(part)
                if batch.lengths[0] <= self._limit:
                    break
            else:
                return Dropped(long.row, long.where, f"one turn alone is longer than {self._limit} tokens")
            if held is together and begun:
                made.pop()
            made.append((part, batch))
            begun, passed = held, ()
        return made

    def _split_text(self, long: Conversation, whole: Samples) -> Pieces:
        """Windows that follow each other, each with the beginning; the end is only where the text ends.

        Every token is predicted in one of them: where no beginning stands before the first, the last one of the
        window before does.
        """
        begins = int(bool(self._tokenizer.bos))
        size = self._limit - 1
        made: Pieces = []
        for start in range(1, len(whole.input_ids), size):
            ids, labels = whole.input_ids[start : start + size], whole.labels[start : start + size]
            before = 0 if begins else start - 1
            first = whole.input_ids[: start == 1 and not begins]
            text = self._text(np.concatenate([first, ids]))
            batch = Samples(
                np.append(whole.input_ids[before], ids).astype(np.int32),
                np.append(whole.labels[before], labels).astype(np.int32),
                np.array([len(ids) + 1]),
            )
            made.append((replace(long, messages=({"role": "assistant", "content": text},)), batch))
        return made

    def _text(self, ids: npt.NDArray[np.int32]) -> str:
        """What a window says; its borders may go through a character."""
        return self._tokenizer.decode(ids[~self._is_control[ids]].tolist()).strip("\ufffd")


def _interleaved(
    texts: npt.NDArray[np.int32], controls: npt.NDArray[np.int32], is_control: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """(N,) control tokens where they stand, and texts everywhere else."""
    ids = np.empty(len(is_control), np.int32)
    ids[is_control] = controls
    ids[~is_control] = texts
    return ids


def _join(batches: Sequence[Samples]) -> Samples:
    columns = [[getattr(batch, name) for batch in batches] for name in ("input_ids", "labels", "lengths")]
    return Samples(*(np.concatenate(column) for column in columns))
