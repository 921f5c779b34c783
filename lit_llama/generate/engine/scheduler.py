"""Plan of the tokens of the next step: sequences join and leave a running batch, and prompts are cut to a budget.

Pure Python over ids; the model is whoever runs a `Plan`. A step takes the next token of every sequence that is being
continued, with the guesses that follow it, and then as much of the prompts as the budget leaves (Agrawal et al. 2023,
arXiv:2308.16369). Where blocks run out, the sequence that came last gives back its own and is computed again later.
"""

from bisect import insort
from collections import abc
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from lit_llama.generate.engine.cache import BlockPool

State = Literal["new", "waiting", "running", "finished"]


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """One answer in the making.

    Attributes:
        ids: Prompt and answer so far.
        adapter: Name of the adapter that computes it; None for the base.
        bound: Tokens that it may have in the end.
        long: Its positions turn as those of long sequences do, see RopeScaling.turns_long.
        priority: A higher one is admitted earlier.
        scored: Prompt tokens whose logits are wanted: all from this one on. Known blocks do not stand in for them.
        source: A sequence with the same prompt, whose blocks are taken over once it has computed it; None after that.
        computed: Tokens whose keys and values are in `blocks`.
        reused: Tokens of the prompt that were found computed.
        blocks: Of the cache, one for each `size` tokens; -1 where no token sees it any more.
        chain: What stands for each full block and all before it.
        guesses: Ids that may follow, computed together with the next token.
        slot: Place of its state while it runs, for models with recurrent layers.
    """

    ids: list[int]
    adapter: str | None = None
    bound: int = 0
    long: bool = False
    priority: int = 0
    scored: int | None = None
    source: "Sequence | None" = None
    computed: int = 0
    reused: int = 0
    blocks: list[int] = field(default_factory=list)
    chain: list[Hashable] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    slot: int = -1
    state: State = "new"
    order: int = 0
    turn: tuple[float, int] = (0.0, 0)

    @property
    def pending(self) -> int:
        """Tokens that are to be computed before the next one can be drawn."""
        return len(self.ids) - self.computed


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of a sequence that a step computes: `ids`, from position `start` on; the last `logits` want logits."""

    sequence: Sequence
    ids: list[int]
    start: int
    logits: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Tokens that a step computes, after the copies (from, to) of blocks, in their order."""

    parts: list[Part]
    copies: list[tuple[int, int]]


class QueueFull(Exception):
    """Refusal of a sequence, as many wait as may."""


class TooLong(Exception):
    """Refusal of a sequence that the cache would not hold, even alone."""


class Scheduler:
    """The queue, the running sequences and their blocks.

    Args:
        pool: Blocks of the cache.
        max_batch_tokens: Tokens of a step, at most; more than `max_sequences`.
        max_sequences: Sequences that run together, at most.
        max_waiting: Sequences that may wait.
        window: Tokens that a query sees in every layer, where blocks before them are given back; None for all.
        reuses: What is known of a prompt is taken over. Not of a model with recurrent layers, whose states are those
            behind the last token of a sequence and no other.
    """

    AGEING = 64
    """Steps after which a waiting sequence goes before a later one of the next priority: none waits for ever."""

    BACKLOG = 8
    """A step computes at least this part of the prompt tokens that wait: a longer piece of a prompt holds up answers
    that go on, and a shorter one those that have not begun."""

    MAX_SCORED = 128
    """Tokens of a scored prompt in a step."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int = 512,
        max_sequences: int = 64,
        max_waiting: int = 1 << 20,
        window: int | None = None,
        reuses: bool = True,
    ) -> None:
        assert max_batch_tokens > max_sequences
        self.pool, self.window, self.reuses = pool, window, reuses
        self.max_batch_tokens, self.max_sequences, self.max_waiting = max_batch_tokens, max_sequences, max_waiting
        self.waiting: list[Sequence] = []  # by their turn
        self.running: list[Sequence] = []  # by their order
        self.preemptions = self.steps = self._order = 0
        self._slots = list(range(max_sequences))

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.waiting or self.running)

    # ---- joining and leaving

    def add(self, sequences: abc.Sequence[Sequence], longest: int) -> None:
        """Let sequences wait, all or none.

        Args:
            sequences: New ones.
            longest: Tokens that one of them may reach.

        Raises:
            TooLong: The whole cache would not hold one of them.
            QueueFull: Too many are waiting.
        """
        if self._blocks_for(longest) > self.pool.count:
            raise TooLong
        if len(self.waiting) + len(sequences) > self.max_waiting:
            raise QueueFull
        for sequence in sequences:
            sequence.order, self._order = self._order, self._order + 1
            sequence.source = sequence.source if self.reuses else None
            sequence.turn = (self.steps / self.AGEING - sequence.priority, sequence.order)
            self._wait(sequence)

    def finish(self, sequence: Sequence, *, damaged: bool = False) -> list[int]:
        """Take a sequence out, whatever its state. What it has computed stays known, unless it is damaged.

        Returns:
            Blocks that nobody holds now and whose content is damaged.
        """
        self._leave(sequence)
        sequence.state = "finished"
        blocks = [block for block in sequence.blocks if block >= 0]
        if damaged:
            self.pool.forget(blocks)
        self._give_back(sequence)
        return [block for block in blocks if not self.pool.is_held(block)] if damaged else []

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=lambda waiting: waiting.turn)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.state == "running":
            self.running.remove(sequence)
            self._slots.append(sequence.slot)
        elif sequence.state == "waiting":
            self.waiting.remove(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release([block for block in sequence.blocks if block >= 0])
        sequence.blocks, sequence.chain, sequence.guesses, sequence.computed = [], [], [], 0

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._give_back(sequence)
        self._wait(sequence)
        self.preemptions += 1

    def slide(self, sequence: Sequence) -> None:
        """Let a running sequence be computed again, as its ids are others now."""
        self._leave(sequence)
        self._give_back(sequence)
        sequence.scored = None
        for other in self.waiting:
            if other.source is sequence:
                other.source = None
        self._wait(sequence)

    def restart(self, sequence: Sequence) -> None:
        """Let a running sequence be computed again, from what is known."""
        if sequence.state == "running":
            self._preempt(sequence)

    # ---- a step

    def plan(self, prompt_tokens: int | None = None) -> Plan:
        """Plan the next step; it is empty only if no sequence waits or runs.

        Args:
            prompt_tokens: Tokens of prompts in a step that also continues answers, beside as many as continue them;
                more where many wait, see `BACKLOG`. None for all that the step has room for.
        """
        self.steps += 1
        plan = Plan([], [])
        planned: set[Sequence] = set()
        budget = self.max_batch_tokens
        # A token of each sequence that is being continued goes before the prompts, which would hold them up.
        prompts = [sequence for sequence in self.running if sequence.pending > 1]
        for sequence in [sequence for sequence in self.running if sequence.pending == 1]:
            budget -= self._continue(sequence, budget, plan, planned)
        if plan.parts and prompt_tokens is not None:
            continued = self.max_batch_tokens - budget
            budget = min(budget, max(prompt_tokens + continued, self._backlog(prompts) // self.BACKLOG))
        for sequence in prompts:
            budget -= self._continue(sequence, budget, plan, planned)
        self._admit(budget, plan)
        return plan

    def _backlog(self, prompts: list[Sequence]) -> int:
        """Prompt tokens that wait, of which no more are counted than matter."""
        backlog, enough = 0, self.max_batch_tokens * self.BACKLOG
        for sequence in chain(prompts, self.waiting):
            backlog += sequence.pending
            if backlog >= enough:
                break
        return backlog

    def _continue(self, sequence: Sequence, budget: int, plan: Plan, planned: set[Sequence]) -> int:
        """Plan the next tokens of a running sequence, for whose blocks later ones are put off; how many there are."""
        if sequence.state != "running" or not budget:
            return 0
        if sequence.pending + len(sequence.guesses) > max(1, budget - len(self.running)):
            sequence.guesses = []
        count = self._limited(sequence, sequence.pending + len(sequence.guesses), budget)
        while not self._hold(sequence, count, plan):
            last = max((other for other in self.running if other not in planned), key=lambda other: other.order)
            self._preempt(last)
            if last is sequence:
                return 0
        planned.add(sequence)
        return self._take(sequence, count, plan)

    def _admit(self, budget: int, plan: Plan) -> None:
        """Let waiting sequences run, in their turn, as far as budget and blocks go.

        One whose next block another one is computing is held back and finds it once it is there; until then, its place
        among those that run is kept. As it waits only for sequences that run, and those wait for none, it has its turn.
        """
        coming = {self._next_block(sequence, len(sequence.ids)) for sequence in self.running} if self.waiting else set()
        held_back = 0
        for sequence in list(self.waiting):
            if not budget or len(self.running) + held_back >= self.max_sequences:
                return
            source = sequence.source
            if source is not None and self._is_coming(source, sequence):
                continue
            self._reuse(sequence)
            following = self._next_block(sequence, self._reusable(sequence))
            if following is not None and following in coming:
                self._give_back(sequence)
                held_back += 1
                continue
            wanted = self._blocks_for(len(sequence.ids) + 1) - len(sequence.blocks) + (sequence.computed > 0)
            if self.running and wanted + len(self.running) > self.pool.available:
                self._give_back(sequence)
                return
            count = self._limited(sequence, sequence.pending, budget)
            held = self._hold(sequence, count, plan)
            assert held, "a sequence that runs alone fits into the cache"
            sequence.source = None  # from now on, it has ids of its own
            self._leave(sequence)
            sequence.state, sequence.slot = "running", self._slots.pop()
            insort(self.running, sequence, key=lambda running: running.order)
            coming.add(self._next_block(sequence, len(sequence.ids)))
            budget -= self._take(sequence, count, plan)

    def _is_coming(self, source: Sequence, sequence: Sequence) -> bool:
        """Whether the source of a sequence is computing its prompt, or will before the sequence has its turn."""
        if source.computed >= len(sequence.ids) - 1:
            return False
        return source.state == "running" or (source.state == "waiting" and source.turn < sequence.turn)

    def _next_block(self, sequence: Sequence, end: int) -> tuple[Hashable, tuple[int, ...]] | None:
        """Parent and ids of the block behind the known ones of a sequence; None if ids up to `end` do not fill it, or
        none are taken over.
        """
        if not self.reuses:
            return None
        size = self.pool.size
        start = len(sequence.chain) * size
        return (self._parent(sequence), tuple(sequence.ids[start : start + size])) if start + size <= end else None

    def _reusable(self, sequence: Sequence) -> int:
        """Tokens of a sequence that need not be computed where they are known: not those whose logits are wanted."""
        return len(sequence.ids) - 1 if sequence.scored is None else min(sequence.scored, len(sequence.ids) - 1)

    def _reuse(self, sequence: Sequence) -> None:
        """Take over what is known of a sequence."""
        size, source, limit = self.pool.size, sequence.source, self._reusable(sequence)
        if source is not None and source.state == "running" and source.computed >= limit and -1 not in source.blocks:
            sequence.blocks = source.blocks[: self._blocks_for(limit)]
            sequence.chain = source.chain[: limit // size]
            sequence.computed = limit
            for block in sequence.blocks:
                self.pool.share(block)
        else:
            while (following := self._next_block(sequence, limit)) is not None:
                found = self.pool.find(*following)
                if found is None:
                    break
                self.pool.share(found[0])
                sequence.blocks.append(found[0])
                sequence.chain.append(found[1])
            sequence.computed = len(sequence.blocks) * size
        sequence.reused = max(sequence.reused, sequence.computed)

    def _limited(self, sequence: Sequence, count: int, budget: int) -> int:
        """Tokens of a sequence that go into a step; fewer where all of them want logits, which take much memory."""
        return min(count, budget, self.max_batch_tokens if sequence.scored is None else self.MAX_SCORED)

    def _take(self, sequence: Sequence, count: int, plan: Plan) -> int:
        """Put `count` tokens of a sequence into a plan."""
        start, end = sequence.computed, sequence.computed + count
        ids = (sequence.ids + sequence.guesses)[start:end] if sequence.guesses else sequence.ids[start:end]
        plan.parts.append(Part(sequence, ids, start, max(0, end - max(start, self._reusable(sequence)))))
        return count

    def _hold(self, sequence: Sequence, count: int, plan: Plan) -> bool:
        """Get blocks for the next `count` tokens, of which none may be written by another; False if there are none."""
        size, blocks = self.pool.size, sequence.blocks
        partial = sequence.computed // size
        copied = sequence.computed % size and self.pool.is_shared(blocks[partial])
        missing = self._blocks_for(sequence.computed + count) - len(blocks)
        if missing + bool(copied) > self.pool.available:
            return False
        if copied:
            block = self.pool.allocate()
            plan.copies.append((blocks[partial], block))
            self.pool.release([blocks[partial]])
            blocks[partial] = block
        blocks.extend(self.pool.allocate() for _ in range(missing))
        return True

    def advance(self, sequence: Sequence, computed: int) -> None:
        """Say how far the ids of a running sequence are computed; its full blocks become known.

        Blocks for tokens beyond, guesses that were wrong, are given back.
        """
        size = self.pool.size
        sequence.computed = computed
        while self.reuses and (len(sequence.chain) + 1) * size <= computed:
            index = len(sequence.chain)
            ids = tuple(sequence.ids[index * size : (index + 1) * size])
            sequence.chain.append(self.pool.publish(sequence.blocks[index], self._parent(sequence), ids))
        keep = self._blocks_for(computed)
        if sequence.blocks[keep:]:
            self.pool.release(sequence.blocks[keep:])
            del sequence.blocks[keep:]
        if self.window is not None:
            unseen = max(0, computed + 1 - self.window) // size
            self.pool.release([block for block in sequence.blocks[:unseen] if block >= 0])
            sequence.blocks[:unseen] = [-1] * unseen

    def _parent(self, sequence: Sequence) -> Hashable:
        return sequence.chain[-1] if sequence.chain else ("adapter", sequence.adapter, sequence.long)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.size)

    # ---- what must hold

    def check(self) -> None:
        """Assert that sequences hold just the blocks that they need, and nobody else holds any."""
        held: dict[int, int] = {}
        for sequence in self.running:
            assert sequence.state == "running" and len(sequence.blocks) >= self._blocks_for(sequence.computed)
            for block in sequence.blocks:
                if block >= 0:
                    held[block] = held.get(block, 0) + 1
        assert all(sequence.state == "waiting" and not sequence.blocks for sequence in self.waiting)
        assert len(self.running) <= self.max_sequences
        assert sorted([*self._slots, *(sequence.slot for sequence in self.running)]) == [*range(self.max_sequences)]
        self.pool.check(held)
