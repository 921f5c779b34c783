"""The operations of pointwise.py on a GPU, each one pass over memory, in Triton (Tillet et al. 2019).

Imported where there is a GPU. Numbers are float32 between loading and storing. A program works on one row, or on BLOCK
columns of it; s* are the elements between two rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_llama.model.operators.kernels import E4M3, TINY

COLUMNS = 1024
"""Columns of a row at a time, where they do not depend on each other."""
VOCABULARY = 8192
"""The same of a row of logits."""


@triton.jit
def _norm(out, x, weight, so, sx, n, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < n
    value = tl.load(x + row * sx + column, mask=inside, other=0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / n + eps)
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * so + column, value * inverse * w, mask=inside)


@triton.jit
def _norm_backward(dx, again, dy, x, weight, residual, sdx, sa, sdy, sx, sr, n, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < n
    value = tl.load(x + row * sx + column, mask=inside, other=0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    scaled = tl.load(dy + row * sdy + column, mask=inside, other=0).to(tl.float32) * w
    rest = tl.load(residual + row * sr + column, mask=inside, other=0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / n + eps)
    direction = value * inverse
    along = tl.sum(scaled * direction, 0) / n
    tl.store(dx + row * sdx + column, rest + inverse * (scaled - direction * along), mask=inside)
    tl.store(again + row * sa + column, direction * w, mask=inside)


@triton.jit
def _rotate(out, x, cos, sin, so, sx, heads, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    at = head * 2 * half + column
    a = tl.load(x + row * sx + at, mask=inside, other=0).to(tl.float32)
    b = tl.load(x + row * sx + half + at, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + row * half + column, mask=column < half, other=0).to(tl.float32)
    s = tl.load(sin + row * half + column, mask=column < half, other=0).to(tl.float32) * sign
    tl.store(out + row * so + at, a * c - b * s, mask=inside)
    tl.store(out + row * so + half + at, b * c + a * s, mask=inside)


@triton.jit
def _copy(out, x, so, sx, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row * so + column, tl.load(x + row * sx + column, mask=column < n), mask=column < n)


@triton.jit
def _round_rows(values, scales, x, columns, sx, n, largest, tiny, FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < n
    value = tl.load(x + row * sx + column, mask=inside, other=0).to(tl.float32)
    if FACTORS:
        value *= tl.load(columns + column, mask=inside, other=0)
    scale = tl.maximum(tl.max(tl.abs(value), 0), tiny) / largest
    tl.store(scales + row, scale)
    tl.store(values + row * n + column, (value / scale).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(out, gate_up, so, sg, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    gate = tl.load(gate_up + row * sg + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * sg + n + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * so + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_backward(d_gate_up, out, gate_up, sd, so, sg, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    gate = tl.load(gate_up + row * sg + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * sg + n + column, mask=inside, other=0).to(tl.float32)
    gradient = tl.load(out + row * so + column, mask=inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(out + row * so + column, silu * up, mask=inside)
    d_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(d_gate_up + row * sd + column, d_gate, mask=inside)
    tl.store(d_gate_up + row * sd + n + column, gradient * silu, mask=inside)


@triton.jit
def _cross_entropy(loss, logits, targets, sl, factor, n: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits += row * sl
    target = tl.load(targets + row)
    right = tl.load(logits + target).to(tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        value = tl.load(logits + start + column, mask=start + column < n, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)
    most = tl.max(top, 0)
    summed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        value = tl.load(logits + start + column, mask=start + column < n, other=float("-inf")).to(tl.float32)
        summed += tl.exp(value - most)
    total = tl.sum(summed, 0)
    tl.store(loss + row, tl.log(total) + most - right)
    if factor != 0:
        for start in range(0, n, BLOCK):
            inside = start + column < n
            value = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(value - most) / total - tl.where(start + column == target, 1.0, 0.0)
            tl.store(logits + start + column, gradient * factor, mask=inside)


def norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    rows, n = x.shape
    _norm[(rows,)](out, x, weight, out.stride(0), x.stride(0), n, eps, **_whole_row(n))


def norm_backward(
    dx: Tensor, again: Tensor, dy: Tensor, x: Tensor, weight: Tensor, residual: Tensor, eps: float
) -> None:
    rows, n = x.shape
    strides = [tensor.stride(0) for tensor in (dx, again, dy, x, residual)]
    _norm_backward[(rows,)](dx, again, dy, x, weight, residual, *strides, n, eps, **_whole_row(n))


def rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    (rows, heads, _), half = x.shape, cos.shape[1]
    blocks = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    _rotate[(rows,)](out, x, cos, sin, out.stride(0), x.stride(0), heads, half, sign, **blocks)


def copy(out: Tensor, x: Tensor) -> None:
    rows, n = x.shape
    _copy[(rows, triton.cdiv(n, COLUMNS))](out, x, out.stride(0), x.stride(0), n, BLOCK=COLUMNS)


def round_rows(values: Tensor, scales: Tensor, x: Tensor, columns: Tensor | None) -> None:
    rows, n = x.shape
    given = x if columns is None else columns
    _round_rows[(rows,)](
        values, scales, x, given, x.stride(0), n, E4M3, TINY, FACTORS=columns is not None, **_whole_row(n)
    )


def swiglu(out: Tensor, gate_up: Tensor) -> None:
    rows, n = out.shape
    _swiglu[(rows, triton.cdiv(n, COLUMNS))](out, gate_up, out.stride(0), gate_up.stride(0), n, BLOCK=COLUMNS)


def swiglu_backward(d_gate_up: Tensor, out: Tensor, gate_up: Tensor) -> None:
    rows, n = out.shape
    strides = [tensor.stride(0) for tensor in (d_gate_up, out, gate_up)]
    _swiglu_backward[(rows, triton.cdiv(n, COLUMNS))](d_gate_up, out, gate_up, *strides, n, BLOCK=COLUMNS)


def cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    rows, n = logits.shape
    loss = logits.new_empty(rows, dtype=torch.float32)
    block = min(VOCABULARY, triton.next_power_of_2(n))
    _cross_entropy[(rows,)](loss, logits, targets, logits.stride(0), scale, n, BLOCK=block, num_warps=16)
    return loss


def _whole_row(n: int) -> dict[str, int]:
    block = triton.next_power_of_2(n)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
