"""Rows of numbers: how they are smoothed, written and cut."""

import functools
import math
from pathlib import Path

import pytest

from lit_llama.train.logs.metrics import Lines, csv_line, perplexity, smooth


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    """Catches a mean that starts at zero and makes the first steps look good."""
    keep = functools.partial(smooth, keep=0.9)
    assert keep([(1, 4.0), (2, 4.0), (3, 4.0)]) == [
        (1, pytest.approx(4)),
        (2, pytest.approx(4)),
        (3, pytest.approx(4)),
    ]
    (_, first), (_, second) = keep([(1, 1.0), (2, 2.0)])
    assert first == pytest.approx(1.0) and second == pytest.approx((0.9 * 0.1 * 1 + 0.1 * 2) / 0.19)


def test_smoothing_passes_over_what_is_not_finite() -> None:
    """Catches one step of NaN that blanks the rest of the curve."""
    assert smooth([(1, 2.0), (2, math.nan), (3, 2.0)]) == [(1, pytest.approx(2)), (3, pytest.approx(2))]


def test_perplexity_is_the_exponential() -> None:
    """Catches another base, and a crash at a loss that went out of bounds."""
    assert perplexity(0.0) == 1.0 and perplexity(1.5) == pytest.approx(4.4816890703)
    assert perplexity(5000.0) == math.inf


def test_numbers_keep_six_digits() -> None:
    """Catches noise of the last bits, and counts that lose their last digits."""
    assert csv_line([12, 0.1 + 0.2, 1 / 3, 123456789, "", 3e-4]) == "12,0.3,0.333333,123456789,,0.0003\n"


def test_a_file_that_is_not_there_is_resumed_empty(tmp_path: Path) -> None:
    """Catches a run that cannot go on because it had asked for no samples before."""
    lines = Lines(tmp_path / "a.csv", "step,x\n")
    assert lines.resume(3) == -1
    lines.append("4,1\n")
    lines.append("5,1\n")
    lines.close()
    assert (tmp_path / "a.csv").read_text() == "step,x\n4,1\n5,1\n"


def test_a_file_torn_in_its_header_is_begun_anew(tmp_path: Path) -> None:
    """Catches a header that is never completed."""
    (tmp_path / "a.csv").write_text("ste")
    lines = Lines(tmp_path / "a.csv", "step,x\n")
    assert lines.resume(0) == -1
    lines.append("1,1\n")
    lines.close()
    assert (tmp_path / "a.csv").read_text() == "step,x\n1,1\n"
