"""The tokenizer that GGUF calls "llama": the pieces and scores of a sentencepiece model."""

from collections.abc import Mapping
from typing import Any

from lit_llama.convert.tokens import listed
from lit_llama.convert.tokens.listed import padding
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.pieces import SPACE, Kind, Piece, SentencePieces


def from_metadata(metadata: Mapping[str, Any]) -> SentencePieces:
    """The tokenizer "llama" of a GGUF file.

    Raises:
        CheckpointError: Its vocabulary contradicts itself.
    """
    tokens = listed.tokens(metadata)
    kinds = list(listed.kinds(metadata, len(tokens)))
    scores = listed.scores(metadata, len(tokens))
    while tokens and kinds[-1] == Kind.UNUSED and tokens[-1] == padding(len(kinds) - 1):
        kinds.pop()
        tokens = tokens[: len(kinds)]
    defaults = {"unknown": 0, "bos": 1, "eos": None}  # as in llama.cpp, but for the end
    unknown, bos, eos = (listed.token_id(metadata, name, len(kinds), default) for name, default in defaults.items())
    special = {"unk": unknown, "bos": bos, "eos": eos}
    pad = metadata.get("tokenizer.ggml.padding_token_id", -1)
    for index in special.values():  # llama.cpp takes them for control tokens whatever the file says
        kinds[index] = Kind.UNKNOWN if index == unknown else Kind.CONTROL
    if pad != -1 and kinds[listed.token_id(metadata, "padding", len(kinds))] == Kind.CONTROL:
        special["pad"] = pad
    if kinds.count(Kind.UNKNOWN) != 1:
        raise CheckpointError("tokenizer.ggml.token_type has more than one unknown token")
    # llama.cpp looks for these in the text as it is, sentencepiece once spaces are replaced.
    pieces = [
        Piece(text.replace(" ", SPACE) if kind == Kind.USER_DEFINED else text, score, int(kind))
        for text, score, kind in zip(tokens, scores, kinds, strict=False)
    ]
    listed.check_distinct([piece.text for piece in pieces])
    return SentencePieces(pieces, special, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
