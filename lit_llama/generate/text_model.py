"""Text in, text out: prompts to a model, and the ids of each answer -> its text, piece by piece, and how it ended."""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, overload

from lit_llama.errors import NumericalError, UserError
from lit_llama.generate.engine.request import FinishReason, Overflow, Sampling, Step
from lit_llama.generate.flags import Asked
from lit_llama.settings import check_names, names_of
from lit_llama.text.message import Conversation, headed, instruct
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import Place
from lit_llama.text.tokenizer.stream import StopFinder, Streamer

if TYPE_CHECKING:
    from lit_llama.generate.llm import LLM
    from lit_llama.generate.metrics import Answer


class AnswerText:
    """The text of an answer as its tokens come.

    Neither the stop id that ends it nor anything from a stop text on is part of it.

    Args:
        tokenizer: That of the model.
        sampling: With the limit and the stop texts.
        stop_ids: An answer ends with any of these.
        opening: Text that answers begin with and that is not shown.
        place: Where the answer stands: behind the text of a prompt, or behind a control token.

    Attributes:
        tokens: Ids so far, the stop id included.
        dropped: Oldest tokens of prompt and answer that the model does not see any more.
        finish_reason: None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: Sampling,
        stop_ids: Collection[int],
        opening: str = "",
        place: Place = Place.MORE,
    ) -> None:
        self._streamer, self._finder = Streamer(tokenizer, place), StopFinder(sampling.stop)
        self._limit, self._least = sampling.max_new_tokens, sampling.min_new_tokens
        # A stop text that spells a control token is never seen as text.
        self._stop_ids = {*stop_ids, *(tokenizer.control[text] for text in sampling.stop if text in tokenizer.control)}
        self._opening = opening
        self.tokens = self.dropped = 0
        self.finish_reason: FinishReason | None = None

    @property
    def stop_ids(self) -> Collection[int]:
        """Ids given as stops, and the control tokens that stop texts spell."""
        return self._stop_ids

    @property
    def ended(self) -> bool:
        """Whether nothing more belongs to it."""
        return self.finish_reason is not None

    def is_before(self, step: Step) -> bool:
        """Whether it has ended, and the engine, whose last step this is, does not know."""
        return self.ended and step.finish_reason is None

    def take(self, step: Step) -> str:
        """Return the text that became certain with a step of the engine; what comes after the end is left out."""
        text = ""
        if self.ended:
            return text
        for token in step.ids:
            if not self.ended:
                text += self.push(token)
        self.dropped += step.dropped
        return text + self.abort() if step.finish_reason == "abort" and not self.ended else text

    def push(self, token: int) -> str:
        """Return the text that became certain with a token; all that is left where it ends the answer."""
        self.tokens += 1
        stopped, last = token in self._stop_ids, self.tokens >= self._limit
        text = "" if stopped else self._shown(self._streamer.push([token]))
        if stopped or last:
            text += self._shown(self._streamer.flush())
        if stopped or self._finder.found:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
        return text if self.finish_reason is None else text + self._finder.flush()

    def abort(self) -> str:
        """Give up waiting for more: what was held back is text."""
        self.finish_reason = "abort"
        return self._shown(self._streamer.flush()) + self._finder.flush()

    def _shown(self, text: str) -> str:
        if text and self._opening:
            text, self._opening = text.removeprefix(self._opening), ""
        return self._finder.push(text) if self.tokens > self._least else text


class Stream:
    """An answer as it comes: iterating gives (new ids, text that became certain with them).

    Attributes:
        text: How it ended, once it has: `text.finish_reason`; and how many tokens it has.
    """

    def __init__(self, steps: Iterator[Step], text: AnswerText) -> None:
        self.text = text
        self._pieces = self._run(steps)

    def __iter__(self) -> Iterator[tuple[list[int], str]]:
        return self._pieces

    def close(self) -> None:
        """End the answer where it is."""
        self._pieces.close()

    def _run(self, steps: Iterator[Step]) -> Generator[tuple[list[int], str]]:
        for step in steps:
            yield list(step.ids), self.text.take(step)
            if self.text.finish_reason is not None:
                return


Messages = Sequence[Mapping[str, Any]]
"""Turns of a conversation: {"role": "system" | "user" | "assistant" | "tool", "content": text} each."""
_ROLES = ("system", "user", "assistant", "tool")


class TextStream:
    """An answer as it comes: iterating gives pieces of its text.

    Attributes:
        text: All pieces so far.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.text = ""
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def finish_reason(self) -> FinishReason | None:
        """Reason why it ended: stop, or length where it was cut off at max_new_tokens; None while it goes on."""
        return self._stream.text.finish_reason

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._stream.text.tokens

    def close(self) -> None:
        """End the answer where it is."""
        self._stream.close()

    def _run(self) -> Iterator[str]:
        for _, piece in self._stream:
            self.text += piece
            if piece:
                yield piece


class TextModel:
    """Methods of an LLM that take and give texts.

    Where a call does not say how tokens are drawn, the folder's generation_config.json does, and where that is silent,
    too, the most likely token is taken.
    """

    @overload
    def generate(self, prompt: str, sampling: Sampling | None = None, **more: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], sampling: Sampling | None = None, **more: Any) -> list[str]: ...

    def generate(self, prompt: str | Sequence[str], sampling: Sampling | None = None, **more: Any) -> str | list[str]:
        """Answer an instruction, or several at once.

        Args:
            prompt: One or a list; each is put to the model in the style that it was trained with.
            sampling: How tokens are drawn; single settings of `Sampling`, such as temperature=0.7, come first.
            more: system, raw and overflow as for `answers`, and settings of `Sampling`.

        Raises:
            UserError: A prompt is too long for the model, or a setting out of its range.
            CheckpointError: The folder does not say how it is asked; raw=True continues a text.
            NumericalError: The model gives numbers that are not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [answer.text for answer in _checked(self.answers(prompts, sampling, **more))]
        return texts[0] if isinstance(prompt, str) else texts

    def chat(self, messages: Messages | str, sampling: Sampling | None = None, **more: Any) -> str:
        """Answer the last of several messages; errors as for `generate`.

        Args:
            messages: {"role": ..., "content": ...} each, from the first on; or one message of the user.
            sampling: As for `generate`.
            more: As for `generate`, and tools, the functions that may be called, as chat templates take them.
        """
        return _checked(self.answers([messages], sampling, **more))[0].text

    def answers(
        self,
        prompts: Sequence[str | Messages],
        sampling: Sampling | None = None,
        *,
        system: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        raw: bool = False,
        overflow: Overflow = "error",
        **settings: Any,
    ) -> "list[Answer]":
        """Answer several prompts at once; of each answer its text, whether it stopped, and its number of tokens.

        Draws depend on the seed and the place of a prompt in the list, so that one that stands there twice gets two.

        Args:
            prompts: Instructions, or messages of conversations.
            sampling: As for `generate`.
            system: System message of prompts that have none of their own.
            tools: Functions that may be called.
            raw: Continue the prompts as they stand, without any style around them.
            overflow: Beyond what the model reads: error refuses; drop_oldest leaves out the oldest turns or tokens.
            settings: Of `Sampling`.

        Returns:
            In the order of the prompts. One that failed has its `error`, and the others go on.
        """
        from lit_llama.generate.answer import answer_all, answer_requests, raw_ids
        from lit_llama.generate.questions import fitted_text, room

        llm = cast("LLM", self)
        drawn = _drawn(llm, sampling, settings)
        if not raw:
            asked = [_conversation(prompt, tools, row) for row, prompt in enumerate(prompts)]
            return answer_all(llm, asked, drawn, system, overflow)
        requests = []
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise UserError("raw continues texts, but a prompt is a conversation; leave raw out")
            fitted = fitted_text(llm, raw_ids(llm, prompt, False), room(llm, drawn), overflow)
            requests.append(llm.request(fitted.ids, drawn, number=row, overflow=overflow, keep=fitted.keep))
        for request in requests:
            llm.engine.check_request(request)
        return [answer for made in answer_requests(llm, requests, opening="") for answer in made]

    def stream_text(
        self,
        prompt: str | Messages,
        sampling: Sampling | None = None,
        *,
        system: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        raw: bool = False,
        overflow: Overflow = "error",
        **settings: Any,
    ) -> TextStream:
        """Answer one prompt as it is made; parameters and errors as for `answers`, the latter at once."""
        from lit_llama.generate.answer import raw_ids
        from lit_llama.generate.questions import fitted_messages, fitted_text, room

        llm = cast("LLM", self)
        drawn = _drawn(llm, sampling, settings)
        if raw and isinstance(prompt, str):
            fitted = fitted_text(llm, raw_ids(llm, prompt, False), room(llm, drawn), overflow)
            return TextStream(llm.stream(fitted.ids, drawn, overflow=overflow, keep=fitted.keep))
        asked = _conversation(prompt, tools, 0)
        fitted = fitted_messages(llm, headed(asked.prompt, system), room(llm, drawn), overflow, asked.tools)
        return TextStream(llm.answer(fitted.ids, drawn, overflow=overflow, keep=fitted.keep))

    def close(self) -> None:
        """End what is being answered, and let go of the model; nothing can be asked any more."""
        cast("LLM", self).engine.release()
        object.__setattr__(self, "model", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drawn(llm: "LLM", sampling: Sampling | None, settings: Mapping[str, Any]) -> Sampling:
    """The sampling of single settings first, then of `sampling`, or else of the folder."""
    if llm.engine.closed:
        raise UserError("the model is closed; load it again")
    check_names(settings, names_of(Sampling), "a setting of Sampling")
    asked = Asked(settings, sampling or Sampling())
    if (n := asked.alone().n) != 1:
        raise UserError(f"n is {n}, expected 1: for several answers, name the prompt as often in a list")
    return asked.alone() if sampling else asked.over(llm.defaults)


def _conversation(prompt: str | Messages, tools: Sequence[Mapping[str, Any]], row: int) -> Conversation:
    """A prompt as a conversation whose last turn is to be answered."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("the prompt is empty, expected an instruction")
        return Conversation(instruct(prompt).messages, row, tools=tuple(tools))
    for number, message in enumerate(prompt):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise UserError(
                f"message {number} is {str(message)[:80]}, expected a role ({', '.join(_ROLES)}) and content"
            )
        if not isinstance(message.get("content", ""), str):
            raise UserError(f"the content of message {number} is {str(message['content'])[:80]}, expected text")
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        found = prompt[-1]["role"] if prompt else "none"
        raise UserError(f"the last message is of the role {found}, expected one that can be answered: user or tool")
    return Conversation(tuple({"content": ""} | dict(message) for message in prompt), row, tools=tuple(tools))


def _checked(answers: "list[Answer]") -> "list[Answer]":
    """Answers of which none failed."""
    for number, answer in enumerate(answers):
        if answer.error is not None:
            raise NumericalError(f"answer {number} failed: {answer.error}")
    return answers
