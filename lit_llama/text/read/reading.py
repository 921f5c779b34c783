"""Sources of any kind -> one stream of conversations in a fixed order, every row accounted for."""

import difflib
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.text.config import DataKind, Documents, OnError, Tree
from lit_llama.text.message import Conversation, Dropped, Preference
from lit_llama.text.read.formats.files import UTF8, Dialect
from lit_llama.text.read.formats.paths import plain_suffix
from lit_llama.text.read.formats.sources import Division, Part, resolve
from lit_llama.text.read.raw import RawRow, RowError, Where
from lit_llama.text.read.schemas.fields import FieldLog
from lit_llama.text.read.schemas.preferences import Judged, judgement, read_judged, refuse
from lit_llama.text.read.schemas.published import join_messages
from lit_llama.text.read.schemas.recognition import FIELDS, complete, recognise
from lit_llama.wording import param


class Reader:
    """Conversations of all sources, in an order that is the same in every run; each loop over it begins anew.

    Attributes:
        rows: Conversations and dropped rows so far. Each has a number below this; a tree may come to several.
        schemas: Rows of each schema.
        files: Path, sha256 and number of raw rows of each file that has been read to its end.
        cut_turns: Last turns without an answer that were left off.
        remarks: What was read otherwise than it stands, and files that were left out; complete after a loop.
        division: How the sources are divided into train and test by themselves.
        log: What became of fields that are not simply used.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Part]],
        fields: Mapping[str, str],
        on_error: OnError,
        tree: Tree,
        weights: Sequence[float] | None,
        seed: int,
        as_text: bool,
        ignored: Sequence[str],
        remarks: dict[str, None],
        data_kind: DataKind,
        where: str | None,
    ) -> None:
        self._sources, self._fields, self._on_error = sources, fields, on_error
        self._new_log = partial(FieldLog, tree=tree, as_text=as_text, ignored=ignored)
        self._weights, self._seed = weights, seed
        self.remarks = remarks
        self._kind = data_kind
        self._where = Where(where, {theirs: ours for ours, theirs in fields.items()}) if where is not None else None
        self.division = Division.of(sources)
        self._expected: dict[str, str] = {}
        self._begin()

    def identity(self) -> list[tuple[str, str, str | None]]:
        """Name, sha256 and split of everything that will be read; what is read later has to be the same."""
        found = [(part.name, part.sha256(), part.split) for parts in self._sources for part in parts]
        self._expected = {name: sha256 for name, sha256, _ in found}
        return found

    def _begin(self) -> None:
        self.rows = 0
        self.schemas: Counter[str] = Counter()
        self.files: list[dict[str, Any]] = []
        self.cut_turns = 0
        self.log = self._new_log()
        self._unseen = dict(self._fields)
        if self._where:
            self._where.begin()

    def __iter__(self) -> Iterator[Conversation | Dropped]:
        """Read.

        Raises:
            DataError: A source or a row that cannot be used; the message names the place.
        """
        self._begin()
        for raw, split, drawn in self._drawn():
            if drawn:
                for found in self._convert(raw, split):
                    self.rows += 1
                    yield found
            else:
                self.rows += 1
                yield Dropped(self.rows - 1, raw.where, "not drawn, by the weight of its source", by_choice=True)
        if self._unseen:
            ours, theirs = next(iter(self._unseen.items()))
            raise DataError(f"{param('fields', {ours: theirs})}: no row has a field {theirs}")
        if self._where:
            self._where.check()

    def _drawn(self) -> Iterator[tuple[RawRow, str | None, bool]]:
        """Rows of all sources with their split, and whether they are wanted."""
        streams = [self._read(parts) for parts in self._sources]
        if self._weights is None:
            for stream in streams:
                yield from ((raw, split, True) for raw, split in stream)
            return
        chance = random.Random(self._seed)
        most = max(self._weights)
        left = list(range(len(streams)))
        while left:
            source = chance.choices(left, [self._weights[index] for index in left])[0]
            if found := next(streams[source], None):
                yield *found, chance.random() < self._weights[source] / most
            else:
                left.remove(source)

    def _read(self, parts: Sequence[Part]) -> Iterator[tuple[RawRow, str | None]]:
        """Rows of one source, under our names, and its entries in `files`."""
        for part in parts:
            entry = {"path": part.name, "sha256": "", "rows": 0}
            with part.guard():
                for raw in join_messages(self._renamed(part, entry)):
                    yield raw, part.split
                entry["sha256"] = part.sha256()
                if entry["sha256"] != self._expected.get(part.name, entry["sha256"]):
                    raise DataError(f"{part.name} changed while this ran: run the same command again")
            self.files.append(entry)

    def _renamed(self, part: Part, entry: dict[str, Any]) -> Iterator[RawRow]:
        for raw in part.rows():
            entry["rows"] += 1
            if raw.value is not None:
                for ours, theirs in self._fields.items():
                    if theirs in raw.value:
                        self._unseen.pop(ours, None)
                raw = replace(raw, value=_rename(raw.value, self._fields)) if self._fields else raw
            yield raw

    def _convert(self, raw: RawRow, split: str | None) -> Iterator[Conversation | Dropped]:
        """What one row comes to."""
        if raw.value is None:
            assert raw.error
            if self._on_error == "stop":
                raise raw.error
            yield Dropped(self.rows, raw.where, raw.reason)
            return
        self.log.begin_row()
        try:
            if self._where and not self._where.holds(raw.value):
                yield Dropped(
                    self.rows, raw.where, f"not asked for by {param('where', self._where.text)}", by_choice=True
                )
                return
            row = self.log.wanted(raw.value)
            if found := judgement(row, wanted=self._kind != "auto"):
                yield from self._judged(row, found, raw.where, split)
                return
            if self._kind == "preference":
                hint = (
                    f"{param('data_kind', 'preference')} needs chosen and rejected, a label that is true or false, or "
                    "rated completions"
                )
                raise RowError("no answer of the row was judged", hint=hint)
            schema = recognise(row)
            self.schemas[schema.name] += 1
            for turns in schema.turns(row, self.log):
                try:
                    messages, cut = complete(turns.messages, schema)
                except RowError as error:
                    if not error.unusable:
                        raise
                    yield Dropped(self.rows, raw.where, error.reason)
                else:
                    self.cut_turns += cut
                    yield Conversation(messages, self.rows, raw.where, schema.is_text, split, tuple(turns.tools))
        except RowError as error:
            if self._on_error == "stop":
                raise DataError(f"{raw.where}: {error}") from error
            yield Dropped(self.rows, raw.where, error.reason)

    def _judged(
        self, row: Mapping[str, Any], found: str, where: str, split: str | None
    ) -> Iterator[Conversation | Dropped]:
        """What a row of preferences comes to.

        Raises:
            RowError: It cannot be used, or nobody has said what to make of it.
        """
        if self._kind == "auto":
            raise refuse(found, row)
        pairs = self._kind == "preference"
        self.schemas[found if pairs else f"{found}, of which the wanted answers"] += 1
        try:
            for one in read_judged(row, found, self.log, pairs=pairs):
                yield self._conversation(one, where, split, pairs)
        except RowError as error:
            if not error.unusable:
                raise
            yield Dropped(self.rows, where, error.reason)

    def _conversation(self, one: Judged, where: str, split: str | None, pairs: bool) -> Conversation | Dropped:
        """What is made of judged answers."""
        self.cut_turns += one.cut
        if one.chosen is None and not pairs:
            return Dropped(self.rows, where, "the answer is not wanted (its label is false)", by_choice=True)
        answer = one.chosen or one.rejected
        assert answer
        messages, tools = (*one.prompt, answer), one.tools
        if not pairs:
            return Conversation(messages, self.rows, where, False, split, tools)
        wanted, other = one.chosen is not None, one.rejected if one.chosen else None
        return Preference(messages, self.rows, where, False, split, tools, wanted, other)


def read_conversations(
    sources: Sequence[str],
    *,
    fields: Mapping[str, str] = {},
    on_error: OnError = "stop",
    tree: Tree = "best",
    weights: Sequence[float] | None = None,
    seed: int = 42,
    documents: Documents | None = None,
    dialect: Dialect = UTF8,
    as_text: bool = False,
    ignore_fields: Sequence[str] = (),
    data_kind: DataKind = "auto",
    where: str | None = None,
) -> Reader:
    """Read instruction, chat or text data. No row is read before the loop over the result begins.

    Args:
        sources: Files, folders, patterns, folders of the datasets library, or data sets of the Hub as OWNER/NAME, with
            :CONFIGURATION and #SPLIT where they are wanted. A file that two sources name is read with the first one.
        fields: Our name of a field -> its name in the data.
        on_error: A row that cannot be used stops the reading, or is dropped with its reason. Rows without anything to
            learn are dropped in any case; what leaves the rest of a file unreadable stops it in any case.
        tree: Of a tree of messages, take the best replies or every branch.
        weights: One for each source. They are relative: of the source with the largest one every row is read, of one
            with half that weight about half the rows, and the sources are interleaved by them. No row comes twice, and
            what is not drawn is dropped with that reason. Without weights, the sources follow one another.
        seed: Of the drawing.
        documents: The sources are files of plain text, or folders of such; this says what a document is.
        dialect: How the text of files is written.
        as_text: Numbers, lists and objects where a text belongs become JSON text, and are counted; else they
            are errors.
        ignore_fields: Fields of rows and of messages, by their names in the data, that are left out.
        data_kind: Rows with judged answers are errors, come to their wanted answers, or to preferences.
        where: A condition on fields, by their names in the data: other rows are dropped by choice.

    Raises:
        UserError: An option is wrong.
        DataError: A source is missing.
    """
    for ours in fields:
        if ours not in FIELDS:
            close = difflib.get_close_matches(ours, FIELDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{param('fields')}: {ours} is none of {', '.join(FIELDS)}{hint}")
    if not sources:
        raise UserError("no sources: name a file, a folder or a data set of the Hub")
    if weights is not None:
        if len(weights) != len(sources):
            raise UserError(
                f"{param('weights')}: found {len(weights)} for {len(sources)} sources, expected one for each"
            )
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"{param('weights')}: found {weight}, expected a number above 0; leave out unwanted sources"
                )
    remarks: dict[str, None] = {}
    parts = resolve(sources, documents, dialect, lambda remark: remarks.setdefault(remark))
    names = [part.name for source in parts for part in source]
    if dialect.is_of_csv and not any(plain_suffix(Path(name)) in (".csv", ".tsv") for name in names):
        raise UserError(
            f"{param('quoting')} and {param('escape')} are about CSV, and no source is named .csv or .tsv: leave them "
            "out"
        )
    return Reader(parts, fields, on_error, tree, weights, seed, as_text, ignore_fields, remarks, data_kind, where)


def _rename(row: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    given = {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}
    taken = {fields[ours] for ours in given}
    # A field whose name is taken by another one keeps a name of its own, so that it is not lost in silence.
    rest = {f"{name} (not the renamed one)" if name in given else name: row[name] for name in row if name not in taken}
    return rest | given
