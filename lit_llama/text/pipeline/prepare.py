"""From raw rows to a data folder: read, encode, split, write, account for every row, and say what is in it."""

import json
import marshal
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lit_llama.errors import DataError
from lit_llama.folder.publish import publish, write_json
from lit_llama.text.config import PrepareConfig
from lit_llama.text.dataset.batches import step_plan
from lit_llama.text.dataset.folder import FORMAT, META_FILE, SPLITS, TEST_FILE, TEST_KEYS_FILE
from lit_llama.text.dataset.held_out import HeldOut, opening, opening_key
from lit_llama.text.dataset.pairs import one_answer
from lit_llama.text.dataset.split import Choice, far_from, hash_side, held_rows, shuffle_split, side_few, usable
from lit_llama.text.dataset.writer import Sides, SplitWriter, trained_tokens
from lit_llama.text.inspect.findings import Findings
from lit_llama.text.inspect.report import write_report
from lit_llama.text.inspect.show import ShownSample, shown_sample
from lit_llama.text.message import Conversation, Message, Preference
from lit_llama.text.pipeline.encoder import Encoded
from lit_llama.text.pipeline.executors.blocks import Block, Executor, rare_collections, read_blocks
from lit_llama.text.pipeline.pairs import Judgements, PairWriter, Verdict, raw_preference
from lit_llama.text.pipeline.reject_log import RejectLog, Tally, keep_long_rows
from lit_llama.text.prompts.encode import TEMPLATE_FILE, begins
from lit_llama.text.prompts.styles import PromptStyle
from lit_llama.text.read.reading import Reader
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.vocabulary import identity
from lit_llama.wording import param


class Texts:
    """Values by number, in the order in which they were added; gone with the object.

    Args:
        folder: Whose disk holds them.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        self._starts = array("q")
        self._end = 0
        self._at_end = True

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, value: Any) -> None:
        """Put something aside: texts, numbers, lists and objects."""
        if not self._at_end:
            self._file.seek(self._end)
            self._at_end = True
        self._starts.append(self._end)
        self._end += self._file.write(marshal.dumps(value))  # quick, and nobody else ever reads the file

    def __getitem__(self, number: int) -> Any:
        self._at_end = False
        self._file.seek(self._starts[number])
        return marshal.load(self._file)


Tools = Sequence[Mapping[str, Any]]


def prepare(
    reader: Reader,
    *,
    config: PrepareConfig,
    choice: Choice,
    executor: Executor,
    tokenizer: Tokenizer,
    style: PromptStyle,
    key: str = "",
    made_of: Mapping[str, Any] | None = None,
    members: HeldOut | None = None,
    plan: Mapping[str, int] | None = None,
    commands: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the data folder `config.destination_path`, or replace it; other files in it stay.

    Args:
        reader: The raw rows.
        config: How rows become samples.
        choice: How they are divided into train and test.
        executor: Encodes the rows.
        tokenizer: Of the model to be tuned.
        style: How conversations are rendered.
        key: Identity of everything that decides the contents.
        made_of: What that key stands for, each thing by its name.
        members: Which rows are for testing, where the split is "from" other data.
        plan: For the report: batch_size and micro_batch_tokens to count steps with.
        commands: For the report: what made this folder.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or a split without rows.
    """
    pairs = config.data_kind == "preference"
    destination = config.destination_path
    made = publish(destination, META_FILE, replace=True)
    with rare_collections(), made as folder, _Work(folder, config, choice, members) as work:
        for block, encoded in executor.encode(read_blocks(reader)):
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
            "tokenizer": identity(tokenizer) | {"path": str(config.tokenizer_path)},
            "prompt_style": style.name,
            **config.rules(),
            **choice.rules(),
            **(work.judged.meta() if pairs else {}),
            "kept": reader.rows - work.rejected.dropped_rows,
            **work.rejected.meta(),
            "in_parts": work.parts,
            "notes": {what: asdict(tally) for what, tally in work.notes.items()},
            "remarks": [*reader.remarks, *choice.remarks, *work.remarks],
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
        steps = step_plan(lengths, seed=config.seed, **plan) if plan else None
        samples = work.shown(tokenizer)
        write_report(folder, meta, findings, samples, name=destination.name, plan=steps, commands=commands)
        meta["files"] = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        write_json(folder / META_FILE, meta)
    return meta


class _Work:
    """The contents of a data folder in the making."""

    def __init__(self, folder: Path, config: PrepareConfig, choice: Choice, members: HeldOut | None) -> None:
        self._config, self._choice, self._members = config, choice, members
        self._drawn = choice.split == "shuffle"
        self.judged = Judgements()
        writer = PairWriter if config.data_kind == "preference" else SplitWriter
        self.sides = Sides(folder, drawn=self._drawn, writer=writer)
        self.findings = Findings(near_duplicates=config.near_duplicates)
        self.rejected = RejectLog(folder)
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
        for file in (self.rejected, self._test, self._keys):
            file.close()

    def add(self, block: Block, encoded: Encoded) -> None:
        """Take in some rows and the samples that they came to."""
        whole = {conversation.row: conversation for conversation in block.conversations}
        self.rejected.add([*block.dropped, *encoded.dropped], [whole[row] for row in encoded.cut])
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
            verdict = self.judged.add(conversation) if isinstance(conversation, Preference) else None
            self._texts.add((messages, conversation.tools, opened, verdict))
            if side == "test":
                self._hold_out(messages, conversation.tools, opened, verdict)

    def _side(self, conversation: Conversation) -> str:
        if self._choice.split == "given":
            if conversation.split is None:
                raise DataError(
                    f"{conversation.where}: {param('split', 'given')}, but the sources do not say whether this row is "
                    "for training "
                    "or for testing (by names such as train.jsonl and test.jsonl, or splits of a data set)"
                )
            return "train" if conversation.split == "train" else "test"
        if self._drawn:
            return ""
        if self._members:
            return self._members.side(conversation)
        return hash_side(opening(conversation.messages), self._choice.test_split_size, self._config.seed)

    def _hold_out(self, messages: Sequence[Message], tools: Tools, opened: str | None, verdict: Verdict | None) -> None:
        row = raw_row(messages, tools) if verdict is None else raw_preference(messages, tools, verdict)
        self._test.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._keys.write(opening_key(opening(messages) if opened is None else opened) + "\n")

    def finish(self, rows: int) -> None:
        """Deal what is not dealt yet.

        Args:
            rows: Raw rows, those that were dropped among them.

        Raises:
            DataError: A split has no rows, or not all of the rows that were to be for testing are there.
        """
        self.judged.check()
        if self._members:
            self._members.check()
        if self._drawn:
            self._deal(rows)
        elif self._choice.split == "hash" and self._choice.tests:
            self._balance()
        self._close()
        for name, counts in self.sides.counts.items():
            if not counts.samples and (name == "train" or self._choice.tests):
                raise self._nothing(name, rows)
        self.sides.close()

    def _deal(self, rows: int) -> None:
        """Shuffle all rows into both splits."""
        size, remark = held_rows(rows, self._choice.test_split_size, self._config.test_limit)
        drawn, moved = usable(shuffle_split(rows, size, self._config.seed), self._rows)
        self.remarks += filter(None, (remark, moved))
        self._assign(self.sides.deal(dict(zip(SPLITS, drawn, strict=True))))

    def _balance(self) -> None:
        """Give both splits samples where the hash gave one of them none."""
        counts, share = (
            {name: counts.samples for name, counts in self.sides.counts.items()},
            self._choice.test_split_size,
        )
        if all(counts.values()):
            self.remarks += filter(None, [far_from(share, counts)])
        elif any(counts.values()) and (found := side_few(self._rows, self._said, share, self._config.seed)):
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
        messages, _, opened, _ = self._texts[number]
        return (opening(messages) if opened is None else opened), *words(messages)

    def _nothing(self, name: str, rows: int) -> DataError:
        """The error for a split without samples."""
        dropped = self.rejected.dropped.items()
        lost = ", ".join(f"{tally.rows} {reason}" for reason, tally in dropped) or "none dropped"
        kept = len(set(self._rows))
        if len(self.rejected.too_long) > rows / 2:
            hint = f"; {keep_long_rows(self.rejected.meta()['too_long'], self._config.max_seq_length)}"
        elif kept and self._choice.split in ("hash", "shuffle"):
            what = "there is one usable row" if kept == 1 else f"the {kept} usable rows are all the same"
            hint = (
                f"; {what}, which cannot be for training and for testing both: {param('test_split_size', 0)} trains "
                "on all"
            )
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
                ids, labels = one_answer(ids, labels) if self._config.data_kind == "preference" else (ids, labels)
                shown.append(shown_sample(tokenizer, ids.tolist(), labels.tolist(), row=row, where=where, split=name))
        return shown


def words(messages: Sequence[Message]) -> tuple[str, str]:
    """Return everything before the last answer, and that answer."""
    *before, last = messages
    return "\n".join(part for message in before for part in _said(message)), "\n".join(_said(last))


def _said(message: Message) -> list[str]:
    """All that is in a message, calls as JSON."""
    parts = [message.get(key, "") for key in ("reasoning_content", "content", "input")]
    parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return [part for part in parts if part]


def raw_row(messages: Sequence[Message], tools: Tools = ()) -> dict[str, Any]:
    """Write a row as it is read to be answered: Alpaca's fields for a question and its answer, else all turns."""
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
