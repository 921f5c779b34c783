"""Best evaluation of a run, and when to stop waiting for a better one."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from lit_llama.train.config import TrainConfig


@dataclass
class Best:
    """The lowest test loss so far.

    Plain numbers, so that they are saved with the state and a resumed run stops where the whole one would have.

    Args:
        loss: The lowest test loss.
        step: The optimizer step after which it was measured.
        waited: Evaluations since then.
    """

    loss: float = math.inf
    step: int = 0
    waited: int = 0

    def update(self, step: int, loss: float, min_delta: float) -> bool:
        """Take in the test loss after `step`; true if it is lower than the best by more than `min_delta`.

        A loss that is not a number is never the best.
        """
        if loss < self.loss - min_delta:
            self.loss, self.step, self.waited = loss, step, 0
            return True
        self.waited += 1
        return False

    def exhausted(self, config: TrainConfig) -> bool:
        """Whether `patience` evaluations in a row brought nothing better."""
        return config.patience is not None and self.waited >= config.patience

    def state(self) -> dict[str, float | int | None]:
        """Return the numbers; a loss that was never measured is None, because JSON knows no infinity."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Rebuild the best from what `state` gave."""
        loss = state["loss"]
        return cls(math.inf if loss is None else float(loss), int(state["step"]), int(state["waited"]))
