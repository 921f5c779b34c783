"""Run of a recipe: attempts go side by side and are decided one after another.

An attempt may use rows that were accepted WINDOW attempts before it and earlier, however the attempts between are
going: so that the rows are the same whenever a run was interrupted, and however many answers come together.
"""

import heapq
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError
from lit_llama.folder.manifest import sha256_file
from lit_llama.generate.rows.attempt import Attempt, Columns
from lit_llama.generate.rows.filters import RowFilters
from lit_llama.generate.rows.journal import VERSION, Journal, kept_line, rejected_line
from lit_llama.generate.rows.recipe import Recipe
from lit_llama.generate.rows.sources import Entry, Pool, named
from lit_llama.generate.rows.teacher import Ask, Key, Reply, Teacher

WINDOW = 64
"""Attempts that are under way at the same time, at most."""
LEAST = 8
"""As many are, however few rows are left to make."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits at which a run ends.

    Args:
        rows: Accepted rows.
        attempts: Attempts; None for any number.
        tokens: Tokens of answers, those of interrupted runs included; None for any number. No more are asked for: a
            prompt waits until its longest answer fits in what is left.
        seconds: Of this run; None for any time.
    """

    rows: int
    attempts: int | None = None
    tokens: int | None = None
    seconds: float | None = None


@dataclass
class Tally:
    """Counts of the attempts so far.

    Attributes:
        accepted: Rows.
        rejected: By the name of the filter.
        tokens: Of answers.
        prompt_tokens: Of prompts.
        barren: Attempts since the last accepted one.
    """

    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    prompt_tokens: int = 0
    barren: int = 0

    @property
    def decided(self) -> int:
        """Attempts that are accepted or rejected."""
        return self.accepted + self.rejected.total()


@dataclass
class _Flight:
    attempt: Attempt
    steps: Generator[tuple[str, Ask], Reply]


def _longest(ask: Ask) -> int:
    """Tokens that the answers to a prompt have, at most."""
    return ask.sampling.n * ask.sampling.max_new_tokens


class RowMaker:
    """A run of a recipe.

    Args:
        recipe: It.
        teacher: Who answers.
        seed: Of all draws.
        test_data: Files whose prompts must not be among the rows.

    Attributes:
        tally: What came of it so far.
        pools: Sources by their names.
        left: Tokens that the limit leaves, and those that the next prompt needs; of a run that it ended.

    Raises:
        UserError: The teacher cannot do what the recipe asks for.
        DataError: A source or test data cannot be used.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, *, seed: int, test_data: Sequence[Path] = ()) -> None:
        self.recipe, self.teacher, self._seed = recipe, teacher, seed
        self._test_data = {str(path): sha256_file(path) if path.is_file() else "" for path in test_data}
        self.pools = {source.name: Pool(source, seed) for source in recipe.sources}
        entries = [entry for pool in self.pools.values() for entry in pool.entries]
        self._filters = RowFilters(recipe, entries, test_data)
        self._columns = Columns(recipe, seed)
        for ask in self._columns.asks():
            teacher.check(ask)
        self.tally = Tally()
        self._accepted: list[Entry] = []
        self._accepted_by: list[int] = []  # after each attempt
        self._flights: dict[int, _Flight] = {}
        self._done: dict[int, Attempt] = {}
        self._next = 0
        self._unsent: list[tuple[Key, Ask]] = []  # a heap: no key is there twice
        self._sent: dict[Key, int] = {}  # with the tokens that its answers may have
        self._spent = 0
        self.left = (0, 0)

    @property
    def last(self) -> int | None:
        """Attempts after which a source is used up; None if none ever is."""
        return min((pool.attempts for pool in self.pools.values() if pool.attempts is not None), default=None)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides about the rows."""
        return {
            "version": VERSION,
            "recipe": self.recipe.name,
            "recipe_sha256": self.recipe.digest,
            "model_fingerprint": self.teacher.identity,
            "seed": self._seed,
            "window": WINDOW,
            "sources": {name: pool.digest for name, pool in self.pools.items()},
            "test_data": self._test_data,
        }

    def run(
        self, journal: Journal | None, limits: Limits, decided: Callable[[Attempt], object] = lambda _: None
    ) -> str:
        """Make rows until one of the limits is reached.

        Args:
            journal: Where lines go, and where those of an interrupted run are; None for nowhere.
            limits: Where it ends.
            decided: Told of each attempt that is accepted or rejected.

        Returns:
            Why it ended: rows, tokens, time or sources.

        Raises:
            DataError: Everything is rejected.
        """
        if journal is not None:
            self._restore(journal)
        last = min((number for number in (self.last, limits.attempts) if number is not None), default=None)
        start = time.monotonic()
        try:
            while not (ended := self._ended(limits, last)):
                if limits.seconds is not None and time.monotonic() - start >= limits.seconds:
                    return "time"
                self._begin(last, journal, limits.rows)
                self._send(limits)
                if self._unsent and not self._sent and not self._done.get(self.tally.decided):
                    return "tokens"
                for key, reply in self.teacher.wait():
                    del self._sent[key]
                    if journal is not None:
                        journal.answer(key, reply)
                    self._advance(key, reply, journal)
                self._decide(journal, limits, decided)
            return ended
        finally:
            self.teacher.close()

    def _restore(self, journal: Journal) -> None:
        """Take over what is decided already."""
        lines = {line.get("metadata", line)["attempt"]: line for line in (*journal.kept, *journal.rejected)}
        journal.kept.clear()
        journal.rejected.clear()
        self._next = len(lines)
        for number in range(self._next):
            line = lines.pop(number)
            meta = line.get("metadata", line)
            attempt = Attempt(number=number, tokens=meta["tokens"], prompt_tokens=meta["prompt_tokens"])
            if "metadata" in line:
                attempt.values = dict(meta["columns"])
                attempt.row = {key: value for key, value in line.items() if key != "metadata"}
            else:
                attempt.rejected = (line["filter"], "")
            self._count(attempt)
        self._spent = self.tally.tokens + sum(reply.tokens for reply in journal.answers.values())

    def _ended(self, limits: Limits, last: int | None) -> str:
        tally = self.tally
        if tally.accepted >= limits.rows:
            return "rows"
        given_up = limits.attempts is None and tally.barren >= self.recipe.give_up_after
        used_up = last is not None and tally.decided >= last
        if given_up or (used_up and limits.attempts is None and not tally.accepted):
            why = ", ".join(f"{name} {count:,}" for name, count in tally.rejected.most_common())
            raise DataError(
                f"the last {tally.barren:,} attempts were all rejected, {tally.accepted:,} of {tally.decided:,} were "
                f"accepted; rejected by: {why}; rejected.jsonl says why of each"
            )
        return "sources" if used_up else ""

    def _side_by_side(self, rows: int) -> int:
        """Attempts that may be under way: about as many as the rows that are left take, by those decided so far, as
        the answers of the others would be thrown away."""
        tally = self.tally
        takes = (rows - tally.accepted) * (tally.decided + 1) // (tally.accepted + 1)
        return min(WINDOW, max(LEAST, takes))

    def _begin(self, last: int | None, journal: Journal | None, rows: int) -> None:
        while self._next < self.tally.decided + self._side_by_side(rows) and (last is None or self._next < last):
            attempt = Attempt(number=self._next)
            before = self._next - WINDOW
            known = self._accepted[: self._accepted_by[before]] if before >= 0 else []
            drawn = {name: pool.draw(attempt.number, known) for name, pool in self.pools.items()}
            self._flights[attempt.number] = _Flight(attempt, self._columns.run(attempt, drawn))
            self._next += 1
            self._advance((attempt.number, ""), None, journal)

    def _send(self, limits: Limits) -> None:
        """Ask the teacher, the first attempts first, as far as the tokens that are left allow."""
        while self._unsent:
            key, ask = self._unsent[0]
            left = (limits.tokens or 1 << 62) - self._spent - sum(self._sent.values())
            if _longest(ask) > left:
                self.left = left, _longest(ask)
                return
            heapq.heappop(self._unsent)
            self._sent[key] = _longest(ask)
            self.teacher.add(key, ask)

    def _advance(self, key: Key, reply: Reply | None, journal: Journal | None) -> None:
        """Go on with an attempt up to its next prompt, or its end; answers of an interrupted run come at once."""
        flight = self._flights[key[0]]
        if reply is not None:
            self._spent += reply.tokens
        try:
            while True:
                column, ask = flight.steps.send(reply) if reply is not None else next(flight.steps)
                known = None if journal is None else journal.answers.pop((key[0], column), None)
                if known is None:
                    heapq.heappush(self._unsent, ((key[0], column), ask))
                    return
                reply = known
        except StopIteration:
            del self._flights[key[0]]
            self._done[key[0]] = flight.attempt

    def _decide(self, journal: Journal | None, limits: Limits, decided: Callable[[Attempt], object]) -> None:
        """Decide about the attempts that are next, as long as they are done."""
        while (attempt := self._done.pop(self.tally.decided, None)) is not None:
            attempt.rejected = self._filters.judge(attempt)
            if journal is not None:
                of = (self.recipe, self.teacher.name, self.teacher.identity)
                if attempt.rejected is None:
                    journal.keep(kept_line(attempt, *of))
                else:
                    journal.reject(rejected_line(attempt, *of))
            self._count(attempt)
            decided(attempt)
            given_up = limits.attempts is None and self.tally.barren >= self.recipe.give_up_after
            if given_up or self.tally.accepted >= limits.rows:
                return

    def _count(self, attempt: Attempt) -> None:
        tally = self.tally
        tally.tokens += attempt.tokens
        tally.prompt_tokens += attempt.prompt_tokens
        if attempt.rejected is None:
            assert attempt.row is not None
            self._filters.accept(attempt)
            if any(source.accepted for source in self.recipe.sources):
                value: Mapping[str, Any] = {**attempt.row, **named(attempt.row, attempt.number)}
                self._accepted.append(Entry(f"attempt {attempt.number}", value))
            tally.accepted += 1
            tally.barren = 0
        else:
            tally.rejected[attempt.rejected[0]] += 1
            tally.barren += 1
        self._accepted_by.append(len(self._accepted))
