"""ROUGE-L of a text against a growing pool, exact and without comparing all pairs.

ROUGE-L (Lin 2004) is F = 2 L / (m + n) for texts of m and n words whose longest common subsequence has L. The sequence
is no longer than the words that both have in common, so that texts with F of at least t share at least
t (m + n) / 2 of them. Of the m words of a text, any m - t / (2 - t) m + 1 must hold one that such a text has, too: only
the rows of its rarest words are looked at (prefix filtering, Chaudhuri, Ganti, Kaushik 2006).
"""

import math
import re
from array import array
from collections.abc import Hashable, Sequence

import numpy as np

from lit_llama.text.dataset.split import normalised

_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+")
"""Letters and digits; of scripts that write no spaces, single characters."""


def words_of(text: str) -> list[str]:
    """Return the words of a text without their case; those of rouge-score where the text is ASCII."""
    return _WORD.findall(normalised(text))


def common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence, by the bits of a row of its table (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for position, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << position
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        if matched := row & places.get(word, 0):
            row = ((row + matched) | (row - matched)) & full
    return len(one) - row.bit_count()


def rouge_l(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Return the F-measure of two texts by their words; 0 where one has none."""
    return 2 * common(one, other) / (len(one) + len(other)) if one and other else 0.0


class RougeIndex:
    """Texts, each of which may be asked for those alike.

    Args:
        threshold: Least ROUGE-L of what is found, above 0 and at most 1.

    Attributes:
        compared: Pairs of texts whose common subsequence was computed.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold, self.compared = threshold, 0
        self._ids: dict[str, int] = {}
        self._texts, self._ends = array("i"), array("q", [0])  # ids of all words, end to end
        self._lengths = array("i")
        self._rows: dict[tuple[int, int], array[int]] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, words: Sequence[str]) -> None:
        """Take in a text."""
        ids = [self._ids.setdefault(word, len(self._ids)) for word in words]
        for key in _numbered(ids):
            self._rows.setdefault(key, array("i")).append(len(self))
        self._texts.extend(ids)
        self._ends.append(len(self._texts))
        self._lengths.append(len(ids))

    def nearest(self, words: Sequence[str]) -> tuple[int, float] | None:
        """Return the text with the highest ROUGE-L of at least the threshold, the first of equals; None without any."""
        ids = [self._ids.get(word, _UNKNOWN) for word in words]
        best: tuple[float, int] = (0.0, 0)
        for row in self._candidates(ids):
            self.compared += 1
            best = max(best, (rouge_l(ids, self._texts[self._ends[row] : self._ends[row + 1]]), -row))
        return (-best[1], best[0]) if best[0] >= self.threshold else None

    def _candidates(self, ids: Sequence[int]) -> list[int]:
        """Rows that share enough words to be alike, as far as the rarest words tell."""
        count, threshold = len(ids), self.threshold
        least = math.ceil(threshold / (2 - threshold) * count - 1e-9)  # shared with the shortest text that can be alike
        keys = sorted(_numbered(ids), key=lambda key: len(self._rows.get(key, ())))[: count - least + 1]
        found = [np.frombuffer(self._rows[key], np.int32) for key in keys if key in self._rows]
        if not count or not found:
            return []
        rows, shared = np.unique(np.concatenate(found), return_counts=True)
        lengths = np.frombuffer(self._lengths, np.int32)[rows]
        unseen = count - len(keys)  # words of this text that nobody was looked up for
        most = np.minimum(shared + unseen, np.minimum(count, lengths))
        alike: list[int] = rows[2 * most >= threshold * (count + lengths) - 1e-9].tolist()
        return alike


_UNKNOWN = -1
"""The id of words that no text of an index has."""


def _numbered(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ids with how many of their kind stand before them, so that a set of them counts what occurs twice."""
    seen: dict[int, int] = {}
    found = []
    for word in ids:
        seen[word] = seen.get(word, 0) + 1
        found.append((word, seen[word]))
    return found
