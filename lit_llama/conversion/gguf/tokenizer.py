"""The tokenizer of a Hugging Face folder -> `tokenizer.*` of a GGUF file.

A tokenizer.json in the style of Llama 2 (BPE whose merges are listed) becomes pieces with scores, if they do the same.
Where a sentencepiece model is not at hand, its scores are lost. Any that order the merged pieces as the merges do will
serve, as long as a piece may be merged from all its halves: then the best-scored pair is the first of the list.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_llama.conversion import bpe
from lit_llama.conversion.listed import padding
from lit_llama.conversion.tokens import merges
from lit_llama.errors import CheckpointError
from lit_llama.progress import stderr
from lit_llama.text.prompts.encode import TEMPLATE_FILE
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.bounds import SPACE, Kind, Piece, SentencePieces, read_bounded
from lit_llama.text.tokenizer.kinds import HubTokenizer, SentencePieceTokenizer
from lit_llama.text.tokenizer.special import (
    ADDED_FILE,
    NAMES_FILE,
    SETTINGS_FILE,
    AddedToken,
    added_tokens,
    read_object,
    spelling_of,
)

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


_MODEL, _JSON = "tokenizer.model", "tokenizer.json"
_GENERATION, _CONFIG = "generation_config.json", "config.json"
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0  # as llama.cpp's converter gives them
_ENDS = ("eos", "eot", "eom")


def vocabulary(files: Mapping[str, Path | bytes], config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return the metadata of the tokenizer and the chat template.

    Args:
        files: Of the folder, by name.
        config: Contents of its config.json.
        rows: Rows of the embedding; ids without a token become unused ones.

    Raises:
        CheckpointError: There is no tokenizer, or GGUF cannot say what it does.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in (_MODEL, _JSON, ADDED_FILE, SETTINGS_FILE, NAMES_FILE, _GENERATION, TEMPLATE_FILE):
            if file in files:
                content = files[file]
                (folder / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        (folder / _CONFIG).write_text(json.dumps(dict(config)))
        try:
            return _metadata(folder, rows)
        except CheckpointError as error:  # which knows the files by a name that is gone
            raise CheckpointError(str(error).replace(f"{folder}/", "").replace(str(folder), "it")) from error


def _metadata(folder: Path, rows: int) -> dict[str, Any]:
    raw, settings = read_object(folder / _JSON), read_object(folder / SETTINGS_FILE)
    tokenizer = Tokenizer.from_path(folder)
    values: dict[str, Any] = {}
    if raw and bpe.is_byte_level(raw):
        values = {"tokenizer.ggml.model": "gpt2"} | bpe.to_metadata(raw)
        pieces = {index: Piece(text, 0.0, Kind.NORMAL) for text, index in raw["model"]["vocab"].items()}
    else:
        path = folder / _MODEL
        model = SentencePieces.decode(path.read_bytes()) if path.is_file() else from_ranks(folder / _JSON)
        values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        values["tokenizer.ggml.add_space_prefix"] = model.dummy_prefix
        pieces = dict(enumerate(model.pieces))
    for token in _added(folder, raw):
        pieces[token.id] = _join(pieces.get(token.id), token)
    if max(pieces) >= rows:
        raise CheckpointError(f"the tokenizer has {max(pieces) + 1} tokens, but the embedding only {rows} rows")
    unused = {index: Piece(padding(index), _PADDING_SCORE, Kind.UNUSED) for index in range(rows)}
    table = [piece for _, piece in sorted((unused | pieces).items())]
    ids = {piece.text: index for index, piece in enumerate(table)}
    if len(ids) != len(table):
        raise CheckpointError("two ids have the same token, which llama.cpp refuses")
    values["tokenizer.ggml.tokens"] = [piece.text for piece in table]
    if values["tokenizer.ggml.model"] == "llama":
        values["tokenizer.ggml.scores"] = [piece.score for piece in table]
    values["tokenizer.ggml.token_type"] = [int(piece.kind) for piece in table]
    return values | _special(folder, tokenizer, settings, ids, table) | _template(folder, settings)


def _added(folder: Path, raw: Mapping[str, Any]) -> list[AddedToken]:
    """The added tokens of all files."""
    own = list(raw.get("added_tokens") or [])
    greedy = [token["content"] for token in own if token.get("lstrip") or token.get("rstrip")]
    if greedy:
        stderr().print(f"{len(greedy)} tokens, {greedy[0]!r} first, take spaces beside them along; GGUF cannot say so")
    tokens = [AddedToken(token["content"], token["id"], bool(token.get("special"))) for token in own]
    return [*added_tokens(folder), *tokens]


def _join(piece: Piece | None, token: AddedToken) -> Piece:
    """What a token that is added, perhaps to one of the vocabulary, becomes."""
    if piece and piece.text.replace(SPACE, " ") != token.spelling.replace(SPACE, " "):
        raise CheckpointError(f"id {token.id} is {piece.text!r} in one file and {token.spelling!r} in another")
    if piece and piece.kind not in (Kind.NORMAL, Kind.USER_DEFINED):
        return piece
    if token.special:
        return Piece(token.spelling, _ADDED_SCORE, Kind.CONTROL)
    # llama.cpp looks for these in the text as it is.
    return Piece(token.spelling.replace(SPACE, " "), _ADDED_SCORE, Kind.USER_DEFINED)


def _special(
    folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any], ids: Mapping[str, int], table: list[Piece]
) -> dict[str, Any]:
    """The ids of special tokens, and whether a text begins and ends with one."""
    config, generation = read_object(folder / _CONFIG), read_object(folder / _GENERATION)
    named = {name: ids.get(spelling_of(settings.get(f"{name}_token"))) for name in ("bos", "unk", "pad")}
    wanted = tokenizer.bos if settings.get("add_bos_token", True) else ""
    unknown = [index for index, piece in enumerate(table) if piece.kind == Kind.UNKNOWN]
    found = {
        "bos": tokenizer.control[wanted] if wanted else _first(config.get("bos_token_id"), named["bos"]),
        "unknown": unknown[0] if unknown else named["unk"],
        "padding": _first(config.get("pad_token_id"), named["pad"]),
    }
    ends = [tokenizer.eos_id, *_list(config.get("eos_token_id")), *_list(generation.get("eos_token_id"))]
    ends = [index for index in dict.fromkeys(ends) if 0 <= index < len(table)]
    # llama.cpp has a word for the end of a message of its own, and knows the usual spellings without being told.
    ends[1:] = sorted(ends[1:], key=lambda index: table[index].text == "<|eom_id|>")
    if len(ends) > len(_ENDS):
        rest = ", ".join(repr(table[index].text) for index in ends[len(_ENDS) :])
        stderr().print(f"GGUF names {len(_ENDS)} tokens that end a text; {rest} is left to the program that reads it")
    found |= dict(zip(_ENDS, ends, strict=False))
    values: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": index
        for name, index in found.items()
        if index is not None and 0 <= index < len(table)
    }
    values["tokenizer.ggml.add_bos_token"] = bool(wanted)
    values["tokenizer.ggml.add_eos_token"] = bool(settings.get("add_eos_token"))
    return values


def _template(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / TEMPLATE_FILE
    template = path.read_text("utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        names = [entry["name"] for entry in template]
        stderr().print(f"of the chat templates {', '.join(names)} only the default goes into the file")
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return {"tokenizer.chat_template": template} if template else {}


def _list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
