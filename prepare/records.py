"""Prepare any instruction, chat or text data for fine-tuning.

python prepare/records.py --source chats.jsonl --destination_path data/chats --tokenizer_path checkpoints/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.text.prompts import StyleName


def main(
    *,
    source: str | list[str],
    destination_path: Path,
    tokenizer_path: Path,
    prompt_style: StyleName | Literal["chat_template"] | None = None,
    max_seq_length: int = 2048,
    mask_inputs: bool = True,
    train_on: Literal["all", "last"] = "all",
    thoughts: Literal["template", "keep", "drop"] = "template",
    typed_ends: Literal["keep", "strip"] = "keep",
    rendered: bool = False,
    overflow: Literal["drop", "truncate_prompt", "truncate_response", "split", "error"] = "drop",
    split: Literal["auto", "hash", "shuffle", "given"] = "auto",
    test_split_size: float | None = None,
    seed: int = 42,
    split_from: Path | None = None,
    near_duplicates: int = 200_000,
    fields: dict[str, str] | None = None,
    ignore_fields: list[str] | None = None,
    as_text: bool = False,
    weights: list[float] | None = None,
    tree: Literal["best", "all"] = "best",
    on_error: Literal["stop", "skip"] = "stop",
    encoding: str | None = None,
    quoting: Literal["double", "none"] = "double",
    escape: str | None = None,
    shard: str | None = None,
    shards: str | list[str] | None = None,
) -> None:
    """Read, render, tokenize, mask and split; writes train and test, a report and the prompt style.

    Args:
        source: Files (JSON, JSONL, CSV, TSV, Parquet, each also .gz or .zst; workbooks as book.xlsx or
            book.xlsx#SHEET), folders, patterns, folders of the datasets library, or data sets of the Hub; several as
            a.jsonl b.csv; see docs/files.md. The schema of every row is recognised: Alpaca, prompt/completion, Dolly,
            OpenAI messages, ShareGPT, OASST trees, plain text; see docs/data.md.
        destination_path: Folder to make, such as data/NAME.
        tokenizer_path: The model folder, a tokenizer.json or a tokenizer.model.
        prompt_style: How a conversation is put to the model; chat_template is the model's own, which is taken where
            none is named, or alpaca where the model folder has none; see docs/prompts.md.
        max_seq_length: Most tokens of a sample.
        mask_inputs: Train on answers only, not on prompts.
        train_on: Every answer of a conversation, or the last one.
        thoughts: What becomes of thoughts before answers (<think>...</think>, reasoning_content): the chat template
            decides, each answer is trained with its own, or none is.
        typed_ends: An answer that ends in a spelled control token such as </s> keeps it as text, or loses it.
        rendered: Rows of plain text hold control tokens, spelled: they were rendered for this model before.
        overflow: What becomes of a longer row: dropped, losing the oldest turns and the beginning of its question,
            losing the end of its answer, cut into several samples between turns, or an error.
        split: By a hash of the question (rows that ask the same stand on one side, and no row moves when others are
            added), by shuffling as lit-llama did, or as the sources are divided by their names, as train.jsonl and
            test.jsonl are (given). auto is given where the sources are divided, and else hash.
        test_split_size: Rows held out for testing: their share, or with --split shuffle their number; 0.05 if it is not
            given, 0 trains on all rows.
        seed: Of the split and of mixing.
        split_from: A data folder, or a file like those of --source: rows that open with a test question of it (but for
            case and white space) are for testing, all others for training, in place of --split.
        near_duplicates: Rows up to which nearly equal ones are looked for, at 1.7 kB of memory each; 0 for not at all.
        fields: Our names of fields and those in the data, as instruction=question,output=answer; a field that holds
            something for the model and has no place stops the command, others without one are counted and named.
        ignore_fields: Fields of rows and of messages to be left out, as context,tools.
        as_text: Numbers, lists and objects where a text belongs become JSON text.
        weights: For several sources, how often a row is drawn from each, as 1,0.5.
        tree: Of a tree of messages, the best path or every one.
        on_error: A row that cannot be used stops the command, or is dropped with its reason.
        encoding: Of files that are not UTF-8, such as cp1252.
        quoting: Of CSV: quotes around a field are no part of it and doubled inside, or (none) part of the text.
        escape: Of CSV: the character before a quote inside a field, where it is not doubled, such as a backslash.
        shard: Encode one part of the rows only, such as 0/3, 1/3 or 2/3, into a folder of its own.
        shards: The folders, or a pattern, of all these parts: put them together, as if all had been encoded here.
    """
    from lit_llama.text.prepare import Rules
    from lit_llama.text.read.files import Dialect
    from lit_llama.text.records import prepare_records
    from lit_llama.train.config import CPU_TOKENS, TrainConfig

    rules = Rules(
        max_seq_length=max_seq_length,
        mask_inputs=mask_inputs,
        train_on=train_on,
        thoughts=thoughts,
        typed_ends=typed_ends,
        rendered=rendered,
        overflow=overflow,
        split=split,
        test_split_size=test_split_size,
        seed=seed,
        near_duplicates=near_duplicates,
    )
    prepare_records(
        source,
        destination_path,
        tokenizer_path=tokenizer_path,
        prompt_style=prompt_style,
        rules=rules,
        fields=fields or {},
        ignore_fields=ignore_fields or (),
        as_text=as_text,
        on_error=on_error,
        tree=tree,
        weights=weights,
        dialect=Dialect(encoding, quoting, escape),
        split_from=split_from,
        shard=shard,
        shards=shards,
        plan={"batch_size": TrainConfig.batch_size, "micro_batch_tokens": CPU_TOKENS},
    )


if __name__ == "__main__":
    CLI(main)
