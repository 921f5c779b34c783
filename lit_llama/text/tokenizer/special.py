"""Special tokens in the files beside a tokenizer, and the places of a text between them.

The files say which tokens were added, and which begin, end or fill a text. A tokenizer of vocab.json and merges.txt, as
GPT-2 was published, is read as the tokenizer.json that it stands for.

Some tokenizers begin a text, or each piece of it, with a blank. A rendered conversation is encoded piece by piece,
between control tokens and at the border of prompt and answer. Other programs encode it as one text, in which a
tokenizer puts its blank before the first word only, or before what follows each added token, but never into the middle
of a text.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_llama import objects
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import MAX_ID, parse_model, read_bounded

_SEQUENCES = ("normalizers", "pretokenizers")
BLANKS = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
"""White space as Unicode has it, within the brackets of a regular expression: what an added token may take away."""
LEADING, TRAILING = re.compile(f"[{BLANKS}]*"), re.compile(f"[{BLANKS}]*\\Z")


class Place(IntEnum):
    """Place of a piece of text."""

    START = 0
    """At the beginning of the text."""
    AFTER = 1
    """Behind an added token."""
    MORE = 2
    """Behind other text, which it goes on with."""


def at_place(raw: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return a tokenizer.json that encodes a piece at a place as the whole text would be encoded there."""
    steps = ("normalizer", "pre_tokenizer")
    return {**raw, **{name: _step(raw.get(name), place) for name in steps}}


def _step(step: Any, place: Place) -> Any:
    """A normalizer or pre-tokenizer, None if nothing is left of it."""
    if not isinstance(step, Mapping) or place == Place.START:
        return step
    for name in _SEQUENCES:
        if isinstance(step.get(name), list):
            left = [found for each in step[name] if (found := _step(each, place)) is not None]
            return {**step, name: left} if left else None
    kind, more = step.get("type"), place == Place.MORE
    if kind == "Metaspace" and (more or step.get("prepend_scheme") == "first"):
        plain = {key: value for key, value in step.items() if key != "add_prefix_space"}
        return plain | {"prepend_scheme": "never"}
    if kind == "Prepend" and more:
        return None
    if kind == "ByteLevel" and more:
        return {**step, "add_prefix_space": False}
    return {**step, "strip_left": False} if kind == "Strip" and more and "strip_left" in step else step


def any_of(spellings: Collection[str]) -> re.Pattern[str]:
    """Return a pattern of one group: the longest of the spellings at the first place where there is one."""
    return _any_of(tuple(spellings))


@lru_cache(64)  # of the same few tokenizers for every row
def _any_of(spellings: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(spellings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")


SETTINGS_FILE, ADDED_FILE, NAMES_FILE = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token that stands beside a tokenizer's own; a special one is no text.

    Attributes:
        lstrip: It takes away the blanks before it.
        rstrip: It takes away the blanks behind it.
    """

    spelling: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False

    @classmethod
    def of(cls, entry: Mapping[str, Any], *, special: bool = False) -> "AddedToken":
        """Read an entry of tokenizer.json's added_tokens; `special` whatever the entry says of that."""
        flags = {name: entry.get(name) is True for name in ("lstrip", "rstrip")}
        return cls(entry["content"], entry["id"], special or entry.get("special") is True, **flags)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that stands in a model folder, empty if the file is not there."""
    return objects.read_object(path, CheckpointError, "download it again") if path.is_file() else {}


def spelling_of(token: Any) -> str:
    """Return the spelling of a token, written as text or as an object with its content; "" for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def named_tokens(folder: Path, role: str) -> list[tuple[Path, str]]:
    """Return the files that name a token such as "eos_token", and its spelling in each."""
    found = [(folder / file, read_object(folder / file).get(role)) for file in (SETTINGS_FILE, NAMES_FILE)]
    return [(path, spelling_of(value)) for path, value in found if value is not None]


def added_tokens(folder: Path) -> list[AddedToken]:
    """Return the tokens of added_tokens.json and of added_tokens_decoder in tokenizer_config.json, by id.

    A token of added_tokens.json is special if one of the files names it as such, as in transformers.

    Raises:
        CheckpointError: An entry is of another form, or two of them claim one id or one spelling.
    """
    settings, special = read_object(folder / SETTINGS_FILE), special_spellings(folder)
    entries: list[tuple[str, str, Any, bool, Any]] = [
        (ADDED_FILE, spelling, index, spelling in special, None)
        for spelling, index in read_object(folder / ADDED_FILE).items()
    ]
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{folder / SETTINGS_FILE}: added_tokens_decoder is {decoder!r}, expected an object")
    for index, token in decoder.items():
        marked = isinstance(token, dict) and token.get("special") is True
        number = int(index) if index.isdecimal() else index
        entries.append((SETTINGS_FILE, spelling_of(token), number, marked or spelling_of(token) in special, token))
    by_id: dict[int, AddedToken] = {}
    by_spelling: dict[str, AddedToken] = {}
    for file, spelling, index, marked, token in entries:
        where = f"{folder / file}: the added token {spelling!r}"
        if not spelling or type(index) is not int or not 0 <= index < MAX_ID:
            raise CheckpointError(f"{where} has the id {index!r}, expected a spelling and a number from 0 to {MAX_ID}")
        for other in (by_id.get(index), by_spelling.get(spelling)):
            if other and (other.id, other.spelling) != (index, spelling):
                raise CheckpointError(f"{where} has the id {index}, but {other.spelling!r} has the id {other.id}")
            marked = marked or bool(other and other.special)
        flags = {name: isinstance(token, dict) and token.get(name) is True for name in ("lstrip", "rstrip")}
        by_id[index] = by_spelling[spelling] = AddedToken(spelling, index, marked, **flags)
    return [by_id[index] for index in sorted(by_id)]


def special_spellings(folder: Path) -> set[str]:
    """Return every token that the files give a role to."""
    found: set[str] = set()
    for file in (SETTINGS_FILE, NAMES_FILE):
        for key, value in read_object(folder / file).items():
            if key in _LISTS and isinstance(value, list | dict):
                found.update(map(spelling_of, value.values() if isinstance(value, dict) else value))
            elif key.endswith("_token"):
                found.add(spelling_of(value))
    return found - {""}


def as_controls(data: bytes, ids: set[int]) -> bytes:
    """Return a serialized sentencepiece model in which these pieces are control tokens, so that no text becomes one."""
    model = parse_model(data)
    for index in ids:
        model.pieces[index].type = model.SentencePiece.CONTROL
    return bytes(model.SerializeToString())


def without_prefix(data: bytes) -> bytes:
    """Return a serialized sentencepiece model that puts no blank before a text."""
    model = parse_model(data)
    model.normalizer_spec.add_dummy_prefix = False
    return bytes(model.SerializeToString())


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
