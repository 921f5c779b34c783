"""The tokenizer that GGUF calls "llama": the pieces and scores of a sentencepiece model."""

import math
from collections.abc import Mapping
from typing import Any

from lit_llama.errors import CheckpointError
from lit_llama.text.pieces import SPACE, Kind, Piece, SentencePieces


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
