"""sentencepiece's tokenizer.model, read and written without the library: it can neither write one nor show all of it.

The format is the protobuf ModelProto of sentencepiece: pieces with scores, of which the best pair is merged first
(Sennrich et al. 2016, arXiv:1508.07909).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.special import encode_varint


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
        """Encode the pieces as the contents of a tokenizer.model."""
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
