"""Requests in an engine: its limits, the ticket of a request, the answers that are made, and counts of it all."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Request, Step, TokenLogprobs
from lit_llama.generate.engine.scheduler import Sequence
from lit_llama.generate.engine.speculative import PromptLookup

if TYPE_CHECKING:  # limits are set by doors, whose help has no use for torch
    from torch import Tensor


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
