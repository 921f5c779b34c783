"""Batches of samples: which rows a step takes, cut to a size and laid end to end without padding.

Prefixes that samples share: computed once for all of them, they give the same loss and gradients out of less work.

A chat template or an instruction's preamble is a tenth to a half of short samples. Tokens see what comes before them
and nothing else, so that the states of a common beginning are the same in all samples; its gradient is the sum of what
they send back (as PrefixGrouper does for groups of one prompt: Liu et al. 2025, arXiv:2506.05433). That holds while no
token of the beginning carries a loss of its own, and nothing is drawn for each token.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from lit_llama.text.message import IGNORE_INDEX

Ids = npt.NDArray[np.int32]
LEAST = 8
"""Tokens that are worth a sample of their own."""


@dataclass(frozen=True)
class Batch:
    """Samples laid end to end without padding.

    The last token of a sample is nobody's input and its first nobody's target: n tokens take n - 1 places. What several
    samples begin with may be a sample of its own, from which they go on: their parent.
    """

    input_ids: npt.NDArray[np.int64]  # (T,)
    lengths: list[int]  # places of each sample; they sum to T
    select: npt.NDArray[np.int64]  # (N,) places whose next token carries loss
    targets: npt.NDArray[np.int64]  # (N,) that next token
    parents: list[int] = field(default_factory=list)  # of each sample, -1 for none; empty: none has one

    def padded(self, multiple: int) -> "Batch":
        """Add a sample at the end that fills up the places to a multiple, and that nobody sees."""
        missing = -len(self.input_ids) % multiple
        if not missing:
            return self
        ids = np.concatenate([self.input_ids, np.zeros(missing, np.int64)])
        parents = [*self.parents, -1] if self.parents else []
        return replace(self, input_ids=ids, lengths=[*self.lengths, missing], parents=parents)

    def emptied(self) -> Self:
        """Return a batch of the first place alone, without a loss."""
        nothing = np.zeros(0, np.int64)
        return replace(self, input_ids=self.input_ids[:1], lengths=[1], select=nothing, targets=nothing, parents=[])


def collate(samples: Sequence[tuple[Ids, Ids]], *, share: bool = False) -> Batch:
    """Lay samples end to end. The shift between input and target happens here and nowhere else.

    Args:
        samples: input_ids and labels of each.
        share: Have what samples begin with alike only once, as far as it carries no loss.
    """
    inputs = [(ids[:-1], labels[1:]) for ids, labels in samples]
    parents: list[int] = []
    if share:
        inputs, parents = _shared(inputs)
    input_ids = np.concatenate([ids for ids, _ in inputs]).astype(np.int64)
    targets = np.concatenate([labels for _, labels in inputs]).astype(np.int64)
    select = np.flatnonzero(targets != IGNORE_INDEX)
    return Batch(input_ids, [len(ids) for ids, _ in inputs], select, targets[select], parents)


def _shared(inputs: Sequence[tuple[Ids, Ids]]) -> tuple[list[tuple[Ids, Ids]], list[int]]:
    """The samples with each common beginning before those that have it, and their parents."""
    most = []
    for ids, labels in inputs:
        trained = np.flatnonzero(labels != IGNORE_INDEX)
        most.append(min(int(trained[0]) if len(trained) else len(ids), len(ids) - 1))  # each keeps a place of its own
    found: list[tuple[Ids, Ids]] = []
    parents: list[int] = []
    rest = dict(enumerate(inputs))
    for length, members in beginnings([ids for ids, _ in inputs], most):
        parent = len(found)
        ids, labels = inputs[members[0]]
        found.append((ids[:length], labels[:length]))
        parents.append(-1)
        for member in members:
            ids, labels = rest.pop(member)
            found.append((ids[length:], labels[length:]))
            parents.append(parent)
    return [*found, *rest.values()], [*parents, *(-1 for _ in rest)]


def beginnings(samples: Sequence[Ids], most: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Divide samples into groups with common beginnings so that most tokens are saved.

    Args:
        samples: Ids of each.
        most: How many first tokens of each may be shared.

    Returns:
        For each group, length of the beginning and samples that have it: two or more, each sample in one group at most.
    """
    able = [index for index, limit in enumerate(most) if limit >= LEAST]
    return _divided(samples, most, able)[1]


def _divided(samples: Sequence[Ids], most: Sequence[int], group: list[int]) -> tuple[int, list[tuple[int, list[int]]]]:
    """Tokens saved, and the groups: all together, or those apart that go on differently, whichever saves more."""
    if len(group) < 2:
        return 0, []
    shared = _common(samples, most, group)
    together = shared * (len(group) - 1) if shared >= LEAST else 0
    apart: dict[int, list[int]] = defaultdict(list)
    for index in group:
        if most[index] > shared:
            apart[int(samples[index][shared])].append(index)
    parts = [_divided(samples, most, part) for part in apart.values() if len(part) < len(group)]
    saved = sum(part for part, _ in parts)
    if saved > together:
        return saved, [found for _, groups in parts for found in groups]
    return together, [(shared, group)] if together else []


def _common(samples: Sequence[Ids], most: Sequence[int], group: list[int]) -> int:
    """Length of the longest beginning that all of a group have and may share."""
    first, shared = samples[group[0]], min(most[index] for index in group)
    for index in group[1:]:
        different = np.flatnonzero(samples[index][:shared] != first[:shared])
        shared = int(different[0]) if len(different) else shared
    return shared


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of the samples in an epoch, a function of (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


class Rows(Protocol):
    """Rows of one split that steps are made of: samples, or preference rows.

    Attributes:
        lengths: (rows,) tokens of each row, by which batches are cut.
    """

    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int], *, share: bool) -> Batch:
        """Lay rows end to end; `share` has what they begin with only once."""
        ...

    def trained_tokens(self, rows: Iterable[int] | None = None) -> int:
        """Count the tokens with a loss, of some rows or all."""
        ...

    def places(self, rows: Sequence[int] | None = None) -> int:
        """Count the tokens that go in for some rows, or all."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model sees."""
        ...

    def counted(self, share: bool) -> Self:
        """Return these rows with the lengths that they have in such batches."""
        ...

    def stranger(self, vocab_size: int) -> int | None:
        """Find an id that is none of so many tokens, if there is one."""
        ...


def micro_batches(split: Rows, rows: Sequence[int], micro_batch_tokens: int, *, share: bool = False) -> Iterator[Batch]:
    """Cut the samples of a step, longest first, into batches of at most `micro_batch_tokens` tokens.

    The gradient of a step does not depend on how its samples are cut. A longer sample is a batch of its own. Tokens are
    counted before any are shared.
    """
    for group in _groups(split.lengths, rows, micro_batch_tokens):
        yield split.batch(group, share=share)


def _groups(lengths: npt.NDArray[np.int64], rows: Sequence[int], micro_batch_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if group and tokens + lengths[row] > micro_batch_tokens:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += int(lengths[row])
    if group:
        yield group


def share_out(lengths: npt.NDArray[np.int64], rows: Sequence[int], shares: int) -> list[list[int]]:
    """Divide samples among processes: the longest first, each to the one with the fewest tokens so far."""
    divided: list[list[int]] = [[] for _ in range(shares)]
    tokens = [0] * shares
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        share = tokens.index(min(tokens))
        divided[share].append(row)
        tokens[share] += int(lengths[row])
    return divided


def shared_micro_batches(
    split: Rows,
    rows: Sequence[int],
    micro_batch_tokens: int,
    share: int,
    shares: int,
    *,
    even: bool,
    share_beginnings: bool = False,
) -> Iterator[Batch]:
    """Yield the micro-batches of one share of the samples of a step.

    Args:
        split: The samples.
        rows: Those of the step, in whatever order; at least one.
        micro_batch_tokens: See `micro_batches`.
        share: Whose, from 0.
        shares: How many there are.
        even: Fill up with batches of one token without a loss, until there are as many as in the share with the most.
        share_beginnings: See `collate`.
    """
    divided = share_out(split.lengths, rows, shares)
    yield from micro_batches(split, divided[share], micro_batch_tokens, share=share_beginnings)
    if even:
        counts = [sum(1 for _ in _groups(split.lengths, part, micro_batch_tokens)) for part in divided]
        for _ in range(max(counts) - counts[share]):
            yield split.batch(rows[:1], share=False).emptied()


_ORDERED = 1 << 16
"""Samples whose order is looked at together."""


def largest_group(
    lengths: npt.NDArray[np.int64],
    *,
    batch_size: int,
    micro_batch_tokens: int,
    seed: int,
    steps: int,
    shares: int = 1,
) -> list[int]:
    """Find the rows of the largest micro-batch, in tokens, that the first `steps` optimizer steps of a run will meet.

    The steps of an epoch, or of several short ones, are divided and cut at once, sample by sample, as `share_out` and
    `_groups` do with each. The search ends with a micro-batch that none can exceed, which few rows soon give.
    """
    largest, step_rows = -1, [0]
    longest = np.sort(lengths)[::-1][:batch_size]
    bound = min(int(longest.sum()), max(int(longest[0]), micro_batch_tokens))
    per_epoch = -(-len(lengths) // batch_size)
    epochs, together = -(-steps // per_epoch), max(1, _ORDERED // len(lengths))
    for first in range(0, epochs, together):
        count = min(together, epochs - first)
        orders = np.full((count, per_epoch * batch_size), -1)
        for epoch in range(count):
            orders[epoch, : len(lengths)] = epoch_order(len(lengths), seed, first + epoch)
        batches = orders.reshape(-1, batch_size)[: steps - first * per_epoch]  # (S, batch_size)
        sizes = -np.sort(-np.where(batches < 0, 0, lengths[batches]), 1)
        every = np.arange(len(batches))
        given, tokens = np.zeros((2, len(batches), shares), np.int64)  # (S, shares): in all, and in the group
        for size in sizes.T:
            share = given.argmin(1)  # (S,)
            open_group = tokens[every, share]
            open_group = np.where((open_group > 0) & (open_group + size > micro_batch_tokens), 0, open_group) + size
            given[every, share] += size
            tokens[every, share] = open_group
            step = int(open_group.argmax())
            if open_group[step] > largest:
                largest = int(open_group[step])
                step_rows = [int(row) for row in batches[step] if row >= 0]
        if largest >= bound:
            break
    groups = (g for share in share_out(lengths, step_rows, shares) for g in _groups(lengths, share, micro_batch_tokens))
    return max(groups, key=lambda group: int(lengths[group].sum()))


def step_plan(
    lengths: npt.NDArray[np.int64], *, batch_size: int, micro_batch_tokens: int, seed: int
) -> dict[str, int | float]:
    """Count what a pass over samples of these lengths will come to.

    Args:
        lengths: (rows,) tokens of each sample of the training split.
        batch_size: Samples per optimizer step.
        micro_batch_tokens: Most tokens per forward pass.
        seed: Of the order.

    Returns:
        The settings, `steps_per_epoch`, `micro_batches_per_step` and `fill`, the share of micro_batch_tokens in use;
        the last two from at most 500 steps.
    """
    order = epoch_order(len(lengths), seed, 0)
    starts = range(0, len(order), batch_size)[:500]
    cut = [list(_groups(lengths, order[at : at + batch_size].tolist(), micro_batch_tokens)) for at in starts]
    batches = sum(map(len, cut))
    tokens = sum(int(lengths[group].sum()) for groups in cut for group in groups)
    return {
        "batch_size": batch_size,
        "micro_batch_tokens": micro_batch_tokens,
        "steps_per_epoch": -(-len(lengths) // batch_size),
        "micro_batches_per_step": batches / max(len(cut), 1),
        "fill": tokens / max(batches * micro_batch_tokens, 1),
    }
