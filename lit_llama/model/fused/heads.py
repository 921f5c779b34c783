"""Heads between the projection and attention: queries and keys normalised, where they are, and rotated.

Shapes: T tokens, N heads, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_llama.device import capabilities
from lit_llama.model.attention.dispatch import Heads
from lit_llama.model.fused.norms import Norm
from lit_llama.model.operators import pointwise
from lit_llama.model.rope import Rotation


def turned(heads: Heads, norms: Sequence[Norm], rotation: Rotation, *, again: bool = False) -> Heads:
    """Return heads as they attend, of those that are projected: queries and keys normalised and rotated.

    Args:
        heads: Those of one product; without norms they are rotated where they are.
        norms: Of queries and keys, or none.
        rotation: cos and sin (T, 1, D/2).
        again: Without norms they are rotated already.
    """
    if again and not norms:
        return heads
    cos, sin = (part.flatten(1) for part in rotation)  # (T, D/2)
    attending = []
    for index, part in enumerate(heads[:2]):
        place = _elsewhere(part, part.dtype) if norms else part
        wide = place if _rotates(place, cos) else _elsewhere(place, cos.dtype)
        if norms:
            rows = wide.flatten(0, 1)  # (T N, D)
            norms[index](rows, rows)
        pointwise.rotate(wide, wide, cos, sin)
        if wide is not place:
            pointwise.copy(place.flatten(1), wide.flatten(1))
        attending.append(place)
    return attending[0], attending[1], heads[2]


def turned_back(
    places: Heads, gradients: Heads, heads: Heads, norms: Sequence[Norm], rotation: Rotation
) -> list[Tensor]:
    """Turn gradients of heads as they attend, in their places or elsewhere, into those of heads as they are projected.

    Args:
        places: Where they are wanted.
        gradients: Of heads as they attend.
        heads: As they are projected; of account where they are normalised.
        norms: Of queries and keys, or none.
        rotation: cos and sin (T, 1, D/2).

    Returns:
        Gradients of the weights of the norms that train.
    """
    cos, sin = (part.flatten(1) for part in rotation)
    found = []
    for index in range(2):
        place, part = places[index], gradients[index]
        wide = place if _rotates(place, cos) else _elsewhere(part, cos.dtype)
        pointwise.rotate(wide, part if wide is place else wide, cos, sin, back=True)
        if norms:
            gradient, rows = (_elsewhere(x, wide.dtype).flatten(0, 1) for x in (wide, heads[index]))  # (T N, D)
            nothing = rows.new_zeros(rows.shape[1]).expand_as(rows)
            found += norms[index].backward(gradient, torch.empty_like(rows), gradient, rows, nothing)
            pointwise.copy(place.flatten(1), gradient.view(len(place), -1))
        elif wide is not place:
            pointwise.copy(place.flatten(1), wide.flatten(1))
    if gradients[2] is not places[2]:
        pointwise.copy(places[2].flatten(1), gradients[2].flatten(1))
    return found


def _rotates(x: Tensor, cos: Tensor) -> bool:
    """Whether a kernel rotates it as it is: on a GPU, or where its numbers are those of the angles."""
    return capabilities(x.device).on_gpu or x.dtype == cos.dtype


def _elsewhere(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of heads (T, N, D) whose rows lie in one piece."""
    own = part.new_empty(part.shape, dtype=dtype)
    pointwise.copy(own.flatten(1), part.flatten(1))
    return own
