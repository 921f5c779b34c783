"""Answers of a request of the wire while the engine makes them: text, calls and log-probabilities, piece by piece."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from lit_llama.errors import NumericalError, ResourceError, UserError
from lit_llama.generate.engine.request import Step, TokenLogprobs
from lit_llama.generate.engine.worker import EngineFailed, EngineThread, Handle
from lit_llama.generate.serve.fields import ApiError
from lit_llama.generate.serve.requests import Asked
from lit_llama.generate.serve.tools import Piece
from lit_llama.generate.text_model import AnswerText
from lit_llama.wording import param

PING = 15.0
"""Seconds of silence after which a stream says that it is alive."""


@dataclass(frozen=True, slots=True)
class Part:
    """Next part of an answer.

    Attributes:
        choice: Which one, over all prompts.
        pieces: Thoughts, content and calls.
        tokens: Ids with their log-probabilities, where those are wanted.
        finish: How it ended, None while it goes on.
    """

    choice: int
    pieces: tuple[Piece, ...]
    tokens: tuple[tuple[int, TokenLogprobs], ...] = ()
    finish: str | None = None


class _Choice:
    """One of the answers."""

    def __init__(self, asked: Asked, index: int, prompt: int) -> None:
        request = asked.requests[prompt]
        self.index, self._asked = index, asked
        self.text: AnswerText = asked.llm.text_behind(request.ids, request.sampling, asked.opening)
        self._reader = asked.reader() if asked.reader else None
        self._thoughts = asked.thoughts() if asked.thoughts else None
        self._scored = request.sampling.logprobs is not None
        self._waiting: deque[tuple[int, TokenLogprobs, int]] = deque()  # with where their text begins
        self._first = True
        self._end = self._given = 0  # bytes of tokens, and of the text that was given

    def take(self, step: Step) -> Part | None:
        """What a step brings; None if nothing can be told yet."""
        before, ended = self.text.tokens, self.text.ended
        text = self.text.take(step)
        if ended:
            return None
        tokens = self._tokens(step, self.text.tokens - before, text) if self._scored else ()
        finish: str | None = self.text.finish_reason
        pieces = self._pieces(text, finish is not None)
        finish = "tool_calls" if finish == "stop" and self._reader and self._reader.calls else finish
        return Part(self.index, tuple(pieces), tokens, finish) if pieces or tokens or finish else None

    def _pieces(self, text: str, end: bool) -> list[Piece]:
        """Thoughts, content and calls that became certain."""
        pieces: list[Piece] = []
        if self._thoughts is not None:
            parts = [self._thoughts.push(text), *([self._thoughts.flush()] if end else [])]
            thoughts, text = ("".join(side) for side in zip(*parts, strict=True))
            pieces = [Piece(thoughts=thoughts)] if thoughts else []
        if self._reader is None:
            return [*pieces, Piece(content=text)] if text else pieces
        return [*pieces, *self._reader.push(text), *(self._reader.flush() if end else [])]

    def _tokens(self, step: Step, count: int, text: str) -> tuple[tuple[int, TokenLogprobs], ...]:
        """The tokens of the text that was given."""
        parts, opening = self._asked.llm.token_bytes, self._asked.opening.encode()
        first = self._first and bool(step.ids)
        self._first = self._first and not step.ids
        if first and opening and parts[step.ids[0]].startswith(opening):
            self._end = -len(opening)
        for token, scores in zip(step.ids[:count], step.logprobs, strict=False):
            self._waiting.append((token, scores, self._end))
            self._end += len(parts[token])
        self._given += len(text.encode("utf-8", "surrogatepass"))
        finish = self.text.finish_reason
        if finish == "stop" and self._waiting and self._waiting[-1][0] in self.text.stop_ids:
            self._waiting.pop()
            finish = "length"  # all others are of the text
        found = []
        while self._waiting and (self._waiting[0][2] < self._given or finish in ("length", "abort")):
            token, scores, _ = self._waiting.popleft()
            found.append((token, scores))
        return tuple(found)


@dataclass
class Running:
    """The answers of a request, being made; `parts` gives them, and closing that ends them.

    Args:
        asked: The request.
        worker: What makes them.
        seconds: They may take.

    Attributes:
        prompt_logprobs: Of each prompt whose scores have come, by its number.
        first: When the first part came, as `time.monotonic` has it.
    """

    asked: Asked
    worker: EngineThread
    seconds: float
    prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    _handles: list[Handle] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = self.asked.sampling.n
        self._choices = [_Choice(self.asked, index, index // n) for index in range(self.asked.choices)]

    def submit(self) -> None:
        """Hand the request to the engine.

        Raises:
            ApiError: It takes nothing in, or not this.
        """
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        try:
            for request in self.asked.requests:
                self._handles.append(self.worker.submit(request, self._notify))
        except BaseException as error:
            self.abort()
            raise failure(error) from error

    def _notify(self) -> None:
        self._loop.call_soon_threadsafe(self._news.set)

    def abort(self) -> None:
        """End what is not made yet."""
        for handle in self._handles:
            handle.listen(None)
            handle.abort()

    async def parts(self) -> AsyncIterator[Part | None]:
        """Yield the parts of the answers, and None from time to time where nothing comes.

        Raises:
            ApiError: They failed, or took too long.
        """
        n, open_ = self.asked.sampling.n, dict(enumerate(self._handles))
        try:
            while open_:
                self._news.clear()
                for number, handle in list(open_.items()):
                    for step in handle.take():
                        if (part := self._part(number, n, handle, step)) is not None:
                            yield part
                    if handle.done:
                        handle.take()  # raises what ended it
                        del open_[number]
                if open_ and not await self._more():
                    yield None
        except (UserError, EngineFailed) as error:
            raise failure(error) from error
        finally:
            self.abort()

    def _part(self, number: int, n: int, handle: Handle, step: Step) -> Part | None:
        self.first = self.first or time.monotonic()
        if step.prompt_logprobs:
            self.prompt_logprobs[number] = step.prompt_logprobs
        choice = self._choices[number * n + step.answer]
        if step.finish_reason == "abort" and not choice.text.ended:
            raise ApiError(503, "the server is stopping, and the answer was ended")
        part = choice.take(step)
        if choice.text.is_before(step):  # at a stop text
            handle.abort(step.answer)
        return part

    async def _more(self) -> bool:
        """Wait for news; False if there are none for a while."""
        left = self.started + self.seconds - time.monotonic()
        if left <= 0:
            raise ApiError(504, f"the answer took longer than {self.seconds:g} seconds")
        try:
            await asyncio.wait_for(self._news.wait(), min(left, PING))
        except TimeoutError:
            return False
        return True

    @property
    def made(self) -> int:
        """Tokens of answers so far."""
        return sum(choice.text.tokens for choice in self._choices)

    def usage(self) -> dict[str, Any]:
        """Count tokens as OpenAI does: those that end an answer are among them, and a prompt counts once."""
        prompt = sum(len(request.ids) for request in self.asked.requests)
        cached = sum(handle.cached_tokens for handle in self._handles)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.made,
            "total_tokens": prompt + self.made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _as_asked(text: str) -> str:
    """A text about a request, whose parameter has another name."""
    return text.replace(param("max_new_tokens"), "max_tokens").replace("max_new_tokens", "max_tokens")


def failure(error: BaseException) -> BaseException:
    """Return an error of the engine as it is told to a client."""
    if isinstance(error, EngineFailed):
        return ApiError(500, "the model failed; the server's log says more")
    if isinstance(error, NumericalError):
        return ApiError(500, str(error).split(";")[0])
    if isinstance(error, ResourceError):
        return ApiError(503, str(error), headers={"Retry-After": "1"})
    if isinstance(error, UserError):
        return ApiError(400, _as_asked(str(error)))
    return error
