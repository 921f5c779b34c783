"""Who attends to whom: samples laid end to end for training, and a cache of keys and values for generation.

The model works on T tokens in one row, whatever samples they belong to; a layout knows which tokens see which.

Shapes: B samples, T tokens of all samples, L longest sample, S cached positions, H query heads, G key/value heads,
D head size.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.model.config import LLaMAConfig
from lit_llama.model.cpu_attention import causal_attention
from lit_llama.model.fused.attention import packed_attention

PADDING = 1.15
"""Samples share a block of attention as long as padding them to one length wastes at most 15 %."""


class Layout(Protocol):
    """Positions of the tokens in their samples, and attention among them."""

    position_ids: Tensor  # (T,)
    counts: list[int]  # how many of the T tokens each sample has, in order
    lengths: list[int]  # tokens of each sample so far, those in a cache included

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Causal softmax attention: q (T, H, D), k and v (T, G, D) -> (T, H, D).

        A token sees the last `window` tokens of its sample, itself among them; None is all.
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
        self.counts, self._parents = list(lengths), list(parents) or [-1] * len(lengths)
        before = [0 if parent < 0 else lengths[parent] for parent in self._parents]
        self.lengths = [own + shared for own, shared in zip(lengths, before, strict=True)]
        ranges = [torch.arange(shared, total) for shared, total in zip(before, self.lengths, strict=True)]
        self.position_ids = torch.cat(ranges).to(device)  # (T,)
        self._device = device

    @cached_property
    def blocks(self) -> list[tuple[slice, Tensor | None, Tensor | None, int]]:
        """Of each block: its tokens, what pads them and takes the padding out again, how many samples it has."""
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
    def offsets(self) -> Tensor:
        """(B + 1,) where each sample begins, and the last ends; int64 on a CPU, int32 on a GPU, as its kernels ask."""
        ends = torch.tensor([0, *accumulate(self.counts)])
        return ends if torch.device(self._device).type == "cpu" else ends.to(self._device, torch.int32)

    @cached_property
    def parents(self) -> Tensor:
        """(B,) int64 on the CPU, for its kernels."""
        return torch.tensor(self._parents)

    @property
    def shares(self) -> bool:
        """Whether any sample has a parent."""
        return max(self._parents) >= 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Causal softmax attention: q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
        if q.requires_grad or q.is_cuda:
            return packed_attention(q, k, v, self, window)
        return self.plain(q, k, v, window)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """The same by the library's kernels, a block of similar samples at a time."""
        if self.shares:
            return self._attend_shared(q, k, v, window)
        outputs = []
        for tokens, pad, unpad, samples in self.blocks:
            queries, keys, values = (_block(x[tokens], pad, samples) for x in (q, k, v))  # (B, H or G, L, D)
            whole = window is None or window >= queries.shape[2]
            if whole and q.device.type == "cpu" and q.requires_grad:
                y = causal_attention(queries, keys, values)
            elif whole:
                if not _takes_groups(queries):
                    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values))
                grouped = queries.shape[1] != keys.shape[1]
                y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
            else:
                assert window is not None
                y = _windowed(queries, keys, values, window)
            y = y.transpose(1, 2).flatten(0, 1)  # (B L, H, D)
            outputs.append(y if unpad is None else y.index_select(0, unpad))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_shared(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """The same, sample by sample, each against its parent's keys and its own."""
        queries, keys, values = (x.split(self.counts) for x in (q, k, v))
        outputs = []
        for sample, parent in enumerate(self._parents):
            seen = [sample] if parent < 0 else [parent, sample]
            key, value = (torch.cat([x[part] for part in seen])[None].transpose(1, 2) for x in (keys, values))
            key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (key, value))  # (1, H, S, D)
            place = torch.arange(key.shape[2], device=q.device)
            distance = place[-len(queries[sample]) :, None] - place
            mask = (distance >= 0) & (distance < (window or len(place)))
            y = F.scaled_dot_product_attention(queries[sample][None].transpose(1, 2), key, value, mask)
            outputs.append(y[0].transpose(0, 1))
        return torch.cat(outputs)


def _takes_groups(q: Tensor) -> bool:
    """Whether the kernels that need little memory take fewer key heads than query heads: on GPUs, FlashAttention's."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return not q.is_cuda or (half and torch.cuda.get_device_capability(q.device) >= (8, 0))


def _padding(lengths: Sequence[int], device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
    """Indices that pad samples of a block to one length (B L,), and those that take the padding out again (T,)."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None, None
    length = torch.tensor(lengths)[:, None]  # (B, 1)
    offset = length.cumsum(0) - length
    position = torch.arange(longest)[None]  # (1, L)
    pad = offset + torch.minimum(position, length - 1)  # (B, L)
    unpad = (position < length).flatten().nonzero().flatten()
    return pad.flatten().to(device), unpad.to(device)


def _block(x: Tensor, pad: Tensor | None, samples: int) -> Tensor:
    """(T, H, D) -> (B, H, L, D)."""
    x = x if pad is None else x.index_select(0, pad)
    return x.unflatten(0, (samples, -1)).transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention to the last `window` keys: q (B, H, L, D), k and v (B, G, L, D) -> (B, H, L, D).

    As many queries at a time as the window is long see at most twice as many keys, so that memory grows with L and not
    with its square.
    """
    # With a mask, the kernels that need little memory want a key head for each query head.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, L, D)
    place = torch.arange(q.shape[2], device=q.device)
    outputs = []
    for start in range(0, len(place), window):
        near = slice(max(start - window + 1, 0), start + window)
        distance = place[start : start + window, None] - place[near]
        mask = (distance >= 0) & (distance < window)
        part = q[:, :, start : start + window], k[:, :, near], v[:, :, near]
        outputs.append(F.scaled_dot_product_attention(*part, mask))
    return torch.cat(outputs, dim=2)


class KVCache:
    """Keys and values of the tokens seen so far, for B sequences of their own lengths.

    Args:
        config: Shape of the model.
        batch: Number of sequences (B).
        capacity: Most tokens a sequence may reach.
        device: Where the model is.
        dtype: That of the model.
    """

    def __init__(
        self, config: LLaMAConfig, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # zeros: 0 x NaN of a masked position is NaN
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch

    @property
    def capacity(self) -> int:
        """Most tokens a sequence may reach."""
        return self.keys.shape[3]

    def extend(self, counts: Sequence[int]) -> "Cached":
        """The layout of the next tokens: `counts[b]` more of sequence b, laid end to end."""
        return Cached(self, counts)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.lengths = [self.lengths[row] for row in rows]

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.lengths = [min(length, old) for old in self.lengths]


class Cached:
    """New tokens of B sequences after those in a cache; building it makes room, running the model fills it in.

    Query heads that share a key/value head are laid along the query axis, so keys and values are never repeated.
    """

    def __init__(self, cache: KVCache, counts: Sequence[int]) -> None:
        device, old = cache.keys.device, cache.lengths
        lengths = [length + count for length, count in zip(old, counts, strict=True)]
        if max(lengths) > cache.capacity:
            raise ValueError(f"{max(lengths)} tokens do not fit into a cache of {cache.capacity}")
        self._cache, cache.lengths = cache, lengths
        self.counts, self.lengths = list(counts), lengths
        self._rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)  # (T,)
        self._columns = torch.cat([torch.arange(count) for count in counts]).to(device)  # (T,)
        self.position_ids = self._columns + torch.tensor(old, device=device)[self._rows]  # (T,)
        self._new, self._span = max(counts), max(lengths)
        query = torch.tensor(old, device=device)[:, None] + torch.arange(self._new, device=device)  # (B, L)
        self._query, self._key = query[:, None, :, None], torch.arange(self._span, device=device)
        self._visible = self._key <= self._query  # (B, 1, L, S)
        self._oldest = min(old)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Causal softmax attention over the cache: q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]  # (B, G, capacity, D)
        keys[self._rows, :, self.position_ids] = k
        values[self._rows, :, self.position_ids] = v
        batch, groups, repeat = keys.shape[0], k.shape[1], q.shape[1] // k.shape[1]
        block = q.new_zeros(batch, self._new, groups, repeat, q.shape[2])
        block[self._rows, self._columns] = q.unflatten(1, (groups, repeat))
        block = block.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, H/G L, D)
        near, visible = slice(self._span), self._visible
        if window is not None and window < self._span:
            near = slice(max(self._oldest - window + 1, 0), self._span)  # no query sees what comes before
            visible = visible[..., near] & (self._key[near] > self._query - window)
        mask = visible.repeat(1, 1, repeat, 1)  # (B, 1, H/G L, S)
        y = F.scaled_dot_product_attention(block, keys[:, :, near], values[:, :, near], mask)
        y = y.unflatten(2, (repeat, self._new)).permute(0, 3, 1, 2, 4)  # (B, L, G, H/G, D)
        return y[self._rows, self._columns].flatten(1, 2)
