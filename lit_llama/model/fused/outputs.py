"""Outputs of joined layers beyond their product: factors of weight-decomposed updates (DoRA), and biases.

    y = f (W x + s B A x) + b,  with f = m / |V| for each output, and V = W + s B A

No gradient goes through |V|, as in low_rank.DoRALinear, the plain twin.

Shapes: T tokens, R ranks of all layers together, r those of one; out outputs of all layers together.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lit_llama.model.adapters.low_rank import DoRALinear
from lit_llama.model.operators.narrow import column_sums
from lit_llama.model.quantize import QuantizedLinear


class Biases:
    """Biases of joined layers as one vector; layers without have zeros there.

    Args:
        bases: The layers.
        sizes: Outputs of each.
        like: A tensor of the device and dtype in which they compute.
    """

    def __init__(self, bases: Sequence[nn.Linear | QuantizedLinear], sizes: Sequence[int], like: Tensor) -> None:
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self._given = [
            (base, slice(start, start + size))
            for base, start, size in zip(bases, starts, sizes, strict=True)
            if base.bias is not None
        ]
        self.vector = like.new_zeros(sum(sizes)) if self._given else None  # (out,)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the biases as they are now."""
        if self.vector is not None:
            for bias, rows in self._now():
                self.vector[rows] = bias

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Biases that train, in the order of `gradients`."""
        return [bias for bias, _ in self._now() if bias.requires_grad]

    def gradients(self, dy: Tensor) -> list[Tensor]:
        """Compute the gradients of those that train: dy (T, out)."""
        if not self.parameters:
            return []
        sums = column_sums(dy)
        return [sums[rows] for bias, rows in self._now() if bias.requires_grad]

    def _now(self) -> Iterator[tuple[nn.Parameter, slice]]:
        """The biases with their places; they are other tensors while weights that are spread are whole."""
        for base, rows in self._given:
            assert base.bias is not None
            yield base.bias, rows


class Magnitudes:
    """Trained lengths m of the rows of V, and the factors f that they make; rows of layers without have a factor of 1.

        |V|^2 = |W|^2 + 2 s B (W A')' + s^2 B (A A') B',  for each row alone

    so that a pass needs W once, in its own dtype, and no matrix of its size.

    Args:
        decomposed: Layers with their rows and the columns of their u.
        weight: (out, in), the base's.
    """

    def __init__(self, decomposed: Sequence[tuple[DoRALinear, slice, slice]], weight: Tensor) -> None:
        self._decomposed = decomposed
        square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        self._square, self._length = square, torch.ones_like(square)  # (out,)
        # f - 1, which 16 bits hold well, while they have no step of less than 0.4 % near 1.
        self._change = torch.zeros_like(square)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The m of each layer, in the order of `gradients`."""
        return [linear.magnitude for linear, _, _ in self._decomposed]

    @torch.no_grad()
    def refresh(self, along: Tensor) -> None:
        """Compute the factors for the updates as they are now; `along` is W A' (out, R)."""
        for linear, rows, columns in self._decomposed:
            a, b, s = linear.lora_A, linear.lora_B, linear.scale
            other = torch.mm(b, a @ a.t()).mul_(s).add_(along[rows, columns], alpha=2)  # (out of this one, r)
            length = self._square[rows].add(other.mul_(b).sum(1), alpha=s).clamp_(min=0).sqrt_()
            self._length[rows] = length
            self._change[rows] = linear.magnitude / length - 1

    def times(self, x: Tensor) -> Tensor:
        """Compute f x: (T, out), in the dtype of x."""
        return torch.addcmul(x, x, self._change.to(x.dtype))

    def gradients(self, dy: Tensor, product: Tensor) -> list[Tensor]:
        """Compute the gradients of each m, and turn dy (T, out) in place into the gradient of `product` (T, out)."""
        wide = dy.float() if dy.dtype == torch.float16 else dy  # scaled losses are near its largest number
        sums = column_sums(wide * product).div_(self._length)
        dy.addcmul_(dy, self._change.to(dy.dtype))
        return [sums[rows] for _, rows, _ in self._decomposed]
