"""Ids -> text as they come."""

from collections.abc import Iterable

from lit_llama.text.places import Place
from lit_llama.text.tokenizer import Tokenizer


class Streamer:
    """Turns ids into text as they come, holding back what later ids may still change.

    A character of several bytes may be spread over several ids, and a tokenizer may drop a leading space: a piece is
    given out only once it is valid and its text no longer depends on what follows.

    Args:
        tokenizer: Whose ids they are.
        place: Where the text stands, as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, place: Place = Place.START) -> None:
        self._tokenizer = tokenizer
        self._ids = list(tokenizer.lead_in(place))
        self._context, self._given = 0, len(self._ids)

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain."""
        self._ids.extend(ids)
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        text = self._tokenizer.decode(self._ids[self._context :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """What is left, valid or not."""
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        text = self._tokenizer.decode(self._ids[self._context :])
        self._context = self._given = len(self._ids)
        return text[len(before) :]
