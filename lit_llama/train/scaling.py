"""The scale of the loss in float16: which steps it spoils, and that this is its way of finding its size."""

import torch
from torch import Tensor


def overflowed(scaler: torch.amp.GradScaler, loss: Tensor, norm: Tensor) -> bool:
    """Whether a step is skipped because the scale was too high, which `scaler.update` then halves.

    It is no failure: the scale starts too high by design and tries a doubled one now and then. A loss that is not
    finite itself, or gradients that are not at scale 1, no scale repairs.

    Args:
        scaler: Has unscaled the gradients already.
        loss: Of the step, before scaling.
        norm: Of the gradients.
    """
    return scaler.is_enabled() and bool(loss.isfinite()) and not bool(norm.isfinite()) and scaler.get_scale() > 1
