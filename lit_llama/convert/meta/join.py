"""One tensor that lies in parts, as Meta's shards keep it: any rows of the whole, part by part into place."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.model.weights import Stored

_BLOCK = 8 * 2**20  # bytes


@dataclass(frozen=True)
class Joined:
    """A tensor whose parts lie in several files.

    Args:
        name: Its name there, for messages.
        parts: The parts in order, of one dtype, alike in all but the dimension `dim`.
        dim: Dimension that they are laid together along: 0 rows, 1 columns.
        copies: So many neighbouring parts hold the same values, of which one counts.

    Raises:
        CheckpointError: The parts do not fit each other.
    """

    name: str
    parts: Sequence[Stored]
    dim: int = 0
    copies: int = 1
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts:
            if (part.dtype, self._others(part)) != (first.dtype, self._others(first)):
                raise CheckpointError(
                    f"{part.path}: {self.name} is {part.shape} of {part.dtype}, which does not fit "
                    f"{first.shape} of {first.dtype} in {first.path.name}"
                )
        shape = list(first.shape)
        if shape:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts[:: self.copies])
        object.__setattr__(self, "shape", tuple(shape))

    def _others(self, part: Stored) -> tuple[int, ...]:
        return tuple(size for i, size in enumerate(part.shape) if i != self.dim)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return self.parts[0].dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Copy rows start to stop of the whole, or all of it, into memory, which holds it and a block of rows.

        Raises:
            CheckpointError: Parts that should hold the same do not.
        """
        if len(self.parts) == 1:
            return self.parts[0].read(start, stop)
        stop = self.shape[0] if stop is None else stop
        whole = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        at = 0
        for i in range(0, len(self.parts), self.copies):
            size = self.parts[i].shape[self.dim]
            low, high = (max(start - at, 0), min(stop - at, size)) if self.dim == 0 else (start, stop)
            for first, last in _blocks(self.parts[i], low, high):
                if self.dim == 0:
                    target = whole[at + first - start : at + last - start]
                else:
                    target = whole[first - start : last - start, at : at + size]
                target.copy_(self._read_copies(i, first, last))
            at += size
        return whole

    def _read_copies(self, i: int, low: int, high: int) -> Tensor:
        value = self.parts[i].read(low, high)
        for other in self.parts[i + 1 : i + self.copies]:
            if not _same_bits(value, other.read(low, high)):
                first = self.parts[i].path.name
                raise CheckpointError(
                    f"{other.path}: {self.name} is not what {first} holds, though every shard has a copy of it; "
                    "the shards are of different models, or damaged: download them again"
                )
        return value


def same(first: Stored | Joined, second: Stored | Joined) -> bool:
    """Whether two tensors are equal to the last bit, without holding either."""
    if first == second:  # one place that two names point to
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape) or not first.shape:
        return False
    blocks = _blocks(first, 0, first.shape[0])
    return all(_same_bits(first.read(*rows), second.read(*rows)) for rows in blocks)


def _blocks(tensor: Stored | Joined, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows start to stop in blocks that are small beside a tensor."""
    step = max(1, _BLOCK // max(1, tensor.dtype.itemsize * math.prod(tensor.shape[1:])))
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
