"""From raw rows to a data folder: read, encode, split, write, account for every row, and say what is in it."""

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError
from lit_llama.folder import publish, write_json
from lit_llama.text.blocks import Block, encode_blocks, rare_collections, read_blocks
from lit_llama.text.dataset import FORMAT, META_FILE, SPLITS, TEST_FILE, TEST_KEYS_FILE, step_plan
from lit_llama.text.encode import begins
from lit_llama.text.losses import Losses, Tally, keep_long_rows
from lit_llama.text.members import Members, opening, opening_key
from lit_llama.text.message import Conversation, Message
from lit_llama.text.prompts import TEMPLATE_FILE
from lit_llama.text.read.reading import Reader
from lit_llama.text.render import OnError, TrainOn, TypedEnds
from lit_llama.text.report.findings import NEAR_DUPLICATES, Findings
from lit_llama.text.report.report import write_report
from lit_llama.text.report.show import ShownSample, shown_sample
from lit_llama.text.samples import Encoded, Encoder, Overflow
from lit_llama.text.shards import Shards
from lit_llama.text.sides import Sides, SplitRule, trained_tokens
from lit_llama.text.split import hash_side, shuffle_split
from lit_llama.text.splits import SHARE, far_from, held_rows, side_few, usable
from lit_llama.text.styles import PromptStyle
from lit_llama.text.texts import Texts
from lit_llama.text.thoughts import ThoughtsRule
from lit_llama.text.tokenizer import Tokenizer
from lit_llama.text.vocabulary import identity

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows become samples; what a data folder says of itself.

    Args:
        max_seq_length: Most tokens of a sample.
        mask_inputs: Only answers carry loss.
        train_on: Every answer of a conversation, or the last one.
        overflow: What becomes of longer rows.
        split: By a hash of the question, by shuffling, as the sources are divided, or as other data is; auto is as the
            sources are divided where they are, and else by hash.
        test_split_size: Rows for testing: below 1 their share, else (shuffle) their number; 0 for none, None for the
            usual share.
        seed: Of the split.
        near_duplicates: Rows up to which near-duplicates are looked for; 0 for not at all.
        thoughts: What becomes of the thoughts of answers.
        typed_ends: Whether an answer keeps a spelled control token that it ends in, as text.
        rendered: Texts hold control tokens, spelled.
        test_limit: Largest share of the rows that a number of rows for testing may come to.
    """

    max_seq_length: int
    mask_inputs: bool
    train_on: TrainOn
    overflow: Overflow
    split: SplitRule
    test_split_size: float | None
    seed: int
    near_duplicates: int = NEAR_DUPLICATES
    thoughts: ThoughtsRule = "template"
    typed_ends: TypedEnds = "keep"
    rendered: bool = False
    test_limit: float = 1.0

    @property
    def tests(self) -> bool:
        """Whether there are to be rows for testing."""
        return self.split in ("given", "from") or self.test_split_size != 0

    @property
    def share(self) -> float:
        """The size of the test split, as a share or a number."""
        return SHARE if self.test_split_size is None else self.test_split_size


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
    made_of: Mapping[str, Any] | None = None,
    members: Members | None = None,
    shards: Shards | None = None,
    plan: Mapping[str, int] | None = None,
    commands: Sequence[str] = (),
    remarks: Sequence[str] = (),
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
        made_of: What that key stands for, each thing by its name.
        members: Which rows are for testing, where the split is "from" other data.
        shards: Encoded rows; without them all rows are encoded here.
        plan: For the report: batch_size and micro_batch_tokens to count steps with.
        commands: For the report: what made this folder.
        remarks: What has to be said of the split.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or a split without rows.
    """
    encoder = new_encoder(tokenizer, style, rules, on_error)
    made = publish(destination, META_FILE, replace=True)
    with rare_collections(), made as folder, _Work(folder, rules, members) as work:
        blocks = read_blocks(reader)
        for block, encoded in shards.encoded(blocks) if shards else encode_blocks(blocks, encoder):
            work.add(block, encoded)
        work.finish(reader.rows)
        findings = work.findings.result(work.text_of)
        leaked = findings["leakage"]
        meta = {
            "format": FORMAT,
            "key": key,
            "made_of": dict(made_of or {}),
            "source": {"file": _name(reader.files), "files": reader.files, "rows": reader.rows},
            "schemas": dict(reader.schemas),
            "fields": reader.log.meta(),
            "tokenizer": identity(tokenizer) | {"path": str(tokenizer_path)},
            "prompt_style": style.name,
            **asdict(rules),
            "kept": reader.rows - work.losses.dropped_rows,
            **work.losses.meta(),
            "in_parts": work.parts,
            "notes": {what: asdict(tally) for what, tally in work.notes.items()},
            "remarks": [*reader.remarks, *remarks, *work.remarks],
            "turns_cut": reader.cut_turns,
            "splits": {name: dict(counts) for name, counts in work.sides.counts.items()},
            "near_duplicates_checked": findings["near_duplicates_checked"],
            "test_rows_also_in_train": sum(leaked[kind]["rows"] for kind in ("exact", "normalised")),
        }
        if members:
            meta["split_from"] = members.meta()
        (folder / TEMPLATE_FILE).write_text(style.jinja(bos=begins(tokenizer, style)), "utf-8")
        lengths = work.findings.lengths_of("train")
        plan = dict(plan or {}) | ({"batch_size": min(plan["batch_size"], len(lengths))} if plan else {})
        steps = step_plan(lengths, seed=rules.seed, **plan) if plan else None
        samples = work.shown(tokenizer)
        write_report(folder, meta, findings, samples, name=destination.name, plan=steps, commands=commands)
        meta["files"] = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        write_json(folder / META_FILE, meta)
    return meta


def new_encoder(tokenizer: Tokenizer, style: PromptStyle, rules: Rules, on_error: OnError) -> Encoder:
    """What makes samples by these rules."""
    return Encoder(
        tokenizer,
        style,
        max_seq_length=rules.max_seq_length,
        mask_inputs=rules.mask_inputs,
        train_on=rules.train_on,
        overflow=rules.overflow,
        on_error=on_error,
        thoughts=rules.thoughts,
        spelled=rules.rendered,
        typed_ends=rules.typed_ends,
    )


class _Work:
    """The contents of a data folder in the making."""

    def __init__(self, folder: Path, rules: Rules, members: Members | None) -> None:
        self._rules, self._folder, self._members = rules, folder, members
        self._drawn = rules.split == "shuffle"
        self.sides = Sides(folder, drawn=self._drawn)
        self.findings = Findings(near_duplicates=rules.near_duplicates)
        self.losses = Losses(folder)
        self.parts = 0
        self.notes: dict[str, Tally] = {}
        self.remarks: list[str] = []
        self._rows = array("q")  # of each sample, by its number of arrival
        self._texts = Texts(folder)  # of each sample, by its number of arrival
        self._test = (folder / TEST_FILE).open("w", encoding="utf-8")
        self._keys = (folder / TEST_KEYS_FILE).open("w", encoding="ascii")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for file in (self.losses, self._test, self._keys):
            file.close()

    def add(self, block: Block, encoded: Encoded) -> None:
        """Take in some rows and the samples that they came to."""
        whole = {conversation.row: conversation for conversation in block.conversations}
        self.losses.add([*block.dropped, *encoded.dropped], [whole[row] for row in encoded.cut])
        self.parts += len(encoded.parts)
        for what, rows_of_it in encoded.notes.items():
            for number in rows_of_it:
                self.notes.setdefault(what, Tally()).add(whole[number].where)
        side_of = {row: self._side(conversation) for row, conversation in whole.items()}  # all parts on one
        if self._members:
            self._members.lost += sum(side_of[row.row] == "test" for row in encoded.dropped)
        rows = [conversation.row for conversation in encoded.conversations]
        sides = [side_of[row] for row in rows]
        self.sides.add(encoded.batch, rows, sides)
        self._rows.extend(rows)
        lengths, trained = encoded.batch.lengths.tolist(), trained_tokens(encoded.batch).tolist()
        for conversation, side, tokens, learned in zip(encoded.conversations, sides, lengths, trained, strict=True):
            messages, row = conversation.messages, whole[conversation.row]
            self.findings.add(len(self._texts), conversation.where, side, *words(messages), tokens, learned)
            opened = None if conversation is row else opening(row.messages)  # a row that was cut may open otherwise
            self._texts.add((messages, conversation.tools, opened))
            if side == "test":
                self._hold_out(messages, conversation.tools, opened)

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
        if self._members:
            return self._members.side(conversation)
        return hash_side(opening(conversation.messages), self._rules.share, self._rules.seed)

    def _hold_out(self, messages: Sequence[Message], tools: Tools, opened: str | None) -> None:
        self._test.write(json.dumps(raw_row(messages, tools), ensure_ascii=False) + "\n")
        self._keys.write(opening_key(opening(messages) if opened is None else opened) + "\n")

    def finish(self, rows: int) -> None:
        """Deal what is not dealt yet.

        Args:
            rows: Raw rows, those that were dropped among them.

        Raises:
            DataError: A split has no rows, or not all of the rows that were to be for testing are there.
        """
        if self._members:
            self._members.check()
        if self._drawn:
            self._deal(rows)
        elif self._rules.split == "hash" and self._rules.tests:
            self._balance()
        self._close()
        for name, counts in self.sides.counts.items():
            if not counts.samples and (name == "train" or self._rules.tests):
                raise self._nothing(name, rows)
        self.sides.close()

    def _deal(self, rows: int) -> None:
        """Shuffle all rows into both splits."""
        size, remark = held_rows(rows, self._rules.share, self._rules.test_limit)
        drawn, moved = usable(shuffle_split(rows, size, self._rules.seed), self._rows)
        self.remarks += filter(None, (remark, moved))
        self._assign(self.sides.deal(dict(zip(SPLITS, drawn, strict=True))))

    def _balance(self) -> None:
        """Give both splits samples where the hash gave one of them none."""
        counts, share = {name: counts.samples for name, counts in self.sides.counts.items()}, self._rules.share
        if all(counts.values()):
            self.remarks += filter(None, [far_from(share, counts)])
        elif any(counts.values()) and (found := side_few(self._rows, self._said, share, self._rules.seed)):
            self.remarks.append(found.remark)
            for file in (self._test, self._keys):
                file.seek(0)
                file.truncate()
            self._assign(self.sides.divide(found.test))

    def _assign(self, samples: Mapping[str, npt.NDArray[np.int64]]) -> None:
        for name, numbers in samples.items():
            self.findings.assign(name, numbers)
            for number in numbers if name == "test" else ():
                self._hold_out(*self._texts[number])

    def _said(self, number: int) -> tuple[str, str, str]:
        """What the row of a sample opens with, and the words of the sample."""
        messages, *_, opened = self._texts[number]
        return (opening(messages) if opened is None else opened), *words(messages)

    def _nothing(self, name: str, rows: int) -> DataError:
        """The error for a split without samples."""
        dropped = self.losses.dropped.items()
        lost = ", ".join(f"{tally.rows} {reason}" for reason, tally in dropped) or "none dropped"
        kept = len(set(self._rows))
        if len(self.losses.too_long) > rows / 2:
            hint = f"; {keep_long_rows(self.losses.meta()['too_long'], self._rules.max_seq_length)}"
        elif kept and self._rules.split in ("hash", "shuffle"):
            what = "there is one usable row" if kept == 1 else f"the {kept} usable rows are all the same"
            hint = f"; {what}, which cannot be for training and for testing both: --test_split_size 0 trains on all"
        else:
            hint = ""
        return DataError(f"no row of the {name} split is usable: of {rows} rows {lost}{hint}")

    def text_of(self, number: int) -> tuple[str, str]:
        """Prompt and answer of a sample."""
        return words(self._texts[number][0])

    def shown(self, tokenizer: Tokenizer) -> list[ShownSample]:
        """The first samples of each split, and the longest."""
        shown = []
        for name, wanted in (("train", 6), ("test", 2)):
            for row, (ids, labels) in self.sides.counts[name].shown(wanted).items():
                where = f"{name} {row}"
                shown.append(shown_sample(tokenizer, ids.tolist(), labels.tolist(), row=row, where=where, split=name))
        return shown


def words(messages: Sequence[Message]) -> tuple[str, str]:
    """Everything before the last answer, and that answer."""
    *before, last = messages
    return "\n".join(part for message in before for part in _said(message)), "\n".join(_said(last))


def _said(message: Message) -> list[str]:
    """All that is in a message, calls as JSON."""
    parts = [message.get(key, "") for key in ("reasoning_content", "content", "input")]
    parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return [part for part in parts if part]


def raw_row(messages: Sequence[Message], tools: Tools = ()) -> dict[str, Any]:
    """A row as generate/instruct.py reads it: Alpaca's fields for a question and its answer, else all turns."""
    roles = [message["role"] for message in messages]
    if roles == ["assistant"]:
        return {"text": messages[0]["content"]}
    more = tools or any(message.keys() - {"role", "content", "input"} for message in messages)
    if more or roles != ["user", "assistant"]:
        return {"messages": list(messages)} | ({"tools": list(tools)} if tools else {})
    question, answer = messages
    return {"instruction": question["content"], "input": question.get("input", ""), "output": answer["content"]}


def _name(files: Sequence[Mapping[str, Any]]) -> str:
    return files[0]["path"] if len(files) == 1 else f"{len(files)} files"
