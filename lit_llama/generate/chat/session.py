"""Requests to a model within a conversation: the prompt of a branch, and an answer that is kept as it comes."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.chat.dialogue import Dialogue, Node, Record
from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.engine import Engine
from lit_llama.generate.engine.request import Overflow, Request, Sampling, Step
from lit_llama.generate.llm import LLM
from lit_llama.generate.questions import fitted_messages
from lit_llama.generate.text_model import Stream
from lit_llama.text.message import Message
from lit_llama.text.prompts.encode import prompt_ids
from lit_llama.text.prompts.teller import opens
from lit_llama.wording import param

SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "stop",
    "seed",
)
"""Fields of `Sampling` that a conversation may have of its own."""
_FLUSH_SECONDS, _FLUSH_CHARACTERS = 0.5, 2000


def sampling_of(default: Sampling, settings: Mapping[str, Any]) -> Sampling:
    """Return the sampling of a conversation: its own settings before those of the program.

    Raises:
        UserError: A value is out of its range.
    """
    own = {name: settings[name] for name in SETTINGS if name in settings}
    if isinstance(own.get("stop"), list):
        own["stop"] = tuple(own["stop"])
    try:
        return replace(default, n=1, **own)
    except TypeError as error:  # a list in place of a number
        raise UserError(f"the settings of the conversation are damaged: {error}") from error


def check_settings(default: Sampling, settings: Mapping[str, Any]) -> None:
    """Find out whether settings can be had.

    Raises:
        UserError: A name is unknown, or a value out of its range.
    """
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"there is no setting {name!r}; there are: {', '.join(SETTINGS)}")
    sampling_of(default, settings)


def changed(sampling: Sampling) -> dict[str, Any]:
    """Return the fields of a sampling that differ from the defaults, as an answer is kept with."""
    defaults = Sampling()
    found = {f.name: getattr(sampling, f.name) for f in fields(sampling) if f.name in SETTINGS}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if value != getattr(defaults, name)
    }


@dataclass(frozen=True)
class Prompt:
    """Ids of the messages that a model reads before it answers.

    Attributes:
        ids: Of the prompt.
        forgotten: The oldest turns that did not fit.
    """

    ids: Sequence[int]
    forgotten: int = 0


def fit(llm: LLM, messages: Sequence[Message], sampling: Sampling, overflow: Overflow = "drop_oldest") -> Prompt:
    """Build the prompt of messages, without the oldest turns beyond what the model reads unless these are an error.

    Raises:
        UserError: The last message does not fit even alone, or the prompt style cannot say something.
    """
    limit = llm.config.context_length - sampling.max_new_tokens
    fitted = fitted_messages(llm, messages, limit, overflow)
    if len(fitted.ids) > limit:
        what = "the message has" if overflow == "drop_oldest" else "the conversation would have"
        raise UserError(
            f"{what} {len(fitted.ids)} tokens, but only {max(limit, 0)} fit beside an answer of "
            f"{param('max_new_tokens', sampling.max_new_tokens)}"
        )
    return Prompt(fitted.ids, fitted.dropped)


def title(text: str) -> str:
    """Return a name for a conversation: the beginning of its first message."""
    words, found = "".join(c if c.isprintable() else " " for c in text).split(), ""
    for word in words:
        if found and len(found) + 1 + len(word) > 40:
            return f"{found} …"
        found = f"{found} {word}".strip()[:60]
    return found or "conversation"


class Steps(Protocol):
    """A request that an engine answers, as `EngineThread.submit` gives it, too."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found computed."""
        ...

    def abort(self) -> None:
        """End it, from any thread."""
        ...

    def __iter__(self) -> Iterator[Step]: ...


class _Own:
    """A request whose steps are computed by whoever iterates."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._ticket = engine, engine.add(request)

    @property
    def cached_tokens(self) -> int:
        return self._ticket.answers[0].sequence.reused

    def abort(self) -> None:
        self._engine.abort(self._ticket)

    def __iter__(self) -> Iterator[Step]:
        return self._engine.follow(self._ticket)


class Answer:
    """An answer on its way: iterating gives its text piece by piece, which is kept as it comes.

    Leaving the iterator, and `stop` from another thread, end the answer; what there is of it stays.

    Args:
        store: Where the conversation is kept.
        conversation: Id of the conversation.
        llm: Who answers.
        sampling: How tokens are drawn.
        text: Message of the user, which is kept with the answer; None where `parent` is the one to be answered.
        parent: The message that the user's follows, or the one to be answered.
        model: Name of the model.
        side: Of a comparison.
        submit: Has an engine answer that a thread drives; None computes while iterating.
        overflow: Beyond what the model reads: refuse the message, or leave out the oldest turns.

    Attributes:
        records: What was kept of it so far, but for its text.
        user: The message that is answered.
        id: Of the answer.
        prompt: What the model reads.
        text: What there is of it so far.
        opened: The prompt ends in the tag that begins thoughts.

    Raises:
        UserError: The message does not fit into what the model reads, even alone; nothing is kept.
        ResourceError: The message cannot be kept, as the disk is full; or too many requests are waiting.
    """

    def __init__(
        self,
        store: Store,
        conversation: str,
        llm: LLM,
        sampling: Sampling,
        *,
        text: str | None,
        parent: int,
        model: str = "",
        side: int = 0,
        submit: Callable[[Request], Steps] | None = None,
        overflow: Overflow = "drop_oldest",
    ) -> None:
        self._store, self._conversation = store, conversation
        dialogue = store.get(conversation)
        messages = [node.message() for node in dialogue.path(parent)] if parent else []
        messages += [] if text is None else [{"role": "user", "content": text}]
        if not messages or messages[-1]["role"] != "user":
            raise UserError("there is no message to be answered")
        self.prompt = fit(llm, messages, sampling, overflow)
        self.opened = opens(llm.tokenizer.decode(list(self.prompt.ids[-16:])))
        siblings = [] if text is not None else dialogue.children(parent)
        again = sum(node.model == model for node in siblings)
        request = llm.request(self.prompt.ids, sampling, number=len(messages) | again << 16)  # other draws in each turn
        llm.engine.check_request(request)
        self.records: list[dict[str, Any]] = []
        self.user, self.id = self._keep(text, parent, model, side, sampling)
        self.text, self.ended = "", False
        self._answer = llm.text_behind(self.prompt.ids, sampling, llm.opening)
        self._start, self._flushed, self._unkept = time.perf_counter(), time.monotonic(), ""
        self._error: ResourceError | None = None
        try:
            self._steps: Steps = submit(request) if submit else _Own(llm.engine, request)
        except Exception:
            self._finish("error", 0)
            raise
        self._pieces = self._run()

    def _keep(self, text: str | None, parent: int, model: str, side: int, sampling: Sampling) -> tuple[int, int]:
        ids = (0, 0)

        def make(dialogue: Dialogue) -> list[dict[str, Any]]:
            nonlocal ids
            now = time.time()
            id, above = dialogue.next_id, parent
            asked = [] if text is None else [message(id, parent, "user", text, now, side)]
            if asked:
                id, above = id + 1, id
            ids = (above, id)
            begun = message(id, above, "assistant", "", now, side)
            begun |= {"opened": True} if self.opened else {}
            self.records = [*asked, begun | {"model": model, "sampling": changed(sampling)}]
            return self.records

        self._store.change(self._conversation, make)
        return ids

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """End the answer where it is."""
        self._pieces.close()
        if not self.ended:  # it was never begun
            self._end("abort")

    def stop(self) -> None:
        """End the answer where it is; whoever iterates gets what there is of it."""
        self._steps.abort()

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return self._answer.tokens

    @property
    def finish_reason(self) -> str | None:
        """Reason why the answer ended; None while it goes on."""
        return self._answer.finish_reason

    @property
    def cut_off(self) -> bool:
        """Whether it ended for being as long as it may be."""
        return self._answer.finish_reason == "length"

    @property
    def seconds(self) -> float:
        """Seconds since the answer was asked for, until it ended."""
        return self._seconds if self.ended else time.perf_counter() - self._start

    def _run(self) -> Generator[str]:
        reason = "abort"
        try:
            for _, piece in Stream(iter(self._steps), self._answer):
                self.text += piece
                self._unkept += piece
                self._flush()
                yield piece
            reason = self._answer.finish_reason or "abort"
        except Exception:
            reason = "error"
            raise
        finally:
            self._end(reason)
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        """Keep what came, now and then."""
        since = time.monotonic() - self._flushed
        if self._unkept and (since > _FLUSH_SECONDS or len(self._unkept) > _FLUSH_CHARACTERS) and not self._error:
            self._write(wait=False)
            self._flushed = time.monotonic()

    def _write(self, *more: Record, wait: bool) -> None:
        text = [{"type": "text", "id": self.id, "text": self._unkept}] if self._unkept else []
        try:
            self._store.write(self._conversation, *text, *more, wait=wait)
            self._unkept, self._error = "", None
        except ResourceError as error:  # told when the answer has been shown
            self._error = error

    def _end(self, reason: str) -> None:
        cached = self._steps.cached_tokens
        self._steps.abort()
        self._finish(reason, cached)

    def _finish(self, reason: str, cached: int) -> None:
        self._seconds, self.ended = time.perf_counter() - self._start, True
        end = {
            "type": "end",
            "id": self.id,
            "finish_reason": reason,
            "tokens": self._answer.tokens,
            "prompt_tokens": len(self.prompt.ids),
            "cached_tokens": cached,
            "forgotten": self.prompt.forgotten,
            "seconds": round(self._seconds, 3),
        }
        self.records.append(end)
        self._write(end, wait=True)


def message(id: int, parent: int, role: str, content: str, now: float, side: int = 0) -> dict[str, Any]:
    """Return the record of a message."""
    record = {"type": "message", "id": id, "parent": parent, "role": role, "content": content, "time": now}
    return record | ({"side": side} if side else {})


def add_system(store: Store, conversation: str, text: str, side: int = 0) -> None:
    """Begin a conversation anew, on another branch, with a system message; or without one where the text is empty."""

    store.change(conversation, lambda dialogue: system_records(dialogue, text, side))


def system_records(dialogue: Dialogue, text: str, side: int = 0) -> list[Record]:
    """Build the records that begin a conversation anew, see `add_system`."""
    if text:
        return [message(dialogue.next_id, 0, "system", text, time.time(), side)]
    return [{"type": "head", "id": 0, "side": side}]


def check_system(llm: LLM, text: str) -> None:
    """Raise UserError if the prompt style has no system message."""
    if text:
        turns = [{"role": "system", "content": text}, {"role": "user", "content": "."}]
        prompt_ids(llm.tokenizer, llm.require_style(), turns)


def context_used(path: Sequence[Node]) -> int:
    """Return the tokens of the last prompt and answer, which the next prompt begins with; 0 if nothing was asked."""
    return next((n.prompt_tokens + n.tokens for n in reversed(path) if n.role == "assistant"), 0)
