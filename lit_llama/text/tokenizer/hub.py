"""Hugging Face's tokenizer.json."""

import json
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError, DataError
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.bounds import check_tokenizer, read_bounded
from lit_llama.text.tokenizer.byte_level import ByteLevel, byte_level
from lit_llama.text.tokenizer.places import TRAILING, Place, any_of, at_place
from lit_llama.text.tokenizer.special import (
    SETTINGS_FILE,
    AddedToken,
    added_tokens,
    named_tokens,
    read_object,
    special_spellings,
    spelling_of,
)

_ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")


class HubTokenizer(Tokenizer):
    """A tokenizer.json, with tokenizer_config.json and config.json beside it where they are there.

    Args:
        path: The file.
        raw: Its contents, where it is not there and stands for other files.
    """

    def __init__(self, path: Path, raw: dict[str, Any] | None = None) -> None:
        try:
            text = read_bounded(path) if raw is None else None
            raw = json.loads(text) if text is not None else raw
            assert raw is not None
            check_tokenizer(raw)
            if raw.get("truncation") or raw.get("padding"):
                text = None
            raw["truncation"] = raw["padding"] = None  # would cut or fill in silence
            own = [AddedToken.of(entry) for entry in raw.get("added_tokens") or []]
            self._raw, self.remarks = raw, []
            self._backends = {Place.START: self._complete(path, text)}
            self._decoder.encode_special_tokens = True  # what somebody typed is never parsed as one
        except BaseException as error:  # the package raises plain Exception, and panics
            if not isinstance(error, Exception) and not _panics(error):
                raise
            raise CheckpointError(f"{path} is not a usable tokenizer.json: {error}") from error
        if raw.get("model", {}).get("dropout"):
            raise CheckpointError(f"{path}: model.dropout makes encoding random; remove it")
        for token in own:
            if self._decoder.token_to_id(token.spelling) != token.id:
                raise CheckpointError(f"{path}: added token {token.spelling!r} does not keep its id {token.id}")
        self._sort()
        self.unknown = self._decoder.token_to_id(raw["model"].get("unk_token") or "")
        ids = self._decoder.get_vocab(with_added_tokens=True).values()
        if not ids or len(set(ids)) < len(ids):
            raise CheckpointError(f"{path}: expected a vocabulary without duplicate ids; found {len(ids)} tokens")
        self.size = max(ids) + 1
        settings = read_object(path.parent / SETTINGS_FILE)
        self.eos = self._find_eos(path, settings)
        self.bos, self.bos_token = self._find_bos(path.parent, settings)
        self.pad = self._pad(path.parent)
        if self.bos and self.bos not in self.control:
            raise CheckpointError(f"{path} has no token {self.bos!r}, which tokenizer_config.json names as bos_token")

    def _complete(self, path: Path, text: bytes | None) -> Any:
        """The tokenizer of the package; the settings beside the file may add tokens, and make tokens special.

        Args:
            path: The file.
            text: Its contents, where they are used as they are.

        Raises:
            CheckpointError: An added token has another id there.
        """
        from tokenizers import Tokenizer as Backend

        raw, special = self._raw, special_spellings(path.parent)
        known = Backend.from_str(json.dumps(raw)) if text is None else Backend.from_buffer(text)
        entries = {entry["content"]: entry for entry in raw.get("added_tokens") or []}
        missing = [token for token in added_tokens(path.parent) if known.token_to_id(token.spelling) is None]
        size = max(known.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        for number, token in enumerate(missing):
            if token.id != size + number:
                self.remarks.append(
                    f"{path.parent / SETTINGS_FILE}: the added token {token.spelling!r} is not in {path.name}, whose "
                    f"next id is {size + number}, not {token.id}; leaving it out"
                )
                break
            entries[token.spelling] = _entry(token)
        listed = {token.spelling for token in added_tokens(path.parent) if token.special}
        for spelling in sorted(special | listed):
            index = known.token_to_id(spelling)
            if spelling in entries:
                entries[spelling] = {**entries[spelling], "special": True}
            elif index is not None and known.encode(spelling, add_special_tokens=False).ids != [index]:
                entries[spelling] = _entry(AddedToken(spelling, index, special=True))
        if list(entries.values()) == raw.get("added_tokens"):
            return known
        raw["added_tokens"] = sorted(entries.values(), key=lambda entry: entry["id"])
        return Backend.from_str(json.dumps(raw))

    def _sort(self) -> None:
        """Take down which added tokens are special."""
        tokens = [AddedToken.of(entry) for entry in self._raw.get("added_tokens") or []]
        self.control = {token.spelling: token.id for token in tokens if token.special}
        self.words = {token.spelling: token.id for token in tokens if not token.special}
        self.strips = {token.spelling: (token.lstrip, token.rstrip) for token in tokens if token.lstrip or token.rstrip}

    def _guard(self, marks: Collection[str]) -> None:
        """See Tokenizer."""
        added = [
            {**entry, "special": entry["special"] or entry["content"] in marks} for entry in self._raw["added_tokens"]
        ]
        self._raw = {**self._raw, "added_tokens": added}
        self._backends = {}

    def _backend(self, place: Place) -> Any:
        """The tokenizer of the package that encodes texts at a place. What somebody typed is never a special token."""
        if place not in self._backends:
            from tokenizers import Tokenizer as Backend

            raw = at_place(self._raw, place)
            same = [other for other in self._backends if at_place(self._raw, other) == raw]
            made = self._backends[same[0]] if same else Backend.from_str(json.dumps(raw))
            made.encode_special_tokens = True
            self._backends[place] = made
        return self._backends[place]

    def _find_eos(self, path: Path, settings: dict[str, Any]) -> str:
        by_id = {index: token for token, index in self.control.items()}
        named = spelling_of(settings.get("eos_token"))
        eos_id = read_object(path.parent / "config.json").get("eos_token_id")
        first = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
        for candidate in (named, by_id.get(first) if isinstance(first, int) else None):
            if candidate in self.control:
                if settings.get("eos_token") is not None and candidate != named:
                    self.remarks.append(
                        f"{path.parent / SETTINGS_FILE}: eos_token is {named!r}, which is no control token; "
                        f"taking {candidate!r} of config.json"
                    )
                return candidate
        known = [token for token in _ENDS if token in self.control]
        if len(known) != 1:
            raise CheckpointError(f"{path} does not say which token ends a text; pass the model folder it belongs to")
        return known[0]

    def _find_bos(self, folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
        """What encoding puts before a text, and what templates call the beginning of one.

        A beginning is put where the settings say so, else where the tokenizer puts one on its own.
        """
        by_id = {index: token for token, index in self.control.items()}
        first = self._decoder.encode("a", add_special_tokens=True).ids[:1]  # "" would show an end, too
        own = by_id.get(first[0], "") if first else ""
        named = next((spelling for _, spelling in named_tokens(folder, "bos_token")), "")
        wanted = settings.get("add_bos_token")
        spelled = named if named in self.control else own
        if wanted is None:
            return own, spelled
        return ((named or own) if wanted else ""), spelled

    def _encode_batch(self, texts: list[str], place: Place) -> list[list[int]]:
        if place != Place.MORE or not self.words or self._backend(place) is self._backend(Place.AFTER):
            return self._encode_at(texts, place)
        # What stands behind an added word may begin with a blank again.
        ends = [found.start() if (found := self._cut.search(text)) else len(text) for text in texts]
        before = [text[:end] for text, end in zip(texts, ends, strict=True)]
        for row, (text, end) in enumerate(zip(texts, ends, strict=True)):
            if end < len(text) and self.strips.get(self._cut.findall(text)[0], (False, False))[0]:
                before[row] = TRAILING.sub("", before[row])
        behind = [text[end:] for text, end in zip(texts, ends, strict=True)]
        pairs = zip(self._encode_at(before, place), self._encode_at(behind, Place.AFTER), strict=True)
        return [first + rest for first, rest in pairs]

    @cached_property
    def _cut(self) -> re.Pattern[str]:
        return any_of(self.words)

    def _encode_at(self, texts: list[str], place: Place) -> list[list[int]]:
        try:
            found = self._backend(place).encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in found]
        except BaseException as error:
            if not _panics(error):  # a regex that runs away
                raise
            raise DataError(f"text cannot be encoded: {error}") from error

    def _find_quick(self) -> ByteLevel | None:
        return byte_level(self._raw, self._backend(Place.START))

    @property
    def _decoder(self) -> Any:
        return self._backend(Place.START)

    def _decode(self, ids: list[int]) -> str:
        try:
            text: str = self._decoder.decode(ids, skip_special_tokens=True)
            return text
        except BaseException as error:
            if not _panics(error):
                raise
            raise CheckpointError(f"tokenizer.json cannot decode: its decoder fails ({error})") from error

    def _vocabulary(self) -> list[str | None]:
        return [self._decoder.id_to_token(i) for i in range(self.size)]


def _entry(token: AddedToken) -> dict[str, Any]:
    """An added token as tokenizer.json has it."""
    flags = {"single_word": False, "lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": not token.special}
    return {"id": token.id, "content": token.spelling, **flags, "special": token.special}


def _panics(error: BaseException) -> bool:
    """Whether this is how `tokenizers` fails within, which is no Exception."""
    return type(error).__name__ == "PanicException"
