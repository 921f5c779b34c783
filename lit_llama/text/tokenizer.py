"""sentencepiece's tokenizer.model and Hugging Face's tokenizer.json behind one small class.

Text never becomes a control token, and no beginning or end is added on its own: that is the business of encode.py.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError, DataError

_ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
_FILES = ("tokenizer.json", "tokenizer.model")


class Tokenizer:
    """What both kinds have in common.

    Attributes:
        size: Largest id + 1 (T).
        control: Ids of the tokens that are spelled in templates, by spelling.
        bos: Spelling of the token that begins a text, "" if the model wants none.
        eos: Spelling of the token that ends a text.
    """

    size: int
    control: dict[str, int]
    bos: str
    eos: str

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

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control tokens.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        for token_id in ids:
            if not 0 <= token_id < self.size:
                raise DataError(f"id {token_id} is outside the tokenizer's vocabulary of {self.size}")
        return self._decode(list(ids))

    def fingerprint(self) -> str:
        """Hash of which id stands for which token."""
        return hashlib.sha256(json.dumps(self._vocabulary()).encode()).hexdigest()

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
            found = [path / name for name in _FILES if (path / name).is_file()]
            if not found:
                raise CheckpointError(f"{path} holds no {_FILES[0]} and no {_FILES[1]}")
            return cls.from_path(found[0])
        if not path.is_file():
            raise CheckpointError(
                f"tokenizer {path} does not exist; expected a tokenizer.model, a tokenizer.json or a model folder"
            )
        return HubTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


class SentencePieceTokenizer(Tokenizer):
    """LLaMA 1 and 2: begins texts with <s> and ends them with </s>."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load(str(path))
        except RuntimeError as error:
            raise CheckpointError(f"{path} is not a sentencepiece model (Llama 3 needs tokenizer.json)") from error
        self.size = self._model.vocab_size()
        ids = [i for i in range(self.size) if self._model.is_control(i)]
        self.control = {self._model.id_to_piece(i): i for i in ids}
        bos, eos = self._model.bos_id(), self._model.eos_id()
        if eos < 0:
            raise CheckpointError(f"{path} has no end-of-text token")
        self.bos = self._model.id_to_piece(bos) if bos >= 0 else ""
        self.eos = self._model.id_to_piece(eos)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(texts, num_threads=-1)
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text

    def _vocabulary(self) -> list[str | None]:
        return [self._model.id_to_piece(i) for i in range(self.size)]


class HubTokenizer(Tokenizer):
    """A tokenizer.json, with tokenizer_config.json and config.json beside it where they are there."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            raw = json.loads(path.read_text("utf-8"))
            raw["truncation"] = raw["padding"] = None  # would cut or fill in silence
            self._decoder = Backend.from_str(json.dumps(raw))
            added = raw.pop("added_tokens", None) or []
            # A copy that knows no added tokens: what somebody typed is never parsed as one.
            self._encoder = Backend.from_str(json.dumps(raw | {"added_tokens": [], "post_processor": None}))
        except Exception as error:  # the package raises plain Exception
            raise CheckpointError(f"{path} is not a usable tokenizer.json: {error}") from error
        if raw.get("model", {}).get("dropout"):
            raise CheckpointError(f"{path}: model.dropout makes encoding random; remove it")
        for token in added:
            if self._decoder.token_to_id(token["content"]) != token["id"]:
                raise CheckpointError(f"{path}: added token {token['content']!r} does not keep its id {token['id']}")
        self.control = {token["content"]: token["id"] for token in added}
        ids = self._decoder.get_vocab(with_added_tokens=True).values()
        if not ids or len(set(ids)) < len(ids):
            raise CheckpointError(f"{path}: expected a vocabulary without duplicate ids; found {len(ids)} tokens")
        self.size = max(ids) + 1
        settings = read_object(path.parent / "tokenizer_config.json")
        self.eos = self._find_eos(path, settings)
        self.bos = self._find_bos(settings)
        if self.bos and self.bos not in self.control:
            raise CheckpointError(f"{path} has no token {self.bos!r}, which tokenizer_config.json names as bos_token")

    def _find_eos(self, path: Path, settings: dict[str, Any]) -> str:
        by_id = {index: token for token, index in self.control.items()}
        named = _spelling(settings.get("eos_token"))
        eos_id = read_object(path.parent / "config.json").get("eos_token_id")
        first = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
        for candidate in (named, by_id.get(first) if isinstance(first, int) else None):
            if candidate in self.control:
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
        return (_spelling(settings.get("bos_token")) or own) if wanted else ""

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the package, no Exception: a regex that runs away
                raise
            raise DataError(f"text cannot be encoded: {error}") from error

    def _decode(self, ids: list[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=True)

    def _vocabulary(self) -> list[str | None]:
        return [self._decoder.id_to_token(i) for i in range(self.size)]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that stands in a model folder, empty if the file is not there."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from error


def _spelling(token: Any) -> str:
    """A token is written as text, or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


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
