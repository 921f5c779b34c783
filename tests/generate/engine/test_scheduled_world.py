"""The scheduler on a model whose next token is a function of all ids, with a cache that remembers who wrote what."""

import random
from collections.abc import Sequence as Ids

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llama.generate.engine.cache import BlockPool
from lit_llama.generate.engine.scheduler import Plan, QueueFull, Scheduler, Sequence, TooLong


def follows(ids: Ids[int], number: int) -> int:
    """The next token, which is another one in another answer to a prompt."""
    return (sum((place + 1) * token for place, token in enumerate(ids)) * 7 + 13 * number) % 5


class World:
    """A scheduler and what a model would do: it writes keys, and checks that it sees the right ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.size, self.window = self.random.choice([1, 2, 4, 8]), self.random.choice([None, None, 6])
        self.count = self.random.choice([4, 8, 20, 60])
        self.pool = BlockPool(self.count, self.size)
        most = self.random.choice([1, 2, 5, 9])
        budget = most + self.random.choice([1, 2, 8, 40])
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=budget,
            max_sequences=most,
            max_waiting=50,
            window=self.window,
        )
        self.prompt_tokens = self.random.choice([1, 3, 100, None])
        self.prefix = [self.random.randrange(3) for _ in range(14)]
        self.damaged = False
        self.written: dict[tuple[int, int], object] = {}  # (block, place): the adapter and all ids up to there
        self.live: dict[Sequence, tuple[list[int], int, int]] = {}  # prompt, tokens of the answer, its number
        self.finished = self.held_back = 0

    def add(self) -> None:
        ids = [self.random.randrange(3) for _ in range(self.random.randrange(1, min(14, self.count * self.size)))]
        alike = self.random.choice([0, 0, 3, 8, 13])
        ids = (self.prefix[:alike] + ids[alike:])[: len(ids)]
        new, adapter = self.random.randrange(1, 12), self.random.choice([None, None, "a"])
        scored = self.random.choice([None, None, None, 0, 2])
        sequences = [
            Sequence(ids=list(ids), adapter=adapter, priority=self.random.choice([0, 0, 1]), scored=scored)
            for _ in range(self.random.choice([1, 1, 2, 3]))
        ]
        for other in sequences[1:]:
            other.source = sequences[0]
        try:
            self.scheduler.add(sequences, len(ids) + new)
        except (TooLong, QueueFull):
            return
        self.live |= {sequence: (ids, new, number) for number, sequence in enumerate(sequences)}

    def disturb(self) -> None:
        if self.live and self.random.random() < 0.05:
            gone = self.random.choice(list(self.live))
            damaged = self.random.random() < 0.3
            self.damaged |= damaged
            self.scheduler.finish(gone, damaged=damaged)
            del self.live[gone]
        for sequence in self.scheduler.running:
            if sequence.pending == 1 and self.random.random() < 0.3:
                sequence.guesses = [self.random.randrange(5) for _ in range(self.random.randrange(4))]

    def step(self) -> None:
        running, waiting = list(self.scheduler.running), self.scheduler.waiting
        going = [sequence for sequence in running if sequence.pending == 1]
        backlog = sum(sequence.pending for sequence in (*running, *waiting)) - len(going)
        plan = self.scheduler.plan(self.prompt_tokens)
        assert plan.parts or not self.scheduler.busy, "nothing goes on though something waits"
        assert sum(len(part.ids) for part in plan.parts) <= self.scheduler.max_batch_tokens
        self.prompts_hold_nobody_up(plan, going, backlog)
        self.nobody_computes_what_another_one_does(plan, running)
        if self.random.random() < 0.02:  # interrupted: all of it is computed again
            for part in plan.parts:
                self.scheduler.restart(part.sequence)
            return
        self.write(plan)
        for part in plan.parts:
            self.take(part.sequence, part.start + len(part.ids), part.logits)
        self.scheduler.check()

    def prompts_hold_nobody_up(self, plan: Plan, going: list[Sequence], backlog: int) -> None:
        """Answers go on in every step, and the pieces of prompts beside them are bounded from above and below."""
        parts = {part.sequence: len(part.ids) for part in plan.parts}
        continued = sum(count for sequence, count in parts.items() if sequence in going)
        computed = sum(parts.values()) - continued
        backlog += sum(sequence.pending for sequence in going if sequence.state == "waiting")  # put off just now
        if self.prompt_tokens is not None:
            bound = max(self.prompt_tokens + continued, backlog // Scheduler.BACKLOG)
            assert not continued or computed <= bound
        assert all(sequence in parts for sequence in going if sequence.state == "running"), "an answer stands still"
        prompts = [sequence for sequence in self.scheduler.running if sequence not in going]
        assert computed or not prompts, "all prompts stand still"

    def nobody_computes_what_another_one_does(self, plan: Plan, before: list[Sequence]) -> None:
        """Who begins to run has no full block before it that somebody else is computing."""
        if self.damaged or self.window is not None:  # where blocks of running sequences may be unknown
            return

        def following(sequence: Sequence, end: int) -> tuple[object, list[int]] | None:
            block = (len(sequence.chain) + 1) * self.size
            return (sequence.adapter, sequence.ids[:block]) if block <= end else None

        computing = [following(s, len(s.ids)) for s in before if s.state == "running"]
        for sequence in [part.sequence for part in plan.parts if part.sequence not in before]:
            last = len(sequence.ids) - 1
            own = following(sequence, last if sequence.scored is None else min(sequence.scored, last))
            assert own is None or own not in computing, "a block is computed twice"
            computing.append(following(sequence, len(sequence.ids)))
        starts = [following(s, len(s.ids) - 1) for s in self.scheduler.waiting]
        self.held_back += any(start is not None and start in computing for start in starts)

    def write(self, plan: Plan) -> None:
        for source, destination in plan.copies:
            for place in range(self.size):
                self.written[destination, place] = self.written.get((source, place))
        for part in plan.parts:
            ids = part.sequence.ids + part.sequence.guesses
            assert ids[part.start : part.start + len(part.ids)] == part.ids
            for position in range(part.start, part.start + len(part.ids)):
                block = part.sequence.blocks[position // self.size]
                assert not self.pool.is_shared(block), "somebody else's keys are overwritten"
                self.written[block, position % self.size] = (part.sequence.adapter, tuple(ids[: position + 1]))
        for part in plan.parts:
            ids, end = part.sequence.ids + part.sequence.guesses, part.start + len(part.ids)
            for position in range(0 if self.window is None else max(0, end - self.window), end):
                seen = self.written[part.sequence.blocks[position // self.size], position % self.size]
                assert seen == (part.sequence.adapter, tuple(ids[: position + 1])), "keys of other ids are seen"

    def take(self, sequence: Sequence, end: int, logits: int) -> None:
        old = len(sequence.ids)
        if end < old:
            return self.scheduler.advance(sequence, end)
        assert logits >= end - old + 1
        drawn: list[int] = []
        prompt, new, number = self.live[sequence]
        for place in range(end - old + 1):
            drawn.append(follows((sequence.ids + sequence.guesses)[: old + place], number))
            if place < len(sequence.guesses) and sequence.guesses[place] != drawn[-1]:
                break
        sequence.guesses = []
        sequence.ids += drawn[: len(prompt) + new - old]
        self.scheduler.advance(sequence, min(end, len(sequence.ids) - 1))
        if len(sequence.ids) == len(prompt) + new:
            expected = list(prompt)
            for _ in range(new):
                expected.append(follows(expected, number))
            assert sequence.ids == expected
            self.scheduler.finish(sequence)
            del self.live[sequence]
            self.finished += 1


def live(seed: int, events: int) -> World:
    world = World(seed)
    for _ in range(events):
        if world.random.random() < 0.4:
            world.add()
        world.disturb()
        world.step()
    for _ in range(20 * events):
        if not world.scheduler.busy:
            break
        world.step()
    assert not world.live, "something never ends"
    world.pool.check({})
    return world


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_every_answer_is_right_and_no_block_is_lost(seed: int) -> None:
    """Catches: a block shared with other ids or another adapter, lost, owned twice, or written while others read it."""
    live(seed, 60)


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_a_million_events(part: int) -> None:
    """The same, at length: pytest -m stress tests/generate/engine/test_scheduled_world.py."""
    worlds = [live(part * 1_000_000 + seed, 1000) for seed in range(250)]
    assert sum(world.finished for world in worlds) > 10_000
    assert sum(world.scheduler.preemptions for world in worlds) > 1_000
    assert sum(world.held_back for world in worlds) > 1_000
