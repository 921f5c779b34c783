"""The split is the one that lit-llama drew, and no split is ever empty."""

import pytest
import torch
from torch.utils.data import random_split

from lit_llama.errors import DataError
from lit_llama.text.split import shuffle_split


@pytest.mark.parametrize(("rows", "test_rows"), [(2, 1), (3, 2), (10, 1), (10, 9), (999, 200), (4097, 2000)])
@pytest.mark.parametrize("seed", [0, 42])
def test_equals_random_split_row_for_row(rows: int, test_rows: int, seed: int) -> None:
    """Catches a reordered, shifted or differently drawn split: lit-llama's runs would not be repeatable."""
    expected = random_split(range(rows), [rows - test_rows, test_rows], torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    train, test = shuffle_split(rows, test_rows, seed)
    assert train == list(expected[0]) and test == list(expected[1])
    assert sorted(train + test) == list(range(rows))


def test_another_seed_draws_another_split_and_the_global_generator_is_not_touched() -> None:
    """Catches an ignored seed, and a draw from (or into) the state that training uses."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    splits = [shuffle_split(100, 20, seed) for seed in (1, 2, 1)]
    assert splits[0] == splits[2] != splits[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("test_rows", [0, -1, 5, 6])
def test_empty_split_is_an_error_that_names_the_flag(test_rows: int) -> None:
    """Catches a training run on nothing, or a test loss of nothing."""
    with pytest.raises(DataError, match=rf"--test_split_size is {test_rows}, but there are 5 rows: expected 1 to 4"):
        shuffle_split(5, test_rows, 42)
