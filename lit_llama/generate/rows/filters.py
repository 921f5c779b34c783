"""Filters of made rows: each says why it rejects, and every rejection is counted.

ROUGE-L of a text against a growing pool is exact, without comparing all pairs. ROUGE-L (Lin 2004) is F = 2 L / (m + n)
for texts of m and n words whose longest common subsequence has L. The sequence is no longer than the words that both
have in common, so that texts with F of at least t share at least t (m + n) / 2 of them. Of the m words of a text, any
m - t / (2 - t) m + 1 must hold one that such a text has, too: only the rows of its rarest words are looked at (prefix
filtering, Chaudhuri, Ganti, Kaushik 2006).
"""

import math
import re
from array import array
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from lit_llama.errors import DataError
from lit_llama.generate.rows.attempt import Attempt, prompt_and_answer
from lit_llama.generate.rows.recipe import Recipe
from lit_llama.generate.rows.sources import Entry
from lit_llama.text.dataset.split import normalised
from lit_llama.text.inspect.characters import SCRIPTS, TROUBLE, count_characters
from lit_llama.text.inspect.duplicates import NearIndex
from lit_llama.text.inspect.findings import refused
from lit_llama.text.read.formats.sources import read_questions

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


_MEDIA = re.compile(
    r"https?://|www\.\w|\b(?:(?:this|the following|attached|given|above|below) (?:image|picture|photo|photograph|video"
    r"|audio|chart|graph|figure|attachment|file|link|url|map|screenshot)s?"
    r"|(?:image|photo|video) (?:below|above|attached)"
    r"|draw (?:a|an|the|me)|(?:go to|visit|open) (?:the|this) (?:link|website|url|page))\b",
    re.IGNORECASE,
)


class RowFilters:
    """The filters of a recipe, and all rows that later ones are compared with.

    Args:
        recipe: With the settings.
        seeds: Rows of the sources.
        test_data: Files whose prompts must not be among the rows.

    Raises:
        DataError: Test data cannot be read.
    """

    def __init__(self, recipe: Recipe, seeds: Iterable[Entry], test_data: Sequence[Path] = ()) -> None:
        self._settings = settings = recipe.filters
        self._seen: dict[bytes, str] = {}  # by a hash of the row, which may be long
        self._near = NearIndex()
        self._near_of: list[str] = []
        self._rouge = None if settings.rouge is None else RougeIndex(settings.rouge)
        self._rouge_of: list[str] = []
        if settings.seeds:
            for entry in seeds:
                self._add_seed(entry)
        self._test: dict[str, str] = {}
        self._test_near, self._test_of = NearIndex(), list[str]()
        for path in test_data:
            self._add_test(path)

    def _add_seed(self, entry: Entry) -> None:
        asked = entry.value.get("instruction")
        if isinstance(asked, str) and self._rouge is not None and not self._settings.compare:
            given = entry.value.get("input")
            self._rouge.add(words_of("\n".join(filter(None, (asked, given if isinstance(given, str) else "")))))
            self._rouge_of.append(entry.where)
        if isinstance(asked, str) and isinstance(entry.value.get("output"), str):
            asked = "\n".join(filter(None, (asked, str(entry.value.get("input") or ""))))
            self._remember(asked, entry.value["output"], entry.where, asked)

    def _add_test(self, path: Path) -> None:
        questions = read_questions(path)
        if not questions:
            raise DataError(f"{path} holds no rows that could leak")
        for question in questions:
            last = question.prompt[-1]
            asked = f"{last['content']}\n{last.get('input', '')}"
            self._test.setdefault(normalised(asked), f"{path}: row {question.row + 1}")
            self._test_near.add(normalised(asked))
            self._test_of.append(f"{path}: row {question.row + 1}")

    def judge(self, attempt: Attempt) -> tuple[str, str] | None:
        """Return the name of the filter that rejects the row of an attempt, and why; None if it is kept."""
        if attempt.rejected is not None:
            return attempt.rejected
        assert attempt.row is not None
        prompt, answer = prompt_and_answer(attempt.row)
        return self._by_itself(prompt, answer) or self._beside_others(attempt, prompt, answer)

    def _by_itself(self, prompt: str, answer: str) -> tuple[str, str] | None:
        settings = self._settings
        if not prompt.strip():
            return "empty", "the prompt is empty"
        if not settings.min_characters <= len(answer) <= settings.max_characters:
            bounds = f"{settings.min_characters} to {settings.max_characters:,}"
            return "length", f"the answer has {len(answer):,} characters, expected {bounds}"
        if settings.refusals and refused(normalised(answer)):
            return "refusal", f"the answer begins with {answer[:60]!r}"
        if settings.media and (found := _MEDIA.search(prompt)):
            return "media", f"the prompt speaks of {found.group()!r}"
        letters, trouble = count_characters([f"{prompt}\n{answer}"])
        if settings.damaged and trouble.any():
            return "damaged", f"the text holds: {TROUBLE[int(np.flatnonzero(trouble[0])[0])]}"
        if settings.scripts is not None and letters.any():
            script = SCRIPTS[int(letters[0].argmax())]
            if script not in settings.scripts:
                return "script", f"most letters are {script}"
        return None

    def _beside_others(self, attempt: Attempt, prompt: str, answer: str) -> tuple[str, str] | None:
        asked, whole = normalised(prompt), _digest(prompt, answer)
        compared = self._compared(attempt, prompt)
        if asked in self._test:
            return "leakage", f"the prompt is that of {self._test[asked]}"
        if self._test and (near := self._test_near.nearest(asked)):
            return "leakage", f"the prompt is {near[1]:.0%} that of {self._test_of[near[0]]}"
        if whole in self._seen:
            return "duplicate", f"the row is that of {self._seen[whole]}"
        if self._rouge is not None and (alike := self._rouge.nearest(words_of(compared))):
            return "rouge", f"ROUGE-L {alike[1]:.2f} with {self._rouge_of[alike[0]]}"
        if self._settings.near_duplicates and (near := self._near.nearest(normalised(f"{compared}\n{answer}"))):
            return "near_duplicate", f"the row is {near[1]:.0%} that of {self._near_of[near[0]]}"
        return None

    def _compared(self, attempt: Attempt, prompt: str) -> str:
        of = self._settings.compare
        return "\n".join(str(attempt.values[name]) for name in of) if of else prompt

    def accept(self, attempt: Attempt) -> None:
        """Compare later rows with that of an attempt, too."""
        assert attempt.row is not None
        prompt, answer = prompt_and_answer(attempt.row)
        where, compared = f"attempt {attempt.number}", self._compared(attempt, prompt)
        self._remember(prompt, answer, where, compared)
        if self._rouge is not None:
            self._rouge.add(words_of(compared))
            self._rouge_of.append(where)

    def _remember(self, prompt: str, answer: str, where: str, compared: str) -> None:
        self._seen.setdefault(_digest(prompt, answer), where)
        if self._settings.near_duplicates:
            self._near.add(normalised(f"{compared}\n{answer}"))
            self._near_of.append(where)


def _digest(prompt: str, answer: str) -> bytes:
    return blake2b(normalised(f"{prompt}\n{answer}").encode("utf-8", "surrogatepass"), digest_size=16).digest()
