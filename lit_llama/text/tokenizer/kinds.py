"""The two kinds of tokenizers: Hugging Face's tokenizer.json, and sentencepiece's tokenizer.model."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError, DataError
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.bounds import check_model, check_tokenizer, read_bounded
from lit_llama.text.tokenizer.quick import ByteLevel, Words, byte_level, splits_at_spaces
from lit_llama.text.tokenizer.special import (
    LEADING,
    SETTINGS_FILE,
    TRAILING,
    AddedToken,
    Place,
    added_tokens,
    any_of,
    as_controls,
    at_place,
    named_tokens,
    read_object,
    special_spellings,
    spelling_of,
    without_prefix,
)

_ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")


class HubTokenizer(Tokenizer, ending=".json"):
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


class SentencePieceTokenizer(Tokenizer, ending=".model"):
    """A tokenizer.model (LLaMA 1 and 2), with the tokens added to it in the JSON files beside it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        model = read_bounded(path)
        check_model(path, model)
        try:
            self._model.load_from_serialized_proto(model)
            self._model.id_to_piece(list(range(self._model.vocab_size())))  # all of them are text
        except (RuntimeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not a sentencepiece model (Llama 3 needs tokenizer.json)") from error
        self.remarks = []
        self._pieces = self._model.vocab_size()
        self.unknown = self._model.unk_id()
        if self.unknown < 0:
            raise CheckpointError(f"{path} is damaged: it has no token for what is unknown; download it again")
        added = self._added(path)
        ids = [i for i in range(self._pieces) if self._model.is_control(i)]
        self.control = {self._model.id_to_piece(i): i for i in ids}
        self.control |= {token.spelling: token.id for token in added if token.special}
        self.words = {token.spelling: token.id for token in added if not token.special}
        self.strips = {token.spelling: (token.lstrip, token.rstrip) for token in added if token.lstrip or token.rstrip}
        self.size = max(self._pieces, *(token.id + 1 for token in added), 0)
        self._shown = {token.id: token.spelling for token in added if not token.special and token.id >= self._pieces}
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
        settings = read_object(path.parent / SETTINGS_FILE)
        self._legacy = settings.get("legacy") is not False  # a blank before every piece of text, not the first alone
        self.bos_token = self._named(path.parent, "bos_token", bos)
        self.bos = self.bos_token if settings.get("add_bos_token") is not False else ""
        self.eos = self._named(path.parent, "eos_token", eos)
        self.pad = self._pad(path.parent, pad)
        if not self.eos:
            raise CheckpointError(f"{path} has no end-of-text token")

    def _added(self, path: Path) -> list[AddedToken]:
        """The added tokens that are no controls already; no text becomes a special one of them.

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
            if is_piece and self._model.is_control(found):
                continue
            added.append(token)
            if is_piece and token.special:
                pieces.add(found)
        if pieces := pieces - {self.unknown}:
            self._model.load_from_serialized_proto(as_controls(self._model.serialized_model_proto(), pieces))
        return added

    def _encode_batch(self, texts: list[str], place: Place) -> list[list[int]]:
        if not self.words:
            return self._pieces_of(texts, [place] * len(texts))
        cut = [self._cut.split(text) for text in texts]  # texts and words in turn
        parts = [self._stripped(pieces) for pieces in cut]
        plain = [part for pieces in parts for part in pieces[::2]]
        places = [Place.AFTER if number else place for pieces in parts for number in range(len(pieces[::2]))]
        found = iter(self._pieces_of(plain, places))
        return [
            [i for number, part in enumerate(pieces) for i in ([self.words[part]] if number % 2 else next(found))]
            for pieces in parts
        ]

    def _stripped(self, pieces: list[str]) -> list[str]:
        """Texts and words in turn, without the blanks that the words take away."""
        for number in range(1, len(pieces), 2):
            before, behind = self.strips.get(pieces[number], (False, False))
            pieces[number - 1] = TRAILING.sub("", pieces[number - 1]) if before else pieces[number - 1]
            pieces[number + 1] = LEADING.sub("", pieces[number + 1], count=1) if behind else pieces[number + 1]
        return pieces

    @cached_property
    def _cut(self) -> re.Pattern[str]:
        return any_of(self.words)

    def _pieces_of(self, texts: list[str], places: Sequence[Place]) -> list[list[int]]:
        """Ids of texts without words, each at its place."""
        rows = [row for row, place in enumerate(places) if self._goes_on(texts[row], place)]
        if not rows:
            ids: list[list[int]] = self._model.encode(texts, num_threads=-1)
            return ids
        plain = iter(self._plain.encode([texts[row] for row in rows], num_threads=-1))
        others = set(range(len(texts))) - set(rows)
        found = iter(self._model.encode([texts[row] for row in sorted(others)], num_threads=-1))
        return [next(found if row in others else plain) for row in range(len(texts))]

    def _goes_on(self, text: str, place: Place) -> bool:
        """Whether no blank is put before a text."""
        if self._legacy:
            return place == Place.MORE
        return place != Place.START or text.startswith((" ", "▁"))

    @cached_property
    def _plain(self) -> Any:
        """The model, putting no blank before a text."""
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor()
        model.load_from_serialized_proto(without_prefix(self._model.serialized_model_proto()))
        return model

    def _guard(self, marks: Collection[str]) -> None:
        """See Tokenizer. A mark among the pieces is one that text may come to, which the encoder finds out."""

    def _find_quick(self) -> Words | None:
        if not self._legacy:
            return None
        return Words(self._model, self._plain) if splits_at_spaces(self._model) else None

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
        tokens = {token_id: spelling for spelling, token_id in self.added.items()}
        return [self._model.id_to_piece(i) if i < self._pieces else tokens.get(i) for i in range(self.size)]
