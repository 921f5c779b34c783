"""Vocabulary checks: a tokenizer, the rows of an embedding and what the folders record belong together."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError, IntegrityError
from lit_llama.text.tokenizer.base import TOKENIZER_FILES, Tokenizer
from lit_llama.text.tokenizer.special import MERGES_FILES, read_object
from lit_llama.wording import call, param

_SHOWN = 3  # extra tokens that an error spells


def check_vocabulary(folder: Path, rows: int, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError if the tokenizer knows more ids than the embedding has rows; fewer is harmless padding."""
    if tokenizer.size <= rows:
        return
    extra = [f"{tokenizer.vocabulary[i]} ({i})" for i in range(rows, tokenizer.size) if tokenizer.vocabulary[i]]
    given = {"source": folder, "destination_path": f"{folder}-resized", "resize_vocab": tokenizer.size}
    resized = call("convert", **given, inline=True)
    raise CheckpointError(
        f"{folder}: the tokenizer has {tokenizer.size} tokens, the embedding only {rows} rows: "
        f"{', '.join(extra[:_SHOWN])}{', ...' if extra[_SHOWN:] else ''} have none. Use the tokenizer that came with "
        f"these weights, or give them rows: {resized}"
    )


def holds_tokenizer(names: Collection[str]) -> bool:
    """Whether files of these names are a tokenizer that is read here."""
    return any(name in names for name in TOKENIZER_FILES) or all(name in names for name in MERGES_FILES)


def tokenizer_home(adapter_dir: Path, base: Path) -> Path:
    """Return the folder whose tokenizer an adapter was trained with: its own where it has one, as in transformers."""
    files = {path.name for path in adapter_dir.iterdir() if path.is_file()} if adapter_dir.is_dir() else set()
    return adapter_dir if holds_tokenizer(files) else base


def adapter_tokenizer(adapter_dir: Path, base: Path, rows: int) -> Tokenizer:
    """Return the tokenizer of base + adapter, which may be one folder, proven against what the folders record.

    Args:
        adapter_dir: The adapter, or the base once more.
        base: Its base model.
        rows: Rows of the base's embedding.

    Raises:
        CheckpointError: It has more tokens than there are rows.
        IntegrityError: It is not the one that is recorded.
    """
    home = tokenizer_home(adapter_dir, base)
    tokenizer = Tokenizer.from_path(home)
    if home != base and tokenizer.size > rows:
        made = f"{base}-resized"
        resized = call("convert", source=base, destination_path=made, resize_vocab=tokenizer.size)
        raise CheckpointError(
            f"{home}: the adapter's own tokenizer has {tokenizer.size} tokens, the base {base} only {rows} rows. Give "
            f"it more: {resized}, then name it with {param('base_dir', made)}"
        )
    check_vocabulary(base, rows, tokenizer)
    for record in dict.fromkeys((adapter_dir, home)):
        check_recorded(record, tokenizer, home)
    return tokenizer


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe the tokenizer that belongs to a folder, as the folder records it."""
    return {"fingerprint": tokenizer.fingerprint(), "size": tokenizer.size}


def check_recorded(folder: Path, tokenizer: Tokenizer, origin: Path) -> None:
    """Compare a tokenizer with the one that meta.json of a checkpoint or adapter folder records, if it records one.

    Args:
        folder: The folder that records.
        tokenizer: The one to be used.
        origin: Where that was read from.

    Raises:
        IntegrityError: They have other vocabularies, which embeddings of the same size would hide.
    """
    path = folder / "meta.json"
    meta = read_object(path)
    data = meta.get("data")
    recorded = data.get("tokenizer") if isinstance(data, dict) else meta.get("tokenizer")
    if not isinstance(recorded, dict) or recorded.get("fingerprint") in (None, tokenizer.fingerprint()):
        return
    raise IntegrityError(
        f"{path} records the tokenizer {recorded.get('path') or 'of this folder'} with {recorded.get('size')} tokens, "
        f"but the one in {origin} with {tokenizer.size} tokens has another vocabulary; bring back the original "
        "tokenizer files"
    )


@dataclass(frozen=True)
class SpecialIds:
    """Ids that the files of a model folder call an end, and special ids that cannot be meant.

    Args:
        ends: Ids after which a text is over, the tokenizer's own among them.
        remarks: One line for each file with ids that are left out.
    """

    ends: frozenset[int]
    remarks: tuple[str, ...]


def text_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json with those of its text model, if it is of a model that sees images, too."""
    inner = raw.get("text_config")
    return {**(inner if isinstance(inner, Mapping) else {}), **raw}


def special_ids(folder: Path, tokenizer: Tokenizer) -> SpecialIds:
    """Judge the ids that config.json and generation_config.json name by the tokenizer.

    Early conversions of LLaMA name ids of no sense, such as bos = eos = 0, which is the unknown token.

    Raises:
        CheckpointError: A file is no JSON object.
    """
    ends, remarks = {tokenizer.eos_id}, []
    for path in (folder / "config.json", folder / "generation_config.json"):
        raw, wrong = text_fields(read_object(path)), []
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            named = raw.get(key)
            for value in named if isinstance(named, list) else [] if named is None else [named]:
                reason = _objection(key, value, tokenizer, raw.get("vocab_size"))
                if reason:
                    wrong.append(f"{key} {value} ({reason})")
                elif key == "eos_token_id":
                    ends.add(value)
        if wrong:
            own = " and ".join(_own(role, tokenizer) for role in ("bos", "eos"))
            remarks.append(f"{path}: ignoring {', '.join(wrong)}; the tokenizer has {own}")
    return SpecialIds(frozenset(ends), tuple(remarks))


def _objection(key: str, value: Any, tokenizer: Tokenizer, rows: Any) -> str:
    """Why an id cannot be meant, "" if it can. A pad may be anything that has a row."""
    is_pad, size = key == "pad_token_id", tokenizer.size
    limit = max(size, rows) if is_pad and isinstance(rows, int) else size
    if type(value) is not int or not 0 <= value < limit:
        return f"not among the {limit} ids"
    if is_pad or value == tokenizer.eos_id:
        return ""
    token = tokenizer.vocabulary[value]
    bos_id = tokenizer.control.get(tokenizer.bos)
    if value == tokenizer.unknown and value != bos_id:
        return f"the unknown token {token}"
    if key == "bos_token_id":
        return ""
    if value not in tokenizer.added.values():
        return f"the word {token!r}"
    return f"the beginning {token}" if value == bos_id else ""


def _own(role: str, tokenizer: Tokenizer) -> str:
    spelling = tokenizer.bos if role == "bos" else tokenizer.eos
    return f"{role} {tokenizer.control[spelling]} ({spelling})" if spelling else f"no {role}"


def difference(one: Sequence[str | None], other: Sequence[str | None]) -> str:
    """Say how many tokens two vocabularies have, and which is the first id that they spell otherwise; "" if equal."""
    if one == other:
        return ""
    token = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    spelled = [repr(tokens[token]) if token < len(tokens) else "none" for tokens in (one, other)]
    return f"of {len(one)} and {len(other)} tokens: id {token} is {spelled[0]} and {spelled[1]}"
