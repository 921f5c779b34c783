"""Which rows are for training and which for testing."""

import hashlib
import unicodedata

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError


def shuffle_split(rows: int, test_split_size: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(rows,) indices of train and test, as lit-llama drew them: torch.utils.data.random_split with a seeded generator.

    Raises:
        DataError: Train would be empty.
    """
    import torch

    if not 0 <= test_split_size < rows:
        expected = f"1 to {rows - 1}, so that train and test both have rows, or 0" if rows > 1 else "0"
        there = "is 1 row" if rows == 1 else f"are {rows} rows"
        raise DataError(
            f"--test_split_size is {test_split_size}, but there {there}: expected {expected} to train on all"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).numpy()
    return order[: rows - test_split_size], order[rows - test_split_size :]


def normalised(text: str) -> str:
    """A text without its case, Unicode form (NFKC) and amount of white space."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def hash_side(opening: str, share: float, seed: int) -> str:
    """Train or test, by a hash of what a conversation opens with.

    Rows that ask the same, but for case, white space and Unicode form, stand on one side, whatever they answer; and no
    row changes sides when others are added.

    Args:
        opening: The first question of a row, or its text.
        share: How many of the openings are for testing, between 0 and 1.
        seed: Of the hash.
    """
    return "test" if hash_number(opening, seed) < share * 2**64 else "train"


def hash_number(text: str, seed: int) -> int:
    """64 bits that a text comes to, whatever its case, white space and Unicode form."""
    data = normalised(text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "little")


def few_sides(numbers: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_] | None:
    """Which rows are for testing, by a hash of each, where both splits are to have some: (rows,).

    Those whose hash is below the share, but at least the lowest one and never the highest.

    Args:
        numbers: (rows,) hashes.
        share: How many are for testing, between 0 and 1.

    Returns:
        None where all hashes are the same.
    """
    known = np.unique(numbers)
    if len(known) < 2:
        return None
    below = int(np.searchsorted(known[:-1], np.uint64(int(share * 2**64))))
    return np.asarray(numbers < known[max(1, below)])
