"""The narrow products of low-rank updates, of which one side has a few columns.

narrow.cpp computes them on a CPU, where they wait for memory and the library's products do so for longer.

Shapes: T tokens, n columns of the wide side, R of the narrow one.
"""

import torch
from torch import Tensor

from lit_llama.model.fused.kernels import call, native

MOST = 64
"""Columns of the narrow side; with more, products are the library's."""


def project(out: Tensor, x: Tensor, a: Tensor) -> None:
    """out (T, R) = x a', for x (T, n) and a (R, n)."""
    if _is_narrow(x, a, len(a)):
        return call("project", x.dtype, *_rows(out, x, a), *x.shape, len(a))
    torch.mm(_apart(x), _apart(a).t(), out=out)


def project_back(out: Tensor, x: Tensor, b: Tensor) -> None:
    """out (T, R) = x b, for x (T, n) and b (n, R)."""
    if _is_narrow(x, b, b.shape[1]):
        return call("project_back", x.dtype, *_rows(out, x, b), *x.shape, b.shape[1])
    torch.mm(_apart(x), _apart(b), out=out)


def outer(u: Tensor, x: Tensor) -> Tensor:
    """u' x (R, n) in float32, for u (T, R) and x (T, n)."""
    if _is_narrow(x, u, u.shape[1]):
        out = x.new_empty(u.shape[1], x.shape[1], dtype=torch.float32)
        call("outer", x.dtype, *_rows(out, u, x), *x.shape, u.shape[1])
        return out
    return torch.mm(_apart(u).t(), _apart(x)).float()


def _apart(x: Tensor) -> Tensor:
    """Rows in one piece: processors with AMX have the library multiply what lies behind a row by zero, and what is no
    number there stays none."""
    return x.contiguous() if x.device.type == "cpu" else x


def _is_narrow(x: Tensor, other: Tensor, columns: int) -> bool:
    """Whether the kernels take it: they read two neighbours of bfloat16 at a time."""
    neighbours = x.stride(1) == other.stride(1) == 1 and not x.shape[1] % 2 and not x.stride(0) % 2
    return columns <= MOST and neighbours and native(x, other)


def _rows(*tensors: Tensor) -> list[Tensor | int]:
    return [part for tensor in tensors for part in (tensor, tensor.stride(0))]
