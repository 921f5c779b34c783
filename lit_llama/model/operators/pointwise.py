"""Operators between the matrix products of a decoder layer, each in as few passes as it takes.

Every one writes into a tensor that it is given, which may be columns of a wider one. It exists three times: here,
plainly and in float32, as it is meant; in pointwise.cpp, for a CPU; in triton_kernels.py, for a GPU.

Shapes: T tokens, C hidden, I intermediate, N heads, D head size, V vocabulary, n trained tokens.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lit_llama.device import capabilities
from lit_llama.model.operators.define import define
from lit_llama.model.operators.kernels import E4M3, TINY, call, native

PIECE = 256
"""Rows that a plain operation has in float32 at once on a CPU: a plan does not see what an operator holds for a moment.
A GPU would wait for each piece; it has kernels that hold nothing."""


def _in_pieces(*places: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have an operation that computes each row by itself compute a few rows at a time.

    Args:
        places: Of the arguments that have rows, the first of them the first.
    """

    def decorate(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def pieces(*arguments: Any) -> Any:
            rows = len(arguments[0])
            if rows <= PIECE or not capabilities(arguments[0].device).on_cpu:
                return plain(*arguments)
            found = [plain(*_part(arguments, places, start)) for start in range(0, rows, PIECE)]
            return None if found[0] is None else torch.cat(found)

        return pieces

    return decorate


def _part(arguments: Sequence[Any], places: Sequence[int], start: int) -> list[Any]:
    """The arguments with a piece of those that have rows."""
    return [value[start : start + PIECE] if index in places else value for index, value in enumerate(arguments)]


def norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Compute out = x / rms(x) * weight, all (T, C) but the weight (C,)."""
    _norm(out, x, weight, eps)


@_in_pieces(0, 1)
def plain_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    wide = x.float()
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float())


def norm_backward(
    dx: Tensor, again: Tensor, dy: Tensor, x: Tensor, weight: Tensor, residual: Tensor, eps: float
) -> None:
    """Compute dx = residual + the gradient of the norm's input; again = the norm itself. All (T, C)."""
    _norm_backward(dx, again, dy, x, weight, residual, eps)


@_in_pieces(0, 1, 2, 3, 5)
def plain_norm_backward(
    dx: Tensor, again: Tensor, dy: Tensor, x: Tensor, weight: Tensor, residual: Tensor, eps: float
) -> None:
    wide, scaled = x.float(), dy.float() * weight.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    direction = wide * inverse
    along = (scaled * direction).mean(-1, keepdim=True)
    dx.copy_(residual.float() + inverse * (scaled - direction * along))
    again.copy_(direction * weight.float())


def drop(out: Tensor, x: Tensor, seed: Tensor, p: float, *, add: bool = False) -> None:
    """Compute out = x / (1 - p), but zero where a number drawn for the place is below p; or add it to out. All (T, n).

    The seed, a whole number in a tensor () on the CPU, and the shape tell what is drawn: it comes again without being
    kept. A GPU draws by its own generator.
    """
    _drop(out, x, seed, p, add)


def plain_drop(out: Tensor, x: Tensor, seed: Tensor, p: float, add: bool) -> None:
    generator = torch.Generator(x.device).manual_seed(int(seed))
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)
    kept.mul_(x).mul_(1 / (1 - p))
    out.add_(kept) if add else out.copy_(kept)


def rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Turn all heads of x, or turn them back, into out: (T, N, D), cos and sin (T, D/2). It may be x itself."""
    _rotate(out, x, cos, sin, -1.0 if back else 1.0)


@_in_pieces(0, 1, 2, 3)
def plain_rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    left, right = (part.float() for part in x.chunk(2, dim=2))
    cos, sin = cos.float()[:, None], sin.float()[:, None] * sign  # (T, 1, D/2)
    out.copy_(torch.cat((left * cos - right * sin, right * cos + left * sin), 2))


def copy(out: Tensor, x: Tensor) -> None:
    """Copy x to out, both (T, C): where it is one of the two that has longer rows, a GPU does it at half the speed
    itself.
    """
    _copy(out, x)


def plain_copy(out: Tensor, x: Tensor) -> None:
    out.copy_(x)


def round_rows(values: Tensor, scales: Tensor, x: Tensor, columns: Tensor | None) -> None:
    """Round x (T, n), its columns multiplied by `columns` (n,), to values (T, n) times scales (T,), as near as e4m3 can
    be.

    The largest magnitude of a row becomes the largest that e4m3 has.
    """
    _round_rows(values, scales, x, columns)


def plain_round_rows(values: Tensor, scales: Tensor, x: Tensor, columns: Tensor | None) -> None:
    for part in (slice(start, start + PIECE) for start in range(0, len(x), PIECE)):
        wide = x[part].float() if columns is None else x[part].float() * columns
        scales[part] = wide.abs().amax(1).clamp(min=TINY) / E4M3
        values[part] = wide / scales[part, None]


def swiglu(out: Tensor, gate_up: Tensor) -> None:
    """Compute out (T, I) = silu(gate) * up, side by side in gate_up (T, 2 I)."""
    _swiglu(out, gate_up)


@_in_pieces(0, 1)
def plain_swiglu(out: Tensor, gate_up: Tensor) -> None:
    gate, up = (part.float() for part in gate_up.split(out.shape[1], dim=1))
    out.copy_(gate * torch.sigmoid(gate) * up)


def swiglu_backward(d_gate_up: Tensor, out: Tensor, gate_up: Tensor) -> None:
    """Compute d_gate_up (T, 2 I), the gradient of gate_up, if `out` (T, I) holds that of silu(gate) * up.

    Afterwards `out` holds silu(gate) * up itself.
    """
    _swiglu_backward(d_gate_up, out, gate_up)


@_in_pieces(0, 1, 2)
def plain_swiglu_backward(d_gate_up: Tensor, out: Tensor, gate_up: Tensor) -> None:
    gate, up = (part.float() for part in gate_up.split(out.shape[1], dim=1))
    gradient, sigmoid = out.float(), torch.sigmoid(gate)
    d_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_gate_up.copy_(torch.cat((d_gate, gradient * gate * sigmoid), 1))
    out.copy_(gate * sigmoid * up)


def cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Compute -log p(target) of each row in float32 (n,); logits (n, V) become `scale` times their gradient, unless it
    is 0.
    """
    found: Tensor = _cross_entropy(logits, targets, scale)
    return found


@_in_pieces(0, 1)
def plain_cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    wide, picked = logits.float(), targets[:, None]
    lse = wide.logsumexp(-1, keepdim=True)
    loss = (lse - wide.gather(1, picked))[:, 0]
    if scale:
        right = torch.arange(wide.shape[1], device=wide.device) == picked
        logits.copy_(((wide - lse).exp() - right.float()) * scale)
    return loss


# ---- the kernels of pointwise.cpp, and without them the plain operations


def _cpu_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    if not native(x, weight):
        return plain_norm(out, x, weight, eps)
    call("norm", x.dtype, out, out.stride(0), x, x.stride(0), weight, *x.shape, eps)


def _cpu_norm_backward(
    dx: Tensor, again: Tensor, dy: Tensor, x: Tensor, weight: Tensor, residual: Tensor, eps: float
) -> None:
    if not native(x, weight):
        return plain_norm_backward(dx, again, dy, x, weight, residual, eps)
    rows = (v for tensor in (dx, again, dy, x) for v in (tensor, tensor.stride(0)))
    call("norm_backward", x.dtype, *rows, weight, residual, residual.stride(0), *x.shape, eps)


def _cpu_drop(out: Tensor, x: Tensor, seed: Tensor, p: float, add: bool) -> None:
    if not native(x):
        return plain_drop(out, x, seed, p, add)
    call("drop", x.dtype, out, out.stride(0), x, x.stride(0), *x.shape, int(seed), p, int(add))


def _cpu_rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    if not native(x, cos):
        return plain_rotate(out, x, cos, sin, sign)
    sizes = (len(x), x.shape[1], cos.shape[1])
    call("rotate", x.dtype, out, out.stride(0), x, x.stride(0), cos, sin, *sizes, sign)


def _cpu_swiglu(out: Tensor, gate_up: Tensor) -> None:
    if not native(gate_up):
        return plain_swiglu(out, gate_up)
    call("swiglu", out.dtype, out, out.stride(0), gate_up, gate_up.stride(0), *out.shape)


def _cpu_swiglu_backward(d_gate_up: Tensor, out: Tensor, gate_up: Tensor) -> None:
    if not native(gate_up):
        return plain_swiglu_backward(d_gate_up, out, gate_up)
    rows = (v for tensor in (d_gate_up, out, gate_up) for v in (tensor, tensor.stride(0)))
    call("swiglu_backward", out.dtype, *rows, *out.shape)


def _cpu_cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    if not native(logits):
        return plain_cross_entropy(logits, targets, scale)
    # What lies outside would be read and written wherever that is in memory.
    if not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise IndexError(f"a target is none of the {logits.shape[1]} tokens")
    loss = _losses(logits, targets)
    call("cross_entropy", logits.dtype, loss, logits, logits.stride(0), targets, *logits.shape, scale)
    return loss


def _losses(logits: Tensor, targets: Tensor, scale: float = 0.0) -> Tensor:
    return logits.new_empty(len(targets), dtype=torch.float32)


# ---- the operators


def _on_gpu(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The twin of a plain operation in triton_kernels.py, where Triton is and knows the dtype, or the plain one."""
    name = plain.__name__.removeprefix("plain_")
    known = (torch.float32, torch.bfloat16, torch.float16)

    def twin(*arguments: Any) -> Any:
        first, given = arguments[0], arguments[2] if name == "round_rows" else arguments[0]
        if not capabilities(first.device).triton or given.dtype not in known or not first.numel():
            return plain(*arguments)
        from lit_llama.model.operators import triton_kernels

        return getattr(triton_kernels, name)(*arguments)

    return twin


_norm = define(
    "norm(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()",
    plain_norm,
    cpu=_cpu_norm,
    cuda=_on_gpu(plain_norm),
)
_norm_backward = define(
    "norm_backward(Tensor(a!) dx, Tensor(b!) again, Tensor dy, Tensor x, Tensor weight, Tensor residual, float eps)"
    " -> ()",
    plain_norm_backward,
    cpu=_cpu_norm_backward,
    cuda=_on_gpu(plain_norm_backward),
)
_drop = define(
    "drop(Tensor(a!) out, Tensor x, Tensor seed, float p, bool add) -> ()",
    plain_drop,
    cpu=_cpu_drop,
)
_rotate = define(
    "rotate(Tensor(a!) out, Tensor x, Tensor cos, Tensor sin, float sign) -> ()",
    plain_rotate,
    cpu=_cpu_rotate,
    cuda=_on_gpu(plain_rotate),
)
_copy = define(
    "copy(Tensor(a!) out, Tensor x) -> ()",
    plain_copy,
    cuda=_on_gpu(plain_copy),
)
_round_rows = define(
    "round_rows(Tensor(a!) values, Tensor(b!) scales, Tensor x, Tensor? columns) -> ()",
    plain_round_rows,
    cuda=_on_gpu(plain_round_rows),
)
_swiglu = define(
    "swiglu(Tensor(a!) out, Tensor gate_up) -> ()",
    plain_swiglu,
    cpu=_cpu_swiglu,
    cuda=_on_gpu(plain_swiglu),
)
_swiglu_backward = define(
    "swiglu_backward(Tensor(a!) d_gate_up, Tensor(b!) out, Tensor gate_up) -> ()",
    plain_swiglu_backward,
    cpu=_cpu_swiglu_backward,
    cuda=_on_gpu(plain_swiglu_backward),
)
_cross_entropy = define(
    "cross_entropy(Tensor(a!) logits, Tensor targets, float scale) -> Tensor",
    plain_cross_entropy,
    cpu=_cpu_cross_entropy,
    cuda=_on_gpu(plain_cross_entropy),
    fake=_losses,
)
