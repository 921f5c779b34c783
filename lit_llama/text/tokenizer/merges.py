"""A tokenizer of vocab.json and merges.txt, as GPT-2 was published, read as the tokenizer.json that it stands for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import read_bounded
from lit_llama.text.tokenizer.special import SETTINGS_FILE, added_tokens, read_object, special_spellings, spelling_of

MERGES_FILES = ("vocab.json", "merges.txt")
_QWEN = (  # Qwen 2's way of cutting text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("GPT2Tokenizer", "CodeGenTokenizer")
_END = "<|endoftext|>"  # special in both, also where nothing names it


def from_merges(folder: Path) -> dict[str, Any]:
    """Return the tokenizer.json that vocab.json and merges.txt stand for.

    How text is cut, the two files do not say: that is a matter of the class that tokenizer_config.json names.

    Raises:
        CheckpointError: A file is damaged, or the class is one that cuts text in another way.
    """
    for name in MERGES_FILES:
        read_bounded(folder / name)
    settings = read_object(folder / SETTINGS_FILE)
    kind = _class(settings, read_object(folder / "config.json"))
    vocabulary = read_object(folder / MERGES_FILES[0])
    if not vocabulary or not all(type(index) is int for index in vocabulary.values()):
        raise CheckpointError(f"{folder / MERGES_FILES[0]} is no vocabulary: expected an id for every token")
    if kind == "Qwen2Tokenizer":
        split = {"type": "Split", "pattern": {"Regex": _QWEN}, "behavior": "Isolated", "invert": False}
        cut: dict[str, Any] = {"type": "Sequence", "pretokenizers": [split, _bytes(False, use_regex=False)]}
        normalizer: dict[str, Any] | None = {"type": "NFC"}
    elif kind in _GPT2:
        cut, normalizer = _bytes(bool(settings.get("add_prefix_space")), use_regex=True), None
    else:
        raise CheckpointError(
            f"{folder / SETTINGS_FILE} names the class {kind}, whose way of cutting text {' and '.join(MERGES_FILES)} "
            "do not say; save a tokenizer.json with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    model = {
        **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": ""},
        **{"end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
        **{"vocab": vocabulary, "merges": _merges(folder / MERGES_FILES[1])},
    }
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(folder, vocabulary)},
        **{"normalizer": normalizer, "pre_tokenizer": cut, "post_processor": None},
        **{"decoder": _bytes(True, use_regex=True), "model": model},
    }


def _class(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class of the tokenizer, without the "Fast" of its twin; the model's own where the settings name none."""
    named = settings.get("tokenizer_class")
    if isinstance(named, str):
        return named.removesuffix("Fast")
    return "Qwen2Tokenizer" if str(config.get("model_type")).startswith(("qwen2", "qwen3")) else "GPT2Tokenizer"


def _bytes(prefix: bool, *, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


def _merges(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{path}:line {number} is {line[:40]!r}, expected two tokens and a space between")
        merges.append(pair)
    return merges


def _added(folder: Path, vocabulary: Mapping[str, int]) -> list[dict[str, Any]]:
    """Added tokens, and those that the settings give a role to, as entries of a tokenizer.json."""
    decoder = read_object(folder / SETTINGS_FILE).get("added_tokens_decoder") or {}
    flags = {spelling_of(entry): entry for entry in decoder.values() if isinstance(entry, dict)}
    found = {token.spelling: (token.id, token.special) for token in added_tokens(folder)}
    for spelling in sorted({_END, *special_spellings(folder)}):
        if spelling not in found and spelling in vocabulary:
            found[spelling] = vocabulary[spelling], True
    entries = []
    for spelling, (index, special) in sorted(found.items(), key=lambda item: item[1][0]):
        own = {name: flags.get(spelling, {}).get(name) is True for name in ("single_word", "lstrip", "rstrip")}
        normalized = flags.get(spelling, {}).get("normalized", not special) is True
        entries.append({"id": index, "content": spelling, **own, "normalized": normalized, "special": special})
    return entries
