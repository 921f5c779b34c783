"""Requests in an engine: its limits, the ticket of a request, the answers that are made, and counts of it all."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Request, Step, TokenLogprobs
from lit_llama.generate.engine.scheduler import Sequence
from lit_llama.generate.engine.speculative import Guesser

if TYPE_CHECKING:  # limits are set by doors, whose help has no use for torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    Args:
        max_batch_tokens: Tokens that a step computes, at most.
        max_sequences: Answers that are made at the same time, at most.
        max_waiting: Answers that may wait for their turn.
        prompt_tokens: Tokens of prompts in a step that also continues answers, beside one for each token of those; more
            where many wait. The more they are, the sooner answers begin, and the longer others wait for their next
            token. None for a number that suits the device where answers are streamed, and elsewhere, where nobody
            waits for a token, for as many as the step has room for.
        speculate: Guess tokens from the text so far, which changes no answer where the runner is exact.

    Raises:
        UserError: A limit is below 1, or a step has no room for a token of every answer and one of a prompt.
    """

    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_waiting: int = 100_000
    prompt_tokens: int | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences", "max_waiting"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise UserError(f"prompt_tokens is {self.prompt_tokens}, expected 1 or more")
        if self.max_batch_tokens <= self.max_sequences:
            raise UserError(
                f"max_batch_tokens is {self.max_batch_tokens}, expected more than {self.max_sequences}, max_sequences"
            )


class Matcher(Protocol):
    """Matcher of the tokens that a constraint lets follow, see constraint.py."""

    def allow(self, row: "Tensor") -> None:
        """Write into (V,) of booleans which ids may follow."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by an id; False, and no change, if it may not follow."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last ids back."""
        ...

    def forced(self) -> list[int]:
        """Return the ids that have to follow, none where there is a choice."""
        ...


@dataclass(eq=False)
class Ticket:
    """A request in the engine, and what came of it.

    Attributes:
        request: As it was added.
        steps: What was not taken yet.
        error: Why it failed; nothing comes after.
        open: Answers that go on.
        notify: Called when a step or the end has come, in the thread that computed it; it returns at once.
    """

    request: Request
    steps: deque[Step] = field(default_factory=deque)
    error: UserError | None = None
    open: int = 0
    notify: Callable[[], object] | None = None
    answers: "list[Answer]" = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.open == 0

    def tell(self) -> None:
        """Notify whoever listens."""
        if self.notify is not None:
            self.notify()


@dataclass(eq=False)
class Answer:
    """One of the answers to a request.

    Attributes:
        before: Ids of prompt and answer up to those that the sequence ends with, where some were left out.
        kept: First ids of the sequence that are among `before`, too.
    """

    ticket: Ticket
    index: int
    sequence: Sequence
    matcher: Matcher | None
    prompt: int
    guesser: Guesser | None = None  # of the guesses that are being computed
    scores: list[TokenLogprobs | None] = field(default_factory=list)  # of the prompt
    before: list[int] = field(default_factory=list)
    kept: int = 0

    @property
    def made(self) -> int:
        """Tokens of the answer."""
        return len(self.before) + len(self.sequence.ids) - self.kept - self.prompt

    @property
    def ids(self) -> list[int]:
        """Prompt and answer, whole."""
        return self.before + self.sequence.ids[self.kept :]

    def slide(self, limit: int) -> int:
        """Leave out ids behind the first ones, so that half of what the limit leaves beside those is free again.

        Returns:
            How many.
        """
        ids = self.ids
        kept = min(self.ticket.request.keep, limit // 2, self.prompt)
        tail = (limit - kept) // 2
        dropped = len(self.sequence.ids) - kept - tail
        self.before, self.kept = ids[:-tail], kept
        self.sequence.ids = ids[:kept] + ids[-tail:]
        return dropped


@dataclass(frozen=True)
class Statistics:
    """Counts of what an engine does and has done."""

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
