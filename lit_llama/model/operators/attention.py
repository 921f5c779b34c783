"""Attention of packed samples on a CPU, forward and backward: attention.cpp as operators.

It keeps the log-sum-exp of the scores and nothing of their square. Inputs and results may be columns of wider tensors.

Shapes: B samples, T tokens of all, H query heads, G key/value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from lit_llama.model.operators.define import define, differentiate
from lit_llama.model.operators.kernels import call


def _attend(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parents: Tensor, scale: float, window: int
) -> Tensor:
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    described = _described(q, k, v, offsets, parents, scale, window)
    call("attend", q.dtype, out, out.stride(0), lse, *described)
    return lse


def _attend_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    parents: Tensor,
    scale: float,
    window: int,
) -> None:
    rows = (part for tensor in (dq, dk, dv, dy, y) for part in (tensor, tensor.stride(0)))
    described = _described(q, k, v, offsets, parents, scale, window)
    call("attend_backward", q.dtype, *rows, lse, *described)


def _described(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parents: Tensor, scale: float, window: int
) -> list[Tensor | int | float]:
    rows = [part for tensor in (q, k, v) for part in (tensor, tensor.stride(0))]
    return [*rows, q.shape[1], k.shape[1], q.shape[2], scale, window, offsets, parents, len(parents)]


def _lse(out: Tensor, q: Tensor, *others: object) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float32)


_SAMPLES = "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor parents, float scale, int window"

attend = define(f"attend(Tensor(a!) out, {_SAMPLES}) -> Tensor", None, cpu=_attend, fake=_lse)
"""Fill out (T, H, D); gives the log-sum-exp (T, H) in float32.

q is (T, H, D), k and v (T, G, D), offsets (B + 1,) and parents (B,) int64: see `Packed`. A token sees the last `window`
tokens of its sample. Rows of a head lie in one piece, and the heads of a token, too.

Raises:
    MemoryError: There was not enough.
"""

attend_backward = define(
    f"attend_backward(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor dy, Tensor y, Tensor lse, {_SAMPLES}) -> ()",
    None,
    cpu=_attend_backward,
)
"""Fill dq (T, H, D), dk and dv (T, G, D), from dy and what `attend` has given, y and lse.

Raises:
    MemoryError: There was not enough.
"""


def _attention(q: Tensor, k: Tensor, v: Tensor, *samples: Any) -> tuple[Tensor, Tensor]:
    y = q.new_empty(q.shape)
    return y, attend(y, q.contiguous(), k.contiguous(), v.contiguous(), *samples)


def _attention_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, parents, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, offsets, parents, *output)


def _attention_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, offsets, parents, y, lse = ctx.saved_tensors
    q, k, v, dy = (x.contiguous() for x in (q, k, v, dy))
    found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    attend_backward(*found, dy, y, lse, q, k, v, offsets, parents, ctx.scale, ctx.window)
    return *found, None, None, None, None


def _attention_fake(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


attention = define(f"attention({_SAMPLES}) -> (Tensor, Tensor)", None, cpu=_attention, fake=_attention_fake)
"""Compute attention (T, H, D) and its log-sum-exp (T, H), of which autograd knows the former's gradients."""
differentiate("attention", _attention_backward, _attention_keep)
