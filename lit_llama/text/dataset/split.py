"""Split of the rows into those for training and those for testing."""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError, UserError
from lit_llama.text.config import SplitChoice
from lit_llama.text.read.formats.sources import Division
from lit_llama.text.read.raw import listed
from lit_llama.wording import param


def shuffle_split(rows: int, test_split_size: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw (rows,) indices of train and test as lit-llama did: torch.utils.data.random_split with a seeded generator.

    Raises:
        DataError: Train would be empty.
    """
    import torch

    if not 0 <= test_split_size < rows:
        expected = f"1 to {rows - 1}, so that train and test both have rows, or 0" if rows > 1 else "0"
        there = "is 1 row" if rows == 1 else f"are {rows} rows"
        raise DataError(
            f"{param('test_split_size')} is {test_split_size}, but there {there}: expected {expected} to train on all"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).numpy()
    return order[: rows - test_split_size], order[rows - test_split_size :]


def normalised(text: str) -> str:
    """Normalize a text: without its case, Unicode form (NFKC) and amount of white space."""
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
    """Hash a text to 64 bits, whatever its case, white space and Unicode form."""
    data = normalised(text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "little")


def few_sides(numbers: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_] | None:
    """Choose the rows for testing by a hash of each, where both splits are to have some: (rows,).

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


SHARE = 0.05
"""Of the rows for testing, where nobody says how many."""
_FAR = 3  # times the share that was asked for; a dominant question takes all its rows along

SplitRule = Literal["hash", "shuffle", "given", "from"]
"""How rows are divided: by a hash of the question, by shuffling, as the sources are, or as other data is."""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """Rule by which the rows are split.

    Args:
        split: The rule.
        test_split_size: Rows for testing: below 1 their share, else their number; 0 for none.
        remarks: What has to be said of it.
    """

    split: SplitRule
    test_split_size: float
    remarks: Sequence[str] = ()

    @property
    def tests(self) -> bool:
        """Whether there are to be rows for testing."""
        return self.split in ("given", "from") or self.test_split_size != 0

    def rules(self) -> dict[str, Any]:
        """Return the rule and the size by the names of their settings."""
        return {"split": self.split, "test_split_size": self.test_split_size}


def choose(split: SplitChoice, test_split_size: float | None, division: Division, *, other: bool) -> Choice:
    """Choose the rule for sources that may be divided into train and test by themselves.

    Args:
        split: What was asked for; auto is as the sources are divided, or else by hash.
        test_split_size: What was asked for, None for nothing.
        division: How the sources are divided.
        other: The test rows of other data decide.

    Raises:
        UserError: Nobody can tell what was meant, or a number is none that the rule takes.
    """
    anew = [f"the sources are divided by themselves ({division}), and are split anew, as asked for"] if division else []
    choice = Choice("hash" if split == "auto" else split, SHARE if test_split_size is None else test_split_size, anew)
    if other:
        if split not in ("auto", "hash"):
            raise UserError(
                f"says which rows are for testing: leave out {param('split', split)}", parameter="split_from"
            )
        return replace(choice, split="from")
    if split == "given" or (split == "auto" and division):
        unused = "" if test_split_size is None else param("test_split_size", test_split_size)
        if split == "auto":
            _ask(division, unused)
        said = [f"split as the sources are divided: {division}"] if division else []
        said += [f"{unused} is not used: the sources are divided by themselves"] if unused else []
        return replace(choice, split="given", remarks=said)
    _check_size(choice)
    return choice


def _ask(division: Division, unused: str) -> None:
    """Put the question where a division is no answer by itself."""
    anew = f"{param('split', 'hash')} (or shuffle) to divide all rows anew"
    if division.unknown:
        raise UserError(
            f"the sources are divided by themselves ({division}), but {listed(division.unknown, 3)} may be for either: "
            f"give {anew}, or name the sources without it, or call it train.* or test.*"
        )
    if unused:
        raise UserError(
            f"{unused} asks for a split, but the sources are divided by themselves ({division}): leave it out to keep "
            f"their division, or give {anew}"
        )


def _check_size(choice: Choice) -> None:
    size = choice.test_split_size
    found = int(size) if float(size).is_integer() else size
    if choice.split == "hash" and not 0 <= size < 1:
        raise UserError(
            parameter="test_split_size",
            value=found,
            expected="a share such as 0.05, or 0 to train on all rows: a split by hash cannot have a number of rows, "
            f"as rows would change sides when others are added ({param('split', 'shuffle')} can)",
        )
    if choice.split == "shuffle" and not (0 <= size < 1 or (size >= 1 and size == int(size))):
        raise UserError(
            parameter="test_split_size",
            value=found,
            expected="a number of rows, a share below 1, or 0 to train on all rows",
        )


def held_rows(rows: int, size: float, limit: float = 1.0) -> tuple[int, str]:
    """Return how many of `rows` a shuffle holds out, and what has to be said of it.

    Args:
        rows: How many there are.
        size: A share below 1, which comes to at least one row, or a number.
        limit: Largest share of the rows that a number may come to.
    """
    wanted = max(1, int(size * rows)) if 0 < size < 1 else int(size)
    if limit < 1 and wanted > (most := max(1, int(limit * rows))):
        return most, f"{most} of {rows} rows are for testing, not the usual {wanted}: a share of {limit:g}"
    return wanted, ""


@dataclass(frozen=True)
class Sided:
    """Samples for testing where a hash of what rows open with left one split empty.

    Args:
        test: (samples,) which are for testing.
        remark: Why, for people.
    """

    test: npt.NDArray[np.bool_]
    remark: str


Words = Callable[[int], tuple[str, str, str]]
_BY = (
    "those with the lowest hash of what they open with, which may be others when rows are added",
    "all rows open alike, and are split by everything before the last answer",
    "all rows ask the same, and are split by their answers: the test loss says nothing of other questions",
)


def side_few(rows: Sequence[int], words: Words, share: float, seed: int) -> Sided | None:
    """Give both splits rows, by the first of these that tells rows apart: their opening, prompt, or all of them.

    Args:
        rows: (samples,) the row of each sample; those of one row follow each other and stay together.
        words: Of a sample by its number: what its row opens with, all before its last answer, that answer.
        share: How many are for testing.
        seed: Of the hash.

    Returns:
        None where all rows are the same.
    """
    parts = [list(group) for _, group in groupby(range(len(rows)), rows.__getitem__)]
    lengths = [len(part) for part in parts]
    for level, why in enumerate(_BY):

        def key(part: list[int], level: int = level) -> int:
            if level == 0:
                return hash_number(words(part[0])[0], seed)
            return hash_number("\n".join(text for number in part for text in words(number)[1 : level + 1]), seed)

        test = few_sides(np.array([key(part) for part in parts], np.uint64), share)
        if test is not None:
            return Sided(np.repeat(test, lengths), f"the test split is {int(test.sum())} of {len(parts)} rows: {why}")
    return None


def usable(orders: tuple[Ints, Ints], kept: Sequence[int]) -> tuple[tuple[Ints, Ints], str]:
    """Return the drawn rows of train and test, both with one that came to a sample, if there are two of these.

    Args:
        orders: Rows of train and test.
        kept: Rows that came to samples.

    Returns:
        The same, or with one row moved to the side that had none, and what has to be said of it.
    """
    train, test = orders
    there = [np.flatnonzero(np.isin(order, kept)) for order in orders]
    if not len(there[1]) and len(there[0]) > 1 and len(test):
        moved = int(there[0][-1])
        found = np.delete(train, moved), np.append(train[moved], test)
    elif not len(there[0]) and len(there[1]) > 1:
        moved = int(there[1][0])
        found = np.append(train, test[moved]), np.delete(test, moved)
    else:
        return orders, ""
    return found, "no row that was drawn for one of the splits is usable: another took its place"


def far_from(share: float, rows: dict[str, int]) -> str:
    """Warn where a hash holds out many more rows than asked for; "" if it does not."""
    total = rows["train"] + rows["test"]
    if rows["test"] <= max(_FAR * share * total, share * total + 2):
        return ""
    return (
        f"{rows['test']:,} of {total:,} rows are for testing, though {param('test_split_size')} is {share:g}: many "
        "open alike, "
        f"and stay together; {param('split', 'shuffle')} divides them"
    )
