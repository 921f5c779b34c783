"""Attention of packed samples as two operations, forward and backward, on columns of wider tensors.

attention.cpp computes them on a CPU; on a GPU it is FlashAttention's kernels for samples of any length (Dao 2023,
arXiv:2307.08691), or cuDNN's where all have the same length and are long. All keep the log-sum-exp of the scores and
nothing of their square. Elsewhere the layout attends, and does it again for the gradients.

Shapes: B samples, L tokens of each, T tokens of all, H query heads, G key/value heads, D head size.
"""

import math
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lit_llama.model.operators.kernels import call, native
from lit_llama.model.operators.pointwise import copy

Heads = tuple[Tensor, Tensor, Tensor]
"""q (T, H, D), k and v (T, G, D)."""


class Samples(Protocol):
    """Samples laid end to end, see `Packed`."""

    counts: list[int]

    @property
    def offsets(self) -> Tensor:
        """Offsets (B + 1,) of the samples, and the end of the last."""

    @property
    def parents(self) -> Tensor:
        """Parent (B,) of each sample, -1 for none."""

    @property
    def shares(self) -> bool:
        """Whether any has a parent."""

    def plain(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Compute attention through the library, under autograd."""


LONG = 512
"""Tokens of a sample from which on cuDNN is faster."""


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: Samples, window: int | None) -> Tensor:
    """Compute both as one function of autograd: q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    if not native(q) and _kernels(q, layout, window) == "plain":
        return layout.plain(q, k, v, window)
    y: Tensor = _PackedAttention.apply(q, k, v, layout, window)  # type: ignore[no-untyped-call]
    return y


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Samples, window: int | None) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        y = torch.empty_like(q)
        kept = attend(y, (q, k, v), layout, window)
        ctx.save_for_backward(q, k, v, y, *kept)
        ctx.layout, ctx.window = layout, window
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *kept = ctx.saved_tensors
        room, dy = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)), grad_outputs[0].contiguous()
        return *attend_backward(room, dy, y, kept, (q, k, v), ctx.layout, ctx.window), None, None


def attend(out: Tensor, qkv: Heads, layout: Samples, window: int | None) -> list[Tensor]:
    """Fill out (T, H, D); gives what `attend_backward` needs to have kept."""
    q, k, v = qkv
    if native(q):
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        call("attend", q.dtype, out, out.stride(0), lse, *_described(qkv, layout, window))
        return [lse]
    match _kernels(q, layout, window):
        case "flash":
            y, *kept, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, *_ends(layout), 0.0, True, False, **_options(q, window)
            )
        case "cudnn":
            y, lse, _, _, _, _, *state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *_samples(qkv, layout), None, True, 0.0, True, False, scale=_scale(q)
            )
            y, kept = y.transpose(1, 2).flatten(0, 1), [lse, *state]
        case "plain":
            y, kept = layout.plain(q, k, v, window), []
    copy(out.flatten(1), y.flatten(1))
    return kept


def attend_backward(
    room: Heads, dy: Tensor, y: Tensor, kept: list[Tensor], qkv: Heads, layout: Samples, window: int | None
) -> Heads:
    """Compute the gradients of q, k and v, in the room for them or elsewhere; dy and y are (T, H, D)."""
    q, k, v = qkv
    if native(q):
        rows = (part for tensor in (*room, dy, y) for part in (tensor, tensor.stride(0)))
        call("attend_backward", q.dtype, *rows, *kept, *_described(qkv, layout, window))
        return room
    match _kernels(q, layout, window):
        case "flash":
            lse, state, unused = kept
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                dy, q, k, v, y, lse, *_ends(layout), 0.0, True, state, unused, **_options(q, window)
            )
        case "cudnn":
            longest = layout.counts[0]
            d_out, q, k, v, out = _samples((dy, q, k, v, y), layout)
            parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                d_out, q, k, v, out, *kept, None, None, None, longest, longest, 0.0, True, scale=_scale(qkv[0])
            )
            dq, dk, dv = (part.transpose(1, 2).flatten(0, 1) for part in parts)
        case "plain":
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                again = layout.plain(inputs[0], inputs[1], inputs[2], window)
            dq, dk, dv = torch.autograd.grad(again, inputs, dy)
    return dq, dk, dv


def _kernels(q: Tensor, layout: Samples, window: int | None) -> Literal["flash", "cudnn", "plain"]:
    """Who attends, where attention.cpp does not."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    if q.dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0) or q.shape[2] % 8 or layout.shares:
        return "plain"
    alike = len(set(layout.counts)) == 1 and layout.counts[0] >= LONG
    return "cudnn" if alike and window is None and capability >= (9, 0) else "flash"


def _described(qkv: Heads, layout: Samples, window: int | None) -> list[Tensor | int | float]:
    q, k, _ = qkv
    _, heads, size = q.shape
    rows = [part for tensor in qkv for part in (tensor, tensor.stride(0))]
    seen = len(q) if window is None else window
    samples = (layout.offsets, layout.parents, len(layout.counts))
    return [*rows, heads, k.shape[1], size, _scale(q), seen, *samples]


def _ends(layout: Samples) -> tuple[Tensor, Tensor, int, int]:
    offsets, longest = layout.offsets, max(layout.counts)
    return offsets, offsets, longest, longest


def _samples(tensors: tuple[Tensor, ...], layout: Samples) -> list[Tensor]:
    """(T, H, D) -> (B, H, L, D) each, for samples of one length."""
    return [x.unflatten(0, (-1, layout.counts[0])).transpose(1, 2) for x in tensors]


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[2])


def _options(q: Tensor, window: int | None) -> dict[str, float | int]:
    left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return {"scale": _scale(q), **left}
