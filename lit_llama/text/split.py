"""Which rows are for training and which for testing."""

from collections.abc import Hashable, Sequence

from lit_llama.errors import DataError


def shuffle_split(rows: int, test_split_size: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of train and test, as lit-llama drew them: torch.utils.data.random_split with a seeded generator.

    Raises:
        DataError: Either split would be empty.
    """
    import torch

    if not 0 < test_split_size < rows:
        raise DataError(
            f"--test_split_size is {test_split_size}, but there are {rows} rows: expected 1 to {rows - 1}, "
            "so that train and test both have rows"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[: rows - test_split_size], order[rows - test_split_size :]


def shared(train: Sequence[Hashable], test: Sequence[Hashable]) -> int:
    """Number of test rows that also stand in train."""
    seen = set(train)
    return sum(row in seen for row in test)
