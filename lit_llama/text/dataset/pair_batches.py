"""Batches of preference rows: a prompt that is computed once, from which both of its answers go on.

Shapes: R rows, T places, N answer tokens.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from lit_llama.text.dataset.batches import Batch, Ids


class Source(Protocol):
    """Rows of prompt, chosen and rejected ids."""

    prompt_lengths: npt.NDArray[np.int64]  # (R,)
    chosen_lengths: npt.NDArray[np.int64]  # (R,)
    rejected_lengths: npt.NDArray[np.int64]  # (R,)

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> tuple[Ids, Ids, Ids]: ...


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """Answers to prompts, laid end to end; every token of an answer is a target, none of a prompt is."""

    rows: list[int]  # of the split, one for each prompt
    counts: npt.NDArray[np.int64]  # (R, 2) tokens of the chosen and the rejected answers, in the order of the targets
    reference: npt.NDArray[np.float64]  # (R, 2) log p of the answers before training

    def emptied(self) -> Self:
        """Return a batch of one place and no row."""
        return replace(super().emptied(), rows=[], counts=self.counts[:0], reference=self.reference[:0])


class PairRows:
    """Rows of a split as a run takes them.

    Args:
        source: Where they are.

    Attributes:
        reference: (rows, 2) log p of chosen and rejected before training, once it is filled in.
        answers: (rows, 2) tokens of chosen and rejected.
        lengths: (rows,) places of each row.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.answers = np.stack([source.chosen_lengths, source.rejected_lengths], 1)
        self.reference = np.zeros((len(source), 2))
        self.lengths = self._places(shared=False)

    def __len__(self) -> int:
        return len(self.source)

    def counted(self, share: bool) -> Self:
        """Return these rows, counted as batches are laid out: with the prompt once for both answers, or not."""
        others = self.others  # one and the same for all views, with its reference
        found = copy(self)
        found.others = others
        found.lengths = self._places(shared=share)
        return found

    def _places(self, *, shared: bool) -> npt.NDArray[np.int64]:
        prompt, answers = self.source.prompt_lengths, (self.answers > 0).sum(1)
        prompts = np.where((answers == 2) & (shared & (prompt > 1)), 1, answers)
        return (prompt - 1) * prompts + self.answers.sum(1)

    @cached_property
    def others(self) -> "PairRows":
        """The prompts with answers to others, see `Mismatched`."""
        return PairRows(Mismatched(self.source))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return int((self.source.prompt_lengths + self.answers.max(1)).max(initial=0))

    def trained_tokens(self, rows: Iterable[int] | None = None) -> int:
        """Count the tokens of the answers of some rows, or of all."""
        return int((self.answers if rows is None else self.answers[list(rows)]).sum())

    def places(self, rows: Sequence[int] | None = None) -> int:
        """Count the tokens that go in for some rows, or all."""
        return int(self.lengths[slice(None) if rows is None else list(rows)].sum())

    def batch(self, rows: Sequence[int], *, share: bool) -> PairBatch:
        """Lay rows end to end.

        Args:
            rows: Their numbers.
            share: The prompt is a sample of its own, from which both answers go on.
        """
        parts: list[Ids] = []
        parents: list[int] = []
        select: list[npt.NDArray[np.int64]] = []
        targets: list[Ids] = []
        at = 0
        for row in rows:
            prompt, *answers = self.source[row]
            begin, parent = prompt[:0], -1
            if share and len(prompt) > 1 and all(map(len, answers)):
                # Its last token stays with the answers, so that each has a place that predicts its first.
                begin, prompt, parent = prompt[:-1], prompt[-1:], len(parts)
                parts.append(begin)
                parents.append(-1)
                at += len(begin)
            for answer in filter(len, answers):
                parts.append(np.concatenate([prompt, answer[:-1]]))
                parents.append(parent)
                first = at + len(prompt) - 1
                at += len(parts[-1])
                select.append(np.arange(first, at))
                targets.append(answer)
        return PairBatch(
            input_ids=np.concatenate(parts).astype(np.int64),
            lengths=[len(part) for part in parts],
            select=np.concatenate(select),
            targets=np.concatenate(targets).astype(np.int64),
            parents=parents if max(parents) >= 0 else [],
            rows=list(rows),
            counts=self.answers[list(rows)],
            reference=self.reference[list(rows)],
        )

    def stranger(self, vocab_size: int) -> int | None:
        """Find an id that is none of so many tokens, if there is one."""
        find = getattr(self.source, "stranger", None)
        found: int | None = find(vocab_size) if find else None
        return found


class Mismatched:
    """Prompts with the answer of the next row, by which KTO estimates how far the model has moved in general.

    Which of its two answers alternates from row to row, so that neither kind counts more.

    Args:
        source: The rows; no answer is left longer than fits the longest of them.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        answers = np.stack([source.chosen_lengths, source.rejected_lengths], 1)
        rows = np.arange(len(source))
        self._from = (rows + 1) % max(len(source), 1)
        side = rows % 2
        self._side = np.where(answers[self._from, side] > 0, side, 1 - side)
        limit = int((source.prompt_lengths + answers.max(1)).max(initial=0))
        self.prompt_lengths = source.prompt_lengths
        self.chosen_lengths = np.minimum(answers[self._from, self._side], limit - self.prompt_lengths)
        self.rejected_lengths = np.zeros_like(self.chosen_lengths)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> tuple[Ids, Ids, Ids]:
        answer = self._source[int(self._from[row])][1 + int(self._side[row])][: self.chosen_lengths[row]]
        return self._source[row][0], answer, answer[:0]
