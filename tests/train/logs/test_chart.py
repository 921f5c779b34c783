"""Charts: where points and ticks come to stand."""

import math
import re

import pytest

from lit_llama.html import Chart, Line, chart, figure


def places(drawn: Chart, line: int = 0) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.-]+) ([\d.-]+)", drawn.lines[line].path)]


def made(*arguments: object, **options: object) -> Chart:
    drawn = chart(*arguments, **options)  # type: ignore[arg-type]
    assert drawn is not None
    return drawn


def test_points_stand_where_their_values_are() -> None:
    """Catches an axis that is upside down or shifted by a step."""
    drawn = made("x", [Line("a", "main", [(0, 0.0), (5, 5.0), (10, 10.0)])], 10, from_zero=True)
    assert places(drawn) == [(0, 100), (50, 50), (100, 0)]
    assert drawn.y_ticks == [(100, "0"), (80, "2"), (60, "4"), (40, "6"), (20, "8"), (0, "10")]
    assert drawn.x_ticks == [(0, "0"), (20, "2"), (40, "4"), (60, "6"), (80, "8"), (100, "10")]


def test_values_far_apart_are_drawn_by_their_logarithm() -> None:
    """1, 10 and 100 stand equally far apart; catches ticks and lines on different scales."""
    drawn = made("x", [Line("a", "main", [(1, 1.0), (2, 10.0), (3, 100.0)])], 3)
    heights = [y for _, y in places(drawn)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)
    ticks = {words: y for y, words in drawn.y_ticks}
    assert ticks["10"] == pytest.approx(heights[1], abs=0.01)


@pytest.mark.parametrize(
    "values",
    [[0.5], [3.0, 3.0], [1e-9, 2e-9], [1e-7, 5e8], [0.0, 1.0], [-3.0, 400.0], [0.0], [6.35, 0.069], [1e12, 1e12 + 5]],
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_everything_stays_inside_and_has_ticks(values: list[float], from_zero: bool) -> None:
    """Catches a division by zero, a point beyond the drawing, and a scale without or with too many numbers."""
    if from_zero and min(values) < 0:
        return
    drawn = made("x", [Line("a", "main", list(enumerate(values)), dots=True)], 1, from_zero=from_zero)
    assert all(-0.01 <= y <= 100.01 for _, y in places(drawn))
    assert 1 <= len(drawn.y_ticks) <= 8 and all(-0.01 <= y <= 100.01 for y, _ in drawn.y_ticks)
    assert len(drawn.lines[0].dots) == len(values)


def test_a_spike_among_very_many_steps_is_still_seen() -> None:
    """Catches a line that is thinned by taking every hundredth point."""
    points = [(step, 1.0) for step in range(100_000)]
    points[77_777] = (77_777, 9.0)
    points[33_333] = (33_333, 0.5)
    drawn = made("x", [Line("a", "main", points)], 100_000, from_zero=True)
    found = places(drawn)
    assert len(found) < 2000 and found == sorted(found, key=lambda place: place[0])
    assert min(y for _, y in found) == pytest.approx(10) and max(y for _, y in found) == pytest.approx(95)
    assert [round(x, 1) for x, y in found if y < 50] == [77.8]


def test_what_is_not_finite_and_what_is_empty_is_not_drawn() -> None:
    """Catches `nan` in a path, at which a browser stops drawing."""
    drawn = made("x", [Line("a", "main", [(1, math.nan), (2, 1.0), (3, math.inf)]), Line("b", "raw", [])], 3)
    assert [line.label for line in drawn.lines] == ["a"] and len(places(drawn)) == 1
    assert chart("x", [Line("a", "main", [(1, math.nan)])], 3) is None


def test_figures_show_what_matters() -> None:
    """Catches a learning rate that is rounded to nothing."""
    assert [figure(x) for x in (0, 12345.6, 572.196, 0.0123456, 0.00030, 8.46e-06)] == [
        *("0", "12,346", "572", "0.0123", "0.0003", "8.5e-06")
    ]
