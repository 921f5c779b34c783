"""Guesses of the tokens that follow, taken from what was written before, which cost nothing but a wider step.

Answers often repeat their prompt: extraction, summaries, code. The last few ids are looked up among the earlier ones,
and what followed there is the guess (Saxena 2023, prompt lookup decoding). A guess counts only where it is the token
that is drawn anyway, so that answers are the same with and without.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Ids that are looked up together, the longer ones first."""


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
