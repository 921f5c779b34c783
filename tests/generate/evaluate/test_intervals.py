"""Bootstrap intervals against loops, and ROUGE-L against the library of its authors."""

import random

import numpy as np
import pytest

from lit_llama.generate.metrics import RESAMPLES, SEED, difference, mean, rouge_l


def drawn(rows: int) -> list[list[int]]:
    """The rows of each resample, one after another."""
    generator = np.random.default_rng(SEED)
    return [generator.integers(0, rows, rows).tolist() for _ in range(RESAMPLES)]


def quantile(values: list[float], share: float) -> float:
    """Linear between the two neighbours, by hand."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


@pytest.mark.parametrize("weighted", [False, True])
def test_an_interval_is_that_of_a_loop_over_resamples(weighted: bool) -> None:
    """A mean of means where tokens count, or another share of the resamples."""
    values, weights = [3.0, 0.5, 2.0, 7.0, 1.0], [4.0, 1.0, 2.0, 9.0, 1.0]
    found = mean(values, weights if weighted else None)
    means = [
        sum(values[i] for i in index) / (sum(weights[i] for i in index) if weighted else len(index))
        for index in drawn(5)
    ]
    assert found.value == pytest.approx(13.5 / (17 if weighted else 5)) and found.rows == 5
    assert (found.low, found.high) == pytest.approx((quantile(means, 0.025), quantile(means, 0.975)))


def test_a_difference_is_of_the_same_drawn_rows() -> None:
    """Two resamples drawn apart, whose interval is that of unpaired models and far wider."""
    one = [random.Random(row).random() for row in range(40)]
    other = [value + 0.1 for value in one]
    found = difference((one, other))
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    other = [value + 0.01 * row for row, value in enumerate(one)]
    means = [sum(other[i] - one[i] for i in index) / 40 for index in drawn(40)]
    found = difference((one, other))
    assert (found.low, found.high) == pytest.approx((quantile(means, 0.025), quantile(means, 0.975)))


def test_rows_without_a_value_do_not_count() -> None:
    """A field that few references have, counted as missed in all others."""
    assert mean([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]).value == 0.5
    found = difference(([1.0, 1.0, 9.0], [2.0, 3.0, 0.0]), ([1.0, 1.0, 1.0], [1.0, 1.0, 0.0]))
    assert found.value == 1.5 and found.rows == 2


def test_all_right_is_not_certain() -> None:
    """100 % of ten rows said to be 100 % of all: Wilson's bound is n / (n + z^2)."""
    found = mean([1.0] * 10)
    assert (found.low, found.high) == pytest.approx((10 / (10 + 1.959963984540054**2), 1.0))
    none = mean([0.0] * 10)
    assert none.low == 0.0 and none.high == pytest.approx(1 - found.low)  # type: ignore[operator]
    assert mean([1.0]).low is None


def test_many_rows_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of gigabytes, or other rows where it is cut."""
    values = [float(row % 7) for row in range(50)]
    whole = mean(values)
    monkeypatch.setattr("lit_llama.generate.metrics._AT_ONCE", 333)
    assert mean(values) == whole


def test_rouge_l_is_that_of_its_library() -> None:
    """A subsequence that has to be in one piece, or precision in place of the F-measure."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    words = ["the", "cat", "sat", "on", "a", "mat", "Cat,", "3", "don't", "mat."]
    generator = random.Random(3)
    for _ in range(200):
        one, other = (" ".join(generator.choices(words, k=generator.randint(0, 70))) for _ in range(2))
        assert rouge_l(one, other) == pytest.approx(scorer.score(one, other)["rougeL"].fmeasure)


def test_rouge_l_knows_other_scripts() -> None:
    """0 for every Chinese or Russian text, as of the library, which knows Latin letters only."""
    assert rouge_l("北京是城市", "北京是大城市") == pytest.approx(2 * (5 / 6) / (1 + 5 / 6))
    assert rouge_l("Москва столица", "москва большая столица") == pytest.approx(0.8)
    assert rouge_l("a", "") == rouge_l("", "a") == rouge_l("a", "b") == 0.0
