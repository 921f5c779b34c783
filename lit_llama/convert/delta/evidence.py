"""What the weights themselves say: which policy, and whether base and delta are what they are called.

The norms of the layers give a delta away: they are few, of one size in the models of a family, and near zero in a
difference.
"""

import torch
from torch import Tensor

from lit_llama.convert.delta.policy import VOCABULARY, Policy, Side
from lit_llama.errors import CheckpointError

_SAME = 0.95  # cosine of two models of one family; a difference points anywhere
_WHOLE = 0.5  # a difference is shorter than half of what it is added to
_ROUNDED = 0.9  # share of float16 values without their last three bits: 1/8 by chance, nearly all after bfloat16


def find_policy(base: Side, delta: Side) -> Policy:
    """The policy that shapes and values leave no doubt about.

    Raises:
        CheckpointError: More than one could be meant.
    """
    if holds_values(base, delta):
        return "ziya"
    if base.rows() == delta.rows():
        return "add"
    raise CheckpointError(
        f"{delta.folder} has {delta.rows()} embedding rows, {base.folder} has {base.rows()}: whether the new rows of "
        "the base start as zeros (--policy vicuna) or as the mean of its rows (--policy alpaca) was the publisher's "
        "choice; name it"
    )


def holds_values(base: Side, delta: Side) -> bool:
    """Whether the embedding of the delta is a whole one: its rows are as long as those of the base."""
    ours, theirs = _first_rows(base).norm(), _first_rows(delta).norm()
    return bool(theirs > _WHOLE * ours)


def check_pair(base: Side, delta: Side) -> None:
    """Raise CheckpointError if base and delta are swapped, the delta is a whole model, or the base merged already."""
    ours, theirs = _norms(base), _norms(delta)
    ratio = float(theirs.norm() / ours.norm().clamp_min(1e-30))
    cosine = float(torch.cosine_similarity(ours, theirs, dim=0))
    if base.rows() == delta.rows() and torch.equal(_first_rows(base), _first_rows(delta)):
        raise CheckpointError(
            f"{base.folder} and {delta.folder} hold the same embedding of {base.rows()} rows: the base is merged "
            "already, or both are one model; --base_dir needs the original weights"
        )
    if cosine > _SAME and ratio > _WHOLE:
        raise CheckpointError(
            f"{delta.folder} is no delta but a whole model: its norms are those of {base.folder} (cosine "
            f"{cosine:.3f}); it needs no base, use it as it is"
        )
    if ratio > 1:
        raise CheckpointError(
            f"base and delta seem swapped: the norms of {delta.folder} are {ratio:.3g} times those of {base.folder}; "
            "--base_dir is the model, --delta_dir what its publisher adds"
        )


def rounded_through_bfloat16(side: Side) -> bool:
    """Whether float16 weights were bfloat16 once, as a converter that loads models in bfloat16 leaves them."""
    name = next(name for name in side.stored if name.endswith("down_proj.weight"))
    value = side.stored[name].read(0, min(64, side.stored[name].shape[0]))
    if value.dtype is not torch.float16:
        return False
    bits = value[value.abs() > 2**-14].view(torch.int16)  # below, float16 itself has fewer bits
    return bits.numel() > 0 and float((bits & 7 == 0).float().mean()) > _ROUNDED


def _first_rows(side: Side) -> Tensor:
    stored = side.stored[VOCABULARY[0]]
    return stored.read(0, min(256, stored.shape[0])).float()


def _norms(side: Side) -> Tensor:
    names = sorted(name for name in side.stored if name.endswith("norm.weight"))
    return torch.cat([side.stored[name].read().float() for name in names])
