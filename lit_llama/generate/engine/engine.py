"""The engine: requests come and go while it runs, and each gets the answer that it would get alone.

It knows ids only. `step` computes one step of all running sequences; one thread at a time owns the model, and requests
may be added and aborted from any. Where the runner is exact, a greedy or seeded answer is the same bytes alone and in
company, after a prefix that was found computed, and after having been put off.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.engine.cache import BlockPool
from lit_llama.generate.engine.drawing import Answers, Drawing
from lit_llama.generate.engine.request import Request, Step
from lit_llama.generate.engine.runner import Runner
from lit_llama.generate.engine.scheduler import Part, Plan, QueueFull, Scheduler, Sequence
from lit_llama.generate.engine.speculative import Guesser, PromptLookups, check_takes_back
from lit_llama.generate.engine.ticket import Answer, Statistics
from lit_llama.generate.engine.ticket import EngineConfig as EngineConfig
from lit_llama.generate.engine.ticket import Ticket as Ticket
from lit_llama.memory import ran_out
from lit_llama.model.kernels.paged import BLOCK, PagedBatch
from lit_llama.model.kernels.trained import Factors
from lit_llama.wording import param

PROMPT_TOKENS = {"cpu": 96, "gpu": 256}
"""Prompt tokens beside those of answers that are streamed. A CPU computes about thirty tokens while it reads the
weights once, so that a step takes at most about four times as long as without prompts; a GPU some hundreds."""


class Engine:
    """Continuous batching over a runner.

    Args:
        runner: The model and its cache.
        tokens: Size of the tokenizer; ids from there on pad the embedding and are never drawn.
        config: Limits.

    Attributes:
        runner: As given.
        default_adapter: Name of the adapter of requests that name none.
    """

    def __init__(self, runner: Runner, *, tokens: int | None = None, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.runner, self._tokens = runner, tokens
        vocabulary = runner.config.vocab_size
        windows = [runner.config.window(layer) for layer in range(runner.config.num_hidden_layers)]
        window = None if None in windows else max(w for w in windows if w is not None)
        self._scheduler = Scheduler(
            BlockPool(runner.blocks, BLOCK),
            max_batch_tokens=self.config.max_batch_tokens,
            max_sequences=self.config.max_sequences,
            max_waiting=self.config.max_waiting,
            window=window,
            reuses=not runner.config.recurrent_layers,
        )
        guesses = self.config.speculate and not runner.config.recurrent_layers  # which cannot be taken back
        guessers: list[Guesser] = [PromptLookups()] if guesses else []
        self._answers = Answers(self._scheduler, runner, tokens, guessers)
        self._drawing = Drawing(self._scheduler, self._answers, vocabulary, tokens)
        self._adapters: set[str] = set()
        self.default_adapter: str | None = None
        self._computed = 0
        suits = PROMPT_TOKENS["cpu" if runner.device.type == "cpu" else "gpu"]
        self._prompt_tokens = self.config.prompt_tokens or suits
        self._lock = threading.RLock()
        self.closed = False

    # ---- requests

    def add(self, request: Request, notify: Callable[[], object] | None = None) -> Ticket:
        """Take a request in; its first step comes with one of the next calls of `step`.

        Args:
            request: What is asked.
            notify: See `Ticket.notify`.

        Raises:
            UserError: It cannot be answered: an id that is no token, an unknown adapter, longer than the model reads or
                the cache holds.
            ResourceError: Too many requests are waiting.
        """
        with self._lock:
            if request.adapter is None and self.default_adapter is not None:
                request = replace(request, adapter=self.default_adapter)
            self.check_request(request)
            ticket = Ticket(request, notify=notify)
            sampling = request.sampling
            first: Sequence | None = None
            bound, scaling = len(request.ids) + sampling.max_new_tokens, self.runner.config.rope_scaling
            long = scaling is not None and scaling.turns_long(bound)
            for index in range(sampling.n):
                scored = None
                if request.prompt_logprobs is not None and index == 0:
                    scored = max(request.scored_from - 1, 0)  # whose logits tell of the token behind it
                sequence = Sequence(
                    ids=list(request.ids),
                    adapter=request.adapter,
                    bound=bound,
                    long=long,
                    priority=-request.priority,
                    scored=scored,
                    source=first,
                )
                first = first or sequence
                matcher = None if request.constraint is None else request.constraint.matcher()
                ticket.answers.append(Answer(ticket, index, sequence, matcher, len(request.ids)))
            try:
                self._answers.add(ticket)
            except QueueFull:
                raise ResourceError(
                    f"{len(self._scheduler.waiting)} requests are waiting, of at most {self.config.max_waiting}; try "
                    "again later"
                ) from None
            return ticket

    def check_request(self, request: Request) -> None:
        """Raise UserError if a request could not be answered, whatever else is there."""
        if self.closed:
            raise UserError("the engine is closed")
        vocabulary = self.runner.config.vocab_size
        if wrong := [token for token in request.ids if token >= vocabulary]:
            raise UserError(f"the prompt holds the id {wrong[0]}, but the model has {vocabulary} tokens")
        if request.adapter is not None and request.adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise UserError(f"there is no adapter {request.adapter!r}; loaded are: {known}")
        sampling = request.sampling
        if not sampling.max_new_tokens and request.prompt_logprobs is None:
            raise UserError("is 0, expected 1 or more where the prompt is not scored", parameter="max_new_tokens")
        reads, holds = self.runner.config.context_length, self.runner.blocks * BLOCK
        longest = len(request.ids) + (sampling.max_new_tokens if request.overflow == "error" else 1)
        if longest > self._answers.longest:
            whose = f"{reads} the model reads" if longest > reads else f"{holds} that the memory of the cache holds"
            raise UserError(
                f"the prompt has {len(request.ids)} tokens; with "
                f"{param('max_new_tokens', longest - len(request.ids))} that is "
                f"more than the {whose}: shorten the prompt or the answer"
            )

    def abort(self, ticket: Ticket, answer: int | None = None) -> None:
        """End a request, or one of its answers, whatever its state; what goes on ends with the reason `abort`."""
        with self._lock:
            for own in () if self.closed else ticket.answers if answer is None else [ticket.answers[answer]]:
                if own.sequence in self._answers.live:
                    self._answers.end(own, (), (), "abort")

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
        """Yield the steps of a request, computing as long as nothing is there.

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
            self.step(streamed=True)

    def abort_all(self) -> None:
        """End every request that is there."""
        with self._lock:
            for answer in list(self._answers.live.values()):
                self._answers.end(answer, (), (), "abort")

    def close(self) -> None:
        """Abort everything and take nothing in any more."""
        with self._lock:
            if not self.closed:
                self.abort_all()
            self.closed = True

    def release(self) -> None:
        """Close, and let go of model and cache, whose memory is free as soon as nobody else holds them."""
        with self._lock:
            self.close()
            for held in ("runner", "_answers", "_drawing", "_scheduler"):
                self.__dict__.pop(held, None)

    # ---- adapters

    def add_adapter(self, name: str, factors: dict[str, Factors]) -> None:
        """Make an adapter known by a name.

        Raises:
            UserError: The name is taken, or the runner cannot have it.
        """
        with self._lock:
            if name in self._adapters:
                raise UserError(f"adapter {name!r} is loaded already; drop it first")
            self.runner.add_adapter(name, factors)
            self._adapters.add(name)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; the requests that use it are aborted.

        Raises:
            UserError: There is none of this name.
        """
        with self._lock:
            if name not in self._adapters:
                raise UserError(f"there is no adapter {name!r}")
            for answer in [a for a in self._answers.live.values() if a.sequence.adapter == name]:
                self._answers.end(answer, (), (), "abort")
            self._adapters.remove(name)
            self._scheduler.pool.forget_adapter(name)
            self.runner.remove_adapter(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return sorted(self._adapters)

    def add_guesser(self, guesser: Guesser) -> None:
        """Add a guesser of tokens, asked where those before it guess nothing.

        Raises:
            UserError: The model cannot take guesses back.
        """
        check_takes_back(self.runner.config)
        with self._lock:
            self._answers.guessers.append(guesser)

    # ---- a step

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return not self.closed and self._scheduler.busy

    def step(self, *, streamed: bool = False) -> None:
        """Compute one step; what comes of it is put into the tickets. Does nothing if no request is there.

        Args:
            streamed: Somebody waits for each token, so that prompts must not hold answers up, see
                `EngineConfig.prompt_tokens`.
        """
        with self._lock, torch.inference_mode():
            if self.closed:
                return
            plan = self._scheduler.plan(self._prompt_tokens if streamed else self.config.prompt_tokens)
            if not plan.parts:
                return
            try:
                for source, destination in plan.copies:
                    self.runner.copy(source, destination)
                parts = sorted(plan.parts, key=lambda part: part.sequence.adapter or "")
                logits = self.runner.logits(_batch(parts))
            except (MemoryError, RuntimeError) as error:
                self._restart(plan)
                if not ran_out(error):
                    raise
                self._answers.fail(
                    self._answers.live[max((part.sequence for part in plan.parts), key=lambda s: s.order)],
                    ResourceError("there was not enough memory for this request; the others go on"),
                )
                return
            except BaseException:
                self._restart(plan)
                raise
            self._computed += sum(len(part.ids) for part in parts)
            self._drawing.take(parts, logits)

    def _restart(self, plan: Plan) -> None:
        """Have what a step would have computed be computed again, as parts of it may be missing."""
        for part in plan.parts:
            self._scheduler.restart(part.sequence)

    # ---- what is going on

    def trim(self) -> int:
        """Forget what is known of prompts that are not being answered, and give its memory back to the system.

        Returns:
            Bytes that hold nothing now, whether they were used before or not: none on a GPU, or outside Linux.
        """
        with self._lock:
            given = self.runner.reclaim(self._scheduler.pool.trim())
            return given + sum(guesser.trim() for guesser in self._answers.guessers)

    def statistics(self) -> Statistics:
        """Return counts since the engine was made, and what there is now; amid a step, some of them are of before."""
        scheduler = self._scheduler  # without the lock, which is held as long as a step takes
        return Statistics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            steps=scheduler.steps,
            computed=self._computed,
            reused=self._answers.reused,
            made=self._answers.made,
            guessed=self._drawing.guessed,
            guessed_right=self._drawing.right,
            preemptions=scheduler.preemptions,
            blocks=scheduler.pool.count,
            blocks_free=scheduler.pool.available,
        )

    def check(self) -> None:
        """Assert that no block is lost or held twice, nor any slot."""
        with self._lock:
            self._scheduler.check()
            self._answers.check()


def _batch(parts: list[Part]) -> PagedBatch:
    return PagedBatch(
        ids=[part.ids for part in parts],
        starts=[part.start for part in parts],
        tables=[part.sequence.blocks for part in parts],
        logits=[part.logits for part in parts],
        adapters=[part.sequence.adapter for part in parts],
        bounds=[part.sequence.bound for part in parts],
        slots=[part.sequence.slot for part in parts],
    )
