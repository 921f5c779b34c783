"""Low-rank updates of linear layers: plain, weight-decomposed (DoRA), on quantised bases."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.device import capabilities
from lit_llama.model.quantize import QuantizedLinear


class Adapter(nn.Module):
    """A module in place of one of the base, with that one's frozen weight and parameters that are trained.

    The parameters are float32 whatever the base is in, because their updates are far below bfloat16's resolution.
    """

    PARTS: ClassVar[Mapping[str, str]]
    """Names of the parameters: after the module's name in a file of PEFT, and here."""

    def parts(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, by the names of PEFT's files."""
        return {stored: self.get_parameter(name) for stored, name in self.PARTS.items()}

    def merged(self, weight: Tensor) -> Tensor:
        """Compute what `weight`, that of the base, becomes: in float32 and not rounded."""
        raise NotImplementedError


class LowRank(Adapter):
    """Base of all updates by A and B."""

    PARTS: ClassVar[Mapping[str, str]] = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float

    def start(self, base: nn.Linear | QuantizedLinear, rank: int, scale: float, dropout: float) -> None:
        """Make A as nn.Linear would and B zero, so that nothing changes at first."""
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        device = device_of(base)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))  # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def update(self, x: Tensor) -> Tensor:
        """Compute scale * dropout(x) A' B', for x (T, in)."""
        u = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (T, r)
        return F.linear(u, (self.lora_B * self.scale).to(x.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """Compute W + scale * B A: (out, in)."""
        return merge_weight(weight, self.lora_A, self.lora_B, self.scale, torch.float32)


class LoRALinear(LowRank, nn.Linear):
    """A frozen linear layer with trainable A and B: y = x W' + scale * dropout(x) A' B'."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.start(base, rank, scale, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its update: (T, in) -> (T, out)."""
        dropped = self.dropout(x) if self.dropout.p and self.training else None
        y = lora_product(x, dropped, self.weight, self.lora_A, self.lora_B, self.scale)
        return y if self.bias is None else y + self.bias


class LoRAOnQuantized(LowRank):
    """LoRA on a quantised layer, which is called and never multiplied with (Dettmers et al. 2023, QLoRA,
    arXiv:2305.14314)."""

    def __init__(self, base: QuantizedLinear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base
        self.start(base, rank, scale, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its update: (T, in) -> (T, out)."""
        y = self.base_layer.product(x, self.update(x))  # the update is small, and y not rounded yet
        return y if self.base_layer.bias is None else y + self.base_layer.bias


class LoRAEmbedding(Adapter, nn.Embedding):
    """A frozen embedding with an update to each row: y = E[i] + scale * A'[i] B'.

    Here A starts at zero and B is normal. Nothing is dropped, as in PEFT. A head that is tied to the embedding keeps
    the matrix of the base.
    """

    PARTS: ClassVar[Mapping[str, str]] = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}

    def __init__(self, base: nn.Embedding, rank: int, scale: float) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight, self.scale = base.weight, scale
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, device=device))  # (r, V)
        self.lora_B = nn.Parameter(torch.empty(base.embedding_dim, rank, device=device))  # (C, r)
        nn.init.normal_(self.lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up embeddings with their update: (T,) -> (T, C)."""
        update = F.linear(F.embedding(ids, self.lora_A.t()), self.lora_B)  # (T, C)
        y = F.embedding(ids, self.weight)
        return torch.add(y, update, alpha=self.scale).to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """Compute E + scale * (B A)': (V, C)."""
        return merge_weight(weight, self.lora_B.t(), self.lora_A.t(), self.scale, torch.float32)


def device_of(base: nn.Linear | QuantizedLinear) -> torch.device:
    """Return the device of a linear layer."""
    return base.packed.device if isinstance(base, QuantizedLinear) else base.weight.device


def base_of(linear: nn.Module) -> nn.Linear | QuantizedLinear:
    """Return the frozen layer below an update of low rank, or the layer itself where it has none."""
    base = linear.base_layer if isinstance(linear, LoRAOnQuantized | DoRALinear) else linear
    assert isinstance(base, nn.Linear | QuantizedLinear)
    return base


def merge_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Compute W + scale * B A, added in float32 and rounded once to `dtype`: (out, in)."""
    return torch.addmm(weight.float(), lora_B.float(), lora_A.float(), alpha=scale).to(dtype)


class DoRALinear(LowRank):
    """DoRA: y = x (m V / |V|)' with V = W + scale * B A, the length |V| of each row, and m that starts as that of W.

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
        """Compute the layer with its update: (T, in) -> (T, out)."""
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
        """Set the mode as nn.Module.train does; the lengths are computed anew."""
        self._kept = None
        return super().train(mode)

    def merged(self, weight: Tensor) -> Tensor:
        """Compute m V / |V|: (out, in)."""
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
        with torch.autocast(capabilities(weight.device).kind, enabled=False):  # which would round W and B A to 16 bits
            direction = merge_weight(weight, self.lora_A, self.lora_B, self.scale, torch.float32)
            return torch.linalg.vector_norm(direction, dim=1)  # (out,)


def lora_product(
    x: Tensor, dropped: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    """Compute x W' + scale * dropped A' B', in the dtype of W.

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
    kind = capabilities(x.device).kind
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x, dropped, weight = x.to(dtype), None if dropped is None else dropped.to(dtype), weight.to(dtype)
    if torch.is_inference_mode_enabled():  # a token at a time, where the number of operations counts
        u = F.linear(x if dropped is None else dropped, lora_A.to(dtype))
        return torch.addmm(F.linear(u, lora_B.to(dtype)), x, weight.t(), beta=scale)
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
