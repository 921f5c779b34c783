"""Ids -> text: as they come, up to the texts that end an answer, and the bytes that each token adds."""

import re
from collections.abc import Iterable
from typing import Any

from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.quick import CHARACTERS
from lit_llama.text.tokenizer.special import Place

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of every id where it goes on with a text.

    Control tokens, the token for what is unknown, and ids that stand for nothing add none. The blank that
    sentencepiece encodes behind an added word, and leaves out of the text again, counts.
    """
    silent = {*tokenizer.control.values(), *([] if tokenizer.unknown is None else [tokenizer.unknown])}
    added = set(tokenizer.words.values())
    return [
        b"" if spelling is None or index in silent else _bytes(tokenizer, index, spelling, index in added)
        for index, spelling in enumerate(tokenizer.vocabulary)
    ]


def _bytes(tokenizer: Tokenizer, index: int, spelling: str, added: bool) -> bytes:
    text = tokenizer.decode([index], Place.MORE)
    if added or "\ufffd" not in text:
        return text.encode()
    # Part of a character: decoding alone cannot tell which.
    if found := _BYTE.fullmatch(spelling):
        return bytes([int(found[1], 16)])
    if set(spelling) <= _BYTES.keys():
        return bytes(_BYTES[character] for character in spelling)
    return text.encode()


_END = ""  # marks a node of the tree at which a text is whole


class StopFinder:
    """Finder of stop texts: gives a text on as it comes, up to the first one; what may become one is held back.

    The first one is that which is whole first; of several that end in one place the longest. So it does not matter how
    the text is cut into pieces. Every place at which a stop text may have begun is a node in a tree of all of them: a
    thousand are looked for in the time of one.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._tree: dict[str, Any] = {}
        for text in stops:
            node = self._tree
            for character in text:
                node = node.setdefault(character, {})
            node[_END] = True
        self._held = ""
        self._open: list[tuple[int, dict[str, Any]]] = []  # place in what is held, and node; the earliest first
        self.found = False

    def push(self, text: str) -> str:
        """Take more text; return what is certain to stand before any stop text; nothing more once one was found."""
        if self.found:
            return ""
        if not self._tree:
            return text
        start, text = len(self._held), self._held + text
        for place in range(start, len(text)):
            still: list[tuple[int, dict[str, Any]]] = []
            for begin, node in (*self._open, (place, self._tree)):
                below = node.get(text[place])
                if below is None:
                    continue
                if _END in below:
                    self.found, self._held, self._open = True, "", []
                    return text[:begin]
                still.append((begin, below))
            self._open = still
        keep = self._open[0][0] if self._open else len(text)
        self._held, self._open = text[keep:], [(begin - keep, node) for begin, node in self._open]
        return text[:keep]

    def flush(self) -> str:
        """Return the text that was held back, where no more comes."""
        held, self._held, self._open = self._held, "", []
        return held


class Streamer:
    """Decoder of ids as they come, holding back what later ids may still change.

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
        """Return the text that became certain."""
        self._ids.extend(ids)
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        text = self._tokenizer.decode(self._ids[self._context :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """Return the text that is left, valid or not."""
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        text = self._tokenizer.decode(self._ids[self._context :])
        self._context = self._given = len(self._ids)
        return text[len(before) :]
