"""Whole trainable copies of embedding, head and norms, PEFT's modules_to_save.

A new token's rows say nothing until they are trained, which a low-rank update does badly. The frozen matrix of the base
stays where it is: a head tied to the embedding keeps it unless it is copied itself.

Shapes: T tokens, C hidden, V vocabulary.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.model.low_rank import Adapter


class Whole(Adapter):
    """A module that computes with `trained`, a float32 copy of its weight."""

    PARTS: ClassVar[Mapping[str, str]] = {"weight": "trained"}
    trained: nn.Parameter

    def start(self, weight: Tensor) -> None:
        """Begin with the base's weight."""
        self.trained = nn.Parameter(weight.detach().to(torch.float32, copy=True))

    def merged(self, weight: Tensor) -> Tensor:
        """The trained copy, which takes the place of `weight`."""
        return self.trained


class WholeEmbedding(Whole, nn.Embedding):
    """An embedding that is trained whole."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight
        self.start(base.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(T,) -> (T, C), in the dtype of the base."""
        return F.embedding(ids, self.trained).to(self.weight.dtype)


class WholeLinear(Whole, nn.Linear):
    """A linear layer without bias that is trained whole."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.start(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        return F.linear(x, self.trained.to(x.dtype))


class WholeNorm(Whole, nn.RMSNorm):
    """A norm that is trained whole."""

    def __init__(self, base: nn.RMSNorm) -> None:
        super().__init__(base.normalized_shape, eps=base.eps, device="meta")
        self.weight = base.weight
        self.start(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.rms_norm(x, self.normalized_shape, self.trained.to(x.dtype), self.eps)


def whole(module: nn.Module) -> Whole | None:
    """The trainable copy of a module; None if it is of no kind that can be."""
    if isinstance(module, nn.Embedding):
        return WholeEmbedding(module)
    if isinstance(module, nn.RMSNorm):
        return WholeNorm(module)
    return WholeLinear(module) if isinstance(module, nn.Linear) and module.bias is None else None
