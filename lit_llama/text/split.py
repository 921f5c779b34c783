"""Which rows are for training and which for testing."""

import hashlib
import unicodedata

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError


def shuffle_split(rows: int, test_split_size: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(rows,) indices of train and test, as lit-llama drew them: torch.utils.data.random_split with a seeded generator.

    Raises:
        DataError: Either split would be empty.
    """
    import torch

    if not 0 < test_split_size < rows:
        raise DataError(
            f"--test_split_size is {test_split_size}, but there are {rows} rows: expected 1 to {rows - 1}, "
            "so that train and test both have rows"
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
    text = normalised(opening).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest()
    return "test" if int.from_bytes(digest, "little") < share * 2**64 else "train"
