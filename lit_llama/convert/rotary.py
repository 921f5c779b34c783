"""The two orders of the rows of q and k: rotary partners side by side (Meta, lit-llama, GGUF), or a head in two halves
(Hugging Face).

Shapes: H heads of the projection, D head size, in: input width, or nothing for a bias.
"""

from torch import Tensor

from lit_llama.model.config import LLaMAConfig


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k from neighbouring pairs to the two halves of a head: (H D, in) -> same."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k from the two halves of a head to neighbouring pairs: (H D, in) -> same."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def in_halves(name: str, weight: Tensor, config: LLaMAConfig) -> Tensor:
    """Return the tensor that Hugging Face calls `name`, from a layout of pairs: rows move if it is of q or k."""
    heads = _heads(name, config)
    return halves_from_pairs(weight, heads) if heads else weight


def in_pairs(name: str, weight: Tensor, config: LLaMAConfig) -> Tensor:
    """Invert `in_halves`."""
    heads = _heads(name, config)
    return pairs_from_halves(weight, heads) if heads else weight


def _heads(name: str, config: LLaMAConfig) -> int:
    """Heads of a projection whose rows are rotated, else 0."""
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return rotated.get(name.split(".")[-2], 0)
