"""The learning rate as a function of the step alone."""

import math

from lit_llama.train.config import TrainConfig


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: a linear rise from above zero, then the schedule."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.schedule]
    return config.learning_rate * factor
