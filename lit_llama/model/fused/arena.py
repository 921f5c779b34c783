"""Memory in which layers keep what their backward passes need, from step to step."""

from collections.abc import Sequence

from torch import Tensor

from lit_llama.device import capabilities

ALIGNED = 64
"""Values at whose multiples parts begin, so that vectors do not cross lines of the cache."""
SLACK = 8
"""A piece is larger than needed by one part in so many, as the next micro-batch may be. Nothing is there until it is
used."""


class Arena:
    """Memory in which the layers of a model keep what their backward passes need, a piece each.

    On a CPU it is one block, used again in every step: pieces made anew would leave holes in the heap, as gradients and
    what the library remembers of its products come to lie between them. A GPU's memory has an allocator for that.

    Args:
        pieces: How many are taken at most until the first is given back.
        kept: Whether pieces are used again; a plan counts each as it comes and goes.
    """

    def __init__(self, pieces: int, *, kept: bool = True) -> None:
        self._pieces, self._size, self._kept = pieces, 0, kept
        self._held = False
        self._free: list[Tensor] = []

    def take(self, like: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return a flat piece, and parts of it of so many values each, as aligned as tensors of their own."""
        spans = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        piece = self._piece(like, sum(spans))
        parts = piece[: sum(spans)].split(spans)
        return piece, [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def _piece(self, like: Tensor, size: int) -> Tensor:
        if not self._kept or not capabilities(like.device).on_cpu:
            return like.new_empty(size)
        if (size > self._size or not self._held) and len(self._free) == self._pieces * self._held:
            self._free.clear()  # first of all, so that its memory can be had again
            if size > self._size:
                self._size = -(-(size + size // SLACK) // ALIGNED) * ALIGNED
            self._held = True
            block = like.new_empty(self._pieces * self._size)
            # By .data autograd takes each for itself: what is written into one does not spoil what another keeps.
            self._free = [piece.data for piece in block.split(self._size)]
        return self._free.pop() if self._free and size <= self._size else like.new_empty(size)

    def give(self, piece: Tensor) -> None:
        """Take it back: nobody needs what is in it."""
        if self._held and piece.numel() == self._size and len(self._free) < self._pieces:
            self._free.append(piece)

    def give_back(self) -> None:
        """Let go of all of it, unless a part is still needed; the next piece brings it back, as large as it was."""
        if self._held and len(self._free) == self._pieces:
            self._free.clear()
            self._held = False
