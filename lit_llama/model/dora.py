"""Low-rank updates of the direction of weights, their lengths trained apart (Liu et al. 2024, DoRA, arXiv:2402.09353).

Shapes: W (out, in), A (r, in), B (out, r), m (out,).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.model.low_rank import LowRank, merge_weight
from lit_llama.model.quantize import QuantizedLinear


class DoRALinear(LowRank):
    """y = x (m V / |V|)' with V = W + scale * B A, the length |V| of each row, and m that starts as that of W.

    No gradient goes through |V| (section 4.3 of the paper). While training, dropout acts on all that m / |V| changes,
    as in PEFT: y = x W' + d ((m / |V| - 1) W + m / |V| scale * B A)' with d = dropout(x).

    |V| costs a product of B and A and a pass over W for each batch; without gradients it is computed once, until the
    module is put into training mode again.
    """

    PARTS: ClassVar[Mapping[str, str]] = {**LowRank.PARTS, "lora_magnitude_vector": "magnitude"}

    def __init__(self, base: nn.Linear | QuantizedLinear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base
        self.start(base, rank, scale, dropout)
        self.magnitude = nn.Parameter(self._lengths())  # (out,)
        self._kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        # In float32: the factor stays near 1, where bfloat16 has no step of less than 0.4 %.
        factor = self.magnitude / self._detached_lengths()  # (out,)
        bias = self.base_layer.bias
        dropped = self.dropout(x)
        y = self._product(dropped)
        u = F.linear(dropped, self.lora_A.to(x.dtype))  # (T, r)
        changed = (factor * torch.addmm(y, u, self.lora_B.to(x.dtype).t(), alpha=self.scale)).to(x.dtype)  # (T, out)
        if dropped is not x:  # W itself sees all of x
            changed = changed + self._product(x) - y
        return changed if bias is None else changed + bias

    def train(self, mode: bool = True) -> "DoRALinear":
        """As nn.Module.train; the lengths are computed anew."""
        self._kept = None
        return super().train(mode)

    def merged(self, weight: Tensor) -> Tensor:
        """m V / |V|: (out, in)."""
        direction = super().merged(weight)
        return direction * (self.magnitude / torch.linalg.vector_norm(direction, dim=1))[:, None]

    def _product(self, x: Tensor) -> Tensor:
        """x W', without the bias: (T, out)."""
        base = self.base_layer
        return base.product(x) if isinstance(base, QuantizedLinear) else F.linear(x, base.weight)

    def _detached_lengths(self) -> Tensor:
        if torch.is_grad_enabled() or self.training:
            return self._lengths()
        if self._kept is None:
            self._kept = self._lengths()
        return self._kept

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        base = self.base_layer
        weight = base.dense(torch.float32) if isinstance(base, QuantizedLinear) else base.weight
        direction = merge_weight(weight, self.lora_A, self.lora_B, self.scale, torch.float32)
        return torch.linalg.vector_norm(direction, dim=1)  # (out,)
