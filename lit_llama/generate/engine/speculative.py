"""Guesses of the tokens that follow, which cost nothing but a wider step where they come from the text itself.

Answers often repeat their prompt: extraction, summaries, code. The last few ids are looked up among the earlier ones,
and what followed there is the guess (Saxena 2023, prompt lookup decoding). A guess counts only where it is the token
that is drawn anyway, so that answers are the same with and without.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lit_llama.generate.engine.request import Sampling

LONGEST, SHORTEST = 4, 2
"""Ids that are looked up together, the longer ones first."""


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer whose next tokens are to be guessed.

    Attributes:
        key: Stands for the answer.
        ids: Prompt and answer so far; they only ever grow.
        made: How many of them are the answer.
        room: Ids that may be guessed at all.
        sampling: How its tokens are drawn.
        number: Of the answer, for its draws.
    """

    key: Hashable
    ids: Sequence[int]
    made: int
    room: int
    sampling: Sampling
    number: int


class Guesser(Protocol):
    """Where guesses come from."""

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Guess what follows each answer; nothing where that would not pay."""
        ...

    def learn(self, key: Hashable, guessed: int, right: int, length: int) -> None:
        """Say how many of the ids guessed for an answer were right, when all its ids are `length` long."""
        ...

    def forget(self, key: Hashable) -> None:
        """Forget an answer, known or not."""
        ...

    def trim(self) -> int:
        """Give memory back to the system that no answer needs; how many bytes."""
        ...


class PromptLookups:
    """Prompt lookup in each of many answers."""

    def __init__(self) -> None:
        self._lookups: dict[Hashable, PromptLookup] = {}

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        """See `PromptLookup.guess`."""
        return [self._lookups.setdefault(one.key, PromptLookup()).guess(one.ids, one.room) for one in asked]

    def learn(self, key: Hashable, guessed: int, right: int, length: int) -> None:
        """See `PromptLookup.learn`."""
        if (lookup := self._lookups.get(key)) is not None:
            lookup.learn(guessed, right, length)

    def forget(self, key: Hashable) -> None:
        """Forget what an answer holds."""
        self._lookups.pop(key, None)

    def trim(self) -> int:
        """Nothing, as answers need all that is held."""
        return 0


class PromptLookup:
    """Finds the ids that followed the last ones before, and stops where guessing does not pay.

    Args:
        most: Ids guessed at a time, at most.
    """

    TRIALS, YIELD = 8, 0.3
    """After so many guesses there have to be so many right ids for each, or there will be no more for a while."""
    PAUSE = 32
    """Tokens without guesses then."""

    def __init__(self, most: int = 10) -> None:
        self._most = most
        self._places: dict[tuple[int, ...], int] = {}  # where what follows an n-gram begins, the last time
        self._indexed = 0
        self._trials = self._right = 0
        self._resume = 0

    def guess(self, ids: Sequence[int], room: int) -> list[int]:
        """What may follow.

        Args:
            ids: Prompt and answer so far; they only ever grow.
            room: Ids that may be guessed at all.
        """
        self._index(ids)
        if len(ids) < self._resume or room < 1:
            return []
        for length in range(min(LONGEST, len(ids)), SHORTEST - 1, -1):
            place = self._places.get(tuple(ids[-length:]))
            if place is not None:
                return list(ids[place : place + min(self._most, room)])
        return []

    def learn(self, guessed: int, right: int, length: int) -> None:
        """Say how many of the guessed ids were right, when the ids are `length` long."""
        if not guessed:
            return
        self._trials, self._right = self._trials + 1, self._right + right
        if self._trials >= self.TRIALS:
            if self._right < self.YIELD * self._trials:
                self._resume = length + self.PAUSE
            self._trials = self._right = 0

    def _index(self, ids: Sequence[int]) -> None:
        """Know all n-grams but those that end the ids, which nothing follows yet."""
        for end in range(max(self._indexed, 1), len(ids)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._places[tuple(ids[end - length : end])] = end
        self._indexed = len(ids)
