"""Attention of packed samples as two operations, forward and backward, on columns of wider tensors.

kernels.cpp computes them on a CPU, FlashAttention's kernels for samples of any length (Dao 2023, arXiv:2307.08691) on
a GPU; both keep the log-sum-exp of the scores and nothing of their square. Elsewhere the layout attends, and does it
again for the gradients.

Shapes: T tokens, H query heads, G key/value heads, D head size.
"""

import math

import torch
from torch import Tensor

from lit_llama.model.attention import Packed
from lit_llama.model.fused.kernels import call, native

Heads = tuple[Tensor, Tensor, Tensor]
"""q (T, H, D), k and v (T, G, D)."""


def attend(out: Tensor, qkv: Heads, layout: Packed, window: int | None) -> list[Tensor]:
    """Fill out (T, H, D); gives what `attend_backward` needs to have kept."""
    q, k, v = qkv
    if native(q):
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        call("attend", q.dtype, out, out.stride(0), lse, *_described(qkv, layout, window))
        return [lse]
    if _flash(q):
        y, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            *qkv, *_ends(layout), 0.0, True, False, **_options(q, window)
        )
        out.copy_(y)
        return [lse, state, unused]
    out.copy_(layout.attend(0, q, k, v, window))
    return []


def attend_backward(
    gradients: Heads, dy: Tensor, y: Tensor, kept: list[Tensor], qkv: Heads, layout: Packed, window: int | None
) -> None:
    """Fill the gradients of q, k and v; dy and y are (T, H, D)."""
    q, k, v = qkv
    if native(q):
        (lse,) = kept
        rows = (part for tensor in (*gradients, dy, y) for part in (tensor, tensor.stride(0)))
        return call("attend_backward", q.dtype, *rows, lse, *_described(qkv, layout, window))
    if _flash(q):
        lse, state, unused = kept
        found = torch.ops.aten._flash_attention_backward(
            dy, q, k, v, y, lse, *_ends(layout), 0.0, True, state, unused, **_options(q, window)
        )
    else:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            again = layout.attend(0, inputs[0], inputs[1], inputs[2], window)
        found = torch.autograd.grad(again, inputs, dy)
    for gradient, value in zip(gradients, found, strict=True):
        gradient.copy_(value)


def _described(qkv: Heads, layout: Packed, window: int | None) -> list[Tensor | int | float]:
    q, k, _ = qkv
    _, heads, size = q.shape
    rows = [part for tensor in qkv for part in (tensor, tensor.stride(0))]
    offsets, samples = layout.offsets, len(layout.counts)
    seen = len(q) if window is None else window
    return [*rows, heads, k.shape[1], size, 1 / math.sqrt(size), seen, offsets, samples]


def _flash(q: Tensor) -> bool:
    """Whether FlashAttention has kernels for this."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 8


def _ends(layout: Packed) -> tuple[Tensor, Tensor, int, int]:
    offsets, longest = layout.offsets, max(layout.counts)
    return offsets, offsets, longest, longest


def _options(q: Tensor, window: int | None) -> dict[str, float | int]:
    left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return {"scale": 1 / math.sqrt(q.shape[2]), **left}
