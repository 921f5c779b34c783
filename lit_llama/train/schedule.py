"""The learning rate as a function of the step alone."""

import math

from lit_llama.train.config import TrainConfig

WARMUP_RATIO, DECAY_RATIO = 0.03, 0.1
"""Shares of the run where neither ratio nor steps are given."""


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: a linear rise from above zero, then the schedule.

    What falls ends at min_lr_ratio of the highest rate, one step after the last: cosine along half a wave (Loshchilov
    and Hutter 2017, arXiv:1608.03983), linear, and wsd linearly over the last decay_ratio of the steps after a stretch
    at the top (Hu et al. 2024, arXiv:2404.06395).
    """
    warmup = warmup_steps(steps, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    fall = steps - warmup
    if config.schedule == "wsd":
        ratio = DECAY_RATIO if config.decay_ratio is None else config.decay_ratio
        fall = min(math.ceil(ratio * steps), fall)
    progress = max(0.0, (step - (steps - fall)) / max(1, fall))
    height = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)


def warmup_steps(steps: int, config: TrainConfig) -> int:
    """Optimizer steps of the rise.

    A warm-up longer than the run is cut to it, so that the highest rate is reached.
    """
    if config.warmup_steps is not None:
        return min(config.warmup_steps, steps)
    return math.ceil((WARMUP_RATIO if config.warmup_ratio is None else config.warmup_ratio) * steps)
