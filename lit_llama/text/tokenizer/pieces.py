"""Pieces of sentencepiece's tokenizer.model, read and written through its protobuf module.

The processor of the library can neither write a model nor show all of it. Of the pieces, which have scores, the best
pair is merged first (Sennrich et al. 2016, arXiv:1508.07909).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import parse_model


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
