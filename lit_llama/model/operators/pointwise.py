"""Operations between the matrix products of a decoder layer, each in as few passes as it takes.

Every operation writes into a tensor that it is given, which may be columns of a wider one. It exists three times: here,
plainly and in float32, as it is meant; in pointwise.cpp, for a CPU; in triton_kernels.py, for a GPU.

Shapes: T tokens, C hidden, I intermediate, N heads, D head size, V vocabulary, n trained tokens.
"""

import functools
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lit_llama.model.operators.kernels import E4M3, TINY, call, native


def norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Compute out = x / rms(x) * weight, all (T, C) but the weight (C,)."""
    if native(x, weight):
        return call("norm", x.dtype, out, out.stride(0), x, x.stride(0), weight, *x.shape, eps)
    _by(plain_norm, out, x, weight, eps)


def plain_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    wide = x.float()
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float())


def norm_backward(
    dx: Tensor, again: Tensor, dy: Tensor, x: Tensor, weight: Tensor, residual: Tensor, eps: float
) -> None:
    """Compute dx = residual + the gradient of the norm's input; again = the norm itself. All (T, C)."""
    if native(x, weight):
        rows = (v for tensor in (dx, again, dy, x) for v in (tensor, tensor.stride(0)))
        return call("norm_backward", x.dtype, *rows, weight, residual, residual.stride(0), *x.shape, eps)
    _by(plain_norm_backward, dx, again, dy, x, weight, residual, eps)


def plain_norm_backward(
    dx: Tensor, again: Tensor, dy: Tensor, x: Tensor, weight: Tensor, residual: Tensor, eps: float
) -> None:
    wide, scaled = x.float(), dy.float() * weight.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    direction = wide * inverse
    along = (scaled * direction).mean(-1, keepdim=True)
    dx.copy_(residual.float() + inverse * (scaled - direction * along))
    again.copy_(direction * weight.float())


def drop(out: Tensor, x: Tensor, seed: int, p: float, *, add: bool = False) -> None:
    """Compute out = x / (1 - p), but zero where a number drawn for the place is below p; or add it to out. All (T, n).

    The seed and the shape tell what is drawn: it comes again without being kept. A GPU draws by its own generator.
    """
    if native(x):
        return call("drop", x.dtype, out, out.stride(0), x, x.stride(0), *x.shape, seed, p, int(add))
    plain_drop(out, x, seed, p, add)


def plain_drop(out: Tensor, x: Tensor, seed: int, p: float, add: bool) -> None:
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)
    kept.mul_(x).mul_(1 / (1 - p))
    out.add_(kept) if add else out.copy_(kept)


def rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Turn all heads of x, or turn them back, into out: (T, N, D), cos and sin (T, D/2). It may be x itself."""
    sign = -1.0 if back else 1.0
    if native(x, cos):
        sizes = (len(x), x.shape[1], cos.shape[1])
        return call("rotate", x.dtype, out, out.stride(0), x, x.stride(0), cos, sin, *sizes, sign)
    _by(plain_rotate, out, x, cos, sin, sign)


def plain_rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    left, right = (part.float() for part in x.chunk(2, dim=2))
    cos, sin = cos.float()[:, None], sin.float()[:, None] * sign  # (T, 1, D/2)
    out.copy_(torch.cat((left * cos - right * sin, right * cos + left * sin), 2))


def copy(out: Tensor, x: Tensor) -> None:
    """Copy x to out, both (T, C): where it is one of the two that has longer rows, a GPU does it at half the speed
    itself.
    """
    if out.numel() and (twin := _triton("copy", x.device)):
        return twin(out, x)
    out.copy_(x)


def round_rows(values: Tensor, scales: Tensor, x: Tensor, columns: Tensor | None) -> None:
    """Round x (T, n), its columns multiplied by `columns` (n,), to values (T, n) times scales (T,), as near as e4m3 can
    be.

    The largest magnitude of a row becomes the largest that e4m3 has.
    """
    (_triton("round_rows", x.device) or plain_round_rows)(values, scales, x, columns)


def plain_round_rows(values: Tensor, scales: Tensor, x: Tensor, columns: Tensor | None) -> None:
    for part in (slice(start, start + 256) for start in range(0, len(x), 256)):  # in float32 only so many at a time
        wide = x[part].float() if columns is None else x[part].float() * columns
        scales[part] = wide.abs().amax(1).clamp(min=TINY) / E4M3
        values[part] = wide / scales[part, None]


def swiglu(out: Tensor, gate_up: Tensor) -> None:
    """Compute out (T, I) = silu(gate) * up, side by side in gate_up (T, 2 I)."""
    if native(gate_up):
        return call("swiglu", out.dtype, out, out.stride(0), gate_up, gate_up.stride(0), *out.shape)
    _by(plain_swiglu, out, gate_up)


def plain_swiglu(out: Tensor, gate_up: Tensor) -> None:
    gate, up = (part.float() for part in gate_up.split(out.shape[1], dim=1))
    out.copy_(gate * torch.sigmoid(gate) * up)


def swiglu_backward(d_gate_up: Tensor, out: Tensor, gate_up: Tensor) -> None:
    """Compute d_gate_up (T, 2 I), the gradient of gate_up, if `out` (T, I) holds that of silu(gate) * up.

    Afterwards `out` holds silu(gate) * up itself.
    """
    if native(gate_up):
        rows = (v for tensor in (d_gate_up, out, gate_up) for v in (tensor, tensor.stride(0)))
        return call("swiglu_backward", out.dtype, *rows, *out.shape)
    _by(plain_swiglu_backward, d_gate_up, out, gate_up)


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
    if native(logits):
        # What lies outside would be read and written wherever that is in memory.
        if not isinstance(logits, FakeTensor) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise IndexError(f"a target is none of the {logits.shape[1]} tokens")
        loss = logits.new_empty(len(targets), dtype=torch.float32)
        call("cross_entropy", logits.dtype, loss, logits, logits.stride(0), targets, *logits.shape, scale)
        return loss
    found: Tensor = _by(plain_cross_entropy, logits, targets, scale)
    return found


def plain_cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    wide, picked = logits.float(), targets[:, None]
    lse = wide.logsumexp(-1, keepdim=True)
    loss = (lse - wide.gather(1, picked))[:, 0]
    if scale:
        right = torch.arange(wide.shape[1], device=wide.device) == picked
        logits.copy_(((wide - lse).exp() - right.float()) * scale)
    return loss


def _by(plain: Callable[..., Any], *arguments: Any) -> Any:
    """A plain operation, or its twin for a GPU."""
    known = arguments[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
    twin = _triton(plain.__name__.removeprefix("plain_"), arguments[0].device) if known else None
    return (twin or plain)(*arguments)


@functools.cache
def _triton(name: str, device: torch.device) -> Callable[..., Any] | None:
    """The function of this name in triton_kernels.py; None where Triton cannot be had.

    It compiles for GPUs from Ampere on, which a V100 is not, and needs a C compiler for what starts its kernels.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if importlib.util.find_spec("triton") is None or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return None
    from lit_llama.model.operators import triton_kernels

    found: Callable[..., Any] = getattr(triton_kernels, name)
    return found
