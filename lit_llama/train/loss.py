"""The loss: sum of the cross entropies of the trained tokens, logits only where there is a label.

Shapes: T tokens, N trained tokens, C hidden, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.device import Numerics
from lit_llama.model.attention import Layout, Packed
from lit_llama.model.llama import LLaMA

CHUNK = 1024
"""Trained tokens whose logits are held at a time."""
_LIFT = 256.0
"""Float16 loses values below 6e-8, which a sure token's gradient is soon; the scale of the loss comes only later."""


class TokenLoss(nn.Module):
    """A model together with its loss, so that one call is all a device does for a batch."""

    def __init__(self, model: LLaMA, numerics: Numerics | None = None) -> None:
        super().__init__()
        self.model, self.numerics = model, numerics

    def forward(self, input_ids: Tensor, lengths: list[int], select: Tensor, targets: Tensor) -> Tensor:
        """Sum of -log p(target) over the selected places.

        Args:
            input_ids: (T,) samples laid end to end.
            lengths: Tokens of each sample.
            select: (N,) places that predict a trained token.
            targets: (N,) those tokens.

        Returns:
            A float32 scalar.
        """
        with self.numerics.autocast() if self.numerics else nullcontext():
            return self.of_layout(input_ids, Packed(lengths, input_ids.device), select, targets)

    def of_layout(self, input_ids: Tensor, layout: Layout, select: Tensor, targets: Tensor) -> Tensor:
        """The same for samples whose layout is known."""
        hidden = self.model.model(input_ids, layout).index_select(0, select)  # (N, C)
        head = self.model.lm_head
        if type(head) is nn.Linear and not head.weight.requires_grad:
            return linear_cross_entropy(hidden, head.weight, targets)
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of `hidden @ weight.T` without ever holding all logits.

    The gradient is formed along with the loss, chunk by chunk in the buffer of the logits, as the weight is frozen
    (after Hsu et al. 2024, arXiv:2410.10989).

    Args:
        hidden: (N, C).
        weight: (V, C), without gradient.
        targets: (N,).

    Returns:
        A float32 scalar.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        kind = hidden.device.type
        product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        lift = _LIFT if product == torch.float16 else 1.0
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            logits = F.linear(hidden[part], weight).float()  # (n, V)
            picked = targets[part, None]
            total += (logits.logsumexp(-1, keepdim=True) - logits.gather(1, picked)).sum()
            if gradient is not None:
                torch.softmax(logits, -1, out=logits)
                logits.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=logits.dtype))
                gradient[part] = (logits.mul_(lift).to(product) @ weight).to(gradient.dtype) / lift
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None
