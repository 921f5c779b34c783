"""The vocabulary that the metadata of a GGUF file lists, each key checked before it is used; errors name the key."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lit_llama.conversion import listed
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import SPACE, Kind, Piece, SentencePieces


def from_metadata(metadata: Mapping[str, Any]) -> SentencePieces:
    """Return the tokenizer "llama" of a GGUF file.

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


_PREFIX = "tokenizer.ggml."
_TOKENS, _TYPES, _SCORES, _MERGES = (f"{_PREFIX}{name}" for name in ("tokens", "token_type", "scores", "merges"))
_NAMES: dict[type, str] = {str: "texts", int: "whole numbers", float: "numbers"}


def padding(index: int) -> str:
    """Return llama.cpp's name of an id that has a row in the embedding, but no token."""
    return f"[PAD{index}]"


def tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Return the tokens by id.

    Raises:
        CheckpointError: There are none, one is empty, or two are alike.
    """
    found: list[str] = _array(metadata, _TOKENS, str)
    if not found:
        raise CheckpointError(f"{_TOKENS} is empty")
    if "" in found:
        raise CheckpointError(f"{_TOKENS}: token {found.index('')} is empty")
    check_distinct(found)
    return found


def check_distinct(found: Sequence[str]) -> None:
    """Raise CheckpointError if two ids have the same token."""
    ids: dict[str, int] = {}
    for index, token in enumerate(found):
        if (first := ids.setdefault(token, index)) != index:
            raise CheckpointError(f"{_TOKENS} holds the same token twice: {first} and {index} are {token!r}")


def kinds(metadata: Mapping[str, Any], count: int) -> list[int]:
    """Return the kinds of `count` tokens by id; see Kind.

    Raises:
        CheckpointError: They are missing, not as many, or not known.
    """
    found: list[int] = _array(metadata, _TYPES, int, count)
    for index, kind in enumerate(found):
        if kind not in _KINDS:
            raise CheckpointError(f"{_TYPES}: token {index} is of type {kind}, expected 1 to {max(Kind)}")
    return found


_KINDS = frozenset(map(int, Kind))


def scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    """Return the scores of `count` tokens by id.

    Raises:
        CheckpointError: They are missing, not as many, or not finite.
    """
    found: list[float] = _array(metadata, _SCORES, float, count)
    for index, score in enumerate(found):
        if not math.isfinite(score):
            raise CheckpointError(f"{_SCORES}: token {index} has the score {score}")
    return found


def merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """Return the pairs of tokens that are merged, in order.

    Raises:
        CheckpointError: They are missing, or one is no pair of tokens whose union is a token.
    """
    pairs = []
    for index, merge in enumerate(_array(metadata, _MERGES, str)):
        pair = merge.split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{_MERGES}: entry {index} is {merge!r}, expected two tokens and a space between")
        for token in (*pair, "".join(pair)):
            if token not in vocabulary:
                raise CheckpointError(f"{_MERGES}: entry {index} is {merge!r}, but {token!r} is not in {_TOKENS}")
        pairs.append(pair)
    return pairs


def token_id(metadata: Mapping[str, Any], name: str, count: int, default: int | None = None) -> int:
    """Return the id of a special token, such as bos.

    Raises:
        CheckpointError: It is missing and there is no default, or is none of `count` ids.
    """
    key = f"{_PREFIX}{name}_token_id"
    found = metadata.get(key, default)
    if found is None:
        raise CheckpointError(f"the metadata has no {key}")
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < count:
        raise CheckpointError(f"{key} is {found!r}, but there are {count} tokens")
    return found


def _array(metadata: Mapping[str, Any], key: str, kind: type, count: int | None = None) -> list[Any]:
    found = metadata.get(key)
    if found is None:
        raise CheckpointError(f"the metadata has no {key}")
    if not isinstance(found, list) or not all(type(item) is kind for item in found):
        raise CheckpointError(f"{key} is no list of {_NAMES[kind]}")
    if count is not None and len(found) != count:
        raise CheckpointError(f"{key} has {len(found)} entries, but {_TOKENS} has {count}")
    return found
