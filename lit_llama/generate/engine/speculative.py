"""Guesses of the tokens that follow, which cost nothing but a wider step where they come from texts that are there.

Answers often repeat their prompt: extraction, summaries, code. And answers to like questions repeat one another, above
all in their form. The last few ids are looked up in the text itself (Saxena 2023, prompt lookup decoding) and in other
answers (Oliaro et al. 2024, SuffixDecoding, arXiv 2411.04975), and what followed there is the guess. It is as long as
it promises to pay, by how often such guesses were right. A guess counts only where it is the token that is drawn
anyway, so that answers are the same with and without.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.model.config import LLaMAConfig
from lit_llama.wording import param

LONGEST = 4
"""Ids that are looked up together, at most."""

MOST = 12
"""Ids guessed at a time, at most."""

ROOM = 1 << 15
"""Ids of other answers that are looked through; twice as many at most are kept."""

FREE = 24
"""Rows that a processor computes in the time in which it reads the weights once, about."""


def check_takes_back(config: LLaMAConfig, what: object = "the model") -> None:
    """Refuse to guess for a model, or with one, that cannot take wrong guesses back.

    Raises:
        UserError: It has recurrent layers, which keep the state behind the last token and no other.
    """
    if config.recurrent_layers:
        raise UserError(
            f"{what} has recurrent layers, whose states cannot be taken back to before a wrong guess: leave "
            f"{param('draft_dir')} out"
        )


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
    """Source of guesses."""

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


class Found(NamedTuple):
    """A place at which the last ids were found.

    Attributes:
        kind: "own", the text itself; "other", another answer; "same", the other answer that was found before.
        length: How many ids were found.
        ids: The text.
        place: What follows the ids begins here.
    """

    kind: str
    length: int
    ids: Sequence[int]
    place: int


class Rates:
    """Rates at which the next id is right, by kind and length of what was found.

    Args:
        prior: What is taken to be right before anything is known, which counts as much as `WEIGHT` trials.
    """

    WEIGHT, KEPT = 4.0, 0.98
    """KEPT: Of what was learned, at each further trial of its kind."""

    def __init__(self, prior: "Rates | None" = None) -> None:
        self._prior = prior
        self._counts: dict[tuple[str, int], tuple[float, float]] = {}

    def __call__(self, kind: str, length: int) -> float:
        """Return the share of ids that are right."""
        if self._prior is not None:
            before = self._prior(kind, length)
        else:
            before = 1 - (0.6 if kind == "own" else 0.4) / length
        right, all_ = self._counts.get((kind, length), (0.0, 0.0))
        return (right + self.WEIGHT * before) / (all_ + self.WEIGHT)

    def learn(self, kind: str, length: int, right: int, wrong: int) -> None:
        """Say how many ids were right, and whether one was wrong."""
        before, all_ = self._counts.get((kind, length), (0.0, 0.0))
        self._counts[kind, length] = self.KEPT * before + right, self.KEPT * all_ + right + wrong

    def fade(self, kind: str, length: int) -> None:
        """Note that a guess of this kind was not made, as it did not pay: it may be tried again some time."""
        before, all_ = self._counts.get((kind, length), (0.0, 0.0))
        self._counts[kind, length] = self.KEPT * before, self.KEPT * all_


class Answers:
    """The latest answers, by what each few ids in them are followed by."""

    def __init__(self) -> None:
        self._new: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}
        self._old: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}
        self._held = 0

    def add(self, ids: Sequence[int], start: int, end: int) -> None:
        """Know what follows the ids before `start` to `end` in a text that only grows."""
        self._held += end - start
        if self._held > ROOM:
            self._old, self._new, self._held = self._new, {}, 0
        for place in range(start, end):
            for length in range(2, min(LONGEST, place) + 1):
                self._new[tuple(ids[place - length : place])] = ids, place

    def find(self, ids: Sequence[int]) -> Found | None:
        """Return the latest place of the most ids."""
        for length in range(min(LONGEST, len(ids)), 1, -1):
            last = tuple(ids[-length:])
            if (at := self._new.get(last) or self._old.get(last)) is not None and at[0] is not ids:
                return Found("other", length, *at)
        return None


@dataclass
class PromptLookup:
    """Ids of an answer and of its text, and where its guesses were found.

    Attributes:
        rates: How often guesses for it were right.
        places: Of every few ids in it, where what followed them begins, the last time.
        indexed: Ids whose places are known.
        answered: Ids that are known to other answers.
        guessed: Where its last guess was found.
        source: The other answer in which ids were found that were right, and where they ended.
    """

    rates: Rates
    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 1
    answered: int = 0
    guessed: Found | None = None
    source: tuple[Sequence[int], int] | None = None

    REACH = 64
    """Ids of the other answer that are looked through."""

    def index(self, ids: Sequence[int]) -> None:
        """Know the places of all ids but the last ones, which nothing follows yet."""
        for end in range(self.indexed, len(ids)):
            for length in range(1, min(LONGEST, end) + 1):
                self.places[tuple(ids[end - length : end])] = end
        self.indexed = max(self.indexed, len(ids))

    def find(self, ids: Sequence[int]) -> list[Found]:
        """Return the place of the most ids in the text, and in the answer that it followed so far."""
        found = []
        for length in range(min(LONGEST, len(ids)), 0, -1):
            if (place := self.places.get(tuple(ids[-length:]))) is not None:
                found.append(Found("own", length, ids, place))
                break
        if self.source is not None:
            other, start = self.source
            ends = range(start, min(start + self.REACH, len(other)))
            for length in range(min(2, len(ids)), 0, -1):
                last = [*ids[-length:]]
                at = next((end for end in ends if end >= length and [*other[end - length : end]] == last), None)
                if at is not None:
                    found.append(Found("same", length, other, at))
                    break
        return found


class PromptLookups:
    """Lookups of the last ids of answers in their own texts and in other answers."""

    def __init__(self) -> None:
        self._lookups: dict[Hashable, PromptLookup] = {}
        self._rates, self._answers = Rates(), Answers()

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Guess the ids that follow each answer, as long as that promises to pay: a guess costs a row of a step, which
        for R answers is R / (FREE + R) of what an id is worth.
        """
        cost = len(asked) / (FREE + len(asked))
        return [self._guess(one, cost) for one in asked]

    def learn(self, key: Hashable, guessed: int, right: int, length: int) -> None:
        """Note how much of a guess was right."""
        lookup = self._lookups.get(key)
        if lookup is None or lookup.guessed is None:
            return
        found, lookup.guessed = lookup.guessed, None
        for rates in (self._rates, lookup.rates):
            rates.learn(found.kind, found.length, right, int(right < guessed))
        if right and found.kind != "own":
            lookup.source = found.ids, found.place + right

    def forget(self, key: Hashable) -> None:
        """Forget an answer, which others may still repeat."""
        self._lookups.pop(key, None)

    def trim(self) -> int:
        """Forget other answers; how many bytes that gives back is not known."""
        self._answers = Answers()
        return 0

    def _guess(self, one: Asked, cost: float) -> list[int]:
        lookup = self._lookups.get(one.key)
        if lookup is None:
            lookup = self._lookups[one.key] = PromptLookup(Rates(self._rates), answered=len(one.ids) - one.made + 1)
        lookup.index(one.ids)
        self._answers.add(one.ids, lookup.answered, len(one.ids))
        lookup.answered = len(one.ids)
        found = lookup.find(one.ids)
        if (other := self._answers.find(one.ids)) is not None:
            found.append(other)
        if not found:
            return []
        rate, best = max(((lookup.rates(at.kind, at.length), at) for at in found), key=lambda pair: pair[0])
        count, chance = 0, rate
        while chance > cost and count < min(MOST, one.room):
            count, chance = count + 1, chance * rate
        if not count:
            for rates in (self._rates, lookup.rates):
                rates.fade(best.kind, best.length)
            return []
        lookup.guessed = best
        return [*best.ids[best.place : best.place + count]]
