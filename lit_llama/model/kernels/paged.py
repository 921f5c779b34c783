"""Keys and values in blocks that sequences share, and a step over any sequences in the library's own operations.

Recurrent layers keep no keys and values, but a state for each sequence, in its slot.

Shapes: T tokens of all sequences, S sequences, N tokens whose logits are wanted, H query heads, G key/value heads, D
head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lit_llama.model.attention.dispatch import for_products
from lit_llama.model.attention.layout import Advance
from lit_llama.model.attention.reference import masked
from lit_llama.model.config import KVCacheType, LLaMAConfig
from lit_llama.model.llama import LLaMA

BLOCK = 32
"""Tokens of a block."""


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """The tokens of a step, those of each sequence next to each other.

    Attributes:
        ids: Of each sequence, its new tokens.
        starts: Position of the first of them.
        tables: Blocks of each sequence, in order; those that nothing sees any more may be -1.
        logits: How many of the last tokens of each sequence want logits.
        adapters: Name of the adapter of each sequence, None for the base; empty where all are None.
        bounds: Tokens that each sequence may have in the end, from which positions of the type longrope follow, so that
            those in the cache and later ones turn alike; empty: as many as it has.
        slots: Place of the state of each sequence, for models with recurrent layers.
    """

    ids: Sequence[Sequence[int]]
    starts: Sequence[int]
    tables: Sequence[Sequence[int]]
    logits: Sequence[int]
    adapters: Sequence[str | None] = field(default=())
    bounds: Sequence[int] = field(default=())
    slots: Sequence[int] = field(default=())

    @property
    def selected(self) -> list[int]:
        """Places among the T tokens whose logits are wanted (N)."""
        end = 0
        places: list[int] = []
        for ids, logits in zip(self.ids, self.logits, strict=True):
            end += len(ids)
            places += range(end - logits, end)
        return places


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate zeros on the CPU, whose memory is not taken before it is used."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class PagedCache:
    """Keys and values of all layers, in blocks.

    Args:
        config: Shape of the model.
        blocks: How many.
        device: Where the model is.
        dtype: That of the model.
        kind: How keys and values are held.
        slots: States that recurrent layers keep, each of a sequence.

    Attributes:
        parts: What it consists of, each (layers, blocks, ...): keys and values, and of codes the scales of both.
    """

    def __init__(
        self,
        config: LLaMAConfig,
        blocks: int,
        device: torch.device | str,
        dtype: torch.dtype,
        kind: KVCacheType = "auto",
        slots: int = 0,
    ) -> None:
        self._rows = {layer: row for row, layer in enumerate(config.attending_layers)}
        self._states = {layer: row for row, layer in enumerate(config.recurrent_layers)}
        shape = (2, len(self._rows), blocks, BLOCK, config.num_key_value_heads, config.head_dim)
        on_cpu = torch.device(device).type == "cpu"

        def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # as 0 x NaN of a masked one is NaN
            return untouched_zeros(shape, dtype) if on_cpu else torch.zeros(shape, device=device, dtype=dtype)

        self.device, self._coded = torch.device(device), kind == "int8"
        self.parts = [*zeros(shape, torch.int8 if self._coded else dtype)]
        if self._coded:
            self.parts += [*zeros((*shape[:-1], 1), torch.float32)]
        self._kept: list[Tensor] = []  # (layers, slots, ...) each, see `State`
        for sizes, kept in zip(state_shapes(config), (dtype, torch.float32), strict=True) if self._states else ():
            self._kept.append(zeros((len(self._states), slots, *sizes), kept))

    @staticmethod
    def bytes_of_block(config: LLaMAConfig, dtype: torch.dtype, kind: KVCacheType = "auto") -> int:
        """Return the memory that a block takes."""
        heads = len(config.attending_layers) * config.num_key_value_heads
        row = config.head_dim + torch.float32.itemsize if kind == "int8" else config.head_dim * dtype.itemsize
        return 2 * BLOCK * heads * row

    @staticmethod
    def bytes_of_slot(config: LLaMAConfig, dtype: torch.dtype) -> int:
        """Return the memory that the state of a sequence takes in all recurrent layers."""
        tail, memory = map(math.prod, state_shapes(config))
        return len(config.recurrent_layers) * (tail * dtype.itemsize + memory * torch.float32.itemsize)

    def copy(self, source: int, destination: int) -> None:
        """Copy a block."""
        for part in self.parts:
            part[:, destination] = part[:, source]

    def clear(self, block: int) -> None:
        """Set a block to zero, as after numbers that are not finite."""
        for part in self.parts:
            part[:, block] = 0

    def write(self, layer: int, blocks: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep keys and values (T, G, D) at their places (T) in blocks (T)."""
        layer = self._rows[layer]
        for index, rows in enumerate((k, v)):
            if not self._coded:
                self.parts[index][layer][blocks, places] = rows.to(self.parts[index].dtype)
                continue
            scale = rows.float().abs().amax(2, keepdim=True) / 127  # (T, G, 1), NaN of what is not finite
            codes = (rows.float() / scale.where(scale != 0, 1)).nan_to_num(0, 0, 0).round()
            self.parts[index][layer][blocks, places] = codes.to(torch.int8)
            self.parts[index + 2][layer][blocks, places] = scale

    def read(self, layer: int, tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read the keys and values of blocks (S, blocks), each (S, tokens, G, D)."""
        layer = self._rows[layer]
        found = [part[layer][tables].flatten(1, 2) for part in self.parts]
        if not self._coded:
            return found[0].to(dtype), found[1].to(dtype)
        keys, values = ((codes * scales).to(dtype) for codes, scales in zip(found[:2], found[2:], strict=True))
        return keys, values

    def states(self, layer: int) -> list[Tensor]:
        """Return the states of a recurrent layer, (slots, ...) each, see `State`; they are written in place."""
        return [kept[self._states[layer]] for kept in self._kept]


def state_shapes(config: LLaMAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the state of a sequence in a recurrent layer: last inputs of its convolution, and memory."""
    tail = (sum(config.linear_channels), (config.linear_conv_kernel_dim or 1) - 1)
    sizes = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    return tail, tuple(size or 0 for size in sizes)


class Paged:
    """The layout of a step, see `Layout`: attention over the blocks of each sequence, and recurrence from its state.

    Sequences with one new token are computed together, their keys gathered to one length; others one by one.
    """

    def __init__(self, batch: PagedBatch, cache: PagedCache) -> None:
        device = cache.device
        self.counts = [len(ids) for ids in batch.ids]
        self.lengths = [start + count for start, count in zip(batch.starts, self.counts, strict=True)]
        self.bounds = list(batch.bounds) or self.lengths
        spans = list(zip(batch.starts, self.lengths, strict=True))
        positions = [position for start, end in spans for position in range(start, end)]
        self.position_ids = torch.tensor(positions, device=device)
        self._cache = cache
        written = zip(batch.tables, spans, strict=True)
        blocks = [table[position // BLOCK] for table, span in written for position in range(*span)]
        self._blocks, self._places = torch.tensor(blocks, device=device), self.position_ids % BLOCK
        self._groups: list[tuple[Tensor, Tensor, Tensor]] = []  # places among T (S L), tables (S, blocks), (S, L)
        self._slots: list[tuple[Tensor, Tensor]] = []  # of each group, and which of its sequences begin (S)
        starts = [0, *accumulate(self.counts)]
        single = [index for index, count in enumerate(self.counts) if count == 1]
        for group in [single, *([index] for index, count in enumerate(self.counts) if count > 1)]:
            if group:
                width = max(-(-self.lengths[index] // BLOCK) for index in group)
                rows = [([*batch.tables[index], *[0] * width])[:width] for index in group]
                tables = torch.tensor(rows, device=device).clamp(min=0)
                places = [place for index in group for place in range(starts[index], starts[index + 1])]
                own = torch.tensor(places, device=device)
                self._groups.append((own, tables, self.position_ids[own].unflatten(0, (len(group), -1))))
                if batch.slots:
                    slots = torch.tensor([batch.slots[index] for index in group], device=device)
                    self._slots.append((slots, torch.tensor([not batch.starts[i] for i in group], device=device)))

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
        """Compute causal softmax attention over the cache, see `Layout`."""
        q, k, v = for_products(q, k, v)
        self._cache.write(layer, self._blocks, self._places, k, v)
        out = torch.empty_like(q)
        for own, tables, position in self._groups:
            query = q[own].unflatten(0, position.shape).transpose(1, 2)  # (S, H, L, D)
            key, value = (x.transpose(1, 2) for x in self._cache.read(layer, tables, q.dtype))  # (S, G, K, D)
            distance = position[..., None] - torch.arange(key.shape[2], device=q.device)  # (S, L, K)
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            y = masked(query, key, value, mask[:, None], scale, softcap)
            out[own] = y.transpose(1, 2).flatten(0, 1)
        return out

    def recur(self, layer: int, advance: Advance, parts: tuple[Tensor, ...]) -> Tensor:
        """Run a recurrence from the states of the sequences, which are replaced, see `Layout`."""
        outputs, kept = [], self._cache.states(layer)
        for (own, _, position), (slots, begins) in zip(self._groups, self._slots, strict=True):
            tails, memories = (state[slots] for state in kept)
            tails[begins], memories[begins] = 0, 0  # whatever the sequence before has left there
            inputs = tuple(part[own].unflatten(0, position.shape) for part in parts)
            y, states = advance(inputs, (tails, memories))
            for state, new in zip(kept, states, strict=True):
                state[slots] = new.to(state.dtype)
            outputs.append(y.flatten(0, 1))
        order = torch.cat([own for own, _, _ in self._groups])
        return torch.cat(outputs)[order.argsort()]


@torch.inference_mode()
def paged_logits(model: LLaMA, batch: PagedBatch, cache: PagedCache) -> Tensor:
    """Compute the logits after the tokens that want them: (N, V). The keys and values of all tokens are written into
    the cache.
    """
    device = cache.device
    ids = torch.tensor([token for ids in batch.ids for token in ids], device=device)
    return model(ids, Paged(batch, cache), torch.tensor(batch.selected, dtype=torch.int64, device=device))
