"""From raw rows to a data folder: read, encode, split, write, account for every row, and say what is in it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

from lit_llama.errors import DataError
from lit_llama.folder import publish, write_json
from lit_llama.progress import count
from lit_llama.text.conversation import Conversation, Dropped, Message
from lit_llama.text.dataset import FORMAT, META_FILE, SPLITS, TEST_FILE, Split, step_plan
from lit_llama.text.prompts import TEMPLATE_FILE
from lit_llama.text.read.reading import Reader
from lit_llama.text.report.findings import Findings
from lit_llama.text.report.report import write_report
from lit_llama.text.report.show import ShownSample, shown_sample
from lit_llama.text.samples import Encoded, Encoder, OnError, Overflow, Rendered, TrainOn
from lit_llama.text.sides import Sides, SplitRule, trained_tokens
from lit_llama.text.split import hash_side, shuffle_split
from lit_llama.text.styles import PromptStyle
from lit_llama.text.texts import Texts
from lit_llama.text.tokenizer import Tokenizer
from lit_llama.text.vocabulary import identity

T = TypeVar("T")
Rows = list[Conversation | Dropped]
CHUNK = 2000  # rows encoded at a time, enough for the tokenizer to use all cores


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows become samples; what a data folder says of itself.

    Args:
        max_seq_length: Most tokens of a sample.
        mask_inputs: Only answers carry loss.
        train_on: Every answer of a conversation, or the last one.
        overflow: What becomes of longer rows.
        split: By a hash of the question, by shuffling, or as the sources are divided.
        test_split_size: Rows for testing: below 1 their share, else (shuffle) their number.
        seed: Of the split.
    """

    max_seq_length: int
    mask_inputs: bool
    train_on: TrainOn
    overflow: Overflow
    split: SplitRule
    test_split_size: float
    seed: int


def prepare(
    reader: Reader,
    destination: Path,
    *,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    style: PromptStyle,
    rules: Rules,
    on_error: OnError = "stop",
    key: str = "",
    plan: Mapping[str, int] | None = None,
    commands: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the data folder `destination`.

    Args:
        reader: The raw rows.
        destination: Folder to make or to replace; other files in it stay.
        tokenizer: Of the model to be tuned.
        tokenizer_path: Where it is, for people.
        style: How conversations are rendered.
        rules: How rows become samples.
        on_error: A row that the style cannot render stops the command, or is dropped with its reason.
        key: Identity of everything that decides the contents.
        plan: For the report: batch_size and micro_batch_tokens to count steps with.
        commands: For the report: what made this folder.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or a split without rows.
    """
    encoder = Encoder(
        tokenizer,
        style,
        max_seq_length=rules.max_seq_length,
        mask_inputs=rules.mask_inputs,
        train_on=rules.train_on,
        overflow=rules.overflow,
        on_error=on_error,
    )
    with publish(destination, META_FILE, replace=True) as folder, _Work(folder, rules) as work:
        for rows, encoded in _ahead(_encoded(_ahead(_rendered(reader, encoder)), encoder)):
            work.drop(row for row in rows if isinstance(row, Dropped))
            work.add([row for row in rows if isinstance(row, Conversation)], encoded)
        work.finish(reader.rows)
        meta = {
            "format": FORMAT,
            "key": key,
            "source": {"file": _name(reader.files), "files": reader.files, "rows": reader.rows},
            "schemas": dict(reader.schemas),
            "tokenizer": identity(tokenizer) | {"path": str(tokenizer_path)},
            "prompt_style": style.name,
            **asdict(rules),
            "kept": reader.rows - sum(map(len, work.dropped.values())),
            "cut": work.cut,
            "in_parts": work.parts,
            "dropped": work.dropped,
            "turns_cut": reader.cut_turns,
            "splits": {name: dict(counts) for name, counts in work.sides.counts.items()},
        }
        findings = work.findings.result(work.text_of)
        leaked = findings["leakage"]
        meta["test_rows_also_in_train"] = sum(leaked[kind]["rows"] for kind in ("exact", "normalised"))
        (folder / TEMPLATE_FILE).write_text(style.jinja(bos=bool(tokenizer.bos)), "utf-8")
        steps = step_plan(work.findings.lengths_of("train"), seed=rules.seed, **plan) if plan else None
        samples = work.shown(tokenizer)
        write_report(folder, meta, findings, samples, name=destination.name, plan=steps, commands=commands)
        meta["files"] = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        write_json(folder / META_FILE, meta)
    return meta


class _Work:
    """The contents of a data folder in the making."""

    def __init__(self, folder: Path, rules: Rules) -> None:
        self._rules, self._folder = rules, folder
        self._drawn = rules.split == "shuffle"
        self.sides = Sides(folder, drawn=self._drawn)
        self.findings = Findings()
        self.dropped: dict[str, list[str]] = {}
        self.cut: list[str] = []
        self.parts = 0
        self._texts = Texts(folder)  # of each sample, by its number of arrival
        self._test = (folder / TEST_FILE).open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._test.close()

    def drop(self, rows: Iterable[Dropped]) -> None:
        """Account for rows that are left out."""
        for row in rows:
            self.dropped.setdefault(row.reason, []).append(row.where)

    def add(self, conversations: Sequence[Conversation], encoded: Encoded) -> None:
        """Take in some rows and the samples that they came to."""
        self.drop(encoded.dropped)
        where = {conversation.row: conversation.where for conversation in conversations}
        self.cut += [where[row] for row in encoded.cut]
        self.parts += len(encoded.parts)
        side_of = {conversation.row: self._side(conversation) for conversation in conversations}  # all parts on one
        rows = [conversation.row for conversation in encoded.conversations]
        sides = [side_of[row] for row in rows]
        self.sides.add(encoded.batch, rows, sides)
        lengths, trained = encoded.batch.lengths.tolist(), trained_tokens(encoded.batch).tolist()
        for conversation, side, tokens, learned in zip(encoded.conversations, sides, lengths, trained, strict=True):
            messages = conversation.messages
            self.findings.add(len(self._texts), conversation.where, side, *words(messages), tokens, learned)
            self._texts.add(messages)
            if side == "test":
                self._hold_out(messages)

    def _side(self, conversation: Conversation) -> str:
        if self._rules.split == "given":
            if conversation.split is None:
                raise DataError(
                    f"{conversation.where}: --split given, but the sources do not say whether this row is for training "
                    "or for testing (by names such as train.jsonl and test.jsonl, or splits of a data set)"
                )
            return "train" if conversation.split == "train" else "test"
        if self._drawn:
            return ""
        question = next((message for message in conversation.messages if message["role"] == "user"), None)
        opening = (question or conversation.messages[0])["content"] + (question or {}).get("input", "")
        return hash_side(opening, self._rules.test_split_size, self._rules.seed)

    def _hold_out(self, messages: Sequence[Message]) -> None:
        self._test.write(json.dumps(raw_row(messages), ensure_ascii=False) + "\n")

    def finish(self, rows: int) -> None:
        """Deal what is not dealt yet.

        Args:
            rows: Raw rows, those that were dropped among them.

        Raises:
            DataError: A split has no rows.
        """
        if self._drawn:
            size = self._rules.test_split_size
            drawn = shuffle_split(rows, int(size if size >= 1 else size * rows), self._rules.seed)
            for name, samples in self.sides.deal(dict(zip(SPLITS, drawn, strict=True))).items():
                self.findings.assign(name, samples)
                for number in samples.tolist() if name == "test" else ():
                    self._hold_out(self._texts[number])
        self._test.close()
        for name, counts in self.sides.counts.items():
            if not counts.samples:
                lost = ", ".join(f"{len(places)} {reason}" for reason, places in self.dropped.items()) or "none dropped"
                size = self._rules.test_split_size
                hint = f"; --test_split_size is {size}, and --seed another draw" if self._rules.split == "hash" else ""
                raise DataError(f"no row of the {name} split is usable: of {rows} rows {lost}{hint}")
        self.sides.close()

    def text_of(self, number: int) -> tuple[str, str]:
        """Prompt and answer of a sample."""
        return words(self._texts[number])

    def shown(self, tokenizer: Tokenizer) -> list[ShownSample]:
        """The first samples of each split, and the longest of train."""
        shown = []
        for name, wanted in (("train", 6), ("test", 2)):
            split = Split(self._folder, name)
            rows = dict.fromkeys([*range(min(wanted, len(split))), int(split.lengths.argmax())])
            for row in rows:
                ids, labels = split[row]
                where = f"{name} {row}"
                shown.append(shown_sample(tokenizer, ids.tolist(), labels.tolist(), row=row, where=where, split=name))
        return shown


def words(messages: Sequence[Message]) -> tuple[str, str]:
    """Everything before the last answer, and that answer."""
    *before, last = messages
    parts = [part for message in before for part in (message["content"], message.get("input", "")) if part]
    return "\n".join(parts), last["content"]


def raw_row(messages: Sequence[Message]) -> dict[str, Any]:
    """A row as generate/instruct.py reads it: Alpaca's fields for a question and its answer, else all turns."""
    roles = [message["role"] for message in messages]
    if roles == ["assistant"]:
        return {"text": messages[0]["content"]}
    if roles != ["user", "assistant"]:
        return {"messages": list(messages)}
    question, answer = messages
    return {"instruction": question["content"], "input": question.get("input", ""), "output": answer["content"]}


def _rendered(reader: Reader, encoder: Encoder) -> Iterator[tuple[Rows, Rendered]]:
    """Some rows at a time, ready for the tokenizer."""
    rows = iter(count(reader, "encoding"))
    while chunk := list(islice(rows, CHUNK)):
        yield chunk, encoder.render([row for row in chunk if isinstance(row, Conversation)])


def _encoded(rendered: Iterable[tuple[Rows, Rendered]], encoder: Encoder) -> Iterator[tuple[Rows, Encoded]]:
    """The same rows, and what they came to."""
    for rows, part in rendered:
        yield rows, encoder.encode(part)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, each made by another thread while the one before is worked on.

    The tokenizer needs no Python: while it encodes, rows are read before it and written behind it.
    """
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(next, items, None)
        while (item := made.result()) is not None:
            made = pool.submit(next, items, None)
            yield item


def _name(files: Sequence[Mapping[str, Any]]) -> str:
    return files[0]["path"] if len(files) == 1 else f"{len(files)} files"
