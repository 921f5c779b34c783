"""Early stopping and the best evaluation."""

import json
import math

import pytest

from lit_llama.train.config import TrainConfig
from lit_llama.train.stopping import Best


def course(losses: list[float], patience: int | None, min_delta: float = 0.0) -> tuple[Best, int]:
    """The best, and how many of the losses were looked at."""
    best, config = Best(), TrainConfig(patience=patience, keep="best", min_delta=min_delta)
    for number, loss in enumerate(losses, 1):
        best.update(10 * number, loss, config.min_delta)
        if best.exhausted(config):
            return best, number
    return best, len(losses)


def test_patience_counts_evaluations_in_a_row() -> None:
    """Catches a count that is not reset by a better loss, an off-by-one, and a stop that nobody asked for."""
    losses = [3.0, 2.0, 2.5, 1.9, 2.0, 2.1, 1.0]
    assert course(losses, 1)[1] == 3
    best, seen = course(losses, 2)
    assert (best.step, best.loss, seen) == (40, 1.9, 6)
    assert course(losses, None) == (Best(1.0, 70, 0), 7)


def test_a_loss_must_be_lower_by_min_delta() -> None:
    """Catches improvements in the last digit that keep a run alive for ever; they must not add up unseen either."""
    best, seen = course([1.0, 0.95, 0.91, 0.89, 0.88], 3, min_delta=0.1)
    assert (best.step, seen) == (40, 5)
    assert course([1.0, 1.0, 1.0], 2)[1] == 3, "an equal loss is no better one"


def test_a_loss_that_is_not_a_number_is_never_the_best() -> None:
    """Catches a comparison that lets NaN through, after which nothing is ever better."""
    best, _ = course([math.nan, 2.0, math.nan], None)
    assert (best.loss, best.step, best.waited) == (2.0, 20, 1)


@pytest.mark.parametrize("cut", range(6))
def test_a_resumed_run_stops_where_the_whole_one_does(cut: int) -> None:
    """Catches numbers that are lost on the way through JSON, infinity before the first evaluation among them."""
    losses, config = [3.0, 2.0, 2.5, 1.9, 2.0, 2.1], TrainConfig(patience=2)
    best = Best()
    for step, loss in enumerate(losses):
        if step == cut:
            best = Best.from_state(json.loads(json.dumps(best.state(), allow_nan=False)))
        best.update(step, loss, 0.0)
    assert best == Best(1.9, 3, 2) and best.exhausted(config)
