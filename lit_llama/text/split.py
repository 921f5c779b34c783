"""Which rows are for training and which for testing."""

import hashlib
import unicodedata
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


def hash_side(opening: str, share: float, seed: int) -> str:
    """Train or test, by a hash of what a conversation opens with.

    Rows that ask the same, but for case, white space and Unicode form, stand on one side, whatever they answer; and no
    row changes sides when others are added.

    Args:
        opening: The first question of a row, or its text.
        share: How many of the openings are for testing, between 0 and 1.
        seed: Of the hash.
    """
    text = " ".join((opening if opening.isascii() else unicodedata.normalize("NFKC", opening)).casefold().split())
    key = seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return "test" if int.from_bytes(digest, "little") < share * 2**64 else "train"


def shared(train: Sequence[Hashable], test: Sequence[Hashable]) -> int:
    """Number of test rows that also stand in train."""
    seen = set(train)
    return sum(row in seen for row in test)
