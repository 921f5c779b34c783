"""The shuffled split is the one that lit-llama drew, and by a hash what is alike stands on one side."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.data import random_split

from lit_llama.errors import DataError
from lit_llama.text.dataset.split import hash_side, normalised, shuffle_split


@pytest.mark.parametrize(("rows", "test_rows"), [(2, 1), (3, 2), (10, 1), (10, 9), (999, 200), (4097, 2000)])
@pytest.mark.parametrize("seed", [0, 42])
def test_equals_random_split_row_for_row(rows: int, test_rows: int, seed: int) -> None:
    """Catches a reordered, shifted or differently drawn split: lit-llama's runs would not be repeatable."""
    expected = random_split(range(rows), [rows - test_rows, test_rows], torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    train, test = shuffle_split(rows, test_rows, seed)
    assert train.tolist() == list(expected[0]) and test.tolist() == list(expected[1])
    assert sorted([*train, *test]) == list(range(rows))


def test_another_seed_draws_another_split_and_the_global_generator_is_not_touched() -> None:
    """Catches an ignored seed, and a draw from (or into) the state that training uses."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    splits = [shuffle_split(100, 20, seed)[0].tolist() for seed in (1, 2, 1)]
    assert splits[0] == splits[2] != splits[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("test_rows", [-1, 5, 6])
def test_empty_split_is_an_error_that_names_the_flag(test_rows: int) -> None:
    """Catches a training run on nothing, or a test loss of nothing."""
    with pytest.raises(DataError, match=rf"--test_split_size is {test_rows}, but there are 5 rows: expected 1 to 4"):
        shuffle_split(5, test_rows, 42)


# By a hash of what is asked

QUESTIONS = [f"Question {n}: what is {n} times {n % 7}?" for n in range(4000)]


def sides(questions: list[str], share: float = 0.1, seed: int = 42) -> list[str]:
    return [hash_side(question, share, seed) for question in questions]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.9])
def test_the_share_for_testing_is_about_what_was_asked(share: float) -> None:
    """Catches a share of half, of bits or of training in place of testing: within four standard deviations."""
    found = sides(QUESTIONS, share).count("test")
    assert abs(found - 4000 * share) < 4 * math.sqrt(4000 * share * (1 - share))


def test_what_is_asked_alike_stands_on_one_side() -> None:
    """Catches a test question that was trained in capitals, with a blank more, or in another Unicode form."""
    twins = [
        [question.upper(), f"  {question}\n", question.replace(" ", "\t \u3000"), question.replace("what", "ｗｈａｔ")]
        for question in QUESTIONS[:500]
    ]
    for side, alike in zip(sides(QUESTIONS[:500], 0.5), twins, strict=True):
        assert sides(alike, 0.5) == [side] * 4
    assert hash_side("Stra\u00dfe Caf\u00e9", 0.5, 1) == hash_side("STRASSE cafe\u0301", 0.5, 1)
    assert normalised("\u00a0Caf\u00e9  AU\nlait") == "caf\u00e9 au lait"


def test_seeds_draw_different_sides_and_no_other_row_matters() -> None:
    """Catches an ignored seed, Python's hash, which is another in every process, and a limit to the size of a seed."""
    first, second = sides(QUESTIONS, 0.5, 1), sides(QUESTIONS, 0.5, 2)
    agreeing = sum(a == b for a, b in zip(first, second, strict=True))
    assert abs(agreeing - 2000) < 4 * math.sqrt(1000)
    assert sides(QUESTIONS[::-1], 0.5, 1) == first[::-1]
    assert {hash_side("a", 0.5, seed) for seed in (-1, 0, 2**80, 7, 8, 9, 10)} == {"train", "test"}
    program = (
        "from lit_llama.text.dataset.split import hash_side; print([hash_side(str(n), 0.5, 3) for n in range(50)])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == str([hash_side(str(n), 0.5, 3) for n in range(50)])
