"""Linear layers of one input as one, with their low-rank updates.

The weights W of all of them stand below each other, and so A and B, each B at its own rows and columns. What goes in
has room for u = A x beside x in one buffer, and what comes back for du = s B' dy beside dy, so that updates cost
little: see `OneMatrix` for a base as it is, quantized.py for others. Where updates drop values of x, each has an x of
its own, and so products of its own with A.

Shapes: T tokens, r ranks of all layers together, R of them with what fills up to a multiple that suits the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_llama.model.low_rank import LoRALinear, LoRAOnQuantized, base_of
from lit_llama.model.operators.narrow import apart, outer, project, project_back
from lit_llama.model.operators.pointwise import drop

Dropped = Sequence[tuple[Tensor, float]]
"""Seed and probability with which each update drops values of its input; none where no update does."""


def _dropped(room: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x (T, n) without the values that are dropped, in the room of as many; x itself where none are."""
    if not p:
        return x
    drop(room, x, seed, p)
    return room


ALIGNED = {"cpu": 8, "cuda": 64}
"""Products are fastest on multiples of this."""


class Joined:
    """Frozen linear layers with the same input, with or without updates.

    Args:
        linears: In the order of their outputs.
        like: A tensor of the device and dtype in which they compute.
    """

    def __init__(self, linears: Sequence[nn.Module], like: Tensor) -> None:
        self.bases = [base_of(linear) for linear in linears]
        self.inputs, self.sizes = self.bases[0].in_features, [base.out_features for base in self.bases]
        self.outputs = sum(self.sizes)
        self.updates = [linear for linear in linears if isinstance(linear, LoRALinear | LoRAOnQuantized)]
        aligned = ALIGNED.get(like.device.type, 1)
        self.tail = -(-sum(linear.lora_A.shape[0] for linear in self.updates) // aligned) * aligned  # R
        self._places: list[tuple[slice, slice]] = []  # rows of B, and its columns
        row = column = 0
        for linear, size in zip(linears, self.sizes, strict=True):
            if isinstance(linear, LoRALinear | LoRAOnQuantized):
                self._places.append((slice(row, row + size), slice(column, column + linear.lora_A.shape[0])))
                column += linear.lora_A.shape[0]
            row += size
        biases = [base.bias for base in self.bases]
        self._bias = None
        if any(bias is not None for bias in biases):
            parts = zip(biases, self.sizes, strict=True)
            self._bias = torch.cat([like.new_zeros(n) if bias is None else bias.detach() for bias, n in parts])
        self._down, self._up = self.take(like)  # A (R, in), s B (out, R)

    def take(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Take the weights over; gives room for A (R, in) and s B (out, R), filled with zeros."""
        return like.new_zeros(self.tail, self.inputs), like.new_zeros(self.outputs, self.tail)

    def product(self, out: Tensor, x: Tensor, residual: Tensor | None) -> None:
        """Compute out (T, out) = W x + s B u (+ residual), x and u beside each other (T, in + R)."""
        raise NotImplementedError

    def product_back(self, dy: Tensor, *, update: bool = True) -> Tensor:
        """Compute W' dy, and + A' du with `update`, dy and du beside each other: (T, out + R) -> (T, in)."""
        raise NotImplementedError

    @property
    def extra(self) -> int:
        """Values that are held beyond those of the weights."""
        return self.tail * (self.inputs + self.outputs)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each update, in the order of `gradients`."""
        return [parameter for linear in self.updates for parameter in (linear.lora_A, linear.lora_B)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the updates as they are now."""
        for linear, (rows, columns) in zip(self.updates, self._places, strict=True):
            self._up[rows, columns] = linear.lora_B * linear.scale
            self._down[columns] = linear.lora_A

    @property
    def chances(self) -> list[float]:
        """Probability with which each update drops values of its input, as its mode is now."""
        return [linear.dropout.p if linear.training else 0.0 for linear in self.updates]

    def draw(self) -> Dropped:
        """Draw from torch's generator what decides which values are dropped, where any are."""
        if not any(chances := self.chances):
            return ()
        seeds = torch.randint(1 << 62, (len(chances),), device="cpu")
        return list(zip(seeds.unbind(), chances, strict=True))

    def buffer_in(self, x: Tensor) -> Tensor:
        """Return room for x and u: (T, in + R)."""
        return x.new_empty(len(x), self.inputs + self.tail)

    def buffer_out(self, x: Tensor) -> Tensor:
        """Return room for dy and du: (T, out + R)."""
        return x.new_empty(len(x), self.outputs + self.tail)

    def __call__(self, out: Tensor, x: Tensor, residual: Tensor | None = None, dropped: Dropped = ()) -> None:
        """Compute out (T, out) = W x + s B A x (+ residual). The last columns of x (T, in + R) are filled with u."""
        if dropped:
            self._project_dropped(x[:, self.inputs :], x[:, : self.inputs], dropped)
        elif self.tail:
            project(x[:, self.inputs :], x[:, : self.inputs], self._down)
        self.product(out, x, residual)
        if self._bias is not None:
            out.add_(self._bias)

    def _project_dropped(self, u: Tensor, x: Tensor, dropped: Dropped) -> None:
        """Fill u (T, R) with A x, of the values of x (T, in) that each update does not drop."""
        u[:, self._places[-1][1].stop :] = 0
        room = x.new_empty(x.shape)
        for (_, columns), draw in zip(self._places, dropped, strict=True):
            project(u[:, columns], _dropped(room, x, *draw), self._down[columns])

    def input_gradient(self, dy: Tensor, dropped: Dropped = ()) -> Tensor:
        """Compute W' dy + A' s B' dy: (T, in). The last columns of dy (T, out + R) are filled with du."""
        if self.tail:
            project_back(dy[:, self.outputs :], dy[:, : self.outputs], self._up)
        dx = self.product_back(dy, update=not dropped)
        if dropped:
            du, room = dy[:, self.outputs :], torch.empty_like(dx)
            for (_, columns), (seed, p) in zip(self._places, dropped, strict=True):
                torch.mm(apart(du[:, columns]), apart(self._down[columns]), out=room)
                drop(dx, room, seed, p, add=True)
        return dx

    def gradients(self, x: Tensor, u: Tensor, dy: Tensor, dropped: Dropped = ()) -> list[Tensor]:
        """Compute the gradients of A and B of each update, in float32; dy as `input_gradient` has left it, u (T, R)."""
        if not self.tail:
            return []
        du, x = dy[:, self.outputs :], x[:, : self.inputs]
        if dropped:
            room = x.new_empty(x.shape)
            parts = zip(self._places, dropped, strict=True)
            d_a = [outer(du[:, columns], _dropped(room, x, *draw)) for (_, columns), draw in parts]
        else:
            joined = outer(du, x)  # (R, in)
            d_a = [joined[columns] for _, columns in self._places]
        found = []
        for linear, (rows, columns), gradient in zip(self.updates, self._places, d_a, strict=True):
            d_b = outer(u[:, columns], dy[:, rows])  # (r, out of this one)
            found += [gradient, d_b.mul_(linear.scale).t()]
        return found


class OneMatrix(Joined):
    """Layers whose weights and updates move into one matrix.

        M = [W  s B]      [y] = M [x]      with u = A x
            [A   0 ]      [ ]     [u]

    A single product over in + r columns gives W x + s B A x without rounding in between, and with du beside dy, a
    single one over out + r rows gives W' dy + A' du: an update costs as much as r columns more. The layers keep their
    weights, by their own names: views of M.
    """

    def take(self, like: Tensor) -> tuple[Tensor, Tensor]:
        matrix = like.new_zeros(self.outputs + self.tail, self.inputs + self.tail)
        self._matrix = matrix
        for base, rows in zip(self.bases, matrix.split([*self.sizes, self.tail])[:-1], strict=True):
            assert isinstance(base, nn.Linear)
            rows[:, : self.inputs] = base.weight
            base.weight = nn.Parameter(rows[:, : self.inputs], requires_grad=False)
        return matrix[self.outputs :, : self.inputs], matrix[: self.outputs, self.inputs :]

    @property
    def extra(self) -> int:
        return self._matrix.numel() - self.outputs * self.inputs

    def refresh(self) -> None:
        first = self.bases[0]
        assert isinstance(first, nn.Linear)
        assert first.weight.untyped_storage()._cdata == self._matrix.untyped_storage()._cdata, "the weights have moved"
        super().refresh()

    def product(self, out: Tensor, x: Tensor, residual: Tensor | None) -> None:
        weight = self._matrix[: self.outputs].t()
        if residual is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(residual, x, weight, out=out)

    def product_back(self, dy: Tensor, *, update: bool = True) -> Tensor:
        rows = self.outputs + self.tail if update else self.outputs
        return torch.mm(dy[:, :rows], self._matrix[:rows, : self.inputs])
