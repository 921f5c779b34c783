"""sentencepiece's tokenizer.model, read and written without the library: it can neither write one nor show all of it.

The format is the protobuf ModelProto of sentencepiece. The tokenizer that GGUF calls "llama" is the same: pieces with
scores, of which the best pair is merged first (Sennrich et al. 2016, arXiv:1508.07909).
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from lit_llama.errors import CheckpointError
from lit_llama.text.special import encode_varint


class Kind(IntEnum):
    """What a piece is; GGUF and sentencepiece count alike."""

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
_BPE = 2
# ModelProto, TrainerSpec, NormalizerSpec: the numbers of the fields.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _SUFFIX, _BYTE_FALLBACK = 3, 4, 24, 35
_IDS = {"unk": (40, 45, "<unk>"), "bos": (41, 46, "<s>"), "eos": (42, 47, "</s>"), "pad": (43, 48, "<pad>")}
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5
_PLAIN: dict[int, Any] = {_CHARSMAP: b"", _REMOVE_SPACES: 0, _ESCAPE_SPACES: 1}  # text as it is, spaces as ▁
_DEFAULTS = {_CHARSMAP: b"", _DUMMY_PREFIX: 1, _REMOVE_SPACES: 1, _ESCAPE_SPACES: 1}


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
        pieces: list[Piece] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = dict(_DEFAULTS)
        try:
            for number, value in _fields(data):
                if number == _PIECES:
                    piece = dict(_fields(value))
                    score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                    pieces.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, Kind.NORMAL)))
                elif number == _TRAINER:
                    trainer.update(_fields(value))
                elif number == _NORMALIZER:
                    normalizer.update(_fields(value))
        except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
            raise CheckpointError(f"tokenizer.model is not a sentencepiece model: {error}") from error
        if trainer.get(_MODEL_TYPE, 1) != _BPE or trainer.get(_SUFFIX):
            raise CheckpointError(
                "tokenizer.model does not merge pieces by score (BPE), which is all that GGUF can say"
            )
        if any(normalizer[number] != only for number, only in _PLAIN.items()):
            raise CheckpointError("tokenizer.model changes text before it is cut, which GGUF cannot say")
        ids = {piece.text: index for index, piece in enumerate(pieces)}
        spelled = {name: trainer.get(field, default.encode()).decode() for name, (_, field, default) in _IDS.items()}
        special = {name: ids[text] for name, text in spelled.items() if text in ids}
        return cls(pieces, special, bool(normalizer[_DUMMY_PREFIX]))

    def encode(self) -> bytes:
        """The contents of a tokenizer.model."""
        parts = []
        for text, score, kind in self.pieces:
            parts.append(_bytes(_PIECES, _bytes(1, text.encode()) + _float(2, score) + _integer(3, kind)))
        trainer = _integer(_MODEL_TYPE, _BPE) + _integer(_VOCAB_SIZE, len(self.pieces))
        trainer += _integer(_BYTE_FALLBACK, any(piece.kind == Kind.BYTE for piece in self.pieces))
        for name, (number, spelling, _) in _IDS.items():
            index = self.special.get(name, -1)
            trainer += _integer(number, index)
            if index >= 0:
                trainer += _bytes(spelling, self.pieces[index].text.encode())
        normalizer = _bytes(_NAME, b"identity") + _integer(_DUMMY_PREFIX, self.dummy_prefix)
        normalizer += b"".join(_integer(number, _PLAIN[number]) for number in (_REMOVE_SPACES, _ESCAPE_SPACES))
        return b"".join([*parts, _bytes(_TRAINER, trainer), _bytes(_NORMALIZER, normalizer)])


def padding(index: int) -> str:
    """How llama.cpp names an id that has a row in the embedding, but no token."""
    return f"[PAD{index}]"


def from_metadata(metadata: Mapping[str, Any]) -> SentencePieces:
    """The tokenizer "llama" of a GGUF file.

    Raises:
        CheckpointError: Its vocabulary contradicts itself.
    """
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    kinds = list(metadata["tokenizer.ggml.token_type"])
    if not len(tokens) == len(scores) == len(kinds):
        raise CheckpointError(f"{len(tokens)} tokens have {len(scores)} scores and {len(kinds)} types")
    while tokens and kinds[-1] == Kind.UNUSED and tokens[-1] == padding(len(kinds) - 1):
        kinds.pop()
        tokens = tokens[: len(kinds)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    special = {"unk": unknown, "bos": metadata.get("tokenizer.ggml.bos_token_id", 1)}
    special["eos"] = metadata["tokenizer.ggml.eos_token_id"]
    pad = metadata.get("tokenizer.ggml.padding_token_id", -1)
    if not all(0 <= index < len(kinds) for index in special.values()) or not -1 <= pad < len(kinds):
        raise CheckpointError(f"the special ids {special} are not all among {len(kinds)} tokens")
    for index in special.values():  # llama.cpp takes them for control tokens whatever the file says
        kinds[index] = Kind.UNKNOWN if index == unknown else Kind.CONTROL
    if pad >= 0 and kinds[pad] == Kind.CONTROL:
        special["pad"] = pad
    if kinds.count(Kind.UNKNOWN) != 1:
        raise CheckpointError("tokenizer.ggml.token_type has more than one unknown token")
    pieces: list[Piece] = []
    for text, score, kind in zip(tokens, scores, kinds, strict=False):
        if not text or not math.isfinite(score) or kind not in set(Kind):
            raise CheckpointError(f"token {len(pieces)} is {text!r} of score {score} and type {kind}")
        # llama.cpp looks for these in the text as it is, sentencepiece once spaces are replaced.
        pieces.append(Piece(text.replace(" ", SPACE) if kind == Kind.USER_DEFINED else text, score, int(kind)))
    if len({piece.text for piece in pieces}) != len(pieces):
        raise CheckpointError("tokenizer.ggml.tokens holds the same token twice")
    return SentencePieces(pieces, special, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message: an int, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(f"a number at byte {at} does not end")

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or (varint() if key & 7 == 2 else len(data) + 1)
        if size > len(data) - at:
            raise ValueError(f"a field at byte {at} does not fit")
        at += size
        yield key >> 3, data[at - size : at]


def _integer(number: int, value: int) -> bytes:
    return encode_varint(number << 3) + encode_varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def _float(number: int, value: float) -> bytes:
    return encode_varint(number << 3 | 5) + struct.pack("<f", value)
