"""Byte-level BPE in the two spellings: metadata of a GGUF file, and tokenizer.json."""

from collections.abc import Mapping
from typing import Any

from lit_llama.convert.tokens import cuts, listed
from lit_llama.convert.tokens.cuts import BYTES
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.pieces import Kind


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the tokenizer of `tokenizer.ggml.*`.

    Raises:
        CheckpointError: It cuts text in a way that is not implemented, or contradicts itself.
    """
    cut = cuts.of_metadata(metadata)
    tokens = listed.tokens(metadata)
    types = listed.kinds(metadata, len(tokens))
    entries = list(enumerate(zip(tokens, types, strict=True)))
    vocabulary = {
        token: index for index, (token, kind) in entries if kind != Kind.UNUSED or token != listed.padding(index)
    }
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
        "normalizer": cut.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut.steps},
        "post_processor": _post_processor(metadata, tokens),
        "decoder": BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut.whole,
            "vocab": vocabulary,
            "merges": listed.merges(metadata, vocabulary),
        },
    }


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether texts begin with a token of their own."""
    return bool(metadata.get("tokenizer.ggml.add_bos_token", cuts.of_metadata(metadata).bos))


def _post_processor(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Puts the beginning-of-text token first where the model wants one."""
    if not adds_bos(metadata):
        return None
    bos_id = listed.token_id(metadata, "bos", len(tokens))
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
    """Return the metadata that `tokenizer_json` reads, without the tokens: `pre` and `merges` of `tokenizer.ggml.*`.

    Raises:
        CheckpointError: GGUF has no name for the way in which the tokenizer.json cuts text.
    """
    model = raw["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type") != "BPE" or odd or model.get("byte_fallback"):
        raise CheckpointError(f"tokenizer.json: a {model.get('type')} model {' '.join(odd)} has no form in GGUF")
    steps = _comparable(_steps(raw.get("pre_tokenizer"), "pretokenizers"))
    normalizers = _steps(raw.get("normalizer"), "normalizers")
    for name, cut in cuts.CUTS.items():
        same = steps == _comparable(cut.steps) and normalizers == ([cut.normalizer] if cut.normalizer else [])
        if same and cut.whole == bool(model.get("ignore_merges")):
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            return {"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    raise CheckpointError(
        f"tokenizer.json cuts text in a way that GGUF has no name for here; known are {', '.join(cuts.CUTS)}. "
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
