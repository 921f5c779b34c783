"""The scale of the loss in float16: which steps it spoils, and that this is its way of finding its size."""

import math

import torch


def overflowed(scaler: torch.amp.GradScaler, loss: float, norm: float) -> bool:
    """Whether a step is skipped because the scale was too high, which `scaler.update` then halves.

    It is no failure: the scale starts too high by design and tries a doubled one now and then. A loss that is not
    finite itself, or gradients that are not at scale 1, no scale repairs.

    Args:
        scaler: Has unscaled the gradients already.
        loss: Of the step, before scaling.
        norm: Of the gradients.
    """
    return scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() > 1
