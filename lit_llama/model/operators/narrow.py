"""Products of matrices with few columns on one side, the updates of low rank.

narrow.cpp computes them on a CPU; elsewhere, and with more columns, they are the library's.

Shapes: T tokens, n columns of the wide side, R of the narrow one.
"""

import torch
from torch import Tensor

from lit_llama.device import capabilities
from lit_llama.model.operators.define import define
from lit_llama.model.operators.kernels import call, native

MOST = 64
"""Columns of the narrow side; with more, products are the library's."""


def project(out: Tensor, x: Tensor, a: Tensor) -> None:
    """Compute out (T, R) = x a', for x (T, n) and a (R, n)."""
    (_project if _is_narrow(x, a, len(a)) else plain_project)(out, x, a)


def plain_project(out: Tensor, x: Tensor, a: Tensor) -> None:
    torch.mm(apart(x), apart(a).t(), out=out)


def project_back(out: Tensor, x: Tensor, b: Tensor) -> None:
    """Compute out (T, R) = x b, for x (T, n) and b (n, R)."""
    (_project_back if _is_narrow(x, b, b.shape[1]) else plain_project_back)(out, x, b)


def plain_project_back(out: Tensor, x: Tensor, b: Tensor) -> None:
    torch.mm(apart(x), apart(b), out=out)


def outer(u: Tensor, x: Tensor) -> Tensor:
    """Compute u' x (R, n) in float32, for u (T, R) and x (T, n)."""
    found: Tensor = (_outer if _is_narrow(x, u, u.shape[1]) else plain_outer)(u, x)
    return found


def plain_outer(u: Tensor, x: Tensor) -> Tensor:
    return torch.mm(apart(u).t(), apart(x)).float()


def column_sums(x: Tensor) -> Tensor:
    """Sum up the tokens of x: (T, n) -> (n,), in float32."""
    ones = x.new_ones(len(x), 2)[:, :1]
    return outer(ones, x)[0] if native(x) and _is_narrow(x, ones, 1) else x.sum(0, dtype=torch.float32)


def apart(x: Tensor) -> Tensor:
    """Return rows in one piece: processors with AMX have the library multiply what lies behind a row by zero, and what
    is no number there stays none."""
    return x.contiguous() if capabilities(x.device).on_cpu else x


def _is_narrow(x: Tensor, other: Tensor, columns: int) -> bool:
    """Whether the kernels take it: they read two neighbours of bfloat16 at a time."""
    neighbours = x.stride(1) == other.stride(1) == 1 and not x.shape[1] % 2 and not x.stride(0) % 2
    return columns <= MOST and neighbours


def _rows(*tensors: Tensor) -> list[Tensor | int]:
    return [part for tensor in tensors for part in (tensor, tensor.stride(0))]


def _cpu_project(out: Tensor, x: Tensor, a: Tensor) -> None:
    if not native(x, a):
        return plain_project(out, x, a)
    call("project", x.dtype, *_rows(out, x, a), *x.shape, len(a))


def _cpu_project_back(out: Tensor, x: Tensor, b: Tensor) -> None:
    if not native(x, b):
        return plain_project_back(out, x, b)
    call("project_back", x.dtype, *_rows(out, x, b), *x.shape, b.shape[1])


def _cpu_outer(u: Tensor, x: Tensor) -> Tensor:
    if not native(x, u):
        return plain_outer(u, x)
    out = _gradient(u, x)
    call("outer", x.dtype, *_rows(out, u, x), *x.shape, u.shape[1])
    return out


def _gradient(u: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(u.shape[1], x.shape[1], dtype=torch.float32)


_project = define("project(Tensor(a!) out, Tensor x, Tensor a) -> ()", plain_project, cpu=_cpu_project)
_project_back = define(
    "project_back(Tensor(a!) out, Tensor x, Tensor b) -> ()", plain_project_back, cpu=_cpu_project_back
)
_outer = define("outer(Tensor u, Tensor x) -> Tensor", plain_outer, cpu=_cpu_outer, fake=_gradient)
