"""The learning rate against its closed formulas, and against transformers after the warm-up."""

import math
from typing import Any, Literal

import pytest
import torch

from lit_llama.train.config import TrainConfig
from lit_llama.train.optim import learning_rate, warmup_steps

Kind = Literal["cosine", "linear", "constant", "wsd"]
KINDS: tuple[Kind, ...] = ("cosine", "linear", "constant", "wsd")
TOP = 3e-4


def rates(steps: int, kind: Kind, warmup: float, **changes: Any) -> list[float]:
    config = TrainConfig(schedule=kind, warmup_ratio=warmup, learning_rate=TOP, **changes)
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
        "wsd": [TOP] * 80 + [TOP * (10 - step) / 10 for step in range(10)],
    }[kind]
    assert found[10:] == pytest.approx(after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "warmup"), [(200, 0.05), (50, 0.0), (33, 0.1)])
def test_rate_after_the_warmup_is_that_of_transformers(kind: Kind, steps: int, warmup: float) -> None:
    """Catches a schedule that ends elsewhere or counts its warm-up otherwise; during it transformers starts at 0."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=TOP)
    rise = math.ceil(warmup * steps)
    name = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}.get(kind, kind)
    fall = {"num_decay_steps": math.ceil(0.1 * steps), "decay_type": "linear"}
    theirs: Any = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=rise,
        num_training_steps=steps,
        scheduler_specific_kwargs=fall if kind == "wsd" else None,
    )
    assert rates(steps, kind, warmup)[rise:] == pytest.approx(course(theirs, optimizer, steps)[rise:])


def course(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The rates of a scheduler that keeps count itself."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_rate_ends_at_its_share_of_the_top() -> None:
    """Against torch's own schedules to a lowest rate; catches a floor that cuts the curve instead of squeezing it."""
    steps, lowest = 50, 0.2
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=TOP)
    cosine: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=TOP * lowest)
    wanted = course(cosine, optimizer, steps)
    assert rates(steps, "cosine", 0.0, min_lr_ratio=lowest) == pytest.approx(wanted)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=TOP)
    linear: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, lowest, steps)
    wanted = course(linear, optimizer, steps)
    assert rates(steps, "linear", 0.0, min_lr_ratio=lowest) == pytest.approx(wanted)
    whole = rates(steps, "wsd", 0.0, min_lr_ratio=lowest, decay_ratio=1.0)
    assert whole == pytest.approx(wanted), "a fall over the whole run is the linear schedule"


def test_the_last_steps_of_wsd_fall_and_no_others() -> None:
    """Catches a share taken of what is left after the warm-up, and a rise and a fall that overlap in a short run."""
    found = rates(100, "wsd", 0.1, decay_ratio=0.25)
    assert [step for step in range(10, 99) if found[step + 1] < found[step]] == list(range(75, 99))
    config = TrainConfig(schedule="wsd", warmup_steps=8, decay_ratio=0.5)
    short = [learning_rate(step, 10, config) for step in range(10)]
    assert short.index(max(short)) == 7 and short[8] == max(short) > short[9] > 0


def test_warmup_in_steps_and_in_shares() -> None:
    """Catches a number of steps that the default share overrides, and one beyond the run that never reaches the top."""
    assert warmup_steps(1000, TrainConfig()) == 30
    assert warmup_steps(1000, TrainConfig(warmup_steps=7)) == 7
    assert warmup_steps(1000, TrainConfig(warmup_steps=0)) == 0
    assert warmup_steps(1000, TrainConfig(warmup_ratio=0.0)) == 0
    config = TrainConfig(warmup_steps=500, learning_rate=TOP)
    assert learning_rate(9, 10, config) == TOP
