"""The tokenizer.model beside weights -> the tokenizer files of a Hugging Face folder.

LLaMA 1 and 2 come with a sentencepiece model; Llama 3 with tiktoken's file of the same name: lines of base64 and rank.
sentencepiece joins the two neighbours whose union has the best score, so every way to cut a piece into two pieces is a
merge, as wanted as the score of the piece is high: this makes the tokenizer.json, which is all that most programs read.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lit_llama.conversion.bpe import tokenizer_json
from lit_llama.errors import CheckpointError
from lit_llama.folder.publish import encode_json, write_json
from lit_llama.progress import stderr
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.kinds import SentencePieceTokenizer
from lit_llama.text.tokenizer.special import SETTINGS_FILE, added_tokens, read_object

Token = TypeVar("Token", str, bytes)
_SPACE = "\u2581"
_PROBES = (
    "",
    " ",
    "a",
    " a",
    "a  b",
    "\n\n x",
    "\t",
    "Zoë's naïve café",
    "北京",
    "😀",
    "ﬁ Ａ e\u0301",
    "</s>",
    "1234567",
)
_PARTS: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": _SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        ],
    },
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}
_MODEL: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}
PLAIN_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers that takes a tokenizer.json as it is. LlamaTokenizer of transformers 5 takes its vocabulary
alone and puts another rule for spaces beside it: ' Hello' is one token there, and two in sentencepiece."""

_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def fast_tokenizer(path: Path) -> dict[str, Any] | None:
    """Return the tokenizer.json of a tokenizer.model; None if it would encode a piece otherwise than the model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    special = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    others = [i for i in range(len(pieces)) if not (i in special or model.is_byte(i) or model.is_unused(i))]
    ids = {pieces[i]: i for i in others}
    bos, sequence = pieces[model.bos_id()], {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    raw = _PARTS | {
        "added_tokens": [{"id": i, "content": pieces[i], **_ADDED} for i in special],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, sequence],
            "pair": [begin, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}},
        },
        "model": _MODEL
        | {
            "unk_token": pieces[model.unk_id()],
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges(ids, lambda piece: (-model.get_score(ids[piece]), ids[piece])),
        },
    }
    texts = [*_PROBES, *(piece.replace(_SPACE, " ") for piece in ids)]
    wanted = model.encode(texts)
    return next((found for found in (raw, raw | _unspaced()) if _encode(found, texts) == wanted), None)


def _unspaced() -> dict[str, Any]:
    """The parts of a tokenizer that puts no space before a text (add_dummy_prefix, which few models leave out)."""
    normalizer, decoder = _PARTS["normalizer"], _PARTS["decoder"]
    return {
        "normalizer": normalizer | {"normalizers": normalizer["normalizers"][1:]},
        "decoder": decoder | {"decoders": decoder["decoders"][:-1]},
    }


def complete(folder: Path) -> None:
    """Put a tokenizer.json beside a tokenizer.model that has none, with the tokens added to it, if it says the same.

    Most programs read nothing else. A folder whose settings say `legacy: false` has rules for spaces that this does not
    follow, and stays as it is. The settings name the class of transformers that takes it as it is, which encodes
    what stands after a control token as if a space stood before it, as sentencepiece does, and as these models were
    trained.
    """
    path, settings = folder / "tokenizer.json", folder / SETTINGS_FILE
    if path.is_file() or not (folder / "tokenizer.model").is_file() or read_object(settings).get("legacy") is False:
        return
    try:
        own, raw = Tokenizer.from_path(folder), fast_tokenizer(folder / "tokenizer.model")
    except CheckpointError:  # it stays as it is, and whoever reads it says so
        return
    if raw is None:
        return
    begin = raw["post_processor"]["special_tokens"]
    if read_object(settings).get("add_bos_token") is False:
        raw["post_processor"] = None
    known = {token["content"] for token in raw["added_tokens"]}
    raw["added_tokens"] += [
        {"id": token.id, "content": token.spelling, **_ADDED, "special": token.special}
        for token in added_tokens(folder)
        if token.spelling not in known
    ]
    write_json(path, raw)
    try:
        same = Tokenizer.from_path(folder)
    except CheckpointError:  # an id that the package does not keep
        same = None
    if same is None or (same.fingerprint(), same.bos, same.eos) != (own.fingerprint(), own.bos, own.eos):
        path.unlink()
        return
    # The class for LLaMA knew them without being told.
    roles = {"bos_token": next(iter(begin)), "eos_token": own.eos, "unk_token": raw["model"]["unk_token"]}
    write_json(settings, roles | read_object(settings) | {"tokenizer_class": PLAIN_CLASS})


def class_settings(fast: bool) -> dict[str, Any]:
    """Return the class in tokenizer_config.json beside a tokenizer.model: with a tokenizer.json of ours, or without."""
    return {"tokenizer_class": PLAIN_CLASS} if fast else {"tokenizer_class": "LlamaTokenizer", "legacy": True}


def merges(ids: Mapping[Token, int], order: Callable[[Token], Any] | None = None) -> list[tuple[Token, Token]]:
    """Return every way to cut a token into two tokens, first the most wanted: those of the first token.

    Args:
        ids: Id of each token.
        order: Key to sort the tokens by; that of `ids` if left out.
    """
    found: list[tuple[Token, Token]] = []
    for token in sorted(ids, key=order) if order else ids:
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        found += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found


def _encode(raw: dict[str, Any], texts: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer as Backend

    tokenizer = Backend.from_str(json.dumps(raw | {"added_tokens": []}))  # text is never a control token
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


FILE = "tokenizer.model"
_FETCH = (
    "LLaMA 1 and 2 need a sentencepiece model (499,723 bytes, md5 eeec4125e9c7560836b4873b6f8e3025), Llama 3 a file of "
    "tiktoken (2,183,982 bytes): fetch the one that is published with these weights"
)
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")
_NORMAL, _CONTROL = 1, 3  # as in the metadata of GGUF, from which bpe.py builds


def _reserved(start: int, stop: int) -> list[str]:
    return [f"<|reserved_special_token_{i}|>" for i in range(start, stop)]


_BEGIN, _END, _TURN_END, _MESSAGE_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
_HEADER = ["<|start_header_id|>", "<|end_header_id|>"]
_SPECIAL = {
    "3": [_BEGIN, _END, *_reserved(0, 4), *_HEADER, *_reserved(4, 5), _TURN_END, *_reserved(5, 251)],
    "3.1": [
        *(_BEGIN, _END, *_reserved(0, 2), "<|finetune_right_pad_id|>", *_reserved(2, 3), *_HEADER),
        *(_MESSAGE_END, _TURN_END, "<|python_tag|>", *_reserved(3, 248)),
    ],
}
"""The 256 tokens behind the vocabulary, as the Hub's tokenizers spell them: Llama 3, and 3.1 to 3.3."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, ready for a Hugging Face folder.

    Args:
        files: What goes into the folder, by name: a file to copy, or its contents.
        size: Number of tokens.
        bos: Id that begins a text.
        eos: Every id that ends one.
    """

    files: dict[str, Path | bytes]
    size: int
    bos: int
    eos: tuple[int, ...]


def read_vocabulary(folder: Path, rows: int, length: int, *, llama: str = "3.1") -> Vocabulary:
    """Read the tokenizer of the weights in `folder`, from there or from the folder above, where Meta's download puts
    it.

    Args:
        folder: Where the weights lie.
        rows: Rows of their embedding.
        length: Longest sequence of the model.
        llama: "3" or "3.1", which names the special tokens of tiktoken's file.

    Raises:
        CheckpointError: It is missing, unreadable, or cannot be of these weights.
    """
    path = next((place / FILE for place in (folder, folder.parent) if (place / FILE).is_file()), None)
    if path is None:
        raise CheckpointError(f"{FILE} is neither in {folder} nor in {folder.parent}; {_FETCH}")
    with path.open("rb") as file:
        is_tiktoken = _TIKTOKEN_LINE.fullmatch(file.readline(1000).rstrip(b"\r\n")) is not None
    found = _from_tiktoken(path, llama) if is_tiktoken else _from_sentencepiece(path)
    if not rows / 2 < found.size <= rows:  # a few rows too many are padding
        kind = "tiktoken" if is_tiktoken else "sentencepiece"
        raise CheckpointError(f"{path} ({kind}) has {found.size} tokens, the embedding {rows} rows; {_FETCH}")
    settings = json.loads(_bytes(found.files["tokenizer_config.json"])) | {"model_max_length": length}
    ids = {"bos_token_id": found.bos, "eos_token_id": list(found.eos)}
    found.files["tokenizer_config.json"] = encode_json(settings)
    found.files["generation_config.json"] = encode_json(ids)
    return found


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _settings(**tokens: str | bool) -> bytes:
    rules = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return encode_json({**tokens, **rules})


def _from_sentencepiece(path: Path) -> Vocabulary:
    tokenizer = SentencePieceTokenizer(path)
    if not tokenizer.bos:
        raise CheckpointError(f"{path} has no token that begins a text, as every LLaMA has; {_FETCH}")
    roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "unk_token": "<unk>"}
    fast = fast_tokenizer(path)
    settings = _settings(**class_settings(fast is not None), **roles)
    files: dict[str, Path | bytes] = {FILE: path, "tokenizer_config.json": settings}
    if fast is not None:  # most programs read this, and the model only with more packages
        files["tokenizer.json"] = encode_json(fast)
    return Vocabulary(files, tokenizer.size, tokenizer.control[tokenizer.bos], (tokenizer.eos_id,))


def _from_tiktoken(path: Path, llama: str) -> Vocabulary:
    ranks = _read_ranks(path)
    names = _SPECIAL[llama]
    ids = {name: len(ranks) + i for i, name in enumerate(names)}
    # tiktoken joins the two neighbours whose union has the lowest rank: merges come in the order of the ranks.
    described = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*map(_spell, ranks), *names],
        "tokenizer.ggml.token_type": [_NORMAL] * len(ranks) + [_CONTROL] * len(names),
        "tokenizer.ggml.merges": [f"{_spell(left)} {_spell(right)}" for left, right in merges(ranks)],
        "tokenizer.ggml.bos_token_id": ids[_BEGIN],
    }
    files: dict[str, Path | bytes] = {
        "tokenizer.json": encode_json(tokenizer_json(described)),
        "tokenizer_config.json": _settings(tokenizer_class=PLAIN_CLASS, bos_token=_BEGIN, eos_token=_END),
    }
    ends = tuple(ids[name] for name in (_END, _MESSAGE_END, _TURN_END) if name in ids)
    return Vocabulary(files, len(ranks) + len(names), ids[_BEGIN], ends)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Rank of each token, in order; the rank is the id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}:{number + 1} is not a token in base64 and its rank: {error}") from error
    if list(ranks.values()) != list(range(len(ranks))) or any(bytes([i]) not in ranks for i in range(256)):
        raise CheckpointError(f"{path}: expected the ranks 0, 1, 2 ... and all 256 bytes among the tokens; {_FETCH}")
    return ranks


def _alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [i for i in range(256) if i not in plain]
    return {i: chr(i) for i in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


_CHARACTERS = _alphabet()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def _spell(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def write_tokenizer_model(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    """Write tokenizer.model for the layouts that read nothing else, or say that it is missing."""
    if (tokenizer := tokenizer_model(files)) is not None:
        (folder / FILE).write_bytes(tokenizer)
    else:
        stderr().print(f"no {FILE} is written: the tokenizer is of a kind that this layout does not know")


def tokenizer_model(files: Mapping[str, Path | bytes]) -> bytes | None:
    """Return the tokenizer.model for Meta's layout: that of the folder, or tiktoken's, rebuilt from Llama 3's
    tokenizer.json.

    None if there is neither.
    """
    if FILE in files:
        return _bytes(files[FILE])
    raw: dict[str, Any] = json.loads(_bytes(files.get("tokenizer.json", b"{}")))
    model = raw.get("model", {})
    if model.get("type") != "BPE" or not model.get("ignore_merges"):
        return None
    added = {token["content"] for token in raw.get("added_tokens", [])}
    tokens = sorted((rank, token) for token, rank in model["vocab"].items() if token not in added)
    if any(rank != i or not set(token) <= _BYTES.keys() for i, (rank, token) in enumerate(tokens)):
        return None
    lines = (base64.b64encode(bytes(_BYTES[c] for c in token)) + b" %d\n" % rank for rank, token in tokens)
    return b"".join(lines)
