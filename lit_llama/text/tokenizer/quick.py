"""Quick ways to encode, several times as fast, where they are proven to do the same.

sentencepiece's merging of pieces goes word by word, and a word that came before is looked up. No piece of a vocabulary
such as LLaMA's goes over the border between a word and the space behind it. So words are merged each on its own, and a
language has few of them: a text is cut at its spaces, and what it comes to is gathered.

Byte-level BPE goes through tiktoken, which merges the pair whose merged token has the lowest id, where tokenizers takes
the pair that is listed first. `merges_by_id` says when that is one and the same; how text is cut into words before that
is told by a few known patterns, and every character that occurs is tried out between others before it is trusted.

Shapes: W words, N tokens.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import SPACE, Kind, SentencePieces

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


_BETWEEN = "\ufdd0\ufdd0"  # no characters, by definition; a text with them goes the plain way
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"
# Digits are taken out first, so that white space before one is at the end of its text.
_DIGIT_BY_DIGIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?=\p{N})|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WHOLE_CUTS = (_CL100K, _CL100K.replace("{1,3}", ""))  # Llama 3, Qwen 2 and 3
_PROBES = ("a{0}a", " {0} {0}{0}", "1{0}1 {0}1", "\n{0}\n\n{0}", "'{0}'s{0}", ".{0}. {0}.", "A{0} \t{0}B")
_UNKNOWN, _TRUSTED, _REFUSED = 0, 1, 2


class ByteLevel:
    """Encoder that does as a tokenizers.Tokenizer does.

    Args:
        backend: It, without added tokens.
        ranks: Ids of all tokens by their bytes.
        pattern: How text is cut, as tiktoken is told.
        composed: Only texts in Unicode's composed form (NFC) are taken.
    """

    def __init__(self, backend: Any, ranks: dict[bytes, int], pattern: str, *, composed: bool) -> None:
        import tiktoken

        self._backend, self._composed = backend, composed
        self._between = max(ranks.values()) + 1
        self._model = tiktoken.Encoding(
            "quick", pat_str=pattern, mergeable_ranks=ranks, special_tokens={_BETWEEN: self._between}
        )
        self._bytes = {byte for byte in range(256) if bytes([byte]) in ranks}
        self._state = np.zeros(0x110000, np.uint8)  # of every character
        self._state[0xFDD0] = _REFUSED

    def encode(self, texts: Sequence[str], *, blank: bool = False) -> Flat | None:
        """Encode texts; None if they hold something that is not proven to come out the same.

        Args:
            texts: What to encode.
            blank: Each is to be encoded as if a space stood before it, which is not what this does.

        Raises:
            UnicodeEncodeError: A lone surrogate.
        """
        whole = "".join(texts)
        if blank or not self._trusted(np.frombuffer(whole.encode("utf-32-le"), np.uint32)):
            return None
        if self._composed and not unicodedata.is_normalized("NFC", whole):
            return None
        found = self._model.encode_to_numpy(_BETWEEN.join(texts), allowed_special={_BETWEEN}).astype(np.int32)
        ends = np.flatnonzero(found == self._between)
        borders = np.concatenate([[-1], ends, [len(found)]])
        return found[found != self._between], (np.diff(borders) - 1)[: len(texts)]

    def _trusted(self, characters: npt.NDArray[np.uint32]) -> bool:
        state = self._state[characters]
        if (new := np.unique(characters[state == _UNKNOWN])).size:
            self._try_out(new)
            state = self._state[characters]
        return bool((state == _TRUSTED).all())

    def _try_out(self, codes: npt.NDArray[np.uint32]) -> None:
        """Compare both ways of encoding around characters."""
        self._state[codes] = _REFUSED
        usable = [chr(code) for code in codes.tolist() if set(chr(code).encode()) <= self._bytes]
        texts = [probe.format(character) for character in usable for probe in _PROBES]
        wanted = [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        equal = [found == ids for found, ids in zip(self._model.encode_ordinary_batch(texts), wanted, strict=True)]
        for index, character in enumerate(usable):
            if all(equal[index * len(_PROBES) : (index + 1) * len(_PROBES)]):
                self._state[ord(character)] = _TRUSTED


def byte_level(raw: Mapping[str, Any], backend: Any) -> ByteLevel | None:
    """Build a faster twin of a tokenizer; None if it does anything that is not proven to be the same.

    Args:
        raw: Contents of tokenizer.json without added tokens.
        backend: The tokenizers.Tokenizer made of it.
    """
    try:
        import tiktoken  # noqa: F401
    except ImportError:  # no wheels for this machine: the plain way does it, too
        return None
    pattern, normalizer = _pattern(raw.get("pre_tokenizer")), raw.get("normalizer")
    plain = normalizer is None or normalizer == {"type": "NFC"}
    if pattern is None or not plain or not _is_plain_bpe(raw["model"]):
        return None
    lost = _not_itself(raw, backend)
    if not merges_by_id(raw, lost):
        return None
    spelled = {character: byte for byte, character in enumerate(CHARACTERS)}
    known = raw["model"]["vocab"].keys() - (set() if raw["model"].get("ignore_merges") else lost)
    if not all(set(token) <= spelled.keys() for token in known):
        return None
    ranks = {bytes(map(spelled.__getitem__, token)): raw["model"]["vocab"][token] for token in known}
    return ByteLevel(backend, ranks, pattern, composed=normalizer is not None)


def _pattern(cut: Mapping[str, Any] | None) -> str | None:
    """What tiktoken calls a way of cutting text, None if it is none of the known ones."""
    steps = (cut or {}).get("pretokenizers", [cut])
    match [{name: step[name] for name in sorted(step) if name != "trim_offsets"} if step else {} for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _GPT2
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return _DIGIT_BY_DIGIT
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern in _WHOLE_CUTS:
            return pattern
    return None


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
    names = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    return model.get("type", "BPE") == "BPE" and not any(model.get(name) for name in names)


def merges_by_id(raw: Mapping[str, Any], lost: Iterable[str]) -> bool:
    """Whether merging the listed pairs in their order is merging whatever gives the token of the lowest id.

    It is, if merges are listed by the ids of what they give, and every pair of tokens that spells a third is a merge
    wherever it comes up. Two tokens that spell t can only come up where t alone is cut that way, so this holds for a t
    that is encoded as itself, and for one of which all pairs are listed. Where a token has several merges, one package
    takes them as they are listed, the other from the left: that has to come to the same.

    Args:
        raw: Contents of tokenizer.json.
        lost: Tokens that merging does not come to.
    """
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    listed = raw["model"]["merges"]
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in listed]
    halves: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        halves.setdefault(left + right, []).append((left, right))
    made = [vocabulary.get(left + right, -1) for left, right in merges]
    if -1 in made or any(a > b for a, b in pairwise(made)) or not {*chain(*merges)} <= vocabulary.keys():
        return False
    several = {token: pairs for token, pairs in halves.items() if len(pairs) > 1}
    return _in_any_order(vocabulary, several) and all(
        (token[:cut], token[cut:]) in halves.get(token, ())
        for token in lost
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    )


def _in_any_order(vocabulary: Mapping[str, int], several: Mapping[str, list[tuple[str, str]]]) -> bool:
    """Whether it makes no difference which of the merges into one token is done first.

    It would, where two overlap (x y x, both of whose pairs spell t) and the right one is listed first; and where
    one that is done is at once merged on, into a token of a lower id that goes over half of the other.
    """
    for token, pairs in several.items():
        for place, (_, right) in enumerate(pairs):
            overlaps = token.startswith(right) and (right, token[len(right) :]) in pairs[:place]
            if overlaps and not _runs(vocabulary, token):
                return False
    for token, index in vocabulary.items() if several else ():
        for cut in range(1, len(token)):
            begun, ended = token[:cut], token[cut:]
            first = vocabulary.get(begun, -1) > index and any(ended.endswith(x) for x, _ in several.get(begun, ()))
            last = vocabulary.get(ended, -1) > index and any(begun.startswith(y) for _, y in several.get(ended, ()))
            if (first or last) and not _runs(vocabulary, token):
                return False
    return True


def _runs(vocabulary: Mapping[str, int], token: str) -> bool:
    """Whether a token repeats one that is complete before anything goes over its borders.

    Then a text has the repeated token side by side, from the left on the merges join equal neighbours, and what is left
    over is at the end: no three tokens x y x, of which either two could be merged, ever come up.
    """
    unit = next(token[:size] for size in range(1, len(token) + 1) if token == (token[:size] * len(token))[: len(token)])
    if unit not in vocabulary or len(token) % len(unit):
        return False
    twice, border = unit * 2, len(unit)
    across = (twice[start:end] for start in range(border) for end in range(border + 1, 2 * border + 1))
    return all(vocabulary.get(piece, vocabulary[unit] + 1) > vocabulary[unit] for piece in across)


def _not_itself(raw: Mapping[str, Any], backend: Any) -> set[str]:
    """The tokens that merging does not come to."""
    from tokenizers import Tokenizer as Backend

    model = raw["model"]
    if model.get("ignore_merges"):  # a copy that does not
        steps = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
        plain: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [],
            "model": {**model, "ignore_merges": False},
            **steps,
        }
        bare = Backend.from_str(json.dumps(plain))
    else:
        bare = Backend(backend.model)
    tokens = list(model["vocab"])
    found = bare.encode_batch_fast(tokens, add_special_tokens=False)
    return {token for token, each in zip(tokens, found, strict=True) if each.ids != [model["vocab"][token]]}


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


CHARACTERS = _byte_characters()
