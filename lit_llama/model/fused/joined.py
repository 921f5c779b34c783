"""Linear layers of one input as one, with their low-rank updates or with weights that train.

The weights W of all of them stand below each other, and so A and B, each B at its own rows and columns. What goes in
has room for u = A x beside x in one buffer, and what comes back for du = s B' dy beside dy, so that updates cost
little: see `OneMatrix` for a base as it is, `Spread` for one that lies in parts, quantized.py for others, outputs.py
for what follows the product. Where updates drop values of x, each has an x of its own, and so products of its own with
A.

Shapes: T tokens, r ranks of all layers together, R of them with what fills up to a multiple that suits the device.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lit_llama.device import capabilities
from lit_llama.model.adapters.low_rank import DoRALinear, LowRank, base_of
from lit_llama.model.fused.outputs import Biases, Magnitudes
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
    """Linear layers with the same input: with or without updates, decomposed or not, or with weights that train.

    Args:
        linears: In the order of their outputs.
        like: A tensor of the device and dtype in which they compute.
    """

    def __init__(self, linears: Sequence[nn.Module], like: Tensor) -> None:
        self.bases = [base_of(linear) for linear in linears]
        self.inputs, self.sizes = self.bases[0].in_features, [base.out_features for base in self.bases]
        self.outputs, self.dtype = sum(self.sizes), like.dtype
        self.updates = [linear for linear in linears if isinstance(linear, LowRank)]
        aligned = ALIGNED.get(capabilities(like.device).kind, 1)
        self.tail = -(-sum(linear.lora_A.shape[0] for linear in self.updates) // aligned) * aligned  # R
        self._places: list[tuple[slice, slice]] = []  # rows of B, and its columns
        row = column = 0
        for linear, size in zip(linears, self.sizes, strict=True):
            if isinstance(linear, LowRank):
                self._places.append((slice(row, row + size), slice(column, column + linear.lora_A.shape[0])))
                column += linear.lora_A.shape[0]
            row += size
        self.biases = Biases(self.bases, self.sizes, like)
        self._down, self._up = self.take(like)  # A (R, in), s B (out, R)
        placed = zip(self.updates, self._places, strict=True)
        decomposed = [(linear, *place) for linear, place in placed if isinstance(linear, DoRALinear)]
        self.magnitudes = Magnitudes(decomposed, self.dense()) if decomposed else None

    def take(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Take the weights over; gives room for A (R, in) and s B (out, R), filled with zeros."""
        return like.new_zeros(self.tail, self.inputs), like.new_zeros(self.outputs, self.tail)

    def dense(self) -> Tensor:
        """Return W (out, in), as it is multiplied with."""
        raise NotImplementedError

    def product(self, out: Tensor, x: Tensor, residual: Tensor | None) -> None:
        """Compute out (T, out) = W x + s B u (+ residual, or biases), x and u beside each other (T, in + R)."""
        raise NotImplementedError

    def product_back(self, dy: Tensor, *, update: bool = True) -> Tensor:
        """Compute W' dy, and + A' du with `update`, dy and du beside each other: (T, out + R) -> (T, in)."""
        raise NotImplementedError

    @property
    def extra(self) -> int:
        """Values that are held beyond those of the weights."""
        return self.tail * (self.inputs + self.outputs)

    @property
    def held(self) -> list[Tensor]:
        """Tensors whose memory holds these values."""
        return [self._down, self._up]

    @property
    def raw(self) -> int:
        """Columns of what `__call__` gives that the backward pass needs: all outputs where magnitudes train."""
        return self.outputs if self.magnitudes else 0

    @property
    def weights(self) -> list[nn.Parameter]:
        """Weights that train: of all of the layers, or of none."""
        weights = [base.weight for base in self.bases if isinstance(base, nn.Linear)]
        return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters that train: A and B of each update or the weights, in the order of `gradients`, then those of
        what follows the product, in the order of `output_gradients`."""
        updates = [parameter for linear in self.updates for parameter in (linear.lora_A, linear.lora_B)]
        magnitudes = self.magnitudes.parameters if self.magnitudes else []
        return [*updates, *self.weights, *magnitudes, *self.biases.parameters]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what trains as it is now."""
        for linear, (rows, columns) in zip(self.updates, self._places, strict=True):
            self._up[rows, columns] = linear.lora_B * linear.scale
            self._down[columns] = linear.lora_A
        if self.biases.parameters:
            self.biases.refresh()
        if self.magnitudes:
            along = self._up.new_empty(self.outputs, self.tail)
            project(along, self.dense(), self._down)
            self.magnitudes.refresh(along)

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
        return x.new_empty(len(x), self.inputs + self.tail, dtype=self.dtype)

    def buffer_out(self, x: Tensor) -> Tensor:
        """Return room for dy and du: (T, out + R)."""
        return x.new_empty(len(x), self.outputs + self.tail, dtype=self.dtype)

    def __call__(self, out: Tensor, x: Tensor, residual: Tensor | None = None, dropped: Dropped = ()) -> None:
        """Compute out (T, out) = W x + s B A x (+ residual). The last columns of x (T, in + R) are filled with u.

        Biases are added, too, unless magnitudes come before them: see `shown`.
        """
        if dropped:
            self._project_dropped(x[:, self.inputs :], x[:, : self.inputs], dropped)
        elif self.tail:
            project(x[:, self.inputs :], x[:, : self.inputs], self._down)
        biases = None if self.magnitudes else self.biases.vector
        self.product(out, x, biases if residual is None else residual)
        if biases is not None and residual is not None:
            out.add_(biases)

    def shown(self, given: Tensor) -> Tensor:
        """Return what the layers give, for what `__call__` gave (T, out): itself, where no magnitudes train."""
        if not self.magnitudes:
            return given
        y = self.magnitudes.times(given)
        return y if self.biases.vector is None else y.add_(self.biases.vector)

    def add(self, out: Tensor, raw: Tensor, x: Tensor, residual: Tensor, dropped: Dropped) -> None:
        """Compute out (T, out) = residual + what the layers give of x, in the dtype of the residual.

        Args:
            out: (T, out).
            raw: (T, out) or empty, see `raw`: what `__call__` gave.
            x: (T, in + R).
            residual: (T, out).
            dropped: See `draw`.
        """
        if not self.magnitudes and out.dtype == self.dtype:
            return self(out, x, residual, dropped)
        given = raw if raw.numel() else x.new_empty(len(x), self.outputs)
        self(given, x, dropped=dropped)
        torch.add(residual, self.shown(given), out=out)

    def _project_dropped(self, u: Tensor, x: Tensor, dropped: Dropped) -> None:
        """Fill u (T, R) with A x, of the values of x (T, in) that each update does not drop."""
        u[:, self._places[-1][1].stop :] = 0
        room = x.new_empty(x.shape)
        for (_, columns), draw in zip(self._places, dropped, strict=True):
            project(u[:, columns], _dropped(room, x, *draw), self._down[columns])

    def output_gradients(self, dy: Tensor, raw: Tensor) -> list[Tensor]:
        """Compute the gradients of what follows the product; dy (T, out + R) becomes that of the product itself.

        Args:
            dy: Gradient of what the layers give, in its first columns.
            raw: (T, out), what `__call__` gave; of no account where no magnitudes train.
        """
        dy = dy[:, : self.outputs]
        biases = self.biases.gradients(dy)
        return [*(self.magnitudes.gradients(dy, raw) if self.magnitudes else []), *biases]

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
        """Compute the gradients of A and B of each update, in float32, or those of the weights; dy as `input_gradient`
        has left it, u (T, R)."""
        du, x = dy[:, self.outputs :], x[:, : self.inputs]
        if self.weights:
            return list(torch.mm(dy[:, : self.outputs].t(), apart(x)).split(self.sizes))
        if not self.tail:
            return []
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
    weights, by their own names: views of M. Weights of other numbers than those of the products stay where they are,
    and M takes them over before each pass.
    """

    def take(self, like: Tensor) -> tuple[Tensor, Tensor]:
        matrix = like.new_zeros(self.outputs + self.tail, self.inputs + self.tail)
        self._matrix, self._copies = matrix, False
        for base, rows in self._rows():
            rows.copy_(base.weight.detach())  # lengths of rows (DoRA) are computed from them now
            if base.weight.dtype == like.dtype:
                base.weight = nn.Parameter(rows, requires_grad=base.weight.requires_grad)
            else:
                self._copies = True
        return matrix[self.outputs :, : self.inputs], matrix[: self.outputs, self.inputs :]

    def _rows(self) -> Iterator[tuple[nn.Linear, Tensor]]:
        """The layers with their places in the matrix."""
        for base, rows in zip(self.bases, self.dense().split(self.sizes), strict=True):
            assert isinstance(base, nn.Linear)
            yield base, rows

    def dense(self) -> Tensor:
        return self._matrix[: self.outputs, : self.inputs]

    @property
    def extra(self) -> int:
        return self._matrix.numel() - (0 if self._copies else self.outputs * self.inputs)

    @torch.no_grad()
    def refresh(self) -> None:
        storage = self._matrix.untyped_storage()._cdata
        for base, rows in self._rows():
            if self._copies:
                rows.copy_(base.weight)
            else:
                assert base.weight.untyped_storage()._cdata == storage, "the weights have moved"
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


class Spread(Joined):
    """Layers whose weights are spread over processes (FSDP): whole, and to be read, only while the layer computes.

    Nothing holds on to a weight from pass to pass, nor moves it: each layer is multiplied alone, out of the memory that
    its weight is gathered into, and writes its own columns.
    """

    def _weights(self) -> Iterator[Tensor]:
        """The weights as they are multiplied with, one after the other."""
        for base in self.bases:
            assert isinstance(base, nn.Linear)
            yield base.weight.detach().to(self._up)

    def product(self, out: Tensor, x: Tensor, residual: Tensor | None) -> None:
        inner, u = x[:, : self.inputs], x[:, self.inputs :]
        parts = zip(self._weights(), out.split(self.sizes, dim=1), self._up.split(self.sizes), strict=True)
        for weight, place, up in parts:
            if self.tail:  # the update is small, and the product not rounded yet when it is added
                torch.addmm(torch.mm(u, up.t()), inner, weight.t(), out=place)
            else:
                torch.mm(inner, weight.t(), out=place)
        if residual is not None:
            out.add_(residual)

    def product_back(self, dy: Tensor, *, update: bool = True) -> Tensor:
        dx = torch.mm(dy[:, self.outputs :], self._down) if self.tail and update else None
        for weight, part in zip(self._weights(), dy[:, : self.outputs].split(self.sizes, dim=1), strict=True):
            dx = torch.mm(part, weight) if dx is None else dx.addmm_(part, weight)
        assert dx is not None
        return dx

    def dense(self) -> Tensor:
        return torch.cat([*self._weights()])
