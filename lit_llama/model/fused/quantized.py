"""Linear layers of one input as one, where their base is quantised: weights and updates stay apart.

Shapes: T tokens, R ranks of all layers together; W (out, in), A (R, in), s B (out, R).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_llama.device import capabilities
from lit_llama.model import float8
from lit_llama.model.adapters.low_rank import DoRALinear, LoRALinear, LoRAOnQuantized, base_of
from lit_llama.model.fused.joined import Joined, OneMatrix, Spread
from lit_llama.model.quantize import Float8Linear, QuantizedLinear


class Unpacked(Joined):
    """Layers of four or eight bits, whose weights are unpacked for each product, all into one matrix."""

    def product(self, out: Tensor, x: Tensor, residual: Tensor | None) -> None:
        inner, u, weight = x[:, : self.inputs], x[:, self.inputs :], self.dense().t()
        if self.tail:  # the update is small, and the product not rounded yet when it is added
            torch.addmm(torch.mm(u, self._up.t()), inner, weight, out=out)
        else:
            torch.mm(inner, weight, out=out)
        if residual is not None:
            out.add_(residual)

    def product_back(self, dy: Tensor, *, update: bool = True) -> Tensor:
        inner, du = dy[:, : self.outputs], dy[:, self.outputs :]
        weight, adds = self.dense(), self.tail and update
        return torch.addmm(torch.mm(du, self._down), inner, weight) if adds else torch.mm(inner, weight)

    def dense(self) -> Tensor:
        weight = self._up.new_empty(self.outputs, self.inputs)
        for base, rows in zip(self.bases, weight.split(self.sizes), strict=True):
            assert isinstance(base, QuantizedLinear)
            base.dense(self.dtype, rows)
        return weight


class Float8(Unpacked):
    """Layers of 8-bit floats, whose products round what they multiply while training; updates are computed as ever.

    A GPU multiplies only with matrices that lie row by row in the direction of the sum. Turning a weight around takes
    too long to be done each time, so there it is kept both ways, which makes 16 bits a value.
    """

    def take(self, like: Tensor) -> tuple[Tensor, Tensor]:
        bases = [base for base in self.bases if isinstance(base, Float8Linear)]
        self._packed = torch.cat([base.packed for base in bases])  # (out, in)
        self._scales = torch.cat([base.state for base in bases])  # (out,)
        for base, rows in zip(bases, self._packed.split(self.sizes), strict=True):
            base.packed = nn.Parameter(rows, requires_grad=False)
        self._turned = (
            self._packed.t().contiguous() if capabilities(like.device).on_gpu else self._packed.t()
        )  # (in, out)
        return super().take(like)

    def product(self, out: Tensor, x: Tensor, residual: Tensor | None) -> None:
        if not self.bases[0].training:
            return super().product(out, x, residual)
        y = float8.product(x[:, : self.inputs], self._packed, self._scales)
        if self.tail:
            y.addmm_(x[:, self.inputs :], self._up.t())
        out.copy_(y) if residual is None else torch.add(y, residual, out=out)

    def product_back(self, dy: Tensor, *, update: bool = True) -> Tensor:
        if not self.bases[0].training:
            return super().product_back(dy, update=update)
        dx = float8.product_back(dy[:, : self.outputs], self._turned, self._scales)
        return dx.addmm_(dy[:, self.outputs :], self._down) if self.tail and update else dx


KINDS: dict[type[nn.Module], type[Joined]] = {
    nn.Linear: OneMatrix,
    LoRALinear: OneMatrix,
    QuantizedLinear: Unpacked,
    Float8Linear: Float8,
}
"""How layers of each kind are joined."""


def kind_of(linear: nn.Module) -> type[Joined] | None:
    """Return how a layer could be joined with others of its kind; None if it could not."""
    return KINDS.get(type(linear.base_layer if isinstance(linear, LoRAOnQuantized | DoRALinear) else linear))


def join(linears: Sequence[nn.Module], like: Tensor, *, spread: bool = False) -> Joined:
    """Join layers of one kind into one; see `Joined`, and `Spread` for weights that are to be spread."""
    kind = KINDS[type(base_of(linears[0]))]
    return (Spread if spread and kind is OneMatrix else kind)(linears, like)
