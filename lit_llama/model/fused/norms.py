"""Norms of the stream and of heads, whose numbers may have more bits than those of the products between them.

Shapes: T tokens, n columns: those of the stream, or of a head.
"""

import torch
from torch import Tensor, nn

from lit_llama.device import capabilities
from lit_llama.model.adapters.rows import WholeNorm
from lit_llama.model.operators import pointwise
from lit_llama.model.operators.narrow import column_sums


class Norm:
    """A norm with a backward pass: numbers in the dtype of its weight inside, in those of its arguments outside.

    Args:
        norm: The base's, or the copy of it that trains.
    """

    def __init__(self, norm: nn.RMSNorm) -> None:
        assert norm.eps is not None
        self._norm, self._eps = norm, norm.eps

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, if it trains."""
        weight = self._norm.trained if isinstance(self._norm, WholeNorm) else self._norm.weight
        return [weight] if weight.requires_grad else []

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the numbers inside."""
        return self._norm.weight.dtype

    def __call__(self, out: Tensor, x: Tensor) -> None:
        """Compute out = x / rms(x) * weight, both (T, n)."""
        self._normalise(out, x, self._weight)

    def backward(self, dx: Tensor, again: Tensor, dy: Tensor, x: Tensor, residual: Tensor) -> list[Tensor]:
        """Compute dx = residual + the gradient of x; again = the norm itself, all (T, n).

        Returns:
            The gradient of the weight, if it trains.
        """
        found = []
        if self.parameters:
            direction = torch.empty_like(dy, dtype=self.dtype)
            self._normalise(direction, x, torch.ones_like(self._weight))
            found.append(column_sums(direction.mul_(dy)))
        inside = [self._inside(place) for place in (dx, again)]
        given = [self._given(tensor) for tensor in (dy, x, residual)]
        pointwise.norm_backward(inside[0], inside[1], given[0], given[1], self._weight, given[2], self._eps)
        for place, value in zip((dx, again), inside, strict=True):
            if value is not place:
                place.copy_(value)
        return found

    @property
    def _weight(self) -> Tensor:
        trained = self._norm.trained if isinstance(self._norm, WholeNorm) else self._norm.weight
        return trained.detach().to(self.dtype)

    def _normalise(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        inside = self._inside(out)
        pointwise.norm(inside, self._given(x), weight, self._eps)
        if inside is not out:
            out.copy_(inside)

    def _inside(self, place: Tensor) -> Tensor:
        """The place, or one of as many numbers of the dtype inside; a GPU's kernels convert by themselves."""
        return place if self._converts(place) else place.new_empty(place.shape, dtype=self.dtype)

    def _given(self, x: Tensor) -> Tensor:
        return x if self._converts(x) else x.to(self.dtype)

    def _converts(self, x: Tensor) -> bool:
        return x.dtype == self.dtype or capabilities(x.device).on_gpu
