"""Linear layers of one input as one matrix, which holds their low-rank updates, too.

    M = [W  s B]      [y] = M [x]      with u = A x
        [A   0 ]      [ ]     [u]

W are the weights of all of them below each other, and so A and B, each B at its own rows and columns. With u beside x
in one buffer, a single product over in + r columns gives W x + s B A x without rounding in between, and with
du = s B' dy beside dy, a single one over out + r rows gives W' dy + A' du: an update costs as much as r columns more.

The layers keep their weights, by their own names: views of M.

Shapes: T tokens, r ranks of all layers together, R of them with what fills up to a multiple that suits the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_llama.model.low_rank import LoRALinear

ALIGNED = {"cpu": 8, "cuda": 64}
"""Products are fastest on multiples of this."""


class Joined:
    """Frozen linear layers with the same input, with or without updates; their weights move into one matrix.

    Args:
        linears: In the order of their outputs.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = list(linears)
        first, self.inputs = linears[0].weight, linears[0].in_features
        self.outputs = sum(linear.out_features for linear in linears)
        self.updates = [linear for linear in linears if isinstance(linear, LoRALinear)]
        ranks = [linear.lora_A.shape[0] for linear in self.updates]
        aligned = ALIGNED.get(first.device.type, 1)
        self.tail = -(-sum(ranks) // aligned) * aligned  # R
        self._matrix = first.new_zeros(self.outputs + self.tail, self.inputs + self.tail)
        self._places: list[tuple[slice, slice]] = []  # rows of B, and its columns behind the inputs
        row = column = 0
        for linear in linears:
            rows = slice(row, row + linear.out_features)
            self._matrix[rows, : self.inputs] = linear.weight
            linear.weight = nn.Parameter(self._matrix[rows, : self.inputs], requires_grad=False)
            if isinstance(linear, LoRALinear):
                self._places.append((rows, slice(column, column + linear.lora_A.shape[0])))
                column += linear.lora_A.shape[0]
            row = rows.stop
        biases = [linear.bias for linear in linears]
        self._bias = None
        if any(bias is not None for bias in biases):
            parts = zip(biases, linears, strict=True)
            self._bias = torch.cat([first.new_zeros(n.out_features) if b is None else b.detach() for b, n in parts])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each update, in the order of `gradients`."""
        return [parameter for linear in self.updates for parameter in (linear.lora_A, linear.lora_B)]

    @property
    def extra(self) -> int:
        """Values of the matrix beyond those of the weights."""
        return self._matrix.numel() - self.outputs * self.inputs

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the updates as they are now."""
        assert self.linears[0].weight.untyped_storage()._cdata == self._matrix.untyped_storage()._cdata
        for linear, (rows, columns) in zip(self.updates, self._places, strict=True):
            self._matrix[rows, self.inputs + columns.start : self.inputs + columns.stop] = linear.lora_B * linear.scale
            self._matrix[self.outputs + columns.start : self.outputs + columns.stop, : self.inputs] = linear.lora_A

    def buffer_in(self, x: Tensor) -> Tensor:
        """Room for x and u: (T, in + R)."""
        return x.new_empty(len(x), self.inputs + self.tail)

    def buffer_out(self, x: Tensor) -> Tensor:
        """Room for dy and du: (T, out + R)."""
        return x.new_empty(len(x), self.outputs + self.tail)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """W x + s B A x (+ residual): (T, out). The last columns of x (T, in + R) are filled with u."""
        if self.tail:
            torch.mm(x[:, : self.inputs], self._matrix[self.outputs :, : self.inputs].t(), out=x[:, self.inputs :])
        weight = self._matrix[: self.outputs].t()
        y = torch.mm(x, weight) if residual is None else torch.addmm(residual, x, weight)
        return y if self._bias is None else y.add_(self._bias)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """W' dy + A' s B' dy: (T, in). The last columns of dy (T, out + R) are filled with du."""
        if self.tail:
            torch.mm(dy[:, : self.outputs], self._matrix[: self.outputs, self.inputs :], out=dy[:, self.outputs :])
        return torch.mm(dy, self._matrix[:, : self.inputs])

    def gradients(self, x: Tensor, u: Tensor, dy: Tensor) -> list[Tensor]:
        """Those of A and B of each update, in float32; dy as `input_gradient` has left it, u (T, R)."""
        if not self.tail:
            return []
        d_a = torch.mm(dy[:, self.outputs :].t(), x[:, : self.inputs])  # (R, in)
        found = []
        for linear, (rows, columns) in zip(self.updates, self._places, strict=True):
            d_b = torch.mm(dy[:, rows].t(), u[:, columns])  # (out of this one, r)
            found += [d_a[columns].float(), d_b.float().mul_(linear.scale)]
        return found
