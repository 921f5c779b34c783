"""sentencepiece's tokenizer.model and Hugging Face's tokenizer.json behind one small class.

Text never becomes a control token, and no beginning or end is added on its own: that is the business of encode.py.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lit_llama.errors import CheckpointError, DataError
from lit_llama.text.bounds import check_model, check_tokenizer, read_bounded
from lit_llama.text.quick.byte_level import ByteLevel, byte_level
from lit_llama.text.quick.words import Flat, Words, splits_at_spaces
from lit_llama.text.special import (
    SETTINGS_FILE,
    AddedToken,
    added_tokens,
    as_controls,
    named_tokens,
    read_object,
    spelling_of,
)

_ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
_MANY = 8_000  # texts, from which on looking for a quicker way pays
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class Tokenizer:
    """What both kinds have in common.

    Attributes:
        size: Largest id + 1 (T).
        control: Ids of the tokens that are spelled in templates, by spelling.
        bos: Spelling of the token that begins a text, "" if the model wants none.
        eos: Spelling of the token that ends a text.
        pad: Spelling of the token that other programs fill batches with, "" if there is none.
        unknown: Id that stands for what cannot be spelled, None if everything can.
        remarks: What the files say that cannot be meant, for people.
    """

    size: int
    control: dict[str, int]
    bos: str
    eos: str
    pad: str
    unknown: int | None
    remarks: list[str]
    _flat = 0  # texts that were encoded for training

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text."""
        return self.control[self.eos]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without beginning and end."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores.

        Raises:
            DataError: A text holds a lone surrogate.
        """
        try:
            return self._encode_batch(list(texts))
        except (TypeError, RuntimeError, UnicodeEncodeError) as error:
            raise DataError(f"text cannot be encoded, it may hold a lone surrogate: {error}") from error

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """The same, laid end to end: (N,) ids, and (texts,) how many are of each. Many texts take a quicker way.

        Raises:
            DataError: A text holds a lone surrogate.
        """
        self._flat += len(texts)
        if self._flat > _MANY and (quick := self._quick) is not None:
            try:
                if (found := quick.encode(texts)) is not None:
                    return found
            except (TypeError, RuntimeError, UnicodeEncodeError):
                pass  # the plain way says what is wrong
        return _laid_out(self.encode_batch(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control tokens.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        for token_id in ids:
            if not 0 <= token_id < self.size:
                raise DataError(f"id {token_id} is outside the tokenizer's vocabulary of {self.size}")
        return self._decode(list(ids))

    @cached_property
    def vocabulary(self) -> list[str | None]:
        """The token of every id, None where an id stands for nothing."""
        return self._vocabulary()

    @cached_property
    def spaced(self) -> bool:
        """Whether a text is encoded as if a space stood before it, as sentencepiece does."""
        return self.encode("a a") == 2 * self.encode("a")

    def fingerprint(self) -> str:
        """Hash of which id stands for which token, the same for a tokenizer.model and its tokenizer.json."""
        return hashlib.sha256(json.dumps(self.vocabulary).encode()).hexdigest()

    def _named(self, folder: Path, role: str, own: str) -> str:
        """The control token that the settings name as "bos_token" or "eos_token", else the tokenizer's own."""
        for path, spelling in named_tokens(folder, role):
            if self.control.get(spelling, self.unknown) != self.unknown:
                return spelling
            self.remarks.append(f"{path}: {role} is {spelling!r}, which is no control token; taking {own!r}")
        return own

    def _pad(self, folder: Path, own: str = "") -> str:
        named = [spelling for _, spelling in named_tokens(folder, "pad_token") if spelling in self.control]
        return (named or [own])[0]

    @cached_property
    def _quick(self) -> Words | ByteLevel | None:
        """Something that encodes the same in less time, if there is."""
        return self._find_quick()

    def _find_quick(self) -> Words | ByteLevel | None:
        raise NotImplementedError

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _vocabulary(self) -> list[str | None]:
        raise NotImplementedError

    @classmethod
    def from_path(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.model, a tokenizer.json, or a model folder that holds one.

        Raises:
            CheckpointError: There is none, or it cannot be used.
        """
        if path.is_dir():
            found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
            if not found:
                raise CheckpointError(f"{path} holds no {TOKENIZER_FILES[0]} and no {TOKENIZER_FILES[1]}")
            return cls.from_path(found[0])
        if not path.is_file():
            raise CheckpointError(
                f"tokenizer {path} does not exist; expected a tokenizer.model, a tokenizer.json or a model folder"
            )
        return HubTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _laid_out(ids: Sequence[Sequence[int]]) -> Flat:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model (LLaMA 1 and 2), with the tokens added to it in the JSON files beside it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        model = read_bounded(path)
        try:
            self._model.load_from_serialized_proto(model)
            self._model.id_to_piece(list(range(self._model.vocab_size())))  # all of them are text
        except (RuntimeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not a sentencepiece model (Llama 3 needs tokenizer.json)") from error
        check_model(path, model)
        self.remarks = []
        self._pieces = self._model.vocab_size()
        self.unknown = self._model.unk_id()
        if self.unknown < 0:
            raise CheckpointError(f"{path} is damaged: it has no token for what is unknown; download it again")
        added = self._added(path)
        ids = [i for i in range(self._pieces) if self._model.is_control(i)]
        self.control = {self._model.id_to_piece(i): i for i in ids} | {token.spelling: token.id for token in added}
        self.size = max(self._pieces, *(token.id + 1 for token in added), 0)
        self._shown = {token.id: token.spelling for token in added if not token.special}
        self._hidden = {token.id for token in added if token.special}
        gaps = sorted(set(range(self._pieces, self.size)) - self._shown.keys() - self._hidden)
        self._shown |= {i: f"<unused {i}>" for i in gaps}
        if gaps:
            self.remarks.append(
                f"{path}: it has {self._pieces} pieces, and {len(gaps)} ids between {gaps[0]} and {gaps[-1]} stand for "
                f"no token; the files beside it may belong to another tokenizer.model"
            )
        bos, eos, pad = (
            self._model.id_to_piece(i) if i >= 0 else ""
            for i in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )
        adds_bos = read_object(path.parent / SETTINGS_FILE).get("add_bos_token") is not False
        self.bos = self._named(path.parent, "bos_token", bos) if adds_bos else ""
        self.eos = self._named(path.parent, "eos_token", eos)
        self.pad = self._pad(path.parent, pad)
        if not self.eos:
            raise CheckpointError(f"{path} has no end-of-text token")

    def _added(self, path: Path) -> list[AddedToken]:
        """The added tokens that are neither words nor controls already; no text becomes one of them.

        Raises:
            CheckpointError: An added token and a piece of another spelling or id are in each other's way.
        """
        added, pieces = [], set()
        for token in added_tokens(path.parent):
            found = self._model.piece_to_id(token.spelling)
            is_piece = self._model.id_to_piece(found) == token.spelling  # other spellings give <unk>
            if (is_piece or token.id < self._pieces) and found != token.id:
                other = f"with id {found}" if is_piece else repr(self._model.id_to_piece(token.id))
                raise CheckpointError(
                    f"{path}: the added token {token.spelling!r} with id {token.id} clashes with the piece {other}"
                )
            if not is_piece:
                added.append(token)
            elif token.special and not self._model.is_control(found):
                added.append(token)
                pieces.add(found)
        if pieces := pieces - {self.unknown}:
            self._model.load_from_serialized_proto(as_controls(self._model.serialized_model_proto(), pieces))
        return added

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(texts, num_threads=-1)
        return ids

    def _find_quick(self) -> Words | None:
        return Words(self._model) if splits_at_spaces(self._model) else None

    def _decode(self, ids: list[int]) -> str:
        """Shown tokens stand between texts that were encoded one by one."""
        if not self._shown and not self._hidden:
            text: str = self._model.decode(ids)
            return text
        parts: list[str] = []
        run: list[int] = []
        for token_id in ids:
            if token_id in self._shown:
                parts += [self._model.decode(run), self._shown[token_id]]
                run = []
            elif token_id not in self._hidden:
                run.append(token_id)
        return "".join([*parts, self._model.decode(run)])

    def _vocabulary(self) -> list[str | None]:
        tokens = {token_id: spelling for spelling, token_id in self.control.items()}
        return [self._model.id_to_piece(i) if i < self._pieces else tokens.get(i) for i in range(self.size)]


class HubTokenizer(Tokenizer):
    """A tokenizer.json, with tokenizer_config.json and config.json beside it where they are there."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            raw = json.loads(read_bounded(path))
            check_tokenizer(raw)
            raw["truncation"] = raw["padding"] = None  # would cut or fill in silence
            self._decoder = Backend.from_str(json.dumps(raw))
            added = raw.pop("added_tokens", None) or []
            self._raw = raw
            # A copy that knows no added tokens: what somebody typed is never parsed as one.
            self._encoder = Backend.from_str(json.dumps(raw | {"added_tokens": [], "post_processor": None}))
        except BaseException as error:  # the package raises plain Exception, and panics
            if not isinstance(error, Exception) and not _panics(error):
                raise
            raise CheckpointError(f"{path} is not a usable tokenizer.json: {error}") from error
        if raw.get("model", {}).get("dropout"):
            raise CheckpointError(f"{path}: model.dropout makes encoding random; remove it")
        for token in added:
            if self._decoder.token_to_id(token["content"]) != token["id"]:
                raise CheckpointError(f"{path}: added token {token['content']!r} does not keep its id {token['id']}")
        self.control = {token["content"]: token["id"] for token in added}
        self.unknown = self._decoder.token_to_id(raw["model"].get("unk_token") or "")
        self.remarks = []
        ids = self._decoder.get_vocab(with_added_tokens=True).values()
        if not ids or len(set(ids)) < len(ids):
            raise CheckpointError(f"{path}: expected a vocabulary without duplicate ids; found {len(ids)} tokens")
        self.size = max(ids) + 1
        settings = read_object(path.parent / SETTINGS_FILE)
        self.eos = self._find_eos(path, settings)
        self.bos = self._find_bos(settings)
        self.pad = self._pad(path.parent)
        if self.bos and self.bos not in self.control:
            raise CheckpointError(f"{path} has no token {self.bos!r}, which tokenizer_config.json names as bos_token")

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

    def _find_bos(self, settings: dict[str, Any]) -> str:
        """The model wants a beginning where its settings say so, else where its tokenizer puts one on its own."""
        by_id = {index: token for token, index in self.control.items()}
        first = self._decoder.encode("a", add_special_tokens=True).ids[:1]  # "" would show an end, too
        own = by_id.get(first[0], "") if first else ""
        wanted = settings.get("add_bos_token")
        if wanted is None:
            return own
        return (spelling_of(settings.get("bos_token")) or own) if wanted else ""

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if not _panics(error):  # a regex that runs away
                raise
            raise DataError(f"text cannot be encoded: {error}") from error

    def _find_quick(self) -> ByteLevel | None:
        return byte_level(self._raw, self._encoder)

    def _decode(self, ids: list[int]) -> str:
        try:
            return self._decoder.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            if not _panics(error):
                raise
            raise CheckpointError(f"tokenizer.json cannot decode: its decoder fails ({error})") from error

    def _vocabulary(self) -> list[str | None]:
        return [self._decoder.id_to_token(i) for i in range(self.size)]


def _panics(error: BaseException) -> bool:
    """Whether this is how `tokenizers` fails within, which is no Exception."""
    return type(error).__name__ == "PanicException"


class Streamer:
    """Turns ids into text as they come, holding back what later ids may still change.

    A character of several bytes may be spread over several ids, and a tokenizer may drop a leading space: a piece is
    given out only once it is valid and its text no longer depends on what follows.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._given = 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain."""
        self._ids.extend(ids)
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        text = self._tokenizer.decode(self._ids[self._context :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """What is left, valid or not."""
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        text = self._tokenizer.decode(self._ids[self._context :])
        self._context = self._given = len(self._ids)
        return text[len(before) :]
