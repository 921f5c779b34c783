"""A tokenizer.json in the style of Llama 2 (BPE whose merges are listed) -> pieces with scores, if they do the same.

Where a sentencepiece model is not at hand, its scores are lost. Any that order the merged pieces as the merges do will
serve, as long as a piece may be merged from all its halves: then the best-scored pair is the first of the list.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_llama.convert.tokens.fast import merges
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import read_bounded
from lit_llama.text.tokenizer.hub import HubTokenizer
from lit_llama.text.tokenizer.pieces import SPACE, Kind, Piece, SentencePieces
from lit_llama.text.tokenizer.sentencepiece_model import SentencePieceTokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TEXTS = [
    "",
    " ",
    " a",
    "a  ",
    "   a",
    "\n",
    "\n\n x",
    "Zoë's naïve café, 北京 is a city. 😀",
    "\u0300\u200b\u3000\t\x7f",
]
_WAY_OUT = "put the tokenizer.model of the model into its folder"


def from_ranks(path: Path) -> SentencePieces:
    """Return the pieces of a tokenizer.json, proven to encode as it does.

    Raises:
        CheckpointError: It does something that pieces with scores do not.
    """
    raw = json.loads(read_bounded(path))
    model = raw["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("dropout"):
        raise CheckpointError(
            f"tokenizer.json: a {model.get('type')} model of this kind has no form in GGUF; {_WAY_OUT}"
        )
    tokenizer = HubTokenizer(path)
    special = {name: tokenizer.control[text] for name, text in (("bos", tokenizer.bos), ("eos", tokenizer.eos)) if text}
    special["unk"] = model["vocab"][model["unk_token"]]
    pieces = _pieces(raw, special)
    texts = _probes(pieces)
    wanted = tokenizer.encode_batch(texts)
    for dummy_prefix in (True, False):
        made = SentencePieces(pieces, special, dummy_prefix)
        if _encode(made, texts) == wanted:
            return made
    raise CheckpointError(f"tokenizer.json encodes otherwise than pieces with scores do; {_WAY_OUT}")


def _pieces(raw: Mapping[str, Any], special: Mapping[str, int]) -> list[Piece]:
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    added = {token["id"]: token for token in raw["added_tokens"]}
    listed = [merge.split(" ") if isinstance(merge, str) else merge for merge in raw["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(listed):
        ranks.setdefault(left + right, rank)
    order = [ranks[left + right] for left, right in listed]
    if sorted(vocabulary.values()) != list(range(len(vocabulary))) or order != sorted(order):
        raise CheckpointError(f"tokenizer.json lists merges in no order of pieces; {_WAY_OUT}")
    pieces = []
    for text, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        kind = Kind.BYTE if _BYTE.fullmatch(text) else Kind.NORMAL
        if index in added:
            kind = Kind.CONTROL if added[index].get("special") else Kind.USER_DEFINED
        if index == special["unk"]:
            kind = Kind.UNKNOWN
        # What nothing is merged into comes after all that is; a float32 holds these numbers exactly.
        pieces.append(Piece(text, -float(ranks.get(text, len(listed) + index)), kind))
    normal = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == Kind.NORMAL}
    if set(merges(normal)) != {(left, right) for left, right in listed}:
        raise CheckpointError(f"tokenizer.json does not merge every pair that makes a piece; {_WAY_OUT}")
    return pieces


def _probes(pieces: list[Piece]) -> list[str]:
    """Every piece, with a neighbour, and runs of one character, whose pieces have many halves."""
    texts = [piece.text.replace(SPACE, " ") for piece in pieces if piece.kind == Kind.NORMAL]
    runs = {text[0] for text in texts if len(text) > 1 and len(set(text)) == 1}
    long = [text for text in texts if len(text) > 2]
    return [
        *_TEXTS,
        *texts,
        *(left + right for left, right in zip(long, long[7:], strict=False)),
        *(f"{before}{run * count}x" for run in sorted(runs) for count in range(1, 70) for before in ("", "y")),
    ]


def _encode(made: SentencePieces, texts: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(made.encode())
        return SentencePieceTokenizer(path).encode_batch(texts)
