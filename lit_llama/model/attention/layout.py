"""Layout of samples laid end to end. Blocks of a cache, for generation, are those of paged.py.

The model works on T tokens in one row, whatever samples they belong to; a layout knows which tokens see which.

Shapes: B samples, T tokens of all samples, L longest sample, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lit_llama.device import capabilities
from lit_llama.model.attention.dispatch import attend

PADDING = 1.15
"""Samples share a block of attention as long as padding them to one length wastes at most 15 %."""

State = tuple[Tensor, Tensor]
"""State of samples in a recurrent layer, each (B, ...): the last inputs of its convolution, and its memory."""
Advance = Callable[[tuple[Tensor, ...], State | None], tuple[Tensor, State]]
"""Tokens (B, L, ...) of samples of one length, and the states before them, None for none -> what comes of the tokens
(B, L, ...), and the states behind them."""


class Layout(Protocol):
    """Positions of the tokens in their samples, and attention among them."""

    position_ids: Tensor  # (T,)
    counts: list[int]  # how many of the T tokens each sample has, in order
    lengths: list[int]  # tokens of each sample so far, those in a cache included
    bounds: list[int]  # tokens that each sample may have in the end

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Compute causal softmax attention: q (T, H, D), k and v (T, G, D) -> (T, H, D).

        Args:
            layer: Index of the layer, for a layout that keeps keys and values.
            q: Queries.
            k: Keys.
            v: Values.
            window: A token sees the last so many tokens of its sample, itself among them; None is all.
            scale: Of the scores; None is 1 / sqrt(D).
            softcap: Bound that scores come near to and never reach, softcap tanh(score / softcap); None for none.
        """
        ...

    def recur(self, layer: int, advance: Advance, parts: tuple[Tensor, ...]) -> Tensor:
        """Run a recurrence over the tokens of each sample in turn: (T, ...) each -> (T, ...).

        Args:
            layer: Index of the layer, for a layout that keeps states.
            advance: Computes tokens of samples of one length from their states.
            parts: Inputs of the recurrence.
        """
        ...


class Packed:
    """Samples of any lengths laid end to end; attention is causal inside each and never crosses.

    Neighbours of similar length form one block (B, L): padding comes last in a causal block, so no token of a sample
    ever sees it, and its own results are not gathered back.

    A sample may go on from another, its parent: it sees all tokens of that one before its own, and its positions
    follow them. So what several samples begin with need be there only once.

    Args:
        lengths: Tokens of each sample, in order; they sum to T.
        device: Where the tokens are.
        parents: For each sample the one from which it goes on, itself without a parent; -1 for none. Empty: none has.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", parents: Sequence[int] = ()) -> None:
        self.counts, self.parents = list(lengths), list(parents) or [-1] * len(lengths)
        before = [0 if parent < 0 else lengths[parent] for parent in self.parents]
        self.lengths = [own + shared for own, shared in zip(lengths, before, strict=True)]
        self.bounds = self.lengths
        ranges = [torch.arange(shared, total) for shared, total in zip(before, self.lengths, strict=True)]
        self.position_ids = torch.cat(ranges).to(device)  # (T,)
        self._device = torch.device(device)

    @cached_property
    def blocks(self) -> list[tuple[slice, Tensor | None, Tensor | None, int]]:
        """Blocks of similar samples: of each its tokens, its padding and how to take it out again, and how many samples
        it has.
        """
        lengths, blocks = self.counts, []
        start = first = 0
        for end in range(1, len(lengths) + 1):
            group = lengths[first:end]
            if end < len(lengths) and max(*group, lengths[end]) * (len(group) + 1) <= PADDING * (
                sum(group) + lengths[end]
            ):
                continue
            stop = start + sum(group)
            blocks.append((slice(start, stop), *_padding(group, self._device), len(group)))
            start, first = stop, end
        return blocks

    @cached_property
    def by_length(self) -> tuple[Tensor, Tensor, "Packed"]:
        """Places (T,) of the tokens once samples are sorted by length, the way back, and the layout of those: there,
        few blocks hold them all.
        """
        samples = sorted(range(len(self.counts)), key=self.counts.__getitem__)
        places = torch.arange(sum(self.counts)).split(self.counts)
        order = torch.cat([places[sample] for sample in samples])
        lengths = [self.counts[sample] for sample in samples]
        return order.to(self._device), order.argsort().to(self._device), Packed(lengths, self._device)

    @cached_property
    def offsets(self) -> Tensor:
        """Offsets (B + 1,) of the samples, and the end of the last; int64 on a CPU, int32 on a GPU for its kernels."""
        ends = torch.tensor([0, *accumulate(self.counts)])
        return ends if capabilities(self._device).on_cpu else ends.to(self._device, torch.int32)

    @cached_property
    def parent_indices(self) -> Tensor:
        """Parent (B,) of each sample, -1 for none; int64 on the CPU, for its kernels."""
        return torch.tensor(self.parents)

    @property
    def shares(self) -> bool:
        """Whether any sample has a parent."""
        return max(self.parents) >= 0

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Compute causal softmax attention, see `Layout`; a layer's place among the others changes nothing here."""
        return attend(q, k, v, self, window, scale, softcap)

    def recur(self, layer: int, advance: Advance, parts: tuple[Tensor, ...]) -> Tensor:
        """Run a recurrence over each sample from no state, see `Layout`; samples of like lengths at a time. None of
        them may have a parent.
        """
        assert not self.shares, "a sample would have to go on from the state of its parent"
        order, back, like = self.by_length
        parts, outputs = tuple(part.index_select(0, order) for part in parts), []
        for tokens, pad, unpad, number in like.blocks:
            block = (part[tokens] if pad is None else part[tokens].index_select(0, pad) for part in parts)
            y = advance(tuple(part.unflatten(0, (number, -1)) for part in block), None)[0].flatten(0, 1)
            outputs.append(y if unpad is None else y.index_select(0, unpad))
        return torch.cat(outputs).index_select(0, back)


def _padding(lengths: Sequence[int], device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
    """Indices that pad samples of a block to one length (B L,), and those that take the padding out again (T,)."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None, None
    length = np.array(lengths)[:, None]  # (B, 1)
    offset = length.cumsum(0) - length
    position = np.arange(longest)[None]  # (1, L)
    pad = offset + np.minimum(position, length - 1)  # (B, L)
    unpad = np.flatnonzero(position < length)
    return torch.from_numpy(pad.flatten()).to(device), torch.from_numpy(unpad).to(device)
