"""Attention of packed samples in the library's own operations: what every kernel is compared with, and their stand-in.

Shapes: B samples, L tokens of each, T tokens of all, H query heads, G key/value heads, D head size, K keys.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.device import capabilities


class Samples(Protocol):
    """Samples laid end to end, see `Packed`."""

    counts: list[int]
    parents: list[int]

    @property
    def blocks(self) -> Sequence[tuple[slice, Tensor | None, Tensor | None, int]]:
        """Blocks of similar samples."""

    @property
    def offsets(self) -> Tensor:
        """Offsets (B + 1,) of the samples, and the end of the last."""

    @property
    def parent_indices(self) -> Tensor:
        """Parent (B,) of each sample, -1 for none."""

    @property
    def shares(self) -> bool:
        """Whether any has a parent."""


def reference(
    q: Tensor, k: Tensor, v: Tensor, samples: Samples, window: int | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Compute causal attention, a block of similar samples at a time: q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
    if samples.shares:
        return _shared(q, k, v, samples, window, scale, softcap)
    outputs = []
    for tokens, pad, unpad, number in samples.blocks:
        queries, keys, values = (_block(x[tokens], pad, number) for x in (q, k, v))  # (B, H or G, L, D)
        if window is None or window >= queries.shape[2]:
            y = _causal(queries, keys, values, scale, softcap)
        else:
            y = _windowed(queries, keys, values, window, scale, softcap)
        y = y.transpose(1, 2).flatten(0, 1)  # (B L, H, D)
        outputs.append(y if unpad is None else y.index_select(0, unpad))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Compute softmax(softcap tanh(scale q k' / softcap)) v over the keys of a mask.

    Args:
        q: (B, H, L, D).
        k: (B, G, K, D).
        v: (B, G, K, D).
        mask: True where a key is seen, to be broadcast to (B, H, L, K).
        scale: Of the scores; None is 1 / sqrt(D).
        softcap: Bound that scores come near to and never reach (Gemma 2, arXiv:2408.00118); None for none.

    Returns:
        (B, H, L, D).
    """
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return _fused(q, k, v, mask, scale=scale, enable_gqa=grouped)
    k, v = _each_head(q, k, v)
    scores = (q @ k.transpose(2, 3)).float() * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype) @ v


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Attention to all tokens before and the token itself: q (B, H, L, D), k and v (B, G, L, D) -> (B, H, L, D)."""
    if softcap is not None:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        return masked(q, k, v, seen, scale, softcap)
    able = capabilities(q.device)
    if able.on_gpu and not (able.flash_attention and q.dtype in (torch.bfloat16, torch.float16)):
        k, v = _each_head(q, k, v)  # of the kernels that need little memory, only those of FlashAttention group heads
    return _fused(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """As F.scaled_dot_product_attention, which holds all scores where tensors have no numbers, and nowhere else."""
    if not q.is_meta:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    mask = None if mask is None else mask.to(q.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y: Tensor = attend(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
    return y


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Causal attention to the last `window` keys: q (B, H, L, D), k and v (B, G, L, D) -> (B, H, L, D).

    As many queries at a time as the window is long see at most twice as many keys, so that memory grows with L and not
    with its square.
    """
    # With a mask, the kernels that need little memory want a key head for each query head.
    k, v = _each_head(q, k, v)
    place = torch.arange(q.shape[2], device=q.device)
    outputs = []
    for start in range(0, len(place), window):
        near = slice(max(start - window + 1, 0), start + window)
        distance = place[start : start + window, None] - place[near]
        mask = (distance >= 0) & (distance < window)
        outputs.append(masked(q[:, :, start : start + window], k[:, :, near], v[:, :, near], mask, scale, softcap))
    return torch.cat(outputs, dim=2)


def _shared(
    q: Tensor, k: Tensor, v: Tensor, samples: Samples, window: int | None, scale: float | None, softcap: float | None
) -> Tensor:
    """As `reference`, sample by sample, each against its parent's keys and its own."""
    queries, keys, values = (x.split(samples.counts) for x in (q, k, v))
    outputs = []
    for sample, parent in enumerate(samples.parents):
        seen = [sample] if parent < 0 else [parent, sample]
        key, value = (torch.cat([x[part] for part in seen])[None].transpose(1, 2) for x in (keys, values))
        query = queries[sample][None].transpose(1, 2)  # (1, H, L, D)
        key, value = _each_head(query, key, value)  # (1, H, K, D)
        place = torch.arange(key.shape[2], device=q.device)
        distance = place[-len(queries[sample]) :, None] - place
        mask = (distance >= 0) & (distance < (window or len(place)))
        outputs.append(masked(query, key, value, mask, scale, softcap)[0].transpose(0, 1))
    return torch.cat(outputs)


def _each_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for each query head: (B, G, K, D) -> (B, H, K, D)."""
    repeats = q.shape[1] // k.shape[1]
    if repeats == 1:
        return k, v
    return k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)


def _block(x: Tensor, pad: Tensor | None, samples: int) -> Tensor:
    """(T, H, D) -> (B, H, L, D)."""
    x = x if pad is None else x.index_select(0, pad)
    return x.unflatten(0, (samples, -1)).transpose(1, 2)
