"""Bounds of foreign tokenizers: ids, growth of a text and repeated steps, bounded before anything is built.

A tokenizer.json is a small program, and a tokenizer.model holds one as well: a few replacements make gigabytes of a
line, one id fills the memory with an empty vocabulary. What published tokenizers do lies far below these bounds.

Pieces of a tokenizer.model are read and written through its protobuf module, as the processor of the library can
neither write a model nor show all of it. Of the pieces, which have scores, the best pair is merged first (Sennrich et
al. 2016, arXiv:1508.07909).
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.errors import CheckpointError, ResourceError
from lit_llama.text.tokenizer.patterns import check_pattern, shortest

MAX_ID = 1 << 21  # eight times the largest vocabulary in use; a wrong id must not fill the memory
LARGEST = 256 << 20  # bytes of a file; the largest in use has 40 MB
_MODEL = 32 << 20  # bytes of a tokenizer.model, whose messages take up to thirty times that; the largest has 18 MB
_GROWTH = 64  # characters that one may become; NFKC has 18
_STEPS, _DEPTH, _TEXT = 64, 8, 64
_WORD = 1000  # characters of a word, of which WordPiece tries every part
_INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def check_tokenizer(raw: Mapping[str, Any]) -> None:
    """Look at the contents of a tokenizer.json.

    Raises:
        CheckpointError: It asks for more memory or time than a tokenizer does; the message names the part.
    """
    model = raw["model"]
    vocabulary = model.get("vocab") or {}
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary)]  # Unigram's is a list
    for index in [max(ids, default=0), *(token["id"] for token in raw.get("added_tokens") or [])]:
        check_id(index)
    if (word := model.get("max_input_chars_per_word") or 0) > _WORD:
        raise CheckpointError(f"model.max_input_chars_per_word is {word}, expected at most {_WORD}")
    _check_texts("model", {name: value for name, value in model.items() if name not in ("vocab", "merges")})
    for part in _INNER:
        steps = list(_steps(part, raw.get(part)))
        if len(steps) > _STEPS:
            raise CheckpointError(f"{part} has {len(steps)} steps, expected at most {_STEPS}")
        for step in steps:
            _check_step(part, step)
        grown = _growth([step for step in steps if step.get("type") == "Replace"])
        if grown > _GROWTH:
            raise CheckpointError(f"{part} makes up to {grown:,.0f} characters of one, expected at most {_GROWTH}")
    for step in _processors(raw.get("post_processor")):
        pieces = [*(step.get("single") or []), *(step.get("pair") or [])]
        known = step.get("special_tokens") or {}
        most = max((len(token["ids"]) for token in known.values()), default=0) if isinstance(known, dict) else 0
        if len(pieces) > _STEPS or most > _STEPS:
            raise CheckpointError(f"post_processor puts more than {_STEPS} tokens around a text")


def read_bounded(path: Path) -> bytes:
    """Read the bytes of a tokenizer's file.

    Raises:
        CheckpointError: It is larger than any tokenizer.
    """
    if (size := path.stat().st_size) > LARGEST:
        raise CheckpointError(f"{path} has {size:,} bytes, a tokenizer at most {LARGEST:,}: it is something else")
    return path.read_bytes()


def check_id(index: object) -> None:
    """Raise CheckpointError unless this can be the id of a token."""
    if type(index) is not int or not 0 <= index < MAX_ID:
        raise CheckpointError(f"a token has the id {index!r}, expected a number from 0 to {MAX_ID}")


def check_map(blob: bytes) -> None:
    """Look at sentencepiece's table of replacements: a trie, then texts that end in a zero byte each.

    Raises:
        CheckpointError: A text is longer than any character could mean.
    """
    texts = blob[4 + int.from_bytes(blob[:4], "little") :]
    longest = max(map(len, texts.split(b"\0")), default=0)
    if longest > 4 * _GROWTH:
        raise CheckpointError(f"the table of characters makes {longest:,} bytes of one, expected at most {4 * _GROWTH}")


def parse_model(data: bytes) -> Any:
    """Parse the contents of a tokenizer.model: the ModelProto of sentencepiece's own protobuf module.

    Raises:
        CheckpointError: It is none, or larger than a tokenizer; the message goes behind the name of the file.
        ResourceError: The package protobuf is older than what sentencepiece needs.
    """
    if len(data) > _MODEL:
        raise CheckpointError(f"has {len(data):,} bytes, a sentencepiece model at most {_MODEL:,}")
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # protobuf raises an error of its own where it is older than the module
        raise ResourceError(f"sentencepiece needs another protobuf: pip install -U protobuf ({error})") from error
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise CheckpointError("is not a sentencepiece model (Llama 3 needs tokenizer.json)") from error
    if len(model.pieces) > MAX_ID:
        raise CheckpointError(f"has {len(model.pieces):,} pieces, expected at most {MAX_ID:,}")
    return model


def check_model(path: Path, data: bytes) -> None:
    """Look at the contents of the tokenizer.model at `path`, and at what is done to a text before and after its pieces.

    Raises:
        CheckpointError: A table is out of bounds, or it is no such file.
    """
    try:
        model = parse_model(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    try:
        for spec in (model.normalizer_spec, model.denormalizer_spec):
            check_map(spec.precompiled_charsmap)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _steps(part: str, step: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The steps of a part in order, sequences unfolded."""
    if not isinstance(step, dict):
        return
    if depth > _DEPTH:
        raise CheckpointError(f"{part} is nested more than {_DEPTH} deep")
    inner = step.get(_INNER[part])
    if isinstance(inner, list):
        for each in inner:
            yield from _steps(part, each, depth + 1)
    else:
        yield step


def _processors(step: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    if isinstance(step, dict) and depth <= _DEPTH:
        yield step
        for each in step.get("processors") or []:
            yield from _processors(each, depth + 1)


def _check_step(part: str, step: Mapping[str, Any]) -> None:
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        try:
            check_pattern(pattern["Regex"])
        except CheckpointError as error:
            raise CheckpointError(f"{part}: {error}") from error
    if isinstance(pattern, dict) and pattern.get("String") == "":
        raise CheckpointError(f"{part} looks for an empty text")
    if step.get("type") == "Precompiled" and isinstance(blob := step.get("precompiled_charsmap"), str):
        check_map(base64.b64decode(blob))
    else:
        _check_texts(part, {name: value for name, value in step.items() if name != "pattern"})
    for name in ("start", "stop"):
        if isinstance(number := step.get(name), int) and number > _TEXT:
            raise CheckpointError(f"{part}.{name} is {number}, expected at most {_TEXT}")


def _check_texts(part: str, values: Mapping[str, Any]) -> None:
    """What is put before or around every word."""
    for name, value in values.items():
        if isinstance(value, str) and len(value) > _TEXT:
            raise CheckpointError(f"{part}.{name} has {len(value):,} characters, expected at most {_TEXT}")


def _growth(steps: list[Mapping[str, Any]]) -> float:
    """How many characters these replacements make of one, at most.

    What each of them finds, or puts in, is sent through those behind it. Of a regular expression the shortest text that
    it finds is taken, as often as it fits.
    """
    most = scale = 1.0
    for first, step in enumerate(steps):
        begin, is_regex = _pattern(step)
        if is_regex:
            scale *= max(1.0, _scale(step))
            begin = step.get("content") or ""
        text = begin * 4
        for later in steps[first + is_regex :]:
            found, is_regex = _pattern(later)
            if not is_regex and len(text) <= 4 * _GROWTH * len(begin):
                text = text.replace(found, later.get("content") or "")
        most = max(most, len(text) / (4 * len(begin) or 1))
    return most * scale


def _pattern(step: Mapping[str, Any]) -> tuple[str, bool]:
    pattern = step["pattern"]
    return (pattern["Regex"], True) if "Regex" in pattern else (pattern["String"], False)


def _scale(step: Mapping[str, Any]) -> float:
    """Characters of a replacement for each that it takes away."""
    least = shortest(_pattern(step)[0])
    content = len(step.get("content") or "")
    return content / least if least else content + 1


class Kind(IntEnum):
    """Kind of a piece; GGUF and sentencepiece count alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """An entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: int


SPACE = "▁"
_ROLES = ("unk", "bos", "eos", "pad")


@dataclass(frozen=True)
class SentencePieces:
    """A vocabulary whose pieces are merged by score.

    Args:
        pieces: By id.
        special: Ids of unk, bos, eos and pad, as far as there are any.
        dummy_prefix: A space is put before every text.
    """

    pieces: list[Piece]
    special: Mapping[str, int]
    dummy_prefix: bool = True

    @classmethod
    def decode(cls, data: bytes) -> "SentencePieces":
        """Read a tokenizer.model.

        Raises:
            CheckpointError: It is none, or changes text in a way that GGUF cannot say.
        """
        try:
            model = parse_model(data)
            pieces = [Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]
            spelled = {role: getattr(model.trainer_spec, f"{role}_piece") for role in _ROLES}
        except CheckpointError as error:
            raise CheckpointError(f"tokenizer.model {error}") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"tokenizer.model is not a sentencepiece model: {error}") from error
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        if trainer.model_type != trainer.BPE or trainer.treat_whitespace_as_suffix:
            raise CheckpointError(
                "tokenizer.model does not merge pieces by score (BPE), which is all that GGUF can say"
            )
        as_it_is = normalizer.escape_whitespaces and not normalizer.remove_extra_whitespaces  # but for spaces as ▁
        if normalizer.precompiled_charsmap or not as_it_is:
            raise CheckpointError("tokenizer.model changes text before it is cut, which GGUF cannot say")
        ids = {piece.text: index for index, piece in enumerate(pieces)}
        special = {role: ids[text] for role, text in spelled.items() if text in ids}
        return cls(pieces, special, normalizer.add_dummy_prefix)

    def encode(self) -> bytes:
        """Encode the pieces as the contents of a tokenizer.model."""
        model = parse_model(b"")
        for text, score, kind in self.pieces:
            model.pieces.add(piece=text, score=score, type=kind)
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        trainer.model_type, trainer.vocab_size = trainer.BPE, len(self.pieces)
        trainer.byte_fallback = any(piece.kind == Kind.BYTE for piece in self.pieces)
        for role in _ROLES:
            index = self.special.get(role, -1)
            setattr(trainer, f"{role}_id", index)
            if index >= 0:
                setattr(trainer, f"{role}_piece", self.pieces[index].text)
        normalizer.name, normalizer.add_dummy_prefix = "identity", self.dummy_prefix
        normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
        return bytes(model.SerializeToString())
