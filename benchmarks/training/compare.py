"""Whether two runs are the same training, and how their speeds compare."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LIMITS = (1e-2, 2e-3, 2e-3)
"""Rounding of bfloat16 moves a loss by less: at one step, over all on average, and held out (as a share)."""
DRAWN_LIMITS = (1e-1, 3e-2, 2e-2)
"""The same where each step draws numbers, as for dropout."""


@dataclass(frozen=True)
class Agreement:
    """Distance of a run from the float32 reference.

    Attributes:
        largest: Absolute difference of the losses at the step where it is largest.
        mean: Mean of the absolute differences.
        held_out: Relative difference of the held-out losses.
        limits: Of the three.
    """

    largest: float
    mean: float
    held_out: float
    limits: tuple[float, float, float] = LIMITS

    @property
    def holds(self) -> bool:
        """Whether a speed counts. NaN does not."""
        found = (self.largest, self.mean, self.held_out)
        return all(value <= limit for value, limit in zip(found, self.limits, strict=True))


def agreement(
    losses: Sequence[float],
    held_out: float,
    wanted: Sequence[float],
    wanted_held_out: float,
    limits: tuple[float, float, float] = LIMITS,
) -> Agreement:
    """Compare losses per step and the held-out loss with those of the reference."""
    distances = [abs(loss - other) for loss, other in zip(losses, wanted, strict=True)]
    off = abs(held_out - wanted_held_out) / wanted_held_out
    return Agreement(max(distances), statistics.fmean(distances), off, limits)


@dataclass(frozen=True)
class Speed:
    """What the runs of a contender come to; per-second values are of the median run.

    Attributes:
        samples: Per second.
        best_samples: Those of its fastest run.
        trained_tokens: Per second.
        tokens: Of the samples per second; padding is no work.
        peak_rss: Bytes, the most of all runs.
        first_step: Seconds from the start of the process to the end of its first step, the fewest of all runs.
        runs: How many.
        with_reference: Samples per second where the time in which the reference of a preference run is computed counts.
    """

    samples: float
    best_samples: float
    trained_tokens: float
    tokens: float
    peak_rss: int
    first_step: float
    runs: int
    with_reference: float


def speed(
    runs: Sequence[dict[str, Any]], *, warmup: int, samples: int, trained_tokens: int, tokens: int, rows: int = 0
) -> Speed:
    """Sum up the runs of one contender.

    Args:
        runs: With `seconds` (of each step), `peak_rss`, `first_step` and `reference`, seconds for all rows.
        warmup: Steps at the beginning that are not counted.
        samples: In the steps that are counted, as the following two.
        trained_tokens: Labels with a loss.
        tokens: Without padding.
        rows: Rows of which the reference is computed; samples if it is 0.
    """
    seconds = [sum(run["seconds"][warmup:]) for run in runs]
    median = statistics.median(seconds)
    reference = statistics.median(run.get("reference", 0.0) for run in runs) / (rows or samples)
    return Speed(
        samples=samples / median,
        best_samples=samples / min(seconds),
        trained_tokens=trained_tokens / median,
        tokens=tokens / median,
        peak_rss=max(run["peak_rss"] for run in runs),
        first_step=min(run["first_step"] for run in runs),
        runs=len(runs),
        with_reference=samples / (median + samples * reference),
    )


def summary(name: str, speed: Speed, agrees: Agreement, ours: Speed | None, details: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    ratio = ours.samples / speed.samples if ours else None
    return {
        "contender": name,
        **asdict(speed),
        "ours_is_faster_by": ratio,
        "ours_best_of_best": ours.best_samples / speed.best_samples if ours else None,
        "memory_of_ours": speed.peak_rss / ours.peak_rss if ours else None,
        **{f"loss_{key}": value for key, value in asdict(agrees).items()},
        "comparable": agrees.holds,
        **details,
    }
