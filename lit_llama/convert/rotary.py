"""The two orders of the rows of q and k: rotary partners side by side (Meta, lit-llama, GGUF), or a head in two halves
(Hugging Face).

Shapes: H heads of the projection, D head size, in: input width, or nothing for a bias.
"""

from torch import Tensor


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from neighbouring pairs to the two halves of a head: (H D, in) -> same."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse: rows of q or k from the two halves of a head to neighbouring pairs: (H D, in) -> same."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
