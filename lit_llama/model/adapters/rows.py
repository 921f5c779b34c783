"""Parts that train as a whole: rows of embeddings and modules to save."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.model.adapters.low_rank import Adapter


class Whole(Adapter):
    """A module that computes with `trained`, a float32 copy of its weight."""

    PARTS: ClassVar[Mapping[str, str]] = {"weight": "trained"}
    trained: nn.Parameter

    def start(self, weight: Tensor) -> None:
        """Begin with the base's weight."""
        self.trained = nn.Parameter(weight.detach().to(torch.float32, copy=True))

    def merged(self, weight: Tensor) -> Tensor:
        """Return the trained copy, which takes the place of `weight`."""
        return self.trained


class WholeEmbedding(Whole, nn.Embedding):
    """An embedding that is trained whole."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight
        self.start(base.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the trained rows: (T,) -> (T, C), in the dtype of the base."""
        return F.embedding(ids, self.trained).to(self.weight.dtype)


class WholeLinear(Whole, nn.Linear):
    """A linear layer without bias that is trained whole."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.start(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with the trained weight: (T, in) -> (T, out)."""
        return F.linear(x, self.trained.to(x.dtype))


class WholeNorm(Whole, nn.RMSNorm):
    """A norm that is trained whole."""

    def __init__(self, base: nn.RMSNorm) -> None:
        super().__init__(base.normalized_shape, eps=base.eps, device="meta")
        self.weight, self.offset = base.weight, getattr(base, "offset", 0.0)
        self.start(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize with the trained weight: (..., C) -> (..., C)."""
        return F.rms_norm(x, self.normalized_shape, (self.trained + self.offset).to(x.dtype), self.eps)


def whole(module: nn.Module) -> Whole | None:
    """Return the trainable copy of a module; None if it is of no kind that can be."""
    if isinstance(module, nn.Embedding):
        return WholeEmbedding(module)
    if isinstance(module, nn.RMSNorm):
        return WholeNorm(module)
    return WholeLinear(module) if isinstance(module, nn.Linear) and module.bias is None else None


PART = "token_adapter.trainable_tokens_delta"
"""PEFT's name; what it holds are the rows themselves and no difference."""


class TrainedRows(Adapter):
    """A module whose weight has other rows at some ids."""

    PARTS: ClassVar[Mapping[str, str]] = {PART: "rows"}
    rows: nn.Parameter
    ids: Tensor
    numbers: tuple[int, ...]

    def start(self, weight: Tensor, ids: Sequence[int]) -> None:
        """Begin with the base's rows: (K, C)."""
        self.numbers = tuple(ids)
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach()[self.ids].to(torch.float32, copy=True))

    def merged(self, weight: Tensor) -> Tensor:
        """Return the base's matrix with the trained rows in place: (V, C)."""
        ids = torch.tensor(self.numbers, device=weight.device)  # those in self.ids may be without storage
        return weight.float().index_copy(0, ids, self.rows.detach().to(weight.device, torch.float32))


class RowsEmbedding(TrainedRows, nn.Embedding):
    """An embedding of which some rows are trained."""

    def __init__(self, base: nn.Embedding, ids: Sequence[int]) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight
        self.start(base.weight, ids)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows, trained ones among them: (T,) -> (T, C), in the dtype of the base."""
        y = F.embedding(ids, self.weight)
        chosen = ids[:, None] == self.ids  # (T, K)
        return torch.where(chosen.any(1, keepdim=True), self.rows.to(y.dtype)[chosen.int().argmax(1)], y)


class RowsLinear(TrainedRows, nn.Linear):
    """A head of which some rows are trained, or are those of the embedding that it is tied to.

    Args:
        base: The head.
        ids: Which rows.
        tied: The embedding whose trained rows are also the head's.
    """

    def __init__(self, base: nn.Linear, ids: Sequence[int], tied: RowsEmbedding | None = None) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.is_tied = base.weight, tied is not None
        self.start(base.weight, ids)
        if tied is not None:
            self.rows = tied.rows

    def parts(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters; rows of a tied head are the embedding's."""
        return {} if self.is_tied else super().parts()

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits with the trained rows: (T, C) -> (T, V)."""
        y = F.linear(x, self.weight)
        return y.index_copy(-1, self.ids, F.linear(x, self.rows.to(x.dtype)).to(y.dtype))
