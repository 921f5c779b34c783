"""A sentencepiece model of LLaMA's kind -> the tokenizer.json that does the same, which is all that most programs read.

sentencepiece joins the two neighbours whose union has the best score, so every way to cut a piece into two pieces is a
merge, as wanted as the score of the piece is high.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lit_llama.errors import CheckpointError
from lit_llama.folder.publish import write_json
from lit_llama.text.tokenizer.base import Tokenizer
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
