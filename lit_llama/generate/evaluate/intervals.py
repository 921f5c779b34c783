"""Means over rows with what they would have been on other rows of the same kind.

Shapes: N rows, B resamples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES, SEED, LEVEL = 2000, 1234, 0.95
_AT_ONCE = 2_000_000  # drawn rows that are in memory
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over rows.

    Attributes:
        value: The mean.
        low: Where its interval begins; None where rows are too few for one.
        high: Where it ends.
        rows: How many it is of.
    """

    value: float
    low: float | None
    high: float | None
    rows: int


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Compute the sum of values / sum of weights, with its bootstrap interval over the rows.

    The weights are 1, or what the values are counts of, such as tokens: then rows count by their size. Where all values
    are 0, or all are 1, resamples cannot differ; the interval is Wilson's (1927) there.

    Args:
        values: Of each row.
        weights: Of each row; those with 0 do not count as rows.
    """
    top, bottom = _columns(values, weights)
    value = float(top.sum() / bottom.sum())
    rows = len(top)
    if rows < 2:
        return Estimate(value, None, None, rows)
    if weights is None and value in (0.0, 1.0) and set(top.tolist()) <= {0.0, 1.0}:
        low, high = _wilson(value, rows)
        return Estimate(value, low, high, rows)
    drawn = np.concatenate([top[index].sum(1) / bottom[index].sum(1) for index in _resamples(rows)])
    return Estimate(value, *_quantiles(drawn), rows)


def difference(
    values: tuple[Sequence[float], Sequence[float]], weights: tuple[Sequence[float], Sequence[float]] | None = None
) -> Estimate:
    """Return the mean of the second minus the mean of the first, on the same rows, with the interval of that
    difference.

    Both means of a resample are of the same drawn rows, so that what is hard for both does not widen the interval.

    Args:
        values: Of each row, of the first and of the second.
        weights: As for `mean`, of both.
    """
    one = _columns(values[0], None if weights is None else weights[0], drop=False)
    other = _columns(values[1], None if weights is None else weights[1], drop=False)
    there = (one[1] > 0) & (other[1] > 0)
    (top, bottom), (top_2, bottom_2) = (tuple(column[there] for column in side) for side in (one, other))
    rows = int(there.sum())
    value = float(top_2.sum() / bottom_2.sum() - top.sum() / bottom.sum())
    if rows < 2:
        return Estimate(value, None, None, rows)
    drawn = [
        top_2[index].sum(1) / bottom_2[index].sum(1) - top[index].sum(1) / bottom[index].sum(1)
        for index in _resamples(rows)
    ]
    return Estimate(value, *_quantiles(np.concatenate(drawn)), rows)


def _columns(values: Sequence[float], weights: Sequence[float] | None, *, drop: bool = True) -> tuple[Floats, Floats]:
    top = np.asarray(values, np.float64)
    bottom = np.ones(len(top)) if weights is None else np.asarray(weights, np.float64)
    there = bottom > 0 if drop else np.ones(len(top), bool)
    return top[there], bottom[there]


def _resamples(rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """(B, N) drawn rows in pieces along B; the same ones for the same number of rows."""
    generator, size = np.random.default_rng(SEED), max(1, _AT_ONCE // rows)
    for start in range(0, RESAMPLES, size):
        yield generator.integers(0, rows, (min(size, RESAMPLES - start), rows))


def _quantiles(drawn: Floats) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _wilson(share: float, rows: int) -> tuple[float, float]:
    z = 1.959963984540054
    center, wide = share + z * z / (2 * rows), z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, (center - wide) / (1 + z * z / rows)), min(1.0, (center + wide) / (1 + z * z / rows))
