"""Special tokens in the files beside a tokenizer: which were added, and which begin, end or fill a text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama import objects
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import MAX_ID, parse_model

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
