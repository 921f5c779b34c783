"""Ids of one answer -> its text, piece by piece, and how it ended."""

from collections.abc import Collection, Generator, Iterator

from lit_llama.generate.engine.request import FinishReason, Sampling, Step
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.special import Place
from lit_llama.text.tokenizer.stream import StopFinder, Streamer


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
