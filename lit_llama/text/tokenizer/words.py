"""sentencepiece's merging of pieces, word by word: a word that came before is looked up.

No piece of a vocabulary such as LLaMA's goes over the border between a word and the space behind it. So words are
merged each on its own, and a language has few of them: a text is cut at its spaces, and what it comes to is gathered.

Shapes: W words, N tokens.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.pieces import SPACE, Kind, SentencePieces

Flat = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""(N,) ids of texts laid end to end, and (texts,) how many are of each."""

_REMEMBERED = 4_000_000  # characters of words, after which a new book is begun
_WORD = re.compile(" ( *[^ ]+| *)")  # without its first space
_BARE = "x "  # ends a word without a space before it; no other word ends in a space after something else


class Words:
    """Encoder that does as the model does, only faster.

    Args:
        model: A sentencepiece processor for which `splits_at_spaces` holds.
        plain: The same, but it puts no space before a text.
    """

    def __init__(self, model: Any, plain: Any) -> None:
        self._model, self._plain = model, plain
        self._space = model.piece_to_id(SPACE)
        self._forget()

    def _forget(self) -> None:
        self._number = {"": 0}  # of a word without its first space
        self._ids = np.array([self._space], np.int32)  # of all words, laid end to end
        self._sizes = np.ones(1, np.int64)
        self._starts = np.zeros(1, np.int64)
        self._characters = 0

    def encode(self, texts: Sequence[str], *, blank: bool = True) -> Flat:
        """Encode texts, each as if a space stood before it, or (`blank` is False) as it is."""
        cut = [_words(text) if blank else _words_as_they_are(text) for text in texts]
        words = list(chain.from_iterable(cut))
        try:
            numbers = np.fromiter(map(self._number.get, words), np.int64, len(words))
        except TypeError:  # None: a word that is new
            self._learn(words)
            numbers = np.fromiter(map(self._number.__getitem__, words), np.int64, len(words))
        sizes = self._sizes[numbers]  # (W,)
        ends = np.cumsum(sizes)
        total = int(ends[-1]) if len(ends) else 0
        places = np.repeat(self._starts[numbers] - (ends - sizes), sizes) + np.arange(total)
        last = np.concatenate([[0], ends])[np.cumsum([0, *map(len, cut)])]
        return self._ids[places], np.diff(last)

    def _learn(self, words: Sequence[str]) -> None:
        if self._characters > _REMEMBERED:
            self._forget()
        new = [word for word in dict.fromkeys(words) if word not in self._number]
        bare = [word.endswith(_BARE) for word in new]
        spaced = iter(self._model.encode([word for word in new if not word.endswith(_BARE)], num_threads=-1))
        others = iter(self._plain.encode([word[: -len(_BARE)] for word in new if word.endswith(_BARE)], num_threads=-1))
        found = [next(others if each else spaced) for each in bare]  # the model puts the first space back
        sizes = np.fromiter(map(len, found), np.int64, len(found))
        self._number.update(zip(new, range(len(self._sizes), len(self._sizes) + len(new)), strict=True))
        self._ids = np.append(self._ids, np.fromiter(chain.from_iterable(found), np.int32, int(sizes.sum())))
        self._sizes = np.append(self._sizes, sizes)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._characters += sum(map(len, new))


def _words(text: str) -> list[str]:
    """The words of a text, each with the spaces before it but one: the first word is given one, as by the model."""
    if SPACE in text:
        text = text.replace(SPACE, " ")  # the model cannot tell them from each other
    if "  " in text or text.startswith(" "):
        return _WORD.findall(" " + text)
    return text.split(" ") if text else []


def _words_as_they_are(text: str) -> list[str]:
    """The words of a text before which no space is put: the first one is bare, if there is none of its own."""
    text = text.replace(SPACE, " ")
    end = text.find(" ") if " " in text else len(text)
    return [*([text[:end] + _BARE] if end else []), *_WORD.findall(text[end:])]


def splits_at_spaces(model: Any) -> bool:
    """Whether a sentencepiece processor may be replaced by `Words`.

    It has to merge pieces by score, take text as it is with a space before it, know no piece that is taken out of a
    text before words are, and no piece in which a space follows anything else than spaces.
    """
    try:
        pieces = SentencePieces.decode(model.serialized_model_proto())
    except CheckpointError:
        return False
    spaces = any(piece.text == SPACE and piece.kind == Kind.NORMAL for piece in pieces.pieces)
    bounded = all(
        piece.kind != Kind.USER_DEFINED and SPACE not in piece.text.lstrip(SPACE)
        for piece in pieces.pieces
        if piece.kind not in (Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE)
    )
    return pieces.dummy_prefix and spaces and bounded
