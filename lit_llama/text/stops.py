"""Texts at which an answer ends, found in what comes piece by piece."""

from collections.abc import Iterable
from typing import Any

_END = ""  # marks a node of the tree at which a text is whole


class StopFinder:
    """Gives a text on as it comes, up to the first stop text; what may become one is held back.

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
        """What is certain to stand before any stop text; nothing more once one was found."""
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
        """What was held back, where no more comes."""
        held, self._held, self._open = self._held, "", []
        return held
