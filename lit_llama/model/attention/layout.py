"""Attention among samples laid end to end. Blocks of a cache, for generation, are those of paged.py.

The model works on T tokens in one row, whatever samples they belong to; a layout knows which tokens see which.

Shapes: B samples, T tokens of all samples, L longest sample, H query heads, G key/value heads,
D head size.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.model.operators.attention import packed_attention

QUERIES = 64
"""Queries at a time: fewer waste less on keys that are not seen, more make larger matrices."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k' / sqrt(D)) v, each token seeing those before it and itself.

    Scores and their gradients are float32 whatever the dtype is, as in the library.

    Args:
        q: (B, H, L, D).
        k: (B, G, L, D).
        v: (B, G, L, D).

    Returns:
        (B, H, L, D).
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    y: Tensor = _CausalAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return y


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, lse = ctx.saved_tensors
        batch, heads, length, size = q.shape
        groups, scale = k.shape[1], 1 / math.sqrt(q.shape[3])
        shape = (batch * groups, heads // groups, length, -1)
        q, dy, y = (x.reshape(shape) for x in (q, grad_outputs[0], y))  # (B G, R, L, D)
        k, v = (x.reshape(batch * groups, length, size) for x in (k, v))  # (B G, L, D)
        lse, delta = lse.reshape(shape), (dy.float() * y.float()).sum(-1, keepdim=True)  # (B G, R, L, 1)
        keys, values = k.float().transpose(1, 2), v.float().transpose(1, 2)  # (B G, D, L)
        hidden = torch.full((QUERIES, QUERIES), -math.inf).triu(1)
        dq, dk, dv = torch.empty_like(q), torch.zeros(k.shape), torch.zeros(v.shape)
        for start in range(0, length, QUERIES):
            end = min(start + QUERIES, length)
            count = end - start
            here, seen = slice(start, end), slice(end)
            queries, gradient = (x[:, :, here].flatten(1, 2) for x in (q, dy))  # (B G, R n, D)
            p = torch.bmm(queries.float() * scale, keys[:, :, seen]).unflatten(1, (-1, count))  # (B G, R, n, m)
            p[..., start:] += hidden[:count, :count]
            p.sub_(lse[:, :, here]).exp_()
            ds = torch.bmm(gradient.float(), values[:, :, seen]).unflatten(1, (-1, count))
            ds = ds.sub_(delta[:, :, here]).mul_(p).flatten(1, 2).to(q.dtype)  # (B G, R n, m)
            p = p.flatten(1, 2).to(q.dtype)
            dv[:, seen] += torch.bmm(p.transpose(1, 2), gradient)
            dk[:, seen] += torch.bmm(ds.transpose(1, 2), queries)
            dq[:, :, here] = torch.bmm(ds, k[:, seen]).mul_(scale).unflatten(1, (-1, count))
        dk, dv = (x.to(q.dtype).view(batch, groups, length, size) for x in (dk.mul_(scale), dv))
        return dq.view(batch, heads, length, size), dk, dv


PADDING = 1.15
"""Samples share a block of attention as long as padding them to one length wastes at most 15 %."""


class Layout(Protocol):
    """Positions of the tokens in their samples, and attention among them."""

    position_ids: Tensor  # (T,)
    counts: list[int]  # how many of the T tokens each sample has, in order
    lengths: list[int]  # tokens of each sample so far, those in a cache included

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Compute causal softmax attention: q (T, H, D), k and v (T, G, D) -> (T, H, D).

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
        """Blocks of similar samples: of each its tokens, its padding and how to take it out again, and its samples.
        samples it has.
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
    def offsets(self) -> Tensor:
        """Offsets (B + 1,) of the samples, and the end of the last; int64 on a CPU, int32 on a GPU for its kernels."""
        ends = torch.tensor([0, *accumulate(self.counts)])
        return ends if torch.device(self._device).type == "cpu" else ends.to(self._device, torch.int32)

    @cached_property
    def parents(self) -> Tensor:
        """Parent (B,) of each sample, -1 for none; int64 on the CPU, for its kernels."""
        return torch.tensor(self._parents)

    @property
    def shares(self) -> bool:
        """Whether any sample has a parent."""
        return max(self._parents) >= 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Compute causal softmax attention: q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
        if q.requires_grad or q.is_cuda:
            return packed_attention(q, k, v, self, window)
        return self.plain(q, k, v, window)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Compute `attend` by the library's kernels, a block of similar samples at a time."""
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
