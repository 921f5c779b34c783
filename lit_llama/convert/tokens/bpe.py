"""Byte-level BPE in the two spellings: metadata of a GGUF file, and tokenizer.json."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_llama.convert.tokens.spm import padding
from lit_llama.errors import CheckpointError
from lit_llama.text.pieces import Kind

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_NFC = {"type": "NFC"}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _BYTES | {"use_regex": False}]


class _Pre(NamedTuple):
    """What `tokenizer.ggml.pre` stands for.

    Args:
        steps: How text is cut before merging.
        normalizer: What is done to it before that.
        whole: A word that is in the vocabulary is not merged.
        bos: Texts begin with a token of their own where the file does not say (as in llama.cpp).
    """

    steps: list[dict[str, Any]]
    normalizer: dict[str, Any] | None = None
    whole: bool = False
    bos: bool = False


_PRE: dict[str, _Pre] = {
    "gpt-2": _Pre([_BYTES | {"use_regex": True}]),
    "smollm": _Pre([_DIGITS, _BYTES | {"use_regex": True}]),
    "llama-bpe": _Pre(_split(_LLAMA3), whole=True, bos=True),
    "qwen2": _Pre(_split(_QWEN2), _NFC),
    "deepseek-r1-qwen": _Pre(_split(_QWEN2)),
    "tekken": _Pre(_split(_TEKKEN), whole=True, bos=True),
}


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the tokenizer of `tokenizer.ggml.*`.

    Raises:
        CheckpointError: It cuts text in a way that is not implemented, or contradicts itself.
    """
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in _PRE:
        raise CheckpointError(f"tokenizer.ggml.pre is {name!r}, implemented are {', '.join(_PRE)}")
    pre = _PRE[name]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens holds the same token twice")
    entries = list(enumerate(zip(tokens, types, strict=True)))
    vocabulary = {token: index for index, (token, kind) in entries if kind != Kind.UNUSED or token != padding(index)}
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == Kind.CONTROL,
        }
        for index, (token, kind) in entries
        if kind in (Kind.CONTROL, Kind.USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps},
        "post_processor": _post_processor(metadata, tokens),
        "decoder": _BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.whole,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether texts begin with a token of their own."""
    pre = _PRE[metadata.get("tokenizer.ggml.pre", "gpt-2")]
    return bool(metadata.get("tokenizer.ggml.add_bos_token", pre.bos))


def _post_processor(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Puts the beginning-of-text token first where the model wants one."""
    if not adds_bos(metadata):
        return None
    bos_id = metadata["tokenizer.ggml.bos_token_id"]
    bos = {"SpecialToken": {"id": tokens[bos_id], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[bos_id]: {"id": tokens[bos_id], "ids": [bos_id], "tokens": [tokens[bos_id]]}},
    }


def is_byte_level(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json works on bytes, as GPT-2 does."""
    return any(step.get("type") == "ByteLevel" for step in _steps(raw.get("pre_tokenizer"), "pretokenizers"))


def to_metadata(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What `tokenizer_json` reads, without the tokens: `pre` and `merges` of `tokenizer.ggml.*`.

    Raises:
        CheckpointError: GGUF has no name for the way in which the tokenizer.json cuts text.
    """
    model = raw["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type") != "BPE" or odd or model.get("byte_fallback"):
        raise CheckpointError(f"tokenizer.json: a {model.get('type')} model {' '.join(odd)} has no form in GGUF")
    steps = _comparable(_steps(raw.get("pre_tokenizer"), "pretokenizers"))
    normalizers = _steps(raw.get("normalizer"), "normalizers")
    for name, pre in _PRE.items():
        same = steps == _comparable(pre.steps) and normalizers == ([pre.normalizer] if pre.normalizer else [])
        if same and pre.whole == bool(model.get("ignore_merges")):
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            return {"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    raise CheckpointError(
        f"tokenizer.json cuts text in a way that GGUF has no name for here; known are {', '.join(_PRE)}. "
        f"It has normalizer {raw.get('normalizer')} and pre_tokenizer {raw.get('pre_tokenizer')}"
    )


def _steps(part: Mapping[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """One step, or a sequence of them, as a list."""
    if not part:
        return []
    return [dict(step) for step in part[members]] if part.get("type") == "Sequence" else [dict(part)]


def _comparable(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps without what changes no id."""
    steps = [
        step | {"use_regex": step.get("use_regex", True)} if step["type"] == "ByteLevel" else step for step in steps
    ]
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]
