"""Rows of an embedding or a head that were trained alone, PEFT's trainable_token_indices: the rest is the base's.

Shapes: T tokens, C hidden, V vocabulary, K trained rows.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.model.low_rank import Adapter

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
        """The base's matrix with the trained rows in place: (V, C)."""
        ids = torch.tensor(self.numbers, device=weight.device)  # those in self.ids may be without storage
        return weight.float().index_copy(0, ids, self.rows.detach().to(weight.device, torch.float32))


class RowsEmbedding(TrainedRows, nn.Embedding):
    """An embedding of which some rows are trained."""

    def __init__(self, base: nn.Embedding, ids: Sequence[int]) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight
        self.start(base.weight, ids)

    def forward(self, ids: Tensor) -> Tensor:
        """(T,) -> (T, C), in the dtype of the base."""
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
        """What is trained; rows of a tied head are the embedding's."""
        return {} if self.is_tied else super().parts()

    def forward(self, x: Tensor) -> Tensor:
        """(T, C) -> (T, V)."""
        y = F.linear(x, self.weight)
        return y.index_copy(-1, self.ids, F.linear(x, self.rows.to(x.dtype)).to(y.dtype))
