"""x W' + scale * x A' B' with a backward pass of its own: one rounding, and no sum of two large matrices.

The update is far below the last bit of x W' in 16 bits: added to what is rounded already, it would be rounded away
every time it is less than half of that bit. So it is computed first, and x W' is accumulated onto it before anything
is rounded; likewise what comes back.

Shapes: T tokens, r rank; x (T, in), W (out, in), A (r, in), B (out, r).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_product(
    x: Tensor, dropped: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    """x W' + scale * dropped A' B', in the dtype of W.

    Args:
        x: (T, in).
        dropped: (T, in), x after dropout; None is x itself.
        weight: (out, in), frozen.
        lora_A: (r, in), float32.
        lora_B: (out, r), float32.
        scale: Of the update.

    Returns:
        (T, out).
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x, dropped, weight = x.to(dtype), None if dropped is None else dropped.to(dtype), weight.to(dtype)
    y: Tensor = _LoRAProduct.apply(x, dropped, weight, lora_A, lora_B, scale)  # type: ignore[no-untyped-call]
    return y


class _LoRAProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float
    ) -> Tensor:
        a, b = lora_A.to(x.dtype), (lora_B * scale).to(x.dtype)
        u = F.linear(x if dropped is None else dropped, a)  # (T, r)
        ctx.save_for_backward(x, dropped, weight, a, b, u)
        ctx.scale = scale
        return torch.addmm(u @ b.t(), x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor, Tensor, None]:
        x, dropped, weight, a, b, u = ctx.saved_tensors
        (dy,) = grad_outputs
        du = dy @ b  # (T, r)
        da = (du.t() @ (x if dropped is None else dropped)).float()
        db = (dy.t() @ u).float() * ctx.scale
        if dropped is not None:
            dx = dy @ weight if ctx.needs_input_grad[0] else None
            return dx, du @ a if ctx.needs_input_grad[1] else None, None, da, db, None
        dx = torch.addmm(du @ a, dy, weight) if ctx.needs_input_grad[0] else None
        return dx, None, None, da, db, None
