"""sentencepiece's tokenizer.model and Hugging Face's tokenizer.json behind one small class.

Text never becomes a control token, and no beginning or end is added on its own: that is the business of encode.py.
"""

import copy
import hashlib
import json
import unicodedata
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from lit_llama.errors import CheckpointError, DataError
from lit_llama.folder.publish import MARKERS, articled
from lit_llama.memory import check_room
from lit_llama.text.tokenizer.quick import ByteLevel, Flat, Words
from lit_llama.text.tokenizer.special import MERGES_FILES, Place, from_merges, named_tokens

_OF_A_CHARACTER = 64  # bytes, of what is told of its token meanwhile
_MANY = 8_000  # texts, from which on looking for a quicker way pays
_FEW = 200  # added words, up to which it pays to look for them before taking a quicker way
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class Tokenizer:
    """Base of both kinds of tokenizers.

    Attributes:
        size: Largest id + 1 (T).
        control: Ids of the special tokens, which are spelled in templates and which no text becomes, by spelling.
        words: Ids of the other added tokens: a text that spells one is encoded as it.
        strips: Added tokens that take away the blanks before or behind them, and whether they do so on either side.
        bos: Spelling of the token that encoding puts before a text, "" if it puts none.
        bos_token: What templates call the beginning of a text, also where encoding puts none; "" if there is none.
        eos: Spelling of the token that ends a text.
        pad: Spelling of the token that other programs fill batches with, "" if there is none.
        unknown: Id that stands for what cannot be spelled, None if everything can.
        remarks: What the files say that cannot be meant, for people.
    """

    size: int
    control: dict[str, int]
    words: dict[str, int]
    strips: dict[str, tuple[bool, bool]]
    bos: str
    bos_token: str
    eos: str
    pad: str
    unknown: int | None
    remarks: list[str]
    _flat = 0  # texts that were encoded for training
    _kinds: ClassVar[dict[str, Callable[..., "Tokenizer"]]] = {}  # by the endings of their files

    def __init_subclass__(cls, *, ending: str = "", **more: Any) -> None:
        """Have `from_path` read files of an ending as this kind, so that nothing here imports the kinds."""
        super().__init_subclass__(**more)
        if ending:
            Tokenizer._kinds[ending] = cls

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text."""
        return self.control[self.eos]

    def encode(self, text: str, place: Place = Place.START) -> list[int]:
        """Encode a text into ids, without beginning and end."""
        return self.encode_batch([text], place)[0]

    def encode_batch(self, texts: Sequence[str], place: Place = Place.START) -> list[list[int]]:
        """Encode many texts that all stand at a place, on all cores.

        Raises:
            DataError: A text holds a lone surrogate.
        """
        check_room(_OF_A_CHARACTER * sum(map(len, texts)))
        try:
            return self._encode_batch(list(texts), place)
        except (TypeError, RuntimeError, UnicodeEncodeError) as error:
            raise DataError(f"text cannot be encoded, it may hold a lone surrogate: {error}") from error

    def encode_flat(self, texts: Sequence[str], places: Sequence[Place] | None = None) -> Flat:
        """Encode texts laid end to end: (N,) ids, and (texts,) how many are of each. Many texts take a quicker way.

        Raises:
            DataError: A text holds a lone surrogate.
        """
        check_room(_OF_A_CHARACTER * sum(map(len, texts)))
        self._flat += len(texts)
        if places is None or not self._placed:
            return self._flat_at(texts, Place.START)
        at = np.fromiter(places, np.int8, len(texts))
        groups = [(place, np.flatnonzero(at == place)) for place in Place]
        return _spread([(rows, self._flat_at([texts[row] for row in rows.tolist()], place)) for place, rows in groups])

    def _flat_at(self, texts: Sequence[str], place: Place) -> Flat:
        quick = self._quick if self._flat > _MANY else None
        if quick is None:
            return _laid_out(self.encode_batch(texts, place))
        odd = self._spelling_words(texts)
        if not len(odd):
            return self._quickly(quick, texts, place)
        even = np.setdiff1d(np.arange(len(texts)), odd)
        slow = _laid_out(self.encode_batch([texts[row] for row in odd.tolist()], place))
        return _spread([(odd, slow), (even, self._quickly(quick, [texts[row] for row in even.tolist()], place))])

    def _quickly(self, quick: Words | ByteLevel, texts: Sequence[str], place: Place) -> Flat:
        """Ids of texts that spell no added word."""
        try:
            if (found := quick.encode(texts, blank=self._blanks[place])) is not None:
                return found
        except (TypeError, RuntimeError, UnicodeEncodeError):
            pass  # the plain way says what is wrong
        return _laid_out(self.encode_batch(texts, place))

    def _spelling_words(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """The texts in which an added word may stand."""
        if not self.words:
            return np.zeros(0, np.int64)
        if len(self.words) > _FEW:
            return np.arange(len(texts))
        whole = "\n".join(texts)
        spellings = {form for word in self.words for form in (word, unicodedata.normalize("NFC", word))}
        found = [spelling for spelling in spellings if spelling in whole]
        return np.flatnonzero([any(spelling in text for spelling in found) for text in texts])

    def decode(self, ids: Sequence[int], place: Place = Place.START) -> str:
        """Decode ids into text, without control tokens.

        Args:
            ids: What to decode.
            place: Where its text stands: only where encoding puts a blank in front is one taken away.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        for token_id in ids:
            if not 0 <= token_id < self.size:
                raise DataError(f"id {token_id} is outside the tokenizer's vocabulary of {self.size}")
        lead = self.lead_in(place)
        return self._decode([*lead, *ids])[len(self._decode(lead)) :] if lead else self._decode(list(ids))

    def lead_in(self, place: Place) -> list[int]:
        """Return the ids to decode before those of a text at a place, so that it keeps the blank at its beginning."""
        return [] if self._blanks[place] else self._lead

    def guarded(self, marks: Collection[str]) -> Self:
        """Return a tokenizer in which some of the added words are control tokens, which no text becomes."""
        found = frozenset(word for word in marks if word in self.words)
        if not found:
            return self
        if found not in self._guarded:
            twin = copy.copy(self)
            for name in ("_guarded", "_quick", "_cut"):
                twin.__dict__.pop(name, None)
            twin.control = self.control | {word: self.words[word] for word in found}
            twin.words = {word: index for word, index in self.words.items() if word not in found}
            twin._guard(found)
            self._guarded[found] = twin
        return self._guarded[found]

    @cached_property
    def _guarded(self) -> dict[frozenset[str], Self]:
        return {}

    @cached_property
    def _blanks(self) -> tuple[bool, ...]:
        """Whether a text at each place is encoded as if a space stood before it."""
        return tuple(self.encode("a", place) != self.encode("a", Place.MORE) for place in Place)

    @cached_property
    def _lead(self) -> list[int]:
        """Something to decode before a text whose first blank would be lost otherwise; nothing where it would not."""
        ids = self.encode("a", Place.MORE)
        return ids if self._decode(self.encode(" a", Place.MORE)) != " a" else []

    @cached_property
    def _placed(self) -> bool:
        """Whether it makes a difference where a text stands."""
        return any(self._blanks)

    @cached_property
    def vocabulary(self) -> list[str | None]:
        """The token of every id, None where an id stands for nothing."""
        return self._vocabulary()

    @cached_property
    def spaced(self) -> bool:
        """Whether a text is encoded as if a space stood before it, as sentencepiece does."""
        return self.encode("a a") == 2 * self.encode("a")

    @property
    def added(self) -> dict[str, int]:
        """Ids of all tokens that stand beside the pieces of words, by spelling."""
        return self.control | self.words

    def fingerprint(self) -> str:
        """Return the hash of which id stands for which token, the same for a tokenizer.model and its tokenizer.json."""
        return hashlib.sha256(json.dumps(self.vocabulary).encode()).hexdigest()

    def _named(self, folder: Path, role: str, own: str) -> str:
        """The control token that the settings name as "bos_token" or "eos_token", else the tokenizer's own."""
        for path, spelling in named_tokens(folder, role):
            if self.control.get(spelling, self.unknown) != self.unknown:
                return spelling
            self.remarks.append(f"{path}: {role} is {spelling!r}, which is no control token; taking {own!r}")
        return own

    def _pad(self, folder: Path, own: str = "") -> str:
        named = [spelling for _, spelling in named_tokens(folder, "pad_token") if spelling in self.control]
        return (named or [own])[0]

    @cached_property
    def _quick(self) -> Words | ByteLevel | None:
        """Something that encodes the same in less time, if there is."""
        return self._find_quick()

    def _find_quick(self) -> Words | ByteLevel | None:
        raise NotImplementedError

    def _encode_batch(self, texts: list[str], place: Place) -> list[list[int]]:
        raise NotImplementedError

    def _guard(self, marks: Collection[str]) -> None:
        """Make control tokens of some added words, in what encodes and decodes."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _vocabulary(self) -> list[str | None]:
        raise NotImplementedError

    @classmethod
    def from_path(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.model, a tokenizer.json, or a model folder that holds one, or vocab.json and merges.txt.

        Raises:
            CheckpointError: There is none, or it cannot be used.
        """
        if path.is_dir():
            found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
            if found:
                return cls.from_path(found[0])
            if all((path / name).is_file() for name in MERGES_FILES):
                return cls._kinds[".json"](path / MERGES_FILES[0], from_merges(path))
            raise CheckpointError(
                f"{path} {_kind(path)}holds no {TOKENIZER_FILES[0]} and no {TOKENIZER_FILES[1]}, nor "
                f"{' and '.join(MERGES_FILES)}; expected the folder of a model, or one of these files"
            )
        if not path.is_file():
            raise CheckpointError(
                f"tokenizer {path} does not exist; expected a tokenizer.model, a tokenizer.json or a model folder"
            )
        return cls._kinds[".json" if path.suffix == ".json" else ".model"](path)


def _kind(folder: Path) -> str:
    """What a folder without a tokenizer is, where that is seen."""
    found = (kind for kind, marker in MARKERS.items() if kind != "model" and (folder / marker).is_file())
    return next((f"is {articled(kind)} and " for kind in found), "")


def _laid_out(ids: Sequence[Sequence[int]]) -> Flat:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _spread(parts: Sequence[tuple[npt.NDArray[np.int64], Flat]]) -> Flat:
    """Ids of texts laid end to end, out of parts of them, each with the numbers of its texts."""
    lengths = np.zeros(sum(len(rows) for rows, _ in parts), np.int64)
    for rows, (_, sizes) in parts:
        lengths[rows] = sizes
    starts = np.cumsum(lengths) - lengths
    ids = np.empty(int(lengths.sum()), np.int32)
    for rows, (found, sizes) in parts:
        own = np.cumsum(sizes) - sizes
        ids[np.repeat(starts[rows] - own, sizes) + np.arange(len(found))] = found
    return ids, lengths
