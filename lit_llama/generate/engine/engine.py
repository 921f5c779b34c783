"""The engine: requests come and go while it runs, and each gets the answer that it would get alone.

It knows ids only. `step` computes one step of all running sequences; one thread at a time owns the model, and requests
may be added and aborted from any. Where the runner is exact, a greedy or seeded answer is the same bytes alone and in
company, after a prefix that was found computed, and after having been put off.

Shapes: N rows of logits, V vocabulary.
"""

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from lit_llama.errors import NumericalError, ResourceError, UserError
from lit_llama.generate.engine.cache import BlockPool
from lit_llama.generate.engine.request import FinishReason, Request, Step, TokenLogprobs
from lit_llama.generate.engine.runner import Runner
from lit_llama.generate.engine.sampling import Sampler, token_logprobs
from lit_llama.generate.engine.scheduler import Part, Plan, QueueFull, Scheduler, Sequence
from lit_llama.generate.engine.speculative import PromptLookup
from lit_llama.model.kernels.decode import Factors
from lit_llama.model.paged import BLOCK, PagedBatch


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    Args:
        max_batch_tokens: Tokens that a step computes, at most.
        max_sequences: Answers that are made at the same time, at most.
        max_waiting: Answers that may wait for their turn.
        speculate: Guess tokens from the text so far, which changes no answer.

    Raises:
        UserError: A limit is below 1, or a step has no room for a token of every answer and one of a prompt.
    """

    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_waiting: int = 100_000
    speculate: bool = True

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences", "max_waiting"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.max_batch_tokens <= self.max_sequences:
            raise UserError(
                f"max_batch_tokens is {self.max_batch_tokens}, expected more than {self.max_sequences}, max_sequences"
            )


class Matcher(Protocol):
    """What a constraint lets follow, see constraint.py."""

    def allow(self, row: Tensor) -> None:
        """Write into (V,) of booleans which ids may follow."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by an id; False, and no change, if it may not follow."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last ids back."""
        ...

    def forced(self) -> list[int]:
        """Ids that have to follow, none where there is a choice."""
        ...


@dataclass(eq=False)
class Ticket:
    """A request in the engine, and what came of it.

    Attributes:
        request: As it was added.
        steps: What was not taken yet.
        error: Why it failed; nothing comes after.
        open: Answers that go on.
    """

    request: Request
    steps: deque[Step] = field(default_factory=deque)
    error: UserError | None = None
    open: int = 0
    answers: "list[_Answer]" = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.open == 0


@dataclass(eq=False)
class _Answer:
    """One of the answers to a request."""

    ticket: Ticket
    index: int
    sequence: Sequence
    matcher: Matcher | None
    lookup: PromptLookup | None
    prompt: int
    scores: list[TokenLogprobs | None] = field(default_factory=list)  # of the prompt

    @property
    def made(self) -> int:
        """Tokens of the answer."""
        return len(self.sequence.ids) - self.prompt


@dataclass(frozen=True)
class Statistics:
    """What an engine does and has done."""

    running: int
    waiting: int
    steps: int
    computed: int
    reused: int
    made: int
    guessed: int
    guessed_right: int
    preemptions: int
    blocks: int
    blocks_free: int


class Engine:
    """Continuous batching over a runner.

    Args:
        runner: The model and its cache.
        tokens: Size of the tokenizer; ids from there on pad the embedding and are never drawn.
        config: Limits.

    Attributes:
        default_adapter: Name of the adapter of requests that name none.
    """

    def __init__(self, runner: Runner, *, tokens: int | None = None, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self._runner, self._tokens = runner, tokens
        vocabulary = runner.config.vocab_size
        self._width = vocabulary if tokens is None else min(tokens, vocabulary)
        windows = [runner.config.window(layer) for layer in range(runner.config.num_hidden_layers)]
        window = None if None in windows else max(w for w in windows if w is not None)
        self._scheduler = Scheduler(
            BlockPool(runner.blocks, BLOCK),
            max_batch_tokens=self.config.max_batch_tokens,
            max_sequences=self.config.max_sequences,
            max_waiting=self.config.max_waiting,
            window=window,
        )
        self._sampler = Sampler(self.config.max_sequences, vocabulary, tokens=tokens, device=runner.device)
        self._free = list(range(self.config.max_sequences))
        self._slots: dict[Sequence, int] = {}
        self._answers: dict[Sequence, _Answer] = {}
        self._adapters: set[str] = set()
        self.default_adapter: str | None = None
        self._computed = self._reused = self._made = self._guessed = self._right = 0
        self._lock = threading.RLock()
        self.closed = False

    # ---- requests

    def add(self, request: Request) -> Ticket:
        """Take a request in; its first step comes with one of the next calls of `step`.

        Raises:
            UserError: It cannot be answered: an id that is no token, an unknown adapter, longer than the model reads or
                the cache holds.
            ResourceError: Too many requests are waiting.
        """
        with self._lock:
            if request.adapter is None and self.default_adapter is not None:
                request = replace(request, adapter=self.default_adapter)
            self.check_request(request)
            ticket = Ticket(request)
            sampling = request.sampling
            first: Sequence | None = None
            for index in range(sampling.n):
                scored = 0 if request.prompt_logprobs is not None and index == 0 else None
                sequence = Sequence(
                    ids=list(request.ids),
                    adapter=request.adapter,
                    priority=-request.priority,
                    scored=scored,
                    source=first,
                )
                first = first or sequence
                matcher = None if request.constraint is None else request.constraint.matcher()
                speculate = self.config.speculate and not sampling.penalised
                lookup = PromptLookup() if speculate else None
                ticket.answers.append(_Answer(ticket, index, sequence, matcher, lookup, len(request.ids)))
            try:
                longest = len(request.ids) + sampling.max_new_tokens
                self._scheduler.add([answer.sequence for answer in ticket.answers], longest)
            except QueueFull:
                raise ResourceError(
                    f"{len(self._scheduler.waiting)} requests are waiting, of at most {self.config.max_waiting}; try "
                    "again later"
                ) from None
            ticket.open = sampling.n
            self._answers.update((answer.sequence, answer) for answer in ticket.answers)
            return ticket

    def check_request(self, request: Request) -> None:
        """Raise UserError if a request could not be answered, whatever else is there."""
        if self.closed:
            raise UserError("the engine is closed")
        vocabulary = self._runner.config.vocab_size
        if wrong := [token for token in request.ids if token >= vocabulary]:
            raise UserError(f"the prompt holds the id {wrong[0]}, but the model has {vocabulary} tokens")
        if request.adapter is not None and request.adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise UserError(f"there is no adapter {request.adapter!r}; loaded are: {known}")
        reads, holds = self._runner.config.context_length, self._runner.blocks * BLOCK
        sampling = request.sampling
        if not sampling.max_new_tokens and request.prompt_logprobs is None:
            raise UserError("--max_new_tokens is 0, expected 1 or more where the prompt is not scored")
        if (longest := len(request.ids) + sampling.max_new_tokens) > min(reads, holds):
            whose = f"{reads} the model reads" if longest > reads else f"{holds} that the memory of the cache holds"
            raise UserError(
                f"the prompt has {len(request.ids)} tokens; with --max_new_tokens {sampling.max_new_tokens} that is "
                f"more than the {whose}: shorten the prompt or the answer"
            )

    def abort(self, ticket: Ticket, answer: int | None = None) -> None:
        """End a request, or one of its answers, whatever its state; what goes on ends with the reason `abort`."""
        with self._lock:
            for own in ticket.answers if answer is None else [ticket.answers[answer]]:
                if own.sequence in self._answers:
                    self._end(own, (), (), "abort")

    def stream(self, request: Request) -> Iterator[Step]:
        """Answer a request, together with all others that are in the engine; leaving the iterator aborts it.

        Raises:
            UserError: As `add`, at once; while iterating, it failed on the way, see `Ticket.error`.
        """
        return self._followed(self.add(request))

    def _followed(self, ticket: Ticket) -> Iterator[Step]:
        try:
            yield from self.follow(ticket)
        finally:
            self.abort(ticket)

    def follow(self, ticket: Ticket) -> Iterator[Step]:
        """What comes of a request, computing as long as nothing is there.

        Raises:
            UserError: It failed.
        """
        while True:
            while ticket.steps:
                yield ticket.steps.popleft()
            if ticket.error is not None:
                raise ticket.error
            if ticket.done:
                return
            self.step()

    def close(self) -> None:
        """Abort everything and take nothing in any more."""
        with self._lock:
            for answer in list(self._answers.values()):
                self._end(answer, (), (), "abort")
            self.closed = True

    # ---- adapters

    def add_adapter(self, name: str, factors: dict[str, Factors]) -> None:
        """Make an adapter known by a name.

        Raises:
            UserError: The name is taken, or the runner cannot have it.
        """
        with self._lock:
            if name in self._adapters:
                raise UserError(f"adapter {name!r} is loaded already; drop it first")
            self._runner.add_adapter(name, factors)
            self._adapters.add(name)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; the requests that use it are aborted.

        Raises:
            UserError: There is none of this name.
        """
        with self._lock:
            if name not in self._adapters:
                raise UserError(f"there is no adapter {name!r}")
            for answer in [a for a in self._answers.values() if a.sequence.adapter == name]:
                self._end(answer, (), (), "abort")
            self._adapters.remove(name)
            self._scheduler.pool.forget_adapter(name)
            self._runner.remove_adapter(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return sorted(self._adapters)

    # ---- a step

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return self._scheduler.busy

    def step(self) -> None:
        """Compute one step; what comes of it is put into the tickets. Does nothing if no request is there."""
        with self._lock, torch.inference_mode():
            plan = self._scheduler.plan()
            if not plan.parts:
                return
            try:
                for source, destination in plan.copies:
                    self._runner.copy(source, destination)
                parts = sorted(plan.parts, key=lambda part: part.sequence.adapter or "")
                logits = self._runner.logits(_batch(parts))
            except MemoryError:
                self._restart(plan)
                self._fail(
                    self._answers[max((part.sequence for part in plan.parts), key=lambda s: s.order)],
                    ResourceError("there was not enough memory for this request; the others go on"),
                )
                return
            except BaseException:
                self._restart(plan)
                raise
            self._computed += sum(len(part.ids) for part in parts)
            self._take(parts, logits)

    def _restart(self, plan: Plan) -> None:
        """Have what a step would have computed be computed again, as parts of it may be missing."""
        for part in plan.parts:
            self._scheduler.restart(part.sequence)

    def _take(self, parts: list[Part], logits: Tensor) -> None:
        """Draw from the logits of a step, and say what came of it."""
        drawn: list[tuple[_Answer, int, int]] = []  # answer, its first row, rows
        end = 0
        for part in parts:
            first, end = end, end + part.logits
            answer = self._answers[part.sequence]
            last = part.start + len(part.ids)
            complete = last >= len(part.sequence.ids)
            rows = 1 + len(part.sequence.guesses) if complete else 0
            if part.sequence.scored is not None:
                self._score(answer, part, logits[first : end - rows if complete else end])
            if complete:
                drawn.append((answer, end - rows, rows))
            else:
                self._scheduler.advance(part.sequence, last)
        if drawn:
            self._draw(drawn, logits)

    def _draw(self, drawn: list[tuple[_Answer, int, int]], logits: Tensor) -> None:
        self._assign()
        places = [row for _, first, count in drawn for row in range(first, first + count)]
        logits = logits if len(places) == len(logits) else logits[torch.tensor(places, device=logits.device)]
        slots = [self._slots[answer.sequence] for answer, _, count in drawn for _ in range(count)]
        positions = [answer.made + i for answer, _, count in drawn for i in range(count)]
        choice = self._sampler.sample(logits, slots, positions, self._allowed(drawn, len(places)))
        ids, details = choice.ids.tolist(), choice.details()
        accepted: list[tuple[int, int]] = []
        first = 0
        for answer, _, count in drawn:
            own = slice(first, first + count)
            first += count
            accepted += self._go_on(answer, ids[own], details[own])
        self._sampler.accept([slot for slot, _ in accepted], [token for _, token in accepted])

    def _go_on(self, answer: _Answer, chosen: list[int], details: list[TokenLogprobs | None]) -> list[tuple[int, int]]:
        """Add the tokens drawn at the end of an answer and after its guesses, as far as those were right.

        Returns:
            Slot and id of each new token, for the penalties of an answer that goes on.
        """
        sequence, sampling = answer.sequence, answer.ticket.request.sampling
        guesses, sequence.guesses = sequence.guesses, []
        base, made = len(sequence.ids), answer.made
        new: list[int] = []
        reason: FinishReason | None = None
        if made >= sampling.max_new_tokens:  # scored only
            self._end(answer, (), (), "length")
            return []
        for index, token in enumerate(chosen):
            if token < 0 or (answer.matcher is not None and not answer.matcher.accept(token)):
                self._fail(answer, _no_token(answer, base + index))
                return []
            new.append(token)
            if token in sampling.stop_ids:
                reason = "stop"
            elif made + len(new) >= sampling.max_new_tokens:
                reason = "length"
            if reason is not None or index >= len(guesses) or guesses[index] != token:
                break
        right = len(new) - 1
        self._guessed, self._right = self._guessed + len(guesses), self._right + right
        if answer.lookup is not None:
            answer.lookup.learn(len(guesses), right, base + len(new))
        sequence.ids += new
        self._scheduler.advance(sequence, len(sequence.ids) - 1)
        given = [part for part in details[: len(new)] if part is not None]
        if reason is None and answer.matcher is not None:
            room = sampling.max_new_tokens - made - len(new)
            forced = self._forced(answer, room) if sampling.logprobs is None else []
            new += forced
            if forced and (forced[-1] in sampling.stop_ids or len(forced) == room):
                reason = "stop" if forced[-1] in sampling.stop_ids else "length"
        if reason is not None:
            self._end(answer, tuple(new), tuple(given), reason)
            return []
        self._made += len(new)
        answer.ticket.steps.append(Step(tuple(new), tuple(given), None, answer.index))
        if answer.lookup is not None and sequence.pending == 1:
            room = sampling.max_new_tokens - answer.made - 1
            sequence.guesses = [token for token in answer.lookup.guess(sequence.ids, room) if token < self._width]
        slot = self._slots[sequence]
        return [(slot, token) for token in new]

    def _forced(self, answer: _Answer, room: int) -> list[int]:
        """Ids that a constraint has follow, appended without being drawn."""
        assert answer.matcher is not None
        taken: list[int] = []
        for token in answer.matcher.forced()[:room]:
            if not answer.matcher.accept(token):
                break
            taken.append(token)
            if token in answer.ticket.request.sampling.stop_ids:
                break
        answer.sequence.ids += taken
        return taken

    def _allowed(self, drawn: list[tuple[_Answer, int, int]], rows: int) -> Tensor | None:
        """Which ids the constraints let follow, after each guess: (N, V); None if there are none."""
        if all(answer.matcher is None for answer, _, _ in drawn):
            return None
        allowed = torch.ones(rows, self._runner.config.vocab_size, dtype=torch.bool)
        row = 0
        for answer, _, count in drawn:
            if answer.matcher is not None:
                answer.matcher.allow(allowed[row])
                steps = 0
                for index, token in enumerate(answer.sequence.guesses):
                    if not answer.matcher.accept(token):
                        break  # what comes after it is not looked at
                    steps += 1
                    answer.matcher.allow(allowed[row + index + 1])
                answer.matcher.rollback(steps)
            row += count
        return allowed.to(self._runner.device)

    def _score(self, answer: _Answer, part: Part, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow those of a part, as far as they are known."""
        if not len(logits):
            return
        top = answer.ticket.request.prompt_logprobs or 0
        first = part.start + 1
        ids = torch.tensor(part.sequence.ids[first : first + len(logits)], device=logits.device)
        found = token_logprobs(logits[: len(ids), : self._width], ids, top)
        chosen, tops, values = (x.tolist() for x in found)
        answer.scores[first - 1 :] = [
            TokenLogprobs(c, tuple(zip(t, v, strict=True))) for c, t, v in zip(chosen, tops, values, strict=True)
        ]

    def _assign(self) -> None:
        """Give each running sequence a slot of the sampler, and take those of the others back."""
        for sequence in [s for s in self._slots if s.state != "running"]:
            self._release(sequence)
        for sequence in self._scheduler.running:
            if sequence not in self._slots:
                answer = self._answers[sequence]
                slot = self._slots[sequence] = self._free.pop()
                request = answer.ticket.request
                prompt, made = sequence.ids[: answer.prompt], sequence.ids[answer.prompt :]
                number = request.answer_number(answer.index)
                self._sampler.set(slot, request.sampling, number=number, prompt=prompt, made=made)
                self._reused += sequence.reused

    def _release(self, sequence: Sequence) -> None:
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._sampler.clear(slot)
            self._free.append(slot)

    def _end(
        self, answer: _Answer, ids: tuple[int, ...], details: tuple[TokenLogprobs, ...], reason: FinishReason
    ) -> None:
        step = Step(ids, details, reason, answer.index)
        if answer.ticket.request.prompt_logprobs is not None and not answer.index:
            step = replace(step, prompt_logprobs=(None, *answer.scores[: answer.prompt - 1]))
        self._made += len(ids)
        self._leave(answer)
        answer.ticket.steps.append(step)

    def _fail(self, answer: _Answer, error: UserError) -> None:
        """End a request with an error; the blocks that it computed are not used again."""
        answer.ticket.error = answer.ticket.error or error
        for other in answer.ticket.answers:
            if other.sequence in self._answers:
                self._leave(other, damaged=True)

    def _leave(self, answer: _Answer, *, damaged: bool = False) -> None:
        for block in self._scheduler.finish(answer.sequence, damaged=damaged):
            self._runner.clear(block)
        self._release(answer.sequence)
        del self._answers[answer.sequence]
        answer.ticket.open -= 1

    # ---- what is going on

    def statistics(self) -> Statistics:
        """Counts since the engine was made, and what there is now."""
        with self._lock:
            scheduler = self._scheduler
            return Statistics(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                steps=scheduler.steps,
                computed=self._computed,
                reused=self._reused,
                made=self._made,
                guessed=self._guessed,
                guessed_right=self._right,
                preemptions=scheduler.preemptions,
                blocks=scheduler.pool.count,
                blocks_free=scheduler.pool.available,
            )

    def check(self) -> None:
        """Assert that no block is lost or held twice, nor any slot."""
        with self._lock:
            self._scheduler.check()
            assert set(self._answers) == {*self._scheduler.running, *self._scheduler.waiting}
            assert len(self._free) + len(self._slots) == self.config.max_sequences


def _batch(parts: list[Part]) -> PagedBatch:
    return PagedBatch(
        ids=[part.ids for part in parts],
        starts=[part.start for part in parts],
        tables=[part.sequence.blocks for part in parts],
        logits=[part.logits for part in parts],
        adapters=[part.sequence.adapter for part in parts],
    )


def _no_token(answer: _Answer, position: int) -> UserError:
    if answer.matcher is not None:
        return UserError(f"nothing that the constraint allows can follow at token {position}")
    return NumericalError(
        f"the logits at token {position} are not finite: the weights or the adapter are damaged, or the precision is "
        "too small for them; try --precision 32-true"
    )
