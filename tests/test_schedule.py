"""The learning rate against its closed formulas, and against transformers after the warm-up."""

import math
from typing import Any, Literal

import pytest
import torch

from lit_llama.train.config import TrainConfig
from lit_llama.train.schedule import learning_rate

Kind = Literal["cosine", "linear", "constant"]
KINDS: tuple[Kind, ...] = ("cosine", "linear", "constant")
TOP = 3e-4


def rates(steps: int, kind: Kind, warmup: float) -> list[float]:
    config = TrainConfig(schedule=kind, warmup_ratio=warmup, learning_rate=TOP)
    return [learning_rate(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("steps", "warmup"), [(100, 0.1), (100, 0.0), (37, 0.03), (10, 0.5), (3, 0.9), (1, 0.0), (1, 0.5)]
)
def test_rate_never_leaves_its_bounds_and_reaches_the_top(kind: Kind, steps: int, warmup: float) -> None:
    """Catches a first step at rate 0, which wastes it, a rate above the highest, a division by zero in short runs."""
    found = rates(steps, kind, warmup)
    assert all(0 < rate <= TOP * (1 + 1e-12) for rate in found)
    assert max(found) == pytest.approx(TOP)


@pytest.mark.parametrize("kind", KINDS)
def test_rate_follows_its_formula(kind: Kind) -> None:
    """A straight rise over the first 10 of 100 steps, then the schedule; catches an off-by-one at the bend."""
    found = rates(100, kind, 0.1)
    assert found[:10] == pytest.approx([TOP * (step + 1) / 10 for step in range(10)])
    after = {
        "cosine": [TOP * math.cos(math.pi * step / 180) ** 2 for step in range(90)],
        "linear": [TOP * (90 - step) / 90 for step in range(90)],
        "constant": [TOP] * 90,
    }[kind]
    assert found[10:] == pytest.approx(after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "warmup"), [(200, 0.05), (50, 0.0), (33, 0.1)])
def test_rate_after_the_warmup_is_that_of_transformers(kind: Kind, steps: int, warmup: float) -> None:
    """Catches a schedule that ends elsewhere or counts its warm-up otherwise; during it transformers starts at 0."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=TOP)
    rise = math.ceil(warmup * steps)
    name = {"constant": "constant_with_warmup"}.get(kind, kind)
    theirs: Any = get_scheduler(name, optimizer, num_warmup_steps=rise, num_training_steps=steps)
    wanted = []
    for _ in range(steps):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(steps, kind, warmup)[rise:] == pytest.approx(wanted[rise:])
