"""sentencepiece's tokenizer.model."""

import re
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.bounds import check_model, read_bounded
from lit_llama.text.tokenizer.places import LEADING, TRAILING, Place, any_of
from lit_llama.text.tokenizer.special import (
    SETTINGS_FILE,
    AddedToken,
    added_tokens,
    as_controls,
    read_object,
    without_prefix,
)
from lit_llama.text.tokenizer.words import Words, splits_at_spaces


class SentencePieceTokenizer(Tokenizer):
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
