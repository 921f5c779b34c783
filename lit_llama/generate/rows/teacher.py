"""Teachers, who answer the prompts of a recipe: a model of a folder, on our engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lit_llama.errors import UserError
from lit_llama.generate.engine.constraint import Constraint
from lit_llama.generate.engine.engine import Ticket
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.llm import LLM
from lit_llama.generate.text_model import AnswerText
from lit_llama.text.message import Message
from lit_llama.text.prompts.encode import Cutter, for_style, ids_of, prompt_ids, rendered

Key = tuple[int, str]
"""Number of the attempt, and name of the column."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A prompt of a column.

    Args:
        messages: The conversation so far; with `user_turn`, up to where the user begins.
        sampling: How answers are drawn.
        schema: JSON schema that they keep to.
        user_turn: The user's words are wanted, not the assistant's.
    """

    messages: tuple[Message, ...]
    sampling: Sampling
    schema: Mapping[str, Any] | None = None
    user_turn: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Answers to a prompt.

    Attributes:
        texts: One for each of `n`.
        finish_reasons: stop or length of each.
        tokens: Of all of them.
        prompt_tokens: Of the prompt.
        error: Why there are none.
    """

    texts: Sequence[str] = ()
    finish_reasons: Sequence[str] = ()
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""


class Teacher(Protocol):
    """Teacher, who takes prompts in and gives replies in any order."""

    name: str
    identity: str
    seeded: bool
    """Whether the same prompt with the same seed has the same answer."""

    def check(self, ask: Ask) -> None:
        """Raise UserError for what it cannot do, before anything runs."""
        ...

    def add(self, key: Key, ask: Ask) -> None:
        """Take a prompt in; its number for the draws is that of the attempt."""
        ...

    def wait(self) -> list[tuple[Key, Reply]]:
        """Work, or wait, until there may be replies; return those that there are."""
        ...

    def close(self) -> None:
        """Give up what is not answered."""
        ...


@dataclass
class _Open:
    ticket: Ticket
    texts: list[AnswerText]
    parts: list[str]
    prompt: int


@dataclass(kw_only=True)
class LocalTeacher:
    """A model of a folder.

    Args:
        llm: It.
        name: For people.
        identity: Of its weights.
    """

    llm: LLM
    name: str
    identity: str
    seeded: bool = True
    _open: dict[Key, _Open] = field(default_factory=dict)
    _refused: list[tuple[Key, Reply]] = field(default_factory=list)
    _constraints: dict[int, tuple[Any, Constraint]] = field(default_factory=dict)

    def check(self, ask: Ask) -> None:
        """Refuse what the model cannot be asked for."""
        self.llm.require_style()
        if ask.schema is not None:
            self._constraint(ask.schema)

    def add(self, key: Key, ask: Ask) -> None:
        """Submit a prompt to the engine."""
        llm, engine = self.llm, self.llm.engine
        try:
            request, texts = self._request(key, ask)
            ticket = engine.add(request)
        except UserError as error:  # too long, mostly: the others go on
            self._refused.append((key, Reply(error=str(error))))
            return
        assert llm.tokenizer is not None
        self._open[key] = _Open(ticket, texts, [""] * request.sampling.n, len(request.ids))

    def _request(self, key: Key, ask: Ask) -> tuple[Request, list[AnswerText]]:
        llm = self.llm
        style = llm.require_style()
        ids = opening_ids(llm, ask.messages) if ask.user_turn else prompt_ids(llm.tokenizer, style, ask.messages)
        constraint = None if ask.schema is None else self._constraint(ask.schema)
        request = llm.request(ids, ask.sampling, number=key[0], constraint=constraint)
        opening = "" if ask.user_turn else llm.opening
        return request, [llm.text_behind(ids, request.sampling, opening) for _ in range(request.sampling.n)]

    def _constraint(self, schema: Mapping[str, Any]) -> Constraint:
        if id(schema) not in self._constraints:  # the recipe keeps them
            self._constraints[id(schema)] = (schema, self.llm.constraint(json_schema=schema))
        return self._constraints[id(schema)][1]

    def wait(self) -> list[tuple[Key, Reply]]:
        """Step the engine, and return the replies that there are."""
        found, self._refused = self._refused, []
        if found or not self._open:
            return found
        engine = self.llm.engine
        engine.step()
        for key, own in list(self._open.items()):
            while own.ticket.steps:
                step = own.ticket.steps.popleft()
                text = own.texts[step.answer]
                own.parts[step.answer] += text.take(step)
                if text.is_before(step):  # at a stop text
                    engine.abort(own.ticket, step.answer)
            if own.ticket.done and not own.ticket.steps:
                del self._open[key]
                found.append((key, _reply(own)))
        return found

    def close(self) -> None:
        """Abort the requests that are still open."""
        for own in self._open.values():
            self.llm.engine.abort(own.ticket)
        self._open.clear()


def _reply(own: _Open) -> Reply:
    tokens = sum(text.tokens for text in own.texts)
    if own.ticket.error is not None:
        return Reply(error=str(own.ticket.error), tokens=tokens, prompt_tokens=own.prompt)
    reasons = [text.finish_reason or "abort" for text in own.texts]
    return Reply(texts=own.parts, finish_reasons=reasons, tokens=tokens, prompt_tokens=own.prompt)


def opening_ids(llm: LLM, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where the user begins to write.

    Raises:
        CheckpointError: There is no prompt style.
    """
    style = llm.require_style()
    tokenizer = for_style(llm.tokenizer, style)
    word = "WORDS"
    told = rendered(tokenizer, style, [*messages, {"role": "user", "content": word}], answer=True)
    last = max(index for index, segment in enumerate(told.segments) if word in segment.text and not segment.template)
    return ids_of(tokenizer, Cutter(tokenizer).runs(told.segments[:last]))
