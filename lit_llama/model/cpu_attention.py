"""Causal attention for training on a CPU: the library's forward pass with a backward pass of our own.

The library's backward pass is far slower than the matrix products that it comes to. Here the probabilities are computed
anew from the saved log-sum-exp (Dao et al. 2022, arXiv:2205.14135, algorithm 4), some queries at a time and against no
more keys than they see, with all heads of a key in one product.

Shapes: B samples, L tokens of each, H query heads, G key/value heads, R = H/G query heads of a key, D head size,
n queries at a time, m keys that they see.
"""

import math
from typing import Any

import torch
from torch import Tensor

QUERIES = 64
"""Queries at a time: fewer waste less on keys that are not seen, more make larger matrices."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v, each token seeing those before it and itself.

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
